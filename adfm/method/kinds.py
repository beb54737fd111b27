"""Kinds of defects that a model names (`sft.kinds`): how they are listed, parsed and rewarded."""

import unicodedata
from collections.abc import Iterable, Sequence

from adfm.errors import AdfmError
from adfm.method.response import ParsedCompletion
from adfm.records import Label

# Number of kinds of one model: fewer leave nothing to tell apart, more make the prompt longer than the image.
FEWEST, MOST = 2, 30
LONGEST = 60  # most characters of a name: it has to fit into a completion with boxes
# Comes before the name in a completion; it begins `<rethink>` of every target completion to a defective image.
PREFIX = "A real defect:"
# Markup would end a stage or the completion, and a quote the name in the prompt.
_REPLACED = str.maketrans({"<": "(", ">": ")", '"': "'"})


def written(name: str | None) -> str | None:
    """Return the name of a kind as prompts and completions write it, on one line, without markup and double quotes."""
    # Tokenizers compose a text in the same way (Unicode NFC).
    text = unicodedata.normalize("NFC", name or "").translate(_REPLACED)
    text = "".join(char if char.isprintable() else " " for char in text)
    return " ".join(text.split()) or None


def of(defect: str | None, kinds: Sequence[str]) -> str | None:
    """Return the kind of an image's defect, as `written`; `None` where none is known, or it has several of `kinds`.

    A kind that is not in `kinds`, as a test split may have, is returned too.
    """
    kind = written(defect)
    return None if kind not in kinds and _is_joined(kind, kinds) else kind


def _is_joined(kind: str | None, kinds: Iterable[str]) -> bool:
    # The shards join the kinds of one image by plus signs: "dent+scratch".
    parts = {written(part) for part in (kind or "").split("+")}
    return len(parts) > 1 and parts <= {*kinds}


def single(names: Iterable[str | None]) -> list[str]:
    """Return the kinds among some defects, as `written`, in alphabetical order."""
    every = {kind for name in names if (kind := written(name))}
    return sorted(kind for kind in every if not _is_joined(kind, every))


def listed(names: Iterable[str | None]) -> tuple[str, ...]:
    """Return the kinds among the defects of a training split, for a model to name.

    Raises:
        AdfmError: There are fewer than `FEWEST` or more than `MOST`, or one is longer than `LONGEST`.
    """
    kinds = single(names)
    if not FEWEST <= len(kinds) <= MOST:
        raise AdfmError(
            f"sft.kinds: the training images have {len(kinds)} kinds of defects, and a model can be asked to name "
            f"{FEWEST} to {MOST}; name the defects of the data set, join rare kinds, or set sft.kinds to false"
        )
    if long := [kind for kind in kinds if len(kind) > LONGEST]:
        raise AdfmError(
            f"sft.kinds: the name {long[0]!r} has {len(long[0])} characters, and {LONGEST} are the most; "
            "shorten it in the data set, or set sft.kinds to false"
        )
    return tuple(kinds)


def read(rethink: str | None, kinds: Sequence[str]) -> str | None:
    """Return the kind that an examination stage names; `None` where it names none of `kinds`, or several."""
    # All that follows the prefix has to be the name: "scratch deep" does not name "scratch".
    _, prefix, rest = (rethink or "").partition(PREFIX)
    kind = rest.strip().removesuffix(".").strip('"') if prefix else ""
    return kind if kind in kinds else None


def reward(response: ParsedCompletion, label: Label, defect: str | None, kinds: Sequence[str]) -> float:
    """Return the term `kind` of the reward: 1 for the right kind with the letter A, or B without a kind, else 0."""
    kind = read(response.rethink, kinds)
    # The kind counts only beside the right letter, so that no blind answer earns on both labels: always the same kind
    # earns that kind's share of the defective images, and always B nothing there.
    if label == "normal":
        return float(response.answer == "B" and kind is None)
    # An image of no known kind, or of several, pays 0 whatever is named: it never contributes to the advantage.
    return float(response.answer == "A" and kind is not None and kind == of(defect, kinds))
