"""The Kubernetes API as a pod reaches it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client
from kubernetes.client.exceptions import ApiException
from kubernetes.config import incluster_config

from adfm.errors import AdfmError, Unreachable
from adfm.kubeflow import cluster
from adfm.process.pod import inside
from tests.certificates import self_signed


class Handler(BaseHTTPRequestHandler):
    """Answers with the request's path and token, or with the statuses that are left."""

    statuses: list[tuple[int, bytes]]
    tokens: list[str]

    def do_GET(self) -> None:
        self.tokens.append(self.headers["authorization"])
        status, body = self.statuses.pop(0) if self.statuses else (200, json.dumps({"path": self.path}).encode())
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Not to the output of the tests."""


@pytest.fixture
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Handler]]:
    """A pod with the token, the namespace and the authority of its service account, and the API behind TLS."""
    handler = type("Pod", (Handler,), {"statuses": [], "tokens": []})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        server.socket = self_signed(tmp_path).wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        (tmp_path / "token").write_text("secret")
        (tmp_path / "namespace").write_text("line\n")
        monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
        monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
        monkeypatch.setattr(cluster, "SERVICE_ACCOUNT", tmp_path)
        monkeypatch.setattr(cluster, "_PAUSE", 0)
        monkeypatch.setitem(incluster_config.os.environ, "KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setitem(incluster_config.os.environ, "KUBERNETES_SERVICE_PORT", str(server.server_address[1]))
        yield handler
        server.shutdown()
        thread.join()


def get(patience: float = 0.0) -> Any:
    """A custom object by way of the real client."""
    with cluster.api() as api:
        jobs = client.CustomObjectsApi(api)
        return cluster.call(
            jobs.get_namespaced_custom_object, "group", "v1", cluster.namespace(), "jobs", "a", patience=patience
        )


def test_the_account_of_the_pod_is_used(pod: type[Handler]) -> None:
    assert inside()
    assert get() == {"path": "/apis/group/v1/namespaces/line/jobs/a"}
    assert pod.tokens == ["bearer secret"]


def test_an_answer_that_passes_is_waited_for(pod: type[Handler], capsys: pytest.CaptureFixture[str]) -> None:
    pod.statuses[:] = [(401, b""), (429, b""), (503, b'{"message": "shutting down"}')]
    assert get(patience=60)["path"].endswith("/jobs/a")
    assert "does not answer (503 shutting down); trying again" in capsys.readouterr().err
    pod.statuses[:] = [(503, b"")]
    with pytest.raises(ApiException):
        get()


@pytest.mark.parametrize("status", [400, 403, 404, 409, 422])
def test_an_answer_that_lasts_is_not_asked_for_again(pod: type[Handler], status: int) -> None:
    pod.statuses[:] = [(status, b'{"kind": "Status", "message": "as it is"}'), (500, b"")]
    with pytest.raises(ApiException) as raised:
        get(patience=60)
    assert raised.value.status == status
    assert cluster.message(raised.value) == "as it is"


@pytest.mark.parametrize("body", [b"404 page not found", b"[]", b'{"message": ""}', b""])
def test_an_answer_without_a_message_has_the_reason_of_http(pod: type[Handler], body: bytes) -> None:
    pod.statuses[:] = [(404, body)]
    with pytest.raises(ApiException) as raised:
        get()
    assert cluster.message(raised.value) == "Not Found"


def test_a_server_that_is_not_there_is_unreachable(pod: type[Handler], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:  # bound, and nobody listens
        silent.bind(("127.0.0.1", 0))
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(silent.getsockname()[1]))
        with pytest.raises(Unreachable, match="the Kubernetes API cannot be reached"):
            get(patience=0.1)


def test_outside_of_a_pod_it_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert not inside()
    with pytest.raises(AdfmError, match="can only be used from a pod with a service account: Service host/port"):
        cluster.api()
    monkeypatch.setattr(cluster, "SERVICE_ACCOUNT", tmp_path)
    with pytest.raises(AdfmError, match="automountServiceAccountToken"):
        cluster.namespace()


def test_the_name_of_the_pod_is_what_kfp_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFP_POD_NAME", "a-pod")
    assert cluster.pod_name() == "a-pod"
    monkeypatch.delenv("KFP_POD_NAME")
    assert cluster.pod_name()
