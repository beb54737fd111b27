"""Training health checks: detect NaN loss, KL blow-up, blind answers, zero-variance groups, flat reward; suggest a fix.

Blind answers are those that do not depend on the image: all one letter, or the same boxes everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from adfm.method import response
from adfm.method.coordinates import Frame
from adfm.params import Health
from adfm.records import Box, Label

Figures = Mapping[str, Any]

# Where fewer of the images have the other label, answers of one letter may be those of a model that sees well.
_BOTH_LABELS = 0.1
# Boxes of an image that are compared with those of others; it bounds the time that a degenerate completion takes.
_MOST_BOXES = 20


class Completed(NamedTuple):
    """A completion with what is true of its image.

    Args:
        label: The image's label.
        regions: Ground-truth boxes `[x1, y1, x2, y2]`, in `frame`.
        frame: Width and height of the model's frame.
        completion: The model's text.
    """

    label: Label
    regions: Sequence[Sequence[float]]
    frame: Sequence[float]
    completion: str


def answer_figures(completed: Sequence[Completed], group: int) -> dict[str, float]:
    """Figures of one step that show whether the answers depend on the image.

    Args:
        completed: All completions of the step; those of an image stand together.
        group: Completions an image.

    Returns:
        - `answers/anomalous_share`, `answers/normal_share`: completions that answer `A`, and `B`; the rest has no clean
          letter.
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
    figures = {
        "answers/anomalous_share": sum(each.answer == "A" for each in responses) / len(responses),
        "answers/normal_share": sum(each.answer == "B" for each in responses) / len(responses),
        "images/anomalous_share": sum(each.label == "anomalous" for each in completed) / len(completed),
    }
    right: dict[Label, list[bool]] = {"anomalous": [], "normal": []}
    for each, parsed in zip(completed, responses, strict=True):
        right[each.label].append(parsed.predicted_label == each.label)
    if all(right.values()):
        figures["balanced_accuracy"] = sum(sum(of) / len(of) for of in right.values()) / len(right)
    if len(true) > 1:
        figures["answers/region_overlap"] = _overlap_with_next(predicted)
        figures["images/region_overlap"] = _overlap_with_next(true)
    return figures


def _overlap_with_next(images: Sequence[Sequence[Box]]) -> float:
    """Mean, over neighbouring images, of the IoU of each box with the one of the other image that it overlaps most."""
    overlaps = []
    for one, other in pairwise(images):
        best = [max(map(box.iou, boxes)) for some, boxes in ((one, other), (other, one)) for box in some]
        overlaps.append(math.fsum(best) / len(best))
    return math.fsum(overlaps) / len(overlaps)


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
    for looked_for in (_blown_up, _one_letter, _same_regions, _collapsed, _flat):
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


def _one_letter(window: Sequence[Figures], settings: Health) -> str | None:
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


def _same_regions(window: Sequence[Figures], settings: Health) -> str | None:
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
            "sft.steps, and see that all weights in train.weights are above 0."
        )
    if _mean(window, "groups/all_wrong") > 0.9:
        return (
            "All answers were wrong: see the pictures of completions in MLflow whether they have the form that the "
            "reward reads; more sft.steps teach it."
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
        "sft.steps if they have not."
    )


def _mean(window: Sequence[Figures], name: str, missing: float = 0.0) -> float:
    return math.fsum(row.get(name, missing) for row in window) / len(window)
