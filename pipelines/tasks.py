"""What each task is given on a cluster: image, CPU, memory, GPU, time, tries, caching, secrets."""

from kfp import dsl, kubernetes

from adfm.pods import KEYS, NEEDS, PULL_SECRET, SECRETS, SHARED_MEMORY, SIGNING


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
