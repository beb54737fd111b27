"""The volume that the machines of a TrainJob share: its claim, and whether it can be written."""

import shutil
from pathlib import Path
from typing import Any

from kubernetes.client.exceptions import ApiException

from adfm.errors import AdfmError
from adfm.kubeflow import cluster, resources
from adfm.kubeflow.joblog import JobLog
from adfm.kubeflow.jobs import DOCS, TrainJobs
from adfm.kubeflow.trainjob import volume_job

_PROBE = 600.0  # seconds in which the volume has to be there; the task `check` has half an hour


def prepare(work: str) -> None:
    """Make the folder of a run on the volume, and print `free BYTES`, or `refused` and why, in `volume_job`'s pod."""
    folder = Path(work)
    try:
        folder.mkdir(exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
        print("free", shutil.disk_usage(folder).free)
    except OSError as error:
        print("refused", error)  # and no failure, after which Kubernetes would start the pod again


def check(jobs: TrainJobs, name: str, work: Path, claim: str, image: str, owner: dict[str, Any] | None) -> int:
    """Check by a TrainJob of that name that a run can use the volume, make its folder there, and return its free bytes.

    Raises:
        AdfmError: The claim is missing, cannot be shared or is not bound, or the volume cannot be written.
        ApiException: The API refuses the TrainJob.
    """
    _check_claim(jobs, claim)
    # Tried by a pod of its own: a volume that this pod mounted would keep it waiting for ever where the claim is
    # missing, and Kubernetes applies `fsGroup` to the volume, which pods of KFP cannot have.
    if jobs.await_deletion(name):
        jobs.create(volume_job(name, work, claim, image, owner), patience=60.0)
    verdict, _, rest = _answer(jobs, name, claim).partition(" ")
    if verdict != "free":
        raise not_writable(claim, rest)
    return int(rest)


def not_writable(claim: str, why: object) -> AdfmError:
    """Return the error of a volume that cannot be written."""
    return AdfmError(
        f"user and group {resources.USER} cannot write to the volume {claim}: {why}; its driver does not apply "
        f"fsGroup, so that its root folder has to be made writable for them once: {DOCS}."
    )


def _check_claim(jobs: TrainJobs, name: str) -> None:
    claim: Any = None
    try:
        read = jobs.core.read_namespaced_persistent_volume_claim
        claim = cluster.call(read, name, jobs.namespace, patience=60.0)
    except ApiException as error:
        if error.status == 403:
            print(f"nodes     the account may not read the claim {name} (deploy/runs/rbac.yaml); it is tried")
            return
        if error.status != 404:
            raise
    if problem := cluster.claim_problem(claim, name, jobs.namespace):
        raise AdfmError(problem)


def _answer(jobs: TrainJobs, name: str, claim: str) -> str:
    """Return the line that `prepare` printed in its pod; the job is deleted."""
    log = JobLog(jobs.core, jobs.namespace, name, quiet=True)
    try:
        ended, why = jobs.follow(log, within=_PROBE)
    finally:
        jobs.delete(name)
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
    cause = ": ".join(filter(None, (problem, log.last_end or why)))
    raise AdfmError(f"the volume {claim} could not be tried by the TrainJob {name}: {cause}; see {DOCS}.")
