"""Run the tasks of a local run in containers of their images, by Docker or what has its API (Podman)."""

import os
from pathlib import Path
from typing import Any

from adfm.errors import AdfmError
from adfm.process.environment import CA_FILE, CA_FOLDER
from adfm.process.pod import STARTED

_PASSED_ON = ("ADFM_ALERT_WEBHOOK", "ADFM_MLFLOW_", STARTED, "ADFM_S3_", "AWS_", "HF_TOKEN", "MLFLOW_")
_AUTHORITY = f"{CA_FOLDER}/{CA_FILE}"


def runner(root: Path, images: list[str]) -> Any:
    """The runner of a local run, after a check that containers run and that the images have the packages.

    Containers see the current folder (for `mlflow.db`) and `root`, both at their own paths, run as the current user,
    and can write nowhere else but to `/tmp`.

    Raises:
        AdfmError: There is no socket, no such image, or the package is not in it.
    """
    import docker
    from kfp import local
    from kfp.local import docker_task_handler

    try:
        client = docker.from_env()
        client.ping()
    except docker.errors.DockerException as error:
        raise AdfmError(
            f"no container can be run: {error}. Start Docker, or `podman system service --time 0 "
            "unix:///tmp/podman.sock` and set DOCKER_HOST=unix:///tmp/podman.sock."
        ) from error
    root.mkdir(parents=True, exist_ok=True)
    for image in images:
        try:
            client.images.get(image)
        except docker.errors.ImageNotFound as error:
            raise AdfmError(f"there is no image {image} here; make it with `make image`.") from error
        try:
            failed = _run(client, image, ["python", "-c", "import adfm.kubeflow.tasks, kfp"], {})
        except docker.errors.APIError as error:  # without Python, for one
            raise AdfmError(f"the image {image} does not run ({error}); make it with `make image`.") from error
        if failed:
            raise AdfmError(f"the image {image} lacks the packages adfm and kfp; make it with `make image`.")
    # The handler's own function takes a container that is gone for one that succeeded.
    docker_task_handler.run_docker_container = _run
    return local.DockerRunner()


def _run(client: Any, image: str, command: list[str], volumes: dict[str, Any]) -> int:
    """Run a container, print its log, and return its exit status."""
    here = str(Path.cwd())
    environment = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    if authority := os.environ.get("ADFM_CA_BUNDLE"):  # where a cluster mounts it
        volumes = {**volumes, authority: {"bind": _AUTHORITY, "mode": "ro"}}
        environment.pop("AWS_CA_BUNDLE", None)  # the temporary file of this process
    container = client.containers.create(
        image,
        command,
        user=f"{os.getuid()}:{os.getgid()}",
        working_dir=here,
        volumes={**volumes, here: {"bind": here, "mode": "rw"}},
        environment=environment,
        network_mode="host",
        read_only=True,
        tmpfs={"/tmp": "exec"},
    )
    try:
        container.start()
        for line in container.logs(stream=True, follow=True):
            print(line.decode(errors="replace"), end="")
        return int(container.wait()["StatusCode"])
    finally:
        container.remove(force=True)
