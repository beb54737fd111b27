"""The recipe of the embedded base model: `adfm tiny-base OUT`.

A base model that has seen inspection images, but none of the products it will be asked about: it is trained on the
source categories of the synthetic generator only. Two stages, both on the same pictures:

1. *dense*: the vision tower alone learns where defects are (coverage, box and kind for each visual token). From
   scratch, a tower that learns through the language model alone does not learn to localise in minutes.
2. *responses*: the whole model learns to answer in the form of the prompt, from an imperfect annotator: loose,
   jittered boxes, some defects missed, some normal regions examined and rejected. So the base is unsure, as a real base
   model is on images of a new line.

Seeded; a killed run goes on from its last checkpoint (`OUT.checkpoint/`).
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from adfm.data import masks, synthetic
from adfm.files import atomic_folder
from adfm.method import prompt
from adfm.models import families, tiny
from adfm.records import Box

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CELL = tiny.PATCH * tiny.MERGE
GRID = tiny.SIDE // CELL
KINDS = list(synthetic.DEFECTS)
CHECKPOINT_EVERY = 100
THRESHOLD = 0.02


@dataclass(frozen=True)
class Picture:
    """One training picture.

    Args:
        pixels: RGB, uint8, `[SIDE, SIDE, 3]`.
        boxes: Ground truth as fractions of the side.
        defect: Kind of the defects, or `None`.
    """

    pixels: NDArray[np.uint8]
    boxes: NDArray[Any]
    defect: str | None


def draw_pictures(count: int, seed: int) -> list[Picture]:
    """Draw `count` pictures of source categories, half of them with defects, on all cores."""
    return list(synthetic.on_all_cores(_draw, [seed] * count, range(count), chunksize=64))


def _draw(seed: int, index: int) -> Picture:
    rng = np.random.default_rng([seed, index])
    category = list(synthetic.SOURCE_CATEGORIES.values())[rng.integers(len(synthetic.SOURCE_CATEGORIES))]
    defect = KINDS[rng.integers(len(KINDS))] if rng.random() < 0.5 else None
    image, mask = synthetic.draw(rng, category, defect)
    boxes = masks.to_boxes(mask, dilation=0.04, connectivity=8, min_area=4)
    small = Image.fromarray(image).resize((tiny.SIDE, tiny.SIDE), Image.Resampling.BICUBIC)
    fractions = np.array(boxes, np.float32).reshape(-1, 4) / synthetic.SIZE
    return Picture(np.asarray(small), fractions, defect if len(boxes) else None)


def _turned(picture: Picture, rng: np.random.Generator) -> Picture:
    """One of the eight turns and mirrorings of a square."""
    pixels, boxes = picture.pixels, picture.boxes
    if rng.random() < 0.5:
        pixels, boxes = pixels[:, ::-1], np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], 1)
    for _ in range(int(rng.integers(4))):
        pixels, boxes = np.rot90(pixels), np.stack([boxes[:, 1], 1 - boxes[:, 2], boxes[:, 3], 1 - boxes[:, 0]], 1)
    return Picture(np.ascontiguousarray(pixels), boxes, picture.defect)


def annotate(picture: Picture, rng: np.random.Generator) -> str:
    """What an imperfect annotator answers: loose boxes, one defect in six missed, some normal regions examined."""
    kept = [b for b in picture.boxes if rng.random() > 0.15]
    if not kept:
        regions = [_somewhere(rng)] if rng.random() < 0.25 else []
        return prompt.answer("normal", [_on_frame(b) for b in regions])
    loose = []
    for x1, y1, x2, y2 in sorted(kept, key=lambda b: (b[1], b[0])):
        width, height = x2 - x1, y2 - y1
        jitter = rng.normal(0, 0.1, 4) + np.array([-1, -1, 1, 1]) * rng.uniform(0, 0.25)
        loose.append(np.array([x1, y1, x2, y2]) + jitter * [width, height, width, height])
    return prompt.answer("anomalous", [_on_frame(b) for b in loose], picture.defect)


def _somewhere(rng: np.random.Generator) -> NDArray[np.float64]:
    side = np.exp(rng.uniform(np.log(0.08), np.log(0.35), 2))
    corner = rng.uniform(0, 1 - side)
    return np.concatenate([corner, corner + side])


def _on_frame(box: NDArray[Any]) -> Box:
    return Box(*(float(v) for v in np.clip(np.round(box * 100) * 10, 0, 1000)))


def corpus() -> list[str]:
    """What the tokenizer is trained on: the prompts and answers of every kind."""
    texts = [prompt.SYSTEM, *(prompt.QUESTION.format(units=u) for u in families.UNITS.values())]
    texts += ["system\n", "user\n", "assistant\n"]
    box = Box(10, 10, 20, 20)
    for defect in KINDS:
        texts += [prompt.answer("anomalous", [box, box], defect)]
    texts += [prompt.answer("normal", []), prompt.answer("normal", [box])]
    for tag in tiny.TAGS:
        texts = [part for text in texts for part in text.split(tag)]
    return [text for text in texts if text] * 20


def build(out: Path, seed: int, pictures: int = 10000, dense_steps: int = 1500, response_steps: int = 900) -> None:
    """Train the base and write it to `out` as a folder that `transformers` loads.

    Args:
        out: Folder to write.
        seed: Seeds the weights, the pictures and their order.
        pictures: Source pictures to draw; each is turned and mirrored anew at every use.
        dense_steps: Steps of the first stage, 48 pictures each.
        response_steps: Steps of the second stage, 48 pictures each.
    """
    import torch

    state = _Checkpoint(out.with_name(out.name + ".checkpoint"), dense_steps, response_steps, seed, pictures)
    data = draw_pictures(pictures, seed)
    processor = tiny.processor(tiny.tokenizer(corpus()))
    model = tiny.model(processor.tokenizer, seed)
    head = torch.nn.Sequential(torch.nn.LayerNorm(128), torch.nn.Linear(128, 1 + 8 + len(KINDS)))
    _dense(model, head, processor, data, dense_steps, seed, state)
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
        """The step to go on from."""
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


def _batch(data: list[Picture], seed: int, step: int, size: int = 48) -> tuple[np.random.Generator, list[Picture]]:
    rng = np.random.default_rng([seed, step])
    return rng, [_turned(data[i], rng) for i in rng.integers(len(data), size=size)]


def _rate(step: int, steps: int) -> float:
    """Linear rise, then cosine to 5 %."""
    return min(1.0, (step + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _dense(
    model: PreTrainedModel,
    head: torch.nn.Module,
    processor: Any,
    data: list[Picture],
    steps: int,
    seed: int,
    state: _Checkpoint,
) -> None:
    import torch
    from torch.nn import functional as F  # noqa: N812

    tower = model.model.visual
    modules = torch.nn.ModuleList([tower, head])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
    progress = tqdm(range(state.load("dense", modules, optimizer), steps), desc="dense", unit="step", mininterval=5.0)
    for step in progress:
        optimizer.param_groups[0]["lr"] = 2e-3 * _rate(step, steps)
        _, batch = _batch(data, seed, step)
        images = processor.image_processor(images=[Image.fromarray(p.pixels) for p in batch], return_tensors="pt")
        features = tower(images["pixel_values"], grid_thw=images["image_grid_thw"]).pooler_output
        guess = head(torch.cat(list(features)) if isinstance(features, list | tuple) else features)
        guess = guess.view(len(batch), GRID * GRID, -1)
        covered, offset, corner, kind = (torch.from_numpy(a) for a in _targets(batch))
        hit = covered > THRESHOLD
        loss = (
            3 * F.binary_cross_entropy_with_logits(guess[..., 0], hit.float())
            + F.smooth_l1_loss(guess[..., 1:5][hit], offset[hit], beta=0.2)
            + F.smooth_l1_loss(guess[..., 5:9][hit], corner[hit], beta=0.2)
            + 0.3 * F.cross_entropy(guess[..., 9:][hit], kind[hit])
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        right = ((guess[..., 0] > 0).any(1) == hit.any(1)).float().mean().item()
        progress.set_postfix(loss=f"{loss.item():.3f}", images_right=f"{right:.2f}")
        if (step + 1) % CHECKPOINT_EVERY == 0:
            state.save("dense", step + 1, modules, optimizer)


def _targets(batch: list[Picture]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """For each visual token: share of it inside a box, that box relative to it, that box absolute, kind of defect.

    Returns:
        `[n, tokens]`, `[n, tokens, 4]` in cells, `[n, tokens, 4]` in quarters of the side, `[n, tokens]`.
    """
    low = np.arange(GRID, dtype=np.float32) / GRID
    covered = np.zeros((len(batch), GRID * GRID), np.float32)
    offset = np.zeros((len(batch), GRID * GRID, 4), np.float32)
    corner = np.zeros_like(offset)
    kind = np.zeros((len(batch), GRID * GRID), np.int64)
    y, x = (a.reshape(-1) for a in np.meshgrid(low, low, indexing="ij"))
    centre = np.stack([x, y, x, y], 1) + 0.5 / GRID
    for i, picture in enumerate(batch):
        for box in picture.boxes:
            width = np.clip(np.minimum(x + 1 / GRID, box[2]) - np.maximum(x, box[0]), 0, None)
            height = np.clip(np.minimum(y + 1 / GRID, box[3]) - np.maximum(y, box[1]), 0, None)
            share = width * height * GRID * GRID
            better = share > covered[i]
            covered[i] = np.where(better, share, covered[i])
            offset[i][better] = ((box - centre) * GRID)[better]
            corner[i][better] = box * 4
            kind[i][better] = KINDS.index(picture.defect or KINDS[0])
    return covered, offset, corner, kind


def _responses(
    model: PreTrainedModel, processor: Any, data: list[Picture], steps: int, seed: int, state: _Checkpoint
) -> None:
    import torch

    vision = [p for n, p in model.named_parameters() if "visual" in n]
    language = [p for n, p in model.named_parameters() if "visual" not in n]
    groups = [{"params": language, "lr": 2e-3}, {"params": vision, "lr": 5e-4}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.98))
    start = _prompt_ids(processor)
    start_step = state.load("responses", model, optimizer)
    progress = tqdm(range(start_step, steps), desc="responses", unit="step", mininterval=5.0)
    for step in progress:
        for group, rate in zip(optimizer.param_groups, (2e-3, 5e-4), strict=True):
            group["lr"] = rate * _rate(step, steps)
        rng, batch = _batch(data, seed + 1, step)
        answers = [processor.tokenizer(annotate(p, rng) + "<|im_end|>")["input_ids"] for p in batch]
        longest = max(len(a) for a in answers)
        pad = processor.tokenizer.pad_token_id
        ids = torch.tensor([start + a + [pad] * (longest - len(a)) for a in answers])
        length = torch.tensor([[len(start) + len(a)] for a in answers])
        position = torch.arange(ids.shape[1])[None]
        images = processor.image_processor(images=[Image.fromarray(p.pixels) for p in batch], return_tensors="pt")
        loss = model(
            input_ids=ids,
            attention_mask=(position < length).long(),
            mm_token_type_ids=(ids == model.config.image_token_id).long(),
            labels=ids.masked_fill((position < len(start)) | (position >= length), -100),
            **images,
        ).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % CHECKPOINT_EVERY == 0:
            state.save("responses", step + 1, model, optimizer)


def _prompt_ids(processor: Any) -> list[int]:
    """The prompt's tokens, image included; the same for every picture, since all have the same size."""
    system, user = prompt.messages(families.get(tiny.FAMILY).units)
    blank = Image.new("RGB", (tiny.SIDE, tiny.SIDE))
    content = [{"type": "image", "image": blank}, {"type": "text", "text": user["content"]}]
    chat = [{**system, "content": [{"type": "text", "text": system["content"]}]}, {**user, "content": content}]
    encoded: Any = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)
    return [int(i) for i in encoded["input_ids"][0]]
