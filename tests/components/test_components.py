"""Each component as a function, on the smallest settings that make sense, one after the other as in the pipeline."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from kfp import dsl

from adfm import tracking
from adfm.params import load
from adfm.tracking import settings

pytestmark = pytest.mark.timeout(900)

SMALL = """
fetch.source=synthetic://?images=20 validate.min_images_per_split=2 validate.min_label_share=0
warmup.steps=1 warmup.batch_size=2
train.steps=1 train.prompts_per_step=2 train.num_generations=2 train.max_completion_length=16 train.pictures_every=0
evaluate.max_new_tokens=16 evaluate.bootstrap=20
"""
SETTINGS = settings(load(None, SMALL.split()))


def function(stage: str, name: str = "") -> Callable[..., Any]:
    component = getattr(importlib.import_module(f"components.{stage}.component"), name or stage)
    return component.python_func


class Artifacts:
    """Artifacts with a place each, made when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[str, Any] = {}

    def __call__(self, name: str, kind: type = dsl.Artifact) -> Any:
        return self.made.setdefault(name, kind(name=name, uri=str(self.folder / name), metadata={}))


@pytest.fixture(scope="module")
def artifacts(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Artifacts]:
    """Made in a folder with a store of MLflow, in which the platform has begun a run."""
    folder = tmp_path_factory.mktemp("components")
    shutil.copy(empty_database, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        run = tracking.client().create_run(tracking.experiment("platform"))
        patch.setenv("MLFLOW_RUN_ID", run.info.run_id)
        yield Artifacts(folder)


@pytest.fixture(scope="module")
def shards(artifacts: Artifacts) -> Any:
    raw = artifacts("raw", dsl.Dataset)
    function("fetch")(source="synthetic://?images=20", name="line", revision="7", raw=raw)
    assert raw.metadata == {"source": "synthetic://?images=20", "name": "line", "revision": "7"}
    parts = []
    for part in ("1/2", "2/2"):
        parts.append(artifacts(f"part-{part[0]}", dsl.Dataset))
        function("convert", "inspect_part")(raw=raw, part=part, settings=SETTINGS, inspected=parts[-1])
    function("convert")(raw=raw, parts=parts, settings=SETTINGS, shards=artifacts("shards", dsl.Dataset))
    return artifacts("shards")


@pytest.fixture(scope="module")
def evaluated(artifacts: Artifacts, shards: Any) -> Artifacts:
    made = artifacts
    function("validate")(
        shards=shards,
        settings=SETTINGS,
        report=made("report"),
        page=made("validation.html", dsl.HTML),
        figures=made("validation-figures", dsl.Metrics),
    )
    function("warmup")(
        shards=shards,
        validation=made("report"),
        settings=SETTINGS,
        model=made("warmup", dsl.Model),
        figures=made("warmup-figures", dsl.Metrics),
    )
    function("train")(
        shards=shards,
        warmup=made("warmup"),
        settings=SETTINGS,
        num_gpus=0.0,
        model=made("trained", dsl.Model),
        figures=made("training-figures", dsl.Metrics),
    )
    function("evaluate")(
        shards=shards,
        warmup=made("warmup"),
        model=made("trained"),
        settings=SETTINGS,
        evaluation=made("evaluation"),
        page=made("report.html", dsl.HTML),
        figures=made("evaluation-figures", dsl.Metrics),
        answers=made("answers", dsl.ClassificationMetrics),
    )
    return made


def test_check_hands_on_the_parts_of_the_settings(artifacts: Artifacts) -> None:
    checked = function("check")(settings=SETTINGS, revision="", gpu_type="nvidia.com/gpu", num_gpus=1)
    assert checked[:4] == (SETTINGS, "synthetic://?images=20", "synthetic", "synthetic://?images=20")


def test_shards_and_models_are_where_the_artifacts_are(evaluated: Artifacts) -> None:
    for name, file in (("shards", "conversion.json"), ("report", "validation.json"), ("trained", "adfm.json")):
        assert (Path(evaluated(name).path) / file).is_file()
    for page in ("validation.html", "report.html"):
        assert "<html" in Path(evaluated(page).path).read_text()


def test_figures_are_on_the_page_of_the_run(evaluated: Artifacts) -> None:
    files = Path(evaluated("shards").path).glob("*.parquet")
    assert evaluated("validation-figures").metadata["images"] == sum(pq.read_metadata(file).num_rows for file in files)
    assert evaluated("warmup-figures").metadata["step"] == 1
    assert "reward" in evaluated("training-figures").metadata
    assert {name.split("/")[0] for name in evaluated("evaluation-figures").metadata} == {"base", "warmup", "trained"}
    matrix = evaluated("answers").metadata["confusionMatrix"]
    assert [each["displayName"] for each in matrix["annotationSpecs"]] == ["normal", "anomalous", "unparseable"]
    curve = evaluated("answers").metadata["confidenceMetrics"]
    assert curve[0] == {"confidenceThreshold": 2.0, "recall": 0.0, "falsePositiveRate": 0.0}
    assert (curve[-1]["recall"], curve[-1]["falsePositiveRate"]) == (1.0, 1.0)


def test_all_tasks_go_on_with_the_run_that_the_platform_began(evaluated: Artifacts) -> None:
    store = tracking.client()
    (run,) = store.search_runs([each.experiment_id for each in store.search_experiments()])
    assert run.info.run_id == os.environ["MLFLOW_RUN_ID"]
    assert json.loads((Path(evaluated("trained").path) / "adfm.json").read_text())["mlflow_run_id"] == run.info.run_id
    assert {file.path for file in store.list_artifacts(run.info.run_id)} > {"validation", "evaluation"}
    assert {"validation/images", "trained/accuracy", "reward"} < set(run.data.metrics)
    assert run.info.status == "FINISHED"


def test_a_version_carries_the_run_and_production_is_evaluated_the_next_time(
    evaluated: Artifacts, tmp_path: Path
) -> None:
    made = evaluated
    version, gate = function("register")(
        model=made("trained"),
        shards=made("shards"),
        evaluation=made("evaluation"),
        settings=SETTINGS,
        run="run-7",
        revision="data-3",
        registration=made("registration"),
        page=made("version.html", dsl.HTML),
        figures=made("decision", dsl.Metrics),
    )
    assert (version, gate) == ("1", "failed")
    assert made("decision").metadata == {"version": 1.0, "gate": 0.0}
    assert "Version 1 of adfm: gate failed" in Path(made("version.html").path).read_text()

    from adfm import tasks
    from adfm.params import loads

    store = tracking.client()
    tags = store.get_model_version("adfm", "1").tags
    assert (tags["kfp_run_id"], tags["data_revision"]) == ("run-7", "data-3")
    assert "version 1 of adfm: gate failed" in tasks.notify("line", "SUCCEEDED", "", "run-7", SETTINGS, "")

    params, start, candidate = loads(SETTINGS), Path("warmup"), Path(made("trained").path)
    assert list(tasks.models_to_compare(params, start, candidate)) == ["base", "warmup"]
    store.set_registered_model_alias("adfm", "production", "1")
    assert list(tasks.models_to_compare(params, start, candidate)) == ["base", "warmup"]  # it is that version
    assert tasks.models_to_compare(params, start, tmp_path)["production"] == "models:/adfm/1"
    store.delete_registered_model_alias("adfm", "production")


def test_a_promotion_without_approval_is_refused_and_the_history_shown(evaluated: Artifacts) -> None:
    from adfm.registry.promotion import Refused

    page = evaluated("history.html", dsl.HTML)
    with pytest.raises(Refused):
        function("promote")(version="1", settings=SETTINGS, by="somebody", history=page)
    assert "refuse" in Path(page.path).read_text()


def test_notify_tells_the_status(artifacts: Artifacts) -> None:
    status = dsl.PipelineTaskFinalStatus(
        state="FAILED",
        pipeline_job_resource_name="job",
        pipeline_task_name="path",
        error_code=1,
        error_message="no space",
    )
    said = function("notify")(status=status, pipeline="line", run="run-8", settings="", ui="https://kfp.example.com")
    assert said == "line failed\nno space\nhttps://kfp.example.com/#/runs/details/run-8"
