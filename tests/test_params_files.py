"""The overlays in params/: they load, are small, and give the reason of each setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from adfm.models import adapters, hardware
from adfm.params import Params, flat, load, merged

ROOT = Path(__file__).parents[1]
BASE = ROOT / "params.yaml"
OVERLAYS = sorted((ROOT / "params").glob("*.yaml"))
PUBLISHED = ROOT / "params" / "published-qwen2.5-vl-7b.yaml"

# As AD-FM's script has them, or ms-swift 3.4.0.dev0 where it sets nothing.
AS_PUBLISHED = {
    "convert.layout": "mmad",
    "split.redivide": True,
    "split.validation": 0.0,
    "split.test": 0.8,
    "split.near_duplicates": True,
    "model.name": "Qwen/Qwen2.5-VL-7B-Instruct",
    "model.max_pixels": 262144,
    "model.dtype": "bfloat16",
    "model.quantization": None,
    "lora.r": 64,
    "lora.alpha": 128,
    "lora.dropout": 0.05,
    "lora.target_modules": "all-linear",
    "lora.vision": False,
    "sft.steps": 0,
    "train.profile": "paper",
    "train.weights.format": 1.0,
    "train.weights.classification": 1.0,
    "train.weights.localization": 1.0,
    "train.aggregation": "sum_then_normalize",
    "train.steps": 502,
    "train.prompts_per_step": 50,
    "train.num_generations": 6,
    "train.learning_rate": 1e-5,
    "train.schedule": "cosine",
    "train.warmup_ratio": 0.001,
    "train.temperature": 0.9,
    "train.top_p": 0.9,
    "train.top_k": 50,
    "train.max_completion_length": 512,
    "train.beta": 0.04,
    "train.epsilon": 0.2,
    "train.scale_rewards": "group",
    "train.weight_decay": 0.1,
    "train.adam_beta1": 0.9,
    "train.adam_beta2": 0.95,
    "train.max_grad_norm": 1.0,
    "train.optimizer": "adamw_torch_fused",
    "train.liger": True,
    "train.dynamic_sampling": 0,
    "train.uncertainty_sampling": False,
}


@pytest.mark.parametrize("file", OVERLAYS, ids=lambda file: file.stem)
def test_an_overlay_is_small_and_gives_a_reason_for_each_setting(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) <= 120
    for line in lines:
        content, _, reason = line.partition(" # ")
        heads_a_section = content.rstrip().endswith(":")
        assert line.startswith("#") or heads_a_section or len(reason) > 5, line
    assert flat(load([BASE, file])) != flat(load(BASE))


@pytest.mark.parametrize("file", OVERLAYS, ids=lambda file: file.stem)
def test_an_overlay_is_fit_to_train_with(file: Path) -> None:
    params = load([BASE, file])
    embedded = params.model.name.startswith("embedded://")
    assert embedded or len(params.model.revision or "") == 40
    assert f"PARAMS=params/{file.name}" in file.read_text()
    assert params.evaluate.max_new_tokens >= params.train.max_completion_length
    for processes in (1, 2):
        hardware.batch_split(params.train, processes)


@pytest.mark.parametrize("file", OVERLAYS, ids=lambda file: file.stem)
def test_dvc_reads_the_same_from_the_merged_file(file: Path) -> None:
    from dvc.utils.serialize import parse_yaml

    text = merged([BASE, file])
    read = parse_yaml(text, "params.yaml")
    expected = load([BASE, file])
    assert Params.model_validate(read) == expected
    comments = [line.partition(" # ")[2] for line in BASE.read_text().splitlines()]
    assert [line.partition(" # ")[2] for line in text.splitlines()] == comments


def test_the_published_run_is_as_published() -> None:
    params = flat(load([BASE, PUBLISHED]))
    assert {key: params[key] for key in AS_PUBLISHED} == AS_PUBLISHED
    images, epochs = 1673, 15
    assert params["train.steps"] == round(images * epochs / AS_PUBLISHED["train.prompts_per_step"])


@pytest.fixture(scope="module")
def network() -> Any:
    """Qwen2.5-VL-7B without memory for its weights: transformers' defaults are its sizes, but for the vocabulary."""
    config = AutoConfig.for_model("qwen2_5_vl")
    text = {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    text |= {"num_attention_heads": 28, "num_key_value_heads": 4}
    config.text_config.update(text)
    config.vision_config.update({"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584})
    return hardware.meta_model(config)


def test_the_published_adapter_leaves_vision_tower_and_merger_alone(network: Any) -> None:
    lora = load([BASE, PUBLISHED]).lora
    assert adapters.weights(network, lora) == 161_480_704
    assert adapters.weights(network, lora.model_copy(update={"vision": True})) == 207_298_560
    merger = [n for n, m in network.named_modules() if "merger" in n and isinstance(m, torch.nn.Linear)]
    assert merger and all(".visual." in name for name in merger)
