"""Types of the domain: `Box`, `Label`, `Sample`, `Record`.

A reader turns a raw data set into `Sample`s; conversion turns those into `Record`s, the rows of the shards.
Boxes are `[x1, y1, x2, y2]` in pixels of the original image unless a docstring names another frame, half-open:
`x2` and `y2` are one past the last pixel, so `x2 - x1` is the width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

Label = Literal["normal", "anomalous"]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
FEW = 200  # images; for a smaller data set cross-validation is offered


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

    def intersection(self, other: "Box") -> float:
        """Return the area of the overlap with `other`."""
        width = min(self.x2, other.x2) - max(self.x1, other.x1)
        height = min(self.y2, other.y2) - max(self.y1, other.y1)
        return max(0.0, width) * max(0.0, height)

    def iou(self, other: "Box") -> float:
        """Return the intersection over union with `other`, in [0, 1]; 0 when both are empty."""
        shared = self.intersection(other)
        union = self.area + other.area - shared
        return shared / union if union > 0 else 0.0


Polygon = tuple[tuple[float, float], ...]  # the corners `(x, y)` of a closed outline


class Rle(NamedTuple):
    """A mask as lengths of runs, column by column (COCO's run-length encoding)."""

    height: int  # of the image that it was drawn on, in pixels
    width: int
    counts: tuple[int, ...]  # background and defect by turns, background first; their sum is `height * width`


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a raw data set, as its reader yields it.

    Defects are marked either by pixel masks, from which conversion derives boxes, or by shapes that a person drew: each
    is one box, and its polygon, where it has one, is the mask too.
    """

    image: Path  # or LabelMe's JSON file, which may hold the image in its `imageData`
    source: str  # path of the image relative to the data set's root, with `/`
    dataset: str
    category: str  # of the product
    label: Label
    defect: str | None = None  # its type; `None` on a normal image
    masks: tuple[Path, ...] = ()  # a defect is what any of them marks
    boxes: tuple[Box, ...] = ()  # drawn by a person, in pixels of the upright image, or as `normalized` says
    # For each box, whether to clip it to the image, as some tools let people draw beyond; empty: that is an error.
    cut: tuple[bool, ...] = ()
    polygons: tuple[Polygon, ...] = ()  # outlines of some or all of `boxes`, in the same frame
    rles: tuple[Rle, ...] = ()  # masks of some or all of `boxes`, on the upright image; painted as polygons are
    normalized: bool = False  # whether `boxes` and `polygons` are fractions of the image's width and height
    unmarked_is_normal: bool = False  # whether empty masks make an image normal, whatever its label, or are an error
    # Whether every anomalous image has to have masks or boxes. If not, the label of one without, or with empty masks,
    # is all that is known, and its record has neither boxes nor a mask.
    located: bool = True
    # Width and height in the annotation; an image of another size is an error, unless `convert.rescale` is set.
    size: tuple[int, int] | None = None
    split: str | None = None  # as the data set itself fixes it
    group: str | None = None  # of the physical part: its images are never divided between splits
    columns: Mapping[str, str] = field(default_factory=dict)  # further columns of a table, for `split.group`
    # Changes of the annotation that its author may not expect, such as dropping a shape that was drawn twice. Images
    # are counted by note in `conversion.json`, so a note names no file.
    notes: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """The path of the image's file, relative to the data set: `source`, but for images in JSON."""
        return f"{self.source[: self.source.rfind('/') + 1]}{self.image.name}"


@dataclass(frozen=True)
class Record:
    """One row of the shards, whose columns are these fields (see `adfm.data.shards.Columns`)."""

    id: str  # from content and path, so that it stays the same when a data set is converted again
    image: bytes  # PNG or JPEG
    mask: bytes | None  # PNG of the image's size, one channel, 0 or 255
    width: int
    height: int
    dataset: str
    category: str
    defect: str | None
    label: Label
    boxes: tuple[Box, ...]  # empty on a normal image, and, as `mask`, where nothing but the label is known
    split: Split
    source: str  # path within the raw data set
    sha256: str  # of the raw image file, hex
    group: str | None = None
