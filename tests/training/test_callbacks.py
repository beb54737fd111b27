from __future__ import annotations

import math

from adfm.training.callbacks import mlflow_metrics


def test_mlflow_has_the_first_charts_in_a_section_of_their_own_and_no_metric_twice() -> None:
    logs = {
        "balanced_accuracy": 0.75,
        "clip_ratio/low_mean": 0.0,
        "epoch": 0.5,
        "frac_reward_zero_std": 0.25,
        "kl": math.nan,
        "loss": 0.5,
        "reward": 2,
        "rewards/format/mean": 1.0,
        "utilisation": 0.75,
        "utilisation/format": 0.25,
    }
    metrics = mlflow_metrics(logs)
    assert metrics == {
        "Overview/balanced_accuracy": 0.75,
        "Overview/reward": 2.0,
        "Overview/utilisation": 0.75,
        "loss": 0.5,
        "rewards/format/mean": 1.0,
        "utilisation/format": 0.25,
    }
    # The order in which MLflow draws them; those without a prefix come last.
    first = ["Overview/balanced_accuracy", "Overview/reward", "Overview/utilisation"]
    assert sorted(name for name in metrics if "/" in name)[:3] == first
