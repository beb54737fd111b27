import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adfm.data.readers.annotations import Shape
from adfm.data.readers.shapes import bitmap, ellipse, group, line, pixels, turned_box
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
    shape = bitmap("dent", part, left, top, size)
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
        bitmap("dent", part, left, 0, size)


_number = st.floats(1, 500)


@given(_number, _number, _number, _number, st.floats(-720, 720), st.booleans())
@settings(deadline=None)
def test_a_turned_box_against_complex_numbers(
    x: float, y: float, width: float, height: float, degrees: float, about_center: bool
) -> None:
    pivot = (x + width / 2, y + height / 2) if about_center else (x, y)
    corners = complex(x, y) + np.array([0, width, width + 1j * height, 1j * height])
    corners = complex(*pivot) + (corners - complex(*pivot)) * np.exp(1j * np.deg2rad(degrees))
    expected = (corners.real.min(), corners.imag.min(), corners.real.max(), corners.imag.max())
    if expected[2] <= 1e-6 or expected[3] <= 1e-6:
        return  # outside of the image
    before = Box(x, y, x + width, y + height)
    shape = turned_box("dent", before, degrees, None if about_center else pivot)
    assert shape.box == pytest.approx(expected)
    assert shape.cut
    assert [complex(*corner) for corner in shape.polygons[0]] == pytest.approx(corners.tolist())


@given(_number, _number, st.floats(-7, 7))
@settings(deadline=None)
def test_the_outline_of_an_ellipse_lies_on_it_and_fills_its_box(across: float, down: float, turn: float) -> None:
    shape = ellipse("dent", (1000, 1000), (across, down), math.degrees(turn))
    points = (np.array([complex(*corner) for corner in shape.polygons[0]]) - (1000 + 1000j)) * np.exp(-1j * turn)
    np.testing.assert_allclose((points.real / across) ** 2 + (points.imag / down) ** 2, 1, atol=1e-6)
    outline = np.array(shape.polygons[0])
    slack = 0.01 * max(across, down)
    np.testing.assert_allclose([*outline.min(axis=0), *outline.max(axis=0)], shape.box, atol=slack)


@given(st.floats(1, 50), st.floats(1, 50), st.floats(0, 7))
def test_ellipses_are_enclosed(rx: float, ry: float, angle: float) -> None:
    shape = ellipse("dent", (100, 90), (rx, ry), math.degrees(angle))
    turns = np.linspace(0, 2 * np.pi, 5000)
    xs = 100 + rx * np.cos(turns) * np.cos(angle) - ry * np.sin(turns) * np.sin(angle)
    ys = 90 + rx * np.cos(turns) * np.sin(angle) + ry * np.sin(turns) * np.cos(angle)
    assert shape.box == pytest.approx((xs.min(), ys.min(), xs.max(), ys.max()), abs=1e-3)
    outline = np.array(shape.polygons[0])
    assert (outline.min(0) >= np.array(shape.box[:2]) - 1e-6).all()
    assert (outline.max(0) <= np.array(shape.box[2:]) + 1e-6).all()


def test_lines() -> None:
    assert line("dent", [(3, 5), (9, 5)]).box == (3, 4.5, 9, 5.5)
    assert line("dent", [(3, 5), (3, 5)]).box == (2.5, 4.5, 3.5, 5.5)
    assert line("dent", [(3, 5), (9, 8), (4, 1)]) == Shape("dent", Box(3, 1, 9, 8), cut=True)
    assert line("dent", [(0, 5), (0, 9)]).box == (0, 5, 1, 9)
    assert line("dent", [(9, 5), (9, 7)], (9, 7)).box == (8, 5, 9, 7)


@pytest.mark.parametrize("values", [(1, 1, 0, 5, 0), (1, 1, 5, -5, 0), (math.nan, 1, 5, 5, 0), (1, 1, 5, 5, math.inf)])
def test_shapes_without_area_or_numbers(values: tuple[float, float, float, float, float]) -> None:
    x, y, width, height, angle = values
    with pytest.raises(ValueError, match="no area|not finite"):
        turned_box("dent", Box(x, y, x + width, y + height), angle)
    with pytest.raises(ValueError, match="has no area"):
        ellipse("dent", (x, y), (width, height), angle)


def test_groups() -> None:
    triangle = ((0.0, 0.0), (4.0, 0.0), (4.0, 4.0))
    outlined = Shape("dent", Box(0, 0, 4, 4), (triangle,))
    plain = Shape("dent", Box(6, 6, 9, 8))
    bitmaps = [bitmap("dent", np.ones((2, 2), bool), left, 0, (12, 12)) for left in (0, 8)]
    other = Shape("scratch", Box(1, 1, 2, 2))
    assert group([("1", plain), (None, plain), ("1", other), (None, plain)]) == [plain, plain, other, plain]
    (one,) = group([("1", outlined), ("1", plain)])
    assert one == Shape("dent", Box(0, 0, 9, 8), (triangle, ((6, 6), (9, 6), (9, 8), (6, 8))))
    assert group([("1", plain), ("1", Shape("dent", Box(1, 1, 2, 2), cut=True))]) == [
        Shape("dent", Box(1, 1, 9, 8), cut=True)
    ]
    (one,) = group([("1", bitmaps[0]), ("1", bitmaps[1])])
    assert one.box == (0, 0, 10, 2) and one.rle
    assert np.argwhere(pixels(one.rle).any(axis=0)).ravel().tolist() == [0, 1, 8, 9]
