"""A double of the KFP API: holds requests against the shapes of the client's own models, and answers as KFP 2.17 does.

What it does was read in the backend's source: names are unique in their namespace (409), pipelines of another
namespace are not listed, one without a namespace is shared, an uploaded pipeline has a version of its own name, several
users need a namespace, schedules with the same name may be there twice, a filter is unescaped once more than HTTP does
and ignores case.
"""

from __future__ import annotations

import json
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote_plus, urlsplit

import kfp_server_api

API = "/apis/v2beta1"
IDS = {
    "experiments": "experiment_id",
    "runs": "run_id",
    "recurringruns": "recurring_run_id",
    "pipelines": "pipeline_id",
    "versions": "pipeline_version_id",
}
MODELS = {
    "experiments": "V2beta1Experiment",
    "runs": "V2beta1Run",
    "recurringruns": "V2beta1RecurringRun",
    "pipelines": "V2beta1Pipeline",
}
UNIQUE = {
    "experiments": ("namespace", "display_name"),
    "pipelines": ("namespace", "name"),
    "versions": ("pipeline_id", "name"),
}
CONFLICT = (409, {"message": "Already exist"})


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
    """The part of the KFP API that submitting uses, with what it was asked to keep.

    Args:
        token: The bearer token that it accepts.
    """

    def __init__(self, token: str) -> None:
        self.token = token
        self.health: Any = {"commit_sha": "1", "tag_name": "2.17.0", "multi_user": False, "pipeline_store": "database"}
        self.things: dict[str, list[dict[str, Any]]] = {kind: [] for kind in IDS}
        self.uploads: list[bytes] = []
        self.terminated: list[str] = []
        self.policies: list[str] = []  # of deleted schedules
        self.wrong: list[str] = []
        self.rivals: dict[str, dict[str, Any]] = {}  # kind -> what somebody else makes just before us
        self.refused: dict[str, int] = {}  # method -> status

    def answer(self, method: str, url: str, body: bytes) -> tuple[int, Any]:
        address = urlsplit(url)
        query = {key: values[0] for key, values in parse_qs(address.query).items()}
        path = address.path.removeprefix(API)
        if path == "/healthz":
            return 200, self.health
        if method in self.refused:
            return self.refused[method], {"message": "no"}
        if method == "GET":
            return self.listed(path, query)
        if method == "DELETE":
            return self.deleted(path, query)
        if action := re.fullmatch(r"/(runs|recurringruns)/(.+):(terminate|enable|disable)", path):
            return self.acted(*action.groups())
        if path in ("/pipelines/upload", "/pipelines/upload_version"):
            return self.uploaded(path, query, body)
        kind = path[1:]
        if kind not in MODELS:
            return 404, {"message": f"{method} {path}"}
        thing = json.loads(body)
        self.wrong += misshapen(thing, MODELS[kind], path)
        if kind in ("experiments", "pipelines"):
            thing = self.placed(thing)
            if kind == "pipelines":
                thing["name"] = thing.get("name") or thing["display_name"]
            if kind == "experiments" and self.health["multi_user"] and not thing["namespace"]:
                return 400, {"message": "Experiment namespace is empty"}
        return self.kept(kind, thing)

    def placed(self, thing: dict[str, Any]) -> dict[str, Any]:
        """With its namespace, which is none where there is one user."""
        return thing | {"namespace": thing.get("namespace", "") if self.health["multi_user"] else ""}

    def kept(self, kind: str, thing: dict[str, Any]) -> tuple[int, Any]:
        many = self.things[kind]
        if (rival := self.rivals.pop(kind, None)) is not None:
            many.append(thing | {IDS[kind]: "rival", "created_at": "2025-12-31T23:59:59Z"} | rival)
        if any(all(each[key] == thing[key] for key in UNIQUE[kind]) for each in many if kind in UNIQUE):
            return CONFLICT
        made = thing | {
            IDS[kind]: f"{kind}-{len(many)}",
            "created_at": f"2026-01-01T00:{len(many) // 60:02d}:{len(many) % 60:02d}Z",
        }
        states = {"runs": {"state": "RUNNING"}, "recurringruns": {"status": "ENABLED"}}
        many.append(made | states.get(kind, {}))
        return 200, many[-1]

    def listed(self, path: str, query: dict[str, str]) -> tuple[int, Any]:
        known = {"page_token", "page_size", "sort_by", "filter", "namespace", "experiment_id"}
        self.wrong += [f"GET {path}: there is no {key}" for key in query if key not in known]
        versions = re.fullmatch(r"/pipelines/(.+)/versions", path)
        kind = "versions" if versions else path[1:]
        many = self.things[kind]
        if versions:
            many = [each for each in many if each["pipeline_id"] == versions[1]]
        elif "experiment_id" in query:
            many = [each for each in many if each["experiment_id"] == query["experiment_id"]]
        elif self.health["multi_user"]:
            namespace = query.get("namespace", "")
            if kind == "recurringruns":
                places = {each["experiment_id"]: each["namespace"] for each in self.things["experiments"]}
                many = [each | {"namespace": places[each["experiment_id"]]} for each in many]
            if kind == "experiments" and not namespace:
                return 400, {"message": "In multi-user mode, ListExperiment must filter by namespace"}
            many = [each for each in many if each["namespace"] == namespace]
        text = query.get("filter", "{}")
        if re.search("%(?![0-9A-Fa-f]{2})", text):
            return 400, {"message": f"invalid URL escape in {text}"}
        for predicate in json.loads(unquote_plus(text)).get("predicates", []):
            if set(predicate) != {"operation", "key", "stringValue"} or predicate["operation"] not in (1, "EQUALS"):
                self.wrong.append(f"GET {path}: {predicate}")
            value = predicate["stringValue"].lower()
            many = [each for each in many if str(each.get(predicate["key"], "")).lower() == value]
        listing = {"versions": "pipeline_versions", "recurringruns": "recurringRuns"}.get(kind, kind)
        start, size = int(query.get("page_token") or 0), int(query.get("page_size") or 20)
        rest = {"next_page_token": str(start + size)} if len(many) > start + size else {}
        return 200, {listing: many[start : start + size], "total_size": len(many), **rest}

    def deleted(self, path: str, query: dict[str, str]) -> tuple[int, Any]:
        kind, ident = path[1:].split("/")
        there = [each for each in self.things[kind] if each[IDS[kind]] == ident]
        if kind != "recurringruns" or not there:
            return 404, {"message": "not found"}
        self.things[kind].remove(there[0])
        self.policies.append(query.get("propagation_policy", ""))
        return 200, {}

    def acted(self, kind: str, ident: str, verb: str) -> tuple[int, Any]:
        if verb == "terminate":
            self.terminated.append(ident)
            return 200, {}
        (there,) = (each for each in self.things[kind] if each[IDS[kind]] == ident)
        there["status"] = f"{verb.upper()}D"
        return 200, {}

    def uploaded(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        content = body.split(b"\r\n\r\n", 1)[1].rsplit(b"\r\n--", 1)[0]
        self.uploads.append(content)
        names = {"name": query["name"], "display_name": query["name"]}
        if path == "/pipelines/upload_version":
            return self.kept("versions", names | {"pipeline_id": query["pipelineid"]})
        status, pipeline = self.kept("pipelines", self.placed(names | {"namespace": query.get("namespace", "")}))
        if status == 200:
            self.kept("versions", names | {"pipeline_id": pipeline["pipeline_id"]})
        return status, pipeline


@contextmanager
def served(
    answer: Callable[[str, str, bytes, Any], tuple[int, Any]], tls: ssl.SSLContext | None = None
) -> Iterator[str]:
    """A JSON server on this machine that answers a method, an address, a body and headers; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, content = answer(self.command, self.path, body, self.headers)
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_POST = do_DELETE = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        if tls:
            http.socket = tls.wrap_socket(http.socket, server_side=True)
        thread = threading.Thread(target=http.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"{'https' if tls else 'http'}://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()
