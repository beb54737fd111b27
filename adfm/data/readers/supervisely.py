"""Supervisely: a JSON file an image, in folders of data sets.

<project>/meta.json, <project>/<data set>/img/000.jpg    and    <project>/<data set>/ann/000.jpg.json
"""

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from adfm.data.readers.annotations import Shape, enclosing, polygon, sample
from adfm.data.readers.files import DataSet, NoImage, folders, holds, images, listing, split_of, walk
from adfm.data.readers.shapes import Point, bitmap, check_mask_size, line, png
from adfm.data.readers.textfiles import Size, member, mentions, optional, parsed, pixel_size, point
from adfm.data.readers.verdicts import class_name, defect_type, is_verdict
from adfm.records import Polygon, Sample, Split

FORM = "<project>/meta.json, <project>/<data set>/img/*, <project>/<data set>/ann/*.json"
_ANN, _IMG, _META = "ann", "img", "meta.json"  # names that Supervisely sets
_LINES = ("line", "polyline")
_PICTURES = "masks_"  # masks_human, masks_machine, masks_instances: drawn from the annotations
_LARGEST = 1 << 28  # bytes of an unpacked bitmap


class _Meta(NamedTuple):
    geometries: dict[str, str]  # of the classes
    tags_are_labels: bool  # of images


def matches(raw: Path) -> bool:
    """Whether there is a folder with img/ and ann/, and a JSON file in it with objects, near the top."""
    return holds(raw, _is_dataset)


def read(raw: Path) -> Iterator[Sample]:
    """Yield the images of all data sets of a project. One whose file has no object is normal.

    A line is the box round it; an image with points is anomalous, without boxes; keypoints and cuboids are refused.
    `split` is that of a tag called train, val or test, else of the folders' names. Other tags label images without an
    object if one of the project's tags is OK, NG or the like, or it has no class of objects.
    """
    data = DataSet(raw, "supervisely")
    for folder in walk(raw):
        if folder.name == _ANN or folder.name.startswith(_PICTURES):
            continue
        if (folder / _ANN).is_dir():
            yield from _dataset(data, folder)
        elif folder.name != _IMG and (stray := images(folder)):
            data.add(folder, f"images outside {_IMG}/, move them there: {', '.join(image.name for image in stray)}")
    data.finish(f"no image in a folder {_IMG}/ beside {_ANN}/")


def _is_dataset(folder: Path) -> bool:
    if not (folder / _ANN).is_dir() or not ((folder / _IMG).is_dir() or (folder.parent / _META).is_file()):
        return False
    return any(mentions(file, b'"objects"', b'"size"') for file in listing(folder / _ANN, ".json"))


def _dataset(data: DataSet, folder: Path) -> Iterator[Sample]:
    files = {file.name.removesuffix(file.suffix): file for file in listing(folder / _ANN, ".json")}
    meta = _meta(data, folder)
    owners: dict[str, Path] = {}
    for image in images(folder / _IMG):
        key = image.name if image.name in files else image.stem  # early versions left the suffix out
        with data.at(image):
            if key not in files:
                raise ValueError(f"its {_ANN}/{image.name}.json is missing; export the annotations as well")
            if (owner := owners.setdefault(key, image)) != image:
                data.add(files[key], f"belongs to {owner.name} and {image.name}; rename one")
            with data.at(files[key]):
                yield _sample(data, image, files[key], meta)
    for key, file in files.items():
        if key not in owners:
            data.add(file, NoImage(f"its image {_IMG}/{key} is missing"))
    for inside in folders(folder / _IMG):
        data.add(inside, f"images in a folder of {_IMG}/; move them into {_IMG}/ itself")


def _meta(data: DataSet, folder: Path) -> _Meta:
    files = (above / _META for above in data.above(folder))
    if file := next((file for file in files if file.is_file()), None):
        with data.at(file):
            content = parsed(file)
            classes = member(content, "classes", list)
            geometries = {member(one, "title", str): member(one, "shape", str) for one in classes}
            tags = optional(content, "tags", list) or []
            return _Meta(geometries, not classes or any(is_verdict(optional(tag, "name", str)) for tag in tags))
    return _Meta({}, False)


def _sample(data: DataSet, image: Path, file: Path, meta: _Meta) -> Sample:
    where, content = data.relative(file), parsed(file)
    stated = member(content, "size", dict)
    size = pixel_size(stated.get("width"), stated.get("height"))
    objects = member(content, "objects", list)
    split, tags = _tags(content)
    label = defect_type(tags) if meta.tags_are_labels else None
    shapes: list[Shape] = []
    points: list[str] = []
    if label == "" and objects:
        data.add(where, "a tag says that it is normal, but objects are drawn on it; remove one of them")
    # Tags may say anything; without a word such as OK among them they are no labels.
    notes = ["tags of an image are left out"] if tags and (objects or not meta.tags_are_labels) else []
    for place, drawn in enumerate(objects, start=1):
        with data.at(f"{where}: object {place}"):
            title = member(drawn, "classTitle", str)
            # Early versions wrote the geometry for the class only.
            by_class = "bitmap" if optional(drawn, "bitmap", object) else meta.geometries.get(title)
            geometry = optional(drawn, "geometryType", str) or by_class
            if geometry == "point":
                points.append(class_name(title))
            else:
                shapes.append(_shape(class_name(title), drawn, geometry, size))
            notes += ["a line is the box round it"] if geometry in _LINES else []
    return sample(data, image, shapes, split or data.split(image), notes, points, label, size=size)


def _tags(content: object) -> tuple[Split | None, list[str]]:
    """Return the split that the tags of an image name, and the other tags."""
    # A tag is an object with a name, or the name alone.
    tags = optional(content, "tags", list) or []
    names = [tag.get("name") if isinstance(tag, dict) else tag for tag in tags]
    splits = {name: split_of(name) if name.isalpha() else None for name in names if isinstance(name, str)}
    if len({*splits.values()} - {None}) > 1:
        raise ValueError("has tags of several splits; keep one of them")
    return next(filter(None, splits.values()), None), [name for name, split in splits.items() if not split]


def _shape(name: str, drawn: object, geometry: object, size: Size) -> Shape:
    if geometry == "bitmap":
        drawing = member(drawn, "bitmap", dict)
        left, top = (int(side) for side in point(member(drawing, "origin", list)))
        pixels = png(member(drawing, "data", str), lambda packed: zlib.decompressobj().decompress(packed, _LARGEST))
        return bitmap(name, pixels, left, top, size)
    if geometry == "multipolygon":
        return _polygons(name, [_rings(part) for part in member(drawn, "parts", list)], size)
    if geometry not in ("rectangle", "polygon", *_LINES):
        raise ValueError(f"a shape of the type {geometry!r} is not read; draw a rectangle, polygon, line or bitmap")
    outer, holes = _rings(member(drawn, "points", dict))
    if geometry == "polygon":
        return _polygons(name, [(polygon(outer), holes)], size)
    if len(outer) < 2:
        raise ValueError(f"a {geometry} has 2 points or more, not {len(outer)}")
    corners = _last_included(outer)
    return Shape(name, enclosing(corners)) if geometry == "rectangle" else line(name, corners)


def _polygons(name: str, parts: list[tuple[Polygon, list[Polygon]]], size: Size) -> Shape:
    if not parts:
        raise ValueError("has no polygon")
    outlines = tuple(polygon(outer) for outer, _ in parts)
    round_it = enclosing(_last_included([corner for outline in outlines for corner in outline]))
    if not any(holes for _, holes in parts):
        return Shape(name, round_it, outlines)
    if size is None:
        raise ValueError("has a hole, but the file does not state the size of the image")
    # An outline has no hole: a mask has to take its place.
    left, top = int(max(round_it.x1, 0)), int(max(round_it.y1, 0))
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
    outer = tuple(map(point, member(part, "exterior", list)))
    holes = optional(part, "interior", list) or []
    are_lists = all(isinstance(hole, list) for hole in holes)
    return outer, [tuple(map(point, hole)) for hole in holes] if are_lists else []


def _last_included(points: Sequence[Point]) -> list[Point]:
    # Corners in whole numbers name pixels, the last one included: so the box reaches to their far ends.
    return [*points, *((x + 1 if x == int(x) else x, y + 1 if y == int(y) else y) for x, y in points)]
