"""Readers: one file a layout. A reader walks a raw data set and yields its `Sample`s; it opens no image."""

from __future__ import annotations

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
        read: Yields the samples of a raw data set.
        matches: Whether a raw data set has this layout; `None` where another entry stands for it.
        form: What the layout looks like, for messages.
    """

    read: Callable[[Path], Iterator[Sample]]
    matches: Callable[[Path], bool] | None
    form: str


LAYOUTS: dict[str, Layout] = {
    "mvtec": Layout(
        mvtec.read,
        mvtec.matches,
        "<category>/train/good/*.png, <category>/test/<good or defect>/*.png,"
        " <category>/ground_truth/<defect>/*_mask.png",
    ),
    "visa-1cls": Layout(mvtec.read, None, "as mvtec"),
    "loco": Layout(
        loco.read,
        loco.matches,
        "<category>/validation/good/*.png, <category>/test/logical_anomalies/*.png,"
        " <category>/ground_truth/logical_anomalies/<image>/*.png",
    ),
    "visa": Layout(
        visa.read,
        visa.matches,
        "<category>/Data/Images/<Normal or Anomaly>/*.JPG, <category>/Data/Masks/Anomaly/*.png, split_csv/1cls.csv",
    ),
    "real-iad": Layout(
        real_iad.read,
        real_iad.matches,
        "<category>/OK/<part>/*.jpg, <category>/NG/<defect>/<part>/*.jpg, <category>.json",
    ),
    "btad": Layout(
        btad.read,
        btad.matches,
        "<category>/train/ok/*.png, <category>/test/<ok or ko>/*.png, <category>/ground_truth/ko/*.png",
    ),
    "dagm": Layout(dagm.read, dagm.matches, "<class>/<Train or Test>/*.PNG, <class>/<Train or Test>/Label/*_label.PNG"),
    "kolektor": Layout(kolektor.read, kolektor.matches, "<part>/*.jpg, <part>/*_label.bmp"),
    "mmad": Layout(mmad.read, mmad.matches, "mmad.json, <data set>/<category>/.../<good or defect>/*"),
    "coco": Layout(coco.read, coco.matches, "annotations/*.json with images, annotations and categories; images/*"),
    "imagefolder": Layout(
        imagefolder.read,
        imagefolder.matches,
        "<split>/*.png, <split>/metadata.jsonl with file_name and objects or label",
    ),
    "deeppcb": Layout(
        deeppcb.read, deeppcb.matches, "<group>/<part>/*_temp.jpg, <group>/<part>/*_test.jpg, <group>/<part>_not/*.txt"
    ),
    "yolo": Layout(yolo.read, yolo.matches, "images/*, labels/*.txt, data.yaml"),
    "voc": Layout(voc.read, voc.matches, "JPEGImages/*, Annotations/*.xml or SegmentationClass/*.png"),
    "cvat": Layout(cvat.read, cvat.matches, "annotations.xml of 'CVAT for images 1.1', images/*"),
    "supervisely": Layout(
        supervisely.read,
        supervisely.matches,
        "<project>/meta.json, <project>/<data set>/img/*, <project>/<data set>/ann/*.json",
    ),
    "labelme": Layout(labelme.read, labelme.matches, "*.jpg, *.json with shapes and imagePath"),
    "label-studio": Layout(
        label_studio.read,
        label_studio.matches,
        "*.json of Label Studio's JSON or JSON-MIN export; images/*, or the folders that its paths name",
    ),
    "via": Layout(
        via.read, via.matches, "*.json or *.csv of VGG Image Annotator, a project or an export; *.jpg or images/*"
    ),
    "csv": Layout(
        table.read,
        table.matches,
        "*.jpg, *.csv with the columns image, label, defect, x1, y1, x2, y2 or filename, class, xmin, ymin, xmax, ymax",
    ),
    "folders": Layout(
        folders.read,
        folders.matches,
        "good/*.jpg, <defect>/*.jpg, and, if there are masks, mask/<defect>/*.png; OK/*.jpg, NG/*.jpg;"
        " images/*.jpg, masks/*.png",
    ),
}


def resolve(raw: Path, layout: str) -> tuple[str, str | None]:
    """The layout to read a raw data set in, as `convert.layout` says; call it before reading.

    Args:
        raw: The data set; a pipe or an endless link in it is refused.
        layout: The name of a layout, or `auto`.

    Returns:
        The name of the layout, and what was seen in the data set where it was detected.

    Raises:
        AdfmError: `layout` is unknown, or `detect` or `files.refuse_special` refuses the data set.
    """
    files.refuse_special(raw)
    if layout == "auto":
        return detect(raw)
    if layout not in LAYOUTS:
        near = difflib.get_close_matches(layout, [*LAYOUTS, "auto"], n=1, cutoff=0)[0]
        raise AdfmError(
            f"convert.layout: there is no layout {layout!r}; did you mean {near!r}?"
            f" Valid layouts: auto, {', '.join(LAYOUTS)}."
        )
    return layout, None


def detect(raw: Path) -> tuple[str, str]:
    """The layout that a raw data set is in, and what was seen there.

    Returns:
        The name of the layout; some of the folders and files, as one line.

    Raises:
        AdfmError: It is in none that is known, or may be in several; says what was seen.
    """
    seen = printable(_seen(raw))
    layouts = [name for name, layout in LAYOUTS.items() if layout.matches and layout.matches(raw)]
    if "mmad" in layouts:  # its parts are in layouts of their own
        layouts = ["mmad"]
    if len(layouts) > 1:  # files with annotations say more than the names of folders
        layouts = [name for name in layouts if name != "folders"]
    if len(layouts) > 1:
        raise AdfmError(
            f"{raw} may be in any of these layouts: {', '.join(layouts)}. Seen there: {seen}. Say which it is with"
            f" --layout {' or '.join(layouts)}, or take apart what are two data sets."
        )
    if not layouts:
        if file := folders.hindrance(raw):
            name = printable(files.relative(raw, file))
            raise AdfmError(
                f"{raw}: {name} may say more of the images than their folders do,"
                " and is in no form that adfm reads; take the labels from the folders alone with --layout folders, or"
                f" remove the file. Seen there: {seen}."
            )
        forms = "\n".join(f"  {name}: {layout.form}" for name, layout in LAYOUTS.items() if layout.matches)
        hint = printable(foreign.hint(raw))
        cause = f": {hint}" if hint else ""
        raise AdfmError(f"{raw} is in no layout that adfm knows{cause}. Seen there: {seen}. The layouts are:\n{forms}")
    return layouts[0], seen


def _seen(raw: Path) -> str:
    """Some folders that hold no folders, and the files at the top."""
    top = files.root(raw, lambda folder: len(files.folders(folder)) != 1) or raw
    inside = files.folders(top)
    deepest = [folder for first in inside[:2] for folder in _deepest(first, depth=3)] if inside or top == raw else [top]
    parts = [f"{files.relative(raw, folder)}/ ({_kinds(folder) or 'no files'})" for folder in deepest[:8]]
    if len(inside) > 2:
        parts.append(f"and {len(inside) - 2} more folders")
    return ", ".join(filter(None, [*parts, _kinds(raw)])) or "nothing"


def _deepest(folder: Path, depth: int) -> list[Path]:
    """The first folder without folders within each of the first few that `folder` holds."""
    inside = files.folders(folder)[: 4 if depth > 1 else 1]
    return [deepest for path in inside for deepest in _deepest(path, depth - 1)] if inside and depth else [folder]


def _kinds(folder: Path) -> str:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and files.holds_true(entry.is_file)]
    kinds = Counter(PurePosixPath(name).suffix.lower() or "without extension" for name in names)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
