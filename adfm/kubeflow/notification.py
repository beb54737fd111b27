"""Notification at the end of a run: how it ended, which stage failed and why, the version and its gate verdict, a link.

The state is that of Argo's Workflow. Without the right to read it, the notification names the right to grant instead.
"""

import os
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from kubernetes import client
from kubernetes.client.exceptions import ApiException

from adfm import params, tracking
from adfm.errors import AdfmError, Unreachable
from adfm.kubeflow import cluster, workflows
from adfm.kubeflow.resources import RESOURCES
from adfm.kubeflow.tasks import RUN_TAG
from adfm.kubeflow.workflows import Failure, Outcome, State
from adfm.params import Mlflow
from adfm.process import environment, pod
from adfm.registry.alerts import alert
from adfm.text import one_line, printable, shortened
from adfm.tracking import VERSION_TAG

PROMOTION = "adfm-promotion"  # the pipeline that sends no message when it had nothing to do
_PAUSES = (2.0, 10.0)  # seconds between requests to the Kubernetes API
_MOST = 5  # failed tasks that are listed
_LONGEST = 400  # characters of an error
_CLOCKS = timedelta(seconds=30)  # by which those of a cluster's machines may differ
_RUN_LABEL = "pipeline/runid"  # of KFP, on a Workflow and its pods: backend/src/common/util/consts.go
_WORKFLOW_LABEL = "workflows.argoproj.io/workflow"  # of Argo, on a pod
_STATES: dict[str, State] = {"SUCCEEDED": "succeeded", "FAILED": "failed", "CANCELLED": "terminated"}


class Status(NamedTuple):
    """The final status of a run as Kubeflow Pipelines gives it to the exit task: `dsl.PipelineTaskFinalStatus`."""

    state: str  # MLMD's of the exit handler; only the local runner's can be trusted
    error_message: str = ""  # empty in KFP 2.17
    # Argo's Workflow: `RunName`, `{{workflow.name}}`, in backend/src/v2/driver/resolve.go.
    pipeline_job_resource_name: str = ""
    pipeline_task_name: str = ""  # of the exit handler, which is the display name of its node


def notify(name: str, status: Status, run: str, settings: str, ui: str) -> str:
    """Report how a run of the pipeline `name` ended, in the log and to the chat channel; return the text; never fail.

    Args:
        name: Name of the pipeline.
        status: As KFP gives it.
        run: Id of the run.
        settings: All settings, as they were given.
        ui: Public address of the pipelines' pages; without one there is no link.
    """
    outcome = _outcome(status, run)
    versions = _versions(name, settings, run, outcome)
    if not versions and name != PROMOTION:
        versions = ["no version was registered"]
    link = _link(ui, run) if pod.is_task() else f"run {run}"
    failures = [str(failure) for failure in outcome.failures[:_MOST]]
    if len(outcome.failures) > _MOST:
        failures.append(f"and {len(outcome.failures) - _MOST} more")
    text = "\n".join([_headline(name, outcome), *failures, *versions, link])
    print(text)
    # A scheduled promotion that has nothing to do would otherwise send 144 messages a day.
    if name == PROMOTION and not versions and _is_quiet(outcome, status):
        print("no message is sent: nothing was promoted, and nothing is known to have failed")
    else:
        alert(text)
    return text


def _is_quiet(outcome: Outcome, status: Status) -> bool:
    """Whether the promotion succeeded, as far as is known by its Workflow, its pods or, without both, KFP's state."""
    if outcome.state is None:
        # KFP has a run of this pipeline as COMPLETE only if its one task was.
        return not outcome.failures and (outcome.started is not None or status.state == "COMPLETE")
    return outcome.state == "succeeded"


def _outcome(status: Status, run: str) -> Outcome:
    if not pod.is_task():
        return _local(status)
    try:
        for pause in _PAUSES:
            try:
                return workflows.outcome(_workflow(status, run), status.pipeline_task_name)
            except Unreachable as error:
                print(f"trying again in {pause:g} s: {error}", flush=True)
                time.sleep(pause)
        return workflows.outcome(_workflow(status, run), status.pipeline_task_name)
    except Exception as error:  # people hear that the run has ended whatever the cluster answers
        return _unknown(status, _error_line(error), run)


def _local(status: Status) -> Outcome:
    state = _STATES.get(status.state)  # that of a local run is right
    reason = printable(status.error_message.strip())
    failures = (Failure("", reason),) if reason else ()
    started = workflows.moment(os.environ.get(pod.STARTED))
    return Outcome(state, failures, started, unknown="" if state else f"its state is {status.state!r}.")


def _unknown(status: Status, why: str, run: str) -> Outcome:
    """Return what is known without the Workflow: the pods that failed, and when the first one started."""
    pods = []
    try:
        pods = _pods(run)
    except Exception as error:  # as in `_outcome`
        print(f"the pods of the run are not known either: {error}")
    failures = workflows.failures_of_pods(pods)
    if status.state == "FAILED" and not failures:  # RUNNING and COMPLETE prove nothing
        text = status.error_message.strip() or "Kubeflow Pipelines has it as FAILED, which a later try may have mended"
        failures = (Failure("", printable(text)),)
    created = [workflows.moment(pod["metadata"].get("creationTimestamp")) for pod in pods]
    started = min((each for each in created if each), default=None)
    return Outcome(None, failures, started, unknown=why)


def _workflow(status: Status, run: str) -> dict[str, Any]:
    name = status.pipeline_job_resource_name or _workflow_of_pods(run)
    get = client.CustomObjectsApi(cluster.api()).get_namespaced_custom_object
    place = ("argoproj.io", "v1alpha1", cluster.namespace(), "workflows", name)
    return dict(_read(get, *place, what=f"Argo's Workflow {name}", right="`get` workflows of argoproj.io"))


def _workflow_of_pods(run: str) -> str:
    for each in _pods(run):
        if name := (each["metadata"].get("labels") or {}).get(_WORKFLOW_LABEL):
            return str(name)
    raise AdfmError(f"Kubeflow Pipelines names no Workflow of Argo, and run {run} has no pods.")


def _pods(run: str) -> list[dict[str, Any]]:
    api = cluster.api()
    find, selector = client.CoreV1Api(api).list_namespaced_pod, f"{_RUN_LABEL}={run}"
    what = f"the pods of run {run}"
    pods = _read(find, cluster.namespace(), label_selector=selector, what=what, right="`list` pods")
    return [api.sanitize_for_serialization(pod) for pod in pods.items]


def _read(function: Callable[..., Any], *args: Any, what: str, right: str, **options: Any) -> Any:
    """Call a method of the Kubernetes API that reads `what`, for which the service account needs `right`."""
    try:
        return cluster.call(function, *args, **options)
    except ApiException as error:
        if error.status == 404:
            raise AdfmError(f"{what} is not there any more.") from error
        if error.status != 403:
            kind = Unreachable if cluster.is_transient(error) else AdfmError
            raise kind(f"the Kubernetes API answered {error.status} {error.reason}.") from error
        match = re.search(r"system:serviceaccount:([\w.:-]+)", str(error.body))
        account = f"the service account {match[1]}" if match else "the service account"
        raise AdfmError(
            f"{account} may not read {what}. Allow it to {right}: apply deploy/runs/rbac.yaml, or bind its Role to "
            "that account."
        ) from error


def _versions(name: str, settings: str, run: str, outcome: Outcome) -> list[str]:
    """Return what the run did to the registered model, a line each; or why that is not known."""
    try:
        loaded = params.loads(settings)
        with tracking.short_timeouts(timeout=30, retries=2):
            if name == PROMOTION:
                return _promoted(loaded.mlflow.registered_model, outcome.started)
            return _registered(loaded.mlflow, run)
    except Exception as error:  # nothing of MLflow may keep the end of a run from people
        what = "what was promoted" if name == PROMOTION else "the gate verdict"
        return [f"{what} is not known: {_error_line(error)}"]


def _registered(place: Mlflow, run: str) -> list[str]:
    with tracking.store_errors(tracking.configure()):
        query = f"name = '{place.registered_model}' and tags.{RUN_TAG} = '{run}'"
        versions = list(tracking.client().search_model_versions(query)) or _submitted_again(place, run)
        return [
            f"version {version.version} of {version.name}: gate {version.tags.get('gate') or 'not decided yet'}"
            f"{_version_link(version.name, str(version.version))}"
            for version in versions
        ]


def _submitted_again(place: Mlflow, run: str) -> list[Any]:
    # Versions that an earlier run registered from the same model; the run of `register` in MLflow names them.
    store, ids = tracking.client(), []
    if experiment := tracking.find_experiment(place.experiment):
        ids.append(experiment.experiment_id)
    if plugged := tracking.find_run(os.environ.get("MLFLOW_RUN_ID")):  # of KFP's MLflow plug-in, in its own experiment
        ids.append(plugged.info.experiment_id)
    runs: Any = store.search_runs(ids, f"tags.{RUN_TAG} = '{run}'") if ids else []
    numbers = {each.data.tags[VERSION_TAG] for each in runs if VERSION_TAG in each.data.tags}
    return [store.get_model_version(place.registered_model, number) for number in sorted(numbers, key=int)]


def _version_link(model: str, version: str) -> str:
    page = environment.version_page(model, version)
    host = urlsplit(page).hostname or ""
    # The name of a Service is left out, which only the cluster resolves.
    return "" if "." not in host or ".svc" in host else f", see {page}"


def _promoted(name: str, started: datetime | None) -> list[str]:
    from adfm.registry import promotion

    since = started or datetime.now(UTC) - timedelta(hours=RESOURCES["promote"].hours)
    if pod.STARTED not in os.environ:
        since -= _CLOCKS
    return [
        f"version {step.version} of {name} was promoted to production by {printable(step.by)}"
        for step in promotion.history(name).counting
        if step.action == "promote" and (at := workflows.moment(step.at)) and at >= since
    ]


def _headline(name: str, outcome: Outcome) -> str:
    ended = outcome.ended or datetime.now(UTC)
    after = "in" if outcome.state == "succeeded" else "after"
    duration = f" {after} {(ended - outcome.started).total_seconds():.0f} s" if outcome.started else ""
    if outcome.state is None:
        return f"{name} has ended{duration}. Whether it succeeded is not known: {outcome.unknown}"
    return f"{name} {'was terminated' if outcome.state == 'terminated' else outcome.state}{duration}"


def _error_line(error: Exception) -> str:
    text = str(error) if isinstance(error, AdfmError) else f"{type(error).__name__}: {error}"
    return shortened(one_line(text), _LONGEST)


def _link(ui: str, run: str) -> str:
    pages = ui.partition("#")[0].rstrip("/")
    return f"{pages}/#/runs/details/{run}" if pages.startswith(("http://", "https://")) else f"run {run}"
