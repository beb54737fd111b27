"""One raw image and what is marked on it: decoded, checked, and made into what the shards need."""

from __future__ import annotations

import hashlib
import io
import math
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from adfm.data import duplicates, masks
from adfm.data.readers import files
from adfm.params import Convert
from adfm.records import Box, Sample

# What is known of an image after it was looked at. Of one with problems, only `source` and `problems` mean anything.
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("source", "dataset", "category", "label", "defect", "split", "group")),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("boxes", pa.list_(pa.list_(pa.float64(), 4))),
        ("fragments", pa.int32()),  # boxes before dilation
        ("mask", pa.binary()),
        ("unmarked", pa.bool_()),  # normal because its mask shows nothing
        ("notes", pa.list_(pa.string())),  # see `Sample`
        ("file", pa.string()),  # that holds the image, relative to the data set; `source` but for images within JSON
        ("part", pa.string()),  # set by conversion, as `split.group` says
        ("sha256", pa.string()),
        ("crc32", pa.uint32()),
        ("embedded", pa.bool_()),  # as it is, byte for byte
        ("thumbnail", pa.binary(duplicates.SIDE**2 * 2)),
        ("contrast", pa.float32()),
        ("problems", pa.list_(pa.string())),
    ]
)


def inspect(sample: Sample, settings: Convert) -> dict[str, Any]:
    """Decodes an image and checks it and its marks.

    Args:
        sample: As its reader found it.
        settings: How boxes are made from masks.

    Returns:
        A row of `SCHEMA`; whatever is wrong with the image or its marks is among its `problems`.
    """
    row: dict[str, Any] = dict.fromkeys(SCHEMA.names)
    if not _is_text(sample.source):
        return row | {"problems": _lines(sample, ["its name is not UTF-8; rename it"])}
    row |= {name: getattr(sample, name) for name in SCHEMA.names[:7]}
    row["file"] = str(PurePosixPath(sample.source).with_name(sample.image.name))
    try:
        content = files.content(sample.image)
        row |= _decoded(content)
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        return row | {"problems": _lines(sample, [f"cannot be read ({reason(error)})"])}
    row |= {"sha256": hashlib.sha256(content).hexdigest(), "crc32": zlib.crc32(content)}
    orientation = row.pop("orientation")
    problems: list[str] = []
    mask, boxes = _marks(sample, row["width"], row["height"], orientation, problems)
    fragments = len(boxes)
    if mask is not None and mask.any() and not sample.boxes:
        boxes = masks.to_boxes(mask, settings.dilation, settings.connectivity, settings.min_area)
        fragments = len(boxes)
        if settings.dilation:
            fragments = len(masks.to_boxes(mask, 0, settings.connectivity, settings.min_area))
        if not boxes:
            problems.append(f"every defect is smaller than convert.min_area ({settings.min_area} pixels)")
    if not problems:
        problems += _contradictions(sample, mask, boxes)
    if sample.unmarked_is_normal and not boxes:
        row |= {"label": "normal", "defect": None, "unmarked": sample.label == "anomalous"}
    if row["label"] == "normal":
        mask = None
    return row | {
        "boxes": [list(box) for box in boxes],
        "fragments": fragments,
        "mask": None if mask is None else png(Image.fromarray(mask), zlib.Z_RLE),
        "notes": list(sample.notes),
        "problems": _lines(sample, problems),
    }


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lines(sample: Sample, problems: list[str]) -> list[str]:
    return [f"{sample.source}: {problem}".encode(errors="backslashreplace").decode() for problem in problems]


def encoded(content: bytes) -> bytes:
    """The image as an upright RGB PNG; for those that are not embedded as they are."""
    with Image.open(io.BytesIO(content)) as file:
        return png(_upright(file))


def size(content: bytes) -> tuple[int, int]:
    """Width and height of the image as it is stored, from its header alone.

    Raises:
        Exception: As `upright`.
    """
    with Image.open(io.BytesIO(content)) as file:
        return file.size


def upright(content: bytes) -> Image.Image:
    """The image as a model sees it: upright, RGB.

    Raises:
        Exception: It cannot be decoded, or is not one image: Pillow raises nearly anything.
    """
    with Image.open(io.BytesIO(content)) as file:
        _refuse_pages(file)
        return _upright(file)


def png(image: Image.Image, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> bytes:
    """The image as a PNG file; zlib's `strategy` changes its size and the time that it takes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_type=strategy)
    return buffer.getvalue()


def reason(error: Exception) -> str:
    """What is wrong with a file that cannot be read."""
    return "it is no image" if isinstance(error, UnidentifiedImageError) else str(error)


def _decoded(content: bytes) -> dict[str, Any]:
    if not content:
        raise ValueError("it is empty")
    with Image.open(io.BytesIO(content)) as file:
        _refuse_pages(file)
        width, height = file.size
        orientation = int(file.getexif().get(ExifTags.Base.Orientation, 1)) if file.format != "PNG" else 1
        embedded = orientation == 1 and file.format in ("PNG", "JPEG", "MPO") and file.mode in ("RGB", "L")
        image: Image.Image = file
        if embedded:
            # All of a JPEG's data are read to decode it at a smaller scale.
            file.draft("L", (256, 256))
            file.load()
            if file.format == "PNG":
                orientation = int(file.getexif().get(ExifTags.Base.Orientation, 1))
                embedded = orientation == 1
        if not embedded:
            image = _upright(file)
            width, height = image.size
        thumbnail, contrast = duplicates.thumbnail(image)
    return {
        "width": width,
        "height": height,
        "orientation": orientation,
        "embedded": embedded,
        "thumbnail": thumbnail.tobytes(),
        "contrast": contrast,
    }


def _refuse_pages(file: Image.Image) -> None:
    frames = getattr(file, "n_frames", 1)
    if frames > 1 and file.format != "MPO":  # a photograph with a preview of itself
        raise ValueError(f"it has {frames} frames or pages; save the one that counts by itself")


def _upright(file: Image.Image) -> Image.Image:
    image: Image.Image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):
        image = Image.fromarray(np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floating point; save it with 8 or 16 bits")
    return image.convert("RGB")


def _marks(
    sample: Sample, width: int, height: int, orientation: int, problems: list[str]
) -> tuple[masks.Mask | None, list[Box]]:
    """The mask, and the boxes that a person drew, in pixels of the upright image."""
    mask = np.zeros((height, width), np.uint8) if sample.masks else None
    for path in sample.masks:
        try:
            part = _mask(path, (height, width), orientation)
        except Exception as error:
            problems.append(f"its mask {path} cannot be read ({reason(error)})")
            continue
        if mask is not None and part.shape == mask.shape:
            mask |= part
        else:
            size = f"{part.shape[1]}x{part.shape[0]}"
            problems.append(f"is {width}x{height}, but its mask {path} is {size}")
    scale = (width, height) if sample.normalized else (1, 1)
    boxes = []
    for drawn in sample.boxes:
        box = _clipped(Box(*(side * by for side, by in zip(drawn, scale * 2, strict=True))), width, height, problems)
        if box:
            boxes.append(box)
    polygons = [tuple((x * scale[0], y * scale[1]) for x, y in polygon) for polygon in sample.polygons]
    for polygon in polygons:
        if not all(math.isfinite(side) for corner in polygon for side in corner):
            problems.append("an outline has a corner that is no number")
    for rle in sample.rles:
        if (rle.width, rle.height) != (width, height):
            problems.append(f"is {width}x{height}, but a mask in its annotation is {rle.width}x{rle.height}")
    if (polygons or sample.rles) and mask is None and not problems:
        mask = masks.painted(width, height, boxes, polygons, sample.rles)
    return mask, boxes


def _mask(path: Path, shape: tuple[int, int], orientation: int) -> masks.Mask:
    mask = masks.load_mask(path, orientation)
    if orientation != 1 and mask.shape != shape:
        mask = masks.load_mask(path)  # drawn on the upright image
    return mask


def _clipped(box: Box, width: int, height: int, problems: list[str]) -> Box | None:
    """The box, cut off where it reaches out of the image by rounding."""
    shown = "({:.6g}, {:.6g}, {:.6g}, {:.6g})".format(*box)
    if not all(math.isfinite(side) for side in box):
        problems.append(f"its box {shown} has a side that is no number")
    elif box.x2 <= box.x1 or box.y2 <= box.y1:
        problems.append(f"its box {shown} is empty or inverted")
    elif min(box.x1, box.y1) < -1 or box.x2 > width + 1 or box.y2 > height + 1:
        problems.append(f"its box {shown} reaches out of the image of {width}x{height}")
    else:
        inside = Box(max(box.x1, 0.0), max(box.y1, 0.0), min(box.x2, float(width)), min(box.y2, float(height)))
        if inside.x2 > inside.x1 and inside.y2 > inside.y1:
            return inside
        problems.append(f"its box {shown} lies outside the image of {width}x{height}")
    return None


def _contradictions(sample: Sample, mask: masks.Mask | None, boxes: list[Box]) -> list[str]:
    if sample.label == "normal" and boxes:
        return ["is normal, but defects are marked on it"]
    if sample.label == "anomalous" and not boxes and sample.located and not sample.unmarked_is_normal:
        if mask is None:
            return ["is anomalous, but nothing is marked on it"]
        return [f"is anomalous, but its mask {sample.masks[0]} shows no defect"]
    return []
