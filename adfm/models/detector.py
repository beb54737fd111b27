"""Reference detector: a small convolutional head on frozen image features, the baseline for a language model.

The features are those of EfficientNet-Lite0 (`adfm.tiny.efficientnet`) at strides 4 (pooled to 8), 8, 16 and 32. The
head joins them at stride 8 and has three outputs: a map of defects, the image's logit, and the kind of the defect. It
runs on the CPU, in float32, so that a folder gives the same answers on any machine: about 50 ms an image on one core.

A folder of a detector holds `detector.safetensors` (weights, and mean and spread of the features) and `adfm.json`.
Where it was trained on tiles (`params.tile` there), an image here is a tile: `adfm.models.predictor.Predictor` cuts
images and joins the answers. `adfm.training.detector` trains it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from adfm.errors import AdfmError
from adfm.models import model_folder
from adfm.records import Box
from adfm.tiny import efficientnet

STAGE = model_folder.DETECTOR
"""The `stage` in `adfm.json` of a detector's folder."""

WEIGHTS = "detector.safetensors"

SIDE = 320
"""Pixels of a square picture's side; a picture of another shape has the same area."""

STRIDE = 8
"""Pixels of the picture to one cell of the map of defects."""

_COARSEST, _LEAST = 32, 64  # pixels: sides are multiples of the one, and at least the other
_CHANNELS = 48
_REFINE = 2  # the map is interpolated to this many times as many cells before regions are cut out of it


class Rule(NamedTuple):
    """How boxes are cut out of the map of defects.

    Args:
        least: Least probability of a cell of a region.
        share: Or this share of the map's highest probability, if that is more.
        most: Number of regions to keep, those with the highest probability first.
    """

    least: float
    share: float
    most: int


class Detection(NamedTuple):
    """The answer to one image.

    Args:
        score: Probability of a defect.
        regions: Boxes in pixels of the image, half-open, within it, the most suspicious first, whatever the score;
            empty for a detector that was trained without boxes.
        kind: The most probable kind of defect; `None` if the detector knows fewer than two.
    """

    score: float
    regions: list[Box]
    kind: str | None


class Outputs(NamedTuple):
    """The head's outputs for n pictures of one size.

    Args:
        cells: Logits of a defect, [n, rows, columns].
        top: Mean of the highest hundredth of `cells`, [n].
        image: Logits of a defective image, [n].
        kinds: Logits of the kinds, [n, kinds].
    """

    cells: Tensor
    top: Tensor
    image: Tensor
    kinds: Tensor


class Head(nn.Module):
    """The trained part, about 66,000 weights.

    Args:
        kinds: How many kinds of defect it tells apart.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, kinds: int) -> None:
        super().__init__()
        width = _CHANNELS
        self.reduce = nn.ModuleDict({str(s): nn.Conv2d(c, width, 1) for s, c in efficientnet.CHANNELS.items()})
        # Of each channel of the features over training pictures; without them the deep maps drown the others.
        channels = sum(efficientnet.CHANNELS.values())
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("spread", torch.ones(channels))
        self.norm, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.near = nn.Conv2d(width, width, 3, padding=1)
        self.wide = nn.Conv2d(width, width, 3, padding=2, dilation=2)
        self.drop = nn.Dropout2d(0.1)
        self.cells = nn.Conv2d(width, 1, 1)
        self.image = nn.Linear(2 * width + 1, 1)
        self.kinds = nn.Linear(2 * width, max(kinds, 1))
        nn.init.constant_(self.cells.bias, -3.0)  # type: ignore[arg-type]  # most cells show no defect

    def forward(self, maps: dict[int, Tensor]) -> Outputs:
        """Compute the outputs for pictures of one size.

        Args:
            maps: By stride, [n, channels, rows, columns], as `features` gives them.
        """
        grid, x, first = maps[STRIDE].shape[-2:], torch.zeros(()), 0
        for stride, channels in efficientnet.CHANNELS.items():
            mean, spread = (values[first : first + channels, None, None] for values in (self.mean, self.spread))
            reduced = self.reduce[str(stride)]((maps[stride] - mean) / spread)
            if reduced.shape[-2:] != grid:
                reduced = F.interpolate(reduced, size=grid, mode="bilinear", align_corners=False)
            x, first = x + reduced, first + channels
        x = self.drop(F.relu(self.norm(x)))
        x = x + F.relu(self.norm2(self.near(x)))
        x = x + F.relu(self.wide(x))
        cells = self.cells(x)[:, 0]
        count = grid[0] * grid[1]
        top = cells.flatten(1).topk(max(count // 100, 1), 1).values.mean(1)
        # The mean alone loses small defects.
        pooled = torch.cat([x.mean((2, 3)), x.flatten(2).topk(max(count // 50, 1), 2).values.mean(2)], 1)
        return Outputs(cells, top, self.image(torch.cat([pooled, top[:, None]], 1))[:, 0], self.kinds(pooled))


@dataclass(frozen=True)
class Detector:
    """A trained detector in memory.

    Args:
        head: The trained part, in evaluation mode.
        threshold: The score from which on an image is called anomalous.
        rule: How boxes are made; `None` if it was trained without boxes.
        kinds: The kinds of defect, in the order of the head's output.
        by_image: Whether the score is the image's logit; otherwise it is the map's highest, since training had no
            normal images.
        chosen_on: Images that threshold and rule were chosen on.
    """

    head: Head
    threshold: float
    rule: Rule | None
    kinds: list[str]
    by_image: bool
    chosen_on: int = 0

    def detect(self, pictures: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Detection]:
        """Return the answers to some images.

        Args:
            pictures: The `picture` of each image.
            sizes: Width and height of each image in pixels.
        """
        compute = efficientnet.Features(tuple(efficientnet.CHANNELS), keep=0)
        return [self._detect(maps, size) for maps, size in zip(features(compute, pictures), sizes, strict=True)]

    def _detect(self, maps: dict[int, Tensor], size: tuple[int, int]) -> Detection:
        with torch.inference_mode():
            outputs = self.head({stride: one[None] for stride, one in maps.items()})
        cells = outputs.cells[0].sigmoid()
        kind = self.kinds[int(outputs.kinds[0].argmax())] if len(self.kinds) > 1 else None
        return Detection(
            score_of(outputs, self.by_image)[0], regions(refined(cells), size, self.rule) if self.rule else [], kind
        )


def score_of(outputs: Outputs, by_image: bool) -> list[float]:
    """Return the probability of a defect for each picture, as `Detector.by_image` says."""
    logits = outputs.image if by_image else outputs.cells.flatten(1).amax(1)
    return [float(score) for score in logits.double().sigmoid()]


def picture_size(width: int, height: int) -> tuple[int, int]:
    """Return width and height that an image of `width` x `height` pixels is resized to.

    About `SIDE` x `SIDE` pixels in all, with the aspect ratio kept as far as sides are multiples of 32 and at least 64.
    """
    scale = SIDE / math.sqrt(width * height)
    across, down = (max(_LEAST, round(side * scale / _COARSEST) * _COARSEST) for side in (width, height))
    return across, down


def picture(image: Image.Image) -> Tensor:
    """Return an image as the backbone's input: RGB from -1 to 1, [3, height, width], of `picture_size`."""
    resized = image.convert("RGB").resize(picture_size(*image.size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 127.5 - 1


def features(compute: efficientnet.Features, pictures: Sequence[Tensor]) -> list[dict[int, Tensor]]:
    """Return the head's inputs for some pictures: the maps of `compute`, that of stride 4 pooled to stride 8."""
    return [maps | {4: F.avg_pool2d(maps[4], 2).half().float()} for maps in compute(pictures)]


def refined(cells: Tensor) -> NDArray[np.float32]:
    """Interpolate a map to `_REFINE` times as many rows and columns, bilinear between the middles of cells."""
    fine = F.interpolate(cells[None, None].float(), scale_factor=_REFINE, mode="bilinear", align_corners=False)
    return np.asarray(fine[0, 0].numpy())


def regions(fine: NDArray[np.float32], size: tuple[int, int], rule: Rule) -> list[Box]:
    """Return boxes around the connected regions of a `refined` map of defects.

    Args:
        fine: Probabilities, [rows, columns]; the map covers the whole image.
        size: Width and height of the image in pixels.
        rule: What belongs to a region, and how many are kept.

    Returns:
        The boxes in pixels of the image, half-open, the highest peak first; at least one.
    """
    from scipy import ndimage

    peak = float(fine.max())
    labels, _ = ndimage.label(fine >= min(max(rule.least, rule.share * peak), peak))
    (rows, columns), (width, height) = fine.shape, size
    boxes = []
    for number, (down, across) in enumerate(ndimage.find_objects(labels), 1):
        inside = fine[down, across][labels[down, across] == number]
        box = Box(
            across.start * width / columns,
            down.start * height / rows,
            across.stop * width / columns,
            down.stop * height / rows,
        )
        boxes.append((float(inside.max()), box))
    boxes.sort(key=lambda each: -each[0])
    return [box for _, box in boxes[: rule.most]]


def load(folder: Path) -> Detector:
    """Load a detector from its folder.

    Raises:
        AdfmError: It does not hold a whole detector.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    description: Any = model_folder.describe(folder) or {}
    try:
        kinds, rule = [str(kind) for kind in description["kinds"]], description["rule"]
        head = Head(len(kinds))
        head.load_state_dict(load_file(folder / WEIGHTS))
        return Detector(
            head.eval().requires_grad_(False),
            float(description["threshold"]),
            Rule(float(rule["least"]), float(rule["share"]), int(rule["most"])) if rule else None,
            kinds,
            bool(description["score"] == "image"),
            int(description["chosen_on"]),
        )
    except (OSError, LookupError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise AdfmError(
            f"{folder} does not hold a whole detector ({error}); train it again: adfm detector SHARDS {folder}"
        ) from error
