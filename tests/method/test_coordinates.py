import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adfm.method.coordinates import Frame
from adfm.records import Box

SIDES = st.integers(1, 10_000)
NUMBERS = st.floats(-1e5, 1e5).filter(lambda number: number == 0 or abs(number) > 1e-3)


@given(st.builds(Box, NUMBERS, NUMBERS, NUMBERS, NUMBERS), SIDES, SIDES, SIDES, SIDES)
@settings(deadline=None)
def test_round_trip(box, frame_width, frame_height, width, height):
    frame = Frame(frame_width, frame_height)
    assert frame.to_pixels(frame.from_pixels(box, width, height), width, height) == pytest.approx(box, rel=1e-6)
    assert frame.from_pixels(frame.to_pixels(box, width, height), width, height) == pytest.approx(box, rel=1e-6)


@given(SIDES, SIDES)
@settings(deadline=None)
def test_the_whole_frame_is_the_whole_image(width, height):
    assert Frame(1000, 1000).to_pixels(Box(0, 0, 1000, 1000), width, height) == pytest.approx((0, 0, width, height))


def test_axes_are_not_mixed_up():
    frame = Frame(1000, 500)
    assert frame.to_pixels(Box(100, 50, 200, 250), 2000, 2000) == Box(200, 200, 400, 1000)
    assert frame.from_pixels(Box(200, 200, 400, 1000), 2000, 2000) == Box(100, 50, 200, 250)
