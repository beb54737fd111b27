"""Convert a raw data set into Parquet shards and validate them, at once or after its parts were inspected."""

from typing import List  # noqa: UP035

from kfp import dsl

from adfm.kubeflow.resources import image


@dsl.component(base_image=image("convert"), install_kfp_package=False)
def convert(
    raw: dsl.Input[dsl.Dataset],
    settings: str,
    shards: dsl.Output[dsl.Dataset],
    validation: dsl.Output[dsl.Artifact],
    validation_report: dsl.Output[dsl.HTML],
    validation_metrics: dsl.Output[dsl.Metrics],
):
    """Shards that fail validation stop the run before a GPU is asked for; their report is in MLflow."""
    from pathlib import Path

    from adfm.kubeflow import tasks

    with tasks.stage():
        from adfm.params import loads

        report = Path(validation.path)
        archive = Path(raw.path) / f"{raw.metadata['name']}.tar"
        metrics = tasks.convert(archive, Path(shards.path), report, loads(settings))
        tasks.name_artifacts({"Shards": shards, "Validation": validation})
        tasks.publish_page(validation_report, "Validation report", report / "index.html")
        tasks.log_metrics(validation_metrics, "Validation metrics", metrics)


@dsl.component(base_image=image("inspect-part"), install_kfp_package=False)
def inspect_part(raw: dsl.Input[dsl.Dataset], part: str, settings: str, inspected: dsl.Output[dsl.Dataset]):
    """Inspect the images of one part, which is written as I/N."""
    from pathlib import Path

    from adfm.kubeflow import tasks

    with tasks.stage():
        from adfm.data.conversion import inspect_part
        from adfm.params import loads

        number, of = part.split("/")
        with tasks.raw_data(Path(raw.path) / f"{raw.metadata['name']}.tar") as folder:
            inspect_part(folder, Path(inspected.path), loads(settings), int(number), int(of))
        tasks.name_artifacts({f"Part {part}": inspected})


@dsl.component(base_image=image("convert-parts"), install_kfp_package=False)
def convert_parts(
    raw: dsl.Input[dsl.Dataset],
    parts: dsl.Input[List[dsl.Dataset]],  # noqa: UP006
    settings: str,
    shards: dsl.Output[dsl.Dataset],
    validation: dsl.Output[dsl.Artifact],
    validation_report: dsl.Output[dsl.HTML],
    validation_metrics: dsl.Output[dsl.Metrics],
):
    """As `convert`, of images that were inspected part by part."""
    from pathlib import Path

    from adfm.kubeflow import tasks

    with tasks.stage():
        from adfm.params import loads

        report = Path(validation.path)
        archive = Path(raw.path) / f"{raw.metadata['name']}.tar"
        inspected = [Path(part.path) for part in parts]
        metrics = tasks.convert(archive, Path(shards.path), report, loads(settings), inspected)
        tasks.name_artifacts({"Shards": shards, "Validation": validation})
        tasks.publish_page(validation_report, "Validation report", report / "index.html")
        tasks.log_metrics(validation_metrics, "Validation metrics", metrics)
