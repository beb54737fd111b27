"""What the pods of a run are given on a cluster: CPU, memory, time, tries, caching, secrets, keys, volumes.

One table for the tasks of the pipelines and for the machines of a TrainJob.
"""

from typing import NamedTuple


class Needs(NamedTuple):
    """What a task is given.

    Args:
        cpu: Cores.
        memory: Of the pod, as Kubernetes writes it.
        hours: After which a try is stopped.
        tries: How often the cluster starts it again. A stock Kubeflow Pipelines 2.17 does so for a pod that was lost
            and not for a failure (its Argo has `templateDefaults.retryStrategy` with `OnError`); one without that
            setting does so for a failure and not for a lost pod. Stages retry what may work in a minute themselves.
        cached: Whether the result of the same inputs is used again.
        gpu: Whether it gets the GPUs that the run asks for.
    """

    cpu: str
    memory: str
    hours: float
    tries: int = 0
    cached: bool = False
    gpu: bool = False


NEEDS = {
    "check": Needs("1", "4Gi", 0.5, tries=2),
    "fetch": Needs("2", "4Gi", 6, tries=2, cached=True),
    "inspect-part": Needs("4", "8Gi", 6, tries=1, cached=True),
    # Not again after a failure: data that are not fit to train on are not fit the next time either.
    "convert": Needs("4", "8Gi", 8, cached=True),
    "convert-parts": Needs("4", "8Gi", 8, cached=True),
    "sft": Needs("4", "16Gi", 6, tries=1, gpu=True),
    "train": Needs("8", "32Gi", 78, tries=1, gpu=True),  # the cold start included
    # Longer than `train`, whose hours the TrainJob's machines have; each try follows the job that is under way.
    "train-on-nodes": Needs("1", "4Gi", 80, tries=5),
    "evaluate": Needs("4", "16Gi", 12, tries=1, gpu=True),
    "register": Needs("4", "16Gi", 12, tries=2, gpu=True),
    "promote": Needs("1", "4Gi", 0.5, tries=2),
    "notify": Needs("1", "2Gi", 0.5),
}

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
"""Kubernetes secrets, and which variable each of their keys becomes. None has to be there: a service account may do.

MLflow's and the data's variables have names of our own. KFP's launcher runs in the task's container and would take
`AWS_*` for those of the pipeline root, and KFP's MLflow plug-in sets `MLFLOW_*` itself.
"""

PULL_SECRET = "adfm-registry"
KEYS = "/etc/adfm/keys"
"""Where the public keys are mounted, for every task."""

SIGNING = "adfm-signing"
"""The secret with the private key of the tasks that sign: `register` as a submitter, `promote` as the service."""

SHARED_MEMORY = "8Gi"
WORKSPACE, WORKSPACE_CLAIM = "/workspace", "adfm-workspace"
"""Where the volume is mounted on which several machines train, and its claim; without several it is not asked for."""
