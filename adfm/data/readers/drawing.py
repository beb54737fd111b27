"""Shapes that annotation tools draw besides boxes and polygons: turned boxes, ellipses, lines, bitmaps, groups.

Angles turn the x axis towards the y axis: clockwise as an image is seen, since its y axis points down.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adfm.data.readers.annotations import Shape, box, enclosing, polygon
from adfm.records import Box, Polygon, Rle

_CORNERS = 64  # of the polygon that stands for an ellipse


def turned(cx: float, cy: float, width: float, height: float, radians: float) -> Polygon:
    """The corners of a box that is turned about its centre.

    Raises:
        ValueError: It has no area, or a number is not finite.
    """
    if not all(map(math.isfinite, (cx, cy, width, height, radians))):
        raise ValueError("a number of the turned box is not finite")
    if width <= 0 or height <= 0:
        raise ValueError(f"the turned box of {width:g}x{height:g} has no area")
    corners = ((-width / 2, -height / 2), (width / 2, -height / 2), (width / 2, height / 2), (-width / 2, height / 2))
    return tuple(_turned(cx, cy, x, y, radians) for x, y in corners)


def turned_shape(name: str, cx: float, cy: float, width: float, height: float, radians: float) -> Shape:
    """A turned box: the box round it, cut off at the edge of the image, and its outline."""
    outline = turned(cx, cy, width, height, radians)
    return Shape(name, enclosing(outline), (outline,), cut=True)


def ellipse_shape(name: str, cx: float, cy: float, rx: float, ry: float, radians: float = 0) -> Shape:
    """An ellipse: the box round it, cut off at the edge of the image, and its outline.

    Raises:
        ValueError: It has no area, or a number is not finite.
    """
    if not all(map(math.isfinite, (cx, cy, rx, ry, radians))) or rx <= 0 or ry <= 0:
        raise ValueError(f"the ellipse with the radii {rx:g} and {ry:g} has no area")
    half_x = math.hypot(rx * math.cos(radians), ry * math.sin(radians))
    half_y = math.hypot(rx * math.sin(radians), ry * math.cos(radians))
    angles = [2 * math.pi * corner / _CORNERS for corner in range(_CORNERS)]
    outline = tuple(_turned(cx, cy, rx * math.cos(angle), ry * math.sin(angle), radians) for angle in angles)
    return Shape(name, box(cx - half_x, cy - half_y, cx + half_x, cy + half_y), (outline,), cut=True)


def line_shape(name: str, points: Sequence[tuple[float, float]]) -> Shape:
    """A line: the box round it, at least one pixel wide and high, cut off at the edge of the image.

    Raises:
        ValueError: It has fewer than two points.
    """
    if len(points) < 2:
        raise ValueError(f"a line needs 2 points, and has {len(points)}")
    xs, ys = zip(*points, strict=True)
    (x1, x2), (y1, y2) = (_widened(min(values), max(values)) for values in (xs, ys))
    return Shape(name, box(x1, y1, x2, y2), cut=True)


def bitmap_shape(name: str, part: NDArray[np.bool_], left: int, top: int, size: tuple[int, int] | None) -> Shape:
    """A bitmap that covers a part of the image: the box round its pixels, and its mask.

    Args:
        name: The class.
        part: [height, width] of the part.
        left: The column of the image that the part begins at.
        top: The row.
        size: Width and height of the image.

    Raises:
        ValueError: It shows nothing, reaches out of the image, or the size of the image is not stated.
    """
    if size is None:
        raise ValueError("has a mask, but the file does not state the size of the image")
    width, height = size
    rows, columns = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
    if not rows.size:
        raise ValueError("its mask shows nothing")
    if left < 0 or top < 0 or left + part.shape[1] > width or top + part.shape[0] > height:
        raise ValueError(
            f"its mask of {part.shape[1]}x{part.shape[0]} at {left}, {top} reaches out of the image of {width}x{height}"
        )
    x1, y1, x2, y2 = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    inner = part[y1:y2, x1:x2]
    # Runs go down one column after the other; a row of background below each column ends its last run.
    edges = np.diff(np.pad(inner, ((1, 1), (0, 0))).T.astype(np.int8).ravel())
    stride = inner.shape[0] + 2
    starts, ends = (np.flatnonzero(edges == sign) for sign in (1, -1))
    ends_in_image = _position(ends, stride, int(left + x1), int(top + y1), height)
    starts_in_image = _position(starts, stride, int(left + x1), int(top + y1), height)
    bounds = np.stack([starts_in_image, ends_in_image], axis=1).ravel()
    counts = np.diff(np.concatenate([[0], bounds, [width * height]]))
    round_it = Box(float(left + x1), float(top + y1), float(left + x2), float(top + y2))
    return Shape(name, round_it, rle=Rle(height, width, tuple(counts.tolist())))


def pixels(rle: Rle) -> NDArray[np.bool_]:
    """The mask as an array [height, width]."""
    runs = np.resize(np.array([False, True]), len(rle.counts))
    return np.repeat(runs, rle.counts).reshape(rle.width, rle.height).T


def drawable(width: int, height: int) -> None:
    """Refuses a mask of more pixels than Pillow takes for an image.

    Raises:
        ValueError: It is too large, or has no pixel.
    """
    if width < 1 or height < 1 or width * height > (Image.MAX_IMAGE_PIXELS or 0):
        raise ValueError(f"a mask of {width}x{height} pixels is too large, or empty")


def joined(shapes: Iterable[tuple[str | None, Shape]]) -> list[Shape]:
    """Makes one defect of the shapes that have the same group and class.

    Args:
        shapes: In the order of drawing, each with its group; `None` is not a group.
    """
    groups: dict[object, list[Shape]] = {}
    for place, (group, shape) in enumerate(shapes):
        groups.setdefault(place if group is None else (group, shape.name), []).append(shape)
    return [_one(pieces) for pieces in groups.values()]


def _one(shapes: Sequence[Shape]) -> Shape:
    if len(shapes) == 1:
        return shapes[0]
    boxes = [shape.box for shape in shapes]
    x1, y1 = min(one.x1 for one in boxes), min(one.y1 for one in boxes)
    x2, y2 = max(one.x2 for one in boxes), max(one.y2 for one in boxes)
    cut = any(shape.cut for shape in shapes)
    if not any(shape.polygons or shape.rle for shape in shapes):
        return Shape(shapes[0].name, Box(x1, y1, x2, y2), cut=cut)
    # A piece without an outline is marked as a whole.
    outlines = [
        outline for shape in shapes for outline in (shape.polygons or (() if shape.rle else (_corners(shape.box),)))
    ]
    rles = [shape.rle for shape in shapes if shape.rle]
    return Shape(shapes[0].name, Box(x1, y1, x2, y2), tuple(outlines), _union(rles) if rles else None, cut)


def _union(rles: Sequence[Rle]) -> Rle:
    if len(rles) == 1:
        return rles[0]
    both = np.logical_or.reduce([pixels(rle) for rle in rles])
    union = bitmap_shape("", both, 0, 0, (rles[0].width, rles[0].height)).rle
    assert union  # bitmaps have one
    return union


def _corners(round_it: Box) -> Polygon:
    x1, y1, x2, y2 = round_it
    return polygon([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])


def _position(edges: NDArray[np.int64], stride: int, left: int, top: int, height: int) -> NDArray[np.int64]:
    columns, rows = np.divmod(edges, stride)
    return (left + columns) * height + top + rows


def _turned(cx: float, cy: float, x: float, y: float, radians: float) -> tuple[float, float]:
    cos, sin = math.cos(radians), math.sin(radians)
    return cx + x * cos - y * sin, cy + x * sin + y * cos


def _widened(first: float, last: float) -> tuple[float, float]:
    lacking = max(0.0, 1 - (last - first)) / 2
    return first - lacking, last + lacking
