"""Register the trained model as a version in MLflow, with the gate's decision on it; move no alias."""

from typing import NamedTuple

from kfp import dsl

from adfm.kubeflow.resources import image


@dsl.component(base_image=image("register"), install_kfp_package=False)
def register(
    model: dsl.Input[dsl.Model],
    shards: dsl.Input[dsl.Dataset],
    evaluation: dsl.Input[dsl.Artifact],
    settings: str,
    run: str,
    revision: str,
    registration: dsl.Output[dsl.Artifact],
    gate_page: dsl.Output[dsl.HTML],
    gate_metrics: dsl.Output[dsl.Metrics],
) -> NamedTuple("Registered", version=str, gate=str):
    """The version carries the ids of the run and of the data."""
    from adfm.kubeflow import tasks

    with tasks.stage():
        from adfm.process import retries

        version, metrics, gate = retries.again(
            lambda: tasks.register(
                model.path, shards.path, evaluation.path, registration.path, settings, run, revision, gate_page.path
            ),
            "the registration",
        )
        tasks.name_artifacts({"Registration": registration, f"Gate: {gate}": gate_page})
        tasks.log_metrics(gate_metrics, "Gate metrics", metrics)
        for artifact in (registration, gate_page):
            artifact.metadata.update(version=version, gate=gate)
        return version, gate
