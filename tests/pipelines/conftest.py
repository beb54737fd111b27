"""A place to run pipelines in, and a channel that receives alerts."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.small import SMALL


@pytest.fixture
def small() -> list[str]:
    """The smallest settings that make sense, as options."""
    return [option for setting in SMALL for option in ("--set", setting)]


@pytest.fixture
def channel(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The texts that a chat channel receives."""
    texts: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            texts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("ADFM_ALERT_WEBHOOK", f"http://127.0.0.1:{server.server_port}/hook")
        yield texts
        server.shutdown()
        thread.join()


@pytest.fixture
def here(store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with nothing but an empty store of MLflow, outside of a cluster."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return store
