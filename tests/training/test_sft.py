from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adfm import cli
from adfm.data import hashes, shards
from adfm.errors import AdfmError
from adfm.evaluation import verdict
from adfm.files import write_json
from adfm.method import response
from adfm.models import loading, model_folder
from adfm.params import Evaluate, Params, Tile
from adfm.training import examples
from adfm.training import sft as sft_module
from adfm.training.sft import Targets, sft, trained_on


def test_no_steps_change_nothing(small_shards: Path, tmp_path: Path) -> None:
    from PIL import Image

    from tests.models.generation import generate

    sft(small_shards, tmp_path / "sft", Params.model_validate({"sft": {"steps": 0}}))
    params = Params()
    images = [Image.new("RGB", (128, 128), colour) for colour in ("gray", "white", "navy")]
    base = generate(loading.load(params.model.name, params.model), images, Evaluate(max_new_tokens=40))
    warmed = generate(loading.load(tmp_path / "sft", params.model), images, Evaluate(max_new_tokens=40))
    assert base[0] == warmed[0]


def test_sft_moves_the_adapter_and_says_where_it_comes_from(small_shards: Path, tmp_path: Path, params: Params) -> None:
    from safetensors.torch import load_file

    sft(small_shards, tmp_path / "sft", params)
    weights = load_file(tmp_path / "sft" / "adapter_model.safetensors")
    assert any(torch.count_nonzero(w) for name, w in weights.items() if "lora_B" in name)
    description = json.loads((tmp_path / "sft" / "adfm.json").read_text())
    assert description["grey_range"] is None  # the shards have no grey images of more than 8 bits
    assert description["base"] == {"name": "embedded://tiny-base", "revision": None}
    assert description["params"]["sft"]["steps"] == 2
    assert len((tmp_path / "sft" / "sft_curves.csv").read_text().splitlines()) == 3
    assert not (tmp_path / "sft" / "cache").exists()
    seen = hashes.of_model(tmp_path / "sft")
    assert seen is not None
    assert seen["id"].to_pylist() == sorted(shards.ids(small_shards, "train") + shards.ids(small_shards, "validation"))


@pytest.mark.parametrize("verb", [["sft", "shards"], ["train", "shards", "model"]])
def test_a_finished_model_is_refused_before_anything_is_read(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adfm.json").write_text("{}")
    assert cli.main([*verb, "out"]) == 1
    assert "out holds a finished model, which is not replaced; choose another" in capsys.readouterr().err
    assert cli.main([*verb, "out", "--force", "--set", "model.name=none"]) == 1
    assert "finished model" not in capsys.readouterr().err
    assert (tmp_path / "out" / "adfm.json").read_text() == "{}"


def test_by_force_a_finished_model_is_replaced(small_shards: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        sft(small_shards, tmp_path / "out", Params.model_validate({"seed": seed, "sft": {"steps": 0}}), force=True)
    assert json.loads((tmp_path / "out" / "adfm.json").read_text())["params"]["seed"] == 2


def test_no_place_is_made_up_where_only_the_label_is_known(
    label_shards: Path, tmp_path: Path, params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    sft(label_shards, tmp_path / "stages", params)
    assert (
        "no anomalous training image has boxes; the model learns the verdict, and no place" in capsys.readouterr().out
    )
    assert len((tmp_path / "stages" / "sft_curves.csv").read_text().splitlines()) == 3
    loaded = loading.load(params.model.name, params.model)
    data = examples.draw(label_shards, loaded, 12, anomalous_share=0.5, seed=0, cache=tmp_path)
    rows = Targets(data, params.sft, seed=0, augment=True)
    for row in (rows[i] for i in range(12)):
        read = response.parse(row["completion"][0]["content"])
        assert (read.predicted_label == "anomalous") == row["defective"] and not read.boxes
        assert row["boxes"] is (None if row["defective"] else row["boxes"]) and not row["boxes"]


def test_where_some_have_boxes_those_without_are_left_out(
    small_shards: Path, tmp_path: Path, params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    records = list(shards.read(small_shards))
    first = next(record.id for record in records if record.split == "train" and record.boxes)
    (tmp_path / "mixed").mkdir()
    mixed = (replace(record, boxes=(), mask=None) if record.id == first else record for record in records)
    shards.write(mixed, tmp_path / "mixed", shard_images=1000)
    sft(tmp_path / "mixed", tmp_path / "out", params)
    assert "1 anomalous training images have no boxes and are left out" in capsys.readouterr().out


def test_rows_show_views_with_the_boxes_that_the_answer_names(
    small_shards: Path, tmp_path: Path, params: Params
) -> None:
    loaded = loading.load(params.model.name, params.model)
    data = examples.draw(small_shards, loaded, 24, anomalous_share=1.0, seed=0, cache=tmp_path)
    rows, plain = Targets(data, params.sft, 0, augment=True), Targets(data, params.sft, 0, augment=False)
    same = 0
    for i in range(24):
        row, as_it_is = rows[i], plain[i]
        assert as_it_is["image"].tobytes() == data[i]["image"].convert("RGB").tobytes()
        same += row["image"].tobytes() == as_it_is["image"].tobytes()
        boxes = response.parse(row["completion"][0]["content"]).boxes
        for box in boxes:
            nearest = min(row["boxes"], key=lambda true: max(abs(a * 1000 - b) for a, b in zip(true, box, strict=True)))
            assert max(abs(a * 1000 - b) for a, b in zip(nearest, box, strict=True)) <= 5.001
        assert list(boxes) == sorted(boxes, key=lambda box: (box.y1, box.x1))
    assert 0 < same < 24


@pytest.mark.parametrize("listed", [False, True])
def test_rows_have_the_number_of_their_kind_whether_or_not_the_prompt_asks_for_it(
    small_shards: Path, tmp_path: Path, params: Params, listed: bool
) -> None:
    loaded = loading.load(params.model.name, params.model)
    data = examples.draw(small_shards, loaded, 24, anomalous_share=0.5, seed=0, cache=tmp_path)
    defects = sorted({row["defect"] for row in data if row["label"] == "anomalous"})
    known = [*defects[:-1], "a kind of other images"]
    rows = Targets(data, params.sft.model_copy(update={"kinds": listed}), 0, kinds=known)
    for i in range(24):
        defect = data[i]["defect"] if data[i]["label"] == "anomalous" else None
        assert rows[i]["kind"] == (known.index(defect) if defect in known else None)
    assert len({rows[i]["kind"] for i in range(24)}) == len(defects) > 2


def test_it_stops_early_and_keeps_the_best_epoch(
    small_shards: Path, tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    sample = len(shards.ids(small_shards, "train"))
    settings = {"steps": 100, "epochs": 20, "patience": 1, "batch_size": sample, "learning_rate": 1.0, "augment": False}
    own = params.model_copy(update={"sft": params.sft.model_copy(update=settings)})
    kept: dict[float, bytes] = {}
    trainer_class = sft_module._trainer_class()

    class Watched(trainer_class):  # type: ignore[misc, valid-type]
        def evaluate(self, *args: object, **kwargs: object) -> object:
            figures = super().evaluate(*args, **kwargs)
            weights = {n: p.detach().clone() for n, p in self.model.named_parameters() if "lora_B.default" in n}
            kept[figures["eval_loss"]] = torch.cat([w.flatten() for w in weights.values()]).numpy().tobytes()
            return figures

    monkeypatch.setattr(sft_module, "_trainer_class", lambda: Watched)
    sft(small_shards, tmp_path / "out", own)
    steps = len((tmp_path / "out" / "sft_curves.csv").read_text().splitlines()) - 1
    assert 2 <= len(kept) == steps < 20
    loaded = loading.load(tmp_path / "out", own.model)
    best = torch.cat([p.detach().flatten() for n, p in loaded.model.named_parameters() if "lora_B.default" in n])
    assert best.numpy().tobytes() == kept[min(kept)]
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")


STILL_FALLING = "its loss on validation was still falling"


@pytest.mark.parametrize(
    ("steps", "epochs", "limit", "early"),
    [
        (2, 20, "sft.steps", STILL_FALLING),
        (100, 2, "sft.epochs", STILL_FALLING),
        (1, 20, "sft.steps", "it has made no more than one pass over the images"),
    ],
)
def test_it_says_which_limit_ended_it_while_it_was_still_learning(
    small_shards: Path,
    tmp_path: Path,
    params: Params,
    capsys: pytest.CaptureFixture[str],
    steps: int,
    epochs: int,
    limit: str,
    early: str,
) -> None:
    sample = len(shards.ids(small_shards, "train"))
    settings = {"steps": steps, "epochs": epochs, "batch_size": sample, "learning_rate": 1e-3, "augment": False}
    changed = params.model_copy(update={"sft": params.sft.model_copy(update=settings)})
    sft(small_shards, tmp_path / "out", changed)
    taken = min(steps, epochs)
    assert f"after {taken} steps, which {limit} allows, {early}" in capsys.readouterr().out
    kind = verdict.kind_of(tmp_path / "out", changed.model)
    assert kind.cut == (taken if limit == "sft.steps" else None)


@pytest.mark.parametrize("labels", [["normal"], []])
def test_without_both_labels_in_validation_it_takes_all_steps(
    labels: list[str], small_shards: Path, tmp_path: Path, params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shards").mkdir()
    some = (r for r in shards.read(small_shards) if r.split != "validation" or r.label in labels)
    shards.write(some, tmp_path / "shards", shard_images=1000)
    settings = {"steps": 3, "batch_size": 100, "epochs": 3}
    sft(
        tmp_path / "shards",
        tmp_path / "out",
        params.model_copy(update={"sft": params.sft.model_copy(update=settings)}),
    )
    missing = "anomalous image" if labels else "anomalous and no normal image"
    assert f"the validation split has no {missing}, so that it takes all its steps" in capsys.readouterr().out
    assert len((tmp_path / "out" / "sft_curves.csv").read_text().splitlines()) == 4


def test_an_epoch_of_tiles_shows_all_of_them(small_shards: Path, tmp_path: Path, params: Params) -> None:
    images = len(shards.ids(small_shards, "train"))
    width = shards.table(small_shards, "train")["width"][0].as_py()
    tile = Tile(size=width * 2 // 3)
    settings = {"steps": 100, "epochs": 1, "batch_size": images, "patience": 0}
    own = params.model_copy(update={"sft": params.sft.model_copy(update=settings), "tile": tile})
    sft(small_shards, tmp_path / "out", own)
    steps = len((tmp_path / "out" / "sft_curves.csv").read_text().splitlines()) - 1
    assert steps == -(-len(examples.rows(small_shards, "train", tile)) // images) > 1


def test_a_training_on_other_shards_has_seen_both(small_shards: Path, tmp_path: Path) -> None:
    records = [record for record in shards.read(small_shards) if record.split != "test"]
    one, two, start = (tmp_path / name for name in ("one", "two", "start"))
    for folder in (one, two, start):
        folder.mkdir()
    shards.write(records[:5], one, 100)
    shards.write(records[5:9], two, 100)
    write_json({"data_fingerprint": shards.fingerprint(one)}, start / model_folder.DESCRIPTION)
    assert trained_on(one, start) is None  # an earlier adfm left no table

    first, second = trained_on(one), trained_on(two)
    assert first is not None and second is not None
    hashes.write(first, start / hashes.FILE)
    assert trained_on(two, start) == hashes.unite([first, second])
    assert trained_on(one, start) == first
    (start / hashes.FILE).write_bytes(b"")
    with pytest.raises(AdfmError, match="trained_on.parquet cannot be read"):
        trained_on(two, start)


def test_the_places_of_defects_teach_the_neck_of_a_tower(small_shards: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from tests.models import random_models

    folder = random_models.write("adfm_embedded", tmp_path / "base")

    settings = {"steps": 3, "batch_size": 4, "anomalous_share": 0.5}
    neck = {}
    for weight in (0.0, 0.3):
        params = Params.model_validate({"model": {"name": str(folder)}, "sft": settings | {"places_weight": weight}})
        sft(small_shards, tmp_path / str(weight), params)
        curves = (tmp_path / str(weight) / "sft_curves.csv").read_text().splitlines()
        assert ("places_loss" in curves[0]) == (weight > 0) and len(curves) == 4
        weights = load_file(tmp_path / str(weight) / "adapter_model.safetensors")
        neck[weight] = weights["base_model.model.model.visual.place.weight"]
        assert loading.load(tmp_path / str(weight), params.model).family == "adfm_embedded"
    assert not torch.equal(neck[0.0], neck[0.3])
