"""LabelMe: a JSON file an image, `{shapes: [{label, points, shape_type, group_id}], imagePath}`.

000.jpg    and    000.json    in one folder, or all JSON files in a folder of their own
000.json    with imageData    alone
"""

import base64
import contextlib
import io
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from PIL import Image, UnidentifiedImageError

from adfm.data.manifest import MANIFEST
from adfm.data.readers.annotations import Shape, enclosing, nfc, outlined, same_names, sample
from adfm.data.readers.files import IMAGES, DataSet, NoImage, holds, images, listing, walk
from adfm.data.readers.lookup import Images
from adfm.data.readers.shapes import Point, bitmap, check_mask_size, ellipse, join, line, png
from adfm.data.readers.textfiles import Size, member, mentions, optional, parsed, pixel_size, point
from adfm.data.readers.verdicts import class_name, defect_type, is_verdict
from adfm.records import Sample

FORM = "*.jpg, *.json with shapes and imagePath"
_NO_DEFECT = ("__ignore__", "_background_")  # of LabelMe's own examples
# People set flags of these names to note that an image was checked, not what is on it.
_PROGRESS = frozenset(("checked", "verified", "reviewed", "approved", "confirmed", "done", "finished", "completed"))
# The types of shapes, with their smallest and largest number of points; rotation and quadrilateral are X-AnyLabeling's.
_OUTLINES = ("polygon", "quadrilateral", "oriented_rectangle", "rotation", None)  # early versions have no other type
_LEAST: dict[str | None, int] = {
    **dict.fromkeys(("polygon", "line", "linestrip", "point", "points", None), 1),
    **dict.fromkeys(("rectangle", "circle", "mask"), 2),
    **dict.fromkeys(("quadrilateral", "oriented_rectangle", "rotation"), 4),
}
_MOST: dict[str | None, int] = {"quadrilateral": 4, "oriented_rectangle": 4, "rotation": 4, "circle": 2, "mask": 2}
_KINDS = ("rectangle", "oriented_rectangle", "polygon", "circle", "line", "linestrip", "point", "mask")

_Drawn = tuple[Shape, Literal["area", "line", "point"]]


def matches(raw: Path) -> bool:
    """Whether there is a JSON file with shapes and imagePath near the top."""
    words = (b'"shapes"', b'"imagePath"')
    return holds(raw, lambda folder: any(mentions(file, *words) for file in listing(folder, ".json")))


def read(raw: Path) -> Iterator[Sample]:
    """Yield the images with a JSON file, then those without one, which are normal, as are those without a shape.

    Rectangles are boxes; polygons, oriented rectangles, circles and masks are masks as well. The box of a line is at
    least one pixel wide and high. Shapes of one label and one `group_id` are one defect. What reaches out of the image
    is cut off. An image with a point outside any group is anomalous, without boxes. Shapes labelled `__ignore__` or
    `_background_` are left out. The flags of an image without shapes are its label if they know one for normal or
    defective images, and refused if it is not known what they say.

    The image of a JSON file is the one of its own name beside it, else the one that `imagePath` leads to (see
    `lookup.Images`), else the one in its `imageData`. `split` is what the names of the image's folders say. The paths
    of all annotated images are in memory.
    """
    data, pictures = DataSet(raw, "labelme"), Images(raw)
    for folder in walk(raw):
        jsons = listing(folder, ".json")
        stems = {nfc(file.stem) for file in jsons}
        for file in (file for file in jsons if file != raw / MANIFEST):
            with data.at(file):
                if one := _sample(data, file, pictures, stems):
                    yield one
    for folder in walk(raw):
        there = images(folder)
        data.problems += same_names(raw, there)
        for image in there:
            if data.relative(image) not in data.listed:
                yield sample(data, image, [], data.split(image))
    data.finish("no LabelMe file: no JSON file with shapes", bool(data.listed))


def _sample(data: DataSet, file: Path, pictures: Images, stems: set[str]) -> Sample | None:
    where, content = data.relative(file), parsed(file)
    is_own = isinstance(content, dict) and content.keys() & {"shapes", "imagePath", "imageData"}
    if not is_own and not pictures.of_stem(file.stem, file.parent):
        return None  # not LabelMe's: a list of classes or the settings of a tool
    shapes = member(content, "shapes", list)
    size = pixel_size(content.get("imageWidth"), content.get("imageHeight"))
    image, source, notes = _image(data, file, content, pictures, stems)
    if other := data.listed.get(source):
        raise ValueError(f"its image {source} belongs to {other} as well; keep one of the two files")
    data.listed[source] = where
    drawn = _drawn(data, where, shapes, size, notes)
    flag = _flagged(content, bool(drawn))
    points = [shape.name for shape, extent in drawn if extent == "point"]
    defects = [shape for shape, extent in drawn if extent != "point"]
    if flag:
        notes.append("nothing is drawn on the image: its flag is taken for its label")
    # The name of an image in a JSON file is not that of the file.
    return replace(sample(data, image, defects, data.split(image), notes, points, flag, size=size), source=source)


def _flagged(content: dict[str, Any], drawn: bool) -> str | None:
    """Return the defect that the flags of an image without shapes name; "" or `None` if they name none."""
    # LabelMe's flags are for classes of whole images, but people note there as well that an image was checked.
    flags = optional(content, "flags", dict) or {}
    given = [flag for flag, value in flags.items() if value is True and flag.strip() not in _NO_DEFECT]
    given = [flag for flag in given if flag.strip().lower() not in _PROGRESS]
    if not given or (drawn and not all(map(is_verdict, given))):
        return None
    if not any(map(is_verdict, flags)):
        remedy = "if that is a defect, draw it or give all files a flag 'ok' (true or false) beside it"
        what = f"nothing is drawn on the image, but its flag {given[0]!r} is set"
        raise ValueError(f"{what}; {remedy}; if it says something else, remove it")
    defect = defect_type(given)
    if drawn and defect == "":
        raise ValueError(f"its flag {given[0]!r} says that it is normal, but shapes are drawn on it; remove one")
    return None if drawn else defect


def _image(
    data: DataSet, file: Path, content: dict[str, Any], pictures: Images, stems: set[str]
) -> tuple[Path, str, list[str]]:
    """Return the image of a JSON file, its `source`, and notes; `stems` are those of the JSON files in its folder."""
    # LabelMe names a JSON file after its image, and finds it by that name; `imagePath` is not changed when both are
    # renamed. So the file's own name counts first, and an image that another JSON file is named after is that one's.
    name = member(content, "imagePath", str)
    own = pictures.of_stem(file.stem, file.parent)
    missing = ValueError(f"image {name!r} is missing")
    try:
        is_beside = bool(own) and own[0].parent == file.parent
        image: Path | None = own[0] if is_beside else pictures.locate(name, file.parent)
    except NoImage as error:
        image, missing = next(iter(own), None), error
    if image and image not in own:
        path = data.relative(image)
        if nfc(image.stem) in stems - {nfc(file.stem)}:
            what = f"imagePath leads to {path}, which {image.stem}.json is named after"
            missing = ValueError(f"{what}; correct imagePath")
            image = next(iter(own), None)
        elif own:
            other = data.relative(own[0])
            raise ValueError(f"imagePath leads to {path}, and its own name to {other}; correct imagePath, or rename")
    if not image:
        if not content.get("imageData"):
            raise missing
        _check_image(content["imageData"])
        suffix = PurePosixPath(name).suffix
        source = file.with_name(file.stem + (suffix if suffix.lower() in IMAGES else ".png"))
        return file, data.relative(source), []
    # a.json may be that of a.jpg and of a.png.
    twins = [each.name for each in own if each.parent == image.parent]
    if image in own and len(twins) > 1:
        raise ValueError(f"may be the file of any of {', '.join(twins)}; remove all but one, or give them other names")
    notes = []
    path_stem = PurePosixPath(name.replace("\\", "/")).stem
    if image in own and nfc(path_stem) != nfc(image.stem):
        if _is_garbled(image.stem, path_stem):
            raise ValueError(f"the file's own name is its imagePath {name!r}, garbled; unpack the archive again")
        notes.append("imagePath names an image that is not the one with the file's own name; the latter counts")
    return image, data.relative(image), notes


def _is_garbled(name: str, intended: str) -> bool:
    # Some tools that unpack zips read the bytes of names in the wrong encoding.
    for wrong, right in itertools.product(("cp437", "cp1252"), ("utf-8", "gb18030", "cp932", "cp949", "big5")):
        with contextlib.suppress(UnicodeError):
            if nfc(name.encode(wrong).decode(right)) == nfc(intended):
                return True
    return False


def _check_image(encoded: object) -> None:
    try:
        if not isinstance(encoded, str):
            raise ValueError("it is not a text")
        Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))).close()
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        reason = "it is in no format of images" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ValueError(f"imageData is not an image in base64 ({reason}); put the image beside this file") from error


def _drawn(data: DataSet, where: str, shapes: Sequence[object], size: Size, notes: list[str]) -> list[_Drawn]:
    """Return the defects that are drawn: the shapes of one label and group are one."""
    defects: dict[object, list[_Drawn]] = defaultdict(list)
    for place, shape in enumerate(shapes, start=1):
        with data.at(f"{where}: shape {place}"):
            label = member(shape, "label", str).strip()
            if label in _NO_DEFECT:
                notes.append(f"a shape labelled {label} is left out")
                continue
            group = optional(shape, "group_id", object)
            if group is not None and type(group) is not int:
                raise ValueError(f"'group_id' is neither a whole number nor null: {str(group)[:40]!r}")
            drawn = _shape(class_name(label), shape, size)
            defects[place if group is None else (label, group)].append(drawn)
    return [_joined(pieces) if len(pieces) > 1 else pieces[0] for pieces in defects.values()]


def _joined(pieces: Sequence[_Drawn]) -> _Drawn:
    shapes, extents = zip(*pieces, strict=True)
    if set(extents) == {"area"}:  # only then the whole has outlines
        return join(shapes, as_outlines=True), "area"
    plain = [Shape(shape.name, shape.box, cut=True) for shape in shapes]
    return join(plain), "point" if set(extents) == {"point"} else "line"


def _shape(name: str, drawn: object, size: Size) -> _Drawn:
    kind = optional(drawn, "shape_type", object)
    points = [point(value) for value in member(drawn, "points", list)]
    count = len(points)
    if not isinstance(kind, str | None) or kind not in _LEAST:
        raise ValueError(f"the type of the shape, {str(kind)[:40]!r}, is unknown; draw a {', '.join(_KINDS)} instead")
    if count < _LEAST[kind] or count > _MOST.get(kind, count):
        raise ValueError(f"a shape of the type {kind or 'polygon'} does not have {count} point{'s' * (count != 1)}")
    if kind in ("point", "points") or count == 1:
        return line(name, points, size), "point"
    flat = any(min(side) == max(side) for side in zip(*points, strict=True))
    if kind in ("line", "linestrip") or (kind in _OUTLINES and (count == 2 or flat)):
        return line(name, points, size), "line"
    if kind == "rectangle":
        return Shape(name, enclosing(points), cut=True), "area"
    if kind == "mask":
        return _mask(name, points, member(drawn, "mask", str), size), "area"
    if kind == "circle":
        radius = math.dist(*points)
        return ellipse(name, points[0], (radius, radius)), "area"
    return outlined(name, points, cut=True), "area"


def _mask(name: str, points: list[Point], encoded: str, size: Size) -> Shape:
    # A mask is a PNG of the part of the image between two corners, both of which belong to it.
    if not size:
        raise ValueError("a mask needs the imageWidth and imageHeight of the file")
    width, height = size
    check_mask_size(width, height)
    (left, top), (right, bottom) = ((round(x), round(y)) for x, y in points)
    span = (right - left + 1, bottom - top + 1)
    # Corners that are not whole numbers say where it begins; its own size says where it ends.
    exact = all(value.is_integer() for point in points for value in point)
    mask = png(encoded)
    if exact and mask.shape != span[::-1]:
        raise ValueError(f"its mask is {mask.shape[1]}x{mask.shape[0]}, and its corners span {span[0]}x{span[1]}")
    if not mask.any():
        raise ValueError("its mask shows nothing")
    inside = mask[max(-top, 0) : max(height - top, 0), max(-left, 0) : max(width - left, 0)]
    if not inside.any():
        raise ValueError("its mask lies outside the image")
    return replace(bitmap(name, inside, max(left, 0), max(top, 0), size), cut=True)
