"""Reference detector: a small convolutional head on frozen image features, which gives a verdict and boxes.

It is what a language model has to beat, and what to use where it does not. `adfm.training.detector` trains it.

The features are those of EfficientNet-Lite0 (`adfm.tiny.efficientnet`) at strides 4 (pooled to 8), 8, 16 and 32. The
head joins them at stride 8 and has three outputs: a map of defects, the image's logit, and the kind of the defect. It
runs on the CPU, in float32, so that a folder gives the same answers on any machine: about 50 ms an image on one core.

A folder of a detector holds `detector.safetensors` (weights, and mean and spread of the features) and `adfm.json`,
whose `stage` is `detector`. Where it was trained on tiles of large images (`params.tile` in `adfm.json`), an image is
answered tile by tile: `adfm.models.predictor.Predictor` cuts and joins, and an image here is a tile.
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
from adfm.models import loading
from adfm.records import Box
from adfm.tiny import efficientnet

STAGE = loading.DETECTOR
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
    """How boxes are made from the map of defects.

    Args:
        least: Probability from which on a cell belongs to a region.
        share: Or this share of the map's highest, if it is more.
        most: Regions that are kept, those with the highest probability first.
    """

    least: float
    share: float
    most: int


class Detection(NamedTuple):
    """The answer to one image.

    Args:
        score: Probability of a defect.
        regions: Boxes in pixels of the image, half-open, within it, the most suspicious first; whatever the score. None
            of a detector that was trained without boxes.
        kind: The most probable kind of defect; `None` if the detector knows fewer than two.
    """

    score: float
    regions: list[Box]
    kind: str | None


class Outputs(NamedTuple):
    """What the head computes for n pictures of one size.

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
        """The outputs for pictures of one size.

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
        by_image: Whether the score is the image's logit; otherwise the highest of the map, as no normal image was
            trained on.
        chosen_on: Images that threshold and rule were chosen on.
    """

    head: Head
    threshold: float
    rule: Rule | None
    kinds: list[str]
    by_image: bool
    chosen_on: int = 0

    def detect(self, pictures: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Detection]:
        """The answers to some images.

        Args:
            pictures: Of each image its `picture`.
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
            score_of(outputs, self.by_image)[0], regions(cells, size, self.rule) if self.rule else [], kind
        )


def score_of(outputs: Outputs, by_image: bool) -> list[float]:
    """Of each picture the probability of a defect, as `Detector.by_image` says."""
    logits = outputs.image if by_image else outputs.cells.flatten(1).amax(1)
    return [float(score) for score in logits.double().sigmoid()]


def picture_size(width: int, height: int) -> tuple[int, int]:
    """Width and height that an image of `width` x `height` pixels is resized to.

    About `SIDE` x `SIDE` pixels in all, with the aspect ratio kept as far as sides are multiples of 32 and at least 64.
    """
    scale = SIDE / math.sqrt(width * height)
    across, down = (max(_LEAST, round(side * scale / _COARSEST) * _COARSEST) for side in (width, height))
    return across, down


def picture(image: Image.Image) -> Tensor:
    """An image as the backbone takes it: RGB from -1 to 1, [3, height, width], of `picture_size`."""
    resized = image.convert("RGB").resize(picture_size(*image.size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 127.5 - 1


def features(compute: efficientnet.Features, pictures: Sequence[Tensor]) -> list[dict[int, Tensor]]:
    """The maps of some pictures that the head takes: those of `compute`, the one of stride 4 pooled to stride 8."""
    return [maps | {4: F.avg_pool2d(maps[4], 2).half().float()} for maps in compute(pictures)]


def regions(cells: Tensor, size: tuple[int, int], rule: Rule) -> list[Box]:
    """Boxes around the connected regions of a map of defects.

    Args:
        cells: Probabilities, [rows, columns]; the map covers the whole image.
        size: Width and height of the image in pixels.
        rule: What belongs to a region, and how many are kept.

    Returns:
        The boxes in pixels of the image, half-open, the highest peak first; at least one.
    """
    return bounded(refined(cells), size, rule)


def refined(cells: Tensor) -> NDArray[np.float32]:
    """The map with `_REFINE` times as many rows and columns, bilinear between the middles of cells."""
    fine = F.interpolate(cells[None, None].float(), scale_factor=_REFINE, mode="bilinear", align_corners=False)
    return np.asarray(fine[0, 0].numpy())


def bounded(fine: NDArray[np.float32], size: tuple[int, int], rule: Rule) -> list[Box]:
    """As `regions`, of a map that is `refined` already."""
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
    """Reads a detector's folder.

    Raises:
        AdfmError: It does not hold a whole detector.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    about: Any = loading.describe(folder) or {}
    try:
        kinds, rule = [str(kind) for kind in about["kinds"]], about["rule"]
        head = Head(len(kinds))
        head.load_state_dict(load_file(folder / WEIGHTS))
        return Detector(
            head.eval().requires_grad_(False),
            float(about["threshold"]),
            Rule(float(rule["least"]), float(rule["share"]), int(rule["most"])) if rule else None,
            kinds,
            bool(about["score"] == "image"),
            int(about["chosen_on"]),
        )
    except (OSError, LookupError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise AdfmError(
            f"{folder} does not hold a whole detector ({error}); train it again: adfm detector SHARDS {folder}"
        ) from error
