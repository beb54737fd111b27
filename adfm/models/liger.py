"""Liger's Triton kernels in the layers of a model: RMSNorm, rotary embedding, and SwiGLU where Liger has it."""

import importlib
import importlib.metadata
from typing import Any

from adfm.models import requirements
from adfm.params import Train


def enabled(settings: Train, family: str) -> bool:
    """Whether a training uses the kernels: as `train.liger` says, or with `auto` on a GPU where they are installed."""
    import torch

    if settings.liger == "auto":
        return torch.cuda.is_available() and not problems(family)
    return settings.liger


def problems(family: str) -> list[str]:
    """Return why the kernels cannot be applied to models of a family on this machine, a sentence each."""
    if missing := requirements.missing_package("train.liger=true", "liger-kernel"):
        return missing
    reason: object = f"it has no kernels for {family} models"
    try:
        _prepare()
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

        if family in MODEL_TYPE_TO_APPLY_LIGER_FN:
            importlib.import_module(f"liger_kernel.transformers.model.{family}")
            return []
    except ImportError as error:
        reason = error
    return [
        f"train.liger=true: liger-kernel {importlib.metadata.version('liger-kernel')} cannot be used ({reason}); "
        "set train.liger=false"
    ]


def apply(model: Any) -> None:
    """Put the kernels into a model, its adapter included; it must be on a GPU when it is run."""
    from transformers.integrations.liger import apply_liger_kernel

    _prepare()
    # Not by TRL, which will drop `use_liger_kernel`; without Liger's loss, since TRL's own never holds all logits.
    apply_liger_kernel(model, {"fused_linear_cross_entropy": False})


def _prepare() -> None:
    # Liger imports its losses for layers too. Version 0.8.5 derives their outputs from classes that transformers 5.23
    # no longer has, such as Qwen3VLCausalLMOutputWithPast, leaves out what it cannot derive, and fails to import it.
    from liger_kernel.transformers.model import output_classes
    from transformers.modeling_outputs import CausalLMOutputWithPast

    def missing(name: str) -> type:
        if name.startswith("Liger") and name.endswith("CausalLMOutputWithPast"):
            return CausalLMOutputWithPast
        raise AttributeError(name)

    output_classes.__getattr__ = missing
