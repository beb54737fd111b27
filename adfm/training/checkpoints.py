"""Checkpoints that are whole: written beside, renamed when all of it is on the disk, removed the same way.

A folder `checkpoint-<step>` is therefore never half of one, whenever the process or its machine dies.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PREFIX = "checkpoint-"


def partial(work: Path) -> Path:
    """Where the checkpoints of the folder `work` are written, and where those that are removed go first."""
    return work / "partial"


def publish(work: Path, window: int | None) -> None:
    """Rename what was written to `partial(work)`, and remove what is not needed any more.

    Args:
        work: Folder of the checkpoints.
        window: So many steps a trouble lasts before it is told; kept are the newest from before them, the oldest from
            within, which will be that one in time, and the newest two. `None`: all are kept.
    """
    for written in partial(work).glob(f"{_PREFIX}*"):
        for file in [path for path in written.rglob("*") if path.is_file()] + [written]:
            _sync(file)
        remove(work / written.name)
        written.rename(work / written.name)
    _sync(work)
    found = every(work)
    if window is None or not found:
        return
    before = [step for step in found if step < found[-1] - window]
    for step in set(found) - {*before[-1:], *found[len(before) :][:1], *found[-2:]}:
        remove(work / f"{_PREFIX}{step}")


def last(work: Path) -> Path | None:
    """The newest checkpoint, after what a killed process had half written or half removed is gone."""
    if partial(work).is_dir():
        if any(partial(work).glob(f"{_PREFIX}*")):
            print(f"{partial(work)}: an unfinished checkpoint is removed")
        shutil.rmtree(partial(work))
    found = every(work)
    return work / f"{_PREFIX}{found[-1]}" if found else None


def drop_after(work: Path, step: int) -> Path | None:
    """Remove the checkpoints of later steps; the newest that is left."""
    for later in every(work):
        if later > step:
            remove(work / f"{_PREFIX}{later}")
    return last(work)


def every(work: Path) -> list[int]:
    """The steps of which there are checkpoints, in order."""
    return sorted(int(folder.name.removeprefix(_PREFIX)) for folder in work.glob(f"{_PREFIX}*"))


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, if it is there, so that no half of it is ever taken for one."""
    if checkpoint.exists():
        going = partial(checkpoint.parent) / f"removed-{checkpoint.name}"
        going.parent.mkdir(exist_ok=True)
        shutil.rmtree(going, ignore_errors=True)
        checkpoint.rename(going)
        shutil.rmtree(going)


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two nested mappings: `key (value, now value)`, or the key alone if the values are long."""
    found = []
    for key in dict.fromkeys([*one, *other]):
        before, now = one.get(key), other.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            found += differences(before, now, f"{prefix}{key}.")
        elif before != now:
            values = f" ({before}, now {now})"
            found.append(f"{prefix}{key}" + (values if len(values) < 60 else ""))
    return found


def _sync(path: Path) -> None:
    """Has the disk hold what was written, so that a machine that dies does not leave an empty file under its name."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
