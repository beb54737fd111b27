"""Seconds and memory of a GRPO step by part: a real architecture with random weights on a GPU, beside TRL alone.

python benchmarks/gpu_step.py                                      # Qwen2.5-VL-7B, and the settings below
python benchmarks/gpu_step.py --model Qwen2.5-VL-3B --set train.num_generations=12
python benchmarks/gpu_step.py --only published FlashAttention      # two of the settings

Images of 512 x 512, 512 tokens a completion (random weights hardly ever stop), published settings otherwise. Prints for
each: seconds of a step and the peak of memory, by part; tokens a second of generation; model FLOPs utilisation of the
rest of the step; and the ratio to TRL alone. Without a GPU the same runs at toy size with the memory of the process,
to see that it runs: its times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from architectures import ARCHITECTURES, configuration
from grpo_step import bare_trainer
from memory import GPUS, operations
from PIL import Image

from adfm import params as params_
from adfm import tracking
from adfm.method import prompt
from adfm.models import adapters, families, hardware, liger, loading, requirements
from adfm.params import Params
from adfm.process import environment
from adfm.training.health import StopCallback
from adfm.training.outbox import Outbox
from experiments import tiny_base, tiny_model

VARIANTS = {
    "published": [],
    "24 completions a group": ["train.num_generations=24", "train.prompts_per_step=4"],
    "no checkpointing": ["train.gradient_checkpointing=false"],
    "FlashAttention": ["model.attention=flash_attention_2"],
    "Liger": ["train.liger=true"],
    "FlashAttention and Liger": ["model.attention=flash_attention_2", "train.liger=true"],
    "8-bit optimizer": ["train.optimizer=adamw_8bit"],
    "adapter on the vision tower": ["lora.vision=true"],
    "no KL penalty": ["train.beta=0.0"],
}
COMMON = ["train.steps=3", "train.prompts_per_step=16", "train.pictures_every=0", "train.checkpoint_every=1000"]
COMMON += ["model.attention=sdpa", "train.liger=false"]
TOY = ["model.dtype=float32", "model.max_pixels=9216", "train.max_completion_length=16", "train.prompts_per_step=4"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(ARCHITECTURES), default="Qwen2.5-VL-7B")
    parser.add_argument("--only", choices=list(VARIANTS), nargs="+", default=list(VARIANTS))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    environment.set_environment()
    gpu = torch.cuda.is_available()
    print(f"{args.model}, random weights, {torch.cuda.get_device_name()}" if gpu else "toy size: no GPU, no timing")
    file = Path(__file__).parents[1] / "params" / "published-qwen2.5-vl-7b.yaml"
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in args.only:
            params = params_.load(file, [*COMMON, *([] if gpu else TOY), *VARIANTS[name], *args.set])
            missing = hardware.missing_requirements(params)
            if params.train.liger is True and not missing:
                missing = liger.problems(ARCHITECTURES[args.model][0])
            if missing:
                print(f"{name}: not run: {'; '.join(missing)}")
                continue
            steps = {}
            for who in ("adfm", "TRL"):
                parts, figures = measured(args.model, params, adfm=who == "adfm")
                steps[who] = figures["s a step"]
                print(f"{name}, {who}: " + ", ".join(f"{value:.3g} {what}" for what, value in figures.items()))
                for part, (seconds, peak) in parts.items():
                    print(f"  {part:18} {seconds:8.3f} s {peak / 2**30:7.2f} GiB")
            print(f"  ratio of the steps, adfm to TRL: {steps['adfm'] / steps['TRL']:.3f}")
        os.chdir("/")


def measured(name: str, params: Params, adfm: bool) -> tuple[dict[str, tuple[float, int]], dict[str, float]]:
    """Seconds of a step and peak of memory in bytes by part, and figures of the whole, of a training of a few steps.

    The first step, which allocates and compiles, is not counted.
    """
    import datasets
    from transformers import ProcessorMixin, TrainerCallback

    loaded = built(name, params)
    settings = params.train
    data = rows(
        loaded, settings.steps * settings.prompts_per_step, 512 if torch.cuda.is_available() else tiny_model.SIDE
    )
    work = Path(f"work-{time.monotonic_ns()}")
    parts = Parts()
    ended: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            ended.append(time.perf_counter())
            if len(ended) == 1:
                parts.clear()

    with contextlib.ExitStack() as opened:
        if adfm:
            run = opened.enter_context(tracking.start_run("train", params))
            outbox = opened.enter_context(Outbox(work.with_suffix(".unsent"), run.info.run_id))
            stop = StopCallback(settings.health, threading.Event())
            from adfm.training.trainer import GrpoTrainer

            trainer: Any = GrpoTrainer(loaded, data, None, work, params, 1, False, outbox, stop)
        else:
            trainer = bare_trainer(loaded, data, work, params)
        trainer.add_callback(Clock())
        for part, owner, method in (
            ("reading images", datasets.Dataset, "__getitems__"),
            ("image processor", ProcessorMixin, "_process_images"),
            ("generation", trainer, "_generate_single_turn"),
            ("scoring", trainer, "_calculate_rewards"),
            ("reference pass", trainer, "_get_per_token_logps_and_entropies"),
            ("forward", trainer, "compute_loss"),
            ("backward", trainer.accelerator, "backward"),
        ):
            opened.enter_context(parts.watch(part, owner, method))
        trainer.train()
    counted = settings.steps - 1
    step = (ended[-1] - ended[0]) / counted
    took = {part: (seconds / counted, peak) for part, (seconds, peak) in parts.items()}
    took["rest"] = (step - sum(seconds for seconds, _ in took.values()), 0)
    completions = settings.prompts_per_step * settings.num_generations
    generation = took["generation"][0]
    figures = {
        "s a step": step,
        "generated tokens/s": completions * settings.max_completion_length / generation,
        "GiB at most": max(peak for _, peak in took.values()) / 2**30,
    }
    if torch.cuda.is_available():
        peak = next((flops for gpu, (flops, _) in GPUS.items() if gpu in torch.cuda.get_device_name()), float("nan"))
        figures["MFU"] = operations(loaded.model, params) / ((step - generation) * peak)
        del trainer, loaded
        torch.cuda.empty_cache()
    return took, figures


class Parts(dict[str, tuple[float, int]]):
    """Seconds, summed, and peak of memory in bytes of the parts of a step; a call within another is not counted."""

    _within = False

    @contextlib.contextmanager
    def watch(self, part: str, owner: Any, name: str) -> Iterator[None]:
        """In the block, `owner.name` is counted as a part."""
        method = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._within:
                return method(*args, **kwargs)
            self._within = True
            synchronize()
            reset_peak()
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                synchronize()
                seconds, most = self.get(part, (0.0, 0))
                self[part] = (seconds + time.perf_counter() - start, max(most, peak_bytes()))
                self._within = False

        setattr(owner, name, call)
        try:
            yield
        finally:
            setattr(owner, name, method)


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most memory since `reset_peak`: of the GPU's tensors, or without one of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def built(name: str, params: Params) -> loading.Loaded:
    """The architecture with random weights and an adapter; the toy one without a GPU."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    processor = tiny_model.processor(tiny_model.tokenizer(tiny_base.corpus()))
    family = ARCHITECTURES[name][0] if torch.cuda.is_available() else tiny_model.FAMILY
    if torch.cuda.is_available():
        config = configuration(name)
        number = processor.tokenizer.convert_tokens_to_ids
        config.image_token_id, config.video_token_id = number("<|image_pad|>"), number("<|video_pad|>")
        config.vision_start_token_id = number("<|vision_start|>")
        images = processor.image_processor
        images.patch_size = config.vision_config.patch_size
        images.size = {"shortest_edge": 4 * images.patch_size**2, "longest_edge": params.model.max_pixels}
        processor = families.processor_class(family)(images, processor.tokenizer, chat_template=processor.chat_template)
        with torch.device("cuda"):
            dtype = getattr(torch, params.model.dtype)
            network = AutoModelForImageTextToText.from_config(
                config, dtype=dtype, attn_implementation=requirements.attention(params.model)
            )
    else:
        network = tiny_model.model(processor.tokenizer, seed=0)
    processor.tokenizer.padding_side = "left"
    adapted = adapters.attach(network, params.lora)
    if liger.enabled(params.train, family):
        liger.apply(adapted)
    return loading.Loaded(adapted, processor, family, params.model, prompt.messages(families.get(family).units))


def rows(loaded: loading.Loaded, count: int, side: int) -> Any:
    """Images of noise with one defect each, as `adfm.training.examples.draw` gives them."""
    import datasets

    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)) for _ in range(8)]
    columns: dict[str, list[Any]] = {
        "prompt": [loaded.prompt] * count,
        "image": [images[k % 8] for k in range(count)],
        "label": ["anomalous", "normal"] * (count // 2) + ["normal"] * (count % 2),
        "regions": [[[100.0, 100.0, 200.0, 200.0]]] * count,
        "frame": [[float(side), float(side)]] * count,
    }
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
