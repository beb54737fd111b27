"""Train the reference detector; evaluate it, the candidate, the models that it came from, production and anchor."""

from kfp import dsl

from adfm.kubeflow.resources import image


@dsl.component(base_image=image("evaluate"), install_kfp_package=False)
def evaluate(
    shards: dsl.Input[dsl.Dataset],
    sft: dsl.Input[dsl.Model],
    model: dsl.Input[dsl.Model],
    settings: str,
    detector: dsl.Output[dsl.Model],
    evaluation: dsl.Output[dsl.Artifact],
    evaluation_report: dsl.Output[dsl.HTML],
    evaluation_metrics: dsl.Output[dsl.Metrics],
    decisions: dsl.Output[dsl.ClassificationMetrics],
    kinds: dsl.Output[dsl.ClassificationMetrics],
):
    """The report is the one that reviewers read; with the pictures that are files of their own it is in MLflow.

    The detector is trained here, in minutes on the CPU, as a pod of its own would take as long to start.
    """
    from pathlib import Path

    from adfm.kubeflow import tasks

    with tasks.stage():
        from adfm.evaluation.evaluate import evaluate
        from adfm.params import loads
        from adfm.process import retries
        from adfm.training.detector import train

        params, folder, trained = loads(settings), Path(evaluation.path), Path(model.path)
        tasks.wait_for_servers(params.model)
        train(Path(shards.path), Path(detector.path), params, force=True)

        def work() -> None:  # predictions that it has made are kept in the pod until it ends well
            models = tasks.models_to_compare(params, Path(detector.path), Path(sft.path), trained)
            evaluate(models | {tasks.CANDIDATE: trained}, Path(shards.path), folder, params)

        retries.again(work, "the evaluation")
        names = {"Reference detector": detector, "Evaluation": evaluation, "Decisions of the candidate": decisions}
        tasks.name_artifacts(names | {"Kinds of defects named by the candidate": kinds})
        tasks.publish_page(evaluation_report, "Evaluation report", folder / "report" / "report.html")
        metrics, first = tasks.evaluation_metrics(folder)
        tasks.log_metrics(evaluation_metrics, "Evaluation metrics", metrics, first)
        decisions.log_confusion_matrix(*tasks.confusion(folder))
        decisions.log_roc_curve(*tasks.roc(folder))
        if counts := tasks.kinds(folder):
            kinds.log_confusion_matrix(*counts)
