"""Hardware checks before a training: packages, GPU, and GPU memory, which is estimated from the sizes of tensors."""

import math
from pathlib import Path
from typing import Any

from adfm.errors import AdfmError
from adfm.models import adapters, families, liger, loading, model_folder, requirements, vllm_engine
from adfm.params import Model, Params, Train

PROMPT = 200  # tokens without the image, about, with the tokenizers of the real models
_LOGITS_TILE = 2**30  # the most bytes of logits that TRL's loss holds at a time
_CONTEXT = 3 * 2**29  # bytes of CUDA's context, and of what its allocator cannot use


def batch_split(settings: Train, processes: int) -> tuple[int, int]:
    """Return the completions of a step in each process, and of a backward pass; raise `AdfmError` for a remainder."""
    completions = settings.prompts_per_step * settings.num_generations
    if completions % ((settings.micro_batch or 1) * processes):
        share = f"{settings.micro_batch or 1}" + f" in each of {processes} processes" * (processes > 1)
        raise AdfmError(
            f"train.micro_batch: {share} does not divide the {completions} completions of a step "
            "(train.prompts_per_step * train.num_generations)"
        )
    if settings.dynamic_sampling and completions // processes % settings.num_generations:
        raise AdfmError(
            f"train.dynamic_sampling: {completions // processes} completions in each of {processes} processes are not "
            f"whole groups of {settings.num_generations}; make train.prompts_per_step a multiple of {processes}"
        )
    return completions // processes, settings.micro_batch or completions // processes


def batch_problems(settings: Train, processes: int) -> list[str]:
    """Return what `batch_split` refuses, if anything."""
    try:
        batch_split(settings, processes)
    except AdfmError as error:
        return [str(error)]
    return []


def require(params: Params, processes: int = 1) -> None:
    """Raise an `AdfmError` that lists the `problems`, if any.

    Args:
        params: Reads `model`, `lora` and `train`.
        processes: Among which the completions of a step are divided, a GPU each.
    """
    if missing := problems(params, processes):
        raise AdfmError("\n  ".join(missing))


def problems(params: Params, processes: int = 1) -> list[str]:
    """Return why the machine cannot train with the settings, a sentence each."""
    import torch

    missing = missing_requirements(params) + batch_problems(params.train, processes)
    if params.train.liger is True and not missing:
        _, folder = loading.base_of(params.model.name, params.model)
        missing += liger.problems(model_folder.family_of(folder))
    if torch.cuda.is_available() and params.train.vllm and not missing:
        available = torch.cuda.get_device_properties(0).total_memory
        missing += vllm_problems(params, processes, available, loading.weights_are_divided())
    if params.train.vllm_server and not missing:
        missing += server_problems(params)
    return missing


def memory_warnings(params: Params, processes: int = 1) -> list[str]:
    """Return a sentence if this machine's GPU may be too small, with how certain that is; nothing without a GPU."""
    import torch

    if loading.weights_are_divided() or not torch.cuda.is_available():
        return []
    return memory_problems(params, processes, torch.cuda.get_device_properties(0).total_memory)


def missing_requirements(params: Params) -> list[str]:
    """Return the packages and the GPU that this machine lacks for a training, a sentence each."""
    train = params.train
    missing = requirements.missing(params.model)
    if train.optimizer != "adamw_torch_fused":
        missing += requirements.missing_package(f"train.optimizer={train.optimizer}", "bitsandbytes")
    if train.liger is True:
        missing += requirements.missing_package("train.liger=true", "liger-kernel")
    return missing + _missing_for_vllm(params)


def _missing_for_vllm(params: Params) -> list[str]:
    """Return what keeps vLLM from generating in a training or an evaluation: setting, package or version."""
    import torch

    train, backend = params.train, params.evaluate.backend
    if not (train.vllm or train.vllm_server):
        evaluates = backend == "vllm" or (backend == "auto" and torch.cuda.is_available())
        return [f"{text}, or set evaluate.backend=transformers" for text in vllm_engine.wrong_version() if evaluates]
    setting = f"train.vllm={train.vllm}" if train.vllm else f"train.vllm_server={train.vllm_server}"
    missing = requirements.missing_package(setting, "vllm") or vllm_engine.wrong_version()
    if train.vllm and train.vllm_server:
        missing.append("train.vllm shares this GPU and train.vllm_server has another; set one of them to null")
    if params.model.quantization:
        missing.append(f"{setting} cannot take the weights of model.quantization; set one of them to null")
    _, folder = loading.base_of(params.model.name, params.model)
    if not families.get(model_folder.family_of(folder)).vllm:
        missing.append(f"{setting}: adfm does not support vLLM for {params.model.name}; set it to null")
    return missing


def memory_problems(params: Params, processes: int, available: int) -> list[str]:
    """Return which setting to lower, and to what, if a training needs more than `available` bytes of GPU memory."""
    base, folder = loading.base_of(params.model.name, params.model)
    network = meta_model(folder)

    def needed(settings: Train) -> dict[str, int]:
        return memory(network, params.model_copy(update={"model": base, "train": settings}), processes, available)

    parts = needed(params.train)
    if total(parts) <= available:
        return []
    # The phase that needs more decides what to lower.
    name, value = "prompts_per_step", params.train.prompts_per_step
    if parts["training"] >= parts["generation"]:
        name, value = "micro_batch", batch_split(params.train, processes)[1]
    remedy = "take a larger GPU, or set model.quantization=nf4"
    for less in range(value - 1, 0, -1):
        settings = params.train.model_copy(update={name: less})
        if not batch_problems(settings, processes) and total(needed(settings)) <= available:
            remedy = f"set train.{name}={less}"
            break
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


def server_problems(params: Params) -> list[str]:
    """Return what keeps the server of `train.vllm_server` from generating, and the command that starts one that can."""
    url = str(params.train.vllm_server)
    base, folder, processor, length = _request(params)
    problems = vllm_engine.server_problems(url, length)
    command = vllm_engine.server_command(folder, processor, base.dtype, length, url)
    return [f"{'; '.join(problems)}. Start it with:\n    {command}"] if problems else []


def _request(params: Params) -> tuple[Model, Path, Any, int]:
    base, folder = loading.base_of(params.model.name, params.model)
    processor = loading.load_processor(params.model.name, params.model)
    messages = loading.prompt_of(params.model.name, model_folder.family_of(folder))
    return base, folder, processor, vllm_engine.model_length(processor, messages, params.train.max_completion_length)


def vllm_problems(params: Params, processes: int, available: int, divided: bool = False) -> list[str]:
    """Return why vLLM cannot start in its share of the GPU, or training beside it, and the share to set.

    Args:
        params: Reads `model`, `lora` and `train`.
        processes: As in `require`.
        available: Memory of the GPU in bytes.
        divided: Whether the weights that are trained are divided among the processes; those of vLLM never are.
    """
    base, folder, processor, length = _request(params)
    params = params.model_copy(update={"model": base})
    network, share = meta_model(folder), params.train.vllm or 0
    longest = network.config.text_config.max_position_embeddings
    if length > longest:
        return [f"prompt and completion have up to {length} tokens, the model takes {longest}; lower model.max_pixels"]
    completions, _ = batch_split(params.train, processes)
    needs = vllm_memory(network, params.model.dtype, length, completions, vllm_engine.image_tokens(processor))
    trained = memory(network, params, processes, available)
    kept = trained["weights"] // (processes if divided else 1) + trained["adapter"]
    least = math.ceil(100 * (1.1 * sum(needs.values()) + _CONTEXT) / available) / 100
    most = math.floor(100 * (available - kept - _CONTEXT) / available) / 100
    remedy = "take a larger GPU, set train.vllm=null, or give vLLM a GPU of its own (train.vllm_server)"
    if least <= most:
        remedy = f"set train.vllm={max(least, min(share, most)):.2f}"
    listed = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in needs.items())
    # Only certain needs count, so that whatever is refused cannot work; the proposed share has room to spare.
    if share * available < sum(needs.values()):
        return [
            f"train.vllm={share} is {share * available / 2**30:.1f} GiB of the GPU's {available / 2**30:.0f}, and vLLM "
            f"needs {sum(needs.values()) / 2**30:.1f} to start ({listed}); {remedy}"
        ]
    if share * available > available - kept:
        return [
            f"train.vllm={share} leaves {(1 - share) * available / 2**30:.1f} GiB of the GPU's "
            f"{available / 2**30:.0f}, and the model in training has {kept / 2**30:.1f} there already; {remedy}"
        ]
    return []


def vllm_memory(network: Any, dtype: str, length: int, requests: int, image: int) -> dict[str, int]:
    """Return the least GPU memory in bytes with which vLLM 0.30 starts; computed from its source, not measured.

    Args:
        network: As `meta_model` makes it.
        dtype: Of weights and cache.
        length: Tokens of one request.
        requests: Completions that are generated at a time.
        image: The most tokens of one image.
    """
    # vLLM runs the model on `BATCHED_TOKENS` tokens and as many of images; the rest of its share must hold the keys and
    # values of one request. The run's largest tensors at one time: of a layer of width h and inner width i, 2 h + 3 i
    # numbers a token (residual, input, gate, up, product; of a vision layer 2 h + 2 i a patch), or the final logits.
    text, vision = network.config.text_config, network.config.vision_config
    number = {"float32": 4}.get(dtype, 2)
    patches = max(vllm_engine.BATCHED_TOKENS // image, 1) * image * vision.spatial_merge_size**2
    language = vllm_engine.BATCHED_TOKENS * (2 * text.hidden_size + 3 * text.intermediate_size)
    images = patches * (2 * vision.hidden_size + 2 * vision.intermediate_size)
    logits = requests * text.vocab_size * (number + 4)
    return {
        "weights": number * sum(weight.numel() for weight in network.parameters()),
        "cache": number * _cached(text) * length,
        "activations": max(number * language, number * images, logits),
    }


def meta_model(model: Path | Any) -> Any:
    """Return the network of a model's folder, or of a configuration, on PyTorch's device `meta`."""
    import torch

    config = loading.auto_class("AutoConfig").from_pretrained(model) if isinstance(model, Path) else model
    with torch.device("meta"):
        return loading.auto_class("AutoModelForImageTextToText").from_config(config)


def total(parts: dict[str, int]) -> int:
    """Return the most bytes of `memory` that are needed at one time."""
    lasting = sum(size for name, size in parts.items() if name not in ("training", "generation", "cache"))
    return lasting + max(parts["training"], parts["generation"])  # which take turns


def memory(network: Any, params: Params, processes: int = 1, available: int = 0) -> dict[str, int]:
    """Estimate GPU memory in bytes from the sizes of tensors, by what it is for.

    Args:
        network: As `meta_model` makes it.
        params: Reads `model`, `lora` and `train`.
        processes: As in `require`; each holds the whole model.
        available: Memory of the GPU, of which `train.vllm` is a share.
    """
    settings = params.train
    completions, micro_batch = batch_split(settings, processes)
    text, vision = network.config.text_config, network.config.vision_config
    number = {"float32": 4}.get(params.model.dtype, 2)
    weights = sum(weight.numel() for weight in network.parameters())
    stored = weights * number
    if params.model.quantization:
        # bitsandbytes stores linear layers other than the head in 4 bits, and 0.127 for the scales of their blocks.
        linear = sum(
            weight.numel()
            for name, weight in network.named_parameters()
            if weight.dim() == 2 and "embed" not in name and "lm_head" not in name
        )
        stored = (weights - linear) * number + round(linear * 0.516)
    adapter = adapters.weights(network, params.lora)
    family = families.get(network.config.model_type)
    patches, image_tokens, depth = family.images.cost(network.config, params.model.max_pixels or 512 * 512)
    prompt = PROMPT + image_tokens
    tokens = prompt + settings.max_completion_length

    def kept(config: Any, layers: int, length: int) -> int:
        # A layer of width h and inner width i keeps about 8 h + 4 i numbers a token for its backward pass: inputs of
        # linear layers and norms, queries, keys, values; with gradient checkpointing h, and one layer the rest.
        layer = int(8 * config.hidden_size + 4 * config.intermediate_size)
        return length * (layers * config.hidden_size + layer if settings.gradient_checkpointing else layers * layer)

    training = micro_batch * number * (kept(text, text.num_hidden_layers, tokens) + kept(vision, depth, patches))
    # The logits are not kept: TRL computes its loss from tiles of them.
    training += min(_LOGITS_TILE, 8 * text.vocab_size * micro_batch * settings.max_completion_length)
    cache = completions * number * _cached(text) * tokens
    if settings.vllm or settings.vllm_server:
        generation = round((settings.vllm or 0) * available)
    else:
        # The tokens of all prompts are computed together, and nothing is kept for a backward pass.
        first = max(
            length * (4 * config.hidden_size + 3 * config.intermediate_size)
            for config, length in ((text, prompt), (vision, patches))
        )
        generation = cache + completions * number * first
    return {
        "weights": stored,
        "adapter": adapter * 4 * (2 if settings.beta else 1),  # a KL penalty needs a copy
        "gradients": adapter * 4,
        "optimizer": adapter * (8 if settings.optimizer == "adamw_torch_fused" else 2),
        "training": training,  # activations of a backward pass
        "generation": generation,  # the cache, and the prompt's activations
        "cache": cache,  # keys and values
        "other": _CONTEXT,
    }


def _cached(text: Any) -> int:
    # Keys and values of each layer, for one token.
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # Layers of linear attention, of which Qwen3.5 has three in four, keep a state that does not grow.
    constant = sum("linear" in kind for kind in getattr(text, "layer_types", None) or [])
    return int(2 * (text.num_hidden_layers - constant) * text.num_key_value_heads * head)
