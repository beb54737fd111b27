"""Access to the TrainJobs of a namespace: create, find, follow and delete them."""

import math
import time
from typing import Any

from kubernetes import client
from kubernetes.client.exceptions import ApiException

from adfm.errors import AdfmError
from adfm.kubeflow import cluster
from adfm.kubeflow.cluster import CONTAINER, GROUP, PLURAL, RUNTIME, VERSION
from adfm.kubeflow.joblog import JobLog

DOCS = "docs/kubernetes.md (Several machines)"
OUTAGE = 900.0  # seconds for which the Kubernetes API may be away while a job is followed
HOPELESS = 900.0  # seconds after which a job is given up whose image or configuration cannot be used
_POLL = 10.0  # seconds between two requests for the state of a job
_QUIET = 180.0  # seconds after which a job that has not started is explained
_DELETION = 600.0  # seconds for which a job of the same name may be on its way out


class TrainJobs:
    """The TrainJobs of this pod's namespace; raises `AdfmError` outside a pod with a service account."""

    def __init__(self) -> None:
        try:
            api = cluster.api()
        except AdfmError as error:
            raise AdfmError(f"a TrainJob needs a cluster; leave out --num-nodes here: {error}") from error
        self.core = client.CoreV1Api(api)
        self.namespace = cluster.namespace()
        self._jobs = client.CustomObjectsApi(api)
        self._place = (GROUP, VERSION, self.namespace, PLURAL)

    def create(self, job: dict[str, Any], patience: float, **options: Any) -> None:
        """Create a job; one of its name that exists already is that of an earlier try."""
        create = self._jobs.create_namespaced_custom_object
        try:
            cluster.call(create, *self._place, job, field_validation="Strict", patience=patience, **options)
        except ApiException as error:
            if error.status != 409:
                raise

    def delete(self, name: str) -> bool:
        """Delete a job, its pods first; return whether it existed."""
        delete = self._jobs.delete_namespaced_custom_object
        try:
            # A next job of the same name must not meet the JobSet of this one: Trainer would take it for its own.
            cluster.call(delete, *self._place, name, propagation_policy="Foreground", patience=60.0)
        except ApiException as error:
            if error.status != 404:
                raise
            return False
        return True

    def await_deletion(self, name: str) -> bool:
        """Wait up to ten minutes for the deletion of a job, whose pods may still write; return whether none is left."""
        end = time.monotonic() + _DELETION
        while (job := self._get(name)) and job["metadata"].get("deletionTimestamp"):
            if time.monotonic() > end:
                raise AdfmError(
                    f"the TrainJob {name} is being deleted for {_DELETION / 60:.0f} minutes; see what holds it: "
                    f"kubectl -n {self.namespace} describe trainjob {name}"
                )
            time.sleep(_POLL)
        return job is None

    def follow(self, log: JobLog, within: float = math.inf) -> tuple[str, str]:
        """Print a job's log until the job ends.

        Args:
            log: Of the job.
            within: Seconds after which it is given up, whatever it does. Without them, only one that cannot start
                because of its image, configuration or rights is given up, after `HOPELESS` seconds.

        Returns:
            `Complete` or `Failed`, "" for a job that was given up; and why.

        Raises:
            AdfmError: Somebody deleted the job.
            ApiException: The API refuses, or is away for longer than `OUTAGE`.
        """
        begun = started = hopeful = time.monotonic()
        explained = ""
        while True:
            job = self._get(log.name)
            if job is None:
                raise AdfmError(f"the TrainJob {log.name} was deleted while it was under way; repeat the run.")
            pods = self._pods(log.name)
            log.show(pods)
            for condition in job.get("status", {}).get("conditions", []):
                if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
                    return str(condition["type"]), str(condition.get("message", ""))
            now = time.monotonic()
            why, hopeless = self._waiting(job, pods)
            started, hopeful = now if not why else started, now if not hopeless else hopeful
            if now - hopeful > HOPELESS or now - begun > within:
                return "", why
            if why and why != explained and now - started > _QUIET:
                print(f"the TrainJob {log.name} has not started yet: {why}", flush=True)
                explained = why
            time.sleep(_POLL)

    def _get(self, name: str) -> dict[str, Any] | None:
        find = self._jobs.list_namespaced_custom_object
        jobs = cluster.call(find, *self._place, field_selector=f"metadata.name={name}", patience=OUTAGE)
        return next(iter(jobs["items"]), None)

    def _pods(self, name: str) -> list[Any]:
        selector = f"jobset.sigs.k8s.io/jobset-name={name}"
        pods = cluster.call(self.core.list_namespaced_pod, self.namespace, label_selector=selector, patience=OUTAGE)
        return sorted(pods.items, key=lambda pod: pod.metadata.creation_timestamp)  # oldest first

    def _waiting(self, job: dict[str, Any], pods: list[Any]) -> tuple[str, bool]:
        """Return why not all pods of a job run, "" if they do; and whether waiting does not help."""
        if job["spec"].get("suspend"):
            return "it is suspended; a queue such as Kueue has not admitted it", False
        name = job["metadata"]["name"]
        if not pods:
            # Of its Job, or of TrainJob and JobSet, which share a name.
            warning = self._warning(f"{name}-{CONTAINER}-0") or self._warning(name)
            return warning or "it has no pods; see whether the controllers of Trainer and JobSet run", True
        for pod in (pod for pod in pods if pod.status.phase == "Pending"):
            for condition in pod.status.conditions or []:
                if condition.type == "PodScheduled" and condition.status == "False":
                    return f"{pod.metadata.name}: {condition.message}", False
            for status in pod.status.container_statuses or []:
                waiting = status.state.waiting
                if waiting and waiting.reason not in ("ContainerCreating", "PodInitializing"):
                    return f"{pod.metadata.name}: {waiting.reason}: {waiting.message}", True
            # A large image may be under way for long, a volume that cannot be mounted leaves a warning.
            return f"{pod.metadata.name}: {self._warning(pod.metadata.name) or 'its container is being made'}", False
        return "", False

    def _warning(self, name: str) -> str:
        """Return the last warning about an object; "" without one, or where events may not be read."""
        selector = f"involvedObject.name={name},type=Warning"
        try:
            events = cluster.call(self.core.list_namespaced_event, self.namespace, field_selector=selector).items
        except (ApiException, AdfmError):
            return ""
        events.sort(key=lambda event: str(event.last_timestamp or event.metadata.creation_timestamp))
        return f"{events[-1].reason}: {events[-1].message}" if events else ""


def refusal(error: ApiException, name: str) -> AdfmError:
    """Return the API's error about a TrainJob in words, with what to do."""
    message = cluster.message(error)
    install = f"install Kubeflow Trainer 2.2 or newer, with its runtimes: {DOCS}"
    if error.status == 404 and not message.startswith("pods "):
        remedy = f"the cluster does not know TrainJobs; {install}"
    elif error.status == 400 and "unknown field" in message:
        remedy = f"Kubeflow Trainer is older than 2.2 or of another API; {install}"
    elif "clustertrainingruntime" in message.lower():
        remedy = f"there is no runtime {RUNTIME}; {install}"
    elif "webhook" in message and error.status >= 500:
        remedy = "see whether the controller of Kubeflow Trainer runs (kubectl get pods -A | grep trainer)"
    elif error.status == 403 and " cannot " in message:
        remedy = "apply deploy/runs/rbac.yaml, and submit with --service-account adfm-pipeline"
    else:
        remedy = f"see {DOCS}"
    return AdfmError(f"the cluster refuses the TrainJob {name}: {error.status} {message}; {remedy}.")
