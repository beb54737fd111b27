"""The manifests of TrainJobs of Kubeflow Trainer: one that trains on several machines, a small one for their volume.

`adfm.kubeflow.nodes` sends them to the cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adfm.kubeflow import resources
from adfm.kubeflow.cluster import GROUP, RUNTIME, VERSION
from adfm.process import environment
from adfm.training.launch import command

if TYPE_CHECKING:
    from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob

CONTAINER = "node"
"""Name of the replicated job, and of its container, in Kubeflow Trainer's Torch runtime."""

USER = 1000
"""User and group of the containers, here and in the pipeline's pods; of the files on the volume too."""

_VOLUME_NEEDS = resources.Needs("500m", "1Gi", 0.5)  # of the pod that tries the volume


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
    owner: dict[str, Any] | None = None,
    variables: Sequence[dict[str, Any]] = (),
) -> TrainerV1alpha1TrainJob:
    """The TrainJob that trains on the data in the folder `work` of a shared volume.

    A machine gets what `adfm.kubeflow.resources` has for the task `train`, and is stopped after its hours.

    Args:
        name: Of the job.
        work: Folder with `shards`, `sft` and `params.yaml`; `trained` is written beside them.
        claim: The volume's claim, mounted at the folder above `work`.
        image: Of the containers.
        nodes: Machines.
        gpus: GPUs of each; 0: one process on its CPUs.
        gpu_type: Resource that stands for a GPU.
        node_selector: Labels of the machines.
        tolerations: Of their taints.
        owner: Reference to the object with which the job is deleted.
        variables: Environment variables besides those of the secrets, as a pod has them.
    """
    # By force: a machine that is started again after the training has ended must not fail for the model that it made.
    started = [*command(work / "shards", work / "sft", work / "trained", work / "params.yaml"), "--force"]
    job = _job(name, resources.NEEDS["train"], claim, work.parent, image, ["torchrun", "-m", *started], owner)
    trainer, pod = job["spec"]["trainer"], _pod(job)
    trainer |= {"numNodes": nodes, "numProcPerNode": max(gpus, 1)}
    trainer["env"] = [
        {"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": key, "optional": True}}}
        for secret, keys in resources.SECRETS.items()
        for key, variable in keys.items()
    ] + list(variables)
    if gpus:
        for amounts in trainer["resourcesPerNode"].values():
            amounts[gpu_type] = str(gpus)
    pod |= {"nodeSelector": node_selector, "tolerations": tolerations}
    pod["volumes"] += [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": resources.SHARED_MEMORY}},
        {"name": "ca", "configMap": {"name": environment.CA, "optional": True}},
    ]
    pod["containers"][0]["volumeMounts"] += [
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        {"name": "ca", "mountPath": environment.CA_FOLDER, "readOnly": True},
    ]
    return _model(job)


def volume_job(
    name: str, work: Path, claim: str, image: str, owner: dict[str, Any] | None = None
) -> TrainerV1alpha1TrainJob:
    """The TrainJob of one small pod that makes the folder `work` on the volume, by `adfm.kubeflow.nodes.prepare`.

    Pods of a TrainJob have an `fsGroup`, which Kubernetes applies to the volume; those of KFP cannot have one.
    """
    code = "import sys; from adfm.kubeflow import nodes; nodes.prepare(sys.argv[1])"
    return _model(_job(name, _VOLUME_NEEDS, claim, work.parent, image, ["python", "-c", code, str(work)], owner))


def _job(
    name: str,
    needs: resources.Needs,
    claim: str,
    mount: Path,
    image: str,
    command: list[str],
    owner: dict[str, Any] | None,
) -> dict[str, Any]:
    """A TrainJob of one machine with the volume, as Pod Security `restricted` admits it."""
    amounts = {"cpu": needs.cpu, "memory": needs.memory}
    container = {
        "name": CONTAINER,
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "workspace", "mountPath": str(mount)}],
    }
    pod = {
        "containers": [container],
        "imagePullSecrets": [{"name": resources.PULL_SECRET}],
        "securityContext": {
            **{"runAsUser": USER, "runAsGroup": USER, "runAsNonRoot": True},
            # On the first mount only: a volume of many files would be walked through before every start.
            **{"fsGroup": USER, "fsGroupChangePolicy": "OnRootMismatch"},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumes": [{"name": "workspace", "persistentVolumeClaim": {"claimName": claim}}],
    }
    # Istio's proxy, which a namespace of Kubeflow's profiles adds, would outlive the training and stand between nodes.
    template = {"metadata": {"labels": {"sidecar.istio.io/inject": "false"}}, "spec": pod}
    patch = {"name": CONTAINER, "template": {"spec": {"template": template}}}
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {
            "name": name,
            "labels": {"app.kubernetes.io/part-of": "adfm"},
            **({"ownerReferences": [owner]} if owner else {}),
        },
        "spec": {
            "activeDeadlineSeconds": round(needs.hours * 3600),
            "runtimeRef": {"name": RUNTIME},
            "trainer": {
                "image": image,
                "command": command,
                "numNodes": 1,
                "resourcesPerNode": {"limits": {**amounts}, "requests": {**amounts}},
            },
            "runtimePatches": [
                {
                    "manager": "adfm.io/pipeline",
                    "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [patch]}}},
                }
            ],
        },
    }


def _pod(job: dict[str, Any]) -> dict[str, Any]:
    (replicated,) = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod: dict[str, Any] = replicated["template"]["spec"]["template"]["spec"]
    return pod


def _model(job: dict[str, Any]) -> TrainerV1alpha1TrainJob:
    from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob

    made = TrainerV1alpha1TrainJob.from_dict(job)
    assert made is not None
    return made
