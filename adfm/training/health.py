"""Is a training still worth its electricity? What its figures say when it is not, in words, and what to change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adfm.params import Health

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Diagnosis:
    """What went wrong.

    Args:
        began: The first step that showed it. The weights that this step started from are those of the step before, so
            the last checkpoint to trust is of two steps before.
        text: What was seen, over which steps, and which settings to change which way.
    """

    began: int
    text: str


def diagnose(history: Sequence[Figures], settings: Health) -> Diagnosis | None:
    """What is wrong with a training, if anything.

    A loss or gradient that is not a number is told at once. The rest has to be so at each of the last
    `settings.patience` steps, so that one step proves nothing; a patience of 0 looks for none of it.

    Args:
        history: A row of figures a step, in order, as TRL logs them; rows without `loss` are passed over.
        settings: `train.health`.
    """
    rows = [row for row in history if "loss" in row]
    if not rows:
        return None
    for name in ("loss", "grad_norm"):
        if not math.isfinite(rows[-1].get(name, 0.0)):
            return _not_a_number(rows, name)
    window = rows[-settings.patience :] if settings.patience else []
    if not window or len(window) < settings.patience:
        return None
    steps = f"steps {window[0]['step']} to {window[-1]['step']}"
    for looked_for in (_blown_up, _collapsed, _flat):
        found = looked_for(window, settings)
        if found:
            return Diagnosis(window[0]["step"], f"{steps}: {found}")
    return None


def _not_a_number(rows: Sequence[Figures], name: str) -> Diagnosis:
    step = rows[-1]["step"]
    norms = [row["grad_norm"] for row in rows[-6:-1] if math.isfinite(row.get("grad_norm", math.nan))]
    before = f" (the gradient norms before it: {', '.join(f'{norm:.3g}' for norm in norms)})" if norms else ""
    return Diagnosis(
        step,
        f"step {step}: {name} is {rows[-1][name]}{before}. Lower train.learning_rate to a third and "
        "train.max_grad_norm to 0.5; with model.dtype float16, take bfloat16, which does not overflow.",
    )


def _blown_up(window: Sequence[Figures], settings: Health) -> str | None:
    if not all(row.get("kl", 0.0) > settings.max_kl for row in window):
        return None
    return (
        f"the KL from the model that training started from stayed above {settings.max_kl:g} "
        f"(train.health.max_kl; it ended at {window[-1]['kl']:.3g}): the policy has run away. Lower "
        "train.learning_rate to a third, or raise train.beta (0.02 to 0.05)."
    )


def _collapsed(window: Sequence[Figures], settings: Health) -> str | None:
    shares = [row.get("utilisation", 1.0) for row in window]
    if max(shares) > settings.min_utilisation or _mean(window, "groups/all_right") > 0.99:
        return None  # where all answers are right there is nothing left to learn, and nothing is wrong
    return (
        f"at most {max(shares):.1%} of the groups of a step had completions that earned different rewards "
        f"(train.health.min_utilisation is {settings.min_utilisation:g}), and the others teach nothing. {_why(window)}"
    )


def _why(window: Sequence[Figures]) -> str:
    if _mean(window, "completions/clipped_ratio") > 0.5:
        return "Most completions were cut: raise train.max_completion_length."
    if _mean(window, "entropy", 1.0) < 0.05:
        return (
            f"The completions are all alike (entropy {_mean(window, 'entropy', 1.0):.2g} a token): the policy has "
            "collapsed. Raise train.temperature or train.beta, or lower train.learning_rate; begin from fewer "
            "warmup.steps, and see that all weights in train.weights are above 0."
        )
    if _mean(window, "groups/all_wrong") > 0.9:
        return (
            "All answers were wrong: see the pictures of completions in MLflow whether they have the form that the "
            "reward reads; more warmup.steps teach it."
        )
    return "Raise train.num_generations or train.temperature, and see that all weights in train.weights are above 0."


def _flat(window: Sequence[Figures], settings: Health) -> str | None:
    rewards = [row["reward"] for row in window if "reward" in row]
    if len(rewards) < len(window) or max(rewards) - min(rewards) >= settings.min_reward_range:
        return None
    if _mean(window, "groups/all_right") > 0.99:
        return None
    return (
        f"the mean reward stayed at {rewards[-1]:.4g} (within train.health.min_reward_range, "
        f"{settings.min_reward_range:g}) on ever new images: it does not depend on the answers. See the pictures of "
        "completions in MLflow whether they have the form that the reward reads; raise train.temperature, and "
        "warmup.steps if they have not."
    )


def _mean(window: Sequence[Figures], name: str, missing: float = 0.0) -> float:
    return math.fsum(row.get(name, missing) for row in window) / len(window)
