"""Parse a completion into its think / rethink / answer stages and boxes. Rewards and evaluation share this parser."""

import re
from typing import Literal, NamedTuple

from adfm.records import Box, Label

STAGES = ("<think>", "</think>", "<rethink>", "</rethink>", "<answer>", "</answer>")  # well-formed, in order
_TAG = re.compile(r"(</?(?:think|rethink|answer)>)", re.IGNORECASE | re.ASCII)
# Where a list of coordinates begins, and its fields if there are four. They hold no bracket and no comma, so that the
# pattern reads no character more than twice: no string makes it slow.
_COORDINATES = re.compile(
    r"\[(?=\s*+[+-]?(?:\.?\d|nan|inf)[^\[\],]*+,)"
    r"(?:([^\[\],]*+),([^\[\],]*+),([^\[\],]*+),([^\[\],]*+)\])?",
    re.IGNORECASE,
)
_FARTHEST = 1e6  # beyond any image; areas of such boxes are still exact enough to compare


class ParsedCompletion(NamedTuple):
    """A completion in its three stages; `None` for one that is missing."""

    think: str | None  # region identification
    rethink: str | None  # examination
    answer: Literal["A", "B"] | None  # anomalous or normal; `None` unless the one answer stage is that letter alone
    # Every box in `think` that has an area, in the model's frame, as written; with the answer `B` they were rejected.
    boxes: tuple[Box, ...]
    # Lists of coordinates that begin in `think` (a bracket, a number, a comma) and are not a box: of more or fewer than
    # four numbers, not closed, inverted, empty, not finite.
    invalid: int
    tags: tuple[str, ...]  # of all stages in the order written, lower case

    @property
    def predicted_label(self) -> Label | None:
        """The decision as a label; `None` if there is no clean letter."""
        return None if self.answer is None else "anomalous" if self.answer == "A" else "normal"


def parse(completion: str) -> ParsedCompletion:
    """Parse a completion: any string, in time linear in its length, without an exception.

    The case of tags and letter, and white space around the letter, do not matter. A stage reaches from its first
    opening tag to the next closing one.
    """
    parts = _TAG.split(completion)  # text, tag, text, tag, …, text
    tags = tuple(map(str.lower, parts[1::2]))
    think, rethink, last = (
        parts[2:11:4]  # the same result, faster, for the form that most completions have
        if tags == STAGES
        else [_stage(parts, tags, *pair) for pair in zip(STAGES[::2], STAGES[1::2], strict=True)]
    )
    letter = (last or "").strip().lower()
    answer: Literal["A", "B"] | None = None
    if tags.count("<answer>") == tags.count("</answer>") == 1:  # of two answers neither is the decision
        answer = "A" if letter == "a" else "B" if letter == "b" else None
    boxes, invalid = _boxes(think or "")
    return ParsedCompletion(think, rethink, answer, boxes, invalid, tags)


def _stage(parts: list[str], tags: tuple[str, ...], opening: str, closing: str) -> str | None:
    if opening not in tags or closing not in tags[(first := tags.index(opening)) :]:
        return None
    return "".join(parts[2 * first + 2 : 2 * tags.index(closing, first) + 1])


def _boxes(text: str) -> tuple[tuple[Box, ...], int]:
    boxes, lists = [], _COORDINATES.findall(text)
    for fields in lists:
        try:
            x1, y1, x2, y2 = map(float, fields)
        except ValueError:
            continue
        # Written so that nan fails it.
        if -_FARTHEST <= x1 < x2 <= _FARTHEST and -_FARTHEST <= y1 < y2 <= _FARTHEST:
            boxes.append(Box(x1, y1, x2, y2))
    return tuple(boxes), len(lists) - len(boxes)
