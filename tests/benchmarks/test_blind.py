"""No completion that ignores the image earns what looking earns; benchmarks/blind.py searches for the best of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from adfm.method.coordinates import PUBLISHED
from adfm.method.rewards import PROFILES, in_training
from adfm.params import Params
from adfm.records import Box, Label

FILE = Path(__file__).parents[2] / "benchmarks" / "blind.py"
IMAGES, STEPS = 30, 30


@pytest.fixture(scope="module")
def blind() -> ModuleType:
    spec = importlib.util.spec_from_file_location("blind", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def total(profile: str) -> Callable[[str, Label, Sequence[Box]], float]:
    return lambda text, label, boxes: PROFILES[profile](text, label, boxes).total


@pytest.fixture(scope="module", params=["scattered", "central"])
def searched(request: pytest.FixtureRequest, blind: ModuleType) -> tuple[Any, Any]:
    truth = blind.draw(request.param, IMAGES, seed=0)
    return truth, blind.search(total("calibrated"), truth, seed=0, steps=STEPS)


def test_the_best_blind_completion_earns_less_than_looking(blind: ModuleType, searched: tuple[Any, Any]) -> None:
    truth, tried = searched
    by_letter, perfect = blind.looking(total("calibrated"), truth), blind.perfect(total("calibrated"), truth)
    fixed = blind.fixed(by_letter)
    for share in blind.SHARES:
        _, earned = blind.best_blind(tried, share)
        assert perfect.at(share) == pytest.approx(3)
        # Always-B misses every anomalous image and always-A every normal one: each miss costs nearly two of three.
        assert earned < 3 - 1.8 * min(share, 1 - share)
        assert earned < blind.weighing(by_letter, share)
        if 0.35 <= share <= 0.9:
            assert earned < blind.weighing(by_letter, share) - 0.1
        if 0.4 <= share <= 0.85:
            assert earned < fixed.at(share) - 0.09
    default = Params().train.anomalous_share
    assert blind.best_blind(tried, default)[1] < fixed.at(default) - 0.3


def test_saying_that_nothing_stands_out_and_answering_a_is_far_from_the_best(
    blind: ModuleType, searched: tuple[Any, Any]
) -> None:
    _, tried = searched
    constant = tried[blind.NOTHING_STANDS_OUT]
    assert constant.at(0.55) == pytest.approx(0.55 * (0.75 + 1 + 0.05) + 0.45 * 0.75)
    assert all(constant.at(share) < blind.best_blind(tried, share)[1] - 0.2 for share in blind.SHARES)


def test_in_a_set_without_boxes_the_best_blind_completion_earns_the_commoner_letter(blind: ModuleType) -> None:
    def score(text: str, label: Label, boxes: Sequence[Box]) -> float:
        return in_training("calibrated", text, label, boxes, PUBLISHED, located=False).total

    tried = {text: blind.earnings(score, text, [[]]) for text in blind.families()}
    for share in blind.SHARES:
        assert blind.best_blind(tried, share)[1] == pytest.approx(1 + max(share, 1 - share))
        assert blind.perfect(score, [[]]).at(share) == pytest.approx(2)


def test_the_number_of_regions_alone_earns_no_more_than_the_commoner_letter(blind: ModuleType) -> None:
    def score(text: str, label: Label, boxes: Sequence[Box]) -> float:
        return PROFILES["calibrated"](text, label, boxes).regions

    truth = blind.draw("scattered", IMAGES, seed=0)
    tried = {text: blind.earnings(score, text, truth) for text in blind.families()}
    for share in blind.SHARES:
        assert blind.best_blind(tried, share)[1] <= max(share, 1 - share)
        assert blind.perfect(score, truth).at(share) == pytest.approx(1)


def test_the_search_finds_what_a_reward_pays_by_mistake(blind: ModuleType) -> None:
    """Where normal images pay for one box of any answer, the best blind completion beats the perfect one."""
    truth = blind.draw("scattered", IMAGES, seed=0)
    tried = blind.search(total("paper"), truth, seed=0, steps=STEPS)
    assert blind.best_blind(tried, 0.2)[1] > blind.perfect(total("paper"), truth).at(0.2) + 0.2


def test_where_every_defect_is_at_one_place_the_search_finds_it(blind: ModuleType) -> None:
    truth = blind.draw("one place", IMAGES, seed=0)
    tried = blind.search(total("calibrated"), truth, seed=0, steps=STEPS)
    text, earned = blind.best_blind(tried, 0.95)
    assert text == blind.completion(truth[0], "A")
    assert earned == pytest.approx(0.95 * 3 + 0.05)


def test_the_search_repeats_itself(blind: ModuleType) -> None:
    first, again = (blind.search(total("calibrated"), blind.draw("central", 5, 1), seed=3, steps=15) for _ in range(2))
    assert first == again
