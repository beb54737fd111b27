from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from adfm.training import resampling

GROUPS = st.lists(st.booleans(), min_size=1, max_size=6)


@given(GROUPS, st.lists(st.booleans(), min_size=40, max_size=40), st.integers(1, 4), st.integers(0, 4))
def test_a_batch_is_filled_with_groups_that_teach_as_far_as_the_rounds_reach(
    first: list[bool], others: list[bool], group: int, rounds: int
) -> None:
    """A row knows whether its group will teach; what is generated for it is its name."""
    drawn: list[bool] = list(first)

    def rows(teaches: list[bool], start: int) -> list[dict[str, Any]]:
        return [{"name": f"{start + i}/{k}", "teaches": t} for i, t in enumerate(teaches) for k in range(group)]

    def further(number: int, count: int) -> list[dict[str, Any]]:
        assert number < rounds
        start = len(drawn)
        drawn.extend(others[start : start + count])
        return rows(drawn[start:], start)

    def generate(asked: list[dict[str, Any]]) -> tuple[Any, ...]:
        return [row["name"] for row in asked], None, [], {}

    chosen, answers, share = resampling.informative(
        rows(first, 0), further, generate, lambda of, _: of[0]["teaches"], lambda n: n, group, rounds
    )

    assert len(chosen) == len(first) * group
    assert answers == ([row["name"] for row in chosen], None, [], {})
    names = [row["name"] for row in chosen]
    assert len(set(names)) == len(names)
    for k in range(0, len(chosen), group):
        assert [name.split("/")[0] for name in names[k : k + group]] == [names[k].split("/")[0]] * group
    teaching = sum(row["teaches"] for row in chosen) // group
    assert teaching == min(len(first), sum(drawn))
    assert share == sum(drawn) / len(drawn)
    if rounds == 0 or all(first):
        assert [row["name"] for row in chosen if row["teaches"]] == [
            row["name"] for row in rows(first, 0) if row["teaches"]
        ]
        assert len(drawn) == len(first)


def test_all_processes_draw_as_many_as_the_one_that_lacks_most() -> None:
    asked: list[int] = []

    def further(number: int, count: int) -> list[dict[str, Any]]:
        asked.append(count)
        return [{}] * count

    resampling.informative([{}] * 3, further, lambda rows: ([0] * len(rows),), lambda *_: True, lambda n: n + 2, 1, 2)
    assert asked == [2, 2]
