"""GPU and packages that model settings require, each problem as a sentence that says what to install or set."""

import importlib.util

from adfm.params import Model

GPU_SETUP = "make setup REQUIREMENTS=requirements-gpu.txt"  # the packages that only a GPU needs


def missing(model: Model) -> list[str]:
    """Return what this machine lacks for the settings of a model."""
    import torch

    problems = missing_flash_attention(model) if model.attention == "flash_attention_2" else []
    if model.quantization:
        problems += missing_package(f"model.quantization={model.quantization}", "bitsandbytes")
    bfloat16 = model.dtype == "bfloat16" and torch.cuda.is_available()
    if bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        problems.append(
            f"model.dtype=bfloat16: {torch.cuda.get_device_name()} does not compute in it (NVIDIA's do from the A100 "
            "on); set model.dtype=float32"
        )
    return problems


def missing_package(setting: str, package: str) -> list[str]:
    """Return what this machine lacks for a setting that needs a GPU and a package that is not installed by default."""
    import torch

    if not torch.cuda.is_available():
        return [f"{setting} needs a GPU, and this machine has none; leave it at its default"]
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        # FlashAttention is compiled on the machine itself, and so is in no requirements file.
        remedy = "see docs/training.md" if package == "flash-attn" else GPU_SETUP
        return [f"{setting} needs the package {package}, which is not installed; {remedy}"]
    return []


def missing_flash_attention(model: Model) -> list[str]:
    """Return what this machine, or a model's settings, lack for FlashAttention 2."""
    import torch
    from transformers.utils.import_utils import is_flash_attn_2_available

    setting = "model.attention=flash_attention_2"
    problems = missing_package(setting, "flash-attn")
    if not problems and not is_flash_attn_2_available():
        problems.append(f"{setting} needs flash-attn 2.3.3 or newer, not the package of FlashAttention 4; install that")
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        problems.append(
            f"{setting} needs an NVIDIA A100 or newer, and here is {torch.cuda.get_device_name()}; set sdpa"
        )
    if model.dtype == "float32":
        problems.append(f"{setting} computes in 16 bits; set model.dtype=bfloat16")
    return problems


def attention(model: Model) -> str:
    """Return the attention to load a model with: `model.attention`, of which `auto` is the fastest that runs here."""
    if model.attention != "auto":
        return model.attention
    # FlashAttention's mask is causal: it computes the same for families whose image tokens attend to no later ones, as
    # those of `families.FAMILIES` (but not Gemma 3).
    return "sdpa" if missing_flash_attention(model) else "flash_attention_2"
