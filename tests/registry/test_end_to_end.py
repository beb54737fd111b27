"""scripts/end-to-end.sh with stand-ins for docker, kind, kubectl and KFP; MLflow, keys and logins are real."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml

from adfm.params import Params
from adfm.registry.registration import register
from tests.pipelines.kfp_api import Server, served
from tests.servers import free_port

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/end-to-end.sh"

pytestmark = pytest.mark.timeout(900)  # 12 programs start one after the other, most of which import MLflow

# Renders what is applied and created, as the real program does without a cluster, and keeps it.
KUBECTL = """#!/bin/bash
echo "kubectl $*" >>"$CALLS"
kept=$(mktemp "$KEPT/XXXXXX")
case " $* " in
  *" apply -k github.com/"*) ;;
  *" apply -k "*) REAL kustomize "${@: -1}" >"$kept" ;;
  *" apply -f - "*) cat >"$kept" ;;
  *" create "*) REAL "$@" --dry-run=client --output yaml >"$kept" ;;
  *" get secret mlpipeline-minio-artifact "*) printf bWluaW8= ;;
  *" port-forward "*)
    [ -z "${TAKEN-}" ] || { echo "error: unable to listen on any of the requested ports: [{8888 3000}]"; exit 1; }
    echo "Forwarding from 127.0.0.1:8888 -> 3000"
    exec sleep 600
    ;;
esac
"""


class Cluster:
    """What the script has asked for."""

    def __init__(self, folder: Path) -> None:
        self.calls, self.kept, self.programs = folder / "calls", folder / "kept", folder / "programs"
        self.kept.mkdir()
        self.programs.mkdir()
        for name, text in (
            ("kubectl", KUBECTL.replace("REAL", str(shutil.which("kubectl")))),
            ("docker", '#!/bin/bash\necho "docker $*" >>"$CALLS"\n'),
            ("kind", '#!/bin/bash\necho "kind $*" >>"$CALLS"\n'),
        ):
            (self.programs / name).write_text(text)
            (self.programs / name).chmod(0o755)

    def things(self) -> list[dict[str, Any]]:
        texts = [file.read_text() for file in self.kept.iterdir()]
        return [each for text in texts for each in yaml.safe_load_all(text) if each]

    def data(self, kind: str, name: str, namespace: str) -> dict[str, str]:
        """The content of a Secret or ConfigMap."""
        (thing,) = [
            each["data"]
            for each in self.things()
            if (each["kind"], each["metadata"]["name"], each["metadata"].get("namespace")) == (kind, name, namespace)
        ]
        return {key: base64.b64decode(value).decode() if kind == "Secret" else value for key, value in thing.items()}

    def keys(self, namespace: str, folder: Path) -> Path:
        """The folder of keys that pods of a namespace see."""
        folder.mkdir()
        (folder / "private.pem").write_text(self.data("Secret", "adfm-signing", namespace)["private.pem"])
        (folder / "private.pem").chmod(0o600)
        for role in ("submitters", "service"):
            (folder / role).mkdir()
            for name, key in self.data("ConfigMap", f"adfm-{role}", namespace).items():
                (folder / role / name).write_text(key)
        return folder


def until(what: Callable[[], Any], process: subprocess.Popen[bytes], log: Path, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := what()):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return value


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    if not shutil.which("kubectl"):
        pytest.skip("NOT TESTED: there is no kubectl")
    return Cluster(tmp_path)


@pytest.fixture
def kfp() -> Iterator[tuple[Server, int]]:
    """A double of KFP's API, and its port."""
    kept = Server("")

    def answer(method: str, url: str, body: bytes, headers: Any) -> tuple[int, Any]:
        if method == "GET" and (one := re.fullmatch(r".*/runs/([^/?:]+)", url)):
            return 200, next(each for each in kept.things["runs"] if each["run_id"] == one[1])
        return kept.answer(method, url, body)

    with served(answer) as address:
        yield kept, int(urlsplit(address).port or 0)
    assert kept.wrong == []


@pytest.fixture
def start(
    cluster: Cluster, kfp: tuple[Server, int], tmp_path: Path
) -> Iterator[Callable[..., tuple[subprocess.Popen[bytes], int]]]:
    """Starts the script; its process and the port where it expects MLflow."""
    port = free_port()
    dropped = ("ADFM_", "MLFLOW_", "KF")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    environment |= {
        "PATH": os.pathsep.join((str(cluster.programs), str(Path(sys.executable).parent), os.environ["PATH"])),
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "CALLS": str(cluster.calls),
        "KEPT": str(cluster.kept),
        "NO_PROXY": "127.0.0.1",
        "KFP_PORT": str(kfp[1]),
        "MLFLOW_PORT": str(port),
    }
    started = []

    def begin(**more: str) -> tuple[subprocess.Popen[bytes], int]:
        with (tmp_path / "log").open("w") as log:
            started.append(subprocess.Popen([SCRIPT], env=environment | more, stdout=log, stderr=log))
        return started[-1], port

    yield begin
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def test_a_version_goes_into_production(
    cluster, kfp, start, start_mlflow, empty_database, make_shards, make_model, make_evaluation, tmp_path, monkeypatch
) -> None:
    """What the cluster would do is done here, with the secrets and keys that the script gave it."""
    script, port = start()
    log = tmp_path / "log"
    (tmp_path / "pod").mkdir()
    monkeypatch.chdir(tmp_path / "pod")
    until(lambda: cluster.calls.exists() and "restart deployment/mlflow" in cluster.calls.read_text(), script, log)
    secret = cluster.data("Secret", "adfm-server", "adfm")
    (configs,) = [
        each["data"] for each in cluster.things() if (each["kind"], each["metadata"]["name"]) == ("ConfigMap", "mlflow")
    ]
    ini = tmp_path / "basic_auth.ini"
    ini.write_text(
        re.sub("database_uri = .*", f"database_uri = sqlite:///{tmp_path}/auth.db", configs["basic_auth.ini"])
    )
    login = {"MLFLOW_AUTH_CONFIG_PATH": str(ini), "MLFLOW_AUTH_ADMIN_PASSWORD": secret["admin-password"]}
    login["MLFLOW_FLASK_SERVER_SECRET_KEY"] = secret["flask-secret-key"]
    with start_mlflow(tmp_path / "mlflow", empty_database, "--app-name", "basic-auth", port=port, **login) as uri:
        server, _ = kfp
        until(lambda: server.things["runs"], script, log)
        service = {
            "MLFLOW_TRACKING_URI": uri,
            "MLFLOW_TRACKING_USERNAME": "approvals",
            "MLFLOW_TRACKING_PASSWORD": secret["service-password"],
            "ADFM_KEYS": str(cluster.keys("adfm", tmp_path / "service-keys")),
            "PYTHONPATH": str(ROOT),
        }
        with (tmp_path / "approvals.log").open("w") as approvals_log:
            approvals = subprocess.Popen(
                [sys.executable, "-m", "adfm", "approvals", "serve", "--poll", "0.5"],
                env=os.environ | service,
                stdout=approvals_log,
                stderr=approvals_log,
            )
        try:
            runs = cluster.data("Secret", "adfm-mlflow", "kubeflow")
            assert (runs["uri"], runs["ui"]) == ("http://mlflow.adfm:5000", uri)
            monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
            monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", runs["username"])
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", runs["password"])
            monkeypatch.setenv("ADFM_KEYS", str(cluster.keys("kubeflow", tmp_path / "runs-keys")))
            shards = make_shards(tmp_path / "shards")
            evaluation = make_evaluation(tmp_path / "evaluation", shards, 30, iou=0.6)
            register(
                make_model(tmp_path / "model", 1.0, shards), shards, evaluation, tmp_path / "out", Params(), wait=120
            )
            server.things["runs"][0] |= {"state": "SUCCEEDED", "finished_at": "2026-01-01T00:07:21Z"}
            status = script.wait(120)
        finally:
            approvals.terminate()
            approvals.wait(60)
    output = log.read_text()
    assert status == 0, output + (tmp_path / "approvals.log").read_text()
    assert "SUCCEEDED, 441 s" in output
    assert "everything is as the signed history says" in output
    assert "the version is in production" in output

    calls = cluster.calls.read_text()
    image = "docker.io/library/adfm:end-to-end"
    assert f"kind load docker-image {image} --name adfm" in calls
    for path in ("cluster-scoped-resources", "env/platform-agnostic"):
        assert f"apply -k github.com/kubeflow/pipelines/manifests/kustomize/{path}?ref=2.17.0\n" in calls
    assert calls.endswith("kind delete cluster --name adfm\n")
    for thing in cluster.things():
        if thing["metadata"].get("creationTimestamp", "") is None:  # as `kubectl create` writes it
            del thing["metadata"]["creationTimestamp"]
        kubernetes_validate.validate(thing, "1.33.0", strict=True)
    kinds = {each["kind"] for each in cluster.things()}
    assert {"Deployment", "StatefulSet", "Job", "CronJob", "Role", "Secret", "ConfigMap", "NetworkPolicy"} <= kinds
    ours = set(re.findall(r"image: (\S+)", yaml.safe_dump(cluster.things())))
    assert ours == {image, "docker.io/library/postgres:17"}
    pipeline, _ = yaml.safe_load_all(server.uploads[-1])
    containers = [each["container"] for each in pipeline["deploymentSpec"]["executors"].values() if "container" in each]
    assert {each["image"] for each in containers} == {image}
    assert {each["resources"]["resourceMemoryRequest"] for each in containers} == {"3Gi"}
    assert not list(tmp_path.glob("tmp.*")), "passwords and private keys are removed"


def test_a_run_that_fails_is_a_failure_and_its_cluster_is_removed(cluster, start, tmp_path) -> None:
    """Here the image cannot be loaded."""
    (cluster.programs / "kind").write_text('#!/bin/bash\necho "kind $*" >>"$CALLS"\n[ "$1" != load ]\n')
    script, _ = start()
    assert script.wait(60) != 0
    calls = cluster.calls.read_text()
    assert "apply" not in calls
    assert "kubectl get pods --all-namespaces" in calls
    assert calls.endswith("kind delete cluster --name adfm\n")


def test_a_cluster_of_that_name_that_is_there_already_is_left_alone(cluster, start, tmp_path) -> None:
    (cluster.programs / "kind").write_text('#!/bin/bash\necho "kind $*" >>"$CALLS"\necho adfm\n')
    script, _ = start()
    assert script.wait(60) == 1
    assert cluster.calls.read_text() == "kind get clusters\n"
    assert (
        "there is a cluster adfm already; remove it first: kind delete cluster --name adfm"
        in (tmp_path / "log").read_text()
    )
    assert not list(tmp_path.glob("tmp.*"))


def test_a_port_that_is_taken_is_not_taken_for_the_cluster(cluster, start, tmp_path) -> None:
    """Here another service replies there: a run must not be submitted to it."""
    script, _ = start(TAKEN="1")
    assert script.wait(60) == 1
    assert "is taken; name another in KFP_PORT or MLFLOW_PORT" in (tmp_path / "log").read_text()
    assert "create namespace" not in cluster.calls.read_text()


def test_it_takes_its_versions_from_the_project() -> None:
    kfp = re.search(r"^kfp=(\S+)$", SCRIPT.read_text(), re.MULTILINE)
    assert kfp is not None
    assert f"kfp=={kfp[1]}\n" in (ROOT / "requirements.txt").read_text()
