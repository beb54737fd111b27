"""What a model learns from a data set, beside the reference detector: one run of the pipeline for each seed.

python benchmarks/photographs.py data/raw/magnetic-tile work              # the tables of docs/evidence.md
python benchmarks/photographs.py data/raw/neu work --set sft.kinds=true

The seed also decides how the images are divided, where the data set does not fix it. Each run converts, trains the
cold start, GRPO and the detector, and lets all three answer the test split. A run that is finished is not done again.

- as written: by the letter of the response; for the detector by its own threshold.
- by score: by a threshold fitted on the validation split (`metrics.best_threshold`).
- IoU: of the boxes of the response, mean over defective images with boxes; nothing boxed counts 0.
- kind: defective images of a known kind answered defective with this kind.

Mean and 95 % interval over the seeds (Student's t). The first row, the cold start's answers to its own training images,
shows what is left for GRPO, which learns from the same images. A second table has GRPO's gain of each seed alone, with
the 95 % interval of a paired comparison of its two models on its test images (`metrics.difference`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adfm.data.conversion import convert
from adfm.evaluation import metrics, predictions, references
from adfm.files import replace_json
from adfm.params import Params, load
from adfm.training import detector, grpo
from adfm.training.sft import sft
from experiments.ablation import interval

COLUMNS = {
    "balanced_accuracy": "as written",
    "by_score": "by score",
    "auroc": "AUROC",
    "iou": "IoU",
    "kind_right": "kind",
}
ENDS = ("", "_low", "_high")
TRAIN = "cold start, training images"


def run(raw: Path, work: Path, params: Params) -> dict[str, dict[str, float | None]]:
    """The metrics of each model of one seed, on the test split."""
    shards, done = work / "shards", work / "result.json"
    if done.is_file():
        results: dict[str, dict[str, float | None]] = json.loads(done.read_text(encoding="utf-8"))
        return results
    if not shards.exists():
        convert(raw, shards, params)
    models = {"cold start": work / "sft", "trained": work / "trained", "detector": work / "detector"}
    if not models["cold start"].exists():
        sft(shards, models["cold start"], params)
    if not models["trained"].exists():
        grpo.train(shards, models["cold start"], models["trained"], params)
    if not models["detector"].exists():
        detector.train(shards, models["detector"], params)
    results, written, decided = {}, {}, {}
    for name, model in models.items():
        splits = ["validation", "test", *(["train"] if name == "cold start" else [])]
        tables = predictions.predict_splits(model, shards, params, name, splits, work / "answers")
        if name == "cold start":
            results[TRAIN] = metrics.values(tables["train"])
        written[name] = tables["test"]
        results[name] = metrics.values(written[name]) | {"by_score": None}
        if (scored := references.by_score(tables["test"], tables["validation"])) is not None:
            decided[name] = scored
            results[name]["by_score"] = metrics.values(scored)["balanced_accuracy"]
    results["gain"] = gain(written, params) | {f"by_score{end}": None for end in ENDS}
    if decided:
        by_score = gain(decided, params)
        results["gain"] |= {f"by_score{end}": by_score[f"balanced_accuracy{end}"] for end in ENDS}
    replace_json(results, done)
    return results


def gain(tables: dict[str, Any], params: Params) -> dict[str, float | None]:
    """What the trained model has more than the cold start on the same images, with limits."""
    return metrics.difference(tables["trained"], tables["cold start"], params.evaluate.bootstrap, params.seed)


def described(values: list[float | None], change: bool = False) -> str:
    """Mean and interval, as a cell of the table; empty where the metric is not defined."""
    if any(value is None for value in values):
        return ""
    return cell(interval(values), change)


def cell(numbers: Sequence[float], change: bool) -> str:
    """A figure and its limits: a change with its sign, a share within 0 and 1."""
    value, low, high = numbers
    sign, (least, most) = ("+", (-1, 1)) if change else ("", (0, 1))
    limits = f" [{max(low, least):{sign}.3f}, {min(high, most):{sign}.3f}]" if np.isfinite(low) else ""
    return f"{value:{sign}.3f}{limits}"


def table(runs: list[dict[str, Any]]) -> str:
    """The models as rows, what GRPO adds to the cold start over the seeds, and in each of them."""
    lines = [row("model", [*COLUMNS.values()]), "|---" * (len(COLUMNS) + 1) + "|"]
    for name in (TRAIN, "cold start", "trained", "detector"):
        lines.append(row(name, [described([each[name].get(key) for each in runs]) for key in COLUMNS]))
    gains = [[each["gain"].get(key) for each in runs] for key in COLUMNS]
    lines += [row("GRPO's gain", [described(each, change=True) for each in gains]), "", *lines[:2]]
    for seed, each in enumerate(runs):
        of_key = [[each["gain"].get(key + end) for end in ENDS] for key in COLUMNS]
        cells = ["" if None in numbers else cell(numbers, change=True) for numbers in of_key]
        lines.append(row(f"gain, seed {seed}", cells))
    return "\n".join(lines)


def row(name: str, cells: list[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    """Runs the seeds one after the other, and prints the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, help="folder of the data set, as `adfm convert` takes it")
    parser.add_argument("work", type=Path, help="folder for the runs")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="SECTION.KEY=VALUE")
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        params = load(args.params, [*args.changes, f"seed={seed}"])
        work = args.work / f"seed{seed}"
        work.mkdir(parents=True, exist_ok=True)
        runs.append(run(args.raw, work, params))
        print(f"\n{args.raw.name}, {len(runs)} of {args.seeds} seeds\n\n{table(runs)}\n", flush=True)


if __name__ == "__main__":
    main()
