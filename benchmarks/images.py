"""Seconds that a GRPO step spends on images: reading, decoding and processing them, adfm beside TRL alone, in one run.

python benchmarks/images.py                                # both families, 512 and 1024 pixels, 10 images x 6
python benchmarks/images.py --images 50 --sides 512        # a step of 300 completions, as published
python benchmarks/images.py --tokenizer FOLDER             # with the tokenizer of a real model

Both trainers are real, with the image processors' published settings; the model writes canned completions and has no
loss, so that nothing but the handling of images and text is left of a step. Prints for each how many images were
decoded and processed, the CPU seconds of it, the peak of the process's memory, and the ratio. Ends with status 1 if an
input of the model differs in a bit, or adfm processes an image of a step more than once.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import io
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from gpu_step import peak_bytes, reset_peak
from grpo_step import bare_trainer
from PIL import Image

from adfm.method import prompt
from adfm.models import adapters, families, loading
from adfm.params import Params
from adfm.process import environment
from adfm.training.health import StopCallback
from experiments import tiny_base, tiny_model

MAX_PIXELS = 512 * 512
PROCESSORS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "patch_size": 14,
        "size": {"shortest_edge": 56 * 56, "longest_edge": MAX_PIXELS},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "qwen3_vl": {
        "patch_size": 16,
        "size": {"shortest_edge": 256 * 256, "longest_edge": MAX_PIXELS},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    },
}
"""As the models' preprocessor_config.json has them, but for `longest_edge`, which is `model.max_pixels`."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10, help="a step")
    parser.add_argument("--group", type=int, default=6, help="completions an image")
    parser.add_argument("--micro-batch", type=int, default=6, help="completions a backward pass")
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024], help="pixels")
    parser.add_argument("--families", nargs="+", choices=list(PROCESSORS), default=list(PROCESSORS))
    parser.add_argument("--tokenizer", type=Path, help="folder; default: that of the embedded model")
    args = parser.parse_args()
    environment.set_environment()
    settings = {"steps": 1, "prompts_per_step": args.images, "num_generations": args.group, "beta": 0.0}
    settings |= {"micro_batch": args.micro_batch, "pictures_every": 0}
    params = Params.model_validate({"train": settings})
    failed = False
    print(f"CPU seconds of a step of {args.images} x {args.group} completions, {args.micro_batch} a backward pass")
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        for family in args.families:
            for side in args.sides:
                loaded = built(family, args.tokenizer)
                data = rows(loaded, args.images, side)
                ours, own = measured(loaded, data, params, adfm=True)
                trl, bare = measured(loaded, data, params, adfm=False)
                differ = [name for name in bare.keys() | own.keys() if bare.get(name) != own.get(name)]
                for name, figures in (("TRL", trl), ("adfm", ours)):
                    print(f"{family} {side} px {name:4}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))
                processor = trl["image processor s"] / ours["image processor s"]
                print(f"  ratio: processor {processor:.1f}, step {trl['step s'] / ours['step s']:.1f}")
                print(f"  inputs that differ: {', '.join(differ) or 'none'} of {len(own)}")
                failed |= bool(differ) or ours["images processed"] > args.images
        os.chdir("/")
    return int(failed)


def built(family: str, tokenizer: Path | None) -> loading.Loaded:
    """The embedded model's network, which is not run, with the image processor of a real one."""
    from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

    embedded = tiny_model.processor(tiny_model.tokenizer(tiny_base.corpus()))
    tokens = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else embedded.tokenizer
    tokens.padding_side = "left"
    images = Qwen2VLImageProcessorPil(**PROCESSORS[family])
    processor = families.processor_class(family)(images, tokens, chat_template=embedded.chat_template)
    network = adapters.attach(tiny_model.model(embedded.tokenizer, seed=0), Params().lora)
    return loading.Loaded(network, processor, family, Params().model, prompt.messages(families.get(family).units))


def rows(loaded: loading.Loaded, count: int, side: int) -> Any:
    """Smooth images with some noise, as PNG files in memory, with the columns of `adfm.training.examples.draw`."""
    import datasets

    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        smooth = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((side, side))
        noise = rng.integers(0, 12, (side, side, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(np.asarray(smooth) // 2 + noise).save(file, "PNG")
        files.append({"bytes": file.getvalue(), "path": None})
    columns: dict[str, list[Any]] = {
        "prompt": [loaded.prompt] * count,
        "image": files,
        "label": ["normal"] * count,
        "regions": [[[0.0, 0.0, 9.0, 9.0]]] * count,
        "frame": [[float(side), float(side)]] * count,
    }
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def measured(loaded: loading.Loaded, data: Any, params: Params, adfm: bool) -> tuple[dict[str, float], dict[str, str]]:
    """Figures of one step, and digests of what the model would have been given by it."""
    import datasets
    from transformers import ProcessorMixin

    from adfm.training.trainer import GrpoTrainer

    gc.collect()  # the trainer before this one refers to itself and holds a step
    work = Path(f"work-{time.monotonic_ns()}")
    if adfm:
        stop = StopCallback(params.train.health, threading.Event())
        trainer: Any = GrpoTrainer(loaded, data, None, work, params, 1, False, None, stop)
    else:
        trainer = bare_trainer(loaded, data, work, params)
    digests: dict[str, str] = {}
    written = loaded.processor.tokenizer(prompt.target_completion("normal", []) + "<|im_end|>")["input_ids"]

    def keep(values: dict[str, Any]) -> None:
        start = time.process_time()
        digests.update({name: digest(value) for name, value in values.items()})
        digesting.append(time.process_time() - start)

    def generate(input_ids: torch.Tensor, generation_config: Any = None, **inputs: Any) -> torch.Tensor:
        keep({f"generate {name}": value for name, value in {"input_ids": input_ids, **inputs}.items()})
        return torch.cat([input_ids, torch.tensor([written] * len(input_ids))], dim=1)

    def score(inputs: Any) -> Any:
        outputs = scored(inputs)
        keep(outputs)
        return outputs

    scored = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = score
    trainer._compute_loss = lambda model, inputs: sum(p.sum() for p in model.parameters() if p.requires_grad) * 0.0
    loaded.model.generate = generate
    digesting: list[float] = []
    processed: list[float] = []
    passes: list[float] = []
    decoded: list[float] = []
    loads: list[float] = []
    with (
        clocked(type(loaded.processor.image_processor), "preprocess", processed, count=lambda images: len(images)),
        clocked(ProcessorMixin, "_process_images", passes),
        clocked(datasets.Image, "decode_example", decoded),
        clocked(datasets.Dataset, "__getitems__", loads),
    ):
        reset_peak()
        start = time.process_time()
        trainer.train()
        step = time.process_time() - start - sum(digesting)
    return {
        "step s": step,
        "images decoded": len(decoded),
        "reading and decoding s": sum(loads),
        "images processed": len(processed),
        "image processor s": sum(passes),
        "peak GiB": peak_bytes() / 2**30,
    }, digests


def digest(value: Any) -> str:
    """Of a tensor's type, shape and bits, or of any other value as text."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    bits = hashlib.blake2b(f"{value.dtype} {tuple(value.shape)}".encode())
    bits.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return bits.hexdigest()


@contextlib.contextmanager
def clocked(owner: type, name: str, seconds: list[float], count: Any = lambda _: 1) -> Iterator[None]:
    """Appends the seconds of every call of a method, a number for each of the things that it was given."""
    method = getattr(owner, name)

    def call(self: Any, given: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        output = method(self, given, *args, **kwargs)
        many = count(given)
        seconds.extend([(time.process_time() - start) / many] * many)
        return output

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, method)


if __name__ == "__main__":
    raise SystemExit(main())
