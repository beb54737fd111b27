"""Registers the trained model as a version in MLflow, with the gate's decision on it; moves no alias."""

import os
from typing import NamedTuple

from kfp import dsl


@dsl.component(base_image=os.environ.get("ADFM_GPU_IMAGE", "localhost/adfm:gpu"), install_kfp_package=False)
def register(
    model: dsl.Input[dsl.Model],
    shards: dsl.Input[dsl.Dataset],
    evaluation: dsl.Input[dsl.Artifact],
    settings: str,
    run: str,
    revision: str,
    registration: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
    figures: dsl.Output[dsl.Metrics],
) -> NamedTuple("Registered", version=str, gate=str):
    """The version carries the ids of the run and of the data."""
    from adfm import tasks

    version, decided, gate = tasks.register(
        model.path, shards.path, evaluation.path, registration.path, settings, run, revision, page.path
    )
    for name, value in decided.items():
        figures.log_metric(name, value)
    registration.metadata.update(version=version, gate=gate)
    return version, gate
