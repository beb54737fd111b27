"""Training on several machines: a TrainJob of Kubeflow Trainer, whose Torch runtime starts `adfm train` on each."""

import errno
import re
import shutil
from pathlib import Path
from typing import Any

from kubernetes.client.exceptions import ApiException

from adfm import tracking
from adfm.errors import AdfmError
from adfm.kubeflow import cluster, jobs, resources, volume
from adfm.kubeflow.joblog import JobLog
from adfm.kubeflow.jobs import TrainJobs, refusal
from adfm.kubeflow.trainjob import Json, Machines, train_job
from adfm.models import hardware
from adfm.params import Params, Train
from adfm.process.pod import inside


def job_name(run: str) -> str:
    """Return the name of the TrainJob of a pipeline's run."""
    return f"adfm-{re.sub('[^a-z0-9]+', '-', run.lower())[:18].strip('-')}"


def check(train: Train, *, run: str, nodes: int, gpus: int, gpu_type: str) -> None:
    """Check that the cluster can train on several machines, and make the run's folder on the volume.

    Raises:
        AdfmError: The batch does not divide; there is no Kubeflow Trainer, an older one or no runtime; the account may
            not make TrainJobs; the claim is missing, cannot be shared or is not bound; the volume cannot be written.
    """
    hardware.batch_split(train, nodes * max(gpus, 1))
    trainjobs = TrainJobs()
    claim, name = resources.WORKSPACE_CLAIM, job_name(run)
    work = Path(resources.WORKSPACE) / name
    try:
        owner, image, variables = _own(trainjobs)
        machines = Machines(nodes, gpus, gpu_type, {}, [])
        job = train_job(name, work, claim, image, machines, owner, variables)
        # A dry run has to pass the schema, Trainer's webhooks and the account's rights.
        trainjobs.create(job, dry_run="All", patience=60.0)
        free = volume.check(trainjobs, _volume_job(run), work, claim, image, owner)
    except ApiException as error:
        raise refusal(error, name) from error
    print(f"nodes     TrainJob accepted; volume {claim} is writable, {free / 2**30:.1f} GiB free")


def on_nodes(
    shards: Path,
    model: Path,
    out: Path,
    params: Params,
    machines: Machines,
    *,
    run: str,
    workspace: Path,
    claim: str,
    image: str,
) -> None:
    """Train on several machines by a TrainJob: start it or find it, follow its log, and copy its adapter.

    Args:
        shards: Folder of shards.
        model: Folder that cold start wrote.
        out: Folder to write.
        params: All settings.
        machines: On which it trains.
        run: Id of the pipeline's run; the job's name has its beginning.
        workspace: Where the shared volume is mounted, here and there.
        claim: The volume's claim.
        image: Of the containers.

    Raises:
        AdfmError: The batch does not divide, there is no cluster or no Kubeflow Trainer, the volume cannot be written,
            or the job failed or could not start.
    """
    if not workspace.is_dir():
        raise AdfmError(f"{workspace} is not a folder; mount the volume {claim} there (deploy/runs/workspace.yaml).")
    hardware.batch_split(params.train, machines.nodes * max(machines.gpus, 1))
    trainjobs, name = TrainJobs(), job_name(run)
    work = workspace / name
    log = JobLog(trainjobs.core, trainjobs.namespace, name)
    try:
        if trainjobs.await_deletion(name):  # a task that is started again follows the job that is under way
            _copy_inputs(shards, model, work, params, claim)
            owner, _, variables = _own(trainjobs)
            job = train_job(name, work, claim, image, machines, owner, variables)
            trainjobs.create(job, patience=jobs.OUTAGE)
        ended, why = trainjobs.follow(log)
        has_model = ended == "Complete" and (work / "trained").is_dir()
        if not has_model:
            trainjobs.delete(name)  # so that the next try resumes from its last checkpoint on the volume
    except ApiException as error:
        raise refusal(error, name) from error
    if not ended:
        minutes = f"{jobs.HOPELESS / 60:.0f} minutes"
        raise AdfmError(f"the TrainJob {name} cannot start, and is given up after {minutes}: {why}.")
    if ended != "Complete":
        reasons = "; ".join(reason for reason in (log.error or why, log.last_end) if reason)
        raise AdfmError(f"the TrainJob {name} ended as {ended}: {reasons}; its log is above.")
    if not has_model:
        raise AdfmError(f"the TrainJob {name} ended as Complete without a model in {work / 'trained'}; see its log.")
    shutil.copytree(work / "trained", out)
    end(run)  # after the copy: that the API is away for a moment must not cost the model
    shutil.rmtree(work, ignore_errors=True)  # where the volume's root is not ours, the empty folder stays


def end(run: str) -> None:
    """Delete the TrainJobs of a run that has ended, so that they do not hold GPUs; never raise."""
    if not inside():
        return
    try:
        trainjobs = TrainJobs()
        for name in (job_name(run), _volume_job(run)):
            if trainjobs.delete(name):
                print(f"the TrainJob {name} of this run was deleted")
    except ApiException as error:
        if error.status != 403:  # without the right to delete TrainJobs there is none to make them
            print(f"the TrainJobs of this run could not be deleted: {error.status} {cluster.message(error)}")
    except AdfmError as error:
        print(f"the TrainJobs of this run could not be deleted: {error}")


def _volume_job(run: str) -> str:
    return f"{job_name(run)}-volume"


def _copy_inputs(shards: Path, model: Path, work: Path, params: Params, claim: str) -> None:
    try:
        for source, folder in ((shards, "shards"), (model, "sft")):
            shutil.copytree(source, work / folder, dirs_exist_ok=True)
        (work / "params.yaml").write_text(tracking.settings(params), encoding="utf-8")
    except OSError as error:
        first: Any = error.args[0][0][2] if isinstance(error, shutil.Error) else error
        if isinstance(first, OSError) and first.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = f"remove folders {work.parent}/adfm-* of runs that have ended"
            raise AdfmError(f"the volume {claim} is full: {first}; {remedy}.") from error
        raise volume.not_writable(claim, first) from error


def _own(trainjobs: TrainJobs) -> tuple[Json | None, str, list[Json]]:
    """Return what a TrainJob takes over from this pod: the run's Workflow as its owner, image, MLflow's variables."""
    pod = cluster.call(trainjobs.core.read_namespaced_pod, cluster.pod_name(), trainjobs.namespace, patience=60.0)
    main = next((each for each in pod.spec.containers if each.name == "main"), pod.spec.containers[0])
    # The job is deleted with the Workflow; by KFP's MLflow plug-in, the machines use the task's server and run.
    owner = next((each for each in pod.metadata.owner_references or [] if each.kind == "Workflow"), None)
    variables = [each for each in main.env or [] if each.name.startswith("MLFLOW_")]
    return (
        owner and {"apiVersion": owner.api_version, "kind": owner.kind, "name": owner.name, "uid": owner.uid},
        main.image,
        trainjobs.core.api_client.sanitize_for_serialization(variables),
    )
