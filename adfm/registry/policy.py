"""The policy of the gate, `gate.yaml`: what a version has to fulfil to be promoted.

The policy that judges is the one registered on the model, which a reviewer sets; the file in a submitter's folder is
shown where it differs. Each metric is a mean over images of a value between 0 and 1, and one entry of `METRICS`: its
name, its direction, over which images, and what a policy asks of it unless it says otherwise. A metric of which nothing
is asked by default is in a policy that names it.
"""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator

from adfm.errors import AdfmError
from adfm.evaluation.gate_metrics import METRICS, Bound
from adfm.params import PositiveInt, Section, flat, validated

if TYPE_CHECKING:
    pass

FILE = "gate.yaml"
"""The policy of a folder, beside its `params.yaml`."""


class PolicyError(AdfmError):
    """A policy that cannot be read or used."""

    exit_code = 2


def _default(part: Literal["whole", "parts"]) -> dict[str, Bound]:
    return {name: getattr(metric, part) for name, metric in METRICS.items() if metric.asked}


class Policy(Section):
    """What a version has to fulfil to be promoted.

    Args:
        level: The risk that any of the candidates judged on one test set passes wrongly.
        looks: How many candidates one test set may judge; the level is spent over them.
        power: The chance of an answer that the numbers of images in "cannot tell" are reckoned for.
        rule: `gain`: accuracy or IoU (or another gain in `whole`) has to be better than in production; `noninferior`:
            nothing may be worse.
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
    whole: dict[str, Bound] = Field(default_factory=lambda: _default("whole"))
    parts: dict[str, Bound] = Field(default_factory=lambda: _default("parts"))
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
        return validated(Policy, [(text, place)], listed=FILE)
    except AdfmError as error:
        raise PolicyError(str(error)) from error


def registered(text: str) -> Policy:
    """The policy of a text that `dumps` wrote, as the history has it; the default where there is none yet.

    It asks only for the metrics that it names: one that was added to `METRICS` since is not asked for.

    Raises:
        PolicyError: As `load`.
    """
    policy = loads(text, "the registered policy")
    written = yaml.safe_load(text) or {}
    return policy.model_copy(
        update={
            part: {name: bound for name, bound in bounds.items() if name in written[part]}
            for part, bounds in (("whole", policy.whole), ("parts", policy.parts))
            if part in written
        }
    )


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
        return "not asked" if key not in values else "null" if values[key] is None else str(values[key])

    keys = [*ours, *(key for key in theirs if key not in ours)]
    words = {key: (written(theirs, key), written(ours, key)) for key in keys}
    return [f"{key}: {their} instead of {our}" for key, (their, our) in words.items() if their != our]
