"""Read pixel masks from any file or drawn shape, and make boxes of them."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageDraw, ImageOps

from adfm.data import contents
from adfm.data.images import Size, open_image
from adfm.records import Box, Polygon, Rle

Mask = NDArray[np.uint8]

# Notes on an image: its mask has values far from any defect that are not taken for one, or may mark the background.
FAINT = "its mask has faint areas, which are not taken for defects; convert.mask_threshold decides"
INVERTED = "its mask marks the corners and most of the image, but not alike: its background may be white, not black"

_NUMBERS = 32  # no soft edge has a maximum as small
_NOISE = 0.1  # of the maximum
_BLOCK = 8  # pixels: the side of a block of JPEG, within which its noise stays
_PLAIN_SHARE = 0.25  # of pixels whose neighbours all have their value, as in an area of 4 x 4
_REACH = 16  # pixels: a JPEG's block of colours
_LOSSY_BLACK = 16  # values of a JPEG that is black
_NEIGHBOURS = np.ones((3, 3))


def load_mask(path: Path, orientation: int = 1, threshold: float = 0.5, notes: list[str] | None = None) -> Mask:
    """Read a mask file; see `decode`."""
    return decode(contents.read(path), orientation, threshold, notes)[0]


def decode(content: bytes, orientation: int, threshold: float, notes: list[str] | None = None) -> tuple[Mask, bool]:
    """Decode a mask of any mode: index, palette, RGB, 1, 16 or 32 bits, floating point.

    Args:
        content: The file.
        orientation: EXIF orientation of the image that the mask belongs to, for a mask that states none of its own.
        threshold: As of `defects`.
        notes: As of `defects`; also gets `INVERTED`.

    Returns:
        [height, width], 0 or 255; and whether the file is a PNG of just that.

    Raises:
        Exception: As of `images.open_image`, and the file is damaged.
    """
    with open_image(content) as file:
        file.load()
        own = file.getexif().get(ExifTags.Base.Orientation)
        plain = file.format == "PNG" and file.mode == "L" and own is None and orientation == 1
        lossy = file.format == "JPEG"
        image: Image.Image = file
        if own is not None or orientation != 1:
            file.getexif().setdefault(ExifTags.Base.Orientation, orientation)
            image = ImageOps.exif_transpose(file)
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif image.mode in ("CMYK", "YCbCr"):
        image = image.convert("RGB")
    values: NDArray[Any] = np.asarray(image)
    if image.mode in ("RGBA", "LA"):
        # Transparency weakens a value in proportion.
        colour, opacity = values[..., :-1].max(axis=2).astype(np.uint16), values[..., -1]
        values = (colour * opacity + 254) // 255
    coloured = values.ndim == 3 and not lossy and bool((values != values[0, 0]).any())
    if values.ndim == 3:
        values = values.max(axis=2)
    if values.dtype == bool:
        values = values.view(np.uint8)
    if lossy and values.max(initial=0) < _LOSSY_BLACK:
        return np.zeros(values.shape, np.uint8), False
    mask = defects(values, threshold, notes).view(np.uint8) * np.uint8(255)
    corners = mask[[0, 0, -1, -1], [0, -1, 0, -1]].all()
    most = corners and mask.size / 2 < np.count_nonzero(mask) < mask.size
    if notes is not None and (most or (coloured and mask.all())):
        notes.append(INVERTED)
    return mask, plain and np.array_equal(mask, values)


def defects(values: NDArray[Any], threshold: float, notes: list[str] | None = None) -> NDArray[np.bool_]:
    """Separate the defects of a mask from its background and from soft edges.

    Some masks number their defects: each has one value throughout, be it 1 of 255. Others were drawn with antialiasing,
    resized, or compressed as JPEG, which puts values in between round every edge, and faint ones beside it.

    Args:
        values: [height, width].
        threshold: Share of the maximum of its connected area, and of the maximum within 8 pixels, that a defect has at
            least; 0: every value above 0 is a defect.
        notes: Gets `FAINT` where values that are left out lie further from a defect than soft edges reach.

    Returns:
        [height, width].
    """
    from scipy import ndimage

    if values.dtype.kind == "f":
        values = np.nan_to_num(values)
    top = values.max(initial=0)
    marked = values > 0
    # Compared with a number of their own kind, for speed.
    least = threshold * top if values.dtype.kind == "f" else math.ceil(threshold * int(top))
    if threshold == 0 or top <= 0 or np.count_nonzero(values >= least) == np.count_nonzero(marked):
        return marked
    rows, columns = np.flatnonzero(marked.any(axis=1)), np.flatnonzero(marked.any(axis=0))
    extent = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    inside = values[extent]
    if _is_numbered(inside, threshold, top):
        return marked
    defect = np.zeros_like(marked)
    defect[extent] = kept = _without_soft_edges(inside, threshold, top)
    if notes is not None and ((inside > 0) & (ndimage.distance_transform_edt(~kept) > _REACH)).any():
        notes.append(FAINT)
    return defect


def _is_numbered(values: NDArray[Any], threshold: float, top: float) -> bool:
    """Return whether values are numbers of defects: all are low, or every area has one, or many lie in plain areas."""
    if top <= _NUMBERS and (values.dtype.kind != "f" or not (values % 1).any()):
        return True
    from scipy import ndimage

    areas, count = ndimage.label(values > 0, _NEIGHBOURS)
    numbers = range(1, count + 1)
    # All eight neighbours, background included: stripes of JPEG's ringing have marked neighbours of one value too.
    plain = ndimage.maximum_filter(values, 3, mode="constant") == ndimage.minimum_filter(values, 3, mode="constant")
    highest = ndimage.maximum(values, areas, numbers)
    if np.array_equal(ndimage.minimum(values, areas, numbers), highest):
        # Where edges fall on JPEG's blocks, every area has one value, and the ripple beside a defect has one too: thin,
        # and faint against a thick area nearby.
        thick = np.concatenate([[False], ndimage.maximum(plain, areas, numbers)])
        nearby = ndimage.maximum_filter(np.where(thick[areas], values, 0), 2 * _BLOCK + 1)
        faint = highest < min(_NOISE, threshold) * ndimage.maximum(nearby, areas, numbers)
        return not (faint & ~thick[1:]).any()
    # Those between noise and defects lie in areas of one value, as no soft edge does.
    between = (values >= min(_NOISE, threshold) * top) & (values < threshold * top)
    return bool(plain[between].sum() >= _PLAIN_SHARE * max(1, between.sum()))


def _without_soft_edges(values: NDArray[Any], threshold: float, top: float) -> NDArray[np.bool_]:
    from scipy import ndimage

    # The maximum of the whole mask would lose thin scratches that were blurred; that of the connected area alone would
    # keep JPEG's ringing, which lies in areas of its own. Bounds below a half keep ringing too (docs/experiments.md).
    nearby = ndimage.maximum_filter(values, 2 * _BLOCK + 1)
    areas, count = ndimage.label(values >= np.maximum(min(_NOISE, threshold) * top, threshold * nearby), _NEIGHBOURS)
    highest = np.concatenate([[np.inf], ndimage.maximum(values, areas, range(1, count + 1))])
    return np.asarray(values >= threshold * highest[areas])


def painted(size: Size, boxes: Iterable[Box], polygons: Iterable[Polygon], rles: Iterable[Rle]) -> Mask | None:
    """Paint shapes that a person drew into a mask, cut off at their boxes, which lie within the mask.

    Returns:
        [height, width], 0 or 255; `None` if a box has no shape in it: a mask must mark all defects.
    """
    image = Image.new("L", size)
    for polygon in polygons:
        ImageDraw.Draw(image).polygon(polygon, fill=255)
    shapes = np.asarray(image).copy()
    for rle in rles:
        shapes |= decoded(rle)
    mask = np.zeros_like(shapes)
    for x1, y1, x2, y2 in boxes:
        inside = np.s_[int(y1) : math.ceil(y2), int(x1) : math.ceil(x2)]
        if not shapes[inside].any():
            return None  # a mask must mark all defects
        mask[inside] = shapes[inside]
    return mask


def decoded(rle: Rle) -> Mask:
    """Decode a run-length encoding to [height, width], 0 or 255."""
    runs = np.resize(np.array([0, 255], np.uint8), len(rle.counts))
    return np.repeat(runs, rle.counts).reshape(rle.width, rle.height).T


def encoded(mask: Mask) -> Rle:
    """Encode a mask by run lengths; a defect is what is not 0."""
    pixels = np.concatenate([[False], (mask != 0).ravel(order="F")])
    ends = np.flatnonzero(pixels[1:] != pixels[:-1])
    counts = np.diff(np.concatenate([[0], ends, [mask.size]]))
    return Rle(mask.shape[0], mask.shape[1], tuple(counts.tolist()))


def placed(mask: Mask, orientation: int, size: Size) -> Mask:
    """Turn a mask as an EXIF orientation turns its image, and resize it to `size`, width and height."""
    image = Image.fromarray(mask)
    image.getexif()[ExifTags.Base.Orientation] = orientation
    return np.asarray(ImageOps.exif_transpose(image).resize(size, Image.Resampling.NEAREST))


def to_boxes(mask: NDArray[Any], dilation: float, connectivity: int, min_area: int) -> list[Box]:
    """Enclose every defect of a mask in a box; see `boxes_and_fragments`."""
    return boxes_and_fragments(mask, dilation, connectivity, min_area)[0]


def boxes_and_fragments(mask: NDArray[Any], dilation: float, connectivity: int, min_area: int) -> tuple[list[Box], int]:
    """Enclose every defect of a mask in a box; fragments that lie close together are one defect.

    The mask is dilated by a disk, and fragments that then touch are merged, as in AD-FM (arXiv 2508.04175). Each box
    is the smallest round the mask's own pixels, not the dilated ones.

    Args:
        mask: [height, width]; a defect is what is not 0.
        dilation: Diameter of the disk as a fraction of the image's shorter side; below 2 pixels nothing is merged.
        connectivity: 4 or 8 neighbours.
        min_area: Defects of fewer mask pixels are dropped.

    Returns:
        Boxes in pixels of the mask, half-open, sorted; and how many there would be without dilation.
    """
    from scipy import ndimage

    neighbours = ndimage.generate_binary_structure(2, 1 if connectivity == 4 else 2)
    defect = mask != 0
    rows, columns = np.flatnonzero(defect.any(axis=1)), np.flatnonzero(defect.any(axis=0))
    if rows.size == 0:
        return [], 0
    # The same components come out of the mask's own extent alone, with room for the disk, in a fraction of the time.
    radius = round(dilation * min(mask.shape)) / 2
    room, top, left = int(radius) + 1, int(rows[0]), int(columns[0])
    defect = np.pad(defect[top : rows[-1] + 1, left : columns[-1] + 1], room)
    labels, fragments = ndimage.label(defect, neighbours)
    areas = np.bincount(labels[defect], minlength=1)
    large = int((areas[1:] >= min_area).sum())
    extents = ndimage.find_objects(labels)
    # A single fragment needs no dilation.
    if radius >= 1 and fragments > 1 and _near(extents, 2 * radius + 1):
        # A pixel lies in the dilated mask exactly when a mask pixel lies within the disk's radius.
        labels, _ = ndimage.label(ndimage.distance_transform_edt(~defect) <= radius, neighbours)
        labels[~defect] = 0
        areas = np.bincount(labels[defect])
        extents = ndimage.find_objects(labels)
    boxes = []
    for number, (y, x) in enumerate(extents, start=1):
        if areas[number] >= min_area:
            box = (x.start + left, y.start + top, x.stop + left, y.stop + top)
            boxes.append(Box(*(float(side - room) for side in box)))
    return sorted(boxes), large


def _near(fragments: list[tuple[slice, slice]], reach: float) -> bool:
    # Judged by their extents.
    if len(fragments) > 1000:  # the matrix below would be large
        return True
    near = np.ones((len(fragments), len(fragments)), bool)
    for axis in (0, 1):
        start, stop = np.array([(extent[axis].start, extent[axis].stop) for extent in fragments]).T
        near &= start[:, None] - stop <= reach
        near &= start - stop[:, None] <= reach
    return int(near.sum()) > len(fragments)
