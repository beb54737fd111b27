"""A model whose weights are divided among processes: who reads it, and what vLLM is sent. Two processes on CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adfm.models import loading
from adfm.params import Params
from adfm.training import vllm_generation
from adfm.training.sft import sft
from tests.models import random_models


@pytest.mark.timeout(300)
def test_only_the_first_process_reads_a_model_and_vllm_is_sent_all_of_it(
    small_shards: Path, tmp_path: Path, params: Params
) -> None:
    base = random_models.write("qwen3_vl", tmp_path / "base")
    params = params.model_copy(update={"model": params.model.model_copy(update={"name": str(base)})})
    sft(small_shards, tmp_path / "sft", params)
    variables = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(Path(__file__).with_name("divided.py")), str(tmp_path / "sft"), str(tmp_path / "result")]
    subprocess.run(command, check=True, env=os.environ | variables | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path)
    first, second = (torch.load(tmp_path / f"result.{number}", weights_only=True) for number in (0, 1))
    assert (first["devices"], second["devices"]) == ({"cpu"}, {"meta"})
    assert 0.4 < first["share"] < 0.6 and first["share"] + second["share"] == pytest.approx(1)
    network = loading.load(tmp_path / "sft", params.model.model_copy(update={"dtype": "bfloat16"})).model
    expected = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): vllm_generation.merged(
            weight.data, vllm_generation.adapted_layer(network, name)
        )
        for name, weight in network.named_parameters()
        if "lora_" not in name
    }
    for sent in (first["sent"], second["sent"]):
        assert set(sent) == set(expected)
        assert all(torch.equal(sent[name], weight) for name, weight in expected.items())


def test_weights_are_divided_if_accelerates_launcher_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE"):
        monkeypatch.delenv(name, raising=False)
    assert not loading.weights_are_divided()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for stage, divided in (("2", False), ("3", True)):
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
        assert loading.weights_are_divided() is divided
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    assert not loading.weights_are_divided()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert loading.weights_are_divided()
