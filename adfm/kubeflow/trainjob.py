"""Manifests of Kubeflow Trainer's TrainJobs: one trains on several machines, a small one tries their volume."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adfm.kubeflow import resources
from adfm.kubeflow.cluster import CONTAINER, GROUP, RUNTIME, VERSION
from adfm.kubeflow.resources import Resources
from adfm.process import environment
from adfm.training.launch import command

Json = dict[str, Any]


class Machines(NamedTuple):
    """The machines of a TrainJob."""

    nodes: int
    gpus: int  # of each; 0: one process on its CPUs
    gpu_type: str  # resource that stands for a GPU
    node_selector: dict[str, str]  # labels of the machines
    tolerations: list[dict[str, Any]]  # of their taints


def train_job(
    name: str, work: Path, claim: str, image: str, machines: Machines, owner: Json | None, variables: Sequence[Json]
) -> Json:
    """Return the TrainJob that trains on the data in the folder `work` of a shared volume.

    A machine gets what `adfm.kubeflow.resources` has for the task `train`, and is stopped after its hours.

    Args:
        name: Of the job.
        work: Folder with `shards`, `sft` and `params.yaml`; `trained` is written beside them.
        claim: The volume's claim, mounted at the folder above `work`.
        image: Of the containers.
        machines: On which it trains.
        owner: Reference to the object with which the job is deleted.
        variables: Environment variables besides those of the secrets, as a pod has them.
    """
    # By force: a machine that is started again after the training has ended must not fail for the model that it made.
    train = [*command(work / "shards", work / "sft", work / "trained", work / "params.yaml"), "--force"]
    entry = resources.RESOURCES[resources.MACHINE]
    job, pod = _job(name, entry, claim, work.parent, image, ["torchrun", "-m", *train], owner)
    trainer = job["spec"]["trainer"]
    trainer |= {"numNodes": machines.nodes, "numProcPerNode": max(machines.gpus, 1)}
    trainer["env"] = [
        {"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": key, "optional": True}}}
        for secret, keys in resources.SECRETS.items()
        for key, variable in keys.items()
    ] + list(variables)
    if machines.gpus:
        for amounts in trainer["resourcesPerNode"].values():
            amounts[machines.gpu_type] = str(machines.gpus)
    pod |= {"nodeSelector": machines.node_selector, "tolerations": machines.tolerations}
    pod["volumes"] += [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": resources.SHARED_MEMORY}},
        {"name": "ca", "configMap": {"name": environment.CA, "optional": True}},
    ]
    pod["containers"][0]["volumeMounts"] += [
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        {"name": "ca", "mountPath": environment.CA_FOLDER, "readOnly": True},
    ]
    return job


def volume_job(name: str, work: Path, claim: str, image: str, owner: Json | None) -> Json:
    """Return the TrainJob of a small pod in which `adfm.kubeflow.volume.prepare` makes the folder `work`."""
    code = "import sys; from adfm.kubeflow import volume; volume.prepare(sys.argv[1])"
    prepare = ["python", "-c", code, str(work)]
    return _job(name, resources.VOLUME_CHECK, claim, work.parent, image, prepare, owner)[0]


def _job(
    name: str, entry: Resources, claim: str, mount: Path, image: str, command: list[str], owner: Json | None
) -> tuple[Json, Json]:
    """Return a TrainJob of one machine with the volume, as Pod Security `restricted` admits it; and its pod's spec."""
    amounts = {"cpu": entry.cpu, "memory": entry.memory}
    container = {
        "name": CONTAINER,
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "workspace", "mountPath": str(mount)}],
    }
    pod: Json = {
        "containers": [container],
        "imagePullSecrets": [{"name": resources.PULL_SECRET}],
        "securityContext": {
            **{"runAsUser": resources.USER, "runAsGroup": resources.USER, "runAsNonRoot": True},
            # On the first mount only: a volume of many files would be walked through before every start.
            **{"fsGroup": resources.USER, "fsGroupChangePolicy": "OnRootMismatch"},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumes": [{"name": "workspace", "persistentVolumeClaim": {"claimName": claim}}],
    }
    # Istio's proxy, which a namespace of Kubeflow's profiles adds, would outlive the training and stand between nodes.
    template = {"metadata": {"labels": {"sidecar.istio.io/inject": "false"}}, "spec": pod}
    replicated = {"name": CONTAINER, "template": {"spec": {"template": template}}}
    patch = {"template": {"spec": {"replicatedJobs": [replicated]}}}
    metadata = {"name": name, "labels": {"app.kubernetes.io/part-of": "adfm"}}
    job = {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": metadata | ({"ownerReferences": [owner]} if owner else {}),
        "spec": {
            "activeDeadlineSeconds": round(entry.hours * 3600),
            "runtimeRef": {"name": RUNTIME},
            "trainer": {
                "image": image,
                "command": command,
                "numNodes": 1,
                "resourcesPerNode": {"limits": {**amounts}, "requests": {**amounts}},
            },
            "runtimePatches": [{"manager": "adfm.io/pipeline", "trainingRuntimeSpec": patch}],
        },
    }
    return job, pod
