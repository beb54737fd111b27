"""Confidence limits, tests and sample sizes of the gate: plain functions of numpy arrays.

Every metric is a mean over images of a value in [0, 1], so a handful of functions serve them all: an upper limit of one
model's mean, an upper limit of the loss between two models on the same images, a test for a gain, and the number of
images that a limit or a margin needs. All limits are one-sided: they fall short of the truth in at most a share `alpha`
of test sets. `group` numbers the parts: images of one part are alike, and nowhere count as independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

Floats = NDArray[np.float64]
Limits = tuple[float, float, float]
"""A measured value, its lower and its upper limit."""


# --------------------------------------------------------------------------------------------------- one model's mean


def rate_at_most(events: Floats, alpha: float, group: NDArray[Any] | None = None) -> float:
    """Upper confidence limit of a rate; with n images and no event `1 - alpha ** (1 / n)`, about 3 / n, never 0.

    Clopper and Pearson (1934). With groups, the number of images is replaced by the effective one of Korn and Graubard
    (1998, Survey Methodology 24:193); without an event that is the number of parts, since nothing then tells how
    alike the images of a part are. The limit never lies below that of the same parts without an event.

    Args:
        events: Array (images,) of 0 and 1.
        alpha: One-sided level; at 0 the limit is 1.
        group: Array (images,), which images show one part; `None`: each shows another.
    """
    n = float(len(events))
    if not n or alpha <= 0:
        return 1.0
    rate = float(np.mean(events))
    if group is None:
        return _clopper_pearson(rate * n, n, alpha)
    sums, sizes = _by_group(events - rate, group)
    parts = float(len(sizes))
    no_event = _clopper_pearson(0.0, parts, alpha)
    variance = parts / max(parts - 1, 1) * float(np.sum(sums**2)) / n**2
    if rate in (0.0, 1.0) or variance == 0:
        return _clopper_pearson(rate * parts, parts, alpha)
    effective = rate * (1 - rate) / variance
    effective *= (stats.t.ppf(alpha, n - 1) / stats.t.ppf(alpha, parts - 1)) ** 2
    effective = min(effective, n)
    return max(no_event, _clopper_pearson(rate * effective, effective, alpha))


def mean_at_most(values: Floats, alpha: float, group: NDArray[Any] | None = None) -> float:
    """Upper confidence limit of a mean of values in [0, 1]; one minus that of `1 - values` is the lower limit.

    The mean of a Bayesian bootstrap with one more image (part) at 1, its distribution taken as the beta distribution
    of the same mean and variance. For values 0 and 1 without groups this is Clopper and Pearson's limit exactly; for
    others it is never narrower than what equal values would give, as a t interval is.

    Args:
        values: Array (images,) in [0, 1].
        alpha: One-sided level; at 0 the limit is 1.
        group: Array (images,), which images show one part; `None`: each shows another.
    """
    if not len(values) or alpha <= 0:
        return 1.0
    sums, sizes = _by_group(values, group)
    size = float(np.mean(sizes))
    sums, sizes = np.append(sums, size), np.append(sizes, size)
    total = float(sizes.sum())
    mean = float(sums.sum()) / total
    if mean >= 1:
        return 1.0
    # Of a Dirichlet-weighted mean; for parts of unequal size to first order.
    variance = float(np.sum((sums - mean * sizes) ** 2)) / (total * (total + size))
    if variance == 0:
        return 1.0
    precision = mean * (1 - mean) / variance - 1
    return float(special.betaincinv(mean * precision, (1 - mean) * precision, 1 - alpha))


def _clopper_pearson(events: float, n: float, alpha: float) -> float:
    return 1.0 if events >= n else float(special.betaincinv(events + 1, n - events, 1 - alpha))


def _by_group(values: Floats, group: NDArray[Any] | None) -> tuple[Floats, Floats]:
    """Sum of the values and number of images of each part."""
    if group is None:
        return np.asarray(values, dtype=float), np.ones(len(values))
    _, places = np.unique(group, return_inverse=True)
    return np.bincount(places, values).astype(float), np.bincount(places).astype(float)


# ------------------------------------------------------------------------------------------------------ two models


def loss_at_most(loss: Floats, alpha: float, group: NDArray[Any] | None = None, binary: bool = True) -> float:
    """Upper confidence limit of the mean loss of a candidate against another model on the same images.

    For single images with a loss of -1, 0 or 1: the score limit of Tango (1998, Statistics in Medicine 17:891). Else a
    t limit over the parts, to which one image with a loss of 1 and one with -1 are added, as Agresti and Min (2005,
    Statistics in Medicine 24:729) do for paired proportions: two models that answer alike on a few images are not
    thereby proved equal.

    Args:
        loss: Array (images,) in [-1, 1], positive where the candidate is worse.
        alpha: One-sided level; at 0 the limit is 1.
        group: Array (images,), which images show one part; `None`: each shows another.
        binary: Whether every loss is -1, 0 or 1.
    """
    if not len(loss) or alpha <= 0:
        return 1.0
    if binary and group is None:
        return _tango(int(np.sum(loss > 0)), int(np.sum(loss < 0)), len(loss), alpha)
    sums, sizes = _by_group(loss, group)
    size = float(np.mean(sizes))
    sums, sizes = np.append(sums, [size, -size]), np.append(sizes, [size, size])
    parts, total = len(sizes), float(sizes.sum())
    mean = float(sums.sum()) / total
    variance = parts / (parts - 1) * float(np.sum((sums - mean * sizes) ** 2)) / total**2
    return min(1.0, mean + float(stats.t.ppf(1 - alpha, parts - 1)) * math.sqrt(variance))


def _tango(losses: int, gains: int, n: int, alpha: float) -> float:
    """Tango's upper score limit of `(losses - gains) / n`: where the score test no longer rejects."""
    critical = float(stats.norm.isf(alpha))
    difference = losses - gains

    def excess(delta: float) -> float:
        # Probability of a gain that is most likely when losses exceed gains by delta.
        linear = -losses - gains + (2 * n - losses + gains) * delta
        constant = -gains * delta * (1 - delta)
        gain = (math.sqrt(max(linear**2 - 8 * n * constant, 0.0)) - linear) / (4 * n)
        variance = n * (2 * gain + delta * (1 - delta))
        return difference - n * delta + critical * math.sqrt(max(variance, 0.0))

    if losses == n:
        return 1.0
    # Just above the measured loss: there itself the variance may be 0, and a test of it says nothing.
    return float(optimize.brentq(excess, difference / n + 1e-9, 1.0, xtol=1e-12))


def gain_p(gain: Floats, group: NDArray[Any] | None = None, binary: bool = True) -> float:
    """One-sided p value of the hypothesis that a candidate is not better than another model on the same images.

    For single images with a gain of -1, 0 or 1: McNemar's exact test. Else a paired t test over the parts; its p is
    never below `2 ** -k` with k parts that differ, the least that a sign-flip test can give.

    Args:
        gain: Array (images,) in [-1, 1], positive where the candidate is better.
        group: Array (images,), which images show one part; `None`: each shows another.
        binary: Whether every gain is -1, 0 or 1.
    """
    if binary and group is None:
        better, worse = int(np.sum(gain > 0)), int(np.sum(gain < 0))
        return float(stats.binomtest(better, better + worse, alternative="greater").pvalue) if better else 1.0
    sums, _ = _by_group(gain, group)
    least = 2.0 ** -int(np.count_nonzero(sums))
    if len(sums) < 2 or np.ptp(sums) == 0:  # no variance to test against
        return least if np.sum(sums) > 0 else 1.0
    return max(least, float(stats.ttest_1samp(sums, 0.0, alternative="greater").pvalue))


def holm(p: Sequence[float], alpha: float) -> list[bool]:
    """Which hypotheses are rejected while the error over all of them stays at `alpha` (Holm 1979)."""
    from statsmodels.stats.multitest import multipletests  # type: ignore[import-untyped]

    return [bool(rejected) for rejected in multipletests(p, alpha, method="holm")[0]] if len(p) else []


def level_of_look(look: int, looks: int, alpha: float) -> float:
    """Level of the look-th candidate that a test set judges: `alpha` spent over all looks, proportional to 1 / look.

    The levels of looks 1 to `looks` sum to `alpha`, so that whatever the dependence between candidates, some unfit one
    passes in at most that share of test sets (Bonferroni with weights). 0 once the budget is used up: nothing passes.
    """
    if look > looks:
        return 0.0
    return alpha / (look * math.fsum(1 / number for number in range(1, looks + 1)))


# ----------------------------------------------------------------------------------------------- images that are needed


@lru_cache(maxsize=4096)
def images_for_rate(rate: float, limit: float, alpha: float, power: float) -> int | None:
    """The fewest images on which a model with this rate is shown to be below the limit with this power.

    Exact: the fewest n with P(`rate_at_most` < limit) >= power, the number of events being binomial.

    Returns:
        `None` if no number of images would do: the rate is not below the limit, or by so little that more than ten
        million images would be needed.
    """
    if rate >= limit or alpha <= 0:
        return None
    z_alpha, z_power = stats.norm.isf(alpha), stats.norm.ppf(power)
    about = ((z_alpha * math.sqrt(limit * (1 - limit)) + z_power * math.sqrt(rate * (1 - rate))) / (limit - rate)) ** 2
    if about > 1e7:
        return None
    # For each number of events, the fewest images on which so many keep the limit.
    events = np.arange(math.ceil(2 * about * limit) + 20)
    n = np.ceil(special.bdtrin(events, alpha, limit))
    n += stats.binom.cdf(events, n, limit) > alpha
    enough = np.flatnonzero(stats.binom.cdf(events, n, rate) >= power)
    return int(n[enough[0]]) if len(enough) else None


def images_for_loss(spread: float, margin: float, alpha: float, power: float) -> int:
    """Images on which an equal candidate is shown not to be worse by the margin, with this power.

    Normal approximation, and at least as many as two models need that answer alike on every image.

    Args:
        spread: Standard deviation of the loss between the models; for equal binary ones, the square root of the share
            of images on which they differ.
        margin: Greatest loss that counts as none, above 0.
        alpha: One-sided level.
        power: Probability, at least 0.5, that an equal candidate passes.
    """
    z_alpha, z_power = float(stats.norm.isf(alpha)), float(stats.norm.ppf(power))
    alike = z_alpha**2 * (1 - margin) / margin
    return math.ceil(max(((z_alpha + z_power) * spread / margin) ** 2, alike))


# ------------------------------------------------------------------------------------------------- in the plant


def at_prevalence(escape: Limits, overkill: Limits, prevalence: float) -> dict[str, Limits]:
    """What rates that were measured on a test set mean at the plant's share of defects.

    Args:
        escape: Share of defects that pass: value, lower and upper limit.
        overkill: The same of good parts that are rejected.
        prevalence: Share of defective parts in the plant.

    Returns:
        `precision` (share of rejected parts that are defective), and `escapes` and `false_calls` per 10,000 parts; each
        with limits that hold where those of both rates hold.
    """

    def precision(escape: float, overkill: float) -> float:
        hits, false_calls = prevalence * (1 - escape), (1 - prevalence) * overkill
        return hits / (hits + false_calls) if hits + false_calls else 0.0

    def scaled(share: float, rate: Limits) -> Limits:
        value, low, high = (10_000 * share * number for number in rate)
        return value, low, high

    return {
        "precision": (
            precision(escape[0], overkill[0]),
            precision(escape[2], overkill[2]),
            precision(escape[1], overkill[1]),
        ),
        "escapes": scaled(prevalence, escape),
        "false_calls": scaled(1 - prevalence, overkill),
    }
