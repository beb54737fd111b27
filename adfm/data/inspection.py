"""Inspect a raw image and its annotation: decode and check both, and make boxes and mask."""

import hashlib
import math
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from adfm.data import contents, duplicates, images, masks
from adfm.data.images import GreyRange, Size, png, reason
from adfm.data.readers import files
from adfm.params import Convert
from adfm.records import Box, Polygon, Rle, Sample

_OF_SAMPLE = ("source", "dataset", "category", "label", "defect", "split", "group")
# Of an image with problems, only `source` and `problems` mean anything.
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in _OF_SAMPLE),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("boxes", pa.list_(pa.list_(pa.float64(), 4))),
        ("fragments", pa.int32()),  # boxes before dilation
        ("mask", pa.binary()),
        ("unmarked", pa.bool_()),  # normal because its mask shows nothing
        ("notes", pa.list_(pa.string())),  # see `Sample`
        ("file", pa.string()),  # see `Sample`
        ("part", pa.string()),  # set by conversion, as `split.group` says
        ("sha256", pa.string()),
        ("crc32", pa.uint32()),
        ("embedded", pa.bool_()),  # as it is, byte for byte
        ("darkest", pa.int64()),  # grey value of an image that has more than 8 bits of them; null for any other
        ("brightest", pa.int64()),
        ("frame", pa.string()),  # on which boxes on a photograph with an EXIF orientation were drawn, see below
        ("thumbnail", pa.binary(duplicates.SIDE**2 * 2)),
        ("contrast", pa.float32()),
        ("problems", pa.list_(pa.string())),
    ]
)

# The image as it is stored, turned upright, or either, where the size that the annotation states fits both.
STORED, UPRIGHT, EITHER = "stored", "upright", "either"

CUT = "boxes that reach out of the image are cut off at its edge"
TURNED = "its annotation is of the photograph as it is stored; it is turned upright with it"
TAKEN_AS_UPRIGHT = (
    "the photograph has an EXIF orientation, and no size tells what its boxes were drawn on; they are taken to be of"
    " the upright picture"
)
SCALED = "its annotation was drawn on another size; it is scaled to that of the image"
STRETCHED = SCALED + ", by another factor across than down, which is wrong if the image was cropped"


def inspect(sample: Sample, settings: Convert) -> dict[str, Any]:
    """Decode an image and check it and its annotation.

    Returns:
        A row of `SCHEMA`; whatever is wrong with the image or its annotation is among its `problems`.
    """
    row: dict[str, Any] = dict.fromkeys(SCHEMA.names)
    try:
        sample.source.encode()
    except UnicodeEncodeError:
        return row | {"problems": _lines(sample, ["its name is not UTF-8; rename it"])}
    row |= {name: getattr(sample, name) for name in _OF_SAMPLE}
    row["file"] = sample.file
    try:
        content = files.content(sample.image)
        row |= _decoded(content)
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        return row | {"problems": _lines(sample, [f"cannot be read ({reason(error)})"])}
    # The checksum, much faster than SHA-256, notices a file that changes before the shards are written.
    row |= {"sha256": hashlib.sha256(content).hexdigest(), "crc32": zlib.crc32(content)}
    orientation, upright = row.pop("orientation"), (row["width"], row["height"])
    problems: list[str] = []
    notes = list(sample.notes)
    shapes = _shapes(sample, upright, orientation, settings.rescale, problems, notes)
    mask, file = _mask(sample, upright, orientation, settings.mask_threshold, problems, notes)
    if mask is None and not problems and (shapes.polygons or shapes.rles):
        mask = masks.painted(upright, shapes.boxes, shapes.polygons, shapes.rles)
    boxes, fragments = shapes.boxes, len(shapes.boxes)
    if mask is not None and mask.any() and not sample.boxes:
        boxes, fragments = masks.boxes_and_fragments(mask, settings.dilation, settings.connectivity, settings.min_area)
        if not boxes and sample.located:
            problems.append(f"every defect is smaller than convert.min_area ({settings.min_area} pixels)")
    if not problems:
        problems += _contradictions(sample, mask, boxes)
    if sample.unmarked_is_normal and not boxes:
        row |= {"label": "normal", "defect": None, "unmarked": sample.label == "anomalous"}
    if row["label"] == "normal":
        mask = None
    elif mask is not None and not boxes:
        small = f" of convert.min_area ({settings.min_area} pixels)" if mask.any() else ""
        notes.append(f"its mask shows no defect{small}, so that its label is all that is known")
        mask = None
    return row | {
        "boxes": [list(box) for box in boxes],
        "fragments": fragments,
        # A clean mask's file is kept as it is. Packed by runs, a mask is as small in half the time.
        "mask": None if mask is None else file or png(Image.fromarray(mask), zlib.Z_RLE),
        "frame": shapes.frame,
        "notes": list(dict.fromkeys(notes)),
        "problems": _lines(sample, problems),
    }


def _lines(sample: Sample, problems: list[str]) -> list[str]:
    return [f"{sample.source}: {problem}".encode(errors="backslashreplace").decode() for problem in problems]


def grey_range(runs: Sequence[Path]) -> GreyRange | None:
    """Return the range of the grey images of more than 8 bits in some files of `SCHEMA`; `None` without any."""
    table = pq.read_table([*runs], columns=["darkest", "brightest"])
    low, high = pc.min(table["darkest"]).as_py(), pc.max(table["brightest"]).as_py()
    return None if low is None else (low, high)


def frame_problems(runs: Sequence[Path]) -> list[str]:
    """Return problems of photographs whose boxes may have been drawn on the stored image, as those of others were."""
    # A tool that ignores the EXIF orientation ignores it in all photographs. By the size that the annotation states, it
    # shows in those that lie on their side, and not in those that stand on their head, are mirrored or square.
    table = pq.read_table([*runs], columns=["source", "frame"])
    if not pc.any(pc.equal(table["frame"], STORED)).as_py():
        return []
    return [
        f"{source}: has an EXIF orientation, and its size does not tell what its boxes were drawn on, while other"
        " images of the set were annotated as they are stored; save it upright, without orientation, and annotate it"
        " again"
        for source in table.filter(pc.equal(table["frame"], EITHER))["source"].to_pylist()
    ]


def mask_problems(runs: Sequence[Path]) -> list[str]:
    """Return problems of masks that may be black on white, where most boxes of the set are all of the image."""
    # One mask alone cannot be judged: a defect may cover most of an image. It does not in most images of a set.
    notes = (pq.read_table(run, columns=["notes"])["notes"] for run in runs)
    if not any(masks.INVERTED in pc.unique(pc.list_flatten(its)).to_pylist() for its in notes):
        return []
    inverted: list[str] = []
    marked = whole = 0
    for run in runs:
        columns = ["source", "label", "width", "height", "boxes", "notes"]
        for row in pq.read_table(run, columns=columns).to_pylist():
            if row["label"] == "anomalous" and row["boxes"]:
                marked += 1
                whole += row["boxes"] == [[0, 0, row["width"], row["height"]]]
                inverted += [row["source"]] if masks.INVERTED in row["notes"] else []
    return [
        f"{source}: its mask marks the corners and most of the image, as those of most images of the set do; where"
        " defects are black on white, exchange the two"
        for source in (inverted if whole > marked / 2 else [])
    ]


def _decoded(content: bytes) -> dict[str, Any]:
    """Return the columns of `SCHEMA` that depend on the image file alone, and its `orientation`."""
    row: dict[str, Any] = {"darkest": None, "brightest": None}
    with images.open_image(content) as file:
        width, height = file.size
        orientation = images.orientation(file) if file.format != "PNG" else 1
        plain = file.format in ("PNG", "JPEG", "MPO") and file.mode in ("RGB", "L")
        embedded = orientation == 1 and plain and not images.is_deep_colour(file)
        image: Image.Image = file
        if embedded:
            file.draft("L", (256, 256))
            file.load()  # reads all data of a JPEG also at a smaller scale
            if file.format == "PNG":
                orientation = images.orientation(file)  # of a PNG it may follow the pixels
                embedded = orientation == 1
        if not embedded:
            values = images.grey(file, content)
            if values is None:
                image = images.colour(file)
            else:
                row["darkest"], row["brightest"] = bounds = images.extent(values)
                image = images.scaled(values, bounds)
            orientation = images.orientation(file)
            width, height = image.size
        thumbnail, contrast = duplicates.thumbnail(image)
    row |= {"width": width, "height": height, "orientation": orientation, "embedded": embedded}
    return row | {"thumbnail": thumbnail.tobytes(), "contrast": contrast}


class _Shapes(NamedTuple):  # that a person drew, in pixels of the upright image
    boxes: list[Box]
    polygons: list[Polygon]
    rles: list[Rle]
    frame: str | None  # in which they were drawn


def _shapes(
    sample: Sample, upright: Size, orientation: int, rescale: bool, problems: list[str], notes: list[str]
) -> _Shapes:
    frame, size = _drawn_on(sample, upright, orientation, rescale, problems, notes)
    if not sample.boxes or size is None:
        return _Shapes([], [], [], None)
    unit = size if sample.normalized else (1, 1)
    boxes = [Box(*(side * by for side, by in zip(box, unit * 2, strict=True))) for box in sample.boxes]
    polygons = [tuple((x * unit[0], y * unit[1]) for x, y in polygon) for polygon in sample.polygons]
    rles = list(sample.rles)
    for polygon in polygons:
        if not all(math.isfinite(side) for corner in polygon for side in corner):
            problems.append("an outline has a corner that is not a number")
    for rle in rles:
        if (rle.width, rle.height) != size:
            where = "is" if size == upright else "was drawn on"
            problems.append(f"{where} {size[0]}x{size[1]}, but a mask in its annotation is {rle.width}x{rle.height}")
    if not problems:
        if frame == STORED:
            boxes = [turned_box(box, size, orientation) for box in boxes]
            polygons = [turned_polygon(polygon, size, orientation) for polygon in polygons]
            size = upright_size(size, orientation)
        if frame == STORED or size != upright:
            turn = orientation if frame == STORED else 1
            rles = [masks.encoded(masks.placed(masks.decoded(rle), turn, upright)) for rle in rles]
        across, down = upright[0] / size[0], upright[1] / size[1]
        if size != upright:
            boxes = [Box(x1 * across, y1 * down, x2 * across, y2 * down) for x1, y1, x2, y2 in boxes]
            polygons = [tuple((x * across, y * down) for x, y in polygon) for polygon in polygons]
    cuts = zip(boxes, sample.cut or (False,) * len(boxes), strict=True)
    clipped = [_clipped(box, *upright, may_reach_out, problems, notes) for box, may_reach_out in cuts]
    return _Shapes([box for box in clipped if box], polygons, rles, frame)


def _drawn_on(
    sample: Sample, upright: Size, orientation: int, rescale: bool, problems: list[str], notes: list[str]
) -> tuple[str | None, Size | None]:
    """Return the frame of an annotation, `None` if the image is stored upright, and its size, `None` if it is wrong."""
    stored = upright_size(upright, orientation)
    size = sample.size if sample.size and min(sample.size) > 0 else None
    sizes = {(rle.width, rle.height) for rle in sample.rles}
    if size is None and sizes == {stored}:
        size = stored
    if size is not None and size not in (stored, upright):
        if not rescale:
            problems.append(
                f"is {upright[0]}x{upright[1]}, but its annotation was drawn on {size[0]}x{size[1]}; if the image was"
                " resized since, set convert.rescale to true, otherwise find the image that belongs to it"
            )
            return None, None
        fits = {STORED: _same_aspect(size, stored), UPRIGHT: _same_aspect(size, upright)}
        notes += [SCALED if any(fits.values()) else STRETCHED] if sample.boxes else []
    else:
        fits = {STORED: size in (None, stored), UPRIGHT: size in (None, upright)}
        size = size or upright
    drawn = [frame for frame, fit in fits.items() if fit]
    if orientation == 1 or not sample.boxes:
        return None, size
    if len(drawn) != 1:
        notes.append(TAKEN_AS_UPRIGHT)
        return EITHER, size
    notes += [TURNED] if drawn == [STORED] else []
    return drawn[0], size


def _same_aspect(size: Size, other: Size) -> bool:
    # But for rounding to whole pixels.
    return abs(size[0] * other[1] - size[1] * other[0]) <= max(sum(size), sum(other))


def upright_size(size: Size, orientation: int) -> Size:
    """Return width and height of a stored image turned upright, and the other way round."""
    return (size[1], size[0]) if orientation >= 5 else size


def turned_polygon(polygon: Iterable[tuple[float, float]], size: Size, orientation: int) -> Polygon:
    """Turn points of a stored image of `size` upright, as its EXIF orientation says."""
    width, height = size
    # Orientations 2 to 4 mirror sides, 5 to 8 exchange them as well.
    across, down = orientation in (2, 3, 7, 8), orientation in (3, 4, 6, 7)
    mirrored = (((width - x if across else x), (height - y if down else y)) for x, y in polygon)
    return tuple((y, x) if orientation >= 5 else (x, y) for x, y in mirrored)


def turned_box(box: Box, size: Size, orientation: int) -> Box:
    """Turn a box of a stored image of `size` upright; an inverted box stays one, as it is a problem."""
    (x1, y1), (x2, y2) = turned_polygon([(box.x1, box.y1), (box.x2, box.y2)], size, orientation)
    x1, x2 = sorted((x1, x2), reverse=box.x1 > box.x2)
    y1, y2 = sorted((y1, y2), reverse=box.y1 > box.y2)
    return Box(x1, y1, x2, y2)


def _clipped(box: Box, width: int, height: int, cut: bool, problems: list[str], notes: list[str]) -> Box | None:
    """Return the box, cut off where it reaches out of the image by rounding, or, if `cut`, by any length."""
    corners = "({:.6g}, {:.6g}, {:.6g}, {:.6g})".format(*box)
    # Up to a pixel is taken for a rounding error.
    reach = max(-box.x1, -box.y1, box.x2 - width, box.y2 - height)
    if not all(math.isfinite(side) for side in box):
        problems.append(f"its box {corners} has a side that is not a number")
    elif box.x2 <= box.x1 or box.y2 <= box.y1:
        problems.append(f"its box {corners} is empty or inverted")
    elif reach > 1 and not cut:
        problems.append(f"its box {corners} reaches out of the image of {width}x{height}")
    else:
        inside = Box(max(box.x1, 0.0), max(box.y1, 0.0), min(box.x2, float(width)), min(box.y2, float(height)))
        if inside.x2 > inside.x1 and inside.y2 > inside.y1:
            notes += [CUT] if reach > 1 else []
            return inside
        problems.append(f"its box {corners} lies outside the image of {width}x{height}")
    return None


def _mask(
    sample: Sample, upright: Size, orientation: int, threshold: float, problems: list[str], notes: list[str]
) -> tuple[masks.Mask | None, bytes | None]:
    """Return the union of the mask files, upright, `None` without any; and the file, if it is one PNG of just that."""
    width, height = upright
    mask = np.zeros((height, width), np.uint8) if len(sample.masks) > 1 else None
    file = None
    for path in sample.masks:
        try:
            content = contents.read(path)
            # A mask without an orientation of its own is stored as its image is, or else was drawn on the upright one.
            part, plain = masks.decode(content, orientation, threshold, notes)
            if orientation != 1 and part.shape != (height, width):
                part, _ = masks.decode(content, 1, threshold, notes)
        except Exception as error:  # a damaged file makes Pillow raise nearly anything
            problems.append(f"its mask {_place(sample, path)} cannot be read ({reason(error)})")
            continue
        if part.shape != (height, width):
            size = f"{part.shape[1]}x{part.shape[0]}"
            problems.append(f"is {width}x{height}, but its mask {_place(sample, path)} is {size}")
        elif mask is None:
            mask, file = part, content if plain else None
        else:
            mask |= part
    return mask, file


def _contradictions(sample: Sample, mask: masks.Mask | None, boxes: list[Box]) -> list[str]:
    if sample.label == "normal" and boxes:
        return ["is normal, but defects are marked on it"]
    if sample.label == "anomalous" and not boxes and sample.located and not sample.unmarked_is_normal:
        if mask is None:
            return ["is anomalous, but nothing is marked on it"]
        return [f"is anomalous, but its mask {_place(sample, sample.masks[0])} shows no defect"]
    return []


def _place(sample: Sample, mask: Path) -> str:
    return os.path.relpath(mask, sample.image.parents[sample.file.count("/")])
