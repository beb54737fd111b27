"""Qwen2.5-VL takes the same path as the embedded Qwen3-VL, with its own coordinates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from adfm.errors import AdfmError
from adfm.evaluation.inference import predict
from adfm.models import loading, tiny
from adfm.params import Params
from adfm.training import base, examples, grpo
from adfm.training.warmup import warmup


@pytest.fixture(scope="module")
def qwen2_5_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of a hundred thousand weights, saved as a real one is."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("qwen2_5_vl")
    processor = tiny.processor(tiny.tokenizer(base.corpus()))
    number: Any = processor.tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(processor.tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]},
        "eos_token_id": number("<|im_end|>"),
        "pad_token_id": number("<|endoftext|>"),
        "bos_token_id": None,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": tiny.PATCH,
        "spatial_merge_size": tiny.MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "window_size": 4 * tiny.PATCH * tiny.MERGE,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = text["eos_token_id"]
    model.generation_config.pad_token_id = text["pad_token_id"]
    model.save_pretrained(folder)
    loading.processor_class("qwen2_5_vl")(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        chat_template=processor.chat_template,
    ).save_pretrained(folder)
    return folder


def test_the_whole_path(qwen2_5_vl: Path, small_shards: Path, tmp_path: Path, params: Params) -> None:
    settings = params.model_dump(by_alias=True)
    settings["model"]["name"] = str(qwen2_5_vl)
    settings["train"]["steps"] = 1
    own = Params.model_validate(settings)
    warmup(small_shards, tmp_path / "warmup", own)
    grpo.train(small_shards, tmp_path / "warmup", tmp_path / "trained", own)
    assert json.loads((tmp_path / "trained" / "adfm.json").read_text())["family"] == "qwen2_5_vl"
    table = predict(tmp_path / "trained", small_shards, own, "trained")
    assert len(table) and table["completion"].notna().all()


def test_a_frozen_vision_tower_and_the_other_attention_take_the_same_path(
    qwen2_5_vl: Path, small_shards: Path, tmp_path: Path, params: Params
) -> None:
    from safetensors import safe_open

    settings = params.model_dump(by_alias=True)
    settings["model"] |= {"name": str(qwen2_5_vl), "attention": "eager", "dtype": "bfloat16"}
    settings["lora"]["vision"] = False
    settings["train"] |= {"steps": 1, "gradient_checkpointing": True, "micro_batch": 4}
    own = Params.model_validate(settings)
    warmup(small_shards, tmp_path / "warmup", own)
    grpo.train(small_shards, tmp_path / "warmup", tmp_path / "trained", own)
    with safe_open(tmp_path / "trained" / "adapter_model.safetensors", framework="np") as adapter:
        names = list(adapter.keys())
    assert names and not any("visual" in name for name in names)
    assert loading.load(tmp_path / "trained", own.model).model.config._attn_implementation == "eager"


def test_an_adapter_on_nothing_is_refused(qwen2_5_vl: Path, small_shards: Path, tmp_path: Path) -> None:
    for targets in (["q_proj", "no_proj"], "no_such_.*"):
        own = Params.model_validate({"model": {"name": str(qwen2_5_vl)}, "lora": {"target_modules": targets}})
        with pytest.raises(AdfmError, match=r"lora\.target_modules: 'no_\S+' matches no module"):
            warmup(small_shards, tmp_path / "warmup", own)


def test_a_model_without_a_vision_tower_or_with_the_processor_of_another_is_refused(
    qwen2_5_vl: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    blind = shutil.copytree(qwen2_5_vl, tmp_path / "blind")
    weights = load_file(blind / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "visual." not in k}, blind / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdfmError, match="no weights of a vision tower"):
        loading.resolve(str(blind), None)
    other = shutil.copytree(qwen2_5_vl, tmp_path / "other")
    file = other / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["image_processor"]["patch_size"] += 2
    file.write_text(json.dumps(settings))
    with pytest.raises(AdfmError, match=f"pixels of a patch {tiny.PATCH + 2}, the model's {tiny.PATCH}"):
        loading.load_processor(str(other), Params().model)


def test_an_engine_with_its_own_processor_gets_images_of_the_size_that_the_model_sees(
    qwen2_5_vl: Path, small_shards: Path, tmp_path: Path
) -> None:
    loaded = loading.load(str(qwen2_5_vl), Params().model)
    data = examples.draw(small_shards, loaded, 4, anomalous_share=0.5, seed=0, cache=tmp_path)
    rows = examples.as_seen(data, loaded.processor)
    assert [list(row["image"].size) for row in rows] == data["frame"][:]
    assert rows[0]["label"] == data[0]["label"]


def test_boxes_are_pixels_of_the_resized_image(qwen2_5_vl: Path, small_shards: Path, tmp_path: Path) -> None:
    loaded = loading.load(str(qwen2_5_vl), Params().model)
    data = examples.draw(small_shards, loaded, 4, anomalous_share=0.5, seed=0, cache=tmp_path)
    assert [row["frame"] for row in data] == [[tiny.SIDE, tiny.SIDE]] * 4
    assert "pixels" in data[0]["prompt"][1]["content"]
