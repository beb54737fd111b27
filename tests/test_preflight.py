"""Checks before a run list everything that is missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adfm import preflight, tracking
from adfm.errors import AdfmError
from adfm.models import adapters, loading
from adfm.params import Lora, Model, Params, load
from adfm.training.sft import sft
from tests import hub


@pytest.fixture(autouse=True)
def _elsewhere(store: Path) -> None:
    """The current folder holds nothing but an empty store of MLflow."""


def test_what_is_written_does_not_depend_on_the_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preflight.check(Params(), tmp_path / "reports" / "check.json")
    first = (tmp_path / "reports" / "check.json").read_bytes()
    preflight.check(Params(seed=1), tmp_path / "reports" / "check.json")
    assert (tmp_path / "reports" / "check.json").read_bytes() == first
    printed = capsys.readouterr().out
    assert "tiny" in printed
    assert (
        printed.count("\nkind      the embedded model (") == 2
        and "\nlarger    Qwen/Qwen2.5-VL-3B-Instruct (" in printed
    )
    assert "GiB to train it on a GPU, computed from tensor sizes, not measured" in printed
    assert str(tmp_path / "mlflow.db") in printed


def test_everything_that_is_missing_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(preflight, "FREE", 2**32)
    with pytest.raises(AdfmError) as caught:
        preflight.check(Params(model=Model(name="/no/such/model")), tmp_path / "check.json")
    for what in ("/no/such/model", "http://127.0.0.1:9", "on its disk"):
        assert what in str(caught.value)
    assert not (tmp_path / "check.json").exists()


def test_a_run_of_the_platform_that_is_elsewhere_is_said_before_work_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("0" * 32, "../no id"):
        monkeypatch.setenv("MLFLOW_RUN_ID", other)
        with pytest.raises(AdfmError, match=f"does not have the run {other} that MLFLOW_RUN_ID names"):
            preflight.check(Params(), tmp_path / "check.json")


def test_the_login_in_the_address_of_mlflow_is_not_printed(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "configure", lambda: "https://someone:hid@den@mlflow.example.com")
    preflight.check(Params(), tmp_path / "check.json")
    assert "tracking  https://mlflow.example.com\n" in capsys.readouterr().out


def test_a_batch_that_does_not_divide_among_the_gpus_and_an_adapter_on_nothing_are_said() -> None:
    params = load(None, ["train.prompts_per_step=3", "train.num_generations=2", "lora.target_modules=[no_proj]"])
    with pytest.raises(AdfmError) as caught:
        preflight.check(params, gpus=4)
    for what in ("1 in each of 4 processes does not divide the 6 completions", "'no_proj' matches no module"):
        assert what in str(caught.value)


def test_a_deleted_experiment_is_refused_before_a_run_begins(store: Path) -> None:
    client = tracking.client()
    client.delete_experiment(client.create_experiment("lines"))
    with pytest.raises(AdfmError, match="experiment 'lines' was deleted; restore it"):
        preflight.check(load(None, ["mlflow.experiment=lines"]))
    preflight.check(load(None, ["mlflow.experiment=others"]))
    assert client.get_experiment_by_name("others") is None  # a check makes nothing


FAMILIES = ("qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def hub_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """A tiny model of each family as the hub has it, its weights in one file and in three."""
    root = tmp_path_factory.mktemp("hub")
    return {
        (family, shards): hub.write(root / f"{family}-{shards}", family, tied=shards == 1, shards=shards)
        for family in FAMILIES
        for shards in (1, 3)
    }


def _weights(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def _json(file: str, **changed: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changed))

    return change


def _text(file: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / file).write_text(text)

    return change


def _without(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def _blind(folder: Path) -> None:
    _weights(folder, lambda weights: {name: weight for name, weight in weights.items() if "visual." not in name})


def _one_missing(folder: Path) -> None:
    _weights(
        folder, lambda weights: {name: w for name, w in weights.items() if not name.endswith("1.mlp.up_proj.weight")}
    )


def _one_narrow(folder: Path) -> None:
    _weights(
        folder, lambda weights: {n: w[:8].clone() if n.endswith("q_proj.weight") else w for n, w in weights.items()}
    )


def _half(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def _tokens_in_another_order(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    ids = {"<|image_pad|>": "<|video_pad|>", "<|video_pad|>": "<|image_pad|>"}
    for token in content["added_tokens"]:
        token["content"] = ids.get(token["content"], token["content"])
    vocabulary = content["model"]["vocab"]
    image, video = vocabulary["<|image_pad|>"], vocabulary["<|video_pad|>"]
    vocabulary |= {"<|image_pad|>": video, "<|video_pad|>": image}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def _a_larger_tokenizer(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens([f"<more {number}>" for number in range(5)])
    tokenizer.save_pretrained(folder)


def _letters_alike(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "B"}, "content": "A"}
    (folder / "tokenizer.json").write_text(json.dumps(content))


FAULTS: dict[str, tuple[int, Callable[[Path], None], str]] = {
    "no vision tower": (1, _blind, "has no weights of a vision tower"),
    "a weight missing": (1, _one_missing, "weights are missing: model.language_model.layers.1.mlp.up_proj.weight"),
    "a weight too narrow": (1, _one_narrow, "weights have another shape than config.json says: model."),
    "a file half written": (1, _half, "is not a safetensors file, or is incomplete"),
    "an empty file": (1, _text("model.safetensors", ""), "is not a safetensors file, or is incomplete"),
    "a pointer of Git LFS": (1, _text("model.safetensors", "version https://git-lfs"), "is not a safetensors file"),
    "no weights": (1, _without("model.safetensors"), "holds no model weights"),
    "a shard missing": (3, _without("model-00002-of-00003.safetensors"), "transformers cannot load"),
    "no index": (3, _without("model.safetensors.index.json"), "no file named model.safetensors"),
    "half an index": (3, _text("model.safetensors.index.json", '{"weight_map":'), "transformers cannot load"),
    "no config": (1, _without("config.json"), "holds no model weights (config.json"),
    "half a config": (1, _text("config.json", "{"), "config.json cannot be read"),
    "a config that is a list": (1, _text("config.json", "[]"), "does not hold the settings of a model"),
    "an unknown architecture": (1, _json("config.json", model_type="foo_vl"), "'foo_vl' model"),
    "a config with a word": (1, _json("config.json", vision_config={"depth": "x"}), "expected int, got str"),
    "no image processor": (1, _without("preprocessor_config.json"), "holds no whole processor"),
    "half an image processor": (1, _text("preprocessor_config.json", "{"), "holds no whole processor"),
    "another image processor": (1, _json("preprocessor_config.json", patch_size=14), "the processor of another model"),
    "no tokenizer": (1, _without("tokenizer.json"), "holds no whole processor"),
    "another tokenizer": (1, _tokens_in_another_order, "has the processor of another model (number of the image token"),
    "a larger tokenizer": (1, _a_larger_tokenizer, "has a tokenizer of"),
    "letters alike": (1, _letters_alike, "cannot be told apart"),
    "no chat template": (1, _without("chat_template.json"), "has no chat template"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_that_cannot_be_trained_is_refused_in_one_sentence_and_by_training_too(
    hub_folders: dict[tuple[str, int], Path], family: str, fault: str, tmp_path: Path
) -> None:
    shards, spoil, reason = FAULTS[fault]
    folder = Path(shutil.copytree(hub_folders[family, shards], tmp_path / "model"))
    spoil(folder)
    params = Params(model=Model(name=str(folder)))
    with pytest.raises(AdfmError) as caught:
        preflight.check(params, tmp_path / "check.json")
    message = str(caught.value)
    assert reason in message
    assert "\n" not in message and ("model.name: " in message or "the model's tokenizer" in message)
    with pytest.raises(AdfmError) as again:
        sft(tmp_path / "shards", tmp_path / "sft", params)
    assert str(again.value) == message


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "setting",
    ["lora.target_modules=all-linear", "lora.target_modules=[q_proj, proj]", "lora.vision=false"],
)
def test_what_check_passes_training_starts_with(
    hub_folders: dict[tuple[str, int], Path],
    family: str,
    shards: int,
    setting: str,
    small_shards: Path,
    tmp_path: Path,
) -> None:
    folder = hub_folders[family, shards]
    if setting == "lora.vision=false":  # a model may be without it
        folder = Path(shutil.copytree(folder, tmp_path / "model"))
        (folder / "generation_config.json").unlink()
    params = load(None, [f"model.name={folder}", "sft.steps=1", "sft.batch_size=2", setting])
    preflight.check(params)
    sft(small_shards, tmp_path / "sft", params)
    assert (tmp_path / "sft" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("family", FAMILIES)
def test_training_starts_with_all_names_at_once_that_check_passes(
    hub_folders: dict[tuple[str, int], Path], family: str, small_shards: Path, tmp_path: Path
) -> None:
    folder = hub_folders[family, 3]
    network = loading.outline(folder)
    names = {name.split(".")[-1] for name, _ in network.named_modules() if name}
    passed = sorted(name for name in names if not adapters.problems(network, Lora(target_modules=[name])))
    assert {"q_proj", "embed_tokens", "proj"} <= set(passed)
    settings = [f"model.name={folder}", "sft.steps=1", "sft.batch_size=2", f"lora.target_modules={passed}"]
    sft(small_shards, tmp_path / "sft", load(None, settings))


def test_it_is_trl_that_refuses_an_adapter_on_the_output_head(
    hub_folders: dict[tuple[str, int], Path], small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it takes one some day, `adapters.problems` need not refuse it any more."""
    monkeypatch.setattr(adapters, "problems", lambda network, settings: [])
    folder = hub_folders["qwen3_vl", 3]
    params = load(None, [f"model.name={folder}", "sft.steps=1", "lora.target_modules=[lm_head]"])
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        sft(small_shards, tmp_path / "sft", params)
