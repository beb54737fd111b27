"""The IR that is checked in, against KFP's own compiler and the messages of its API, at the version that is pinned."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

ROOT = Path(__file__).parents[2]
COMPILED = sorted((ROOT / "pipelines/compiled").iterdir())

pytestmark = pytest.mark.parametrize("file", COMPILED, ids=lambda file: file.stem)


def documents(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text()))


def test_it_is_of_the_version_that_is_pinned(file: Path) -> None:
    pinned = re.search(r"^kfp==(.+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert pinned is not None and pinned[1] == version("kfp") == version("kfp-kubernetes")
    assert documents(file)[0]["sdkVersion"] == f"kfp-{pinned[1]}"


def test_the_api_knows_every_field(file: Path) -> None:
    """What `ParseDict` does not know it refuses, as the backend does; and nothing gets lost on the way."""
    pipeline, platform = documents(file)
    parsed = json_format.ParseDict(pipeline, pipeline_spec_pb2.PipelineSpec())
    assert json_format.MessageToDict(parsed) == pipeline
    json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec())
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert set(executors) <= set(pipeline["deploymentSpec"]["executors"])
    for config in executors.values():
        json_format.ParseDict(config, kubernetes_executor_config_pb2.KubernetesExecutorConfig())


def test_an_unknown_field_would_be_seen(file: Path) -> None:
    pipeline, platform = documents(file)
    with pytest.raises(json_format.ParseError, match="priorityClass"):
        json_format.ParseDict(pipeline | {"priorityClass": "high"}, pipeline_spec_pb2.PipelineSpec())
    config = next(iter(platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()))
    with pytest.raises(json_format.ParseError, match="priorityClass"):
        json_format.ParseDict(
            config | {"priorityClass": "high"}, kubernetes_executor_config_pb2.KubernetesExecutorConfig()
        )


def test_kfp_compiles_the_same(file: Path, tmp_path: Path) -> None:
    """By KFP's command `kfp dsl compile`, of the function that is named like the file."""
    function = file.stem.replace("-", "_")
    (source,) = [
        each
        for each in (ROOT / "pipelines").glob("*.py")
        if re.search(rf"^def {function}\(", each.read_text(), re.MULTILINE)
    ]
    out = tmp_path / "pipeline.yaml"
    kfp = [sys.executable, "-c", "from kfp.cli.__main__ import main; main()"]  # as the program `kfp`
    command = [*kfp, "dsl", "compile", "--py", str(source), "--function", function, "--output", str(out)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ADFM_")}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert out.read_text() == file.read_text()
