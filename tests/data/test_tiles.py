"""Tiling: the grid, what a tile shows, boxes there and back, and boxes that a seam cuts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adfm.data import tiles
from adfm.data.tiles import Defect
from adfm.records import Box

SIDES = st.integers(1, 400)
SIZES = st.integers(32, 120)
OVERLAPS = st.floats(0.01, 0.5)


@st.composite
def images(draw: st.DrawFn) -> tuple[int, int, list[Box]]:
    """An image with its tiles."""
    width, height = draw(SIDES), draw(SIDES)
    return width, height, tiles.grid(width, height, draw(SIZES), draw(OVERLAPS))


def boxes_in(width: int, height: int, most: int = 400) -> st.SearchStrategy[Box]:
    """Boxes of whole pixels with an area, whose sides have at most so many pixels."""

    def side(length: int) -> st.SearchStrategy[tuple[int, int]]:
        return st.integers(0, length - 1).flatmap(
            lambda start: st.tuples(st.just(start), st.integers(start + 1, min(length, start + most)))
        )

    return st.builds(lambda x, y: Box(x[0], y[0], x[1], y[1]), side(width), side(height))


def apart(boxes: list[Box]) -> list[Box]:
    """Those that overlap none before them."""
    kept: list[Box] = []
    for box in boxes:
        if not any(box.intersection(other) for other in kept):
            kept.append(box)
    return kept


def answered(boxes: list[Box], grid: list[Box]) -> list[list[Box]]:
    """What a perfect model answers to each tile: all that it shows of the boxes, in pixels of the tile."""
    return [
        [
            tiles.to_tile(Box(*np.clip(box, [*tile[:2]] * 2, [*tile[2:]] * 2).tolist()), tile)
            for box in boxes
            if box.intersection(tile)
        ]
        for tile in grid
    ]


# ------------------------------------------------------------------------------------------------- the grid


@given(SIDES, SIDES, SIZES, OVERLAPS)
def test_tiles_cover_every_pixel_and_lie_inside_with_one_size(
    width: int, height: int, size: int, overlap: float
) -> None:
    grid = tiles.grid(width, height, size, overlap)
    covered = np.zeros((height, width), bool)
    for x1, y1, x2, y2 in grid:
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
        assert (x2 - x1, y2 - y1) == (min(size, width), min(size, height))
        assert all(isinstance(side, int) for side in (x1, y1, x2, y2))
        covered[y1:y2, x1:x2] = True
    assert covered.all() and len(set(grid)) == len(grid)
    least = math.prod(math.ceil(max(1, side - size) / (size - 1)) for side in (width, height))
    assert least <= len(grid)


@given(st.data(), images())
def test_a_box_that_is_not_larger_than_the_overlap_lies_wholly_in_a_tile(
    data: st.DataObject, image: tuple[int, int, list[Box]]
) -> None:
    width, height, _ = image
    size, overlap = data.draw(SIZES), data.draw(OVERLAPS)
    box = data.draw(boxes_in(width, height, tiles.shared(size, overlap)))
    assert any(box.intersection(tile) == box.area for tile in tiles.grid(width, height, size, overlap))


def test_no_more_tiles_than_needed() -> None:
    assert tiles.grid(640, 640, 640, 0.2) == [Box(0, 0, 640, 640)] == tiles.grid(640, 640, 1000, 0.2)
    assert tiles.grid(640, 300, 360, 0.2) == [Box(0, 0, 360, 300), Box(280, 0, 640, 300)]
    assert len(tiles.grid(4000, 4000, 400, 0.2)) == 169
    assert {tile.x1 for tile in tiles.grid(1000, 10, 400, 0.2)} == {0, 300, 600}  # spread evenly


# ------------------------------------------------------------------------------------------------- truth


@given(st.data(), images())
def test_every_defect_counts_in_a_tile_and_its_box_maps_back_exactly(
    data: st.DataObject, image: tuple[int, int, list[Box]]
) -> None:
    width, height, grid = image
    box = data.draw(boxes_in(width, height))
    counted = 0
    for tile in grid:
        truth = tiles.truth("anomalous", [box], tile)
        if not box.intersection(tile):
            assert truth == ("normal", [])
        elif truth:
            assert truth[0] == "anomalous"
            (inside,) = (tiles.to_image(part, tile) for part in truth[1])
            assert inside.area == box.intersection(tile) == box.intersection(inside)
            counted += 1
    assert counted


@given(st.data(), images())
def test_coordinates_there_and_back_are_exact(data: st.DataObject, image: tuple[int, int, list[Box]]) -> None:
    width, height, grid = image
    box, tile = data.draw(boxes_in(width, height)), data.draw(st.sampled_from(grid))
    back = tiles.to_image(tiles.to_tile(box, tile), tile)
    assert back == box and all(isinstance(side, int) for side in back)


def test_a_tile_with_a_rest_of_a_defect_is_neither_normal_nor_anomalous() -> None:
    tile = Box(100, 0, 200, 100)
    rest, whole, none = Box(80, 10, 104, 20), Box(150, 50, 160, 60), Box(10, 10, 20, 20)
    assert tiles.truth("anomalous", [rest], tile) is None
    assert tiles.truth("anomalous", [rest, whole], tile) == ("anomalous", [Box(50, 50, 60, 60)])
    assert tiles.truth("anomalous", [none], tile) == ("normal", []) == tiles.truth("normal", [], tile)
    # Of a scratch ten tiles long a tile can hold a tenth, and one that holds a quarter of that counts.
    for start, counts in ((174, True), (176, False)):
        scratch = Box(start, 40, start + 1000, 50)
        assert bool(tiles.truth("anomalous", [scratch], tile)) is counts


# ------------------------------------------------------------------------------------------------- joining


@given(st.data(), images())
def test_defects_of_any_size_come_back_each_once_and_exactly(
    data: st.DataObject, image: tuple[int, int, list[Box]]
) -> None:
    width, height, grid = image
    boxes = apart(data.draw(st.lists(boxes_in(width, height, data.draw(st.sampled_from([8, 60, 400]))), max_size=6)))
    joined = tiles.merged(answered(boxes, grid), grid)
    assert joined == sorted(boxes) and all(isinstance(side, int) for box in joined for side in box)


@given(st.data(), SIDES, SIDES, SIZES, st.floats(0.1, 0.5))
def test_defects_smaller_than_the_overlap_come_back_from_tiles_that_leave_out_rests(
    data: st.DataObject, width: int, height: int, size: int, overlap: float
) -> None:
    grid = tiles.grid(width, height, size, overlap)
    boxes = apart(data.draw(st.lists(boxes_in(width, height, tiles.shared(size, overlap)), max_size=6)))
    truths = [tiles.truth("anomalous", boxes, tile) for tile in grid]
    assert tiles.merged([truth[1] if truth else [] for truth in truths], grid) == sorted(boxes)


@given(st.data(), images())
def test_the_order_of_tiles_and_boxes_does_not_matter(data: st.DataObject, image: tuple[int, int, list[Box]]) -> None:
    width, height, grid = image
    own = st.lists(boxes_in(min(120, width), min(120, height)), max_size=3)  # some of them reach out of their tile
    boxes = [data.draw(own) for _ in grid[:12]]
    grid = grid[:12]
    order = data.draw(st.permutations(range(len(grid))))
    shuffled = [data.draw(st.permutations(boxes[i])) for i in order]
    joined = tiles.merged(boxes, grid)
    assert tiles.merged(shuffled, [grid[i] for i in order]) == joined
    assert all(0 <= box.x1 < box.x2 <= width and 0 <= box.y1 < box.y2 <= height for box in joined)
    assert len(joined) <= sum(map(len, boxes))


def test_doubles_that_differ_a_little_are_one_and_neighbours_stay_two() -> None:
    left, right = Box(0, 0, 100, 100), Box(80, 0, 180, 100)

    def merged(one: Box, other: Box) -> list[Box]:
        return tiles.merged([[tiles.to_tile(one, left)], [tiles.to_tile(other, right)]], [left, right])

    assert merged(Box(82, 10, 94, 22), Box(84, 12, 96, 24)) == [Box(82, 10, 96, 24)]
    # A scratch across both tiles, drawn by each up to its border.
    assert merged(Box(20, 40, 100, 50), Box(80, 42, 170, 52)) == [Box(20, 40, 170, 52)]
    for two in ((Box(60, 10, 81, 30), Box(80, 10, 98, 30)), (Box(85, 10, 90, 20), Box(92, 10, 98, 20))):
        assert merged(*two) == sorted(two)
    # Two of one tile are two.
    assert len(tiles.merged([[Box(0, 0, 10, 10), Box(1, 1, 11, 11)], []], [left, right])) == 2


# ------------------------------------------------------------------------------------------------- the proposal


def test_a_tile_size_makes_small_defects_visible() -> None:
    small = [Defect(20, 18, 640, 640)] * 3 + [Defect(60, 50, 640, 640)] * 5
    assert tiles.seen(small, 320 * 320, None) == 9
    assert tiles.propose(small, 320 * 320, None, 0.2)[:2] == (360, 4)
    assert tiles.seen(small, 320 * 320, 360) == 16
    assert tiles.propose(small, 320 * 320, 360, 0.2) is None  # it is in use
    assert tiles.propose([Defect(40, 40, 640, 640)] * 8, 320 * 320, None, 0.2) is None  # large enough
    assert tiles.propose([Defect(6, 6, 300, 300)] * 8, 320 * 320, None, 0.2) is None  # all of the image is seen
    # Not smaller than what the model sees, nor than most defects.
    assert tiles.propose([Defect(6, 6, 4000, 3000)] * 8, 320 * 320, None, 0.2)[:2] == (320, 192)
    assert tiles.propose([Defect(6, 900, 4000, 3000)] * 8, 320 * 320, None, 0.2)[:2] == (900, 24)


@given(
    st.lists(st.builds(Defect, *[st.floats(1, 500)] * 2, *[st.integers(500, 5000)] * 2), min_size=1),
    st.integers(100, 1000),
    st.none() | st.integers(32, 5000),
)
def test_a_proposal_is_an_improvement(defects: list[Defect], side: int, size: int | None) -> None:
    proposal = tiles.propose(defects, side * side, size, 0.2)
    now = tiles.seen(defects, side * side, size)
    if proposal:
        new, count = proposal[:2]
        assert now < tiles.LEAST_SIDE and new < (size or 5000) and count >= 1
        assert tiles.seen(defects, side * side, new) >= 1.25 * now
    if now >= tiles.LEAST_SIDE:
        assert proposal is None


def test_shared_pixels() -> None:
    assert [tiles.shared(*case) for case in ((400, 0.2), (32, 0.01), (33, 0.5))] == [80, 1, pytest.approx(16)]
