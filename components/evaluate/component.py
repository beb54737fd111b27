"""Lets the candidate, the models that it came from, production and anchor answer the same held-out images."""

import os

from kfp import dsl


@dsl.component(base_image=os.environ.get("ADFM_GPU_IMAGE", "localhost/adfm:gpu"), install_kfp_package=False)
def evaluate(
    shards: dsl.Input[dsl.Dataset],
    warmup: dsl.Input[dsl.Model],
    model: dsl.Input[dsl.Model],
    settings: str,
    evaluation: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
    figures: dsl.Output[dsl.Metrics],
    answers: dsl.Output[dsl.ClassificationMetrics],
):
    """The page is the report that reviewers read; with the pictures that are files of their own it is in MLflow."""
    from pathlib import Path

    from adfm import tasks
    from adfm.evaluation.evaluate import evaluate

    params, folder, trained = tasks.begin(settings), Path(evaluation.path), Path(model.path)
    models = tasks.models_to_compare(params, Path(warmup.path), trained) | {"trained": trained}
    evaluate(models, Path(shards.path), folder, params)
    tasks.show(folder / "report" / "report.html", page.path)
    for name, value in tasks.evaluation_figures(folder).items():
        figures.log_metric(name, value)
    answers.log_confusion_matrix(*tasks.confusion(folder))
    answers.log_roc_curve(*tasks.roc(folder))
