"""Decoding with transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from adfm.models import decoding, loading
from adfm.models.decoding import Completions, Scorer
from adfm.models.loading import Loaded
from adfm.params import Evaluate, Params

Prepare = Callable[[list[Image.Image]], Any]


def load(model: str | Path, params: Params) -> tuple[Any, str, Prepare, Callable[[Any], Completions]]:
    """Load a model: its processor and family, the function that prepares a list of images, and the one that answers."""
    loaded = loading.load(model, params.model)
    loaded.model.eval()
    text = loading.chat_text(loaded.processor, loaded.prompt)
    scorer = Scorer(loaded.processor.tokenizer)
    return (
        loaded.processor,
        loaded.family,
        lambda images: _inputs(loaded.processor, text, images),
        lambda inputs: _generate(loaded, scorer, inputs, params.evaluate, params.seed),
    )


def _inputs(processor: Any, text: str, images: list[Image.Image]) -> Any:
    return processor(text=[text] * len(images), images=images, padding=True, return_tensors="pt")


def _generate(loaded: Loaded, scorer: Scorer, inputs: Any, settings: Evaluate, seed: int) -> Completions:
    import torch

    inputs = inputs.to(loaded.model.device)
    completions, scores = _complete(loaded, scorer, inputs, settings)
    if settings.samples:
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # the same batch gets the same samples
            samples = [_complete(loaded, scorer, inputs, settings, sample=True)[1] for _ in range(settings.samples)]
        scores = decoding.mean_of_samples(scores, samples)
    return completions, scores


def _complete(loaded: Loaded, scorer: Scorer, inputs: Any, settings: Evaluate, sample: bool = False) -> Completions:
    import torch
    from transformers import LogitsProcessorList

    tokenizer, steps = loaded.processor.tokenizer, []

    def keep(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # At every step, the logits of a few tokens: those of the whole vocabulary would fill the memory.
        steps.append(scores[:, scorer.tokens].float())
        return scores

    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    with torch.inference_mode():
        output: Any = loaded.model.generate(  # type: ignore[operator]
            **inputs,
            **sampling,
            max_new_tokens=settings.max_new_tokens,
            stop_strings=[decoding.STOP],
            tokenizer=tokenizer,
            logits_processor=LogitsProcessorList([keep]),
        )
    tokens = output[:, inputs["input_ids"].shape[1] :].tolist()
    logits = torch.stack(steps, 1).cpu().numpy()  # [images, tokens, deciding tokens]
    completions = [decoding.until_stop(text) for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    scores = [
        scorer.score(settings, row, text, at.__getitem__)
        for row, text, at in zip(tokens, completions, logits, strict=True)
    ]
    return completions, scores
