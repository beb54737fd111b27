"""LabelMe: a JSON file an image, `{shapes: [{label, points, shape_type}], imagePath}`.

000.jpg    and    000.json    in one folder, or all JSON files in a folder of their own
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from adfm.data.readers.annotations import (
    Shape,
    class_name,
    enclosing,
    folder_names,
    holds,
    listing,
    locate,
    member,
    mentions,
    near,
    number,
    parsed,
    polygon,
    sample,
    split_of,
    walk,
)
from adfm.data.readers.files import images, refuse
from adfm.records import Rle, Sample

_MANIFEST = "manifest.json"  # of a fetched data set
_CORNERS = 64  # of the polygon that stands for a circle


def matches(raw: Path) -> bool:
    """Whether there is a JSON file with shapes and imagePath near the top."""
    words = (b'"shapes"', b'"imagePath"')
    return holds(raw, lambda folder: any(mentions(file, *words) for file in listing(folder, ".json")))


def read(raw: Path) -> Iterator[Sample]:
    """Yields the images with a JSON file, then those without one, which are normal, as are those without a shape.

    A rectangle is a box; a polygon, a circle and a mask are masks as well. Points and lines have no area and are
    refused. `imagePath` is looked for beside the JSON file and in the folders round it. `split` is what the names of
    the image's folders say: train, val, valid, validation, test.

    The paths of all annotated images are in memory.

    Args:
        raw: The raw data set; its name is the name of the data set and of the category.

    Raises:
        AdfmError: Everything that is wrong in the JSON files, images that are missing, and a data set without any JSON
            file: in one error, after the last sample.
    """
    problems: list[str] = []
    annotated: dict[Path, str] = {}
    for folder in walk(raw):
        around = near(raw, folder)
        for file in listing(folder, ".json"):
            if file == raw / _MANIFEST:
                continue
            where = file.relative_to(raw).as_posix()
            try:
                content = parsed(file)
                drawn = member(content, "shapes", list)
                image = _image(raw, file, content, around)
                if image in annotated:
                    raise ValueError(f"{image.relative_to(raw).as_posix()} has a file before, {annotated[image]}")
            except ValueError as error:
                problems.append(f"{where}: {error}")
                continue
            annotated[image] = where
            shapes = []
            for place, shape in enumerate(drawn, start=1):
                try:
                    shapes.append(_shape(shape, content))
                except ValueError as error:
                    problems.append(f"{where}: shape {place}: {error}")
            yield sample(raw, image, shapes, split_of(*folder_names(raw, image)))
    for folder in walk(raw):
        for image in images(folder):
            if image not in annotated:
                yield sample(raw, image, [], split_of(*folder_names(raw, image)))
    if not annotated and not problems:
        problems.append("no LabelMe file: no JSON file with shapes")
    refuse(raw, "labelme", problems)


def _image(raw: Path, file: Path, content: dict[str, Any], around: list[Path]) -> Path:
    name = member(content, "imagePath", str)
    try:
        return locate(raw, name, [file.parent], around)
    except ValueError as error:
        if content.get("imageData"):
            raise ValueError(
                f"{error}; the file holds a copy of it, to be had with `labelmetk extract-image {file.name}`"
                " (pip install labelme-toolkit)"
            ) from error
        raise


def _shape(drawn: object, content: dict[str, Any]) -> Shape:
    name = class_name(member(drawn, "label", str))
    points = [_point(value) for value in member(drawn, "points", list)]
    kind = drawn.get("shape_type") if isinstance(drawn, dict) else None
    if kind in ("polygon", None):  # early versions knew nothing else
        outline = polygon(points)
        return Shape(name, enclosing(outline), (outline,))
    if kind not in ("rectangle", "circle", "mask"):
        raise ValueError(
            f"a shape of the type {kind!r} has no area; draw a rectangle, polygon, circle or mask in its place"
        )
    if len(points) < 2:
        raise ValueError(f"a {kind} has 2 points, not {len(points)}")
    if kind == "rectangle":
        return Shape(name, enclosing(points))
    if kind == "circle":
        (x, y), edge = points[:2]
        radius = math.dist((x, y), edge)
        turns = [2 * math.pi * corner / _CORNERS for corner in range(_CORNERS)]
        outline = tuple((x + radius * math.cos(turn), y + radius * math.sin(turn)) for turn in turns)
        return Shape(name, enclosing([(x - radius, y - radius), (x + radius, y + radius)]), (outline,))
    return _mask(name, points, drawn, content)


def _point(value: object) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{str(value)[:40]!r} is no point [x, y]")
    return number(value[0]), number(value[1])


def _mask(name: str, points: list[tuple[float, float]], drawn: object, content: dict[str, Any]) -> Shape:
    """A mask is a PNG of the part of the image between two corners, both of which belong to it."""
    (left, top), (right, bottom) = ((int(x), int(y)) for x, y in points[:2])
    height, width = member(content, "imageHeight", int), member(content, "imageWidth", int)
    if not (0 <= left <= right < width and 0 <= top <= bottom < height):
        raise ValueError(f"its corners {left}, {top} and {right}, {bottom} do not lie in an image of {width}x{height}")
    if width * height > (Image.MAX_IMAGE_PIXELS or 0):
        raise ValueError(f"an image of {width}x{height} is too large for a mask")
    span = (right - left + 1, bottom - top + 1)
    try:
        encoded = base64.b64decode(member(drawn, "mask", str), validate=True)
    except binascii.Error as error:
        raise ValueError("its mask cannot be read (it is no base64 text)") from error
    try:
        with Image.open(io.BytesIO(encoded), formats=["PNG"]) as file:
            size = file.size
            part = np.asarray(file) != 0 if size == span else np.empty(0)
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise ValueError(f"its mask cannot be read ({error})") from error
    if size != span:
        raise ValueError(f"its mask is {size[0]}x{size[1]}, and its corners span {span[0]}x{span[1]}")
    rows, columns = np.nonzero(part.reshape(*part.shape[:2], -1).any(axis=2))
    if not rows.size:
        raise ValueError("its mask shows nothing")
    pixels = np.zeros((height, width), bool)
    pixels[rows + top, columns + left] = True
    column_by_column = pixels.T.ravel()
    changes = np.flatnonzero(np.diff(column_by_column, prepend=False))
    counts = np.diff([0, *changes, pixels.size])
    corners = [(left + columns.min(), top + rows.min()), (left + columns.max() + 1, top + rows.max() + 1)]
    box = enclosing([(float(x), float(y)) for x, y in corners])
    return Shape(name, box, rle=Rle(height, width, tuple(counts.tolist())))
