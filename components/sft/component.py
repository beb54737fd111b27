"""Supervised fine-tuning of the base model, the cold start, as a task of its own for training on several machines."""

from kfp import dsl

from adfm.kubeflow.resources import image


@dsl.component(base_image=image("sft"), install_kfp_package=False)
def sft(
    shards: dsl.Input[dsl.Dataset],
    settings: str,
    sft: dsl.Output[dsl.Model],
    sft_metrics: dsl.Output[dsl.Metrics],
):
    """Trains on shards that passed validation: others are not an output of their task."""
    from pathlib import Path

    from adfm.kubeflow import tasks

    with tasks.stage():
        from adfm.params import loads
        from adfm.training.launch import cold_start

        params, folder = loads(settings), Path(sft.path)
        tasks.wait_for_servers(params.model)
        cold_start(Path(shards.path), folder, params)
        tasks.name_artifacts({"Model after the cold start": sft})
        metrics = tasks.last_metrics(folder / "sft_curves.csv")
        tasks.log_metrics(sft_metrics, "Cold start metrics", metrics, tasks.SFT_FIRST)
