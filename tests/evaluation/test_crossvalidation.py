"""Intervals of a cross-validation, against published formulas and by simulation."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from adfm.evaluation import crossvalidation, metrics


def predictions(fold: int, images: int, right: float = 0.8, shift: float = 0.0) -> pd.DataFrame:
    """Decisions of one fold's model, whose scores are all higher by `shift`."""
    rng = np.random.default_rng(fold)
    anomalous = np.arange(images) % 2 == 0
    flagged = anomalous == (rng.random(images) < right)
    label, predicted = (np.where(which, "anomalous", "normal") for which in (anomalous, flagged))
    boxes = {name: np.where(anomalous, value, np.nan) for name, value in (("iou", 0.4), ("true_positives", 0))}
    boxes |= {name: np.where(anomalous, 1, np.nan) for name in ("false_positives", "false_negatives")}
    regions = {f"region_{name}": boxes.get(name, np.full(images, np.nan)) for name in metrics.COMPARED}
    score = 0.3 * flagged + 0.4 * rng.random(images) + shift
    ids = [f"{fold} {i:03}" for i in range(images)]
    columns = {"id": ids, "label": label, "predicted": predicted, "decision": predicted, "score": score}
    return pd.DataFrame(columns | boxes | regions)


def test_the_spread_between_folds_is_that_of_nadeau_and_bengio() -> None:
    values = [0.8, 0.9, 0.7, 0.85, 0.75]
    low, high = crossvalidation.interval(0.8, 0.79, 0.81, values, 1 / 4)
    half = stats.t.ppf(0.975, 4) * math.sqrt(np.var(values, ddof=1) * (1 / 5 + 1 / 4))
    assert (low, high) == (pytest.approx(0.8 - half), pytest.approx(min(1.0, 0.8 + half)))


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=8),
    st.floats(0, 1),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
    st.floats(0.05, 1),
)
def test_the_interval_is_never_narrower_than_the_limits_of_all_predictions(
    values: list[float], value: float, below: float, above: float, share: float
) -> None:
    limits = max(0.0, value - below), min(1.0, value + above)
    low, high = crossvalidation.interval(value, *limits, values, share)
    assert 0 <= low <= limits[0] <= value <= limits[1] <= high <= 1


def test_folds_without_an_error_have_the_exact_limits_of_all_images() -> None:
    measured = crossvalidation.summarize([predictions(fold, 20, right=1.0) for fold in range(5)], [80] * 5, 50, 0)
    upper = stats.binomtest(0, 50).proportion_ci(0.95, "exact").high
    assert measured["miss_rate"] == {"value": 0.0, "low": 0.0, "high": pytest.approx(upper), "folds": [0.0] * 5}


def test_folds_that_agree_do_not_hide_that_the_models_may_differ() -> None:
    """Recalls of models by other training sets differ; the interval holds their mean at least as often as it says."""
    rng = np.random.default_rng(0)
    k, images, truth, runs = 5, 40, 0.8, 400
    held = naive = 0
    for _ in range(runs):
        # The training sets of two folds share three quarters: so do, in part, the faults of their models.
        shared, own = rng.normal(0, 0.03), rng.normal(0, 0.07, k)
        events = rng.binomial(images, np.clip(truth + shared + own, 0, 1))
        pooled = np.repeat([1.0, 0.0], [events.sum(), k * images - events.sum()])
        limits = metrics.confidence_limits(pooled)
        low, high = crossvalidation.interval(float(pooled.mean()), *limits, (events / images).tolist(), 1 / (k - 1))
        held += low <= truth <= high
        naive += limits[0] <= truth <= limits[1]
    assert held / runs >= 0.95 > naive / runs


def test_auroc_is_the_mean_of_the_folds_since_their_scores_are_on_other_scales() -> None:
    tables = [predictions(fold, 40, shift=0.1 * fold) for fold in range(4)]
    measured = crossvalidation.summarize(tables, [120] * 4, 200, 0)["auroc"]
    of_folds = [metrics.values(table)["auroc"] for table in tables]
    assert measured["folds"] == of_folds and measured["value"] == pytest.approx(np.mean(of_folds))
    assert metrics.values(pd.concat(tables))["auroc"] < measured["value"] - 0.02
    assert measured["low"] < measured["value"] < measured["high"]


def test_what_a_fold_lacks_is_left_out_and_what_all_lack_is_none() -> None:
    whole, normal = predictions(0, 40), predictions(1, 40)
    normal = normal[normal["label"] == "normal"]
    measured = crossvalidation.summarize([whole, normal], [40, 60], 50, 0)
    assert measured["auroc"]["folds"][1] is None and measured["auroc"]["value"] == measured["auroc"]["folds"][0]
    nothing = crossvalidation.summarize([normal, normal.assign(id=normal["id"] + "b")], [40, 60], 50, 0)
    assert nothing["miss_rate"]["value"] is None and nothing["overkill"]["value"] is not None


def test_the_section_has_a_row_for_every_metric_and_says_what_it_is() -> None:
    tables = [predictions(fold, 20) for fold in range(2)]
    fold = {"train": 16, "validation": 4, "test": 20, "anomalous": 10}
    measured = {"images": 40, "anomalous": 20, "folds": [fold, fold]}
    measured["metrics"] = crossvalidation.summarize(tables, [16, 16], 50, 0)
    text = crossvalidation.section(measured)
    assert "| escape rate at threshold | 0." in text and "| AUROC | 0." in text
    assert "40 images, 20 of them defective, each judged once by one of 2 models" in text
