"""Ctrl-C for the processes that tests start."""

from __future__ import annotations

import signal


def heed_sigint() -> None:
    """Restore what SIGINT does, as `preexec_fn`: a shell's background job, which pytest may be in, ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
