"""Training on several machines: a TrainJob of Kubeflow Trainer, whose Torch runtime starts `adfm train` on each.

`check` asks the cluster for what that needs before a run pays for data, `on_nodes` trains, `end` cleans up after a run.
"""

from __future__ import annotations

import errno
import math
import re
import shutil
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from adfm import tracking
from adfm.errors import AdfmError, Unreachable
from adfm.kubeflow import cluster, resources
from adfm.kubeflow.cluster import GROUP, PLURAL, RUNTIME, VERSION
from adfm.kubeflow.trainjob import CONTAINER, USER, train_job, volume_job
from adfm.models import hardware
from adfm.params import Params
from adfm.process.pod import inside

if TYPE_CHECKING:
    from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
    from kubernetes.client import CoreV1Api, CustomObjectsApi
    from kubernetes.client.exceptions import ApiException

_POLL = 10.0  # seconds between two looks at a job
_OUTAGE = 900.0  # seconds for which the Kubernetes API may be away while a job is followed
_LOG = 60.0  # seconds for which a log is asked for again; a machine that was lost has none
_QUIET = 180.0  # seconds after which a job that has not started is explained
_HOPELESS = 900.0  # seconds after which a job is given up whose image or configuration cannot be used
_PROBE = 600.0  # seconds in which the volume has to be there; the task `check` has half an hour
_DELETION = 600.0  # seconds for which a job of the same name may be on its way out
_TAIL = 20  # lines of a machine that failed

_ERROR = "adfm: error: "  # before what the command line prints of an AdfmError

_DOCS = "docs/kubernetes.md (Several machines)"
_INSTALL = f"install Kubeflow Trainer 2.2 or newer, with its runtimes: {_DOCS}"


class _Cluster(NamedTuple):
    jobs: CustomObjectsApi
    core: CoreV1Api
    namespace: str


class _Own(NamedTuple):
    """What a TrainJob has of the pod that makes it.

    Args:
        owner: Reference to the run's Workflow, with which the job is deleted; None for a pod that has none.
        image: Of the pod.
        mlflow: Variables of KFP's MLflow plug-in, so that the machines use the server and the run that the task has.
    """

    owner: dict[str, Any] | None
    image: str
    mlflow: list[dict[str, Any]]


def job_name(run: str) -> str:
    """Name of the TrainJob of a pipeline's run."""
    return f"adfm-{re.sub('[^a-z0-9]+', '-', run.lower())[:18].strip('-')}"


def prepare(work: str) -> None:
    """Make the folder of a run on the volume, and print `free BYTES`, or `refused` and why.

    Runs in the pod of `volume_job`. It ends well either way: Kubernetes would start a pod that failed again.
    """
    folder = Path(work)
    try:
        folder.mkdir(exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
        print("free", shutil.disk_usage(folder).free)
    except OSError as error:
        print("refused", error)


def check(params: Params, *, run: str, nodes: int, gpus: int, gpu_type: str) -> None:
    """Check that the cluster can train on several machines, and make the run's folder on the volume.

    The TrainJob is sent as a dry run, which its schema, Trainer's webhooks and the account's rights have to pass. The
    volume is tried by a TrainJob of one small pod with the image of this one: what this pod mounted itself would keep
    it waiting for ever where the claim is missing, and it has no `fsGroup`.

    Args:
        params: Reads `train`.
        run: Id of the pipeline's run.
        nodes: Machines.
        gpus: GPUs of each.
        gpu_type: Resource that stands for a GPU.

    Raises:
        AdfmError: The batch does not divide; there is no Kubeflow Trainer, an older one or no runtime; the account may
            not make TrainJobs; the claim is missing, cannot be shared or is not bound; the volume cannot be written.
    """
    from kubernetes.client.exceptions import ApiException

    hardware.shares(params.train, nodes * max(gpus, 1))
    at = _connect()
    claim, name = resources.WORKSPACE_CLAIM, job_name(run)
    work = Path(resources.WORKSPACE) / name
    try:
        own = _own(at)
        where: dict[str, Any] = {"gpu_type": gpu_type, "node_selector": {}, "tolerations": []}
        job = train_job(
            name, work, claim, own.image, nodes=nodes, gpus=gpus, owner=own.owner, variables=own.mlflow, **where
        )
        _create(at, job, dry_run="All", patience=60.0)
        _check_claim(at, claim)
        if _await_deletion(at, f"{name}-volume"):
            _create(at, volume_job(f"{name}-volume", work, claim, own.image, own.owner), patience=60.0)
        answer = _answer(at, f"{name}-volume", claim)
    except ApiException as error:
        raise _refusal(error, f"the TrainJob {name}") from error
    verdict, _, rest = answer.partition(" ")
    if verdict != "free":
        raise _not_writable(claim, rest)
    print(f"nodes     TrainJob accepted; volume {claim} is writable, {int(rest) / 2**30:.1f} GiB free")


def _check_claim(at: _Cluster, claim: str) -> None:
    """What the claim says of itself; one that waits for its first pod is tried by that."""
    from kubernetes.client.exceptions import ApiException

    try:
        found = cluster.call(at.core.read_namespaced_persistent_volume_claim, claim, at.namespace, patience=60.0)
    except ApiException as error:
        if error.status == 403:
            print(f"nodes     the account may not look at the claim {claim} (deploy/runs/rbac.yaml); it is tried")
            return
        if error.status != 404:
            raise
        raise AdfmError(
            f"there is no volume claim {claim} in the namespace {at.namespace}; "
            f"kubectl -n {at.namespace} apply -f deploy/runs/workspace.yaml, with a storage class of ReadWriteMany."
        ) from error
    if "ReadWriteMany" not in found.spec.access_modes:
        raise AdfmError(
            f"the volume claim {claim} is {', '.join(found.spec.access_modes)}, and several nodes have to write to it; "
            "make it again with ReadWriteMany and a storage class that has it (deploy/runs/workspace.yaml)."
        )
    if found.status.phase == "Lost":
        raise AdfmError(f"the volume of the claim {claim} is lost; make the claim again (deploy/runs/workspace.yaml).")


def _answer(at: _Cluster, name: str, claim: str) -> str:
    """What `prepare` printed in its pod; the job is deleted."""
    log = _Log(at, name, quiet=True)
    try:
        ended, why = _follow(at, log, within=_PROBE)
    finally:
        _delete(at, name)
    if ended == "Complete":
        answer = next((line for line in reversed(log.tail) if line.startswith(("free ", "refused "))), "")
        if answer:
            return answer
        problem, why = "its pod has left no word in its log", "; ".join(log.unread.values())
    elif ended:
        problem = f"it ended as {ended}"
    elif why:
        problem = f"it has not started in {_PROBE / 60:.0f} minutes"
    else:
        problem = f"its pod has been running for {_PROBE / 60:.0f} minutes; does its storage answer"
    reason = log.last_end or why
    raise AdfmError(
        f"the volume {claim} could not be tried by the TrainJob {name}: {problem}{reason and f': {reason}'}; "
        f"see {_DOCS}."
    )


def _not_writable(claim: str, why: object) -> AdfmError:
    return AdfmError(
        f"user and group {USER} cannot write to the volume {claim}: {why}; its driver does not apply fsGroup, so that "
        f"its root folder has to be made writable for them once: {_DOCS}."
    )


def on_nodes(
    shards: Path,
    model: Path,
    out: Path,
    params: Params,
    *,
    run: str,
    workspace: Path,
    claim: str,
    image: str,
    nodes: int,
    gpus: int,
    gpu_type: str,
    node_selector: dict[str, str],
    tolerations: list[dict[str, Any]],
) -> None:
    """Train on several machines by a TrainJob: start it or find it, follow its log, and take its adapter.

    A task that is started again follows the job that is under way. A job that failed is removed, so that the next try
    resumes from its last checkpoint on the volume.

    Args:
        shards: Folder of shards.
        model: Folder that cold start wrote.
        out: Folder to write.
        params: All settings.
        run: Id of the pipeline's run; the job's name has its beginning.
        workspace: Where the shared volume is mounted, here and there.
        claim: The volume's claim.
        image: Of the containers.
        nodes: Machines.
        gpus: GPUs of each.
        gpu_type: Resource that stands for a GPU.
        node_selector: Labels of the machines.
        tolerations: Of their taints.

    Raises:
        AdfmError: The batch does not divide, there is no cluster or no Kubeflow Trainer, the volume cannot be written,
            or the job failed or could not start.
    """
    from kubernetes.client.exceptions import ApiException

    if not workspace.is_dir():
        raise AdfmError(f"{workspace} is not a folder; mount the volume {claim} there (deploy/runs/workspace.yaml).")
    hardware.shares(params.train, nodes * max(gpus, 1))
    at = _connect()
    name = job_name(run)
    work = workspace / name
    log = _Log(at, name)
    try:
        if _await_deletion(at, name):
            _write(shards, model, work, params, claim)
            own = _own(at)
            job = train_job(
                name,
                work,
                claim,
                image,
                nodes=nodes,
                gpus=gpus,
                gpu_type=gpu_type,
                node_selector=node_selector,
                tolerations=tolerations,
                owner=own.owner,
                variables=own.mlflow,
            )
            _create(at, job, patience=_OUTAGE)
        ended, why = _follow(at, log)
        has_model = ended == "Complete" and (work / "trained").is_dir()
        if not has_model:
            _delete(at, name)
    except ApiException as error:
        raise _refusal(error, f"the TrainJob {name}") from error
    if not ended:
        raise AdfmError(f"the TrainJob {name} cannot start, and is given up after {_HOPELESS / 60:.0f} minutes: {why}.")
    if ended != "Complete":
        reasons = "; ".join(reason for reason in (log.error or why, log.last_end) if reason)
        raise AdfmError(f"the TrainJob {name} ended as {ended}: {reasons}; its log is above.")
    if not has_model:
        raise AdfmError(f"the TrainJob {name} ended as Complete without a model in {work / 'trained'}; see its log.")
    shutil.copytree(work / "trained", out)
    end(run)  # after the copy: that the API is away for a moment must not cost the model
    shutil.rmtree(work, ignore_errors=True)  # where the volume's root is not ours, the empty folder stays


def _write(shards: Path, model: Path, work: Path, params: Params, claim: str) -> None:
    try:
        for source, folder in ((shards, "shards"), (model, "sft")):
            shutil.copytree(source, work / folder, dirs_exist_ok=True)
        (work / "params.yaml").write_text(tracking.settings(params), encoding="utf-8")
    except OSError as error:
        first: Any = error.args[0][0][2] if isinstance(error, shutil.Error) else error
        if isinstance(first, OSError) and first.errno in (errno.ENOSPC, errno.EDQUOT):
            raise AdfmError(
                f"the volume {claim} is full: {first}; remove folders {work.parent}/adfm-* of runs that have ended."
            ) from error
        raise _not_writable(claim, first) from error


def end(run: str) -> None:
    """Delete the TrainJobs of a run that has ended, so that they do not hold GPUs; a terminated run leaves them behind.

    Quiet where there is no cluster, no Kubeflow Trainer or no such job. Never raises.
    """
    from kubernetes.client.exceptions import ApiException

    if not inside():
        return
    try:
        at = _connect()
        for name in (job_name(run), f"{job_name(run)}-volume"):
            if _delete(at, name):
                print(f"the TrainJob {name} of this run was deleted")
    except ApiException as error:
        if error.status != 403:  # without the right to delete TrainJobs there is none to make them
            print(f"the TrainJobs of this run could not be deleted: {error.status} {cluster.reason(error)}")
    except AdfmError as error:
        print(f"the TrainJobs of this run could not be deleted: {error}")


def _connect() -> _Cluster:
    from kubernetes import client

    try:
        api = cluster.api()
    except AdfmError as error:
        raise AdfmError(f"a TrainJob needs a cluster; leave out --num-nodes here: {error}") from error
    return _Cluster(client.CustomObjectsApi(api), client.CoreV1Api(api), cluster.namespace())


def _own(at: _Cluster) -> _Own:
    """What this pod says of itself."""
    pod = cluster.call(at.core.read_namespaced_pod, cluster.pod_name(), at.namespace, patience=60.0)
    main = next((each for each in pod.spec.containers if each.name == "main"), pod.spec.containers[0])
    variables = [each for each in main.env or [] if each.name.startswith("MLFLOW_")]
    owner = next((each for each in pod.metadata.owner_references or [] if each.kind == "Workflow"), None)
    return _Own(
        owner and {"apiVersion": owner.api_version, "kind": owner.kind, "name": owner.name, "uid": owner.uid},
        main.image,
        at.core.api_client.sanitize_for_serialization(variables),
    )


def _create(at: _Cluster, job: TrainerV1alpha1TrainJob, patience: float, **options: Any) -> None:
    """Make a job; one of its name that is there already is ours."""
    from kubernetes.client.exceptions import ApiException

    create = at.jobs.create_namespaced_custom_object
    where = (GROUP, VERSION, at.namespace, PLURAL)
    try:
        cluster.call(create, *where, job.to_dict(), field_validation="Strict", patience=patience, **options)
    except ApiException as error:
        if error.status != 409:
            raise


def _get(at: _Cluster, name: str) -> dict[str, Any] | None:
    """The job; None if there is none of that name."""
    found = cluster.call(
        at.jobs.list_namespaced_custom_object,
        *(GROUP, VERSION, at.namespace, PLURAL),
        field_selector=f"metadata.name={name}",
        patience=_OUTAGE,
    )
    return next(iter(found["items"]), None)


def _await_deletion(at: _Cluster, name: str) -> bool:
    """Whether no job has the name; waits for one that is being deleted, whose pods may still write."""
    end = time.monotonic() + _DELETION
    while (job := _get(at, name)) and job["metadata"].get("deletionTimestamp"):
        if time.monotonic() > end:
            raise AdfmError(
                f"the TrainJob {name} is being deleted for {_DELETION / 60:.0f} minutes; see what holds it: "
                f"kubectl -n {at.namespace} describe trainjob {name}"
            )
        time.sleep(_POLL)
    return job is None


def _delete(at: _Cluster, name: str) -> bool:
    """Delete a job, its pods first; whether there was one."""
    from kubernetes.client.exceptions import ApiException

    try:
        cluster.call(
            at.jobs.delete_namespaced_custom_object,
            *(GROUP, VERSION, at.namespace, PLURAL, name),
            # A next job of the same name must not find the JobSet of this one: Trainer would take it for its own.
            propagation_policy="Foreground",
            patience=60.0,
        )
    except ApiException as error:
        if error.status != 404:
            raise
        return False
    return True


def _refusal(error: ApiException, what: str) -> AdfmError:
    """The API's error as words, with what to do."""
    message = cluster.reason(error)
    if error.status == 404 and not message.startswith("pods "):
        remedy = f"the cluster does not know TrainJobs; {_INSTALL}"
    elif error.status == 400 and "unknown field" in message:
        remedy = f"Kubeflow Trainer is older than 2.2 or of another API; {_INSTALL}"
    elif "clustertrainingruntime" in message.lower():
        remedy = f"there is no runtime {RUNTIME}; {_INSTALL}"
    elif "webhook" in message and error.status >= 500:
        remedy = "see whether the controller of Kubeflow Trainer runs (kubectl get pods -A | grep trainer)"
    elif error.status == 403 and " cannot " in message:
        remedy = "apply deploy/runs/rbac.yaml, and submit with --service-account adfm-pipeline"
    else:
        remedy = f"see {_DOCS}"
    return AdfmError(f"the cluster refuses {what}: {error.status} {message}; {remedy}.")


def _follow(at: _Cluster, log: _Log, within: float = math.inf) -> tuple[str, str]:
    """Print a job's log until it has ended; how, and why.

    Without an end where it cannot start: for `_HOPELESS` seconds because of its image, configuration or rights, or for
    `within` seconds whatever it does. One that waits for a machine or in a queue may.

    Raises:
        AdfmError: Somebody deleted the job.
        ApiException: The API refuses, or is away for longer than `_OUTAGE`.
    """
    begun = started = hopeful = time.monotonic()
    explained = ""
    while True:
        job = _get(at, log.name)
        if job is None:
            raise AdfmError(f"the TrainJob {log.name} was deleted while it was under way; the run has to be repeated.")
        machines = _pods(at, log.name)
        log.show(machines)
        for condition in job.get("status", {}).get("conditions", []):
            if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
                return str(condition["type"]), str(condition.get("message", ""))
        now = time.monotonic()
        why, hopeless = _waiting(at, job, machines)
        started, hopeful = now if not why else started, now if not hopeless else hopeful
        if now - hopeful > _HOPELESS or now - begun > within:
            return "", why
        if why and why != explained and now - started > _QUIET:
            print(f"the TrainJob {log.name} has not started yet: {why}", flush=True)
            explained = why
        time.sleep(_POLL)


def _pods(at: _Cluster, name: str) -> list[Any]:
    """The pods of a job, oldest first."""
    found = cluster.call(
        at.core.list_namespaced_pod,
        at.namespace,
        label_selector=f"jobset.sigs.k8s.io/jobset-name={name}",
        patience=_OUTAGE,
    ).items
    return sorted(found, key=lambda pod: pod.metadata.creation_timestamp)


def _waiting(at: _Cluster, job: dict[str, Any], machines: list[Any]) -> tuple[str, bool]:
    """Why not all pods of a job run, if so; whether that does not pass by waiting."""
    if job["spec"].get("suspend"):
        return "it is suspended; a queue such as Kueue has not admitted it", False
    name = job["metadata"]["name"]
    if not machines:
        # Of its Job, or of TrainJob and JobSet, which share a name.
        warning = _warning(at, f"{name}-{CONTAINER}-0") or _warning(at, name)
        return warning or "it has no pods; see whether the controllers of Trainer and JobSet run", True
    for pod in machines:
        if pod.status.phase != "Pending":
            continue
        for condition in pod.status.conditions or []:
            if condition.type == "PodScheduled" and condition.status == "False":
                return f"{pod.metadata.name}: {condition.message}", False
        for status in _containers(pod):
            waiting = status.state.waiting
            if waiting and waiting.reason not in ("ContainerCreating", "PodInitializing"):
                return f"{pod.metadata.name}: {waiting.reason}: {waiting.message}", True
        # A large image may be under way for long, a volume that cannot be mounted leaves a warning.
        return f"{pod.metadata.name}: {_warning(at, pod.metadata.name) or 'its container is being made'}", False
    return "", False


def _containers(pod: Any) -> Iterable[Any]:
    return pod.status.container_statuses or []


def _warning(at: _Cluster, name: str) -> str:
    """The last warning about an object; empty if there is none or events may not be read."""
    from kubernetes.client.exceptions import ApiException

    selector = f"involvedObject.name={name},type=Warning"
    try:
        events = cluster.call(at.core.list_namespaced_event, at.namespace, field_selector=selector).items
    except (ApiException, AdfmError):
        return ""
    events.sort(key=lambda event: str(event.last_timestamp or event.metadata.creation_timestamp))
    return f"{events[-1].reason}: {events[-1].message}" if events else ""


@dataclass
class _Log:
    """The log of a job's first machine as it is printed, and the ends of the others.

    Args:
        at: The cluster.
        name: Of the job.
        quiet: Its lines are kept and not printed.
        tail: Its last lines.
        error: The last error that `adfm train` printed.
        last_end: The last failure of a container, with machine, exit code and reason.
        last: Time of the last line of a pod, as Kubernetes wrote it.
        read: When the log of a pod was read last, in seconds of this machine.
        unread: Why the log of a pod could not be read the last time.
        ended: Pods and restarts whose failure was printed.
    """

    at: _Cluster
    name: str
    quiet: bool = False
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=_TAIL))
    error: str = ""
    last_end: str = ""
    last: dict[str, tuple[datetime, str]] = field(default_factory=dict)
    read: dict[str, float] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    ended: set[tuple[str, int]] = field(default_factory=set)

    def show(self, machines: list[Any]) -> None:
        """Print what is new in the logs of the pods."""
        for pod in machines:
            for status in _containers(pod):
                if status.name == CONTAINER:
                    self._show(pod, status)

    def _show(self, pod: Any, status: Any) -> None:
        first = pod.metadata.labels.get("batch.kubernetes.io/job-completion-index") == "0"
        restarts, name = status.restart_count, pod.metadata.name
        if status.last_state and status.last_state.terminated:
            self._end(name, status.last_state.terminated, restarts - 1, first, previous=True)
        if first and (status.state.running or status.state.terminated):
            self._print(name)
        if status.state.terminated:
            self._end(name, status.state.terminated, restarts, first, previous=False)

    def _end(self, pod: str, ended: Any, restarts: int, first: bool, *, previous: bool) -> None:
        """Print how a container failed, once, and the end of its log."""
        if ended.exit_code == 0 or (pod, restarts) in self.ended:
            return
        self.ended.add((pod, restarts))
        self._print(pod, previous=previous, **({} if first else {"tail_lines": _TAIL}))
        self.last_end = f"{pod} ended with status {ended.exit_code} ({ended.reason})"
        self._write(f"{self.last_end}, restart {restarts}" if restarts else self.last_end)

    def _print(self, pod: str, **options: Any) -> None:
        from kubernetes.client.exceptions import ApiException

        now = time.monotonic()
        if pod in self.read:  # a minute more than has passed; what was printed is told by its time
            options["since_seconds"] = math.ceil(now - self.read[pod]) + 60
        try:
            lines = cluster.call(self._read, pod, patience=0.0 if pod in self.unread else _LOG, **options)
        except ApiException as error:
            if error.status in (400, 404):  # it has not started yet, or has gone already; the job's conditions decide
                return
            if error.status == 403:
                raise
            self._miss(pod, f"{error.status} {cluster.reason(error)}")
            return
        except Unreachable as error:
            self._miss(pod, str(error))
            return
        self.unread.pop(pod, None)
        self.read[pod] = now
        for line in lines:
            stamp, _, text = line.partition(" ")
            try:
                when = (datetime.fromisoformat(stamp), stamp)  # its microseconds, and what is finer
            except ValueError:  # the empty rest after the last line
                continue
            if pod not in self.last or when > self.last[pod]:
                self.last[pod] = when
                self._write(text)

    def _read(self, pod: str, **options: Any) -> list[str]:
        response = self.at.core.read_namespaced_pod_log(
            pod,
            self.at.namespace,
            container=CONTAINER,
            timestamps=True,
            _preload_content=False,  # the client decodes strictly, and takes a line of JSON for its answer
            **options,
        )
        # Without `_preload_content` the connection may break here, and not in the call.
        text: str = response.data.decode("utf-8", errors="replace")
        return text.split("\n")

    def _miss(self, pod: str, why: str) -> None:
        """Report once that a log cannot be read; a lost machine's pod stays for a while, and training continues."""
        if pod not in self.unread:
            print(f"the log of {pod} cannot be read now: {why}", flush=True)
        self.unread[pod] = why

    def _write(self, text: str) -> None:
        self.tail.append(text)
        self.error = text.partition(_ERROR)[2] or self.error
        if not self.quiet:
            print(text, flush=True)
