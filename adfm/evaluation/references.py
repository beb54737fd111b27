"""Blind answers, and the reference detector where one was evaluated, as references of the candidate.

A blind answer is the same for every image, `always A` (anomalous) or `always B` (normal), and names no box; where
kinds are asked for, A comes with the commonest. The reference detector is `adfm.models.detector`.

`references.json` has `rows` (by model, then by blind answer, `[value, low, high]` of `METRICS`), and for the comparison
`sentence`, `verdict` (`detector`, `candidate`, `open`; `null` without a detector), `metric`, `rule`, `values` and
`difference` (detector minus candidate, `[value, low, high]`). `summary` is that of `adfm.evaluation.verdict`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from adfm.errors import AdfmError
from adfm.evaluation import metrics
from adfm.evaluation.metrics import numbers, with_limits, written

FILE = "references.json"  # in an evaluation's folder, and so in a version: `evaluation/references.json`
BLIND = {"always_A": "anomalous", "always_B": "normal"}  # labels by name, which no model may have
BY_SCORE = "balanced_accuracy_by_score"

# Titles of the metrics of the rows; all but `BY_SCORE` and AUROC count the answers as written.
METRICS = {
    "balanced_accuracy": "balanced accuracy",
    BY_SCORE: "the same by score",
    "recall": "recall",
    "specificity": "specificity",
    "auroc": "AUROC",
    "iou": "IoU",
    metrics.KIND: "kind right",
}
_BY_SCORE = "each decided by its score, at a threshold fitted on the validation split"
_AS_WRITTEN = "by the answers as written"


class Reference(NamedTuple):
    """The reference detector of an evaluation: its name among the models, and its folder."""

    name: str
    folder: str


def blind_tables(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Prediction tables of the blind answers on the images of `table`, by the names of `BLIND`."""
    regions = [f"region_{name}" for name in metrics.COMPARED]
    # A table without regions has the boxes in their place.
    boxes = {name: table[name if name in table else name.removeprefix("region_")] for name in regions}
    blind = metrics.as_decided(table.assign(decision="normal", **boxes))
    blind = blind.drop(columns=["probability", "decision"], errors="ignore")
    if "predicted_kind" in table:
        commonest = table["kind"][table["label"] == "anomalous"].mode()
        blind = blind.assign(predicted_kind=None if commonest.empty else commonest.iloc[0])
    return {name: blind.assign(predicted=label, score=0.5) for name, label in BLIND.items()}


def by_score(table: pd.DataFrame, validation: pd.DataFrame | None) -> pd.DataFrame | None:
    """A prediction table whose answers are those of the score, at a threshold fitted on the validation split.

    An image without a score keeps its answer. `None` where `validation`, the model's prediction table of the
    validation split, is missing or does not have scored images of both labels.
    """
    if validation is None:
        return None
    score = numbers(validation, "score")
    known = ~np.isnan(score)
    anomalous = metrics.is_defective(validation)[known]
    if not anomalous.any() or anomalous.all():
        return None
    # Of the best balanced accuracy, so that neither model gains by a limit or by letters that lean to one side.
    threshold = metrics.best_threshold(anomalous, score[known])
    return table.assign(predicted=metrics.decide(table, numbers(table, "score"), threshold))


def compare(
    tables: Mapping[str, pd.DataFrame],
    overall: Mapping[str, Mapping[str, Any]],
    validation: Mapping[str, pd.DataFrame],
    reference: Reference | None,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Return the contents of `references.json`.

    `tables` are prediction tables by model, the last of which is the candidate, `validation` those of the validation
    split; `overall` are metrics of these models and of the blind answers. The models are compared by their scores;
    without validation images of both labels by their answers as written; on images of one label by their boxes.
    """
    *_, candidate = tables
    decided = {name: by_score(table, validation.get(name)) for name, table in tables.items()}
    rows = {name: {metric: with_limits(values, metric) for metric in METRICS} for name, values in overall.items()}
    for name, table in decided.items():
        if table is not None:
            measured = metrics.overall(table, 1, seed, ["balanced_accuracy"])  # its limits are not the bootstrap's
            rows[name][BY_SCORE] = with_limits(measured, "balanced_accuracy")
    result: dict[str, Any] = {"rows": rows, "candidate": candidate, "detector": None, "verdict": None, "sentence": ""}
    if reference is None or reference.name == candidate:
        return result
    written_tables = tables[reference.name], tables[candidate]
    left, right = decided[reference.name], decided[candidate]
    rule, metric, measure = _BY_SCORE, "balanced_accuracy", "balanced accuracy by score"
    if left is None or right is None:
        left, right = written_tables
        rule, measure = _AS_WRITTEN, "balanced accuracy as written"
    change = metrics.difference(left, right, resamples, seed)
    if change[metric] is None:
        left, right = written_tables
        rule, metric, measure = _AS_WRITTEN, "iou", "IoU"
        change = metrics.difference(left, right, resamples, seed)
    result |= {"detector": reference.name, "metric": metric, "rule": rule}
    difference = with_limits(change, metric)
    value, low, high = difference
    if value is None:
        sentence = f"{candidate} and the reference detector cannot be compared on these images, which have one label"
        sentence += " and no boxes; evaluate both on images of both labels."
        return result | {"verdict": "open", "sentence": sentence}
    verdict = "detector" if low is not None and low > 0 else "candidate" if high is not None and high < 0 else "open"
    both = {name: metrics.values(table)[metric] for name, table in ((reference.name, left), (candidate, right))}
    words = {
        "detector": "The reference detector is better on this data",
        "candidate": f"{candidate} is better than the reference detector on this data",
        "open": f"{candidate} and the reference detector cannot be told apart on this data",
    }[verdict]
    figures = f"{measure} {written(both[reference.name])} (detector) and {written(both[candidate])} ({candidate})"
    if low is not None:
        figures += f", difference {written(value, low, high, '+')}"
    sentence = f"{words}: {figures}."
    return result | {"verdict": verdict, "values": both, "difference": difference, "sentence": sentence}


def read(evaluation: Path) -> dict[str, Any]:
    """Read `references.json` of an evaluation; an evaluation of before there were references has no rows.

    Its `summary` is added as text for people, `lines`; one of before there were summaries has the sentence alone.

    Raises:
        AdfmError: It is broken.
    """
    file = evaluation / FILE
    if not file.is_file():
        return {"rows": {}, "verdict": None, "sentence": "", "lines": []}
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda _: None)
        every = content["rows"].items()
        rows = {str(name): {metric: _numbers(row.get(metric)) for metric in METRICS} for name, row in every}
        summary = content.get("summary")
        own = lines(summary) if summary else [str(content["sentence"])] * bool(content["sentence"])
        return content | {"rows": rows, "sentence": str(content["sentence"]), "lines": own}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise AdfmError(f"{file} cannot be read ({error!r}); make it with `adfm evaluate`.") from error


def _numbers(values: Any) -> list[float | None]:
    value, low, high = values or (None, None, None)
    return [None if number is None else float(number) for number in (value, low, high)]


def lines(summary: Mapping[str, Any]) -> list[str]:
    """A summary of `adfm.evaluation.verdict` as sentences: model, comparison, next steps."""
    steps = [f"Next: {step['text']}" for step in summary["steps"]]
    return [str(summary["model"]), *map(str, summary["comparison"]), *steps]


def brief(references: Mapping[str, Any]) -> list[tuple[int, str]]:
    """The summary of `read` for a screen that shows the gate's decision too, in sentences with a rank.

    They are the first sentence on the model, on each of its two references, and on the next step, unless that is the
    gate. The lower the rank, the more a sentence matters.
    """
    if not (summary := references.get("summary")):
        return []
    steps = [f"Next: {step['text']}" for step in summary["steps"] if step["rule"] != "gate"]
    ranked = [(3, str(summary["model"])), *((2, str(line)) for line in summary["comparison"][:2])]
    ranked += [(1, step) for step in steps[:1]]
    return [(rank, line.partition(". ")[0].rstrip(".") + ".") for rank, line in ranked]


def table(references: Mapping[str, Any]) -> list[list[str]]:
    """The rows as text: a header, then a row for each model and blind answer, without columns that are empty."""
    rows = references["rows"]

    def filled(metric: str) -> bool:
        # A blind answer has a kind only where the candidate's prompt asks for one.
        those = [row for name, row in rows.items() if metric != metrics.KIND or name in BLIND]
        return any(row[metric][0] is not None for row in those)

    columns = [*filter(filled, METRICS)]
    return [
        ["", *(METRICS[metric] for metric in columns)],
        *([title(name), *(written(*values[metric]) for metric in columns)] for name, values in rows.items()),
    ]


def title(name: str) -> str:
    """A row's name for people."""
    return name.replace("_", " ") if name in BLIND else name
