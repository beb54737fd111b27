"""What the local pipeline costs over its stages one by one, on the smallest settings, and how long compiling takes.

python benchmarks/pipeline.py

Prints the seconds of `adfm <verb>` for each stage in turn, of `python -m pipelines.training run`, which runs the same
stages and its own two tasks, and of `python -m pipelines.training compile`. Ends with status 1 if the pipeline takes 10
seconds more than the stages, or compiling more than 3.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
MOST_OVER, MOST_COMPILE = 10.0, 3.0
SMALL = {
    "fetch.source": "synthetic://?images=20",
    "validation.min_images_per_split": 2,
    "validation.min_label_share": 0,
    "sft.steps": 2,
    "sft.batch_size": 2,
    "train.steps": 2,
    "train.prompts_per_step": 2,
    "train.num_generations": 2,
    "train.max_completion_length": 48,
    "evaluate.max_new_tokens": 48,
    "evaluate.bootstrap": 50,
    "gate.bootstrap": 50,
    "gate.min_images": 10,
}
STAGES = (
    ("check",),
    ("fetch", SMALL["fetch.source"], "raw"),
    ("convert", "raw", "shards"),
    ("validate", "shards", "report"),
    ("sft", "shards", "warm"),
    ("train", "shards", "warm", "trained"),
    (
        "evaluate",
        "trained",
        "shards",
        "evaluation",
        "--compare",
        "base=embedded://tiny-base",
        "--compare",
        "sft=warm",
    ),
    ("register", "trained", "shards", "evaluation", "registration"),
)


def main() -> int:
    settings = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
    with TemporaryDirectory() as one, TemporaryDirectory() as other:
        stages = 0.0
        for verb, *arguments in STAGES:
            seconds = timed(one, "adfm", verb, *map(str, arguments), *settings)
            print(f"{verb}: {seconds:.1f} s", flush=True)
            stages += seconds
        pipeline = timed(other, "pipelines.training", "run", *settings)
        compiling = min(timed(other, "pipelines.training", "compile", "--out", "compiled") for _ in range(3))
    print(f"stages one by one: {stages:.1f} s")
    print(f"pipeline: {pipeline:.1f} s, {pipeline - stages:+.1f} s, {pipeline / stages:.2f} times")
    print(f"compiling: {compiling:.1f} s")
    return int(pipeline - stages > MOST_OVER or compiling > MOST_COMPILE)


def timed(folder: str, module: str, *arguments: str) -> float:
    """Seconds that a module takes as a program in a folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=folder, env=environment, capture_output=True)
    if done.returncode:
        raise SystemExit(done.stdout.decode() + done.stderr.decode())
    return time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main())
