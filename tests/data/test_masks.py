from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy import ndimage

from adfm.data import masks
from adfm.records import Box

pictures = hnp.arrays(
    np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=14), elements=st.integers(0, 1), fill=st.nothing()
)


def _flood_fill(mask: np.ndarray, connectivity: int, min_area: int) -> list[Box]:
    """The same boxes, found pixel by pixel."""
    steps = [(0, 1), (1, 0), (0, -1), (-1, 0)] + ([(1, 1), (1, -1), (-1, 1), (-1, -1)] if connectivity == 8 else [])
    todo = set(zip(*np.nonzero(mask), strict=True))
    boxes = []
    while todo:
        front = [todo.pop()]
        component = set(front)
        while front:
            y, x = front.pop()
            near = {(y + dy, x + dx) for dy, dx in steps} & todo
            todo -= near
            component |= near
            front += near
        ys, xs = zip(*component, strict=True)
        if len(component) >= min_area:
            boxes.append(Box(min(xs), min(ys), max(xs) + 1, max(ys) + 1))
    return sorted(boxes)


def _dilated(mask: np.ndarray, radius: float) -> np.ndarray:
    """Dilation by its definition, without a border to fall off."""
    room = int(radius)
    grown = np.zeros((mask.shape[0] + 2 * room, mask.shape[1] + 2 * room), bool)
    for y, x in zip(*np.nonzero(mask), strict=True):
        for dy in range(-room, room + 1):
            for dx in range(-room, room + 1):
                if dy * dy + dx * dx <= radius * radius:
                    grown[y + dy + room, x + dx + room] = True
    return grown


@settings(deadline=None)
@given(mask=pictures, connectivity=st.sampled_from([4, 8]), min_area=st.integers(0, 5))
def test_boxes_without_dilation_are_those_of_a_flood_fill(mask: np.ndarray, connectivity: int, min_area: int) -> None:
    assert masks.to_boxes(mask, 0, connectivity, min_area) == _flood_fill(mask, connectivity, min_area)


@settings(deadline=None)
@given(mask=pictures, diameter=st.integers(2, 8), connectivity=st.sampled_from([4, 8]))
def test_dilation_merges_and_does_not_enlarge(mask: np.ndarray, diameter: int, connectivity: int) -> None:
    boxes = masks.to_boxes(mask, diameter / min(mask.shape), connectivity, 0)
    # One box for each component of the dilated mask; each is the union of boxes of the mask itself.
    assert len(boxes) == len(_flood_fill(_dilated(mask, diameter / 2), connectivity, 0))
    fragments = _flood_fill(mask, connectivity, 0)
    for box in boxes:
        inside = [f for f in fragments if f.x1 >= box.x1 and f.y1 >= box.y1 and f.x2 <= box.x2 and f.y2 <= box.y2]
        assert box.x1 == min(f.x1 for f in inside) and box.x2 == max(f.x2 for f in inside)
        assert box.y1 == min(f.y1 for f in inside) and box.y2 == max(f.y2 for f in inside)
    for y, x in zip(*np.nonzero(mask), strict=True):
        assert any(box.x1 <= x < box.x2 and box.y1 <= y < box.y2 for box in boxes)


@settings(deadline=None)
@given(mask=pictures, diameter=st.integers(2, 8), connectivity=st.sampled_from([4, 8]))
def test_dilation_is_that_by_an_elliptic_structuring_element(
    mask: np.ndarray, diameter: int, connectivity: int
) -> None:
    y, x = np.mgrid[-4:5, -4:5]
    room = np.pad(mask, 4)
    dilated = ndimage.binary_dilation(room, x**2 + y**2 <= (diameter / 2) ** 2)
    labels, count = ndimage.label(dilated, np.ones((3, 3)) if connectivity == 8 else None)
    boxes = []
    for number in range(1, count + 1):
        ys, xs = np.nonzero(room * (labels == number))
        boxes.append(Box(xs.min() - 4, ys.min() - 4, xs.max() - 3, ys.max() - 3))
    assert masks.to_boxes(mask, diameter / min(mask.shape), connectivity, 0) == sorted(boxes)


def test_corners_touch_among_eight_neighbours_and_not_among_four() -> None:
    mask = np.eye(2, dtype=np.uint8)
    assert masks.to_boxes(mask, 0, 8, 0) == [Box(0, 0, 2, 2)]
    assert masks.to_boxes(mask, 0, 4, 0) == [Box(0, 0, 1, 1), Box(1, 1, 2, 2)]


def test_fragments_two_apart_merge_at_a_diameter_of_two() -> None:
    mask = np.zeros((100, 200), np.uint8)
    mask[10, 10] = mask[10, 13] = 1
    assert masks.to_boxes(mask, 0.01, 8, 0) == [Box(10, 10, 11, 11), Box(13, 10, 14, 11)]
    assert masks.to_boxes(mask, 0.02, 8, 0) == [Box(10, 10, 14, 11)]


def test_the_smallest_area_counts_the_pixels_of_a_merged_defect() -> None:
    mask = np.zeros((100, 100), np.uint8)
    mask[10, 10:20:2] = 1  # five pixels, apart
    assert masks.to_boxes(mask, 0, 8, 2) == []
    assert masks.to_boxes(mask, 0.02, 8, 5) == [Box(10, 10, 19, 11)]
    assert masks.to_boxes(mask, 0.02, 8, 6) == []


def _save(path: Path, kind: str) -> np.ndarray:
    """Writes a mask as `kind`; returns where its defect is."""
    defect = np.zeros((20, 30), bool)
    defect[5:12, 8:20] = True
    grey = np.where(defect, 255, 0).astype(np.uint8)
    rgb = np.stack([grey, 0 * grey, 0 * grey], axis=2)
    indexed = Image.fromarray(np.where(defect, 0, 1).astype(np.uint8))
    indexed.putpalette([200, 0, 0, 0, 0, 0])  # the background is colour 1
    image = {
        "1.png": Image.fromarray(defect),
        "L.png": Image.fromarray(grey),
        "index.png": Image.fromarray(np.where(defect, 3, 0).astype(np.uint8)),
        "palette.png": indexed,
        "RGB.png": Image.fromarray(rgb),
        "opaque.png": Image.fromarray(np.dstack([rgb, np.full_like(grey, 255)])),
        "transparent.png": Image.fromarray(np.dstack([np.full_like(rgb, 200), grey])),
        "LA.png": Image.fromarray(np.dstack([grey, np.full_like(grey, 255)])),
        "16.png": Image.fromarray(np.where(defect, 700, 0).astype(np.uint16)),
        "16.tif": Image.fromarray(np.where(defect, 1, 0).astype(np.uint16)),
        "32.tif": Image.fromarray(np.where(defect, 70_000, 0).astype(np.int32)),
        "float.tif": Image.fromarray(np.where(defect, 0.5, 0).astype(np.float32)),
        "CMYK.tif": Image.fromarray(rgb).convert("CMYK"),
        "grey.bmp": Image.fromarray(grey),
        "grey.jpg": Image.fromarray(grey),
        "rgb.jpg": Image.fromarray(np.stack([grey] * 3, axis=2)),
    }[kind]
    image.save(path / kind, quality=95)
    return defect


KINDS = (
    "1.png L.png index.png palette.png RGB.png opaque.png transparent.png LA.png 16.png"
    " 16.tif 32.tif float.tif CMYK.tif grey.bmp grey.jpg rgb.jpg"
)


@pytest.mark.parametrize("kind", KINDS.split())
def test_a_mask_of_any_kind(tmp_path: Path, kind: str) -> None:
    defect = _save(tmp_path, kind)
    mask = masks.load_mask(tmp_path / kind)
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) == {0, 255}
    assert (mask > 0).tolist() == defect.tolist()


def test_a_mask_turns_with_its_image_and_states_its_own_orientation_first(tmp_path: Path) -> None:
    grey = np.zeros((4, 6), np.uint8)
    grey[0, 0] = 255
    Image.fromarray(grey).save(tmp_path / "plain.png")
    assert np.argwhere(masks.load_mask(tmp_path / "plain.png", 6)).tolist() == [[0, 3]]
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(grey).save(tmp_path / "turned.png", exif=exif)
    assert np.argwhere(masks.load_mask(tmp_path / "turned.png", 6)).tolist() == [[3, 5]]
