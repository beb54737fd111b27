"""Batched greedy decoding of a split, and the prediction table.

One row an image: `id source dataset category defect label predicted score iou mask_iou matched_iou true_positives
false_positives false_negatives area_share boxes predicted_boxes completion`. Boxes are original pixels, half-open.
`predicted` is null where the completion has no clean answer, and such an image counts as wrong everywhere; `score` is
the probability of `A` against `B` at the answer's token, null where there is none.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from adfm.data import shards as shards_
from adfm.evaluation import metrics
from adfm.method import coordinates, prompt, response
from adfm.models import loading
from adfm.params import Params
from adfm.records import Record

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from transformers import ProcessorMixin

_BEFORE_LETTER = re.compile(r"<answer>\s*", re.IGNORECASE)


def predict(model: str | Path, shards: Path, params: Params, describe: str) -> pd.DataFrame:
    """Let `model` answer every image of the split `params.evaluate.split`, greedily, one answer an image.

    Args:
        model: A base model's name, or a folder that warm-up or training wrote.
        shards: Folder of shards.
        params: Reads the sections `model` and `evaluate`.
        describe: What the progress bar says.

    Raises:
        AdfmError: The model or the shards cannot be loaded.
    """
    import pandas as pd

    loaded = loading.load(model, params.model)
    loaded.model.eval()
    split = params.evaluate.split
    total = shards_.table(shards, split).num_rows
    rows: list[dict[str, Any]] = []
    with tqdm(total=total, desc=describe, unit="image", mininterval=1.0) as progress:
        for batch in _batched(shards_.read(shards, split), params.evaluate.batch_size):
            images = [Image.open(io.BytesIO(record.image)).convert("RGB") for record in batch]
            completions, scores = answer(loaded, images, params.evaluate.max_new_tokens)
            rows += [_row(loaded, *row) for row in zip(batch, completions, scores, strict=True)]
            progress.update(len(batch))
    return pd.DataFrame(rows)


def answer(
    loaded: loading.Loaded, images: list[Image.Image], max_new_tokens: int
) -> tuple[list[str], list[float | None]]:
    """Greedy completions for `images`, and the probability of `A` against `B` where the letter stands."""
    import torch
    from transformers import LogitsProcessorList

    processor = loaded.processor
    inputs = processor(
        text=[chat_text(processor, loaded.family)] * len(images), images=images, padding=True, return_tensors="pt"
    ).to(loaded.model.device)
    letters = _LetterScores(processor)
    generate: Any = loaded.model.generate
    with torch.inference_mode():
        output = generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            suppress_tokens=[loaded.model.config.image_token_id, loaded.model.config.video_token_id],
            logits_processor=LogitsProcessorList([letters]),
        )
    tokens = output[:, inputs["input_ids"].shape[1] :].tolist()
    completions = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    scores = [letters.at(row, tokens[row], text) for row, text in enumerate(completions)]
    return completions, scores


def chat_text(processor: ProcessorMixin, family: str) -> str:
    """The prompt as the model's own chat template writes it, ending where the response begins."""
    system, user = prompt.messages(family)
    chat: Any = [
        {"role": "system", "content": [{"type": "text", "text": system["content"]}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": user["content"]}]},
    ]
    return str(processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


class _LetterScores:
    """Called by `generate` at every step: keeps two numbers a row, not the scores of the whole vocabulary."""

    def __init__(self, processor: ProcessorMixin) -> None:
        self._tokenizer = processor.tokenizer
        self._letters = [self._tokens(letter) for letter in "AB"]
        self._steps: list[torch.Tensor] = []

    def _tokens(self, letter: str) -> list[int]:
        texts = [before + case for before in ("", " ", "\n") for case in (letter, letter.lower())]
        tokens = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return sorted({t[0] for t in tokens if len(t) == 1})

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        a, b = (torch.logsumexp(scores[:, tokens].float(), 1) for tokens in self._letters)
        self._steps.append(torch.sigmoid(a - b).cpu())
        return scores

    def at(self, row: int, tokens: list[int], completion: str) -> float | None:
        """The score at the token that writes the answer's letter."""
        if response.parse(completion).answer is None:
            return None
        where = _BEFORE_LETTER.search(completion).end()  # type: ignore[union-attr]
        low, high = 0, len(tokens)
        while low < high:  # the shortest run of tokens that reaches beyond the letter
            middle = (low + high) // 2
            if len(self._tokenizer.decode(tokens[: middle + 1], skip_special_tokens=True)) > where:
                high = middle
            else:
                low = middle + 1
        return float(self._steps[low][row])


def _batched(records: Iterator[Record], size: int) -> Iterator[list[Record]]:
    batch: list[Record] = []
    for record in records:
        batch.append(record)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _row(loaded: loading.Loaded, record: Record, completion: str, score: float | None) -> dict[str, Any]:
    parsed = response.parse(completion)
    frame = coordinates.frame_of(loaded.family, loaded.processor, record.width, record.height)
    predicted = parsed.predicted_label
    # A region that was examined and rejected is no predicted defect.
    boxes = [frame.to_pixels(b, record.width, record.height) for b in parsed.boxes] if predicted == "anomalous" else []
    mask = None if record.mask is None else np.asarray(Image.open(io.BytesIO(record.mask))) > 0
    anomalous = record.label == "anomalous"
    found = metrics.localize(record.boxes, boxes, record.width, record.height, mask) if anomalous else {}
    return {
        "id": record.id,
        "source": record.source,
        "dataset": record.dataset,
        "category": record.category,
        "defect": record.defect,
        "label": record.label,
        "predicted": predicted,
        "score": score,
        **found,
        "boxes": [list(box) for box in record.boxes],
        "predicted_boxes": [list(box) for box in boxes],
        "completion": completion,
    }
