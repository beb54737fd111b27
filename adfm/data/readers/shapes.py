"""Shapes that annotation tools draw besides boxes and polygons: turned boxes, ellipses, lines, bitmaps, groups.

Angles are in degrees, clockwise as an image is seen. Bad data raise `ValueError` with what is wrong.
"""

import base64
import binascii
import io
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adfm.data.readers.annotations import Shape, box, enclosing, outlined
from adfm.records import Box, Polygon, Rle

Point = tuple[float, float]

_CORNERS = 64  # of the polygon that stands for an ellipse


def turned_box(name: str, before: Box, degrees: float, pivot: Point | None = None) -> Shape:
    """Turn a box about its centre or a pivot: the box round it, cut off at the edge of the image, and its outline."""
    if not all(map(math.isfinite, (*before, degrees))):
        raise ValueError("a number of the turned box is not finite")
    x1, y1, x2, y2 = before
    if x2 <= x1 or y2 <= y1:
        raise ValueError(f"the turned box of {x2 - x1:g}x{y2 - y1:g} has no area")
    x, y = pivot or ((x1 + x2) / 2, (y1 + y2) / 2)
    return outlined(name, _turned((x, y), [(left - x, top - y) for left, top in corners(before)], degrees), cut=True)


def ellipse(name: str, center: Point, radii: Point, degrees: float = 0) -> Shape:
    """Return an ellipse: the box round it, cut off at the edge of the image, and its outline."""
    (x, y), (across, down) = center, radii
    if not all(map(math.isfinite, (x, y, across, down, degrees))) or across <= 0 or down <= 0:
        raise ValueError(f"the ellipse with the radii {across:g} and {down:g} has no area")
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    width, height = math.hypot(across * cos, down * sin), math.hypot(across * sin, down * cos)
    angles = [2 * math.pi * corner / _CORNERS for corner in range(_CORNERS)]
    outline = _turned(center, [(across * math.cos(angle), down * math.sin(angle)) for angle in angles], degrees)
    return Shape(name, box(x - width, y - height, x + width, y + height), (outline,), cut=True)


def line(name: str, points: Sequence[Point], size: tuple[int, int] | None = None) -> Shape:
    """Return a line or a point: the box round it, at least one pixel wide and high, cut off at the image's edge."""
    sides = []
    for values, length in zip(zip(*points, strict=True), size or (math.inf, math.inf), strict=True):
        low, high = min(values), max(values)
        if high - low < 1:
            middle = (low + high) / 2
            # The pixel lies within the image, where its size is known.
            low = min(max(middle - 0.5, 0), length - 1) if 0 <= middle <= length else middle - 0.5
            high = low + 1
        sides.append((low, high))
    (x1, x2), (y1, y2) = sides
    return Shape(name, box(x1, y1, x2, y2), cut=True)


def bitmap(name: str, part: NDArray[np.bool_], left: int, top: int, size: tuple[int, int] | None) -> Shape:
    """Return a bitmap that covers a part of the image: the box round its pixels, and its mask.

    `part` is [height, width], and begins at the column `left` and the row `top` of an image of `size` (width, height).
    """
    if size is None:
        raise ValueError("has a mask, but the file does not state the size of the image")
    (width, height), (down, across) = size, part.shape
    rows, columns = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
    if not rows.size:
        raise ValueError("its mask shows nothing")
    if left < 0 or top < 0 or left + across > width or top + down > height:
        raise ValueError(f"its mask of {across}x{down} at {left}, {top} reaches out of the image of {width}x{height}")
    x1, y1, x2, y2 = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    inner = part[y1:y2, x1:x2]
    # Runs go down one column after the other; a row of background below each column ends its last run.
    edges = np.flatnonzero(np.diff(np.pad(inner, ((1, 1), (0, 0))).T.astype(np.int8).ravel()))
    in_column, in_row = np.divmod(edges, inner.shape[0] + 2)
    bounds = (left + x1 + in_column) * height + top + y1 + in_row
    counts = np.diff(np.concatenate([[0], bounds, [width * height]]))
    round_it = Box(float(left + x1), float(top + y1), float(left + x2), float(top + y2))
    return Shape(name, round_it, rle=Rle(height, width, tuple(counts.tolist())))


def patches(name: str, mask: NDArray[np.bool_], size: tuple[int, int]) -> list[Shape]:
    """Return a bitmap for every patch of a mask [height, width] of an image of `size` (width, height)."""
    from scipy import ndimage

    labels, _ = ndimage.label(mask, np.ones((3, 3)))  # pixels that touch at a side or a corner are of one patch
    places = enumerate(ndimage.find_objects(labels), start=1)
    return [bitmap(name, labels[at] == number, at[1].start, at[0].start, size) for number, at in places]


def pixels(rle: Rle) -> NDArray[np.bool_]:
    """Return a mask as an array [height, width]."""
    return unpacked(rle.counts).reshape(rle.width, rle.height).T


def unpacked(counts: Sequence[int]) -> NDArray[np.bool_]:
    """Expand lengths of runs, of background and defect by turns, to pixels."""
    return np.repeat(np.resize(np.array([False, True]), len(counts)), counts)


def png(encoded: str, unpack: Callable[[bytes], bytes] = bytes) -> NDArray[np.bool_]:
    """Return the pixels [height, width] of a PNG in base64 that are not background; `unpack` makes a PNG of bytes."""
    try:
        content = unpack(base64.b64decode(encoded, validate=True))
        with Image.open(io.BytesIO(content), formats=["PNG"]) as file:
            check_mask_size(*file.size)
            # Background is transparent if any pixel can be, else 0.
            transparent = "transparency" in file.info or file.mode in ("LA", "RGBA")
            values = np.asarray(file.convert("RGBA"))[..., 3] if transparent else np.asarray(file)
    except binascii.Error as error:
        raise ValueError("its mask cannot be read (it is not base64 text)") from error
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise ValueError(f"its mask cannot be read ({error})") from error
    return np.asarray((values != 0).reshape(*values.shape[:2], -1).any(axis=2))


def check_mask_size(width: int, height: int) -> None:
    """Refuse a mask of more pixels than Pillow takes for an image, or of none."""
    if width < 1 or height < 1 or width * height > (Image.MAX_IMAGE_PIXELS or 0):
        raise ValueError(f"a mask of {width}x{height} pixels is too large, or empty")


def group(shapes: Iterable[tuple[str | None, Shape]]) -> list[Shape]:
    """Join the shapes, given in the order of drawing, that have the same group and class; `None` is not a group."""
    groups: dict[object, list[Shape]] = {}
    for place, (key, shape) in enumerate(shapes):
        groups.setdefault(place if key is None else (key, shape.name), []).append(shape)
    return [join(pieces) for pieces in groups.values()]


def join(pieces: Sequence[Shape], as_outlines: bool = False) -> Shape:
    """Join shapes of one class; boxes become outlines if any shape has an outline or a mask, or if that is set."""
    if len(pieces) == 1:
        return pieces[0]
    name, boxes, cut = pieces[0].name, [piece.box for piece in pieces], any(piece.cut for piece in pieces)
    around = enclosing(corner for one in boxes for corner in corners(one))
    if not as_outlines and not any(piece.polygons or piece.rle for piece in pieces):
        return Shape(name, around, cut=cut)
    outlines: list[Polygon] = []
    for piece in pieces:
        outlines += piece.polygons or (() if piece.rle else (corners(piece.box),))
    rles = [piece.rle for piece in pieces if piece.rle]
    union = np.logical_or.reduce([pixels(rle) for rle in rles]) if rles else None
    mask = None if union is None else bitmap(name, union, 0, 0, (rles[0].width, rles[0].height)).rle
    return Shape(name, around, tuple(outlines), mask, cut)


def corners(area: Box) -> Polygon:
    """Return the outline of a box."""
    x1, y1, x2, y2 = area
    return ((x1, y1), (x2, y1), (x2, y2), (x1, y2))


def _turned(center: Point, points: Iterable[Point], degrees: float) -> Polygon:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return tuple((center[0] + x * cos - y * sin, center[1] + x * sin + y * cos) for x, y in points)
