import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from adfm import descriptions, tracking
from adfm.errors import AdfmError
from adfm.params import Mlflow, Params


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The embedded store in an empty folder; made once, because MLflow takes seconds for the first use of a file."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder)
        tracking.configure()
        yield folder


@pytest.fixture
def here(store, monkeypatch):
    monkeypatch.chdir(store)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    return store


@contextmanager
def server(status: int, body: bytes = b""):
    """A web server that answers everything with `status`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield http.server_port
        http.shutdown()
        thread.join()


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_import_is_light():
    heavy = "import sys, adfm.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", heavy], check=False).returncode == 0


def test_embedded_store_is_in_the_current_folder(here):
    assert tracking.configure() == f"sqlite:///{here}/mlflow.db"
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_run_carries_what_repeats_it(here):
    params = Params(seed=7)
    with tracking.start_run("train", params, {"data_fingerprint": "abc"}) as run:
        (here / "note.txt").write_text("x")
        import mlflow

        mlflow.log_artifact(str(here / "note.txt"))
    data = tracking.client().get_run(run.info.run_id)
    assert data.info.status == "FINISHED"
    assert data.info.run_name == "train"
    assert data.data.params["seed"] == "7"
    assert data.data.params["train.weights.format"] == "1.0"
    assert data.data.params["mlflow.experiment"] == "adfm"
    assert data.data.tags["stage"] == "train"
    assert data.data.tags["data_fingerprint"] == "abc"
    for library in ("torch", "transformers", "trl", "peft"):
        assert data.data.tags[f"library.{library}"] == metadata.version(library)
    artifacts = here / "mlartifacts" / run.info.run_id / "artifacts"
    assert (artifacts / "note.txt").read_text() == "x"
    assert yaml.safe_load((artifacts / "params.yaml").read_text()) == params.model_dump(mode="json", by_alias=True)


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_run_ends_as_it_went(here, error, status):
    with pytest.raises(error), tracking.start_run("train", Params()) as run:
        raise error
    assert tracking.client().get_run(run.info.run_id).info.status == status
    with tracking.start_run("train", Params()):  # nothing is left active
        pass


def test_the_experiment_says_where_to_look_until_somebody_edits_that(here):
    def note():
        return tracking.find_experiment("described").tags[descriptions.NOTE]

    def start(model):
        with tracking.start_run("train", Params(mlflow=Mlflow(experiment="described", registered_model=model))):
            pass

    start("line-1")
    assert "](#/models/line-1?" in note()
    start("line-2")
    assert "](#/models/line-2?" in note() and "line-1" not in note()
    store, edited = tracking.client(), f"Ask Ada first.\n\n{note()}"
    store.set_experiment_tag(tracking.experiment("described"), descriptions.NOTE, edited)
    start("line-3")
    assert note() == edited


def test_a_run_is_resumed(here):
    import mlflow

    with tracking.start_run("train", Params(seed=1)) as first:
        mlflow.log_metric("reward", 0.1, step=1)
    with tracking.start_run("train", Params(seed=2), run_id=first.info.run_id) as second:
        mlflow.log_metric("reward", 0.2, step=2)
    assert second.info.run_id == first.info.run_id
    assert [m.value for m in tracking.client().get_metric_history(first.info.run_id, "reward")] == [0.1, 0.2]
    assert tracking.client().get_run(first.info.run_id).data.params["seed"] == "1"
    artifacts = here / "mlartifacts" / first.info.run_id / "artifacts"
    assert yaml.safe_load((artifacts / "params.yaml").read_text())["seed"] == 2


def test_attaches_to_the_run_of_the_platform(here, monkeypatch):
    given = tracking.client().create_run(tracking.experiment("platform"), run_name="task").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    for stage in ("sft", "train"):
        with tracking.start_run(stage, Params()) as run:
            assert run.info.run_id == given
    run = tracking.client().get_run(given)
    assert run.info.run_name == "task"
    assert run.data.params["sft.steps"] == str(Params().sft.steps)


def test_a_missing_run(here, monkeypatch):
    assert tracking.find_run(None) is None
    assert tracking.find_run("0" * 32) is None
    with tracking.start_run("train", Params()) as run:
        pass
    assert tracking.find_run(run.info.run_id).info.run_id == run.info.run_id
    with tracking.start_run("train", Params(), run_id="0" * 32) as run:
        assert run.info.run_id != "0" * 32
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with (
        pytest.raises(
            AdfmError, match=rf"MLflow at sqlite:///{here}/mlflow\.db does not have the run 0000.* MLFLOW_RUN_ID"
        ),
        tracking.start_run("train", Params()),
    ):
        pass
    assert os.environ["MLFLOW_RUN_ID"] == "0" * 32
    tracking.client().delete_run(run.info.run_id)
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
    with pytest.raises(AdfmError, match="or was deleted"), tracking.start_run("train", Params()):
        pass


def test_long_values_are_cut_not_refused(here):
    params = Params(lora={"target_modules": [f"layers.{i}.attention.query" for i in range(400)]})
    with tracking.start_run("train", params) as run:
        pass
    data = tracking.client().get_run(run.info.run_id).data
    assert data.params["lora.target_modules"].startswith("['layers.0.attention.query'")
    assert len(data.params["lora.target_modules"]) == 6000


def test_deleted_experiment(here):
    params = Params(mlflow=Mlflow(experiment="gone"))
    tracking.client().delete_experiment(tracking.experiment("gone"))
    with pytest.raises(AdfmError, match="mlflow experiments restore"), tracking.start_run("train", params):
        pass


def test_store_that_fails_during_the_run(tmp_path, store, monkeypatch):
    copy = tmp_path / "mlflow.db"
    copy.write_bytes((store / "mlflow.db").read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{copy}")
    import mlflow

    with pytest.raises(AdfmError, match="no such table: metrics"), tracking.start_run("train", Params()):
        with closing(sqlite3.connect(copy)) as database:
            database.execute("DROP TABLE metrics")
        mlflow.log_metric("reward", 0.1)
    assert mlflow.active_run() is None


def test_files_that_go_to_s3_without_a_server_between(here, monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    tracking.client().create_experiment("direct", artifact_location="s3://bucket/direct")
    says = r"(?s)MLflow at .*sends clients to S3, which failed: .*credentials.*--serve-artifacts"
    with (
        pytest.raises(AdfmError, match=says),
        tracking.start_run("train", Params(mlflow=Mlflow(experiment="direct"))),
    ):
        pytest.fail("the body was run")


def test_each_folder_has_its_own_store(here, tmp_path, monkeypatch):
    (tmp_path / "mlflow.db").write_bytes((here / "mlflow.db").read_bytes())
    monkeypatch.chdir(tmp_path)
    with tracking.start_run("train", Params(mlflow=Mlflow(experiment="elsewhere"))) as run:
        pass
    assert (tmp_path / "mlartifacts" / run.info.run_id).is_dir()
    monkeypatch.chdir(here)
    tracking.configure()
    assert tracking.find_run(run.info.run_id) is None


@pytest.mark.parametrize("login", ["", "someone:hidden@", "someone:an@hidden@"])
def test_a_missing_server(tmp_path, monkeypatch, login):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{login}127.0.0.1:{port}")
    start = time.monotonic()
    with pytest.raises(AdfmError) as caught, tracking.start_run("train", Params()):
        pass
    assert time.monotonic() - start < 60  # with its usual retries, MLflow takes minutes
    assert f"MLflow at http://127.0.0.1:{port} failed" in str(caught.value)
    assert "Connection refused" in str(caught.value)
    assert "MLFLOW_TRACKING_URI" in str(caught.value)
    assert "hidden" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_a_token_that_no_header_can_hold_is_not_shown(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hidden\n")
    with pytest.raises(AdfmError, match="Invalid header value\n") as caught:
        tracking.configure()
    assert "hidden" not in str(caught.value)


def test_server_that_never_answers(monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # the user's own patience is kept
        start = time.monotonic()
        with pytest.raises(AdfmError, match=r"timeout|timed out"):
            tracking.configure()
        assert 1 <= time.monotonic() - start < 60
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "1"


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (401, b"You are not authenticated.", "401.*MLFLOW_TRACKING_USERNAME"),
        (503, b"", "503"),
        (200, b"<html>It works!</html>", "not in a valid JSON format"),
    ],
)
def test_server_that_refuses(monkeypatch, status, body, says):
    with server(status, body) as port:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        with pytest.raises(AdfmError, match=f"(?s)MLflow at http://127.0.0.1:{port} failed.*{says}"):
            tracking.configure()


def test_a_damaged_database(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_text("not a database, " * 100)
    with pytest.raises(AdfmError, match=r"mlflow\.db cannot be used: file is not a database"):
        tracking.configure()


def test_address_of_no_known_kind(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "ftp://example.com")
    with pytest.raises(AdfmError, match=r"(?s)ftp://example.com.*names a server or a database"):
        tracking.configure()


def test_code_version(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tracking.code_version() == {}
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "train.py").write_text("x = 1\n")
    (tmp_path / "dvc.lock").write_text("a: 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "start")
    (tmp_path / "dvc.lock").write_text("a: 2\n")
    (tmp_path / "metrics.json").write_text("{}")
    version = tracking.code_version()
    assert version["git_commit"] == git(tmp_path, "rev-parse", "HEAD")
    assert version["git_dirty"] == "false"
    monkeypatch.chdir(tmp_path / "pipelines")
    (tmp_path / "params.yaml").write_text("seed: 1\n")
    assert tracking.code_version()["git_dirty"] == "true"
    (tmp_path / "params.yaml").unlink()
    (tmp_path / "pipelines" / "train.py").write_text("x = 2\n")
    assert tracking.code_version()["git_dirty"] == "true"
