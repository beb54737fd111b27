"""Training health checks: find NaN loss, KL blow-up, blind answers, zero-variance groups, flat reward; name a fix."""

import json
import math
import threading
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState

from adfm.errors import AdfmError
from adfm.files import write_json
from adfm.method import response
from adfm.method.coordinates import Frame
from adfm.params import Health
from adfm.process.stopping import Stopped
from adfm.records import Box, Label
from adfm.training import checkpoints

Metrics = Mapping[str, Any]

# Where fewer of the images have the other label, a good model may answer one letter too.
_BOTH_LABELS = 0.1
# Boxes of an image that are compared with those of others: bounds the time that a degenerate completion takes.
_MOST_BOXES = 20
_DIAGNOSIS = "diagnosis.json"
_SEE_COMPLETIONS = "see the pictures of completions in MLflow whether they have the form that the reward parses"


class Completed(NamedTuple):
    """A completion with the label of its image, and the true boxes in the model's frame of this width and height."""

    label: Label
    regions: Sequence[Sequence[float]]
    frame: Sequence[float]
    completion: str


def answer_metrics(completed: Sequence[Completed], group: int) -> dict[str, float]:
    """Return metrics of one step that show whether the answers depend on the image.

    Args:
        completed: All completions of the step; those of an image are adjacent.
        group: Completions an image.

    Returns:
        - `answers/anomalous_share`, `answers/normal_share`: completions that answer `A`, and `B`, with a clean letter.
        - `images/anomalous_share`: images that are anomalous.
        - `balanced_accuracy`: mean of the shares of right answers on anomalous and on normal images; 0.5 for answers
          that do not depend on the image. Left out where all images have the same label.
        - `answers/region_overlap`, `images/region_overlap`: how much predicted boxes, and the true ones, overlap with
          those of the next image (mean IoU of each box with the nearest one, in shares of the frame), over anomalous
          images of which both are known. Left out where there are fewer than two such images.
    """
    responses = [response.parse(each.completion) for each in completed]
    predicted, true = [], []
    for start in range(0, len(completed), group):
        image = completed[start]
        boxes = next((each.boxes for each in responses[start : start + group] if each.boxes), None)
        if image.label == "anomalous" and image.regions and boxes:
            frame = Frame(*image.frame)
            predicted.append([frame.to_pixels(box, 1, 1) for box in boxes[:_MOST_BOXES]])
            true.append([frame.to_pixels(Box(*box), 1, 1) for box in image.regions[:_MOST_BOXES]])
    metrics = {
        "answers/anomalous_share": sum(each.answer == "A" for each in responses) / len(responses),
        "answers/normal_share": sum(each.answer == "B" for each in responses) / len(responses),
        "images/anomalous_share": sum(each.label == "anomalous" for each in completed) / len(completed),
    }
    right: dict[Label, list[bool]] = {"anomalous": [], "normal": []}
    for each, parsed in zip(completed, responses, strict=True):
        right[each.label].append(parsed.predicted_label == each.label)
    if all(right.values()):
        metrics["balanced_accuracy"] = sum(sum(of) / len(of) for of in right.values()) / len(right)
    if len(true) > 1:
        metrics["answers/region_overlap"] = _overlap_with_next(predicted)
        metrics["images/region_overlap"] = _overlap_with_next(true)
    return metrics


def _overlap_with_next(images: Sequence[Sequence[Box]]) -> float:
    # Of each box with the one of the neighbouring image that it overlaps most.
    overlaps = []
    for one, other in pairwise(images):
        best = [max(map(box.iou, boxes)) for some, boxes in ((one, other), (other, one)) for box in some]
        overlaps.append(math.fsum(best) / len(best))
    return math.fsum(overlaps) / len(overlaps)


class Problem(NamedTuple):
    """A failed health check: the first step that showed it; what was seen, when, and which settings to change how."""

    began: int
    text: str


def find_problem(history: Sequence[Metrics], settings: Health) -> Problem | None:
    """Return what is wrong with a training, if anything.

    A loss or gradient that is not a number counts at once. Everything else must hold at each of the last
    `settings.patience` steps; a patience of 0 switches these checks off.

    Args:
        history: The metrics of each step, in order, as TRL logs them; rows without `loss` are skipped.
        settings: `train.health`.
    """
    rows = [row for row in history if "loss" in row]
    for name in ("loss", "grad_norm"):
        if rows and not math.isfinite(rows[-1].get(name, 0.0)):
            return _not_a_number(rows, name)
    window = rows[-settings.patience :] if settings.patience else []
    if not window or len(window) < settings.patience:
        return None
    steps = f"steps {window[0]['step']} to {window[-1]['step']}"
    for check in (_high_kl, _one_letter, _same_regions, _no_variance, _flat_reward):
        if text := check(window, settings):
            return Problem(window[0]["step"], f"{steps}: {text}")
    return None


def _not_a_number(rows: Sequence[Metrics], name: str) -> Problem:
    step = rows[-1]["step"]
    norms = [row["grad_norm"] for row in rows[-6:-1] if math.isfinite(row.get("grad_norm", math.nan))]
    before = f" (the gradient norms before it: {', '.join(f'{norm:.3g}' for norm in norms)})" if norms else ""
    return Problem(
        step,
        f"step {step}: {name} is {rows[-1][name]}{before}. Lower train.learning_rate to a third and "
        "train.max_grad_norm to 0.5; with model.dtype float16, take bfloat16, which does not overflow.",
    )


def _high_kl(window: Sequence[Metrics], settings: Health) -> str | None:
    if not all(row.get("kl", 0.0) > settings.max_kl for row in window):
        return None
    return (
        f"the KL from the model that training started from stayed above {settings.max_kl:g} "
        f"(train.health.max_kl; it ended at {window[-1]['kl']:.3g}): the policy has diverged from it. Lower "
        "train.learning_rate to a third, or raise train.beta (0.02 to 0.05)."
    )


def _one_letter(window: Sequence[Metrics], settings: Health) -> str | None:
    anomalous = _mean(window, "images/anomalous_share")
    if min(anomalous, 1 - anomalous) < _BOTH_LABELS:
        return None
    for letter, name in (("A", "answers/anomalous_share"), ("B", "answers/normal_share")):
        least = min(row.get(name, 0.0) for row in window)
        if least > 1 - settings.min_other_letter:
            others, change = (1 - anomalous, "Lower") if letter == "A" else (anomalous, "Raise")
            return (
                f"at least {least:.1%} of the answers of each step were {letter} (train.health.min_other_letter is "
                f"{settings.min_other_letter:g}), although {others:.0%} of the images are "
                f"{'normal' if letter == 'A' else 'anomalous'}: the letter does not depend on the image. {change} "
                "train.anomalous_share; more sft.steps with sft.anomalous_share near 0.5 teach the model to tell "
                "the labels apart. If it could before, lower train.learning_rate to a third, or raise train.beta."
            )
    return None


def _same_regions(window: Sequence[Metrics], settings: Health) -> str | None:
    rows = [row for row in window if "answers/region_overlap" in row]
    if 2 * len(rows) < len(window):
        return None  # too few steps with two defects to compare
    least = min(row["answers/region_overlap"] for row in rows)
    true = _mean(rows, "images/region_overlap")
    if least <= settings.max_region_overlap or true > least / 2:
        return None  # where all defects are at one place, boxes that are all alike may be right
    return (
        f"the boxes on different images overlapped by an IoU of at least {least:.2f} at each step "
        f"(train.health.max_region_overlap is {settings.max_region_overlap:g}), their true boxes by {true:.2f}: the "
        "places do not depend on the image. More sft.steps teach where defects are. If the model knew before, lower "
        "train.learning_rate to a third, or raise train.beta; see that train.weights.localization is above 0."
    )


def _no_variance(window: Sequence[Metrics], settings: Health) -> str | None:
    shares = [row.get("utilisation", 1.0) for row in window]
    if max(shares) > settings.min_utilisation or _all_right(window):
        return None
    if _mean(window, "completions/clipped_ratio") > 0.5:
        change = "Most completions were cut: raise train.max_completion_length."
    elif (entropy := _mean(window, "entropy", 1.0)) < 0.05:
        change = (
            f"The completions are all alike (entropy {entropy:.2g} a token): the policy has "
            "collapsed. Raise train.temperature or train.beta, or lower train.learning_rate; begin from fewer "
            "sft.steps, and see that all weights in train.weights are above 0."
        )
    elif _mean(window, "groups/all_wrong") > 0.9:
        change = f"All answers were wrong: {_SEE_COMPLETIONS}; more sft.steps teach it."
    else:
        change = "Raise train.num_generations or train.temperature, and see that all train.weights are above 0."
    return (
        f"at most {max(shares):.1%} of the groups of a step had completions that earned different rewards "
        f"(train.health.min_utilisation is {settings.min_utilisation:g}), and the others teach nothing. {change}"
    )


def _flat_reward(window: Sequence[Metrics], settings: Health) -> str | None:
    rewards = [row["reward"] for row in window if "reward" in row]
    if len(rewards) < len(window) or max(rewards) - min(rewards) >= settings.min_reward_range or _all_right(window):
        return None
    return (
        f"the mean reward stayed at {rewards[-1]:.4g} (within train.health.min_reward_range, "
        f"{settings.min_reward_range:g}) on ever new images, so that it does not depend on the "
        f"answers: {_SEE_COMPLETIONS}; raise train.temperature, and sft.steps if they have not."
    )


def _all_right(window: Sequence[Metrics]) -> bool:
    return _mean(window, "groups/all_right") > 0.99  # nothing is left to learn then, and nothing is wrong


def _mean(window: Sequence[Metrics], name: str, missing: float = 0.0) -> float:
    return math.fsum(row.get(name, missing) for row in window) / len(window)


class StopCallback(TrainerCallback):
    """Stop all processes at the same step: on SIGTERM with a checkpoint, on a failed health check without one."""

    def __init__(self, settings: Health, terminated: threading.Event) -> None:
        self._settings, self._terminated = settings, terminated
        self._problem: Problem | None = None
        self.stopped = False

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        """Check a step."""
        if "loss" not in (logs or {}):
            return
        import torch
        from accelerate.utils import gather

        self._problem = find_problem(state.log_history, self._settings)
        # One process that stopped alone would leave the others waiting for it in the next collective operation.
        own = [[self._terminated.is_set(), self._problem is not None]]
        terminated, failed = gather(torch.tensor(own, dtype=torch.int32, device=args.device)).any(0).tolist()
        if failed or (terminated and state.global_step < state.max_steps):
            self.stopped = control.should_training_stop = True
            control.should_save = not failed

    def error(self, work: Path, step: int, steps: int, first: bool) -> AdfmError:
        """Return why training stopped after `step` of `steps` and how to resume it.

        The first process removes the checkpoints in `work` that a failed check rules out.
        """
        if not first:
            return Stopped("stopped with the first process, which says why")
        if self._problem is None:
            last = checkpoints.last(work)
            return Stopped(f"stopped after step {step} of {steps}; the same command resumes from {last}")
        # The step that showed the problem started from the weights of the step before, which are suspect too.
        good = checkpoints.drop_after(work, self._problem.began - 2)
        kept = f"The last good checkpoint is {good}." if good else "There is no checkpoint from before it."
        text = (
            f"training was stopped. {self._problem.text}\n{kept} With other settings training starts over; with "
            f"another train.health (patience 0: no stop) it resumes {'from there' if good else 'from the start'}."
        )
        write_json({"health": self._settings.model_dump(), "text": text}, work / _DIAGNOSIS)
        return AdfmError(text)


def refuse_diverged(work: Path, settings: Health) -> None:
    """Refuse to resume a training that a health check stopped, unless `train.health` changed.

    Raises:
        AdfmError: It did not change.
    """
    file = work / _DIAGNOSIS
    if file.is_file():
        diagnosis = json.loads(file.read_text())
        # Started again, as a scheduler's retry does, it would only run into the same problem.
        if diagnosis["health"] == settings.model_dump():
            raise AdfmError(
                f"{diagnosis['text']}\nNothing has changed since; to start over all the same, remove {work}."
            )
        file.unlink()
