from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from adfm import cli
from adfm.data import hashes, shards
from adfm.errors import AdfmError
from adfm.files import write_json
from adfm.models import loading
from adfm.params import Evaluate, Params
from adfm.training.warmup import trained_on, warmup


def test_no_steps_change_nothing(small_shards: Path, tmp_path: Path) -> None:
    from PIL import Image

    from adfm.evaluation.inference import answer

    warmup(small_shards, tmp_path / "warmup", Params.model_validate({"warmup": {"steps": 0}}))
    params = Params()
    images = [Image.new("RGB", (128, 128), colour) for colour in ("gray", "white", "navy")]
    base = answer(loading.load(params.model.name, params.model), images, Evaluate(max_new_tokens=40))
    warmed = answer(loading.load(tmp_path / "warmup", params.model), images, Evaluate(max_new_tokens=40))
    assert base[0] == warmed[0]


def test_warmup_moves_the_adapter_and_says_where_it_comes_from(
    small_shards: Path, tmp_path: Path, params: Params
) -> None:
    from safetensors.torch import load_file

    warmup(small_shards, tmp_path / "warmup", params)
    weights = load_file(tmp_path / "warmup" / "adapter_model.safetensors")
    assert any(torch.count_nonzero(w) for name, w in weights.items() if "lora_B" in name)
    description = json.loads((tmp_path / "warmup" / "adfm.json").read_text())
    assert description["grey_range"] is None  # the shards have no grey images of more than 8 bits
    assert description["base"] == {"name": "embedded://tiny-base", "revision": None}
    assert description["params"]["warmup"]["steps"] == 2
    assert len((tmp_path / "warmup" / "warmup_curves.csv").read_text().splitlines()) == 3
    assert not (tmp_path / "warmup" / "cache").exists()
    seen = hashes.of_model(tmp_path / "warmup")
    assert seen is not None
    assert seen["id"].to_pylist() == sorted(shards.ids(small_shards, "train") + shards.ids(small_shards, "validation"))


@pytest.mark.parametrize("verb", [["warmup", "shards"], ["train", "shards", "model"]])
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
        warmup(
            small_shards, tmp_path / "out", Params.model_validate({"seed": seed, "warmup": {"steps": 0}}), force=True
        )
    assert json.loads((tmp_path / "out" / "adfm.json").read_text())["params"]["seed"] == 2


def test_no_place_is_made_up_where_only_the_label_is_known(
    label_shards: Path, tmp_path: Path, params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    warmup(label_shards, tmp_path / "stages", params)
    printed = capsys.readouterr().out
    assert "anomalous training images have no boxes and are left out" in printed
    assert "no step is taken; GRPO starts from the base model" in printed
    assert len((tmp_path / "stages" / "warmup_curves.csv").read_text().splitlines()) == 1
    plain = params.model_copy(update={"warmup": params.warmup.model_copy(update={"stages": False})})
    warmup(label_shards, tmp_path / "plain", plain)
    assert len((tmp_path / "plain" / "warmup_curves.csv").read_text().splitlines()) == 3
    assert "left out" not in capsys.readouterr().out


def test_a_training_on_other_shards_has_seen_both(small_shards: Path, tmp_path: Path) -> None:
    records = [record for record in shards.read(small_shards) if record.split != "test"]
    one, two, start = (tmp_path / name for name in ("one", "two", "start"))
    for folder in (one, two, start):
        folder.mkdir()
    shards.write(records[:5], one, 100)
    shards.write(records[5:9], two, 100)
    write_json({"data_fingerprint": shards.fingerprint(one)}, start / loading.DESCRIPTION)
    assert trained_on(one, start) is None  # an earlier adfm left no table

    first, second = trained_on(one), trained_on(two)
    assert first is not None and second is not None
    hashes.write(first, start / hashes.FILE)
    assert trained_on(two, start) == hashes.unite([first, second])
    assert trained_on(one, start) == first
    (start / hashes.FILE).write_bytes(b"")
    with pytest.raises(AdfmError, match="trained_on.parquet cannot be read"):
        trained_on(two, start)
