"""Report errors about many files, grouped by cause: 10,000 files with one fault are one line and some examples."""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from adfm.errors import AdfmError
from adfm.text import printable

EXAMPLES = 10  # of each cause in a message; the file lists all
_LISTED = 50  # problems of a source in a message

# "a.json: shape 3: …": the file, and the places within it that readers name.
_PLACE = re.compile(
    r"(?:(?:line|shape|object|annotation|image|category|region|result|task|label|row)s?"
    r"(?: no\.)? \S+?(?:, column \d+)?: )+"
)
_VARIABLE = re.compile(
    r"'(?:[^'\\]|\\.)*'|\"[^\"]*\"|\[[^\]]*\]|\([-\d., einf]+\)|\S*\d\S*|\S+/\S+|\S+\.[A-Za-z]\w{1,4}\b"
)


class MissingImage(str):
    """The problem that an annotation's image is missing, which `convert.missing: skip` turns into a note."""


class Unlisted(str):
    """The problem that no annotation names an image; often a consequence of other problems, so it is listed last."""


class ProblemList:
    """The problems of a source that is fetched, raised all at once; the error calls the source `who`."""

    def __init__(self, who: str) -> None:
        self._who = who
        self._first: list[str] = []  # not all: memory does not grow with their number
        self._count = 0

    def add(self, problem: str) -> None:
        """Add a problem: what is wrong with which member."""
        self._count += 1
        if len(self._first) < _LISTED:
            self._first.append(problem)

    def finish(self) -> None:
        """Raise an `AdfmError` if there are problems."""
        if self._count:
            more = [f"and {self._count - _LISTED} more"] if self._count > _LISTED else []
            listed = "\n".join(f"  {problem}" for problem in [*self._first, *more])
            raise AdfmError(f"{self._who}: cannot be taken as it is; fix it, or unpack it by hand:\n{listed}")


class BadData(AdfmError):
    """A data set of a layout cannot be converted as it is.

    `problems` are lines `file: what is wrong`, each once. The message has some, and says that `listing` has all.
    """

    def __init__(self, raw: Path, layout: str, problems: Iterable[str], listing: Path | str | None = None) -> None:
        self.raw, self.layout, self.listing = raw, layout, listing
        self.problems = list(dict.fromkeys(problems))
        super().__init__(_message(raw, layout, self.problems, listing))

    def written(self, listing: Path) -> "BadData":
        """Return the error; if it lists only some of the problems, write all to a file that its message names."""
        groups = grouped(self.problems)
        if all(len(its) <= EXAMPLES for its in groups.values()):
            return self
        lines = [
            f"{cause} ({len(its)})\n" + "".join(f"  {printable(one)}\n" for one in its) for cause, its in groups.items()
        ]
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("\n".join(lines), encoding="utf-8")
        return BadData(self.raw, self.layout, self.problems, listing)


def grouped(problems: Iterable[str]) -> dict[str, list[str]]:
    """Group problems by their cause, the most frequent first, but images without an annotation last.

    Problems have one cause if they differ only in files, names, numbers and paths; those that differ become `…`.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for problem in problems:
        groups[_VARIABLE.sub("…", _what(problem))].append(problem)
    ranked = sorted(groups.values(), key=lambda its: (isinstance(its[0], Unlisted), -len(its)))
    return {printable(_cause(its)): its for its in ranked}


def _cause(problems: list[str]) -> str:
    variables = [_VARIABLE.findall(_what(problem)) for problem in problems]
    common = iter(["…" if len(set(its)) > 1 else its[0] for its in zip(*variables, strict=False)])
    return _VARIABLE.sub(lambda _: next(common, "…"), _what(problems[0]))


def _what(problem: str) -> str:
    """Return the problem without the file and the place in it."""
    _, separator, what = problem.partition(": ")
    return _PLACE.sub("", what, count=1) if separator and what else problem


def _message(raw: Path, layout: str, problems: list[str], listing: Path | str | None) -> str:
    groups = grouped(problems)
    first, its = next(iter(groups.items()))
    count = f"{len(its)} of {len(problems)} problems, " if len(problems) > 1 else ""
    lines = [f"{raw}: {first} ({count}layout {layout})"]
    for cause, its in groups.items():
        lines += [f"  {cause}: {len(its)}"] if len(groups) > 1 else []
        lines += [f"    {printable(problem)}" for problem in its[:EXAMPLES]]
        lines += [f"    and {len(its) - EXAMPLES} more"] if len(its) > EXAMPLES else []
    lines += [f"All of them are listed in {listing}."] if listing else []
    lines.append("Add what is missing, fix or remove these files, and convert again.")
    return "\n".join(lines)
