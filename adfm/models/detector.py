"""Reference detector: a small convolutional head on frozen image features, the baseline for a language model.

The features are those of EfficientNet-Lite0 at strides 4 (pooled to 8), 8, 16 and 32, which the head joins at stride 8.
Where it was trained on tiles, an image here is a tile: `adfm.models.predictor` cuts images and joins the answers.
"""

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

STAGE = model_folder.DETECTOR  # in `adfm.json`
WEIGHTS = "detector.safetensors"
SIDE = 320  # pixels of a square picture's side; a picture of another shape has the same area
STRIDE = 8  # pixels of the picture to one cell of the map of defects
_COARSEST, _LEAST = 32, 64  # pixels: sides are multiples of the one, and at least the other
_CHANNELS = 48
_REFINE = 2  # the map is interpolated to this many times as many cells before regions are cut out of it


class Rule(NamedTuple):
    """How boxes are cut out of the map of defects."""

    least: float  # probability of a cell of a region
    share: float  # or this share of the map's highest probability, if that is more
    most: int  # regions to keep, those with the highest probability first


class Detection(NamedTuple):
    """The answer to one image."""

    score: float  # probability of a defect
    regions: list[Box]  # as of `regions`, whatever the score; empty for a detector that was trained without boxes
    kind: str | None  # the most probable kind of defect; `None` if the detector knows fewer than two


class Outputs(NamedTuple):
    """The head's outputs for n pictures of one size: logits."""

    cells: Tensor  # of a defect, [n, rows, columns]
    top: Tensor  # mean of the highest hundredth of `cells`, [n]
    image: Tensor  # of a defective image, [n]
    kinds: Tensor  # [n, kinds]


class Head(nn.Module):
    """The trained part, about 66,000 weights, for a number of kinds of defects."""

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
        """Compute the outputs from `features`, stacked: by stride, [n, channels, rows, columns]."""
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
    """A trained detector in memory."""

    head: Head  # in evaluation mode
    threshold: float  # the score from which on an image is called anomalous
    rule: Rule | None  # `None` if it was trained without boxes
    kinds: list[str]  # in the order of the head's output
    by_image: bool  # the score is the image's logit; else the map's highest, since training had no normal images
    chosen_on: int = 0  # images that threshold and rule were chosen on

    def detect(self, pictures: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Detection]:
        """Return the answers to images, from the `picture` of each and its width and height in pixels."""
        compute = efficientnet.Features(tuple(efficientnet.CHANNELS), keep=0)
        return [self._detect(maps, size) for maps, size in zip(features(compute, pictures), sizes, strict=True)]

    def _detect(self, maps: dict[int, Tensor], size: tuple[int, int]) -> Detection:
        # One image at a time, on the CPU in float32: a folder gives the same answers on any machine, 50 ms each.
        with torch.inference_mode():
            outputs = self.head({stride: one[None] for stride, one in maps.items()})
        boxes = regions(refined(outputs.cells[0].sigmoid()), size, self.rule) if self.rule else []
        kind = self.kinds[int(outputs.kinds[0].argmax())] if len(self.kinds) > 1 else None
        return Detection(score_of(outputs, self.by_image)[0], boxes, kind)


def score_of(outputs: Outputs, by_image: bool) -> list[float]:
    """Return the probability of a defect for each picture, as `Detector.by_image` says."""
    logits = outputs.image if by_image else outputs.cells.flatten(1).amax(1)
    return [float(score) for score in logits.double().sigmoid()]


def picture_size(width: int, height: int) -> tuple[int, int]:
    """Return width and height that an image is resized to: about `SIDE`² pixels, its aspect ratio nearly kept."""
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
    """Return boxes around the connected regions of a `refined` map of defects, which covers an image of `size`.

    Returns:
        The boxes in pixels of the image, half-open, the highest peak first; at least one.
    """
    from scipy import ndimage

    peak = float(fine.max())
    labels, count = ndimage.label(fine >= min(max(rule.least, rule.share * peak), peak))
    peaks = ndimage.maximum(fine, labels, range(1, count + 1))
    (rows, columns), (width, height) = fine.shape, size
    boxes = [
        Box(x.start * width / columns, y.start * height / rows, x.stop * width / columns, y.stop * height / rows)
        for y, x in ndimage.find_objects(labels)
    ]
    return [boxes[i] for i in sorted(range(count), key=lambda i: -peaks[i])[: rule.most]]


def load(folder: Path) -> Detector:
    """Load a detector from its folder; raise `AdfmError` if that does not hold a whole one."""
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
