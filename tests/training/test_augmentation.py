from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from adfm.records import Box
from adfm.training.augmentation import VIEWS, view, view_of_box

SIDES = st.integers(4, 40)


@given(SIDES, SIDES, st.data(), st.integers(0, VIEWS - 1), st.integers(0, 100))
def test_boxes_move_with_the_picture(width: int, height: int, data: st.DataObject, number: int, seed: int) -> None:
    x, y = data.draw(st.integers(0, width - 2)), data.draw(st.integers(0, height - 2))
    box = Box(x, y, data.draw(st.integers(x + 1, width)), data.draw(st.integers(y + 1, height)))
    pixels = np.full((height, width, 3), 60, np.uint8)
    pixels[y : int(box.y2), x : int(box.x2)] = 190
    seen = np.asarray(view(Image.fromarray(pixels), number, [seed]))[..., 0].astype(int)
    where = view_of_box(box, number, width, height)
    inside = np.zeros((height, width), bool)
    inside[int(where.y1) : int(where.y2), int(where.x1) : int(where.x2)] = True
    if not inside.all():
        assert seen[inside].min() > seen[~inside].max()


@given(SIDES, SIDES, st.integers(0, VIEWS - 1))
def test_a_box_seen_twice_in_a_mirror_is_where_it_was(width: int, height: int, number: int) -> None:
    box = Box(1, 2, 3, 4)
    assert view_of_box(view_of_box(box, number, width, height), number, width, height) == box


def test_the_first_view_is_the_picture_and_each_view_is_always_the_same() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))
    assert view(image, 0, [0]) is image
    views = [np.asarray(view(image, number, [0])) for number in range(VIEWS)]
    assert len({each.tobytes() for each in views}) == VIEWS
    assert all(np.array_equal(each, view(image, number, [0])) for number, each in enumerate(views))


@pytest.mark.parametrize("seed", range(20))
def test_a_view_keeps_the_contrast_of_a_defect(seed: int) -> None:
    pixels = np.full((16, 16, 3), 120, np.uint8)
    pixels[4:8, 4:8] = 150
    for number in range(1, VIEWS):
        values = np.unique(np.asarray(view(Image.fromarray(pixels), number, [seed])))
        assert len(values) == 2 and 20 <= int(values[1]) - int(values[0]) <= 40
