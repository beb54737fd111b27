"""What a model learns from a data set, beside the reference detector: one run of the pipeline for each seed.

python benchmarks/photographs.py data/raw/magnetic-tile work              # the tables of docs/evidence.md
python benchmarks/photographs.py data/raw/neu work --set warmup.kinds=true

The seed also decides how the images are divided, where the data set does not fix it. Each run converts, trains the
warm-up, GRPO and the detector, and lets all three answer the test split. A run that is finished is not done again.

- as written: by the letter of the response; for the detector by its own threshold.
- by score: by the threshold of the best balanced accuracy on the validation split.
- IoU: of the boxes of the response, mean over defective images with boxes; nothing boxed counts 0.
- kind: defective images of a known kind answered defective with this kind.

Mean and 95 % interval over the seeds (Student's t).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from adfm.ablation import interval
from adfm.data.conversion import convert
from adfm.evaluation import inference, metrics, references
from adfm.files import replace_json
from adfm.params import Params, load
from adfm.training import detector, grpo
from adfm.training.warmup import warmup

COLUMNS = {
    "balanced_accuracy": "as written",
    "by_score": "by score",
    "auroc": "AUROC",
    "iou": "IoU",
    "kind_right": "kind",
}


def run(raw: Path, work: Path, params: Params) -> dict[str, dict[str, float | None]]:
    """The metrics of each model of one seed, on the test split."""
    shards, done = work / "shards", work / "result.json"
    if done.is_file():
        results: dict[str, dict[str, float | None]] = json.loads(done.read_text(encoding="utf-8"))
        return results
    if not shards.exists():
        convert(raw, shards, params)
    models = {"warm-up": work / "warmup", "trained": work / "trained", "detector": work / "detector"}
    if not models["warm-up"].exists():
        warmup(shards, models["warm-up"], params)
    if not models["trained"].exists():
        grpo.train(shards, models["warm-up"], models["trained"], params)
    if not models["detector"].exists():
        detector.train(shards, models["detector"], params)
    results = {}
    for name, model in models.items():
        tables = inference.predict_splits(model, shards, params, name, ["validation", "test"], work / "answers")
        results[name] = metrics.values(tables["test"])
        decided = references.by_score(tables["test"], tables["validation"])
        results[name]["by_score"] = None if decided is None else metrics.values(decided)["balanced_accuracy"]
    replace_json(results, done)
    return results


def described(values: list[float | None]) -> str:
    """Mean and interval, as a cell of the table; empty where the metric is not defined."""
    if any(value is None for value in values):
        return ""
    mean, low, high = interval(values)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]" if np.isfinite(low) else f"{mean:.3f}"


def table(runs: list[dict[str, Any]]) -> str:
    """The models as rows, and what GRPO adds to the warm-up."""
    lines = ["| model | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    rows = {name: [[each[name].get(key) for each in runs] for key in COLUMNS] for name in runs[0]}
    rows["GRPO's gain"] = [
        [None if after is None else after - before for before, after in zip(*pair, strict=True)]
        for pair in zip(rows["warm-up"], rows["trained"], strict=True)
    ]
    lines += [f"| {name} | " + " | ".join(map(described, cells)) + " |" for name, cells in rows.items()]
    return "\n".join(lines)


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
