"""`adfm env`: complete, fast, and safe to paste into a bug report."""

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from adfm.cli import main

SECRET = "hunter2"
UNREACHABLE = f"http://anna:{SECRET}@192.0.2.1:5000/mlflow?token={SECRET}"  # RFC 5737: routed nowhere


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("ADFM_", "MLFLOW_"))]:
        monkeypatch.delenv(name)


def test_it_says_versions_machine_and_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "params.yaml").write_text("train: [")  # settings that are broken are no hindrance
    assert main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == metadata.version("torch")
    assert report["versions"]["Python"] == platform.python_version()
    assert set(report["machine"]) >= {"system", "CPUs", "memory", "GPUs"}
    assert report["paths"]["working folder"].startswith(str(tmp_path))
    assert report["paths"]["keys"] == f"{tmp_path}/.adfm/keys (not there yet)"
    assert report["environment variables"] == {}
    assert main(["env"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["torch", metadata.version("torch")] in lines
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]  # neither a store nor keys are made


def test_it_prints_no_secret_and_contacts_no_server_and_imports_nothing_heavy() -> None:
    variables = {
        "ADFM_MLFLOW_TRACKING_URI": UNREACHABLE,
        "ADFM_MLFLOW_UI": f"anna:{SECRET}@192.0.2.1",
        "ADFM_MLFLOW_TRACKING_USERNAME": "anna",
        "ADFM_MLFLOW_TRACKING_PASSWORD": SECRET,
        "ADFM_ALERT_WEBHOOK": f"https://chat.example.com/{SECRET}",
        "ADFM_ANYTHING": SECRET,
        "ADFM_KEYS": "/etc/adfm/keys",
        "ADFM_SERVE_LOG": "",
    }
    code = (
        "import socket, sys\n"
        "from adfm.cli import main\n"
        "def refuse(*_): raise AssertionError('a connection')\n"
        "socket.socket.connect = refuse\n"
        "main(['env'])\n"
        "heavy = {'torch', 'transformers', 'mlflow', 'pandas', 'kfp', 'dvc'} & set(sys.modules)\n"
        "print('imported:', heavy or 'nothing')\n"
    )
    if Path("/proc/driver/nvidia/version").exists():
        code = code.replace("'torch', ", "")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | variables)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr and "anna" not in done.stdout
    lines = {" ".join(line.split()) for line in done.stdout.splitlines()}
    assert "imported: nothing" in lines
    assert "MLflow http://192.0.2.1:5000/mlflow" in lines
    assert {"ADFM_MLFLOW_TRACKING_PASSWORD (set)", "ADFM_ALERT_WEBHOOK (set)", "ADFM_MLFLOW_UI (set)"} <= lines
    assert {"ADFM_KEYS /etc/adfm/keys", "ADFM_SERVE_LOG (empty)", "ADFM_ANYTHING (set)"} <= lines


def test_a_certificate_authority_that_cannot_be_used_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ADFM_CA_BUNDLE", str(tmp_path / "none.pem"))
    assert main(["env"]) == 0
    assert f"{tmp_path / 'none.pem'}: cannot be read" in capsys.readouterr().out
