"""The multi-stage prompt, the plain one to compare it with, and the supervised answer in the form of either.

The three stages are those of AD-FM (arXiv 2508.04175): region identification in `<think>`, focused examination in
`<rethink>`, decision in `<answer>`. The authors' wording was not published; this one states everything that the
rewards pay for. The plain prompt asks for the decision alone, as GRPO without AD-FM does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adfm.records import Box, Label

SYSTEM = "You inspect photographs of products for defects."

QUESTION = """\
Inspect this product in three stages, in this order, each once, none empty.
First <think>say what you see and box every suspicious region tightly, one box a region, never the whole image: \
[x1, y1, x2, y2], {units}</think>
then <rethink>look at each region again: is it a real defect or normal variation?</rethink>
then <answer>one letter alone, A if the product has a defect or B if it is normal</answer>"""

PLAIN_QUESTION = """\
Inspect this product.
<answer>one letter alone, A if the product has a defect or B if it is normal</answer>"""


def messages(units: str, stages: bool = True) -> list[dict[str, Any]]:
    """The prompt as chat messages, without the image.

    Args:
        units: The words that say in which units boxes are asked for, as `adfm.models.families` has them.
        stages: Whether the decision is asked for in three stages, or alone.
    """
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": QUESTION.format(units=units) if stages else PLAIN_QUESTION},
    ]


def answer(label: Label, regions: Sequence[Box], defect: str | None = None, step: int = 1, stages: bool = True) -> str:
    """A complete response in the form that the prompt asks for.

    Args:
        label: The decision.
        regions: Boxes in the model's frame; on a normal image they are examined and rejected.
        defect: Name of the defect, for the examination stage of an anomalous image.
        step: Coordinates are rounded to multiples of this.
        stages: As in `messages`.
    """
    decision = f"<answer>{'A' if label == 'anomalous' else 'B'}</answer>"
    if not stages:
        return decision
    boxes = ", ".join("[" + ", ".join(str(round(v / step) * step) for v in box) + "]" for box in regions)
    think = f"Suspicious: {boxes}" if regions else "The surface is even, nothing stands out."
    if label == "anomalous":
        rethink = f"A real defect: {defect or 'damage'}." if regions else "Something is wrong all the same."
    else:
        rethink = "Normal variation, no defect." if regions else "There is no region to examine."
    return f"<think>{think}</think><rethink>{rethink}</rethink>{decision}"
