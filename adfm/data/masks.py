"""Pixel masks: from any file or drawn shape to one form, and from that form to boxes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageDraw, ImageOps

from adfm.records import Box, Polygon, Rle

Mask = NDArray[np.uint8]


def load_mask(path: Path, orientation: int = 1) -> Mask:
    """Reads a mask in any form it comes in.

    A defect is every pixel that is not black, whatever the mode (index, palette, RGB, 1 and 16 bit) and whatever the
    value: data sets number their defects from 1. Fully transparent pixels are not defects. A JPEG has values between 1
    and 254 round every edge, so there a defect starts at 128.

    Args:
        path: The mask file.
        orientation: EXIF orientation of the image that the mask belongs to, for a mask that states none of its own.

    Returns:
        [height, width], 0 or 255.

    Raises:
        OSError: The file cannot be read or is damaged (Pillow raises others as well for some damaged files).
    """
    with Image.open(path) as file:
        background = 127 if file.format == "JPEG" else 0
        file.getexif().setdefault(ExifTags.Base.Orientation, orientation)
        image: Image.Image = ImageOps.exif_transpose(file)
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif image.mode in ("CMYK", "YCbCr"):
        image = image.convert("RGB")
    values: NDArray[Any] = np.asarray(image)
    if image.mode in ("RGBA", "LA"):
        values = values[..., :-1] * (values[..., -1:] > 0)
    if values.ndim == 3:
        values = values.max(axis=2)
    return np.where(values > background, np.uint8(255), np.uint8(0))


def painted(
    width: int, height: int, boxes: Iterable[Box], polygons: Iterable[Polygon], rles: Iterable[Rle]
) -> Mask | None:
    """Paints the shapes that a person drew.

    A polygon is filled with its outline, and cut off at the boxes. A mask says of every pixel whether it is defective,
    so there is none if not every box has a shape in it.

    Args:
        width: Of the mask, in pixels.
        height: Of the mask, in pixels.
        boxes: In pixels, half-open, within the mask.
        polygons: In pixels.
        rles: Of the mask's size.

    Returns:
        [height, width], 0 or 255; or `None`.
    """
    image = Image.new("L", (width, height))
    draw = ImageDraw.Draw(image)
    for polygon in polygons:
        draw.polygon(polygon, fill=255)
    shapes = np.asarray(image).copy()
    for rle in rles:
        runs = np.resize(np.array([0, 255], np.uint8), len(rle.counts))
        shapes |= np.repeat(runs, rle.counts).reshape(width, height).T
    mask = np.zeros_like(shapes)
    for x1, y1, x2, y2 in boxes:
        inside = np.s_[int(y1) : math.ceil(y2), int(x1) : math.ceil(x2)]
        if not shapes[inside].any():
            return None
        mask[inside] = shapes[inside]
    return mask


def to_boxes(mask: NDArray[Any], dilation: float, connectivity: int, min_area: int) -> list[Box]:
    """Encloses every defect of a mask; fragments that lie close together are one defect.

    The mask is dilated by a disk, and fragments that then touch are merged. Every box encloses the mask's own pixels
    (not the dilated ones) of one merged defect as tightly as can be. The method is AD-FM's (arXiv 2508.04175).

    Args:
        mask: [height, width]; a defect is what is not 0.
        dilation: Diameter of the disk as a fraction of the image's shorter side; below 2 pixels nothing is merged.
        connectivity: 4 or 8 neighbours.
        min_area: Defects of fewer mask pixels are dropped.

    Returns:
        Boxes in pixels of the mask, half-open, sorted.
    """
    from scipy import ndimage

    neighbours = ndimage.generate_binary_structure(2, 1 if connectivity == 4 else 2)
    defect = mask != 0
    rows, columns = np.flatnonzero(defect.any(axis=1)), np.flatnonzero(defect.any(axis=0))
    if rows.size == 0:
        return []
    # The same components come out of the mask's own extent alone, with room for the disk, in a fraction of the time.
    radius = round(dilation * min(mask.shape)) / 2
    room, top, left = int(radius) + 1, int(rows[0]), int(columns[0])
    defect = np.pad(defect[top : rows[-1] + 1, left : columns[-1] + 1], room)
    labels, fragments = ndimage.label(defect, neighbours)
    if radius >= 1 and fragments > 1 and _near(ndimage.find_objects(labels), 2 * radius + 1):
        # A pixel lies in the dilated mask exactly when a mask pixel lies within the disk's radius.
        labels, _ = ndimage.label(ndimage.distance_transform_edt(~defect) <= radius, neighbours)
        labels[~defect] = 0
    areas = np.bincount(labels[defect])
    boxes = []
    for number, (y, x) in enumerate(ndimage.find_objects(labels), start=1):
        if areas[number] >= min_area:
            box = (x.start + left, y.start + top, x.stop + left, y.stop + top)
            boxes.append(Box(*(float(side - room) for side in box)))
    return sorted(boxes)


def _near(fragments: list[tuple[slice, slice]], reach: float) -> bool:
    """Whether any two fragments can be within reach of each other, judged by their extents."""
    if len(fragments) > 1000:
        return True
    near = np.ones((len(fragments), len(fragments)), bool)
    for axis in (0, 1):
        start, stop = np.array([(extent[axis].start, extent[axis].stop) for extent in fragments]).T
        near &= start[:, None] - stop <= reach
        near &= start - stop[:, None] <= reach
    return int(near.sum()) > len(fragments)
