from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from PIL import Image

import adfm
from adfm import signing, tracking
from adfm.cli import main
from adfm.files import digest
from adfm.params import Params
from adfm.registry import history, pyfunc

FILES = ("MLmodel", "params.yaml", "model/adfm.json", "evaluation/metrics.json")
MLMODEL = "flavors:\n  python_function:\n    loader_module: {}\n"
LOADER = """\
import os, pathlib
class Model:
    def __init__(self, path):
        self.answer = [path, (pathlib.Path(path) / "params.yaml").read_text(), os.environ.get("ADFM_SHADOW", "")]
    def predict(self, data, params=None):
        return self.answer
def _load_pyfunc(path):
    {}
    return Model(path)
"""


@pytest.fixture
def loaders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path of Python with two loaders: one that serves, and one that leaves a file behind."""
    folder = tmp_path / "loaders"
    folder.mkdir()
    (folder / "plain_loader.py").write_text(LOADER.format("pass"))
    (folder / "evil_loader.py").write_text(LOADER.format(f"pathlib.Path({str(tmp_path / 'evil')!r}).touch()"))
    (folder / "failing_loader.py").write_text(LOADER.format("raise OSError('it cannot be loaded')"))
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture
def version(store: Path, loaders: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a signed version, `models:/adfm/1`, where the artifact store has them."""
    monkeypatch.delenv("ADFM_KEYS", raising=False)
    folder = store / "artifacts"
    write(folder)
    signing.sign(folder, signing.keys())
    client = tracking.client()
    client.create_registered_model("adfm")
    add(client, folder)
    return folder


def write(folder: Path, loader: str = "plain_loader", salt: str = "") -> None:
    for file in (*FILES, "gate.json"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(f"content: {file}{salt}\n")
    (folder / "MLmodel").write_text(MLMODEL.format(loader))


def add(client: Any, folder: Path) -> None:
    client.create_model_version("adfm", folder.as_uri(), tags={"artifact_digest": digest(folder / "model")})


def move(number: str, folder: Path, name: str = "adfm") -> None:
    """Puts a version into production: in the signed history, and by its alias."""
    client, keys = tracking.client(), signing.keys()
    seen = history.read(client, name, keys)
    moved = {"production": number, "previous": "none", "replaced": "none", "manifest": signing.manifest(folder)}
    history.append(client, name, keys, seen, "promote", number, **moved)
    client.set_registered_model_alias(name, "production", number)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """Starts `adfm serve`; the process and, once it answers, its address."""
    started: list[subprocess.Popen[str]] = []
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def start(*options: str, wait: bool = True) -> tuple[subprocess.Popen[str], str]:
        log = tmp_path / f"serve-{len(started)}.log"
        path = os.pathsep.join(map(str, (Path(adfm.__file__).parents[1], *sys.path)))
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "adfm", "serve", *options, "--port", "0"],
                env=os.environ | {"PYTHONPATH": path, "TMPDIR": str(tmp_path / "private")},
                stdout=file, stderr=file, text=True, start_new_session=True,
            )  # fmt: skip
        started.append(process)
        for _ in range(1200 if wait else 0):
            address = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
            try:
                if address:
                    opener.open(f"{address[0]}/ping", timeout=5).close()
                    return process, address[0]
            except OSError:
                pass
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        return process, str(log)

    (tmp_path / "private").mkdir()
    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)


def post(address: str, image: str) -> Any:
    body = json.dumps({"dataframe_records": [{"image": image}]}).encode()
    request = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
        return json.loads(answer.read())["predictions"]


# ----------------------------------------------------------------------------------------------- what is not served


def refused(capsys: pytest.CaptureFixture[str], model: str = "models:/adfm/1") -> str:
    """What `adfm serve` says when it refuses; it does not start."""
    capsys.readouterr()
    assert main(["serve", model, "--port", "0"]) == 2
    out, message = capsys.readouterr()
    assert not out and message.startswith("adfm: error: ") and message.count("\n") == 1
    return message


@pytest.mark.parametrize("file", FILES)
def test_a_changed_file_is_refused_by_its_name(file: str, version: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray((version / file).read_bytes())
    content[-2] ^= 1
    (version / file).write_bytes(content)
    assert f"models:/adfm/1 is not what was signed: changed: {file}." in refused(capsys)
    (version / file).unlink()
    assert f"models:/adfm/1 is not what was signed: missing: {file}." in refused(capsys)
    (version / file).symlink_to(version / "gate.json")
    assert f"models:/adfm/1 is not what was signed: changed: {file}." in refused(capsys)


def test_an_exchanged_mlmodel_is_refused_before_its_loader_runs(
    version: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (version / "MLmodel").write_text(MLMODEL.format("evil_loader"))
    assert "changed: MLmodel." in refused(capsys)
    (version / "MLmodel").write_text(MLMODEL.format("worse_loader") + "    code: code\n")
    (version / "code").mkdir()
    (version / "code" / "worse_loader.py").write_text(LOADER.format(f"open({str(tmp_path / 'evil')!r}, 'w')"))
    assert "changed: MLmodel; too many: code/worse_loader.py." in refused(capsys)
    assert not (tmp_path / "evil").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's, of its own type hints
        mlflow.pyfunc.load_model("models:/adfm/1")  # what MLflow itself does with it
    assert (tmp_path / "evil").exists()


def test_what_is_no_plain_file_in_the_store_is_refused(version: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = version / "model" / "odd"
    for make in (lambda: odd.symlink_to("nowhere"), lambda: odd.symlink_to("/etc"), lambda: os.mkfifo(odd)):
        make()
        assert "models:/adfm/1 cannot be verified: its files cannot be downloaded (" in refused(capsys)
        odd.unlink()
    (version / "model" / "a\nb").write_text("")
    assert "models:/adfm/1 cannot be verified: its files cannot be downloaded (" in refused(capsys)
    shutil.rmtree(version)
    assert "models:/adfm/1 has no model.sig: " in refused(capsys)


def test_files_too_many_are_refused(version: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (version / "model" / "modeling.py").write_text("")
    assert "too many: model/modeling.py." in refused(capsys)


def test_a_version_without_a_signature_or_with_a_foreign_one_is_refused(
    version: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = (version / "model.sig").read_bytes()
    (version / "model.sig").unlink()
    assert "models:/adfm/1 has no model.sig: " in refused(capsys)
    (version / "model.sig").write_bytes(b"")
    assert "models:/adfm/1 is not what was signed: model.sig is damaged" in refused(capsys)
    (tmp_path / "other").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "other")
        signing.sign(version, signing.keys())
    assert "models:/adfm/1 was signed with a key whose versions do not count" in refused(capsys)
    (version / "model.sig").write_bytes(own)
    monkeypatch.setenv("ADFM_KEYS", str(tmp_path / "nowhere"))
    assert f"ADFM_KEYS: folder {tmp_path / 'nowhere'} is missing" in refused(capsys)


def test_another_signed_version_in_its_place_is_refused(version: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(version, salt=" of an earlier version")
    signing.sign(version, signing.keys())
    assert "models:/adfm/1: its model files have the digest" in refused(capsys)


def test_an_alias_that_was_moved_by_hand_is_refused(version: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client = tracking.client()
    client.set_registered_model_alias("adfm", "production", "1")
    assert "points at version 1, and its history has none in production" in refused(capsys, "models:/adfm@production")
    move("1", version)
    add(client, version)
    client.set_registered_model_alias("adfm", "production", "2")
    message = refused(capsys, "models:/adfm@production")
    assert (
        "points at version 2, and its history has version 1 in production: somebody has moved the alias by hand"
        in message
    )


def test_files_that_were_signed_again_since_the_promotion_are_refused(
    version: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    move("1", version)
    (version / "evaluation" / "metrics.json").write_text("better")
    signing.sign(version, signing.keys())
    message = refused(capsys, "models:/adfm@production")
    assert "models:/adfm/1: its files were changed, and signed again, since it came into production" in message


def test_files_that_were_signed_again_since_the_decision_are_refused(
    version: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client, keys = tracking.client(), signing.keys()
    seen = history.read(client, "adfm", keys)
    history.append(client, "adfm", keys, seen, "judge", "1", manifest=signing.manifest(version))
    (version / "evaluation" / "metrics.json").write_text("better")
    signing.sign(version, keys)
    assert "signed again, since the gate decided on them" in refused(capsys, "models:/adfm/1")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert main(["predict", str(tmp_path / "a.png"), "--model", "models:/adfm/1"]) == 2
    assert "signed again, since the gate decided on them" in capsys.readouterr().err


def test_what_names_no_version_is_an_error(version: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, says in [
        ("models:/adfm@production", "No version of adfm has the alias production in MLflow"),
        ("models:/adfm/2", "MLflow has no version 2"),
        ("somewhere", "somewhere names no version; write models:/adfm/3"),
    ]:
        assert main(["serve", model, "--port", "0"]) == 1
        assert says in capsys.readouterr().err


def test_an_address_that_is_taken_is_an_error(version: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "models:/adfm/1", "--port", str(port)]) == 1
    assert f"127.0.0.1:{port} cannot be listened on" in capsys.readouterr().err
    assert main(["serve", "models:/adfm/1", "--port", "65536"]) == 1
    assert main(["serve", "models:/adfm/1", "--workers", "0"]) == 1


def test_predict_refuses_what_serve_refuses(version: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (version / "params.yaml").write_text("evaluate: {max_new_tokens: 1}")
    assert main(["predict", str(tmp_path / "a.png"), "--model", "models:/adfm/1"]) == 2
    assert "models:/adfm/1 is not what was signed: changed: params.yaml." in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- what is served


def test_the_verified_copy_is_served_until_stopped(version: Path, serve: Any, tmp_path: Path) -> None:
    move("1", version)
    process, address = serve("--workers", "2")
    log = (tmp_path / "serve-0.log").read_text()
    assert f"models:/adfm/1 is verified; loading it to serve on {address}" in log
    path, params, _ = post(address, "")
    assert Path(path).is_relative_to(tmp_path / "private") and params == "content: params.yaml\n"
    above = next(folder for folder in Path(path).parents if folder.parent == tmp_path / "private")
    assert above.stat().st_mode & 0o777 == 0o700
    (version / "params.yaml").write_text("changed while it is served")
    assert post(address, "")[1] == params
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert not list((tmp_path / "private").glob("adfm-serve-*"))


def test_the_shadow_is_verified_too(version: Path, serve: Any, tmp_path: Path, capsys: Any) -> None:
    candidate = tmp_path / "candidate"
    write(candidate, salt=" of a candidate")
    signing.sign(candidate, signing.keys())
    add(tracking.client(), candidate)
    process, address = serve("models:/adfm/1", "--shadow", "models:/adfm/2")
    path, params, beside = post(address, "")
    assert params == "content: params.yaml\n"
    assert (Path(beside) / "params.yaml").read_text() == "content: params.yaml of a candidate\n"
    assert Path(beside) != Path(path) and Path(beside).is_relative_to(tmp_path / "private")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert not list((tmp_path / "private").glob("adfm-serve-*"))
    (candidate / "params.yaml").write_text("")
    assert main(["serve", "models:/adfm/1", "--port", "0", "--shadow", "models:/adfm/2"]) == 2
    assert "models:/adfm/2 is not what was signed: changed: params.yaml." in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*Any type hint:UserWarning")  # MLflow's, of its own
def test_workers_share_the_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import uvicorn.supervisors
    from mlflow.pyfunc import scoring_server

    from adfm.process import cpus
    from adfm.serving import server

    threads: list[str] = []

    class Supervisor:
        processes: tuple[object, ...] = ()

        def __init__(self, config: object, sockets: object) -> None:
            pass

        def run(self) -> None:
            threads.append(os.environ["OMP_NUM_THREADS"])

    monkeypatch.setattr(scoring_server, "get_cmd", lambda folder: ("", {}))
    monkeypatch.setattr(uvicorn.supervisors, "Multiprocess", Supervisor)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setattr(cpus, "count", lambda: 8)
    with socket.socket() as listener:
        server._run(tmp_path, listener, 4)
    assert threads == ["2"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_model_that_cannot_be_loaded_ends_the_server(workers: str, version: Path, serve: Any, tmp_path: Path) -> None:
    write(version, "failing_loader")
    signing.sign(version, signing.keys())
    process, log = serve("models:/adfm/1", "--workers", workers, wait=False)
    assert process.wait(120) != 0
    assert "it cannot be loaded" in Path(log).read_text()
    assert not list((tmp_path / "private").glob("adfm-serve-*"))


def test_the_version_in_production_is_served_from_a_real_server(
    server: str, small_shards: Path, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """With adfm's own loader and a reader's keys, against MLflow with its artifacts behind HTTP."""
    from peft import LoraConfig, get_peft_model

    from adfm.models import loading
    from adfm.training.sft import save

    monkeypatch.delenv("ADFM_KEYS", raising=False)
    params, folder = Params(), tmp_path / "version"
    loaded = loading.load("embedded://tiny-base", params.model)
    adapted = get_peft_model(loaded.model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    pyfunc.write(folder)
    save(folder / "model", adapted, loaded, small_shards, params, "train", "0" * 32)
    (folder / "params.yaml").write_text(tracking.settings(params))
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "metrics.json").write_text("{}")
    signing.sign(folder, signing.keys())

    client = tracking.client()
    logged = mlflow.initialize_logged_model(name="adapter")
    client.log_model_artifacts(logged.model_id, str(folder))
    client.finalize_logged_model(logged.model_id, "READY")
    client.create_registered_model("served")
    tags = {"artifact_digest": digest(folder / "model")}
    client.create_model_version("served", logged.model_uri, tags=tags, model_id=logged.model_id)
    move("1", folder, "served")

    reader = tmp_path / "reader"
    shutil.copytree(tmp_path / ".adfm" / "keys", reader, ignore=shutil.ignore_patterns("private.pem"))
    monkeypatch.setenv("ADFM_KEYS", str(reader))
    Image.new("RGB", (64, 64), "gray").save(tmp_path / "a.png")
    assert main(["predict", str(tmp_path / "a.png"), "--model", "models:/served@production", "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)

    process, address = serve("--set", "mlflow.registered_model=served")
    answer = post(address, base64.b64encode((tmp_path / "a.png").read_bytes()).decode())[0]
    assert answer["label"] == expected["label"] and answer["reasoning"] == expected["reasoning"]
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0

    (tmp_path / "MLmodel").write_text((folder / "MLmodel").read_text().replace("adfm.serving.scoring", "os"))
    client.log_model_artifact(logged.model_id, str(tmp_path / "MLmodel"))  # as anybody who may edit the run can
    assert main(["serve", "models:/served@production", "--port", "0"]) == 2
    assert "models:/served/1 is not what was signed: changed: MLmodel." in capsys.readouterr().err
