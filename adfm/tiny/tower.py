"""The embedded model's network: Qwen3-VL's own classes, with a vision tower that was pretrained on photographs.

The tower is the frozen EfficientNet-Lite0, which a model's folder does not contain, and a small neck. In cells of 16 x
16 pixels the neck computes a logit and the box of the defect there, and for the picture the kind of its defect. The
language model reads the features, one token for every 2 x 2 cells, with the regions of the logits and the kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLTextConfig,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from adfm.method import kinds as kinds_
from adfm.tiny.efficientnet import CHANNELS, Features

FAMILY = "adfm_embedded"
STRIDES = (8, 16, 32)
CELL = 16
REGIONS = 8  # the most of a picture that the tower passes to the language model
_FREQUENCIES = 8  # the finest tells apart places that differ by a hundredth of the picture
_CODED = 1 + 4 * REGIONS + 2 * _FREQUENCIES  # logit, number of the edge, edge
_REGION_LOGIT = 0.7  # a cell of a region has a larger logit
_COVERED = 0.25  # least share of a cell, or of the defect if that is smaller, that makes it a cell of the defect

features = Features(STRIDES, keep=2 << 30)  # of the most recent pictures, shared by all models of this process


@strict
class TowerConfig(PreTrainedConfig):
    """Sizes of the tower.

    `hidden_size` are the neck's channels, `intermediate_size` those of the features; `patch_size` and
    `spatial_merge_size` are those of the processor.
    """

    model_type = "adfm_tower"
    base_config_key = "vision_config"

    hidden_size: int = 64  # channels of the neck
    intermediate_size: int = sum(CHANNELS[stride] for stride in STRIDES)  # channels of the features
    out_hidden_size: int = 128
    depth: int = 1
    patch_size: int = CELL
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    in_channels: int = 3
    initializer_range: float = 0.02


@strict
class EmbeddedConfig(Qwen3VLConfig):
    """Qwen3-VL's configuration with the tower's."""

    model_type = FAMILY
    sub_configs_defaults = {"vision_config": TowerConfig, "text_config": Qwen3VLTextConfig}  # type: ignore[dict-item] # noqa: RUF012


@dataclass
class Places:
    """The neck's outputs for one picture of `rows` x `columns` cells."""

    defect: Tensor  # logit of a defect in each cell, `[rows, columns]`
    boxes: Tensor  # the defect's box, `[rows, columns, 4]`, as fractions of the picture's width and height
    image: Tensor  # logit of a defect anywhere in the picture
    kinds: Tensor  # logits of the kinds of its defect, `[kinds_.MOST]`


@dataclass
class TowerOutput(BaseModelOutputWithDeepstackFeatures):
    """The output that Qwen3-VL expects of a tower, with `places` for each picture."""

    places: list[Places] | None = None


class Tower(PreTrainedModel):
    """Pretrained features and a neck, with the inputs and outputs of Qwen3-VL's vision tower."""

    config_class = TowerConfig
    base_model_prefix = "visual"
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: TowerConfig) -> None:
        super().__init__(config)
        self.spatial_merge_size = config.spatial_merge_size
        width, out, merged = config.hidden_size, config.out_hidden_size, config.spatial_merge_size**2
        for stride in STRIDES:
            self.register_buffer(f"mean{stride}", torch.zeros(CHANNELS[stride]))
            self.register_buffer(f"spread{stride}", torch.ones(CHANNELS[stride]))
        self.fine = nn.Conv2d(CHANNELS[8], width, 2, 2)
        self.middle = nn.Conv2d(CHANNELS[16], width, 1)
        self.coarse = nn.Conv2d(CHANNELS[32], width, 1)
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.near = nn.Conv2d(width, width, 3, padding=1)
        self.far = nn.Conv2d(width, width, 3, padding=2, dilation=2)
        self.place = nn.Conv2d(width, 5, 1)
        self.image = nn.Linear(2 * width, 1)
        self.kinds = nn.Linear(2 * width, kinds_.MOST)
        self.up = nn.Linear(merged * width, out)
        self.context = nn.Linear(2 * width, out)
        self.code = nn.Linear(_CODED, out)
        self.kind = nn.Linear(kinds_.MOST, out, bias=False)
        self.last = nn.LayerNorm(out)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, pixel_values: Tensor, grid_thw: Tensor, **_: Any) -> TowerOutput:
        """Compute the tokens of some pictures.

        Args:
            pixel_values: Patches as Qwen's image processor packs them, `[patches, channels * 2 * patch * patch]`.
            grid_thw: For each picture 1, and its patches down and across, `[pictures, 3]`.

        Returns:
            `pooler_output` `[tokens, hidden]`, the pictures one after the other; `places`.
        """
        maps, grids = self.maps(pixel_values, grid_thw), [tuple(grid) for grid in grid_thw.tolist()]
        tokens: list[Tensor] = [pixel_values] * len(grids)
        places: list[Any] = [None] * len(grids)
        for size in dict.fromkeys(grids):  # pictures of one size go through the neck together
            alike = [number for number, grid in enumerate(grids) if grid == size]
            stacked = {stride: torch.stack([maps[number][stride] for number in alike]) for stride in STRIDES}
            for number, of_one, place in zip(alike, *self._neck(stacked), strict=True):
                tokens[number], places[number] = of_one, place
        together = torch.cat(tokens)
        return TowerOutput(last_hidden_state=together, pooler_output=together, deepstack_features=[], places=places)

    def maps(self, pixel_values: Tensor, grid_thw: Tensor) -> list[dict[int, Tensor]]:
        """Compute the pretrained features of some pictures, by stride; arguments as of `forward`."""
        grids = [(rows, columns) for _, rows, columns in grid_thw.tolist()]
        packed = pixel_values.split([rows * columns for rows, columns in grids])
        return features([unpacked(each, *grid, self.config) for each, grid in zip(packed, grids, strict=True)])

    def _neck(self, maps: dict[int, Tensor]) -> tuple[Tensor, list[Places]]:
        fine, middle, coarse = (
            ((maps[stride] - self._of("mean", stride)) / self._of("spread", stride)).to(self.dtype)
            for stride in STRIDES
        )
        wide = F.interpolate(self.coarse(coarse), scale_factor=2.0, mode="bilinear", align_corners=False)
        x = F.relu(self.norm1(self.fine(fine) + self.middle(middle) + wide))
        x = x + F.relu(self.norm2(self.near(x)))
        x = x + F.relu(self.far(x))
        defect, offsets = self.place(x).float().split((1, 4), 1)
        logits, boxes, summary = defect[:, 0], _boxes(offsets), pooled(x)
        image, kinds = self.image(summary)[:, 0].float(), self.kinds(summary).float()
        places = [Places(*each) for each in zip(logits, boxes, image, kinds, strict=True)]
        return self.tokens(x, summary, logits.detach(), boxes.detach(), kinds.detach().softmax(1)), places

    def tokens(self, x: Tensor, summary: Tensor, defect: Tensor, boxes: Tensor, kinds: Tensor) -> Tensor:
        """Compute the tokens of some pictures of one size, `[n, tokens, out_hidden_size]`, from the neck's outputs.

        Args:
            x: The neck's features, `[n, hidden_size, rows, columns]`.
            summary: `pooled` of them.
            defect: As in `Places`, stacked.
            boxes: As in `Places`, stacked.
            kinds: Probability of each kind, `[n, kinds_.MOST]`.
        """
        seen = self.up(F.pixel_unshuffle(x, self.spatial_merge_size).flatten(2).transpose(1, 2))
        code = _code(defect, boxes, self.spatial_merge_size).to(self.dtype)
        of_picture = self.context(summary) + self.kind(4 * kinds.to(self.dtype))
        tokens: Tensor = self.last(seen + self.code(code) + of_picture[:, None])
        return tokens

    def _of(self, what: str, stride: int) -> Tensor:
        values: Tensor = getattr(self, f"{what}{stride}")
        return values.float()[:, None, None]


def pooled(x: Tensor) -> Tensor:
    """Return the mean of each channel over a picture, and that of its largest cells: `[n, 2 * channels]`."""
    flat = x.flatten(2)
    return torch.cat([flat.mean(2), flat.topk(max(flat.shape[2] // 50, 2), 2).values.mean(2)], 1)


def _code(defect: Tensor, boxes: Tensor, merge: int) -> Tensor:
    """Return the numbers of each token, `[n, tokens, _CODED]`: the logit of its likeliest cell, an edge of a region."""
    # The first token has the left edge of the first region, the second its upper edge, and so on: to write a box is to
    # copy token after token. A language model of this size does not learn in an hour to pick four edges from one token.
    logit = F.max_pool2d(defect[:, None], merge).flatten(2).transpose(1, 2)
    most = min(logit.shape[1] // 4, REGIONS)
    turn = logit.new_zeros(len(logit), logit.shape[1], 4 * REGIONS)
    edge = logit.new_zeros(len(logit), logit.shape[1], 2 * _FREQUENCIES)
    for number, (logits, corners) in enumerate(zip(defect, boxes, strict=True)):
        edges = [value for box in regions(logits, corners, most) for value in box]
        turn[number, : len(edges), : len(edges)] = 4 * torch.eye(len(edges))
        edge[number, : len(edges)] = sinusoids(logit.new_tensor(edges).clamp(0, 1))
    return torch.cat([logit / 4, turn, edge], 2)


def sinusoids(values: Tensor) -> Tensor:
    """Return sines and cosines of `values` from 0 to 1: `[..., 2 * _FREQUENCIES]`."""
    # After 400 steps, 0.43 of the coordinates that began so were right, of those at random 0.25 (docs/experiments.md).
    angles = values[..., None] * math.pi * 2 ** torch.arange(_FREQUENCIES, device=values.device)
    return torch.cat([angles.sin(), angles.cos()], -1)


def regions(logits: Tensor, boxes: Tensor, most: int = REGIONS) -> list[tuple[float, float, float, float]]:
    """Return the `most` likeliest boxes around connected cells with a defect, also by a corner, in reading order.

    Args:
        logits: As `Places.defect`.
        boxes: As `Places.boxes`, whose unit the result has.
        most: How many at most.
    """
    from scipy import ndimage

    # A region's box is halfway between the extent of its cells and the mean of the boxes that they predict, weighted by
    # their probabilities: the first is better for long defects, the second for small ones.
    values, corners = logits.cpu().numpy(), boxes.cpu().numpy()
    numbered, count = ndimage.label(values > _REGION_LOGIT, np.ones((3, 3)))
    rows, columns = values.shape
    candidates = []
    for number, (down, across) in enumerate(ndimage.find_objects(numbered, count), 1):
        inside = numbered == number
        weight = 1 / (1 + np.exp(-values[inside]))
        extent = np.array([across.start / columns, down.start / rows, across.stop / columns, down.stop / rows])
        x1, y1, x2, y2 = (extent + (corners[inside] * weight[:, None]).sum(0) / weight.sum()) / 2
        candidates.append((values[inside].max(), (float(x1), float(y1), float(x2), float(y2))))
    likeliest = sorted(candidates, key=lambda each: -each[0])[:most]
    return sorted((box for _, box in likeliest), key=lambda box: (box[1], box[0]))


def _boxes(offsets: Tensor) -> Tensor:
    """Return boxes, `[n, rows, columns, 4]`, from the offsets of their corners to the middle of each cell, in cells."""
    rows, columns = offsets.shape[-2:]
    cell = offsets.new_tensor([1 / columns, 1 / rows] * 2)[None, :, None, None]
    down, across = ((torch.arange(count, device=offsets.device) + 0.5) / count for count in (rows, columns))
    y, x = torch.meshgrid(down, across, indexing="ij")
    return (torch.stack([x, y, x, y]) + offsets * cell).permute(0, 2, 3, 1)


def unpacked(patches: Tensor, rows: int, columns: int, config: Any) -> Tensor:
    """Unpack a picture from the patches of Qwen's image processor: `[channels, rows * patch, columns * patch]`.

    Args:
        patches: `[rows * columns, channels * frames * patch * patch]`; the frames of a still picture are the same.
        rows: Patches down.
        columns: Patches across.
        config: A `TowerConfig`.
    """
    merge, side = config.spatial_merge_size, config.patch_size
    shape = (rows // merge, columns // merge, merge, merge, config.in_channels, config.temporal_patch_size, side, side)
    picture = patches.view(shape)[:, :, :, :, :, 0].permute(4, 0, 2, 5, 1, 3, 6)
    return picture.reshape(config.in_channels, rows * side, columns * side)


def targets(boxes: Sequence[Sequence[float]], rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return whether each cell belongs to a defect, `[rows, columns]`, and that defect's box, `[rows, columns, 4]`.

    A cell belongs to the defect of which it holds the largest share, of the cell's area or, if smaller, the defect's; a
    defect of which no cell holds enough takes the cell of its middle. Boxes are fractions of width and height.
    """
    best = torch.zeros(rows, columns)
    box_of = torch.zeros(rows, columns, 4)
    across, down = torch.arange(columns) / columns, torch.arange(rows) / rows
    for box in boxes:
        x1, y1, x2, y2 = box
        width = ((across + 1 / columns).clamp(max=x2) - across.clamp(min=x1)).clamp(min=0)
        height = ((down + 1 / rows).clamp(max=y2) - down.clamp(min=y1)).clamp(min=0)
        share = height[:, None] * width / max(min(1 / (rows * columns), (x2 - x1) * (y2 - y1)), 1e-9)
        row = min(max(int((y1 + y2) / 2 * rows), 0), rows - 1)
        column = min(max(int((x1 + x2) / 2 * columns), 0), columns - 1)
        share[row, column] = share[row, column].clamp(min=1.0)
        here = share > best
        best = torch.where(here, share, best)
        box_of[here] = torch.tensor([float(v) for v in box])
    return best >= _COVERED, box_of


def loss(
    places: Sequence[Places],
    boxes: Sequence[Sequence[Sequence[float]] | None],
    labels: Sequence[bool],
    kinds: Sequence[int | None],
) -> Tensor:
    """Return the neck's loss on the boxes, labels and kinds of some pictures, the mean over the pictures.

    Each picture adds the cross-entropy of its cells, a Dice loss and the distance of the boxes in the defects' cells;
    and the cross-entropies of its label and kind.

    Args:
        places: The neck's outputs, for each picture.
        boxes: Ground truth of each, as fractions of width and height; `None` where a defect's place is not known.
        labels: Whether each is defective.
        kinds: The number of its kind, below `kinds_.MOST`; `None` where none is known.
    """
    total = places[0].image.new_zeros(())
    for place, truth, label, kind in zip(places, boxes, labels, kinds, strict=True):
        total = total + 0.5 * F.binary_cross_entropy_with_logits(place.image, place.image.new_tensor(float(label)))
        if kind is not None:
            total = total + 0.5 * F.cross_entropy(place.kinds, torch.tensor(kind, device=place.kinds.device))
        if truth is None:
            continue
        rows, columns = place.defect.shape
        hit, box_of = (each.to(place.defect.device) for each in targets(truth, rows, columns))
        target = hit.float()
        cells = F.binary_cross_entropy_with_logits(place.defect, target, pos_weight=target.new_tensor(3.0))
        total = total + 2 * cells
        if hit.any():
            probability = place.defect.sigmoid()
            # A defect of one cell counts as much as one of a hundred.
            dice = 1 - (2 * (probability * target).sum() + 1) / (probability.sum() + target.sum() + 1)
            side = target.new_tensor([columns, rows] * 2)
            off = F.smooth_l1_loss(place.boxes[hit] * side, box_of[hit] * side, beta=0.3)
            total = total + 0.5 * dice + 0.25 * off
    return total / len(places)


class EmbeddedForConditionalGeneration(Qwen3VLForConditionalGeneration):
    """Qwen3-VL with the tower of this module."""

    config_class = EmbeddedConfig


AutoConfig.register(TowerConfig.model_type, TowerConfig)
AutoModel.register(TowerConfig, Tower)
AutoConfig.register(FAMILY, EmbeddedConfig)
AutoModelForImageTextToText.register(EmbeddedConfig, EmbeddedForConditionalGeneration)
