"""Confidence limits, tests and sample sizes of the gate, as functions of numpy arrays.

Every metric is a mean over images of a value in [0, 1]. All limits are one-sided: they fall short of the truth in at
most a share `alpha` of test sets; at `alpha` 0 a limit is 1. `group`, an array (images,), numbers the parts, whose
images are alike and do not count as independent; `None`: each image shows another part.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special  # every verb of the registry would wait half a second for scipy.stats

Floats = NDArray[np.float64]
Limits = tuple[float, float, float]  # a measured value, its lower and its upper limit

_ROUNDING = 1e-9  # differences of this size are of floating point, not of models


def rate_at_most(events: Floats, alpha: float, group: NDArray[Any] | None = None) -> float:
    """Return the upper confidence limit of a rate of `events`, 0 or 1; with groups `mean_at_most`.

    Clopper and Pearson (1934, Biometrika 26:404). Without an event in n images: `1 - alpha ** (1 / n)`, about 3 / n.
    """
    if group is not None:
        return mean_at_most(events, alpha, group)
    n, count = len(events), int(np.sum(events))
    if count >= n or alpha <= 0:
        return 1.0
    return float(special.betaincinv(count + 1, n - count, 1 - alpha))


def mean_at_most(values: Floats, alpha: float, group: NDArray[Any] | None = None) -> float:
    """Return the upper confidence limit of a mean of values up to 1; for a lower one, pass minus or 1 minus the values.

    One part whose images are all 1, the worst possible, is added, and the limit is the quantile of the mean when the
    parts get random weights, exponential and independent (Gaffke 2005, Metrika 61:1). For 0 and 1 without groups this
    is Clopper and Pearson's limit; without an event in n parts of one size, `1 - alpha ** (1 / n)`. The quantile is by
    saddlepoint (Barndorff-Nielsen 1986, Biometrika 73:307), which errs by less than 0.6 % of the limit.
    """
    if not len(values) or alpha <= 0:
        return 1.0
    # A t limit would be 0 without an event, and for sparse losses falls short up to three times as often as it may; so
    # does Korn and Graubard's effective sample size (1998) for unequal parts (`benchmarks/gate_errors.py --limits`).
    sums, sizes = _by_group(values, group)
    added = float(np.sum(sizes**2) / np.sum(sizes))  # size of the part that an image drawn at random belongs to
    sums, sizes = np.append(sums, added), np.append(sizes, added)
    mean = float(np.sum(sums) / np.sum(sizes))
    spread = math.sqrt(float(np.sum((sums - mean * sizes) ** 2))) / float(np.sum(sizes))
    z = float(-special.ndtri(alpha))

    def excess(limit: float) -> float:
        return _saddlepoint(sums - limit * sizes) - z

    low, high = mean + 0.01 * spread, 1 - 1e-9  # the approximation has a pole at the mean
    if low >= high or excess(high) <= 0:
        return 1.0
    return float(optimize.brentq(excess, low, high, xtol=1e-9)) if excess(low) < 0 else low


def _saddlepoint(deviations: Floats) -> float:
    """Return the normal quantile of the probability that random weights lift a sum of `deviations` to above 0."""
    highest = float(np.max(deviations))

    def slope(tilt: float) -> float:
        return float(np.sum(deviations / (1 - tilt * deviations)))

    tilt = optimize.brentq(slope, 0, (1 - 1e-12) / highest, xtol=1e-13 / highest)
    shrunk = 1 - tilt * deviations
    root = math.sqrt(2 * float(np.sum(np.log(shrunk))))
    scale = tilt * math.sqrt(float(np.sum((deviations / shrunk) ** 2)))
    return root + math.log(scale / root) / root


def _by_group(values: Floats, group: NDArray[Any] | None) -> tuple[Floats, Floats]:  # each part's sum, and its images
    if group is None:
        return np.asarray(values, dtype=float), np.ones(len(values))
    _, places = np.unique(group, return_inverse=True)
    return np.bincount(places, values).astype(float), np.bincount(places).astype(float)


def loss_at_most(loss: Floats, alpha: float, group: NDArray[Any] | None = None, binary: bool = True) -> float:
    """Return the upper confidence limit of the mean loss of a candidate against another model on the same images.

    A loss in [-1, 1] is positive where the candidate is worse, and -1, 0 or 1 if `binary`. For binary ones of single
    images: the score limit of Tango (1998, Statistics in Medicine 17:891). Else `mean_at_most`. Neither is 0 for models
    that answer alike on all images.
    """
    if not len(loss) or alpha <= 0:
        return 1.0
    if binary and group is None:
        return _tango(int(np.sum(loss > 0)), int(np.sum(loss < 0)), len(loss), alpha)
    return mean_at_most(loss, alpha, group)


def _tango(losses: int, gains: int, n: int, alpha: float) -> float:
    # The upper limit of `(losses - gains) / n`, from which on the score test rejects; no library has it.
    if losses == n:
        return 1.0
    critical = float(-special.ndtri(alpha))

    def excess(difference: float) -> float:
        spread = _spread_at(difference, losses / n, gains / n)
        return (losses - gains) / n - difference + critical * spread / math.sqrt(n)

    # Just above the measured loss: there itself the variance may be 0, and a test of it says nothing.
    return float(optimize.brentq(excess, (losses - gains) / n + 1e-9, 1.0, xtol=1e-12))


def _spread_at(difference: float, losses: float, gains: float) -> float:
    """Return the maximum likelihood standard deviation of a loss of -1, 0 or 1 whose mean is `difference`."""
    # Losses and gains are measured shares of the images, the difference is of their probabilities.
    linear = (2 - losses + gains) * difference - losses - gains
    gain = (math.sqrt(linear**2 + 8 * gains * difference * (1 - difference)) - linear) / 4
    return math.sqrt(max(2 * gain + difference * (1 - difference), 0.0))


def gain_p(gain: Floats, group: NDArray[Any] | None = None, binary: bool = True) -> float:
    """Return the one-sided p value of the hypothesis that a candidate is not better than another model.

    A gain in [-1, 1] is positive where the candidate is better, and -1, 0 or 1 if `binary`. For binary ones of single
    images: McNemar's exact test. Else a paired t test over the parts, with the least p that a sign-flip test can give.
    """
    if binary and group is None:
        better, worse = int(np.sum(gain > 0)), int(np.sum(gain < 0))
        return float(special.bdtrc(better - 1, better + worse, 0.5)) if better else 1.0
    sums, _ = _by_group(gain, group)
    least = 2.0 ** -int(np.sum(np.abs(sums) > _ROUNDING))  # of a sign-flip test, by the number of parts that differ
    if len(sums) < 2 or np.ptp(sums) < _ROUNDING:  # no variance to test against
        return least if np.sum(sums) > 0 else 1.0
    t = np.mean(sums) / (np.std(sums, ddof=1) / math.sqrt(len(sums)))
    return max(least, float(special.stdtr(len(sums) - 1, -t)))


def holm(p: Sequence[float], alpha: float) -> list[bool]:
    """Return which hypotheses are rejected while the error over all of them stays at `alpha` (Holm 1979)."""
    # statsmodels' multipletests collects garbage at every call (0.15): a second where torch is loaded.
    rejected = [False] * len(p)
    for rank, place in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        if p[place] > alpha / (len(p) - rank):
            break
        rejected[place] = True
    return rejected


def level_of_look(look: int, looks: int, alpha: float) -> float:
    """Return the level of the look-th candidate that a test set judges: a share of `alpha` proportional to 1 / look.

    The levels of looks 1 to `looks` sum to `alpha`, so that whatever the dependence between candidates, some unfit one
    passes in at most that share of test sets (Bonferroni with weights).
    """
    if look > looks:
        return 0.0  # the budget is used up: nothing passes
    # The levels of all looks sum to `alpha`, so that whatever the dependence between candidates, some unfit one passes
    # in at most that share of test sets (Bonferroni with weights).
    return alpha / (look * math.fsum(1 / number for number in range(1, looks + 1)))


@lru_cache(maxsize=4096)
def images_for_rate(rate: float, limit: float, alpha: float, power: float) -> int | None:
    """Return the fewest images on which a model with this rate is shown to be below the limit with this power.

    Exact: the fewest n with P(`rate_at_most` < limit) >= power, the number of events being binomial. `None` if the rate
    is not below the limit, or by so little that more than ten million images would be needed.
    """
    if rate >= limit or alpha <= 0:
        return None
    z_alpha, z_power = -special.ndtri(alpha), special.ndtri(power)
    about = ((z_alpha * math.sqrt(limit * (1 - limit)) + z_power * math.sqrt(rate * (1 - rate))) / (limit - rate)) ** 2
    if about > 1e7:
        return None
    # For each number of events, the fewest images on which so many keep the limit.
    events = np.arange(math.ceil(2 * about * limit) + 20)
    n = np.ceil(special.bdtrin(events, alpha, limit)).astype(int)
    n += special.bdtr(events, n, limit) > alpha
    enough = np.flatnonzero(special.bdtr(events, n, rate) >= power)
    return int(n[enough[0]]) if len(enough) else None


def images_for_loss(spread: float, margin: float, alpha: float, power: float) -> int:
    """Return the number of images on which an equal candidate is shown not to be worse by the margin, with this power.

    Nam (1997, Biometrics 53:1422), for Tango's limit; close for continuous losses. At least as many as are needed to
    show that a loss which never occurred is below the margin. `spread` is the standard deviation of the loss between
    the models; for equal binary ones, the square root of the share of images on which they differ.
    """
    at_margin = _spread_at(margin, spread**2 / 2, spread**2 / 2)
    z_alpha, z_power = float(-special.ndtri(alpha)), float(special.ndtri(power))
    without_loss = math.log(alpha) / math.log1p(-margin) if margin < 1 else 1.0
    return math.ceil(max(((z_alpha * at_margin + z_power * spread) / margin) ** 2, without_loss))


def half_width(rate: float, images: float, alpha: float = 0.025) -> float:
    """Return half of the width of Clopper and Pearson's interval of a rate; `rate * images` need not be whole."""
    events = rate * images
    low = special.betaincinv(events, images - events + 1, alpha) if events > 0 else 0.0
    high = special.betaincinv(events + 1, images - events, 1 - alpha) if events < images else 1.0
    return float(high - low) / 2


def images_for_half_width(rate: float, width: float, alpha: float = 0.025) -> int:
    """Return the fewest images from which on a rate's interval is, on average, at most `width` (< 0.5) to each side."""
    enough = 1
    while half_width(rate, enough, alpha) > width:
        enough *= 2
    # The width falls with the number of images.
    return bisect_left(range(enough), -width, lo=enough // 2, key=lambda images: -half_width(rate, images, alpha))


def at_prevalence(escape: Limits, overkill: Limits, prevalence: float) -> dict[str, Limits]:
    """Convert rates of a test set, each with its limits, to the plant's share of defective parts, `prevalence`.

    Returns `precision` (share of rejected parts that are defective), and `escapes` and `false_calls` per 10,000 parts;
    each with limits that hold where those of both rates hold.
    """

    def precision(escape: float, overkill: float) -> float:
        hits, false_calls = prevalence * (1 - escape), (1 - prevalence) * overkill
        return hits / (hits + false_calls) if hits + false_calls else 0.0

    def scaled(share: float, rate: Limits) -> Limits:
        value, low, high = (10_000 * share * number for number in rate)
        return value, low, high

    (escapes, least, most), (false_calls, fewest, highest) = escape, overkill
    return {
        "precision": (precision(escapes, false_calls), precision(most, highest), precision(least, fewest)),
        "escapes": scaled(prevalence, escape),
        "false_calls": scaled(1 - prevalence, overkill),
    }
