import os
import signal
import sys
import time

import pytest

from adfm.process.stopping import Terminated, handle_sigterm


class Finalized:
    """Something that a signal comes to while it is thrown away."""

    def __init__(self, number: signal.Signals) -> None:
        self._number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self._number)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_an_interrupt_that_comes_in_a_finalizer_is_not_lost(
    number: signal.Signals, raised: type[BaseException]
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored
    try:
        with pytest.raises(KeyboardInterrupt) as caught, handle_sigterm():
            Finalized(number)
            time.sleep(60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught.type is raised


def test_other_errors_of_finalizers_are_reported_as_always(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __del__(self) -> None:
            raise ValueError

    reported: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: reported.append(dropped.exc_type))
    with handle_sigterm():
        Broken()
    assert reported == [ValueError]
