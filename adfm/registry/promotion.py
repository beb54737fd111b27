"""Promotion and rollback: the only code that moves the aliases `production` and `previous`.

A promotion checks, writes its step into the history, and then moves the aliases: `adfm.registry.history` says why two
at once cannot both win. Whoever comes next finishes what a process that died has begun, and puts back an alias that was
moved by hand.
"""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from adfm import tracking
from adfm.errors import AdfmError
from adfm.evaluation import calibration
from adfm.files import file_digest
from adfm.models.loading import check_unchanged
from adfm.params import Params
from adfm.registry import history as history_
from adfm.registry.alerts import alert
from adfm.registry.history import Step, decision
from adfm.registry.registration import NOBODY, PRODUCTION, decide_again, download, renew

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

PREVIOUS = "previous"
_UNDECIDED = ("pending", "withdrawn")
_MOST_MOVES = 20


class Refused(AdfmError):
    """What was asked may not be done; production is untouched."""


def promote(version: str, params: Params, by: str | None = None) -> None:
    """Puts a version into production, if everything that its gate and its reviewer saw is still so.

    A refusal is written into the history. An approval that cannot be followed is set back to `pending`, and the tag
    `approval_refused` says why. If production is another one than the gate compared with, the gate decides anew, where
    the two versions' predictions can be compared, and the reviewer is asked again.

    Args:
        version: Number of the version.
        params: Reads `register.model`.
        by: Who promotes; the user of the process if not given.

    Raises:
        AdfmError: The gate did not pass, the approval is missing or used up, production is another one than the gate
            compared with, or the model's files or the gate's decision are not those that were registered. Production is
            untouched.
    """
    with _store() as store:
        _promote(store, params.register_.model, version, by or _user())


def promote_approved(params: Params, by: str | None = None) -> bool:
    """Does what the reviewers have decided since the last time: promotes what is approved, notes what is rejected.

    The newest approved version comes first. Older ones are then refused, because their gate did not see it.

    Args:
        params: Reads `register.model`.
        by: Who promotes; the user of the process if not given.

    Returns:
        Whether any version was newly approved.

    Raises:
        Refused: An approval could not be followed; others were.
        AdfmError: MLflow failed, or a version's files could not be read; the approval stands for the next time.
    """
    name = params.register_.model
    errors: list[AdfmError] = []
    with _store() as store:
        steps, move, versions = _settle(store, name)
        approved = []
        for number in sorted(versions, key=int, reverse=True):
            version = versions[number]
            approval = version.tags.get("approval", "pending")
            if approval == "rejected":
                history_.note_rejection(store, version, steps)
            elif approval not in _UNDECIDED and not (move and move.production == number) and not _used(version, steps):
                approved.append(number)
        for number in approved:
            try:
                _promote(store, name, number, by or _user())
            except AdfmError as error:
                errors.append(error)
    if errors:
        kind = Refused if all(isinstance(error, Refused) for error in errors) else AdfmError
        raise kind("\n".join(map(str, errors)))
    return bool(approved)


def rollback(params: Params, by: str | None = None, to: str | None = None, why: str = "") -> None:
    """Puts an earlier version back into production; the one that leaves needs a new approval to return.

    Afterwards `previous` is the version that the restored one had once replaced, so that one can go back further.

    Args:
        params: Reads `register.model`.
        by: Who rolls back; the user of the process if not given.
        to: Number of a version that was in production; without it, the version under `previous`.
        why: The reason, for the history.

    Raises:
        AdfmError: There is nothing to roll back to, `to` never was in production, or its files are not those that were
            registered. Production is untouched.
    """
    name = params.register_.model
    with _store() as store:
        steps, move, versions = _settle(store, name)
        if move is None or move.production == move.previous == NOBODY:
            raise AdfmError(f"No version of {name} is in production, so there is nothing to roll back.")
        leaving = move.production
        if to is None and move.previous not in versions:
            raise AdfmError(
                f"Version {leaving} of {name} replaced no version that is still there, so there is nothing to "
                "roll back to; name a version that was in production with --to."
            )
        target = _version(versions, name, to or move.previous)
        number = str(target.version)
        if number == leaving:
            raise AdfmError(f"Version {number} of {name} is in production already; name another with --to.")
        if not any(step.production == number and not step.void for step in steps):
            raise AdfmError(f"Version {number} of {name} was never in production; use `adfm promote`.")
        with TemporaryDirectory() as folder:
            check_unchanged(target, Path(folder))
        before = next((s.replaced for s in reversed(steps) if _promotes(s, number)), NOBODY)
        previous = before if before in versions else NOBODY
        state = {"production": number, "previous": previous, "replaced": leaving}
        step = _append(store, target, "rollback", move, by=by or _user(), why=why, **state)
        _settle(store, name)
        if step.void:
            raise AdfmError(f"Somebody else moved production of {name} meanwhile; see `adfm registry log`.")
    print(f"version {number} of {name} is in production again; it replaced {leaving}")
    alert(f"{name}: rolled back from version {leaving} to {number} by {step.by}. {why}".rstrip())


def history(params: Params) -> list[Step]:
    """Every step in the history of production, oldest first.

    Raises:
        AdfmError: MLflow cannot be reached.
    """
    with _store() as store:
        return history_.read(store, params.register_.model)


def _promote(store: MlflowClient, name: str, number: str, by: str) -> None:
    while True:
        steps, move, versions = _settle(store, name)
        try:
            candidate = _version(versions, name, number)
        except AdfmError as error:
            if steps:
                history_.append(store, name, "refuse", number, move.number if move else 0, by=by, why=str(error))
            raise
        outdated, refusals = _outdated(candidate, steps, move), _refusals(candidate, steps, move)
        if outdated or not refusals:
            refusals = _changed(candidate)
            if refusals and _approval(store, candidate) != candidate.tags.get("approval"):
                continue  # somebody else lets the gate decide anew, and has set it back before changing anything
        if outdated and not refusals:
            refusals = [_decide_anew(store, candidate, move, versions, by)]
        if not refusals:
            # To check the files may have taken minutes.
            steps, move, versions = _settle(store, name)
            candidate = _version(versions, name, number)
            if _outdated(candidate, steps, move):
                continue
            refusals = _refusals(candidate, steps, move)
        if refusals:
            _refuse(store, candidate, move, refusals, by)
        replaced = move.production if move else NOBODY
        why = f"gate passed on {candidate.tags['gate_decided_at']} against version {replaced}"
        if reason := candidate.tags.get("approval_reason"):
            why += f"; {reason}"
        # The version before stays within reach when the one in production was deleted.
        previous = move.previous if move and replaced == NOBODY else replaced
        state = {"production": number, "previous": previous, "replaced": replaced}
        approval_by = candidate.tags.get("approval_by", "")
        step = _append(store, candidate, "promote", move, by=by, why=why, approval_by=approval_by, **state)
        _settle(store, name)
        if not step.void:
            break
    print(f"version {number} of {name} is in production; it replaced {replaced}")
    alert(f"{name}: version {number} is in production, in place of {replaced}; promoted by {by}. {why}")


def _refusals(candidate: ModelVersion, steps: list[Step], move: Step | None) -> list[str]:
    """What the tags and the history have against a promotion."""
    tags, number = candidate.tags, move.production if move else NOBODY
    if number == str(candidate.version):
        return ["it is in production already"]
    refusals = []
    if tags.get("gate") != "passed":
        refusals.append(f"its tag gate is {_quoted(tags.get('gate'))}, not 'passed': its gate.json says why")
    if tags.get("approval") != "approved":
        refusals.append(
            f"its tag approval is {_quoted(tags.get('approval'))}: a reviewer sets it to exactly 'approved' or "
            "'rejected'"
        )
    if tags.get("gate_production_version") != number:
        refusals.append(
            f"its gate compared it with version {tags.get('gate_production_version')}, and in production is {number}: "
            "the gate decides anew when it is approved, or with `adfm register`"
        )
    if _used(candidate, steps):
        refusals.append(
            "its approval was used: it has been in production since the gate decided, and was replaced; bring it back "
            f"with `adfm rollback --to {candidate.version}`"
        )
    return refusals


def _outdated(candidate: ModelVersion, steps: list[Step], move: Step | None) -> bool:
    """Whether a reviewer wants a version in production whose gate compared it with another than is there now."""
    number = move.production if move else NOBODY
    return (
        candidate.tags.get("approval") == "approved"
        and candidate.tags.get("gate_production_version", number) != number
        and number != str(candidate.version)
        and not _used(candidate, steps)
    )


def _decide_anew(
    store: MlflowClient, candidate: ModelVersion, move: Step | None, versions: dict[str, ModelVersion], by: str
) -> str:
    """Lets the gate decide against today's production, and asks the reviewer again.

    Several may do so at once: the decision follows from the versions, and its time is that of the first step of the
    history that says so; so all of them write the same.

    Returns:
        Why it cannot be decided here.

    Raises:
        Refused: It was decided.
    """
    name, number = candidate.name, str(candidate.version)
    before, after = candidate.tags["gate_production_version"], move.production if move else NOBODY
    changed = f"its gate compared it with version {before}, and in production is {after}"
    try:
        decided = decide_again(candidate, versions.get(after))
    except AdfmError as error:
        return f"{changed}; the gate cannot decide anew from what is stored, {error}: run `adfm register` again"
    except OSError as error:
        raise AdfmError(f"Files of versions {number} and {after} of {name} cannot be read: {error}") from error
    why = f"{changed}; decided again against version {after}: gate {decided['verdict']}"
    step = _append(store, candidate, "decide", move, by=by, why=why)
    same = ("decide", number, step.decision, step.follows)
    steps = history_.read(store, name)
    first = next(each for each in steps if (each.action, each.version, each.decision, each.follows) == same)
    said = f"{why}; {'approve again' if decided['verdict'] == 'passed' else 'it cannot be promoted'}"
    if decision(store.get_model_version(name, number)) == step.decision:
        renew(store, candidate, decided | {"decided_at": first.at}, f"Version {number}: {why}.")
        history_.tag(store, candidate, approval_refused=said[:1000])
    alert("\n- ".join([f"{name}: version {number} was approved and cannot be promoted: {said}", *decided["reasons"]]))
    raise Refused(f"Version {number} of {name} cannot be promoted: {said}.\nIts tag approval is 'pending' again.")


def _changed(candidate: ModelVersion) -> list[str]:
    """What has been changed by hand: the gate's decision, the tags that repeat it, or the model's files."""
    import mlflow

    tags = candidate.tags
    with TemporaryDirectory() as folder, tracking.store_errors(mlflow.get_tracking_uri()):
        try:
            file = download(candidate, "gate.json", Path(folder))
            if file_digest(file) != tags.get("gate_digest"):
                return ["its gate.json is not the decision that was registered: run `adfm register` again"]
            decided = json.loads(file.read_text(encoding="utf-8"))
            agreed = {
                "gate": decided["verdict"],
                "gate_decided_at": decided["decided_at"],
                "gate_production_version": decided["production_version"] or NOBODY,
            }
            if wrong := [f"{key} ({_quoted(tags.get(key))})" for key in agreed if tags.get(key) != agreed[key]]:
                return [f"its gate.json says otherwise than its tags {', '.join(wrong)}: somebody has changed them"]
            try:
                check_unchanged(candidate, Path(folder))
                calibration.of_version(f"models:/{candidate.name}/{candidate.version}")
            except AdfmError as error:
                return [str(error)]
        except (ValueError, KeyError, TypeError):
            return ["its gate.json is not the decision that was registered: run `adfm register` again"]
        except OSError as error:
            raise AdfmError(
                f"Files of version {candidate.version} of {candidate.name} cannot be read: {error}"
            ) from error
    return []


def _refuse(store: MlflowClient, candidate: ModelVersion, move: Step | None, refusals: list[str], by: str) -> None:
    """Writes a refusal down, asks for another approval where one was given, and raises it."""
    name, number = candidate.name, str(candidate.version)
    message = "\n  - ".join([f"Version {number} of {name} cannot be promoted:", *refusals])
    why = "; ".join(refusals)
    _append(store, candidate, "refuse", move, by=by, why=why)
    approval = candidate.tags.get("approval", "pending")
    in_production = move is not None and move.production == number
    if approval not in (*_UNDECIDED, "rejected") and not in_production:
        history_.tag(store, candidate, approval="pending", approval_refused=why[:1000])
        message += "\nIts tag approval is 'pending' again."
        alert(f"{name}: version {number} was approved and cannot be promoted: {why}")
    raise Refused(message)


def _approval(store: MlflowClient, version: ModelVersion) -> str | None:
    """The tag `approval` as it is now."""
    return store.get_model_version(version.name, str(version.version)).tags.get("approval")


def _used(version: ModelVersion, steps: list[Step]) -> bool:
    """Whether the approval of the version's present decision has brought it into production before.

    A rollback withdraws the approval of the version that leaves; one that is given after it is new.
    """
    number = str(version.version)
    for step in reversed(steps):
        if step.void or step.action not in history_.MOVES:
            continue
        if step.production == number:
            return step.decision == decision(version)
        if step.action == "rollback" and step.replaced == number:
            return False
    return False


def _promotes(step: Step, number: str) -> bool:
    return step.action == "promote" and step.version == number and not step.void


def _settle(store: MlflowClient, name: str) -> tuple[list[Step], Step | None, dict[str, ModelVersion]]:
    """Makes the aliases agree with the history, and the history with what is there.

    Returns:
        The history; its last move, `None` if nothing was ever in production; the versions by number.
    """
    for _ in range(_MOST_MOVES):
        steps, versions = history_.read(store, name), _versions(store, name)
        move = history_.last_move(steps)
        aliases = {alias: number for alias, number in _aliases(store, name).items() if number in versions}
        actual, previous = aliases.get(PRODUCTION, NOBODY), aliases.get(PREVIOUS, NOBODY)
        if move is None:
            if actual == NOBODY:
                return steps, None, versions
            state = {"production": actual, "previous": previous, "decision": decision(versions[actual])}
            why = "in production when this history began"
            history_.append(store, name, "found", actual, 0, replaced=NOBODY, why=why, **state)
        elif move.production != NOBODY and move.production not in versions:
            state = {"production": NOBODY, "previous": move.previous, "replaced": move.production}
            why = f"version {move.production}, which was in production, was deleted"
            history_.append(store, name, "lost", move.production, move.number, why=why, **state)
            alert(f"{name}: {why}. Nothing is in production; `adfm rollback` brings back version {move.previous}.")
        elif not move.finished:
            _apply(store, name, move, versions)
        elif (actual, previous) != (move.production, move.previous if move.previous in versions else NOBODY):
            why = (
                f"by hand, production had been set to {actual} and previous to {previous}; put back to "
                f"{move.production} and {move.previous}"
            )
            state = {"production": move.production, "previous": move.previous, "decision": move.decision}
            history_.append(store, name, "restore", move.production, move.number, replaced=actual, why=why, **state)
            print(f"{name}: {why}")
            alert(f"{name}: {why}")
        else:
            return steps, move, versions
    raise AdfmError(f"The aliases of {name} do not come to rest; see who else moves them, and `adfm registry log`.")


def _apply(store: MlflowClient, name: str, move: Step, versions: dict[str, ModelVersion]) -> None:
    """Aliases and tags as a move has them. Done twice, or by two processes, it does the same."""
    for alias, number in ((PREVIOUS, move.previous), (PRODUCTION, move.production)):
        if number in versions:
            history_.insist(partial(store.set_registered_model_alias, name, alias, number))
        elif alias in _aliases(store, name):
            store.delete_registered_model_alias(name, alias)
    version, replaced = versions.get(move.version), versions.get(move.replaced)
    if move.action == "promote" and version:
        approver = {"approval_by": move.approval_by} if move.approval_by else {}
        history_.tag(
            store, version, promoted_at=move.at, promoted_by=move.by, replaced_version=move.replaced, **approver
        )
        if "approval_refused" in version.tags:
            store.delete_model_version_tag(name, move.version, "approval_refused")
    if move.action == "rollback" and version:
        history_.tag(store, version, restored_at=move.at, restored_by=move.by, restored_from=move.replaced)
    if move.action == "rollback" and replaced:
        gone = {"rolled_back_at": move.at, "rolled_back_by": move.by, "rolled_back_to": move.version}
        history_.tag(store, replaced, approval="withdrawn", **gone)
    history_.finish(store, name, move)


@contextmanager
def _store() -> Iterator[MlflowClient]:
    """MLflow's client, which does not wait long: what is not done now is done the next time."""
    from mlflow import MlflowClient

    with tracking.impatient(timeout=20, retries=2):
        uri = tracking.configure()
        with tracking.store_errors(uri):
            yield MlflowClient()


def _append(store: MlflowClient, about: ModelVersion, action: str, move: Step | None, **content: str) -> Step:
    follows, number = move.number if move else 0, str(about.version)
    return history_.append(store, about.name, action, number, follows, decision=decision(about), **content)


def _aliases(store: MlflowClient, name: str) -> dict[str, str]:
    from mlflow.exceptions import MlflowException

    try:
        return {alias: str(number) for alias, number in store.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}


def _versions(store: MlflowClient, name: str) -> dict[str, ModelVersion]:
    return {str(version.version): version for version in history_.versions(store, name)}


def _version(versions: dict[str, ModelVersion], name: str, number: str) -> ModelVersion:
    if number not in versions:
        there = ", ".join(sorted(versions, key=int)) or "none yet; `adfm register` makes one"
        raise AdfmError(f"{name} has no version {number}; its versions: {there}.")
    return versions[number]


def _quoted(text: str | None) -> str:
    return repr(text if text is None or len(text) <= 60 else f"{text[:60]}…")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a user without a name
        return f"uid {os.getuid()}"
