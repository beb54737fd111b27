import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from adfm.data import inspection, masks
from adfm.params import Convert
from adfm.records import Box, Rle, Sample

WIDTH, HEIGHT = 40, 30


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("raw") / "a.png"
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def _inspected(
    picture: Path, label: str = "anomalous", settings_: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    sample = Sample(picture, "a.png", "set", "bolt", label, "hole" if label == "anomalous" else None, **more)
    return inspection.inspect(sample, Convert(dilation=0.2, min_area=50, **(settings_ or {})))


def _mask(row: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row["mask"]))) > 0


def test_boxes_that_a_person_drew_are_kept_as_they_are(picture: Path) -> None:
    boxes = (Box(2.5, 3, 4, 5.25), Box(5, 3, 6, 5))  # small, and near to each other
    row = _inspected(picture, boxes=boxes)
    assert row["problems"] == []
    assert row["boxes"] == [list(box) for box in boxes]
    assert row["fragments"] == 2
    assert row["mask"] is None


def test_normalized_boxes_are_shares_of_the_upright_image(picture: Path, tmp_path: Path) -> None:
    assert _inspected(picture, boxes=(Box(0.25, 0.5, 0.5, 1),), normalized=True)["boxes"] == [[10, 15, 20, 30]]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "turned.jpg", exif=exif)
    row = _inspected(tmp_path / "turned.jpg", boxes=(Box(0.25, 0.5, 0.5, 1),), normalized=True)
    assert (row["width"], row["height"]) == (HEIGHT, WIDTH)
    assert row["boxes"] == [[7.5, 20, 15, 40]]


@given(box=st.tuples(*[st.floats(-3, 45) | st.sampled_from([math.nan, math.inf, -math.inf])] * 4))
def test_a_box_is_clipped_by_a_pixel_at_most_or_a_problem(picture: Path, box: tuple[float, ...]) -> None:
    row = _inspected(picture, boxes=(Box(*box),))
    x1, y1, x2, y2 = box
    clipped = [max(x1, 0), max(y1, 0), min(x2, WIDTH), min(y2, HEIGHT)]
    sound = (
        all(map(math.isfinite, box))
        and clipped[0] < clipped[2]
        and clipped[1] < clipped[3]
        and max(-x1, -y1, x2 - WIDTH, y2 - HEIGHT) <= 1
    )
    assert bool(row["problems"]) != sound
    if sound:
        assert row["boxes"] == [clipped]
    else:
        assert row["problems"][0].startswith("a.png: its box (")


def test_all_that_is_wrong_with_an_image_is_listed(picture: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("text")
    Image.new("L", (3, 3), 255).save(tmp_path / "small.png")
    row = _inspected(
        picture,
        boxes=(Box(3, 3, 3, 9), Box(0, 0, math.nan, 9), Box(0, 0, 99, 9), Box(50, 50, 60, 60)),
        polygons=(((math.inf, 0.0), (1.0, 1.0), (2.0, 0.0)),),
        rles=(Rle(3, 3, (9,)),),
        masks=(tmp_path / "text.png", tmp_path / "small.png", tmp_path / "missing.png"),
    )
    assert len(row["problems"]) == 9
    for part in (
        "text.png cannot be read (it is not an image)",
        "small.png is 3x3",
        "missing.png cannot be read ([Errno 2]",
        "its box (3, 3, 3, 9) is empty or inverted",
        "its box (0, 0, nan, 9) has a side that is not a number",
        "its box (0, 0, 99, 9) reaches out of the image of 40x30",
        "its box (50, 50, 60, 60) reaches out",
        "an outline has a corner that is not a number",
        "is 40x30, but a mask in its annotation is 3x3",
    ):
        assert any(part in problem for problem in row["problems"]), part


def test_polygons_are_the_mask_within_their_boxes(picture: Path) -> None:
    diamond = ((20.0, 5.0), (30.0, 15.0), (20.0, 25.0), (10.0, 15.0))
    row = _inspected(picture, boxes=(Box(10, 5, 30, 25),), polygons=(diamond,))
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    distance = np.abs(x - 20) + np.abs(y - 15)
    mask = _mask(row)
    assert mask[distance < 9].all()
    assert not mask[distance > 11].any()
    assert row["boxes"] == [[10, 5, 30, 25]]

    square = ((2.0, 2.0), (6.0, 2.0), (6.0, 6.0), (2.0, 6.0))
    row = _inspected(picture, boxes=(Box(2, 2, 6, 6),), polygons=(square,))
    assert np.argwhere(_mask(row)).tolist() == [[y, x] for y in range(2, 6) for x in range(2, 6)]
    row = _inspected(
        picture,
        boxes=(Box(0.05, 0.1, 0.15, 0.2),),
        polygons=(((0.05, 0.1), (0.15, 0.1), (0.15, 0.2)),),
        normalized=True,
    )
    assert _mask(row)[3, 5] and not _mask(row)[5, 2]


def test_there_is_no_mask_if_a_box_has_no_shape(picture: Path) -> None:
    square = ((2.0, 2.0), (6.0, 2.0), (6.0, 6.0), (2.0, 6.0))
    row = _inspected(picture, boxes=(Box(2, 2, 6, 6), Box(20, 20, 30, 30)), polygons=(square,))
    assert (row["problems"], row["mask"], len(row["boxes"])) == ([], None, 2)


def test_run_lengths_go_down_the_columns(picture: Path) -> None:
    defect = np.zeros((HEIGHT, WIDTH), bool)
    defect[4:9, 7:12] = True
    defect[5, 8] = False
    runs, now = [0], False
    for pixel in defect.ravel(order="F").tolist():
        if pixel == now:
            runs[-1] += 1
        else:
            runs.append(1)
            now = pixel
    row = _inspected(picture, boxes=(Box(7, 4, 12, 9),), rles=(Rle(HEIGHT, WIDTH, tuple(runs)),))
    assert (_mask(row) == defect).all()


def test_several_masks_are_one(picture: Path, tmp_path: Path) -> None:
    union = np.zeros((HEIGHT, WIDTH), bool)
    paths = []
    for number, (x, value) in enumerate([(2, 1), (12, 200), (30, 7)]):
        part = np.zeros((HEIGHT, WIDTH), np.uint8)
        part[5:14, x : x + 8] = value
        union |= part > 0
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(part).save(paths[-1])
    row = _inspected(picture, masks=tuple(paths))
    assert (_mask(row) == union).all()
    assert row["boxes"] == [[2, 5, 20, 14], [30, 5, 38, 14]]
    assert row["fragments"] == 3


@pytest.mark.parametrize("count", [0, 1])
def test_an_image_without_a_mark(picture: Path, tmp_path: Path, count: int) -> None:
    Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "empty.png")
    paths = (tmp_path / "empty.png",) * count
    row = _inspected(picture, masks=paths, unmarked_is_normal=True)
    assert (row["problems"], row["label"], row["defect"], row["mask"]) == ([], "normal", None, None)
    assert row["unmarked"]
    assert _inspected(picture, "normal", masks=paths)["problems"] == []
    assert "is anomalous, but" in _inspected(picture, masks=paths)["problems"][0]


def test_a_normal_image_has_no_marks(picture: Path, tmp_path: Path) -> None:
    Image.new("L", (WIDTH, HEIGHT), 255).save(tmp_path / "full.png")
    wrong = ["a.png: is normal, but defects are marked on it"]
    assert _inspected(picture, "normal", masks=(tmp_path / "full.png",))["problems"] == wrong
    assert _inspected(picture, "normal", boxes=(Box(0, 0, 5, 5),))["problems"] == wrong
    assert _inspected(picture, masks=(tmp_path / "full.png",))["boxes"] == [[0, 0, WIDTH, HEIGHT]]


@pytest.mark.parametrize(("side", "what"), [(0, "no defect,"), (3, "no defect of convert.min_area (50 pixels),")])
def test_of_an_image_that_need_not_be_marked_the_label_is_known_alone(
    picture: Path, tmp_path: Path, side: int, what: str
) -> None:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:side, :side] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    row = _inspected(picture, masks=(tmp_path / "mask.png",), located=False)
    assert (row["problems"], row["label"], row["boxes"], row["mask"]) == ([], "anomalous", [], None)
    assert row["notes"] == [f"its mask shows {what} so that its label is all that is known"]
    assert len(_inspected(picture, masks=(tmp_path / "mask.png",))["problems"]) == 1


# ------------------------------------------------------------------------------------------ sizes, orientations, edges


def _photograph(folder: Path, size: tuple[int, int], orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (*size[::-1], 3), np.uint8)).save(
        folder / "photo.jpg", exif=exif
    )
    return folder / "photo.jpg"


edges = st.lists(st.integers(0, 12), min_size=2, max_size=2, unique=True).map(sorted)


@given(orientation=st.integers(1, 8), xs=edges, ys=edges)
def test_a_box_turns_as_the_picture_does(orientation: int, xs: list[int], ys: list[int]) -> None:
    width, height = 13, 17
    mask = np.zeros((height, width), np.uint8)
    mask[ys[0] : ys[1], xs[0] : xs[1]] = 255
    size = inspection.upright_size((width, height), orientation)
    turned = masks.placed(mask, orientation, size)
    box = inspection.turned_box(Box(xs[0], ys[0], xs[1], ys[1]), (width, height), orientation)
    assert masks.to_boxes(turned, 0, 8, 0) == [box]
    assert inspection.upright_size(size, orientation) == (width, height)


@given(
    orientation=st.integers(1, 8),
    pixels=st.lists(st.tuples(st.integers(0, 29), st.integers(0, 19)), min_size=3, max_size=6),
)
def test_the_corners_of_a_polygon_turn_as_the_pixels_that_they_are_in(
    orientation: int, pixels: list[tuple[int, int]]
) -> None:
    width, height = 30, 20
    size = inspection.upright_size((width, height), orientation)
    centres = tuple((x + 0.5, y + 0.5) for x, y in pixels)
    turned = inspection.turned_polygon(centres, (width, height), orientation)
    for (x, y), corner in zip(pixels, turned, strict=True):
        mask = np.zeros((height, width), np.uint8)
        mask[y, x] = 255
        [[row, column]] = np.argwhere(masks.placed(mask, orientation, size))
        assert corner == (column + 0.5, row + 0.5)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("frame", ["stored", "upright"])
def test_marks_of_either_frame_of_a_photograph_become_upright(tmp_path: Path, orientation: int, frame: str) -> None:
    photo = _photograph(tmp_path, (WIDTH, HEIGHT), orientation)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[4:9, 7:19] = 255
    turned = masks.placed(mask, orientation, inspection.upright_size((WIDTH, HEIGHT), orientation))
    own = mask if frame == "stored" else turned
    [box] = masks.to_boxes(own, 0, 8, 0)
    corners = ((box.x1, box.y1), (box.x2, box.y1), (box.x2, box.y2), (box.x1, box.y2))
    for more in ({"polygons": (corners,)}, {"rles": (masks.encoded(own),)}):
        row = _inspected(photo, boxes=(box,), size=own.shape[::-1], **more)
        assert row["problems"] == []
        if frame == "stored" and orientation in (2, 3, 4):  # the size does not tell
            assert (row["frame"], row["notes"]) == ("either", [inspection.TAKEN_AS_UPRIGHT])
            assert row["boxes"] == [list(box)]
            continue
        assert row["boxes"] == [list(side) for side in masks.to_boxes(turned, 0, 8, 0)]
        if "rles" in more:
            assert (_mask(row) == (turned > 0)).all()
        assert row["frame"] == (None if orientation == 1 else "either" if orientation < 5 else frame)


def test_a_run_length_mask_tells_the_frame_where_no_size_is_stated(tmp_path: Path) -> None:
    photo = _photograph(tmp_path, (WIDTH, HEIGHT), 6)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[4:9, 7:19] = 255
    row = _inspected(photo, boxes=(Box(7, 4, 19, 9),), rles=(masks.encoded(mask),))
    assert (row["problems"], row["boxes"], row["frame"]) == ([], [[21, 7, 26, 19]], "stored")


def test_masks_of_black_on_white_are_a_problem_where_most_boxes_are_the_whole_image(tmp_path: Path) -> None:
    rows = []
    for number, inverted in enumerate([True, True, False]):
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[4:9, 7:19] = 255
        path = tmp_path / f"{number}.png"
        Image.fromarray(255 - mask if inverted else mask).save(path)
        photo = tmp_path / f"photo{number}.png"
        Image.effect_noise((WIDTH, HEIGHT), 50).save(photo)
        rows.append(_inspected(photo, masks=(path,)) | {"source": f"{number}.jpg"})
    assert [row["notes"] for row in rows] == [[masks.INVERTED], [masks.INVERTED], []]
    run = tmp_path / "0.parquet"
    pq.write_table(pa.Table.from_pylist(rows, inspection.SCHEMA), run)
    assert [problem.partition(":")[0] for problem in inspection.mask_problems([run])] == ["0.jpg", "1.jpg"]
    pq.write_table(pa.Table.from_pylist(rows[1:], inspection.SCHEMA), run)
    assert inspection.mask_problems([run]) == []


def test_photographs_that_do_not_tell_are_a_problem_beside_others_in_the_stored_frame(tmp_path: Path) -> None:
    rows = []
    for number, (orientation, size) in enumerate([(6, (WIDTH, HEIGHT)), (3, (WIDTH, HEIGHT)), (8, (HEIGHT, WIDTH))]):
        photo = _photograph(tmp_path, (WIDTH, HEIGHT), orientation)
        rows.append(_inspected(photo, boxes=(Box(1, 2, 9, 8),), size=size) | {"source": f"{number}.jpg"})
        rows[-1]["file"] = "photo.jpg"
    assert [row["frame"] for row in rows] == ["stored", "either", "upright"]
    runs = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
    pq.write_table(pa.Table.from_pylist(rows[:1], inspection.SCHEMA), runs[0])
    pq.write_table(pa.Table.from_pylist(rows[1:], inspection.SCHEMA), runs[1])
    [problem] = inspection.frame_problems(runs)
    assert problem.startswith("1.jpg: has an EXIF orientation")
    assert inspection.frame_problems(runs[1:]) == []
    assert inspection.grey_range(runs) is None


@given(
    wide=st.integers(20, 200),
    high=st.integers(20, 200),
    box=st.tuples(st.floats(0, 0.4), st.floats(0, 0.4), st.floats(0.5, 1), st.floats(0.5, 1)),
)
def test_another_size_is_refused_or_scales_what_was_drawn(
    picture: Path, wide: int, high: int, box: tuple[float, ...]
) -> None:
    drawn = Box(*(share * side for share, side in zip(box, (wide, high) * 2, strict=True)))
    corners = ((drawn.x1, drawn.y1), (drawn.x2, drawn.y1), (drawn.x2, drawn.y2))
    sample = {"boxes": (drawn,), "polygons": (corners,), "size": (wide, high)}
    row = _inspected(picture, **sample)
    if (wide, high) == (WIDTH, HEIGHT):
        assert (row["problems"], row["notes"]) == ([], [])
        return
    [problem] = row["problems"]
    assert f"is 40x30, but its annotation was drawn on {wide}x{high}; " in problem
    assert "convert.rescale" in problem
    row = _inspected(picture, settings_={"rescale": True}, **sample)
    assert row["problems"] == []
    assert row["boxes"][0] == pytest.approx([s * side for s, side in zip(box, (WIDTH, HEIGHT) * 2, strict=True)])
    proportional = abs(wide * HEIGHT - high * WIDTH) <= max(wide + high, WIDTH + HEIGHT)
    assert row["notes"] == [inspection.SCALED if proportional else inspection.STRETCHED]


def test_a_mask_of_runs_is_scaled_and_turned_with_its_box(tmp_path: Path) -> None:
    mask = np.zeros((2 * HEIGHT, 2 * WIDTH), np.uint8)
    mask[8:18, 14:38] = 255
    more = {"boxes": (Box(14, 8, 38, 18),), "rles": (masks.encoded(mask),), "size": (2 * WIDTH, 2 * HEIGHT)}
    row = _inspected(_photograph(tmp_path, (WIDTH, HEIGHT), 6), settings_={"rescale": True}, **more)
    assert (row["problems"], row["boxes"], row["frame"]) == ([], [[21, 7, 26, 19]], "stored")
    assert masks.to_boxes(_mask(row), 0, 8, 0) == [Box(21, 7, 26, 19)]


@pytest.mark.parametrize("size", [(0, 0), (-1, 5)])
def test_a_size_of_nothing_states_none(picture: Path, size: tuple[int, int]) -> None:
    assert _inspected(picture, boxes=(Box(1, 1, 9, 9),), size=size)["problems"] == []


@given(box=st.tuples(*[st.integers(-30, 80)] * 4))
def test_a_box_that_may_be_cut_is_cut_unless_it_lies_outside(picture: Path, box: tuple[int, ...]) -> None:
    row = _inspected(picture, boxes=(Box(*box),), cut=(True,))
    clipped = [max(box[0], 0), max(box[1], 0), min(box[2], WIDTH), min(box[3], HEIGHT)]
    if box[0] >= box[2] or box[1] >= box[3] or clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
        assert len(row["problems"]) == 1
        return
    assert (row["problems"], row["boxes"]) == ([], [clipped])
    reach = max(-box[0], -box[1], box[2] - WIDTH, box[3] - HEIGHT)
    assert row["notes"] == ([inspection.CUT] if reach > 1 else [])


def test_only_the_boxes_that_may_be_cut_are(picture: Path) -> None:
    row = _inspected(picture, boxes=(Box(-9, 1, 9, 9), Box(-9, 11, 9, 19)), cut=(True, False))
    assert row["problems"] == ["a.png: its box (-9, 11, 9, 19) reaches out of the image of 40x30"]


# ------------------------------------------------------------------------------------------------------- kinds of files


def test_grey_values_of_more_than_8_bits_are_kept_by_their_range(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(200, 4000, (HEIGHT, WIDTH)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.tif")
    row = _inspected(tmp_path / "a.tif", "normal")
    assert (row["problems"], row["embedded"]) == ([], False)
    assert (row["darkest"], row["brightest"]) == (values.min(), values.max())
    eight = np.rint((values - values.min()) / (values.max() - values.min()) * 255).astype(np.uint8)
    Image.fromarray(eight).save(tmp_path / "b.png")
    assert _inspected(tmp_path / "b.png", "normal")["thumbnail"] == row["thumbnail"]  # one picture, saved twice
    run = tmp_path / "0.parquet"
    pq.write_table(pa.Table.from_pylist([row], inspection.SCHEMA), run)
    assert inspection.grey_range([run]) == (values.min(), values.max())


def test_a_pointer_of_git_lfs_says_so(tmp_path: Path, picture: Path) -> None:
    (tmp_path / "a.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n")
    [problem] = _inspected(tmp_path / "a.png")["problems"]
    assert "a.png: cannot be read (it is a Git LFS pointer" in problem and "git lfs pull" in problem
    [problem] = _inspected(picture, masks=(tmp_path / "a.png",))["problems"]
    assert "its mask" in problem and "git lfs pull" in problem


def test_a_clean_mask_is_kept_as_it_is_and_any_other_encoded(picture: Path, tmp_path: Path) -> None:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[5:14, 3:9] = 255
    Image.fromarray(mask).save(tmp_path / "clean.png")
    Image.fromarray(mask // 255).save(tmp_path / "index.png")
    clean, index = (_inspected(picture, masks=(tmp_path / name,)) for name in ("clean.png", "index.png"))
    assert clean["mask"] == (tmp_path / "clean.png").read_bytes()
    assert (_mask(index) == (mask > 0)).all() and clean["boxes"] == index["boxes"] == [[3, 5, 9, 14]]
    with Image.open(io.BytesIO(index["mask"])) as file:
        assert (file.mode, file.getextrema()) == ("L", (0, 255))
