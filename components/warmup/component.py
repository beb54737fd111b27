"""Teaches the base model the form of the answer."""

import os

from kfp import dsl


@dsl.component(base_image=os.environ.get("ADFM_GPU_IMAGE", "localhost/adfm:gpu"), install_kfp_package=False)
def warmup(
    shards: dsl.Input[dsl.Dataset],
    validation: dsl.Input[dsl.Artifact],
    settings: str,
    model: dsl.Output[dsl.Model],
    figures: dsl.Output[dsl.Metrics],
):
    """The validation's report is an input so that nothing is trained on shards that were not judged."""
    from pathlib import Path

    from adfm import tasks
    from adfm.training.warmup import warmup

    folder = Path(model.path)
    warmup(Path(shards.path), folder, tasks.begin(settings))
    for name, value in tasks.last_figures(folder / "warmup_curves.csv").items():
        figures.log_metric(name, value)
