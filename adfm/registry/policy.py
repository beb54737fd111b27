"""The policy of the gate, `gate.yaml`: what a version has to fulfil to be promoted.

The policy that judges is the one registered on the model, which a reviewer sets; the file in a submitter's folder is
shown where it differs. Each metric is a mean over images of a value between 0 and 1, and one entry of `METRICS`: its
name, its direction, over which images, and what a policy asks of it unless it says otherwise.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import Field, field_validator

from adfm.errors import AdfmError
from adfm.params import Fraction, PositiveInt, Section, flat, validated

if TYPE_CHECKING:
    import pandas as pd

FILE = "gate.yaml"
"""The policy of a folder, beside its `params.yaml`."""

Floats = NDArray[np.float64]


class PolicyError(AdfmError):
    """A policy that cannot be read or used."""

    exit_code = 2


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
        gain: Whether a better value is a reason to promote.
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


def _right(table: pd.DataFrame) -> Floats:
    """1 where the decision is the label; an answer that cannot be parsed is wrong."""
    right = table["predicted"].notna() & (table["predicted"].astype(object) == table["label"].astype(object))
    return np.asarray(right, dtype=np.float64)


def _wrong_of(label: str) -> Callable[[pd.DataFrame], Floats]:
    def values(table: pd.DataFrame) -> Floats:
        return np.asarray(np.where(table["label"].isin([label]), 1 - _right(table), np.nan), dtype=float)

    return values


def _iou(table: pd.DataFrame) -> Floats:
    return table["iou"].to_numpy(dtype=float, na_value=np.nan)


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
        values=_iou,
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
}
"""The metrics that the gate judges, by name, in the order of a policy."""


class Policy(Section):
    """What a version has to fulfil to be promoted.

    Args:
        level: The risk that any of the candidates judged on one test set passes wrongly.
        looks: How many candidates one test set may judge; the level is spent over them.
        power: The chance of an answer that the numbers of images in "cannot tell" are reckoned for.
        rule: `gain`: accuracy or IoU has to be better than in production; `noninferior`: nothing may be worse.
        defect_rate: The share of defective parts on the line, for the operating point.
        whole: By metric, what is asked over all images.
        parts: By metric, what is asked over each category, and each kind of defect.
        enough: Images without which a part is not judged, but for a fall that is certain.
        approvers: Who may approve; empty: whoever may edit the registered model.
        team_of_one: Whether the one who submits a version may approve it.
    """

    level: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    looks: PositiveInt = 20
    power: Annotated[float, Field(gt=0.5, lt=1)] = 0.8
    rule: Literal["gain", "noninferior"] = "gain"
    defect_rate: Annotated[float, Field(gt=0, lt=1)] = 0.02
    whole: dict[str, Bound] = Field(default_factory=lambda: {name: metric.whole for name, metric in METRICS.items()})
    parts: dict[str, Bound] = Field(default_factory=lambda: {name: metric.parts for name, metric in METRICS.items()})
    enough: PositiveInt = 100
    approvers: list[str] = Field(default_factory=list)
    team_of_one: bool = True

    @field_validator("whole", "parts")
    @classmethod
    def _known_metrics(cls, bounds: dict[str, Bound]) -> dict[str, Bound]:
        for name in bounds:
            if name not in METRICS:
                near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0)[0]
                raise ValueError(f"there is no metric {name!r}; the nearest is {near}. Known: {', '.join(METRICS)}")
        return bounds


def load(file: Path | None = None) -> Policy:
    """The policy of a file; without one that of `gate.yaml` in this folder, or the default where that is missing.

    Raises:
        PolicyError: The file cannot be read, is not YAML, or has unknown keys, metrics or values; all are listed.
    """
    if file is None and not Path(FILE).is_file():
        return Policy()
    file = file or Path(FILE)
    try:
        return loads(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"the policy {file} cannot be read: {error}.") from error


def loads(text: str, place: str = FILE) -> Policy:
    """The policy of a YAML text; `place` names it in errors. Keys that it lacks have the default.

    Raises:
        PolicyError: As `load`.
    """
    try:
        return validated(Policy, [(text, place)])
    except AdfmError as error:
        raise PolicyError(str(error)) from error


def dumps(policy: Policy) -> str:
    """A policy as YAML with every key, which stays the same policy when defaults change."""
    return yaml.safe_dump(policy.model_dump(), sort_keys=False, allow_unicode=True)


def digest(policy: Policy) -> str:
    """SHA-256 of a policy's text, in hex."""
    return hashlib.sha256(dumps(policy).encode()).hexdigest()


def difference(registered: Policy, own: Policy) -> list[str]:
    """What a submitter's policy says otherwise than the registered one, one line a key."""
    ours, theirs = flat(registered), flat(own)

    def written(values: dict[str, Any], key: str) -> str:
        return "null" if values[key] is None else str(values[key])

    keys = [key for key in ours if ours[key] != theirs[key]]
    return [f"{key}: {written(theirs, key)} instead of {written(ours, key)}" for key in keys]
