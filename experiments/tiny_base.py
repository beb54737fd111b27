"""Train the embedded base model: `python -m experiments tiny-base OUT`.

It sees inspection images, but only of the source categories of the synthetic generator: none of the products that it
will be asked about. The pretrained features of its tower stay as they are; three stages train the rest:

1. *places*: the neck of the tower learns where defects are (`adfm.tiny.tower.loss`).
2. *copying*: the language model learns to write the boxes that the tower gives it, and the name that the prompt lists
   at the number of the kind, on random regions and kinds, without pictures.
3. *responses*: the whole model learns to answer in the form of the prompt.

Seeded; a killed run resumes from its last checkpoint (`OUT.checkpoint/`).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adfm.data import masks, synthetic
from adfm.files import atomic_folder
from adfm.method import kinds as kinds_
from adfm.method import prompt
from adfm.models import families, loading
from adfm.process.progress import bar
from adfm.records import Box
from experiments import tiny_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

KINDS = list(synthetic.DEFECTS)
SYLLABLES = ("ba", "cor", "den", "fi", "gul", "ho", "in", "kra", "lo", "mer", "nu", "ost", "pit", "ra", "sco", "ux")
BATCH = 32
PLACES_WEIGHT = 0.3
_WITH_KINDS = 0.3  # share of the prompts that ask for a kind of defect
CHECKPOINT_EVERY = 100
_FEATURES = 12 << 30  # bytes: the maps of all pictures, which are computed once


@dataclass(frozen=True)
class Picture:
    """One training picture.

    Args:
        image: RGB, half of them square.
        boxes: Ground truth as fractions of width and height.
        defect: Kind of the defects, or `None`.
    """

    image: Image.Image
    boxes: NDArray[Any]
    defect: str | None


def draw_pictures(count: int, seed: int) -> list[Picture]:
    """Draw `count` pictures of source categories, half of them with defects, on all cores."""
    return list(synthetic.on_all_cores(_draw, [seed] * count, range(count), chunksize=64))


def _draw(seed: int, index: int) -> Picture:
    rng = np.random.default_rng([seed, index])
    category = list(synthetic.SOURCE_CATEGORIES.values())[rng.integers(len(synthetic.SOURCE_CATEGORIES))]
    defect = KINDS[rng.integers(len(KINDS))] if rng.random() < 0.5 else None
    pixels, mask = synthetic.draw(rng, category, defect)
    sides = [synthetic.SIZE, synthetic.SIZE]
    if rng.random() < 0.5:  # photographs are seldom square
        sides[rng.integers(2)] = int(rng.uniform(0.5, 1) * synthetic.SIZE)
    y, x = (int(rng.integers(synthetic.SIZE - side + 1)) for side in sides)
    pixels, mask = (each[y : y + sides[0], x : x + sides[1]] for each in (pixels, mask))
    boxes = masks.to_boxes(mask, dilation=0.04, connectivity=8, min_area=4)
    fractions = np.array(boxes, np.float32).reshape(-1, 4) / [sides[1], sides[0], sides[1], sides[0]]
    return Picture(Image.fromarray(np.ascontiguousarray(pixels)), fractions, defect if len(boxes) else None)


def annotate(picture: Picture, rng: np.random.Generator, kinds: Sequence[str] = ()) -> str:
    """Return the correct answer; on some normal pictures it examines a region and rejects it.

    `kinds`, if the prompt lists some, are other names of `KINDS`, in the same order.
    """
    if picture.defect is None:
        regions = [_somewhere(rng)] if rng.random() < 0.1 else []
        return prompt.target_completion("normal", [_on_frame(box) for box in regions])
    ordered = sorted(picture.boxes, key=lambda box: (box[1], box[0]))
    defect = kinds[KINDS.index(picture.defect)] if kinds else picture.defect
    return prompt.target_completion("anomalous", [_on_frame(box) for box in ordered], defect, kinds=kinds)


def made_up_kinds(rng: np.random.Generator, count: int) -> tuple[str, ...]:
    """Draw names of kinds of defects that no tokenizer has seen, in alphabetical order."""
    names: set[str] = set()
    while len(names) < count:
        names.add("".join(rng.choice(SYLLABLES, rng.integers(2, 5))) + rng.choice(["", "", "_a", "-x"]))
    return tuple(sorted(names))


def _somewhere(rng: np.random.Generator) -> NDArray[np.float64]:
    side = np.exp(rng.uniform(np.log(0.08), np.log(0.35), 2))
    corner = rng.uniform(0, 1 - side)
    return np.concatenate([corner, corner + side])


def _on_frame(box: NDArray[Any]) -> Box:
    return Box(*(float(v) for v in np.clip(np.round(box * 100) * 10, 0, 1000)))


def corpus() -> list[str]:
    """Return the texts that the tokenizer is trained on: the prompts and answers of every kind."""
    texts = [prompt.SYSTEM, *(prompt.QUESTION.format(units=u) for u in families.UNITS.values())]
    texts += [*prompt.KINDS.split("{kinds}"), prompt.PLAIN_QUESTION]
    texts += ["system\n", "user\n", "assistant\n"]
    box, answer = Box(10, 10, 20, 20), prompt.target_completion
    texts += [answer("anomalous", [box, box], defect) for defect in KINDS]
    texts += [answer("anomalous", []), answer("normal", []), answer("normal", [box])]
    for tag in tiny_model.TAGS:
        texts = [part for text in texts for part in text.split(tag)]
    return [text for text in texts if text] * 20


def build(
    out: Path,
    seed: int,
    pictures: int = 5000,
    places_steps: int = 200,
    copying_steps: int = 800,
    response_steps: int = 600,
) -> None:
    """Train the base and write it to `out` as a folder that `transformers` loads.

    Args:
        out: Folder to write.
        seed: Seeds the weights, the pictures and their order.
        pictures: Source pictures to draw.
        places_steps: Steps of the first stage, `BATCH` pictures each.
        copying_steps: Steps of the second stage, `BATCH` sets of regions each.
        response_steps: Steps of the third stage, `BATCH` pictures each.
    """
    from adfm.tiny import efficientnet, tower

    state = _Checkpoint(
        out.with_name(out.name + ".checkpoint"), places_steps, copying_steps, response_steps, seed, pictures
    )
    data = draw_pictures(pictures, seed)
    processor = tiny_model.processor(tiny_model.tokenizer(corpus()))
    model = tiny_model.model(processor.tokenizer, seed)
    tower.features = efficientnet.Features(tower.STRIDES, keep=_FEATURES)
    _standardise(model.model.visual, processor, data[:500])
    _places(model, processor, data, places_steps, seed, state)
    _copying(model, processor, copying_steps, seed, state)
    _responses(model, processor, data, response_steps, seed, state)
    with atomic_folder(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    shutil.rmtree(state.folder, ignore_errors=True)


class _Checkpoint:
    """The state of an unfinished build: stage, step, weights and optimizer."""

    def __init__(self, folder: Path, *identity: int) -> None:
        self.folder, self.identity = folder, identity

    def load(self, stage: str, modules: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Return the step to resume from."""
        import torch

        file = self.folder / f"{stage}.pt"
        if not file.is_file():
            return 0
        saved = torch.load(file, weights_only=True)
        if tuple(saved["identity"]) != self.identity:
            return 0
        modules.load_state_dict(saved["modules"])
        optimizer.load_state_dict(saved["optimizer"])
        return int(saved["step"])

    def save(self, stage: str, step: int, modules: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        import torch

        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "identity": list(self.identity),
            "step": step,
            "modules": modules.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        torch.save(state, self.folder / "partial")
        (self.folder / "partial").replace(self.folder / f"{stage}.pt")


def _standardise(tower: Any, processor: Any, data: list[Picture]) -> None:
    """Set the means and spreads by which the neck scales the maps of the features."""
    import torch

    from adfm.tiny.tower import STRIDES

    inputs = _pixels(processor, data)
    maps = tower.maps(inputs["pixel_values"], inputs["image_grid_thw"])
    for stride in STRIDES:
        values = torch.cat([each[stride].flatten(1) for each in maps], 1)
        getattr(tower, f"mean{stride}").copy_(values.mean(1))
        getattr(tower, f"spread{stride}").copy_(values.std(1))


def _batch(data: list[Picture], seed: int, step: int) -> tuple[np.random.Generator, list[Picture]]:
    rng = np.random.default_rng([seed, step])
    return rng, [data[i] for i in rng.integers(len(data), size=BATCH)]


def _pixels(processor: Any, batch: list[Picture]) -> Any:
    return processor.image_processor(images=[picture.image for picture in batch], return_tensors="pt")


def _rate(step: int, steps: int) -> float:
    """Linear rise, then cosine to 5 %."""
    return min(1.0, (step + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _places_loss(places: Any, batch: list[Picture]) -> torch.Tensor:
    from adfm.tiny import tower

    boxes, kinds = [p.boxes.tolist() for p in batch], [KINDS.index(p.defect) if p.defect else None for p in batch]
    return tower.loss(places, boxes, [len(p.boxes) > 0 for p in batch], kinds)


def _train(
    stage: str,
    modules: Any,
    optimizer: torch.optim.Optimizer,
    steps: int,
    state: _Checkpoint,
    loss_of: Callable[[int], tuple[torch.Tensor, dict[str, str]]],
) -> None:
    """Take the remaining steps of a stage; `loss_of` returns a step's loss, and metrics for the progress bar."""
    import torch

    rates = [group["lr"] for group in optimizer.param_groups]  # those of a checkpoint have fallen
    progress = bar(range(state.load(stage, modules, optimizer), steps), desc=stage, unit="step")
    for step in progress:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * _rate(step, steps)
        loss, metrics = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        progress.set_postfix(metrics, refresh=False)
        if (step + 1) % CHECKPOINT_EVERY == 0:
            state.save(stage, step + 1, modules, optimizer)


def _places(
    model: PreTrainedModel, processor: Any, data: list[Picture], steps: int, seed: int, state: _Checkpoint
) -> None:
    # Through the language model alone, the tower does not learn in minutes where defects are.
    import torch

    tower = model.model.visual

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, str]]:
        _, batch = _batch(data, seed, step)
        images = _pixels(processor, batch)
        places = tower(images["pixel_values"], grid_thw=images["image_grid_thw"]).places
        loss = _places_loss(places, batch)
        right = np.mean([(each.image.item() > 0) == (len(p.boxes) > 0) for each, p in zip(places, batch, strict=True)])
        return loss, {"loss": f"{loss.item():.3f}", "images_right": f"{right:.2f}"}

    optimizer = torch.optim.AdamW(tower.parameters(), lr=2e-3, weight_decay=0.02, betas=(0.9, 0.98))
    _train("places", tower, optimizer, steps, state, loss_of)


def _copying(model: Any, processor: Any, steps: int, seed: int, state: _Checkpoint) -> None:
    # Without pictures it takes a third of the time.
    import torch

    from adfm.tiny.tower import pooled

    tower = model.model.visual
    image = "<|vision_start|><|image_pad|><|vision_end|><|im_start|>assistant\n"

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, str]]:
        rng = np.random.default_rng([seed, step])
        rows, columns = (int(rng.integers(4, 9)) for _ in range(2))  # tokens down, and across
        defect, boxes = _regions(rng, rows * tower.spatial_merge_size, columns * tower.spatial_merge_size)
        noise = torch.from_numpy(rng.normal(size=(BATCH, tower.config.hidden_size, *defect.shape[1:])).clip(0)).float()
        drawn = [_draw_kind(rng) for _ in range(BATCH)]
        kinds = torch.from_numpy(np.stack([probabilities for _, _, probabilities in drawn])).float()
        tokens = tower.tokens(noise, pooled(noise), defect, boxes, kinds)
        texts = [
            prompt.asking_for(listed) + image + _answer_of_regions(logits, corners, kind, listed) + "<|im_end|>"
            for logits, corners, (listed, kind, _) in zip(defect, boxes, drawn, strict=True)
        ]
        expanded = [text.replace("<|image_pad|>", "<|image_pad|>" * (rows * columns)) for text in texts]
        inputs = processor.tokenizer(expanded, padding=True, padding_side="right", return_tensors="pt")
        numbers, grid = inputs["input_ids"], torch.tensor([[1, *defect.shape[1:]]] * BATCH)
        seen = numbers == model.config.image_token_id
        embedded = model.get_input_embeddings()(numbers).masked_scatter(seen[..., None], tokens)
        positions, _ = model.model.get_rope_index(
            numbers, seen.int(), image_grid_thw=grid, attention_mask=inputs["attention_mask"]
        )
        loss = model(
            inputs_embeds=embedded,
            attention_mask=inputs["attention_mask"],
            position_ids=positions,
            labels=numbers.masked_fill(~_answered(processor, inputs), -100),
        ).loss
        return loss, {"loss": f"{loss.item():.3f}"}

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
    _train("copying", model, optimizer, steps, state, loss_of)


def _regions(rng: np.random.Generator, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw logits and boxes of cells as a neck gives them, with one to four regions a picture."""
    import torch

    defect = np.minimum(rng.normal(-3, 1, (BATCH, rows, columns)), 0)
    boxes = rng.random((BATCH, rows, columns, 4))
    for logits, corners in zip(defect, boxes, strict=True):
        for _ in range(rng.integers(1, 5)):
            box = _somewhere(rng)
            row, column = int((box[1] + box[3]) / 2 * rows), int((box[0] + box[2]) / 2 * columns)
            logits[row, column], corners[row, column] = rng.uniform(1, 5), box
    return torch.from_numpy(defect).float(), torch.from_numpy(boxes).float()


def _draw_kind(rng: np.random.Generator) -> tuple[tuple[str, ...], str, NDArray[Any]]:
    """Draw the kinds that a prompt lists, or none; the kind to name; a neck's probabilities, highest at its number."""
    listed = made_up_kinds(rng, int(rng.integers(2, 9))) if rng.random() < 0.5 else ()
    number = int(rng.integers(len(listed or KINDS)))
    probabilities = rng.dirichlet([0.1] * kinds_.MOST) * rng.uniform(0, 0.5)
    probabilities[number] += 1 - probabilities.sum()
    return listed, (listed or KINDS)[number], probabilities


def _answer_of_regions(logits: torch.Tensor, boxes: torch.Tensor, kind: str, kinds: Sequence[str]) -> str:
    from adfm.tiny import tower

    regions = [_on_frame(np.clip(box, 0, 1)) for box in tower.regions(logits, boxes)]
    return prompt.target_completion("anomalous", regions, kind, kinds=kinds)


def _answered(processor: Any, inputs: Any) -> torch.Tensor:
    """Mask the tokens of the response: those from the second after the last `<|im_start|>` to its end."""
    import torch

    numbers = inputs["input_ids"]
    start = processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
    begun = numbers.shape[1] - (numbers.flip(1) == start).int().argmax(1) + 2
    answered: torch.Tensor = inputs["attention_mask"].bool() & (torch.arange(numbers.shape[1]) >= begun[:, None])
    return answered


def _responses(
    model: PreTrainedModel, processor: Any, data: list[Picture], steps: int, seed: int, state: _Checkpoint
) -> None:
    import torch

    tower: list[Any] = []
    model.model.visual.register_forward_hook(lambda module, inputs, output: tower.append(output.places))
    units = families.get(tiny_model.FAMILY).units

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, str]]:
        rng, batch = _batch(data, seed + 1, step)
        answers = []
        for picture in batch:
            kinds = made_up_kinds(rng, len(KINDS)) if rng.random() < _WITH_KINDS else ()
            text = loading.chat_text(processor, prompt.messages(units, kinds=kinds))
            answers.append(text + annotate(picture, rng, kinds) + "<|im_end|>")
        images = [picture.image for picture in batch]
        inputs = processor(text=answers, images=images, padding=True, padding_side="right", return_tensors="pt")
        labels = inputs["input_ids"].masked_fill(~_answered(processor, inputs), -100)
        loss = model(**inputs, labels=labels).loss
        return loss + PLACES_WEIGHT * _places_loss(tower.pop(), batch), {"loss": f"{loss.item():.3f}"}

    vision = [p for n, p in model.named_parameters() if "visual" in n]
    language = [p for n, p in model.named_parameters() if "visual" not in n]
    groups = [{"params": language, "lr": 2e-3}, {"params": vision, "lr": 6e-4}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.98))
    _train("responses", model, optimizer, steps, state, loss_of)
