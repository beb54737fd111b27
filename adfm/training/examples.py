"""Shards to the rows that TRL trains on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adfm.data import shards as shards_
from adfm.errors import AdfmError
from adfm.method import kinds as kinds_
from adfm.models import families
from adfm.models.loading import Loaded
from adfm.records import Box

if TYPE_CHECKING:
    import datasets
    from numpy.typing import NDArray


def draw(
    shards: Path,
    loaded: Loaded,
    count: int,
    anomalous_share: float,
    seed: int,
    cache: Path,
    weights: dict[str, float] | None = None,
    located: bool = False,
) -> datasets.Dataset:
    """`count` training images in an order fixed by `seed`.

    Every image of a label is drawn once before any is drawn again, unless there are weights. Images stay on disk until
    they are used.

    Args:
        shards: Folder of shards; its train split is read.
        loaded: Says what is asked, and in which frame boxes are written.
        count: Rows to draw.
        anomalous_share: Share of anomalous images, evenly spread. A model that names kinds can be trained on anomalous
            images alone; where there is no normal one, it is 1.
        seed: Seeds the order.
        cache: Folder for the memory-mapped copy of the split.
        weights: By id, how often an image is drawn in proportion to others of its label; at least a twentieth of the
            largest.
        located: Whether to leave out anomalous images without boxes, of which only the label is known.

    Returns:
        Columns `prompt` (messages), `image`, `label`, `defect`, `regions` (ground-truth boxes in the model's frame) and
        `frame` (width and height of that frame).

    Raises:
        AdfmError: The train split lacks normal or anomalous images.
    """
    import datasets

    table = shards_.table(shards, "train").to_pylist()
    weight = np.array([weights[row["id"]] for row in table]) if weights else None
    if loaded.kinds:
        evenly = _evenly([kinds_.of(row["defect"], loaded.kinds) for row in table])
        weight = evenly if weight is None else evenly * weight
        if all(row["label"] == "anomalous" for row in table):
            anomalous_share = 1.0
    labels = ["" if located and _has_label_alone(row) else row["label"] for row in table]
    order = _order(labels, count, anomalous_share, seed, shards, weight)
    data = datasets.Dataset.from_parquet(
        [str(file) for file in sorted(shards.glob("train-*.parquet"))], cache_dir=str(cache), columns=["image"]
    )
    family = families.get(loaded.family)
    regions, frames = [], []
    for row in table:
        frame = family.frame(loaded.processor, row["width"], row["height"])
        boxes = [frame.from_pixels(Box(*box), row["width"], row["height"]) for box in row["boxes"]]
        regions.append([list(box) for box in boxes])
        frames.append([frame.width, frame.height])
    columns: dict[str, list[Any]] = {
        "prompt": [loaded.prompt] * len(table),
        "label": [row["label"] for row in table],
        "defect": [row["defect"] for row in table],
        "regions": regions,
        "frame": frames,
    }
    for name, values in columns.items():
        data = data.add_column(name, values)
    return data.select(order)


def _evenly(kinds: list[str | None]) -> NDArray[np.float64]:
    """Weights by which every kind is drawn as often as any other, so that always naming the commonest does not pay.

    An image without one counts as one of the commonest kind.
    """
    counts = Counter(kind for kind in kinds if kind)
    most = max(counts.values(), default=1)
    return np.array([1 / (counts[kind] if kind else most) for kind in kinds])


def boxes_known(shards: Path) -> tuple[int, int]:
    """How many anomalous images of the train split have boxes, and how many have none."""
    anomalous = without = 0
    for batch in shards_.batches(shards, "train", ["label", "boxes"]):
        for row in batch.to_pylist():
            anomalous += row["label"] == "anomalous"
            without += _has_label_alone(row)
    return anomalous - without, without


def _has_label_alone(row: dict[str, Any]) -> bool:
    return row["label"] == "anomalous" and not row["boxes"]


def as_seen(data: datasets.Dataset, loaded: Loaded) -> datasets.Dataset:
    """The same rows with each image as the processor resizes it, for an engine that has a processor of its own."""
    from PIL import Image

    images, cut = loaded.processor.image_processor, families.get(loaded.family).images

    def resized(image: Image.Image) -> Image.Image:
        size = cut.resized(images, image.width, image.height)
        return image.convert("RGB").resize(size, Image.Resampling.BICUBIC)

    return data.with_transform(lambda rows: {**rows, "image": [resized(image) for image in rows["image"]]})


def _order(
    labels: list[str], count: int, share: float, seed: int, shards: Path, weight: NDArray[np.float64] | None = None
) -> list[int]:
    """Indices of `count` images, of which any run holds anomalous ones in the given share.

    Each label's own are shuffled anew for each pass over them, or drawn by their weights.
    """
    rng = np.random.default_rng(seed)
    anomalous = np.diff(np.floor(np.arange(count + 1) * share + 1e-9)).astype(bool)
    order = np.empty(count, int)
    for label, places in (("anomalous", anomalous), ("normal", ~anomalous)):
        of_label = np.flatnonzero([value == label for value in labels])
        needed = int(places.sum())
        if needed and not len(of_label):
            raise AdfmError(
                f"{shards}: the train split has no {label} image, and training needs both; add some, or see split.* in "
                "params.yaml" + ("; on defects alone a model can learn their kinds: warmup.kinds" * (label == "normal"))
            )
        if needed and weight is not None:
            of_these = np.maximum(weight[of_label], weight[of_label].max() / 20)
            order[places] = rng.choice(of_label, needed, p=of_these / of_these.sum())
            continue
        passes = -(-needed // max(1, len(of_label)))
        shuffled = [rng.permutation(of_label) for _ in range(passes)]
        order[places] = np.concatenate([*shuffled, np.empty(0, int)])[:needed]
    return order.tolist()
