"""Each component as a function, on the smallest settings that make sense, one after the other as in the pipeline."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from kfp import dsl

from adfm import tracking
from adfm.files import digest
from adfm.params import load
from adfm.tracking import settings

pytestmark = pytest.mark.timeout(900)

SMALL = """
fetch.source=synthetic://?images=20 validation.min_images_per_split=2 validation.min_label_share=0
sft.steps=1 sft.batch_size=2 detector.steps=1
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
def raw(artifacts: Artifacts) -> Any:
    raw = artifacts("raw", dsl.Dataset)
    function("fetch")(source="synthetic://?images=20", name="line", revision="7", raw=raw)
    return raw


@pytest.fixture(scope="module")
def shards(artifacts: Artifacts, raw: Any) -> Any:
    function("convert")(raw=raw, settings=SETTINGS, **outputs_of_conversion(artifacts, ""))
    return artifacts("shards")


def outputs_of_conversion(made: Artifacts, suffix: str) -> dict[str, Any]:
    return {
        "shards": made(f"shards{suffix}", dsl.Dataset),
        "validation": made(f"validation{suffix}"),
        "validation_report": made(f"validation_report{suffix}.html", dsl.HTML),
        "validation_metrics": made(f"validation_metrics{suffix}", dsl.Metrics),
    }


@pytest.fixture(scope="module")
def evaluated(artifacts: Artifacts, shards: Any) -> Artifacts:
    made = artifacts
    function("train")(
        shards=shards,
        settings=SETTINGS,
        num_gpus=0.0,
        sft=made("sft", dsl.Model),
        sft_metrics=made("sft_metrics", dsl.Metrics),
        model=made("trained", dsl.Model),
        training_metrics=made("training_metrics", dsl.Metrics),
    )
    function("evaluate")(
        shards=shards,
        sft=made("sft"),
        model=made("trained"),
        settings=SETTINGS,
        detector=made("detector", dsl.Model),
        evaluation=made("evaluation"),
        evaluation_report=made("evaluation_report.html", dsl.HTML),
        evaluation_metrics=made("evaluation_metrics", dsl.Metrics),
        decisions=made("decisions", dsl.ClassificationMetrics),
        kinds=made("kinds", dsl.ClassificationMetrics),
    )
    return made


def test_raw_data_are_one_archive_that_is_named_by_the_data_set(raw: Any) -> None:
    assert [file.name for file in Path(raw.path).iterdir()] == ["line.tar"]
    about = {name: raw.metadata[name] for name in ("source", "name", "revision")}
    assert about == {"source": "synthetic://?images=20", "name": "line", "revision": "7"}


def test_a_server_that_is_away_for_a_minute_fails_no_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adfm.data import sources
    from adfm.errors import Unreachable

    tries: list[Path] = []

    def fetch(source: str, out: Path) -> None:
        tries.append(out)
        if len(tries) == 1:
            raise Unreachable(f"{source}: no connection")
        out.mkdir()
        (out / "part.png").touch()

    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setattr(sources, "fetch", fetch)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    raw = Artifacts(tmp_path)("raw", dsl.Dataset)
    function("fetch")(source="s3://bucket/line", name="line", revision="7", raw=raw)
    assert len(tries) == 2
    assert tries[0] == tries[1]  # what was downloaded is resumed
    assert Path(raw.path).parent in tries[0].parents  # and lies on the disk of the artifacts
    assert [path.name for path in Path(raw.path).parent.iterdir()] == ["raw"]
    assert (Path(raw.path) / "line.tar").is_file()


def test_an_evaluation_is_tried_again_where_mlflow_was_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adfm.errors import AdfmError, Unreachable
    from adfm.evaluation import evaluate
    from adfm.kubeflow import tasks
    from adfm.training import detector

    tries: list[Path] = []

    def work(models: object, shards: object, out: Path, params: object) -> None:
        tries.append(out)
        raise Unreachable("MLflow failed: 503") if len(tries) == 1 else AdfmError("a person has to fix this")

    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setattr(tasks, "wait_for_servers", lambda model: None)
    monkeypatch.setattr(tasks, "models_to_compare", lambda *_: {})
    monkeypatch.setattr(evaluate, "evaluate", work)
    monkeypatch.setattr(detector, "train", lambda *_, **__: None)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    inputs = {name: Artifacts(tmp_path)(name) for name in ("shards", "sft", "model", "detector", "evaluation")}
    outputs = dict.fromkeys(("evaluation_report", "evaluation_metrics", "decisions", "kinds"))
    with pytest.raises(SystemExit):
        function("evaluate")(settings=SETTINGS, **inputs, **outputs)
    assert tries == [Path(inputs["evaluation"].path)] * 2  # beside which the predictions that it made are kept


def test_parts_give_the_shards_of_the_whole(artifacts: Artifacts, raw: Any, shards: Any) -> None:
    parts = []
    for part in ("1/2", "2/2"):
        parts.append(artifacts(f"part-{part[0]}", dsl.Dataset))
        function("convert", "inspect_part")(raw=raw, part=part, settings=SETTINGS, inspected=parts[-1])
    outputs = outputs_of_conversion(artifacts, "_of_parts")
    function("convert", "convert_parts")(raw=raw, parts=parts, settings=SETTINGS, **outputs)
    assert digest(Path(outputs["shards"].path)) == digest(Path(shards.path))
    assert outputs["validation_metrics"].metadata == artifacts("validation_metrics").metadata


def test_shards_that_fail_validation_end_the_task_with_its_own_error(
    raw: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = outputs_of_conversion(Artifacts(tmp_path), "")
    strict = settings(load(None, [*SMALL.split(), "validation.min_images_per_split=1000"]))
    with pytest.raises(SystemExit) as status:
        function("convert")(raw=raw, settings=strict, **made)
    assert status.value.code == 1
    assert "is not fit to train on" in capsys.readouterr().err
    assert not Path(made["validation_report"].path).exists()
    store = tracking.client()  # the report is in MLflow all the same
    assert "validation/index.html" in {
        file.path for file in store.list_artifacts(os.environ["MLFLOW_RUN_ID"], "validation")
    }


def test_check_hands_on_the_parts_of_the_settings(artifacts: Artifacts) -> None:
    checked = function("check")(
        settings=SETTINGS, run="run-7", revision="", gpu_type="nvidia.com/gpu", num_gpus=1, num_nodes=0
    )
    assert checked[:4] == (SETTINGS, "synthetic://?images=20", "synthetic", "synthetic://?images=20")


def test_shards_and_models_are_where_the_artifacts_are(evaluated: Artifacts) -> None:
    for name, file in (
        ("shards", "conversion.json"),
        ("validation", "validation.json"),
        ("sft", "adfm.json"),
        ("trained", "adfm.json"),
    ):
        assert (Path(evaluated(name).path) / file).is_file()
    for page in ("validation_report.html", "evaluation_report.html"):
        assert "<html" in Path(evaluated(page).path).read_text()


def test_artifacts_say_on_the_page_what_they_are(evaluated: Artifacts) -> None:
    names = {name: made.metadata["display_name"] for name, made in evaluated.made.items() if "_of_parts" not in name}
    assert names["validation_report.html"] == "Validation report"
    assert names["evaluation_report.html"] == "Evaluation report"
    assert len(set(names.values())) == len(names)


def test_metrics_that_matter_come_first_where_names_are_sorted(evaluated: Artifacts) -> None:
    files = Path(evaluated("shards").path).glob("*.parquet")
    images = sum(pq.read_metadata(file).num_rows for file in files)
    assert evaluated("validation_metrics").metadata["images"] == images
    assert next(iter(rows(evaluated("sft_metrics")))) == "1 loss"
    assert evaluated("sft_metrics").metadata["3 step"] == 1
    assert next(iter(rows(evaluated("training_metrics")))) == "1 reward"
    leading = ("1 trained/balanced_accuracy", "2 trained/miss_rate", "3 trained/overkill", "4 trained/iou")
    names = list(rows(evaluated("evaluation_metrics")))
    assert [name.removesuffix("_at_threshold") for name in names[:4]] == list(leading)
    models = {"base", "sft", "trained", "detector", "always_A", "always_B"}
    assert {name.split("/")[0] for name in names[4:]} == models
    matrix = evaluated("decisions").metadata["confusionMatrix"]
    assert [each["displayName"] for each in matrix["annotationSpecs"]] == ["normal", "anomalous", "unparseable"]
    curve = evaluated("decisions").metadata["confidenceMetrics"]
    assert curve[0] == {"confidenceThreshold": 2.0, "recall": 0.0, "falsePositiveRate": 0.0}
    assert (curve[-1]["recall"], curve[-1]["falsePositiveRate"]) == (1.0, 1.0)


def rows(artifact: Any) -> dict[str, float]:
    """The metrics of an artifact as KFP's page has them: sorted by name."""
    return {name: value for name, value in sorted(artifact.metadata.items()) if name != "display_name"}


def test_all_tasks_go_on_with_the_run_that_the_platform_began(evaluated: Artifacts) -> None:
    store = tracking.client()
    (run,) = store.search_runs([each.experiment_id for each in store.search_experiments()])
    assert run.info.run_id == os.environ["MLFLOW_RUN_ID"]
    assert json.loads((Path(evaluated("trained").path) / "adfm.json").read_text())["mlflow_run_id"] == run.info.run_id
    assert {file.path for file in store.list_artifacts(run.info.run_id)} > {"validation", "evaluation"}
    assert {"validation/images", "trained/accuracy", "Overview/reward"} < set(run.data.metrics)
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
        gate_page=made("gate_page.html", dsl.HTML),
        gate_metrics=made("gate_metrics", dsl.Metrics),
    )
    assert (version, gate) == ("1", "failed")
    assert rows(made("gate_metrics")) == {"version": 1.0, "gate": 0.0}
    page = Path(made("gate_page.html").path).read_text()
    assert "Version 1 of adfm: gate failed" in page
    assert re.search("<td align=left>escape rate</td>", page, re.IGNORECASE) and "<th align=left>candidate</th>" in page
    assert made("gate_page.html").metadata == {"display_name": "Gate: failed", "version": "1", "gate": "failed"}

    from adfm.kubeflow import tasks
    from adfm.params import loads

    store = tracking.client()
    tags = store.get_model_version("adfm", "1").tags
    assert (tags["kfp_run_id"], tags["data_revision"]) == ("run-7", "data-3")

    params, candidate = loads(SETTINGS), Path(made("trained").path)
    others = Path("detector"), Path("sft")
    assert list(tasks.models_to_compare(params, *others, candidate)) == ["detector", "base", "sft"]
    store.set_registered_model_alias("adfm", "production", "1")
    assert list(tasks.models_to_compare(params, *others, candidate)) == ["detector", "base", "sft"]  # it is that one
    assert tasks.models_to_compare(params, *others, tmp_path)["production"] == "models:/adfm/1"
    store.delete_registered_model_alias("adfm", "production")


def test_a_promotion_without_approval_is_refused_and_the_history_shown(
    evaluated: Artifacts, capsys: pytest.CaptureFixture[str]
) -> None:
    page = evaluated("history.html", dsl.HTML)
    with pytest.raises(SystemExit) as status:
        function("promote")(version="1", settings=SETTINGS, by="somebody", history=page)
    assert status.value.code == 1
    assert "adfm: error: " in capsys.readouterr().err
    assert "refuse" in Path(page.path).read_text()


def test_the_exit_task_ends_the_run_on_the_cluster_and_reports_what_kfp_says_of_it(
    artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adfm.kubeflow import nodes, notification

    calls: list[Any] = []
    monkeypatch.setattr(nodes, "end", lambda run: calls.append(("end", run)))
    monkeypatch.setattr(notification, "notify", lambda *arguments: calls.append(arguments) or "sent")
    status = dsl.PipelineTaskFinalStatus(
        state="RUNNING",
        pipeline_job_resource_name="adfm-training-x7k2p",
        pipeline_task_name="exit-handler-1",
        error_code=None,
        error_message=None,
    )
    ui = "https://kfp.example.com"
    assert function("notify")(status=status, pipeline="line", run="run-8", settings="", ui=ui) == "sent"
    ended, (name, given, *rest) = calls
    assert ended == ("end", "run-8")
    assert (name, rest) == ("line", ["run-8", "", ui])
    assert given == notification.Status("RUNNING", "", "adfm-training-x7k2p", "exit-handler-1")
