"""A folder of images and one CSV file: `image,label,defect,x1,y1,x2,y2`, a row a box or a normal image.

parts.csv    and    000.jpg    or    images/000.jpg
"""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from adfm.data.readers.annotations import Shape, box, class_name, listing, sample, split_of, text, unlisted, within
from adfm.data.readers.files import refuse, root
from adfm.records import Box, Label, Sample, Split

_SIDES = ("x1", "y1", "x2", "y2")
_COLUMNS = ("image", "label", "defect", *_SIDES, "category", "split", "mask")
_NORMAL = ("normal", "good", "ok", "0")
_ANOMALOUS = ("anomalous", "anomaly", "defective", "defect", "bad", "ng", "ko", "nok", "1")


@dataclass(frozen=True)
class _Row:
    line: int
    label: Label
    category: str
    split: Split | None
    defect: str
    box: Box | None
    mask: Path | None


def matches(raw: Path) -> bool:
    """Whether there is a CSV file with the columns image and label."""
    return root(raw, lambda folder: bool(_tables(folder))) is not None


def read(raw: Path) -> Iterator[Sample]:
    """Yields the images of the table, in its order.

    Columns, in any order: `image` (path, from the table's folder or from images/ in it) and `label`; for defects
    `defect` (its name; "defect" if there is none), and either `x1`, `y1`, `x2`, `y2` (pixels, half-open) or `mask`
    (path of a pixel mask). May be there: `category` (the data set's name otherwise) and `split` (train, validation or
    test). A label is normal, good, ok or 0, or else anomalous, anomaly, defective, defect, bad, ng, ko, nok or 1. An
    image with several defects has several rows. Columns are separated by comma, semicolon or tab.

    The table is in memory.

    Args:
        raw: The raw data set; its name is the name of the data set.

    Raises:
        AdfmError: Everything that is wrong in the table, images that are missing, and images that are not in it.
    """
    problems: list[str] = []
    folder = root(raw, lambda folder: bool(_tables(folder))) or raw
    tables = _tables(folder) or listing(folder, ".csv")
    images: dict[Path, list[_Row]] = {}
    if len(tables) == 1:
        images = _images(raw, tables[0], problems)
        masks = {row.mask for rows in images.values() for row in rows if row.mask}
        problems += unlisted(raw, images.keys() | masks)
    else:
        names = ", ".join(table.name for table in tables) or "none"
        problems.append(f"one CSV file is wanted, with at least the columns image and label; there are: {names}")
    for image, rows in images.items():
        if not rows:
            continue
        shapes = [Shape(row.defect, row.box) for row in rows if row.box]
        found = sample(raw, image, shapes, rows[0].split)
        yield replace(
            found,
            category=rows[0].category or found.category,
            label=rows[0].label,
            defect="+".join(sorted({row.defect for row in rows})) or None,
            masks=tuple(row.mask for row in rows if row.mask),
        )
    refuse(raw, "csv", problems)


def _tables(folder: Path) -> list[Path]:
    """The CSV files whose first line has an image and a label."""
    tables = []
    for file in listing(folder, ".csv"):
        with file.open(encoding="utf-8-sig", errors="replace") as lines:
            first = set(re.findall(r"\w+", lines.readline(10_000).lower()))
        if {"image", "label"} <= first:
            tables.append(file)
    return tables


def _images(raw: Path, table: Path, problems: list[str]) -> dict[Path, list[_Row]]:
    where = table.relative_to(raw).as_posix()
    images: dict[Path, list[_Row]] = {}
    line = 1
    try:
        content = text(table)
        delimiter = max(",;\t", key=content.splitlines()[0].count)
        reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
        header = _header(next(reader))
        for cells in reader:
            line = reader.line_num
            if not any(cell.strip() for cell in cells):
                continue
            try:
                if len(cells) != len(header):
                    raise ValueError(f"has {len(cells)} cells, and the first line has {len(header)}")
                values = dict(zip(header, map(str.strip, cells), strict=True))
                rows = images.setdefault(_path(raw, table.parent, values["image"], "images"), [])
                row = _row(raw, table.parent, line, values)
                _agree(rows, row)
                rows.append(row)
            except ValueError as error:
                problems.append(f"{where}: line {line}: {error}")
    except csv.Error as error:
        problems.append(f"{where}: line {line + 1}: is no CSV ({error})")
    except ValueError as error:
        problems.append(f"{where}: {error}")
    else:
        if not images and not problems:
            problems.append(f"{where}: has no rows")
    return images


def _header(cells: list[str]) -> list[str]:
    header = [cell.strip().lower() for cell in cells]
    wrong = []
    for column in dict.fromkeys(header):
        if column not in _COLUMNS:
            near = difflib.get_close_matches(column, _COLUMNS, n=1, cutoff=0)[0]
            wrong.append(f"there is no column {column!r}; the nearest is {near!r}")
        elif header.count(column) > 1:
            wrong.append(f"the column {column!r} is there {header.count(column)} times")
    sides = _SIDES if set(_SIDES) & set(header) else ()
    wrong += [f"the column {column!r} is missing" for column in ("image", "label", *sides) if column not in header]
    if wrong:
        raise ValueError(f"line 1: {'; '.join(wrong)} (known: {', '.join(_COLUMNS)})")
    return header


def _row(raw: Path, folder: Path, line: int, values: dict[str, str]) -> _Row:
    word, defect, mask = values["label"].lower(), values.get("defect", ""), values.get("mask", "")
    sides = [values.get(side, "") for side in _SIDES]
    split = split_of(values.get("split", ""))
    if values.get("split") and not split:
        raise ValueError(f"the split {values['split']!r} is none of train, validation, test")
    if word in _NORMAL:
        if any(sides) or mask or defect.lower() not in ("", *_NORMAL):
            raise ValueError(f"the label is {word}, but there is a defect, a box or a mask")
        return _Row(line, "normal", values.get("category", ""), split, "", None, None)
    if word not in _ANOMALOUS:
        known = f"{', '.join(_NORMAL)}, or {', '.join(_ANOMALOUS)}"
        raise ValueError(f"the label {values['label']!r} is unknown; write {known}")
    if any(sides) == bool(mask):
        raise ValueError(f"the label is {word}, so that either x1, y1, x2 and y2 or a mask is needed, not both")
    return _Row(
        line,
        "anomalous",
        values.get("category", ""),
        split,
        class_name(defect or "defect"),
        box(*(_number(name, side) for name, side in zip(_SIDES, sides, strict=True))) if any(sides) else None,
        _path(raw, folder, mask) if mask else None,
    )


def _number(name: str, written: str) -> float:
    if re.fullmatch(r"[-+]?\d+,\d*", written):
        raise ValueError(f"{name} is {written!r}; write it with a decimal point: {written.replace(',', '.')}")
    try:
        return float(written)
    except ValueError as error:
        raise ValueError(f"{name} is {written!r}, which is no number") from error


def _path(raw: Path, folder: Path, name: str, *inside: str) -> Path:
    for written in (name, name.replace("\\", "/")):
        for base in (folder, *(folder / each for each in inside)):
            if path := within(raw, base, written):
                return path
    raise ValueError(f"there is no file {name!r} in {folder.resolve().name}")


def _agree(rows: list[_Row], row: _Row) -> None:
    """Raises `ValueError` if a row contradicts, or repeats, the earlier rows of its image."""
    for other in rows:
        for key, was, now in (
            ("label", other.label, row.label),
            ("category", other.category, row.category),
            ("split", other.split, row.split),
            ("way of marking", "mask" if other.mask else "box", "mask" if row.mask else "box"),
        ):
            if was != now:
                raise ValueError(f"line {other.line} has another {key} for the same image: {was or 'none'}, not {now}")
        if replace(other, line=row.line) == row:
            raise ValueError(f"repeats line {other.line}")
