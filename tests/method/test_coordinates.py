from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adfm.errors import AdfmError
from adfm.method.coordinates import Frame, frame_of
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


@given(st.integers(20, 300), st.integers(20, 300), st.sampled_from([(14, 2), (16, 2), (8, 1)]), st.integers(1, 6))
@settings(deadline=None, max_examples=30)
def test_qwen2_5_frame_is_the_image_that_its_processor_makes(width, height, patch, limit):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    patch_size, merge_size = patch
    smallest, largest = 32 * 32 * limit, 64 * 64 * limit
    images = Qwen2VLImageProcessorPil(
        patch_size=patch_size, merge_size=merge_size, size={"shortest_edge": smallest, "longest_edge": largest}
    )
    made = images(np.zeros((height, width, 3), np.uint8), return_tensors="np", input_data_format="channels_last")
    _, rows, columns = made["image_grid_thw"][0]
    frame = frame_of("qwen2_5_vl", SimpleNamespace(image_processor=images), width, height)
    assert frame == Frame(columns * patch_size, rows * patch_size)


def test_published_frame():
    images = SimpleNamespace(patch_size=14, merge_size=2, size={"shortest_edge": 3136, "longest_edge": 262144})
    assert frame_of("qwen2_5_vl", SimpleNamespace(image_processor=images), 1024, 1024) == Frame(504, 504)


def test_qwen3_frame_does_not_depend_on_the_image():
    assert frame_of("qwen3_vl", None, 37, 4000) == Frame(1000, 1000)


def test_an_unknown_family_and_a_sliver_are_named():
    with pytest.raises(AdfmError, match="llava.*qwen3_vl"):
        frame_of("llava", None, 10, 10)
    images = SimpleNamespace(patch_size=14, merge_size=2, size={"shortest_edge": 3136, "longest_edge": 262144})
    with pytest.raises(AdfmError, match="4x4000"):
        frame_of("qwen2_5_vl", SimpleNamespace(image_processor=images), 4, 4000)
