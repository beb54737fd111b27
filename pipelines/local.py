"""Runs a compiled pipeline on this machine: each task in a subprocess, or in a container of its image."""

import tempfile
import warnings
from pathlib import Path
from typing import Any

from adfm.errors import AdfmError
from pipelines.command import write


def run(pipeline: Any, arguments: dict[str, Any], root: Path, in_containers: bool = False) -> None:
    """Runs the pipeline as a cluster would, but for what only a cluster has: resources, timeouts, secrets, caching.

    Args:
        pipeline: What `dsl.pipeline` made.
        arguments: Of the pipeline, by name.
        root: Folder for what the tasks write.
        in_containers: Whether tasks run in containers of their images.

    Raises:
        AdfmError: A task failed, or containers cannot be run.
    """
    from kfp import components, local

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Task .* have no effect in the current local runner", UserWarning)
        warnings.filterwarnings("ignore", "You may be attemping to run a task", RuntimeWarning)
        file = Path(folder) / "pipeline.yaml"
        write(pipeline, file)
        runner: Any = local.SubprocessRunner(use_venv=False)
        if in_containers:
            from pipelines import containers

            executors = pipeline.pipeline_spec.deployment_spec["executors"].values()
            runner = containers.runner(root, sorted({executor["container"]["image"] for executor in executors}))
        local.init(runner, pipeline_root=str(root), workspace_root=folder, raise_on_error=True)
        try:
            components.load_component_from_file(str(file))(**arguments)
        except RuntimeError as error:
            raise AdfmError(f"{error} What failed is said above.") from error
