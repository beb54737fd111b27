"""The notification at the end of a run, with the real Kubernetes client against an API on loopback."""

import json
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.config import incluster_config

from adfm import tracking
from adfm.kubeflow import cluster as api
from adfm.kubeflow import notification
from adfm.kubeflow.notification import PROMOTION, Status, notify
from adfm.process.pod import STARTED
from tests import argo
from tests.argo import DEADLINE, HANDLER, NAME, RUN, STOPPED, Cluster, Workflow, training

TRAINING, UI = "adfm-training", "https://kfp.example.com/pipeline"
STATES = ("COMPLETE", "RUNNING", "FAILED")
"""What MLMD's state of the exit handler can be in KFP 2.17, whatever happened."""


@pytest.fixture(autouse=True)
def here(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod without anything around it, whose requests are not repeated after a pause."""
    for name in ("KUBERNETES_SERVICE_HOST", "ADFM_ALERT_WEBHOOK", "ADFM_MLFLOW_UI", "ADFM_MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(notification, "_PAUSES", (0.0, 0.0))


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The API of the cluster that this process has become a pod of."""
    folder = tmp_path / "serviceaccount"
    folder.mkdir()
    with argo.serve(folder) as served:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(served.port))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(folder / "token"))
        monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(folder / "ca.crt"))
        monkeypatch.setattr(api, "SERVICE_ACCOUNT", folder)
        yield served


@pytest.fixture
def channel(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The messages of a chat channel."""
    messages: list[str] = []

    class Channel(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Channel) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        monkeypatch.setenv("ADFM_ALERT_WEBHOOK", f"http://127.0.0.1:{server.server_port}/hook")
        yield messages
        server.shutdown()
        thread.join()


def notified(state: str = "RUNNING", name: str = TRAINING, ui: str = UI, workflow: str = NAME) -> list[str]:
    return notify(name, Status(state, "", workflow, HANDLER), RUN, "", ui).splitlines()


def registered(**tags: str) -> None:
    store = tracking.client()
    store.create_registered_model("adfm")
    store.create_model_version("adfm", "somewhere", tags={"kfp_run_id": RUN} | tags)


LINK = f"{UI}/#/runs/details/{RUN}"
NO_VERSION = "no version was registered"


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("stock", [True, False])
def test_a_run_that_succeeded_from_the_cache(cluster: Cluster, channel: list[str], state: str, stock: bool) -> None:
    cluster.has(training(cached=("fetch", "convert"), stock=stock))
    registered(gate="passed")
    lines = ["adfm-training succeeded in 441 s", "version 1 of adfm: gate passed", LINK]
    assert notified(state) == lines
    assert channel == ["\n".join(lines)]


@pytest.mark.parametrize("gate", ["passed", "failed", "cannot tell"])
def test_the_verdict(cluster: Cluster, gate: str) -> None:
    cluster.has(training())
    registered(gate=gate)
    assert notified()[1] == f"version 1 of adfm: gate {gate}"


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    ("phase", "message", "line"),
    [
        ("Failed", "main: Error (exit code 1): no GPU is free", "train failed: no GPU is free"),
        ("Failed", "main: Error (exit code 1)", "train failed: exit code 1; see the log of its pod"),
        ("Failed", "main: OOMKilled (exit code 137)", "train failed: out of memory: it needed more than its limit of"),
        ("Failed", DEADLINE, "train failed: it ran longer than its limit of "),
        (
            "Error",
            "pod deleted",
            "train failed: its pod was deleted: its node was drained or lost, or somebody removed",
        ),
        (
            "Error",
            'pods "x" is forbidden: no such priority',
            "train failed: the cluster refused its pod: no such priority",
        ),
    ],
)
def test_a_run_that_failed(
    cluster: Cluster, channel: list[str], state: str, phase: str, message: str, line: str
) -> None:
    cluster.has(training("train", [(phase, message)]))
    lines = notified(state)
    assert lines[0] == "adfm-training failed after 441 s"
    assert lines[1].startswith(line)
    assert lines[2:] == [NO_VERSION, LINK]
    assert len(channel) == 1


@pytest.mark.parametrize("state", STATES)
def test_a_run_that_was_terminated(cluster: Cluster, channel: list[str], state: str) -> None:
    cluster.has(training("train", [("Failed", STOPPED)], terminated=True))
    assert notified(state) == ["adfm-training was terminated after 441 s", "train was under way", NO_VERSION, LINK]
    assert len(channel) == 1


def test_a_driver_that_failed(cluster: Cluster) -> None:
    cluster.has(training("fetch", driver=[("Failed", "main: Error (exit code 1)")]))
    lines = notified()
    assert lines[0] == "adfm-training failed after 441 s"
    assert lines[1].startswith("fetch failed: its driver, a pod of Kubeflow Pipelines, failed: exit code 1")


def test_a_large_workflow_has_compressed_nodes(cluster: Cluster) -> None:
    workflow = training("train", [("Failed", "main: Error (exit code 1): no GPU")])
    cluster.has(workflow, workflow.compressed())
    assert notified()[:2] == ["adfm-training failed after 441 s", "train failed: no GPU"]


def test_the_workflow_is_found_by_the_run_where_kfp_does_not_name_it(cluster: Cluster) -> None:
    cluster.has(training())
    assert notified(workflow="")[0] == "adfm-training succeeded in 441 s"


def test_the_version_has_a_link_where_mlflow_has_public_pages(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.has(training())
    registered(gate="passed")
    monkeypatch.setenv("ADFM_MLFLOW_UI", "https://mlflow.example.com/")
    page = "https://mlflow.example.com/#/models/adfm/versions/1"
    assert notified()[1] == f"version 1 of adfm: gate passed, see {page}"
    for inside in ("http://mlflow.adfm.svc:5000", "http://mlflow.adfm.svc.cluster.local", "http://mlflow:5000"):
        monkeypatch.setenv("ADFM_MLFLOW_UI", inside)
        assert notified()[1] == "version 1 of adfm: gate passed"


@pytest.mark.parametrize("answers", [[500], [503, 429], [401]])
def test_an_api_that_is_busy_is_asked_again(cluster: Cluster, answers: list[int]) -> None:
    cluster.has(training())
    cluster.answers = answers
    assert notified()[0] == "adfm-training succeeded in 441 s"


def test_a_handler_that_has_not_ended_is_asked_for_again(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    workflow = training()
    workflow.close(workflow.handler, "Running")
    cluster.has(workflow)
    cluster.workflows[NAME] = json.loads(json.dumps(workflow.json()))
    done = training().json()
    monkeypatch.setattr("time.sleep", lambda _: cluster.workflows.update({NAME: done}))
    assert notified()[0] == "adfm-training succeeded in 441 s"


def unknown(lines: list[str]) -> str:
    """Why the state is not known; it is given nowhere."""
    begin = "adfm-training has ended"
    assert lines[0].startswith(begin) and "Whether it succeeded is not known: " in lines[0]
    assert not any(f"{TRAINING} {word}" in line for line in lines for word in ("succeeded", "failed", "was"))
    return lines[0].partition("not known: ")[2]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    ("workflow", "line"),
    [
        (training(cached=("fetch", "convert")), ""),
        (training("train", [("Failed", "main: Error (exit code 1): no GPU")]), "train failed: no GPU"),
        (training("train", [("Failed", "main: OOMKilled (exit code 137)")]), "train failed: out of memory"),
        (training("train", [("Failed", DEADLINE)]), "train failed: it ran longer"),
        (training("train", [("Error", "pod deleted")]), ""),
        (training("train", [("Failed", STOPPED)], terminated=True), "train failed: stopped by SIGTERM"),
    ],
)
def test_without_the_right(cluster: Cluster, channel: list[str], state: str, workflow: Workflow, line: str) -> None:
    cluster.has(workflow)
    cluster.refused = {"workflows"}
    registered(gate="passed")
    lines = notified(state)
    assert unknown(lines) == (
        f"the service account kubeflow:adfm-pipeline may not read Argo's Workflow {NAME}. Allow it to `get` workflows "
        "of argoproj.io: apply deploy/runs/rbac.yaml, or bind its Role to that account."
    )
    if line:
        assert lines[1].startswith(line)
    elif state == "FAILED":
        assert lines[1] == "Kubeflow Pipelines has it as FAILED, which a later try may have mended"
    else:
        assert lines[1] == "version 1 of adfm: gate passed"
    assert lines[-2:] == ["version 1 of adfm: gate passed", LINK]
    assert channel == ["\n".join(lines).replace("&", "&amp;")]


def test_without_any_right(cluster: Cluster, channel: list[str]) -> None:
    cluster.has(training())
    cluster.refused = {"workflows", "pods"}
    assert "may not read Argo's Workflow" in unknown(notified("COMPLETE"))
    assert "Allow it to `list` pods" in unknown(notified("COMPLETE", workflow=""))
    assert len(channel) == 2


def test_a_workflow_that_is_gone(cluster: Cluster) -> None:
    assert unknown(notified("COMPLETE")) == f"Argo's Workflow {NAME} is not there any more."
    assert "has no pods" in unknown(notified("COMPLETE", workflow=""))


def test_nodes_in_the_database_of_argo(cluster: Cluster) -> None:
    workflow = training("train", [("Failed", "main: Error (exit code 1): no GPU")])
    cluster.has(workflow, workflow.json(offloadNodeStatusVersion="fnv:123"))
    lines = notified("COMPLETE")
    assert "in its own database" in unknown(lines)
    assert lines[1] == "train failed: no GPU"


def test_an_api_that_does_not_answer(cluster: Cluster, channel: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(closed.getsockname()[1]))
    assert unknown(notified("COMPLETE")).startswith("the Kubernetes API cannot be reached: ")
    assert len(channel) == 1


@pytest.mark.parametrize("answers", [[500] * 9, [401] * 9, [400] * 9])
def test_an_api_that_fails(cluster: Cluster, answers: list[int]) -> None:
    cluster.has(training())
    cluster.answers = answers
    assert unknown(notified("COMPLETE")).startswith(f"the Kubernetes API answered {answers[0]} ")


@pytest.mark.parametrize(
    "resource", [{}, {"status": None}, {"status": {"nodes": {"a": {}}}}, {"status": {"nodes": [1]}}]
)
def test_a_workflow_of_another_form(cluster: Cluster, channel: list[str], resource: dict[str, Any]) -> None:
    cluster.has(training(), resource)
    unknown(notified("COMPLETE"))
    assert len(channel) == 1


def test_a_pod_without_a_service_account(cluster: Cluster, channel: list[str]) -> None:
    (cluster.folder / "token").unlink()
    assert "service account" in unknown(notified("COMPLETE"))
    assert len(channel) == 1


def test_mlflow_that_does_not_answer_is_reported(
    cluster: Cluster, channel: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.has(training())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    lines = notified()
    assert lines[0] == "adfm-training succeeded in 441 s"
    assert lines[1].startswith("the gate verdict is not known: ") and "127.0.0.1:9" in lines[1]
    assert lines[2] == LINK and len(channel) == 1


def test_wrong_settings_are_reported(cluster: Cluster) -> None:
    cluster.has(training("check", [("Failed", "main: Error (exit code 1): seed: should be a number")]))
    lines = notify(TRAINING, Status("RUNNING", "", NAME, HANDLER), RUN, "seed: x", UI).splitlines()
    assert lines[1] == "check failed: seed: should be a number"
    assert lines[2].startswith("the gate verdict is not known: ")


@pytest.mark.parametrize(
    ("ui", "link"),
    [
        ("https://kfp.example.com/", f"https://kfp.example.com/#/runs/details/{RUN}"),
        ("https://kfp.example.com/pipeline/#/runs", f"https://kfp.example.com/pipeline/#/runs/details/{RUN}"),
        ("", f"run {RUN}"),
        ("kfp.example.com", f"run {RUN}"),
    ],
)
def test_the_link(cluster: Cluster, ui: str, link: str) -> None:
    cluster.has(training())
    assert notified(ui=ui)[-1] == link


def test_what_a_stage_says_means_nothing_to_the_channel(cluster: Cluster, channel: list[str]) -> None:
    cluster.has(training("train", [("Failed", "main: Error (exit code 1): <!channel> & <http://evil|here>\x1b[2J")]))
    assert notified()[1] == "train failed: <!channel> & <http://evil|here>\\x1b[2J"
    assert "&lt;!channel&gt; &amp; &lt;http://evil|here&gt;\\x1b[2J" in channel[0]


def test_long_reasons_leave_room_for_the_link(cluster: Cluster, channel: list[str]) -> None:
    workflow = Workflow()
    for number in range(8):
        workflow.task(workflow.handler, f"part-{number}", [("Failed", f"main: Error (exit code 1): {'x' * 1000}")])
    workflow.close(workflow.handler, "Failed")
    workflow.exit()
    cluster.has(workflow)
    assert notified()[-1] == LINK and channel[0].endswith(LINK)


def test_many_failures_are_counted(cluster: Cluster) -> None:
    workflow = Workflow()
    for number in range(8):
        workflow.task(workflow.handler, f"part-{number}", [("Failed", "main: Error (exit code 1): no")])
    workflow.close(workflow.handler, "Failed")
    workflow.exit()
    cluster.has(workflow)
    lines = notified()
    assert lines[5:7] == ["part-4 failed: no", "and 3 more"]


def test_a_promotion_that_had_nothing_to_do_sends_nothing(
    cluster: Cluster, channel: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.has(training())
    assert notified(name=PROMOTION) == ["adfm-promotion succeeded in 441 s", LINK]
    assert "no message is sent" in capsys.readouterr().out
    cluster.refused = {"workflows"}
    assert notified(name=PROMOTION)[0].startswith("adfm-promotion has ended")
    assert channel == []


def test_a_promotion_that_failed_sends_so(cluster: Cluster, channel: list[str]) -> None:
    cluster.has(training("register", [("Failed", "main: Error (exit code 1): not approved")]))
    assert notified(name=PROMOTION)[1] == "register failed: not approved"
    cluster.refused = {"workflows"}
    assert notified(name=PROMOTION)[1] == "register failed: not approved"
    cluster.pods = []
    assert "FAILED" in notified("FAILED", name=PROMOTION)[1]
    assert len(channel) == 3


def test_a_promotion_of_which_nothing_is_known_sends_so(cluster: Cluster, channel: list[str]) -> None:
    cluster.refused = {"workflows", "pods"}
    notified("COMPLETE", name=PROMOTION)  # as KFP has it only after its one task has succeeded
    assert channel == []
    notified("RUNNING", name=PROMOTION)
    notified("FAILED", name=PROMOTION)
    assert len(channel) == 2


@pytest.mark.parametrize(
    ("state", "error", "lines"),
    [
        ("SUCCEEDED", "", ["line succeeded"]),
        ("FAILED", "Task exit-handler-1 failed.", ["line failed", "Task exit-handler-1 failed."]),
        ("CANCELLED", "", ["line was terminated"]),
        ("ODD", "", ["line has ended. Whether it succeeded is not known: its state is 'ODD'."]),
    ],
)
def test_the_state_of_the_local_runner_is_right(state: str, error: str, lines: list[str]) -> None:
    text = notify("line", Status(state, error, "local-pipeline-exit-handler-1", HANDLER), "run-7", "", "")
    assert text.splitlines() == [*lines, NO_VERSION, "run run-7"]


def test_a_local_run_in_a_pod_has_no_workflow(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STARTED, "2026-11-20T10:00:00+00:00")
    text = notify(TRAINING, Status("FAILED", "Task x failed.", f"local-pipeline-{HANDLER}", HANDLER), RUN, "", UI)
    assert re.fullmatch(r"adfm-training failed after -?\d+ s", text.splitlines()[0])
    assert text.splitlines()[1:] == ["Task x failed.", NO_VERSION, f"run {RUN}"]  # KFP's pages do not know it
    assert cluster.asked == []


def test_the_pods_account_may_read_workflows_and_nothing_else_of_them() -> None:
    documents = yaml.safe_load_all((Path(__file__).parents[2] / "deploy/runs/rbac.yaml").read_text())
    (role,) = [each for each in documents if each["kind"] == "Role"]
    rules = [rule for rule in role["rules"] if "argoproj.io" in rule["apiGroups"] and "workflows" in rule["resources"]]
    assert rules == [{"apiGroups": ["argoproj.io"], "resources": ["workflows"], "verbs": ["get"]}]
    pods = [rule["verbs"] for rule in role["rules"] if rule["resources"] == ["pods"]]
    assert pods == [["get", "list", "watch"]]
