"""Apply the table of `adfm.kubeflow.resources` to the tasks of a pipeline."""

from typing import Any, NamedTuple

from kfp import dsl, kubernetes

from adfm.kubeflow import resources
from adfm.kubeflow.resources import RESOURCES, Resources


def _ensure_container_spec_exists(task: dsl.PipelineTask) -> None:
    if task.container_spec is None:
        raise ValueError(f"{task.name} is not a task of a single container, which alone has resources")


# KFP's own calls `inspect.stack` in every `set_…`, only to name the method in its error. That searches all modules for
# the source of each frame: 1 of the 2.5 s of `make compile`, and 25 s in a process with 7,000 modules.
dsl.PipelineTask._ensure_container_spec_exists = _ensure_container_spec_exists

_PAUSE, _FACTOR = 30, 2  # seconds before the second try; each further pause is so many times longer
_WAITING = 24 * 3600  # seconds that a try may wait for a node or an image


class Gpus(NamedTuple):
    """The GPUs that a run asks for, as parameters of its pipeline.

    Args:
        kind: Resource that stands for a GPU on the cluster's nodes.
        number: GPUs of a pod.
        node_selector: Labels of the nodes.
        tolerations: Of the nodes' taints.
    """

    kind: Any
    number: Any
    node_selector: Any
    tolerations: Any


def configure(task: dsl.PipelineTask, gpus: Gpus | None = None) -> dsl.PipelineTask:
    """Apply the entry of a task in `RESOURCES` to it, and the secrets and ConfigMaps that every task has.

    Args:
        task: Named as its entry.
        gpus: For a task that uses GPUs.

    Returns:
        The task.
    """
    entry = RESOURCES[task.component_spec.name]
    task.set_cpu_request(entry.cpu).set_cpu_limit(entry.cpu)
    task.set_memory_request(entry.memory).set_memory_limit(entry.memory)
    task.set_caching_options(entry.cached)
    if entry.tries:
        task.set_retry(entry.tries, f"{_PAUSE}s", _FACTOR, f"{retry_deadline(entry)}s")
    kubernetes.set_timeout(task, round(entry.hours * 3600))
    kubernetes.set_security_context(task, run_as_user=resources.USER, run_as_group=resources.USER, run_as_non_root=True)
    kubernetes.set_image_pull_secrets(task, [resources.PULL_SECRET])
    for secret, keys in resources.SECRETS.items():
        kubernetes.use_secret_as_env(task, secret, keys, optional=True)
    if entry.signs:
        kubernetes.use_secret_as_volume(task, resources.SIGNING, resources.KEYS, optional=True)
    for config_map, folder in resources.CONFIG_MAPS.items():
        kubernetes.use_config_map_as_volume(task, config_map, folder, optional=True)
    if entry.workspace:
        kubernetes.mount_pvc(task, resources.WORKSPACE_CLAIM, resources.WORKSPACE)
    if entry.gpu:
        if gpus is None:
            raise ValueError(f"the task {task.name} uses GPUs: pass those that the run asks for")
        _configure_gpu(task, gpus)
    return task


def _configure_gpu(task: dsl.PipelineTask, gpus: Gpus) -> None:
    task.set_accelerator_type(gpus.kind).set_accelerator_limit(gpus.number)
    kubernetes.add_node_selector_json(task, gpus.node_selector)
    kubernetes.add_toleration_json(task, gpus.tolerations)
    # Processes of one pod share tensors there; a container's own /dev/shm is 64 MiB.
    kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory", size_limit=resources.SHARED_MEMORY)


def retry_deadline(entry: Resources) -> int:
    """Seconds from the start of a task's first try until it is not retried: every try in full, and the pauses."""
    # KFP's `backoff_max_duration` is Argo's `maxDuration`: despite the name it does not limit a pause. Argo adds it to
    # the start of the first try, starts no try after that moment and kills one that runs then (`processNodeRetries` in
    # argo-workflows `workflow/controller/operator.go`; the pauses are `duration * factor^n`).
    pauses: int = _PAUSE * sum(_FACTOR**number for number in range(entry.tries))
    return (entry.tries + 1) * (round(entry.hours * 3600) + _WAITING) + pauses
