"""The metrics that the gate judges: one entry of `METRICS` each.

Each is a mean over images of a value between 0 and 1. An entry has its name, its direction, over which images it is
taken, and what a policy asks of it by default; gate, plan, report, policy file and MLflow's tables follow from it. A
metric of which nothing is asked by default is judged where a policy names it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from adfm.params import Fraction, Section

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]


class Bound(Section):
    """What is asked of one metric.

    Args:
        limit: The worst value that is acceptable, whatever production does; `None`: not asked.
        margin: By how much the candidate may be worse than production or the anchor; `None`: not asked.
    """

    limit: Fraction | None = None
    margin: Annotated[float, Field(gt=0, le=1)] | None = None


@dataclass(frozen=True)
class Metric:
    """One metric that the gate judges.

    Args:
        title: For people.
        higher: Whether more is better.
        over: The images that count, in words: `images`, `normal images`, `anomalous images`.
        values: For a prediction table of decisions, each image's value in [0, 1]; NaN where an image does not count.
        binary: Whether each value is 0 or 1.
        gain: Whether a better value is a reason to promote, by a policy that names the metric.
        whole: What the default policy asks of it over all images.
        parts: The same over a category, or a kind of defect.
    """

    title: str
    higher: bool
    over: str
    values: Callable[[pd.DataFrame], Floats]
    binary: bool
    gain: bool
    whole: Bound
    parts: Bound

    @property
    def asked(self) -> bool:
        """Whether the default policy has the metric; otherwise it would weaken the gain of the others (Holm)."""
        return self.whole != Bound() or self.parts != Bound()


def _right(table: pd.DataFrame) -> Floats:
    """1 where the decision is the label; an answer that cannot be parsed is wrong."""
    right = table["predicted"].notna() & (table["predicted"].astype(object) == table["label"].astype(object))
    return np.asarray(right, dtype=np.float64)


def _wrong_of(label: str) -> Callable[[pd.DataFrame], Floats]:
    def values(table: pd.DataFrame) -> Floats:
        return np.asarray(np.where(table["label"].isin([label]), 1 - _right(table), np.nan), dtype=float)

    return values


def _column(name: str) -> Callable[[pd.DataFrame], Floats]:
    """The values of a column; of a table without it no image counts."""

    def values(table: pd.DataFrame) -> Floats:
        return table.reindex(columns=[name])[name].to_numpy(dtype=float, na_value=np.nan)

    return values


METRICS: dict[str, Metric] = {
    "accuracy": Metric(
        title="accuracy",
        higher=True,
        over="images",
        values=_right,
        binary=True,
        gain=True,
        whole=Bound(limit=0.6, margin=0.05),
        parts=Bound(margin=0.2),
    ),
    "iou": Metric(
        title="IoU",
        higher=True,
        over="anomalous images with boxes",
        values=_column("iou"),
        binary=False,
        gain=True,
        whole=Bound(limit=0.1, margin=0.05),
        parts=Bound(margin=0.2),
    ),
    "escape_rate": Metric(
        title="escape rate",
        higher=False,
        over="anomalous images",
        values=_wrong_of("anomalous"),
        binary=True,
        gain=False,
        whole=Bound(limit=0.35, margin=0.05),
        parts=Bound(limit=0.7, margin=0.2),
    ),
    "overkill": Metric(
        title="overkill",
        higher=False,
        over="normal images",
        values=_wrong_of("normal"),
        binary=True,
        gain=False,
        whole=Bound(limit=0.4, margin=0.05),
        parts=Bound(margin=0.2),
    ),
    "mask_iou": Metric(
        title="mask IoU",
        higher=True,
        over="anomalous images with masks",
        values=_column("mask_iou"),
        binary=False,
        gain=True,
        whole=Bound(),
        parts=Bound(),
    ),
}
"""The metrics that the gate judges, by name, in the order of a policy."""
