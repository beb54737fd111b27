"""Measure drift of the training images from those of an earlier report, such as that of the version in production."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from adfm import tracking
from adfm.errors import AdfmError
from adfm.params import Validation
from adfm.validation.facts import FIGURES, Array
from adfm.validation.suite import MAX, MEAN, warn

if TYPE_CHECKING:
    import pandas as pd
    from great_expectations.expectations.expectation import Expectation


def profile(table: "pd.DataFrame") -> dict[str, Any]:
    """Return the number of training images by category and by defect, and mean and deviation of each of `FIGURES`."""
    defects = table["defect"].fillna(table["label"])  # normal images are a kind of their own here
    profile: dict[str, Any] = {}
    for name, values in (("categories", table["product"]), ("defects", defects)):
        profile[name] = {str(value): int(count) for value, count in values.value_counts().sort_index().items()}
    for name in FIGURES:
        figures: Array = table[name].dropna().to_numpy(float)
        mean, deviation = (float(figures.mean()), float(figures.std())) if figures.size else (None, None)
        profile[name] = {"mean": mean, "deviation": deviation}
    return profile


def expectations(
    table: "pd.DataFrame", train: Mapping[str, Any], before: Mapping[str, Any], limits: Validation
) -> list["Expectation"]:
    """Return the expectations that the `profile` of the training split, `train`, has not drifted from `before`."""
    remedy = "see `statistics` in both reports; if the line has changed, train and evaluate on new images of it"
    suite = []
    for name in ("categories", "defects"):
        table[f"drift_of_{name}"] = distance(train[name], before[name])  # a column for the expectation
        what = f"the shares of {name} in train are those of the reference, to a distance of {limits.max_drift:g}"
        suite.append(warn(MAX, f"drift_of_{name}", what, remedy, max_value=limits.max_drift))
    for name in FIGURES:
        mean, deviation = before[name]["mean"], before[name]["deviation"]
        if mean is not None:
            what = f"mean {name} in train is that of the reference, to {limits.max_shift:g} standard deviations"
            # Glass's delta, the difference of the means over the standard deviation of the reference group (Glass,
            # "Primary, Secondary, and Meta-Analysis of Research", 1976), of which 0.2 is called small, 0.5 medium and
            # 0.8 large (Cohen, "Statistical Power Analysis", 1988).
            room = max(limits.max_shift * deviation, 1e-6)  # images of one size have no deviation
            bounds = {"min_value": mean - room, "max_value": mean + room}
            suite.append(warn(MEAN, name, what, remedy, **bounds, where={"split": "train"}))
    return suite


def distance(counts: Mapping[str, int], before: Mapping[str, int]) -> float:
    """Return the Jensen-Shannon distance of two distributions given as counts: 0 if equal, 1 if they share nothing."""
    from scipy.special import rel_entr

    # The root of the divergence of Lin ("Divergence measures based on the Shannon entropy", IEEE Transactions on
    # Information Theory 37, 1991), which, unlike the population stability index (PSI), is finite when a category is
    # new. For small changes it is sqrt(PSI / (8 ln 2)): 0.13 is a PSI of 0.1, commonly read as some change, and 0.21
    # one of 0.25, a large one.
    if not counts or not before:
        return float(bool(counts) != bool(before))
    names = sorted({*counts, *before})
    p, q = (np.array([these.get(name, 0) for name in names], float) for these in (counts, before))
    p, q = p / p.sum(), q / q.sum()
    divergence = (rel_entr(p, (p + q) / 2) + rel_entr(q, (p + q) / 2)).sum() / 2 / np.log(2)
    return float(np.sqrt(max(0.0, divergence)))  # rounding may leave it below 0


def of_file(path: Path) -> dict[str, Any]:
    """Read the statistics of a report from its folder or its `validation.json`; `AdfmError` if it is not a report."""
    file = path / "validation.json" if path.is_dir() else path
    try:
        return _statistics(file)
    except (OSError, ValueError, LookupError, TypeError) as error:
        what = f"validation.reference: {file} is not the report of a validation ({error!r})"
        raise AdfmError(f"{what}; make one with `adfm validate`, or say production, or null.") from error


def of_production(model: str) -> dict[str, Any] | None:
    """Read the statistics of the shards that a model's version in production was trained on; `None` without any."""
    import mlflow
    from mlflow.exceptions import MlflowException

    store = mlflow.MlflowClient()
    try:
        version = store.get_model_version_by_alias(model, "production")
        everywhere = [experiment.experiment_id for experiment in store.search_experiments()]
        filter_ = f"tags.validated = '{version.tags['data_fingerprint']}'"
        run = store.search_runs(everywhere, filter_, max_results=1)[0].info
        with TemporaryDirectory() as folder, tracking.store_errors(mlflow.get_tracking_uri()):
            # Not `runs:/`: while its server is down, MLflow reports such a file as missing.
            artifact = f"{run.artifact_uri}/validation/validation.json"
            return _statistics(Path(mlflow.artifacts.download_artifacts(artifact, dst_path=folder)))
    except (AdfmError, MlflowException, OSError, ValueError, LookupError, TypeError) as error:
        if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":  # nothing is in production
            print(f"adfm: warning: no drift is measured: production has no report ({error})", file=sys.stderr)
        return None


def _statistics(file: Path) -> dict[str, Any]:
    statistics = json.loads(file.read_text(encoding="utf-8"))["statistics"]
    train = statistics["train"]
    # A `LookupError` or a `TypeError` where drift cannot be measured by them.
    for name in ("categories", "defects"):
        sum(train[name].values())
    for name in FIGURES:
        train[name]["mean"], train[name]["deviation"]
    return dict(statistics)
