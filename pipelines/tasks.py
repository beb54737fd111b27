"""What each task is given on a cluster: image, CPU, memory, GPU, time, tries, caching, secrets."""

from typing import NamedTuple

from kfp import dsl, kubernetes


class Needs(NamedTuple):
    """What a task is given.

    Args:
        cpu: Cores.
        memory: Of the pod, as Kubernetes writes it.
        hours: After which a try is stopped.
        tries: How often it is started again after a failure.
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
    "fetch": Needs("2", "4Gi", 6, tries=3, cached=True),
    "inspect-part": Needs("4", "8Gi", 6, tries=1, cached=True),
    "convert": Needs("4", "8Gi", 6, tries=1, cached=True),
    "validate": Needs("2", "8Gi", 2, cached=True),
    "warmup": Needs("4", "16Gi", 6, tries=1, gpu=True),
    "train": Needs("8", "32Gi", 72, tries=1, gpu=True),
    "train-on-nodes": Needs("1", "4Gi", 72, tries=5),  # each goes on from the last checkpoint
    "evaluate": Needs("4", "16Gi", 12, tries=1, gpu=True),
    "register": Needs("4", "16Gi", 12, tries=2, gpu=True),
    "promote": Needs("1", "4Gi", 0.5, tries=2),
    "notify": Needs("1", "2Gi", 0.5),
}

SECRETS = {
    "adfm-mlflow": {
        "uri": "MLFLOW_TRACKING_URI",
        "username": "MLFLOW_TRACKING_USERNAME",
        "password": "MLFLOW_TRACKING_PASSWORD",
    },
    "adfm-s3": {
        "access-key": "AWS_ACCESS_KEY_ID",
        "secret-key": "AWS_SECRET_ACCESS_KEY",
        "endpoint": "AWS_ENDPOINT_URL",
        "region": "AWS_DEFAULT_REGION",
    },
    "adfm-hub": {"token": "HF_TOKEN"},
    "adfm-alerts": {"webhook": "ADFM_ALERT_WEBHOOK"},
    "adfm-signing": {"folder": "ADFM_KEYS"},
}
"""Kubernetes secrets, and which variable each of their keys becomes. None has to be there: a service account may do."""

PULL_SECRET = "adfm-registry"
KEYS = "/etc/adfm/keys"
"""Where the public keys are mounted, for every task."""

SIGNING = "adfm-signing"
"""The secret with the private key of the tasks that sign: `register` as a submitter, `promote` as the service."""

SHARED_MEMORY = "8Gi"
WORKSPACE, WORKSPACE_CLAIM = "/workspace", "adfm-workspace"
"""Where the volume is mounted on which several machines train, and its claim; without several it is not asked for."""


def give(task: dsl.PipelineTask, name: str) -> dsl.PipelineTask:
    """Gives a task what `NEEDS` says, and the secrets."""
    needs = NEEDS[name]
    task.set_cpu_request(needs.cpu).set_cpu_limit(needs.cpu)
    task.set_memory_request(needs.memory).set_memory_limit(needs.memory)
    task.set_caching_options(needs.cached)
    if needs.tries:
        task.set_retry(needs.tries, backoff_duration="30s", backoff_factor=2, backoff_max_duration="600s")
    kubernetes.set_timeout(task, round(needs.hours * 3600))
    kubernetes.set_security_context(task, run_as_user=1000, run_as_group=1000, run_as_non_root=True)
    kubernetes.set_image_pull_secrets(task, [PULL_SECRET])
    for secret, keys in SECRETS.items():
        kubernetes.use_secret_as_env(task, secret, keys, optional=True)
    if name in ("register", "promote"):
        kubernetes.use_secret_as_volume(task, SIGNING, KEYS, optional=True)
    for role in ("submitters", "service"):
        kubernetes.use_config_map_as_volume(task, f"adfm-{role}", f"{KEYS}/{role}", optional=True)
    return task


def give_gpu(task: dsl.PipelineTask, name: str, gpu_type, gpus, node_selector, tolerations) -> dsl.PipelineTask:
    """Gives a task what `give` does, the GPUs that the run asks for, the nodes that have them, and shared memory."""
    give(task, name)
    task.set_accelerator_type(gpu_type).set_accelerator_limit(gpus)
    kubernetes.add_node_selector_json(task, node_selector)
    kubernetes.add_toleration_json(task, tolerations)
    kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory", size_limit=SHARED_MEMORY)
    return task
