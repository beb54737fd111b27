import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adfm.data.readers.outlines import ellipse, turned_rectangle
from adfm.records import Box

_SIDE = st.floats(1, 500)


@given(_SIDE, _SIDE, _SIDE, _SIDE, st.floats(-720, 720), st.booleans())
@settings(deadline=None)
def test_a_turned_rectangle_against_complex_numbers(
    x: float, y: float, width: float, height: float, degrees: float, about_center: bool
) -> None:
    pivot = (x + width / 2, y + height / 2) if about_center else (x, y)
    corners = complex(x, y) + np.array([0, width, width + 1j * height, 1j * height])
    corners = complex(*pivot) + (corners - complex(*pivot)) * np.exp(1j * np.deg2rad(degrees))
    expected = (corners.real.min(), corners.imag.min(), corners.real.max(), corners.imag.max())
    if expected[2] <= 1e-6 or expected[3] <= 1e-6:
        return  # outside of the image
    before = Box(x, y, x + width, y + height)
    shape = turned_rectangle("dent", before, degrees, None if about_center else pivot)
    assert shape.box == pytest.approx(expected)
    assert shape.cut
    assert [complex(*corner) for corner in shape.polygons[0]] == pytest.approx(corners.tolist())


@given(_SIDE, _SIDE, st.floats(-7, 7))
@settings(deadline=None)
def test_the_outline_of_an_ellipse_lies_on_it_and_fills_its_box(across: float, down: float, turn: float) -> None:
    shape = ellipse("dent", (1000, 1000), (across, down), turn)
    points = (np.array([complex(*corner) for corner in shape.polygons[0]]) - (1000 + 1000j)) * np.exp(-1j * turn)
    np.testing.assert_allclose((points.real / across) ** 2 + (points.imag / down) ** 2, 1, atol=1e-6)
    outline = np.array(shape.polygons[0])
    slack = 0.01 * max(across, down)
    np.testing.assert_allclose([*outline.min(axis=0), *outline.max(axis=0)], shape.box, atol=slack)


def test_what_has_no_area() -> None:
    with pytest.raises(ValueError, match="has no area"):
        turned_rectangle("dent", Box(5, 5, 5, 9), 45)
    with pytest.raises(ValueError, match="the radii 0 and 3 has no area"):
        ellipse("dent", (5, 5), (0, 3))
