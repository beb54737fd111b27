"""Training on several machines, by a TrainJob: Kubernetes' own client against its API on loopback."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from adfm.errors import AdfmError
from adfm.kubeflow import cluster, joblog, jobs, nodes, resources, volume
from adfm.kubeflow.trainjob import Machines
from adfm.params import Params
from adfm.process import environment
from tests.kubeflow.kubernetes_api import (
    CLAIM,
    EVENTS,
    NOT_SERVED,
    PODS,
    TRAIN_JOBS,
    Api,
    Refused,
    claim,
    machine,
    own_pod,
)

GPU = "nvidia.com/gpu"
RUN = "1f0c7a52-9d1e-4c6b-8d51-0c6f3c1f9a55"
JOB = "adfm-1f0c7a52-9d1e-4c6b"
VOLUME_JOB = f"{JOB}-volume"
OWNER = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "adfm-training-7xk2p", "uid": "0b1c"}


def on_nodes(folder: Path, image: str = "localhost/adfm:gpu", **changed: Any) -> None:
    machines = Machines(2, 4, GPU, {"pool": "gpu"}, [{"key": "gpu", "operator": "Exists"}])._replace(**changed)
    place: dict[str, Any] = {"workspace": folder / "workspace", "claim": "adfm-workspace", "image": image}
    nodes.on_nodes(folder / "shards", folder / "sft", folder / "out", Params(), machines, run=RUN, **place)


def check() -> None:
    nodes.check(Params().train, run=RUN, nodes=2, gpus=4, gpu_type=GPU)


def finish(job: dict[str, Any], kind: str, message: str = "") -> None:
    job["status"] = {"conditions": [{"type": kind, "status": "True", "message": message}]}


def made_pod(job: dict[str, Any]) -> dict[str, Any]:
    (patch,) = job["spec"]["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod: dict[str, Any] = replicated["template"]["spec"]["template"]
    return pod


def stamped(*lines: bytes, second: int = 0) -> bytes:
    return b"".join(
        b"2026-11-20T10:00:%02d.%09dZ %s\n" % (second, number, line) for number, line in enumerate(lines, start=1)
    )


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """The API with Kubeflow Trainer, a pod of a pipeline's run, and a volume; every training ends well."""
    for folder in ("workspace", "shards", "sft"):
        (tmp_path / folder).mkdir()
    (tmp_path / "shards" / "train.parquet").write_text("data")
    with Api() as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def run(job: dict[str, Any]) -> None:
            name, command = job["metadata"]["name"], job["spec"]["trainer"]["command"]
            served.pods["machine"] = machine(name, name="machine")
            if name == VOLUME_JOB:
                served.logs["machine"] = stamped(b"a warning", b"free 2147483648")
            else:
                trained = Path(command[6])
                trained.mkdir()
                (trained / "adfm.json").write_text("{}")
                served.logs["machine"] = stamped(b"step 1")
            finish(job, "Complete")

        served.pods["own"], served.at_create = own_pod(), run
        monkeypatch.setattr(cluster, "api", lambda: client.ApiClient(client.Configuration(host=served.address)))
        monkeypatch.setattr(cluster, "namespace", lambda: "line")
        monkeypatch.setattr(cluster, "_PAUSE", 0)
        monkeypatch.setattr(jobs, "_POLL", 0)
        monkeypatch.setattr(resources, "WORKSPACE", str(tmp_path / "workspace"))
        monkeypatch.setenv("KFP_POD_NAME", "own")
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        yield served
        served.shutdown()
        thread.join()


class Steps:
    """What a controller does at each look at a job: the steps in order, the last one again and again."""

    def __init__(self, *steps: Any) -> None:
        self.steps = list(steps)

    def __call__(self, job: dict[str, Any]) -> None:
        (self.steps.pop(0) if len(self.steps) > 1 else self.steps[0])(job)


def test_a_train_job_runs_the_image_on_the_machines_and_gives_its_adapter(
    api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_nodes(tmp_path)
    assert (tmp_path / "out" / "adfm.json").is_file()
    assert list((tmp_path / "workspace").iterdir()) == []
    assert api.jobs == {}
    assert capsys.readouterr().out == f"step 1\nthe TrainJob {JOB} of this run was deleted\n"
    (job,) = api.created
    assert job["metadata"]["name"] == JOB
    assert job["metadata"]["ownerReferences"] == [OWNER]
    trainer = job["spec"]["trainer"]
    work = tmp_path / "workspace" / JOB
    assert trainer["command"] == [
        *("torchrun", "-m", "adfm", "train", f"{work}/shards", f"{work}/sft", f"{work}/trained"),
        *("--params", f"{work}/params.yaml", "--force"),  # whoever finds the model made must not fail for it
    ]
    assert (trainer["image"], trainer["numNodes"], trainer["numProcPerNode"]) == ("localhost/adfm:gpu", 2, 4)
    pod = made_pod(job)["spec"]
    assert pod["nodeSelector"] == {"pool": "gpu"}
    assert pod["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "adfm-workspace"
    # A next job of the name must not find the JobSet of this one.
    assert ("DELETE", f"{TRAIN_JOBS}/{JOB}?propagationPolicy=Foreground") in api.requests


def test_a_machine_gets_the_resources_of_the_task_train(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(resources.RESOURCES, "train", resources.Resources("12", "96Gi", 10))
    monkeypatch.setattr(resources, "SECRETS", {"some-secret": {"some-key": "SOME_VARIABLE"}})
    monkeypatch.setattr(resources, "PULL_SECRET", "some-registry")
    monkeypatch.setattr(resources, "SHARED_MEMORY", "16Gi")
    monkeypatch.setattr(environment, "CA", "some-authority")
    monkeypatch.setattr(environment, "CA_FOLDER", "/some/folder")
    on_nodes(tmp_path)
    (job,) = api.created
    amounts = {"cpu": "12", "memory": "96Gi", GPU: "4"}
    assert job["spec"]["trainer"]["resourcesPerNode"] == {"limits": amounts, "requests": amounts}
    assert job["spec"]["activeDeadlineSeconds"] == 36000
    reference = {"name": "some-secret", "key": "some-key", "optional": True}
    assert job["spec"]["trainer"]["env"] == [{"name": "SOME_VARIABLE", "valueFrom": {"secretKeyRef": reference}}]
    pod = made_pod(job)["spec"]
    assert pod["imagePullSecrets"] == [{"name": "some-registry"}]
    volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
    assert volumes["shared-memory"] == {"emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}}
    assert volumes["ca"] == {"configMap": {"name": "some-authority", "optional": True}}
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {"workspace": str(tmp_path / "workspace"), "shared-memory": "/dev/shm", "ca": "/some/folder"}


def test_the_machines_get_what_the_mlflow_plug_in_of_kfp_gives_the_task(api: Api, tmp_path: Path) -> None:
    password = {
        "name": "MLFLOW_TRACKING_PASSWORD",
        "valueFrom": {"secretKeyRef": {"name": "kfp-mlflow", "key": "password"}},
    }
    plugged = [{"name": "MLFLOW_RUN_ID", "value": "0f"}, password]
    api.pods["own"]["spec"]["containers"][1]["env"] = [{"name": "KFP_POD_NAME", "value": "own"}, *plugged]
    on_nodes(tmp_path)
    assert api.created[0]["spec"]["trainer"]["env"][-2:] == plugged
    assert "KFP_POD_NAME" not in str(api.created[0])


def test_without_gpus_a_machine_gets_none_and_one_process(api: Api, tmp_path: Path) -> None:
    on_nodes(tmp_path, gpus=0)
    trainer = api.created[0]["spec"]["trainer"]
    assert set(trainer["resourcesPerNode"]["limits"]) == {"cpu", "memory"}
    assert trainer["numProcPerNode"] == 1


def test_the_pods_of_a_train_job_are_admitted_by_pod_security_and_left_alone_by_istio(api: Api, tmp_path: Path) -> None:
    check()
    on_nodes(tmp_path)
    assert [job["metadata"]["name"] for job in api.created] == [VOLUME_JOB, JOB]
    for job in api.created:
        pod = made_pod(job)
        assert pod["metadata"]["labels"] == {"sidecar.istio.io/inject": "false"}
        security = pod["spec"]["securityContext"]
        assert (security["runAsUser"], security["fsGroup"], security["runAsNonRoot"]) == (1000, 1000, True)
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = pod["spec"]["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }


def test_check_tries_the_train_job_and_the_volume(api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check()
    assert capsys.readouterr().out == ("nodes     TrainJob accepted; volume adfm-workspace is writable, 2.0 GiB free\n")
    assert ("POST", f"{TRAIN_JOBS}?dryRun=All&fieldValidation=Strict") in api.requests
    (dry,) = api.dry_runs
    (tried,) = api.created
    assert api.jobs == {}
    on_nodes(tmp_path, node_selector={}, tolerations=[], image="registry.example.com/adfm:cpu")
    assert api.created[1] == dry
    assert tried["metadata"]["ownerReferences"] == [OWNER]
    assert tried["spec"]["trainer"]["image"] == "registry.example.com/adfm:cpu"
    assert tried["spec"]["trainer"]["numNodes"] == 1
    assert set(tried["spec"]["trainer"]["resourcesPerNode"]["limits"]) == {"cpu", "memory"}


def test_the_volume_is_tried_by_making_the_folder_of_the_run(api: Api, tmp_path: Path) -> None:
    def run(job: dict[str, Any]) -> None:
        command = [sys.executable, *job["spec"]["trainer"]["command"][1:]]
        output = subprocess.run(command, check=True, capture_output=True).stdout
        api.pods["machine"], api.logs["machine"] = machine(VOLUME_JOB, name="machine"), stamped(*output.splitlines())
        finish(job, "Complete")

    api.at_create = run
    check()
    assert list((tmp_path / "workspace").iterdir()) == [tmp_path / "workspace" / JOB]
    assert list((tmp_path / "workspace" / JOB).iterdir()) == []


def test_a_volume_that_cannot_be_written_is_reported_with_the_reason(api: Api, tmp_path: Path) -> None:
    def run(job: dict[str, Any]) -> None:
        api.pods["machine"] = machine(VOLUME_JOB, name="machine")
        api.logs["machine"] = stamped(b"refused [Errno 13] Permission denied: '/workspace/adfm-1'")
        finish(job, "Complete")

    api.at_create = run
    with pytest.raises(AdfmError, match=r"user and group 1000 cannot write to the volume adfm-workspace: \[Errno 13\]"):
        check()


def test_prepare_prints_why_a_folder_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    volume.prepare(str(tmp_path / "file" / "run"))
    assert capsys.readouterr().out.startswith("refused [Errno 20] Not a directory")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "the namespace line has no volume claim adfm-workspace, .*; kubectl -n line apply"),
        (claim(("ReadWriteOnce",)), "is ReadWriteOnce, and several machines write to it"),
        (claim(phase="Lost"), "the volume of the claim adfm-workspace in the namespace line is lost"),
    ],
)
def test_a_claim_that_cannot_be_used_is_reported_before_a_pod_waits_for_it(api: Api, state: Any, message: str) -> None:
    api.claim = state
    with pytest.raises(AdfmError, match=message):
        check()
    assert api.created == []


def test_a_claim_that_may_not_be_read_is_tried(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    api.refusals["GET", CLAIM] = Refused(403, 'persistentvolumeclaims "adfm-workspace" is forbidden')
    check()
    assert "may not read the claim adfm-workspace (deploy/runs/rbac.yaml); it is tried" in capsys.readouterr().out


FORBIDDEN = (
    'trainjobs.trainer.kubeflow.org is forbidden: User "system:serviceaccount:line:default" cannot create resource '
    '"trainjobs" in API group "trainer.kubeflow.org" in the namespace "line"'
)
WEBHOOK = 'admission webhook "validator.trainjob.trainer.kubeflow.org" denied the request: '
REFUSALS = [
    (NOT_SERVED, "the cluster does not know TrainJobs; install Kubeflow Trainer 2.2 or newer"),
    (
        Refused(400, 'TrainJob in version "v1alpha1" cannot be handled: unknown field "spec.runtimePatches"'),
        "Kubeflow Trainer is older than 2.2 or of another API",
    ),
    (Refused(403, FORBIDDEN), "apply deploy/runs/rbac.yaml, and submit with --service-account adfm-pipeline"),
    (
        Refused(403, f"{WEBHOOK}spec.RuntimeRef: Invalid value: specified clusterTrainingRuntime must be created"),
        "there is no runtime torch-distributed; install Kubeflow Trainer",
    ),
    (
        Refused(500, f'Internal error occurred: failed calling webhook "validator": {"connection refused"}'),
        "see whether the controller of Kubeflow Trainer runs",
    ),
    (Refused(422, "TrainJob is invalid: spec.trainer.numNodes"), "422 TrainJob is invalid: spec.trainer.numNodes; see"),
]


@pytest.mark.parametrize(("refusal", "message"), REFUSALS)
def test_a_cluster_that_refuses_train_jobs_is_reported_by_check(
    api: Api, refusal: Refused, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.refusals["POST", TRAIN_JOBS] = refusal
    call = cluster.call
    monkeypatch.setattr(cluster, "call", lambda *args, patience, **options: call(*args, patience=0, **options))
    with pytest.raises(AdfmError, match=message) as raised:
        check()
    assert refusal.code == 404 or str(refusal) in str(raised.value)
    assert api.created == []


def test_a_train_job_that_cannot_be_made_for_training_is_reported(api: Api, tmp_path: Path) -> None:
    api.refusals["POST", TRAIN_JOBS] = Refused(403, FORBIDDEN)
    with pytest.raises(AdfmError, match=f"the cluster refuses the TrainJob {JOB}: 403 .* apply deploy/runs/rbac.yaml"):
        on_nodes(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_volume_that_is_not_there_in_time_ends_the_check(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume, "_PROBE", 0.2)
    unbound = "0/3 nodes are available: pod has unbound immediate PersistentVolumeClaims."
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": unbound}

    def run(job: dict[str, Any]) -> None:
        api.pods["machine"] = machine(VOLUME_JOB, name="machine", phase="Pending", conditions=[condition])

    api.at_create = run
    with pytest.raises(AdfmError, match=f"has not started in 0 minutes: machine: {unbound}"):
        check()
    assert api.jobs == {}


def test_a_volume_whose_storage_does_not_answer_ends_the_check(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume, "_PROBE", 0.1)
    api.at_create = lambda job: api.pods.update({"machine": machine(VOLUME_JOB, name="machine")})
    with pytest.raises(AdfmError, match="its pod has been running for 0 minutes; does its storage answer"):
        check()
    assert api.jobs == {}


def test_a_volume_whose_trial_left_no_log_is_not_called_unwritable(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joblog, "_PATIENCE", 0)
    api.refusals["GET", f"{PODS}/machine/log"] = Refused(502, "proxy error")
    with pytest.raises(AdfmError, match="could not be tried .*: its pod has left no word in its log: 502 proxy error;"):
        check()


def test_a_task_that_is_started_again_follows_the_job_that_is_under_way(api: Api, tmp_path: Path) -> None:
    work = tmp_path / "workspace" / JOB
    (work / "trained").mkdir(parents=True)
    api.jobs[JOB] = {"metadata": {"name": JOB}, "spec": {}}
    api.at_get = Steps(lambda job: None, lambda job: None, lambda job: finish(job, "Complete"))
    on_nodes(tmp_path)
    assert api.created == []
    assert (tmp_path / "out").is_dir()


def test_a_job_that_is_being_deleted_is_waited_for(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api.jobs[JOB] = {"metadata": {"name": JOB, "deletionTimestamp": "2026-11-20T10:00:00Z"}, "spec": {}}
    api.at_get = Steps(lambda job: None, lambda job: None, lambda job: api.jobs.pop(JOB, None), lambda job: None)
    on_nodes(tmp_path)
    assert len(api.created) == 1
    api.jobs[JOB] = {"metadata": {"name": JOB, "deletionTimestamp": "2026-11-20T10:00:00Z"}, "spec": {}}
    monkeypatch.setattr(jobs, "_DELETION", 0)
    with pytest.raises(AdfmError, match=f"kubectl -n line describe trainjob {JOB}"):
        on_nodes(tmp_path)


def test_a_job_that_failed_is_reported_and_removed_for_the_next_try(
    api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}

    def run(job: dict[str, Any]) -> None:
        api.pods = {
            "own": api.pods["own"],
            "first": machine(JOB, 0, name="first"),
            "second": machine(JOB, 1, name="second", restarts=1, lastState=killed),
        }
        api.logs = {"first": stamped(b"step 1"), "second previous": stamped(*(b"line %d" % i for i in range(30)))}
        finish(job, "Failed", "jobset failed due to one or more job failures")

    api.at_create = run
    with pytest.raises(AdfmError, match=r"Failed: jobset failed .*; second ended with status 137 \(OOMKilled\)"):
        on_nodes(tmp_path)
    assert api.jobs == {}
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "workspace" / JOB / "params.yaml").is_file()  # the next try resumes from there
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 1"
    assert lines[1:-1] == [f"line {i}" for i in range(10, 30)]
    assert lines[-1] == "second ended with status 137 (OOMKilled)"


def test_a_job_that_failed_is_reported_with_the_error_of_the_training(api: Api, tmp_path: Path) -> None:
    failed = {"terminated": {"exitCode": 1, "reason": "Error"}}

    def run(job: dict[str, Any]) -> None:
        api.pods["machine"] = machine(JOB, name="machine", state=failed)
        api.logs["machine"] = stamped(b"[rank0] adfm: error: the loss is not a number; lower it.", b"E")
        finish(job, "Failed", "jobset failed due to one or more job failures")

    api.at_create = run
    with pytest.raises(AdfmError) as raised:
        on_nodes(tmp_path)
    assert str(raised.value) == (
        f"the TrainJob {JOB} ended as Failed: the loss is not a number; lower it.; "
        "machine ended with status 1 (Error); its log is above."
    )


def test_a_job_without_a_model_is_reported(api: Api, tmp_path: Path) -> None:
    api.at_create = lambda job: finish(job, "Complete")
    with pytest.raises(AdfmError, match="ended as Complete without a model in"):
        on_nodes(tmp_path)


def test_a_log_is_printed_once_and_whole_whatever_is_in_it(
    api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create = api.at_create
    failed = {"terminated": {"exitCode": 1, "reason": "Error"}}

    def run(job: dict[str, Any]) -> None:
        create(job)
        del job["status"]
        api.logs["machine"] = stamped(b"\xff broken", b'{"json": 1}')

    def grow(job: dict[str, Any]) -> None:
        api.logs["machine"] += stamped(b"  indented 50%|#####\r60%", second=1)

    def restart(job: dict[str, Any]) -> None:
        api.logs["machine previous"] = api.logs["machine"] + stamped(b"NCCL error", second=2)
        api.logs["machine"] = stamped(b"resumed", second=3)
        api.pods["machine"] = machine(JOB, name="machine", restarts=1, lastState=failed)

    api.at_create, api.at_get = run, Steps(lambda job: None, grow, restart, lambda job: finish(job, "Complete"))
    on_nodes(tmp_path)
    assert capsys.readouterr().out == (
        '\N{REPLACEMENT CHARACTER} broken\n{"json": 1}\n  indented 50%|#####\r60%\nNCCL error\n'
        f"machine ended with status 1 (Error)\nresumed\nthe TrainJob {JOB} of this run was deleted\n"
    )


def test_a_connection_that_breaks_within_a_log_does_not_end_the_training(
    api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api.broken = [f"{PODS}/machine/log"] * 2
    on_nodes(tmp_path)
    assert api.broken == []
    assert capsys.readouterr().out.startswith("step 1\n")


def test_a_log_of_a_lost_machine_does_not_end_the_training(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(joblog, "_PATIENCE", 0)
    create, message = api.at_create, "dial tcp 10.0.0.7:10250: connect: no route to host"

    def run(job: dict[str, Any]) -> None:
        create(job)
        del job["status"]
        api.refusals["GET", f"{PODS}/machine/log"] = Refused(500, message)

    def replace(job: dict[str, Any]) -> None:
        api.pods["other"], api.logs["other"] = machine(JOB, name="other"), stamped(b"step 2", second=1)

    api.at_create, api.at_get = run, Steps(replace, lambda job: None, lambda job: finish(job, "Complete"))
    on_nodes(tmp_path)
    assert (tmp_path / "out" / "adfm.json").is_file()
    assert capsys.readouterr().out.splitlines()[:-1] == [
        f"the log of machine cannot be read now: 500 {message}",
        "step 2",
    ]


def test_a_model_is_taken_before_its_job_is_deleted(api: Api, tmp_path: Path) -> None:
    api.refusals["DELETE", TRAIN_JOBS] = Refused(403, "not now")
    on_nodes(tmp_path)
    assert (tmp_path / "out" / "adfm.json").is_file()


@pytest.mark.parametrize("path", [TRAIN_JOBS, PODS])
def test_an_outage_of_the_api_does_not_end_the_training(api: Api, tmp_path: Path, path: str) -> None:
    create = api.at_create

    def run(job: dict[str, Any]) -> None:
        create(job)
        outage = [Refused(code, "etcdserver: leader changed") for code in (401, 429, 500, 502, 503)]
        api.refusals["GET", path] = outage

    api.at_create = run
    on_nodes(tmp_path)
    assert api.refusals["GET", path] == []
    assert (tmp_path / "out" / "adfm.json").is_file()


def test_an_outage_without_end_ends_the_task(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "OUTAGE", 0.1)
    api.refusals["GET", TRAIN_JOBS] = Refused(503, "apiserver is shutting down")
    with pytest.raises(AdfmError, match="503 apiserver is shutting down"):
        on_nodes(tmp_path)


def waiting(reason: str, message: str) -> dict[str, Any]:
    pending = {"waiting": {"reason": reason, "message": message}}
    return machine(JOB, name="machine", phase="Pending", state=pending)


def test_a_job_that_waits_for_a_machine_says_so_and_waits(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jobs, "_QUIET", -1)
    monkeypatch.setattr(jobs, "HOPELESS", 0)
    create = api.at_create
    full = "0/5 nodes are available: 5 Insufficient nvidia.com/gpu."
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": full}

    def run(job: dict[str, Any]) -> None:
        create(job)
        del job["status"]
        job["spec"]["suspend"] = True
        api.pods["machine"] = machine(JOB, name="machine", phase="Pending", conditions=[condition])

    def pull(job: dict[str, Any]) -> None:
        api.pods["machine"] = waiting("ContainerCreating", "")
        api.warnings["machine"] = "FailedMount: mount.nfs: connection timed out"

    api.at_create = run
    api.at_get = Steps(
        lambda job: None,  # suspended
        lambda job: job["spec"].pop("suspend"),
        lambda job: None,  # the same reason is not printed twice
        pull,
        lambda job: finish(job, "Complete"),
    )
    on_nodes(tmp_path)
    start = f"the TrainJob {JOB} has not started yet: "
    assert capsys.readouterr().out.splitlines()[:3] == [
        f"{start}it is suspended; a queue such as Kueue has not admitted it",
        f"{start}machine: {full}",
        f"{start}machine: FailedMount: mount.nfs: connection timed out",
    ]


@pytest.mark.parametrize(
    ("pod", "warning", "message"),
    [
        (waiting("ImagePullBackOff", 'Back-off pulling image "x"'), "", "machine: ImagePullBackOff: Back-off pulling"),
        (waiting("CreateContainerConfigError", "secret not there"), "", "machine: CreateContainerConfigError: secret"),
        (None, "", "it has no pods; see whether the controllers of Trainer and JobSet run"),
        (
            None,
            'FailedCreate: pods "x" is forbidden: violates PodSecurity',
            "FailedCreate: pods .* PodSecurity",
        ),
        (
            None,
            'TrainJobResourcesCreationFailed: no matches for kind "JobSet"',
            "TrainJobResourcesCreationFailed: no matches",
        ),
    ],
)
def test_a_job_that_cannot_start_is_given_up(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pod: Any, warning: str, message: str
) -> None:
    monkeypatch.setattr(jobs, "HOPELESS", 0.05)
    if warning:
        api.warnings[JOB if warning.startswith("TrainJob") else f"{JOB}-node-0"] = warning
    api.at_create = lambda job: api.pods.update({"machine": pod} if pod else {})
    with pytest.raises(AdfmError, match=f"cannot start, and is given up after 0 minutes: {message}"):
        on_nodes(tmp_path)
    assert api.jobs == {}


def test_events_that_may_not_be_read_are_done_without(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "HOPELESS", 0.05)
    api.refusals["GET", EVENTS] = Refused(403, "events is forbidden")
    api.at_create = lambda job: None
    with pytest.raises(AdfmError, match="it has no pods"):
        on_nodes(tmp_path)


def test_a_job_that_was_made_by_a_request_without_an_answer_is_followed(api: Api, tmp_path: Path) -> None:
    create = api.at_create

    def run(job: dict[str, Any]) -> None:
        create(job)
        raise Refused(504, "the server was unable to return a response in the time allotted")

    api.at_create = run
    on_nodes(tmp_path)
    assert [method for method, path in api.requests if method == "POST"] == ["POST", "POST"]
    assert (tmp_path / "out" / "adfm.json").is_file()


def test_a_pod_that_is_not_one_of_kubernetes_is_reported(api: Api, tmp_path: Path) -> None:
    del api.pods["own"]
    with pytest.raises(AdfmError, match=f'the cluster refuses the TrainJob {JOB}: 404 pods "own" not found; see docs'):
        on_nodes(tmp_path)


def test_a_job_that_somebody_deletes_ends_the_task(api: Api, tmp_path: Path) -> None:
    api.at_create = lambda job: api.jobs.clear()
    with pytest.raises(AdfmError, match=f"the TrainJob {JOB} was deleted while it was under way"):
        on_nodes(tmp_path)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied"),
            "user and group 1000 cannot write to the volume",
        ),
        (
            shutil.Error([("a", "b", "[Errno 13] Permission denied: 'b'")]),
            r"user and group 1000 cannot write to the volume adfm-workspace: \[Errno 13\] Permission denied: 'b'",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "the volume adfm-workspace is full: .* remove folders"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the volume adfm-workspace is full: .* remove folders"),
    ],
)
def test_a_volume_that_cannot_take_the_data_is_reported_without_a_traceback(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, message: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(shutil, "copytree", refuse)
    with pytest.raises(AdfmError, match=message):
        on_nodes(tmp_path)
    assert api.created == []


def test_the_end_of_a_run_deletes_its_jobs(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    api.jobs = {name: {"metadata": {"name": name}, "spec": {}} for name in (JOB, VOLUME_JOB, "adfm-of-another-run")}
    nodes.end(RUN)
    assert list(api.jobs) == ["adfm-of-another-run"]
    assert capsys.readouterr().out.splitlines() == [
        f"the TrainJob {name} of this run was deleted" for name in (JOB, VOLUME_JOB)
    ]


@pytest.mark.parametrize("refusal", [None, NOT_SERVED, Refused(403, FORBIDDEN)])
def test_the_end_of_a_run_without_a_job_is_quiet(
    api: Api, refusal: Refused | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if refusal:
        api.refusals["DELETE", TRAIN_JOBS] = refusal
    nodes.end(RUN)
    assert any(method == "DELETE" for method, _ in api.requests)
    assert capsys.readouterr().out == ""


def test_the_end_of_a_run_never_fails(
    api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    api.refusals["DELETE", TRAIN_JOBS] = Refused(422, "odd")
    nodes.end(RUN)
    assert capsys.readouterr().out == "the TrainJobs of this run could not be deleted: 422 odd\n"

    def missing() -> Any:
        raise AdfmError("Service token file does not exist.")

    monkeypatch.setattr(cluster, "api", missing)
    nodes.end(RUN)
    assert "could not be deleted: a TrainJob needs a cluster" in capsys.readouterr().out
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    nodes.end(RUN)
    assert capsys.readouterr().out == ""


def test_a_pod_that_no_workflow_owns_makes_a_job_without_an_owner(api: Api, tmp_path: Path) -> None:
    del api.pods["own"]["metadata"]["ownerReferences"]
    on_nodes(tmp_path)
    assert "ownerReferences" not in api.created[0]["metadata"]


def test_without_a_volume_or_a_cluster_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AdfmError, match="mount the volume adfm-workspace"):
        on_nodes(tmp_path)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    (tmp_path / "workspace").mkdir()
    message = "needs a cluster; leave out --num-nodes here: .* Service host/port"
    with pytest.raises(AdfmError, match=message):
        on_nodes(tmp_path)
    with pytest.raises(AdfmError, match=message):
        check()


def test_a_batch_that_does_not_divide_starts_nothing(api: Api, tmp_path: Path) -> None:
    with pytest.raises(AdfmError, match="in each of 10 processes does not divide the 48"):
        on_nodes(tmp_path, gpus=5)
    with pytest.raises(AdfmError, match="in each of 10 processes does not divide the 48"):
        nodes.check(Params().train, run=RUN, nodes=2, gpus=5, gpu_type=GPU)
    assert api.requests == []
