"""Promotion and rollback: the only code that decides which version is in production.

A promotion verifies the version's signature, runs the gate again with the registered policy, checks the approval, and
writes its step into the signed history, which the aliases follow. Of the tags, only the approval counts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NoReturn

from adfm import signing
from adfm.errors import AdfmError
from adfm.registry import decisions, policy
from adfm.registry import history as history_
from adfm.registry.alerts import alert
from adfm.registry.history import NOBODY, History, Step
from adfm.registry.reconcile import Refused, Registry, client, find, reconcile, record_rejection, user, versions
from adfm.registry.registration import adopt_policy, rejudge
from adfm.registry.submission import Unfit, fetch, version_uri
from adfm.registry.tables import Incomparable

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_UNDECIDED = ("pending", "withdrawn")  # values of the tag `approval` that are not a reviewer's answer
_WAITS = "its tag approval_by is missing: the reviewer writes the own name there, beside approval; then it is promoted"


class _Changed(Exception):
    """History or tags have changed while files were checked: start again."""


def promote(version: str, name: str, by: str | None = None) -> None:
    """Put a version into production, if its files are those that were signed, its gate passes, and it is approved.

    A refusal is written into the history. An approval that cannot be followed is set back to `pending`, and the tag
    `approval_refused` says why. If production, anchor or policy are not those of the decision, the gate decides again,
    and the reviewer has to approve again. `by` is by default the user of the process.

    Raises:
        AdfmError: The gate does not pass, the approval is missing, used up or of somebody who may not approve, or the
            files are not what was signed. Production is untouched.
    """
    with client() as store:
        adopt_policy(reconcile(store, name))
        _promote(store, name, version, by or user())


def promote_approved(name: str, by: str | None = None) -> bool:
    """Promote what reviewers have approved since the last time, and record what they have rejected.

    Returns:
        Whether any version was newly approved. One whose tag `approval_by` is still missing waits.

    Raises:
        Refused: An approval could not be followed; others were.
        AdfmError: MLflow failed, or a version's files could not be read; the approval stands for the next time.
    """
    errors: list[AdfmError] = []
    with client() as store:
        registry = adopt_policy(reconcile(store, name))
        approved = []
        # The newest first: older ones are then refused, because their gate did not compare them with it.
        for number in sorted(registry.versions, key=int, reverse=True):
            version, history = registry.versions[number], registry.history
            approval = version.tags.get("approval", "pending")
            if approval == "rejected":
                record_rejection(registry, version)
            elif approval in _UNDECIDED or history.production == number or _used(number, history):
                continue
            elif approval == "approved" and _approver(version) is None:
                _wait_for_name(store, version)
            else:
                approved.append(number)
        for number in approved:
            try:
                _promote(store, name, number, by or user())
            except AdfmError as error:
                errors.append(error)
    if errors:
        kind = Refused if all(isinstance(error, Refused) for error in errors) else AdfmError
        raise kind("\n".join(map(str, errors)))
    return bool(approved)


def rollback(name: str, by: str | None = None, to: str | None = None, why: str = "") -> None:
    """Put an earlier version back into production; the one that leaves needs a new approval to return.

    By default it is the version under `previous`; any other that was in production can be named by `to`.

    Raises:
        AdfmError: There is nothing to roll back to, `to` never was in production, or its files are not what was signed.
            Production is untouched.
    """
    with client() as store:
        registry = reconcile(store, name)
        history, move = registry.history, registry.history.move
        if move is None or move.production == move.previous == NOBODY:
            raise AdfmError(f"No version of {name} is in production, so there is nothing to roll back.")
        leaving = move.production
        if to is None and move.previous not in registry.versions:
            gone = f"Version {leaving} of {name} replaced no version that is still there, so there is nothing to roll"
            raise AdfmError(f"{gone} back to; name a version that was in production with --to.")
        target = registry.version(to or move.previous)
        number = str(target.version)
        if number == leaving:
            raise AdfmError(f"Version {number} of {name} is in production already; name another with --to.")
        if not history.move_to(number):
            raise AdfmError(f"Version {number} of {name} was never in production; use `adfm promote`.")
        came = next(s for s in reversed(history.counting) if s.action == "promote" and s.version == number)
        with TemporaryDirectory() as folder:
            _check_as_promoted(registry, target, came, Path(folder))
        # The version that this one had once replaced, so that one can roll back further.
        previous = came.replaced if came.replaced in registry.versions else NOBODY
        state = {"production": number, "previous": previous, "replaced": leaving}
        kept = {"decision": came.decision, "manifest": came.manifest}
        step = registry.append("rollback", number, by=by or user(), why=why, **state, **kept)
        registry = reconcile(store, name)
        if step.void:
            raise AdfmError(f"Somebody else moved production of {name} meanwhile; see `adfm registry log`.")
        registry.version(number)  # else it was deleted meanwhile
    print(f"version {number} of {name} is in production again; it replaced {leaving}")
    alert(f"{name}: rolled back from version {leaving} to {number} by {step.by}. {why}".rstrip())


def history(name: str) -> History:
    """Read and verify the history of a registered model.

    Raises:
        AdfmError: MLflow cannot be reached, or the history is broken.
    """
    with client() as store:
        return history_.read(store, name, signing.keys())


def approve(version: str, name: str, value: str = "approved", reason: str = "") -> None:
    """Set the tags of an approval (`approved`) or a rejection (`rejected`), with the own login; nothing moves by that.

    Raises:
        AdfmError: There is no such version, its gate did not pass, or the login may not edit it.
    """
    with client() as store:
        target = find(versions(name), name, version)
        if value == "approved" and target.tags.get("gate") != "passed":
            verdict = target.tags.get("gate", "missing")
            raise Refused(f"Version {version} of {name} cannot be approved: its gate's verdict is {verdict!r}.")
        tags = {"approval_by": user()} | ({"approval_reason": reason} if reason else {})
        with history_.permission_errors(f"version {version} of {name}", "edit"):
            history_.tag(store, target, **tags, approval=value)
    print(f"version {version} of {name}: {value} by {user()}")


def confirm_keys(name: str, by: str | None = None) -> None:
    """Confirm, with the service's present key, the steps that retired keys have signed.

    Raises:
        AdfmError: The own key is not one of the service, or the history is broken.
    """
    with client() as store:
        keys = signing.keys()
        trusting = replace(keys, service=keys.service | keys.retired, retired={})
        seen = history_.read(store, name, trusting)
        last = seen.counting[-1].number if seen.counting else 0
        why = f"key {keys.id} of the service confirms the steps up to {last}"
        step = history_.append(store, name, keys, seen, "keys", NOBODY, by=by or user(), why=why)
    if step.void:
        raise AdfmError(f"Somebody else wrote into the history of {name} meanwhile; try again.")
    print(f"{name}: step {step.number}: {why}")


def _promote(store: MlflowClient, name: str, number: str, by: str) -> None:
    while True:
        registry = reconcile(store, name)
        try:
            candidate = registry.version(number)
        except AdfmError as error:
            if registry.history.counting:
                registry.append("refuse", number, by=by, why=str(error))
            raise
        try:
            step = _try(registry, candidate, by)
        except _Changed:
            continue
        after = reconcile(store, name)
        if step.void:
            continue
        if number not in after.versions:
            raise AdfmError(f"Version {number} of {name} was deleted while it was promoted; it is not in production.")
        break
    print(f"version {number} of {name} is in production; it replaced {step.replaced}")
    alert(f"{name}: version {number} is in production, in place of {step.replaced}; promoted by {by}. {step.why}")


def _try(registry: Registry, candidate: ModelVersion, by: str) -> Step:
    """Check everything, then write the move; raise Refused or _Changed if it may not be."""
    number = str(candidate.version)
    if refusals := _refusals(registry, candidate):
        _refuse(registry, candidate, refusals, by)
    judged = _rerun_gate(registry, candidate, by)
    # The gate may have taken minutes, and no lock was held: check again on what is there now.
    now = registry.read()
    if any(step.action not in history_.NOTES for step in now.history.since(registry.history)):
        raise _Changed
    candidate = now.version(number)
    if refusals := _refusals(now, candidate):
        _refuse(now, candidate, refusals, by)
    move, production = now.history.move, now.history.production
    why = f"gate passed on {judged.at} against version {judged.production}"
    if reason := candidate.tags.get("approval_reason"):
        why += f"; {reason}"
    approver = _approver(candidate) or ""
    if _same_person(approver, judged.submitted_by):
        why += "; team of one: the submitter approved"
    # The version before stays within reach when the one in production was deleted.
    previous = move.previous if move and production == NOBODY else production
    state = {"production": number, "previous": previous, "replaced": production}
    if now.history.anchor == NOBODY:
        state["anchor"] = number
    kept = {"decision": judged.decision, "manifest": judged.manifest, "submitted_by": judged.submitted_by}
    return now.append("promote", number, by=by, why=why, approval_by=approver, **state, **kept)


def _refusals(registry: Registry, candidate: ModelVersion) -> list[str]:
    history, tags, number = registry.history, candidate.tags, str(candidate.version)
    if history.production == number:
        return ["it is in production already"]
    judged = history.last("judge", version=number)
    if judged is None or history.policy is None:
        return ["no decision of the gate on it is in the history: only what `adfm register` makes can be promoted"]
    refusals = []
    outdated = decisions.stands(history, number) is None
    if judged.verdict != "passed" and not outdated:
        refusals.append(f"its gate's verdict is {judged.verdict!r}, not 'passed': its description says why")
    if tags.get("approval") != "approved":
        value = _quoted(tags.get("approval"))
        refusals.append(f"its tag approval is {value}: a reviewer sets it to exactly 'approved' or 'rejected'")
    else:
        refusals += _approver_refusals(_approver(candidate), judged, history)
    if _used(number, history):
        used = "its approval was used: it has been in production since the gate decided, and was replaced"
        refusals.append(f"{used}; bring it back with `adfm rollback --to {number}`")
    if outdated and refusals:
        changed = _outdated(registry, judged)
        refusals.append(f"{changed}: the gate decides again when it is approved, or with `adfm register`")
    return refusals


def _approver_refusals(approver: str | None, judged: Step, history: History) -> list[str]:
    if approver is None:
        return [_WAITS]
    registered, refusals = policy.registered(history.policy), []
    if registered.approvers and approver not in registered.approvers:
        refusals.append(f"{_quoted(approver)} (tag approval_by) is not one of the policy's approvers")
    if not registered.team_of_one and _same_person(approver, judged.submitted_by):
        refusals.append(f"{_quoted(approver)} (tag approval_by) submitted it: another person has to approve")
    return refusals


def _rerun_gate(registry: Registry, candidate: ModelVersion, by: str) -> Step:
    """Verify the files and decide on them again; return the decision if it is the approved one, or raise Refused."""
    judged = registry.history.last("judge", version=str(candidate.version))
    assert judged is not None  # _refusals checks it
    with TemporaryDirectory() as folder:
        try:
            judgement = decisions.judge(registry, candidate, Path(folder))
        except (signing.Unverified, Unfit, Incomparable) as error:
            _refuse(_unless_changed(registry, candidate), candidate, [str(error)], by)
    if judgement.fields["manifest"] != judged.manifest:
        refusal = "its files were changed, and signed again, after the gate decided on them"
        _refuse(_unless_changed(registry, candidate), candidate, [refusal], by)
    if judgement.fields["decision"] != judged.decision:
        _request_approval(registry, candidate, _outdated(registry, judged))
    if not (judged.finished and decisions.is_published(candidate, judged)):
        reason = "what its page showed was not the decision that stands, and was written again"
        _request_approval(registry, candidate, reason)
    return judged


def _unless_changed(registry: Registry, candidate: ModelVersion) -> Registry:
    """Read the registry again; raise _Changed if somebody else has changed the approval meanwhile."""
    now = registry.read()
    # What was wrong may then be the half-done work of that other process.
    if now.version(str(candidate.version)).tags.get("approval") != candidate.tags.get("approval"):
        raise _Changed
    return now


def _request_approval(registry: Registry, candidate: ModelVersion, reason: str) -> NoReturn:
    """Put the present decision on a version, request another approval, and raise Refused."""
    number = str(candidate.version)
    _unless_changed(registry, candidate)
    step, _ = rejudge(registry, candidate, reason)
    text = f"{reason}; decided against version {step.production}: gate {step.verdict}; "
    text += "approve again" if step.verdict == "passed" else "it cannot be promoted"
    history_.tag(registry.store, candidate, approval_refused=text[:1000])
    alert(f"{registry.name}: version {number} was approved and cannot be promoted: {text}")
    message = f"Version {number} of {registry.name} cannot be promoted: {text}."
    raise Refused(f"{message}\nIts tag approval is 'pending' again.")


def _outdated(registry: Registry, judged: Step) -> str:
    history, compared = registry.history, "its gate compared it with version"
    changed = []
    if judged.production != history.production:
        changed.append(f"{compared} {judged.production} (production), which is {history.production} now")
    if judged.anchor != history.anchor:
        changed.append(f"{compared} {judged.anchor} (the anchor), which is {history.anchor} now")
    if judged.policy != policy.digest(policy.registered(history.policy)):
        changed.append("the policy has changed since its gate decided")
    return "; ".join(changed) or "the gate decides otherwise than before on the same files (another version of adfm?)"


def _refuse(registry: Registry, candidate: ModelVersion, refusals: list[str], by: str) -> NoReturn:
    """Record a refusal, set an approval back to `pending`, and raise Refused."""
    name, number = candidate.name, str(candidate.version)
    message = "\n  - ".join([f"Version {number} of {name} cannot be promoted:", *refusals])
    why = "; ".join(refusals)
    judged = registry.history.last("judge", version=number)
    registry.append("refuse", number, by=by, why=why, decision=judged.decision if judged else "")
    if judged and judged.finished:  # somebody may have changed the tags, which people read
        due = decisions.decision_tags(judged)
        changed = {key: text for key, text in due.items() if candidate.tags.get(key) != text}
        history_.tag(registry.store, candidate, **changed)
    approval = candidate.tags.get("approval", "pending")
    if refusals == [_WAITS]:
        _wait_for_name(registry.store, candidate)
    elif approval not in (*_UNDECIDED, "rejected") and registry.history.production != number:
        refused = {"approval": "pending", "approval_by": NOBODY, "approval_refused": why[:1000]}
        history_.tag(registry.store, candidate, **refused)
        message += "\nIts tag approval is 'pending' again."
        alert(f"{name}: version {number} was approved and cannot be promoted: {why}")
    raise Refused(message)


def _check_as_promoted(registry: Registry, version: ModelVersion, came: Step, folder: Path) -> None:
    title = f"{version.version} of {version.name}"
    try:
        files = fetch(version_uri(version), registry.keys, folder)
    except signing.Unverified as error:
        raise Refused(f"Version {title} cannot return: {error}") from error
    if files.manifest != came.manifest:
        changed = "its files were changed, and signed again, since it was in production"
        raise Refused(f"Version {title} cannot return: {changed}.")


def _wait_for_name(store: MlflowClient, version: ModelVersion) -> None:
    if version.tags.get("approval_refused") != _WAITS:
        history_.tag(store, version, approval_refused=_WAITS)
        print(f"version {version.version} of {version.name} is approved and waits: {_WAITS}")


def _approver(version: ModelVersion) -> str | None:
    name = version.tags.get("approval_by", "").strip()
    return name if name and name != NOBODY else None


def _same_person(one: str, other: str) -> bool:
    return one.strip().casefold() == other.strip().casefold()


def _used(number: str, history: History) -> bool:
    """Whether the approval of the version's present decision has brought it into production before."""
    judged = history.last("judge", version=number)
    for step in reversed(history.counting):
        if step.action not in history_.MOVES:
            continue
        if step.production == number:
            return judged is not None and step.decision == judged.decision
        # A rollback withdraws the approval of the version that leaves: one that is given after it is new.
        if step.action == "rollback" and step.replaced == number:
            return False
    return False


def _quoted(text: str | None) -> str:
    return repr(text if text is None or len(text) <= 60 else f"{text[:60]}…")
