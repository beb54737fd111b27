"""Progress bars with a label, a unit and an estimate; in logs, a line a minute."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

_LINES_EVERY = 60.0  # seconds, where the output is a file or a pod's log


def bar(iterable: Iterable[Any] | None = None, *, desc: str, unit: str, **options: Any) -> Any:
    """Return a `tqdm` bar on stderr. Where that is not a terminal, it prints a line a minute, and none before.

    Args:
        iterable: Counted by its items; without it, call `update`.
        desc: Label, such as `cold start`, `write shards`.
        unit: Name of one item.
        options: As of `tqdm`; the end is estimated from `total` or the iterable's length.
    """
    if not sys.stderr.isatty():
        options |= {"file": _Lines(sys.stderr), "delay": _LINES_EVERY}
    interval = 1.0 if sys.stderr.isatty() else _LINES_EVERY
    return tqdm(iterable, desc=desc, unit=unit, mininterval=interval, maxinterval=max(interval, 10.0), **options)


class _Lines:
    """A stream on which every state of a bar is a line of its own."""

    # A log does not interpret the carriage return by which a bar overwrites itself.
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if line := text.strip():
            self._stream.write(line + "\n")
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
