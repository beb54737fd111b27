"""Workflows of Argo as its controller writes them for the pipelines of Kubeflow Pipelines, and an API that serves them.

Names, types, phases and messages are those of Argo Workflows 4.0 (workflow/controller/operator.go, exec_control.go) for
what KFP 2.17 compiles (backend/src/v2/compiler/argocompiler/dag.go, container.go), and of the kubelet.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.certificates import self_signed

NAME = "adfm-training-x7k2p"
RUN = "5f0c8a0e-6a1d-4c58-9a55-0d8a3a1f3c11"
HANDLER = "exit-handler-1"
STARTED = datetime(2026, 11, 20, 10, tzinfo=UTC)
TASKS = ("check", "fetch", "convert", "train", "evaluate", "register")

DEADLINE = "Pod was active on the node longer than the specified deadline"
OMITTED = "omitted: depends condition not met"
STOPPED = "Step exceeded its deadline"

Tries = list[tuple[str, str]]
"""Phase and message of each try of a pod."""


def node_id(workflow: str, name: str) -> str:
    """`Workflow.NodeID` in pkg/apis/workflow/v1alpha1/workflow_types.go: FNV-1a, 32 bits."""
    value = 0x811C9DC5
    for byte in name.encode():
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return workflow if name == workflow else f"{workflow}-{value}"


def stamp(seconds: int) -> str:
    return (STARTED + timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")


class Workflow:
    """A Workflow that grows node by node.

    Args:
        stock: Whether the controller has `templateDefaults.retryStrategy`, so that every template is retried.
        name: Its name.
    """

    def __init__(self, stock: bool = True, name: str = NAME) -> None:
        self.name, self.stock, self.nodes, self.clock = name, stock, dict[str, dict[str, Any]](), 0
        self.spec: dict[str, Any] = {"entrypoint": "entrypoint", "serviceAccountName": "adfm-pipeline"}
        root = self.dag("", name, "entrypoint")
        self.pod(root, "root-driver", "system-dag-driver")
        self.root = self.dag(root, "root", "root")
        self.pod(self.root, f"{HANDLER}-driver", "system-dag-driver")
        self.handler = self.dag(self.root, HANDLER, f"comp-{HANDLER}")

    def add(self, within: str, name: str, kind: str, template: str, phase: str, message: str = "") -> str:
        boundary = self.nodes[node_id(self.name, within)] if within else {}
        full = f"{within}.{name}" if within else name
        display = re.sub(r"^(\[\d+\])?\.", "", full.removeprefix(within)) if within else name
        node = {
            "id": node_id(self.name, full),
            "name": full,
            "displayName": display,
            "type": kind,
            "templateName": template,
            "templateScope": f"local/{self.name}",
            "phase": phase,
            "startedAt": stamp(self.clock),
            "finishedAt": stamp(self.clock) if phase not in ("Running", "Pending") else None,
            "progress": "1/1",
        }
        node |= {"boundaryID": boundary["id"]} if boundary else {}
        node |= {"message": message} if message else {}
        self.nodes[node["id"]] = node
        return full

    def dag(self, within: str, name: str, template: str) -> str:
        """A DAG that runs; the name of what its members are in."""
        if not self.stock:
            return self.add(within, name, "DAG", template, "Running")
        self._child(
            self.add(within, name, "Retry", template, "Running"), f"{within}.{name}(0)" if within else f"{name}(0)"
        )
        return self.add(within, f"{name}(0)", "DAG", template, "Running")

    def again(self, within: str) -> str:
        """The next try of a DAG that failed."""
        name, number = re.fullmatch(r"(.*)\((\d+)\)", within).groups()  # type: ignore[union-attr]
        parent = self.node(name)
        boundary = next((n["name"] for n in self.nodes.values() if n["id"] == parent.get("boundaryID")), "")
        short = name.removeprefix(f"{boundary}.") if boundary else name
        self._child(name, f"{name}({int(number) + 1})")
        return self.add(boundary, f"{short}({int(number) + 1})", "DAG", parent["templateName"], "Running")

    def pod(self, within: str, name: str, template: str, tries: Tries | None = None, retried: bool = False) -> None:
        """A pod; with a retry strategy of the task or the controller, a node of its tries above it."""
        tries = tries or [("Succeeded", "")]
        if self.stock or retried:
            phase, message = tries[-1]
            limit = "No more retries left" if len(tries) > 1 and phase != "Succeeded" else message
            retry = self.add(within, name, "Retry", template, phase, limit)
            for number, (phase, message) in enumerate(tries):
                self.clock += 20
                self._child(retry, f"{retry}({number})")
                self.add(within, f"{name}({number})", "Pod", template, phase, message)
            self.node(retry)["finishedAt"] = stamp(self.clock) if tries[-1][0] != "Running" else None
        else:
            self.clock += 20
            self.add(within, name, "Pod", template, *tries[0])

    def task(self, within: str, name: str, tries: Tries | None = None, driver: Tries | None = None) -> str:
        """A task: its driver, its DAG, its pod. What did not come to its end stops here; the phase of the task."""
        self.pod(within, f"{name}-driver", "system-container-driver", driver)
        if driver and driver[-1][0] != "Succeeded":
            self.add(within, name, "Skipped", "retry-system-container-executor", "Omitted", OMITTED)
            return driver[-1][0]
        dag = self.dag(within, name, "retry-system-container-executor")
        self.pod(dag, "executor", "retry-system-container-impl", tries, retried=True)
        phase = tries[-1][0] if tries else "Succeeded"
        self.close(dag, phase)
        return phase

    def cached(self, within: str, name: str) -> None:
        """A task whose result was in KFP's cache."""
        self.pod(within, f"{name}-driver", "system-container-driver")
        dag = self.dag(within, name, "retry-system-container-executor")
        message = "when 'true != true' evaluated false"
        self.add(dag, "executor", "Skipped", "retry-system-container-impl", "Skipped", message)
        self.close(dag, "Succeeded")

    def omitted(self, within: str, name: str) -> None:
        """A task after one that failed."""
        for each in (f"{name}-driver", name):
            self.add(within, each, "Skipped", "system-container-driver", "Omitted", OMITTED)

    def close(self, dag: str, phase: str, message: str = "") -> None:
        """Ends a DAG, and the node of its tries."""
        for name in {dag, re.sub(r"\(\d+\)$", "", dag)} if self.stock else {dag}:
            node = self.node(name)
            node |= {"phase": phase, "finishedAt": stamp(self.clock)} | ({"message": message} if message else {})

    def exit(self, handler: str = "") -> None:
        """The exit task: a hook of the handler, under way."""
        handler = re.sub(r"\(\d+\)$", "", handler or self.handler)
        hook = self.dag(self.root, handler.removeprefix(f"{self.root}.") + ".onExit", "exit-hook-root-notify")
        self.pod(hook, "notify-driver", "system-container-driver")
        dag = self.dag(hook, "notify", "system-container-executor")
        self.pod(dag, "executor", "system-container-impl", [("Running", "")])

    def node(self, name: str) -> dict[str, Any]:
        return self.nodes[node_id(self.name, name)]

    def json(self, **status: Any) -> dict[str, Any]:
        """The resource."""
        return {
            "apiVersion": "argoproj.io/v1alpha1",
            "kind": "Workflow",
            "metadata": {
                "name": self.name,
                "namespace": "kubeflow",
                "creationTimestamp": stamp(0),
                "labels": {"pipeline/runid": RUN, "workflows.argoproj.io/phase": "Running"},
            },
            "spec": self.spec,
            "status": {"phase": "Running", "startedAt": stamp(0), "finishedAt": None}
            | (status or {"nodes": self.nodes}),
        }

    def compressed(self) -> dict[str, Any]:
        """The resource of a large Workflow: workflow/packer/packer.go."""
        return self.json(compressedNodes=base64.b64encode(gzip.compress(json.dumps(self.nodes).encode())).decode())

    def pods(self) -> list[dict[str, Any]]:
        """Its pods, but for those that were refused or deleted."""
        return [pod(node["name"], node, self.name) for node in self.nodes.values() if has_pod(node)]

    def _child(self, name: str, child: str) -> None:
        self.node(name).setdefault("children", []).append(node_id(self.name, child))


def has_pod(node: dict[str, Any]) -> bool:
    return node["type"] == "Pod" and node["phase"] != "Error"


def pod(name: str, node: dict[str, Any], workflow: str) -> dict[str, Any]:
    """A pod, whose status is what Argo made the message of its node from."""
    message = node.get("message", "")
    if message == STOPPED:  # Argo's word; what it stops gets SIGTERM
        message = "main: Error (exit code 143)"
    container = re.fullmatch(r"(?s)main: (\w+) \(exit code (\d+)\)(?:: (.*))?", message)
    status: dict[str, Any] = {"phase": node["phase"]}
    if container:
        terminated = {"exitCode": int(container[2]), "reason": container[1]}
        terminated |= {"message": container[3]} if container[3] else {}
        states = [("wait", {"exitCode": 0, "reason": "Completed"}), ("main", terminated)]
        status["containerStatuses"] = [
            {
                "name": each,
                "image": "adfm",
                "imageID": "",
                "ready": False,
                "restartCount": 0,
                "state": {"terminated": end},
            }
            for each, end in states
        ]
    elif message and node["phase"] == "Failed":
        status["message"] = message
    return {
        "metadata": {
            "name": node["id"],
            "creationTimestamp": node["startedAt"],
            "labels": {"pipeline/runid": RUN, "workflows.argoproj.io/workflow": workflow},
            "annotations": {"workflows.argoproj.io/node-name": name, "workflows.argoproj.io/node-id": node["id"]},
        },
        "spec": {"containers": [{"name": "main"}]},
        "status": status,
    }


def training(
    failing: str = "",
    tries: Tries | None = None,
    driver: Tries | None = None,
    cached: tuple[str, ...] = (),
    stock: bool = True,
    terminated: bool = False,
) -> Workflow:
    """A run of the training pipeline, as its exit task finds it.

    Args:
        failing: The task that fails; "": all succeed.
        tries: Of its pod.
        driver: Tries of its driver's pod.
        cached: Tasks whose results come from the cache.
        stock: As for `Workflow`.
        terminated: Whether a person terminated it.
    """
    workflow = Workflow(stock)
    phase = "Succeeded"
    for name in TASKS:
        if phase != "Succeeded":
            workflow.omitted(workflow.handler, name)
        elif name in cached:
            workflow.cached(workflow.handler, name)
        elif name == failing:
            phase = workflow.task(workflow.handler, name, tries, driver)
        else:
            workflow.task(workflow.handler, name)
    if terminated:
        workflow.spec["activeDeadlineSeconds"] = 0
    workflow.clock = 441
    workflow.close(workflow.handler, phase)
    workflow.exit()
    return workflow


class Cluster:
    """What the API of a cluster has, and how it answers.

    Args:
        folder: Where the service account's token, the authority's certificate and the namespace are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.workflows: dict[str, dict[str, Any]] = {}
        self.pods: list[dict[str, Any]] = []
        self.refused: set[str] = set()
        self.answers: list[int] = []
        self.asked: list[str] = []
        self.port = 0

    def has(self, workflow: Workflow, resource: dict[str, Any] | None = None) -> None:
        self.workflows[workflow.name] = workflow.json() if resource is None else resource
        self.pods = workflow.pods()

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        parts = urlsplit(path)
        self.asked.append(parts.path)
        kind, name = re.fullmatch(r".*/namespaces/kubeflow/(\w+)(?:/(.+))?", parts.path).groups()  # type: ignore[union-attr]
        if self.answers:
            return self.answers[0], status(self.answers.pop(0), "etcdserver: request timed out", "InternalError")
        if kind in self.refused:
            user = "system:serviceaccount:kubeflow:adfm-pipeline"
            text = (
                f'{kind} "{name}" is forbidden: User "{user}" cannot get resource "{kind}" in API group "argoproj.io"'
            )
            return 403, status(403, f'{text} in the namespace "kubeflow"', "Forbidden")
        if kind == "workflows":
            if name in self.workflows:
                return 200, self.workflows[name]
            return 404, status(404, f'workflows.argoproj.io "{name}" not found', "NotFound")
        assert parse_qs(parts.query)["labelSelector"] == [f"pipeline/runid={RUN}"]
        return 200, {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": self.pods}


def status(code: int, message: str, reason: str) -> dict[str, Any]:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "code": code,
    }


@contextmanager
def serve(folder: Path) -> Iterator[Cluster]:
    """The Kubernetes API over TLS on loopback."""
    cluster = Cluster(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            assert self.headers["Authorization"] == "bearer a-token"
            code, body = cluster.get(self.path)
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    context = self_signed(folder)
    (folder / "token").write_text("a-token")
    (folder / "namespace").write_text("kubeflow\n")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.socket = context.wrap_socket(server.socket, server_side=True)
        cluster.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield cluster
        finally:
            server.shutdown()
            thread.join()
