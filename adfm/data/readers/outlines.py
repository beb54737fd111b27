"""Shapes that tools draw other than as polygons: turned rectangles and ellipses, with the box round them."""

from __future__ import annotations

import math

from adfm.data.readers.annotations import Shape, box, enclosing
from adfm.records import Box

Point = tuple[float, float]

_CORNERS = 64  # of the polygon that stands for an ellipse


def turned_rectangle(name: str, before: Box, degrees: float, pivot: Point | None = None) -> Shape:
    """A rectangle that is turned clockwise; the box round it is cut off at the edge of the image.

    Args:
        name: Its class.
        before: The rectangle before the turn.
        degrees: How far it is turned.
        pivot: The point that it is turned about; its center if `None`.

    Raises:
        ValueError: It has no area.
    """
    box(*before)  # refuses what has no area
    turn = math.radians(degrees)
    cos, sin = math.cos(turn), math.sin(turn)
    x0, y0 = pivot or ((before.x1 + before.x2) / 2, (before.y1 + before.y2) / 2)
    corners = [(before.x1, before.y1), (before.x2, before.y1), (before.x2, before.y2), (before.x1, before.y2)]
    outline = tuple((x0 + (x - x0) * cos - (y - y0) * sin, y0 + (x - x0) * sin + (y - y0) * cos) for x, y in corners)
    return Shape(name, enclosing(outline), (outline,), cut=True)


def ellipse(name: str, center: Point, radii: Point, turn: float = 0) -> Shape:
    """An ellipse; the box round it is cut off at the edge of the image.

    Args:
        name: Its class.
        center: Its center.
        radii: Half of its axes.
        turn: How far it is turned clockwise about its center, in radians.

    Raises:
        ValueError: It has no area.
    """
    (x, y), (across, down) = center, radii
    if across <= 0 or down <= 0:
        raise ValueError(f"an ellipse with the radii {across:g} and {down:g} has no area")
    cos, sin = math.cos(turn), math.sin(turn)
    outline = []
    for corner in range(_CORNERS):
        angle = 2 * math.pi * corner / _CORNERS
        u, v = across * math.cos(angle), down * math.sin(angle)
        outline.append((x + u * cos - v * sin, y + u * sin + v * cos))
    width, height = math.hypot(across * cos, down * sin), math.hypot(across * sin, down * cos)
    return Shape(name, box(x - width, y - height, x + width, y + height), (tuple(outline),), cut=True)
