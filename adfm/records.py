"""The words of the domain: `Box`, `Label`, `Sample`, `Record`.

A reader turns a raw data set into `Sample`s; conversion turns those into `Record`s, the rows of the shards.
Boxes are `[x1, y1, x2, y2]` in pixels of the original image unless a docstring names another frame, half-open:
`x2` and `y2` are one past the last pixel, so `x2 - x1` is the width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

Label = Literal["normal", "anomalous"]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class Box(NamedTuple):
    """An axis-aligned box, half-open."""

    x1: float
    y1: float
    x2: float
    y2: float

    @property
    def area(self) -> float:
        """Area in square units of the box's frame; 0 for an inverted box."""
        return max(0.0, self.x2 - self.x1) * max(0.0, self.y2 - self.y1)

    def intersection(self, other: Box) -> float:
        """Area shared with `other`."""
        width = min(self.x2, other.x2) - max(self.x1, other.x1)
        height = min(self.y2, other.y2) - max(self.y1, other.y1)
        return max(0.0, width) * max(0.0, height)

    def iou(self, other: Box) -> float:
        """Intersection over union with `other`, in [0, 1]; 0 when both are empty."""
        shared = self.intersection(other)
        union = self.area + other.area - shared
        return shared / union if union > 0 else 0.0


@dataclass(frozen=True)
class Sample:
    """One image of a raw data set, as its reader found it.

    Args:
        image: Path of the image file.
        source: The same path relative to the data set's root, with `/`.
        dataset: Name of the data set.
        category: Product category.
        label: `normal` or `anomalous`.
        defect: Defect type; `None` on a normal image.
        mask: Path of the pixel mask, or `None`.
        split: The split that the data set itself fixes, or `None`.
    """

    image: Path
    source: str
    dataset: str
    category: str
    label: Label
    defect: str | None = None
    mask: Path | None = None
    split: str | None = None


@dataclass(frozen=True)
class Record:
    """One row of the shards.

    Args:
        id: Stable identifier, from content and path.
        image: The encoded image (PNG or JPEG bytes).
        mask: The encoded mask (PNG, one channel, 0 or 255, the image's size), or `None`.
        width: Image width in pixels.
        height: Image height in pixels.
        dataset: Name of the data set.
        category: Product category.
        defect: Defect type; `None` on a normal image.
        label: `normal` or `anomalous`.
        boxes: Ground-truth boxes, original pixels, half-open; empty on a normal image.
        split: `train`, `validation` or `test`.
        source: Path within the raw data set.
        sha256: SHA-256 of the raw image file, hex.
    """

    id: str
    image: bytes
    mask: bytes | None
    width: int
    height: int
    dataset: str
    category: str
    defect: str | None
    label: Label
    boxes: tuple[Box, ...]
    split: Split
    source: str
    sha256: str
