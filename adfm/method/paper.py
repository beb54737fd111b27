"""The reward as published with AD-FM (arXiv 2508.04175, Eq. 5 and 6); `adfm.method.rewards` says what is wrong."""

import re
from collections.abc import Iterable, Sequence

from adfm.method.coordinates import PUBLISHED, Frame
from adfm.method.terms import Terms
from adfm.records import Box, Label

_NUMBER = r"\s*+(\d++(?:\.\d++)?+)\s*+"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")
_LARGEST = 1e100  # areas stay finite
_TAGS = {
    name: (re.compile(f"<{name}>", re.IGNORECASE), re.compile(f"</{name}>", re.IGNORECASE))
    for name in ("think", "rethink", "answer")
}


def paper(completion: str, label: Label, boxes: Sequence[Box], frame: Frame = PUBLISHED) -> Terms:
    """Return the published reward of one completion; the ground-truth boxes are in `frame`.

    Returns:
        `format` in [0, 1.2], `classification` in {0, 0.8, 1}, `localization` in [-0.1, 1].
    """
    think, rethink = _stage(completion, "think") or "", _stage(completion, "rethink") or ""
    answer = _stage(completion, "answer")
    predicted = [Box(*(min(float(number), _LARGEST) for number in box)) for box in _BOX.findall(think)]
    truth = [Box(*box) for box in boxes] if label == "anomalous" else []
    # The published code compares coordinates with 505, one more than the side of its square images; here that is one
    # more than the frame's width for x and than its height for y, so that images that are not square, and a frame of 0
    # to 1000, are paid alike. GIoU does not depend on the frame.
    inside = all(max(x1, x2) < frame.width + 1 and max(y1, y2) < frame.height + 1 for x1, y1, x2, y2 in predicted)
    return Terms(
        _format(think.strip(), rethink.strip(), (answer or "").strip().lower(), bool(predicted), inside),
        _classification((completion if answer is None else answer).strip().lower(), label),
        _localization(predicted, truth),
    )


def _stage(completion: str, name: str) -> str | None:
    # Two searches, where one lazy expression would try every opening tag again.
    begin, end = _TAGS[name]
    opening = begin.search(completion)
    closing = opening and end.search(completion, opening.end())
    return completion[opening.end() : closing.start()] if opening and closing else None


def _format(think: str, rethink: str, answer: str, boxed: bool, inside: bool) -> float:
    pay = 0.0
    if think:
        pay += 0.4 if len(think) > 10 else 0.3
    if rethink:
        pay += 0.3 if len(rethink) > 10 else 0.2
    if answer in ("a", "b"):
        pay += 0.2
    elif "a" in answer or "b" in answer:
        pay += 0.1
    if boxed:
        pay += 0.3 if inside else 0.2
    elif "[" in think and "]" in think:
        pay += 0.1
    return pay


def _classification(answer: str, label: Label) -> float:
    right = "a" if label == "anomalous" else "b"
    if answer == right:
        return 1.0
    return 0.8 if right in answer and len(answer) <= 10 else 0.0


def _localization(predicted: list[Box], truth: list[Box]) -> float:
    m, n = len(predicted), len(truth)
    if n == 0:
        return {0: 0.0, 1: 0.5}.get(m, -0.1)
    if m == 0:
        return 0.0
    count = {0: 1.0, 1: 0.5}.get(abs(m - n), -0.1)
    giou = [[_giou(box, true) for true in truth] for box in predicted]
    reward = sum(giou[i][j] for i, j in best_matching(giou)) / m + 0.3 * count
    return min(1.0, max(0.0, (reward + 0.5) / 1.5))


def _giou(box: Box, true: Box) -> float:
    """Generalised IoU (arXiv 1902.09630), in [-1, 1]."""
    # As the methods of Box, written out: this is most of what scoring costs.
    x1, y1, x2, y2 = box
    u1, v1, u2, v2 = true
    hull = max(0.0, max(x2, u2) - min(x1, u1)) * max(0.0, max(y2, v2) - min(y1, v1))
    shared = max(0.0, min(x2, u2) - max(x1, u1)) * max(0.0, min(y2, v2) - max(y1, v1))
    union = max(0.0, x2 - x1) * max(0.0, y2 - y1) + max(0.0, u2 - u1) * max(0.0, v2 - v1) - shared
    return (shared / union if union > 0 else 0.0) - ((hull - union) / hull if hull > 0 else 0.0)


def best_matching(gains: Sequence[Sequence[float]]) -> Iterable[tuple[int, int]]:
    """Return the one-to-one matching of rows and columns with the largest sum of `gains` (Hungarian)."""
    if len(gains) == 1:
        return [(0, max(range(len(gains[0])), key=lambda j: gains[0][j]))]
    if len(gains[0]) == 1:
        return [(max(range(len(gains)), key=lambda i: gains[i][0]), 0)]
    if len(gains) == len(gains[0]) == 2:
        (a, b), (c, d) = gains
        return [(0, 0), (1, 1)] if a + d >= b + c else [(0, 1), (1, 0)]
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(gains, maximize=True)
    return zip(rows.tolist(), columns.tolist(), strict=True)
