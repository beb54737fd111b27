"""A GRPO step of a real architecture with random weights on a GPU, setting by setting, beside a bare TRL script.

python benchmarks/gpu_step.py                                      # Qwen2.5-VL-7B, and the settings below
python benchmarks/gpu_step.py --model Qwen2.5-VL-3B --set train.num_generations=12

Images of 512 x 512, 512 tokens a completion (random weights hardly ever stop), published settings otherwise. Prints for
each: seconds of a step divided into generation, scoring, forward, backward and the rest; tokens a second of generation;
peak memory; model FLOPs utilisation of the training part; and the ratio to TRL alone. Without a GPU the same runs at
toy size, to see that it runs: its times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
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

from adfm import cli, tracking
from adfm import params as params_
from adfm.method import prompt
from adfm.models import adapters, families, hardware, loading, tiny
from adfm.outbox import Outbox
from adfm.params import Params
from adfm.training import base, grpo
from adfm.training.guard import Guard

VARIANTS = {
    "published": [],
    "24 completions a group": ["train.num_generations=24", "train.prompts_per_step=4"],
    "no checkpointing": ["train.gradient_checkpointing=false"],
    "FlashAttention": ["model.attention=flash_attention_2"],
    "Liger": ["train.liger=true"],
    "8-bit optimizer": ["train.optimizer=adamw_8bit"],
    "frozen vision tower": ["lora.vision=false"],
    "no KL penalty": ["train.beta=0.0"],
}
COMMON = ["train.steps=3", "train.prompts_per_step=16", "train.pictures_every=0", "train.checkpoint_every=1000"]
TOY = ["model.dtype=float32", "model.max_pixels=9216", "train.max_completion_length=16", "train.prompts_per_step=4"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(ARCHITECTURES), default="Qwen2.5-VL-7B")
    parser.add_argument("--only", choices=list(VARIANTS), nargs="+", default=list(VARIANTS))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    cli.set_environment()
    gpu = torch.cuda.is_available()
    print(f"{args.model}, random weights, {torch.cuda.get_device_name()}" if gpu else "toy size: no GPU, no timing")
    file = Path(__file__).parents[1] / "params" / "qwen2.5-vl-7b-mvtec.yaml"
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in args.only:
            params = params_.load(file, [*COMMON, *([] if gpu else TOY), *VARIANTS[name], *args.set])
            if missing := hardware.lacking(params):
                print(f"{name}: not run: {'; '.join(missing)}")
                continue
            ours = measured(args.model, params, adfm=True)
            theirs = measured(args.model, params, adfm=False)
            print(f"{name}: " + ", ".join(f"{what} {value:.3g}" for what, value in ours.items()))
            print(f"  bare TRL {theirs['step s']:.3g} s a step, ratio {ours['step s'] / theirs['step s']:.3f}")
        os.chdir("/")


def measured(name: str, params: Params, adfm: bool) -> dict[str, float]:
    """Figures of the last step of a training of a few."""
    from transformers import TrainerCallback

    loaded = built(name, params)
    settings = params.train
    data = rows(loaded, settings.steps * settings.prompts_per_step, 512 if torch.cuda.is_available() else tiny.SIDE)
    work = Path(f"work-{time.monotonic_ns()}")
    began: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronize()
            began.append(time.perf_counter())

    with contextlib.ExitStack() as opened:
        if adfm:
            run = opened.enter_context(tracking.start_run("train", params))
            outbox = opened.enter_context(Outbox(work.with_suffix(".unsent"), run.info.run_id))
            guard = Guard(settings.health, threading.Event())
            trainer: Any = grpo._trainer(loaded, data, None, work, params, 1, False, outbox, guard)
        else:
            trainer = bare_trainer(loaded, data, work, params)
        trainer.add_callback(Clock())
        spent: dict[str, list[float]] = {}
        for phase, method in (
            ("generation", "_generate"),
            ("scoring", "_calculate_rewards"),
            ("forward", "compute_loss"),
            ("forward and backward", "training_step"),
        ):
            setattr(trainer, method, watched(getattr(trainer, method), spent.setdefault(phase, [])))
        trainer.train()
        synchronize()
    step = (time.perf_counter() - began[0]) / settings.steps
    took = {phase: sum(seconds) / settings.steps for phase, seconds in spent.items()}
    # The first training_step of a step generates and scores as well.
    took["backward"] = took.pop("forward and backward") - took["forward"]
    took["backward"] -= took["generation"] + took["scoring"]
    tokens = settings.prompts_per_step * settings.num_generations * settings.max_completion_length
    figures = {"step s": step, **{f"{phase} s": seconds for phase, seconds in took.items()}}
    figures["rest s"] = step - sum(took.values())
    figures["generated tokens/s"] = tokens / took["generation"]
    if torch.cuda.is_available():
        peak = next((flops for gpu, (flops, _) in GPUS.items() if gpu in torch.cuda.get_device_name()), float("nan"))
        figures["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
        figures["MFU"] = operations(loaded.model, params) / ((step - took["generation"]) * peak)
        del trainer, loaded
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return figures


def built(name: str, params: Params) -> loading.Loaded:
    """The architecture with random weights and an adapter; the toy one without a GPU."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    processor = tiny.processor(tiny.tokenizer(base.corpus()))
    family = ARCHITECTURES[name][0] if torch.cuda.is_available() else tiny.FAMILY
    if torch.cuda.is_available():
        config = configuration(name)
        number = processor.tokenizer.convert_tokens_to_ids
        config.image_token_id, config.video_token_id = number("<|image_pad|>"), number("<|video_pad|>")
        config.vision_start_token_id = number("<|vision_start|>")
        images = processor.image_processor
        images.patch_size = config.vision_config.patch_size
        images.size = {"shortest_edge": 4 * images.patch_size**2, "longest_edge": params.model.max_pixels}
        processor = families.processor_class(family)(images, processor.tokenizer, processor.chat_template)
        with torch.device("cuda"):
            dtype = getattr(torch, params.model.dtype)
            network = AutoModelForImageTextToText.from_config(
                config, dtype=dtype, attn_implementation=params.model.attention
            )
    else:
        network = tiny.model(processor.tokenizer, seed=0)
    processor.tokenizer.padding_side = "left"
    adapted = adapters.attach(network, params.lora)
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


def watched(method: Any, seconds: list[float]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        with clocked(seconds):
            return method(*args, **kwargs)

    return call


@contextlib.contextmanager
def clocked(seconds: list[float]) -> Iterator[None]:
    synchronize()
    start = time.perf_counter()
    yield
    synchronize()
    seconds.append(time.perf_counter() - start)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
