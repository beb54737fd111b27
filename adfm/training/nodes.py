"""Training on several machines: a TrainJob of Kubeflow Trainer, whose Torch runtime starts `adfm train` on each."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adfm import pods, tracking
from adfm.errors import AdfmError
from adfm.models import hardware
from adfm.params import Params
from adfm.training.launch import command

if TYPE_CHECKING:
    from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
RUNTIME = "torch-distributed"
CONTAINER = "node"
"""Name of the replicated job, and of its container, in Kubeflow Trainer's Torch runtime."""

_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_SECRETS = ("adfm-mlflow", "adfm-hub")
_POLL = 10  # seconds


def train_job(
    name: str,
    work: Path,
    claim: str,
    image: str,
    *,
    nodes: int,
    gpus: int,
    gpu_type: str,
    node_selector: dict[str, str],
    tolerations: list[dict[str, Any]],
) -> TrainerV1alpha1TrainJob:
    """The TrainJob that trains what lies in the folder `work` of a shared volume.

    Args:
        name: Of the job.
        work: Folder with `shards`, `warmup` and `params.yaml`; `trained` is written beside them.
        claim: The volume's claim, mounted at the folder above `work`.
        image: Of the containers.
        nodes: Machines.
        gpus: GPUs of each; 0: one process on its CPUs.
        gpu_type: Resource that stands for a GPU.
        node_selector: Labels of the machines.
        tolerations: Of their taints.
    """
    from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob

    # By force: a machine that is started again after the training has ended must not fail for the model that it made.
    started = [*command(work / "shards", work / "warmup", work / "trained", work / "params.yaml"), "--force"]
    env = [
        {"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": key, "optional": True}}}
        for secret in _SECRETS
        for key, variable in pods.SECRETS[secret].items()
    ]
    resources = {"cpu": "8", "memory": "32Gi", **({gpu_type: str(gpus)} if gpus else {})}
    mounts = [{"name": "workspace", "mountPath": str(work.parent)}, {"name": "shared-memory", "mountPath": "/dev/shm"}]
    pod = {
        "containers": [{"name": CONTAINER, "volumeMounts": mounts}],
        "imagePullSecrets": [{"name": "adfm-registry"}],
        "nodeSelector": node_selector,
        "securityContext": {"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000, "runAsNonRoot": True},
        "tolerations": tolerations,
        "volumes": [
            {"name": "workspace", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}},
        ],
    }
    job = {"name": CONTAINER, "template": {"spec": {"template": {"spec": pod}}}}
    made = TrainerV1alpha1TrainJob.from_dict(
        {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": "TrainJob",
            "metadata": {"name": name, "labels": {"app.kubernetes.io/part-of": "adfm"}},
            "spec": {
                "runtimeRef": {"name": RUNTIME},
                "trainer": {
                    "image": image,
                    "command": ["torchrun", "-m", *started],
                    "env": env,
                    "numNodes": nodes,
                    "numProcPerNode": max(gpus, 1),
                    "resourcesPerNode": {"limits": resources, "requests": resources},
                },
                "runtimePatches": [
                    {
                        "manager": "adfm.io/pipeline",
                        "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}},
                    }
                ],
            },
        }
    )
    assert made is not None
    return made


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
    """Trains on several machines by a TrainJob: starts it or finds it, follows its log, and takes its adapter.

    A task that is started again follows the job that is under way. A job that failed is removed, for the next try.

    Args:
        shards: Folder of shards.
        model: Folder that warm-up wrote.
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
        AdfmError: The batch does not divide, there is no cluster or no Kubeflow Trainer, or the job failed.
    """
    from kubernetes.client.exceptions import ApiException

    if not workspace.is_dir():
        raise AdfmError(f"{workspace} is no folder; mount the volume {claim} there (deploy/runs/workspace.yaml).")
    hardware.shares(params.train, nodes * max(gpus, 1))
    jobs, pods, namespace = _cluster()
    name = f"adfm-{run[:18].lower().rstrip('-')}"
    work = workspace / name
    try:
        found = jobs.list_namespaced_custom_object(
            GROUP, VERSION, namespace, PLURAL, field_selector=f"metadata.name={name}"
        )
        if not found["items"]:
            for source, folder in ((shards, "shards"), (model, "warmup")):
                shutil.copytree(source, work / folder, dirs_exist_ok=True)
            (work / "params.yaml").write_text(tracking.settings(params), encoding="utf-8")
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
            )
            jobs.create_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, job.to_dict())
        ended, why = _follow(jobs, pods, namespace, name)
        jobs.delete_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, name)
    except ApiException as error:
        remedy = (
            "install Kubeflow Trainer 2.2 or newer" if error.status == 404 else "see the role in deploy/runs/rbac.yaml"
        )
        raise AdfmError(f"the cluster refuses the TrainJob {name}: {error.status} {error.reason}; {remedy}.") from error
    if ended != "Complete":
        raise AdfmError(f"the TrainJob {name} ended as {ended}: {why}; its log is above.")
    shutil.copytree(work / "trained", out)
    shutil.rmtree(work)


def _cluster() -> tuple[Any, Any, str]:
    from kubernetes import client, config

    try:
        config.load_incluster_config()
    except config.ConfigException as error:
        raise AdfmError("a TrainJob needs a cluster; leave out --num-nodes here.") from error
    return client.CustomObjectsApi(), client.CoreV1Api(), _NAMESPACE.read_text(encoding="utf-8").strip()


def _follow(jobs: Any, pods: Any, namespace: str, name: str) -> tuple[str, str]:
    """Prints the log of the first machine until the job has ended; how it ended, and why."""
    shown = 0
    while True:
        job = jobs.get_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, name)
        shown = _show_log(pods, namespace, name, shown)
        for condition in job.get("status", {}).get("conditions", []):
            if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
                _show_log(pods, namespace, name, shown)
                return str(condition["type"]), str(condition.get("message", ""))
        time.sleep(_POLL)


def _show_log(pods: Any, namespace: str, name: str, shown: int) -> int:
    """Prints the lines after the first `shown`; returns how many there are."""
    from kubernetes.client.exceptions import ApiException

    labels = f"jobset.sigs.k8s.io/jobset-name={name},batch.kubernetes.io/job-completion-index=0"
    try:
        found = pods.list_namespaced_pod(namespace, label_selector=labels).items
        if not found:
            return shown
        lines = pods.read_namespaced_pod_log(found[-1].metadata.name, namespace, container=CONTAINER).splitlines()
    except ApiException:  # it has not started yet, or has gone already; the job's conditions decide
        return shown
    for line in lines[shown:]:
        print(line)
    return max(shown, len(lines))


def check(params: Params, *, run: str, nodes: int, gpus: int, gpu_type: str) -> None:
    """Check that the cluster has what a TrainJob needs (stand-in)."""


def end(run: str) -> None:
    """Delete the TrainJob of a run that has ended (stand-in)."""
