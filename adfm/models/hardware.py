"""What settings ask of the machine that trains: packages, a GPU, its kind and its memory.

What is missing is said before the first step. The memory is computed, from the sizes of the tensors; see `memory`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from adfm.errors import AdfmError
from adfm.models import adapters, families, loading
from adfm.params import Params, Train

PROMPT = 200
"""Tokens of the prompt without the image, about, with the tokenizers of the real models."""

_TILE = 2**30  # bytes that TRL's loss holds at a time instead of the logits, at most
_CONTEXT = 3 * 2**29  # bytes of CUDA's own and of what its allocator cannot use


def shares(settings: Train, processes: int) -> tuple[int, int]:
    """Completions of a step in each of several processes, and those of a backward pass.

    Raises:
        AdfmError: They do not divide.
    """
    completions = settings.prompts_per_step * settings.num_generations
    if completions % ((settings.micro_batch or 1) * processes):
        share = f"{settings.micro_batch or 1}" + f" in each of {processes} processes" * (processes > 1)
        raise AdfmError(
            f"train.micro_batch: {share} does not divide the {completions} completions of a step "
            "(train.prompts_per_step * train.num_generations)"
        )
    if settings.resample and completions // processes % settings.num_generations:
        raise AdfmError(
            f"train.resample: {completions // processes} completions in each of {processes} processes are no whole "
            f"groups of {settings.num_generations}; make train.prompts_per_step a multiple of {processes}"
        )
    return completions // processes, settings.micro_batch or completions // processes


def batch_problems(settings: Train, processes: int) -> list[str]:
    """What `shares` refuses, if anything."""
    try:
        shares(settings, processes)
    except AdfmError as error:
        return [str(error)]
    return []


def require(params: Params, processes: int = 1) -> None:
    """Refuses settings that the machine cannot train with.

    Args:
        params: Reads `model`, `lora` and `train`.
        processes: In which the completions of a step are divided, a GPU each.

    Raises:
        AdfmError: They ask for what is not there; everything is listed.
    """
    if missing := problems(params, processes):
        raise AdfmError("\n  ".join(missing))


def problems(params: Params, processes: int = 1) -> list[str]:
    """What `require` refuses, a sentence each; none: the machine is fit."""
    return lacking(params) + batch_problems(params.train, processes)


def memory_warnings(params: Params, processes: int = 1) -> list[str]:
    """A sentence if this machine's GPU may be too small, with how sure that is; none without a GPU.

    Args:
        params: What `problems` and `adapters.problems` accept.
        processes: As in `require`.
    """
    import torch

    divided = any(f"ACCELERATE_USE_{name}" in os.environ for name in ("FSDP", "DEEPSPEED"))  # set by its launcher
    if divided or not torch.cuda.is_available():
        return []
    return beyond(params, processes, torch.cuda.get_device_properties(0).total_memory)


def lacking(params: Params) -> list[str]:
    """What this machine lacks for a training, a sentence each: a GPU of the right kind, a package."""
    train = params.train
    found = loading.lacking(params.model)
    if train.optimizer != "adamw_torch_fused":
        found += loading.lacking_package(f"train.optimizer={train.optimizer}", "bitsandbytes")
    if train.liger:
        found += loading.lacking_package("train.liger=true", "liger-kernel")
    if train.vllm:
        found += loading.lacking_package(f"train.vllm={train.vllm}", "vllm")
    return found


def beyond(params: Params, processes: int, available: int) -> list[str]:
    """A sentence that says which setting to lower, and to what, if more memory is needed than is `available`."""
    base, folder = loading.base_of(params.model.name, params.model)
    network = empty(folder)

    def needed(settings: Train) -> dict[str, int]:
        return memory(network, params.model_copy(update={"model": base, "train": settings}), processes, available)

    parts = needed(params.train)
    if total(parts) <= available:
        return []
    _, micro_batch = shares(params.train, processes)
    name = "micro_batch" if parts["training"] >= parts["generation"] else "prompts_per_step"
    value = micro_batch if name == "micro_batch" else params.train.prompts_per_step
    smaller = [params.train.model_copy(update={name: less}) for less in range(value - 1, 0, -1)]
    fitting = [
        getattr(settings, name)
        for settings in smaller
        if not batch_problems(settings, processes) and total(needed(settings)) <= available
    ]
    remedy = f"set train.{name}={fitting[0]}" if fitting else "take a larger GPU, or set model.quantization=nf4"
    if params.train.vllm and name == "prompts_per_step":
        remedy = "lower train.vllm"
    if not params.train.gradient_checkpointing:
        remedy = f"set train.gradient_checkpointing=true, or {remedy}"
    sure = "; computed from tensor sizes, not measured on any GPU, so it is not certain and nothing is refused"
    if (weights := parts["weights"] + parts["adapter"]) > available:
        sure = f"; this is certain: the weights alone are {weights / 2**30:.0f} GiB"
    return [
        f"train.{name}={value} needs about {total(parts) / 2**30:.0f} GiB of GPU memory, and the GPU has "
        f"{available / 2**30:.0f}{sure}. {remedy[0].upper()}{remedy[1:]}."
    ]


def empty(model: Path | Any) -> Any:
    """A network of a model's folder, or of a configuration, without memory for its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(model) if isinstance(model, Path) else model
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def total(parts: dict[str, int]) -> int:
    """The largest sum that is needed at one time, in bytes: training and generation take turns."""
    lasting = sum(size for name, size in parts.items() if name not in ("training", "generation", "cache"))
    return lasting + max(parts["training"], parts["generation"])


def memory(network: Any, params: Params, processes: int = 1, available: int = 0) -> dict[str, int]:
    """GPU memory in bytes by what it is for, computed from the sizes of tensors: an estimate, not a measurement.

    A layer of width h whose inner layer has width i keeps about 8 h + 4 i numbers a token for its backward pass: the
    inputs of its linear layers and norms, queries, keys, values. With gradient checkpointing each layer keeps h numbers
    a token, and one layer at a time the rest. The logits are not kept: TRL computes its loss from tiles of them.

    Args:
        network: As `empty` makes it.
        params: Reads `model`, `lora` and `train`.
        processes: As in `require`; each holds the whole model.
        available: Memory of the GPU, of which `train.vllm` is a share.

    Returns:
        `weights`, `adapter` (with the copy that a KL penalty needs), `gradients`, `optimizer`, `training` (activations
        of a backward pass), `generation` (`cache`, keys and values, and the prompt's activations), `other`.
    """
    settings = params.train
    completions, micro_batch = shares(settings, processes)
    text, vision = network.config.text_config, network.config.vision_config
    number = {"float32": 4}.get(params.model.dtype, 2)
    weights = sum(weight.numel() for weight in network.parameters())
    linear = sum(weight.numel() for name, weight in network.named_parameters() if _quantized(name, weight))
    stored = weights * number
    if params.model.quantization:
        stored = (weights - linear) * number + round(linear * 0.516)  # 4 bits, and 0.127 for the scales of its blocks
    adapter = adapters.weights(network, params.lora)
    family = families.get(network.config.model_type)
    patches, image_tokens, depth = family.images.cost(network.config, params.model.max_pixels or 512 * 512)
    prompt = PROMPT + image_tokens
    tokens = prompt + settings.max_completion_length

    def layer(config: Any) -> int:
        return int(8 * config.hidden_size + 4 * config.intermediate_size)

    def kept(config: Any, layers: int, length: int) -> int:
        return length * (layers * config.hidden_size + layer(config) if checkpointed else layers * layer(config))

    checkpointed = settings.gradient_checkpointing
    training = micro_batch * number * (kept(text, text.num_hidden_layers, tokens) + kept(vision, depth, patches))
    training += min(_TILE, 8 * text.vocab_size * micro_batch * settings.max_completion_length)
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # Layers of linear attention, of which Qwen3.5 has three in four, keep a state that does not grow.
    constant = sum("linear" in kind for kind in getattr(text, "layer_types", None) or [])
    cache = 2 * (text.num_hidden_layers - constant) * text.num_key_value_heads * head * tokens
    # The tokens of all prompts are computed together, and nothing is kept for a backward pass.
    first = max(
        length * (4 * config.hidden_size + 3 * config.intermediate_size)
        for config, length in ((text, prompt), (vision, patches))
    )
    generation = completions * number * (cache + first)
    return {
        "weights": stored,
        "adapter": adapter * 4 * (2 if settings.beta else 1),
        "gradients": adapter * 4,
        "optimizer": adapter * (8 if settings.optimizer == "adamw_torch_fused" else 2),
        "training": training,
        "generation": round(settings.vllm * available) if settings.vllm else generation,
        "cache": completions * number * cache,
        "other": _CONTEXT,
    }


def _quantized(name: str, weight: Any) -> bool:
    """Whether bitsandbytes stores a weight in 4 bits: that of a linear layer, but not the head."""
    return weight.dim() == 2 and "embed" not in name and "lm_head" not in name
