"""Run a pipeline on this machine: each task in a subprocess, or in a container of its image."""

import builtins
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import yaml

from adfm import tracking
from adfm.errors import AdfmError
from adfm.process.pod import STARTED
from pipelines import checks
from pipelines.ir import write


def run(pipeline: Any, arguments: dict[str, Any], root: Path, in_containers: bool = False) -> None:
    """Run the pipeline as a cluster would, without its resources, time limits, retries, secrets and cache.

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
        images = checks.images(_drop_retries(file))
        runner: Any = local.SubprocessRunner(use_venv=False)
        if in_containers:
            from pipelines import containers

            runner = containers.runner(root, images)
        local.init(runner, pipeline_root=str(root), workspace_root=folder, raise_on_error=True)
        plain = builtins.print
        os.environ[STARTED] = tracking.now()
        try:
            components.load_component_from_file(str(file))(**arguments)
        except RuntimeError as error:
            raise AdfmError(f"{error} The reason is printed above.") from error
        finally:
            del os.environ[STARTED]
            # Tasks side by side each put an indenting one in its place and back (`indented_print` in
            # kfp/local/logging_utils.py): one of them is left there.
            builtins.print = plain


def _drop_retries(file: Path) -> dict[str, Any]:
    """Remove the retries from a compiled pipeline, which only delay the report of a failure here; return its IR."""
    ir, *platform = yaml.safe_load_all(file.read_text(encoding="utf-8"))
    for component in (ir["root"], *ir["components"].values()):
        for task in component.get("dag", {}).get("tasks", {}).values():
            task.pop("retryPolicy", None)
    file.write_text(yaml.safe_dump_all([ir, *platform]), encoding="utf-8")
    return dict(ir)
