"""SIGTERM handling (preemption): stages stop as on Ctrl-C; training finishes the current step and checkpoints."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from adfm.errors import AdfmError


class Terminated(KeyboardInterrupt):
    """SIGTERM was received. What cleans up after a keyboard interrupt cleans up after this."""


class Stopped(AdfmError):
    """Work stopped on SIGTERM and kept its progress: the same command resumes it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


@contextmanager
def handle_sigterm() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM in the body. A process forked from this one exits immediately."""
    here = os.getpid()

    def terminate(*_: object) -> None:
        if os.getpid() != here:
            os._exit(143)  # 128 + SIGTERM, as shells report it
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
    """Send an interrupt again if Python dropped it."""

    # Python reports an exception of a finalizer, or of a callback of an import or a fork, to this hook and continues.
    def hook(dropped: "sys.UnraisableHookArgs") -> None:
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
def defer_sigterm(what: str, then: Callable[[], object] | None = None) -> Iterator[threading.Event]:
    """Yield an event that the first SIGTERM in the body sets; a second SIGTERM is handled as before the body.

    Args:
        what: What happens on the first one, for its message.
        then: Called on the first one.
    """
    received = threading.Event()

    def notice(*_: object) -> None:
        signal.signal(signal.SIGTERM, before)
        received.set()
        if then:
            then()
        print(f"\nSIGTERM: {what}; a second one ends it at once", file=sys.stderr, flush=True)

    before = signal.getsignal(signal.SIGTERM)
    with _handler(notice):
        yield received


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
