"""Tells how a run ended."""

import os

from kfp import dsl


@dsl.component(base_image=os.environ.get("ADFM_CPU_IMAGE", "localhost/adfm:cpu"), install_kfp_package=False)
def notify(status: dsl.PipelineTaskFinalStatus, pipeline: str, run: str, settings: str, ui: str) -> str:
    """Status, gate verdict and link, to the chat channel that the secret adfm-alerts names, if any, and to the log."""
    from adfm import tasks

    return tasks.notify(pipeline, status.state, status.error_message or "", run, settings, ui)
