"""The metrics that the gate judges: one entry of `METRICS` each.

Each is a mean over images of a value between 0 and 1. Gate, plan, report, policy file and MLflow's tables follow from
the entry.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated

import pandas as pd
from pydantic import Field

from adfm.evaluation import metrics
from adfm.evaluation.metrics import Floats
from adfm.params import Fraction, Section


class Bound(Section):
    """What a policy demands of one metric; `None` of either: nothing."""

    limit: Fraction | None = None  # the worst value that is acceptable, whatever production does
    # By how much the candidate may be worse than production or the anchor.
    margin: Annotated[float, Field(gt=0, le=1)] | None = None


_NOTHING = Bound()


@dataclass(frozen=True)
class Metric:
    """One metric that the gate judges."""

    title: str
    higher: bool  # whether more is better
    over: str  # the images that count, in words
    values: str | Callable[[pd.DataFrame], Floats]  # key of `metrics.of_images`, or a function as `values` below
    binary: bool = True  # whether each value is 0 or 1
    gain: bool = True  # whether a better value is a reason to promote, by a policy that names the metric
    whole: Bound = _NOTHING  # of the default policy over all images
    parts: Bound = _NOTHING  # the same over a category, or a kind of defect

    @property
    def asked(self) -> bool:
        """Whether the default policy has the metric; otherwise it is judged where a policy names it."""
        # In every policy, a further metric would weaken the gain of the others (Holm).
        return self.whole != _NOTHING or self.parts != _NOTHING


# By name, in the order of a policy.
METRICS: dict[str, Metric] = {
    "accuracy": Metric(
        title="accuracy",
        higher=True,
        over="images",
        values="accuracy",
        whole=Bound(limit=0.6, margin=0.05),
        parts=Bound(margin=0.2),
    ),
    "iou": Metric(
        title="IoU",
        higher=True,
        over="anomalous images with boxes",
        values="iou",
        binary=False,
        whole=Bound(limit=0.1, margin=0.05),
        parts=Bound(margin=0.2),
    ),
    "escape_rate": Metric(
        title="escape rate",
        higher=False,
        over="anomalous images",
        values="miss_rate",
        gain=False,
        whole=Bound(limit=0.35, margin=0.05),
        parts=Bound(limit=0.7, margin=0.2),
    ),
    "overkill": Metric(
        title="overkill",
        higher=False,
        over="normal images",
        values="overkill",
        gain=False,
        whole=Bound(limit=0.4, margin=0.05),
        parts=Bound(margin=0.2),
    ),
    "mask_iou": Metric(
        title="mask IoU",
        higher=True,
        over="anomalous images with masks",
        values="mask_iou",
        binary=False,
    ),
}


def values(table: pd.DataFrame, names: Iterable[str]) -> dict[str, Floats]:
    """Return each image's value of some metrics, in [0, 1], (n,), by name; NaN where an image does not count.

    `table` is a prediction table, of decisions where the model has a threshold (`metrics.as_decided`).
    """
    means = metrics.of_images(table)
    sources = {name: METRICS[name].values for name in names}
    return {name: means[source] if isinstance(source, str) else source(table) for name, source in sources.items()}
