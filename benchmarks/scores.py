"""How well each score (`evaluate.score`, `evaluate.samples`) ranks images and can be calibrated.

python benchmarks/scores.py MODEL SHARDS

For the score of the letter, of the branches, and of 8 sampled answers: AUROC on the test split, expected calibration
error after calibration on the validation split (as `adfm evaluate` does it), the share of scores within 1e-4 of 0 or 1,
and the time against that of the first.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
from transformers.utils import logging

from adfm.evaluation import calibration, metrics, predictions
from adfm.params import Params


def main(model: str, shards: Path) -> int:
    """Measures and prints."""
    logging.set_verbosity_error()
    print("| score | AUROC | calibration error | near 0 or 1 | time |\n|---|---|---|---|---|")
    alone = 0.0
    for score, settings in (("letter", {"score": "letter"}), ("branch", {}), ("8 samples", {"samples": 8})):
        params = Params.model_validate({"evaluate": settings})
        evaluate = params.evaluate
        start = time.perf_counter()
        tables = predictions.predict_splits(model, shards, params, score, ["validation", "test"])
        seconds = time.perf_counter() - start
        alone = alone or seconds
        fitted = calibration.fit(tables["validation"], evaluate)
        test = fitted.apply(tables["test"])
        overall = metrics.summarize(test, evaluate.bootstrap, params.seed, evaluate.small, evaluate.large)["overall"]
        raw = test["score"].dropna()
        certain = np.mean((raw < 1e-4) | (raw > 1 - 1e-4))
        cells = [
            " ".join([f"{overall[metric]:.3f}", f"[{overall[metric + '_low']:.3f}, {overall[metric + '_high']:.3f}]"])
            for metric in ("auroc", "ece")
        ]
        print(f"| {score} | {' | '.join(cells)} | {certain:.2f} | {seconds / alone:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
