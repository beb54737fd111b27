"""The IR that is checked in: the code's own, byte for byte, and what each task is given in it."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import promotion, training
from pipelines.command import write

ROOT = Path(__file__).parents[2]
COMPILED = ROOT / "pipelines" / "compiled"
CPU, GPU = "localhost/adfm:cpu", "localhost/adfm:gpu"

# task: image, CPU, GiB, GPU, seconds, tries, cached
TABLE = {
    "check": (CPU, 1, 4, False, 1800, 2, False),
    "fetch": (CPU, 2, 4, False, 21600, 3, True),
    "inspect-part": (CPU, 4, 8, False, 21600, 1, True),
    "convert": (CPU, 4, 8, False, 21600, 1, True),
    "validate": (CPU, 2, 8, False, 7200, 0, True),
    "warmup": (GPU, 4, 16, True, 21600, 1, False),
    "train": (GPU, 8, 32, True, 259200, 1, False),
    "train-on-nodes": (CPU, 1, 4, False, 259200, 5, False),
    "evaluate": (GPU, 4, 16, True, 43200, 1, False),
    "register": (GPU, 4, 16, True, 43200, 2, False),
    "notify": (CPU, 1, 2, False, 1800, 0, False),
    "promote": (CPU, 1, 4, False, 1800, 2, False),
}
PIPELINES = {
    "training": set(TABLE) - {"promote", "train-on-nodes"},
    "training-on-nodes": set(TABLE) - {"promote", "train"},
    "promotion": {"promote", "notify"},
}
SECRETS = {
    "adfm-mlflow": {
        "ADFM_MLFLOW_TRACKING_URI",
        "ADFM_MLFLOW_TRACKING_USERNAME",
        "ADFM_MLFLOW_TRACKING_PASSWORD",
        "ADFM_MLFLOW_UI",
    },
    "adfm-s3": {"ADFM_S3_ACCESS_KEY_ID", "ADFM_S3_SECRET_ACCESS_KEY", "ADFM_S3_ENDPOINT_URL", "ADFM_S3_REGION"},
    "adfm-hub": {"HF_TOKEN"},
    "adfm-alerts": {"ADFM_ALERT_WEBHOOK"},
    "adfm-signing": {"ADFM_KEYS"},
}


@cache
def ir(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pipeline and what is said for Kubernetes."""
    pipeline, platform = yaml.safe_load_all((COMPILED / f"{name}.yaml").read_text())
    return pipeline, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def tasks(pipeline: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every task that has an executor, by name, however deep it lies."""
    found = {}
    components = pipeline["components"]
    for dag in [pipeline["root"], *components.values()]:
        for name, task in dag.get("dag", {}).get("tasks", {}).items():
            component = components[task["componentRef"]["name"]]
            if "executorLabel" in component:
                found[name] = task | {"executor": component["executorLabel"]}
    return found


@pytest.mark.parametrize("name", PIPELINES)
def test_what_is_checked_in_is_what_the_code_compiles_to(name: str, tmp_path: Path) -> None:
    (pipeline,) = [each for each in (*training.PIPELINES, *promotion.PIPELINES) if each.name == f"adfm-{name}"]
    for attempt in ("first.yaml", "second.yaml"):
        write(pipeline, tmp_path / attempt)
        written = (tmp_path / attempt).read_text()
        assert written == (COMPILED / f"{name}.yaml").read_text(), "run `make compile` and commit what it writes"


@pytest.mark.parametrize(
    ("name", "task"), [(name, task) for name, found in PIPELINES.items() for task in sorted(found)]
)
def test_each_task_is_given_what_the_table_says(name: str, task: str) -> None:
    pipeline, kubernetes = ir(name)
    found = tasks(pipeline)
    assert set(found) == PIPELINES[name]
    label = found[task]["executor"]
    container = pipeline["deploymentSpec"]["executors"][label]["container"]
    image, cpu, memory, gpu, seconds, tries, cached = TABLE[task]

    assert container["image"] == image
    resources = container["resources"]
    for kind, size in (("cpu", str(cpu)), ("memory", f"{memory}Gi")):
        assert resources[f"resource{kind.capitalize()}Limit"] == size
        assert resources[f"resource{kind.capitalize()}Request"] == size
    assert ("accelerator" in resources) == gpu
    if gpu:
        assert resources["accelerator"] == {
            "resourceType": "{{$.inputs.parameters['pipelinechannel--gpu_type']}}",
            "resourceCount": "{{$.inputs.parameters['pipelinechannel--num_gpus']}}",
        }
    policy = found[task].get("retryPolicy", {})
    assert policy.get("maxRetryCount", 0) == tries
    if tries:
        assert policy["backoffDuration"] == "30s"
        assert policy["backoffFactor"] == 2
        assert policy["backoffMaxDuration"] == "600s"
    assert found[task]["cachingOptions"].get("enableCache", False) == cached

    given = kubernetes[label]
    assert int(given["activeDeadlineSeconds"]) == seconds
    assert given["securityContext"] == {"runAsNonRoot": True, "runAsUser": "1000", "runAsGroup": "1000"}
    assert [secret["secretName"] for secret in given["imagePullSecret"]] == ["adfm-registry"]
    secrets = {each["secretName"]: {key["envVar"] for key in each["keyToEnv"]} for each in given["secretAsEnv"]}
    assert secrets == SECRETS
    assert all(each["optional"] for each in given["secretAsEnv"])
    # Every task can verify; those alone that sign have a private key.
    assert [each["configMapName"] for each in given["configMapAsVolume"]] == ["adfm-submitters", "adfm-service"]
    private = [(each["secretName"], each["mountPath"]) for each in given.get("secretAsVolume", [])]
    assert private == ([("adfm-signing", "/etc/adfm/keys")] if task in ("register", "promote") else [])
    assert ("nodeSelector" in given, "tolerations" in given, "emptyDirMounts" in given) == (gpu, gpu, gpu)
    claims = [mount["constant"] for mount in given.get("pvcMount", [])]
    assert claims == (["adfm-workspace"] if task == "train-on-nodes" else [])
    if gpu:
        shared = {"volumeName": "shared-memory", "mountPath": "/dev/shm", "medium": "Memory", "sizeLimit": "8Gi"}
        assert given["emptyDirMounts"] == [shared]


@pytest.mark.parametrize("name", PIPELINES)
def test_nothing_is_installed_when_a_task_starts(name: str) -> None:
    text = (COMPILED / f"{name}.yaml").read_text()
    assert "pip install" not in text
    assert "PIP_" not in text


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_has_fewer_than_15_parameters(name: str) -> None:
    pipeline, _ = ir(name)
    assert len(pipeline["root"]["inputDefinitions"]["parameters"]) < 15
    assert all(parameter["isOptional"] for parameter in pipeline["root"]["inputDefinitions"]["parameters"].values())


@pytest.mark.parametrize("name", PIPELINES)
def test_every_parameter_that_a_task_asks_for_is_one_of_its_pipeline(name: str) -> None:
    pipeline, _ = ir(name)
    for component in (pipeline["root"], *pipeline["components"].values()):
        defined = set(component.get("inputDefinitions", {}).get("parameters", {}))
        for task in component.get("dag", {}).get("tasks", {}).values():
            asked = task.get("inputs", {}).get("parameters", {}).values()
            inner = task.get("parameterIterator", {}).get("itemInput")
            assert {each.get("componentInputParameter") for each in asked} <= defined | {None, inner}


@pytest.mark.parametrize("name", ["training", "training-on-nodes"])
def test_no_task_with_a_gpu_starts_before_validation_has_passed(name: str) -> None:
    pipeline, _ = ir(name)
    dags = [component["dag"]["tasks"] for component in pipeline["components"].values() if "dag" in component]
    dag = next(each for each in dags if "warmup" in each)

    def before(task: str) -> set[str]:
        direct = set(dag[task].get("dependentTasks", []))
        return direct.union(*map(before, direct))

    without = {"check", "fetch", "conversion", "validate"}
    assert without < set(dag)
    assert not any(gpu for task, (*_, gpu, _, _, _) in TABLE.items() if task in without | {"inspect-part", "convert"})
    for task in set(dag) - without:
        assert without <= before(task), task


def test_the_table_in_the_readme_is_that_of_the_tasks() -> None:
    row = r"^\| `([a-z-]+)` \| (cpu|gpu) \| (\d+) \| (\d+) GiB \| (yes|no) \| (on|off) \|"
    shown = {
        task: (f"localhost/adfm:{target}", int(cpu), int(memory), gpu == "yes", cached == "on")
        for task, target, cpu, memory, gpu, cached in re.findall(row, (ROOT / "README.md").read_text(), re.MULTILINE)
    }
    assert shown == {task: (*needs[:4], needs[6]) for task, needs in TABLE.items()}
