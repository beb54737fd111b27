"""The curve of detection against size: its maximum, its limits, and where there is none."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, special

from adfm.evaluation import detection


def defects(number: int, seed: int, intercept: float = 0.5, slope: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    size = np.exp(random.normal(0, 1, number))
    return size, (random.random(number) < special.expit(intercept + slope * np.log(size))).astype(float)


def log_likelihood(size: np.ndarray, hit: np.ndarray, intercept: float, slope: float) -> float:
    logit = intercept + slope * np.log(size)
    return float(np.sum(hit * logit - np.logaddexp(0, logit)))


def likeliest_through(log_size: float, logit: float, size: np.ndarray, hit: np.ndarray) -> float:
    """Greatest log likelihood of a curve through a point."""
    best = optimize.minimize_scalar(lambda slope: -log_likelihood(size, hit, logit - slope * log_size, slope), (0.5, 2))
    return -float(best.fun)


def test_the_limits_are_where_the_likelihood_ratio_says() -> None:
    size, hit = defects(120, 3)
    curve = detection.curve(size, hit)
    best = log_likelihood(size, hit, curve["intercept"], curve["slope"])
    for shift in (0.05, -0.05):
        assert log_likelihood(size, hit, curve["intercept"] + shift, curve["slope"]) < best
        assert log_likelihood(size, hit, curve["intercept"], curve["slope"] + shift) < best
    assert [point["detection"] for point in curve["points"]] == list(detection.POINTS)
    for point in curve["points"]:
        logit = special.logit(point["detection"])
        assert curve["intercept"] + curve["slope"] * math.log(point["size"]) == pytest.approx(logit)
        assert point["low"] < point["size"] < point["high"]
        for limit in (point["low"], point["high"]):
            assert 2 * (best - likeliest_through(math.log(limit), logit, size, hit)) == pytest.approx(2.7055, abs=1e-3)
    assert (curve["a50"], curve["a90"]) == (curve["points"][6]["size"], curve["points"][10]["size"])
    assert curve["a90_95"] == curve["points"][10]["high"]


def test_a90_95_is_rarely_below_a90() -> None:
    truth = math.exp((math.log(9) - 0.5) / 2)
    limits = [detection.curve(*defects(200, seed))["a90_95"] for seed in range(60)]
    assert np.mean(np.array(limits) < truth) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 60)


def test_the_unit_of_size_does_not_matter() -> None:
    size, hit = defects(100, 1)
    one, other = detection.curve(size, hit), detection.curve(1e-4 * size, hit)
    assert other["a90_95"] == pytest.approx(1e-4 * one["a90_95"])
    assert other["slope"] == pytest.approx(one["slope"])


@pytest.mark.parametrize(
    ("size", "hit", "reason"),
    [
        ([], [], "0 defects"),
        (np.arange(1, 60), np.arange(1, 60) % 2, "a curve needs 60"),
        (np.arange(1, 101), np.arange(1, 101) > 5, "95 of 100 defects are detected"),
        (np.arange(1, 101), np.arange(1, 101) > 50, "One size divides"),
        (np.arange(1, 101), np.arange(1, 101) < 50, "One size divides"),
        (np.full(100, 3.0), np.arange(100) % 2, "One size divides"),
        (np.arange(1, 101), np.arange(1, 101) % 2, "does not rise"),
        (*(lambda size, hit: (size, 1 - hit))(*defects(200, 0)), "does not rise"),
    ],
)
def test_there_is_a_reason_where_there_is_no_curve(size: np.ndarray, hit: np.ndarray, reason: str) -> None:
    curve = detection.curve(np.asarray(size), np.asarray(hit, dtype=float))
    assert reason in curve["reason"]
    assert curve["a90_95"] is None and curve["a50"] is None and curve["points"] == []


def test_sizes_beyond_those_measured_are_noted() -> None:
    size, hit = defects(200, 0)
    assert detection.curve(size, hit)["note"] is None
    small = size < 2
    assert "add larger defects" in detection.curve(size[small], hit[small])["note"]
