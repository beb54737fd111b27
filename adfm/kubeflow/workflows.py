"""How a run of a pipeline ended, from the Workflow of Argo that Kubeflow Pipelines made of it.

KFP's own final status has no reason, and stays `RUNNING` when a pod was killed, a driver failed or a loop's tasks came
from the cache. The nodes' form is that of KFP 2.17 (backend/src/v2/compiler/argocompiler/dag.go, container.go) and Argo
Workflows 4.0 (workflow/controller/operator.go, exec_control.go, workflow/packer/packer.go). A node's name is its path,
`adfm-training-x7k2p.root.exit-handler-1.train.executor`: Workflow, KFP's root DAG, exit handler, task (a DAG), pod.
"""

import base64
import gzip
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from adfm.errors import AdfmError, Unreachable
from adfm.kubeflow.resources import RESOURCES
from adfm.text import printable, shortened

State = Literal["succeeded", "failed", "terminated"]
Node = Mapping[str, Any]

NODE_NAME = "workflows.argoproj.io/node-name"  # annotation of a pod: the name of its node
_FAILED = ("Failed", "Error")
_EXIT = ".onExit"  # after the name of the exit handler: what runs after it
_TRY = re.compile(r"\((\d+)\)$")  # after the name of a node of the type Retry
_TRIES = re.compile(r"\(\d+\)")
_INDICES = re.compile(r"\([^)]*\)")  # of tries, and of the items of a loop: (3:3)
_DRIVER = "-driver"  # after the name of a task: the pod of KFP that starts it
# Names of KFP that say nothing of the task: its pod, and the DAGs of a loop.
_OF_KFP = ("executor", "iteration", "iteration-iterations", "iteration-item")
_STOPPED = re.compile(
    r"exceeded its deadline$|retry exceeded workflow deadline|workflow shutdown with strategy|Stopped with strategy"
)
_CONTAINER = re.compile(r"(?s)(?P<name>[\w.-]+): (?P<reason>\w*) \(exit code (?P<code>\d+)\)(?:: (?P<message>.*))?")
_REFUSED = re.compile(
    r'(?s)(?:pods "[^"]*" is forbidden|Pod "[^"]*" is invalid|admission webhook "[^"]*" denied the request): (.*)'
)
_RAISE_LIMIT = "raise the limit in adfm/kubeflow/resources.py and submit again"
_LONGEST = 400  # characters of a reason; five of them and the link fit into a message


@dataclass(frozen=True)
class Failure:
    """A task that failed."""

    task: str  # its name in the pipeline; "" if no task is to blame
    reason: str  # in one line
    stopped: bool = False  # it failed because the whole run was terminated

    def __str__(self) -> str:
        """The failure as a line of a message."""
        if self.stopped:
            return f"{self.task} was under way" if self.task else "no task was under way"
        return f"{self.task} failed: {self.reason}" if self.task else self.reason


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    state: State | None  # `None` if it is not known
    failures: tuple[Failure, ...] = ()  # in the order in which they ended
    started: datetime | None = None  # the run
    ended: datetime | None = None  # its tasks
    unknown: str = ""  # why the state is not known, and what to do about it


def outcome(workflow: Mapping[str, Any], task: str) -> Outcome:
    """Return the outcome of a run, for the task that runs after all others.

    Args:
        workflow: The Workflow, as the Kubernetes API has it.
        task: Name of KFP's exit handler, `pipeline_task_name` of its final status.

    Raises:
        Unreachable: The Workflow does not show the end of the exit handler yet.
        AdfmError: The nodes cannot be read, or none is the exit handler.
    """
    status = workflow.get("status") or {}
    tree = _Tree(nodes(status))
    handler = tree.exit_handler(task)
    started = moment(status.get("startedAt") or (workflow.get("metadata") or {}).get("creationTimestamp"))
    ended = moment(handler.get("finishedAt"))
    phase = handler.get("phase")
    if phase == "Succeeded":
        return Outcome("succeeded", (), started, ended)
    if phase not in _FAILED:
        raise Unreachable(f"{handler.get('displayName')} is {phase} in Argo's Workflow, and has not ended.")
    spec = workflow.get("spec") or {}
    # KFP terminates a run by a deadline of 0 seconds; Argo then fails what runs with `Step exceeded its deadline`.
    is_terminated = spec.get("activeDeadlineSeconds") == 0 or spec.get("shutdown") in ("Terminate", "Stop")
    failures = []
    for leaf in sorted(tree.failed(handler), key=lambda leaf: (leaf.get("finishedAt") or "", leaf["name"])):
        name = task_of(leaf["name"]) if task_of(leaf["name"]) != task_of(handler["name"]) else ""
        stopped = is_terminated and (not name or bool(_STOPPED.search(leaf.get("message") or "")))
        failures.append(Failure(name, reason(leaf), stopped))
    state: State = "terminated" if all(failure.stopped for failure in failures) else "failed"
    return Outcome(state, _distinct(failures), started, ended)


def nodes(status: Mapping[str, Any]) -> dict[str, Node]:
    """Return the nodes in the status of a Workflow, by id; raise `AdfmError` if they cannot be read there."""
    if status.get("nodes"):
        return dict(status["nodes"])
    if status.get("compressedNodes"):  # of a large Workflow
        try:
            return dict(json.loads(gzip.decompress(base64.b64decode(status["compressedNodes"]))))
        except (ValueError, OSError, EOFError, zlib.error) as error:
            raise AdfmError(f"the compressed nodes of Argo's Workflow cannot be unpacked ({error}).") from error
    if status.get("offloadNodeStatusVersion"):  # where Argo has a database for them
        raise AdfmError(
            "Argo keeps the nodes of this Workflow in its own database (nodeStatusOffLoad); `argo get` and the page of "
            "the run show them."
        )
    raise AdfmError("Argo's Workflow has no nodes.")


class _Tree:
    """The nodes of a Workflow by the DAG that they belong to, their `boundaryID`."""

    # A template with a retry strategy is a node of the type Retry, whose tries are nodes of the same DAG. With the
    # `templateDefaults` of a stock controller, every template has one.
    def __init__(self, nodes: Mapping[str, Node]) -> None:
        self._nodes = nodes
        self._by_name = {node["name"]: node for node in nodes.values()}
        self._members: dict[str, list[Node]] = defaultdict(list)
        self._tries: dict[str, list[Node]] = defaultdict(list)
        for node in nodes.values():
            retried = self._by_name.get(_TRY.sub("", node["name"]))
            if retried is not None and retried is not node and retried.get("type") == "Retry":
                self._tries[retried["name"]].append(node)
            else:
                self._members[node.get("boundaryID") or ""].append(node)

    def exit_handler(self, task: str) -> Node:
        """The newest node of the exit handler: one of a retried DAG has the same display name."""
        # KFP makes the exit task a hook of the handler, by which the handler can be found without its name.
        handlers = [node for node in self._by_name.values() if node.get("displayName") == task] or [
            self._by_name[name.removesuffix(_EXIT)]
            for name in self._by_name
            if name.endswith(_EXIT) and name.removesuffix(_EXIT) in self._by_name
        ]
        if not handlers:
            raise AdfmError(f"Argo's Workflow has no node {task!r}.")
        return max(handlers, key=lambda node: node.get("startedAt") or "")

    def failed(self, node: Node) -> list[Node]:
        """The failed nodes at the bottom of a node: what made it fail. Of a retried one only the last try counts."""
        if node.get("phase") not in _FAILED:
            return []
        below: Iterable[Node]
        if node.get("type") == "Retry":
            below = sorted(self._tries[node["name"]], key=_number)[-1:]
        elif node.get("type") == "TaskGroup":  # of a loop, whose items belong to the DAG as well
            below = [self._nodes[child] for child in node.get("children") or [] if child in self._nodes]
        else:
            below = self._members[node["id"]]
        leaves = {leaf["id"]: leaf for each in below if each is not node for leaf in self.failed(each)}
        return list(leaves.values()) or [node]


def _number(node: Node) -> int:
    match = _TRY.search(node["name"])
    return int(match[1]) if match else -1


def task_of(name: str) -> str:
    """Return the task in a node's name: `train` of `adfm-training-x7k2p.root.exit-handler-1.train(0).executor(0)`."""
    parts = [part.removesuffix(_DRIVER) for part in _INDICES.sub("", name).split(".")]
    return next((part for part in reversed(parts) if part not in _OF_KFP), parts[-1])


def reason(node: Node) -> str:
    """Return why a node failed: the stage's own message if it left one, else Argo's or Kubernetes' explained."""
    text = _explain((node.get("message") or "").strip(), task_of(node["name"]))
    text = shortened(printable(" ".join(text.split())), _LONGEST)
    is_driver = _INDICES.sub("", node["name"]).endswith(_DRIVER)
    return f"its driver, a pod of Kubeflow Pipelines, failed: {text}" if is_driver else text


def _explain(message: str, task: str) -> str:
    if not message:
        return "Argo gives no reason; see the log of its pod"
    if container := _CONTAINER.fullmatch(message):
        return _container(container, task)
    if refused := _REFUSED.search(message):
        return f"the cluster refused its pod: {refused[1]}"
    if "active on the node longer than the specified deadline" in message:  # kubelet, pkg/kubelet/active_deadline.go
        limit = f" of {RESOURCES[task].hours:g} h" if task in RESOURCES else ""
        return f"it ran longer than its limit{limit}; {_RAISE_LIMIT}"
    if message == "pod deleted":
        return "its pod was deleted: its node was drained or lost, or somebody removed it"
    if _STOPPED.search(message):
        return "it was stopped: the run was terminated, or a time limit set for it was over"
    return message


def _container(match: re.Match[str], task: str) -> str:
    name, code = match["name"], int(match["code"])
    line = _own_line(match["message"] or "")
    if match["reason"] == "OOMKilled":
        limit = f" of {RESOURCES[task].memory}" if task in RESOURCES and name == "main" else ""
        text = f"out of memory: it needed more than its limit{limit}; {_RAISE_LIMIT}"
        return f"{text} ({line})" if line else text
    if line:
        return line
    where = "" if name == "main" else f" of its container {name}"
    if code == 137:
        return f"killed (exit code 137){where}, as the kernel does when memory runs out; see the log of its pod"
    prefix = f"stopped by SIGTERM (exit code {code})" if code == 143 else f"exit code {code}"
    return f"{prefix}{where}; see the log of its pod"


def _own_line(message: str) -> str:
    # Where the stage left no line, Kubernetes takes the end of the log, whose error or last line counts.
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line.partition("adfm: error: ")[2] for line in lines if "adfm: error: " in line]
    return (errors or lines or [""])[-1]


def failures_of_pods(pods: Iterable[Mapping[str, Any]]) -> tuple[Failure, ...]:
    """Return the tasks of a run whose last pod failed, for where the Workflow cannot be read."""
    # Tasks whose pods were deleted or refused are missing, and so is whether the run was terminated.
    last: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for pod in sorted(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp"))):
        name = (pod["metadata"].get("annotations") or {}).get(NODE_NAME, "")
        if name:
            last[_TRIES.sub("", name)] = name, pod
    return _distinct(
        Failure(task_of(name), reason({"name": name, "message": _message(pod["status"])}))
        for name, pod in last.values()
        if pod["status"].get("phase") == "Failed"
    )


def _message(status: Mapping[str, Any]) -> str:
    """The message that Argo would give the node of a failed pod: `inferFailedReason`, without its rarer cases."""
    if status.get("message"):
        return str(status["message"])
    main_first = sorted(status.get("containerStatuses") or [], key=lambda container: container["name"] != "main")
    for container in [*(status.get("initContainerStatuses") or []), *main_first]:
        ended = (container.get("state") or {}).get("terminated") or {}
        if ended.get("exitCode"):
            text = f"{container['name']}: {ended.get('reason') or 'Error'} (exit code {ended['exitCode']})"
            return f"{text}: {ended['message']}" if ended.get("message") else text
    return ""


def moment(text: Any) -> datetime | None:
    """Return a time as Kubernetes and MLflow's history write it; `None` for any other text."""
    try:
        value = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return value if value.tzinfo else value.replace(tzinfo=UTC)


def _distinct(failures: Iterable[Failure]) -> tuple[Failure, ...]:
    return tuple(dict.fromkeys(failures))  # the parts of a loop fail alike
