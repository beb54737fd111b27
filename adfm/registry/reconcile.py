"""Reconcile aliases and history: the aliases `production`, `previous` and `anchor` follow the signed history.

An interrupted move is completed by the next caller, an alias that was moved by hand is put back, and a version in
production that was deleted is written down as lost. A reviewer moves the anchor, which is the version from which losses
are measured over many promotions: to any version that has been in production.
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
from adfm.registry.alerts import alert
from adfm.registry.history import NOBODY, BrokenHistory, History, Step

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

    from adfm.signing import Keys

PRODUCTION = "production"
PREVIOUS = "previous"
ANCHOR = "anchor"

_BEGUN = "history"  # tag of the registered model, once its history has begun
_MOST_MOVES = 20


class Refused(AdfmError):
    """What was asked for may not be done; production is untouched."""


@dataclass(frozen=True)
class Registry:
    """A registered model as one caller sees it.

    Args:
        store: MLflow's client.
        name: Name of the registered model.
        keys: Keys that count, and the own one.
        history: The signed history.
        versions: The versions by number.
    """

    store: MlflowClient
    name: str
    keys: Keys
    history: History
    versions: dict[str, ModelVersion]

    def version(self, number: str) -> ModelVersion:
        """A version; raises AdfmError if there is none of this number."""
        return find(self.versions, self.name, number)

    def append(self, action: str, version: str, **content: str) -> Step:
        """As `history.append`, after the steps that this caller has seen."""
        return history_.append(self.store, self.name, self.keys, self.history, action, version, **content)

    def read(self) -> Registry:
        """The same, as it is now."""
        history = history_.read(self.store, self.name, self.keys)
        versions = {str(each.version): each for each in history_.versions(self.store, self.name)}
        return replace(self, history=history, versions=versions)


@contextmanager
def client() -> Iterator[MlflowClient]:
    """MLflow's client, which does not wait long: what is not done now is done the next time."""
    from mlflow import MlflowClient

    with tracking.impatient(timeout=20, retries=2):
        uri = tracking.configure()
        with tracking.store_errors(uri):
            yield MlflowClient()


def look(store: MlflowClient, name: str) -> Registry:
    """Read a registered model and its history; changes nothing.

    Raises:
        AdfmError: The history is broken, or may not be read.
    """
    return Registry(store, name, signing.keys(), History([], "", {}), {}).read()


def settle(store: MlflowClient, name: str) -> Registry:
    """Make the aliases agree with the history, and the history with what is there.

    Raises:
        AdfmError: The history is broken or may not be written, or somebody else keeps moving the aliases.
    """
    from mlflow.exceptions import MlflowException

    for _ in range(_MOST_MOVES):
        registry, model = look(store, name), registered_model(store, name)
        _check_begun(registry, model)
        try:
            if not _step(registry, model):
                return registry
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise  # else a version was deleted meanwhile: look again
    raise AdfmError(f"The aliases of {name} keep changing; another process or user moves them: `adfm registry log`.")


def find(versions: dict[str, ModelVersion], name: str, number: str) -> ModelVersion:
    """The version of model `name` with a number; raises AdfmError if there is none."""
    if number not in versions:
        there = ", ".join(sorted(versions, key=int)) or "none yet; `adfm register` makes one"
        raise AdfmError(f"{name} has no version {number}; its versions: {there}.")
    return versions[number]


def registered_model(store: MlflowClient, name: str) -> RegisteredModel | None:
    """The registered model; `None` if there is none."""
    from mlflow.exceptions import MlflowException

    with history_.allowed(name):
        try:
            return store.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None


def user() -> str:
    """Who runs this process: the login at MLflow, or else the name at the machine."""
    if login := os.environ.get("MLFLOW_TRACKING_USERNAME", "").strip():
        return login
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a user without a name
        return f"uid {os.getuid()}"


def _check_begun(registry: Registry, model: RegisteredModel | None) -> None:
    """Notice that model and history are not of one another: one of them was deleted, renamed or made again.

    A history that was deleted whole would otherwise look like one that has not begun, and a model that a reviewer
    renamed like one whose versions were all deleted. The first step comes before the first move, so that the tag is
    there when something moves.
    """
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
    if _BEGUN in model.tags and not registry.history.counting:
        raise BrokenHistory(
            f"The history of {registry.name} is gone: its tag {_BEGUN} says that there was one. Nothing moves. Bring "
            f"{registry.name}-history back from a backup; only if there is none, delete the tag: nothing is in "
            "production then."
        )


def _step(registry: Registry, model: RegisteredModel | None) -> bool:
    """One change towards agreement; whether one was needed."""
    history, versions = registry.history, registry.versions
    move = history.move
    if move and move.production != NOBODY and move.production not in versions:
        _lose(registry, move)
        return True
    if move and not move.finished:
        _apply(registry, move)
        return True
    here = {alias: str(number) for alias, number in model.aliases.items()} if model else {}
    here = {alias: number for alias, number in here.items() if number in versions}
    due = _aliases(history, versions)
    if any(here.get(alias) != due.get(alias) for alias in (PRODUCTION, PREVIOUS)):
        _restore(registry, here, due)
        return True
    if history.anchor != NOBODY and history.anchor not in versions:
        heir = "the next one in production" if history.production == NOBODY else f"version {history.production}"
        why = f"the anchor, version {history.anchor}, was deleted; {heir} takes its place"
        registry.append("anchor", history.production, anchor=history.production, by="adfm", why=why)
        _tell(registry, why)
        return True
    if history.anchor == NOBODY and history.production != NOBODY:  # after a rollback from a deleted anchor
        why = "there was no anchor; the version in production is it"
        registry.append("anchor", history.production, anchor=history.production, by="adfm", why=why)
        return True
    if here.get(ANCHOR) != due.get(ANCHOR):
        _move_anchor(registry, here.get(ANCHOR), due.get(ANCHOR))
        return True
    return False


def _aliases(history: History, versions: dict[str, ModelVersion]) -> dict[str, str]:
    """The aliases as the history has them."""
    move = history.move
    numbers = {ANCHOR: history.anchor}
    if move:
        numbers |= {PRODUCTION: move.production, PREVIOUS: move.previous}
    return {alias: number for alias, number in numbers.items() if number in versions}


def _lose(registry: Registry, move: Step) -> None:
    """Write down that the version in production was deleted; before its aliases moved, the one before it stays."""
    before = registry.history.was_brought_by(move.replaced)
    if not move.finished and before and move.replaced in registry.versions:
        why = f"version {move.production} was deleted before it was in production; version {move.replaced} stays"
        state = {"production": move.replaced, "previous": before.previous, "replaced": move.production}
        kept = {"decision": before.decision, "manifest": before.manifest}
        registry.append("restore", move.replaced, why=why, **state, **kept)
        _tell(registry, why)
        return
    why = f"version {move.production}, which was in production, was deleted"
    state = {"production": NOBODY, "previous": move.previous, "replaced": move.production}
    registry.append("lost", move.production, why=why, **state)
    _tell(registry, f"{why}. Nothing is in production; `adfm rollback` brings back version {move.previous}.")


def _restore(registry: Registry, here: dict[str, str], due: dict[str, str]) -> None:
    """Put aliases back that were moved by hand, or set before the history began."""
    was, move = {alias: here.get(alias, NOBODY) for alias in (PRODUCTION, PREVIOUS)}, registry.history.move
    back = {alias: due.get(alias, NOBODY) for alias in (PRODUCTION, PREVIOUS)}
    why = (
        f"by hand, production had been set to {was[PRODUCTION]} and previous to {was[PREVIOUS]}; put back to "
        f"{back[PRODUCTION]} and {back[PREVIOUS]}"
    )
    state = {"production": back[PRODUCTION], "previous": move.previous if move else NOBODY}
    kept = {"decision": move.decision, "manifest": move.manifest} if move else {}
    registry.append("restore", back[PRODUCTION], replaced=was[PRODUCTION], why=why, **state, **kept)
    _tell(registry, why)


def _move_anchor(registry: Registry, here: str | None, due: str | None) -> None:
    """Follow a reviewer who moved the anchor to a version that was in production; put anything else back."""
    if here and registry.history.was_in_production(here):
        step = registry.append("anchor", here, anchor=here, why=f"moved from version {due} in MLflow")
        if not step.void:
            _tell(registry, f"version {here} is the anchor now, instead of {due}")
        return
    _set_alias(registry, ANCHOR, due)
    _tell(registry, f"by hand, the anchor had been set to {here or NOBODY}; put back to {due or NOBODY}")


def _apply(registry: Registry, move: Step) -> None:
    """Aliases and tags as a move has them. Done twice, or by two processes, it does the same."""
    store, versions, due = registry.store, registry.versions, _aliases(registry.history, registry.versions)
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
    model = registered_model(registry.store, registry.name)
    now = str(model.aliases[alias]) if model and alias in model.aliases else None
    with history_.allowed(registry.name, "write"):
        if number and now != number:
            history_.insist(partial(registry.store.set_registered_model_alias, registry.name, alias, number))
        elif not number and now:
            registry.store.delete_registered_model_alias(registry.name, alias)


def _tell(registry: Registry, text: str) -> None:
    print(f"{registry.name}: {text}")
    alert(f"{registry.name}: {text}")
