"""Readers: one file a layout. A reader walks a raw data set and yields its `Sample`s; it opens no image."""

import difflib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from adfm.data.readers import (
    btad,
    coco,
    cvat,
    dagm,
    deeppcb,
    files,
    folders,
    foreign,
    imagefolder,
    kolektor,
    label_studio,
    labelme,
    loco,
    mmad,
    mvtec,
    real_iad,
    severstal,
    supervisely,
    table,
    via,
    visa,
    voc,
    yolo,
)
from adfm.errors import AdfmError
from adfm.records import Sample
from adfm.text import printable


class Layout(NamedTuple):
    """A layout of raw data sets.

    Args:
        read: Yields the samples of a raw data set, whose folder gives the data set its name. Raises `BadData` after the
            last sample, with everything that is wrong: bad annotation files, missing images or masks, images that no
            annotation lists or that have no place in the layout, or no image at all.
        matches: Whether a raw data set has this layout; `None` where another entry stands for it.
        form: What the layout looks like, for messages.
    """

    read: Callable[[Path], Iterator[Sample]]
    matches: Callable[[Path], bool] | None
    form: str


LAYOUTS = {
    "mvtec": Layout(mvtec.read, mvtec.matches, mvtec.FORM),
    "visa-1cls": Layout(mvtec.read, None, "as mvtec"),
    "loco": Layout(loco.read, loco.matches, loco.FORM),
    "visa": Layout(visa.read, visa.matches, visa.FORM),
    "real-iad": Layout(real_iad.read, real_iad.matches, real_iad.FORM),
    "btad": Layout(btad.read, btad.matches, btad.FORM),
    "dagm": Layout(dagm.read, dagm.matches, dagm.FORM),
    "kolektor": Layout(kolektor.read, kolektor.matches, kolektor.FORM),
    "severstal": Layout(severstal.read, severstal.matches, severstal.FORM),
    "mmad": Layout(mmad.read, mmad.matches, mmad.FORM),
    "coco": Layout(coco.read, coco.matches, coco.FORM),
    "imagefolder": Layout(imagefolder.read, imagefolder.matches, imagefolder.FORM),
    "deeppcb": Layout(deeppcb.read, deeppcb.matches, deeppcb.FORM),
    "yolo": Layout(yolo.read, yolo.matches, yolo.FORM),
    "voc": Layout(voc.read, voc.matches, voc.FORM),
    "cvat": Layout(cvat.read, cvat.matches, cvat.FORM),
    "supervisely": Layout(supervisely.read, supervisely.matches, supervisely.FORM),
    "labelme": Layout(labelme.read, labelme.matches, labelme.FORM),
    "label-studio": Layout(label_studio.read, label_studio.matches, label_studio.FORM),
    "via": Layout(via.read, via.matches, via.FORM),
    "csv": Layout(table.read, table.matches, table.FORM),
    "folders": Layout(folders.read, folders.matches, folders.FORM),
}


def resolve(raw: Path, layout: str) -> tuple[str, str | None]:
    """Return the layout to read a raw data set in, and, for `auto`, what was seen there; call it before reading.

    Raises:
        AdfmError: `layout` is unknown, or `detect` or `files.refuse_special` refuses the data set.
    """
    files.refuse_special(raw)
    if layout == "auto":
        return detect(raw)
    if layout not in LAYOUTS:
        near = difflib.get_close_matches(layout, [*LAYOUTS, "auto"], n=1, cutoff=0)[0]
        what = f"the layout {layout!r} is unknown; did you mean {near!r}?"
        raise AdfmError(f"convert.layout: {what} Valid layouts: auto, {', '.join(LAYOUTS)}.")
    return layout, None


def detect(raw: Path) -> tuple[str, str]:
    """Detect the layout of a raw data set; with it come some of the folders and files there, as one line.

    Raises:
        AdfmError: It is in no layout that is known, or may be in several; says what was seen.
    """
    seen = printable(_seen(raw))
    layouts = [name for name, layout in LAYOUTS.items() if layout.matches and layout.matches(raw)]
    if "mmad" in layouts:  # its parts are in layouts of their own
        layouts = ["mmad"]
    if len(layouts) > 1:
        layouts = [name for name in layouts if name != "folders"]  # annotations say more than the names of folders
    if len(layouts) > 1:
        remedy = f"Say which it is with --layout {' or '.join(layouts)}, or take apart what are two data sets."
        raise AdfmError(f"{raw} may be in any of these layouts: {', '.join(layouts)}. Seen there: {seen}. {remedy}")
    if not layouts:
        if file := folders.hindrance(raw):
            name = printable(files.relative(raw, file))
            what = f"{name} may say more of the images than their folders do, and is in no form that adfm reads"
            remedy = "take the labels from the folders alone with --layout folders, or remove the file"
            raise AdfmError(f"{raw}: {what}; {remedy}. Seen there: {seen}.")
        forms = "\n".join(f"  {name}: {layout.form}" for name, layout in LAYOUTS.items() if layout.matches)
        hint = printable(foreign.hint(raw))
        cause = f": {hint}" if hint else ""
        raise AdfmError(f"{raw} is in no layout that adfm knows{cause}. Seen there: {seen}. The layouts are:\n{forms}")
    return layouts[0], seen


def _seen(raw: Path) -> str:
    """Describe some folders that hold no folders, and the files at the top."""
    top = files.root(raw, lambda folder: len(files.folders(folder)) != 1) or raw
    inside = files.folders(top)
    deepest = [folder for first in inside[:2] for folder in _deepest(first, depth=3)] if inside or top == raw else [top]
    parts = [f"{files.relative(raw, folder)}/ ({_kinds(folder) or 'no files'})" for folder in deepest[:8]]
    if len(inside) > 2:
        parts.append(f"and {len(inside) - 2} more folders")
    return ", ".join(filter(None, [*parts, _kinds(raw)])) or "nothing"


def _deepest(folder: Path, depth: int) -> list[Path]:
    """List the first folder without folders within each of the first few that `folder` holds."""
    inside = files.folders(folder)[: 4 if depth > 1 else 1]
    return [deepest for path in inside for deepest in _deepest(path, depth - 1)] if inside and depth else [folder]


def _kinds(folder: Path) -> str:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and files.holds_true(entry.is_file)]
    kinds = Counter(PurePosixPath(name).suffix.lower() or "without extension" for name in names)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
