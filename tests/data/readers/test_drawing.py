import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adfm.data.readers.annotations import Shape
from adfm.data.readers.drawing import bitmap_shape, ellipse_shape, joined, line_shape, pixels, turned, turned_shape
from adfm.records import Box

_side = st.integers(1, 12)


@st.composite
def _parts(draw: st.DrawFn) -> tuple[np.ndarray, int, int, tuple[int, int]]:
    """A part of an image with something on it, its corner, and the size of the image."""
    height, width = draw(_side), draw(_side)
    bits = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    part = np.array(bits).reshape(height, width)
    part[draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))] = True
    left, top = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    return part, left, top, (left + width + draw(st.integers(0, 5)), top + height + draw(st.integers(0, 5)))


@given(_parts())
@settings(deadline=None)
def test_bitmaps(drawn: tuple[np.ndarray, int, int, tuple[int, int]]) -> None:
    part, left, top, size = drawn
    shape = bitmap_shape("dent", part, left, top, size)
    expected = np.zeros((size[1], size[0]), bool)
    expected[top : top + part.shape[0], left : left + part.shape[1]] = part
    assert shape.rle and sum(shape.rle.counts) == size[0] * size[1]
    assert (pixels(shape.rle) == expected).all()
    rows, columns = np.nonzero(expected)
    assert shape.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


@pytest.mark.parametrize(
    ("part", "left", "size", "error"),
    [
        (np.zeros((2, 2), bool), 0, (9, 9), "its mask shows nothing"),
        (np.ones((2, 2), bool), -1, (9, 9), "its mask of 2x2 at -1, 0 reaches out of the image of 9x9"),
        (np.ones((2, 2), bool), 8, (9, 9), "its mask of 2x2 at 8, 0 reaches out of the image of 9x9"),
        (np.ones((2, 2), bool), 0, None, "does not state the size of the image"),
    ],
)
def test_bitmaps_that_are_refused(part: np.ndarray, left: int, size: tuple[int, int] | None, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        bitmap_shape("dent", part, left, 0, size)


_number = st.floats(1, 500)


@given(st.floats(100, 500), st.floats(100, 500), _number, _number, st.floats(-10, 10))
def test_turned_corners_are_as_far_from_the_centre(
    cx: float, cy: float, width: float, height: float, angle: float
) -> None:
    corners = np.array(turned(cx, cy, width, height, angle))
    assert np.hypot(*(corners - (cx, cy)).T) == pytest.approx(np.full(4, math.hypot(width, height) / 2))
    back = (corners - (cx, cy)) @ np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    assert back[0] == pytest.approx((-width / 2, -height / 2), abs=1e-6)


@given(st.floats(1, 50), st.floats(1, 50), st.floats(0, 7))
def test_ellipses_are_enclosed(rx: float, ry: float, angle: float) -> None:
    shape = ellipse_shape("dent", 100, 90, rx, ry, angle)
    turns = np.linspace(0, 2 * np.pi, 5000)
    xs = 100 + rx * np.cos(turns) * np.cos(angle) - ry * np.sin(turns) * np.sin(angle)
    ys = 90 + rx * np.cos(turns) * np.sin(angle) + ry * np.sin(turns) * np.cos(angle)
    assert shape.box == pytest.approx((xs.min(), ys.min(), xs.max(), ys.max()), abs=1e-3)
    outline = np.array(shape.polygons[0])
    assert (outline.min(0) >= np.array(shape.box[:2]) - 1e-6).all()
    assert (outline.max(0) <= np.array(shape.box[2:]) + 1e-6).all()


def test_lines() -> None:
    assert line_shape("dent", [(3, 5), (9, 5)]).box == (3, 4.5, 9, 5.5)
    assert line_shape("dent", [(3, 5), (3, 5)]).box == (2.5, 4.5, 3.5, 5.5)
    assert line_shape("dent", [(3, 5), (9, 8), (4, 1)]) == Shape("dent", Box(3, 1, 9, 8), cut=True)
    with pytest.raises(ValueError, match="a line needs 2 points, and has 1"):
        line_shape("dent", [(3, 5)])


@pytest.mark.parametrize("values", [(1, 1, 0, 5, 0), (1, 1, 5, -5, 0), (math.nan, 1, 5, 5, 0), (1, 1, 5, 5, math.inf)])
def test_shapes_without_area_or_numbers(values: tuple[float, float, float, float, float]) -> None:
    with pytest.raises(ValueError, match="no area|not finite"):
        turned_shape("dent", *values)
    with pytest.raises(ValueError, match="has no area"):
        ellipse_shape("dent", *values)


def test_groups() -> None:
    triangle = ((0.0, 0.0), (4.0, 0.0), (4.0, 4.0))
    outlined = Shape("dent", Box(0, 0, 4, 4), (triangle,))
    plain = Shape("dent", Box(6, 6, 9, 8))
    bitmaps = [bitmap_shape("dent", np.ones((2, 2), bool), left, 0, (12, 12)) for left in (0, 8)]
    other = Shape("scratch", Box(1, 1, 2, 2))
    assert joined([("1", plain), (None, plain), ("1", other), (None, plain)]) == [plain, plain, other, plain]
    (one,) = joined([("1", outlined), ("1", plain)])
    assert one == Shape("dent", Box(0, 0, 9, 8), (triangle, ((6, 6), (9, 6), (9, 8), (6, 8))))
    assert joined([("1", plain), ("1", Shape("dent", Box(1, 1, 2, 2), cut=True))]) == [
        Shape("dent", Box(1, 1, 9, 8), cut=True)
    ]
    (one,) = joined([("1", bitmaps[0]), ("1", bitmaps[1])])
    assert one.box == (0, 0, 10, 2) and one.rle
    assert np.argwhere(pixels(one.rle).any(axis=0)).ravel().tolist() == [0, 1, 8, 9]
