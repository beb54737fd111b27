"""Problems of a data set, grouped by cause: an error that a person can read when 10,000 files have the same fault."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from adfm.errors import AdfmError
from adfm.text import printable

EXAMPLES = 10  # shown of each cause; the file lists all

# "a.json: shape 3: …": the file, and the places within it that readers name.
_PLACE = re.compile(
    r"(?:(?:line|shape|object|annotation|image|category|region|result|task|label|row)s?"
    r"(?: no\.)? \S+?(?:, column \d+)?: )+"
)
_VARIABLE = re.compile(
    r"'(?:[^'\\]|\\.)*'|\"[^\"]*\"|\[[^\]]*\]|\([-\d., einf]+\)|\S*\d\S*|\S+/\S+|\S+\.[A-Za-z]\w{1,4}\b"
)


class MissingImage(str):
    """A problem that `convert.missing: skip` turns into a note: an annotation whose image is not there."""


class Unlisted(str):
    """A problem of an image that no annotation names: often it only follows from another one, and so comes after it."""


class BadData(AdfmError):
    """A data set cannot be converted as it is.

    Args:
        raw: The data set.
        layout: Name of its layout.
        problems: One line each, `file: what is wrong`; the same line twice counts once.
        listing: A file that lists all of them, for the message, or where else they are.
    """

    def __init__(self, raw: Path, layout: str, problems: Iterable[str], listing: Path | str | None = None) -> None:
        self.raw, self.layout, self.listing = raw, layout, listing
        self.problems = list(dict.fromkeys(problems))
        super().__init__(_message(raw, layout, self.problems, listing))

    def written(self, listing: Path) -> BadData:
        """The same error; if it shows only some of the problems, they are all in a file that the message names."""
        if all(len(its) <= EXAMPLES for its in grouped(self.problems).values()):
            return self
        lines = [
            f"{cause} ({len(its)})\n" + "".join(f"  {printable(one)}\n" for one in its)
            for cause, its in grouped(self.problems).items()
        ]
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("\n".join(lines), encoding="utf-8")
        return BadData(self.raw, self.layout, self.problems, listing)


def grouped(problems: Iterable[str]) -> dict[str, list[str]]:
    """Problems by their cause, the most frequent first, but images without an annotation last.

    The cause is the text without the file and the place in it. Problems have one cause if they differ only in names,
    numbers and paths; those that differ become `…`.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for problem in problems:
        groups[_VARIABLE.sub("…", _what(problem))].append(problem)
    ranked = sorted(groups.values(), key=lambda its: (isinstance(its[0], Unlisted), -len(its)))
    return {printable(_cause(its)): its for its in ranked}


def _cause(problems: list[str]) -> str:
    """What problems that differ in names, numbers and paths have in common."""
    variables = [_VARIABLE.findall(_what(problem)) for problem in problems]
    common = iter(["…" if len(set(its)) > 1 else its[0] for its in zip(*variables, strict=False)])
    return _VARIABLE.sub(lambda _: next(common, "…"), _what(problems[0]))


def _what(problem: str) -> str:
    """The problem without the file and the place in it."""
    _, separator, what = problem.partition(": ")
    return _PLACE.sub("", what, count=1) if separator and what else problem


def _message(raw: Path, layout: str, problems: list[str], listing: Path | str | None) -> str:
    groups = grouped(problems)
    first, its = next(iter(groups.items()))
    count = f"{len(its)} of {len(problems)} problems, " if len(problems) > 1 else ""
    lines = [f"{raw}: {first} ({count}layout {layout})"]
    for cause, its in groups.items():
        if len(groups) > 1:
            lines.append(f"  {cause}: {len(its)}")
        lines += [f"    {printable(problem)}" for problem in its[:EXAMPLES]]
        if len(its) > EXAMPLES:
            lines.append(f"    and {len(its) - EXAMPLES} more")
    if listing:
        lines.append(f"All of them are listed in {listing}.")
    lines.append("Add what is missing, fix or remove these files, and convert again.")
    return "\n".join(lines)
