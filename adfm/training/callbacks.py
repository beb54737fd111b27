"""Trainer callback: a progress bar, and the metrics of every step for MLflow."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from adfm.process.progress import bar
from adfm.training.outbox import Outbox

# MLflow sorts charts by name, a section for each prefix before `/`, capital letters first, those without prefix last.
_FIRST = {name: f"Overview/{name}" for name in ("balanced_accuracy", "reward", "utilisation")}
# `epoch` repeats the step, and `frac_reward_zero_std` is 1 - utilisation. Clip ratios are 0: the weights do not change
# between the sampling of a batch and the one step on it.
_NOT_IN_MLFLOW = ("epoch", "frac_reward_zero_std", "clip_ratio/")


def mlflow_metrics(logs: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite metrics of a step under their names in MLflow, the most important in the section `Overview`."""
    return {
        _FIRST.get(name, name): float(value)
        for name, value in logs.items()
        if isinstance(value, int | float) and math.isfinite(value) and not name.startswith(_NOT_IN_MLFLOW)
    }


class MetricsCallback(TrainerCallback):
    """Show a progress bar with some `metrics`, and send all to MLflow; only the first process has an `outbox`."""

    def __init__(self, description: str, metrics: Sequence[str], outbox: Outbox | None) -> None:
        self._description, self._metrics, self._outbox = description, metrics, outbox

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the bar at the step that training resumes from."""
        total, done, hidden = state.max_steps, state.global_step, not state.is_world_process_zero
        self._bar = bar(total=total, initial=done, desc=self._description, unit="step", disable=hidden)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        """Show and send the metrics of a step."""
        if self._outbox and logs and "loss" in logs:
            self._outbox.add(mlflow_metrics(logs), state.global_step)
            labels = {name: name.removesuffix("/mean").rsplit("/", 1)[-1] for name in self._metrics if name in logs}
            self._bar.set_postfix({label: f"{logs[name]:.3f}" for name, label in labels.items()}, refresh=False)
            self._bar.update(state.global_step - self._bar.n)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the bar."""
        self._bar.close()
