from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from adfm.errors import AdfmError
from adfm.params import Health
from adfm.process.stopping import Stopped
from adfm.training import checkpoints, guard


def look(settings: Health, told: bool = False, **last: float) -> tuple[guard.Guard, TrainerControl]:
    """A guard that has seen nine healthy steps of twenty and a tenth."""
    event = threading.Event()
    if told:
        event.set()
    made, control = guard.Guard(settings, event), TrainerControl(should_save=True)
    history = [{"step": step, "loss": 0.1, "reward": float(step)} for step in range(1, 10)]
    state = TrainerState(global_step=10, max_steps=20, log_history=[*history, {"step": 10, "loss": 0.1, **last}])
    args: Any = SimpleNamespace(device="cpu")
    made.on_log(args, state, control, {"loss": 0.1})
    return made, control


def test_a_healthy_step_is_left_alone() -> None:
    made, control = look(Health())
    assert not made.stopped and not control.should_training_stop and control.should_save


def test_what_is_told_to_stop_stops_with_a_checkpoint(tmp_path: Path) -> None:
    made, control = look(Health(), told=True)
    assert made.stopped and control.should_training_stop and control.should_save
    error = made.error(tmp_path, 10, 20, first=True)
    assert isinstance(error, Stopped) and error.exit_code == 75


def test_weights_that_are_not_numbers_are_never_gone_on_from(tmp_path: Path) -> None:
    made, control = look(Health(), told=True, loss=float("nan"))
    assert made.stopped and control.should_training_stop and not control.should_save
    for step in (7, 8, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    error = made.error(tmp_path, 10, 20, first=True)
    assert "step 10: loss is nan" in str(error) and f"last good checkpoint is {tmp_path}/checkpoint-8." in str(error)
    assert error.exit_code == 1
    assert checkpoints.every(tmp_path) == [7, 8]


def test_what_was_stopped_goes_on_only_with_other_bounds(tmp_path: Path) -> None:
    made, _ = look(Health(patience=0), loss=float("inf"))
    made.error(tmp_path, 10, 20, first=True)
    with pytest.raises(AdfmError, match=r"(?s)loss is inf.*Nothing has changed since"):
        guard.refuse_the_same(tmp_path, Health(patience=0))
    guard.refuse_the_same(tmp_path, Health(patience=3))
    guard.refuse_the_same(tmp_path, Health(patience=0))
