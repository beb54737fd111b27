"""Greedy decoding by vLLM: the same prompts, the same end, the same scores as with transformers, and many times faster.

Written from the source of vLLM 0.30 and tested with a stand-in for it: this file has not been run with vLLM itself.
There `logprob_token_ids` takes at most 128 tokens and gives their log-probabilities at every position, before
`logit_bias` and temperature; `enable_tower_connector_lora`, which vLLM calls experimental, adds an adapter to the
vision tower and the layers after it, in both families; sampling parameters that are not given are neutral, whatever
the model's folder says.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adfm.errors import AdfmError
from adfm.evaluation import inference
from adfm.models import loading, vllm_engine
from adfm.params import Model

if TYPE_CHECKING:
    from PIL import Image

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # for which vLLM has kernels
_SHARE = 0.9


def load(
    model: str | Path, settings: Model, max_new_tokens: int
) -> tuple[Any, str, Callable[[list[Image.Image]], inference.Answers]]:
    """Loads a model into vLLM.

    Args:
        model: A base model's name, or a folder that warm-up or training wrote.
        settings: As `adfm.models.loading.load` reads them.
        max_new_tokens: Most tokens of a completion.

    Returns:
        The model's processor and family, and the function that answers a list of images.

    Raises:
        AdfmError: As `adfm.models.loading.resolve`; the adapter's rank is beyond vLLM's largest; or the vLLM that is
            installed does not fit.
    """
    import vllm
    from vllm.lora.request import LoRARequest

    base, folder = loading.base_of(model, settings)
    processor, family = loading.load_processor(model, settings), loading.family_of(folder)
    options: dict[str, Any] = {}
    adapter = None
    if loading.describe(Path(model)):
        rank = json.loads((Path(model) / "adapter_config.json").read_text(encoding="utf-8"))["r"]
        if rank > _RANKS[-1]:
            raise AdfmError(
                f"{model}: vLLM takes adapters of rank {_RANKS[-1]} at most; set evaluate.backend=transformers."
            )
        adapter = LoRARequest("adapter", 1, str(model))
        options = {
            "enable_lora": True,
            "max_lora_rank": next(known for known in _RANKS if known >= rank),
            "enable_tower_connector_lora": True,  # the adapter is on the vision tower too
        }
    if problems := vllm_engine.wrong_version():
        raise AdfmError("; ".join(problems))
    messages = loading.prompt_of(model, family)
    engine = vllm.LLM(
        model=str(folder),
        max_model_len=vllm_engine.model_length(processor, messages, max_new_tokens),
        gpu_memory_utilization=_free_share(),
        **vllm_engine.options(processor, base.dtype),
        **options,
    )
    letters = inference.letter_tokens(processor.tokenizer)
    sampling = vllm.SamplingParams(
        temperature=0.0,
        max_tokens=max_new_tokens,
        stop=[inference.STOP],
        include_stop_str_in_output=True,
        logit_bias=dict.fromkeys(inference.unwanted(processor), -100.0),
        logprob_token_ids=[*letters[0], *letters[1]],
    )
    text = inference.chat_text(processor, messages)

    def answer(images: list[Image.Image]) -> inference.Answers:
        prompts = [{"prompt": text, "multi_modal_data": {"image": image}} for image in images]
        outputs = engine.generate(prompts, sampling, lora_request=adapter, use_tqdm=False)
        completions: list[str] = []
        scores: list[float | None] = []
        for output in (request.outputs[0] for request in outputs):
            completions.append(inference.until_stop(output.text))
            at = inference.letter_token(processor.tokenizer, output.token_ids, completions[-1])
            scores.append(None if at is None else _score(output.logprobs[at], letters))
        return completions, scores

    return processor, family, answer


def _free_share() -> float:
    """Share of the GPU's memory that vLLM may take: it refuses to start with less free than it asks for."""
    import torch

    if not torch.cuda.is_available():
        return _SHARE
    free, total = torch.cuda.mem_get_info()
    return min(_SHARE, 0.95 * free / total)


def _score(found: dict[int, Any], letters: tuple[list[int], list[int]]) -> float:
    """The probability of `A` against `B` from the log-probabilities of their tokens at one position."""
    a, b = (np.logaddexp.reduce([found[token].logprob for token in tokens]) for tokens in letters)
    return float(1 / (1 + np.exp(np.clip(b - a, -500, 500))))
