"""COCO JSON: one file or several, `{images, annotations, categories}`, in any folder of the data set.

annotations/instances_train2017.json    and    train2017/000.jpg, images/train2017/000.jpg or images/000.jpg
train/_annotations.coco.json            and    train/000.jpg
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adfm.data.readers.annotations import (
    Shape,
    box,
    class_name,
    enclosing,
    folder_names,
    holds,
    listing,
    member,
    mentions,
    number,
    parsed,
    polygon,
    problem,
    sample,
    split_of,
    unlisted,
    walk,
)
from adfm.data.readers.files import refuse
from adfm.data.readers.lookup import Images
from adfm.records import Polygon, Rle, Sample

_KEYS = ("images", "annotations", "categories")


def matches(raw: Path) -> bool:
    """Whether there is a JSON file with images, annotations and categories near the top."""
    words = [f'"{key}"'.encode() for key in _KEYS]
    return holds(raw, lambda folder: any(mentions(file, *words) for file in listing(folder, ".json")))


def read(raw: Path) -> Iterator[Sample]:
    """Yields the images that the JSON files list, file by file.

    An annotation is a defect: its `bbox` the box, its `segmentation` (polygons, or run lengths, compressed or not) the
    mask. `split` is what the file's name, its folders or the image's folders say: train, val, valid, validation, test.
    Other JSON files, such as captions, are passed over.

    A JSON file is in memory whole while its images are yielded; so are the paths of all images.

    Args:
        raw: The raw data set; its name is the name of the data set and of the category.

    Raises:
        AdfmError: Everything that is wrong in the JSON files, images that are missing, and images that none of them
            lists: in one error, after the last sample.
    """
    problems: list[str] = []
    pictures = Images(raw)
    used: dict[Path, str] = {}
    seen = False
    for folder in walk(raw):
        for file in listing(folder, ".json"):
            try:
                content = parsed(file)
            except ValueError as error:
                problems.append(f"{file.relative_to(raw).as_posix()}: {error}")
                continue
            if isinstance(content, dict) and all(isinstance(content.get(key), list) for key in _KEYS):
                seen = True
                yield from _samples(raw, file, content, pictures, used, problems)
    if not seen and not problems:
        problems.append("no JSON file with the lists images, annotations and categories")
    if seen:
        problems += unlisted(raw, used)
    refuse(raw, "coco", problems)


def _samples(
    raw: Path, file: Path, content: dict[str, Any], pictures: Images, used: dict[Path, str], problems: list[str]
) -> Iterator[Sample]:
    where = file.relative_to(raw).as_posix()
    classes = _by_id(where, "category", content["categories"], problems)
    entries = _by_id(where, "image", content["images"], problems)

    drawn: dict[int | str, list[Shape]] = defaultdict(list)
    ids: set[int | str] = set()
    for place, annotation in enumerate(content["annotations"], start=1):
        name = f"annotation no. {place}"
        try:
            image, category = _id(annotation, "image_id"), _id(annotation, "category_id")
            if "id" in annotation:
                name = f"annotation {_id(annotation, 'id')}"
                if annotation["id"] in ids:
                    raise ValueError("another annotation has the same id")
                ids.add(annotation["id"])
            if image not in entries:
                raise ValueError(f"there is no image with the id {image!r}")
            if category not in classes:
                raise ValueError(f"there is no category with the id {category!r}")
            drawn[image].append(_shape(class_name(classes[category].get("name")), annotation))
        except ValueError as error:
            problems.append(f"{where}: {name}: {error}")

    split = split_of(file.stem, *folder_names(raw, file))
    for identifier, entry in entries.items():
        try:
            path = pictures.locate(member(entry, "file_name", str), file.parent, file.stem)
            if path in used:
                raise ValueError(f"{path.relative_to(raw).as_posix()} is listed before, in {used[path]}")
        except ValueError as error:
            problems.append(problem(f"{where}: image {identifier}", error))
            continue
        used[path] = where
        yield sample(raw, path, drawn.pop(identifier, []), split or split_of(*folder_names(raw, path)))


def _by_id(where: str, kind: str, entries: list[Any], problems: list[str]) -> dict[int | str, dict[str, Any]]:
    found: dict[int | str, dict[str, Any]] = {}
    for place, entry in enumerate(entries, start=1):
        try:
            identifier = _id(entry, "id")
        except ValueError as error:
            problems.append(f"{where}: {kind} no. {place}: {error}")
            continue
        if identifier in found:
            problems.append(f"{where}: {kind} {identifier}: another {kind} has the same id")
        found[identifier] = entry
    return found


def _id(entry: object, key: str) -> int | str:
    value: object = member(entry, key, object)
    if not isinstance(value, int | str):
        raise ValueError(f"{key!r} is neither a number nor a text")
    return value


def _shape(name: str, annotation: dict[str, Any]) -> Shape:
    drawn = annotation.get("segmentation") or []
    rle = _rle(drawn) if isinstance(drawn, dict) else None
    polygons = () if rle else tuple(_polygon(part) for part in member({"segmentation": drawn}, "segmentation", list))
    if polygons and "bbox" not in annotation:
        return Shape(name, enclosing(point for part in polygons for point in part), polygons)
    sides = [number(side) for side in member(annotation, "bbox", list)]
    if len(sides) != 4:
        raise ValueError(f"'bbox' is [x, y, width, height], and has {len(sides)} numbers")
    x, y, width, height = sides
    return Shape(name, box(x, y, x + width, y + height), polygons, rle)


def _polygon(flat: object) -> Polygon:
    if not isinstance(flat, list) or len(flat) % 2:
        raise ValueError("'segmentation' is no list of polygons [x, y, x, y, …]")
    numbers = [number(value) for value in flat]
    return polygon(list(zip(numbers[::2], numbers[1::2], strict=True)))


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
    """Run lengths from COCO's compressed string (rleFrString of its maskApi.c).

    A character is six bits from `0` on: five of the number, the lowest first, and one that says that more follow; the
    number is signed. From the fourth on it is the difference from the run before the last.
    """
    counts: list[int] = []
    value = shift = 0
    for char in packed:
        bits = ord(char) - ord("0")
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("the compressed run lengths are damaged")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("the compressed run lengths break off")
    return counts
