"""The table of model families; `tests/training/test_families.py` runs a model of each."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import adfm.method
from adfm.errors import AdfmError
from adfm.method.coordinates import Frame
from adfm.models import adapters, families, hardware, loading
from adfm.models.families import qwen3_vl, tiles
from adfm.params import Params
from tests.models import random_models


def test_every_family_is_run_with_random_weights() -> None:
    assert list(random_models.BUILDERS) == list(families.FAMILIES)


def test_the_method_knows_no_family() -> None:
    text = "".join(file.read_text() for file in Path(adfm.method.__path__[0]).glob("*.py"))
    assert not [name for name in families.FAMILIES if name in text]
    assert "adfm.models" not in "".join(line for line in text.splitlines() if "import" in line)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A model of a family that is added to the table: Qwen3-VL's classes under another `model_type`."""
    from transformers import AutoConfig, AutoModelForImageTextToText, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    class MadeUpConfig(Qwen3VLConfig):
        model_type = "made_up"

    class MadeUp(Qwen3VLForConditionalGeneration):
        config_class = MadeUpConfig

    AutoConfig.register("made_up", MadeUpConfig, exist_ok=True)
    AutoModelForImageTextToText.register(MadeUpConfig, MadeUp, exist_ok=True)
    family = qwen3_vl.FAMILY._replace(coordinates="pixels", modules_to_save=("lm_head",), vllm=False)
    monkeypatch.setitem(families.FAMILIES, "made_up", family)
    random_models.write("qwen3_vl", tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "made_up"}))
    return tmp_path


def test_a_family_is_a_line_in_the_table(made_up: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = Params.model_validate({"model": {"name": str(made_up)}, "lora": {"vision": False}, "train": {"vllm": 0.5}})
    loaded = loading.load(made_up, params.model)
    assert loaded.family == "made_up" and loaded.model.config.model_type == "made_up"
    assert "in pixels of the image" in loaded.prompt[1]["content"]
    assert families.get("made_up").frame(loaded.processor, 192, 96).width != 1000
    adapted = adapters.attach(loaded.model, params.lora)
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert any("lm_head" in name for name in trained) and not any("visual" in name for name in trained)
    assert hardware.memory(hardware.meta_model(made_up), params)["adapter"] > 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    assert "adfm does not support vLLM for" in hardware.missing_requirements(params)[0]


def test_an_unknown_family_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(AdfmError, match=r"'llava'.*qwen3_vl \(Qwen3-VL\).*adfm/models/families/__init__.py"):
        families.get("llava")


@pytest.mark.parametrize(
    ("family", "name", "sees"),
    [
        ("qwen2_5_vl", "visual.blocks.0.attn.qkv.weight", True),
        ("qwen2_5_vl", "base_model.model.model.visual.merger.mlp.0.lora_A.default.weight", True),
        ("qwen2_5_vl", "model.layers.0.self_attn.q_proj.weight", False),
        ("qwen3_vl", "model.language_model.layers.0.visual_proj.weight", False),
        ("internvl", "model.vision_tower.encoder.layer.0.attention.q_proj", True),
        ("internvl", "multi_modal_projector.linear_1.weight", True),
        ("internvl", "language_model.model.layers.0.mlp.up_proj.weight", False),
    ],
)
def test_what_sees_is_known_by_its_name_to_us_and_to_peft(family: str, name: str, sees: bool) -> None:
    import re

    known = families.get(family)
    assert known.is_vision(name) == sees
    assert bool(re.fullmatch(known.vision_pattern, name)) == sees


@given(st.integers(20, 300), st.integers(20, 300), st.integers(1, 12))
@settings(deadline=None, max_examples=30)
def test_tiles_are_those_that_the_processor_makes(width: int, height: int, limit: int) -> None:
    from transformers import GotOcr2ImageProcessorPil

    images = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=True)
    tiles.set_max_pixels(images, limit * 32 * 32)
    assert (images.min_patches, images.max_patches) == (1, limit)
    assert tiles.max_pixels(images.to_dict()) == limit * 32 * 32
    made = images(np.zeros((height, width, 3), np.uint8), return_tensors="np", input_data_format="channels_last")
    columns, rows = (side // 32 for side in tiles.resized(images, width, height))
    count = columns * rows
    assert count <= limit and made["num_patches"][0] == count + (count > 1)


def test_less_than_a_tile_is_refused() -> None:
    images = SimpleNamespace(size={"height": 448, "width": 448}, min_patches=1, max_patches=12)
    with pytest.raises(AdfmError, match=r"model\.max_pixels: .* set 200704 or more"):
        tiles.set_max_pixels(images, 447 * 448)


@given(st.integers(20, 300), st.integers(20, 300), st.sampled_from([(14, 2), (16, 2), (8, 1)]), st.integers(1, 6))
@settings(deadline=None, max_examples=30)
def test_qwen2_5_frame_is_the_image_that_its_processor_makes(
    width: int, height: int, patch: tuple[int, int], limit: int
) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    patch_size, merge_size = patch
    smallest, largest = 32 * 32 * limit, 64 * 64 * limit
    images = Qwen2VLImageProcessorPil(
        patch_size=patch_size, merge_size=merge_size, size={"shortest_edge": smallest, "longest_edge": largest}
    )
    made = images(np.zeros((height, width, 3), np.uint8), return_tensors="np", input_data_format="channels_last")
    _, rows, columns = made["image_grid_thw"][0]
    frame = families.get("qwen2_5_vl").frame(SimpleNamespace(image_processor=images), width, height)
    assert frame == Frame(columns * patch_size, rows * patch_size)


def test_published_frame() -> None:
    images = SimpleNamespace(patch_size=14, merge_size=2, size={"shortest_edge": 3136, "longest_edge": 262144})
    assert families.get("qwen2_5_vl").frame(SimpleNamespace(image_processor=images), 1024, 1024) == Frame(504, 504)


def test_qwen3_frame_does_not_depend_on_the_image() -> None:
    assert families.get("qwen3_vl").frame(None, 37, 4000) == Frame(1000, 1000)


def test_a_sliver_is_named() -> None:
    images = SimpleNamespace(patch_size=14, merge_size=2, size={"shortest_edge": 3136, "longest_edge": 262144})
    with pytest.raises(AdfmError, match="4x4000"):
        families.get("qwen2_5_vl").frame(SimpleNamespace(image_processor=images), 4, 4000)
