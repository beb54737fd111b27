"""Readers: one file a layout. A reader walks a raw data set and yields its `Sample`s; it opens no image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from adfm.data.readers import mvtec
from adfm.errors import AdfmError
from adfm.records import Sample

READERS: dict[str, Callable[[Path], Iterator[Sample]]] = {"mvtec": mvtec.read}
_RECOGNISERS: dict[str, Callable[[Path], bool]] = {"mvtec": mvtec.recognises}


def detect(raw: Path) -> str:
    """The name of the layout that a raw data set is in.

    Raises:
        AdfmError: It is in none that is known; says what was seen.
    """
    for layout, recognises in _RECOGNISERS.items():
        if recognises(raw):
            return layout
    raise AdfmError(
        f"{raw} is in no layout that adfm knows ({', '.join(READERS)}). Seen there: {_seen(raw)}. mvtec wants"
        " <category>/train/good/*.png, <category>/test/<good or defect>/*.png and"
        " <category>/ground_truth/<defect>/*_mask.png."
    )


def _seen(raw: Path) -> str:
    entries = sorted(path for path in raw.iterdir() if not path.name.startswith("."))
    folders = [path.name + "/" for path in entries if path.is_dir()]
    kinds = Counter(path.suffix.lower() or "without extension" for path in entries if path.is_file())
    more = [f"and {len(folders) - 8} more folders"] if len(folders) > 8 else []
    return (
        ", ".join(folders[:8] + more + [f"{count} files {kind}" for kind, count in sorted(kinds.items())]) or "nothing"
    )
