"""Promotion and rollback: the only code that moves the aliases `production` and `previous`.

`previous` is the version to which a rollback returns. Tags of the versions say who moved them, when, and in whose
place; tags `history.<time>` of the registered model keep every move, one a tag, because a tag holds 5000 characters.
"""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from adfm import tracking
from adfm.errors import AdfmError
from adfm.params import Params
from adfm.registry.registration import NOBODY, PRODUCTION, check_unchanged, holder, now

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

PREVIOUS = "previous"
_HISTORY = "history."
_PATIENCE = 60  # seconds to wait for another promotion


def promote(version: str, params: Params, by: str | None = None) -> None:
    """Puts a version into production, if everything that its gate and its reviewer saw is still so.

    Args:
        version: Number of the version.
        params: Reads `register.model`.
        by: Who promotes; the user of the process if not given.

    Raises:
        AdfmError: The gate did not pass, the approval is missing, production is another one than the gate compared
            with, or the model's files are not those that were registered. Production is untouched.
    """
    name = params.register_.model
    with _alone() as store, TemporaryDirectory() as folder:
        candidate, replaced = _version(store, name, version), holder(store, name)
        number = str(replaced.version) if replaced else NOBODY
        compared = candidate.tags.get("gate_production_version")
        refusals = []
        if number == str(candidate.version):
            refusals.append("it is in production already")
        else:
            if candidate.tags.get("gate") != "passed":
                refusals.append(f"its tag gate is {candidate.tags.get('gate')!r}, not 'passed': its gate.json says why")
            if candidate.tags.get("approval") != "approved":
                refusals.append(
                    f"its tag approval is {candidate.tags.get('approval')!r}: a reviewer sets it to exactly 'approved'"
                )
            if compared != number:
                refusals.append(
                    f"its gate compared it with version {compared}, and in production is {number}: run `adfm register` "
                    "again, so that the gate decides anew"
                )
        if refusals:
            raise AdfmError("\n  - ".join([f"Version {version} of {name} cannot be promoted:", *refusals]))
        check_unchanged(candidate, Path(folder))

        at, by = now(), by or _user()
        _tag(store, candidate, promoted_at=at, promoted_by=by, replaced_version=number)
        if replaced:
            store.set_registered_model_alias(name, PREVIOUS, number)
        store.set_registered_model_alias(name, PRODUCTION, str(candidate.version))
        _record(store, name, at, "promote", str(candidate.version), number, by)
    print(f"version {version} of {name} is in production; it replaced {number}")


def rollback(params: Params, by: str | None = None, to: str | None = None) -> None:
    """Puts an earlier version back into production; the one that leaves needs a new approval to return.

    Afterwards `previous` is the version that the restored one had once replaced, so that one can go back further.

    Args:
        params: Reads `register.model`.
        by: Who rolls back; the user of the process if not given.
        to: Number of a version that was in production; without it, the version under `previous`.

    Raises:
        AdfmError: There is nothing to roll back to, `to` never was in production, or its files are not those that were
            registered. Production is untouched.
    """
    name = params.register_.model
    with _alone() as store, TemporaryDirectory() as folder:
        leaving = holder(store, name)
        if leaving is None:
            raise AdfmError(f"No version of {name} is in production, so there is nothing to roll back.")
        target = _version(store, name, to) if to else holder(store, name, PREVIOUS)
        if target is None:
            raise AdfmError(
                f"Version {leaving.version} of {name} replaced no version that is still there, so there is nothing to "
                "roll back to; name a version that was in production with --to."
            )
        if target.version == leaving.version:
            raise AdfmError(f"Version {target.version} of {name} is in production already; name another with --to.")
        if "promoted_at" not in target.tags:
            raise AdfmError(f"Version {target.version} of {name} was never in production; use `adfm promote`.")
        check_unchanged(target, Path(folder))

        at, by = now(), by or _user()
        old, new = str(leaving.version), str(target.version)
        _tag(store, leaving, approval="withdrawn", rolled_back_at=at, rolled_back_by=by, rolled_back_to=new)
        _tag(store, target, restored_at=at, restored_by=by, restored_from=old)
        before = target.tags.get("replaced_version", NOBODY)
        if before in _versions(store, name):
            store.set_registered_model_alias(name, PREVIOUS, before)
        elif holder(store, name, PREVIOUS):
            store.delete_registered_model_alias(name, PREVIOUS)
        store.set_registered_model_alias(name, PRODUCTION, new)
        _record(store, name, at, "rollback", new, old, by)
    print(f"version {new} of {name} is in production again; it replaced {old}")


def history(params: Params) -> list[dict[str, str]]:
    """Every promotion and rollback, oldest first: `at`, `action`, `version`, `replaced`, `by`.

    Raises:
        AdfmError: MLflow cannot be reached.
    """
    from mlflow import MlflowClient

    with tracking.store_errors(tracking.configure()):
        models = MlflowClient().search_registered_models(f"name = '{params.register_.model}'")
    tags = models[0].tags if models else {}
    return [json.loads(tags[key]) for key in sorted(tags) if key.startswith(_HISTORY)]


@contextmanager
def _alone() -> Iterator[MlflowClient]:
    """MLflow's client, while no other process moves the aliases of the same database file.

    MLflow cannot compare and swap an alias. On a server, where processes of several machines may promote, leave
    promotion to one of them.
    """
    from filelock import FileLock, Timeout
    from mlflow import MlflowClient

    uri = tracking.configure()
    database = tracking.sqlite_file(uri)
    try:
        with FileLock(f"{database}.lock", timeout=_PATIENCE) if database else nullcontext(), tracking.store_errors(uri):
            yield MlflowClient()
    except Timeout as error:
        raise AdfmError(
            f"Another promotion has held {error.lock_file} for {_PATIENCE} s; see what it waits for."
        ) from error


def _versions(store: MlflowClient, name: str) -> dict[str, ModelVersion]:
    return {str(version.version): version for version in store.search_model_versions(f"name = '{name}'")}


def _version(store: MlflowClient, name: str, number: str) -> ModelVersion:
    versions = _versions(store, name)
    if number not in versions:
        there = ", ".join(sorted(versions, key=int)) or "none yet; `adfm register` makes one"
        raise AdfmError(f"{name} has no version {number}; its versions: {there}.")
    return versions[number]


def _tag(store: MlflowClient, version: ModelVersion, **tags: str) -> None:
    for key, value in tags.items():
        store.set_model_version_tag(version.name, str(version.version), key, value)


def _record(store: MlflowClient, name: str, at: str, action: str, version: str, replaced: str, by: str) -> None:
    entry = {"at": at, "action": action, "version": version, "replaced": replaced, "by": by}
    key = _HISTORY + datetime.now(UTC).strftime(
        "%Y-%m-%dT%H:%M:%S.%fZ"
    )  # `at` holds a `+`, which MLflow refuses in keys
    store.set_registered_model_tag(name, key, json.dumps(entry))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a user without a name
        return f"uid {os.getuid()}"
