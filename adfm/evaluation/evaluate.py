"""Evaluation: several models on the same held-out images, side by side.

The folder that it writes; the candidate is the last model:

    predictions.parquet, <name>.parquet   one row an image: the candidate's, those of any other model
    metrics.json                          each model's metrics with intervals; candidate minus each other model
    metrics/<name>.json                   the headline alone, one row a model in `dvc metrics show`
    details.json                          the same by data set, category, defect and size of the defect
    evaluation.json                       what was evaluated: models, split, fingerprint of the shards, settings
    comparison.md, comparison.csv         the table that is printed
    plots/                                confusion.csv, roc.csv, iou_by_size.csv for DVC; figures as PNG
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from adfm import tracking
from adfm.data import shards as shards_
from adfm.errors import AdfmError
from adfm.evaluation import inference, metrics, plots
from adfm.files import atomic_folder, digest
from adfm.params import Params

if TYPE_CHECKING:
    import pandas as pd

_BOXES = pa.list_(pa.list_(pa.float64()))
_COUNT = pa.int64()
_NUMBER = pa.float64()
PREDICTIONS = pa.schema(
    [(name, pa.string()) for name in ("id", "source", "dataset", "category", "defect", "label", "predicted")]
    + [(name, _NUMBER) for name in ("score", "iou", "mask_iou", "matched_iou")]
    + [(name, _COUNT) for name in ("true_positives", "false_positives", "false_negatives")]
    + [("area_share", _NUMBER), ("boxes", _BOXES), ("predicted_boxes", _BOXES), ("completion", pa.string())]
)


def evaluate(models: dict[str, str | Path], shards: Path, out: Path, params: Params) -> None:
    """Lets each model answer the split `params.evaluate.split`, writes all results to `out`, prints the comparison.

    Args:
        models: Base model names or model folders by the name to show, in the order to show; the last is the candidate.
        shards: Folder of shards.
        out: Folder to write.
        params: Reads the sections `evaluate`, `model` and `register`, and `seed`.

    Raises:
        AdfmError: A model or the shards cannot be read, MLflow cannot be reached, or `out` cannot be written.
    """
    if not models:
        raise AdfmError("There is no model to evaluate; name at least one.")
    for name in models:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == "predictions":
            raise AdfmError(f"{name!r} cannot name a model: letters, digits, - and _ only, and not `predictions`.")
    *_, candidate = models
    fingerprint = shards_.fingerprint(shards, params.evaluate.split)
    about = {
        "candidate": candidate,
        "candidate_digest": digest(Path(models[candidate])) if Path(models[candidate]).is_dir() else None,
        "models": {name: str(model) for name, model in models.items()},
        "split": params.evaluate.split,
        "images": len(shards_.ids(shards, params.evaluate.split)),
        "fingerprint": fingerprint,
        "seed": params.seed,
        "settings": params.evaluate.model_dump(),
    }
    tags = {"candidate": candidate, "data_fingerprint": fingerprint}
    with tracking.start_run("evaluate", params, tags) as run, atomic_folder(out) as partial:
        _write_json(about | {"mlflow_run_id": run.info.run_id}, partial / "evaluation.json")
        tables = {name: inference.predict(model, shards, params, name) for name, model in models.items()}
        for name, table in tables.items():
            file = partial / f"{'predictions' if name == candidate else name}.parquet"
            pq.write_table(_typed(table), file)
        comparison = report(tables, shards, partial, params)
        _log(partial)
    print(comparison)


def _typed(table: pd.DataFrame) -> pa.Table:
    return pa.Table.from_pandas(table.reindex(columns=PREDICTIONS.names), schema=PREDICTIONS, preserve_index=False)


def report(tables: dict[str, pd.DataFrame], shards: Path, out: Path, params: Params) -> str:
    """Writes everything that follows from prediction tables; returns the comparison as an aligned Markdown table.

    Args:
        tables: Prediction tables of the same images by model; the last is the candidate.
        shards: The shards, for the pictures.
        out: An existing folder.
        params: Reads the section `evaluate`, and `seed`.
    """
    *others, candidate = tables
    settings = params.evaluate
    details = {
        name: metrics.summarize(table, settings.bootstrap, params.seed, settings.small, settings.large)
        for name, table in tables.items()
    }
    overall = {name: found.pop("overall") for name, found in details.items()}
    differences = {
        f"{candidate}_minus_{other}": metrics.difference(
            tables[candidate], tables[other], settings.bootstrap, params.seed
        )
        for other in reversed(others)
    }
    _write_json(overall | differences, out / "metrics.json")
    _write_json(details, out / "details.json")
    (out / "metrics").mkdir()
    for name, values in overall.items():
        _write_json({metric: values[metric] for metric in metrics.HEADLINE}, out / "metrics" / f"{name}.json")

    folder = out / "plots"
    folder.mkdir()
    sizes = {name: found["sizes"] for name, found in details.items()}
    _write_plot_data(tables[candidate], sizes, folder)
    plots.confusion(tables, folder / "confusion.png")
    plots.iou_by_size(sizes, settings.small, settings.large, folder / "iou_by_size.png")
    plots.comparison(overall, differences, folder / "comparison.png")
    shown = plots.choose(tables[candidate])
    ids = set(shown["id"])
    images = {record.id: record.image for record in shards_.read(shards, settings.split) if record.id in ids}
    plots.examples(shown, images, folder / "examples.png")
    return _write_comparison(overall, differences, out)


def _write_plot_data(candidate: pd.DataFrame, sizes: dict[str, dict[str, Any]], folder: Path) -> None:
    """The rows that DVC's own templates draw: one answer each, the ROC curve, and IoU with a column a model."""
    from sklearn.metrics import roc_curve

    answers = zip(candidate["label"], candidate["predicted"].fillna("unparseable"), strict=True)
    _write_csv(["actual", "predicted"], answers, folder / "confusion.csv")

    anomalous = (candidate["label"] == "anomalous").to_numpy(dtype=bool)
    score = metrics.ranks(candidate["score"].to_numpy(dtype=float, na_value=np.nan), anomalous)
    curve = roc_curve(anomalous, score)[:2] if 0 < anomalous.sum() < len(anomalous) else ((), ())
    _write_csv(["fpr", "tpr"], zip(*curve, strict=True), folder / "roc.csv")

    there = [size for size in metrics.SIZES if size in sizes[[*sizes][-1]]]
    rows = ([size, *(of[size]["iou"] for of in sizes.values())] for size in there)
    _write_csv(["size", *sizes], rows, folder / "iou_by_size.csv")


def _write_comparison(overall: dict[str, Any], differences: dict[str, Any], out: Path) -> str:
    shown = overall | differences
    header = ["", *overall, *(name.replace("_minus_", " - ") for name in differences)]
    rows = [
        [plots.TITLES[metric], *(_cell(values, metric, "+" * (name in differences)) for name, values in shown.items())]
        for metric in metrics.HEADLINE
    ]
    table = _markdown([header, *rows])
    note = (
        f"{overall[[*overall][-1]]['images']} images. In brackets 95 % bootstrap intervals over images, paired for"
        " differences."
    )
    (out / "comparison.md").write_text(f"{table}\n\n{note}\n", encoding="utf-8")
    _write_csv(
        ["metric", "model", "value", "low", "high"],
        (
            [metric, name, values[metric], values[f"{metric}_low"], values[f"{metric}_high"]]
            for metric in metrics.HEADLINE
            for name, values in shown.items()
        ),
        out / "comparison.csv",
    )
    return table


def _cell(values: dict[str, Any], metric: str, sign: str = "") -> str:
    if values[metric] is None:
        return "-"
    value, low, high = (format(values[key], f"{sign}.3f") for key in (metric, f"{metric}_low", f"{metric}_high"))
    return f"{value} [{low}, {high}]"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that is also aligned as plain text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _log(folder: Path) -> None:
    import mlflow

    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    flat = {f"{name}/{metric}": value for name, values in found.items() for metric, value in values.items()}
    mlflow.log_metrics({key: float(value) for key, value in flat.items() if value is not None})
    mlflow.log_artifacts(str(folder), "evaluation")


def _write_json(content: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _write_csv(header: Sequence[str], rows: Iterable[Sequence[Any]], file: Path) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
