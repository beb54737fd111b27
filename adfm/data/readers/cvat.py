"""CVAT for images 1.1: one annotations.xml for many images.

annotations.xml    and    images/000.jpg, images/<subset>/000.jpg or both beside each other
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from adfm.data.problems import MissingImage
from adfm.data.readers.annotations import (
    POINT,
    Shape,
    box,
    enclosing,
    folder_names,
    holds,
    labelled,
    listing,
    polygon,
    sample,
    split_of,
    unlisted,
    walk,
    within,
)
from adfm.data.readers.files import IMAGES, refuse, relative
from adfm.data.readers.shapes import bitmap, check_mask_size, ellipse, group, line, turned_box
from adfm.data.readers.verdicts import class_name, defect_type
from adfm.data.readers.xmlfiles import outermost
from adfm.records import Sample

_SHAPES = frozenset(("box", "polygon", "polyline", "ellipse", "mask", "points", "cuboid", "skeleton"))
_NO_AREA = frozenset(("cuboid", "skeleton"))
_FEW = 100  # a folder with more XML files than these has one an image, and opening all of them would take long
_LINE = "a polyline is the box round it"
_TAGS = "tags beside shapes are left out"


def matches(raw: Path) -> bool:
    """Whether there is an XML file with `annotations` near the top."""
    return holds(raw, lambda folder: any(map(_is_export, listing(folder, ".xml")[:_FEW])))


def read(raw: Path) -> Iterator[Sample]:
    """Yields the images of all XML files, in their order. One without a shape and a tag is normal.

    Boxes are in pixels from 0 on. A turned box or an ellipse is the box round it, cut off at the edge of the image,
    and an outline; polygons and masks are masks as well; a polyline is the box round it, at least one pixel wide.
    Shapes of the same group and class are one defect. An image that has tags alone is anomalous as a whole, with the
    tags as its defects, or normal if the tag says so; one with points is anomalous, without boxes. Cuboids and
    skeletons are refused.

    Images are in images/ beside the XML file, there in a folder of the name of their subset, or beside the XML file.
    `split` is that of the subset, else of the folders' names (train, val, valid, validation, test).

    The paths of all images are in memory.

    Args:
        raw: The raw data set; its name is the name of the data set and of the category.

    Raises:
        AdfmError: Everything that is wrong in the XML files, images that are missing, and images that no file lists:
            in one error, after the last sample.
    """
    problems: list[str] = []
    known: dict[str, str] = {}
    for folder in walk(raw):
        for file in listing(folder, ".xml"):
            if _is_export(file):
                yield from _samples(raw, file, known, problems)
    if not known and not problems:
        problems.append("no annotations.xml of CVAT lists an image")
    refuse(raw, "cvat", [*problems, *unlisted(raw, known)])


def _is_export(file: Path) -> bool:
    return outermost(file) == "annotations"


def _samples(raw: Path, file: Path, known: dict[str, str], problems: list[str]) -> Iterator[Sample]:
    where = relative(raw, file)
    try:
        for place, element in enumerate(_images(file), start=1):
            name = element.get("name", "")
            here = f"{where}: image {name!r}"
            image = _image(raw, file.parent, name, element.get("subset", ""))
            if image is None:
                problems.append(
                    MissingImage(f"{here}: there is no such image in images/ beside the file; export with the images")
                )
                continue
            if str(image) in known:
                problems.append(f"{here}: is listed twice, here as number {place}, and {known[str(image)]}")
                continue
            known[str(image)] = f"in {where} as number {place}"
            yield _sample(raw, image, element, here, problems)
    except ElementTree.ParseError as error:
        problems.append(f"{where}: is not XML ({error})")
    except (OSError, ValueError, LookupError) as error:  # LookupError: an encoding that the parser does not know
        problems.append(f"{where}: {error}")


def _images(file: Path) -> Iterator[ElementTree.Element]:
    """The elements of images, one in memory at a time.

    Raises:
        ValueError: It is CVAT's format for videos.
    """
    with file.open("rb") as content:
        events = ElementTree.iterparse(content, ("start", "end"))
        _, root = next(events)
        depth = 1
        for event, element in events:
            depth += 1 if event == "start" else -1
            if event == "end" and depth == 1:
                if element.tag == "track":
                    raise ValueError("has tracks: it is 'CVAT for video'; export the task as 'CVAT for images 1.1'")
                if element.tag == "image":
                    yield element
                root.clear()


def _image(raw: Path, folder: Path, name: str, subset: str) -> Path | None:
    """The image of a name, which has no suffix if it is a frame of a video."""
    slashed = name.replace("\\", "/")
    for base in ("images", "."):
        for inner in (f"{base}/{subset}", base) if subset else (base,):
            for tried in dict.fromkeys((name, slashed)):
                if image := within(raw, folder, f"{inner}/{tried}"):
                    return image
                if Path(tried).suffix.lower() not in IMAGES:
                    for suffix in (*IMAGES, *(suffix.upper() for suffix in IMAGES)):
                        if image := within(raw, folder, f"{inner}/{tried}{suffix}"):
                            return image
    return None


def _sample(raw: Path, image: Path, element: ElementTree.Element, here: str, problems: list[str]) -> Sample:
    size = _size(element)
    split = split_of(element.get("subset", ""), *folder_names(raw, image))
    drawn: list[tuple[str | None, Shape]] = []
    points: list[str] = []
    notes = []
    for place, part in enumerate((part for part in element if part.tag in _SHAPES), start=1):
        try:
            if part.tag == "points":
                points.append(class_name(part.get("label")))
            else:
                drawn.append((part.get("group_id"), _shape(part, size)))
            notes += [_LINE] if part.tag == "polyline" else []
        except ValueError as error:
            problems.append(f"{here}: shape {place}: {part.tag}: {error}")
    shapes = group(drawn)
    if len(shapes) < len(drawn):
        notes.append("shapes of one group and class are one defect")
    try:
        tags = defect_type(tag.get("label", "") for tag in element.findall("tag"))
        if tags == "" and (shapes or points):
            raise ValueError("a tag says that it is normal, but shapes are drawn on it; remove one of them")
    except ValueError as error:
        problems.append(f"{here}: {error}")
        tags = None
    if points:
        names = [*points, *(shape.name for shape in shapes)]
        return labelled(raw, image, names, split, [*notes, POINT], size=size)
    if tags and not shapes:
        return labelled(raw, image, [tags], split, notes, size=size)
    return sample(raw, image, shapes, split, [*notes, *([_TAGS] if tags else [])], size=size)


def _size(element: ElementTree.Element) -> tuple[int, int] | None:
    width, height = (element.get(side, "") for side in ("width", "height"))
    if not (width.isdecimal() and height.isdecimal() and len(width) < 10 and len(height) < 10):
        return None
    return (int(width), int(height)) if int(width) and int(height) else None


def _shape(part: ElementTree.Element, size: tuple[int, int] | None) -> Shape:
    name = class_name(part.get("label"))
    if part.tag in _NO_AREA:
        raise ValueError("is not an area; draw a rectangle, polygon, ellipse or mask in its place")
    if part.tag == "box":
        x1, y1, x2, y2 = (_number(part, side) for side in ("xtl", "ytl", "xbr", "ybr"))
        before = box(x1, y1, x2, y2)
        if degrees := _rotation(part):
            return turned_box(name, before, degrees)
        return Shape(name, before)
    if part.tag == "ellipse":
        cx, cy, rx, ry = (_number(part, side) for side in ("cx", "cy", "rx", "ry"))
        return ellipse(name, (cx, cy), (rx, ry), _rotation(part))
    if part.tag == "mask":
        left, top, width, height = (_whole(part, side) for side in ("left", "top", "width", "height"))
        return bitmap(name, _pixels(part.get("rle", ""), width, height), left, top, size)
    points = _points(part.get("points", ""))
    if part.tag == "polyline":
        if len(points) < 2:
            raise ValueError(f"a line needs 2 points, and has {len(points)}")
        return line(name, points, size)
    outline = polygon(points)
    return Shape(name, enclosing(outline), (outline,))


def _pixels(rle: str, width: int, height: int) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """A mask of runs row by row, background first, [height, width]."""
    check_mask_size(width, height)
    try:
        counts = [int(word) for word in rle.split(",")]
    except ValueError as error:
        raise ValueError("its rle has something else than whole numbers") from error
    if min(counts) < 0 or sum(counts) != width * height:
        raise ValueError(f"its rle does not have {width * height} pixels, as its width and height do")
    return np.repeat(np.resize(np.array([False, True]), len(counts)), counts).reshape(height, width)


def _points(text: str) -> list[tuple[float, float]]:
    points = []
    for pair in filter(None, text.split(";")):
        words = pair.split(",")
        try:
            x, y = (float(word) for word in words)
        except ValueError as error:
            raise ValueError(f"{pair[:40]!r} is not a point") from error
        if not (math.isfinite(x) and math.isfinite(y)):
            raise ValueError(f"{pair[:40]!r} is not finite")
        points.append((x, y))
    return points


def _rotation(part: ElementTree.Element) -> float:
    """Degrees, clockwise about the centre."""
    angle = _number(part, "rotation") if part.get("rotation") else 0.0
    if not math.isfinite(angle):
        raise ValueError(f"its rotation {part.get('rotation')!r} is not finite")
    return angle % 360


def _number(part: ElementTree.Element, name: str) -> float:
    value = part.get(name)
    try:
        return float(value or "")
    except ValueError as error:
        raise ValueError(f"has no number {name}, but {value!r}") from error


def _whole(part: ElementTree.Element, name: str) -> int:
    number = _number(part, name)
    if not abs(number) < 1e9 or number != int(number):
        raise ValueError(f"{name} is not a whole number: {part.get(name)!r}")
    return int(number)
