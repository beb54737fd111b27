"""Reconcile aliases and history: the aliases `production`, `previous` and `anchor` follow the signed history.

An interrupted move is completed by the next caller, an alias that was moved by hand is put back, and a version in
production that was deleted is written down as lost. Reviewers may move the anchor to any that was in production.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from adfm import signing, tracking
from adfm.errors import AdfmError
from adfm.registry import history as history_
from adfm.registry.alerts import alert, announce
from adfm.registry.history import NOBODY, BrokenHistory, History, Step, registered_model, suppress_error
from adfm.text import printable

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

PRODUCTION = "production"
PREVIOUS = "previous"
ANCHOR = "anchor"

_BEGUN = "history"  # tag of the registered model, once its history has begun
_MOST_MOVES = 20  # changes in one call, after which somebody else must be moving the aliases


class Refused(AdfmError):
    """A change that may not be made; production is untouched."""


@dataclass(frozen=True)
class Registry:
    """A registered model as one caller sees it."""

    store: MlflowClient
    name: str
    keys: signing.Keys
    history: History
    versions: dict[str, ModelVersion]  # by number

    def version(self, number: str) -> ModelVersion:
        """Return the version of this number; raise AdfmError if there is none."""
        return find(self.versions, self.name, number)

    def append(self, action: str, version: str, **content: str) -> Step:
        """As `history.append`, after the steps that this caller has seen."""
        return history_.append(self.store, self.name, self.keys, self.history, action, version, **content)

    def read(self) -> Registry:
        """Read the registered model and its history again."""
        return replace(self, history=history_.read(self.store, self.name, self.keys), versions=versions(self.name))


@contextmanager
def client() -> Iterator[MlflowClient]:
    """Yield MLflow's client with short timeouts: what fails now is done by the next caller."""
    from mlflow import MlflowClient

    with tracking.short_timeouts(timeout=20, retries=2), tracking.store_errors(tracking.configure()):
        yield MlflowClient()


def read(store: MlflowClient, name: str) -> Registry:
    """Read a registered model and its history; changes nothing.

    Raises:
        AdfmError: The history is broken, or may not be read.
    """
    return Registry(store, name, signing.keys(), History([], "", {}), {}).read()


def reconcile(store: MlflowClient, name: str) -> Registry:
    """Make the aliases agree with the history, and the history with the versions that exist.

    Raises:
        AdfmError: The history is broken or may not be written, or somebody else keeps moving the aliases.
    """
    for _ in range(_MOST_MOVES):
        registry, model = read(store, name), registered_model(store, name)
        _check_begun(registry, model)
        # A version may be deleted meanwhile: then everything is read again.
        with suppress_error("RESOURCE_DOES_NOT_EXIST"):
            if not _step(registry, model):
                return registry
    raise AdfmError(f"The aliases of {name} keep changing; another process or user moves them: `adfm registry log`.")


def versions(name: str) -> dict[str, ModelVersion]:
    """Return the versions of a registered model by number."""
    return {str(each.version): each for each in history_.versions(name)}


def find(versions: dict[str, ModelVersion], name: str, number: str) -> ModelVersion:
    """Return the version of model `name` with a number; raise AdfmError if there is none."""
    if number not in versions:
        there = ", ".join(sorted(versions, key=int)) or "none yet; `adfm register` makes one"
        raise AdfmError(f"{name} has no version {number}; its versions: {there}.")
    return versions[number]


def aliases(model: RegisteredModel | None) -> dict[str, str]:
    """Return the numbers of the versions that the aliases of a registered model point at."""
    return {alias: str(number) for alias, number in model.aliases.items()} if model else {}


def due_aliases(history: History) -> dict[str, str]:
    """Return the numbers of the versions that the aliases should point at, also of versions that were deleted."""
    previous = history.move.previous if history.move else NOBODY
    due = {PRODUCTION: history.production, PREVIOUS: previous, ANCHOR: history.anchor}
    return {alias: number for alias, number in due.items() if number != NOBODY}


def record_rejection(registry: Registry, version: ModelVersion) -> None:
    """Write down that the version's tag `approval` is `rejected`, if it is and the history does not have it."""
    if version.tags.get("approval") != "rejected":
        return
    number = str(version.version)
    why, by = (version.tags.get(key, "")[: history_.LONGEST] for key in ("approval_reason", "approval_by"))
    by = "" if by == NOBODY else by
    judged = registry.history.last("judge", version=number)
    decision = judged.decision if judged else ""
    known = registry.history.last("reject", version=number)
    if known and (known.why, known.by, known.decision) == (why, by, decision):
        return
    registry.append("reject", number, why=why, by=by, decision=decision)
    words = f"{registry.name}: version {number} was rejected" + f" by {by}" * bool(by) + f": {why}" * bool(why)
    print(printable(words))
    alert(words)


def user() -> str:
    """Return who runs this process: the login at MLflow, or else the name at the machine."""
    if login := os.environ.get("MLFLOW_TRACKING_USERNAME", "").strip():
        return login
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a user without a name
        return f"uid {os.getuid()}"


def _check_begun(registry: Registry, model: RegisteredModel | None) -> None:
    """Check that model and history belong together: neither was deleted, renamed or made again."""
    # The first step comes before the first move, so that the tag is there when something moves. Without it, a model
    # that was renamed would look like one whose versions were all deleted.
    if registry.history.move and (model is None or _BEGUN not in model.tags):
        state = "is missing" if model is None else f"is not the one that its history is of: its tag {_BEGUN} is missing"
        raise BrokenHistory(
            f"The registered model {registry.name} {state}. Nothing moves. Somebody has renamed or deleted it, removed "
            "the tag, or made a prompt of it (tag mlflow.prompt.is_prompt): an administrator finds it in MLflow and "
            "undoes that."
        )
    if model is None:
        return
    if registry.history.counting and _BEGUN not in model.tags:
        registry.store.set_registered_model_tag(registry.name, _BEGUN, "begun")
    # A history that was deleted whole would otherwise look like one that has not begun.
    if _BEGUN in model.tags and not registry.history.counting:
        raise BrokenHistory(
            f"The history of {registry.name} is gone: its tag {_BEGUN} says that there was one. Nothing moves. Bring "
            f"{registry.name}-history back from a backup; only if there is none, delete the tag: nothing is in "
            "production then."
        )


def _step(registry: Registry, model: RegisteredModel | None) -> bool:
    """Make one change towards agreement; return whether one was needed."""
    history, versions, move = registry.history, registry.versions, registry.history.move
    here = {alias: number for alias, number in aliases(model).items() if number in versions}
    due = _due(registry)
    if move and move.production != NOBODY and move.production not in versions:
        _lose(registry, move)
    elif move and not move.finished:
        _apply(registry, move)
    elif any(here.get(alias) != due.get(alias) for alias in (PRODUCTION, PREVIOUS)):
        _restore(registry, here, due)
    elif history.anchor != NOBODY and history.anchor not in versions:
        heir = "the next one in production" if history.production == NOBODY else f"version {history.production}"
        why = f"the anchor, version {history.anchor}, was deleted; {heir} takes its place"
        registry.append("anchor", history.production, anchor=history.production, by="adfm", why=why)
        announce(f"{registry.name}: {why}")
    elif history.anchor == NOBODY and history.production != NOBODY:  # after a rollback from a deleted anchor
        why = "there was no anchor; the version in production is it"
        registry.append("anchor", history.production, anchor=history.production, by="adfm", why=why)
    elif here.get(ANCHOR) != due.get(ANCHOR):
        _move_anchor(registry, here.get(ANCHOR), due.get(ANCHOR))
    else:
        return False
    return True


def _due(registry: Registry) -> dict[str, str]:
    return {alias: number for alias, number in due_aliases(registry.history).items() if number in registry.versions}


def _lose(registry: Registry, move: Step) -> None:
    before = registry.history.move_to(move.replaced)
    # Until the aliases have moved, the version before is still in production: it stays.
    if not move.finished and before and move.replaced in registry.versions:
        why = f"version {move.production} was deleted before it was in production; version {move.replaced} stays"
        state = {"production": move.replaced, "previous": before.previous, "replaced": move.production}
        kept = {"decision": before.decision, "manifest": before.manifest}
        registry.append("restore", move.replaced, why=why, **state, **kept)
        announce(f"{registry.name}: {why}")
        return
    why = f"version {move.production}, which was in production, was deleted"
    state = {"production": NOBODY, "previous": move.previous, "replaced": move.production}
    registry.append("lost", move.production, why=why, **state)
    announce(f"{registry.name}: {why}. Nothing is in production; `adfm rollback` brings back version {move.previous}.")


def _restore(registry: Registry, here: dict[str, str], due: dict[str, str]) -> None:
    """Put aliases back that were moved by hand, or set before the history began."""
    was, move = {alias: here.get(alias, NOBODY) for alias in (PRODUCTION, PREVIOUS)}, registry.history.move
    back = {alias: due.get(alias, NOBODY) for alias in (PRODUCTION, PREVIOUS)}
    why = f"by hand, production had been set to {was[PRODUCTION]} and previous to {was[PREVIOUS]}; put back to "
    why += f"{back[PRODUCTION]} and {back[PREVIOUS]}"
    state = {"production": back[PRODUCTION], "previous": move.previous if move else NOBODY}
    kept = {"decision": move.decision, "manifest": move.manifest} if move else {}
    registry.append("restore", back[PRODUCTION], replaced=was[PRODUCTION], why=why, **state, **kept)
    announce(f"{registry.name}: {why}")


def _move_anchor(registry: Registry, here: str | None, due: str | None) -> None:
    """Follow a reviewer who moved the anchor to a version that was in production; put anything else back."""
    if here and registry.history.move_to(here):
        step = registry.append("anchor", here, anchor=here, why=f"moved from version {due} in MLflow")
        if not step.void:
            announce(f"{registry.name}: version {here} is the anchor now, instead of {due}")
        return
    _set_alias(registry, ANCHOR, due)
    announce(f"{registry.name}: by hand, the anchor had been set to {here or NOBODY}; put back to {due or NOBODY}")


def _apply(registry: Registry, move: Step) -> None:
    """Set aliases and tags as a move has them. Done twice, or by two processes, it does the same."""
    store, versions, due = registry.store, registry.versions, _due(registry)
    for alias in (PREVIOUS, PRODUCTION, *([ANCHOR] if move.anchor else [])):
        _set_alias(registry, alias, due.get(alias))
    version, replaced = versions.get(move.version), versions.get(move.replaced)
    if move.action == "promote" and version:
        moved = {"promoted_at": move.at, "promoted_by": move.by, "replaced_version": move.replaced}
        history_.tag(store, version, **moved)
        if "approval_refused" in version.tags:
            store.delete_model_version_tag(registry.name, move.version, "approval_refused")
    if move.action == "rollback" and version:
        history_.tag(store, version, restored_at=move.at, restored_by=move.by, restored_from=move.replaced)
    if move.action == "rollback" and replaced:
        gone = {"rolled_back_at": move.at, "rolled_back_by": move.by, "rolled_back_to": move.version}
        history_.tag(store, replaced, approval="withdrawn", approval_by=NOBODY, **gone)
    history_.finish(store, registry.name, move)


def _set_alias(registry: Registry, alias: str, number: str | None) -> None:
    now = aliases(registered_model(registry.store, registry.name)).get(alias)
    with history_.permission_errors(registry.name, "write"):
        if number and now != number:
            history_.retry_on_conflict(partial(registry.store.set_registered_model_alias, registry.name, alias, number))
        elif not number and now:
            registry.store.delete_registered_model_alias(registry.name, alias)
