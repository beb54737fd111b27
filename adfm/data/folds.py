"""Divide a small data set for cross-validation, or offer that."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from adfm.data import duplicates, shards, splits
from adfm.errors import AdfmError
from adfm.params import Params
from adfm.records import FEW


def assign(folder: Path, params: Params) -> NDArray[np.int8]:
    """Assign each image of shards to a split in each fold; train, validation and test are pooled.

    Images of one part, copies and, with `split.near_duplicates`, near-duplicates are together.

    Args:
        folder: The shards.
        params: Reads `evaluate.folds`, `seed` and `split`.

    Returns:
        [folds, images]: indices into `SPLITS`, in the order of the shards.

    Raises:
        AdfmError: The data set cannot be divided so; the message says what to do.
    """
    count = params.evaluate.folds
    _require_free_splits(folder, count)
    table = shards.table(folder)
    # `group` is a part, by `split.group` or by the layout, or a photograph that augmented copies share.
    images = table.append_column("part", table["group"]).append_column("photograph", pa.nulls(len(table), pa.string()))
    images = images.select(splits.COLUMNS)
    pairs = _near_duplicates(folder) if params.split.near_duplicates else np.empty((0, 2), np.int64)
    group, anomalous = splits.groups(images, pairs), np.asarray(table["label"]) == "anomalous"
    with_defects = np.unique(group[anomalous])
    parts = {"defective": len(with_defects), "normal": len(np.setdiff1d(group, with_defects))}
    rarer = min(parts, key=lambda label: parts[label])
    if not parts[rarer]:
        raise AdfmError(f"{folder}: no image is {rarer}, and folds need both; add some, or set evaluate.folds to 0.")
    if parts[rarer] < count:
        fewer = f"set evaluate.folds to {parts[rarer]}, " if parts[rarer] > 1 else ""
        raise AdfmError(
            f"evaluate.folds is {count}, but the {rarer} images of {folder} show only {parts[rarer]} parts (copies and"
            f" near-duplicates count as one), and every fold has to judge one: {fewer}add images, or set it to 0."
        )
    share = params.split.validation / (1 - params.split.test)  # validation keeps its proportion to train
    return splits.folds(images, pairs, count, share, params.seed)


def _require_free_splits(folder: Path, count: int) -> None:
    file = folder / "conversion.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        kept, held_out = about["official_splits_kept"], about["params"]["split"]["holdout_categories"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise AdfmError(
            f"{file} does not say whether the data set fixes its splits ({error!r}), which cross-validation would mix;"
            " make the shards again with `adfm convert`, or set evaluate.folds to 0."
        ) from error
    if kept:
        raise AdfmError(
            f"evaluate.folds is {count}, but the data set fixes its splits, which cross-validation"
            " would mix: set evaluate.folds to 0, or split.redivide to true and convert it again."
        )
    if held_out:
        raise AdfmError(
            f"evaluate.folds is {count}, but split.holdout_categories keeps {', '.join(held_out)} for"
            " the test alone, which cross-validation would mix: set one of them to its default and convert again."
        )


def _near_duplicates(folder: Path) -> duplicates.Pairs:
    images = (row["bytes"] for batch in shards.batches(folder, None, ["image"]) for row in batch["image"].to_pylist())
    looks = (duplicates.thumbnail(Image.open(io.BytesIO(image))) for image in images)
    small, contrasts = zip(*looks, strict=True)
    thumbnails = np.stack(small)
    return duplicates.near_duplicates(duplicates.Looks(thumbnails, np.array(contrasts), duplicates.coarse(thumbnails)))


def offer(folder: Path) -> str | None:
    """Return a sentence that offers cross-validation of fewer than `FEW` images; `None` where it would not help."""
    from adfm.statistics import half_width

    table = shards.table(folder).to_pandas()
    counts = table.groupby("split")["label"].value_counts()
    defects, tested = int((table["label"] == "anomalous").sum()), int(counts.get(("test", "anomalous"), 0))
    if len(table) >= FEW or not 0 < defects < len(table) or not 0 < tested < defects:
        return None
    try:
        _require_free_splits(folder, 0)
    except AdfmError:
        return None
    return (
        f"the test split has {(table['split'] == 'test').sum()} images, and its {tested} defective ones measure a"
        f" recall of 0.9 to ± {half_width(0.9, tested):.2f}; set evaluate.folds=5: every image is judged once, all"
        f" {defects} defective ones give ± {half_width(0.9, defects):.2f}, more where the folds differ; it takes 5"
        " times the training"
    )
