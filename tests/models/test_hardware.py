"""Requirements of settings, checked before the first step. This machine has no GPU."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from adfm.errors import AdfmError
from adfm.models import hardware, loading, model_folder, requirements
from adfm.params import Params, Train, load

GIB = 2**30

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")


@pytest.fixture(scope="module")
def network() -> Any:
    return hardware.meta_model(loading.EMBEDDED["embedded://tiny-base"])


def test_the_embedded_model_is_measured_in_a_process_that_has_loaded_no_model() -> None:
    """As the check of memory at the start of `adfm train`: transformers then does not know the embedded classes yet."""
    measure = "from adfm.models import hardware, loading; hardware.meta_model(loading.resolve(*{name!r}))"
    subprocess.run([sys.executable, "-c", measure.format(name=("embedded://tiny-base", None))], check=True)


@without_gpu
def test_the_default_run_asks_for_nothing_that_is_not_here() -> None:
    hardware.require(Params())


@without_gpu
@pytest.mark.parametrize(
    "setting",
    [
        "model.attention=flash_attention_2",
        "model.quantization=nf4",
        "train.optimizer=adamw_8bit",
        "train.optimizer=paged_adamw_8bit",
        "train.liger=true",
        "train.vllm=0.3",
        "train.vllm_server=http://gpu0:8000",
    ],
)
def test_what_needs_a_gpu_says_so(setting: str) -> None:
    with pytest.raises(AdfmError, match=f"{setting} needs a GPU"):
        hardware.require(load(None, ["model.dtype=bfloat16", setting]))


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert requirements.missing_package("train.x=1", "no-such-package") == [
        f"train.x=1 needs the package no-such-package, which is not installed; {requirements.GPU_SETUP}"
    ]
    assert requirements.missing_package("train.x=1", "numpy") == []


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What PyTorch and transformers say where flash-attn is installed and an A100 is there; none of it is run."""
    from transformers.utils import import_utils

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(requirements, "missing_package", lambda setting, package: [])
    monkeypatch.setattr(import_utils, "is_flash_attn_2_available", lambda: True)
    return monkeypatch


def test_flash_attention_is_taken_where_it_runs_and_only_there(gpu: Any) -> None:
    from transformers.utils import import_utils

    auto = Params().model.model_copy(update={"dtype": "bfloat16"})
    assert auto.attention == "auto"
    assert requirements.attention(auto) == "flash_attention_2"
    assert requirements.attention(auto.model_copy(update={"dtype": "float32"})) == "sdpa"
    assert requirements.attention(auto.model_copy(update={"attention": "eager"})) == "eager"
    gpu.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert requirements.attention(auto) == "sdpa"
    asked = auto.model_copy(update={"attention": "flash_attention_2"})
    (problem,) = requirements.missing_flash_attention(asked)
    assert "needs an NVIDIA A100 or newer, and here is a GPU; set sdpa" in problem
    gpu.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    gpu.setattr(import_utils, "is_flash_attn_2_available", lambda: False)
    assert requirements.attention(auto) == "sdpa"
    (problem,) = requirements.missing_flash_attention(asked)
    assert "needs flash-attn 2.3.3 or newer" in problem


@without_gpu
def test_without_a_gpu_auto_is_sdpa_and_no_kernels() -> None:
    from adfm.models import liger

    assert requirements.attention(Params().model.model_copy(update={"dtype": "bfloat16"})) == "sdpa"
    assert not liger.enabled(Params().train, "qwen3_vl")
    assert liger.enabled(Train(liger=True), "qwen3_vl") and not liger.enabled(Train(liger=False), "qwen3_vl")
    assert liger.problems("qwen3_vl") == [
        "train.liger=true needs a GPU, and this machine has none; leave it at its default"
    ]


def test_bfloat16_on_a_gpu_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old GPU")
    (problem,) = requirements.missing(Params().model.model_copy(update={"dtype": "bfloat16"}))
    assert problem.startswith("model.dtype=bfloat16: an old GPU does not compute in it")


@pytest.mark.parametrize(("processes", "micro_batch", "share"), [(1, None, (48, 48)), (3, 4, (16, 4)), (16, 3, (3, 3))])
def test_a_step_is_divided(processes: int, micro_batch: int | None, share: tuple[int, int]) -> None:
    assert hardware.batch_split(Train(micro_batch=micro_batch), processes) == share


@pytest.mark.parametrize(("processes", "micro_batch"), [(5, None), (2, 5), (4, 24)])
def test_a_step_that_does_not_divide_is_refused_for_any_number_of_processes(
    processes: int, micro_batch: int | None
) -> None:
    with pytest.raises(AdfmError, match="does not divide the 48 completions of a step"):
        hardware.require(Params(train=Train(micro_batch=micro_batch)), processes)


def test_memory_shrinks_with_the_settings_that_save_it(network: Any) -> None:
    def parts(*overrides: str) -> dict[str, int]:
        return hardware.memory(network, load(None, list(overrides)))

    default = parts()
    assert default["weights"] == 4 * sum(weight.numel() for weight in network.parameters())
    for overrides, part in (
        (["model.dtype=bfloat16"], "weights"),
        (["model.quantization=nf4"], "weights"),
        (["lora.vision=false"], "gradients"),
        (["train.beta=0.0"], "adapter"),
        (["train.optimizer=adamw_8bit"], "optimizer"),
        (["train.gradient_checkpointing=true"], "training"),
        (["train.micro_batch=12"], "training"),
        (["train.prompts_per_step=6"], "generation"),
        (["train.vllm_server=http://gpu0:8000"], "generation"),
    ):
        assert parts(*overrides)[part] < default[part], overrides


def test_more_than_fits_says_what_to_lower_and_to_what() -> None:
    params = load(None, ["train.micro_batch=48"])
    needed = hardware.memory(hardware.meta_model(loading.EMBEDDED["embedded://tiny-base"]), params)
    assert hardware.memory_problems(params, 1, hardware.total(needed)) == []
    (problem,) = hardware.memory_problems(params, 1, hardware.total(needed) - needed["training"] // 2)
    assert "train.micro_batch=48 needs about" in problem
    assert "Set train.gradient_checkpointing=true, or set train.micro_batch=" in problem
    (problem,) = hardware.memory_problems(params, 1, 1)
    assert "take a larger GPU" in problem
    assert "this is certain: the weights alone are" in problem


def test_an_estimate_of_memory_warns_and_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small:
        total_memory = 24 * 2**20

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Small)
    hardware.require(Params())
    (warning,) = hardware.memory_warnings(Params())
    assert "not measured on any GPU, so it is not certain and nothing is refused" in warning
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # a GPU then holds a part of the model only
    assert hardware.memory_warnings(Params()) == []


# ------------------------------------------------------------------------------------------------- vLLM


def test_vllm_needs_weights_the_cache_of_a_request_and_a_run(network: Any) -> None:
    short, long = (hardware.vllm_memory(network, "bfloat16", length, 48, 16) for length in (500, 1000))
    assert short["weights"] == 2 * sum(weight.numel() for weight in network.parameters())
    text = network.config.text_config
    assert short["cache"] == 500 * 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    assert long["cache"] == 2 * short["cache"]
    assert hardware.vllm_memory(network, "float32", 500, 48, 16)["activations"] > short["activations"]


def test_a_share_that_cannot_hold_vllm_is_refused_with_one_that_can(network: Any) -> None:
    def problems(share: float, available: int) -> list[str]:
        return hardware.vllm_problems(load(None, [f"train.vllm={share}"]), 1, available)

    available = 8 * GIB
    assert problems(0.3, available) == []
    (problem,) = problems(0.001, available)
    assert "train.vllm=0.001 is 0.0 GiB of the GPU's 8, and vLLM needs" in problem
    named = float(problem.split("set train.vllm=")[1])
    assert problems(named, available) == []
    (problem,) = problems(0.9999, available)
    assert "leaves 0.0 GiB" in problem
    assert problems(float(problem.split("set train.vllm=")[1]), available) == []
    (problem,) = problems(0.5, GIB // 32)
    assert "take a larger GPU" in problem


def test_more_tokens_than_the_model_takes_are_refused() -> None:
    (problem,) = hardware.vllm_problems(load(None, ["train.vllm=0.5", "train.max_completion_length=9999999"]), 1, GIB)
    assert "the model takes" in problem


def test_nonsense_about_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: True)
    (problem,) = hardware.missing_requirements(load(None, ["train.vllm=0.3"]))
    assert problem.endswith("adfm does not support vLLM for embedded://tiny-base; set it to null")
    monkeypatch.setattr(model_folder, "family_of", lambda _: "qwen3_vl")
    both = ["train.vllm=0.3", "train.vllm_server=http://gpu0:8000"]
    (problem,) = hardware.missing_requirements(load(None, both))
    assert "set one of them to null" in problem
    (problem,) = hardware.missing_requirements(load(None, ["train.vllm=0.3", "model.quantization=nf4"]))
    assert "cannot take the weights of model.quantization" in problem
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(model_folder, "family_of", lambda _: "qwen3_vl")
    monkeypatch.setattr(hardware.vllm_engine.importlib.metadata, "version", lambda name: "0.33.0")
    (problem,) = hardware.missing_requirements(load(None, ["train.vllm=0.3"]))
    assert "vllm==0.30.0" in problem
    (problem,) = hardware.missing_requirements(Params())
    assert "vllm==0.30.0, or set evaluate.backend=transformers" in problem
    assert hardware.missing_requirements(load(None, ["evaluate.backend=transformers"])) == []


def test_a_server_that_is_not_there_is_refused_with_the_command_that_starts_it() -> None:
    (problem,) = hardware.server_problems(load(None, ["train.vllm_server=http://127.0.0.1:9"]))
    assert "does not reply" in problem and "vllm serve" in problem and "--max-model-len" in problem
