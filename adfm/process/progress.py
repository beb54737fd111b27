"""Progress bars with a label, a unit and an estimate; in logs, a line a minute."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from adfm.text import EditedStream

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
        # A log does not interpret the carriage return by which a bar overwrites itself: each state is a line.
        lines = EditedStream(sys.stderr, lambda text: f"{text.strip()}\n" if text.strip() else "")
        options |= {"file": lines, "delay": _LINES_EVERY}
    interval = 1.0 if sys.stderr.isatty() else _LINES_EVERY
    return tqdm(iterable, desc=desc, unit=unit, mininterval=interval, maxinterval=max(interval, 10.0), **options)
