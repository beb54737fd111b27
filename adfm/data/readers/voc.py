"""Pascal VOC: an XML file an image.

JPEGImages/000.jpg    and    Annotations/000.xml    and, where there are, ImageSets/Main/{train,val,test}.txt
or images/ instead of JPEGImages/, or image and XML in one folder.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import cast
from xml.etree import ElementTree

from adfm.data.readers.annotations import (
    Shape,
    box,
    class_name,
    folder_names,
    holds,
    listing,
    mentions,
    paired,
    sample,
    split_of,
    text,
    walk,
)
from adfm.data.readers.files import images, refuse
from adfm.records import Sample, Split

_IMAGES = frozenset(("images", "jpegimages"))
_XML = frozenset(("annotations", "labels", "xml"))
_MASKS = frozenset(("SegmentationClass", "SegmentationObject"))  # pictures, but not of the data set


def matches(raw: Path) -> bool:
    """Whether there is an XML file with an `annotation` near the top."""
    return holds(raw, lambda folder: any(map(_is_annotation, listing(folder, ".xml"))))


def read(raw: Path) -> Iterator[Sample]:
    """Yields the images, folder by folder. One without an XML file, or with one that has no `object`, is normal.

    An image and its XML file have the same name; what the file says of the image's name, folder and size is not looked
    at. Sides of a `bndbox` are numbers of pixels from 1 on, the last one included, as the VOC development kit has them;
    the 0 of tools that count from 0 is taken for 1. `split` is that of ImageSets/Main, else of the folders' names
    (train, val, valid, validation, test). SegmentationClass and SegmentationObject are passed over.

    Args:
        raw: The raw data set; its name is the name of the data set and of the category.

    Raises:
        AdfmError: Everything that is wrong in the XML files, XML files without an image, names in ImageSets without
            one, and a data set without any XML file: in one error, after the last sample.
    """
    problems: list[str] = []
    annotated = False
    for folder in walk(raw):
        if _MASKS & {folder.name, *folder_names(raw, folder / "image")}:
            continue
        splits = _sets(raw, folder, problems)
        for image, file in paired(raw, folder, ".xml", _IMAGES, _XML, _is_annotation, problems):
            annotated |= file is not None
            shapes = _shapes(raw, file, problems) if file else []
            if splits is None:
                yield sample(raw, image, shapes, split_of(*folder_names(raw, image)))
            else:
                own = splits.get(image.stem, set())
                yield sample(raw, image, shapes, min(own) if len(own) == 1 else None)
    if not annotated and not problems:
        problems.append("no image has an XML file, beside it or in Annotations/ instead of JPEGImages/")
    refuse(raw, "voc", problems)


def _is_annotation(file: Path) -> bool:
    return mentions(file, b"<annotation")


def _sets(raw: Path, folder: Path, problems: list[str]) -> dict[str, set[Split]] | None:
    """The splits that ImageSets/Main gives to the images of a folder; `None` if there is none."""
    stems = {image.stem for image in images(folder)}
    places = [base / "ImageSets" / "Main" for base in (folder, folder.parent) if base.is_relative_to(raw)]
    lists = [file for place in places for file in listing(place, ".txt") if file.stem in ("train", "val", "test")]
    if not stems or not lists:
        return None
    splits: dict[str, set[Split]] = defaultdict(set)
    for file in lists:
        try:
            names = {line.strip() for line in text(file).splitlines()} - {""}
        except ValueError as error:
            problems.append(f"{file.relative_to(raw).as_posix()}: {error}")
            continue
        if missing := sorted(names - stems):
            problems.append(f"{file.relative_to(raw).as_posix()}: there are no images {', '.join(missing)}")
        for name in names & stems:
            splits[name].add(cast(Split, split_of(file.stem)))
    return splits


def _shapes(raw: Path, file: Path, problems: list[str]) -> list[Shape]:
    where = file.relative_to(raw).as_posix()
    try:
        root = ElementTree.fromstring(file.read_bytes())
    except ElementTree.ParseError as error:
        problems.append(f"{where}: is no XML ({error})")
        return []
    except (LookupError, OSError, ValueError) as error:
        problems.append(f"{where}: cannot be read ({error})")
        return []
    if root.tag != "annotation":
        problems.append(f"{where}: is no Pascal VOC file: it begins with <{root.tag}> instead of <annotation>")
    shapes = []
    for place, drawn in enumerate(root.findall("object"), start=1):
        try:
            name = class_name(drawn.findtext("name"))
            x1, y1, x2, y2 = (_side(drawn, side) for side in ("xmin", "ymin", "xmax", "ymax"))
            shapes.append(Shape(name, box(_from_zero(x1), _from_zero(y1), x2, y2)))
        except ValueError as error:
            problems.append(f"{where}: object {place}: {error}")
    return shapes


def _side(drawn: ElementTree.Element, side: str) -> float:
    value = drawn.findtext(f"bndbox/{side}")
    try:
        return float(value or "")
    except ValueError as error:
        raise ValueError(f"bndbox has no number {side}, but {value!r}") from error


def _from_zero(first: float) -> float:
    return first - 1 if first >= 1 else min(first, 0.0)
