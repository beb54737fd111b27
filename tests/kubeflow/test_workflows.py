"""How a run ended, by the nodes of Argo's Workflow."""

from typing import Any

import pytest

from adfm.errors import AdfmError, Unreachable
from adfm.kubeflow import workflows
from adfm.kubeflow.resources import RESOURCES
from adfm.kubeflow.workflows import Failure, Outcome
from tests.argo import DEADLINE, HANDLER, STOPPED, Workflow, training

BOTH = pytest.mark.parametrize("stock", [True, False])


def outcome(workflow: Workflow, task: str = HANDLER) -> Outcome:
    return workflows.outcome(workflow.json(), task)


def failures(workflow: Workflow) -> list[tuple[str, str]]:
    result = outcome(workflow)
    assert result.state == "failed"
    return [(each.task, each.reason) for each in result.failures]


@BOTH
@pytest.mark.parametrize("cached", [(), ("fetch", "convert"), ("check", "fetch", "convert", "train", "evaluate")])
def test_a_run_that_succeeded(stock: bool, cached: tuple[str, ...]) -> None:
    result = outcome(training(cached=cached, stock=stock))
    assert (result.state, result.failures, result.unknown) == ("succeeded", (), "")
    assert result.started and result.ended and (result.ended - result.started).total_seconds() == 441


@BOTH
@pytest.mark.parametrize(
    ("phase", "message", "reason"),
    [
        ("Failed", "main: Error (exit code 1): 3 of 5 expectations fail", "3 of 5 expectations fail"),
        ("Failed", "main: Error (exit code 1)", "exit code 1; see the log of its pod"),
        (
            "Failed",
            "main: OOMKilled (exit code 137)",
            "out of memory: it needed more than its limit of {memory}; raise",
        ),
        (
            "Failed",
            "main: OOMKilled (exit code 1): Killed",
            "out of memory: it needed more than its limit of {memory};",
        ),
        (
            "Failed",
            "main: OOMKilled (exit code 1): training died 3 times",
            "out of memory: it needed more than its limit of {memory}; raise the limit in "
            "adfm/kubeflow/resources.py and submit again (training died 3 times)",
        ),
        (
            "Failed",
            "main: Error (exit code 137)",
            "killed (exit code 137), as the kernel does when memory runs out; see",
        ),
        ("Failed", "main: Error (exit code 143)", "stopped by SIGTERM (exit code 143); see the log of its pod"),
        (
            "Failed",
            DEADLINE,
            "it ran longer than its limit of {hours:g} h; raise the limit in adfm/kubeflow/resources.py",
        ),
        ("Failed", STOPPED, "it was stopped: the run was terminated, or a time limit set for it was over"),
        ("Error", "pod deleted", "its pod was deleted: its node was drained or lost, or somebody removed it"),
        (
            "Error",
            'pods "adfm-training-x7k2p-1" is forbidden: violates PodSecurity "restricted:latest": runAsNonRoot != true',
            'the cluster refused its pod: violates PodSecurity "restricted:latest": runAsNonRoot != true',
        ),
        (
            "Error",
            'Pod "adfm-1" is invalid: spec.containers[1].env[9].valueFrom: Invalid value: "": may not be specified '
            "when `value` is not empty",
            'the cluster refused its pod: spec.containers[1].env[9].valueFrom: Invalid value: "": may not be specified',
        ),
        (
            "Error",
            'admission webhook "validate.kyverno.svc" denied the request: \n\npolicy Pod/kubeflow/x:\n  no tag\n',
            "the cluster refused its pod: policy Pod/kubeflow/x: no tag",
        ),
        (
            "Failed",
            "The node was low on resource: ephemeral-storage. Threshold quantity: 10Gi, available: 9Gi.",
            "The node was low on resource: ephemeral-storage. Threshold quantity: 10Gi, available: 9Gi.",
        ),
        ("Error", "wait: OOMKilled (exit code 137)", "out of memory: it needed more than its limit; raise"),
        ("Error", "init: Error (exit code 64): no space", "no space"),
        (
            "Error",
            "kfp-launcher: StartError (exit code 128)",
            "exit code 128 of its container kfp-launcher; see the log",
        ),
        ("Failed", "", "Argo gives no reason; see the log of its pod"),
    ],
)
def test_the_task_and_the_reason_of_a_failed_pod(stock: bool, phase: str, message: str, reason: str) -> None:
    ((task, text),) = failures(training("train", [(phase, message)], stock=stock))
    assert task == "train"
    assert text.startswith(reason.format(**RESOURCES["train"]._asdict()))


def test_the_end_of_the_log_in_place_of_a_message_gives_its_error() -> None:
    """As with the policy FallbackToLogsOnError, which KFP sets after 2.17."""
    log = "step 3\nadfm: error: the disk is full\n\nF1120 10:07 launcher_v2.go:151] exit status 1\n"
    ((_, reason),) = failures(training("train", [("Failed", f"main: Error (exit code 1): {log}")]))
    assert reason == "the disk is full"
    ((_, reason),) = failures(training("train", [("Failed", "main: Error (exit code 1): step 3\nValueError: no\n")]))
    assert reason == "ValueError: no"


def test_a_reason_is_one_printable_line_of_bounded_length() -> None:
    ((_, reason),) = failures(training("train", [("Failed", "main: Error (exit code 1): a\x1b[2J" + "b" * 5000)]))
    assert reason.startswith("a\\x1b[2Jb") and reason.endswith("…") and len(reason) == 400


@BOTH
def test_only_the_last_try_counts(stock: bool) -> None:
    tries = [("Error", "pod deleted"), ("Failed", "main: Error (exit code 1): no GPU")]
    assert failures(training("train", tries, stock=stock)) == [("train", "no GPU")]


@BOTH
def test_tries_that_failed_are_no_failures_of_a_task_that_succeeded(stock: bool) -> None:
    tries = [("Error", "pod deleted"), ("Failed", "main: OOMKilled (exit code 137)"), ("Succeeded", "")]
    assert outcome(training("train", tries, stock=stock)).state == "succeeded"
    workflow = training("evaluate", [("Failed", "main: Error (exit code 1): no model")], stock=stock)
    workflow.pod(workflow.handler, "late", "x", tries, retried=True)
    assert failures(workflow) == [("evaluate", "no model")]


@BOTH
def test_a_driver_that_failed_is_called_so(stock: bool) -> None:
    result = failures(training("train", driver=[("Failed", "main: Error (exit code 1)")], stock=stock))
    driver = "its driver, a pod of Kubeflow Pipelines, failed: exit code 1; see the log of its pod"
    assert result == [("train", driver)]


def test_a_failed_try_of_the_root_is_not_the_present_one() -> None:
    """With `templateDefaults` a lost pod makes Argo run the handler, and then the exit task, again."""
    workflow = training("train", [("Error", "pod deleted")] * 3)
    workflow.close(workflow.root, "Error")
    workflow.node(workflow.root[:-3])["phase"] = "Running"
    workflow.root = workflow.again(workflow.root)
    workflow.clock = 500
    workflow.handler = workflow.dag(workflow.root, HANDLER, f"comp-{HANDLER}")
    workflow.task(workflow.handler, "train")
    workflow.close(workflow.handler, "Succeeded")
    workflow.exit()
    assert outcome(workflow).state == "succeeded"
    assert outcome(workflow, "path").state == "succeeded"


def loop(stock: bool, *messages: str) -> Workflow:
    """A loop over parts, of which those with a message failed, and then a training that failed."""
    workflow = Workflow(stock)
    dag = workflow.dag(workflow.handler, "for-loop-1", "comp-for-loop-1-for-loop-1-iterator")
    workflow.pod(dag, "iteration-driver", "system-dag-driver")
    group = workflow.add(dag, "iteration-iterations", "TaskGroup", "comp-for-loop-1-for-loop-1", "Failed")
    for number, message in enumerate(messages):
        phase = "Failed" if message else "Succeeded"
        item = workflow.dag(dag, f"iteration-iterations({number}:{number})", "comp-for-loop-1-for-loop-1")
        workflow._child(group, item[:-3] if stock else item)
        workflow.pod(item, "iteration-item-driver", "system-dag-driver")
        inner = workflow.dag(item, "iteration-item", "comp-for-loop-1")
        workflow.task(inner, "inspect-part", [(phase, message)])
        workflow.close(inner, phase)
        workflow.close(item, phase)
    workflow.close(dag, "Failed")
    workflow.task(workflow.handler, "train", [("Failed", "main: Error (exit code 1): no shards")])
    workflow.close(workflow.handler, "Failed")
    workflow.exit()
    return workflow


@BOTH
def test_parts_of_a_loop(stock: bool) -> None:
    no_part = "main: Error (exit code 1): no part"
    workflow = loop(stock, "", no_part, no_part, "")
    assert failures(workflow) == [("inspect-part", "no part"), ("train", "no shards")]
    assert workflows.failures_of_pods(workflow.pods()) == outcome(workflow).failures


@BOTH
@pytest.mark.parametrize("spec", [{"activeDeadlineSeconds": 0}, {"shutdown": "Stop"}, {"shutdown": "Terminate"}])
def test_a_run_that_was_terminated(stock: bool, spec: dict[str, Any]) -> None:
    strategy = spec.get("shutdown")
    message = f"workflow shutdown with strategy:  {strategy}" if strategy else STOPPED
    workflow = training("train", [("Failed", message)], stock=stock)
    workflow.spec |= spec
    result = outcome(workflow)
    assert result.state == "terminated"
    assert [(each.task, each.stopped) for each in result.failures] == [("train", True)]


def test_a_run_that_was_terminated_between_two_tasks() -> None:
    workflow = training(terminated=True)
    workflow.close(workflow.handler, "Failed")
    assert (outcome(workflow).state, [each.task for each in outcome(workflow).failures]) == ("terminated", [""])


def test_a_run_that_failed_before_it_was_terminated_has_failed() -> None:
    workflow = training("train", [("Failed", "main: Error (exit code 1): no GPU")], terminated=True)
    assert outcome(workflow).state == "failed"
    assert outcome(training(terminated=True)).state == "succeeded"


@BOTH
def test_the_handler_is_found_without_its_name(stock: bool) -> None:
    assert outcome(training("train", [("Failed", "")], stock=stock), "path").state == "failed"
    assert outcome(training(stock=stock), "").state == "succeeded"


def test_a_handler_that_runs_has_not_ended() -> None:
    workflow = training()
    workflow.close(workflow.handler, "Running")
    with pytest.raises(Unreachable, match="exit-handler-1 is Running"):
        outcome(workflow)


def test_compressed_nodes() -> None:
    workflow = training("train", [("Failed", "main: Error (exit code 1): no GPU")])
    assert workflows.outcome(workflow.compressed(), HANDLER) == outcome(workflow)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ({"offloadNodeStatusVersion": "fnv:1234567"}, "in its own database"),
        ({"compressedNodes": "KLUv/QQAAA=="}, "cannot be unpacked"),  # Zstandard, which Argo can be set to after 4.0
        ({"compressedNodes": "%"}, "cannot be unpacked"),
        ({"nodes": {}}, "has no nodes"),
        ({"nodes": {"a": {"id": "a", "name": "a", "displayName": "a"}}}, "has no node 'exit-handler-1'"),
    ],
)
def test_nodes_that_are_not_there(status: dict[str, Any], message: str) -> None:
    with pytest.raises(AdfmError, match=message):
        workflows.outcome(training().json(**status), HANDLER)


@BOTH
def test_pods_tell_the_failures_that_they_show(stock: bool) -> None:
    tries = [("Failed", "main: Error (exit code 1): no GPU"), ("Failed", "main: Error (exit code 1): no GPU at all")]
    workflow = training("train", tries, stock=stock)
    assert workflows.failures_of_pods(workflow.pods()) == (Failure("train", "no GPU at all"),)
    workflow = training("train", [*tries, ("Succeeded", "")], stock=stock)
    assert workflows.failures_of_pods(workflow.pods()) == ()
    with_sidecar = training("train", tries, stock=stock).pods()
    for pod in with_sidecar:
        for container in pod["status"].get("containerStatuses", []):
            container["state"]["terminated"] |= (
                {"exitCode": 2, "reason": "Error"} if container["name"] == "wait" else {}
            )
    assert workflows.failures_of_pods(with_sidecar) == (Failure("train", "no GPU at all"),)
    (late,) = workflows.failures_of_pods(training("train", [("Failed", DEADLINE)], stock=stock).pods())
    assert late.reason.startswith("it ran longer than its limit")


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("adfm-training-x7k2p.root.exit-handler-1.train.executor", "train"),
        ("adfm-training-x7k2p(0).root(0).exit-handler-1(2).inspect-part(0).executor(1)", "inspect-part"),
        (
            "w.root.exit-handler-1.for-loop-1.iteration-iterations(0:0).iteration-item.inspect-part-driver",
            "inspect-part",
        ),
        ("w.root.exit-handler-1.for-loop-1.iteration-driver", "for-loop-1"),
        ("w.root.exit-handler-1.for-loop-1.iteration-iterations(3:3).iteration-item-driver(0)", "for-loop-1"),
        ("executor", "executor"),
    ],
)
def test_the_task_in_the_name_of_a_node(name: str, task: str) -> None:
    assert workflows.task_of(name) == task
