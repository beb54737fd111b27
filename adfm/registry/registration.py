"""Registration: a submission becomes a version, and the gate decides on it. Nothing here moves production.

Whoever trains submits (`adfm.registry.submission`); the service, whose key signs the history, accepts: it verifies the
signature, makes the version and decides with the registered policy. Where the own key is one of the service, as on a
laptop, `adfm register` does both. Elsewhere it submits, and waits for the service.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from adfm import descriptions, signing, tracking
from adfm.errors import AdfmError
from adfm.evaluation import references
from adfm.files import atomic_folder, write_json
from adfm.params import Params
from adfm.process import environment
from adfm.registry import decisions, gate, page, policy, reconcile, tables
from adfm.registry import history as history_
from adfm.registry.alerts import alert
from adfm.registry.history import NOBODY, Step
from adfm.registry.policy import Policy
from adfm.registry.reconcile import Registry, settle
from adfm.registry.submission import Unfit, check, download, own_policy, read, submit, waiting_submissions
from adfm.signing import Unverified

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

PRODUCTION = reconcile.PRODUCTION

WAIT = 900.0
"""Seconds that a submitter waits for the service."""

_POLL = 3.0
# What makes a submission unfit for good; anything else may pass by the next time.
_FOR_GOOD = (Unverified, Unfit, tables.Incomparable)


class NoPolicy(AdfmError):
    """Submissions wait for a policy."""


class NotAccepted(AdfmError):
    """The service refused a submission, or has not answered yet."""

    exit_code = 2


def register(
    model: Path,
    shards: Path,
    evaluation: Path,
    out: Path,
    params: Params,
    tags: Mapping[str, str] | None = None,
    wait: float = WAIT,
) -> gate.Decision:
    """Submits a trained model, and has it made a version with the gate's decision on it.

    A version of the same model with the same predictions is used again, so a stage that is repeated makes no second
    one; its approval stands unless the decision is another one now. The verdict is printed.

    Args:
        model: Folder that training wrote.
        shards: Folder of shards.
        evaluation: Folder that evaluation wrote from these shards, with `model` as the candidate.
        out: Folder to write: `gate.json` and `registration.json`.
        params: Reads `register`, `evaluate` and `model`.
        tags: Further tags of the version and of MLflow's run, such as the run of the pipeline that made it.
        wait: Seconds to wait for the service, where the own key is not one of it.

    Returns:
        The decision. The version is registered either way.

    Raises:
        AdfmError: A folder lacks something, the evaluation is of other data or settings, the service refused or did not
            answer, or MLflow cannot be reached.
    """
    # The tags of the run as well: the version that was there already keeps those of the run that was first.
    with tracking.start_run("register", params, tags) as run, atomic_folder(out) as partial:
        from mlflow import MlflowClient

        store, name = MlflowClient(), params.mlflow.registered_model
        registry = reconcile.look(store, name)
        accepts = registry.keys.id in registry.keys.service
        submission = submit(registry, model, shards, evaluation, params, run, tags or {})
        if accepts:
            accept(store, params, [submission], own_policy(registry.history))
        version, step = _accepted(store, name, submission, 0 if accepts else wait)
        store.set_tag(run.info.run_id, tracking.VERSION_TAG, str(version.version))
        if tags and accepts:
            history_.tag(store, version, **tags)
        decided = _decided(version)
        write_json(decided, partial / "gate.json")
        registration = {
            "model": name,
            "version": str(version.version),
            "uri": f"models:/{name}/{version.version}",
            "logged_model": version.source,
            "run_id": run.info.run_id,
            "training_run": version.run_id,
            "gate": step.verdict,
        }
        write_json(registration, partial / "registration.json")
    print(page.screen(decided, str(version.version), references.brief(references.read(evaluation))))
    return decisions.parse(decided)


def accept(
    store: MlflowClient, params: Params, submissions: list[str] | None = None, first_policy: Policy | None = None
) -> list[str]:
    """Makes versions of submissions and decides on them.

    Two that do so at once make one version of a submission, and one that is killed is finished by the next. A
    submission that is not what was signed, or cannot be judged, is refused: the history says so.

    Args:
        store: MLflow's client.
        params: Reads `register`.
        submissions: Ids of logged models; all that wait or are unfinished, if not given.
        first_policy: The policy to register where there is none yet.

    Returns:
        Numbers of the versions that were decided on.

    Raises:
        AdfmError: Something could not be done; the rest was.
    """
    name = params.mlflow.registered_model
    registry = adopt_policy(settle(store, name), first_policy)
    if submissions is None:
        submissions = [str(each.model_id) for each in waiting_submissions(registry, params)]
        submissions += _unfinished(registry)
    decided, errors = [], []
    if submissions and registry.history.policy is None:
        raise NoPolicy(
            f"{len(submissions)} submissions for {name} wait for a policy: a reviewer sets one with `adfm policy set "
            f"{policy.FILE}`."
        )
    for submission in submissions:
        try:
            if number := _accept(store, name, submission):
                decided.append(number)
        except AdfmError as error:
            errors.append(error)
        except OSError as error:
            errors.append(AdfmError(f"Files of submission {submission} cannot be read: {error}"))
        except (LookupError, TypeError, ValueError, AttributeError):  # one that is odd must not stop the others
            errors.append(AdfmError(f"Submission {submission} cannot be judged:\n{traceback.format_exc()}"))
    if errors:
        raise errors[0] if len(errors) == 1 else AdfmError("\n".join(map(str, errors)))
    return decided


def adopt_policy(registry: Registry, first: Policy | None = None) -> Registry:
    """Registers the policy that a reviewer has set on the registered model.

    A policy that cannot be used is answered by the tag `policy_refused`, and changes nothing.

    Args:
        registry: The registered model.
        first: The policy to register where there is none yet, and no reviewer has set one.
    """
    store, name = registry.store, registry.name
    proposed: Policy | None
    while True:
        model = reconcile.registered_model(store, name)
        tags = model.tags if model else {}
        text, by = tags.get("policy", ""), tags.get("policy_by", "")
        try:
            if text.strip():
                proposed = policy.loads(text, "the tag policy")
            else:
                proposed = None if registry.history.policy else first
        except policy.PolicyError as error:
            _answer(store, name, tags, str(error))
            return registry
        # The tag stays where it is: that a metric was added to adfm since is nobody's change of the policy.
        if proposed is None or registry.history.policy in (
            policy.dumps(proposed),
            policy.dumps(policy.registered(text)),
        ):
            _answer(store, name, tags, "")
            return registry
        lines = _changes(registry.history.policy, proposed)
        step = registry.append("policy", NOBODY, policy=policy.dumps(proposed), by=by or reconcile.user(), why=lines)
        registry = settle(store, name)
        if not step.void:
            print(f"{name}: policy registered as step {step.number} of the history: {lines}")
            alert(f"{name}: policy changed by {step.by}: {lines}")


def holder(store: MlflowClient, name: str, alias: str = PRODUCTION) -> ModelVersion | None:
    """The version of model `name` that `alias` points at; `None` if there is no such alias, model or version."""
    from mlflow.exceptions import MlflowException

    try:
        version = store.get_registered_model(name).aliases.get(alias)
        return None if version is None else store.get_model_version(name, str(version))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def set_policy(file: Path, params: Params) -> None:
    """Sets the policy that judges from now on, with the own login at MLflow; the service registers it.

    Where the own key is one of the service, as on a laptop, it is registered at once.

    Args:
        file: The policy.
        params: Reads `mlflow.registered_model`.

    Raises:
        AdfmError: The file is not a policy, or the login may not edit the registered model.
    """
    proposed, name = policy.load(file), params.mlflow.registered_model
    with reconcile.client() as store:
        _make_model(store, name)
        with history_.allowed(name, "edit"):
            for key, value in (("policy_by", reconcile.user()), ("policy", policy.dumps(proposed))):
                store.set_registered_model_tag(name, key, value)
        if _is_service(store, name):
            adopt_policy(settle(store, name))
        else:
            print(f"{name}: the policy is set; the service registers it at its next look (`adfm policy show`)")


def _is_service(store: MlflowClient, name: str) -> bool:
    """Whether the own key signs the history of a model; a key is not made for that on a reviewer's machine."""
    local = tracking.sqlite_file(store.tracking_uri) is not None
    if not (local or (environment.home() / signing.FOLDER).is_dir() or os.environ.get(signing.VARIABLE)):
        return False
    try:
        keys = reconcile.look(store, name).keys
    except AdfmError:  # signed by keys that this machine does not know
        return False
    return keys.id in keys.service


def rejudge(registry: Registry, version: ModelVersion, why: str = "") -> tuple[Step, bool]:
    """Makes sure that the decision on a version stands, and that its page shows it.

    Args:
        registry: The registered model; a policy is registered.
        version: The version.
        why: Why it is decided again, for history and description.

    Returns:
        The step of the decision, and whether anything was written: an approval of before is void then.
    """
    number, name, store = str(version.version), registry.name, registry.store
    while True:
        step = decisions.stands(registry.history, number)
        if step and step.finished and decisions.is_shown(version, step):
            return step, False
        with TemporaryDirectory() as folder:
            judgement = decisions.judge(registry, version, Path(folder))
            fresh = step is None or judgement.fields["decision"] != step.decision
            if step is None or fresh:
                words = decisions.summary(judgement.fields, judgement.decided)
                step = registry.append(
                    "judge", number, by="adfm", why=f"{why}; {words}" if why else words, **judgement.fields
                )
                if step.void:
                    registry = settle(store, name)
                    continue
            registry = registry.read()
            # Somebody else may have shown it meanwhile, and been answered.
            now = next(each for each in registry.history.steps if each.number == step.number)
            version = registry.version(number)
            if not (now.finished and decisions.is_shown(version, now)):
                decisions.present(registry, version, judgement, step, f"Version {number}: {why}." if why else "")
            if fresh:
                alert("\n- ".join([_headline(version, step), *judgement.decided["reasons"]]))
            return step, True


def _accept(store: MlflowClient, name: str, submission: str) -> str | None:
    """Makes a version of a submission if there is none, and decides on it; its number, `None` if it was refused."""
    registry = settle(store, name)
    version = _version_of(registry, submission)
    try:
        if version is None:
            version = _create(registry, submission)
            if version is None:
                return None
            registry = settle(store, name)
        if registry.history.production == str(version.version):
            return None  # it cannot be its own rival; the decision that brought it there stands
        _describe_model(store, name, submission)
        rejudge(registry, version)
        return str(version.version)
    except _FOR_GOOD as error:
        _refuse(registry, submission, version, error)
        return None


def _unfinished(registry: Registry) -> list[str]:
    """Submissions whose version does not show its decision yet: whoever made it was killed."""
    last = {step.version: step for step in registry.history.counting if step.action in ("judge", "refuse")}
    production = registry.history.production
    return [
        step.submission
        for number, step in last.items()
        if step.action == "judge" and not step.finished and number in registry.versions and number != production
    ]


def _refuse(registry: Registry, submission: str, version: ModelVersion | None, error: Exception) -> None:
    registry = registry.read()
    number = str(version.version) if version else NOBODY
    why = f"submission {submission}: {error}"
    registry.append("refuse", number, by="adfm", why=why, submission=submission)
    if version:
        history_.tag(registry.store, version, gate="refused", approval_refused=str(error)[:1000])
    print(f"{registry.name}: refused: {why}")
    alert(f"{registry.name}: refused: {why}")


def _create(registry: Registry, submission: str) -> ModelVersion | None:
    """A version of a submission, once: of two that are made at once, the one with the smaller number stays."""
    import mlflow

    store, name = registry.store, registry.name
    if any(step.submission == submission for step in registry.history.counting):
        return None  # it was refused, or its version was deleted
    logged = store.get_logged_model(submission)
    if str(logged.status) != "READY":
        return None
    with TemporaryDirectory() as folder:
        files = Path(mlflow.artifacts.download_artifacts(f"models:/{submission}", dst_path=folder))
        check(read(files, registry.keys, f"models:/{submission}"), name)
    _make_model(store, name)
    run = tracking.find_run(logged.source_run_id)
    run_id = run.info.run_id if run else None
    with history_.allowed(name, "write"):
        store.create_model_version(
            name, f"models:/{submission}", run_id=run_id, tags={"approval": "pending"}, model_id=submission
        )
    return _version_of(registry.read(), submission)


def _version_of(registry: Registry, submission: str) -> ModelVersion | None:
    """The version of a submission; further ones, which nobody has decided on, are deleted."""
    judged = {step.version for step in registry.history.counting if step.action == "judge"}
    same = [
        registry.versions[number]
        for number in sorted(registry.versions, key=int)
        if str(registry.versions[number].source).rstrip("/") == f"models:/{submission}"
    ]
    for twin in same[1:]:
        if str(twin.version) not in judged:
            _delete(registry.store, twin)
    return same[0] if same else None


def _delete(store: MlflowClient, version: ModelVersion) -> None:
    from mlflow.exceptions import MlflowException

    try:
        store.delete_model_version(version.name, str(version.version))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def _make_model(store: MlflowClient, name: str) -> None:
    if reconcile.registered_model(store, name) is None:
        history_.create_model(store, name)


def _describe_model(store: MlflowClient, name: str, submission: str) -> None:
    """Write the registered model's description, or bring it up to date, unless somebody has edited it."""
    model = reconcile.registered_model(store, name)
    text = descriptions.of_model(name, str(store.get_logged_model(submission).experiment_id))
    if model and (description := descriptions.to_write(model.description, text)):
        with history_.allowed(name, "write"):
            store.update_registered_model(name, description)


def _accepted(store: MlflowClient, name: str, submission: str, wait: float) -> tuple[ModelVersion, Step]:
    """The version of a submission with the decision on it, once both are there.

    Raises:
        NotAccepted: The submission is refused, or nothing has come in time.
    """
    deadline, waits = time.monotonic() + wait, False
    while True:
        registry = reconcile.look(store, name)
        steps = [step for step in registry.history.counting if step.submission == submission]
        if steps and steps[-1].action == "refuse":
            raise NotAccepted(f"The submission {submission} for {name} is refused: {steps[-1].why}")
        judged = next((step for step in reversed(steps) if step.action == "judge"), None)
        if judged and judged.version not in registry.versions:
            raise NotAccepted(f"Version {judged.version} of {name}, which was made of this submission, was deleted.")
        if judged and (judged.finished or judged.version == registry.history.production):
            return registry.versions[judged.version], judged
        if time.monotonic() >= deadline:
            raise NotAccepted(
                f"The submission {submission} for {name} is there, and the service has not made a version of it in "
                f"{wait:g} s. See that `adfm approvals serve` runs there and that a policy is registered (`adfm policy "
                "show`); then run the same command again: it finds the submission."
            )
        if not waits:
            print(f"submitted as {submission}; waiting up to {wait:g} s for the service to decide", flush=True)
            waits = True
        time.sleep(min(_POLL, max(0.0, deadline - time.monotonic())))


def _decided(version: ModelVersion) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        content = json.loads(download(version, "gate.json", Path(folder)).read_text(encoding="utf-8"))
        return dict(content)


def _headline(version: ModelVersion, step: Step) -> str:
    return f"version {version.version} of {version.name}: gate {step.verdict}"


def _changes(registered: str | None, proposed: Policy) -> str:
    if registered is None:
        return "the first policy"
    return "; ".join(policy.difference(policy.registered(registered), proposed))


def _answer(store: MlflowClient, name: str, tags: Mapping[str, str], problem: str) -> None:
    if problem and tags.get("policy_refused") != problem[:1000]:
        store.set_registered_model_tag(name, "policy_refused", problem[:1000])
        print(f"{name}: the policy that a reviewer has set is refused: {problem}")
    elif not problem and "policy_refused" in tags:
        store.delete_registered_model_tag(name, "policy_refused")
