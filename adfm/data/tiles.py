"""Cut large images into overlapping tiles at full resolution, and merge a model's boxes on them.

A model sees an image at a fixed number of pixels, so a defect of 20 pixels in a photograph of 4,000 disappears. In
tiles it keeps its size. A tile is a `Box` of whole pixels of the image.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from adfm.data import shards
from adfm.data.duplicates import components
from adfm.records import Box, Label

# Share of a defect that a tile must hold for the defect to count there; see `truth`. At a quarter, every defect counts
# in at least one tile, also without overlap: the best tile holds half of it, or of itself, in each direction.
COUNTS = 0.25
# IoU from which two boxes of different tiles are one defect, within the zone that both tiles show; see `merged`. Two
# equal boxes have it when they are shifted by half of their side.
SAME = 0.3
LEAST_SIDE = 16  # pixels that the smaller side of a defect needs in what the model sees: half of a token of 32 pixels


def grid(width: int, height: int, size: int, overlap: float) -> list[Box]:
    """Return the tiles of an image, row by row.

    All have the same size: `size`, or in a direction in which the image is smaller, the image's own. They cover the
    image exactly, spread evenly, as few as share `overlap` (above 0, at most 0.5) of their side or more.
    """
    columns, rows = (_starts(length, size, overlap) for length in (width, height))
    across, down = min(size, width), min(size, height)
    return [Box(x, y, x + across, y + down) for y in rows for x in columns]


def shared(size: int, overlap: float) -> int:
    """Return the pixels that neighbours share at least; a box with no longer side lies wholly in at least one tile."""
    return min(size - 1, max(1, round(size * overlap)))


def _starts(length: int, size: int, overlap: float) -> list[int]:
    rest = length - size
    if rest <= 0:
        return [0]
    steps = math.ceil(rest / (size - shared(size, overlap)))
    return [i * rest // steps for i in range(steps + 1)]


def truth(label: Label, boxes: Sequence[Box], tile: Box) -> tuple[Label, list[Box]] | None:
    """Return the label and the boxes of a tile, for training.

    A defect counts in a tile that holds at least `COUNTS` of it, or of the largest part of it that fits into a tile,
    by area; its box is cut at the tile's border. A tile that a smaller rest of a defect reaches into, and no defect
    that counts, is neither normal nor anomalous: such a rest may show nothing, or all that there is to see.

    Returns:
        The label, and the boxes in pixels of the tile; `None` for a tile that is neither. A tile of an anomalous image
        that no box reaches into is normal, so an anomalous image needs boxes.
    """
    if label == "normal":
        return "normal", []
    parts = [(box, part) for box in boxes if (part := _overlap(box, tile)).area > 0]
    if not parts:
        return "normal", []
    width, height = tile.x2 - tile.x1, tile.y2 - tile.y1
    counting = []
    for box, part in parts:
        fitting = min(box.x2 - box.x1, width) * min(box.y2 - box.y1, height)
        if part.area >= COUNTS * fitting * (1 - 1e-9):  # less by rounding: a defect of exactly that share counts
            counting.append(to_tile(part, tile))
    return ("anomalous", counting) if counting else None


def _overlap(box: Box, tile: Box) -> Box:
    return Box(max(box.x1, tile.x1), max(box.y1, tile.y1), min(box.x2, tile.x2), min(box.y2, tile.y2))


def to_tile(box: Box, tile: Box) -> Box:
    """Return a box in pixels of the tile, from one in pixels of the image."""
    return Box(box.x1 - tile.x1, box.y1 - tile.y1, box.x2 - tile.x1, box.y2 - tile.y1)


def to_image(box: Box, tile: Box) -> Box:
    """Return a box in pixels of the image, from one in pixels of a tile; of whole numbers if the box is."""
    return Box(box.x1 + tile.x1, box.y1 + tile.y1, box.x2 + tile.x1, box.y2 + tile.y1)


def merged(boxes: Sequence[Sequence[Box]], tiles: Sequence[Box]) -> list[Box]:
    """Merge boxes on the tiles of an image into boxes on the image.

    Two boxes of different tiles are one defect if they agree where the tiles overlap: cut to that zone, their IoU is at
    least `SAME`. That joins the parts of a defect that a seam cuts, however large it is, and the doubles of one in the
    zone. Connected boxes become the smallest box around them. `boxes` has those of each tile, in pixels of the tile;
    those that are returned are in pixels of the image, and sorted.
    """
    parts: list[Box] = []
    of_tile: list[tuple[Box, range]] = []
    for its, tile in zip(boxes, tiles, strict=True):
        cut = [_overlap(to_image(box, tile), tile) for box in its]  # the model has not seen what lies outside
        parts += [part for part in cut if part.area]
        of_tile.append((tile, range(of_tile[-1][1].stop if of_tile else 0, len(parts))))
    pairs = [np.empty((0, 2), np.int64)]
    for (one, first), (other, second) in combinations([(tile, its) for tile, its in of_tile if its], 2):
        zone = _overlap(one, other)
        for i, j in product(first, second) if zone.area else ():
            if _overlap(parts[i], zone).iou(_overlap(parts[j], zone)) >= SAME:
                pairs.append(np.array([[i, j]]))
    around: dict[int, list[Box]] = defaultdict(list)
    for number, part in zip(components(np.concatenate(pairs), len(parts)).tolist(), parts, strict=True):
        around[number].append(part)
    sides = (zip(*each, strict=True) for each in around.values())
    return sorted(Box(min(x1), min(y1), max(x2), max(y2)) for x1, y1, x2, y2 in sides)


class Defect(NamedTuple):
    """The size of a defect's box and of its image, in pixels."""

    width: float
    height: float
    image_width: int
    image_height: int


def defects_of(folder: Path) -> list[Defect]:
    """Return the sizes of all boxes in a folder of shards that have an area."""
    return [
        Defect(x2 - x1, y2 - y1, row["width"], row["height"])
        for row in shards.table(folder).select(["boxes", "width", "height"]).to_pylist()
        for x1, y1, x2, y2 in row["boxes"] or ()
        if x1 < x2 and y1 < y2 and row["width"] and row["height"]
    ]


def seen(defects: Sequence[Defect], pixels: int, size: int | None) -> float:
    """Return the lower quartile of the smaller sides of the defects, in pixels of what the model sees.

    It reduces larger images, or tiles of the side `size`, `None` without tiles, to `pixels` pixels, in their shape.
    """
    sides = []
    for width, height, image_width, image_height in defects:
        across, down = (min(side, size or side) for side in (image_width, image_height))
        sides.append(min(width, height) * min(1.0, math.sqrt(pixels / (across * down))))
    return float(np.quantile(sides, 0.25))


class Proposal(NamedTuple):
    """A tile size."""

    size: int  # side of a tile in pixels
    tiles: int  # of an image of middling size
    now: float  # as of `seen`, with the tile size in use
    then: float  # the same with `size`


def propose(defects: Sequence[Defect], pixels: int, size: int | None, overlap: float) -> Proposal | None:
    """Propose the largest tile size with which the model sees three quarters of the defects at `LEAST_SIDE` pixels.

    It is not smaller than what the model sees without reduction, as smaller tiles gain nothing, nor than the longer
    side of nine defects in ten, which would be cut to pieces.

    Returns:
        `None` where the defects are large enough, cutting would gain less than a quarter, or sizes are not known.
    """
    if not defects or not pixels:
        return None
    now = seen(defects, pixels, size)
    if now >= LEAST_SIDE:
        return None
    side = math.sqrt(pixels)
    smaller = np.quantile([min(defect.width, defect.height) for defect in defects], 0.25)
    longer = np.quantile([max(defect.width, defect.height) for defect in defects], 0.9)
    new = math.floor(max(smaller * side / LEAST_SIDE, side, longer))
    then = seen(defects, pixels, new)
    if then < 1.25 * now:
        return None
    sizes = sorted((defect.image_width * defect.image_height, defect[2:]) for defect in defects)
    return Proposal(new, len(grid(*sizes[len(sizes) // 2][1], new, overlap)), now, then)
