"""The plant that benchmarks/gate_errors.py simulates has the rates that it claims, and its parts run."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "gate_errors.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gate_errors", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gate_errors"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_models_have_their_true_rates_and_disagree_as_often_as_claimed(benchmark: ModuleType) -> None:
    random, production = np.random.default_rng(0), benchmark.PRODUCTION
    better = benchmark.Truth(0.95, 0.92, 0.50, fallen=0.26)
    rights, disagreed = [], []
    for _ in range(60):
        plant = benchmark.Plant(random)
        before = plant.model(production)
        same, other = plant.successor(before, production), plant.successor(before, better)
        disagreed.append(np.mean(before.right != same.right))
        fallen, anomalous = plant.category == 0, plant.anomalous
        rights.append(
            [
                same.right[anomalous].mean(),
                same.right[~anomalous].mean(),
                other.right[anomalous & ~fallen].mean(),
                other.right[fallen & ~anomalous].mean(),
                np.nanmean(plant.table(same)["iou"]),
            ]
        )
    assert np.mean(rights, axis=0) == pytest.approx([0.90, 0.85, 0.95, 0.66, 0.45], abs=0.01)
    assert np.mean(disagreed) == pytest.approx(0.12, abs=0.01)


def test_scenarios_at_a_margin_lose_just_that(benchmark: ModuleType) -> None:
    titles = [scenario.title for scenario in benchmark.scenarios()]
    assert len(set(titles)) == len(titles)
    truths = {
        scenario.title.split(" worse")[0]: scenario.trial.args[1]
        for scenario in benchmark.scenarios()
        if "worse by the margin" in scenario.title
    }
    before = benchmark.PRODUCTION
    assert before.recall - truths["escapes"].recall == pytest.approx(0.05)
    assert before.specificity - truths["overkill"].specificity == pytest.approx(0.05)
    assert before.iou_of_all - truths["IoU"].iou_of_all == pytest.approx(0.05)
    assert truths["escapes"].iou_of_all > before.iou_of_all


def test_a_trial_of_each_kind_is_decided(benchmark: ModuleType) -> None:
    random = np.random.default_rng(0)
    by_title = {scenario.title: scenario for scenario in benchmark.scenarios()}
    assert by_title["better by 3 points, look 1"].trial(random)
    assert not by_title["recall -10 points, specificity +14, IoU as before"].trial(random)
    assert not by_title["accuracy at the limit, no production, level 0.05"].trial(random)
    assert not by_title["one of 5 categories (320 images) 30 points worse, the others better"].trial(random)
    (descent,) = (title for title in by_title if title.endswith("no anchor: the margin is lost"))
    assert by_title[descent].trial(random)


def test_tables_of_limits_and_images_are_printed(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--images"]) == 0
    assert "| 5 points, 12% | 319 / 438 | 481 / 624 |" in capsys.readouterr().out
    assert benchmark.main(["--limits", "--runs=3"]) == 0
    rows = re.findall(r"^\| (.+): (.+) \| [\d.]+% \| [\d.]+% \|$", capsys.readouterr().out, re.MULTILINE)
    assert {"ours", "Tango", "Korn-Graubard", "t with a pseudo pair", "Clopper-Pearson"} == {name for _, name in rows}
