"""What tasks do around their stages."""

import csv
import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import dsl

from adfm import tracking
from adfm.data import packed
from adfm.data.problems import BadData
from adfm.errors import AdfmError, Unreachable
from adfm.kubeflow import nodes, tasks, termination
from adfm.models import loading
from adfm.params import Params, loads
from adfm.process import environment, retries
from adfm.process.pod import STARTED
from adfm.process.stopping import Stopped, Terminated


@pytest.fixture(autouse=True)
def here(store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    return store


@pytest.fixture
def last_words(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What stages leave for Kubernetes."""
    texts: list[str] = []
    monkeypatch.setattr(termination, "leave", texts.append)
    return texts


def no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "shards/train.parquet")


def fail(error: BaseException) -> Callable[[], None]:
    def raise_error() -> None:
        raise error

    return raise_error


@pytest.mark.parametrize(
    ("work", "status", "line"),
    [
        (fail(AdfmError("shards: 2 problems:\n  a\n  b")), 1, "shards: 2 problems:\n  a\n  b"),
        (fail(Stopped("told to stop")), 75, "told to stop"),
        (fail(Terminated()), 143, "terminated by SIGTERM: the run was terminated, or its pod deleted"),
        (no_space, 1, "shards/train.parquet: the disk is full; use nodes with more ephemeral storage."),
    ],
)
def test_a_stage_ends_with_the_status_and_the_reason_of_its_error(
    work: Callable[[], None], status: int, line: str, last_words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end, tasks.stage():
        work()
    assert end.value.code == status
    assert last_words == [line]
    assert capsys.readouterr().err.startswith(f"adfm: error: {line}\n")


def test_an_error_that_nobody_expected_keeps_its_traceback_and_leaves_a_line(last_words: list[str]) -> None:
    with pytest.raises(ZeroDivisionError), tasks.stage():
        raise ZeroDivisionError("division by zero\nmore")
    assert last_words == ["ZeroDivisionError: division by zero\nmore"]


def test_an_environment_that_cannot_be_set_up_is_an_error_of_the_stage(
    last_words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "set_environment", fail(AdfmError("ca.crt: holds no certificate")))
    with pytest.raises(SystemExit), tasks.stage():
        raise AssertionError
    assert last_words == ["ca.crt: holds no certificate"]


def test_a_notification_is_sent_from_an_environment_that_cannot_be_set_up(
    last_words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "set_environment", fail(AdfmError("ca.crt: holds no certificate")))
    with tasks.stage(tolerant=True):
        print("sent")
    assert capsys.readouterr() == ("sent\n", "adfm: ca.crt: holds no certificate\n") and not last_words


def test_a_stage_that_ends_well_leaves_nothing(last_words: list[str]) -> None:
    with tasks.stage():
        pass
    assert not last_words


def test_a_stage_sets_up_its_environment_before_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # and not delenv, which would not undo what the stage sets
    monkeypatch.setenv("ADFM_MLFLOW_TRACKING_URI", "https://mlflow.example.com")
    with tasks.stage():
        assert os.environ["MLFLOW_TRACKING_URI"] == "https://mlflow.example.com"


def test_a_stage_waits_for_mlflow_and_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setattr(retries.time, "sleep", pauses.append)
    away = {"MLflow": [Unreachable("no connection"), Unreachable("no connection")], "model": [Unreachable("timed out")]}

    def answer(server: str) -> None:
        if away[server]:
            raise away[server].pop()

    monkeypatch.setattr(tracking, "configure", lambda: answer("MLflow"))
    monkeypatch.setattr(loading, "resolve", lambda *_: answer("model"))
    tasks.wait_for_servers(Params().model)
    assert pauses == [10, 20, 10]
    monkeypatch.setattr(loading, "resolve", lambda *_: fail(AdfmError("no such model"))())
    with pytest.raises(AdfmError, match="no such model"):
        tasks.wait_for_servers(Params().model)
    assert pauses == [10, 20, 10]


def test_the_check_takes_settings_apart_for_those_that_read_them() -> None:
    settings, source, name, revision, inspection, conversion = tasks.check("seed: 3\nsft: {steps: 1}\n")
    assert loads(settings).seed == 3
    assert source == revision == "synthetic://?images=200"
    assert name == "synthetic"
    assert set(yaml.safe_load(inspection)) == {"convert", "split"}
    assert set(yaml.safe_load(conversion)) == {"seed", "convert", "split", "validation", "mlflow"}
    others = tasks.check("seed: 3\nsft: {steps: 2}\n")
    assert others[1:] == (source, name, revision, inspection, conversion)


def test_images_are_inspected_again_only_for_settings_that_their_inspection_reads() -> None:
    inspection, conversion = tasks.check("")[4:]
    others = tasks.check("split: {test: 0.3}\nconvert: {shard_images: 7}\n")[4:]
    assert others[0] == inspection and others[1] != conversion
    for settings in ("convert: {min_area: 7}", "split: {group: (.*)}", "split: {holdout_categories: [bolt]}"):
        (other,) = tasks.check(settings)[4:5]
        assert other != inspection
        assert set(loads(other).model_dump(exclude_defaults=True)) == {settings.partition(":")[0]}


def test_on_a_cluster_a_store_that_would_be_lost_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv(STARTED, "2026-11-20T10:00:00+00:00")
    tasks.check("")  # a local run, in the pod of a notebook, keeps its files
    monkeypatch.delenv(STARTED)
    with pytest.raises(AdfmError, match="MLflow's address is not set.*secret adfm-mlflow"):
        tasks.check("")


@pytest.mark.parametrize(
    ("machines", "ranks"), [({"num_gpus": 3}, 3), ({"num_gpus": 3, "num_nodes": 2}, 6), ({"num_nodes": 3}, 3)]
)
def test_a_batch_that_does_not_divide_among_all_processes_is_refused(machines: dict[str, int], ranks: int) -> None:
    with pytest.raises(AdfmError, match=rf"\b{ranks}\b"):
        tasks.check("train: {prompts_per_step: 4, num_generations: 4}", **machines)


def test_what_a_trainjob_needs_is_checked_only_if_one_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(nodes, "check", lambda params, **machines: calls.append(machines))
    tasks.check("", "run-7")
    assert not calls
    tasks.check("", "run-7", num_nodes=2)
    assert calls == [{"run": "run-7", "nodes": 2, "gpus": 0, "gpu_type": "nvidia.com/gpu"}]


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("AWS_ACCESS_KEY_ID",),
        ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
        ("ADFM_S3_ACCESS_KEY_ID", "ADFM_S3_SECRET_ACCESS_KEY"),
    ],
)
def test_on_a_cluster_data_in_s3_want_a_secret_or_an_account_that_may(
    names: tuple[str, ...], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "ADFM_S3_"))]:
        monkeypatch.delenv(name)
    given = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "none", "AWS_SHARED_CREDENTIALS_FILE": "none"}
    given |= {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "MLFLOW_TRACKING_URI": f"sqlite:///{here}/mlflow.db"}
    for name, value in (given | dict.fromkeys(names, "any")).items():
        monkeypatch.setenv(name, value)
    source = "fetch: {source: 's3://bucket/line'}"
    if len(names) == 2:
        assert tasks.check(source)[1] == "s3://bucket/line"
    else:
        with pytest.raises(AdfmError, match="secret adfm-s3 .*keys access-key and secret-key"):
            tasks.check(source)


def test_gpus_that_no_machine_has_are_refused_also_where_a_run_is_started_by_hand() -> None:
    with pytest.raises(AdfmError, match="^unknown GPU type 'nvidia.com/gpus'; the nearest is nvidia.com/gpu"):
        tasks.check("", gpu_type="nvidia.com/gpus")
    with pytest.raises(AdfmError, match="num_gpus is -1"):
        tasks.check("", num_gpus=-1)
    tasks.check_gpus("nvidia.com/mig-1g.5gb", 2)


@pytest.mark.parametrize(
    ("source", "fixed"),
    [
        ("synthetic://?images=20", True),
        (f"dvc:///data/line@{'a' * 40}:shards", True),
        ("dvc:///data/line@main:shards", False),
        ("s3://bucket/line", False),
        ("/data/line", False),
    ],
)
def test_a_source_whose_content_may_change_has_no_revision_of_its_own(source: str, fixed: bool) -> None:
    assert tasks.fixed_revision(source) == (source if fixed else "")


def test_settings_that_are_wrong_are_all_named() -> None:
    with pytest.raises(
        AdfmError, match=r"(?s)params line 1: seed .*params line 2: unknown setting `tarin`; did you mean `train`"
    ):
        tasks.check("seed: x\ntarin: {}\n")


def test_the_last_row_of_curves(here: Path) -> None:
    with (here / "curves.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["step", "loss", "kl"], [1, 2.0, 0.1], [2, 1.5, ""]])
    assert tasks.last_metrics(here / "curves.csv") == {"step": 2.0, "loss": 1.5}
    (here / "curves.csv").write_text("step\r\n")
    assert tasks.last_metrics(here / "curves.csv") == {}


@pytest.mark.parametrize(("threshold", "suffix"), [(None, ""), (0.4, "_at_threshold")])
def test_metrics_of_an_evaluation_and_those_that_the_gate_judges(here: Path, threshold: Any, suffix: str) -> None:
    (here / "metrics").mkdir()
    (here / "metrics" / "base.json").write_text(json.dumps({"accuracy": 0.5, "auroc": None}))
    (here / "metrics" / "trained.json").write_text(json.dumps({"accuracy": 0.75, "auroc": 1.0}))
    greedy = {"balanced_accuracy": 0.7, "miss_rate": 0.2, "overkill": 0.3, "iou": None}
    decided = {f"{name}_at_threshold": 0.1 for name in greedy}
    candidate = greedy | {"threshold": threshold} | (decided if threshold else {})
    (here / "metrics.json").write_text(json.dumps({"base": {}, "trained": candidate}))
    metrics, first = tasks.evaluation_metrics(here)
    assert first == [f"trained/{name}{suffix}" for name in greedy]
    headline = {"base/accuracy": 0.5, "trained/accuracy": 0.75, "trained/auroc": 1.0}
    judged = {f"trained/{name}": value for name, value in (decided if threshold else greedy).items()}
    assert metrics == headline | {name: value for name, value in judged.items() if value is not None}


def test_metrics_that_come_first_are_numbered_because_the_page_sorts_by_name() -> None:
    artifact = dsl.Metrics(name="training_metrics", uri="", metadata={})
    tasks.log_metrics(artifact, "Training metrics", {"kl": 1.0, "a": 2.0, "reward": 3.0}, ["reward", "gone", "kl"])
    assert artifact.metadata == {"display_name": "Training metrics", "1 reward": 3.0, "2 kl": 1.0, "a": 2.0}
    assert max(len(tasks.TRAINING_FIRST), len(tasks.SFT_FIRST)) < 10  # "10" would come before "2"


def test_metrics_that_json_lacks_do_not_fail_a_task_that_has_done_its_work() -> None:
    artifact = dsl.Metrics(name="training_metrics", uri="", metadata={})
    tasks.log_metrics(artifact, "Training metrics", {"kl": math.nan, "a": math.inf, "reward": 3.0}, ["kl", "reward"])
    assert artifact.metadata == {"display_name": "Training metrics", "1 reward": 3.0}


@pytest.mark.parametrize("in_a_pod", [False, True])
def test_errors_in_packed_data_are_listed_where_they_can_be_read(
    in_a_pod: bool, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if in_a_pod:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    (here / "line").mkdir()
    packed.pack(here / "line", here / "line.tar")
    listing = here / "shards.problems.txt"
    problems = [f"{number:02d}.jpg: has no mask" for number in range(12)]
    with pytest.raises(BadData) as error, tasks.raw_data(here / "line.tar") as folder:
        raise BadData(folder, "mvtec", problems).written(listing)
    assert str(error.value).startswith("line: has no mask (12 of 12 problems, layout mvtec)\n")
    place = "the log above" if in_a_pod else listing
    assert f"\nAll of them are listed in {place}.\n" in str(error.value)
    assert ("11.jpg: has no mask" in capsys.readouterr().out) == in_a_pod


def test_confusion_has_truth_in_rows_and_decisions_in_columns(here: Path) -> None:
    (here / "plots").mkdir()
    answers = ["normal,normal", "normal,anomalous", "anomalous,unparseable", "anomalous,anomalous", "normal,normal"]
    (here / "plots" / "confusion.csv").write_text(
        "\n".join(["actual,predicted,decision", *(each.replace(",", ",-,") for each in answers)])
    )
    assert tasks.confusion(here) == (
        ["normal", "anomalous", "unparseable"],
        [[2, 1, 0], [0, 1, 1], [0, 0, 0]],
    )


def test_a_roc_curve_is_finite_and_of_few_points_with_both_ends(here: Path) -> None:
    (here / "plots").mkdir()
    rows = [(0.0, 0.0, math.inf), *((i / 999, i / 999, 1 - i / 1000) for i in range(1000))]
    with (here / "plots" / "roc.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["fpr", "tpr", "threshold"], *rows])
    fpr, tpr, threshold = tasks.roc(here)
    assert len(fpr) == len(tpr) == len(threshold) == 200
    assert (fpr[0], tpr[0], threshold[0]) == (0.0, 0.0, 2.0)
    assert (fpr[-1], tpr[-1], threshold[-1]) == pytest.approx((1.0, 1.0, 0.001))
    assert fpr == sorted(fpr)
    assert threshold == sorted(threshold, reverse=True)
    (here / "plots" / "roc.csv").write_text("fpr,tpr,threshold\n")
    assert tasks.roc(here) == ([], [], [])


def test_a_link_leads_to_the_public_address_and_is_made_only_to_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADFM_MLFLOW_UI", raising=False)
    assert tasks.version_link("adfm", "3") == "models:/adfm/3"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.adfm.svc:5000")
    assert 'href="http://mlflow.adfm.svc:5000/#/models/adfm/versions/3"' in tasks.version_link("adfm", "3")
    monkeypatch.setenv("ADFM_MLFLOW_UI", "https://mlflow.example.com/")
    address = "https://mlflow.example.com/#/models/adfm/versions/3"
    assert tasks.version_link("adfm", "3") == f'models:/adfm/3: <a href="{address}">{address}</a>'


def test_the_table_of_kinds_is_square(here: Path) -> None:
    (here / "plots").mkdir()
    (here / "plots" / "kinds.csv").write_text("actual,predicted\n")
    assert tasks.kinds(here) is None
    (here / "plots" / "kinds.csv").write_text('actual,predicted\ndent,dent\ndent,(normal)\n"a,b",dent\n')
    assert tasks.kinds(here) == (["(normal)", "a,b", "dent"], [[0, 0, 0], [0, 0, 1], [1, 0, 1]])


def test_settings_that_a_pipeline_does_not_use_are_named() -> None:
    assert tasks.unused_settings(Params().evaluate) == []
    (text,) = tasks.unused_settings(Params.model_validate({"evaluate": {"folds": 5}}).evaluate)
    assert text.startswith("evaluate.folds is 5 and is not used") and "`adfm folds`" in text
