"""Metrics of a cross-validation: every image is judged once, by a model that was not trained on it.

They show how good the recipe (data, settings, training) is on this data, not how good one model is. Two things make
them uncertain: the images are few, and another training set would have given another model.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from adfm.data import shards as shards_
from adfm.errors import AdfmError
from adfm.evaluation import metrics, plots

FILE = "cross-validation.json"
PREDICTIONS = "cross-validation.parquet"

# Metrics of the letters as written, and of the decisions at the threshold.
_WRITTEN = ("miss_rate", "overkill", "balanced_accuracy", "auroc", "iou", "box_f1", "parse_rate")
_DECIDED = ("miss_rate", "overkill", "balanced_accuracy", "iou")


def interval(value: float, low: float, high: float, folds: Sequence[float], test_share: float) -> tuple[float, float]:
    """Return the 95 % interval of a metric over all folds, the wider of two on each side.

    - `low` and `high`, the limits of the pooled predictions: what so few images leave open if all folds had one model.
    - Student's t of the folds' values, with the variance of their mean corrected for the training images that they
      share: `variance * (1 / k + test_share)` (Nadeau and Bengio 2003, "Inference for the generalization error",
      Machine Learning 52:239). It has the spread between the folds' models, and few degrees of freedom. `test_share`
      is the images that a fold judges, divided by those that its model is trained on.
    """
    # No unbiased estimate of the variance exists: the predictions of a fold are by one model, and any two models share
    # most of their training images (Bengio and Grandvalet 2004, JMLR 5:1089).
    k = len(folds)
    if k < 2:
        return low, high
    half = float(special.stdtrit(k - 1, 0.975)) * math.sqrt(float(np.var(folds, ddof=1)) * (1 / k + test_share))
    return max(0.0, min(low, value - half)), min(1.0, max(high, value + half))


def summarize(tables: Sequence[pd.DataFrame], trained_on: Sequence[int], resamples: int, seed: int) -> dict[str, Any]:
    """Measure a cross-validation by the prediction tables of its folds, with decisions, and their training images.

    Rates, means over images and box F1 are those of all predictions together; AUROC is the mean of the folds'. Limits
    are exact for rates; by a bootstrap of whole parts within each fold for AUROC and box F1; all are then widened as
    `interval` says. Returns for each metric `value`, `low`, `high` and the values of `folds`; `None` where it is not
    defined. `<metric>_at_threshold` counts decisions, each at the threshold of its fold, the rest letters.
    """
    share = float(np.mean([len(table) / images for table, images in zip(tables, trained_on, strict=True)]))
    decided = [metrics.as_decided(table) for table in tables]
    return {
        **{f"{name}_at_threshold": _metric(name, decided, share, resamples, seed) for name in _DECIDED},
        **{name: _metric(name, tables, share, resamples, seed) for name in _WRITTEN},
    }


def _metric(name: str, tables: Sequence[pd.DataFrame], share: float, resamples: int, seed: int) -> dict[str, Any]:
    of_folds = [metrics.values(table)[name] for table in tables]
    known = [value for value in of_folds if value is not None]
    pooled = pd.concat(tables, ignore_index=True)
    value = metrics.values(pooled)[name]
    if name == "auroc":
        # Scores of two models are on two scales (Forman and Scholz 2010, "Apples-to-apples in cross-validation
        # studies", SIGKDD Explorations 12:49).
        value = float(np.mean(known)) if known else None
    if value is None:
        return {"value": None, "low": None, "high": None, "folds": of_folds}
    limits = metrics.limits_of_means(pooled.sort_values("id"), [name])
    if f"{name}_low" in limits:
        low, high = limits[f"{name}_low"], limits[f"{name}_high"]
    else:
        low, high = np.nanquantile(_resampled(name, tables, resamples, seed), [0.025, 0.975]).tolist()
    low, high = interval(value, low, high, known, share)
    return {"value": value, "low": low, "high": high, "folds": of_folds}


def _resampled(name: str, tables: Sequence[pd.DataFrame], resamples: int, seed: int) -> metrics.Floats:
    """Return a metric in bootstrap resamples that draw the parts of each fold among themselves, (resamples,)."""
    weights = [
        np.concatenate([*metrics.bootstrap_weights(metrics.samples(table), resamples, seed + fold)])
        for fold, table in enumerate(tables)
    ]
    if name == "auroc":
        of_folds = [metrics.measure(table)(each)[name] for table, each in zip(tables, weights, strict=True)]
        defined = [values for values in of_folds if not np.isnan(values).all()]
        counts = np.sum([~np.isnan(values) for values in defined], axis=0)
        return np.asarray(np.nansum(defined, axis=0) / np.where(counts > 0, counts, np.nan))
    return metrics.measure(pd.concat(tables, ignore_index=True))(np.concatenate(weights, axis=1))[name]


def read(folder: Path, shards: Path) -> dict[str, Any] | None:
    """Read a cross-validation of these shards; return `None` if it had no folds.

    Raises:
        AdfmError: They cannot be read, or are of other data.
    """
    try:
        results: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if not results["folds"]:
            return None
        same = results["fingerprint"] == shards_.fingerprint(shards)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise AdfmError(f"{folder / FILE} cannot be read ({error!r}); make it with `adfm folds`.") from error
    if not same:
        raise AdfmError(f"{folder / FILE} is of other data than {shards}; make it again with `adfm folds`.")
    return results


def note(results: dict[str, Any]) -> str:
    """Explain the figures that `adfm.training.folds.cross_validate` wrote, with folds, in words."""
    first = results["folds"][0]
    return (
        f"Cross-validation: {results['images']} images, {results['anomalous']} of them defective, each judged once by"
        f" one of {len(results['folds'])} models that had not seen it (the first was trained on {first['train']}"
        f" images, its threshold chosen on {first['validation']}). The figures are of the recipe on this data; the"
        " model that is registered is another one, trained on train. In brackets 95 % intervals, the wider of two:"
        " limits of all predictions together, for the few images, and Student's t over the folds with Nadeau and"
        " Bengio's correction for the training images that they share, for the model that another training set would"
        " give."
    )


def section(results: dict[str, Any]) -> str:
    """Write the section of the comparison, in Markdown."""
    lines = ["## Cross-validation", "", "| | all folds | lowest and highest fold |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(results)]
    return "\n".join([*lines, "", note(results)])


def rows(results: dict[str, Any]) -> list[list[str]]:
    """Return title, value with its interval, and the range over the folds of each metric that is defined."""
    return [
        [
            plots.TITLES[name],
            metrics.written(metric["value"], metric["low"], metric["high"]),
            " to ".join(f"{end([v for v in metric['folds'] if v is not None]):.3f}" for end in (min, max)),
        ]
        for name, metric in results["metrics"].items()
        if metric["value"] is not None
    ]
