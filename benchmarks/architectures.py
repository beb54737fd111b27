"""The architectures of real models, as their published `config.json` has them: no weights are needed to build them.

Sizes that are not written here are the defaults of transformers' configuration classes, which are theirs too.
"""

from __future__ import annotations

from typing import Any

_QWEN2_5_IDS = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652}
_QWEN2_5_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
_QWEN2_5_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2.5-VL-7B": (
        "qwen2_5_vl",
        {
            "text_config": {
                "vocab_size": 152064,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "rope_parameters": _QWEN2_5_ROPE,
                "tie_word_embeddings": False,
            },
            "vision_config": {**_QWEN2_5_VISION, "out_hidden_size": 3584},
            "tie_word_embeddings": False,
            **_QWEN2_5_IDS,
        },
    ),
    "Qwen2.5-VL-3B": (
        "qwen2_5_vl",
        {
            "text_config": {
                "vocab_size": 151936,
                "hidden_size": 2048,
                "intermediate_size": 11008,
                "num_hidden_layers": 36,
                "num_attention_heads": 16,
                "num_key_value_heads": 2,
                "rope_parameters": _QWEN2_5_ROPE,
                "tie_word_embeddings": True,
            },
            "vision_config": {**_QWEN2_5_VISION, "out_hidden_size": 2048},
            "tie_word_embeddings": True,
            **_QWEN2_5_IDS,
        },
    ),
    "Qwen3-VL-8B": (
        "qwen3_vl",
        {
            "text_config": {
                "vocab_size": 151936,
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 5e6,
                    "mrope_section": [24, 20, 20],
                    "mrope_interleaved": True,
                },
                "tie_word_embeddings": False,
            },
            "vision_config": {
                "depth": 27,
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_heads": 16,
                "patch_size": 16,
                "out_hidden_size": 4096,
                "num_position_embeddings": 2304,
                "deepstack_visual_indexes": [8, 16, 24],
            },
            "tie_word_embeddings": False,
            "image_token_id": 151655,
            "video_token_id": 151656,
            "vision_start_token_id": 151652,
        },
    ),
}


def configuration(name: str) -> Any:
    """The configuration of one of `ARCHITECTURES`, in transformers' form."""
    from transformers import AutoConfig

    family, sizes = ARCHITECTURES[name]
    return AutoConfig.for_model(family, **sizes)
