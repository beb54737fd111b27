"""The ablation, with the embedded data and model at their smallest, and its figures against other ways to get them."""

from __future__ import annotations

import json
import multiprocessing
import time
from concurrent.futures import CancelledError, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from adfm.errors import AdfmError
from adfm.params import Params
from adfm.process.stopping import Terminated
from experiments import ablation
from experiments.__main__ import main
from tests.small import SMALL


def run(balanced_accuracy: float, iou: float, utilisation: float, curve: list[float]) -> dict[str, Any]:
    """The figures of a made-up run of 30 steps."""
    flat = [[10 * i, value] for i, value in enumerate(curve)]
    figures = {"balanced_accuracy": balanced_accuracy, "iou": iou, "utilisation": utilisation, "steps": 30}
    figures |= {"recall": balanced_accuracy, "specificity": balanced_accuracy}
    return figures | {
        "curve": [[step, value, iou] for step, value in flat],
        "curves": dict.fromkeys(ablation.METRICS, flat),
    }


def evidence(**balanced: float) -> dict[str, dict[int, dict[str, Any]]]:
    """Three seeds an arm, 0.01 apart."""
    return {
        arm: {seed: run(value + 0.01 * (seed - 1), value / 2, value, [0.5, 0.6, value, value]) for seed in range(3)}
        for arm, value in balanced.items()
    }


def test_the_interval_is_that_of_a_t_test() -> None:
    values = [0.71, 0.74, 0.78, 0.72]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert ablation.interval(values) == pytest.approx((np.mean(values), expected.low, expected.high))


def test_one_run_has_no_interval() -> None:
    assert ablation.interval([0.7]) == (0.7, -np.inf, np.inf)


def test_a_metric_that_no_run_has_is_left_out() -> None:
    runs = evidence(answer=0.5, paper=0.6, calibrated=0.8)
    for of_arm in runs.values():
        for figures in of_arm.values():
            figures["iou"] = None
            figures["curve"] = [[step, value, None] for step, value, _ in figures["curve"]]
    assert not any("IoU" in words for words, _ in ablation.claims(runs))
    assert "| 0.500, - |" in ablation.describe(runs, Params(), 9)


def test_what_was_found_and_what_was_not() -> None:
    found = ablation.claims(evidence(answer=0.52, paper=0.75, calibrated=0.74))
    assert [holds for _, holds in found] == [False, True, True, False, False, True]
    assert "utilisation" in found[0][0].lower() and "0.740" in found[0][0] and "0.520" in found[0][0]
    assert found[-1][0].endswith("it takes 10")
    assert [holds for _, holds in ablation.claims(evidence(answer=0.3, paper=0.7, calibrated=0.8))] == [True] * 6


def test_a_goal_that_is_never_reached_is_said() -> None:
    words, holds = ablation.claims(evidence(answer=0.9, calibrated=0.7))[-1]
    assert not holds and words.endswith("it does not reach it")


def test_one_seed_shows_nothing_apart() -> None:
    one = {arm: {0: runs[0]} for arm, runs in evidence(answer=0.5, calibrated=0.9).items()}
    assert not dict(ablation.claims(one))[next(words for words, _ in ablation.claims(one) if "apart" in words)]


def test_an_unknown_arm_is_named(small_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(AdfmError, match="no arm 'full'; there are: answer, stages, paper, calibrated, resample, doubt"):
        ablation.ablate(small_shards, tmp_path / "runs", tmp_path / "out", Params(), ["full"], 1, 1)
    with pytest.raises(AdfmError, match="0 is too few"):
        ablation.ablate(small_shards, tmp_path / "runs", tmp_path / "out", Params(), ["answer"], 1, 0)
    assert not (tmp_path / "runs").exists()


@pytest.mark.timeout(600)
def test_arms_are_trained_judged_and_kept(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    command = ["ablation", str(small_shards), "runs", "docs", "--arms", "answer", "calibrated", "--seeds", "1"]
    small = [*SMALL, "train.steps=10", "train.checkpoint_every=5"]
    settings = [part for setting in small for part in ("--set", setting)]

    assert main([*command, "--jobs", "2", *settings]) == 0
    report = json.loads(Path("docs/ablation.json").read_text())
    assert {arm: [*runs] for arm, runs in report.items()} == {"answer": ["0"], "calibrated": ["0"]}
    for arm, runs in report.items():
        figures = runs["0"]
        assert figures.keys() >= {*ablation.METRICS, "steps", "curve"} and figures["steps"] == 10
        assert [step for step, _, _ in figures["curve"]] == [0, 5, 10]
        assert figures["curve"][-1][1:] == [figures["balanced_accuracy"], figures["iou"]]
        asked = json.loads(Path(f"runs/{arm}-0/trained/adfm.json").read_text())["prompt"][1]["content"]
        assert ("<think>" in asked) == (arm == "calibrated")
    page = Path("docs/ablation.md").read_text()
    assert "| no stages, answer-only reward | 0 |" in page and "before GRPO" in page and "2 of 2 runs" in page
    assert Path("docs/ablation.png").stat().st_size > 10_000

    finished = {file: file.stat().st_mtime_ns for file in Path("runs").rglob("*") if file.is_file()}
    assert main([*command, *settings]) == 0
    assert finished == {file: file.stat().st_mtime_ns for file in Path("runs").rglob("*") if file.is_file()}

    assert main([*command, *settings, "--set", "train.beta=0.5"]) == 1
    assert "run with another train.beta" in capsys.readouterr().err


def test_sigterm_ends_the_runs_under_way_and_begins_no_others() -> None:
    spawn = multiprocessing.get_context("spawn")
    with (
        pytest.raises(Terminated),
        ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool,
        ablation._begins_no_more(pool),
    ):
        runs = [pool.submit(time.sleep, 600) for _ in range(4)]
        raise Terminated
    for run in runs:  # one by one: `concurrent.futures.wait` never returns a run that the pool cancelled
        with pytest.raises((BrokenProcessPool, CancelledError)):
            run.result(timeout=60)
