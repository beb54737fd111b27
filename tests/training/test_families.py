"""Qwen2.5-VL takes the same path as the embedded Qwen3-VL, with its own coordinates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

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


def test_boxes_are_pixels_of_the_resized_image(qwen2_5_vl: Path, small_shards: Path, tmp_path: Path) -> None:
    loaded = loading.load(str(qwen2_5_vl), Params().model)
    data = examples.draw(small_shards, loaded, 4, anomalous_share=0.5, seed=0, cache=tmp_path)
    assert [row["frame"] for row in data] == [[tiny.SIDE, tiny.SIDE]] * 4
    assert "pixels" in data[0]["prompt"][1]["content"]
