"""Progress bars: what is done, how much of it, and when it will be finished."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

_LINES_EVERY = 60.0  # seconds, where the output is a file or a pod's log


def bar(iterable: Iterable[Any] | None = None, *, desc: str, unit: str, **options: Any) -> Any:
    """A `tqdm` bar on stderr. Where that is not a terminal, a line a minute, and none for what takes less.

    Args:
        iterable: What to count the items of; without it, call `update`.
        desc: What is being done: `cold start`, `write shards`.
        unit: What is counted, in the singular.
        options: As of `tqdm`. Without `total` (or an iterable with a length) there is no estimate of the end.
    """
    if not sys.stderr.isatty():
        options |= {"file": _Lines(sys.stderr), "delay": _LINES_EVERY}
    interval = 1.0 if sys.stderr.isatty() else _LINES_EVERY
    return tqdm(iterable, desc=desc, unit=unit, mininterval=interval, maxinterval=max(interval, 10.0), **options)


class _Lines:
    """A stream on which every state of a bar is a line of its own: a log has no carriage returns to overwrite one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if line := text.strip():
            self._stream.write(line + "\n")
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
