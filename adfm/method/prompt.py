"""The multi-stage prompt of AD-FM (arXiv 2508.04175), a plain prompt to compare it with, and target completions."""

from collections.abc import Sequence
from typing import Any

from adfm.method import kinds as kinds_
from adfm.records import Box, Label

SYSTEM = "You inspect photographs of products for defects."

# The three stages are the paper's: region identification, focused examination, decision. The authors' wording was not
# published; this one states everything that the rewards pay for.
QUESTION = """\
Inspect this product in three stages, in this order, each once, none empty.
First <think>say what you see and box every suspicious region tightly, one box a region, never the whole image: \
[x1, y1, x2, y2], {units}</think>
then <rethink>look at each region again: is it a real defect or normal variation?</rethink>
then <answer>one letter alone, A if the product has a defect or B if it is normal</answer>"""

# As GRPO without AD-FM asks.
PLAIN_QUESTION = """\
Inspect this product.
<answer>one letter alone, A if the product has a defect or B if it is normal</answer>"""

# Added to the system message, before the image, as the embedded model has seen no other question: its loss on correct
# answers stays at 1.33, and rises to 1.41 with these words before the question; words like them after it made it 2.4.
KINDS = f" End <rethink> of a defective product with {kinds_.PREFIX} and its kind, one of: {{kinds}}."

LETTERS: dict[str, Label] = {"A": "anomalous", "B": "normal"}

# How each stage of a target completion begins: `rethink` with regions to examine, and without.
OPENINGS: dict[str, dict[Label, tuple[str, ...]]] = {
    "think": {"anomalous": ("Suspicious:",), "normal": ("The surface is even, nothing stands out.",)},
    "rethink": {
        "anomalous": (kinds_.PREFIX, "Something is wrong all the same."),
        "normal": ("Normal variation, no defect.", "There is no region to examine."),
    },
}
_NO_REGION = "no single region."  # after "Suspicious:", where the place of a defect is not known
_NO_MARKUP = str.maketrans("<>", "()")  # would end the stage or the response, as in "dent</rethink>" or "<|im_end|>"


def messages(units: str, stages: bool = True, kinds: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the prompt as chat messages, without the image.

    Args:
        units: The words for the units of boxes, as `adfm.models.families` has them.
        stages: Whether to ask for three stages, or for the decision alone.
        kinds: Kinds of defects to name one of; only with stages.
    """
    return [
        {"role": "system", "content": SYSTEM + asking_for(kinds)},
        {"role": "user", "content": QUESTION.format(units=units) if stages else PLAIN_QUESTION},
    ]


def asking_for(kinds: Sequence[str]) -> str:
    """Return the sentence of the system message that lists the kinds to name one of; empty without kinds."""
    return KINDS.format(kinds=", ".join(f'"{kind}"' for kind in kinds)) if kinds else ""


def target_completion(
    label: Label,
    regions: Sequence[Box],
    defect: str | None = None,
    step: int = 1,
    stages: bool = True,
    kinds: Sequence[str] = (),
) -> str:
    """Return a correct completion in the form that the prompt asks for, to train on.

    Args:
        label: The decision.
        regions: Boxes in the model's frame; on a normal image they are examined and rejected.
        defect: Name of the defect, for the examination stage of an anomalous image.
        step: Coordinates are rounded to multiples of this.
        stages: As in `messages`.
        kinds: As in `messages`; the defect is named as one of them, if it is one.
    """
    letter = next(letter for letter, means in LETTERS.items() if means == label)
    decision = f"<answer>{letter}</answer>"
    if not stages:
        return decision
    boxes = ", ".join(str([round(v / step) * step for v in box]) for box in regions)
    (suspicious,), (nothing,) = OPENINGS["think"].values()
    think = f"{suspicious} {boxes or _NO_REGION}" if regions or label == "anomalous" else nothing
    examined, unexamined = OPENINGS["rethink"][label]
    rethink = examined if regions else unexamined
    if label == "anomalous" and (kind := kinds_.of(defect, kinds)) in kinds:
        rethink += f" {kind}." if regions else f" {kinds_.PREFIX} {kind}."
    elif label == "anomalous" and regions:
        name = defect or ("" if "damage" in kinds else "damage")  # no kind is named where none is known
        rethink += f" {name.translate(_NO_MARKUP)}."
    return f"<think>{think}</think><rethink>{rethink}</rethink>{decision}"
