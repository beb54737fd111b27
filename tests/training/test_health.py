from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adfm.params import Health
from adfm.training.health import diagnose

HEALTHY: dict[str, Any] = {
    "loss": 0.01, "grad_norm": 0.4, "reward": 1.5, "utilisation": 0.6, "kl": 0.1, "entropy": 0.4,
    "groups/all_right": 0.3, "groups/all_wrong": 0.2, "completions/clipped_ratio": 0.0,
}  # fmt: skip
ALIKE = {"utilisation": 0.0, "entropy": 0.001, "groups/all_right": 0.5, "groups/all_wrong": 0.5}
TROUBLES: dict[str, dict[str, float]] = {
    "completions are all alike": ALIKE,
    "raise train.max_completion_length": {"utilisation": 0.0, "completions/clipped_ratio": 1.0},
    "All answers were wrong": {"utilisation": 0.0, "groups/all_wrong": 1.0},
    "Raise train.num_generations": {"utilisation": 0.0},
    "raise train.beta": {"kl": 50.0},
    "mean reward stayed at 0": {"reward": 0.0},
}
PATIENCE = 6


def history(*steps: dict[str, float]) -> list[dict[str, Any]]:
    """A row a step; the mean reward of a healthy one moves."""
    return [
        {**HEALTHY, "step": number, "reward": 1.5 + 0.1 * (number % 3), **figures}
        for number, figures in enumerate(steps, 1)
    ]


@pytest.mark.parametrize("said", TROUBLES)
def test_a_trouble_that_lasts_is_told_in_words(said: str) -> None:
    rows = history(*[{}] * 4, *[TROUBLES[said]] * PATIENCE)
    found = diagnose(rows, Health(patience=PATIENCE))
    assert found is not None
    assert found.began == 5
    assert found.text.startswith("steps 5 to 10: ") and said in found.text and "train." in found.text
    assert diagnose(rows[:-1], Health(patience=PATIENCE)) is None
    assert diagnose(rows, Health(patience=0)) is None


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_a_number_is_told_at_once_and_always(name: str, value: float) -> None:
    found = diagnose(history({}, {}, {name: value}), Health(patience=0))
    assert found is not None and found.began == 3
    assert f"step 3: {name} is" in found.text and "train.learning_rate" in found.text


def test_where_all_answers_are_right_nothing_is_wrong() -> None:
    solved = {"utilisation": 0.0, "groups/all_right": 1.0, "reward": 3.0}
    assert diagnose(history(*[solved] * 50), Health(patience=PATIENCE)) is None


def test_without_a_reference_model_there_is_no_kl_to_blow_up() -> None:
    rows = [{name: value for name, value in row.items() if name != "kl"} for row in history(*[{}] * 50)]
    assert diagnose(rows, Health(patience=PATIENCE)) is None


figures = st.fixed_dictionaries(
    {
        "utilisation": st.floats(0.02, 1),
        "kl": st.floats(0, 4.9),
        "reward": st.floats(0, 3),
        "entropy": st.floats(0, 3),
        "groups/all_wrong": st.floats(0, 1),
    }
)


@settings(deadline=None)
@given(st.lists(figures, min_size=1, max_size=60), st.integers(0, 10))
def test_figures_within_the_bounds_stop_nothing_while_rewards_move(
    steps: list[dict[str, float]], patience: int
) -> None:
    moving = [{**row, "reward": row["reward"] + number % 2 * 5} for number, row in enumerate(steps)]
    if patience != 1:  # of one step alone no reward can move
        assert diagnose(history(*moving), Health(patience=patience)) is None


@settings(deadline=None)
@given(st.lists(st.sampled_from([*TROUBLES.values(), {}]), max_size=40), st.integers(2, 8))
def test_a_diagnosis_needs_a_whole_window_of_bad_steps(steps: list[dict[str, float]], patience: int) -> None:
    found = diagnose(history(*steps), Health(patience=patience))
    if found:
        assert found.began == len(steps) - patience + 1
        assert all(steps[-patience:])
