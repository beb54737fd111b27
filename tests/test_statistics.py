"""Confidence limits, tests and sample sizes against published values, brute force and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from adfm import statistics

LEVELS = st.sampled_from([0.05, 0.025, 0.0139, 0.0007])


def losses(worse: int, better: int, images: int) -> np.ndarray:
    return np.repeat([1.0, -1.0, 0.0], [worse, better, images - worse - better])


def short(limits: list[float], truth: float) -> float:
    return float(np.mean(np.array(limits) < truth))


# --------------------------------------------------------------------------------------------------- upper limits


@pytest.mark.parametrize(("images", "limit"), [(64, 0.0457), (59, 0.0495), (299, 0.00997)])
def test_without_an_escape_the_limit_is_about_three_in_n(images: int, limit: float) -> None:
    assert statistics.rate_at_most(np.zeros(images), 0.05) == pytest.approx(limit, rel=2e-3)
    assert statistics.rate_at_most(np.zeros(images), 0.05) == pytest.approx(1 - 0.05 ** (1 / images))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 400), st.data(), LEVELS)
def test_a_rate_has_the_limit_of_clopper_and_pearson(images: int, data: st.DataObject, alpha: float) -> None:
    events = data.draw(st.integers(0, images))
    limit = statistics.rate_at_most(np.repeat([1.0, 0.0], [events, images - events]), alpha)
    interval = stats.binomtest(events, images).proportion_ci(1 - 2 * alpha, "exact")
    assert limit == pytest.approx(interval.high, abs=1e-9)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 400), st.data(), LEVELS)
def test_the_limit_of_a_mean_is_that_of_clopper_and_pearson_for_zeros_and_ones(
    images: int, data: st.DataObject, alpha: float
) -> None:
    events = np.repeat([1.0, 0.0], [count := data.draw(st.integers(0, images)), images - count])
    exact, limit = statistics.rate_at_most(events, alpha), statistics.mean_at_most(events, alpha)
    assert limit == pytest.approx(exact, rel=0.006)  # the approximation of the quantile


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=40), st.sampled_from([0.05, 0.0139]))
def test_the_limit_of_a_mean_is_the_quantile_over_random_weights(values: list[float], alpha: float) -> None:
    weights = np.random.default_rng(0).standard_exponential((100_000, len(values) + 1))
    means = weights @ np.append(values, 1.0) / weights.sum(axis=1)
    limit = statistics.mean_at_most(np.array(values), alpha)
    assert np.mean(means > limit) == pytest.approx(alpha, rel=0.1)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=40), LEVELS, st.integers(2, 4))
def test_copies_of_an_image_in_its_group_change_nothing(values: list[float], alpha: float, copies: int) -> None:
    several, group = np.repeat(values, copies), np.repeat(np.arange(len(values)), copies)
    limit = statistics.mean_at_most(np.array(values), alpha)
    assert statistics.mean_at_most(several, alpha, group) == pytest.approx(limit, abs=1e-6)
    assert statistics.mean_at_most(np.array(values), alpha, np.arange(len(values))) == pytest.approx(limit, abs=1e-6)
    assert limit > np.mean(values) or limit == 1


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.data())
def test_a_larger_value_never_lowers_the_limit(values: list[float], data: st.DataObject) -> None:
    larger = list(values)
    larger[data.draw(st.integers(0, len(values) - 1))] = 1.0
    before, after = (statistics.mean_at_most(np.array(numbers), 0.05) for numbers in (values, larger))
    assert after >= before - 1e-7


def test_without_an_event_the_parts_count_not_their_images() -> None:
    group = np.repeat(np.arange(100), 3)
    assert statistics.rate_at_most(np.zeros(300), 0.05, group) == pytest.approx(1 - 0.05**0.01, rel=0.01)


@pytest.mark.parametrize("images", [1, 2, 30, 1600])
def test_models_that_answer_alike_are_not_proved_equal(images: int) -> None:
    for binary in (True, False):
        assert statistics.loss_at_most(np.zeros(images), 0.05, None, binary) > 1.6 / (images + 2)


def test_nothing_is_excluded_without_images_or_at_level_0() -> None:
    for limit in (statistics.rate_at_most, statistics.mean_at_most, statistics.loss_at_most):
        assert limit(np.array([]), 0.05) == limit(np.zeros(50), 0.0) == limit(np.ones(50), 0.05) == 1


@pytest.mark.parametrize(
    ("better", "worse", "images", "level", "low", "high"),
    [
        (1, 7, 21, 0.025, -0.5172, -0.0260),  # Bentur et al. 2009, in Fagerland, Lydersen and Laake 2017, chapter 8
        (6, 16, 161, 0.025, -0.1240, -0.0054),  # Cavo et al. 2012, in the same
        (28, 25, 618, 0.05, -0.0148, 0.0247),  # PropCIs 0.3 for R: scoreci.mp(25, 28, 618, conf.level = 0.9)
    ],
)
def test_a_loss_has_the_published_limits_of_tango(
    better: int, worse: int, images: int, level: float, low: float, high: float
) -> None:
    gain = -losses(worse, better, images)
    assert statistics.loss_at_most(gain, level) == pytest.approx(high, abs=5e-5)
    assert -statistics.loss_at_most(-gain, level) == pytest.approx(low, abs=5e-5)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 500), st.data(), LEVELS)
def test_the_score_test_rejects_from_the_limit_of_tango_on(images: int, data: st.DataObject, alpha: float) -> None:
    worse = data.draw(st.integers(0, images))
    better = data.draw(st.integers(0, images - worse))
    assume(worse < images)
    limit = statistics.loss_at_most(losses(worse, better, images), alpha)

    def unlikely(gain: float) -> float:
        rest = 1 - limit - 2 * gain
        counts, shares = [worse, better, images - worse - better], [limit + gain, gain, rest]
        return -sum(count * math.log(max(share, 1e-300)) for count, share in zip(counts, shares, strict=True) if count)

    least = max(0.0, -limit)
    gain = optimize.minimize_scalar(
        unlikely, bounds=(least, (1 - limit) / 2), method="bounded", options={"xatol": 1e-10}
    ).x
    spread = math.sqrt(images * (2 * gain + limit * (1 - limit)))
    assert (images * limit - worse + better) / spread == pytest.approx(stats.norm.isf(alpha), rel=2e-3)


def test_limits_of_a_loss_hold_at_the_margin() -> None:
    random = np.random.default_rng(1)
    draws = range(800)
    error = 0.05 + 3 * math.sqrt(0.05 * 0.95 / len(draws))
    rare = [statistics.mean_at_most((random.random(80) < 0.1) * random.random(80), 0.05) for _ in draws]
    two = [statistics.loss_at_most(random.choice([1.0, -1.0, 0.0], 200, p=[0.085, 0.035, 0.88]), 0.05) for _ in draws]
    alike = [(random.random(60) < 0.1).astype(float) for _ in draws]
    parts = [statistics.rate_at_most(np.repeat(part, 4), 0.05, np.repeat(np.arange(60), 4)) for part in alike]
    assert short(rare, 0.05) <= error
    assert 0.02 < short(two, 0.05) <= error
    assert 0.01 < short(parts, 0.1) <= error
    assert short([statistics.rate_at_most(np.repeat(part, 4), 0.05) for part in alike], 0.1) > 0.1  # what groups mend


# ------------------------------------------------------------------------------------------------------------ gains


def test_a_gain_in_accuracy_is_tested_by_mcnemar() -> None:
    assert statistics.gain_p(-losses(2, 10, 100)) == pytest.approx(stats.binom.sf(9, 12, 0.5))
    assert statistics.gain_p(np.zeros(100)) == 1


def test_a_gain_in_iou_is_tested_over_parts() -> None:
    gain = np.random.default_rng(0).normal(0.02, 0.1, 60)
    assert statistics.gain_p(gain, binary=False) == pytest.approx(
        stats.ttest_1samp(gain, 0, alternative="greater").pvalue
    )
    several = statistics.gain_p(np.repeat(gain, 3), np.repeat(np.arange(60), 3), binary=False)
    assert several == pytest.approx(statistics.gain_p(gain, binary=False))


@pytest.mark.parametrize("gain", [[0.1], [0.1, 0.1], [0.2 + 1e-16, 0.2, 0.2], [0.0, 0.0, 0.3]])
def test_a_few_equal_gains_are_no_certainty(gain: list[float]) -> None:
    assert statistics.gain_p(np.array(gain), binary=False) >= 2.0 ** -np.count_nonzero(gain)


def test_no_gain_is_not_a_gain() -> None:
    assert statistics.gain_p(np.array([]), binary=False) == statistics.gain_p(np.zeros(9), binary=False) == 1
    assert statistics.gain_p(np.full(9, -0.1), binary=False) == 1


def test_two_metrics_share_the_level() -> None:
    assert statistics.holm([0.04, 0.04], 0.05) == [False, False]
    assert statistics.holm([0.02, 0.04], 0.05) == [True, True]
    assert statistics.holm([0.03, 0.01], 0.05) == [True, True]
    assert statistics.holm([0.03, 0.01, 0.04], 0.05) == [False, True, False]  # 0.04 alone would do after 0.03
    assert statistics.holm([], 0.05) == []


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 200), st.floats(0.001, 0.4))
def test_the_level_is_spent_over_the_budget_of_looks(looks: int, alpha: float) -> None:
    levels = [statistics.level_of_look(look, looks, alpha) for look in range(1, looks + 1)]
    assert sum(levels) == pytest.approx(alpha)
    assert levels == sorted(levels, reverse=True) and min(levels) > 0
    assert statistics.level_of_look(looks + 1, looks, alpha) == 0


# ----------------------------------------------------------------------------------------------- images that are needed


@pytest.mark.parametrize(("rate", "limit"), [(0.0, 0.05), (0.02, 0.1), (0.1, 0.3)])
@pytest.mark.parametrize("power", [0.8, 0.9])
def test_images_for_a_rate_are_the_fewest_that_show_it(rate: float, limit: float, power: float) -> None:
    def passes(images: int) -> float:
        events = np.arange(images + 1)
        good = [
            statistics.rate_at_most(np.repeat([1.0, 0.0], [count, images - count]), 0.05) <= limit for count in events
        ]
        return float(stats.binom.pmf(events, images, rate)[np.array(good)].sum())

    needed = statistics.images_for_rate(rate, limit, 0.05, power)
    assert needed is not None
    assert needed == next(images for images in range(1, 400) if passes(images) >= power)


def test_no_number_of_images_shows_what_is_not_so() -> None:
    assert statistics.images_for_rate(0.1, 0.1, 0.05, 0.8) is None
    assert statistics.images_for_rate(0.2, 0.1, 0.05, 0.8) is None
    assert statistics.images_for_rate(0.0999999, 0.1, 0.05, 0.8) is None


@pytest.mark.parametrize("differ", [0.02, 0.12])
@pytest.mark.parametrize("power", [0.8, 0.9])
def test_images_for_a_loss_give_the_power(differ: float, power: float) -> None:
    needed = statistics.images_for_loss(math.sqrt(differ), 0.05, 0.0139, power)
    random = np.random.default_rng(0)
    draws = random.multinomial(needed, [differ / 2, differ / 2, 1 - differ], 1500)
    limits = [statistics.loss_at_most(losses(worse, better, needed), 0.0139) for worse, better, _ in draws]
    assert short(limits, 0.05) == pytest.approx(power, abs=0.05)


def test_images_for_a_loss_of_models_that_answer_alike() -> None:
    for alpha in (0.05, 0.001):
        needed = statistics.images_for_loss(0.0, 0.02, alpha, 0.8)
        assert all(
            statistics.loss_at_most(np.zeros(needed + 3), alpha, None, binary) <= 0.02 for binary in (True, False)
        )
    assert statistics.images_for_loss(0.5, 1.0, 0.05, 0.8) >= 1


# ------------------------------------------------------------------------------------------------- in the plant


def test_rates_at_the_share_of_defects_in_the_plant() -> None:
    at = statistics.at_prevalence((0.1, 0.05, 0.2), (0.02, 0.01, 0.04), 0.01)
    assert at["escapes"] == pytest.approx((10, 5, 20))
    assert at["false_calls"] == pytest.approx((198, 99, 396))
    assert at["precision"] == pytest.approx((90 / 288, 80 / (80 + 396), 95 / (95 + 99)))
    assert statistics.at_prevalence((1.0, 0.9, 1.0), (0.0, 0.0, 0.1), 0.01)["precision"][0] == 0


# ------------------------------------------------------------------------------------------------- width of intervals


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 400), st.data(), LEVELS)
def test_half_the_width_is_that_of_clopper_and_pearson(images: int, data: st.DataObject, alpha: float) -> None:
    events = data.draw(st.integers(0, images))
    interval = stats.binomtest(events, images).proportion_ci(1 - 2 * alpha, "exact")
    half = statistics.half_width(events / images, images, alpha)
    assert half == pytest.approx((interval.high - interval.low) / 2, abs=1e-9)


@settings(deadline=None, max_examples=50)
@given(st.floats(0, 1), st.floats(0.01, 0.4), LEVELS)
def test_so_many_images_make_the_interval_narrow_and_one_less_does_not(rate: float, width: float, alpha: float) -> None:
    images = statistics.images_for_half_width(rate, width, alpha)
    assert statistics.half_width(rate, images, alpha) <= width
    assert images == 1 or statistics.half_width(rate, images - 1, alpha) > width
    assert statistics.half_width(rate, 4 * images, alpha) < width


def test_half_the_width_in_round_numbers() -> None:
    assert statistics.images_for_half_width(0.5, 0.05) == pytest.approx(
        1 / 0.05**2, rel=0.05
    )  # 1.96 times 0.5, squared
    assert statistics.images_for_half_width(0.0, 0.05) == 36  # 1 - 0.025 ** (1 / n) = 0.1 at n = 35.01
