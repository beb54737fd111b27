"""Supervised fine-tuning of the base model, the cold start, as a task of its own for training on several machines."""

import os

from kfp import dsl


@dsl.component(base_image=os.environ.get("ADFM_GPU_IMAGE", "localhost/adfm:gpu"), install_kfp_package=False)
def warmup(
    shards: dsl.Input[dsl.Dataset],
    settings: str,
    warmup: dsl.Output[dsl.Model],
    warmup_metrics: dsl.Output[dsl.Metrics],
):
    """Trains on shards that passed validation: others are not an output of their task."""
    from pathlib import Path

    from adfm.kubeflow import tasks

    with tasks.stage():
        from adfm.params import loads
        from adfm.training.launch import cold_start

        params, folder = loads(settings), Path(warmup.path)
        tasks.wait_for_servers(params)
        cold_start(Path(shards.path), folder, params)
        tasks.name_artifacts({"Model after the cold start": warmup})
        metrics = tasks.last_metrics(folder / "warmup_curves.csv")
        tasks.log_metrics(warmup_metrics, "Cold start metrics", metrics, tasks.WARMUP_FIRST)
