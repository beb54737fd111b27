"""The compiled pipelines: equal to the code byte for byte, with the resources of the table in each task."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from adfm.kubeflow.resources import RESOURCES, SECRETS
from pipelines import promotion, training
from pipelines.ir import write

ROOT = Path(__file__).parents[2]
COMPILED = ROOT / "pipelines" / "compiled"

EVERY = {"check", "fetch", "evaluate", "register", "notify"}
PIPELINES = {
    "training": EVERY | {"convert", "train"},
    "training-in-parts": EVERY | {"inspect-part", "convert-parts", "train"},
    "training-on-nodes": EVERY | {"convert", "sft", "train-on-nodes"},
    "training-in-parts-on-nodes": EVERY | {"inspect-part", "convert-parts", "sft", "train-on-nodes"},
    "promotion": {"promote", "notify"},
}
TRAININGS = [name for name in PIPELINES if name != "promotion"]


@cache
def ir(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pipeline, and its settings for Kubernetes."""
    pipeline, platform = yaml.safe_load_all((COMPILED / f"{name}.yaml").read_text())
    return pipeline, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def dags(pipeline: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The tasks of every DAG, by the DAG's component."""
    components = {"root": pipeline["root"], **pipeline["components"]}
    return {name: component["dag"]["tasks"] for name, component in components.items() if "dag" in component}


def tasks(pipeline: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every task that has an executor, by name, however deep it lies."""
    components = pipeline["components"]
    return {
        name: task | {"executor": component["executorLabel"]}
        for dag in dags(pipeline).values()
        for name, task in dag.items()
        if "executorLabel" in (component := components[task["componentRef"]["name"]])
    }


def pods(pipeline: dict[str, Any], parts: int) -> int:
    """Pods of a run without a cache, as KFP's compiler makes them (backend/src/v2/compiler/argocompiler/dag.go).

    The root has a driver, and so has every DAG in it, every loop and every iteration of a loop; a task has a driver and
    an executor. So counted, the pipeline of 11 executors that a real Kubeflow Pipelines 2.17 ran had 28, as it did.
    """
    components = pipeline["components"]

    def of(component: dict[str, Any]) -> int:
        if "executorLabel" in component:
            return 2
        number = 1
        for task in component["dag"]["tasks"].values():
            inner = of(components[task["componentRef"]["name"]])
            number += 1 + parts * inner if "parameterIterator" in task else inner
        return number

    return of(pipeline["root"])


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


@pytest.mark.parametrize("name", PIPELINES)
def test_the_compiled_files_are_what_the_code_compiles_to(name: str, tmp_path: Path) -> None:
    pipeline = (training.PIPELINES | promotion.PIPELINES)[name]
    for attempt in ("first.yaml", "second.yaml"):
        write(pipeline, tmp_path / attempt)
        written = (tmp_path / attempt).read_text()
        assert written == (COMPILED / f"{name}.yaml").read_text(), "run `make compile` and commit what it writes"


def test_every_compiled_pipeline_is_of_the_code() -> None:
    assert {file.stem for file in COMPILED.glob("*.yaml")} == set(PIPELINES)
    assert set(training.PIPELINES | promotion.PIPELINES) == set(PIPELINES)


@pytest.mark.parametrize(
    ("name", "task"), [(name, task) for name, members in PIPELINES.items() for task in sorted(members)]
)
def test_each_task_has_the_resources_of_its_entry(name: str, task: str) -> None:
    pipeline, kubernetes = ir(name)
    members = tasks(pipeline)
    assert set(members) == PIPELINES[name]
    label = members[task]["executor"]
    container = pipeline["deploymentSpec"]["executors"][label]["container"]
    entry = RESOURCES[task]

    assert container["image"] == f"localhost/adfm:{'gpu' if entry.gpu else 'cpu'}"
    resources = container["resources"]
    for kind, size in (("cpu", entry.cpu), ("memory", entry.memory)):
        assert resources[f"resource{kind.capitalize()}Limit"] == size
        assert resources[f"resource{kind.capitalize()}Request"] == size
    assert ("accelerator" in resources) == entry.gpu
    if entry.gpu:
        assert resources["accelerator"] == {
            "resourceType": "{{$.inputs.parameters['pipelinechannel--gpu_type']}}",
            "resourceCount": "{{$.inputs.parameters['pipelinechannel--num_gpus']}}",
        }
    assert members[task].get("retryPolicy", {}).get("maxRetryCount", 0) == entry.tries
    assert members[task]["cachingOptions"].get("enableCache", False) == entry.cached

    config = kubernetes[label]
    assert int(config["activeDeadlineSeconds"]) == entry.hours * 3600
    assert config["securityContext"] == {"runAsNonRoot": True, "runAsUser": "1000", "runAsGroup": "1000"}
    assert [secret["secretName"] for secret in config["imagePullSecret"]] == ["adfm-registry"]
    secrets = {each["secretName"]: {key["envVar"] for key in each["keyToEnv"]} for each in config["secretAsEnv"]}
    assert secrets == {secret: set(keys.values()) for secret, keys in SECRETS.items()}
    assert all(each["optional"] for each in config["secretAsEnv"])
    # Every task can verify and trusts the private CA; those alone that sign have a private key.
    assert {each["configMapName"]: (each["mountPath"], each["optional"]) for each in config["configMapAsVolume"]} == {
        "adfm-submitters": ("/etc/adfm/keys/submitters", True),
        "adfm-service": ("/etc/adfm/keys/service", True),
        "adfm-ca": ("/etc/adfm/ca", True),
    }
    private = [(each["secretName"], each["mountPath"]) for each in config.get("secretAsVolume", [])]
    assert private == ([("adfm-signing", "/etc/adfm/keys")] if entry.signs else [])
    assert ("nodeSelector" in config, "tolerations" in config, "emptyDirMounts" in config) == (entry.gpu,) * 3
    claims = [mount["constant"] for mount in config.get("pvcMount", [])]
    assert claims == (["adfm-workspace"] if entry.workspace else [])
    if entry.gpu:
        shared = {"volumeName": "shared-memory", "mountPath": "/dev/shm", "medium": "Memory", "sizeLimit": "8Gi"}
        assert config["emptyDirMounts"] == [shared]


@pytest.mark.parametrize("name", PIPELINES)
def test_argo_retries_a_task_until_each_try_has_had_its_time(name: str) -> None:
    pipeline, kubernetes = ir(name)
    for task, spec in tasks(pipeline).items():
        policy = spec.get("retryPolicy")
        if policy is None:  # Argo's own, 3600 s, is only for those that have a policy
            continue
        tries, limit = policy["maxRetryCount"], int(kubernetes[spec["executor"]]["activeDeadlineSeconds"])
        pauses = [seconds(policy["backoffDuration"]) * policy["backoffFactor"] ** number for number in range(tries)]
        assert tries > 0, task
        assert pauses[0] == 30 and policy["backoffFactor"] == 2, task
        # A try may also wait for a node: a day for each is what it is given.
        assert seconds(policy["backoffMaxDuration"]) >= (tries + 1) * (limit + 86400) + sum(pauses), task


@pytest.mark.parametrize("name", PIPELINES)
def test_only_tasks_are_retried_and_no_pipeline_around_them(name: str) -> None:
    pipeline, _ = ir(name)
    components = pipeline["components"]
    for dag in dags(pipeline).values():
        for task, spec in dag.items():
            assert "retryPolicy" not in spec or "executorLabel" in components[spec["componentRef"]["name"]], task


def test_the_task_that_follows_a_trainjob_outlives_its_machines() -> None:
    assert RESOURCES["train-on-nodes"].hours > RESOURCES["train"].hours


def test_only_registration_and_promotion_have_a_private_key() -> None:
    assert {task for task, entry in RESOURCES.items() if entry.signs} == {"register", "promote"}


def test_every_entry_of_the_table_is_a_task_of_a_pipeline() -> None:
    assert RESOURCES.keys() == set().union(*PIPELINES.values())


def test_the_default_run_is_16_pods_without_a_loop_or_a_nested_pipeline() -> None:
    pipeline, _ = ir("training")
    assert set(dags(pipeline)) == {"root", "comp-exit-handler-1"}
    assert not any("parameterIterator" in task for dag in dags(pipeline).values() for task in dag.values())
    assert pods(pipeline, parts=1) == 2 + 2 * len(tasks(pipeline)) == 16


def test_the_variants_cost_what_their_parts_and_machines_add() -> None:
    counts = {name: [pods(ir(name)[0], parts) for parts in (1, 2, 8)] for name in TRAININGS}
    assert counts == {
        "training": [16, 16, 16],
        "training-in-parts": [21, 24, 42],  # one for the nested pipeline, one for the loop, three for each part
        "training-on-nodes": [18, 18, 18],
        "training-in-parts-on-nodes": [23, 26, 44],
    }


@pytest.mark.parametrize("name", TRAININGS)
def test_the_variants_are_of_one_pipeline_and_share_what_the_cache_holds(name: str) -> None:
    pipeline, kubernetes = ir(name)
    assert pipeline["pipelineInfo"]["name"] == "adfm-training"

    def key(task: str, pipeline: dict[str, Any], kubernetes: dict[str, Any]) -> Any:
        """What KFP makes a task's key of: `getFingerPrint` in backend/src/v2/driver/cache.go, `GenerateCacheKey`."""
        spec = tasks(pipeline)[task]
        container = pipeline["deploymentSpec"]["executors"][spec["executor"]]["container"]
        component = pipeline["components"][spec["componentRef"]["name"]]
        run = {name: container.get(name) for name in ("image", "command", "args", "env")}
        claims = kubernetes[spec["executor"]].get("pvcMount", [])
        return component.get("inputDefinitions"), component["outputDefinitions"], spec["inputs"], run, claims

    whole, in_parts = ir("training"), ir("training-in-parts")
    assert key("fetch", pipeline, kubernetes) == key("fetch", *whole)
    for task in PIPELINES[name] & {"convert", "inspect-part", "convert-parts"}:
        assert key(task, pipeline, kubernetes) == key(task, *(whole if task == "convert" else in_parts))


@pytest.mark.parametrize("name", PIPELINES)
def test_no_two_artifacts_of_a_run_have_one_name(name: str) -> None:
    pipeline, _ = ir(name)
    names = [
        output
        for task in tasks(pipeline).values()
        for output in pipeline["components"][task["componentRef"]["name"]]["outputDefinitions"].get("artifacts", {})
    ]
    assert len(names) == len(set(names))
    every = {  # nested pipelines hand on what their tasks make
        output
        for component in pipeline["components"].values()
        for output in component.get("outputDefinitions", {}).get("artifacts", {})
    }
    assert every - {"pipelinechannel--inspect-part-inspected"} == set(names)
    assert not {"page", "figures", "report", "Output"} & every


@pytest.mark.parametrize("name", TRAININGS)
def test_a_reader_of_the_run_has_two_reports_and_the_page_of_the_gate(name: str) -> None:
    pipeline, _ = ir(name)
    pages = {
        output: task
        for task, spec in tasks(pipeline).items()
        for output, artifact in pipeline["components"][spec["componentRef"]["name"]]["outputDefinitions"]
        .get("artifacts", {})
        .items()
        if artifact["artifactType"]["schemaTitle"] == "system.HTML"
    }
    (conversion,) = PIPELINES[name] & {"convert", "convert-parts"}
    assert pages == {"validation_report": conversion, "evaluation_report": "evaluate", "gate_page": "register"}


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
            parameters = task.get("inputs", {}).get("parameters", {}).values()
            inner = task.get("parameterIterator", {}).get("itemInput")
            assert {each.get("componentInputParameter") for each in parameters} <= defined | {None, inner}


@pytest.mark.parametrize("name", TRAININGS)
def test_no_task_with_a_gpu_starts_before_validation_has_passed(name: str) -> None:
    pipeline, _ = ir(name)
    dag = dags(pipeline)["comp-exit-handler-1"]

    def before(task: str) -> set[str]:
        direct = set(dag[task].get("dependentTasks", []))
        return direct.union(*map(before, direct))

    without = {"check", "fetch", "conversion" if "in-parts" in name else "convert"}  # the last one validates
    assert without < set(dag)
    inner = set(dags(pipeline).get("comp-conversion", {})) - {"for-loop-1"}
    assert not any(RESOURCES[task].gpu for task in (without | inner) - {"conversion"})
    for task in set(dag) - without:
        assert without <= before(task), task
