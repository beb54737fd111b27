"""Judges shards, and stops the run if they are not fit to train on."""

import os

from kfp import dsl


@dsl.component(base_image=os.environ.get("ADFM_CPU_IMAGE", "localhost/adfm:cpu"), install_kfp_package=False)
def validate(
    shards: dsl.Input[dsl.Dataset],
    settings: str,
    report: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
    figures: dsl.Output[dsl.Metrics],
):
    """The page is that of the report; a report of shards that fail is in MLflow."""
    from pathlib import Path

    from adfm import tasks
    from adfm.data.validation import require

    folder = Path(report.path)
    require(Path(shards.path), folder, tasks.begin(settings))
    tasks.show(folder / "index.html", page.path)
    for name, value in tasks.validation_figures(folder).items():
        figures.log_metric(name, value)
