"""Supervisely: a JSON file an image, in folders of data sets.

<project>/meta.json, <project>/<data set>/img/000.jpg    and    <project>/<data set>/ann/000.jpg.json
"""

from __future__ import annotations

import base64
import binascii
import io
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from adfm.data.problems import MissingImage
from adfm.data.readers.annotations import (
    POINT,
    Shape,
    enclosing,
    folder_names,
    holds,
    labelled,
    listing,
    member,
    mentions,
    number,
    parsed,
    point,
    polygon,
    sample,
    split_of,
    walk,
)
from adfm.data.readers.files import folders, images, refuse, relative
from adfm.data.readers.shapes import Point, bitmap, check_mask_size, line
from adfm.data.readers.verdicts import class_name, defect_type, is_verdict
from adfm.records import Polygon, Sample, Split

_ANN, _IMG, _META = "ann", "img", "meta.json"
_LINES = ("line", "polyline")
_LINE = "a line is the box round it"
_PICTURES = "masks_"  # masks_human, masks_machine, masks_instances: drawn from the annotations
_LARGEST = 1 << 28  # bytes of an unpacked bitmap

_Size = tuple[int, int] | None


class _Meta(NamedTuple):
    """What meta.json says of a project: the geometry of every class, and whether its tags are labels of images."""

    geometries: dict[str, str]
    tags_are_labels: bool


def matches(raw: Path) -> bool:
    """Whether there is a folder with img/ and ann/, and a JSON file in it with objects, near the top."""
    return holds(raw, _is_dataset)


def read(raw: Path) -> Iterator[Sample]:
    """Yields the images of all data sets of a project. One whose file has no object is normal.

    Corners are numbers of pixels, the last one included. A rectangle is a box; a polygon and a bitmap are masks as
    well; a line is the box round it; an image with points is anomalous, without boxes. Keypoints and cuboids are
    refused. Image tags called train, val or test are splits. The others are the labels of images without an object if
    one of the project's tags is OK, NG or the like, or the project has no class of objects; otherwise they are left
    out. `split` is that of a tag, else of the folders' names (train, val, valid, validation, test).

    Args:
        raw: The raw data set; its name is the name of the data set and of the category.

    Raises:
        AdfmError: Everything that is wrong in the JSON files, JSON files without an image, images without one or
            outside img/: in one error, after the last sample.
    """
    problems: list[str] = []
    empty = True
    for folder in walk(raw):
        if folder.name == _ANN or folder.name.startswith(_PICTURES):
            continue
        if (folder / _ANN).is_dir():
            for image in _dataset(raw, folder, problems):
                empty = False
                yield image
        elif folder.name != _IMG and (stray := images(folder)):
            names = ", ".join(image.name for image in stray)
            problems.append(f"{relative(raw, folder)}: images outside {_IMG}/, move them there: {names}")
    if empty and not problems:
        problems.append(f"no image in a folder {_IMG}/ beside {_ANN}/")
    refuse(raw, "supervisely", problems)


def _is_dataset(folder: Path) -> bool:
    if not (folder / _ANN).is_dir() or not ((folder / _IMG).is_dir() or (folder.parent / _META).is_file()):
        return False
    return any(mentions(file, b'"objects"', b'"size"') for file in listing(folder / _ANN, ".json"))


def _dataset(raw: Path, folder: Path, problems: list[str]) -> Iterator[Sample]:
    files = {file.name.removesuffix(file.suffix): file for file in listing(folder / _ANN, ".json")}
    meta = _meta(raw, folder, problems)
    used = set()
    stems: dict[str, Path] = {}
    for image in images(folder / _IMG):
        key = image.name if image.name in files else image.stem  # early versions left the suffix out
        where = relative(raw, image)
        if key not in files:
            problems.append(f"{where}: there is no {_ANN}/{image.name}.json for it; export the annotations as well")
            continue
        if stems.setdefault(key, image) != image:
            problems.append(f"{relative(raw, files[key])}: belongs to {stems[key].name} and {image.name}; rename one")
        used.add(key)
        yield _sample(raw, image, files[key], meta, problems)
    for key, file in files.items():
        if key not in used:
            where = relative(raw, file)
            problems.append(MissingImage(f"{where}: there is no image {_IMG}/{key} for it"))
    problems += [
        f"{relative(raw, inside)}: images in a folder of {_IMG}/; move them into {_IMG}/ itself"
        for inside in folders(folder / _IMG)
    ]


def _meta(raw: Path, folder: Path, problems: list[str]) -> _Meta:
    """The meta.json of the project that a data set is in."""
    for above in folder.parents:
        file = above / _META
        if above.is_relative_to(raw) and file.is_file():
            try:
                content = parsed(file)
                classes = member(content, "classes", list)
                geometries = {one["title"]: one["shape"] for one in classes}
                tags = content["tags"] if isinstance(content.get("tags"), list) else []
                verdicts = any(is_verdict(tag.get("name")) for tag in tags if isinstance(tag, dict))
                return _Meta(geometries, verdicts or not classes)
            except (KeyError, TypeError, ValueError) as error:
                problems.append(f"{relative(raw, file)}: {error}")
                break
    return _Meta({}, False)


def _sample(raw: Path, image: Path, file: Path, meta: _Meta, problems: list[str]) -> Sample:
    where = relative(raw, file)
    try:
        content = parsed(file)
        size = _size(content)
        objects = member(content, "objects", list)
        split, tags = _tags(content)
        label = defect_type(tags) if meta.tags_are_labels else None
    except ValueError as error:
        problems.append(f"{where}: {error}")
        return sample(raw, image, [])
    shapes: list[Shape] = []
    points: list[str] = []
    if label == "" and objects:
        problems.append(f"{where}: a tag says that it is normal, but objects are drawn on it; remove one of them")
    notes = ["tags of an image are left out"] if tags and (objects or not meta.tags_are_labels) else []
    for place, drawn in enumerate(objects, start=1):
        try:
            geometry = _geometry(drawn, meta)
            if geometry == "point":
                points.append(class_name(member(drawn, "classTitle", str)))
            else:
                shapes.append(_shape(drawn, geometry, size))
            notes += [_LINE] if geometry in _LINES else []
        except ValueError as error:
            problems.append(f"{where}: object {place}: {error}")
    split = split or split_of(*folder_names(raw, image))
    if points:
        names = [*points, *(shape.name for shape in shapes)]
        return labelled(raw, image, names, split, [*notes, POINT], size=size)
    if label and not shapes:
        return labelled(raw, image, [label], split, notes, size=size)
    return sample(raw, image, shapes, split, notes, size=size)


def _size(content: object) -> _Size:
    size = member(content, "size", dict)
    width, height = (int(number(size.get(side))) for side in ("width", "height"))
    return (width, height) if width > 0 and height > 0 else None


def _tags(content: object) -> tuple[Split | None, list[str]]:
    """The split that the tags of an image name, and the other tags."""
    tags = content.get("tags") if isinstance(content, dict) else None
    names = [tag.get("name") if isinstance(tag, dict) else tag for tag in tags] if isinstance(tags, list) else []
    texts = [name for name in names if isinstance(name, str)]
    splits = {split for name in texts if (split := split_of(name)) and name.isalpha()}
    if len(splits) > 1:
        raise ValueError("has tags of several splits; keep one of them")
    return next(iter(splits), None), [name for name in texts if not (split_of(name) and name.isalpha())]


def _geometry(drawn: object, meta: _Meta) -> object:
    """The geometry of an object; early versions wrote it for the class only."""
    title = member(drawn, "classTitle", str)
    if not isinstance(drawn, dict) or isinstance(drawn.get("geometryType"), str):
        return member(drawn, "geometryType", str)
    return "bitmap" if drawn.get("bitmap") else meta.geometries.get(title)


def _shape(drawn: object, geometry: object, size: _Size) -> Shape:
    name = class_name(member(drawn, "classTitle", str))
    if geometry == "bitmap":
        drawing = member(drawn, "bitmap", dict)
        left, top = (int(side) for side in point(member(drawing, "origin", list)))
        return bitmap(name, _pixels(member(drawing, "data", str)), left, top, size)
    if geometry == "multipolygon":
        return _polygons(name, [_rings(part) for part in member(drawn, "parts", list)], size)
    if geometry not in ("rectangle", "polygon", *_LINES):
        raise ValueError(
            f"a shape of the type {geometry!r} is not a rectangle, polygon, line or bitmap; draw one in its place"
        )
    outer, holes = _rings(member(drawn, "points", dict))
    if geometry == "polygon":
        return _polygons(name, [(polygon(outer), holes)], size)
    if len(outer) < 2:
        raise ValueError(f"a {geometry} has 2 points or more, not {len(outer)}")
    if geometry == "rectangle":
        return Shape(name, enclosing(_last_included(outer)))
    return line(name, _last_included(outer))


def _polygons(name: str, parts: list[tuple[Polygon, list[Polygon]]], size: _Size) -> Shape:
    """Polygons of one object; a hole in one makes a mask of them."""
    if not parts:
        raise ValueError("has no polygon")
    outlines = [polygon(outer) for outer, _ in parts]
    corners = [corner for outline in outlines for corner in outline]
    if not any(holes for _, holes in parts):
        return Shape(name, enclosing(_last_included(corners)), tuple(outlines))
    round_it = enclosing(_last_included(corners))
    left, top = int(max(round_it.x1, 0)), int(max(round_it.y1, 0))
    if size is None:
        raise ValueError("has a hole, but the file does not state the size of the image")
    width, height = int(min(round_it.x2, size[0])) - left, int(min(round_it.y2, size[1])) - top
    check_mask_size(width, height)
    part = np.zeros((height, width), bool)
    for outer, holes in parts:
        one = Image.new("1", (width, height))
        draw = ImageDraw.Draw(one)
        draw.polygon([(x - left, y - top) for x, y in outer], fill=1)
        for hole in holes:
            draw.polygon([(x - left, y - top) for x, y in polygon(hole)], fill=0)
        part |= np.asarray(one)
    return bitmap(name, part, left, top, size)


def _rings(part: object) -> tuple[Polygon, list[Polygon]]:
    """The outline and the holes of a polygon."""
    outer = tuple(point(value) for value in member(part, "exterior", list))
    holes = part.get("interior") if isinstance(part, dict) else None
    if not isinstance(holes, list) or not all(isinstance(hole, list) for hole in holes):
        holes = []
    return outer, [tuple(point(value) for value in hole) for hole in holes]


def _last_included(points: Sequence[Point]) -> list[Point]:
    """The corners, and the far ends of the pixels in whole numbers that they name."""
    ends = [(x + 1 if x == int(x) else x, y + 1 if y == int(y) else y) for x, y in points]
    return [*points, *ends]


def _pixels(data: str) -> NDArray[np.bool_]:
    """The pixels of a bitmap: a PNG, packed by zlib, whose background is transparent."""
    try:
        packed = base64.b64decode(data, validate=True)
        unpacked = zlib.decompressobj().decompress(packed, _LARGEST)
        with Image.open(io.BytesIO(unpacked), formats=["PNG"]) as file:
            check_mask_size(*file.size)
            if "transparency" in file.info or file.mode in ("LA", "RGBA"):
                return np.asarray(file.convert("RGBA"))[..., 3] > 0
            values = np.asarray(file) != 0
    except binascii.Error as error:
        raise ValueError("its bitmap cannot be read (it is not base64 text)") from error
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise ValueError(f"its bitmap cannot be read ({error})") from error
    return np.asarray(values.reshape(*values.shape[:2], -1).any(axis=2))
