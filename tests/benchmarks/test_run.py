"""Benchmarks run at toy size, also those for GPUs without one, and print the figures they are for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks"


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, str(FOLDER / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)


def test_a_step_is_divided_into_its_parts_with_their_seconds_and_memory() -> None:
    small = ["train.prompts_per_step=2", "train.max_completion_length=4"]
    done = run("gpu_step.py", "--only", "published", "Liger", *(f"--set={setting}" for setting in small))
    assert done.returncode == 0, done.stderr
    assert "toy size: no GPU, no timing" in done.stdout
    for who in ("adfm", "TRL"):
        figures = re.search(
            rf"published, {who}: (\S+) s a step, (\S+) generated tokens/s, (\S+) GiB at most", done.stdout
        )
        assert figures and all(float(value) > 0 for value in figures.groups())
    found = re.findall(r"^  (\w[\w ]+?) +(\S+) s +(\S+) GiB$", done.stdout, re.MULTILINE)
    parts = [
        "reading images",
        "image processor",
        "generation",
        "reference pass",
        "scoring",
        "forward",
        "backward",
        "rest",
    ]
    assert sorted(part for part, *_ in found) == sorted(2 * parts)
    assert all(float(memory) > 0 for part, _, memory in found if part != "rest")
    assert re.search(r"ratio of the steps, adfm to TRL: \d", done.stdout)
    assert "Liger: not run: train.liger=true needs a GPU" in done.stdout


def test_images_are_the_same_and_looked_at_once() -> None:
    done = run("images.py", "--images=2", "--group=2", "--micro-batch=2", "--sides=64")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("inputs that differ: none of") == 2
    for who, decoded, processed in (("TRL", 8, 8), ("adfm", 2, 2)):
        pattern = rf"64 px {who} *: step s \S+, images decoded {decoded}, .*images processed {processed}, "
        assert len(re.findall(pattern, done.stdout)) == 2, done.stdout


def test_evaluation_is_measured_beside_one_image_at_a_time(small_shards: Path) -> None:
    done = run("evaluate.py", "embedded://tiny-base", str(small_shards))
    assert re.search(r"one by one +\S+ images/s", done.stdout), done.stderr
    assert re.search(r"evaluation +\S+ images/s", done.stdout)
    assert "answers that differ: 0 of" in done.stdout


def test_the_guard_refuses_spoilt_images_and_lets_good_ones_through(small_shards: Path) -> None:
    done = run("guard.py", str(small_shards))
    assert done.returncode == 0, done.stdout + done.stderr
    shares = dict(re.findall(r"^(\S.*?\S) {2,}(\d+\.\d)$", done.stdout, re.MULTILINE))
    assert float(shares["as they are"]) <= 1
    assert float(shares["noise"]) == float(shares["4 times as large"]) == 100
    assert float(shares["blurred by 4 %"]) > 90
