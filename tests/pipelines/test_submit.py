"""Submitting, against a double of the server that holds each request against the shapes of the KFP API's own client."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kfp_server_api
import pytest
import yaml
from kubernetes.config import kube_config

from pipelines import promotion, training
from pipelines.command import main, write

API = "/apis/v2beta1"


def misshapen(value: Any, kind: str, where: str) -> list[str]:
    """What is wrong with a JSON value of a type as the API's OpenAPI description names it."""
    simple: dict[str, tuple[type, ...]] = {"str": (str,), "datetime": (str,), "int": (int,), "bool": (bool,)}
    if where.endswith(".max_concurrency") and isinstance(value, int):
        return []  # int64: JSON of protocol buffers reads numbers as well as texts
    if kind in simple:
        return [] if isinstance(value, simple[kind]) else [f"{where}: {value!r} is no {kind}"]
    if kind == "object":
        return []
    if of := re.fullmatch(r"list\[(.+)\]", kind):
        return [wrong for i, item in enumerate(value) for wrong in misshapen(item, of[1], f"{where}[{i}]")]
    if of := re.fullmatch(r"dict\(str, (.+)\)", kind):
        return [wrong for key, item in value.items() for wrong in misshapen(item, of[1], f"{where}.{key}")]
    model = getattr(kfp_server_api, kind)
    if not model.openapi_types:
        return [] if value in model.allowable_values else [f"{where}: {value!r} is no {kind}"]
    types = {model.attribute_map[name]: each for name, each in model.openapi_types.items()}
    unknown = [f"{where}: {kind} has no {key}" for key in value if key not in types]
    known = [key for key in value if key in types]
    return unknown + [wrong for key in known for wrong in misshapen(value[key], types[key], f"{where}.{key}")]


class Server:
    """The part of the KFP API that submitting uses, with what it was asked to keep."""

    def __init__(self, token: str | None) -> None:
        self.token = token
        self.things: dict[str, list[dict[str, Any]]] = {"experiments": [], "pipelines": [], "runs": []}
        self.things |= {"recurringruns": [], "versions": []}
        self.uploads: list[Any] = []
        self.terminated: list[str] = []
        self.wrong: list[str] = []
        self.rival: dict[str, Any] | None = None  # a run that somebody else begins at the same time

    def answer(self, method: str, url: str, body: bytes) -> tuple[int, Any]:
        address = urlsplit(url)
        query = {key: values[0] for key, values in parse_qs(address.query).items()}
        path = address.path.removeprefix(API)
        if path == "/healthz":
            return 200, {"multi_user": False}
        if method == "GET":
            return self.listed(path, query)
        if found := re.fullmatch(r"/runs/(.+):terminate", path):
            self.terminated.append(found[1])
            return 200, {}
        if path in ("/pipelines/upload", "/pipelines/upload_version"):
            return self.uploaded(path, query, body)
        kinds = {"/experiments": "V2beta1Experiment", "/runs": "V2beta1Run", "/recurringruns": "V2beta1RecurringRun"}
        if path not in kinds:
            return 404, {"message": f"{method} {path}"}
        asked = json.loads(body)
        self.wrong += misshapen(asked, kinds[path], path)
        return self.kept(path[1:], asked)

    def kept(self, kind: str, asked: dict[str, Any]) -> tuple[int, Any]:
        many = self.things[kind]
        if kind == "runs" and self.rival:
            many.append(asked | self.rival)
        name = {"experiments": "experiment_id", "runs": "run_id", "recurringruns": "recurring_run_id"}[kind]
        stamp = f"2026-01-01T00:00:{len(many):02d}Z"
        made = asked | {name: f"{kind}-{len(many)}", "created_at": stamp}
        many.append(made | ({"state": "RUNNING"} if kind == "runs" else {}))
        return 200, many[-1]

    def listed(self, path: str, query: dict[str, str]) -> tuple[int, Any]:
        known = {"page_token", "page_size", "sort_by", "filter", "namespace", "experiment_id"}
        self.wrong += [f"GET {path}: there is no {key}" for key in query if key not in known]
        versions = re.fullmatch(r"/pipelines/(.+)/versions", path)
        kind = "versions" if versions else path[1:]
        found = self.things[kind]
        for predicate in json.loads(query.get("filter", "{}")).get("predicates", []):
            if set(predicate) != {"operation", "key", "stringValue"} or predicate["operation"] not in (1, "EQUALS"):
                self.wrong.append(f"GET {path}: {predicate}")
            found = [each for each in found if each.get(predicate["key"]) == predicate["stringValue"]]
        listing = {"versions": "pipeline_versions", "recurringruns": "recurringRuns"}.get(kind, kind)
        return 200, {listing: found, "total_size": len(found)}

    def uploaded(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        content = body.split(b"\r\n\r\n", 1)[1].rsplit(b"\r\n--", 1)[0]
        self.uploads.append(list(yaml.safe_load_all(content)))
        if path == "/pipelines/upload":
            pipeline = {"pipeline_id": "pipeline-0", "display_name": query["name"]}
            self.things["pipelines"].append(pipeline)
            return 200, pipeline
        version = {
            "pipeline_id": query["pipelineid"],
            "pipeline_version_id": f"version-{len(self.things['versions'])}",
            "display_name": query["name"],
        }
        self.things["versions"].append(version)
        return 200, version


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a configuration of kubectl, outside of a cluster."""
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    return tmp_path


def send_json(handler: BaseHTTPRequestHandler, status: int, content: Any) -> None:
    text = json.dumps(content).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(text)))
    handler.end_headers()
    handler.wfile.write(text)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    kept = Server("good")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, answer = 401, {"message": "token is expired"}
            if kept.token is None or self.headers.get("Authorization") == f"Bearer {kept.token}":
                status, answer = kept.answer(self.command, self.path, body)
            send_json(self, status, answer)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", f"http://127.0.0.1:{http.server_port}")
        monkeypatch.setenv("KFP_TOKEN", "good")
        yield kept
        http.shutdown()
        thread.join()
    assert kept.wrong == []


def submit(*argv: str, pipeline: Any = training) -> int:
    return main(pipeline.PIPELINES, pipeline.options, pipeline.arguments, ["submit", *argv])


def test_a_run_is_of_a_version_of_the_pipeline_with_the_whole_settings(server: Server) -> None:
    assert submit("--set", "seed=3", "--num-gpus", "2", "--service-account", "trainer", "--experiment", "line") == 0
    (run,) = server.things["runs"]
    assert server.things["experiments"][0]["display_name"] == "line"
    assert run["experiment_id"] == server.things["experiments"][0]["experiment_id"]
    assert run["service_account"] == "trainer"
    assert run["pipeline_version_reference"] == {"pipeline_id": "pipeline-0", "pipeline_version_id": "version-0"}
    given = run["runtime_config"]["parameters"]
    assert yaml.safe_load(given["settings"])["seed"] == 3
    assert (given["num_gpus"], given["parts"]) == (2, ["1/2", "2/2"])
    assert given["data_revision"] == "synthetic://"
    assert given["ui"].startswith("http://127.0.0.1")
    pipeline, platform = server.uploads[-1]
    assert pipeline["pipelineInfo"]["name"] == "adfm-training"
    assert "kubernetes" in platform["platforms"]


def test_settings_files_are_laid_over_one_another_before_they_are_sent(server: Server, tmp_path: Path) -> None:
    base, overlay = tmp_path / "base.yaml", tmp_path / "overlay.yaml"
    base.write_text("seed: 1\ntrain: {steps: 5, beta: 0.5}")
    overlay.write_text("train: {steps: 6, top_k: 50}")
    files = ["--params", str(base), "--params", str(overlay)]
    assert submit(*files, "--set", "seed=2") == 0
    (run,) = server.things["runs"]
    sent = yaml.safe_load(run["runtime_config"]["parameters"]["settings"])
    assert (sent["seed"], sent["train"]["steps"], sent["train"]["beta"], sent["train"]["top_k"]) == (2, 6, 0.5, 50)
    overlay.write_text("train: {stepz: 6}")
    assert submit(*files) == 1
    assert len(server.things["runs"]) == 1


def test_the_same_data_settings_and_images_asked_twice_are_one_run(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert submit() == 0
    assert len(server.things["runs"]) == 1
    assert "the same run is there already" in capsys.readouterr().out
    assert submit("--set", "seed=1") == 0
    assert submit("--data-revision", "another") == 0
    assert len(server.things["runs"]) == 3
    assert len(server.things["versions"]) == 1


def test_a_run_that_failed_is_made_again(server: Server) -> None:
    assert submit() == 0
    server.things["runs"][0]["state"] = "FAILED"
    assert submit() == 0
    assert len(server.things["runs"]) == 2


def test_other_images_are_another_run_of_another_version(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert submit() == 0

    def with_another_image(pipeline: Any, file: Path) -> None:
        write(pipeline, file)
        file.write_text(file.read_text().replace("localhost/adfm:gpu", "localhost/adfm@sha256:1"))

    monkeypatch.setattr("pipelines.server.write", with_another_image)
    assert submit() == 0
    assert (len(server.things["runs"]), len(server.things["versions"])) == (2, 2)


def test_of_two_that_are_begun_at_once_the_later_one_is_ended(server: Server) -> None:
    server.rival = {"run_id": "rival", "state": "PENDING", "created_at": "2025-12-31T23:59:59Z"}
    assert submit() == 0
    assert server.terminated == ["runs-1"]


def test_data_that_may_have_changed_are_asked_for_again(server: Server) -> None:
    for _ in range(2):
        assert submit("--set", "fetch.source=s3://bucket/line") == 0
    assert len(server.things["runs"]) == 2
    assert server.things["runs"][0]["runtime_config"]["parameters"]["data_revision"] == ""


def test_a_schedule_is_made_once(server: Server) -> None:
    for _ in range(2):
        assert submit("--schedule", "0 0 3 * * *") == 0
    (recurring,) = server.things["recurringruns"]
    assert recurring["trigger"]["cron_schedule"]["cron"] == "0 0 3 * * *"
    assert recurring["mode"] == "ENABLE"
    assert server.things["runs"] == []


def test_a_promotion_is_a_run_each_time(server: Server) -> None:
    for _ in range(2):
        assert submit("--version", "3", pipeline=promotion) == 0
    assert [run["runtime_config"]["parameters"]["version"] for run in server.things["runs"]] == ["3", "3"]


def test_a_token_that_has_expired_is_said(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KFP_TOKEN", "old")
    assert submit() == 1
    error = capsys.readouterr().err
    assert "does not accept the token: it is missing or has expired" in error
    assert "KFP_TOKEN" in error
    assert "old" not in error
    assert server.things["experiments"] == []


def test_a_token_is_taken_from_the_service_account(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.delenv("KFP_TOKEN")
    (tmp_path / "token").write_text("good\n")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    assert submit() == 0


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("http://127.0.0.1:9", "the KFP API at http://127.0.0.1:9 cannot be reached"),
        ("kfp.example.com", "name the KFP API by an http(s):// address"),
        ("", "--host is missing"),
    ],
)
def test_a_server_that_is_not_there_is_said_at_once(
    host: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT", raising=False)
    assert submit("--host", host) == 1
    assert said in capsys.readouterr().err


ACCOUNT = "serviceaccounts/adfm-pipeline"
SECRET = "secrets/adfm-mlflow"


@pytest.fixture
def kubernetes(home: Path) -> Iterator[dict[str, Any]]:
    """A cluster that kubectl would talk to: what it has in the namespace of the runs; a number is a refusal."""
    there: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = there.get(self.path.removeprefix("/api/v1/namespaces/kubeflow/"), 404)
            status, answer = (found, {"kind": "Status"}) if isinstance(found, int) else (200, found)
            send_json(self, status, answer)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{http.server_port}"
        context = {"name": "here", "context": {"cluster": "here", "user": "me"}}
        content = {
            "clusters": [{"name": "here", "cluster": {"server": address}}],
            "users": [{"name": "me", "user": {"token": "any"}}],
            "contexts": [context],
            "current-context": "here",
        }
        (home / "kubeconfig").write_text(yaml.safe_dump(content))
        yield there
        http.shutdown()
        thread.join()


@pytest.mark.parametrize("secret", [404, {"metadata": {}}, {"data": {"username": "bWU="}}])
def test_a_secret_that_is_missing_is_said_before_anything_is_begun(
    secret: Any, server: Server, kubernetes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    kubernetes.update({ACCOUNT: {}, SECRET: secret})
    assert submit() == 1
    assert "has no secret adfm-mlflow with the key uri" in capsys.readouterr().err
    assert server.things["experiments"] == []


@pytest.mark.parametrize(
    "there",
    [
        {ACCOUNT: {}, SECRET: {"data": {"uri": "aHR0cA=="}}},
        {ACCOUNT: {}, SECRET: 403},
        {ACCOUNT: 403, SECRET: 404},
        {},  # another cluster
    ],
)
def test_where_the_secret_is_there_or_cannot_be_looked_for_a_run_is_begun(
    there: dict[str, Any], server: Server, kubernetes: dict[str, Any]
) -> None:
    kubernetes.update(there)
    assert submit() == 0
    assert len(server.things["runs"]) == 1


@pytest.mark.parametrize("content", ["", "clusters: [", "current-context: none"])
def test_a_configuration_of_kubectl_that_is_of_no_use_stops_nothing(content: str, server: Server, home: Path) -> None:
    (home / "kubeconfig").write_text(content)
    assert submit() == 0
