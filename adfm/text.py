"""Escape untrusted text, such as names of files, for a terminal or a Markdown page."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from typing import Any, TextIO

# Control characters can move the cursor or forge a line, direction marks reorder words, and markup can run or mislead.
_LAYOUT = "\n\r\t"  # of a text of several lines; a progress bar returns to the start of its line
# What CommonMark, GitHub's tables and autolinks, and showdown (which draws MLflow's pages) read as more than itself. A
# colon matters before a word alone (http://, :smile:), and a dot before a letter or after www.
_MARKUP = re.compile(r"[\\`*_{}\[\]<>#!~|&$@^\"¨]|:(?=\S)|\.(?=[^\W\d])|(?<=[Ww])\.")
# What begins a list, a rule or the underline of a heading at the start of a line.
_START = re.compile(r"^(\d*)([-+=.)])(?=[-=\s]|$)")


def printable(text: str, keep: str = "") -> str:
    """Return the text with newlines, ESC, C1 controls and direction marks escaped, except the characters of `keep`."""
    return "".join(char if char.isprintable() or char in keep else repr(char)[1:-1] for char in text)


def one_line(text: str) -> str:
    """Return the first line of a text, printable, and, where it ends with a colon, the lines that it introduces."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return ""
    # The cause is often in these: "these settings are wrong:", "Version 3 of adfm cannot be promoted:".
    listed = lines[1:] if lines[0].endswith(":") else []
    if listed and listed[0].startswith("Traceback"):
        listed = listed[-1:]  # the error
    return printable(f"{lines[0]} {'; '.join(line.removeprefix('- ') for line in listed)}".rstrip())


def did_you_mean(names: Sequence[str]) -> str:
    """Return a question that suggests one or more names; "" without any."""
    *others, last = [f"`{name}`" for name in names] or [""]
    return f"did you mean {', '.join(others)}{' or ' * bool(others)}{last}?" if last else ""


def shortened(text: str, most: int) -> str:
    """Return the text, cut to at most `most` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table whose columns are padded to one width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def markdown(text: str) -> str:
    """Escape text for a paragraph, a list or a cell of a table in Markdown."""
    # Unlike backslashes, numeric entities are literal in CommonMark, GitHub's dialect and showdown; they hide `|` too.
    line = _MARKUP.sub(lambda match: _entity(match[0]), printable(text).strip())
    return _START.sub(lambda match: match[1] + _entity(match[2]), line)


def _entity(char: str) -> str:
    return f"&#{ord(char)};"


class EditedStream:
    """A text stream that passes what is written to it through a function."""

    def __init__(self, stream: TextIO, edit: Callable[[str], str]) -> None:
        self._stream = stream
        self._edit = edit

    def write(self, text: str) -> int:
        """Write the edited text, and return the length of the original."""
        self._stream.write(self._edit(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write the edited lines."""
        for line in lines:  # the stream's own method would write them as they are
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the stream below."""
        return getattr(self._stream, name)


@contextmanager
def printable_output() -> Iterator[None]:
    """Escape control characters of all that is printed to stdout and stderr in the block."""
    edit = partial(printable, keep=_LAYOUT)
    out, err = (EditedStream(stream, edit) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        yield
