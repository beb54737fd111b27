"""Training examples: turn shards into the rows that TRL trains on."""

import hashlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from adfm.data import shards as shards_
from adfm.data import tiles
from adfm.errors import AdfmError
from adfm.files import replacing
from adfm.method import kinds as kinds_
from adfm.models import families
from adfm.models.loading import Loaded
from adfm.params import Tile
from adfm.records import Box, Record, Split

if TYPE_CHECKING:
    import datasets

# Of a file of tiles; datasets reads the type of a column of images from the metadata.
_TILE = pa.schema(
    [shards_.COLUMNS.schema.field("image")],
    metadata={"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})},
)


def draw(
    shards: Path,
    loaded: Loaded,
    count: int,
    anomalous_share: float,
    seed: int,
    cache: Path,
    weights: dict[str, float] | None = None,
    located: bool = False,
    tile: Tile | None = None,
    split: Split = "train",
) -> "datasets.Dataset":
    """Draw images of a split, or tiles of them (`rows`), in an order fixed by `seed`; images stay on disk until used.

    Every image of a label is drawn once before any is drawn again, unless there are weights.

    Args:
        shards: Folder of shards.
        loaded: The model, whose prompt and coordinate frame are used.
        count: Rows to draw.
        anomalous_share: Share of anomalous images, evenly spread.
        seed: Seeds the order.
        cache: Folder for the memory-mapped copy of the split.
        weights: By id, how often an image of its label is drawn; at least a twentieth of the largest.
        located: Whether to leave out anomalous images without boxes.
        tile: `None`: whole images.
        split: The split.

    Returns:
        Columns `prompt`, `image`, `label`, `defect`, `regions` (true boxes in the model's frame), `frame` (its size).

    Raises:
        AdfmError: As `rows`; or the split lacks normal or anomalous images.
    """
    import datasets

    table = rows(shards, split, tile or Tile())
    weight = np.array([weights[row["id"]] for row in table]) if weights else None
    if loaded.kinds:
        evenly = _evenly([kinds_.of(row["defect"], loaded.kinds) for row in table])
        weight = evenly if weight is None else evenly * weight
        if all(row["label"] == "anomalous" for row in table):  # a model that names kinds can learn from defects alone
            anomalous_share = 1.0
    labels = ["" if located and _lacks_boxes(row) else row["label"] for row in table]  # "": is not drawn
    order = _order(labels, count, anomalous_share, seed, f"{shards}: the {split} split", weight)
    if tile and tile.size:
        drawn = sorted(set(order))
        table, order = [table[i] for i in drawn], np.searchsorted(drawn, order).tolist()
        data = _cut(table, shards, split, cache)
    else:
        data = datasets.Dataset.from_parquet(
            [str(file) for file in sorted(shards.glob(f"{split}-*.parquet"))], cache_dir=str(cache), columns=["image"]
        )
    family = families.get(loaded.family)
    columns = defaultdict[str, list[Any]](list)
    for row in table:
        frame = family.frame(loaded.processor, row["width"], row["height"])
        boxes = [frame.from_pixels(Box(*box), row["width"], row["height"]) for box in row["boxes"]]
        columns["prompt"].append(loaded.prompt)
        columns["label"].append(row["label"])
        columns["defect"].append(row["defect"])
        columns["regions"].append([list(box) for box in boxes])
        columns["frame"].append([frame.width, frame.height])
    for name, values in columns.items():
        data = data.add_column(name, values)
    return data.select(order)


def _evenly(kinds: list[str | None]) -> NDArray[np.float64]:
    """Weights by which every kind is drawn equally often, no kind as the commonest: to name that always would pay."""
    counts = Counter(kind for kind in kinds if kind)
    most = max(counts.values(), default=1)
    return np.array([1 / (counts[kind] if kind else most) for kind in kinds])


def boxes_known(shards: Path) -> tuple[int, int]:
    """Return how many anomalous images of the train split have boxes, and how many have none."""
    batches = shards_.batches(shards, "train", ["label", "boxes"])
    boxes = [len(row["boxes"]) for batch in batches for row in batch.to_pylist() if row["label"] == "anomalous"]
    return len(boxes) - boxes.count(0), boxes.count(0)


def rows(shards: Path, split: Split, tile: Tile) -> list[dict[str, Any]]:
    """Return a row for every image of a split; with `tile.size` for every tile that can be labelled (`tiles.truth`).

    Returns:
        The columns of the shards but images and masks, in their order; `number`, the image's in the split; and `tile`,
        the tile's place in the image, or the whole image. Label, boxes, defect, width and height are those of the tile.
        An anomalous image without boxes is left out where there are tiles.

    Raises:
        AdfmError: `tile.size` is set, and no anomalous image has boxes.
    """
    table = shards_.table(shards, split).to_pylist()
    if not tile.size:
        return [row | {"number": i, "tile": Box(0, 0, row["width"], row["height"])} for i, row in enumerate(table)]
    if any(row["label"] == "anomalous" for row in table) and not any(row["boxes"] for row in table):
        raise AdfmError(
            f"{shards}: no anomalous image of the {split} split has boxes, so that it is not known which of its tiles "
            "are anomalous; mark the defects, or set tile.size=null to train on whole images"
        )
    cut = []
    for number, row in enumerate(table):
        boxes = [Box(*box) for box in row["boxes"]]
        if _lacks_boxes(row):  # which of its tiles shows the defect?
            continue
        for place in tiles.grid(row["width"], row["height"], tile.size, tile.overlap):
            if truth := tiles.truth(row["label"], boxes, place):
                label, inside = truth
                width, height = int(place.x2 - place.x1), int(place.y2 - place.y1)
                defect = row["defect"] if label == "anomalous" else None
                of_tile = {"label": label, "boxes": inside, "defect": defect, "width": width, "height": height}
                cut.append(row | of_tile | {"number": number, "tile": place})
    return cut


def images(
    shards: Path, split: Split, table: list[dict[str, Any]]
) -> Iterator[tuple[Record, Image.Image, list[dict[str, Any]]]]:
    """Yield the images of some of `rows`, in the order of the shards, each with its record and its rows."""
    of_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in table:
        of_image[row["number"]].append(row)
    for number, record in enumerate(shards_.read(shards, split)):
        if number in of_image:
            yield record, Image.open(io.BytesIO(record.image)), of_image[number]


def _cut(table: list[dict[str, Any]], shards: Path, split: Split, cache: Path) -> "datasets.Dataset":
    # To a memory-mapped file: to cut a tile when its row is read would decode the whole photograph, 0.2 s for 16 MP.
    import datasets

    key = json.dumps([shards_.fingerprint(shards, split), [[row["number"], *row["tile"]] for row in table]])
    file = cache / f"tiles-{hashlib.sha256(key.encode()).hexdigest()[:32]}.arrow"
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial, pa.ipc.new_stream(str(partial), _TILE) as stream:
            for _, image, of_image in images(shards, split, table):
                plain = image if image.mode in ("L", "RGB") else image.convert("RGB")
                cut = [{"bytes": _png(plain.crop(row["tile"])), "path": None} for row in of_image]
                stream.write_batch(pa.record_batch([pa.array(cut, _TILE.field("image").type)], schema=_TILE))
    return datasets.Dataset.from_file(str(file))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)  # fast: the file is temporary
    return buffer.getvalue()


def _lacks_boxes(row: dict[str, Any]) -> bool:
    return row["label"] == "anomalous" and not row["boxes"]


def as_seen(data: "datasets.Dataset", loaded: Loaded) -> "datasets.Dataset":
    """Return the rows with images as the processor resizes them, for an engine that has a processor of its own."""
    processor, family = loaded.processor.image_processor, families.get(loaded.family)

    def resized(image: Image.Image) -> Image.Image:
        size = family.images.resized(processor, image.width, image.height)
        return image.convert("RGB").resize(size, Image.Resampling.BICUBIC)

    return data.with_transform(lambda rows: {**rows, "image": [resized(image) for image in rows["image"]]})


def _order(
    labels: list[str], count: int, share: float, seed: int, where: str, weight: NDArray[np.float64] | None = None
) -> list[int]:
    """Return the indices of `count` images, of which any run holds anomalous ones in the given share."""
    rng = np.random.default_rng(seed)
    # 1e-9: a product such as 10 * 0.3 may be a hair below the whole number that it stands for.
    anomalous = np.diff(np.floor(np.arange(count + 1) * share + 1e-9)).astype(bool)
    order = np.empty(count, int)
    for label, places in (("anomalous", anomalous), ("normal", ~anomalous)):
        of_label = np.flatnonzero([value == label for value in labels])
        needed = int(places.sum())
        if needed and not len(of_label):
            raise AdfmError(
                f"{where} has no {label} image, and training needs both; add some, or see split.* in params.yaml"
                + ("; on defects alone a model can learn their kinds: sft.kinds" * (label == "normal"))
            )
        if needed and weight is not None:
            of_these = np.maximum(weight[of_label], weight[of_label].max() / 20)
            order[places] = rng.choice(of_label, needed, p=of_these / of_these.sum())
            continue
        passes = -(-needed // max(1, len(of_label)))
        shuffled = [rng.permutation(of_label) for _ in range(passes)]
        order[places] = np.concatenate([*shuffled, np.empty(0, int)])[:needed]
    return order.tolist()
