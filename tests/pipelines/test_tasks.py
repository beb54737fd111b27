"""An entry of the table of resources in the compiled task."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import dsl

from adfm.kubeflow.resources import RESOURCES, Resources, image
from pipelines.ir import write
from pipelines.tasks import Gpus, configure

ENTRY = Resources("3", "5Gi", 2.5, tries=4, cached=True, gpu=True, signs=True, workspace=True)


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A component with an entry in the table, in an image of its own registry."""
    monkeypatch.setitem(RESOURCES, "new-task", ENTRY)
    monkeypatch.setenv("ADFM_GPU_IMAGE", "registry.example.com/adfm:gpu")

    @dsl.component(base_image=image("new-task"), install_kfp_package=False)
    def new_task():
        pass

    return new_task


def test_an_entry_is_all_that_a_new_task_needs(probe: Any, tmp_path: Path) -> None:
    @dsl.pipeline(name="line")
    def line(kind: str, number: int, node_selector: dict, tolerations: list):
        configure(probe(), Gpus(kind, number, node_selector, tolerations))

    write(line, tmp_path / "line.yaml")
    pipeline, platform = yaml.safe_load_all((tmp_path / "line.yaml").read_text())
    (executor,) = pipeline["deploymentSpec"]["executors"].values()
    (config,) = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()
    task = pipeline["root"]["dag"]["tasks"]["new-task"]
    assert executor["container"]["image"] == "registry.example.com/adfm:gpu"
    sizes = executor["container"]["resources"]
    assert (sizes["resourceCpuLimit"], sizes["resourceMemoryLimit"], "accelerator" in sizes) == ("3", "5Gi", True)
    assert (task["retryPolicy"]["maxRetryCount"], task["cachingOptions"]) == (4, {"enableCache": True})
    assert config["activeDeadlineSeconds"] == "9000"
    assert [volume["secretName"] for volume in config["secretAsVolume"]] == ["adfm-signing"]
    assert [volume["constant"] for volume in config["pvcMount"]] == ["adfm-workspace"]
    assert {"nodeSelector", "tolerations", "emptyDirMounts"} <= config.keys()


def test_a_task_that_uses_gpus_is_refused_without_those_of_the_run(probe: Any) -> None:
    with pytest.raises(ValueError, match="the task new-task uses GPUs: pass those that the run asks for"):

        @dsl.pipeline(name="line")
        def line():
            configure(probe())


def test_a_task_without_an_entry_is_refused() -> None:
    @dsl.component(base_image="localhost/adfm:cpu", install_kfp_package=False)
    def unknown():
        pass

    with pytest.raises(KeyError, match="unknown"):

        @dsl.pipeline(name="line")
        def line():
            configure(unknown())


def test_a_pipeline_used_as_a_task_has_no_resources_of_its_own(probe: Any) -> None:
    @dsl.pipeline(name="inner")
    def inner():
        probe()

    with pytest.raises(ValueError, match="inner is not a task of a single container"):

        @dsl.pipeline(name="line")
        def line():
            inner().set_cpu_limit("1")
