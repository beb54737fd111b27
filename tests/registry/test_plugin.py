"""KFP's MLflow plug-in beside our server: whose address, login and run a task takes. Two real MLflow servers."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from adfm import tracking
from adfm.errors import AdfmError
from adfm.params import Params
from adfm.process import environment

Start = Callable[..., AbstractContextManager[str]]


@pytest.fixture(scope="module")
def plugin_server(start_mlflow: Start, empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with start_mlflow(tmp_path_factory.mktemp("plugin") / "home", empty_database) as uri:
        yield uri


@pytest.fixture
def nested(plugin_server: str) -> Run:
    """What the plug-in makes of a run and of a task in it (handler.go, `OnBeforeRunCreation` and `OnTaskStart`)."""
    client = MlflowClient(plugin_server)
    known = client.get_experiment_by_name("KFP-Default")
    experiment = known.experiment_id if known else client.create_experiment("KFP-Default")
    parent = client.create_run(experiment, run_name="adfm-training")
    return client.create_run(experiment, run_name="train", tags={"mlflow.parentRunId": parent.info.run_id})


@pytest.fixture
def pod(mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What every pod of ours has: the address and the pages of our server, which it returns."""
    for name in [name for name in os.environ if name.startswith(("ADFM_MLFLOW_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.setenv(name, "")  # so that what the test leaves is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("ADFM_MLFLOW_TRACKING_URI", mlflow_server)
    monkeypatch.setenv("ADFM_MLFLOW_UI", "https://mlflow.example.com")
    monkeypatch.chdir(tmp_path)
    return mlflow_server


def _runs(uri: str) -> list[Run]:
    client = MlflowClient(uri)
    experiments = [each.experiment_id for each in client.search_experiments()]
    return list(client.search_runs(experiments))


def _params(experiment: str) -> Params:
    return Params.model_validate({"mlflow": {"experiment": experiment}})


def test_the_plug_ins_run_is_resumed_in_its_own_experiment(
    pod: str, plugin_server: str, nested: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = len(_runs(pod))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", plugin_server)
    monkeypatch.setenv("MLFLOW_RUN_ID", nested.info.run_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", nested.info.experiment_id)
    environment.set_environment()
    for stage in ("sft", "train"):
        with tracking.start_run(stage, _params("not-used")) as run:
            assert run.info.run_id == nested.info.run_id
    client = MlflowClient(plugin_server)
    after = client.get_run(nested.info.run_id)
    assert after.info.experiment_id == nested.info.experiment_id
    assert after.data.tags["mlflow.parentRunId"] == nested.data.tags["mlflow.parentRunId"]
    assert after.data.tags["stage"] == "train"
    assert after.data.params["mlflow.experiment"] == "not-used"
    assert [file.path for file in client.list_artifacts(nested.info.run_id)] == ["params.yaml"]
    assert client.get_experiment_by_name("not-used") is None
    assert len(_runs(pod)) == before
    assert f"train: {plugin_server}/#/experiments/" in capsys.readouterr().out  # not our server's pages


def test_without_variables_of_the_plug_in_runs_go_to_our_server(
    pod: str, plugin_server: str, nested: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "kfp")  # the launcher's
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "theirs")
    before = len(_runs(plugin_server))
    environment.set_environment()
    with tracking.start_run("train", _params("ours")) as run:
        pass
    assert MlflowClient(pod).get_run(run.info.run_id).info.status == "FINISHED"
    assert len(_runs(plugin_server)) == before
    assert "MLFLOW_TRACKING_PASSWORD" not in os.environ
    assert "train: https://mlflow.example.com/#/experiments/" in capsys.readouterr().out


def test_a_run_of_another_server_is_named_with_the_server_that_lacks_it(
    pod: str, nested: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(_runs(pod))
    monkeypatch.setenv("MLFLOW_RUN_ID", nested.info.run_id)
    environment.set_environment()
    with (
        pytest.raises(AdfmError, match=f"MLflow at {pod} does not have the run {nested.info.run_id}.*unset MLFLOW_RUN"),
        tracking.start_run("train", Params()),
    ):
        pytest.fail("the body was run")
    assert len(_runs(pod)) == before
