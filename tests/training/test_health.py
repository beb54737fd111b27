from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerControl, TrainerState

from adfm.errors import AdfmError
from adfm.method import prompt
from adfm.params import Health
from adfm.process.stopping import Stopped
from adfm.records import Box, Label
from adfm.training import checkpoints
from adfm.training.health import Completed, StopCallback, answer_metrics, find_problem, refuse_diverged

HEALTHY: dict[str, Any] = {
    "loss": 0.01, "grad_norm": 0.4, "reward": 1.5, "utilisation": 0.6, "kl": 0.1, "entropy": 0.4,
    "groups/all_right": 0.3, "groups/all_wrong": 0.2, "completions/clipped_ratio": 0.0,
    "answers/anomalous_share": 0.6, "answers/normal_share": 0.3, "images/anomalous_share": 0.5,
    "answers/region_overlap": 0.2, "images/region_overlap": 0.1,
}  # fmt: skip
ALIKE = {"utilisation": 0.0, "entropy": 0.001, "groups/all_right": 0.5, "groups/all_wrong": 0.5}
TROUBLES: dict[str, dict[str, float]] = {
    "completions are all alike": ALIKE,
    "raise train.max_completion_length": {"utilisation": 0.0, "completions/clipped_ratio": 1.0},
    "All answers were wrong": {"utilisation": 0.0, "groups/all_wrong": 1.0},
    "Raise train.num_generations": {"utilisation": 0.0},
    "raise train.beta": {"kl": 50.0},
    "mean reward stayed at 0": {"reward": 0.0},
    "Lower train.anomalous_share": {"answers/anomalous_share": 0.99},
    "Raise train.anomalous_share": {"answers/normal_share": 1.0},
    "places do not depend on the image": {"answers/region_overlap": 0.95},
}
PATIENCE = 6


def history(*steps: dict[str, float]) -> list[dict[str, Any]]:
    """A row a step; the mean reward of a healthy one moves."""
    return [
        {**HEALTHY, "step": number, "reward": 1.5 + 0.1 * (number % 3), **figures}
        for number, figures in enumerate(steps, 1)
    ]


@pytest.mark.parametrize("text", TROUBLES)
def test_a_lasting_problem_is_reported_with_a_remedy(text: str) -> None:
    rows = history(*[{}] * 4, *[TROUBLES[text]] * PATIENCE)
    problem = find_problem(rows, Health(patience=PATIENCE))
    assert problem is not None
    assert problem.began == 5
    assert problem.text.startswith("steps 5 to 10: ") and text in problem.text and "train." in problem.text
    assert find_problem(rows[:-1], Health(patience=PATIENCE)) is None
    assert find_problem(rows, Health(patience=0)) is None


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_a_number_is_reported_at_once(name: str, value: float) -> None:
    problem = find_problem(history({}, {}, {name: value}), Health(patience=0))
    assert problem is not None and problem.began == 3
    assert f"step 3: {name} is" in problem.text and "train.learning_rate" in problem.text


def test_where_all_answers_are_right_nothing_is_wrong() -> None:
    solved = {"utilisation": 0.0, "groups/all_right": 1.0, "reward": 3.0}
    assert find_problem(history(*[solved] * 50), Health(patience=PATIENCE)) is None


BLIND = {"answers/anomalous_share": 1.0, "answers/region_overlap": 1.0}


@pytest.mark.parametrize(
    "harmless",
    [
        {"answers/anomalous_share": 1.0, "images/anomalous_share": 1.0},  # no normal image
        {"answers/anomalous_share": 1.0, "images/anomalous_share": 0.95},
        {"answers/normal_share": 1.0, "images/anomalous_share": 0.0},
        {"answers/normal_share": 1.0, "images/anomalous_share": 0.05},
        {"answers/anomalous_share": 0.97},
        {"answers/region_overlap": 0.95, "images/region_overlap": 0.6},  # all defects are at one place
        {"answers/region_overlap": 1.0, "images/region_overlap": 1.0},
    ],
)
def test_answers_that_are_alike_because_the_images_are_do_not_stop_a_training(harmless: dict[str, float]) -> None:
    assert find_problem(history(*[harmless] * 50), Health(patience=PATIENCE)) is None


def test_each_check_of_blind_answers_can_be_switched_off() -> None:
    for name, off in ({"min_other_letter": 0.0}, "places"), ({"max_region_overlap": 1.0}, "letter"):
        problem = find_problem(history(*[BLIND] * PATIENCE), Health(patience=PATIENCE, **name))
        assert problem is not None and f"{off} do" in problem.text.replace("does", "do")
    off_both = Health(patience=PATIENCE, min_other_letter=0.0, max_region_overlap=1.0)
    assert find_problem(history(*[BLIND] * 50), off_both) is None


def test_one_step_with_other_answers_is_enough_to_continue() -> None:
    rows = history(*[BLIND] * (PATIENCE - 1), {}, *[BLIND] * (PATIENCE - 1))
    assert find_problem(rows, Health(patience=PATIENCE)) is None


def test_steps_with_one_defect_or_none_prove_nothing_about_boxes() -> None:
    rows = history(*[{"answers/region_overlap": 1.0}] * PATIENCE)
    for row in rows[: PATIENCE // 2 + 1]:
        del row["answers/region_overlap"], row["images/region_overlap"]
    assert find_problem(rows, Health(patience=PATIENCE)) is None


def test_without_a_reference_model_there_is_no_kl_to_blow_up() -> None:
    rows = [{name: value for name, value in row.items() if name != "kl"} for row in history(*[{}] * 50)]
    assert find_problem(rows, Health(patience=PATIENCE)) is None


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
def test_metrics_within_the_bounds_stop_nothing_while_rewards_move(
    steps: list[dict[str, float]], patience: int
) -> None:
    moving = [{**row, "reward": row["reward"] + number % 2 * 5} for number, row in enumerate(steps)]
    if patience != 1:  # of one step alone no reward can move
        assert find_problem(history(*moving), Health(patience=patience)) is None


@settings(deadline=None)
@given(st.lists(st.sampled_from([*TROUBLES.values(), {}]), max_size=40), st.integers(2, 8))
def test_a_problem_needs_a_whole_window_of_bad_steps(steps: list[dict[str, float]], patience: int) -> None:
    problem = find_problem(history(*steps), Health(patience=patience))
    if problem:
        assert problem.began == len(steps) - patience + 1
        assert all(steps[-patience:])


# From completions to the diagnosis.

REGIONS = [Box(50 * k, 40 * (k % 3), 50 * k + 60, 40 * (k % 3) + 50) for k in range(8)]
BOTH: list[tuple[Label, list[Box]]] = [("normal", []), *(("anomalous", [box]) for box in REGIONS[:3]), ("normal", [])]
TWO: list[tuple[Label, list[Box]]] = [("anomalous", REGIONS[:1]), ("normal", [])]
NO_NORMAL: list[tuple[Label, list[Box]]] = [("anomalous", [box, box._replace(y1=300, y2=340)]) for box in REGIONS[:5]]
NO_BOXES: list[tuple[Label, list[Box]]] = [("anomalous", []), ("normal", [])] * 3
Images = list[tuple[Label, list[Box]]]
Policy = Callable[[Label, list[Box]], str]


def diagnosed(images: Images, policy: Policy, group: int = 2) -> str | None:
    """The diagnosis of a training in which each step has these images, and `policy` answers them."""
    completed = [
        Completed(label, [list(box) for box in boxes], [504, 504], policy(label, boxes))
        for label, boxes in images
        for _ in range(group)
    ]
    figures = answer_metrics(completed, group)
    others = {name: value for name, value in HEALTHY.items() if not name.startswith(("answers/", "images/"))}
    rows = [{**others, **figures, "step": number, "reward": number} for number in range(1, PATIENCE + 1)]
    problem = find_problem(rows, Health(patience=PATIENCE))
    return problem and problem.text


def constant(letter: Label, *boxes: Box) -> Policy:
    return lambda label, truth: prompt.target_completion(letter, boxes)


def right(label: Label, boxes: list[Box]) -> str:
    return prompt.target_completion(label, boxes)


@pytest.mark.parametrize("images", [BOTH, TWO, NO_BOXES])
def test_one_letter_on_images_of_both_labels_is_diagnosed(images: Images) -> None:
    for letter, change in ("anomalous", "Lower"), ("normal", "Raise"):
        for boxes in ((), REGIONS[:1]):
            text = diagnosed(images, constant(letter, *boxes))
            assert text is not None and f"{change} train.anomalous_share" in text
        plain = diagnosed(
            images, lambda label, boxes, letter=letter: prompt.target_completion(letter, [], stages=False)
        )
        assert plain == diagnosed(images, constant(letter))


@pytest.mark.parametrize("boxes", [[REGIONS[0]], [Box(0, 0, 504, 504)], REGIONS[:3]])
@pytest.mark.parametrize("images", [BOTH, NO_NORMAL])
def test_the_same_boxes_on_images_with_different_defects_are_diagnosed(images: Images, boxes: list[Box]) -> None:
    text = diagnosed(images, lambda label, truth: prompt.target_completion(label, boxes))
    assert text is not None and "places do not depend on the image" in text


@pytest.mark.parametrize("images", [BOTH, TWO, NO_NORMAL, NO_BOXES, [("anomalous", REGIONS[:1])] * 4])
@pytest.mark.parametrize("stages", [True, False])
def test_right_answers_are_not_diagnosed(images: Images, stages: bool) -> None:
    assert diagnosed(images, lambda label, boxes: prompt.target_completion(label, boxes, stages=stages)) is None
    assert diagnosed(images[::-1], right, group=1) is None


def test_answers_without_a_letter_are_left_to_the_other_checks() -> None:
    assert diagnosed(BOTH, lambda label, boxes: "<think>Even.</think>") is None
    mostly = iter([*["<think>Even.</think>"] * 9, "<answer>A</answer>"])
    assert diagnosed(BOTH, lambda label, boxes: next(mostly)) is None


def test_metrics_of_constructed_answers() -> None:
    half, frames = Box(0, 0, 50, 100), ([100, 100], [200, 400])
    completed = [
        Completed("anomalous", [[0, 0, 50, 100]], frames[0], prompt.target_completion("anomalous", [])),
        Completed("anomalous", [[0, 0, 50, 100]], frames[0], prompt.target_completion("anomalous", [half])),
        Completed("anomalous", [[0, 0, 200, 400]], frames[1], prompt.target_completion("normal", [Box(0, 0, 50, 400)])),
        Completed("anomalous", [[0, 0, 200, 400]], frames[1], "cut"),
        Completed("normal", [], frames[0], prompt.target_completion("normal", [half])),
        Completed("normal", [], frames[0], prompt.target_completion("normal", [])),
    ]
    assert answer_metrics(completed, 2) == pytest.approx(
        {
            "answers/anomalous_share": 2 / 6,
            "answers/normal_share": 3 / 6,
            "images/anomalous_share": 2 / 3,
            "balanced_accuracy": (2 / 4 + 2 / 2) / 2,
            "answers/region_overlap": 0.5,
            "images/region_overlap": 0.5,
        }
    )
    assert "answers/region_overlap" not in answer_metrics(completed[2:], 2)


@settings(deadline=None)
@given(
    st.lists(
        st.builds(
            Completed,
            st.sampled_from(["normal", "anomalous"]),
            st.lists(st.sampled_from([list(box) for box in REGIONS]), max_size=3),
            st.just([504, 504]),
            st.one_of(
                st.text(),
                st.lists(st.sampled_from(REGIONS)).map(lambda boxes: prompt.target_completion("anomalous", boxes)),
            ),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_metrics_of_any_answers_are_shares(completed: list[Completed]) -> None:
    assert all(0 <= value <= 1 for value in answer_metrics(completed, 1).values())


def test_a_degenerate_completion_takes_no_longer() -> None:
    boxes = "[1, 1, 9, 9]" * 20_000
    many = Completed("anomalous", [[1, 1, 9, 9]], [504, 504], f"<think>{boxes}</think><answer>A</answer>")
    start = time.process_time()
    assert answer_metrics([many] * 6, 1)["answers/region_overlap"] == 1
    assert time.process_time() - start < 5  # compared with each other, they would take hours


def stopped_by(settings: Health, terminated: bool = False, **last: float) -> tuple[StopCallback, TrainerControl]:
    """A callback after nine healthy steps of twenty and a tenth."""
    event = threading.Event()
    if terminated:
        event.set()
    made, control = StopCallback(settings, event), TrainerControl(should_save=True)
    history = [{"step": step, "loss": 0.1, "reward": float(step)} for step in range(1, 10)]
    state = TrainerState(global_step=10, max_steps=20, log_history=[*history, {"step": 10, "loss": 0.1, **last}])
    args: Any = SimpleNamespace(device="cpu")
    made.on_log(args, state, control, {"loss": 0.1})
    return made, control


def test_a_healthy_step_is_left_alone() -> None:
    made, control = stopped_by(Health())
    assert not made.stopped and not control.should_training_stop and control.should_save


def test_sigterm_stops_a_training_with_a_checkpoint(tmp_path: Path) -> None:
    made, control = stopped_by(Health(), terminated=True)
    assert made.stopped and control.should_training_stop and control.should_save
    error = made.error(tmp_path, 10, 20, first=True)
    assert isinstance(error, Stopped) and error.exit_code == 75


def test_training_never_resumes_from_weights_that_are_not_numbers(tmp_path: Path) -> None:
    made, control = stopped_by(Health(), terminated=True, loss=float("nan"))
    assert made.stopped and control.should_training_stop and not control.should_save
    for step in (7, 8, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    error = made.error(tmp_path, 10, 20, first=True)
    assert "step 10: loss is nan" in str(error) and f"last good checkpoint is {tmp_path}/checkpoint-8." in str(error)
    assert error.exit_code == 1
    assert checkpoints.every(tmp_path) == [7, 8]


def test_a_diverged_training_resumes_only_with_other_bounds(tmp_path: Path) -> None:
    made, _ = stopped_by(Health(patience=0), loss=float("inf"))
    made.error(tmp_path, 10, 20, first=True)
    with pytest.raises(AdfmError, match=r"(?s)loss is inf.*Nothing has changed since"):
        refuse_diverged(tmp_path, Health(patience=0))
    refuse_diverged(tmp_path, Health(patience=3))
    refuse_diverged(tmp_path, Health(patience=0))
