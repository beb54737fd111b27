"""Images that a policy needs, for the whole and the parts of a data set."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from adfm import statistics
from adfm.evaluation.gate_metrics import METRICS, Bound
from adfm.registry import plan
from adfm.registry.policy import Policy


def images(normal: int, anomalous: int, located: int, category: str = "gear", defect: str = "dent") -> pd.DataFrame:
    """A category: `located` of the anomalous images have a box."""
    label = ["normal"] * normal + ["anomalous"] * anomalous
    boxes = [[]] * (normal + anomalous - located) + [[[0.0, 0.0, 1.0, 1.0]]] * located
    return pd.DataFrame(
        {
            "category": category,
            "label": label,
            "boxes": boxes,
            "defect": [None] * normal + [defect] * anomalous,
            "dataset": "own",
            "group": None,
        }
    )


def test_each_metric_counts_its_own_images() -> None:
    needs = plan.plan(Policy(), images(40, 30, 20))
    assert {need.metric: need.images for need in needs} == {
        "accuracy": 70,
        "iou": 20,
        "escape_rate": 30,
        "overkill": 40,
    }
    assert all(need.of == "whole" and need.name == "" and need.judged for need in needs)


def test_only_images_with_masks_count_for_the_iou_with_them() -> None:
    policy = Policy(whole={"mask_iou": Bound(limit=0.1)}, parts={})
    table = images(40, 30, 20)
    for masked in (0, 10):
        (need,) = plan.plan(policy, table.assign(mask_iou=[np.nan] * (70 - masked) + [1.0] * masked))
        assert need.images == masked
    assert plan.plan(policy, table)[0].images == 0


def test_numbers_are_those_of_the_gate_at_the_look() -> None:
    policy = Policy()
    for look in (1, 7, 20, 25):
        level = statistics.level_of_look(min(look, 20), 20, 0.05)
        needs = {(need.metric, need.question): need for need in plan.plan(policy, images(40, 30, 20), look)}
        escapes = needs["escape_rate", "limit"]
        assert escapes.bound == policy.whole["escape_rate"].limit
        assert escapes.needed == tuple(
            statistics.images_for_rate(escapes.bound / 2, escapes.bound, level, power) for power in plan.POWERS
        )
        loss = needs["iou", "margin"]
        assert loss.needed == tuple(
            statistics.images_for_loss(math.sqrt(0.12), loss.bound, level, power) for power in plan.POWERS
        )


@pytest.mark.parametrize("name", METRICS)
def test_what_a_policy_does_not_ask_needs_nothing(name: str) -> None:
    policy = Policy(whole={name: Bound()}, parts={})
    assert plan.plan(policy, images(40, 30, 20)) == []
    (need,) = plan.plan(Policy(whole={name: Bound(margin=0.1)}, parts={}), images(40, 30, 20))
    assert (need.metric, need.question) == (name, "margin")


@pytest.mark.parametrize("name", METRICS)
def test_limits_that_ask_nothing_or_perfection(name: str) -> None:
    nothing, perfect = (0.0, 1.0) if METRICS[name].higher else (1.0, 0.0)
    (loose,) = plan.plan(Policy(whole={name: Bound(limit=nothing)}, parts={}), images(40, 30, 20))
    assert loose.needed == (0, 0) and not loose.lacks
    (strict,) = plan.plan(Policy(whole={name: Bound(limit=perfect)}, parts={}), images(40, 30, 20))
    assert strict.needed == (None, None) and strict.lacks


def test_parts_are_categories_and_kinds_of_defect() -> None:
    table = pd.concat([images(120, 110, 110), images(10, 20, 20, "leather", "scratch")], ignore_index=True)
    parts = [need for need in plan.plan(Policy(), table) if need.of != "whole"]
    assert {(need.of, need.name) for need in parts} == {
        ("category", "gear"),
        ("category", "leather"),
        ("defect", "dent"),
        ("defect", "scratch"),
    }
    assert {need.metric for need in parts if need.of == "defect"} == {"iou", "escape_rate"}
    assert {need.name for need in parts if not need.judged} == {"leather", "scratch"}


def test_the_text_says_what_is_missing() -> None:
    table = pd.concat([images(400, 500, 500), images(10, 20, 20, "lea\x1b[2Jther", "scratch")], ignore_index=True)
    text = plan.text(plan.plan(Policy(), table), Policy())
    assert "overkill" in text and "410 normal images" in text
    assert next(line for line in text.splitlines() if "loss" in line and "normal" in line).endswith("too few")
    assert next(line for line in text.splitlines() if line.startswith("accuracy") and "60.0%" in line).endswith(
        "enough"
    )
    assert "not judged below 100" in text and "lea\\x1b[2Jther" in text and "\x1b" not in text
    assert "gear" not in text  # has enough
    assert "The smallest gain that is shown with power 0.8: accuracy by 3." in text
    assert "smallest gain" not in plan.text(plan.plan(Policy(), table), Policy(rule="noninferior"))
    alone = plan.text(plan.plan(Policy(), images(900, 900, 900)), Policy())
    assert "too few" not in alone and "not judged" not in alone


def test_the_test_split_of_shards_is_planned(small_shards: Path) -> None:
    text = plan.of_shards(small_shards, Policy())
    assert "too few" in text and "look 1 of 20" in text
    assert np.all([METRICS[name].title in text for name in Policy().whole])
    policy = Policy(whole={"mask_iou": Bound(limit=0.1)}, parts={})
    assert "mask IoU  ≥ 10.0%" in plan.of_shards(small_shards, policy)
    assert "24 anomalous images with masks" in plan.of_shards(small_shards, policy)


def test_images_of_one_part_are_pointed_out(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adfm.data import shards

    table = images(40, 40, 40).assign(group=[f"part {number // 2}" for number in range(80)])

    class Table:
        def to_pandas(self) -> pd.DataFrame:
            return table

    monkeypatch.setattr(shards, "table", lambda folder, split: Table())
    assert "The 80 images show 40 parts" in plan.of_shards(small_shards, Policy())
