"""Ends a training early, in all its processes at the same step: when it is told to, and when it has gone wrong."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from adfm.errors import AdfmError
from adfm.files import write_json
from adfm.params import Health
from adfm.process.stopping import Stopped
from adfm.training import checkpoints, health

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

_DIAGNOSIS = "diagnosis.json"


class Guard(TrainerCallback):
    """Looks at every step: was the process told to stop, and are the figures those of a training that works?"""

    def __init__(self, settings: Health, told: threading.Event) -> None:
        self._settings, self._told = settings, told
        self._diagnosis: health.Diagnosis | None = None
        self.stopped = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Stop all processes if one was told to, after a checkpoint, or if the figures are bad, without one."""
        if "loss" not in (logs or {}):
            return
        self._diagnosis = health.diagnose(state.log_history, self._settings)
        told, ill = _any([self._told.is_set(), self._diagnosis is not None], args.device)
        if ill or (told and state.global_step < state.max_steps):
            self.stopped = control.should_training_stop = True
            control.should_save = not ill

    def error(self, work: Path, step: int, steps: int, first: bool) -> AdfmError:
        """Why the training stopped and how to go on; after bad figures only checkpoints from before them are left.

        Args:
            work: Folder of the checkpoints.
            step: The last step.
            steps: All that were to be done.
            first: Whether this is the first process, which alone touches the checkpoints.
        """
        if not first:
            return Stopped("stopped with the first process, which says why")
        if self._diagnosis is None:
            return Stopped(
                f"told to stop, after step {step} of {steps}; the same command goes on from {checkpoints.last(work)}"
            )
        good = checkpoints.drop_after(work, self._diagnosis.began - 2)
        kept = f"The last good checkpoint is {good}." if good else "There is no checkpoint from before it."
        text = (
            f"training was stopped. {self._diagnosis.text}\n{kept} With other settings training starts anew; with "
            f"another train.health (patience 0: no stop) it goes on {'from there' if good else 'from the start'}."
        )
        write_json({"health": self._settings.model_dump(), "text": text}, work / _DIAGNOSIS)
        return AdfmError(text)


def refuse_the_same(work: Path, settings: Health) -> None:
    """Spares a training that was stopped for its figures from running into the same again, as a retry would.

    Raises:
        AdfmError: The training in `work` was stopped, and `train.health` is what it was.
    """
    file = work / _DIAGNOSIS
    if file.is_file():
        found = json.loads(file.read_text())
        if found["health"] == settings.model_dump():
            raise AdfmError(f"{found['text']}\nNothing has changed since; to start anew all the same, remove {work}.")
        file.unlink()


def _any(flags: list[bool], device: Any) -> list[bool]:
    """Each flag, raised if any process raised it."""
    import torch

    if not torch.distributed.is_initialized():
        return flags
    raised = torch.tensor(flags, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(raised, torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in raised.tolist()]
