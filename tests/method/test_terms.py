"""A term that is added to the reward appears wherever the others do."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from adfm.method.terms import MEANS, WEIGHTS, Terms
from adfm.params import Params

ROOT = Path(__file__).parents[2]
TRAIN = """
import json, sys
from pathlib import Path
from adfm.kubeflow import tasks
from adfm.params import load
from adfm.training import grpo
from adfm.training.sft import sft

shards, out = map(Path, sys.argv[1:3])
params = load(None, sys.argv[3:])
sft(shards, out / "sft", params)
grpo.train(shards, out / "sft", out / "trained", params)
(out / "seen.json").write_text(json.dumps([params.train.weights.model_dump(), tasks.TRAINING_FIRST]))
"""


def replaced(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


def test_a_new_term_is_one_function_and_its_name(small_shards: Path, empty_database: Path, tmp_path: Path) -> None:
    """In a copy of the package, as a person would add it; then one step of GRPO."""
    shutil.copytree(ROOT / "adfm", tmp_path / "code" / "adfm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(empty_database, tmp_path)
    method = tmp_path / "code" / "adfm" / "method"
    replaced(method / "terms.py", "    localization: float\n", "    localization: float\n    brevity: float = 0.0\n")
    located = "        _localization(response, label, boxes, frame) if located else 0.0,\n"
    replaced(method / "rewards.py", located, f"{located}        _brevity(completion),\n")
    with (method / "rewards.py").open("a") as rewards:
        rewards.write("\n\ndef _brevity(completion: str) -> float:\n    return 1 / (1 + len(completion))\n")
    fast = ["sft.steps=0", "train.steps=1", "train.prompts_per_step=1", "train.num_generations=2"]
    fast += ["train.max_completion_length=16", "train.pictures_every=0"]
    subprocess.run(
        [sys.executable, "-c", TRAIN, small_shards, tmp_path, *fast, "train.weights.brevity=2.0"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "code")},
        check=True,
    )
    weights, first = json.loads((tmp_path / "seen.json").read_text())
    assert weights["brevity"] == 2 and "rewards/brevity/mean" in first
    [curves] = csv.DictReader((tmp_path / "trained" / "reward_curves.csv").read_text().splitlines())
    assert "utilisation/brevity" in curves and float(curves["rewards/brevity/mean"]) > 0
    terms = [name for name in weights if name != "kind"]  # no kinds are asked for
    total = sum(weights[term] * float(curves[f"rewards/{term}/mean"]) for term in terms)
    assert float(curves["reward"]) == pytest.approx(total, abs=1e-4)


def test_dvc_plots_every_term() -> None:
    plots = yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"]
    curves = [next(iter(plot.values())) for plot in plots if isinstance(plot, dict)]
    columns = [curve["y"].get("models/trained/reward_curves.csv") for curve in curves if "smoothed" in str(curve)]
    assert {"reward", *MEANS} <= set(columns)


def test_a_term_counts_by_its_default_weight() -> None:
    terms = Terms(0.5, 0.25, 0.125)
    assert terms.total == 0.875 and terms.weighted(Terms(2, 0, 4)) == 1.5
    weights = Params().train.weights.model_dump()
    assert {term: weights[term] for term in Terms._fields} == WEIGHTS._asdict()
