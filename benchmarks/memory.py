"""GPU memory and time of a training step with the settings in params/, as tables: computed, not measured.

python benchmarks/memory.py

Memory is what `adfm.models.hardware.memory` computes, the numbers by which `adfm check` refuses settings; vLLM's is its
share of 80 GiB. Time is floating-point operations and bytes over what a GPU does in a second, times the shares below,
which are assumed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from architectures import configuration

from adfm import params as params_
from adfm.models import families, hardware
from adfm.params import Params

SETTINGS = {
    "published-qwen2.5-vl-7b": "Qwen2.5-VL-7B",
    "qwen2.5-vl-3b": "Qwen2.5-VL-3B",
    "qwen2.5-vl-7b": "Qwen2.5-VL-7B",
    "qwen3-vl-8b": "Qwen3-VL-8B",
}
GPUS = {"A100": (312e12, 2.0e12), "H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}
"""Dense bf16 operations and bytes of memory traffic a second, as NVIDIA publishes them."""

COMPUTE, TRAFFIC = 0.35, 0.25  # shares of these that training and generation are assumed to reach
GIB = 2**30


def operations(network: Any, params: Params) -> float:
    """Floating-point operations of the training of one step.

    All tokens go forward (once more for the KL penalty, once more with gradient checkpointing) and backward to the
    adapter, which costs as much again: 2 operations a weight and token each time.
    """
    settings = params.train
    text = network.config.text_config
    family = families.get(network.config.model_type)
    patches, image_tokens, _ = family.images.cost(network.config, params.model.max_pixels or 512 * 512)
    tokens = hardware.PROMPT + image_tokens + settings.max_completion_length
    visual = sum(weight.numel() for name, weight in network.named_parameters() if family.is_vision(name))
    embedding = text.vocab_size * text.hidden_size
    textual = sum(weight.numel() for weight in network.parameters()) - visual - embedding
    passes = 2 + (settings.beta > 0) + settings.gradient_checkpointing
    completions = settings.prompts_per_step * settings.num_generations
    return 2.0 * passes * completions * (textual * tokens + visual * patches)


def seconds(network: Any, params: Params, gpu: str) -> tuple[float, float]:
    """Generation and training of one step on one GPU.

    Every token of a generation reads all weights, and the keys and values so far.
    """
    compute, traffic = GPUS[gpu]
    parts = hardware.memory(network, params)
    reading = params.train.max_completion_length * (parts["weights"] + parts["cache"] / 2)
    return reading / (traffic * TRAFFIC), operations(network, params) / (compute * COMPUTE)


def main() -> None:
    folder = Path(__file__).parents[1] / "params"
    print("| settings | weights | adapter, gradients, optimizer | training | generation | peak |")
    print("|---|---|---|---|---|---|")
    rows = []
    for name, architecture in SETTINGS.items():
        network = hardware.meta_model(configuration(architecture))
        params = params_.load(folder / f"{name}.yaml")
        parts = hardware.memory(network, params, available=80 * GIB)
        ours = sum(parts[part] for part in ("adapter", "gradients", "optimizer"))
        sizes = [parts["weights"], ours, parts["training"], parts["generation"], hardware.total(parts)]
        print(f"| {name} | " + " | ".join(f"{size / GIB:.1f} GiB" for size in sizes) + " |")
        rows.append((name, params, network))
    print(f"\n| settings | {' | '.join(GPUS)} |")
    print("|---|" + "---|" * len(GPUS))
    for name, params, network in rows:
        cells = []
        for gpu in GPUS:
            generation, training = seconds(network, params, gpu)
            hours = params.train.steps * (generation + training) / 3600
            cells.append(f"{generation:.0f} s + {training:.0f} s, {hours:.0f} h")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
