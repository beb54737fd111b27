"""Scripts that complete adfm's verbs, options and file names in a shell, by shtab."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

SHELLS = ("bash", "zsh", "tcsh", "fish")


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script of a parser.

    Args:
        parser: Its arguments of type `Path`, and those that name a source or a model, complete file names.
        shell: One of `SHELLS`.
    """
    import shtab

    for action in _actions(parser):
        if action.type is Path or action.dest in ("uri", "model"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(parser, shell)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of a parser and of the parsers of its verbs; argparse has no public way to list them."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)
