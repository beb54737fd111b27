"""Trains by GRPO: on one machine, with one GPU or several, or on several machines."""

import os

from kfp import dsl


@dsl.component(base_image=os.environ.get("ADFM_GPU_IMAGE", "localhost/adfm:gpu"), install_kfp_package=False)
def train(
    shards: dsl.Input[dsl.Dataset],
    warmup: dsl.Input[dsl.Model],
    settings: str,
    num_gpus: int,
    model: dsl.Output[dsl.Model],
    figures: dsl.Output[dsl.Metrics],
):
    """Several GPUs are used through accelerate."""
    from pathlib import Path

    from adfm import tasks
    from adfm.training.launch import on_gpus

    folder = Path(model.path)
    with tasks.exit_status():
        on_gpus(Path(shards.path), Path(warmup.path), folder, tasks.begin(settings), int(num_gpus))
    for name, value in tasks.last_figures(folder / "reward_curves.csv").items():
        figures.log_metric(name, value)


@dsl.component(base_image=os.environ.get("ADFM_CPU_IMAGE", "localhost/adfm:cpu"), install_kfp_package=False)
def train_on_nodes(
    shards: dsl.Input[dsl.Dataset],
    warmup: dsl.Input[dsl.Model],
    settings: str,
    num_nodes: int,
    num_gpus: int,
    gpu_type: str,
    node_selector: dict,
    tolerations: list,
    image: str,
    run: str,
    workspace: str,
    claim: str,
    model: dsl.Output[dsl.Model],
    figures: dsl.Output[dsl.Metrics],
):
    """This task holds no GPU itself: it follows a TrainJob, which runs the image on the machines."""
    from pathlib import Path

    from adfm import tasks
    from adfm.training.nodes import on_nodes

    folder = Path(model.path)
    on_nodes(
        Path(shards.path),
        Path(warmup.path),
        folder,
        tasks.begin(settings),
        run=run,
        workspace=Path(workspace),
        claim=claim,
        image=image,
        nodes=int(num_nodes),
        gpus=int(num_gpus),
        gpu_type=gpu_type,
        node_selector=node_selector,
        tolerations=tolerations,
    )
    for name, value in tasks.last_figures(folder / "reward_curves.csv").items():
        figures.log_metric(name, value)
