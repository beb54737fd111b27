"""Blind answers and the reference detector beside the models."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from adfm.errors import AdfmError
from adfm.evaluation import metrics, references
from adfm.evaluation.references import Reference

DETECTOR = Reference("detector", "models/detector")


def predictions(right: float, seed: int, images: int = 200, boxes: bool = True, iou: float = 0.5) -> pd.DataFrame:
    """Every second image is defective; the score and the letter are right in a share `right`."""
    rng = np.random.default_rng(seed)
    anomalous = np.arange(images) % 2 == 0
    hit = rng.random(images) < right
    flagged = anomalous == hit
    overlap = np.where(anomalous & boxes, np.where(flagged, iou, 0.0), np.nan)
    return pd.DataFrame(
        {
            "id": [f"{i:04}" for i in range(images)],
            "dataset": "d",
            "category": "c",
            "defect": np.where(anomalous, "scratch", None),
            "label": np.where(anomalous, "anomalous", "normal"),
            "predicted": np.where(flagged, "anomalous", "normal"),
            "score": np.where(flagged, 0.8, 0.2) + rng.uniform(-0.1, 0.1, images),
            "iou": overlap,
            "mask_iou": np.nan,
            "matched_iou": overlap,
            "true_positives": np.where(anomalous & boxes, (flagged & (iou >= 0.5)).astype(float), np.nan),
            "false_positives": np.where(anomalous & boxes, 0.0, np.nan),
            "false_negatives": np.where(anomalous & boxes, 1.0 - (flagged & (iou >= 0.5)), np.nan),
            "area_share": np.where(anomalous & boxes, 0.02, np.nan),
        }
    )


def compared(tables: dict[str, pd.DataFrame], validation: dict[str, pd.DataFrame] | None = None) -> dict[str, Any]:
    *_, candidate = tables
    everything = tables | references.blind_tables(tables[candidate])
    overall = {name: metrics.overall(table, 200, 0) for name, table in everything.items()}
    reference = DETECTOR if "detector" in tables else None
    result = references.compare(tables, overall, tables if validation is None else validation, reference, 200, 0)
    return json.loads(json.dumps(result, allow_nan=False))  # as it is written


@pytest.mark.parametrize(
    ("of_detector", "of_candidate", "verdict", "start"),
    [
        (0.95, 0.6, "detector", "The reference detector is better on this data: balanced accuracy by score 0."),
        (
            0.6,
            0.95,
            "candidate",
            "trained is better than the reference detector on this data: balanced accuracy by score 0.",
        ),
        (0.8, 0.8, "open", "trained and the reference detector cannot be told apart on this data: "),
    ],
)
def test_the_sentence_says_which_of_the_two_is_better(
    of_detector: float, of_candidate: float, verdict: str, start: str
) -> None:
    result = compared({"detector": predictions(of_detector, 0), "trained": predictions(of_candidate, 1)})
    assert result["verdict"] == verdict and result["sentence"].startswith(start)
    value, low, high = result["difference"]
    assert value == pytest.approx(result["values"]["detector"] - result["values"]["trained"]) and low < value < high
    assert f"difference {value:+.3f} [{low:+.3f}, {high:+.3f}]" in result["sentence"]
    assert ": balanced accuracy by score " in result["sentence"] and "fitted on the validation split" in result["rule"]


def test_letters_that_lean_to_one_side_do_not_decide() -> None:
    good = predictions(0.95, 0)
    leaning = good.assign(predicted="anomalous")
    result = compared({"detector": good, "trained": leaning})
    assert result["verdict"] == "open" and result["difference"] == [0, 0, 0]
    rows = result["rows"]["trained"]
    assert rows["balanced_accuracy"][0] == 0.5 and rows[references.BY_SCORE][0] > 0.9
    without = compared({"detector": good, "trained": leaning}, {})
    assert without["verdict"] == "detector" and "balanced accuracy as written " in without["sentence"]
    assert without["rows"]["trained"][references.BY_SCORE] == [None] * 3


def test_images_of_one_label_are_compared_by_their_boxes() -> None:
    def defective(iou: float, seed: int) -> pd.DataFrame:
        table = predictions(0.9, seed, iou=iou)
        return table[table["label"] == "anomalous"].reset_index(drop=True)

    result = compared({"detector": defective(0.7, 0), "trained": defective(0.2, 1)})
    assert result["metric"] == "iou" and result["verdict"] == "detector"
    assert "IoU 0." in result["sentence"] and result["rows"]["always_A"]["balanced_accuracy"] == [None] * 3
    labels = {name: table.assign(iou=np.nan) for name, table in (("detector", defective(0.7, 0)),)}
    labels["trained"] = labels["detector"]
    nothing = compared(labels)
    assert nothing["verdict"] == "open" and "cannot be compared" in nothing["sentence"]


def test_without_a_detector_there_are_blind_rows_and_no_sentence() -> None:
    result = compared({"trained": predictions(0.9, 0)})
    assert result["sentence"] == "" and result["verdict"] is None
    assert list(result["rows"]) == ["trained", "always_A", "always_B"]
    header, *rows = references.table(result)
    assert header == ["", *(title for title in references.METRICS.values() if title != "kind right")]
    assert [row[0] for row in rows] == ["trained", "always A", "always B"]
    assert rows[1][1].startswith("0.500 [") and rows[1][3].startswith("1.000 [") and rows[2][3].startswith("0.000 [")


@settings(deadline=None, max_examples=25)
@given(right=st.floats(0, 1), seed=st.integers(0, 99), images=st.integers(2, 60), decisions=st.booleans())
def test_a_blind_answer_is_right_for_one_label_and_boxes_nothing(
    right: float, seed: int, images: int, decisions: bool
) -> None:
    table = predictions(right, seed, images)
    if decisions:  # as evaluation gives them
        regions = {f"region_{name}": table[name] for name in metrics.COMPARED}
        table = table.assign(probability=table["score"], decision=table["predicted"], **regions)
    blind = references.blind_tables(table)
    for name, recall in (("always_A", 1.0), ("always_B", 0.0)):
        measured = metrics.values(blind[name])
        assert (measured["recall"], measured["specificity"]) == (recall, 1 - recall)
        assert measured["balanced_accuracy"] == measured["auroc"] == 0.5
        assert measured["iou"] == 0 and measured["parse_rate"] == 1
        assert blind[name]["false_negatives"].sum() == (table["label"] == "anomalous").sum()
        assert blind[name]["id"].tolist() == table["id"].tolist()


def test_a_blind_answer_names_the_commonest_kind() -> None:
    table = predictions(0.9, 0, 60)
    defective = table["label"] == "anomalous"
    kinds = np.where(defective, np.where(np.arange(60) % 3 == 0, "dent", "scratch"), None)
    table = table.assign(kind=kinds, predicted_kind=kinds)
    rows = compared({"trained": table})["rows"]
    assert rows["always_B"][metrics.KIND][0] == 0
    assert rows["always_A"][metrics.KIND][0] == (kinds[defective] == "scratch").mean() > 0.5
    header, *cells = references.table({"rows": rows})
    assert header[-1] == "kind right" and cells[-1][-1].startswith("0.000 [")
    nothing = table.assign(kind=None, predicted_kind=None)
    assert compared({"trained": nothing})["rows"]["always_A"][metrics.KIND] == [None] * 3


@pytest.mark.parametrize(("shift", "apart"), [(0.0, 2.0), (2.0, 2.0), (-3.0, 3.0), (0.0, 4.0)])
def test_the_threshold_is_nearly_the_best_for_other_images(shift: float, apart: float) -> None:
    """Normally distributed log-odds, whose best threshold is half way, of 60 images: the mean loss over 200 sets."""
    normal = NormalDist()
    balances = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        anomalous = rng.random(60) < 0.4
        odds = np.where(anomalous, apart / 2, -apart / 2) + rng.normal(size=60)
        threshold = metrics.best_threshold(anomalous, special.expit(odds * apart + shift))
        at = (float(special.logit(threshold)) - shift) / apart
        balances.append((normal.cdf(apart / 2 - at) + normal.cdf(apart / 2 + at)) / 2)
    assert normal.cdf(apart / 2) - 0.004 < np.mean(balances) <= normal.cdf(apart / 2)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 10)), min_size=1, max_size=30))
def test_there_is_a_threshold_for_any_scores(images: list[tuple[bool, int]]) -> None:
    anomalous = np.array([label for label, _ in images])
    score = np.array([value / 10 for _, value in images])
    threshold = metrics.best_threshold(anomalous, score)
    assert 0 <= threshold <= 1
    if anomalous.all():
        assert threshold == score.min()
    elif anomalous.any() and score[anomalous].min() > score[~anomalous].max():
        assert score[~anomalous].max() < threshold < score[anomalous].min()


def test_an_image_without_a_score_keeps_its_answer() -> None:
    table = predictions(0.9, 0, 6)
    table.loc[0, ["predicted", "score"]] = [None, np.nan]
    decided = references.by_score(table, predictions(0.9, 1))
    assert decided is not None and decided["predicted"].isna().tolist() == [True] + [False] * 5


def test_an_evaluation_of_before_has_no_references_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    assert references.read(tmp_path) == {"rows": {}, "verdict": None, "sentence": "", "lines": []}
    for text in ("{", "[]", '{"rows": {"a": 1}, "sentence": ""}', '{"rows": {"a": {"iou": [1]}}, "sentence": ""}'):
        (tmp_path / references.FILE).write_text(text)
        with pytest.raises(AdfmError, match="make it with `adfm evaluate`"):
            references.read(tmp_path)
