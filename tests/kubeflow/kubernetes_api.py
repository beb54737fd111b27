"""The Kubernetes API on loopback, as far as `adfm.kubeflow` uses it, and as it words errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob

NAMESPACE = "line"
TRAIN_JOBS = f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{NAMESPACE}/trainjobs"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
CLAIM = f"/api/v1/namespaces/{NAMESPACE}/persistentvolumeclaims/adfm-workspace"
EVENTS = f"/api/v1/namespaces/{NAMESPACE}/events"


class Refused(Exception):
    """An answer other than 200: a Status of the API, or the plain text of a path that it does not serve."""

    def __init__(self, code: int, message: str = "", *, plain: bool = False) -> None:
        super().__init__(message)
        self.code = code
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}
        self.body = message if plain else json.dumps(status)


NOT_SERVED = Refused(404, "404 page not found\n", plain=True)


class Api(ThreadingHTTPServer):
    """The state of the cluster; `at_create` and `at_get` are what its controllers do.

    Args:
        jobs: TrainJobs by name.
        pods: Pods by name.
        logs: What a container printed, by pod; its previous one's by `<pod> previous`.
        claim: The volume claim; None: there is none.
        warnings: Messages of warning events, by the name of the object.
        refusals: Answers by method and beginning of the path, each given once; a last one that is not a list for ever.
        broken: Paths at whose answers the connection breaks in the middle, each once.
        requests: Method and path with its query, in order.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.jobs: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, bytes] = {}
        self.claim: dict[str, Any] | None = claim()
        self.warnings: dict[str, str] = {}
        self.refusals: dict[tuple[str, str], Refused | list[Refused]] = {}
        self.broken: list[str] = []
        self.requests: list[tuple[str, str]] = []
        self.at_create: Callable[[dict[str, Any]], None] = lambda job: None
        self.at_get: Callable[[dict[str, Any]], None] = lambda job: None
        self.dry_runs: list[dict[str, Any]] = []
        self.created: list[dict[str, Any]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Any:
        """The object for a request, or bytes for a log.

        Raises:
            Refused: The answer is another status.
        """
        self._refuse(method, path)
        name = path.rpartition("/")[2]
        if path.startswith(TRAIN_JOBS):
            return self._train_jobs(method, path, name, query, body)
        if path == PODS:
            selected = [pod for pod in self.pods.values() if _selected(pod, query.get("labelSelector", ""))]
            return {"kind": "PodList", "apiVersion": "v1", "items": selected}
        if path.startswith(PODS) and path.endswith("/log"):
            pod = path.split("/")[-2] + (" previous" if query.get("previous", "").lower() == "true" else "")
            if pod not in self.logs:
                raise Refused(400, f'previous terminated container "node" in pod "{pod}" not found')
            return _lines(self.logs[pod], query)
        if path.startswith(PODS):
            if name not in self.pods:
                raise Refused(404, f'pods "{name}" not found')
            return self.pods[name]
        if path == CLAIM:
            if self.claim is None:
                raise Refused(404, f'persistentvolumeclaims "{name}" not found')
            return self.claim
        if path == EVENTS:
            selected_name = query["fieldSelector"].partition("=")[2].partition(",")[0]
            return {"kind": "EventList", "apiVersion": "v1", "items": self._events(selected_name)}
        raise NOT_SERVED

    def _refuse(self, method: str, path: str) -> None:
        for (refused_method, beginning), answers in self.refusals.items():
            if method == refused_method and path.startswith(beginning):
                if isinstance(answers, Refused):
                    raise answers
                if answers:
                    raise answers.pop(0)

    def _train_jobs(self, method: str, path: str, name: str, query: dict[str, str], body: Any) -> Any:
        if method == "POST":
            return self._create(query, body)
        if path == TRAIN_JOBS:
            wanted = query["fieldSelector"].removeprefix("metadata.name=")
            items = [job for job in self.jobs.values() if job["metadata"]["name"] == wanted]
            for job in items:
                self.at_get(job)
            return {"kind": "TrainJobList", "items": [job for job in items if wanted in self.jobs]}
        if name not in self.jobs:
            raise Refused(404, f'trainjobs.trainer.kubeflow.org "{name}" not found')
        assert method == "DELETE"
        self.jobs.pop(name)
        return {"kind": "Status", "status": "Success", "details": {"propagation": query.get("propagationPolicy", "")}}

    def _create(self, query: dict[str, str], body: dict[str, Any]) -> dict[str, Any]:
        assert query.get("fieldValidation") == "Strict"
        taken = TrainerV1alpha1TrainJob.from_dict(body)
        assert taken is not None
        if taken.to_dict() != body:
            raise Refused(400, 'TrainJob in version "v1alpha1" cannot be handled: strict decoding error: unknown field')
        name = body["metadata"]["name"]
        if name in self.jobs:
            raise Refused(409, f'trainjobs.trainer.kubeflow.org "{name}" already exists')
        if query.get("dryRun") == "All":
            self.dry_runs.append(body)
            return body
        self.created.append(body)
        self.jobs[name] = json.loads(json.dumps(body))
        self.at_create(self.jobs[name])
        return body

    def _events(self, name: str) -> list[dict[str, Any]]:
        if name not in self.warnings:
            return []
        kind, _, message = self.warnings[name].partition(": ")
        return [
            {
                "metadata": {"name": "e", "creationTimestamp": "2026-11-20T10:00:00Z"},
                "involvedObject": {"name": name},
                "reason": kind,
                "message": message,
                "type": "Warning",
            }
        ]


def claim(modes: tuple[str, ...] = ("ReadWriteMany",), phase: str = "Bound") -> dict[str, Any]:
    """The volume claim `adfm-workspace`."""
    return {
        "kind": "PersistentVolumeClaim",
        "apiVersion": "v1",
        "metadata": {"name": "adfm-workspace"},
        "spec": {"accessModes": list(modes)},
        "status": {"phase": phase},
    }


def own_pod() -> dict[str, Any]:
    """A pod of Kubeflow Pipelines, as Argo makes it."""
    owner = {
        **{"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "adfm-training-7xk2p"},
        **{"uid": "0b1c", "controller": True, "blockOwnerDeletion": True},
    }
    return {
        "metadata": {"name": "own", "labels": {}, "ownerReferences": [owner]},
        "spec": {
            "containers": [
                {"name": "wait", "image": "quay.io/argoproj/argoexec:v4.0.5"},
                {"name": "main", "image": "registry.example.com/adfm:cpu"},
            ]
        },
        "status": {"phase": "Running"},
    }


def machine(job: str, index: int = 0, *, name: str = "", restarts: int = 0, **status: Any) -> dict[str, Any]:
    """A pod of a TrainJob; `status` is its container's, `phase` and `conditions` the pod's."""
    phase, conditions = status.pop("phase", "Running"), status.pop("conditions", [])
    container = {
        **{"name": "node", "image": "i", "imageID": "", "ready": True, "restartCount": restarts},
        "state": {"running": {}},
    }
    return {
        "metadata": {
            "name": name or f"{job}-node-0-{index}-abcde",
            "labels": {
                "jobset.sigs.k8s.io/jobset-name": job,
                "batch.kubernetes.io/job-completion-index": str(index),
            },
            "creationTimestamp": "2026-11-20T10:00:00Z",
        },
        "spec": {"containers": [{"name": "node"}]},
        "status": {
            "phase": phase,
            "conditions": conditions,
            "containerStatuses": [] if conditions else [container | status],
        },
    }


def _selected(pod: dict[str, Any], selector: str) -> bool:
    pairs = [pair.split("=") for pair in selector.split(",") if pair]
    return all(pod["metadata"]["labels"].get(key) == value for key, value in pairs)


def _lines(log: bytes, query: dict[str, str]) -> bytes:
    assert query["container"] == "node"
    assert query["timestamps"].lower() == "true"
    lines = log.split(b"\n")[:-1][-int(query.get("tailLines", "0")) :]
    return b"".join(line + b"\n" for line in lines)


class _Handler(BaseHTTPRequestHandler):
    server: Api
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        self.server.requests.append((self.command, self.path))
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        try:
            answer = self.server.answer(self.command, parts.path, query, body)
            status, content = 200, answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        except Refused as refused:
            status, content = refused.code, refused.body.encode()
        except Exception as error:  # a mistake of a test, not an outage to wait for
            status, content = 418, json.dumps({"message": repr(error)}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if parts.path in self.server.broken:
            self.server.broken.remove(parts.path)
            content, self.close_connection = content[: len(content) // 2], True
        self.wfile.write(content)

    do_GET = do_POST = do_DELETE = _handle

    def log_message(self, format: str, *args: Any) -> None:
        """Not to the output of the tests."""
