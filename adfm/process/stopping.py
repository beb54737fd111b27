"""SIGTERM handling (preemption): stages stop as on Ctrl-C; training finishes the current step and checkpoints."""

from __future__ import annotations

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
    """Raise `Terminated` on SIGTERM in the body. A process forked from this one exits immediately."""
    here = os.getpid()

    def terminate(*_: object) -> None:
        if os.getpid() != here:
            os._exit(143)
        raise Terminated

    with _handler(terminate), _redelivered():
        yield


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block SIGINT and SIGTERM in processes started in the body; the process that started them shuts them down."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _redelivered() -> Iterator[None]:
    """Send an interrupt again if Python dropped it: one raised in a finalizer, or a callback of an import or a fork."""

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            before(dropped)
            return
        number = signal.SIGTERM if issubclass(dropped.exc_type, Terminated) else signal.SIGINT
        timer = threading.Timer(0.05, os.kill, (os.getpid(), number))  # after the finalizer has returned
        timer.daemon = True
        timer.start()

    before = sys.unraisablehook
    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


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
