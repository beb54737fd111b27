"""Exceptions whose messages are for users."""


class AdfmError(Exception):
    """An error that the user can fix: the message says what is wrong, where (file, record, key), and what to do."""

    exit_code = 1  # of the command line, which prints the message without a traceback


class Unreachable(AdfmError):
    """A server or the network did not answer, or is temporarily unavailable: the same may work in a minute."""


class Unusable(AdfmError):
    """Input, a signature or a permission that cannot be used as it is; the exit code is that of wrong usage."""

    exit_code = 2
