"""Model folders as the hub has them, at tiny shapes: flat or nested config, old tensor names, processor files apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from experiments import tiny_model
from tests.models.random_models import MERGE, PATCH, SIDE, TOWER

_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "hidden_act": "silu",
}


def write(folder: Path, family: str, tied: bool = False, shards: int = 1) -> Path:
    """Write a random model of `family`, `qwen2_5_vl` or `qwen3_vl`, to `folder`, its weights in one file or several."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForImageTextToText

    from experiments import tiny_base

    folder.mkdir(parents=True, exist_ok=True)
    processor = tiny_model.processor(tiny_model.tokenizer(tiny_base.corpus()))
    processor.tokenizer.save_pretrained(folder)
    config = _config(family, processor.tokenizer, tied)
    name = "Qwen2_5_VLProcessor" if family == "qwen2_5_vl" else "Qwen3VLProcessor"
    images = {
        **{"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": MERGE, "processor_class": name},
        **{"size": {"shortest_edge": SIDE**2, "longest_edge": SIDE**2}},
        **{"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "image_processor_type": "Qwen2VLImageProcessor"},
    }
    generation = {"eos_token_id": config["eos_token_id"], "pad_token_id": processor.tokenizer.pad_token_id}
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    for file, content in {
        "config.json": config,
        "preprocessor_config.json": images,
        "generation_config.json": generation | {"repetition_penalty": 1.05, "do_sample": True, "temperature": 0.7},
        "chat_template.json": {"chat_template": processor.chat_template},
    }.items():
        (folder / file).write_text(json.dumps(content))
    torch.manual_seed(0)
    loaded = AutoConfig.from_pretrained(folder)
    weights = {
        _hub_name(key, family): value.clone().contiguous()
        for key, value in AutoModelForImageTextToText.from_config(loaded).state_dict().items()
        if not (tied and key == "lm_head.weight")
    }
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(weights)
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({key: weights[key] for key in names[shard::shards]}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names[shard::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def _hub_name(key: str, family: str) -> str:
    if family == "qwen3_vl":
        return key
    return key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def _config(family: str, tokenizer: Any, tied: bool) -> dict[str, Any]:
    number = tokenizer.convert_tokens_to_ids
    ids = {
        "image_token_id": number("<|image_pad|>"),
        "video_token_id": number("<|video_pad|>"),
        "vision_start_token_id": number("<|vision_start|>"),
        "vision_end_token_id": number("<|vision_end|>"),
        "eos_token_id": number("<|im_end|>"),
        "tie_word_embeddings": tied,
    }
    text = _TEXT | {"vocab_size": len(tokenizer), "eos_token_id": ids["eos_token_id"], "use_cache": True}
    if family == "qwen2_5_vl":  # the text model's settings lie beside the vision tower's, not in a section of their own
        vision = TOWER | {"window_size": 4 * PATCH * MERGE, "fullatt_block_indexes": [1], "in_chans": 3}
        rope = {"rope_theta": 100.0, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
        architecture = "Qwen2_5_VLForConditionalGeneration"
        return {**text, **rope, **ids, "vision_config": vision, "model_type": family, "architectures": [architecture]}
    vision = TOWER | {
        "num_position_embeddings": (SIDE // PATCH) ** 2,
        "deepstack_visual_indexes": [0],
        "model_type": "qwen3_vl",
    }
    scaling = {"mrope_interleaved": True, "mrope_section": [2, 3, 3], "rope_type": "default"}
    text |= {"head_dim": 16, "rope_theta": 100.0, "rope_scaling": scaling, "model_type": "qwen3_vl_text"}
    sections = {"text_config": text, "vision_config": vision}
    return {**sections, **ids, "model_type": family, "architectures": ["Qwen3VLForConditionalGeneration"]}
