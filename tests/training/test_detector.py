"""The reference detector learns, and says so of every odd set."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from adfm.cli import main
from adfm.data import hashes, shards, tiles
from adfm.errors import AdfmError
from adfm.evaluation import metrics, predictions
from adfm.files import digest
from adfm.models import detector, loading, model_folder, predictor
from adfm.params import Params, Tile
from adfm.records import Box, Record, Split
from adfm.tiny import efficientnet
from adfm.training import detector as training
from adfm.training import examples as examples_

PARAMS = Params.model_validate({"detector": {"steps": 60}})
FEW = Params.model_validate({"detector": {"steps": 4}})
SIZE = 96, 64


@pytest.fixture(scope="module", autouse=True)
def small_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detector, "SIDE", 96)
        yield


def record(number: int, split: Split, size: tuple[int, int] = SIZE) -> Record:
    """A grey surface; every second one has a black spot or a white stripe."""
    rng = np.random.default_rng(number)
    width, height = size
    grey = rng.normal(128, 12, (height, width))
    defect, boxes = (None, "spot", None, "stripe")[number % 4], []
    if defect:
        across, down = (14, 14) if defect == "spot" else (36, 5)
        x, y = int(rng.integers(width - across)), int(rng.integers(height - down))
        grey[y : y + down, x : x + across] = 20 if defect == "spot" else 235
        boxes = [Box(x, y, x + across, y + down)]
    stream = io.BytesIO()
    Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB").save(stream, "PNG")
    return Record(
        id=f"{number:016x}",
        image=stream.getvalue(),
        mask=None,
        width=width,
        height=height,
        dataset="toy",
        category="surface",
        defect=defect,
        label="anomalous" if defect else "normal",
        boxes=tuple(boxes),
        split=split,
        source=f"{number}.png",
        sha256=f"{number:064x}",
    )


def drawn(counts: dict[Split, int], size: tuple[int, int] = SIZE) -> list[Record]:
    splits = [split for split, count in counts.items() for _ in range(count)]
    return [record(number, split, size) for number, split in enumerate(splits)]


def written(folder: Path, records: list[Record]) -> Path:
    folder.mkdir()
    shards.write(records, folder, shard_images=1000)
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = drawn({"train": 40, "validation": 20, "test": 24})
    return written(tmp_path_factory.mktemp("toy") / "shards", records)


@pytest.fixture(scope="module")
def trained(toy: Path) -> Path:
    training.train(toy, toy.parent / "detector", PARAMS)
    return toy.parent / "detector"


def test_it_learns_label_place_and_kind(toy: Path, trained: Path) -> None:
    table = predictions.predict(trained, toy, PARAMS, "detector")
    right = table["predicted"] == table["label"]
    assert right.mean() >= 0.9
    assert table["iou"].mean() > 0.4  # boxes of an 8-pixel grid on stripes 5 pixels high
    assert table["score"].between(0, 1).all() and table["predicted"].notna().all()
    flagged = table[(table["predicted"] == "anomalous") & (table["label"] == "anomalous")]
    kinds = [defect in words.lower() for defect, words in zip(flagged["defect"], flagged["completion"], strict=True)]
    assert np.mean(kinds) >= 0.9
    assert (table["completion"][table["predicted"] == "normal"] == "No defect.").all()


def test_its_folder_says_what_it_is(toy: Path, trained: Path) -> None:
    about = json.loads((trained / "adfm.json").read_text())
    assert about["stage"] == "detector" and about["kinds"] == ["spot", "stripe"] and about["score"] == "image"
    assert about["data_fingerprint"] == shards.fingerprint(toy) and about["params"]["detector"]["steps"] == 60
    assert sorted(file.name for file in trained.iterdir()) == [
        "adfm.json",
        "detector.safetensors",
        "trained_on.parquet",
    ]
    assert hashes.of_model(trained).num_rows == 60
    assert model_folder.is_detector(trained) and not model_folder.is_detector("embedded://tiny-base")


def test_the_same_seed_gives_the_same_detector(tmp_path: Path) -> None:
    few = written(tmp_path / "shards", drawn({"train": 8, "validation": 4, "test": 4}))
    torch.manual_seed(7)
    training.train(few, tmp_path / "one", FEW)
    torch.manual_seed(8)
    training.train(few, tmp_path / "two", FEW)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    other = Params.model_validate({"seed": 1, "detector": {"steps": 4}})
    training.train(few, tmp_path / "two", other, force=True)
    assert digest(tmp_path / "one") != digest(tmp_path / "two")


def test_a_loaded_detector_answers_as_the_one_that_was_saved(toy: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    head = detector.Head(2).eval()
    made = detector.Detector(head, 0.0, None, ["spot", "stripe"], True)
    made = training._choose(made, toy, "validation", Tile(), rng)
    (tmp_path / "detector").mkdir()
    training._save(tmp_path / "detector", made, toy, FEW)
    loaded = detector.load(tmp_path / "detector")
    images = [Image.open(io.BytesIO(each.image)) for each in list(shards.read(toy, "test"))[:6]]
    pictures, sizes = [detector.picture(image) for image in images], [image.size for image in images]
    assert loaded.detect(pictures, sizes) == made.detect(pictures, sizes)
    assert (loaded.threshold, loaded.rule, loaded.kinds) == (made.threshold, made.rule, made.kinds)


def test_a_finished_detector_is_not_replaced_unasked(toy: Path, trained: Path) -> None:
    with pytest.raises(AdfmError, match="--force"):
        training.train(toy, trained, FEW)


def test_a_broken_folder_is_refused(trained: Path, tmp_path: Path) -> None:
    for file in trained.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "detector.safetensors").write_bytes(b"half of it")
    with pytest.raises(AdfmError, match="does not hold a whole detector"):
        detector.load(tmp_path)


def test_it_is_no_language_model_to_train_or_register(trained: Path, tmp_path: Path) -> None:
    from adfm.registry import submission

    with pytest.raises(AdfmError, match="is a reference detector, not a language model"):
        loading.load(trained, PARAMS.model)
    with pytest.raises(AdfmError, match="is a reference detector, and only language models are registered"):
        submission.check_model(trained)


# ---------------------------------------------------------------------------------------------------- odd sets

ODD: dict[str, tuple[Callable[[Record], Record | None], str]] = {
    "labels alone": (lambda one: replace(one, boxes=()), "no image has boxes"),
    "some labels alone": (
        lambda one: replace(one, boxes=()) if one.defect == "spot" else one,
        "defective images have a label alone",
    ),
    "defective alone": (lambda one: one if one.boxes else None, "no image is normal"),
    "kinds alone": (lambda one: replace(one, boxes=()) if one.boxes else None, "it learns the kinds alone"),
    "no kinds": (lambda one: replace(one, defect=None), "in 2 variants\n"),
    "no validation": (lambda one: None if one.split == "validation" else one, "there is no validation split"),
    "one-sided validation": (lambda one: None if one.split == "validation" and one.boxes else one, "in 2 variants"),
}


@pytest.mark.parametrize("name", ODD)
def test_it_is_trained_on_an_odd_set_and_says_what_it_learns_from(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "VARIANTS", 2)
    change, message = ODD[name]
    records = [changed for one in drawn({"train": 12, "validation": 8, "test": 8}) if (changed := change(one))]
    folder = written(tmp_path / "shards", records)
    training.train(folder, tmp_path / "detector", FEW)
    printed = capsys.readouterr().out
    assert message in printed
    table = predictions.predict(tmp_path / "detector", folder, FEW, "detector")
    assert table["score"].between(0, 1).all() and table["predicted"].notna().all()
    boxes = [len(each) for each in table["regions"]]
    assert max(boxes) == 0 if name in ("labels alone", "kinds alone", "one-sided validation") else min(boxes) > 0
    if name in ("defective alone", "kinds alone"):
        assert "flags every image, as no normal one was there to learn from" in printed
        assert (table["predicted"] == "anomalous").all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: None if one.boxes else one, "has no defective image"),
        (
            lambda one: replace(one, boxes=(), defect="spot") if one.boxes else None,
            "no normal image, no boxes and no two",
        ),
    ],
)
def test_a_set_that_nothing_can_be_learnt_from_is_refused(
    change: Callable[[Record], Record | None], message: str, tmp_path: Path
) -> None:
    records = [changed for one in drawn({"train": 8, "validation": 4, "test": 4}) if (changed := change(one))]
    with pytest.raises(AdfmError, match=message):
        training.train(written(tmp_path / "shards", records), tmp_path / "detector", FEW)
    assert not (tmp_path / "detector").exists()


def test_images_of_any_size_are_learnt_from_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "VARIANTS", 2)
    sizes = [(40, 15), (500, 90), (64, 200)]
    records = [record(n, "train", sizes[n // 4]) for n in range(12)]
    folder = written(tmp_path / "shards", [*records, *(record(100 + n, "test", sizes[n % 3]) for n in range(6))])
    training.train(folder, tmp_path / "detector", FEW)
    table = predictions.predict(tmp_path / "detector", folder, FEW, "detector")
    assert table["iou"].notna().any() and min(len(each) for each in table["regions"]) > 0


def test_of_many_images_some_are_drawn_half_of_them_normal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "MOST_PICTURES", 8)
    records = drawn({"train": 24, "validation": 4, "test": 4})
    rare = [one for one in records if one.split != "train" or not one.boxes or int(one.id, 16) < 8]
    training.train(written(tmp_path / "shards", rare), tmp_path / "detector", FEW)
    assert "8 training images of 16, drawn, 4 defective, in 1 variants" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- tiles

LARGE = 240, 160
TILED = Params.model_validate({"detector": {"steps": 60}, "tile": {"size": 80, "overlap": 0.25}})


def test_it_learns_from_tiles_and_answers_large_images_by_its_tiles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a whole image, which is seen with 96 pixels across, a stripe would be 2 pixels high."""
    monkeypatch.setattr(training, "MOST_PICTURES", 160)
    folder = written(tmp_path / "shards", drawn({"train": 20, "validation": 8, "test": 8}, LARGE))
    training.train(folder, tmp_path / "detector", TILED)
    defects = [row for row in examples_.rows(folder, "train", TILED.tile) if row["label"] == "anomalous"]
    assert f"{len(defects)} of {len(defects)} tiles with a defect" in capsys.readouterr().out
    trained = tmp_path / "detector"
    assert predictor.tile_of(trained, Params().tile) == TILED.tile
    table = predictions.predict(trained, folder, Params(), "detector")  # whatever the settings say later
    assert (table["predicted"] == table["label"]).mean() >= 0.9
    assert table["iou"].mean() > 0.35
    loaded = detector.load(trained)
    first = next(one for one in shards.read(folder, "test") if one.boxes)
    image = Image.open(io.BytesIO(first.image))
    grid = tiles.grid(*LARGE, 80, 0.25)
    cut = [image.crop(tile) for tile in grid]
    alone = loaded.detect([detector.picture(one) for one in cut], [one.size for one in cut])
    answer = table[table["id"] == first.id].iloc[0]
    assert answer["score"] == pytest.approx(max(one.score for one in alone))
    flagged = [one.regions if one.score >= loaded.threshold else [] for one in alone]
    assert [Box(*box) for box in answer["predicted_boxes"]] == tiles.merged(flagged, grid)


def test_the_threshold_is_that_of_the_joined_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "MOST_PICTURES", 16)
    folder = written(tmp_path / "shards", drawn({"train": 8, "validation": 8, "test": 4}, LARGE))
    training.train(folder, tmp_path / "detector", Params.model_validate({"detector": {"steps": 4}, "tile": TILED.tile}))
    loaded = detector.load(tmp_path / "detector")
    table = predictions.predict_splits(tmp_path / "detector", folder, Params(), "", ["validation"])["validation"]
    best = metrics.best_threshold((table["label"] == "anomalous").to_numpy(), table["score"].to_numpy())
    assert loaded.threshold == pytest.approx(best, abs=1e-6) and loaded.chosen_on == 8


def test_of_many_tiles_some_are_drawn_and_it_says_what_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "MOST_PICTURES", 8)
    monkeypatch.setattr(training, "_MOST_TILES", 24)
    monkeypatch.setattr(training, "_FEWEST_VALIDATION", 1)
    params = Params.model_validate({"detector": {"steps": 4}, "tile": TILED.tile})
    records = drawn({"train": 24, "validation": 4, "test": 4}, LARGE)
    some = [replace(one, boxes=()) if one.split == "train" and int(one.id, 16) < 8 else one for one in records]
    folder = written(tmp_path / "shards", some)
    training.train(folder, tmp_path / "detector", params)
    rows = examples_.rows(folder, "train", params.tile)
    defects = sum(row["label"] == "anomalous" for row in rows)
    printed = capsys.readouterr().out
    assert f"4 of {defects} tiles with a defect, 4 of {len(rows) - defects} normal tiles" in printed
    assert "4 defective images have no boxes and are left out" in printed
    assert "chosen on 2 of 4 validation images, drawn" in printed  # of 12 tiles each

    none = written(tmp_path / "labels", [replace(one, boxes=()) for one in records])
    with pytest.raises(AdfmError, match=r"no anomalous image of the train split has boxes.*tile\.size=null"):
        training.train(none, tmp_path / "none", params)


@settings(deadline=None)
@given(anomalous=st.integers(1, 3000), normal=st.integers(0, 3000))
def test_all_tiles_with_a_defect_are_drawn_while_as_many_normal_ones_fit_beside_them(
    anomalous: int, normal: int
) -> None:
    rows = [{"label": "anomalous"}] * anomalous + [{"label": "normal"}] * normal
    chosen, variants = training._chosen(rows, np.random.default_rng(0), TILED.tile)
    drawn_ = sum(row["label"] == "anomalous" for row in chosen)
    assert len(chosen) * variants <= training.MOST_PICTURES
    assert drawn_ >= min(anomalous, training.MOST_PICTURES // 2)
    assert len(chosen) - drawn_ >= min(normal, drawn_)


# ------------------------------------------------------------------------------------------------------ pieces


@settings(deadline=None)
@given(st.data())
def test_the_cells_of_a_box_turn_with_the_picture(data: st.DataObject) -> None:
    columns, rows = data.draw(st.integers(8, 60)), data.draw(st.integers(8, 60))
    width, height = data.draw(st.integers(50, 2000)), data.draw(st.integers(50, 2000))
    x, y = data.draw(st.floats(0, 0.8)), data.draw(st.floats(0, 0.8))
    w, h = data.draw(st.floats(0.03, 0.2)), data.draw(st.floats(0.03, 0.2))
    box = Box(x * width, y * height, (x + w) * width, (y + h) * height)
    cells = training.target([box], (width, height), (rows, columns))
    assert cells[min(int((y + h / 2) * rows), rows - 1), min(int((x + w / 2) * columns), columns - 1)] == 1
    across, down = w * columns, h * rows
    assert 1 <= cells.sum() <= (across + 2) * (down + 2)
    for variant in range(4):
        assert np.array_equal(
            training.flipped(training.flipped(torch.from_numpy(cells), variant), variant).numpy(), cells
        )
    picture = torch.zeros(3, rows, columns)
    picture[:, torch.from_numpy(cells) > 0] = 1
    for variant in range(1, 4):
        lit = training.varied(picture, variant, [0, variant])[0]
        bright = lit > (lit.min() + lit.max()) / 2
        assert (training.flipped(torch.from_numpy(cells), variant)[bright] > 0).all()


def test_a_plain_picture_is_as_it_is_and_variants_differ() -> None:
    picture = torch.rand(3, 32, 32) * 2 - 1
    assert training.varied(picture, 0, [1]) is picture
    first, again, other = (training.varied(picture, 1, [seed]) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.abs().max() <= 1


def test_the_features_in_the_file_are_those_of_the_pictures(toy: Path, tmp_path: Path) -> None:
    rows = examples_.rows(toy, "train", Tile())[:3]
    examples = training._compute(toy, rows, ["spot", "stripe"], 2, 0, tmp_path / "features")
    values = np.memmap(tmp_path / "features", np.float16, "r")
    compute = efficientnet.Features(tuple(efficientnet.CHANNELS))
    for number, (example, one) in enumerate(zip(examples, list(shards.read(toy, "train"))[:3], strict=True)):
        plain = detector.picture(Image.open(io.BytesIO(one.image)))
        for variant in range(2):
            [maps] = detector.features(compute, [training.varied(plain, variant, [0, number, variant])])
            read = training._read(values, example, variant)
            assert all(torch.equal(read[stride], maps[stride]) for stride in efficientnet.CHANNELS)


# --------------------------------------------------------------------------------------------------- the command


def test_photographs_are_answered_from_the_command_line(
    toy: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = next(each for each in shards.read(toy, "test") if each.boxes)
    (tmp_path / "part.png").write_bytes(one.image)
    arguments = ["predict", "--model", str(trained), "--json", str(tmp_path / "part.png")]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    about = json.loads((trained / "adfm.json").read_text())
    assert answer["label"] == "anomalous" and answer["threshold"] == about["threshold"] <= answer["probability"]
    assert answer["boxes"] and answer["reasoning"].endswith(("place.", "places."))
    assert max(Box(*box).iou(one.boxes[0]) for box in answer["boxes"]) > 0.2
    assert "cannot judge" not in captured.out
