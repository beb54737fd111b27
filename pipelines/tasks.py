"""What each task is given on a cluster: image, CPU, memory, GPU, time, tries, caching, secrets."""

from kfp import dsl, kubernetes

from adfm.kubeflow.resources import KEYS, NEEDS, PULL_SECRET, SECRETS, SHARED_MEMORY, SIGNING, Needs
from adfm.process.environment import CA, CA_FOLDER

_PAUSE, _FACTOR = 30, 2  # seconds before the second try; each further pause is so many times longer
_WAITING = 24 * 3600  # seconds that a try may wait for a node or an image


def configure(task: dsl.PipelineTask, name: str) -> dsl.PipelineTask:
    """Apply what `NEEDS[name]` says, the secrets, the public keys and the private CA to a task."""
    needs = NEEDS[name]
    task.set_cpu_request(needs.cpu).set_cpu_limit(needs.cpu)
    task.set_memory_request(needs.memory).set_memory_limit(needs.memory)
    task.set_caching_options(needs.cached)
    if needs.tries:
        task.set_retry(needs.tries, f"{_PAUSE}s", _FACTOR, f"{retry_deadline(needs)}s")
    kubernetes.set_timeout(task, round(needs.hours * 3600))
    kubernetes.set_security_context(task, run_as_user=1000, run_as_group=1000, run_as_non_root=True)
    kubernetes.set_image_pull_secrets(task, [PULL_SECRET])
    for secret, keys in SECRETS.items():
        kubernetes.use_secret_as_env(task, secret, keys, optional=True)
    if name in ("register", "promote"):
        kubernetes.use_secret_as_volume(task, SIGNING, KEYS, optional=True)
    for role in ("submitters", "service"):
        kubernetes.use_config_map_as_volume(task, f"adfm-{role}", f"{KEYS}/{role}", optional=True)
    kubernetes.use_config_map_as_volume(task, CA, CA_FOLDER, optional=True)
    return task


def configure_gpu(task: dsl.PipelineTask, name: str, gpu_type, gpus, node_selector, tolerations) -> dsl.PipelineTask:
    """As `configure`; also apply the GPUs that the run asks for, the nodes that have them, and shared memory."""
    configure(task, name)
    task.set_accelerator_type(gpu_type).set_accelerator_limit(gpus)
    kubernetes.add_node_selector_json(task, node_selector)
    kubernetes.add_toleration_json(task, tolerations)
    kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory", size_limit=SHARED_MEMORY)
    return task


def retry_deadline(needs: Needs) -> int:
    """Seconds from the start of a task's first try until it is not tried again: every try in full, and the pauses.

    KFP's `backoff_max_duration` is Argo's `maxDuration`: despite the name it does not limit a pause. Argo adds it to
    the start of the first try, starts no try after that moment and kills one that runs then (`processNodeRetries` in
    argo-workflows `workflow/controller/operator.go`; the pauses are `duration * factor^n`).
    """
    pauses: int = _PAUSE * sum(_FACTOR**number for number in range(needs.tries))
    return (needs.tries + 1) * (round(needs.hours * 3600) + _WAITING) + pauses
