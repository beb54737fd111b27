from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from adfm.training.dynamic_sampling import fill_batch

GROUPS = st.lists(st.booleans(), min_size=1, max_size=6)


@given(GROUPS, st.lists(st.booleans(), min_size=40, max_size=40), st.integers(1, 4), st.integers(0, 4))
def test_a_batch_is_filled_with_groups_with_variance_as_far_as_the_rounds_reach(
    first: list[bool], others: list[bool], group: int, rounds: int
) -> None:
    """A row knows whether the rewards of its group differ; what is generated for it is its name."""
    drawn: list[bool] = list(first)

    def rows(varies: list[bool], start: int) -> list[dict[str, Any]]:
        return [{"name": f"{start + i}/{k}", "varies": t} for i, t in enumerate(varies) for k in range(group)]

    def next_groups(number: int, count: int) -> list[dict[str, Any]]:
        assert number < rounds
        start = len(drawn)
        drawn.extend(others[start : start + count])
        return rows(drawn[start:], start)

    def generate(batch: list[dict[str, Any]]) -> tuple[Any, ...]:
        return [row["name"] for row in batch], None, [], {}

    chosen, generated, share = fill_batch(
        rows(first, 0), next_groups, generate, lambda of, _: of[0]["varies"], lambda n: n, group, rounds
    )

    assert len(chosen) == len(first) * group
    assert generated == ([row["name"] for row in chosen], None, [], {})
    names = [row["name"] for row in chosen]
    assert len(set(names)) == len(names)
    for k in range(0, len(chosen), group):
        assert [name.split("/")[0] for name in names[k : k + group]] == [names[k].split("/")[0]] * group
    varied = sum(row["varies"] for row in chosen) // group
    assert varied == min(len(first), sum(drawn))
    assert share == sum(drawn) / len(drawn)
    if rounds == 0 or all(first):
        assert [row["name"] for row in chosen if row["varies"]] == [
            row["name"] for row in rows(first, 0) if row["varies"]
        ]
        assert len(drawn) == len(first)


def test_all_processes_draw_as_many_as_the_one_that_lacks_most() -> None:
    counts: list[int] = []

    def next_groups(number: int, count: int) -> list[dict[str, Any]]:
        counts.append(count)
        return [{}] * count

    fill_batch([{}] * 3, next_groups, lambda rows: ([0] * len(rows),), lambda *_: True, lambda n: n + 2, 1, 2)
    assert counts == [2, 2]
