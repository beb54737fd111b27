"""Pascal VOC: an XML file an image.

JPEGImages/000.jpg    and    Annotations/000.xml    and, where there are, ImageSets/Main/{train,val,test}.txt
or images/ or data/ and annotations/ or labels/, or image and XML in one folder;
and masks, SegmentationClass/000.png and SegmentationObject/000.png, with the names of the classes in labelmap.txt.
"""

import math
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from adfm.data.readers import voc_masks, voc_sets
from adfm.data.readers.annotations import Shape, box, bracketed, by_stem, enclosing, nfc, outlined, polygon, sample
from adfm.data.readers.files import DataSet, NoImage, folders, holds, images, listing, walk
from adfm.data.readers.shapes import turned_box
from adfm.data.readers.textfiles import Size, decimal, pixel_size
from adfm.data.readers.verdicts import class_name
from adfm.data.readers.xmlfiles import document, outermost
from adfm.records import Box, Sample

FORM = "JPEGImages/*, Annotations/*.xml or SegmentationClass/*.png"
_IMAGES = frozenset(("images", "jpegimages", "image", "imgs", "img", "data"))
_XML = frozenset(("annotations", "annotation", "labels", "label", "lable", "xml", "xmls"))
_OVERLAP = 0.5  # a box and an outline that overlap less (IoU) are not of one object
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_CORNERS = ("left_top", "right_top", "right_bottom", "left_bottom")  # of DIOR-R
_ROTATION = re.compile(r"\brotation\s*=\s*([^,;]+)")  # in the attributes of LabelMe, which are one text

_Files = dict[str, tuple[str, ...]]  # by their stem


class _Drawn(NamedTuple):
    shapes: list[Shape]
    size: Size
    segmented: bool  # whether the image has a mask, and no object
    notes: list[str]


_NOTHING = _Drawn([], None, False, [])


def matches(raw: Path) -> bool:
    """Whether there is an XML file with an `annotation`, or images beside masks as VOC has them, near the top."""
    return holds(raw, lambda folder: _has_annotations(folder) or voc_masks.beside(folder))


def read(raw: Path) -> Iterator[Sample]:
    """Yield the images, folder by folder. One without an XML file, or with one that has no `object`, is normal.

    An image and its XML file have the same name; the image's name and folder in the file do not count. A `bndbox` that
    CVAT's attribute `rotation` turns, and the `robndbox` of roLabelImg, are the boxes round the turned ones. `polygon`
    is an outline; `difficult` and `truncated` objects count as others do.

    Masks in SegmentationObject and SegmentationClass are defects where no `object` says so; background is black, and
    the border of VOC (value 255) belongs to no defect. Their classes have the names of labelmap.txt (CVAT) or
    class_names.txt (LabelMe), and without these `class 1` and so on.

    `split` is that of ImageSets, else of the folders' names. An image in several lists is in the most held-out one,
    with a note. In memory are the paths of the XML files, and the names in ImageSets.
    """
    data = DataSet(raw, "voc")
    owners: dict[str, str] = {}  # of an XML file, the folder of its image
    lists, classes = voc_sets.Lists(data, _IMAGES), voc_masks.Classes(data, _IMAGES)
    shared_files = lru_cache(maxsize=4)(_files)  # class folders share them
    annotated = False
    for folder in walk(raw):
        if voc_masks.pictures(raw, folder):  # masks are images too, by their names
            continue
        same: dict[str, str] = {}
        there = images(folder)
        own, shared = _places(data, folder) if there else ([], [])
        files = [_files(own), *([shared_files(tuple(shared))] if shared else [])]
        for image in there:
            if (other := same.setdefault(nfc(image.stem), image.name)) != image.name:
                data.add(folder / other, f"has the same name as {data.relative(image)}")
            file = _annotation(data, image, files, owners)
            drawn = _read(data, file) if file else _NOTHING
            mask = classes.find(image)
            annotated |= file is not None or mask is not None
            shapes, notes = drawn.shapes, drawn.notes
            with data.at((mask and (mask.objects or mask.classes)) or file or image):
                if mask:
                    shapes, mask_notes = voc_masks.added(drawn.shapes, classes.shapes(mask))
                    notes = [*notes, *mask_notes]
                elif drawn.segmented:
                    what = f"there is neither an object nor a mask {image.stem}.png in SegmentationClass"
                    remedy = "add the mask, export boxes, or write 0 if nothing is wrong with the part"
                    raise ValueError(f"'segmented' is 1, but {what}; {remedy}")
            split, split_notes = lists.split(image)
            yield sample(data, image, shapes, split, [*notes, *split_notes], size=drawn.size)
    for folder in walk(raw):
        for file in listing(folder, ".xml"):
            if str(file) not in owners and outermost(file) == "annotation":
                data.add(file, NoImage(f"its image {file.stem}.* is missing"))
    classes.add_orphans()
    lists.add_missing()
    data.finish("no image has an XML file, beside it or in Annotations/ instead of JPEGImages/, or a mask", annotated)


def _has_annotations(folder: Path) -> bool:
    # Folders of annotations may have folders of their own.
    inside = walk(folder) if folder.name.lower() in _XML else [folder]
    return any("annotation" in map(outermost, listing(place, ".xml")) for place in inside)


def _files(folders: Iterable[Path]) -> _Files:
    return by_stem(file for folder in folders for file in listing(folder, ".xml"))


def _places(data: DataSet, folder: Path) -> tuple[list[Path], list[Path]]:
    """List the folders where annotations of a folder may be: its own, and those for several, the nearest first."""
    # For `a/images/b`: itself, `a/b`, `a/annotations/b` and `a/images/b/annotations`; and `a/annotations`.
    own = [folder, *_annotation_folders(folder)]
    shared: list[Path] = []
    for above in data.above(folder):
        first, *rest = folder.relative_to(above).parts
        inner = rest if first.lower() in _IMAGES else [first, *rest]
        own += [place.joinpath(*inner) for place in (above, *_annotation_folders(above))]
        ends = [inner[:depth] for depth in range(len(inner) - 1, -1, -1)]
        shared += [place.joinpath(*end) for place in _annotation_folders(above) for end in ends]
        if first.lower() in _IMAGES:  # what lies above belongs to other images
            break
    own = list(dict.fromkeys(own))
    return own, [place for place in dict.fromkeys(shared) if place not in own]


def _annotation_folders(folder: Path) -> list[Path]:
    return [inside for inside in folders(folder) if inside.name.lower() in _XML]


def _annotation(data: DataSet, image: Path, files: Iterable[_Files], owners: dict[str, str]) -> Path | None:
    """Return the XML file of an image, in the first group that has one, and record its owner."""
    folder = data.relative(image.parent)
    same = next((group[nfc(image.stem)] for group in files if nfc(image.stem) in group), ())
    names = [data.relative(Path(file)) for file in same]
    if len(names) > 1:
        data.add(names[0], f"has the same name as {', '.join(names[1:])}")
    for file, name in zip(same, names, strict=True):
        if (other := owners.setdefault(file, folder)) != folder:
            remedy = "put it beside the image that it is for, or into a folder of the same name"
            data.add(name, f"may belong to an image in {other} or to one in {folder}; {remedy}")
    return Path(same[0]) if same else None


def _read(data: DataSet, file: Path) -> _Drawn:
    where = data.relative(file)
    with data.at(where):
        content = document(file)
        if content.tag != "annotation":
            raise ValueError(f"is not a Pascal VOC file: it begins with <{content.tag}> instead of <annotation>")
        size = pixel_size(_text(content, "size/width"), _text(content, "size/height"), as_text=True)
        # LabelMe writes it elsewhere.
        size = size or pixel_size(_text(content, "imagesize/ncols"), _text(content, "imagesize/nrows"), as_text=True)
        objects = content.findall("object")
        if not objects and content.find(".//object") is not None:
            raise ValueError("has objects, but not directly in <annotation>; export it as Pascal VOC again")
        shapes: list[Shape] = []
        notes: list[str] = []
        for place, drawn in enumerate(objects, start=1):
            with data.at(f"{where}: object {place}"):
                if _text(drawn, "deleted") == "1":
                    notes.append("an object that LabelMe marks as deleted is left out")
                else:
                    shapes += _shapes(drawn)
        return _Drawn(shapes, size, _text(content, "segmented") == "1" and not objects, notes)
    return _NOTHING


def _text(part: ElementTree.Element, name: str) -> str:
    return (part.findtext(name) or "").strip()


def _shapes(drawn: ElementTree.Element) -> list[Shape]:
    name = class_name(drawn.findtext("name"))
    rotation = _rotation(drawn)
    boxes = [_box(bndbox, rotation) for bndbox in drawn.findall("bndbox")]
    outlines = [polygon(_corners(outline)) for outline in drawn.findall("polygon") if len(outline)]
    robndbox = drawn.find("robndbox")
    if robndbox is not None:
        return [_rolabelimg(name, robndbox)]
    if not boxes and not outlines:
        raise ValueError("has neither a bndbox nor a robndbox nor a polygon")
    if rotation and not boxes:
        raise ValueError("the attribute rotation turns a polygon, which LabelMe does not know; export another format")
    if rotation:
        return [turned_box(name, one, rotation) for one in boxes]
    if len(boxes) == 1 and outlines:
        round_it = enclosing(corner for outline in outlines for corner in outline)
        if round_it.iou(boxes[0]) < _OVERLAP:
            sides, spans = bracketed(boxes[0]), bracketed(round_it)
            raise ValueError(f"its bndbox is {sides}, but its polygon spans {spans}; correct one of them")
        return [Shape(name, boxes[0], tuple(outlines))]
    return [*(Shape(name, one) for one in boxes), *(outlined(name, outline, cut=True) for outline in outlines)]


def _box(bndbox: ElementTree.Element, rotation: float) -> Box:
    if bndbox.find("rotation") is not None:
        raise ValueError("its bndbox has a rotation, and tools differ in what that means; export boxes without it")
    # Of one that is turned, the box before the turn.
    x1, y1, x2, y2 = (_number(bndbox, side) for side in _SIDES)
    # As the VOC development kit has them, sides are numbers of pixels from 1 on, the last one included; the 0 of tools
    # that count from 0 is taken for 1. Numbers with a decimal point are positions from 0 on, as CVAT has them.
    if not rotation and not all("." in (bndbox.findtext(side) or "") for side in _SIDES):
        x1, y1 = (side - 1 if side >= 1 else min(side, 0.0) for side in (x1, y1))
    within = box(x1, y1, x2, y2)
    if not rotation and min(x1, y1) < -1:
        raise ValueError(f"the box {bracketed(within)} begins before the image")
    return within


def _rotation(drawn: ElementTree.Element) -> float:
    # Degrees, clockwise about the centre: in attributes of CVAT's Pascal VOC export, in the text of its LabelMe export.
    attributes = drawn.findall("attributes/attribute")
    values = [each.findtext("value") for each in attributes if _text(each, "name") == "rotation"]
    values += _ROTATION.findall(drawn.findtext("attributes") or "")
    return decimal(values[0], "its attribute rotation") % 360 if values else 0.0


def _rolabelimg(name: str, robndbox: ElementTree.Element) -> Shape:
    if robndbox.find("cx") is None and robndbox.find("x_left_top") is not None:
        # DIOR-R has the corners instead of a centre and an angle.
        corners = [(_number(robndbox, f"x_{at}"), _number(robndbox, f"y_{at}")) for at in _CORNERS]
        return outlined(name, corners, cut=True)
    cx, cy, width, height, angle = (_number(robndbox, part) for part in ("cx", "cy", "w", "h", "angle"))
    before = Box(cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
    return turned_box(name, before, math.degrees(angle))  # roLabelImg writes radians


def _corners(outline: ElementTree.Element) -> list[tuple[float, float]]:
    points = outline.findall("pt") or outline.findall("point")  # the former: LabelMe's
    if points:
        return [(_number(point, "x"), _number(point, "y")) for point in points]
    count = sum(1 for part in outline if re.fullmatch(r"x\d+", part.tag))  # x1, y1, x2 and so on: Roboflow's
    return [(_number(outline, f"x{place}"), _number(outline, f"y{place}")) for place in range(1, count + 1)]


def _number(part: ElementTree.Element, name: str) -> float:
    return decimal(part.findtext(name), f"{name} of {part.tag}")
