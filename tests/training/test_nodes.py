"""Training on several machines, by a TrainJob."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from kubernetes.client.exceptions import ApiException

from adfm.errors import AdfmError
from adfm.params import Params
from adfm.training import nodes

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
    nodes.on_nodes(folder / "shards", folder / "warmup", folder / "out", Params(), **given | changed)


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
    monkeypatch.setattr(nodes, "_cluster", lambda: (made, made, "line"))
    monkeypatch.setattr(nodes, "_POLL", 0)
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


def test_a_batch_that_does_not_divide_starts_nothing(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(AdfmError, match="in each of 10 processes does not divide the 48"):
        on_nodes(tmp_path, gpus=5)
    assert cluster.created == 0
