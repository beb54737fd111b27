"""Read and check the prediction tables that the gate judges."""

from pathlib import Path

import numpy as np
import pandas as pd

from adfm.errors import AdfmError, Unusable
from adfm.evaluation.metrics import COMPARED, as_decided, listed, same_images

_COLUMNS = ("id", "category", "label", "predicted", "iou")
_FURTHER = ("dataset", "defect", "group", "boxes", *(name for name in COMPARED if name not in _COLUMNS))


class Incomparable(Unusable):
    """The tables cannot be judged: they are broken, or not of the same images."""


def read(file: Path) -> pd.DataFrame:
    """Read a prediction table, a Parquet file that evaluation wrote.

    Raises:
        Incomparable: It cannot be read.
    """
    try:
        return pd.read_parquet(file)
    except (OSError, ValueError, KeyError) as error:
        raise Incomparable(
            f"{file} cannot be read as a prediction table ({error}); `adfm evaluate` writes it."
        ) from error


def what_decides(name: str, table: pd.DataFrame) -> str:
    """Say whether letters or decisions are judged."""
    if "decision" not in table or table.attrs.get("threshold", 0) is None:
        return f"{name} has no threshold: its letters are judged."
    at = f" from a probability of {table.attrs['threshold']:.6g} on" if "threshold" in table.attrs else ""
    return f"{name} is judged by its decisions: an image is flagged{at or ' by the column decision'}."


def checked(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Check a table, and return the columns that the gate uses, of decisions where it has them.

    Raises:
        Incomparable: The table, called `name`, is broken; every fault is listed.
    """
    if missing := [column for column in _COLUMNS if column not in table]:
        there = ", ".join(map(str, table.columns)) or "none"
        raise Incomparable(f"The {name} table has no column {' and no column '.join(missing)}; it has {there}.")
    if not len(table):
        raise Incomparable(f"The {name} table is empty: evaluate the model first.")
    try:
        table = as_decided(table)
    except AdfmError as error:
        raise Incomparable(f"The {name} table cannot be judged: {error}") from error
    table = table[[column for column in (*_COLUMNS, *_FURTHER) if column in table]]
    rows = table["id"].astype(object)
    iou = pd.to_numeric(table["iou"], errors="coerce").astype(float)
    of_mask = table["mask_iou"] if "mask_iou" in table else pd.Series(np.nan, table.index)
    anomalous = table["label"].isin(["anomalous"])
    # Only the label is known where there is nothing to overlap with.
    located = table["boxes"].map(len).gt(0) if "boxes" in table else anomalous
    faults = {
        "a missing id": rows.isna(),
        "an id that occurs more than once": rows.duplicated(keep=False) & rows.notna(),
        "no category or data set": table[["category", *(["dataset"] if "dataset" in table else [])]].isna().any(axis=1),
        "a label other than normal and anomalous": ~table["label"].isin(["normal", "anomalous"]),
        "a prediction other than normal, anomalous and null": ~table["predicted"].isin(["normal", "anomalous"])
        & table["predicted"].notna(),
        "no IoU in [0, 1] on an anomalous image": anomalous & located & ~iou.between(0, 1),
        "an IoU on an image without boxes": anomalous & ~located & table["iou"].notna(),
        "an IoU on a normal image": ~anomalous & table["iou"].notna(),
        "an IoU with a mask that is not in [0, 1]": of_mask.notna()
        & ~pd.to_numeric(of_mask, errors="coerce").astype(float).between(0, 1),
        "an IoU with a mask on a normal image": ~anomalous & of_mask.notna(),
    }
    wrong = [
        f"{fault}: {listed([f'row {row} ({key})' for row, key in zip(where.nonzero()[0], rows[where], strict=True)])}"
        for fault, where in ((fault, rows_.to_numpy(dtype=bool)) for fault, rows_ in faults.items())
        if where.any()
    ]
    if wrong:
        raise Incomparable(f"The {name} table cannot be judged:\n" + "\n".join(f"- {fault}" for fault in wrong))
    return table.assign(iou=iou)


def check_pair(candidate: pd.DataFrame, production: pd.DataFrame, name: str) -> None:
    """Check that the table `name` is of the same images as the candidate's, labelled alike and made in the same way.

    Raises:
        Incomparable: It is not.
    """
    try:
        same_images(candidate, production)
    except AdfmError as error:
        raise Incomparable(f"Candidate (first) and {name} (second) cannot be compared. {error}") from error
    left, right = candidate.attrs, production.attrs
    if unlike := [key for key in left if key in right and key != "threshold" and left[key] != right[key]]:
        lines = [f"- {key}: {left[key]} and {right[key]}" for key in unlike]
        message = f"Candidate and {name} were not evaluated in the same way; evaluate both again with `adfm evaluate`:"
        raise Incomparable("\n".join([message, *lines]))
    both = candidate.merge(production, on="id", suffixes=("", "_production"))
    wrong = [
        f"- {column}: {listed(sorted(both['id'][differs], key=str))}"
        for column in ("label", "category", "dataset")
        if f"{column}_production" in both and (differs := both[column] != both[f"{column}_production"]).any()
    ]
    if wrong:
        unlike_data = f"Candidate and {name} were evaluated on data that differ for the same ids"
        raise Incomparable("\n".join([f"{unlike_data}; evaluate both on the same shards:", *wrong]))
