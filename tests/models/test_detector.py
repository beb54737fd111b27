"""The detector's head, its boxes, and its folder."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from adfm.models import detector
from adfm.records import Box
from adfm.tiny import efficientnet

HALF = detector.Rule(0.5, 0.0, 10)
SIDES = st.integers(1, 4000)


@settings(deadline=None)
@given(width=SIDES, height=SIDES)
def test_a_picture_has_whole_cells_of_every_stride(width: int, height: int) -> None:
    across, down = detector.picture_size(width, height)
    assert across % 32 == down % 32 == 0 and min(across, down) >= 64
    if max(width, height) <= 5 * min(width, height):
        assert 0.7 < across * down / detector.SIDE**2 < 1.4
        assert 0.7 < across / down * height / width < 1.4


@settings(deadline=None)
@given(st.data())
def test_a_box_is_exactly_its_cells_in_pixels_of_the_image(data: st.DataObject) -> None:
    """Of a map that is 1 in a rectangle of cells and 0 elsewhere, whatever the shapes of map and image."""
    rows, columns = data.draw(st.integers(2, 40)), data.draw(st.integers(2, 40))
    width, height = data.draw(SIDES), data.draw(SIDES)
    left, right = sorted(data.draw(st.lists(st.integers(0, columns), min_size=2, max_size=2, unique=True)))
    top, bottom = sorted(data.draw(st.lists(st.integers(0, rows), min_size=2, max_size=2, unique=True)))
    cells = torch.zeros(rows, columns)
    cells[top:bottom, left:right] = 1
    [box] = detector.regions(detector.refined(cells), (width, height), HALF)
    cell = width / columns, height / rows
    assert box == pytest.approx((left * cell[0], top * cell[1], right * cell[0], bottom * cell[1]))


@settings(deadline=None)
@given(st.data())
def test_boxes_lie_in_the_image_and_there_is_always_one(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(2, 20)), data.draw(st.integers(2, 20))
    seed = data.draw(st.integers(0, 1000))
    cells = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) ** 4
    width, height = data.draw(SIDES), data.draw(SIDES)
    rule = detector.Rule(data.draw(st.floats(0, 1)), data.draw(st.floats(0, 1)), data.draw(st.integers(1, 5)))
    boxes = detector.regions(detector.refined(cells), (width, height), rule)
    assert 1 <= len(boxes) <= rule.most
    for box in boxes:
        assert 0 <= box.x1 < box.x2 <= width and 0 <= box.y1 < box.y2 <= height


def test_regions_come_with_the_highest_first_and_no_more_than_the_rule_keeps() -> None:
    cells = torch.zeros(10, 20)
    cells[1, 1], cells[1, 10], cells[7, 15] = 0.6, 0.9, 0.8
    size = 200, 100
    high = [Box(100, 10, 110, 20), Box(150, 70, 160, 80), Box(10, 10, 20, 20)]
    three = detector.regions(detector.refined(cells), size, detector.Rule(0.3, 0.0, 10))
    assert three == high
    assert detector.regions(detector.refined(cells), size, detector.Rule(0.3, 0.0, 2)) == high[:2]
    assert detector.regions(detector.refined(cells), size, detector.Rule(0.0, 0.95, 10)) == high[:1]


def test_the_head_answers_a_picture_alone_as_in_a_batch() -> None:
    torch.manual_seed(0)
    head = detector.Head(3).eval()
    compute = efficientnet.Features(tuple(efficientnet.CHANNELS))
    pictures = [detector.picture(Image.effect_noise((100, 60), 40 + 20 * i)) for i in range(3)]
    maps = detector.features(compute, pictures)
    assert {stride: one.shape[1] for stride, one in maps[0].items()} == {4: 32, 8: 32, 16: 16, 32: 8}
    with torch.inference_mode():
        together = head({stride: torch.stack([one[stride] for one in maps]) for stride in maps[0]})
        alone = [head({stride: each[None] for stride, each in one.items()}) for one in maps]
    assert together.cells.shape == (3, 32, 52) and together.kinds.shape == (3, 3)
    for name in detector.Outputs._fields:
        joined = torch.cat([getattr(one, name) for one in alone])
        assert torch.allclose(getattr(together, name), joined, atol=1e-4)
    assert sum(weight.numel() for weight in head.parameters()) == pytest.approx(66_000, rel=0.05)
