"""Probability of detection against defect size: hit/miss analysis of MIL-HDBK-1823A (2009, appendix G).

A logistic regression of hit or miss on the logarithm of the size. a50 and a90 are the sizes that are detected with a
probability of 50 and 90 %; a90/95, the figure that inspection engineers ask for, is the upper 95 % limit of a90, by the
likelihood ratio.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from adfm.evaluation.metrics import Floats

LEAST = 60  # defects that hit/miss data need (MIL-HDBK-1823A, 4.5.2.2)
LEAST_OF_EACH = 10  # hits, and misses, without which the slope is little more than chance
CONFIDENCE = 0.95
POINTS = np.array([0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98])


def curve(size: Floats, detected: Floats) -> dict[str, Any]:
    """Fit the probability of detection as a function of defect size, above 0, in any unit of length or area.

    `detected` is 0 or 1 for each defect. Returns JSON values: `defects`, `hits`, `smallest` and `largest` size; `a50`,
    `a90`, `a90_95`; `intercept` and `slope` of the logit in the natural logarithm of the size; `points`: `detection`,
    the `size` that reaches it, and the limits of that size `low` and `high`, each one-sided at 95 % (the upper and
    lower bound of the curve, read across). `reason`: why no curve was fitted, in words, else `None`; without a curve
    all of these are `None`, and `points` is empty. `note`: that a90/95 lies outside the measured sizes, else `None`.
    """
    size, detected = np.asarray(size, dtype=float), np.asarray(detected, dtype=float)
    defects, hits = len(size), int(np.sum(detected))
    result: dict[str, Any] = {
        "defects": defects,
        "hits": hits,
        "smallest": float(size.min()) if defects else None,
        "largest": float(size.max()) if defects else None,
        "reason": _no_curve(size, detected == 1),
        "note": None,
        **dict.fromkeys(("a50", "a90", "a90_95", "intercept", "slope")),
        "points": [],
    }
    if result["reason"] is not None:
        return result
    # With 60 to 200 defects a90/95 falls short of a90 in about 7 of 100 data sets, not 5: the likelihood ratio is exact
    # for many only.
    center = float(np.mean(np.log(size)))  # the two parameters are nearly independent there
    log_size = np.log(size) - center
    import statsmodels.api as sm  # type: ignore[import-untyped]

    model = sm.GLM(detected, sm.add_constant(log_size, has_constant="add"), family=sm.families.Binomial())
    intercept, slope = map(float, model.fit().params)
    fitted = _log_likelihood(intercept + slope * log_size, detected)
    level = float(special.logit(np.mean(detected)))
    critical = float(special.chdtri(1, 2 - 2 * CONFIDENCE)) / 2
    if slope <= 0 or fitted - _log_likelihood(np.full(defects, level), detected) <= critical:
        result["reason"] = "Detection does not rise with the size of the defect, so no size can be named."
        return result

    def limit(detection: float, side: int) -> float:
        """Return the size, in units of `log_size`, beyond which that probability is excluded on this side."""
        logit = float(special.logit(detection))
        best = (logit - intercept) / slope

        def excess(distance: float) -> float:
            return fitted - _constrained(log_size - best - side * distance, detected, logit) - critical

        far = 1 / slope
        while excess(far) < 0:
            far *= 2
            if far > 1e3 / slope:
                return side * math.inf
        return best + side * float(optimize.brentq(excess, 0, far, xtol=1e-6))

    def in_units(log_size: float) -> float | None:
        return math.exp(log_size + center) if log_size + center < 700 else None

    result["points"] = [
        {
            "detection": float(detection),
            "size": in_units((float(special.logit(detection)) - intercept) / slope),
            "low": in_units(limit(detection, -1)),
            "high": in_units(limit(detection, 1)),
        }
        for detection in POINTS
    ]
    half, most = (next(point for point in result["points"] if point["detection"] == at) for at in (0.5, 0.9))
    result |= {"a50": half["size"], "a90": most["size"], "a90_95": most["high"]}
    result |= {"intercept": intercept - slope * center, "slope": slope}
    if result["a90_95"] is None or result["a90_95"] > result["largest"]:
        result["note"] = "a90/95 is larger than any defect measured: add larger defects before it is relied on."
    elif result["a90_95"] < result["smallest"]:
        result["note"] = "a90/95 is smaller than any defect measured: add smaller defects before it is relied on."
    return result


def _no_curve(size: Floats, hit: NDArray[np.bool_]) -> str | None:
    defects, hits = len(size), int(hit.sum())
    if defects < LEAST:
        return f"{defects} defects with a size; a curve needs {LEAST} (MIL-HDBK-1823A)."
    if min(hits, defects - hits) < LEAST_OF_EACH:
        least = f"{LEAST_OF_EACH} hits and {LEAST_OF_EACH} misses"
        return f"{hits} of {defects} defects are detected; a curve needs {least}."
    # The likelihood has no maximum when one size divides hits from misses.
    if size[hit].min() >= size[~hit].max() or size[~hit].min() >= size[hit].max():
        return "One size divides detected from missed defects: no curve can be fitted. Add defects of about that size."
    return None


def _log_likelihood(logit: Floats, detected: Floats) -> float:
    return float(np.sum(special.log_expit(np.where(detected == 1, logit, -logit))))


def _constrained(distance: Floats, detected: Floats, logit: float) -> float:
    """Return the greatest log likelihood of a curve that passes `logit` at distance 0 (profile likelihood)."""
    sign = 2 * detected - 1

    def gradient(slope: float) -> float:
        return float(np.sum(sign * distance * special.expit(-sign * (logit + slope * distance))))

    # The likelihood is concave in the slope.
    low, high = -1.0, 1.0
    while gradient(high) > 0 and high < 1e6:
        low, high = high, 4 * high
    while gradient(low) < 0 and low > -1e6:
        low, high = 4 * low, low
    slope = optimize.brentq(gradient, low, high, xtol=1e-9) if gradient(low) * gradient(high) < 0 else high
    return _log_likelihood(logit + slope * distance, detected)
