"""The log of a TrainJob: of its first machine as it grows, and the ends of the others that fail."""

import math
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from kubernetes.client import CoreV1Api
from kubernetes.client.exceptions import ApiException

from adfm.errors import Unreachable
from adfm.kubeflow import cluster
from adfm.kubeflow.cluster import CONTAINER

_PATIENCE = 60.0  # seconds for which a log is requested again; a machine that was lost has none
_TAIL = 20  # lines of a machine that failed


@dataclass
class JobLog:
    """The log of a TrainJob, as far as it was printed."""

    core: CoreV1Api
    namespace: str
    name: str
    quiet: bool = False  # lines are kept and not printed
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=_TAIL))  # the last lines
    error: str = ""  # the last one that `adfm train` printed
    last_end: str = ""  # the last failure of a container, with machine, exit code and reason
    unread: dict[str, str] = field(default_factory=dict)  # why the log of a pod could not be read the last time
    _last: dict[str, tuple[datetime, str]] = field(default_factory=dict)  # time of a pod's last line
    _read_at: dict[str, float] = field(default_factory=dict)  # when a pod's log was read last, on this machine's clock
    _ended: set[tuple[str, int]] = field(default_factory=set)  # pods and restarts whose failure was printed

    def show(self, pods: Iterable[Any]) -> None:
        """Print what is new in the logs of the pods."""
        for pod in pods:
            for status in pod.status.container_statuses or []:
                if status.name == CONTAINER:
                    self._show(pod, status)

    def _show(self, pod: Any, status: Any) -> None:
        first = pod.metadata.labels.get("batch.kubernetes.io/job-completion-index") == "0"
        restarts, name = status.restart_count, pod.metadata.name
        if status.last_state and status.last_state.terminated:
            self._end(name, status.last_state.terminated, restarts - 1, first, previous=True)
        if first and (status.state.running or status.state.terminated):
            self._print(name)
        if status.state.terminated:
            self._end(name, status.state.terminated, restarts, first, previous=False)

    def _end(self, pod: str, terminated: Any, restarts: int, first: bool, *, previous: bool) -> None:
        """Print once how a container failed, and the end of its log."""
        if terminated.exit_code == 0 or (pod, restarts) in self._ended:
            return
        self._ended.add((pod, restarts))
        self._print(pod, previous=previous, **({} if first else {"tail_lines": _TAIL}))
        self.last_end = f"{pod} ended with status {terminated.exit_code} ({terminated.reason})"
        self._write(f"{self.last_end}, restart {restarts}" if restarts else self.last_end)

    def _print(self, pod: str, **options: Any) -> None:
        now = time.monotonic()
        if pod in self._read_at:  # a minute more than has passed; lines that were printed are known by their time
            options["since_seconds"] = math.ceil(now - self._read_at[pod]) + 60
        try:
            lines = cluster.call(self._read, pod, patience=0.0 if pod in self.unread else _PATIENCE, **options)
        except ApiException as error:
            if error.status in (400, 404):  # it has not started yet, or has gone already; the job's conditions decide
                return
            if error.status == 403:
                raise
            return self._miss(pod, f"{error.status} {cluster.message(error)}")
        except Unreachable as error:
            return self._miss(pod, str(error))
        self.unread.pop(pod, None)
        self._read_at[pod] = now
        for line in lines:
            stamp, _, text = line.partition(" ")
            try:
                when = (datetime.fromisoformat(stamp), stamp)  # its microseconds, and what is finer
            except ValueError:  # the empty rest after the last line
                continue
            if pod not in self._last or when > self._last[pod]:
                self._last[pod] = when
                self._write(text)

    def _read(self, pod: str, **options: Any) -> list[str]:
        # With `_preload_content` the client would decode strictly, and take a line of JSON for its answer.
        options |= {"container": CONTAINER, "timestamps": True, "_preload_content": False}
        response = self.core.read_namespaced_pod_log(pod, self.namespace, **options)
        # Without it the connection may break here, and not in the call.
        text: str = response.data.decode("utf-8", errors="replace")
        return text.split("\n")

    def _miss(self, pod: str, why: str) -> None:
        """Report once that a log cannot be read; a lost machine's pod stays for a while, and training continues."""
        if pod not in self.unread:
            print(f"the log of {pod} cannot be read now: {why}", flush=True)
        self.unread[pod] = why

    def _write(self, text: str) -> None:
        self.tail.append(text)
        self.error = text.partition("adfm: error: ")[2] or self.error  # as the command line prints an AdfmError
        if not self.quiet:
            print(text, flush=True)
