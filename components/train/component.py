"""Train: the cold start and GRPO on one machine, or GRPO alone on several machines."""

from kfp import dsl

from adfm.kubeflow.resources import image


@dsl.component(base_image=image("train"), install_kfp_package=False)
def train(
    shards: dsl.Input[dsl.Dataset],
    settings: str,
    num_gpus: int,
    sft: dsl.Output[dsl.Model],
    sft_metrics: dsl.Output[dsl.Metrics],
    model: dsl.Output[dsl.Model],
    training_metrics: dsl.Output[dsl.Metrics],
):
    """Both run in processes of their own, which leave no memory of a GPU behind; several GPUs through accelerate."""
    from pathlib import Path

    from adfm.kubeflow import tasks

    with tasks.stage():
        from adfm.params import loads
        from adfm.training.launch import cold_start, on_gpus

        params, start, trained = loads(settings), Path(sft.path), Path(model.path)
        tasks.wait_for_servers(params.model)
        cold_start(Path(shards.path), start, params)
        on_gpus(Path(shards.path), start, trained, params, int(num_gpus))
        tasks.name_artifacts({"Model after the cold start": sft, "Trained model": model})
        metrics = tasks.last_metrics(start / "sft_curves.csv")
        tasks.log_metrics(sft_metrics, "Cold start metrics", metrics, tasks.SFT_FIRST)
        metrics = tasks.last_metrics(trained / "reward_curves.csv")
        tasks.log_metrics(training_metrics, "Training metrics", metrics, tasks.TRAINING_FIRST)


@dsl.component(base_image=image("train-on-nodes"), install_kfp_package=False)
def train_on_nodes(
    shards: dsl.Input[dsl.Dataset],
    sft: dsl.Input[dsl.Model],
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
    training_metrics: dsl.Output[dsl.Metrics],
):
    """This task holds no GPU itself: it follows a TrainJob, which runs the image on the machines."""
    from pathlib import Path

    from adfm.kubeflow import tasks

    with tasks.stage():
        from adfm.kubeflow.nodes import on_nodes
        from adfm.kubeflow.trainjob import Machines
        from adfm.params import loads

        trained = Path(model.path)
        on_nodes(
            Path(shards.path),
            Path(sft.path),
            trained,
            loads(settings),
            Machines(int(num_nodes), int(num_gpus), gpu_type, node_selector, tolerations),
            run=run,
            workspace=Path(workspace),
            claim=claim,
            image=image,
        )
        tasks.name_artifacts({"Trained model": model})
        metrics = tasks.last_metrics(trained / "reward_curves.csv")
        tasks.log_metrics(training_metrics, "Training metrics", metrics, tasks.TRAINING_FIRST)
