"""What tasks do around their stages."""

import csv
import json
import math
import os
from pathlib import Path

import pytest
import yaml

from adfm import tasks
from adfm.errors import AdfmError
from adfm.params import Params, loads


@pytest.fixture(autouse=True)
def here(store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("KUBERNETES_SERVICE_HOST", "ADFM_ALERT_WEBHOOK"):
        monkeypatch.delenv(name, raising=False)
    return store


def test_the_check_takes_settings_apart_for_those_that_read_them() -> None:
    settings, source, name, revision, conversion, validation = tasks.check("seed: 3\nwarmup: {steps: 1}\n")
    assert loads(settings).seed == 3
    assert source == revision == "synthetic://"
    assert name == "synthetic"
    assert set(yaml.safe_load(conversion)) == {"seed", "convert", "split"}
    assert set(yaml.safe_load(validation)) == {"convert", "split", "validate", "register"}
    others = tasks.check("seed: 3\nwarmup: {steps: 2}\n")
    assert others[1:] == (source, name, revision, conversion, validation)


def test_on_a_cluster_a_store_that_would_be_lost_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(AdfmError, match="MLFLOW_TRACKING_URI is not set.*secret adfm-mlflow"):
        tasks.check("")


@pytest.mark.parametrize("names", [(), ("AWS_ACCESS_KEY_ID",), ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")])
def test_on_a_cluster_data_in_s3_want_a_secret_or_an_account_that_may(
    names: tuple[str, ...], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
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


def test_gpus_that_no_machine_has_are_refused_also_where_a_run_is_begun_by_hand() -> None:
    with pytest.raises(AdfmError, match="no GPU type 'nvidia.com/gpus'; the nearest is nvidia.com/gpu"):
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
    with pytest.raises(AdfmError, match=r"(?s)params line 1: seed .*params line 2: there is no setting tarin"):
        tasks.begin("seed: x\ntarin: {}\n")
    assert tasks.begin("") == Params()


def test_the_last_row_of_curves(here: Path) -> None:
    with (here / "curves.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["step", "loss", "kl"], [1, 2.0, 0.1], [2, 1.5, ""]])
    assert tasks.last_figures(here / "curves.csv") == {"step": 2.0, "loss": 1.5}
    (here / "curves.csv").write_text("step\r\n")
    assert tasks.last_figures(here / "curves.csv") == {}


def test_figures_of_an_evaluation(here: Path) -> None:
    (here / "metrics").mkdir()
    (here / "metrics" / "base.json").write_text(json.dumps({"accuracy": 0.5, "auroc": None}))
    (here / "metrics" / "trained.json").write_text(json.dumps({"accuracy": 0.75, "auroc": 1.0}))
    assert tasks.evaluation_figures(here) == {"base/accuracy": 0.5, "trained/accuracy": 0.75, "trained/auroc": 1.0}


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


def test_a_link_is_made_only_to_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tasks.version_link("adfm", "3") == "models:/adfm/3"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.com/")
    assert 'href="https://mlflow.example.com/#/models/adfm/versions/3"' in tasks.version_link("adfm", "3")
