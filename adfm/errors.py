"""The one exception that people are meant to read."""


class AdfmError(Exception):
    """Something the user can mend.

    The message says what is wrong, where (file, record, key), and what to do. The command line prints it without a
    traceback and exits with `exit_code`.
    """

    exit_code = 1


class Unreachable(AdfmError):
    """A server or the network did not answer, or answered that it cannot now: the same may work in a minute."""


class Unusable(AdfmError):
    """Input, a signature or a permission that cannot be used as it is; the exit code is that of wrong usage."""

    exit_code = 2
