from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from adfm.data import shards
from adfm.errors import AdfmError
from adfm.models import loading
from adfm.params import Model, Tile
from adfm.records import Box, Record
from adfm.training import examples

LABELS = st.lists(st.sampled_from(["normal", "anomalous"]), min_size=2, max_size=30).filter(
    lambda labels: len(set(labels)) == 2
)


@given(LABELS, st.integers(1, 100), st.floats(0, 1), st.integers(0, 100))
def test_labels_come_in_their_share_and_all_images_before_any_comes_twice(
    labels: list[str], count: int, share: float, seed: int
) -> None:
    order = examples._order(labels, count, share, seed, "shards")
    assert len(order) == count
    for run in range(1, count + 1):
        assert abs(sum(labels[i] == "anomalous" for i in order[:run]) - run * share) < 1 + 1e-6
    for label in ("anomalous", "normal"):
        drawn = [i for i in order if labels[i] == label]
        total = labels.count(label)
        assert len(set(drawn[:total])) == len(drawn[:total])


def test_one_label_alone_cannot_be_trained_on() -> None:
    with pytest.raises(AdfmError, match="no anomalous image"):
        examples._order(["normal"] * 3, 4, 0.5, 0, "shards")
    assert examples._order(["normal"] * 3, 4, 0.0, 0, "shards")


def test_rows_hold_boxes_in_the_models_frame(small_shards: Path, tmp_path: Path) -> None:
    loaded = loading.load("embedded://tiny-base", Model())
    data = examples.draw(small_shards, loaded, 12, anomalous_share=0.5, seed=0, cache=tmp_path)
    assert data.column_names == ["image", "prompt", "label", "defect", "regions", "frame"]
    for row in data:
        assert row["frame"] == [1000, 1000]
        assert bool(row["regions"]) == (row["label"] == "anomalous")
        assert all(0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000 for x1, y1, x2, y2 in row["regions"])
        assert row["image"].size == (128, 128)


def test_images_of_which_only_the_label_is_known_may_be_left_out(
    small_shards: Path, label_shards: Path, tmp_path: Path
) -> None:
    with_boxes, none = examples.boxes_known(small_shards)
    assert (examples.boxes_known(label_shards), none) == ((0, with_boxes), 0)
    loaded = loading.load("embedded://tiny-base", Model())
    data = examples.draw(label_shards, loaded, 12, anomalous_share=0.5, seed=0, cache=tmp_path)
    assert (data["label"].count("anomalous"), sum(map(len, data["regions"]))) == (6, 0)
    with pytest.raises(AdfmError, match="no anomalous image"):
        examples.draw(label_shards, loaded, 12, anomalous_share=0.5, seed=0, cache=tmp_path, located=True)


def test_images_are_drawn_by_their_weights() -> None:
    labels = ["normal", "anomalous"] * 3
    order = examples._order(labels, 6000, 0.5, 0, Path("shards"), np.array([0.0, 1.0, 1.0, 1.0, 3.0, 2.0]))
    times = np.bincount(order, minlength=6) / 3000
    # No image is drawn less than a twentieth as often as the heaviest of its label.
    assert times[[0, 2, 4]] == pytest.approx(np.array([0.15, 1, 3]) / 4.15, abs=0.03)
    assert times[[1, 3, 5]] == pytest.approx([0.25, 0.25, 0.5], abs=0.03)


# ------------------------------------------------------------------------------------------------- tiles

SPOT = 10


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight photographs of 400 x 300 pixels; every second one has a white spot of 10 x 10, the last without a box."""
    rng, records = np.random.default_rng(0), []
    for number in range(8):
        pixels, label, boxes = rng.integers(90, 110, (300, 400, 3), dtype=np.uint8), "normal", ()
        if number % 2:
            x, y = int(rng.integers(0, 400 - SPOT)), int(rng.integers(0, 300 - SPOT))
            pixels[y : y + SPOT, x : x + SPOT] = 255
            label, boxes = "anomalous", (Box(x, y, x + SPOT, y + SPOT),) if number < 7 else ()
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "PNG")
        row: dict[str, Any] = {"dataset": "parts", "category": "plate", "split": "train", "sha256": "0" * 64}
        row |= {"id": str(number), "source": f"{number}.png", "label": label, "boxes": boxes, "mask": None}
        row |= {"width": 400, "height": 300, "defect": "spot" if label == "anomalous" else None}
        records.append(Record(image=png.getvalue(), **row))
    folder = tmp_path_factory.mktemp("large")
    shards.write(records, folder, shard_images=3)
    return folder


def test_rows_are_tiles_labelled_by_what_they_show(large: Path, tmp_path: Path) -> None:
    loaded = loading.load("embedded://tiny-base", Model())
    tile = Tile(size=128)
    data = examples.draw(large, loaded, 40, anomalous_share=0.25, seed=0, cache=tmp_path, tile=tile)
    assert data.column_names == ["image", "prompt", "label", "defect", "regions", "frame"]
    assert data["label"].count("anomalous") == 10
    spots = 0
    for row in data:
        pixels = np.asarray(row["image"])
        assert pixels.shape == (128, 128, 3)
        white = np.argwhere((pixels == 255).all(2))
        assert len(white) in ((0,) if row["label"] == "normal" else range(SPOT * SPOT // 4, SPOT * SPOT + 1))
        assert row["defect"] == ("spot" if len(white) else None)
        for x1, y1, x2, y2 in np.array(row["regions"]) * 128 / 1000:
            assert [y1, x1, y2, x2] == pytest.approx([*white.min(0), *white.max(0) + 1])
            spots += 1
    assert spots == 10
    # The same rows are cut once; others have a file of their own.
    again = examples.draw(large, loaded, 40, anomalous_share=0.25, seed=0, cache=tmp_path, tile=tile)
    assert again["regions"][:] == data["regions"][:] and len(list(tmp_path.glob("tiles-*.arrow"))) == 1
    examples.draw(large, loaded, 4, anomalous_share=0.25, seed=0, cache=tmp_path, tile=tile)
    assert len(list(tmp_path.glob("tiles-*"))) == 2


def test_an_uncut_image_is_a_row_and_its_place_is_all_of_it(large: Path) -> None:
    rows = examples.rows(large, "train", Tile())
    assert [row["number"] for row in rows] == list(range(8)) and {row["tile"] for row in rows} == {Box(0, 0, 400, 300)}
    assert [row["label"] for row in rows] == ["normal", "anomalous"] * 4
    assert len(examples.rows(large, "train", Tile(size=400))) == 7  # nobody knows where the last one's defect is
    assert len(examples.rows(large, "train", Tile(size=200, overlap=0.5))) <= 7 * 6


def test_tiles_are_drawn_by_the_weights_of_their_images_and_need_boxes(
    large: Path, label_shards: Path, tmp_path: Path
) -> None:
    loaded = loading.load("embedded://tiny-base", Model())
    weights = {str(number): float(number in (1, 3)) for number in range(8)}
    data = examples.draw(large, loaded, 20, 1.0, 0, tmp_path, weights=weights, tile=Tile(size=400))
    assert {row["image"].size for row in data} == {(400, 300)}  # the height is the image's own
    with pytest.raises(AdfmError, match=r"no anomalous image of the train split has boxes.*tile\.size=null"):
        examples.draw(label_shards, loaded, 12, 0.5, 0, tmp_path, tile=Tile(size=64))


def test_kinds_are_drawn_as_often_as_one_another() -> None:
    kinds = ["dent"] * 8 + ["scratch"] * 2 + [None] * 2
    weights = examples._evenly(kinds)
    assert weights.tolist() == [1 / 8] * 8 + [1 / 2] * 2 + [1 / 8] * 2
    assert examples._evenly([None, None]).tolist() == [1, 1]
