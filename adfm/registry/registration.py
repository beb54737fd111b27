"""Registration: the service makes a version of a submission, and the gate decides on it. Production does not move.

Whoever trains submits (`adfm.registry.submission`). The service, whose key signs the history, makes the version. Where
the own key is one of the service, as on a laptop, `adfm register` does both; elsewhere it waits for the service.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from adfm import descriptions, signing, tracking
from adfm.errors import AdfmError, Unusable
from adfm.evaluation import references
from adfm.files import atomic_folder, write_json
from adfm.params import Mlflow, Params
from adfm.process import environment
from adfm.registry import decisions, gate, page, policy, reconcile, tables
from adfm.registry import history as history_
from adfm.registry.alerts import alert, announce
from adfm.registry.history import NOBODY, Step, make_model, registered_model, suppress_error
from adfm.registry.policy import Policy
from adfm.registry.reconcile import Registry
from adfm.registry.submission import Unfit, check, fetch, own_policy, read_artifact, submit, waiting_submissions
from adfm.signing import Unverified

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

WAIT = 900.0  # seconds that a submitter waits for the service
_POLL = 3.0  # seconds
# What makes a submission unfit for good; anything else may pass by the next time.
_FOR_GOOD = (Unverified, Unfit, tables.Incomparable)


class NoPolicy(AdfmError):
    """Submissions wait for a policy."""


class NotAccepted(Unusable):
    """The service refused a submission, or has not answered yet."""


def register(
    model: Path,
    shards: Path,
    evaluation: Path,  # of these shards, with `model` as the candidate
    out: Path,  # gets `gate.json` and `registration.json`
    params: Params,
    tags: Mapping[str, str] | None = None,  # of the version and of MLflow's run, such as the run of the pipeline
    wait: float = WAIT,  # seconds, where the own key is not one of the service
) -> gate.Decision:
    """Submit a trained model, and wait until it is a version with the gate's decision; print the verdict.

    A version of the same model with the same predictions is used again, so that a repeated stage does not make a second
    one. Its approval stands unless the decision is another one now.

    Returns:
        The decision. The version is registered either way.

    Raises:
        AdfmError: A folder lacks something, the evaluation is of other data or settings, the service refused or did not
            answer, or MLflow cannot be reached.
    """
    # The run has the tags as well: a version that existed keeps those of the run that was first.
    with tracking.start_run("register", params, tags) as run, atomic_folder(out) as partial:
        from mlflow import MlflowClient

        store, name = MlflowClient(), params.mlflow.registered_model
        registry = reconcile.read(store, name)
        accepts = registry.keys.id in registry.keys.service
        submission = submit(registry, model, shards, evaluation, params, run, tags or {})
        if accepts:
            accept(store, params.mlflow, [submission], own_policy(registry.history))
        version, step = _accepted(store, name, submission, 0 if accepts else wait)
        store.set_tag(run.info.run_id, tracking.VERSION_TAG, str(version.version))
        if tags and accepts:
            history_.tag(store, version, **tags)
        decided = json.loads(read_artifact(version, "gate.json"))
        write_json(decided, partial / "gate.json")
        number = str(version.version)
        about = {"model": name, "version": number, "uri": f"models:/{name}/{number}", "logged_model": version.source}
        about |= {"run_id": run.info.run_id, "training_run": version.run_id, "gate": step.verdict}
        write_json(about, partial / "registration.json")
    print(page.screen(decided, str(version.version), references.brief(references.read(evaluation))))
    return decisions.parse(decided)


def accept(
    store: MlflowClient,
    place: Mlflow,
    submissions: list[str] | None = None,  # ids of logged models; by default all that wait or are unfinished
    first_policy: Policy | None = None,  # to register where there is none yet
) -> list[str]:
    """Make versions of submissions and decide on them; what a killed process has begun is finished.

    A submission that is not what was signed, or cannot be judged, is refused, and the history records it.

    Returns:
        Numbers of the versions that were decided on.

    Raises:
        AdfmError: Something could not be done; the rest was.
    """
    name = place.registered_model
    registry = adopt_policy(reconcile.reconcile(store, name), first_policy)
    if submissions is None:
        submissions = [str(each.model_id) for each in waiting_submissions(registry, place.experiment)]
        submissions += _unfinished(registry)
    decided, errors = [], []
    if submissions and registry.history.policy is None:
        waiting = f"{len(submissions)} submissions for {name}"
        raise NoPolicy(f"{waiting} wait for a policy: a reviewer sets one with `adfm policy set {policy.FILE}`.")
    for submission in submissions:
        try:
            if number := _accept(store, name, submission):
                decided.append(number)
        except AdfmError as error:
            errors.append(error)
        except (OSError, LookupError, TypeError, ValueError, AttributeError):  # an odd one must not stop the others
            errors.append(AdfmError(f"Submission {submission} cannot be judged:\n{traceback.format_exc()}"))
    if errors:
        raise errors[0] if len(errors) == 1 else AdfmError("\n".join(map(str, errors)))
    return decided


def adopt_policy(registry: Registry, first: Policy | None = None) -> Registry:
    """Register the policy that a reviewer has set on the registered model.

    A policy that cannot be used changes nothing; the tag `policy_refused` says why. Where there is none yet, and no
    reviewer has set one, `first` is registered.
    """
    store, name = registry.store, registry.name
    while True:
        model, now = registered_model(store, name), registry.history.policy
        tags = model.tags if model else {}
        text, by = tags.get("policy", ""), tags.get("policy_by", "")
        proposed = None if now else first
        try:
            if text.strip():
                proposed = policy.loads(text, "the tag policy")
        except policy.PolicyError as error:
            problem = str(error)[:1000]
            if tags.get("policy_refused") != problem:
                store.set_registered_model_tag(name, "policy_refused", problem)
                print(f"{name}: the policy that a reviewer has set is refused: {error}")
            return registry
        # The tag stays where it is. A metric that was added to adfm since does not make it another policy.
        if proposed is None or now in (policy.dumps(proposed), policy.dumps(policy.registered(text))):
            if "policy_refused" in tags:
                store.delete_registered_model_tag(name, "policy_refused")
            return registry
        changes = "the first policy"
        if now is not None:
            changes = "; ".join(policy.difference(policy.registered(now), proposed))
        step = registry.append("policy", NOBODY, policy=policy.dumps(proposed), by=by or reconcile.user(), why=changes)
        registry = reconcile.reconcile(store, name)
        if not step.void:
            print(f"{name}: policy registered as step {step.number} of the history: {changes}")
            alert(f"{name}: policy changed by {step.by}: {changes}")


def set_policy(file: Path, name: str) -> None:
    """Set the policy of model `name`, with the own login; the service, or this process with its key, registers it.

    Raises:
        AdfmError: The file is not a policy, or the login may not edit the registered model.
    """
    proposed = policy.load(file)
    with reconcile.client() as store:
        make_model(store, name)
        with history_.permission_errors(name, "edit"):
            for key, value in (("policy_by", reconcile.user()), ("policy", policy.dumps(proposed))):
                store.set_registered_model_tag(name, key, value)
        if _is_service(store, name):
            adopt_policy(reconcile.reconcile(store, name))
        else:
            print(f"{name}: the policy is set; the service registers it at its next look (`adfm policy show`)")


def _is_service(store: MlflowClient, name: str) -> bool:
    """Whether the own key signs the history of a model."""
    # Reading the keys would make one, which a reviewer's machine does not need.
    local = tracking.sqlite_file(store.tracking_uri) is not None
    if not (local or (environment.home() / signing.FOLDER).is_dir() or os.environ.get(signing.VARIABLE)):
        return False
    try:
        keys = reconcile.read(store, name).keys
    except AdfmError:  # signed by keys that this machine does not know
        return False
    return keys.id in keys.service


def rejudge(registry: Registry, version: ModelVersion, why: str = "") -> tuple[Step, bool]:
    """Decide on a version unless its decision stands, and write its page unless it has the decision.

    Returns:
        The step of the decision, and whether anything was written, which voids an earlier approval. History and
        description say `why`.
    """
    number, name, store = str(version.version), registry.name, registry.store
    while True:
        step = decisions.stands(registry.history, number)
        if step and step.finished and decisions.is_published(version, step):
            return step, False
        with TemporaryDirectory() as folder:
            judgement = decisions.judge(registry, version, Path(folder))
            fresh = step is None or judgement.fields["decision"] != step.decision
            if step is None or fresh:
                fields, looks = judgement.fields, judgement.decided["looks"]
                words = f"{why}; " if why else ""
                words += f"gate {fields['verdict']} against version {fields['production']}, anchor {fields['anchor']}; "
                words += f"look {fields['look']} of {looks}"
                step = registry.append("judge", number, by="adfm", why=words, **fields)
                if step.void:
                    registry = reconcile.reconcile(store, name)
                    continue
            registry = registry.read()
            # Somebody else may have written the page meanwhile, and a reviewer have answered.
            now = next(each for each in registry.history.steps if each.number == step.number)
            version = registry.version(number)
            if not (now.finished and decisions.is_published(version, now)):
                decisions.publish(registry, version, judgement, step, f"Version {number}: {why}." if why else "")
            if fresh:
                headline = f"version {version.version} of {version.name}: gate {step.verdict}"
                alert("\n- ".join([headline, *judgement.decided["reasons"]]))
            return step, True


def _accept(store: MlflowClient, name: str, submission: str) -> str | None:
    """Make a version of a submission if there is none, and decide on it: its number, or `None` if it was refused."""
    registry = reconcile.reconcile(store, name)
    version = _version_of(registry, submission)
    try:
        if version is None:
            version = _create(registry, submission)
            if version is None:
                return None
            registry = reconcile.reconcile(store, name)
        if registry.history.production == str(version.version):
            return None  # it cannot be compared with itself; the decision that brought it there stands
        _describe_model(store, name, submission)
        rejudge(registry, version)
        return str(version.version)
    except _FOR_GOOD as error:
        number, why = str(version.version) if version else NOBODY, f"submission {submission}: {error}"
        registry.read().append("refuse", number, by="adfm", why=why, submission=submission)
        if version:
            history_.tag(store, version, gate="refused", approval_refused=str(error)[:1000])
        announce(f"{name}: refused: {why}")
        return None


def _unfinished(registry: Registry) -> list[str]:
    """Submissions whose version does not have its decision on the page yet: the process that made it was killed."""
    last = {step.version: step for step in registry.history.counting if step.action in ("judge", "refuse")}
    begun = [step for step in last.values() if step.action == "judge" and not step.finished]
    waiting = registry.versions.keys() - {registry.history.production}
    return [step.submission for step in begun if step.version in waiting]


def _create(registry: Registry, submission: str) -> ModelVersion | None:
    """Make a version of a submission; of two that are made at once, the one with the smaller number stays."""
    store, name = registry.store, registry.name
    if any(step.submission == submission for step in registry.history.counting):
        return None  # it was refused, or its version was deleted
    logged = store.get_logged_model(submission)
    if str(logged.status) != "READY":
        return None
    with TemporaryDirectory() as folder:
        checked = fetch(f"models:/{submission}", registry.keys, Path(folder))
        check(checked, name)
        tags = decisions.tags(checked) | {"approval": "pending", "approval_by": NOBODY}
    make_model(store, name)
    run = tracking.find_run(logged.source_run_id)
    run_id = run.info.run_id if run else None
    with history_.permission_errors(name, "write"):
        store.create_model_version(name, f"models:/{submission}", run_id=run_id, tags=tags, model_id=submission)
    return _version_of(registry.read(), submission)


def _version_of(registry: Registry, submission: str) -> ModelVersion | None:
    """Return the version of a submission; delete further ones, which nobody has decided on."""
    judged = {step.version for step in registry.history.counting if step.action == "judge"}
    uris = {number: str(version.source).rstrip("/") for number, version in registry.versions.items()}
    numbers = sorted((number for number, uri in uris.items() if uri == f"models:/{submission}"), key=int)
    for number in numbers[1:]:
        if number not in judged:
            with suppress_error("RESOURCE_DOES_NOT_EXIST"):
                registry.store.delete_model_version(registry.name, number)
    return registry.versions[numbers[0]] if numbers else None


def _describe_model(store: MlflowClient, name: str, submission: str) -> None:
    """Write the registered model's description, or bring it up to date, unless somebody has edited it."""
    model = registered_model(store, name)
    text = descriptions.of_model(name, str(store.get_logged_model(submission).experiment_id))
    if model and (description := descriptions.to_write(model.description, text)):
        with history_.permission_errors(name, "write"):
            store.update_registered_model(name, description)


def _accepted(store: MlflowClient, name: str, submission: str, wait: float) -> tuple[ModelVersion, Step]:
    """Wait for the version of a submission and the decision on it; raise NotAccepted without one in time."""
    deadline, waits = time.monotonic() + wait, False
    while True:
        registry = reconcile.read(store, name)
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
