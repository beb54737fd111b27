"""Training in several processes, and by a TrainJob."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from kubernetes.client.exceptions import ApiException

from adfm.errors import AdfmError
from adfm.params import Params, load
from adfm.stopping import Stopped
from adfm.tracking import settings
from adfm.training import checkpoints, grpo, launch
from adfm.training.warmup import warmup

GPU = "nvidia.com/gpu"


def on_nodes(folder: Path, **changed: Any) -> None:
    given: dict[str, Any] = {
        "run": "1f0c7a52-9d1e-4c6b",
        "workspace": folder / "workspace",
        "claim": "adfm-workspace",
        "image": "localhost/adfm:gpu",
        "nodes": 2,
        "gpus": 4,
        "gpu_type": GPU,
        "node_selector": {"pool": "gpu"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
    }
    launch.on_nodes(folder / "shards", folder / "warmup", folder / "out", Params(), **given | changed)


class Cluster:
    """Kubernetes as far as a TrainJob needs it: `create` runs the job, whose state then goes through `states`."""

    def __init__(self, folder: Path, states: list[str]) -> None:
        self.folder, self.states = folder, states
        self.job: dict[str, Any] | None = None
        self.created = self.deleted = 0
        self.log = ["step 1"]

    def list_namespaced_custom_object(self, *_: str, field_selector: str) -> dict[str, Any]:
        return {"items": [self.job] if self.job else []}

    def create_namespaced_custom_object(self, group: str, version: str, space: str, plural: str, body: Any) -> None:
        assert (group, version, space, plural) == ("trainer.kubeflow.org", "v1alpha1", "line", "trainjobs")
        self.job, self.created = json.loads(json.dumps(body)), self.created + 1
        trained = Path(body["spec"]["trainer"]["command"][6])
        trained.mkdir()
        (trained / "adfm.json").write_text("{}")

    def get_namespaced_custom_object(self, *_: str) -> dict[str, Any]:
        state = self.states.pop(0)
        self.log.append(f"state {state}")
        conditions = [{"type": state, "status": "True", "message": "out of memory"}] if state else []
        return {"status": {"conditions": conditions}}

    def delete_namespaced_custom_object(self, *_: str) -> None:
        self.job, self.deleted = None, self.deleted + 1

    def list_namespaced_pod(self, namespace: str, label_selector: str) -> Any:
        return type("Pods", (), {"items": []})()


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster(tmp_path, ["", "Suspended", "Complete"])
    for folder in ("workspace", "shards", "warmup"):
        (tmp_path / folder).mkdir()
    (tmp_path / "shards" / "train.parquet").write_text("data")
    monkeypatch.setattr(launch, "_cluster", lambda: (made, made, "line"))
    monkeypatch.setattr(launch, "_POLL", 0)
    return made


def test_a_train_job_runs_the_image_on_the_nodes_and_gives_its_adapter(cluster: Cluster, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    create = cluster.create_namespaced_custom_object
    cluster.create_namespaced_custom_object = lambda *given: (asked.append(given[-1]), create(*given))[1]  # type: ignore[method-assign]
    on_nodes(tmp_path)
    assert (tmp_path / "out" / "adfm.json").is_file()
    assert list((tmp_path / "workspace").iterdir()) == []
    assert (cluster.created, cluster.deleted) == (1, 1)
    (job,) = asked
    assert TrainerV1alpha1TrainJob.from_json(json.dumps(job)).to_dict() == job
    assert job["metadata"]["name"] == "adfm-1f0c7a52-9d1e-4c6b"
    trainer = job["spec"]["trainer"]
    work = tmp_path / "workspace" / "adfm-1f0c7a52-9d1e-4c6b"
    assert trainer["command"] == [
        *("torchrun", "-m", "adfm", "train", f"{work}/shards", f"{work}/warmup", f"{work}/trained"),
        *("--params", f"{work}/params.yaml", "--force"),  # whoever finds the model made must not fail for it
    ]
    assert (trainer["image"], trainer["numNodes"], trainer["numProcPerNode"]) == ("localhost/adfm:gpu", 2, 4)
    assert trainer["resourcesPerNode"]["limits"][GPU] == "4"
    (patch,) = job["spec"]["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"pool": "gpu"}
    assert pod["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "adfm-workspace"


def test_a_task_that_is_started_again_follows_the_job_that_is_under_way(cluster: Cluster, tmp_path: Path) -> None:
    work = tmp_path / "workspace" / "adfm-1f0c7a52-9d1e-4c6b"
    (work / "trained").mkdir(parents=True)
    cluster.job = {"metadata": {"name": work.name}}
    on_nodes(tmp_path)
    assert cluster.created == 0
    assert (tmp_path / "out").is_dir()


def test_a_job_that_failed_is_said_and_removed_for_the_next_try(cluster: Cluster, tmp_path: Path) -> None:
    cluster.states = ["Failed"]
    with pytest.raises(AdfmError, match="ended as Failed: out of memory"):
        on_nodes(tmp_path)
    assert cluster.deleted == 1
    assert not (tmp_path / "out").exists()


def test_a_cluster_without_trainer_or_rights_is_said(cluster: Cluster, tmp_path: Path) -> None:
    for status, said in ((404, "install Kubeflow Trainer"), (403, "deploy/runs/rbac.yaml")):

        def refuse(*_: Any, status: int = status, **__: Any) -> None:
            raise ApiException(status=status, reason="refused")

        cluster.list_namespaced_custom_object = refuse  # type: ignore[method-assign, assignment]
        with pytest.raises(AdfmError, match=said):
            on_nodes(tmp_path)


def test_without_a_volume_or_a_cluster_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AdfmError, match="mount the volume adfm-workspace"):
        on_nodes(tmp_path)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    (tmp_path / "workspace").mkdir()
    with pytest.raises(AdfmError, match="needs a cluster"):
        on_nodes(tmp_path)


def test_several_gpus_are_used_by_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    class Processes(contextlib.AbstractContextManager[Any]):
        def __init__(self, command: list[str]) -> None:
            asked.append(command)
            assert load(Path(command[-1])).seed == 3

        def __exit__(self, *_: object) -> None:
            pass

        def terminate(self) -> None:
            self.told = True

        def wait(self) -> int:
            if len(asked) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                assert self.told
            return 1

    monkeypatch.setattr(subprocess, "Popen", Processes)
    with pytest.raises(AdfmError, match="training in 2 processes failed with status 1"):
        launch.on_gpus(tmp_path / "s", tmp_path / "m", tmp_path / "o", Params(seed=3), 2)
    with pytest.raises(Stopped, match="goes on"):
        launch.on_gpus(tmp_path / "s", tmp_path / "m", tmp_path / "o", Params(seed=3), 2)
    command = asked[0]
    assert command[1:6] == ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    assert command[command.index("--num_processes") + 1] == "2"
    assert command[-7:-2] == ["adfm", "train", *(str(tmp_path / name) for name in "smo")]


def test_a_batch_that_does_not_divide_starts_nothing(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(AdfmError, match="in each of 5 processes does not divide the 48"):
        launch.on_gpus(tmp_path / "s", tmp_path / "m", tmp_path / "o", Params(), 5)
    with pytest.raises(AdfmError, match="in each of 10 processes does not divide the 48"):
        on_nodes(tmp_path, gpus=5)
    assert cluster.created == 0


# `accelerate launch --cpu --num_processes 2` starts one process.
IN_TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]


@pytest.mark.timeout(600)
def test_two_processes_that_are_told_to_stop_stop_together_with_a_checkpoint(
    small_shards: Path, tmp_path: Path
) -> None:
    small = {"steps": 500, "prompts_per_step": 2, "num_generations": 2, "max_completion_length": 16}
    params = Params.model_validate({"warmup": {"steps": 0}, "train": small | {"checkpoint_every": 1}})
    warmup(small_shards, tmp_path / "warmup", params)
    (tmp_path / "params.yaml").write_text(settings(params))
    command = launch.command(small_shards, tmp_path / "warmup", tmp_path / "trained", tmp_path / "params.yaml")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = subprocess.Popen([*IN_TWO, *command], env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "trained.checkpoint" / "checkpoint-1").is_dir():
        assert processes.poll() is None
        time.sleep(0.05)
    processes.terminate()
    said = processes.communicate()[1]
    assert processes.returncode and "adfm: stopped with the first process" in said, said
    newest = checkpoints.last(tmp_path / "trained.checkpoint")
    assert newest and (newest / "rng_state_1.pth").is_file()
    assert f"the same command goes on from {newest}" in said

    from adfm import tracking

    (run,) = tracking.client().search_runs([tracking.experiment("adfm")], "tags.stage = 'train'")
    assert run.info.status == "KILLED"


@pytest.mark.timeout(600)
def test_two_processes_go_on_from_a_checkpoint_of_one_and_do_what_one_would(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So cold that a completion does not depend on chance, and all rewards can be compared.
    small = {"steps": 3, "prompts_per_step": 2, "num_generations": 2, "max_completion_length": 16, "temperature": 1e-3}
    often = {"checkpoint_every": 1, "pictures_every": 1, "beta": 0.0}
    params = Params.model_validate({"warmup": {"steps": 0}, "train": small | often})
    warmup(small_shards, tmp_path / "warmup", params)
    grpo.train(small_shards, tmp_path / "warmup", tmp_path / "alone", params)
    stop_at_step(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        grpo.train(small_shards, tmp_path / "warmup", tmp_path / "trained", params)
    assert (tmp_path / "trained.checkpoint" / "checkpoint-1").is_dir()

    (tmp_path / "params.yaml").write_text(settings(params))
    command = launch.command(small_shards, tmp_path / "warmup", tmp_path / "trained", tmp_path / "params.yaml")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*IN_TWO, *command], check=True, env=environment, cwd=tmp_path)

    description = json.loads((tmp_path / "trained" / "adfm.json").read_text())
    assert yaml.safe_load(settings(Params.model_validate(description["params"]))) == yaml.safe_load(settings(params))
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob("*.checkpoint"))
    for figure in ("step", *(f"rewards/{term}/mean" for term in grpo.TERMS), "completions/mean_length"):
        alone, together = (curve(tmp_path / name / "reward_curves.csv", figure) for name in ("alone", "trained"))
        assert len(alone) == 3 and together == pytest.approx(alone, abs=1e-6), figure

    from adfm import tracking

    runs = tracking.client().search_runs([tracking.experiment("adfm")], "tags.stage = 'train'")
    assert [run.info.status for run in runs] == ["FINISHED"] * 2  # of the training alone, and of this one
    assert description["mlflow_run_id"] in {run.info.run_id for run in runs}


def stop_at_step(step: int, patch: pytest.MonkeyPatch) -> None:
    """Interrupts the next training at this step, once its checkpoint before it is written."""
    from adfm.training.watch import Watch

    original = Watch.on_log

    def on_log(self: Watch, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt
        original(self, args, state, control, **given)

    patch.setattr(Watch, "on_log", on_log)


def curve(file: Path, figure: str) -> list[float]:
    with file.open(newline="") as stream:
        return [float(row[figure]) for row in csv.DictReader(stream)]
