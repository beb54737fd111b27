"""Calibration: what it does to scores, how the threshold is chosen, and its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adfm.errors import AdfmError
from adfm.evaluation import calibration, metrics
from adfm.evaluation.calibration import Calibration, choose_threshold, fit
from adfm.params import Evaluate

SCORES = st.floats(0, 1)
IMAGES = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]) | SCORES, st.booleans()), min_size=2, max_size=80
)
METHODS = st.sampled_from(["temperature", "isotonic", "none"])


def table(scores: Any, anomalous: Any, predicted: Any = None) -> pd.DataFrame:
    """The columns that are read; letters at 0.5 unless they are given."""
    score = np.array(scores, dtype=float)
    letters = np.where(np.isnan(score), None, np.where(score >= 0.5, "anomalous", "normal"))
    return pd.DataFrame(
        {
            "id": [f"{i:05}" for i in range(len(score))],
            "label": np.where(np.array(anomalous, dtype=bool), "anomalous", "normal"),
            "predicted": letters if predicted is None else np.array(predicted, dtype=object),
            "score": score,
        }
    )


def drawn(images: int, temperature: float = 1.0, bias: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """Images whose score is off by a temperature and a bias: the true odds are `logit / temperature + bias`."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(0, 2, images)
    true = 1 / (1 + np.exp(-(logit / temperature + bias)))
    return table(1 / (1 + np.exp(-logit)), rng.random(images) < true)


# -------------------------------------------------------------------------------------------------- probabilities


@settings(deadline=None, max_examples=60)
@given(IMAGES, METHODS, st.lists(SCORES, min_size=2, max_size=30))
def test_probabilities_lie_in_0_to_1_and_never_fall_with_the_score(
    images: list[tuple[float, bool]], method: Any, scores: list[float]
) -> None:
    fitted = fit(table(*zip(*images, strict=True)), Evaluate(calibration=method))
    probability = fitted.probability(sorted(scores))
    assert ((probability >= 0) & (probability <= 1)).all() and (np.diff(probability) >= 0).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.sampled_from([20, 100, 1000]))
def test_temperature_keeps_the_order_of_scores_strictly(seed: int, images: int) -> None:
    fitted = fit(drawn(images, temperature=5, bias=1, seed=seed), Evaluate())
    if fitted.method == "temperature":
        # As close to 0 and 1 as real scores come.
        scores = [0.0, 1e-8, 1e-7, 1e-6, 0.2, 0.5, 0.500001, 0.9, 1 - 1e-6, 1 - 1e-7, 1 - 1e-8, 1.0]
        assert (np.diff(fitted.probability(scores)) > 0).all()


@pytest.mark.parametrize(("temperature", "bias"), [(1, 0), (4, 0), (0.5, -1), (10, 2)])
def test_temperature_and_bias_are_fitted(temperature: float, bias: float) -> None:
    fitted = fit(drawn(100_000, temperature, bias), Evaluate())
    assert fitted.method == "temperature" and fitted.note == ""
    assert 1 / fitted.parameters["temperature"] == pytest.approx(1 / temperature, abs=0.03)
    assert fitted.parameters["bias"] == pytest.approx(bias, abs=0.05)


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_calibration_lowers_the_error_on_other_images(method: Any) -> None:
    fitted = fit(drawn(500, temperature=6, bias=1), Evaluate(calibration=method))
    measured = metrics.values(fitted.apply(drawn(5000, temperature=6, bias=1, seed=1)))
    assert measured["ece_of_score"] is not None and measured["ece"] is not None
    assert measured["ece_of_score"] > 0.2 > 0.1 > measured["ece"]


@pytest.mark.parametrize("method", ["temperature", "isotonic", "none"])
def test_scores_of_0_and_1_and_none_at_all(method: Any) -> None:
    scores = [0.0] * 30 + [1.0] * 30 + [np.nan] * 4
    fitted = fit(
        table(scores, [False] * 29 + [True] + [True] * 29 + [False] + [True] * 4), Evaluate(calibration=method)
    )
    low, high, missing = fitted.probability([0.0, 1.0, None])
    assert np.isnan(missing)
    expected = {"temperature": (2 / 32, 30 / 32), "isotonic": (1 / 30, 29 / 30), "none": (0, 1)}[method]
    assert (low, high) == pytest.approx(expected, abs=0.01)
    assert fitted.judge(None, None) == (None, None)


def test_scores_that_separate_the_labels_give_finite_probabilities() -> None:
    fitted = fit(table([0.2] * 50 + [0.7] * 50, [False] * 50 + [True] * 50), Evaluate())
    # Platt's labels: 1 of 52 and 51 of 52.
    assert fitted.probability([0.2, 0.7]) == pytest.approx([1 / 52, 51 / 52], abs=1e-4)


def test_isotonic_makes_ties_and_temperature_does_not() -> None:
    images = drawn(300)
    tied, strict = (
        fit(images, Evaluate(calibration=method)).apply(images)["probability"].nunique()
        for method in ("isotonic", "temperature")
    )
    assert tied < 60 and strict == 300


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
@pytest.mark.parametrize(
    ("scores", "anomalous", "words"),
    [
        ([0.5] * 10, [True, False] * 5, "do not rise with defects"),
        ([0.9, 0.1] * 5, [False, True] * 5, "do not rise with defects"),
        ([0.9, 0.1] * 5, [False] * 10, "scored images of both labels"),
        ([np.nan, 0.1] * 5, [True, False] * 5, "scored images of both labels"),
    ],
)
def test_scores_that_cannot_be_calibrated_stay_and_it_says_so(
    method: Any, scores: Any, anomalous: Any, words: str
) -> None:
    fitted = fit(table(scores, anomalous), Evaluate(calibration=method))
    assert fitted.method == "none" and words in fitted.note
    assert fitted.probability([0.25]) == [0.25]


# -------------------------------------------------------------------------------------------------- the threshold


def shares(images: pd.DataFrame, at: float) -> tuple[float, float]:
    """Overkill and escapes at a threshold."""
    judged = Calibration(threshold=at).apply(images)["decision"]
    anomalous = images["label"] == "anomalous"
    return float((judged[~anomalous] != "normal").mean()), float((judged[anomalous] != "anomalous").mean())


def chosen(images: pd.DataFrame, kind: Literal["overkill", "escapes"], share: float) -> float | None:
    return choose_threshold(images, images["score"].to_numpy(), {kind: share})[0]


@settings(deadline=None, max_examples=150)
@given(IMAGES, st.floats(0, 0.99), st.sampled_from(["overkill", "escapes"]))
def test_the_threshold_keeps_its_limit_and_is_no_more_careful(
    images: list[tuple[float, bool]], limit: float, kind: Literal["overkill", "escapes"]
) -> None:
    data = table(*zip(*images, strict=True))
    at, side = chosen(data, kind, limit), 0 if kind == "overkill" else 1
    if data["label"].nunique() < 2:
        return
    steps = sorted({*data["score"]})
    keeping = [step for step in [*steps, 1.0] if shares(data, step)[side] <= limit + 1e-9]
    if at is None:
        assert keeping == []
        return
    assert 0 <= at <= 1 and shares(data, at)[side] <= limit + 1e-9
    # Of the decisions that keep the limit, those with the fewest faults of the other kind.
    assert shares(data, at)[1 - side] == min(shares(data, step)[1 - side] for step in keeping)


@pytest.mark.parametrize(
    ("kind", "share", "at"),
    [
        ("overkill", 0.0, 0.85),  # between the highest normal image, 0.8, and the next, 0.9
        ("overkill", 0.24, 0.85),
        ("overkill", 0.25, 0.7),  # 0.8 may be flagged, 0.6 not
        ("overkill", 0.5, 0.25),
        ("overkill", 0.99, 0.15),
        ("escapes", 0.0, 0.25),  # between the lowest defect, 0.3, and the image below, 0.2
        ("escapes", 0.25, 0.4),
        ("escapes", 0.5, 0.7),
        ("escapes", 0.75, 0.85),
    ],
)
def test_known_thresholds(kind: Any, share: float, at: float) -> None:
    normal, defects = [0.1, 0.2, 0.6, 0.8], [0.3, 0.5, 0.8, 0.9]
    assert chosen(table(normal + defects, [False] * 4 + [True] * 4), kind, share) == pytest.approx(at)


def test_ties_are_flagged_together() -> None:
    data = table([0.4] * 4 + [0.4, 0.4, 0.7], [False] * 4 + [True] * 3)
    assert chosen(data, "overkill", 0.5) == pytest.approx(0.55)  # not two of the four
    assert chosen(data, "escapes", 0.5) == pytest.approx(0.2)


def test_the_ends_of_the_scale() -> None:
    # Nothing above the highest normal image: nothing that was seen is flagged.
    assert chosen(table([0.6, 0.2], [False, True]), "overkill", 0.0) == pytest.approx(0.8)
    assert chosen(table([1.0, 0.2], [False, True]), "overkill", 0.0) is None  # a threshold above 1 there is not
    assert chosen(table([0.3, 0.0], [False, True]), "escapes", 0.0) == 0.0  # everything is flagged


def test_a_limit_that_answers_without_a_score_exceed_cannot_be_kept() -> None:
    data = table([np.nan, 0.2, 0.7, np.nan], [False, False, True, True])
    for kind in ("overkill", "escapes"):
        at, why = choose_threshold(data, data["score"].to_numpy(), {kind: 0.4})
        assert at is None and "answers without a score alone exceed it" in why
        assert chosen(data, kind, 0.5) is not None  # type: ignore[arg-type]
    for label, kind in (("normal", "escapes"), ("anomalous", "overkill")):
        at, why = choose_threshold(data[data["label"] == label], np.array([0.1, 0.2]), {kind: 0.4})
        assert at is None and "image to choose a threshold on" in why


def test_a_letter_without_a_score_is_decided_by_itself() -> None:
    letters = ["normal", "anomalous", "normal", "anomalous"]
    data = table([np.nan, np.nan, 0.2, 0.9], [False, False, False, True], letters)
    assert chosen(data, "overkill", 0.0) is None
    assert chosen(data, "overkill", 0.4) == pytest.approx(0.55)
    judged = Calibration(threshold=0.5).apply(data)
    assert judged["decision"].tolist() == letters


@settings(deadline=None, max_examples=40)
@given(IMAGES, METHODS)
def test_one_image_is_judged_as_a_table_is(images: list[tuple[float, bool]], method: Any) -> None:
    data = table(*zip(*images, strict=True))
    fitted = fit(data, Evaluate(calibration=method))
    judged = fitted.apply(data)
    for letter, score, probability, decision in zip(
        data["predicted"], data["score"], judged["probability"], judged["decision"], strict=True
    ):
        assert fitted.judge(letter, score) == (pytest.approx(probability), decision)


def test_without_a_threshold_the_letter_decides_and_it_says_why() -> None:
    nothing = Calibration(note="the validation split is not there")
    assert nothing.judge("normal", 0.99) == (0.99, "normal") and nothing.judge(None, 0.99) == (0.99, None)
    assert nothing.summary == "The letter decides: the validation split is not there."
    set_ = Calibration(threshold=0.25, limit={"escapes": 0.02}, images=192)
    assert set_.judge("normal", 0.25) == (0.25, "anomalous") and set_.judge(None, 0.2) == (0.2, "normal")
    assert "from a probability of 0.25 on" in set_.summary and "at most 2.0% of the defective images" in set_.summary


def test_the_limit_that_is_set_is_kept() -> None:
    images = drawn(400, temperature=3)
    assert shares(images, 0.5)[0] > 0.1
    careful = fit(images, Evaluate(overkill_limit=0.05))
    measured = metrics.values(
        careful.apply(images).assign(predicted=lambda judged: judged["decision"]),
    )
    assert measured["overkill"] == pytest.approx(0.05, abs=0.006) and careful.limit == {"overkill": 0.05}
    eager = fit(images, Evaluate(overkill_limit=None, escape_limit=0.05))
    measured = metrics.values(eager.apply(images).assign(predicted=lambda judged: judged["decision"]))
    assert measured["miss_rate"] == pytest.approx(0.05, abs=0.006) and eager.limit == {"escapes": 0.05}


@pytest.mark.parametrize(("overkill", "escapes"), [(None, None), (0.1, 0.1)])
def test_exactly_one_limit_is_set(overkill: float | None, escapes: float | None) -> None:
    with pytest.raises(ValueError, match="exactly one of overkill_limit and escape_limit"):
        Evaluate(overkill_limit=overkill, escape_limit=escapes)


# -------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("method", ["temperature", "isotonic", "none"])
def test_the_file_gives_the_same_back(tmp_path: Path, method: Any) -> None:
    fitted = fit(drawn(200, 3), Evaluate(calibration=method), "f00d", "data")
    (tmp_path / "calibration.json").write_text(json.dumps(fitted.model_dump()))
    again = calibration.read(tmp_path / "calibration.json", "f00d")
    assert again == fitted and again.images == 200 and again.data == "data"
    scores = np.linspace(0, 1, 101)
    assert again.probability(scores).tolist() == fitted.probability(scores).tolist()
    with pytest.raises(AdfmError, match=r"another model \(digest f00d, not beef\)"):
        calibration.read(tmp_path / "calibration.json", "beef")


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"method": "magic"}', '{"method": "temperature"}', '{"threshold": 7}', '{"threshold": 0.5, "x": 1}'],
)
def test_a_file_that_is_not_a_calibration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(AdfmError, match=r"calibration\.json is not a calibration"):
        calibration.read(tmp_path / "calibration.json")
    with pytest.raises(AdfmError, match="cannot be read"):
        calibration.read(tmp_path / "not-there.json")


@pytest.mark.parametrize("limit", [{"overkill_limit": 0.1}, {"overkill_limit": None, "escape_limit": 0.1}])
def test_on_defects_alone_there_is_neither_calibration_nor_threshold(limit: dict[str, float | None]) -> None:
    table = pd.DataFrame({"label": ["anomalous"] * 3, "predicted": ["anomalous"] * 3, "score": [0.2, 0.7, 0.9]})
    fitted = calibration.fit(table, Evaluate(**limit))
    assert (fitted.method, fitted.threshold) == ("none", None)
    assert "no normal image to choose a threshold on" in fitted.summary
