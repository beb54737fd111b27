"""What settings ask of a machine: said before the first step. This one has no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adfm.errors import AdfmError
from adfm.models import hardware, loading
from adfm.params import Params, Train, load

SETTINGS = sorted((Path(__file__).parents[2] / "params").glob("*.yaml"))
GIB = 2**30

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")


@pytest.fixture(scope="module")
def network() -> Any:
    return hardware.empty(loading.EMBEDDED["embedded://tiny-base"])


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
    ],
)
def test_what_needs_a_gpu_says_so(setting: str) -> None:
    with pytest.raises(AdfmError, match=f"{setting} needs a GPU"):
        hardware.require(load(None, ["model.dtype=bfloat16", setting]))


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loading.lacking_package("train.x=1", "no-such-package") == [
        "train.x=1 needs a package that is not installed; pip install no-such-package"
    ]
    assert loading.lacking_package("train.x=1", "numpy") == []


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What PyTorch and transformers say where flash-attn is installed and an A100 is there; none of it is run."""
    from transformers.utils import import_utils

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(loading, "lacking_package", lambda setting, package: [])
    monkeypatch.setattr(import_utils, "is_flash_attn_2_available", lambda: True)
    return monkeypatch


def test_flash_attention_is_taken_where_it_runs_and_only_there(gpu: Any) -> None:
    from transformers.utils import import_utils

    auto = Params().model.model_copy(update={"dtype": "bfloat16"})
    assert auto.attention == "auto"
    assert [loading.attention(auto, family) for family in loading.FAMILIES] == ["flash_attention_2"] * 2
    assert loading.attention(auto, "gemma3") == "sdpa"
    assert loading.attention(auto.model_copy(update={"dtype": "float32"}), "qwen3_vl") == "sdpa"
    assert loading.attention(auto.model_copy(update={"attention": "eager"}), "qwen3_vl") == "eager"
    gpu.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert loading.attention(auto, "qwen3_vl") == "sdpa"
    asked = auto.model_copy(update={"attention": "flash_attention_2"})
    (problem,) = loading.lacking_flash(asked)
    assert "needs an NVIDIA A100 or newer, and here is a GPU; set sdpa" in problem
    gpu.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    gpu.setattr(import_utils, "is_flash_attn_2_available", lambda: False)
    assert loading.attention(auto, "qwen3_vl") == "sdpa"
    (problem,) = loading.lacking_flash(asked)
    assert "needs flash-attn 2.3.3 or newer" in problem


@without_gpu
def test_without_a_gpu_auto_is_sdpa_and_no_kernels() -> None:
    from adfm.models import liger

    assert loading.attention(Params().model.model_copy(update={"dtype": "bfloat16"}), "qwen3_vl") == "sdpa"
    assert not liger.wanted(Params().train, "qwen3_vl")
    assert liger.wanted(Train(liger=True), "qwen3_vl") and not liger.wanted(Train(liger=False), "qwen3_vl")
    assert liger.problems("qwen3_vl") == ["train.liger=true needs a GPU, and there is none; leave it at its default"]


def test_bfloat16_on_a_gpu_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old GPU")
    (problem,) = loading.lacking(Params().model.model_copy(update={"dtype": "bfloat16"}))
    assert problem.startswith("model.dtype=bfloat16: an old GPU does not compute in it")


@pytest.mark.parametrize(("processes", "micro_batch", "share"), [(1, None, (48, 48)), (3, 4, (16, 4)), (16, 3, (3, 3))])
def test_a_step_is_divided(processes: int, micro_batch: int | None, share: tuple[int, int]) -> None:
    assert hardware.shares(Train(micro_batch=micro_batch), processes) == share


@pytest.mark.parametrize(("processes", "micro_batch"), [(5, None), (2, 5), (4, 24)])
def test_a_step_that_does_not_divide_is_refused_for_any_number_of_processes(
    processes: int, micro_batch: int | None
) -> None:
    with pytest.raises(AdfmError, match="does not divide the 48 completions of a step"):
        hardware.require(Params(train=Train(micro_batch=micro_batch)), processes)


@pytest.mark.parametrize("file", SETTINGS, ids=lambda file: file.stem)
def test_settings_of_real_models_hold_what_was_published_and_their_tuned_ones_are_settings(file: Path) -> None:
    params = load(file)
    assert (params.lora.r, params.lora.alpha, params.lora.target_modules) == (64, 128, "all-linear")
    train = params.train
    assert (train.num_generations, train.temperature, train.max_completion_length) == (6, 0.9, 512)
    assert (train.learning_rate, params.model.max_pixels, train.profile) == (1e-5, 262144, "paper")
    assert train.prompts_per_step * train.num_generations == 300
    assert params.model.revision is not None and len(params.model.revision) == 40
    tuned = [line.removeprefix("#   ") for line in file.read_text().splitlines() if line.startswith("#   ")]
    for settings in (params, load(file, tuned)):
        for processes in (1, 2):
            hardware.shares(settings.train, processes)


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
    ):
        assert parts(*overrides)[part] < default[part], overrides


def test_the_weights_of_an_adapter_are_counted(network: Any) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(network, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    assert hardware.adapter_weights(adapted.unload(), Params().lora) == trained


def test_more_than_fits_says_what_to_lower_and_to_what() -> None:
    params = load(None, ["train.micro_batch=48"])
    needed = hardware.memory(hardware.empty(loading.EMBEDDED["embedded://tiny-base"]), params)
    assert hardware.beyond(params, 1, hardware.total(needed)) == []
    (problem,) = hardware.beyond(params, 1, hardware.total(needed) - needed["training"] // 2)
    assert "train.micro_batch=48 needs about" in problem
    assert "set train.gradient_checkpointing=true, or set train.micro_batch=" in problem
    (problem,) = hardware.beyond(params, 1, 1)
    assert "take a larger GPU" in problem
