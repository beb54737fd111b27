"""The versions that a candidate has to compare with, as a file that changes when they do: `adfm production FILE`.

The stages that judge depend on the file, so that a promotion makes them stale, and nothing else does.
"""

from pathlib import Path
from typing import Any

from adfm import tracking
from adfm.files import replace_json
from adfm.registry import reconcile
from adfm.registry.history import suppress_error

ALIASES = ("production", "anchor")


def in_production(name: str) -> dict[str, Any]:
    """Return the versions that a candidate is judged against; makes no store where there is none.

    Returns:
        `model`: the name; `production`, `anchor`: `version` and `artifact_digest` of the version that the alias points
        at, `None` if it points at none, or both at the same.

    Raises:
        AdfmError: MLflow cannot be reached.
    """
    versions: dict[str, Any] = dict.fromkeys(ALIASES)
    if not tracking.store_is_missing():
        with reconcile.client() as store:
            for alias in ALIASES:
                with suppress_error("RESOURCE_DOES_NOT_EXIST"):
                    if number := store.get_registered_model(name).aliases.get(alias):
                        tags = store.get_model_version(name, str(number)).tags
                        versions[alias] = {"version": str(number), "artifact_digest": tags.get("artifact_digest")}
    if versions["anchor"] == versions["production"]:
        versions["anchor"] = None
    return {"model": name, **versions}


def judging_policy(name: str) -> str:
    """Return the digest of the policy that judges: the registered one, or else `gate.yaml`, which would be registered.

    Raises:
        AdfmError: MLflow cannot be reached, the history is broken, or the policy cannot be read.
    """
    from adfm.registry import policy

    registered = None
    if not tracking.store_is_missing():
        with reconcile.client() as store:
            registered = reconcile.read(store, name).history.policy
    return policy.digest(policy.load() if registered is None else policy.registered(registered))


def write(out: Path, name: str, policy: Path | None = None) -> None:
    """Write `in_production` to the file `out`, and `judging_policy` to the file `policy`, as JSON; print the versions.

    Raises:
        AdfmError: As of `in_production` and `judging_policy`.
    """
    about = in_production(name)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_json(about, out)
    if policy is not None:
        replace_json({"policy": judging_policy(name)}, policy)
    lines = [f"{alias}: version {about[alias]['version']} of {name}" for alias in ALIASES if about[alias]]
    print("\n".join(lines) or f"no version of {name} is in production")
