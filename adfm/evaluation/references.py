"""References in every report: the blind answers, and the reference detector where one was evaluated.

A blind answer is the same for every image, `always A` (anomalous) or `always B` (normal), and names no box; where
kinds are asked for, A comes with the commonest. A model that does not beat both has learnt nothing from the images. The
reference detector (`adfm.models.detector`) learns from the same images without language; where it is better than the
language model, the report says so first.

Language model and detector are compared by their scores: each is decided at a threshold fitted on the validation split
for the best balanced accuracy, so that neither gains by a limit or by letters that lean to one side. Where there is
no validation split of both labels, the answers as written are compared; where the evaluated images have one label
alone, their boxes.

`references.json` has `rows` (by model, then by blind answer, `[value, low, high]` of `METRICS`), and for the comparison
`sentence`, `verdict` (`detector`, `candidate`, `open`; `null` without a detector), `metric`, `rule`, `values` and
`difference` (detector minus candidate, `[value, low, high]`). `summary` is that of `adfm.evaluation.verdict`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from adfm.errors import AdfmError
from adfm.evaluation import metrics

if TYPE_CHECKING:
    import pandas as pd

FILE = "references.json"
"""In an evaluation's folder, and so in a version: `evaluation/references.json`."""

BLIND = {"always_A": "anomalous", "always_B": "normal"}
"""The blind answers: names, which no model may have, and labels."""

BY_SCORE = "balanced_accuracy_by_score"

METRICS = {
    "balanced_accuracy": "balanced accuracy",
    BY_SCORE: "the same by score",
    "recall": "recall",
    "specificity": "specificity",
    "auroc": "AUROC",
    "iou": "IoU",
    metrics.KIND: "kind right",
}
"""The metrics of the rows and their titles; all but `BY_SCORE` and AUROC count the answers as written."""

_RULES = {
    True: "each decided by its score, at a threshold fitted on the validation split",
    False: "by the answers as written",
}
_BY = {True: "balanced accuracy by score", False: "balanced accuracy as written"}


class Reference(NamedTuple):
    """The reference detector of an evaluation.

    Args:
        name: As of the evaluated models.
        folder: Where it lies, for the command that uses it.
    """

    name: str
    folder: str


def blind_tables(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Prediction tables of the blind answers on the images of `table`, by the names of `BLIND`."""
    without_boxes = metrics.as_decided(table.assign(decision="normal", **_regions(table)))
    without_boxes = without_boxes.drop(columns=["probability", "decision"], errors="ignore")
    if "predicted_kind" in table:
        commonest = table["kind"][table["label"] == "anomalous"].mode()
        without_boxes = without_boxes.assign(predicted_kind=None if commonest.empty else commonest.iloc[0])
    return {name: without_boxes.assign(predicted=label, score=0.5) for name, label in BLIND.items()}


def _regions(table: pd.DataFrame) -> dict[str, Any]:
    """The localisation columns of the regions; those of the boxes where a table has none."""
    return {
        f"region_{name}": table[f"region_{name}" if f"region_{name}" in table else name] for name in metrics.COMPARED
    }


def by_score(table: pd.DataFrame, validation: pd.DataFrame | None) -> pd.DataFrame | None:
    """A prediction table whose answers are those of the score, at a threshold fitted on the validation split.

    An image without a score keeps its answer.

    Args:
        table: Prediction table.
        validation: That of the same model on the validation split.

    Returns:
        The table; `None` without a validation split, or where it does not have scored images of both labels.
    """
    if validation is None:
        return None
    score = validation["score"].to_numpy(dtype=float, na_value=np.nan)
    known = ~np.isnan(score)
    anomalous = (validation["label"] == "anomalous").to_numpy(dtype=bool)[known]
    if not anomalous.any() or anomalous.all():
        return None
    threshold = metrics.best_threshold(anomalous, score[known])
    scores = table["score"].to_numpy(dtype=float, na_value=np.nan)
    decided = np.where(scores >= threshold, "anomalous", "normal").astype(object)
    return table.assign(predicted=np.where(np.isnan(scores), table["predicted"].astype(object), decided))


def compare(
    tables: Mapping[str, pd.DataFrame],
    overall: Mapping[str, Mapping[str, Any]],
    validation: Mapping[str, pd.DataFrame],
    reference: Reference | None,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """The contents of `references.json`.

    Args:
        tables: Prediction tables by model; the last is the candidate.
        overall: Metrics of these models and of the blind answers, as `metrics.overall` gives them.
        validation: Prediction tables of the validation split by model, where there is one.
        reference: The detector among the models, if there is one.
        resamples: Bootstrap resamples behind the interval of the difference.
        seed: Their seed.
    """
    *_, candidate = tables
    decided = {name: by_score(table, validation.get(name)) for name, table in tables.items()}
    rows = {name: {metric: _interval(values, metric) for metric in METRICS} for name, values in overall.items()}
    for name, table in decided.items():
        if table is not None:
            measured = metrics.overall(table, 1, seed, ["balanced_accuracy"])  # its limits are not the bootstrap's
            rows[name][BY_SCORE] = _interval(measured, "balanced_accuracy")
    result: dict[str, Any] = {"rows": rows, "candidate": candidate, "detector": None, "verdict": None, "sentence": ""}
    if reference is None or reference.name == candidate:
        return result
    return result | _compared(tables, decided, candidate, reference, resamples, seed)


def _compared(
    tables: Mapping[str, pd.DataFrame],
    decided: Mapping[str, pd.DataFrame | None],
    candidate: str,
    reference: Reference,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    left, right = decided[reference.name], decided[candidate]
    scored = left is not None and right is not None
    if left is None or right is None:
        left, right = tables[reference.name], tables[candidate]
    change = metrics.difference(left, right, resamples, seed)
    metric = "balanced_accuracy"
    if change[metric] is None:
        metric, scored = "iou", False
        left, right = tables[reference.name], tables[candidate]
        change = metrics.difference(left, right, resamples, seed)
    result: dict[str, Any] = {"detector": reference.name, "metric": metric, "rule": _RULES[scored]}
    if change[metric] is None:
        words = (
            f"{candidate} and the reference detector cannot be compared on these images, which have one label and no "
            "boxes; evaluate both on images of both labels."
        )
        return result | {"verdict": "open", "sentence": words}
    difference = _interval(change, metric)
    _, low, high = difference
    verdict = "open"
    if low is not None and high is not None:
        verdict = "detector" if low > 0 else "candidate" if high < 0 else "open"
    both = {name: metrics.values(table)[metric] for name, table in ((reference.name, left), (candidate, right))}
    result |= {"verdict": verdict, "values": both, "difference": difference}
    return result | {"sentence": _sentence(result, candidate, reference)}


def _sentence(compared: dict[str, Any], candidate: str, reference: Reference) -> str:
    """Which of the two is better on these images, and by how much."""
    of_detector, of_candidate = compared["values"][reference.name], compared["values"][candidate]
    metric = _BY[compared["rule"] == _RULES[True]] if compared["metric"] == "balanced_accuracy" else "IoU"
    value, low, high = compared["difference"]
    figures = f"{metric} {of_detector:.3f} (detector) and {of_candidate:.3f} ({candidate})"
    if low is not None:
        figures += f", difference {value:+.3f} [{low:+.3f}, {high:+.3f}]"
    return {
        "detector": f"The reference detector is better on this data: {figures}.",
        "candidate": f"{candidate} is better than the reference detector on this data: {figures}.",
        "open": f"{candidate} and the reference detector cannot be told apart on this data: {figures}.",
    }[compared["verdict"]]


def _interval(values: Mapping[str, Any], metric: str) -> list[float | None]:
    return [values.get(metric + end) for end in ("", "_low", "_high")]


def read(evaluation: Path) -> dict[str, Any]:
    """`references.json` of an evaluation; without rows, sentence and lines for one of before there were references.

    Its `summary` is given as text for people, `lines`; one of before there were summaries has the sentence alone.

    Raises:
        AdfmError: It is broken.
    """
    file = evaluation / FILE
    if not file.is_file():
        return {"rows": {}, "verdict": None, "sentence": "", "lines": []}
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda _: None)
        rows = {
            str(name): {metric: _numbers(values.get(metric)) for metric in METRICS}
            for name, values in content["rows"].items()
        }
        summary = content.get("summary")
        own = lines(summary) if summary else [str(content["sentence"])] * bool(content["sentence"])
        return content | {"rows": rows, "sentence": str(content["sentence"]), "lines": own}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise AdfmError(f"{file} cannot be read ({error!r}); make it with `adfm evaluate`.") from error


def lines(summary: Mapping[str, Any]) -> list[str]:
    """A summary of `adfm.evaluation.verdict` as sentences: model, comparison, next steps."""
    steps = [f"Next: {step['text']}" for step in summary["steps"]]
    return [str(summary["model"]), *map(str, summary["comparison"]), *steps]


def brief(references: Mapping[str, Any]) -> list[tuple[int, str]]:
    """The summary for a screen that shows the gate's decision too, in sentences with a rank.

    They are the first sentence on the model, on each of its two references, and on the next step, unless that is the
    gate. The lower the rank, the more a sentence matters.

    Args:
        references: As `read` gives them.
    """
    if not (summary := references.get("summary")):
        return []
    steps = [f"Next: {step['text']}" for step in summary["steps"] if step["rule"] != "gate"]
    ranked = [(3, str(summary["model"])), *((2, str(line)) for line in summary["comparison"][:2])]
    ranked += [(1, step) for step in steps[:1]]
    return [(rank, line.partition(". ")[0].rstrip(".") + ".") for rank, line in ranked]


def _numbers(values: Any) -> list[float | None]:
    value, low, high = values or (None, None, None)
    return [None if number is None else float(number) for number in (value, low, high)]


def table(references: Mapping[str, Any]) -> list[list[str]]:
    """The rows as text: a header, then a row for each model and blind answer, without columns that are empty.

    Kinds are shown where the candidate was asked for them, and so a blind answer has one.
    """
    rows = references["rows"]

    def filled(metric: str) -> bool:
        those = [row for name, row in rows.items() if metric != metrics.KIND or name in BLIND]
        return any(row[metric][0] is not None for row in those)

    columns = [*filter(filled, METRICS)]
    return [
        ["", *(METRICS[metric] for metric in columns)],
        *([title(name), *(_cell(values[metric]) for metric in columns)] for name, values in rows.items()),
    ]


def title(name: str) -> str:
    """A row's name for people."""
    return name.replace("_", " ") if name in BLIND else name


def _cell(values: list[float | None]) -> str:
    value, low, high = values
    if value is None:
        return "-"
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"
