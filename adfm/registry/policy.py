"""The gate's policy, `gate.yaml`: limits, margins, level and approvers.

The policy that judges is the one registered on the model; the file in a submitter's folder is only compared with it.
"""

import difflib
import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator

from adfm import statistics
from adfm.errors import AdfmError, Unusable
from adfm.evaluation.gate_metrics import METRICS, Bound
from adfm.params import PositiveInt, Section, flat, validated

FILE = "gate.yaml"  # beside the `params.yaml` of a folder


class PolicyError(Unusable):
    """A policy that cannot be read or used."""


def _default(part: Literal["whole", "parts"]) -> dict[str, Bound]:
    return {name: getattr(metric, part) for name, metric in METRICS.items() if metric.asked}


class Policy(Section):
    """What a version has to fulfil to be promoted."""

    level: Annotated[float, Field(gt=0, lt=0.5)] = 0.05  # risk that any candidate judged on one test set passes wrongly
    looks: PositiveInt = 20  # candidates that one test set may judge; the level is spent over them
    power: Annotated[float, Field(gt=0.5, lt=1)] = 0.8  # of an answer, for the numbers of images in "cannot tell"
    # gain: accuracy, IoU or another gain in `whole` has to be better than in production; noninferior: none worse
    rule: Literal["gain", "noninferior"] = "gain"
    defect_rate: Annotated[float, Field(gt=0, lt=1)] = 0.02  # share of defective parts, for the operating point
    whole: dict[str, Bound] = Field(default_factory=lambda: _default("whole"))  # by metric, over all images
    parts: dict[str, Bound] = Field(default_factory=lambda: _default("parts"))  # over each category, kind of defect
    enough: PositiveInt = 100  # images without which a part is not judged, unless its fall is certain
    approvers: list[str] = Field(default_factory=list)  # empty: whoever may edit the registered model
    team_of_one: bool = True  # whether the submitter of a version may approve it

    def level_at(self, look: int) -> float:
        """Level of each answer for the look-th candidate; beyond the budget, that of the last look."""
        return statistics.level_of_look(min(look, self.looks), self.looks, self.level)

    @field_validator("whole", "parts")
    @classmethod
    def _known_metrics(cls, bounds: dict[str, Bound]) -> dict[str, Bound]:
        for name in bounds:
            if name not in METRICS:
                near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0)[0]
                raise ValueError(f"unknown metric {name!r}; the nearest is {near}. Known: {', '.join(METRICS)}")
        return bounds


def load(file: Path | None = None) -> Policy:
    """Read the policy of a file; by default that of `gate.yaml` in this folder, or the default policy without one.

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
    """Parse a policy from YAML; missing keys have the default. `place` names the text in errors.

    Raises:
        PolicyError: As `load`.
    """
    try:
        return validated(Policy, [(text, place)], listed=FILE)
    except AdfmError as error:
        raise PolicyError(str(error)) from error


def registered(text: str | None) -> Policy:
    """Parse a policy that `dumps` wrote into the history; `None` gives the default.

    Raises:
        PolicyError: As `load`.
    """
    policy = loads(text or "", "the registered policy")
    written = yaml.safe_load(text or "") or {}
    # A metric that was added to METRICS since is not one that this policy asks for.
    return policy.model_copy(
        update={
            part: {name: bound for name, bound in bounds.items() if name in written[part]}
            for part, bounds in (("whole", policy.whole), ("parts", policy.parts))
            if part in written
        }
    )


def dumps(policy: Policy) -> str:
    """Write a policy as YAML with every key, so that it stays the same policy when defaults change."""
    return yaml.safe_dump(policy.model_dump(), sort_keys=False, allow_unicode=True)


def digest(policy: Policy) -> str:
    """Return the SHA-256 of a policy's text, in hex."""
    return hashlib.sha256(dumps(policy).encode()).hexdigest()


def difference(registered: Policy, own: Policy) -> list[str]:
    """List the keys in which a submitter's policy differs from the registered one, one line per key."""
    ours, theirs = flat(registered), flat(own)

    def written(values: dict[str, Any], key: str) -> str:
        return "not asked" if key not in values else "null" if values[key] is None else str(values[key])

    words = {key: (written(theirs, key), written(ours, key)) for key in dict.fromkeys([*ours, *theirs])}
    return [f"{key}: {their} instead of {our}" for key, (their, our) in words.items() if their != our]
