"""Greedy completions of a loaded model, as its backend makes them."""

from __future__ import annotations

from PIL import Image

from adfm.models import decoding, loading, transformers_backend
from adfm.params import Evaluate


def generate(loaded: loading.Loaded, images: list[Image.Image], settings: Evaluate) -> decoding.Completions:
    """Completions for `images`, and the probability of a defect for each."""
    scorer = decoding.Scorer(loaded.processor.tokenizer)
    text = loading.chat_text(loaded.processor, loaded.prompt)
    inputs = transformers_backend._inputs(loaded.processor, text, images)
    return transformers_backend._generate(loaded, scorer, inputs, settings, seed=0)
