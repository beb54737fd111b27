import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageFilter
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


# ------------------------------------------------------------------------------------------------- soft edges, numbers

shapes = st.lists(
    st.tuples(st.integers(6, 80), st.integers(6, 60), st.integers(6, 30), st.integers(6, 30)), min_size=1, max_size=3
)


def _drawn(rectangles: list[tuple[int, int, int, int]]) -> np.ndarray:
    mask = np.zeros((96, 128), np.uint8)
    for x, y, width, height in rectangles:
        mask[y : y + height, x : x + width] = 255
    return mask


def _jpeg(mask: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


SOFT = {
    "blurred": lambda mask: np.asarray(Image.fromarray(mask).filter(ImageFilter.GaussianBlur(1))),
    "blurred more": lambda mask: np.asarray(Image.fromarray(mask).filter(ImageFilter.GaussianBlur(2))),
    "JPEG 95": lambda mask: _jpeg(mask, 95),
    "JPEG 75": lambda mask: _jpeg(mask, 75),
    "JPEG 50": lambda mask: _jpeg(mask, 50),
    "antialiased": lambda mask: np.asarray(
        Image.fromarray(mask).resize((256, 192), Image.Resampling.NEAREST).resize((128, 96), Image.Resampling.BOX)
    ),
    "faint": lambda mask: np.asarray(Image.fromarray(mask).filter(ImageFilter.GaussianBlur(1))) // 3,
    "16 bits": lambda mask: (
        np.asarray(Image.fromarray(mask).filter(ImageFilter.GaussianBlur(1))).astype(np.uint16) * 257
    ),
    "floating point": lambda mask: (
        np.asarray(Image.fromarray(mask).filter(ImageFilter.GaussianBlur(1))) / np.float32(255)
    ),
}


@pytest.mark.parametrize("kind", SOFT)
@settings(max_examples=15, deadline=None)
@example(rectangles=[(8, 6, 8, 6)])  # fills blocks of JPEG, so that a ripple of one value is left beside it
@example(rectangles=[(6, 8, 6, 8)])
@given(rectangles=shapes)
def test_soft_edges_move_no_edge_by_more_than_a_pixel(kind: str, rectangles: list[tuple[int, int, int, int]]) -> None:
    mask = _drawn(rectangles)
    defect = masks.defects(SOFT[kind](mask), 0.5)
    square = np.ones((3, 3))
    # Corners are rounded; notches between rectangles are filled.
    assert not (defect & ~ndimage.binary_dilation(mask, square, 2)).any()
    assert not (ndimage.binary_erosion(mask, square, 3) & ~defect).any()
    [extent], [clean] = (ndimage.find_objects(values.astype(int)) for values in (defect, mask > 0))
    for axis in (0, 1):
        assert abs(extent[axis].start - clean[axis].start) <= 1
        assert abs(extent[axis].stop - clean[axis].stop) <= 1


@settings(max_examples=40, deadline=None)
@given(
    rectangles=st.lists(st.tuples(*[st.integers(0, 60)] * 2, *[st.integers(4, 20)] * 2), min_size=1, max_size=6),
    numbers=st.lists(st.integers(1, 32), min_size=6, max_size=6),
)
def test_small_numbers_are_all_defects(rectangles: list[tuple[int, int, int, int]], numbers: list[int]) -> None:
    mask = np.zeros((96, 128), np.uint8)
    for (x, y, width, height), number in zip(rectangles, numbers, strict=False):
        mask[y : y + height, x : x + width] = number
    assert (masks.defects(mask, 0.5) == (mask > 0)).all()
    as_float = mask.astype(np.float32)
    assert (masks.defects(as_float, 0.5) == (mask > 0)).all()


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.integers(1, 255), min_size=4, max_size=4), thin=st.booleans(), gap=st.integers(1, 12))
def test_apart_from_each_other_any_numbers_are_defects(values: list[int], thin: bool, gap: int) -> None:
    mask = np.zeros((96, 128), np.uint8)
    side = 1 if thin else 9
    for place, value in enumerate(values):
        mask[10 : 10 + side, place * (20 + gap) : place * (20 + gap) + 20] = value
    assert (masks.defects(mask, 0.5) == (mask > 0)).all()


def test_areas_that_touch_keep_their_numbers() -> None:
    mask = np.zeros((60, 60), np.uint8)
    mask[10:30, 10:30], mask[20:40, 30:50], mask[30:50, 10:30] = 60, 120, 255
    assert (masks.defects(mask, 0.5) == (mask > 0)).all()


def test_a_thin_scratch_that_was_blurred_is_a_defect_beside_a_large_one() -> None:
    mask = np.zeros((96, 128), np.uint8)
    mask[10:50, 10:50] = 255
    mask[80, 20:100] = 255
    soft = np.asarray(Image.fromarray(mask).filter(ImageFilter.GaussianBlur(1.5)))
    assert soft[80].max() < 127
    boxes = masks.to_boxes(masks.defects(soft, 0.5), 0, 8, 4)
    assert len(boxes) == 2
    assert np.abs(np.array(boxes[1]) - (20, 80, 100, 81)).max() <= 1


def test_what_is_left_out_far_from_any_defect_is_noted() -> None:
    soft = _jpeg(_drawn([(6, 6, 30, 30)]), 75).copy()
    notes: list[str] = []
    masks.defects(soft, 0.5, notes)
    assert notes == []
    soft[70:80, 90:110] = 20
    assert not masks.defects(soft, 0.5, notes)[70:80].any()
    assert notes == [masks.FAINT]


@pytest.mark.parametrize(("threshold", "width"), [(0, 9), (0.2, 7), (0.5, 5), (0.9, 3), (1, 1)])
def test_the_threshold_is_a_share_of_the_maximum(threshold: float, width: int) -> None:
    slope = np.array([0, 25, 60, 140, 240, 255, 240, 140, 60, 25, 0])
    mask = np.zeros((20, 20), np.uint8)
    mask[5:15, 4:15] = slope
    assert masks.defects(mask, threshold)[10].sum() == width


def test_a_black_mask_and_an_almost_black_jpeg_show_nothing(tmp_path: Path) -> None:
    assert not masks.defects(np.zeros((4, 4), np.uint8), 0.5).any()
    assert not masks.defects(np.full((4, 4), np.nan, np.float32), 0.5).any()
    Image.fromarray(np.full((16, 16), 3, np.uint8)).save(tmp_path / "black.jpg")
    assert not masks.load_mask(tmp_path / "black.jpg").any()


def test_a_mask_of_several_pages_is_refused(tmp_path: Path) -> None:
    page = Image.new("L", (8, 8), 255)
    page.save(tmp_path / "mask.tif", save_all=True, append_images=[page])
    with pytest.raises(ValueError, match="2 frames or pages"):
        masks.load_mask(tmp_path / "mask.tif")


@given(mask=pictures, connectivity=st.sampled_from([4, 8]), min_area=st.integers(0, 5))
def test_fragments_are_the_boxes_without_dilation(mask: np.ndarray, connectivity: int, min_area: int) -> None:
    _, fragments = masks.boxes_and_fragments(mask, 0.5, connectivity, min_area)
    assert fragments == len(masks.to_boxes(mask, 0, connectivity, min_area))


@given(mask=pictures)
def test_run_lengths_of_a_mask_are_read_as_it(mask: np.ndarray) -> None:
    rle = masks.encoded(mask * np.uint8(255))
    assert sum(rle.counts) == rle.width * rle.height
    assert (masks.decoded(rle) == mask * 255).all()


def test_a_background_that_is_not_black_is_noted() -> None:
    colours = np.full((40, 60, 3), 255, np.uint8)
    for colour, noted in (((255, 0, 0), True), ((255, 255, 255), False)):
        colours[10:20, 10:20] = colour
        buffer = io.BytesIO()
        Image.fromarray(colours).save(buffer, "PNG")
        notes: list[str] = []
        mask, _ = masks.decode(buffer.getvalue(), 1, 0.5, notes)
        assert mask.all()
        assert notes == [masks.INVERTED] * noted
