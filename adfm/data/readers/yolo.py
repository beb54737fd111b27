"""YOLO: a text file an image, one line a defect, in fractions of the image's width and height.

images/train/000.jpg    and    labels/train/000.txt    or    train/images/000.jpg    and    train/labels/000.txt
or both in one folder; and data.yaml, classes.txt or obj.names with the names of the classes.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import yaml

from adfm.data.readers.annotations import (
    Shape,
    box,
    class_name,
    enclosing,
    folder_names,
    holds,
    listing,
    mentions,
    paired,
    polygon,
    sample,
    split_of,
    text,
    walk,
    within,
)
from adfm.data.readers.files import images, refuse
from adfm.records import Sample, Split

_IMAGES = frozenset(("images",))
_LABELS = frozenset(("labels",))
_LISTS = ("classes.txt", "obj.names")
_SLACK = 0.01  # rounding of the tools that write the files


def matches(raw: Path) -> bool:
    """Whether there are images, and a data.yaml with names or a text file of such lines, near the top."""
    return holds(raw, _is_part) and holds(raw, lambda folder: bool(images(folder)))


def read(raw: Path) -> Iterator[Sample]:
    """Yields the images, folder by folder. One without a text file, or with an empty one, is normal.

    `class cx cy width height` is a box, `class x1 y1 x2 y2 x3 y3 …` a polygon. Classes have the names in the YAML file
    of the data set, in classes.txt or obj.names; without any they are called `class 0` and so on. `split` is that of
    train, val and test in the YAML file, where those are folders or lists in the data set, else that of the folders'
    names (train, val, valid, validation, test).

    Args:
        raw: The raw data set; its name is the name of the data set and of the category.

    Raises:
        AdfmError: Everything that is wrong in the text files, text files without an image, and a data set without any
            text file: in one error, after the last sample.
    """
    problems: list[str] = []
    names, splits = _settings(raw, problems)
    defects = False
    for folder in walk(raw):
        for image, file in paired(raw, folder, ".txt", _IMAGES, _LABELS, partial(_belongs, raw), problems):
            shapes = _shapes(raw, file, names, problems) if file else []
            defects = defects or bool(shapes)
            yield sample(raw, image, shapes, _split(raw, image, splits), normalized=True)
    if not defects and not problems:
        problems.append("no image has a text file with a defect, beside it or in labels/ instead of images/")
    refuse(raw, "yolo", problems)


def _is_part(folder: Path) -> bool:
    settings = [*listing(folder, ".yaml"), *listing(folder, ".yml")]
    return any(map(_is_settings, settings)) or any(map(_is_labels, listing(folder, ".txt")))


def _is_settings(file: Path) -> bool:
    return file.stem == "data" or mentions(file, b"names:")


def _is_labels(file: Path) -> bool:
    try:
        with file.open(encoding="utf-8", errors="replace") as lines:
            first = next((line for line in lines if line.strip()), "").split()
        return len(first) > 4 and first[0].isdigit() and all(math.isfinite(float(word)) for word in first)
    except (OSError, ValueError):
        return False


def _belongs(raw: Path, file: Path) -> bool:
    """Whether a text file without an image should have one."""
    inside = any(name.lower() in _LABELS for name in folder_names(raw, file))
    return file.name not in _LISTS and (inside or _is_labels(file))


def _settings(raw: Path, problems: list[str]) -> tuple[dict[int, str], dict[Path, set[Split]]]:
    """The names of the classes, and which splits the YAML file gives to a folder or to an image."""
    splits: dict[Path, set[Split]] = defaultdict(set)
    named: dict[Path, dict[int, str]] = {}
    for folder in walk(raw, 2):
        for file in [*listing(folder, ".yaml"), *listing(folder, ".yml")]:
            try:
                content = yaml.safe_load(text(file)) if _is_settings(file) else None
                if isinstance(content, dict) and "names" in content:
                    named[file] = _names(content)
                    _add_splits(raw, file, content, splits)
            except (yaml.YAMLError, RecursionError, ValueError) as error:
                problems.append(f"{file.relative_to(raw).as_posix()}: {' '.join(str(error).split())}")
    for folder in walk(raw, 2) if not named else []:
        for file in (folder / name for name in _LISTS):
            try:
                if file.is_file():
                    named[file] = dict(enumerate(text(file).strip().splitlines()))
            except ValueError as error:
                problems.append(f"{file.relative_to(raw).as_posix()}: {error}")
    names = list(named.values())
    if any(other != names[0] for other in names):
        files = ", ".join(file.relative_to(raw).as_posix() for file in named)
        problems.append(f"{files}: name the classes differently; keep one of them")
    return names[0] if names else {}, splits


def _names(content: dict[Any, Any]) -> dict[int, str]:
    names = content["names"]
    if "kpt_shape" in content:
        raise ValueError("kpt_shape says that the labels are points of a pose; export boxes or polygons")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names or not all(str(number).isdecimal() for number in names):
        raise ValueError("'names' is neither a list of names nor names under their numbers")
    return {int(number): str(name) for number, name in names.items()}


def _add_splits(raw: Path, file: Path, content: dict[Any, Any], splits: dict[Path, set[Split]]) -> None:
    """Takes train, val and test from a YAML file where they lead to something in the data set.

    The files of several tools lead out of the data set (`../train/images`, or to the machine that wrote them).
    """
    roots = [file.parent, raw]
    if base := within(raw, file.parent, str(content.get("path", "")), Path.is_dir):
        roots.insert(0, base)
    for key in ("train", "val", "test"):
        places = content.get(key)
        for place in places if isinstance(places, list) else [places]:
            name = re.sub(r"^(\.{1,2}/)+", "", str(place))
            found = [path for base in roots if name and (path := within(raw, base, name, Path.exists))]
            for path in found[:1]:
                split = cast(Split, split_of(key))
                splits[path].add(split)
                for line in text(path).splitlines() if path.suffix == ".txt" and path.is_file() else []:
                    for base in (path.parent, *roots):
                        if image := within(raw, base, line.strip()):
                            splits[image].add(split)


def _split(raw: Path, image: Path, splits: dict[Path, set[Split]]) -> Split | None:
    for path in (image, *image.parents):
        if path in splits:
            return next(iter(splits[path])) if len(splits[path]) == 1 else None
    return split_of(*folder_names(raw, image))


def _shapes(raw: Path, file: Path, names: dict[int, str], problems: list[str]) -> list[Shape]:
    where = file.relative_to(raw).as_posix()
    shapes = []
    try:
        lines = text(file).splitlines() if file.read_bytes().strip() else []
    except (OSError, ValueError) as error:
        problems.append(f"{where}: {error}")
        return []
    for place, line in enumerate(lines, start=1):
        try:
            if line.strip():
                shapes.append(_shape(line.split(), names))
        except ValueError as error:
            problems.append(f"{where}: line {place}: {error}")
    return shapes


def _shape(words: list[str], names: dict[int, str]) -> Shape:
    if len(words) == 6:
        raise ValueError("has 6 numbers: the last is a confidence, and predictions are no labels")
    if len(words) < 5 or len(words) % 2 == 0:
        raise ValueError(f"is neither class, cx, cy, width, height nor class and points: has {len(words)} numbers")
    if not words[0].isdecimal():
        raise ValueError(f"the class {words[0]!r} is no whole number from 0")
    if names and int(words[0]) not in names:
        raise ValueError(f"the class {words[0]} has no name; there are {', '.join(map(str, sorted(names)))}")
    name = class_name(names[int(words[0])]) if names else f"class {int(words[0])}"
    values = [_fraction(word) for word in words[1:]]
    if len(values) == 4:
        cx, cy, width, height = values
        return Shape(name, box(cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2, side=1))
    points = polygon(list(zip(values[::2], values[1::2], strict=True)))
    return Shape(name, enclosing(points, side=1), (points,))


def _fraction(word: str) -> float:
    try:
        value = float(word)
    except ValueError as error:
        raise ValueError(f"{word!r} is no number") from error
    if not -_SLACK <= value <= 1 + _SLACK:
        raise ValueError(f"{word} is no fraction of the image; write positions and sizes from 0 to 1, not in pixels")
    return value
