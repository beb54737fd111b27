"""Check that a run can start before anything is fetched: settings, weights of the base model, MLflow, disk, cluster."""

from typing import NamedTuple

from kfp import dsl

from adfm.kubeflow.resources import image


@dsl.component(base_image=image("check"), install_kfp_package=False)
def check(
    settings: str,
    run: str,
    revision: str,
    gpu_type: str,
    num_gpus: int,
    num_nodes: int,
) -> NamedTuple("Checked", settings=str, source=str, name=str, revision=str, inspection=str, conversion=str):
    """Settings are the text of a params.yaml; the parts of them that data stages read come out one by one."""
    from adfm.kubeflow import tasks

    with tasks.stage():
        from adfm.process import retries

        return retries.again(
            lambda: tasks.check(settings, run, revision, gpu_type, int(num_gpus), int(num_nodes)),
            "the check before the run",
        )
