import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from adfm.data import inspection
from adfm.params import Convert
from adfm.records import Box, Rle, Sample

WIDTH, HEIGHT = 40, 30


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("raw") / "a.png"
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def _inspected(picture: Path, label: str = "anomalous", **more: Any) -> dict[str, Any]:
    sample = Sample(picture, "a.png", "set", "bolt", label, "hole" if label == "anomalous" else None, **more)
    return inspection.inspect(sample, Convert(dilation=0.2, min_area=50))


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
        "text.png cannot be read (it is no image)",
        "small.png is 3x3",
        "missing.png cannot be read ([Errno 2]",
        "its box (3, 3, 3, 9) is empty or inverted",
        "its box (0, 0, nan, 9) has a side that is no number",
        "its box (0, 0, 99, 9) reaches out of the image of 40x30",
        "its box (50, 50, 60, 60) reaches out",
        "an outline has a corner that is no number",
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


@pytest.mark.parametrize("masks", [0, 1])
def test_an_image_without_a_mark(picture: Path, tmp_path: Path, masks: int) -> None:
    Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "empty.png")
    paths = (tmp_path / "empty.png",) * masks
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
