"""DVC's experiments in temporary copies of the workspace leave their runs and keys in the workspace."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from adfm import tracking
from adfm.process import environment

_STAGE = """
from pathlib import Path
from adfm import tracking
from adfm.params import Params
from adfm import signing

with tracking.start_run("train", Params()) as run:
    tracking.client().log_text(run.info.run_id, "kept", "note.txt")
Path("out").write_text(f"{signing.keys().id} {Path.cwd()}")
"""


def test_an_experiment_in_a_temporary_copy(
    empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = tmp_path / "line"
    workspace.mkdir()
    monkeypatch.chdir(workspace)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "ADFM_KEYS", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    shutil.copy(empty_database, "mlflow.db")
    stage = {"cmd": f"{sys.executable} stage.py", "params": ["steps"], "outs": ["out"]}
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": {"train": stage}}))
    Path("params.yaml").write_text("steps: 1\n")
    Path("stage.py").write_text(_STAGE)
    Path(".gitignore").write_text("mlflow.db\nmlartifacts\n.adfm\n")
    _run("git", "init", "--quiet")
    _run(sys.executable, "-m", "dvc", "init", "--quiet")
    _run("git", "add", "--all")
    _run("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message=1")

    _run(sys.executable, "-m", "dvc", "exp", "run", "--temp", "--name", "longer", "--set-param", "steps=2")
    _run(sys.executable, "-m", "dvc", "exp", "apply", "longer")
    key, _, folder = Path("out").read_text().partition(" ")
    assert Path(folder).is_relative_to(workspace / ".dvc" / "tmp") and not Path(folder).exists()
    assert _key() == key
    store = tracking.client()
    (run,) = store.search_runs([tracking.experiment("adfm")])
    assert run.info.status == "FINISHED"
    assert _artifact(store, run.info.run_id) == "kept"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "default"})
    assert done.returncode == 0, done.stdout + done.stderr


def _key() -> str:
    from adfm import signing

    return signing.keys().id


def _artifact(store: MlflowClient, run: str) -> str:
    return Path(store.download_artifacts(run, "note.txt")).read_text()


def test_only_a_copy_below_the_workspace_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC sets DVC_ROOT for every stage, and what a stage starts inherits it."""
    workspace, other = tmp_path / "line", tmp_path / "other"
    for folder in (workspace / "sub", workspace / ".dvc/tmp/exps/standalone/tmp7/sub", other):
        folder.mkdir(parents=True)
    homes = []
    for root in (None, "", str(workspace)):
        monkeypatch.delenv("DVC_ROOT", raising=False) if root is None else monkeypatch.setenv("DVC_ROOT", root)
        for folder in (workspace, workspace / "sub", other, workspace / ".dvc/tmp/exps/standalone/tmp7/sub"):
            monkeypatch.chdir(folder)
            homes.append(environment.home().relative_to(tmp_path).as_posix())
    copy = "line/.dvc/tmp/exps/standalone/tmp7/sub"
    assert homes == [*["line", "line/sub", "other", copy] * 2, "line", "line/sub", "other", "line"]


def test_a_relative_database_is_that_of_the_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dvc exp run --temp` would leave it in the copy, which it removes."""
    copy = tmp_path / "line/.dvc/tmp/exps/standalone/tmp7"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "line"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs/mlflow.db")
    assert tracking.address() == f"sqlite:///{tmp_path}/line/runs/mlflow.db"
    for other in (f"sqlite:///{tmp_path}/own.db", "sqlite:///:memory:", "https://mlflow.example.com"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
        assert tracking.address() == other
    monkeypatch.chdir(tmp_path / "line")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs/mlflow.db")
    assert tracking.address() == "sqlite:///runs/mlflow.db"
