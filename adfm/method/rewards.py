"""The project's own reward, `calibrated`, and the choice between it and the published one.

It keeps AD-FM's graded reward of several terms, and fixes what the published numbers reward by mistake: boxes round
everything, neighbouring boxes, missed defects, answers that merely contain the letter or do not depend on the image
(`benchmarks/blind.py`). Every term lies in [0, 1].
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from math import hypot
from typing import Final

from adfm.method.coordinates import PUBLISHED, Frame
from adfm.method.paper import best_matching, paper
from adfm.method.response import STAGES, ParsedCompletion, parse
from adfm.method.terms import Terms
from adfm.records import Box, Label

__all__ = ["PROFILES", "Terms", "calibrated", "in_training"]

# `localization` of an anomalous image when nothing is boxed. Boxes that touch no defect earn less, and the farther the
# less: no place is better than a wrong place, and a near place than a far one.
_NO_BOX = 0.05
# Of the rest, the share paid for overlap that a box round the whole image has as well; so that box earns under 0.15.
_BY_CHANCE = 0.1
# Penalty per unmatched box: small against any real IoU, non-zero so that extra boxes are never free.
_UNMATCHED = 1e-3
# The share of `localization` that an anomalous image pays with the wrong letter: its boxes are then regions that were
# examined and rejected, which nobody sees in use. Not 0, so that a model that still answers B learns where to look;
# at most a half, so that the right letter alone beats all the right boxes with the wrong one.
_REJECTED = 0.5
# A completion of more boxes points at nothing: all of them count as unmatched.
_MAX_BOXES = 1000


def calibrated(
    completion: str, label: Label, boxes: Sequence[Box], frame: Frame = PUBLISHED, located: bool = True
) -> Terms:
    """Return the project's reward of one completion.

    `format`: a quarter for each stage that is there once and not empty (the answer: a clean letter), the last quarter
    for all three in their order, in which an answer `A` has a box in `<think>`. `classification`: 1 for the right
    letter and nothing but the letter. `localization` judges the boxes in `<think>`; without that stage it is 0:

    - An anomalous image pays 1 for the letter `A` and exactly the true boxes (see `_soft_f1`), half as much for the
      same boxes without that letter. Where its boxes are not known it pays 0 whatever is boxed, so that it never
      contributes to the advantage; and `format` requires no box there, so that the model does not learn to make places
      up.
    - A normal image pays only for the letter `B`: 1 for at most one box, since the method asks to examine a region and
      reject it, and less for each further box.

    `regions` pays for the number of boxes in `<think>`, wherever they are, of answers with the right letter (see
    `_regions`).

    Args:
        completion: The model's text.
        label: The image's label.
        boxes: Ground-truth boxes, in `frame`; ignored on a normal image.
        frame: The units of all boxes.
        located: Whether the data set has boxes at all. Where it has none, `A` needs no box on normal images either, and
            `localization` is 0 on these too: paid for `B` alone, it would count the letter of normal images twice.
    """
    response = parse(completion)
    box_required = located and (label == "normal" or bool(boxes))
    return Terms(
        _format(response, box_required),
        float(response.predicted_label == label),
        _localization(response, label, boxes, frame) if located else 0.0,
        _regions(response, label, boxes) if located else 0.0,
    )


def _format(response: ParsedCompletion, box_required: bool) -> float:
    tags, texts = response.tags, (response.think, response.rethink, response.answer)
    there = 0
    in_form = tags == STAGES
    for stage, text in enumerate(texts):
        if text and not text.isspace():
            there += in_form or tags.count(STAGES[2 * stage]) == tags.count(STAGES[2 * stage + 1]) == 1
    # An answer A needs a place. A quarter is enough: a box in the wrong place takes at most 0.05 off
    # `localization`, so that naming the likeliest place always pays more than naming none. It belongs to the form of
    # the three stages, so that where the letter alone is asked for, A and B stay equal.
    unplaced = box_required and response.answer == "A" and not response.boxes
    return (there + (there == 3 and in_form and not unplaced)) / 4


def _localization(response: ParsedCompletion, label: Label, truth: Sequence[Box], frame: Frame) -> float:
    if not (response.think or "").strip():
        return 0.0
    if label == "anomalous":
        paid = _soft_f1(response.boxes, response.invalid, truth, frame) if truth else 0.0
        return paid if response.answer == "A" else _REJECTED * paid
    # Paid for A as well, an image without a box would give "nothing stands out, A" this term on every normal image: the
    # best answer for a model that does not see (2.03 of 3 where 55 % of the images are anomalous).
    if response.answer != "B":
        return 0.0
    return 4 / (4 + max(0, len(response.boxes) + response.invalid - 1))


def _regions(response: ParsedCompletion, label: Label, truth: Sequence[Box]) -> float:
    """Return how near the number of regions in `<think>` is to that of the true boxes: the smaller over the larger.

    0 with the wrong letter, for none on an anomalous image, and for all numbers where its boxes are not known. On a
    normal image, one region to examine and reject is none. A region that is written again, or is not a box, makes the
    number larger, but is not one of those asked for.
    """
    # A number alone is earned without looking: "one region, B" has the right one on normal images, and on those of one
    # defect, most of the others. With the letter asked for, it never pays more than the letter does, which no constant
    # answer has on both.
    if response.predicted_label != label or not (response.think or "").strip():
        return 0.0
    regions = len(response.boxes) + response.invalid
    if label == "normal":
        return 1 / max(1, regions)
    defects = len({*map(Box._make, truth)})
    return min(len({*response.boxes}), defects) / max(regions, defects) if truth else 0.0


def _soft_f1(boxes: Sequence[Box], invalid: int, truth: Sequence[Box], frame: Frame) -> float:
    """Return a soft F1 of predicted and true boxes under the best matching, corrected for chance.

    With R = the largest sum, over one-to-one matchings of the m predicted and the n true boxes, of IoU, less
    `_UNMATCHED` times the distance (0 to 1) of each matched pair that does not touch, and times 1 + the distance to the
    nearest true box for each predicted box left over:

    - S = 2R / (m + n) is 1 for exactly the true boxes and nothing else. It rises with the IoU of every matched pair,
      falls with every missed and every spurious box.
    - S0 is the score of boxes round the whole image, repeated as often as it pays (their IoU with a defect is the
      defect's share of the image). Overlap up to S0 shows nothing; so the reward grows slowly with S up to S0 and fast
      from there to 1.
    - R < 0 (no box touches a defect) pays the less, the more boxes there are and the farther they lie.

    The matching maximises the very sum that is paid for, so that no change of matching can break the order.
    """
    n, m = len(truth), len(boxes) + invalid
    if m > _MAX_BOXES:
        boxes, invalid = (), m
    # Sorted, so that not even a last bit depends on the order of boxes.
    true, predicted = tuple(sorted(map(Box._make, truth))), sorted(boxes)
    pairs = [[_overlap_and_distance(box, defect, frame) for defect in true] for box in predicted]
    unmatched = [1 + min([far for _, far in row]) for row in pairs]
    gains = [[iou + _UNMATCHED * (cost - far) for iou, far in row] for row, cost in zip(pairs, unmatched, strict=True)]
    total = 0.0
    for i, j in best_matching(gains) if gains else ():
        iou, unmatched[i] = pairs[i][j]
        total += iou
    reward = total - _UNMATCHED * (sum(unmatched) + 2 * invalid)
    if reward < 0:
        return _NO_BOX / (1 - reward / _UNMATCHED)
    f1 = 2 * reward / (m + n)
    chance = _chance(true, frame)
    insight = max(0.0, (f1 - chance) / (1 - chance)) if chance < 1 else f1
    return _NO_BOX + (1 - _NO_BOX) * (_BY_CHANCE * f1 + (1 - _BY_CHANCE) * insight)


@lru_cache  # the completions of a group have the same truth
def _chance(true: tuple[Box, ...], frame: Frame) -> float:
    """Return the score of boxes round the whole image, repeated as often as it pays: S0 of `_soft_f1`."""
    shares = sorted((defect.area / (frame.width * frame.height) for defect in true), reverse=True)
    return max(2 * share / (len(true) + k) for k, share in enumerate(accumulate(shares), 1))


def _overlap_and_distance(box: Box, defect: Box, frame: Frame) -> tuple[float, float]:
    """Return the IoU of two boxes, and their distance: 0 where they overlap, else in (0, 1).

    The distance is measured between edges: 0.5 at an eighth of the frame's width and height together.
    """
    # Written out, and not by the methods of Box: this is most of what scoring costs.
    x1, y1, x2, y2 = box
    u1, v1, u2, v2 = defect
    width = min(x2, u2) - max(x1, u1)
    height = min(y2, v2) - max(y1, v1)
    if width > 0 and height > 0:
        shared = width * height
        union = max(0.0, x2 - x1) * max(0.0, y2 - y1) + max(0.0, u2 - u1) * max(0.0, v2 - v1) - shared
        return (shared / union if union > 0 else 0.0), 0.0
    centres = hypot(x1 + x2 - u1 - u2, y1 + y2 - v1 - v2) / 2
    # With a thousandth of the distance between centres, a box that slides along a defect still gets nearer.
    distance = hypot(min(width, 0.0), min(height, 0.0)) + centres / 1000
    return 0.0, distance / (distance + (frame.width + frame.height) / 8)


def in_training(
    profile: str, completion: str, label: Label, boxes: Sequence[Box], frame: Frame, located: bool = True
) -> Terms:
    """Return the terms of a completion in training, by a key of `PROFILES`; the rest as for `calibrated`."""
    if profile == "calibrated":
        return calibrated(completion, label, boxes, frame, located)
    terms = PROFILES[profile](completion, label, boxes, frame)
    # The published reward pays an anomalous image without boxes for one box, wherever it is. Its place is not known, so
    # `localization` is 0 for every completion, which never contributes to the advantage.
    return terms if boxes or label == "normal" else terms._replace(localization=0.0)


PROFILES: Final[dict[str, Callable[..., Terms]]] = {"calibrated": calibrated, "paper": paper}
