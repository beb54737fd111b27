"""Servers that tests start in processes of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def running(command: Sequence[object], url: str, log: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """Start a server in the log's folder, wait until it answers at `url`, and end it with its children afterwards."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=log.parent, env=environment, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                opener.open(url, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
