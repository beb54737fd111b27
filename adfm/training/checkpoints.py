"""Atomic checkpoints: a folder `checkpoint-<step>` is complete, whenever the process or its machine dies."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PREFIX = "checkpoint-"


def partial(work: Path) -> Path:
    """Return the folder where checkpoints are written, and where they are moved before they are removed."""
    return work / "partial"


def publish(work: Path, window: int | None) -> None:
    """Move checkpoints from `partial(work)` to `work`, and remove those that are no longer needed.

    `window` are the steps for which a problem lasts before a health check reports it; `None` keeps all checkpoints.
    """
    for written in partial(work).glob(f"{_PREFIX}*"):
        for file in [path for path in written.rglob("*") if path.is_file()] + [written]:
            _sync(file)
        remove(work / written.name)
        written.rename(work / written.name)
    _sync(work)
    steps = every(work)
    if window is None or not steps:
        return
    before = [step for step in steps if step < steps[-1] - window]
    # Kept are the newest from before the window, to resume from when a check fails; its successor; the newest two.
    for step in set(steps) - {*before[-1:], *steps[len(before) :][:1], *steps[-2:]}:
        remove(work / f"{_PREFIX}{step}")


def last(work: Path) -> Path | None:
    """Return the newest checkpoint; remove what a killed process had half written or half removed."""
    if partial(work).is_dir():
        if any(partial(work).glob(f"{_PREFIX}*")):
            print(f"{partial(work)}: an unfinished checkpoint is removed")
        shutil.rmtree(partial(work))
    steps = every(work)
    return work / f"{_PREFIX}{steps[-1]}" if steps else None


def drop_after(work: Path, step: int) -> Path | None:
    """Remove the checkpoints of later steps; return the newest that is left."""
    for later in every(work):
        if later > step:
            remove(work / f"{_PREFIX}{later}")
    return last(work)


def every(work: Path) -> list[int]:
    """Return the steps of the checkpoints, in order."""
    return sorted(int(folder.name.removeprefix(_PREFIX)) for folder in work.glob(f"{_PREFIX}*"))


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, if it exists."""
    if checkpoint.exists():
        # Renamed first: a process that is killed while it removes files must not leave half a checkpoint.
        removed = partial(checkpoint.parent) / f"removed-{checkpoint.name}"
        removed.parent.mkdir(exist_ok=True)
        shutil.rmtree(removed, ignore_errors=True)
        checkpoint.rename(removed)
        shutil.rmtree(removed)


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return what differs between two nested mappings: `key (value, now value)`; long values are left out."""
    changed = []
    for key in dict.fromkeys([*one, *other]):
        before, now = one.get(key), other.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            changed += differences(before, now, f"{prefix}{key}.")
        elif before != now:
            values = f" ({before}, now {now})"
            changed.append(f"{prefix}{key}" + (values if len(values) < 60 else ""))
    return changed


def _sync(path: Path) -> None:
    # Without it, a machine that dies after the rename may leave an empty file under the final name.
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
