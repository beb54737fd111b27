"""CVAT for images 1.1: one annotations.xml for many images.

annotations.xml    and    images/000.jpg, images/<subset>/000.jpg or both beside each other
"""

import contextlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from adfm.data.readers.annotations import Shape, box, outlined, sample, unlisted
from adfm.data.readers.files import IMAGES, DataSet, NoImage, holds, listing, walk, within
from adfm.data.readers.shapes import bitmap, check_mask_size, ellipse, group, line, turned_box, unpacked
from adfm.data.readers.textfiles import Size, decimal, pixel_size
from adfm.data.readers.verdicts import class_name, defect_type
from adfm.data.readers.xmlfiles import outermost
from adfm.records import Sample

FORM = "annotations.xml of 'CVAT for images 1.1', images/*"
_SHAPES = frozenset(("box", "polygon", "polyline", "ellipse", "mask", "points", "cuboid", "skeleton"))
_FEW = 100  # a folder with more XML files than these has one an image, and opening all of them would take long


def matches(raw: Path) -> bool:
    """Whether there is an XML file with `annotations` near the top."""
    return holds(raw, lambda folder: "annotations" in map(outermost, islice(listing(folder, ".xml"), _FEW)))


def read(raw: Path) -> Iterator[Sample]:
    """Yield the images of all XML files, in their order. One without a shape and a tag is normal.

    Boxes are in pixels from 0 on. A turned box or an ellipse is the box round it, cut off at the edge of the image,
    and an outline; polygons and masks are masks as well; a polyline is the box round it, at least one pixel wide.
    Shapes of the same group and class are one defect. An image that has tags alone is anomalous as a whole, with the
    tags as its defects, or normal if the tag says so; one with points is anomalous, without boxes.

    `split` is that of the subset, else of the folders' names. The paths of all images are in memory.
    """
    data = DataSet(raw, "cvat")
    for folder in walk(raw):
        for file in listing(folder, ".xml"):
            if outermost(file) == "annotations":
                yield from _samples(data, file)
    if not (data.listed or data.problems):
        data.problems.append("no annotations.xml of CVAT lists an image")
    data.problems += unlisted(data)
    data.finish()


def _samples(data: DataSet, file: Path) -> Iterator[Sample]:
    where = data.relative(file)
    try:
        for place, element in enumerate(_images(file), start=1):
            name = element.get("name", "")
            with data.at(here := f"{where}: image {name!r}"):
                image = _image(data.raw, file.parent, name, element.get("subset", ""))
                data.claim(image, f"{where} as number {place}")
                yield _sample(data, image, element, here)
    except ElementTree.ParseError as error:
        data.add(where, f"is not XML ({error})")
    except (OSError, ValueError, LookupError) as error:  # LookupError: an encoding that the parser does not know
        data.add(where, str(error))


def _images(file: Path) -> Iterator[ElementTree.Element]:
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
                root.clear()  # so that one image is in memory at a time


def _image(raw: Path, folder: Path, name: str, subset: str) -> Path:
    slashed = name.replace("\\", "/")
    # Images are in images/ beside the file, there in a folder of the name of their subset, or beside the file.
    for base in ("images", "."):
        for inner in (f"{base}/{subset}", base) if subset else (base,):
            for written in dict.fromkeys((name, slashed)):  # a backslash may be part of a name on Linux
                # The name of a frame of a video has no suffix.
                known = Path(written).suffix.lower() in IMAGES
                suffixes = ("",) if known else ("", *sorted(IMAGES), *map(str.upper, sorted(IMAGES)))
                there = (within(raw, folder, f"{inner}/{written}{suffix}") for suffix in suffixes)
                # By the name in lower case: where a disk does not tell cases apart, .png and .PNG are one file.
                paths = list({path.name.lower(): path for path in there if path}.values())
                if len(paths) > 1:
                    several = ", ".join(path.relative_to(raw).as_posix() for path in paths)
                    raise ValueError(f"may be any of the images {several}; keep one, or give the others other names")
                if paths:
                    return paths[0]
    raise NoImage("the image is missing in images/ beside the file; export with the images")


def _sample(data: DataSet, image: Path, element: ElementTree.Element, here: str) -> Sample:
    size = None
    with contextlib.suppress(ValueError):  # a size that is nonsense says no more than none
        size = pixel_size(element.get("width"), element.get("height"), as_text=True)
    split = data.split(image, element.get("subset", ""))
    drawn: list[tuple[str | None, Shape]] = []
    points: list[str] = []
    notes = []
    for place, part in enumerate((part for part in element if part.tag in _SHAPES), start=1):
        with data.at(f"{here}: shape {place}: {part.tag}"):
            if part.tag == "points":
                points.append(class_name(part.get("label")))
            else:
                drawn.append((part.get("group_id"), _shape(part, size)))
            notes += ["a polyline is the box round it"] if part.tag == "polyline" else []
    shapes = group(drawn)
    if len(shapes) < len(drawn):
        notes.append("shapes of one group and class are one defect")
    tags = defect_type(tag.get("label", "") for tag in element.findall("tag"))
    if tags == "" and (shapes or points):
        raise ValueError("a tag says that it is normal, but shapes are drawn on it; remove one of them")
    notes += ["tags beside shapes are left out"] if tags and shapes and not points else []
    return sample(data, image, shapes, split, notes, points, tags, size=size)


def _shape(part: ElementTree.Element, size: Size) -> Shape:
    name = class_name(part.get("label"))
    if part.tag in ("cuboid", "skeleton"):
        raise ValueError("is not an area; draw a rectangle, polygon, ellipse or mask in its place")
    if part.tag == "box":
        # CVAT turns it about its centre, clockwise.
        before, degrees = box(*(_number(part, side) for side in ("xtl", "ytl", "xbr", "ybr"))), _rotation(part)
        return turned_box(name, before, degrees) if degrees else Shape(name, before)
    if part.tag == "ellipse":
        cx, cy, rx, ry = (_number(part, side) for side in ("cx", "cy", "rx", "ry"))
        return ellipse(name, (cx, cy), (rx, ry), _rotation(part))
    if part.tag == "mask":
        left, top, width, height = (_whole(part, side) for side in ("left", "top", "width", "height"))
        return bitmap(name, _pixels(part.get("rle", ""), width, height), left, top, size)
    points = []
    for pair in filter(None, part.get("points", "").split(";")):
        x, comma, y = pair.partition(",")
        if not comma:
            raise ValueError(f"{pair[:40]!r} is not a point")
        points.append((decimal(x, "x"), decimal(y, "y")))
    if part.tag == "polygon":
        return outlined(name, points)
    if len(points) < 2:
        raise ValueError(f"a line needs 2 points, and has {len(points)}")
    return line(name, points, size)


def _pixels(rle: str, width: int, height: int) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    # Lengths of runs, row by row, background first.
    check_mask_size(width, height)
    try:
        counts = [int(word) for word in rle.split(",")]
    except ValueError as error:
        raise ValueError("its rle has something else than whole numbers") from error
    if min(counts) < 0 or sum(counts) != width * height:
        raise ValueError(f"its rle does not have {width * height} pixels, as its width and height do")
    return unpacked(counts).reshape(height, width)


def _rotation(part: ElementTree.Element) -> float:
    return _number(part, "rotation") % 360 if part.get("rotation") else 0.0


def _number(part: ElementTree.Element, name: str) -> float:
    return decimal(part.get(name), name)


def _whole(part: ElementTree.Element, name: str) -> int:
    number = _number(part, name)
    if abs(number) >= 1e9 or number != int(number):
        raise ValueError(f"{name} is not a whole number: {part.get(name)!r}")
    return int(number)
