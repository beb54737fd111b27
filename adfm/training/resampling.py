"""Dynamic sampling: groups that teach nothing are replaced by those of further images, before anything is trained.

The advantage of a group whose rewards are all equal is zero. DAPO (arXiv 2503.14476, section 3.2) draws on until a
batch holds none; here the rounds are bounded, and what is still missing is filled with such groups.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

Rows = list[dict[str, Any]]
Generated = tuple[Any, ...]
"""What TRL's `_generate` returns for some rows: lists with an entry a row; other parts are the same for all."""


def informative(
    rows: Rows,
    further: Callable[[int, int], Rows],
    generate: Callable[[Rows], Generated],
    differ: Callable[[Rows, Generated], bool],
    most: Callable[[int], int],
    group: int,
    rounds: int,
) -> tuple[Rows, Generated, float]:
    """Fills a batch with groups whose rewards differ.

    Args:
        rows: The batch as drawn; the rows of a group stand together.
        further: The rows of `n` further groups, by the round (from 0) and `n`.
        generate: Lets the model answer rows.
        differ: Whether the rewards of one group differ.
        most: The largest of a number over all processes, each of which fills a batch of its own: none may stop to
            generate while others go on.
        group: Rows a group.
        rounds: How often to draw further groups, at most.

    Returns:
        As many rows as there were, what was generated for them, and the share of all drawn groups whose rewards differ.
    """
    wanted, drawn = len(rows) // group, 0
    teaching: list[tuple[Rows, Generated]] = []
    dull: list[tuple[Rows, Generated]] = []
    for round_ in range(rounds + 1):
        answers = generate(rows)
        for start in range(0, len(rows), group):
            end = start + group
            part = rows[start:end], tuple(_rows(value, len(rows), start, end) for value in answers)
            (teaching if differ(*part) else dull).append(part)
        drawn += len(rows) // group
        missing = most(max(0, wanted - len(teaching)))
        if not missing or round_ == rounds:
            break
        rows = further(round_, missing)
    chosen = (teaching + dull)[:wanted]
    merged = (
        list(chain(*values)) if isinstance(values[0], list) else values[0]
        for values in zip(*(answers for _, answers in chosen), strict=True)
    )
    return [row for of_group, _ in chosen for row in of_group], tuple(merged), len(teaching) / drawn


def _rows(value: Any, count: int, start: int, end: int) -> Any:
    return value[start:end] if isinstance(value, list) and len(value) == count else value
