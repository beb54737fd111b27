"""Text from data and from people, made safe for where it is shown: a terminal, a Markdown page.

Names of categories, files and models, reasons that somebody typed, and messages that quote them may hold anything. What
shows them passes them through one of these functions: control characters move no cursor and forge no line, direction
marks turn no words round, and no character is read as markup.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

_LAYOUT = "\n\r\t"  # of a text of several lines; a progress bar returns to the start of its line
# What CommonMark, GitHub's tables and autolinks, and showdown (which draws MLflow's pages) read as more than itself. A
# colon matters before a word alone (http://, :smile:), and a dot before a letter or after www.
_MARKUP = re.compile(r"[\\`*_{}\[\]<>#!~|&$@^\"¨]|:(?=\S)|\.(?=[^\W\d])|(?<=[Ww])\.")
# What begins a list, a rule or the underline of a heading at the start of a line.
_START = re.compile(r"^(\d*)([-+=.)])(?=[-=\s]|$)")


def printable(text: str) -> str:
    """The text in one line, with what cannot be printed escaped: newlines, ESC, C1 controls, direction marks."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def one_line(text: str) -> str:
    """The first line of a text, printable; where it ends with a colon, the lines that it introduces follow it.

    What is wrong is often in those: "these settings are wrong:", "Version 3 of adfm cannot be promoted:".
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return ""
    listed = lines[1:] if lines[0].endswith(":") else []
    if listed and listed[0].startswith("Traceback"):
        listed = listed[-1:]
    return printable(f"{lines[0]} {'; '.join(line.removeprefix('- ') for line in listed)}".rstrip())


def did_you_mean(names: Sequence[str]) -> str:
    """A question that suggests one or more names; "" without any."""
    *others, last = [f"`{name}`" for name in names] or [""]
    return f"did you mean {', '.join(others)}{' or ' * bool(others)}{last}?" if last else ""


def shortened(text: str, most: int) -> str:
    """The text, in at most so many characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def printable_lines(text: str) -> str:
    """As `printable`, for a text of several lines: newlines, carriage returns and tabs are kept."""
    return "".join(char if char.isprintable() or char in _LAYOUT else repr(char)[1:-1] for char in text)


def markdown(text: str) -> str:
    """The text as Markdown that shows it and means nothing else, in a paragraph, a list or a cell of a table.

    Special characters become numeric entities: unlike backslashes, these are literal in CommonMark, in GitHub's dialect
    and in showdown alike, and hide the `|` of a table too.
    """
    line = _MARKUP.sub(lambda match: _entity(match[0]), printable(text).strip())
    return _START.sub(lambda match: match[1] + _entity(match[2]), line)


def _entity(char: str) -> str:
    return f"&#{ord(char)};"


class _Printable:
    """A text stream that escapes what could steer a terminal; all else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable_lines(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def printable_output() -> Iterator[None]:
    """In the block, what is printed to stdout and stderr passes through `printable_lines`, whoever prints it."""
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(_Printable(sys.stdout)))
        stack.enter_context(redirect_stderr(_Printable(sys.stderr)))
        yield
