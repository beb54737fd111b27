"""Types of the domain: `Box`, `Label`, `Sample`, `Record`.

A reader turns a raw data set into `Sample`s; conversion turns those into `Record`s, the rows of the shards.
Boxes are `[x1, y1, x2, y2]` in pixels of the original image unless a docstring names another frame, half-open:
`x2` and `y2` are one past the last pixel, so `x2 - x1` is the width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
        """The area in square units of the box's frame; 0 for an inverted box."""
        return max(0.0, self.x2 - self.x1) * max(0.0, self.y2 - self.y1)

    def intersection(self, other: Box) -> float:
        """Return the area shared with `other`."""
        width = min(self.x2, other.x2) - max(self.x1, other.x1)
        height = min(self.y2, other.y2) - max(self.y1, other.y1)
        return max(0.0, width) * max(0.0, height)

    def iou(self, other: Box) -> float:
        """Return the intersection over union with `other`, in [0, 1]; 0 when both are empty."""
        shared = self.intersection(other)
        union = self.area + other.area - shared
        return shared / union if union > 0 else 0.0


Polygon = tuple[tuple[float, float], ...]
"""The corners `(x, y)` of a closed outline."""


class Rle(NamedTuple):
    """A mask as lengths of runs, column by column (COCO's run-length encoding)."""

    height: int  # of the image that it was drawn on, in pixels
    width: int
    counts: tuple[int, ...]  # background and defect by turns, background first; their sum is `height * width`


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a raw data set, as its reader yields it.

    Defects are marked either by pixel masks, of which conversion makes boxes, or by shapes that a person drew: each is
    one box, and its polygon, where it has one, is the mask too.

    Args:
        image: Path of the image file, or of a JSON file of LabelMe that holds the image in its `imageData`.
        source: The path of the image relative to the data set's root, with `/`.
        dataset: Name of the data set.
        category: Product category.
        label: `normal` or `anomalous`.
        defect: Defect type; `None` on a normal image.
        masks: Paths of pixel masks; a defect is what any of them marks.
        boxes: Boxes drawn by a person, in pixels of the upright image; fractions of its size if `normalized`.
        cut: For each of `boxes`, whether it is cut off at the edge of the image, however far it reaches out: the tool
            lets people draw there. Empty: none is. A box that is not cut and reaches out is an error.
        polygons: The outlines of some or all of `boxes`, in the same frame.
        rles: The masks of some or all of `boxes`, on the upright image; they are painted as polygons are.
        normalized: Whether `boxes` and `polygons` are fractions of the image's width and height.
        unmarked_is_normal: Whether an image whose masks show nothing is normal, whatever its `label`; otherwise that
            is an error.
        located: Whether masks or boxes say where the defects are. If they need not, the label of an anomalous image
            without any, or whose masks show nothing, is all that is known, and its record has neither boxes nor a mask.
        size: Width and height of the image that the annotation was drawn on, as the annotation states them; `None`
            where it does not. An image of another size is an error, unless `convert.rescale` is set.
        split: The split that the data set itself fixes, or `None`.
        group: Images of one physical part share it and never straddle a split; `None` where that is not known.
        columns: Further columns of a table, by name; for `split.group`.
        notes: Changes of the annotation that its author may not expect, such as dropping a shape that was drawn twice.
            Images are counted by note in `conversion.json`, so a note names no file.
    """

    image: Path
    source: str
    dataset: str
    category: str
    label: Label
    defect: str | None = None
    masks: tuple[Path, ...] = ()
    boxes: tuple[Box, ...] = ()
    cut: tuple[bool, ...] = ()
    polygons: tuple[Polygon, ...] = ()
    rles: tuple[Rle, ...] = ()
    normalized: bool = False
    unmarked_is_normal: bool = False
    located: bool = True
    size: tuple[int, int] | None = None
    split: str | None = None
    group: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """The path of the image's file, relative to the data set: `source`, but for images in JSON."""
        return f"{self.source[: self.source.rfind('/') + 1]}{self.image.name}"


@dataclass(frozen=True)
class Record:
    """One row of the shards, whose columns are these fields (see `adfm.data.shards.Columns`).

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
        boxes: Ground-truth boxes, original pixels, half-open; empty on a normal image, and on an anomalous one of
            which nothing but the label is known (it has no mask then either).
        split: `train`, `validation` or `test`.
        source: Path within the raw data set.
        sha256: SHA-256 of the raw image file, hex.
        group: Images of one physical part share it; `None` where that is not known.
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
    group: str | None = None
