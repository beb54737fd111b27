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


def test_more_than_fits_says_what_to_lower_and_to_what() -> None:
    params = load(None, ["train.micro_batch=48"])
    needed = hardware.memory(hardware.empty(loading.EMBEDDED["embedded://tiny-base"]), params)
    assert hardware.beyond(params, 1, hardware.total(needed)) == []
    (problem,) = hardware.beyond(params, 1, hardware.total(needed) - needed["training"] // 2)
    assert "train.micro_batch=48 needs about" in problem
    assert "Set train.gradient_checkpointing=true, or set train.micro_batch=" in problem
    (problem,) = hardware.beyond(params, 1, 1)
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
