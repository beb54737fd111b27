"""SIGTERM, by which a scheduler takes a machine back: work ends as by Ctrl-C, a training after the step under way."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from adfm.errors import AdfmError


class Terminated(KeyboardInterrupt):
    """SIGTERM has come. Whatever cleans up after a keyboard interrupt cleans up after this."""


class Stopped(AdfmError):
    """Work was told to stop and kept what it had: the same command goes on. The exit status is EX_TEMPFAIL."""

    exit_code = 75


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated` in the body, after it is passed on to the processes of a pool; there it ends them."""
    here = os.getpid()

    def terminate(*_: object) -> None:
        if os.getpid() != here:
            os._exit(143)
        for child in multiprocessing.active_children():
            child.terminate()
        raise Terminated

    with _handler(terminate):
        yield


@contextmanager
def noticed(what: str, then: Callable[[], object] | None = None) -> Iterator[threading.Event]:
    """The first SIGTERM in the body sets the event and says `what` happens now; a second does what it did before.

    Args:
        what: To say.
        then: What else to do.
    """
    asked = threading.Event()

    def notice(*_: object) -> None:
        signal.signal(signal.SIGTERM, before)
        asked.set()
        if then:
            then()
        print(f"\nSIGTERM: {what}; a second one ends it at once", file=sys.stderr, flush=True)

    before = signal.getsignal(signal.SIGTERM)
    with _handler(notice):
        yield asked


@contextmanager
def _handler(handle: Callable[..., Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
