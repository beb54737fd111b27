"""What a pod of a run or TrainJob gets: image, CPU, memory, GPU, time, retries, caching, secrets, volumes."""

# Components import this module where they are defined, so it imports nothing but the standard library.
import os
from typing import NamedTuple

from adfm.process.environment import CA, CA_FOLDER


class Resources(NamedTuple):
    """What a task gets."""

    cpu: str  # cores, requested and as a limit
    memory: str  # of the pod, requested and as a limit, as Kubernetes writes it
    hours: float  # after which a try is stopped
    # How often the cluster starts it again. A stock Kubeflow Pipelines 2.17 starts a task again whose pod was lost, and
    # not one that failed (its Argo has `templateDefaults.retryStrategy` with `OnError`); without that setting it is the
    # other way round. Stages retry what may work in a minute themselves.
    tries: int = 0
    cached: bool = False  # the result of the same inputs is used again
    gpu: bool = False  # it runs in the image for GPUs and gets those of the run, with shared memory
    signs: bool = False  # the private key of `SIGNING` is mounted
    workspace: bool = False  # the volume of `WORKSPACE` is mounted


RESOURCES = {
    "check": Resources("1", "4Gi", 0.5, tries=2),
    "fetch": Resources("2", "4Gi", 6, tries=2, cached=True),
    "inspect-part": Resources("4", "8Gi", 6, tries=1, cached=True),
    # Not again after a failure: data that are not fit to train on are not fit the next time either.
    "convert": Resources("4", "8Gi", 8, cached=True),
    "convert-parts": Resources("4", "8Gi", 8, cached=True),
    "sft": Resources("4", "16Gi", 6, tries=1, gpu=True),
    "train": Resources("8", "32Gi", 78, tries=1, gpu=True),  # the cold start included
    # Longer than `train`, whose hours the TrainJob's machines have; each try follows the job that is under way.
    "train-on-nodes": Resources("1", "4Gi", 80, tries=5, workspace=True),
    "evaluate": Resources("4", "16Gi", 12, tries=1, gpu=True),
    "register": Resources("4", "16Gi", 12, tries=2, gpu=True, signs=True),  # as a submitter
    "promote": Resources("1", "4Gi", 0.5, tries=2, signs=True),  # as the service
    "notify": Resources("1", "2Gi", 0.5),
}
"""By the name of the task in a pipeline, which is that of its component's function with hyphens."""

MACHINE = "train"  # the task whose resources each machine of a TrainJob gets
VOLUME_CHECK = Resources("500m", "1Gi", 0.5)  # of the pod that checks the volume before a TrainJob

# MLflow's and the data's variables have names of our own: KFP's launcher runs in the task's container and would take
# `AWS_*` for those of the pipeline root, and KFP's MLflow plug-in sets `MLFLOW_*` itself.
SECRETS = {
    "adfm-mlflow": {
        "uri": "ADFM_MLFLOW_TRACKING_URI",
        "username": "ADFM_MLFLOW_TRACKING_USERNAME",
        "password": "ADFM_MLFLOW_TRACKING_PASSWORD",
        "ui": "ADFM_MLFLOW_UI",
    },
    "adfm-s3": {
        "access-key": "ADFM_S3_ACCESS_KEY_ID",
        "secret-key": "ADFM_S3_SECRET_ACCESS_KEY",
        "endpoint": "ADFM_S3_ENDPOINT_URL",
        "region": "ADFM_S3_REGION",
    },
    "adfm-hub": {"token": "HF_TOKEN"},
    "adfm-alerts": {"webhook": "ADFM_ALERT_WEBHOOK"},
    "adfm-signing": {"folder": "ADFM_KEYS"},
}
"""Kubernetes secrets, and the environment variable that each of their keys becomes; all are optional."""

KEYS = "/etc/adfm/keys"  # folder of the keys: the public ones of every task, the private one of those that sign
SIGNING = "adfm-signing"  # the secret with the private key
# ConfigMaps that every task has, and where they are mounted: public keys, the private authority; all are optional.
CONFIG_MAPS = {"adfm-submitters": f"{KEYS}/submitters", "adfm-service": f"{KEYS}/service", CA: CA_FOLDER}
PULL_SECRET = "adfm-registry"
SHARED_MEMORY = "8Gi"
USER = 1000  # user and group of all containers, and of the files on the volume
WORKSPACE, WORKSPACE_CLAIM = "/workspace", "adfm-workspace"  # the volume on which several machines train: mount, claim


def image(task: str) -> str:
    """Return the image of a task, for GPUs or for CPUs: that of `ADFM_GPU_IMAGE` or `ADFM_CPU_IMAGE`."""
    kind = "gpu" if RESOURCES[task].gpu else "cpu"
    return os.environ.get(f"ADFM_{kind.upper()}_IMAGE", f"localhost/adfm:{kind}")
