"""A model of every family with some ten thousand random weights, in a folder as the family's models are saved.

Every one has the embedded model's vocabulary, which with a real tokenizer would be nearly all of the model.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adfm.models import families
from experiments import tiny_base, tiny_model

SIDE, PATCH, MERGE = 96, 12, 2  # of Qwen's images: pixels of a side and of a patch, patches merged
TILE = 48  # pixels of InternVL's tile: 4 x 4 patches, of which 2 x 2 tokens are made
LANGUAGE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": None,
}
TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
}


def write(family: str, folder: Path) -> Path:
    """Write a model of `family` to `folder`."""
    model, processor = BUILDERS[family]()
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {**LANGUAGE, "vocab_size": len(tokenizer), **ends, **more}


def _qwen(family: str, template: str) -> tuple[Any, dict[str, int]]:
    embedded = tiny_model.processor(tiny_model.tokenizer(tiny_base.corpus()), SIDE)
    embedded.image_processor.patch_size = PATCH
    text = (importlib.resources.files("trl") / "chat_templates" / template).read_text()
    processor = families.processor_class(family)(embedded.image_processor, embedded.tokenizer, chat_template=text)
    number = embedded.tokenizer.convert_tokens_to_ids
    return processor, {
        "image_token_id": number("<|image_pad|>"),
        "video_token_id": number("<|video_pad|>"),
        "vision_start_token_id": number("<|vision_start|>"),
        "vision_end_token_id": number("<|vision_end|>"),
    }


def _qwen2_5_vl() -> tuple[Any, Any]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    processor, numbers = _qwen("qwen2_5_vl", "qwen2_5_vl.jinja")
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]}
    windows = {"window_size": 4 * PATCH * MERGE, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(
        text_config=_text(processor.tokenizer, rope_parameters=rope), vision_config={**TOWER, **windows}, **numbers
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def _qwen3_vl() -> tuple[Any, Any]:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    processor, numbers = _qwen("qwen3_vl", "qwen3_vl.jinja")
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    tower = {**TOWER, "num_position_embeddings": (SIDE // PATCH) ** 2, "deepstack_visual_indexes": [0]}
    text = _text(processor.tokenizer, rope_parameters=rope, head_dim=16)
    config = Qwen3VLConfig(text_config=text, vision_config=tower, **numbers)
    return Qwen3VLForConditionalGeneration(config), processor


def _qwen3_5() -> tuple[Any, Any]:
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    processor, numbers = _qwen("qwen3_5", "qwen3_5_think.jinja")
    rope = {
        "rope_type": "default",
        "rope_theta": 100.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 3, 3],
        "mrope_interleaved": True,
    }
    linear = {
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "layer_types": ["linear_attention", "full_attention"],
    }
    text = _text(processor.tokenizer, rope_parameters=rope, head_dim=32, **linear)
    tower = {**TOWER, "num_position_embeddings": (SIDE // PATCH) ** 2}
    config = Qwen3_5Config(text_config=text, vision_config=tower, **numbers)
    return Qwen3_5ForConditionalGeneration(config), processor


def _internvl() -> tuple[Any, Any]:
    from transformers import (
        GotOcr2ImageProcessorPil,
        InternVLConfig,
        InternVLForConditionalGeneration,
        PreTrainedTokenizerFast,
    )

    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_model.tokenizer(tiny_base.corpus()).backend_tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=named,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    turns = "{% for m in messages %}<|im_start|>{{ m.role + '\\n' }}{% for c in m.content %}"
    parts = "{% if c.type == 'image' %}<IMG_CONTEXT>\n{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n"
    ending = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    processor = families.processor_class("internvl")(
        GotOcr2ImageProcessorPil(size={"height": TILE, "width": TILE}, max_patches=4),
        tokenizer,
        image_seq_length=4,
        chat_template=turns + parts + ending,
    )
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [TILE, TILE],
        "patch_size": [PATCH, PATCH],
    }
    config = InternVLConfig(
        text_config=_text(tokenizer, model_type="qwen3", head_dim=16),
        vision_config=tower,
        image_token_id=processor.image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration(config), processor


def _adfm_embedded() -> tuple[Any, Any]:
    processor = tiny_model.processor(tiny_model.tokenizer(tiny_base.corpus()), SIDE)
    return tiny_model.model(processor.tokenizer, seed=0), processor


BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_5": _qwen3_5,
    "adfm_embedded": _adfm_embedded,
    "internvl": _internvl,
}
