"""Shards to the rows that TRL trains on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adfm.data import shards as shards_
from adfm.errors import AdfmError
from adfm.method import coordinates, prompt
from adfm.models.loading import Loaded
from adfm.records import Box

if TYPE_CHECKING:
    import datasets


def draw(shards: Path, loaded: Loaded, count: int, seed: int, cache: Path) -> datasets.Dataset:
    """`count` training images, as many normal as anomalous, in an order fixed by `seed`.

    Every image of a label is drawn once before any is drawn again. Images stay on disk until they are used.

    Args:
        shards: Folder of shards; its train split is read.
        loaded: Says in which frame boxes are written.
        count: Rows to draw.
        seed: Seeds the order.
        cache: Folder for the memory-mapped copy of the split.

    Returns:
        Columns `prompt` (messages), `image`, `label`, `defect`, `regions` (ground-truth boxes in the model's frame) and
        `frame` (width and height of that frame).

    Raises:
        AdfmError: The train split lacks normal or anomalous images.
    """
    import datasets

    table = shards_.table(shards, "train").to_pylist()
    order = _balanced([row["label"] for row in table], count, seed, shards)
    data = datasets.Dataset.from_parquet(
        [str(file) for file in sorted(shards.glob("train-*.parquet"))], cache_dir=str(cache), columns=["image"]
    )
    regions, frames = [], []
    for row in table:
        frame = coordinates.frame_of(loaded.family, loaded.processor, row["width"], row["height"])
        boxes = [frame.from_pixels(Box(*box), row["width"], row["height"]) for box in row["boxes"]]
        regions.append([list(box) for box in boxes])
        frames.append([frame.width, frame.height])
    columns: dict[str, list[Any]] = {
        "prompt": [prompt.messages(loaded.family)] * len(table),
        "label": [row["label"] for row in table],
        "defect": [row["defect"] for row in table],
        "regions": regions,
        "frame": frames,
    }
    for name, values in columns.items():
        data = data.add_column(name, values)
    return data.select(order)


def _balanced(labels: list[str], count: int, seed: int, shards: Path) -> list[int]:
    """Indices that take turns between the labels; each label's own are shuffled anew for each pass over them."""
    rng = np.random.default_rng(seed)
    turns = []
    for label in ("anomalous", "normal"):
        of_label = np.flatnonzero([value == label for value in labels])
        if not len(of_label):
            raise AdfmError(
                f"{shards}: the train split has no {label} image, and training needs both; see split.* in params.yaml"
            )
        passes = -(-count // (2 * len(of_label)))
        turns.append(np.concatenate([rng.permutation(of_label) for _ in range(max(1, passes))]))
    return [int(turns[i % 2][i // 2]) for i in range(count)]


def digest(folder: Path) -> str:
    """SHA-256, hex, of the files of a model folder (names and contents)."""
    total = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(file.relative_to(folder).as_posix().encode() + b"\0")
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()
