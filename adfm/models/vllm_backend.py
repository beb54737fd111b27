"""Decoding with vLLM, as with transformers and many times faster."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from adfm.errors import AdfmError
from adfm.models import decoding, families, loading, model_folder, vllm_engine
from adfm.models.decoding import Completions
from adfm.params import Params

_LOGPROBS = 128  # the most tokens in `logprob_token_ids` of a request (vllm/sampling_params.py)
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # for which vLLM has kernels
_SHARE = 0.9


def load(model: str | Path, params: Params) -> tuple[Any, str, Callable[[list[Image.Image]], Completions]]:
    """Load a model into vLLM: its processor and family, and the function that answers a list of images.

    Raises:
        AdfmError: As `adfm.models.loading.resolve`; or vLLM does not fit, or takes no such rank or so many tokens.
    """
    # Written from the source of vLLM 0.30 and tested with a stand-in for it, not with vLLM itself.
    import vllm
    from vllm.lora.request import LoRARequest

    settings = params.evaluate
    base, folder = loading.base_of(model, params.model)
    processor, family = loading.load_processor(model, params.model), model_folder.family_of(folder)
    options: dict[str, Any] = {}
    adapter = None
    if model_folder.describe(Path(model)):
        rank = json.loads((Path(model) / "adapter_config.json").read_text(encoding="utf-8"))["r"]
        if rank > _RANKS[-1]:
            raise AdfmError(f"{model}: vLLM takes adapters up to rank {_RANKS[-1]}; set evaluate.backend=transformers.")
        adapter = LoRARequest("adapter", 1, str(model))
        options = {
            "enable_lora": True,
            "max_lora_rank": next(known for known in _RANKS if known >= rank),
            "enable_tower_connector_lora": True,  # the adapter is on the vision tower too; experimental in vLLM
        }
    if problems := vllm_engine.wrong_version():
        raise AdfmError("; ".join(problems))
    messages = loading.prompt_of(model, family)
    engine = vllm.LLM(
        model=str(folder),
        max_model_len=vllm_engine.model_length(processor, messages, settings.max_new_tokens),
        gpu_memory_utilization=_free_share(),
        **vllm_engine.options(processor, base.dtype),
        **options,
    )
    scorer = decoding.Scorer(processor.tokenizer)
    if len(scorer.tokens) > _LOGPROBS:
        raise AdfmError(
            f"{model}: {len(scorer.tokens)} of its tokens can decide an answer, and vLLM gives the probabilities of "
            f"{_LOGPROBS}; set evaluate.backend=transformers."
        )

    def read(output: Any) -> tuple[str, float | None]:
        text = decoding.until_stop(output.text)

        def logits(at: int) -> Any:
            return np.array([output.logprobs[at][token].logprob for token in scorer.tokens])

        return text, scorer.score(settings, output.token_ids, text, logits)

    def complete(prompts: list[Any], **how: Any) -> list[list[tuple[str, float | None]]]:
        # Sampling parameters that are not given are neutral, whatever the model's folder says. `logprob_token_ids`
        # gives log-probabilities at every position, before `logit_bias` and temperature.
        sampling = vllm.SamplingParams(
            max_tokens=settings.max_new_tokens,
            stop=[decoding.STOP],
            include_stop_str_in_output=True,
            logit_bias=dict.fromkeys(families.placeholders(processor), -100.0),
            logprob_token_ids=scorer.tokens,
            **how,
        )
        requests = engine.generate(prompts, sampling, lora_request=adapter, use_tqdm=False)
        return [[read(output) for output in request.outputs] for request in requests]

    text = loading.chat_text(processor, messages)

    def answer(images: list[Image.Image]) -> Completions:
        prompts = [{"prompt": text, "multi_modal_data": {"image": image}} for image in images]
        completions, scores = map(list, zip(*(only for [only] in complete(prompts, temperature=0.0)), strict=True))
        if settings.samples:
            sampled = complete(prompts, temperature=1.0, n=settings.samples, seed=params.seed)
            samples = [[score for _, score in each] for each in zip(*sampled, strict=True)]
            scores = decoding.mean_of_samples(scores, samples)
        return completions, scores

    return processor, family, answer


def _free_share() -> float:
    # vLLM refuses to start with less memory free than the share that it is given.
    import torch

    if not torch.cuda.is_available():
        return _SHARE
    free, total = torch.cuda.mem_get_info()
    return min(_SHARE, 0.95 * free / total)
