"""Which versions a candidate has to compare with, as a file that changes when they do: `adfm production FILE`.

The stages that judge depend on the file, so that a promotion makes them stale, and nothing else does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from adfm import tracking
from adfm.files import replace_json

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

ALIASES = ("production", "anchor")


def in_production(name: str) -> dict[str, Any]:
    """The versions that a candidate is judged against.

    Where there is no store yet, none is made.

    Args:
        name: The registered model.

    Returns:
        `model`: its name; `production`, `anchor`: `version` and `artifact_digest` of the version that the alias points
        at, `None` if it points at none, or both at the same.

    Raises:
        AdfmError: MLflow cannot be reached.
    """
    versions = dict.fromkeys(ALIASES) if tracking.store_is_missing() else _versions(name)
    if versions["anchor"] == versions["production"]:
        versions["anchor"] = None
    return {"model": name, **versions}


def judging_policy(name: str) -> str:
    """Digest of the policy that judges: the registered one; where none is, `gate.yaml`, which would be registered.

    Raises:
        AdfmError: MLflow cannot be reached, the history is broken, or the policy cannot be read.
    """
    from adfm.registry import policy, reconcile

    registered = None
    if not tracking.store_is_missing():
        with reconcile.client() as store:
            registered = reconcile.look(store, name).history.policy
    return policy.digest(policy.load() if registered is None else policy.registered(registered))


def write(out: Path, name: str, policy: Path | None = None) -> None:
    """Writes what `in_production` gives as JSON, and prints it; the same versions give the same bytes.

    Args:
        out: The file.
        name: The registered model.
        policy: File to write `judging_policy` to, for those stages alone that decide.

    Raises:
        AdfmError: As of `in_production` and `judging_policy`.
    """
    about = in_production(name)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_json(about, out)
    if policy is not None:
        replace_json({"policy": judging_policy(name)}, policy)
    lines = [f"{alias}: version {about[alias]['version']} of {about['model']}" for alias in ALIASES if about[alias]]
    print("\n".join(lines) or f"no version of {about['model']} is in production")


def _versions(name: str) -> dict[str, Any]:
    from adfm.registry.registration import holder

    with tracking.impatient(timeout=20, retries=2):
        store = tracking.client()
        with tracking.store_errors(tracking.configure()):
            return {alias: _described(holder(store, name, alias)) for alias in ALIASES}


def _described(version: ModelVersion | None) -> dict[str, str | None] | None:
    if version is None:
        return None
    return {"version": str(version.version), "artifact_digest": version.tags.get("artifact_digest")}
