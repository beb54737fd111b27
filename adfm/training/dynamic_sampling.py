"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): replace groups without variance by groups of other images.

The advantage of a group whose rewards are all equal is zero. DAPO samples until a batch has no such group; here the
rounds are bounded, and groups without variance fill what is still missing.
"""

from collections.abc import Callable
from itertools import chain
from typing import Any

Rows = list[dict[str, Any]]
# What TRL's `_generate` returns for some rows: lists with an entry a row; other parts are the same for all.
Generated = tuple[Any, ...]


def fill_batch(
    rows: Rows,
    next_groups: Callable[[int, int], Rows],
    generate: Callable[[Rows], Generated],
    has_variance: Callable[[Rows, Generated], bool],
    max_over_ranks: Callable[[int], int],
    group: int,
    rounds: int,
) -> tuple[Rows, Generated, float]:
    """Fill a batch with groups whose rewards differ.

    Args:
        rows: The batch as drawn; the rows of a group are adjacent.
        next_groups: Returns the rows of further groups, by the round (from 0) and their number.
        generate: Generates completions for rows.
        has_variance: Whether the rewards of one group differ.
        max_over_ranks: Returns the largest of a number over all processes, each of which fills a batch of its own.
        group: Rows a group.
        rounds: How often to draw further groups, at most.

    Returns:
        As many rows as there were, what was generated for them, and the share of all drawn groups with variance.
    """
    needed, drawn = len(rows) // group, 0
    varied: list[tuple[Rows, Generated]] = []
    flat: list[tuple[Rows, Generated]] = []
    for round_ in range(rounds + 1):
        generated = generate(rows)
        for start in range(0, len(rows), group):
            end = start + group
            part = rows[start:end], tuple(_slice(value, len(rows), start, end) for value in generated)
            (varied if has_variance(*part) else flat).append(part)
        drawn += len(rows) // group
        # Generation gathers the weights of divided models: no process may stop while others continue.
        missing = max_over_ranks(max(0, needed - len(varied)))
        if not missing or round_ == rounds:
            break
        rows = next_groups(round_, missing)
    chosen = (varied + flat)[:needed]
    merged = (
        list(chain(*values)) if isinstance(values[0], list) else values[0]
        for values in zip(*(generated for _, generated in chosen), strict=True)
    )
    return [row for of_group, _ in chosen for row in of_group], tuple(merged), len(varied) / drawn


def _slice(value: Any, count: int, start: int, end: int) -> Any:
    return value[start:end] if isinstance(value, list) and len(value) == count else value
