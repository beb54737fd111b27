"""COCO JSON: one file or several, `{images, annotations, categories}`, in any folder of the data set.

annotations/instances_train2017.json    and    train2017/000.jpg, images/train2017/000.jpg or images/000.jpg
train/_annotations.coco.json            and    train/000.jpg
"""

import contextlib
import io
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from adfm.data import contents
from adfm.data.readers.annotations import Shape, box, bracketed, polygon, sample, unlisted
from adfm.data.readers.files import DataSet, holds, listing, walk
from adfm.data.readers.lookup import Images
from adfm.data.readers.shapes import turned_box
from adfm.data.readers.textfiles import Size, member, mentions, number, optional, parsed, pixel_size
from adfm.data.readers.verdicts import class_name
from adfm.records import Polygon, Rle, Sample

_Id = int | str
_Entries = dict[_Id, dict[str, Any]]

FORM = "annotations/*.json with images, annotations and categories; images/*"
_KEYS = ("images", "annotations", "categories")
_SLACK = 2  # pixels between a box and its outline: tools round either, and some count the last pixel and some do not
_MANY = 5  # annotations whose areas fit the same wrong reading within a pixel a side: no chance


def matches(raw: Path) -> bool:
    """Whether there is a JSON file with images, annotations and categories near the top."""
    words = [f'"{key}"'.encode() for key in _KEYS]
    return holds(raw, lambda folder: any(mentions(file, *words) for file in listing(folder, ".json")))


def read(raw: Path) -> Iterator[Sample]:
    """Yield the images that the JSON files list, file by file.

    An annotation is a defect: its `bbox` the box, its `segmentation` (polygons, or run lengths, compressed or not) the
    mask. A box that has another meaning than COCO's, by its outline or its area, is refused. `split` is what the file's
    name, its folders or the image's folders say. Other JSON files, such as captions and panoptic segmentations, are
    ignored. In memory are one JSON file, and the paths of all images.
    """
    data, pictures = DataSet(raw, "coco"), Images(raw)
    seen, panoptic = False, []
    for file in (file for folder in walk(raw) for file in listing(folder, ".json")):
        content = None
        with data.at(file):
            content = parsed(file)
        if isinstance(content, dict) and all(isinstance(content.get(key), list) for key in _KEYS):
            # COCO's panoptic format: an annotation for each image, with a PNG of its segments.
            drawn = content["annotations"]
            if drawn and all(isinstance(entry, dict) and "segments_info" in entry for entry in drawn):
                panoptic.append(f"{data.relative(file)}: is a panoptic segmentation (segments_info); export instances")
                continue
            seen = True
            yield from _samples(data, file, content, pictures)
    data.problems += unlisted(data) if seen else panoptic
    data.finish("no JSON file with the lists images, annotations and categories", seen)


def _samples(data: DataSet, file: Path, content: dict[str, Any], pictures: Images) -> Iterator[Sample]:
    where = data.relative(file)
    classes = _by_id(data, where, "category", content["categories"])
    entries = _by_id(data, where, "image", content["images"])
    drawn, notes = _drawn(data, where, content["annotations"], entries, classes)
    split = data.split(file, file.stem)
    contributor = optional(content.get("info"), "contributor", str) or ""
    for identifier, entry in entries.items():
        with data.at(f"{where}: image {identifier}"):
            path, size = pictures.locate(member(entry, "file_name", str), file.parent, file.stem), _size(entry)
            remedy = "an image belongs to one file (and so to one split), remove it from the other"
            if data.listed.get(str(path)) == where:
                remedy = "list each image once, with all of its annotations"
            data.claim(path, where, remedy)
            if contributor.startswith("Label Studio") and identifier in drawn and _is_stored_size(path, size):
                cause = "Label Studio exports its boxes turned upright to COCO, and its size and polygons not"
                raise ValueError(f"{data.relative(path)} has an EXIF orientation; {cause}; export JSON instead")
            yield sample(data, path, drawn.pop(identifier, []), split or data.split(path), notes[identifier], size=size)


def _drawn(
    data: DataSet, where: str, drawings: list[Any], entries: _Entries, classes: _Entries
) -> tuple[dict[_Id, list[Shape]], dict[_Id, list[str]]]:
    """Return the shapes of each image, and notes about them."""
    drawn: dict[_Id, list[Shape]] = defaultdict(list)
    notes: dict[_Id, list[str]] = defaultdict(list)
    ids: set[_Id] = set()
    areas_are_of_corners = _areas_are_of_corners(drawings)
    for place, annotation in enumerate(drawings, start=1):
        identifier = annotation.get("id") if isinstance(annotation, dict) else None
        name = identifier if isinstance(identifier, int | str) else f"no. {place}"
        with data.at(f"{where}: annotation {name}"):
            image, category = _id(annotation, "image_id"), _id(annotation, "category_id")
            if "id" in annotation:
                identifier = _id(annotation, "id")
                if identifier in ids:
                    raise ValueError("another annotation has the same id")
                ids.add(identifier)
            if image not in entries:
                raise ValueError(f"the image with the id {annotation['image_id']!r} is missing")
            if category not in classes:
                raise ValueError(f"the category with the id {annotation['category_id']!r} is missing")
            if annotation.get("ignore") in (1, "1"):  # not to be detected, as in CrowdHuman
                notes[image].append("an annotation that is marked to be ignored is left out")
                continue
            if areas_are_of_corners and _area_fits(annotation) == "corners":
                evidence = f", but its area of {annotation['area']:g}"
                raise _wrong_reading(annotation["bbox"], evidence, "[x1, y1, x2, y2]")
            kind = class_name(classes[category].get("name"))
            drawn[image].append(_shape(kind, annotation, _size(entries[image]), notes[image]))
    return drawn, notes


def _is_stored_size(path: Path, size: Size) -> bool:
    """Whether a photograph lies on its side, and a size is that of the picture as stored, not upright."""
    try:
        with Image.open(io.BytesIO(contents.read(path))) as file:
            turned = file.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return turned and file.size == size and file.width != file.height
    except Exception:  # a damaged file makes Pillow raise nearly anything; inspection reports it
        return False


def _by_id(data: DataSet, where: str, kind: str, entries: list[Any]) -> _Entries:
    by_id: _Entries = {}
    for place, entry in enumerate(entries, start=1):
        with data.at(f"{where}: {kind} no. {place}"):
            if (identifier := _id(entry, "id")) in by_id:
                remedy = "if the file was put together from several, keep these as files of their own"
                data.add(where, f"{kind} {identifier}: another {kind} has the same id; {remedy}")
            by_id[identifier] = entry
    return by_id


def _id(entry: object, key: str) -> _Id:
    # Whole numbers are the same as text and as number: tools write either, and one file may have both.
    value: object = member(entry, key, object)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{key!r} is neither a number nor a text")
    if isinstance(value, str) and value.isascii() and value.isdigit() and value == (value.lstrip("0") or "0"):
        return int(value) if len(value) < 20 else value
    return value


def _size(entry: dict[str, Any]) -> Size:
    with contextlib.suppress(ValueError):  # a size that is nonsense says no more than none
        return pixel_size(entry.get("width"), entry.get("height"), as_text=True)
    return None


def _shape(name: str, annotation: dict[str, Any], size: Size, notes: list[str]) -> Shape:
    drawn = annotation.get("segmentation") or []
    rle = _rle(drawn) if isinstance(drawn, dict) else None
    polygons = () if rle else _polygons(drawn, bool(annotation.get("bbox")), notes)
    extent = _extent(rle) if rle else None
    if polygons:
        xs, ys = zip(*(corner for part in polygons for corner in part), strict=True)
        extent = min(xs), min(ys), max(xs), max(ys)  # which may lie outside the image, unlike a `Box`
    rotation = _rotation(annotation)
    if extent and (rotation or not annotation.get("bbox")):  # CVAT's box is that before the turn
        return Shape(name, box(*extent), polygons, rle, cut=size is not None)
    sides = [number(side) for side in member(annotation, "bbox", list)]
    if len(sides) != 4:
        raise ValueError(f"'bbox' is [x, y, width, height], and has {len(sides)} numbers")
    x, y, width, height = sides
    if size and min(size) > 1 and all(0 <= side <= 1 for side in sides) and 0 < max(width, height) < 1:
        remedy = "write [x, y, width, height] in pixels, not in fractions of the image"
        raise ValueError(f"'bbox' {bracketed(sides)} would be smaller than a pixel; {remedy}")
    if extent:
        _check_outline(sides, extent)
        same = _distance(extent, _READINGS["[x, y, width, height]"](*sides)) <= _SLACK
        return Shape(name, box(x, y, x + width, y + height), polygons, rle, cut=same and size is not None)
    plain = box(x, y, x + width, y + height)  # CVAT turns it clockwise about its center
    return turned_box(name, plain, rotation) if rotation else Shape(name, plain, polygons, rle)


def _rotation(annotation: dict[str, Any]) -> float:
    # CVAT puts the turn into `attributes`, in degrees.
    try:
        degrees = float((optional(annotation, "attributes", dict) or {}).get("rotation") or 0)
    except (TypeError, ValueError):  # someone's own attribute of that name
        return 0.0
    if not math.isfinite(degrees):
        raise ValueError("its rotation is not a finite number")
    return degrees % 360


# What people and tools take the four numbers for; the first is COCO's.
_READINGS: dict[str, Callable[[float, float, float, float], tuple[float, ...]]] = {
    "[x, y, width, height]": lambda a, b, c, d: (a, b, a + c, b + d),
    "[x1, y1, x2, y2]": lambda a, b, c, d: (a, b, c, d),
    "[center x, center y, width, height]": lambda a, b, c, d: (a - c / 2, b - d / 2, a + c / 2, b + d / 2),
    "[y1, x1, y2, x2]": lambda a, b, c, d: (b, a, d, c),
    "[y, x, height, width]": lambda a, b, c, d: (b, a, b + d, a + c),
}


def _distance(extent: tuple[float, ...], other: tuple[float, ...]) -> float:
    return max(abs(one - two) for one, two in zip(extent, other, strict=True))


def _check_outline(sides: list[float], extent: tuple[float, float, float, float]) -> None:
    """Refuse a box that fits the outline only if its numbers are read otherwise than COCO does."""
    # An outline may be smaller than its box (an occluded part, a group of shapes): that alone is not a contradiction.
    x1, y1, x2, y2 = _READINGS["[x, y, width, height]"](*sides)
    if (apart := _distance(extent, (x1, y1, x2, y2))) <= _SLACK:
        return
    outline = f"its outline, which spans {bracketed(extent)}"
    for meaning, reading in _READINGS.items():
        other = _distance(extent, reading(*sides))
        if other <= _SLACK and other < apart - _SLACK / 2:
            raise _wrong_reading(sides, f", but {outline},", meaning)
    if max(x1 - extent[2], y1 - extent[3], extent[0] - x2, extent[1] - y2) > _SLACK:
        text = f"'bbox' {bracketed(sides)}, which is [x, y, width, height]"
        raise ValueError(f"{text}, has nothing in common with {outline}; correct one of them")


def _wrong_reading(sides: list[float], evidence: str, meaning: str) -> ValueError:
    coco, what = "[x, y, width, height]", f"{evidence} says that it is {meaning}"
    return ValueError(f"'bbox' {bracketed(sides)} is {coco} in COCO{what}; write all boxes as {coco}")


def _areas_are_of_corners(annotations: list[Any]) -> bool:
    """Whether areas say that boxes without an outline are given as corners."""
    # Areas of masks may be anything up to the box's, and so hit that of the corners by chance: then most hit neither.
    fits = Counter(_area_fits(annotation) for annotation in annotations)
    return fits["corners"] > fits["neither"] and (
        fits["corners"] >= _MANY or "corners" in {_area_fits(annotation, exactly=True) for annotation in annotations}
    )


def _area_fits(annotation: Any, exactly: bool = False) -> str | None:
    """Whether the area is that of `size`, of `corners` or of `neither`; `None` where it cannot tell them apart."""
    if not isinstance(annotation, dict) or annotation.get("segmentation"):
        return None
    try:
        area = number(annotation.get("area"))
        x, y, width, height = [number(side) for side in member(annotation, "bbox", list)]
    except ValueError:
        return None
    across, down = width - x, height - y
    if min(width, height, across, down) <= 0:
        return None
    size, corners = _is_area(area, width, height), _is_area(area, across, down)
    if size and corners:
        return None
    if corners and exactly:  # off by rounding of the area at most, not of the sides
        exact = (across * down, (across + 1) * (down + 1))
        corners = any(abs(area - product) <= 1 + product / 200 for product in exact)
    return "size" if size else "corners" if corners else "neither"


def _is_area(area: float, width: float, height: float) -> bool:
    """Whether an area is that of a box, within a pixel on each side."""
    return max(width - 1, 0) * max(height - 1, 0) <= area <= (width + 1) * (height + 1)


def _polygons(drawn: object, has_box: bool, notes: list[str]) -> tuple[Polygon, ...]:
    if not isinstance(drawn, list):
        raise ValueError(f"'segmentation' is not a list: {str(drawn)[:40]!r}")
    if drawn and not any(isinstance(part, list) for part in drawn):
        drawn = [drawn]  # one flat list: VIA before 2.0.11, MyVision and others
    polygons = []
    for part in drawn:
        if not isinstance(part, list) or len(part) % 2:
            raise ValueError("'segmentation' is not a list of polygons [x, y, x, y, …]")
        numbers = [number(value) for value in part]
        if not has_box or len(numbers) >= 6:
            polygons.append(polygon(list(zip(numbers[::2], numbers[1::2], strict=True))))
        elif numbers:
            notes.append("an outline of fewer than three corners is left out; its box counts")
    return tuple(polygons)


def _extent(rle: Rle) -> tuple[float, float, float, float] | None:
    """Return the sides of the box round a mask; `None` if it shows nothing."""
    # By the runs alone: an image may have hundreds of masks, and a damaged file state a size that fills the memory.
    ends = np.cumsum(np.array(rle.counts, np.int64))
    starts, ends = ends[:-1:2], ends[1::2]
    runs = starts < ends
    starts, ends = starts[runs], ends[runs] - 1
    if not starts.size:
        return None
    tops, bottoms = starts % rle.height, ends % rle.height
    over = starts // rle.height != ends // rle.height  # a run that continues in the next column touches both edges
    top, bottom = (0, rle.height - 1) if over.any() else (int(tops.min()), int(bottoms.max()))
    return float(starts[0] // rle.height), float(top), float(ends[-1] // rle.height + 1), float(bottom + 1)


def _rle(drawn: dict[str, Any]) -> Rle:
    size, counts = member(drawn, "size", list), member(drawn, "counts", object)
    if isinstance(counts, str):
        counts = _unpacked(counts)
    if not isinstance(counts, list) or len(size) != 2:
        raise ValueError("'segmentation' has neither polygons nor run lengths with a size [height, width]")
    if not all(type(value) is int and value >= 0 for value in [*size, *counts]):
        raise ValueError("run lengths and their size are whole numbers from 0")
    if sum(counts) != size[0] * size[1]:
        raise ValueError(f"the run lengths sum to {sum(counts)}, not to {size[0]} x {size[1]}")
    return Rle(size[0], size[1], tuple(counts))


def _unpacked(packed: str) -> list[int]:
    # rleFrString of COCO's maskApi.c.
    # Six bits a character, from `0` on: five of the number, the lowest first, and one that says that more follow.
    counts: list[int] = []
    value = shift = 0
    for char in packed:
        bits = ord(char) - ord("0")
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("the compressed run lengths are damaged")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)  # the number is signed
            # From the fourth on it is the difference from the run before the last.
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("the compressed run lengths break off")
    return counts
