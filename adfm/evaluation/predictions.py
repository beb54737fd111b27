"""Prediction tables: a model's answers to a split, one row an image, resumable."""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import adfm
from adfm.data import shards as shards_
from adfm.evaluation import metrics
from adfm.files import replacing
from adfm.method import kinds, prompt
from adfm.models import families, loading
from adfm.models.predictor import Prediction, Predictor, batched, grid_of, tile_of, uses_vllm
from adfm.params import Params, Tile
from adfm.process.progress import bar
from adfm.records import Record

_OF_RECORD = ("id", "source", "dataset", "category", "defect", "group", "label")
_BOXES = pa.list_(pa.list_(pa.float64()))
# `predicted` is null where the completion has no clean answer, `score` (uncalibrated, by `evaluate.score`) where there
# is no valid one, `group` where it is not known which images show the same part. Boxes are original pixels, half-open.
# `regions` are all boxes that the completion names, whatever its letter: what an image gets that is flagged by its
# probability. `region_iou` and so on compare them as `iou` and so on compare `predicted_boxes`.
PREDICTIONS = pa.schema(
    [(name, pa.string()) for name in (*_OF_RECORD, "predicted")]
    + [(name, pa.float64()) for name in ("score", "iou", "mask_iou", "matched_iou")]
    + [(name, pa.int64()) for name in ("true_positives", "false_positives", "false_negatives")]
    + [("area_share", pa.float64()), ("boxes", _BOXES), ("predicted_boxes", _BOXES), ("completion", pa.string())]
    + [("regions", _BOXES), *((f"region_{name}", pa.float64()) for name in metrics.COMPARED)]
)

# Further columns where the model's prompt asks for the defect's kind: the true one, null where an image has several or
# none is known; and the one that `<rethink>` names, whatever the letter, null where it names none or several.
KINDS = tuple(pa.field(name, pa.string()) for name in ("kind", "predicted_kind"))
_WINDOW = 4  # batches that are read, sorted and kept at a time


def predict(model: str | Path, shards: Path, params: Params, describe: str) -> pd.DataFrame:
    """Predict every image of the split `params.evaluate.split`; as `predict_splits`."""
    split = params.evaluate.split
    return predict_splits(model, shards, params, describe, [split])[split]


def predict_splits(
    model: str | Path, shards: Path, params: Params, describe: str, splits: Sequence[str], keep: Path | None = None
) -> dict[str, pd.DataFrame]:
    """Predict every image of some splits, greedily, one answer an image; return the prediction table of each split.

    Args:
        model: A base model's name, or a folder that cold start or training wrote.
        shards: Folder of shards.
        params: Reads the sections `model`, `tile` and `evaluate`, and `seed`.
        describe: The progress bar's text.
        splits: The splits.
        keep: Folder for what is finished; what it has of the same model, data and settings is not done again.

    Raises:
        AdfmError: The model or the shards cannot be loaded, or the configured backend is missing.
    """
    vllm = uses_vllm(params)
    tile = tile_of(model, params.tile)
    predictor: Predictor | None = None
    tables: dict[str, pd.DataFrame] = {}
    for split in splits:
        kept = keep / _key(model, shards, split, params, vllm) if keep else None
        parts: list[pa.Table] = []
        total, most = len(shards_.ids(shards, split)), _most_tiles(shards, split, tile)
        with bar(total=total, desc=f"{describe}, {split} split", unit="image") as progress:
            windows = batched(shards_.read(shards, split), max(1, _WINDOW * params.evaluate.batch_size // most))
            for number, window in enumerate(windows):
                file = kept / f"{number:06d}.parquet" if kept else None
                if file and file.is_file():
                    parts.append(pq.read_table(file))
                    progress.update(len(window))
                    continue
                if predictor is None:  # not before: everything may be finished
                    predictor = Predictor(model, params)
                schema = pa.schema([*PREDICTIONS, *KINDS]) if predictor.kinds else PREDICTIONS
                parts.append(pa.Table.from_pylist(_rows(predictor, window, progress.update), schema=schema))
                if file:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with replacing(file) as unfinished:
                        pq.write_table(parts[-1], unfinished)
        tables[split] = pa.concat_tables(parts).to_pandas()
    return tables


def _key(model: str | Path, shards: Path, split: str, params: Params, vllm: bool) -> str:
    """Return a digest of all that predictions depend on: the name of their folder."""
    settings = params.evaluate
    decides = {
        "code": adfm.__version__,
        "columns": PREDICTIONS.names,
        "prompt": [prompt.messages(units) for units in families.UNITS.values()],
        "model": loading.identity(model, params.model),
        "how": [params.model.dtype, params.model.max_pixels, settings.batch_size, settings.max_new_tokens, vllm],
        "tile": tile_of(model, params.tile).model_dump(),
        "score": [settings.score, settings.samples, params.seed if settings.samples else None],
        "data": [split, shards_.fingerprint(shards, split)],
    }
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]


def _most_tiles(shards: Path, split: str, tile: Tile) -> int:
    if not tile.size:
        return 1
    images = shards_.table(shards, split).select(["width", "height"]).to_pydict()
    return max(len(grid_of(size, tile)) for size in {*zip(*images.values(), strict=True)})


def _rows(predictor: Predictor, window: Sequence[Record], done: Callable[[int], object]) -> list[dict[str, Any]]:
    def image(number: int) -> Image.Image:
        return Image.open(io.BytesIO(window[number].image)).convert("RGB")

    answers = predictor.answers([(record.width, record.height) for record in window], image, done)
    rows = list(map(_row, window, answers))
    if predictor.kinds:
        for row, answer in zip(rows, answers, strict=True):
            row |= {"kind": kinds.of(row["defect"], predictor.kinds), "predicted_kind": answer.kind}
    return rows


def _row(record: Record, answer: Prediction) -> dict[str, Any]:
    mask = None if record.mask is None else np.asarray(Image.open(io.BytesIO(record.mask))) > 0
    overlap: dict[str, Any] = {}
    if record.label == "anomalous":
        overlap = metrics.localize(record.boxes, answer.boxes, record.width, record.height, mask)
        of_regions = metrics.localize(record.boxes, answer.regions, record.width, record.height, mask)
        overlap |= {f"region_{name}": of_regions[name] for name in metrics.COMPARED}
    return {
        **{name: getattr(record, name) for name in _OF_RECORD},
        "predicted": answer.predicted,
        "score": answer.score,
        **overlap,
        "boxes": [list(box) for box in record.boxes],
        "predicted_boxes": [list(box) for box in answer.boxes],
        "completion": answer.completion,
        "regions": [list(box) for box in answer.regions],
    }
