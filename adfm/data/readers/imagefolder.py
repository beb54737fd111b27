"""Hugging Face's `imagefolder`: images, and metadata.jsonl, metadata.csv or metadata.parquet with a row an image.

train/000.png    and    train/metadata.jsonl
{"file_name": "000.png", "objects": {"bbox": [[302.0, 109.0, 73.0, 52.0]], "categories": [0]}}
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from adfm.data.readers import table
from adfm.data.readers.annotations import Shape, box, sample, unlisted
from adfm.data.readers.files import DataSet, NoImage, holds, split_of, walk, within
from adfm.data.readers.textfiles import mentions, number, optional, pixel_size, text
from adfm.data.readers.verdicts import class_name
from adfm.records import Sample

FORM = "<split>/*.png, <split>/metadata.jsonl with file_name and objects or label"
_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_BOXES = ("bbox", "bboxes")
_KNOWN = frozenset(("file_name", "objects", "label", "mask_file_name", "split", "width", "height"))

_Names = dict[str, dict[int, str]]  # of classes, by their number, for each column


def matches(raw: Path) -> bool:
    """Whether there is a metadata file with names of images, near the top."""
    return holds(raw, lambda folder: any(mentions(file, b"file_name") for file in _metadata(folder)))


def read(raw: Path) -> Iterator[Sample]:
    """Yield the images of the metadata files, in their order.

    `file_name` is relative to the file. `objects` has the boxes, `bbox`, as `[x, y, width, height]` in pixels, and
    their classes, `categories` or `category`; without boxes the image is normal. Or else `label` says what the image
    is: normal, or the kind of the defect, whose place is not known; or `mask_file_name` names a mask. Classes may be
    numbers, whose names are in `dataset_info` in README.md. `split` is that of the folders' names.
    """
    data = DataSet(raw, "imagefolder")
    for file in (file for folder in walk(raw) for file in _metadata(folder)):
        yield from _samples(data, file)
    data.problems += unlisted(data) if data.listed else []
    data.finish("no metadata.jsonl, metadata.csv or metadata.parquet that lists an image in `file_name`")


def _metadata(folder: Path) -> list[Path]:
    return [file for file in (folder / name for name in _FILES) if file.is_file()]


def _samples(data: DataSet, file: Path) -> Iterator[Sample]:
    where = data.relative(file)
    try:
        names = _names(data, file)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        data.problems.append(f"README.md: {' '.join(str(error).split())}")
        return
    place = 0
    try:
        for place, row in _rows(file):
            with data.at(here := f"{where}: line {place}"):
                yield _sample(data, file.parent, here, row(), names)
    except csv.Error as error:
        data.add(where, f"line {place + 1}: is not CSV ({error})")
    except (ValueError, OSError, RecursionError, pa.ArrowException) as error:
        data.add(where, " ".join(str(error).split()))


def _rows(file: Path) -> Iterator[tuple[int, Callable[[], dict[str, Any]]]]:
    """Yield the rows of a metadata file, with their lines; one that cannot be read raises `ValueError` when called."""
    if file.suffix == ".parquet":
        start = 1
        for batch in pq.ParquetFile(file).iter_batches():
            yield from ((place, partial(dict, row)) for place, row in enumerate(batch.to_pylist(), start))
            start += len(batch)
    elif file.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text(file), newline=""), strict=True)
        columns = sorted(name for name in reader.fieldnames or () if name.lower() in table.MAY_BE_BOXES | table.SIDES)
        if columns:
            remedy = "rename the file to read it as layout csv"
            raise ValueError(f"the columns {', '.join(columns)} are not of this layout; {remedy}")
        yield from ((reader.line_num, partial(_of_csv, row)) for row in reader)
    else:
        lines = enumerate(text(file).split("\n"), start=1)
        yield from ((place, partial(_parsed, line)) for place, line in lines if line.strip())


def _of_csv(row: dict[str | Any, Any]) -> dict[str, Any]:
    if None in row or None in row.values():
        raise ValueError("has more or fewer cells than the first line")
    cells: dict[str, Any] = {name: cell.strip() for name, cell in row.items() if cell.strip()}
    if "objects" in cells:
        cells["objects"] = _parsed(cells["objects"])
    for name in ("width", "height", "label"):
        if re.fullmatch("[0-9]{1,9}", cells.get(name, "")):
            cells[name] = int(cells[name])
    return cells


def _parsed(line: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError("is not a JSON object")
    return content


def _names(data: DataSet, file: Path) -> _Names:
    """Return the names of classes in the README.md nearest above a file, as the `datasets` library writes them."""
    for above in data.above(file):
        if (readme := above / "README.md").is_file() and readme.read_bytes().strip():
            front = re.match(r"---\s*\n(.*?)\n---", text(readme), re.DOTALL)
            # The base loader leaves all as text: for others a class called `no` is a boolean.
            content = yaml.load(front[1], yaml.BaseLoader) if front else None
            names: _Names = {}
            if isinstance(content, dict):
                _add_names(content.get("dataset_info"), "", names)
            return names
    return {}


def _add_names(part: Any, column: str, names: _Names) -> None:
    # The parts are nested as deep as the features of the data set are.
    if isinstance(part, list):
        for inside in part:
            _add_names(inside, column, names)
    elif isinstance(part, dict):
        column = part["name"] if isinstance(part.get("name"), str) else column
        listed = optional(part.get("class_label"), "names", object)
        listed = dict(enumerate(listed)) if isinstance(listed, list) else listed
        if isinstance(listed, dict) and all(str(key).isdecimal() for key in listed):
            classes = {int(key): str(name) for key, name in listed.items()}
            if names.setdefault(column, classes) != classes:
                raise ValueError(f"dataset_info names the classes of {column!r} differently; keep one of them")
        for inside in part.values():
            _add_names(inside, column, names)


def _sample(data: DataSet, folder: Path, here: str, row: dict[str, Any], names: _Names) -> Sample:
    image = _path(data.raw, folder, row.get("file_name"))
    if not image:
        raise NoImage(f"image {row.get('file_name')!r} is missing")
    data.claim(image, here, "keep one of the rows")
    for name in (*table.MAY_BE_BOXES, *_BOXES, "annotations"):
        if isinstance(row.get(name), list | dict):
            raise ValueError(f"{name!r} may say where the defects are; write them in 'objects'")
    mask = None
    if row.get("mask_file_name") is not None:
        mask = _path(data.raw, folder, row["mask_file_name"])
        if not mask:
            raise ValueError(f"mask {row['mask_file_name']!r} is missing")
        data.listed[str(mask)] = here  # else it would be an image that no row lists
    word = row.get("text")  # a caption, or in some data sets the label
    is_label = isinstance(word, str) and (table.is_normal(word.strip()) or table.is_anomalous(word.strip()))
    label = row.get("label", word if is_label else None)
    defect = None if label is None else _defect(label, names.get("label", {}))
    has_objects = row.get("objects") is not None
    shapes = _shapes(row["objects"], names) if has_objects else []
    if label is None and not has_objects and not mask:
        raise ValueError("has neither 'objects' nor a 'label'; a normal image has the label `normal`, or empty lists")
    if label is not None and not defect and (shapes or mask):
        raise ValueError(f"the label is {label!r}, but defects are marked on the image")
    if row.get("split") and not split_of(str(row["split"])):
        raise ValueError(f"the split {row['split']!r} is not train, validation or test")
    values = {str(name): str(value) for name, value in row.items() if isinstance(value, str | int | float)}
    columns = {name: value for name, value in values.items() if name not in _KNOWN and value.isprintable()}
    notes = [f"columns that only split.group reads: {', '.join(columns)}"] if columns else []
    split, size = data.split(image, str(row.get("split") or "")), pixel_size(row.get("width"), row.get("height"))
    kind = defect or ("defect" if mask else None)
    one = sample(data, image, shapes, split, notes, label=kind, size=size, columns=columns)
    if shapes or not mask:
        return one
    # Where the mask alone says what the image is, an empty one says normal.
    return replace(one, masks=(mask,), unmarked_is_normal=not defect, located=True)


def _path(raw: Path, folder: Path, name: Any) -> Path | None:
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{name!r} is not the name of a file; write one in 'file_name'")
    # A backslash may be part of a name on Linux.
    return within(raw, folder, name) or within(raw, folder, name.replace("\\", "/"))


def _defect(label: Any, names: dict[int, str]) -> str | None:
    """Return the defect that the label of an image names; `None` if that is normal."""
    name = _class(label, names)
    if name is None:
        raise ValueError(f"the label {label!r} is a number without a name; write names, or dataset_info in README.md")
    if table.is_normal(name):
        return None
    return "defect" if table.is_anomalous(name) else class_name(name)


def _class(value: Any, names: dict[int, str]) -> str | None:
    """Return the name of a class; `None` for a number where no names are known."""
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1e9:
        raise ValueError(f"{str(value)[:40]!r} is neither a name nor a number of a class")
    if names and value not in names:
        raise ValueError(f"the class {value} has no name in README.md; there are {', '.join(map(str, sorted(names)))}")
    return names.get(value)


def _shapes(objects: Any, names: _Names) -> list[Shape]:
    if isinstance(objects, list) and all(isinstance(one, dict) for one in objects):  # some write an object a box
        objects = {key: [one.get(key) for one in objects] for key in (objects[0] if objects else ("bbox",))}
    if not isinstance(objects, dict):
        raise ValueError("'objects' is neither an object of lists nor a list of objects")
    boxes = next((objects[key] for key in _BOXES if key in objects), None)
    if not isinstance(boxes, list):
        raise ValueError("'objects' has no list 'bbox'")
    key = next((key for key in ("categories", "category", "labels", "label") if key in objects), "")
    classes = objects[key] if key else ["defect"] * len(boxes)
    if not isinstance(classes, list) or len(classes) != len(boxes):
        raise ValueError(f"'objects' has {len(boxes)} boxes, but not as many {key or 'categories'}")
    shapes = []
    for drawn, value in zip(boxes, classes, strict=True):
        if not isinstance(drawn, list) or len(drawn) != 4:
            raise ValueError(f"the box {str(drawn)[:60]} is not [x, y, width, height]")
        x, y, width, height = map(number, drawn)
        name = _class(value, names.get(key, {}))
        name = f"class {value}" if name is None else name
        shapes.append(Shape(class_name(name), box(x, y, x + width, y + height)))
    return shapes
