"""The embedded model's architecture, tokenizer and processor.

Qwen3-VL's own classes with a pretrained vision tower (`adfm.tiny.tower`). An image is resized to about 320 x 320
pixels, its aspect ratio kept, and becomes about 100 visual tokens; coordinates are Qwen3-VL's, 0 to 1000.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from adfm.models.families import processor_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

FAMILY = "adfm_embedded"
SIDE = 320
PATCH = 16
MERGE = 2
HIDDEN = 128
COORDINATES = range(0, 1001, 10)
VOCABULARY = 1600
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# Ordinary tokens, not special ones: TRL drops special tokens before it calls the rewards.
TAGS = ["<think>", "</think>", "<rethink>", "</rethink>", "<answer>", "</answer>"]


def tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on `corpus`; every coordinate that is a multiple of 10 is one token."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    # Merges may cross spaces, so that a frequent sentence, such as one of the prompt, is a single token and a whole
    # response about thirty. Any other text still tokenizes, down to bytes.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d+"), "isolated"),
            pre_tokenizers.Split(Regex(r"[\[\]\n]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    numbers = ["[" + ", ".join(str(n) for n in COORDINATES) + "]"] * 10
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([*corpus, *numbers], trainer)
    bpe.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL[1:2] + SPECIAL[3:],
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def processor(tokens: PreTrainedTokenizerFast, side: int = SIDE) -> Any:
    """Return Qwen3-VL's processor for images of `side` x `side` pixels or as many in another shape."""
    from transformers import Qwen2VLImageProcessorPil

    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        temporal_patch_size=2,
        merge_size=MERGE,
        size={"shortest_edge": side * side, "longest_edge": side * side},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    template = (importlib.resources.files("trl") / "chat_templates" / "qwen3_vl.jinja").read_text()
    return processor_class(FAMILY)(image_processor=images, tokenizer=tokens, chat_template=template)


def model(tokens: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """Return a randomly initialised model for `tokens`."""
    import torch
    from torch.nn import functional as F  # noqa: N812

    from adfm.tiny.tower import EmbeddedConfig, EmbeddedForConditionalGeneration, sinusoids

    torch.manual_seed(seed)
    number: Any = tokens.convert_tokens_to_ids
    ends = {"eos_token_id": number("<|im_end|>"), "pad_token_id": number("<|endoftext|>"), "bos_token_id": None}
    text = {
        "vocab_size": len(tokens),
        "hidden_size": HIDDEN,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 100.0,
            "mrope_section": [4, 6, 6],
            "mrope_interleaved": True,
        },
        "tie_word_embeddings": False,  # PEFT ties those of one adapter only, and GRPO needs two
        **ends,
    }
    config = EmbeddedConfig(
        text_config=text,
        vision_config={"out_hidden_size": HIDDEN, "patch_size": PATCH, "spatial_merge_size": MERGE},
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    network = EmbeddedForConditionalGeneration(config)
    # Coordinates begin as the tower writes them: what is learned of one holds for its neighbours. With random weights a
    # third of the boxes is copied after the 400 steps after which three quarters are.
    places = sinusoids(torch.tensor(COORDINATES) / 1000)
    numbers = number([str(value) for value in COORDINATES])
    untyped: Any = network
    head, embeddings = untyped.get_output_embeddings(), untyped.get_input_embeddings()
    for weights, length in ((head.weight, 1.0), (embeddings.weight, 0.3)):
        plane = torch.linalg.qr(torch.randn(HIDDEN, places.shape[1]))[0]
        with torch.no_grad():
            weights[numbers] = length * F.normalize(places, dim=1) @ plane.T
    network.generation_config.eos_token_id = ends["eos_token_id"]
    network.generation_config.pad_token_id = ends["pad_token_id"]
    return network
