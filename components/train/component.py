"""Trains by GRPO: here, on several GPUs of this machine, or on several machines."""

import os

from kfp import dsl


@dsl.component(base_image=os.environ.get("ADFM_GPU_IMAGE", "localhost/adfm:gpu"), install_kfp_package=False)
def train(
    shards: dsl.Input[dsl.Dataset],
    warmup: dsl.Input[dsl.Model],
    settings: str,
    num_gpus: int,
    num_nodes: int,
    gpu_type: str,
    image: str,
    model: dsl.Output[dsl.Model],
    figures: dsl.Output[dsl.Metrics],
):
    """Several GPUs are used by accelerate, several machines through a TrainJob with this image."""
    from pathlib import Path

    from adfm import tasks
    from adfm.training.launch import launch

    folder = Path(model.path)
    asked = tasks.begin(settings)
    launch(Path(shards.path), Path(warmup.path), folder, asked, int(num_gpus), int(num_nodes), gpu_type, image)
    for name, value in tasks.last_figures(folder / "reward_curves.csv").items():
        figures.log_metric(name, value)
