"""Qwen's real tokenizers, made from their vocabulary (scripts/fetch-test-vocabulary.sh)."""

from __future__ import annotations

import base64
import functools
import importlib.resources
import os
import sys
import zipfile
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
WHEEL = Path(sys.prefix) / "share" / "adfm-tests" / "dashscope-2.0.2-py3-none-any.whl"
# How Qwen's tokenizers cut a text before they merge (the pattern of the published tokenizer.json).
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    *("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start"),
    *("quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"),
)
CODE = ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")
ADDED = ("<tool_call>", "</tool_call>", *(f"<|{name}|>" for name in CODE))
ADDED_3 = (*ADDED, "<tool_response>", "</tool_response>", "<think>", "</think>")  # Qwen3's


@functools.cache
def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """The tokenizer of Qwen2.5-VL or Qwen3-VL; without its vocabulary tests are skipped, and fail where `CI` is set."""
    if not WHEEL.is_file():
        missing = "NOT TESTED with real tokenizers: run scripts/fetch-test-vocabulary.sh"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    made = Tokenizer(models.BPE(*_vocabulary()))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(f"<|{name}|>", special=True, normalized=False) for name in SPECIAL])
    added = ADDED_3 if family == "qwen3_vl" else ADDED
    made.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=[f"<|{name}|>" for name in SPECIAL[1:]],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


@functools.cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens by rank, and the merges that make them, in the letters with which byte-level BPE writes bytes."""
    lines = zipfile.ZipFile(WHEEL).read("dashscope/resources/qwen.tiktoken").splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    alphabet = _alphabet()
    written = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    merges = [
        (written[left], written[right])
        for token, rank in ranks.items()
        if len(token) > 1
        for left, right in [_halves(token, rank, ranks)]
    ]
    return {written[token]: rank for token, rank in ranks.items()}, merges


def _halves(token: bytes, rank: int, ranks: dict[bytes, int]) -> list[bytes]:
    """The two parts that are left of a token when all merges before its own are done."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        at = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _alphabet() -> list[str]:
    """The letter that byte-level BPE has for each byte: printable ones of Latin-1, then those from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def save_model(family: str, folder: Path) -> None:
    """Write an untrained model of a family to `folder`: two narrow layers with the real vocabulary."""
    from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2VLImageProcessorPil

    from adfm.models import families
    from tests.models.random_models import TOWER

    tokens = tokenizer(family)
    ids = {name: tokens.convert_tokens_to_ids(f"<|{name}|>") for name in SPECIAL}
    patch = {"qwen2_5_vl": 14, "qwen3_vl": 16}[family]
    head = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = {
        "vocab_size": len(tokens),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_parameters": head,
        "eos_token_id": ids["im_end"],
        "pad_token_id": ids["endoftext"],
    }
    own = {
        "qwen2_5_vl": {"window_size": 4 * patch, "fullatt_block_indexes": [1]},
        "qwen3_vl": {"num_position_embeddings": 256, "deepstack_visual_indexes": [0]},
    }
    config = AutoConfig.for_model(
        family,
        text_config=text,
        vision_config=TOWER | {"patch_size": patch} | own[family],
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config.update(eos_token_id=ids["im_end"], pad_token_id=ids["endoftext"])
    model.save_pretrained(folder)
    families.processor_class(family)(
        image_processor=Qwen2VLImageProcessorPil(
            patch_size=patch, merge_size=2, size={"shortest_edge": 3136, "longest_edge": 262144}
        ),
        tokenizer=tokens,
        chat_template=(importlib.resources.files("trl") / "chat_templates" / f"{family}.jinja").read_text(),
    ).save_pretrained(folder)
