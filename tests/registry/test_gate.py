from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adfm.errors import AdfmError
from adfm.evaluation.metrics import COMPARED
from adfm.params import Gate, MetricRule
from adfm.registry.gate import Decision, Incomparable, decide, read


def predictions(images: int = 600, wrong: int = 60, iou: float = 0.4, categories: int = 3) -> pd.DataFrame:
    """Half of the images anomalous; the first `wrong` ones judged wrongly; every defect found with the same IoU."""
    anomalous = np.arange(images) % 2 == 0
    right = np.arange(images) >= wrong
    return pd.DataFrame(
        {
            "id": [f"{i:04}" for i in range(images)],
            "category": [f"part-{i // 2 % categories}" for i in range(images)],
            "defect": np.where(anomalous, "scratch", None),
            "label": np.where(anomalous, "anomalous", "normal"),
            "predicted": np.where(anomalous == right, "anomalous", "normal"),
            "score": 0.5,
            "iou": np.where(anomalous, iou, np.nan),
        }
    )


def verdicts(decision: Decision) -> tuple[str, str]:
    return decision.metrics["accuracy"]["verdict"], decision.metrics["iou"]["verdict"]


def test_the_first_model_passes_on_its_floors() -> None:
    decision = decide(predictions(), None, Gate())
    assert decision.passed and verdicts(decision) == ("no production", "no production")
    assert decision.metrics["accuracy"]["candidate"] == 0.9
    assert decision.metrics["accuracy"]["difference"] is None
    assert any("no model in production" in reason for reason in decision.reasons)


@pytest.mark.parametrize(("wrong", "iou", "passed"), [(240, 0.1, True), (241, 0.1, False), (240, 0.0999, False)])
def test_floors_are_reached_or_not(wrong: int, iou: float, passed: bool) -> None:
    decision = decide(predictions(wrong=wrong, iou=iou), None, Gate())
    assert decision.passed is passed
    assert ("missed" in decision.reasons[0]) is not passed


def test_a_floor_binds_whatever_the_gain() -> None:
    decision = decide(predictions(wrong=300), predictions(wrong=500), Gate())
    assert not decision.passed and verdicts(decision) == ("better", "equivalent")
    assert "floor of 60.0% is missed" in decision.reasons[0]


def test_the_same_model_again_gains_nothing() -> None:
    decision = decide(predictions(), predictions().sample(frac=1, random_state=0), Gate())
    assert not decision.passed and verdicts(decision) == ("equivalent", "equivalent")
    assert {decision.metrics[m][k] for m in ("accuracy", "iou") for k in ("difference", "low", "high")} == {0.0}
    assert "nothing to gain" in decision.reasons[0]


def test_one_better_and_one_equal_passes() -> None:
    assert verdicts(decide(predictions(wrong=30), predictions(), Gate())) == ("better", "equivalent")
    assert verdicts(decide(predictions(iou=0.5), predictions(), Gate())) == ("equivalent", "better")
    for candidate in (predictions(wrong=30), predictions(iou=0.5)):
        decision = decide(candidate, predictions(), Gate())
        assert decision.passed and not any(
            part[m]["fallen"] for part in decision.categories.values() for m in ("accuracy", "iou")
        )


@pytest.mark.parametrize(("lost", "verdict"), [(5, "equivalent"), (6, "equivalent"), (7, "worse")])
def test_a_loss_is_allowed_up_to_its_limit(lost: int, verdict: str) -> None:
    decision = decide(predictions(wrong=60 + lost, iou=0.5), predictions(), Gate())
    assert verdicts(decision) == (verdict, "better")
    assert decision.passed is (verdict == "equivalent")
    assert decision.metrics["accuracy"]["difference"] == pytest.approx(-lost / 600)
    if verdict == "worse":
        assert "worse by 1.2 points; 1.0 points are allowed" in decision.reasons[0]


def test_a_gain_in_one_does_not_pay_for_a_loss_in_the_other() -> None:
    decision = decide(predictions(wrong=0, iou=0.3), predictions(), Gate())
    assert not decision.passed and verdicts(decision) == ("better", "worse")


def test_a_gain_that_may_be_chance_is_none() -> None:
    assert verdicts(decide(predictions(wrong=59), predictions(), Gate()))[0] == "equivalent"
    mixed = predictions(wrong=58)
    mixed.loc[100:139, "predicted"] = (
        predictions().loc[100:139, "predicted"].map({"normal": "anomalous", "anomalous": "normal"})
    )
    before = predictions(wrong=60)
    before.loc[140:179, "predicted"] = mixed.loc[140:179, "predicted"].map(
        {"normal": "anomalous", "anomalous": "normal"}
    )
    decision = decide(mixed, before, Gate())
    assert decision.metrics["accuracy"]["difference"] > 0 > decision.metrics["accuracy"]["low"]
    assert verdicts(decision)[0] == "equivalent" and not decision.passed
    assert any("cannot be excluded with 95% confidence; about" in reason for reason in decision.reasons)


def test_a_gain_below_the_smallest_is_none() -> None:
    rule = MetricRule(floor=0.6, min_gain=0.05)
    assert verdicts(decide(predictions(wrong=30), predictions(), Gate(accuracy=rule)))[0] == "better"
    assert verdicts(decide(predictions(wrong=31), predictions(), Gate(accuracy=rule)))[0] == "equivalent"


def test_a_gain_below_the_smallest_share_of_production_is_none() -> None:
    rule = MetricRule(floor=0.1, min_relative_gain=0.25)
    assert verdicts(decide(predictions(iou=0.5), predictions(iou=0.4), Gate(iou=rule)))[1] == "better"
    assert verdicts(decide(predictions(iou=0.49), predictions(iou=0.4), Gate(iou=rule)))[1] == "equivalent"


@pytest.mark.parametrize(
    ("rule", "passing"),
    [
        ("none_worse_one_better", {("better", "equivalent"), ("better", "better")}),
        ("none_worse", {("equivalent", "equivalent"), ("better", "equivalent"), ("better", "better")}),
        ("all_better", {("better", "better")}),
    ],
)
def test_the_rule_joins_the_verdicts(rule: Any, passing: set[tuple[str, str]]) -> None:
    for wrong, iou in ((60, 0.4), (30, 0.4), (30, 0.5), (90, 0.5)):
        candidate = predictions(wrong=wrong, iou=iou)
        decision = decide(candidate, predictions(), Gate(rule=rule))
        assert decision.passed is (verdicts(decision) in passing)
        assert "The rule: " in decision.reasons[-1]


@pytest.mark.parametrize(("confidence", "verdict"), [(0.97, "better"), (0.985, "equivalent")])
def test_confidence_is_one_sided(confidence: float, verdict: str) -> None:
    # Four images won of 600, none lost: no gain is drawn with probability (596 / 600) ** 600, 1.8 %.
    gate = Gate(confidence=confidence, bootstrap=20000)
    assert verdicts(decide(predictions(wrong=56), predictions(), gate))[0] == verdict


def test_direction_lower_turns_the_rule_round() -> None:
    gate = Gate(accuracy=MetricRule(direction="lower", floor=0.95), iou=MetricRule(floor=0.1))
    decision = decide(predictions(wrong=90), predictions(wrong=60), gate)
    assert decision.passed and verdicts(decision)[0] == "better"
    assert decision.metrics["accuracy"]["difference"] == pytest.approx(-0.05)
    assert verdicts(decide(predictions(wrong=60), predictions(wrong=90), gate))[0] == "worse"
    assert verdicts(decide(predictions(wrong=61), predictions(wrong=60), gate))[0] == "equivalent"
    assert not decide(predictions(wrong=0), None, gate).passed


def test_a_category_that_falls_stops_a_better_model() -> None:
    candidate = predictions(wrong=0, categories=12)
    there = candidate.index[candidate["category"] == "part-3"]
    candidate.loc[there[:8], "predicted"] = candidate.loc[there[:8], "predicted"].map(
        {"normal": "anomalous", "anomalous": "normal"}
    )
    production = predictions(wrong=60, categories=12)
    production.loc[there, "predicted"] = production.loc[there, "label"]
    decision = decide(candidate, production, Gate())
    assert verdicts(decision)[0] == "better" and not decision.passed
    assert decision.categories["part-3"]["accuracy"]["fallen"] and decision.categories["part-3"]["images"] == 50
    assert not decision.categories["part-4"]["accuracy"]["fallen"]
    assert decision.reasons[0].startswith("part-3: Accuracy") and "worse by 16.0 points" in decision.reasons[0]
    assert decide(candidate, production, Gate(category_max_loss=0.16)).passed


@pytest.mark.parametrize(("categories", "fallen"), [(2, True), (30, False)])
def test_among_many_categories_some_fall_by_chance(categories: int, fallen: bool) -> None:
    # Five images lost of 20: no loss is drawn with probability 0.75 ** 20, 0.3 %; of 60 comparisons each gets 0.08 %.
    images = 20 * categories
    candidate, production = (predictions(images, 0, iou=iou, categories=categories) for iou in (0.6, 0.4))
    lost = candidate.index[candidate["category"] == "part-0"][:5]
    candidate.loc[lost, "predicted"] = candidate.loc[lost, "label"].map({"normal": "anomalous", "anomalous": "normal"})
    decision = decide(candidate, production, Gate(min_images=10))
    assert decision.categories["part-0"]["accuracy"]["difference"] == -0.25
    assert decision.categories["part-0"]["accuracy"]["fallen"] is fallen


def test_a_category_whose_iou_falls_stops_a_better_model() -> None:
    candidate = predictions(iou=0.6)
    candidate.loc[(candidate["category"] == "part-1") & candidate["iou"].notna(), "iou"] = 0.25
    decision = decide(candidate, predictions(), Gate())
    assert verdicts(decision) == ("equivalent", "better") and not decision.passed
    assert decision.categories["part-1"]["iou"]["fallen"] and not decision.categories["part-1"]["accuracy"]["fallen"]


def test_one_image_of_a_tiny_category_is_told_and_not_punished() -> None:
    candidate, production = predictions(wrong=30), predictions()
    for table in (candidate, production):
        table.loc[596:599, "category"] = "rare"
    candidate.loc[599, "predicted"] = "anomalous"
    decision = decide(candidate, production, Gate())
    assert decision.categories["rare"]["accuracy"]["difference"] == -0.25
    assert decision.passed
    assert any(reason.startswith("rare: Accuracy") and "may be chance" in reason for reason in decision.reasons)


def test_a_category_without_defects_has_no_iou() -> None:
    candidate, production = predictions(wrong=30), predictions()
    for table in (candidate, production):
        table.loc[table["label"] == "normal", "category"] = "clean"
    decision = decide(candidate, production, Gate())
    assert decision.passed and decision.categories["clean"]["iou"]["difference"] is None


def test_equal_categories_of_two_data_sets_are_told_apart() -> None:
    table = predictions(categories=1).assign(dataset=["a", "b"] * 300)
    assert set(decide(table, None, Gate()).categories) == {"a/part-0", "b/part-0"}


def test_an_unparseable_answer_is_wrong() -> None:
    table = predictions(wrong=0)
    table.loc[0:299, "predicted"] = None
    assert decide(table, None, Gate()).metrics["accuracy"]["candidate"] == 0.5


@pytest.mark.parametrize("convert", [pd.DataFrame.convert_dtypes, lambda t: t.astype(object), lambda t: t])
def test_any_column_type_gives_the_same_decision(convert: Any) -> None:
    candidate, production = predictions(wrong=30), predictions()
    candidate.loc[0:9, "predicted"] = None
    expected = decide(candidate, production, Gate())
    assert decide(convert(candidate), convert(production), Gate()) == expected


def test_a_decision_is_json() -> None:
    for production in (None, predictions(wrong=80)):
        decision = decide(predictions(), production, Gate())
        again = json.loads(json.dumps(dataclasses.asdict(decision), allow_nan=False))
        assert Decision(**again) == decision


# ------------------------------------------------------------------------------------------------- refusals


def changed(rows: int | slice, column: str, value: Any) -> pd.DataFrame:
    table = predictions(20).astype({"iou": object})
    table.loc[rows, column] = value
    return table


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (predictions(20).drop(columns="iou"), "no column iou; it has id, category"),
        (predictions(20).drop(columns=["iou", "label"]), "no column label and no column iou"),
        (predictions(0, 0), "is empty"),
        (pd.DataFrame(), "no column id"),
        (changed(3, "id", "0002"), r"more than once: row 2 \(0002\), row 3 \(0002\)"),
        (changed(3, "id", None), r"missing id: row 3"),
        (changed(3, "category", None), r"no category or data set: row 3 \(0003\)"),
        (changed(3, "label", "defective"), r"label other than.*row 3 \(0003\)"),
        (changed(3, "label", None), r"label other than.*row 3 \(0003\)"),
        (changed(3, "predicted", "A"), r"prediction other than.*row 3 \(0003\)"),
        (changed(4, "iou", np.nan), r"no IoU in \[0, 1\].*row 4 \(0004\)"),
        (changed(4, "iou", np.inf), r"no IoU in \[0, 1\].*row 4 \(0004\)"),
        (changed(4, "iou", -0.1), r"no IoU in \[0, 1\].*row 4 \(0004\)"),
        (changed(4, "iou", "high"), r"no IoU in \[0, 1\].*row 4 \(0004\)"),
        (changed(3, "iou", 0.3), r"IoU on a normal image: row 3 \(0003\)"),
        (predictions(20)[lambda t: t["label"] == "normal"], "no anomalous image"),
    ],
)
def test_a_broken_table_is_refused_on_either_side(table: pd.DataFrame, message: str) -> None:
    with pytest.raises(Incomparable, match=f"(?s)The candidate table.*{message}") as caught:
        decide(table, predictions(20), Gate())
    assert isinstance(caught.value, AdfmError) and caught.value.exit_code == 2
    with pytest.raises(Incomparable, match=f"(?s)The production table.*{message}"):
        decide(predictions(20), table, Gate())


def test_all_that_is_wrong_is_said_at_once() -> None:
    table = changed(3, "predicted", "A")
    table.loc[4, "iou"] = None
    table.loc[7, "label"] = "?"
    with pytest.raises(Incomparable) as caught:
        decide(table, None, Gate())
    assert all(key in str(caught.value) for key in ("0003", "0004", "0007"))


def test_other_images_are_refused() -> None:
    with pytest.raises(Incomparable, match=r"1 only in the first \(0000\), 0 only in the second \(none\)"):
        decide(predictions(20), predictions(20).iloc[1:], Gate())


def test_too_few_images_are_refused() -> None:
    with pytest.raises(Incomparable, match="29 normal and 29 anomalous; at least 30 of each"):
        decide(predictions(58), predictions(58), Gate())
    assert not decide(predictions(60, 6), predictions(60, 6), Gate()).passed


def test_tables_made_in_another_way_are_refused(tmp_path: Path) -> None:
    candidate, production = predictions(wrong=0), predictions()
    candidate.attrs = {"prompt": "a", "split": "test"}
    production.attrs = {"prompt": "b", "split": "test"}
    for name, table in (("candidate", candidate), ("production", production)):
        table.to_parquet(tmp_path / name)
    with pytest.raises(Incomparable, match="not evaluated in the same way(?s:.*)- prompt: a and b$"):
        decide(read(tmp_path / "candidate"), read(tmp_path / "production"), Gate())
    production.attrs["prompt"] = "a"
    assert decide(candidate, production, Gate()).passed


@pytest.mark.parametrize("content", [b"", b"PAR1 and then nothing", None])
def test_what_is_no_table_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "table").write_bytes(content)
    with pytest.raises(Incomparable, match="table cannot be read as a prediction table"):
        read(tmp_path / "table")


@pytest.mark.parametrize(("column", "value"), [("label", "normal"), ("category", "other")])
def test_other_truth_for_an_image_is_refused(column: str, value: str) -> None:
    production = predictions(20)
    production.loc[4, column] = value
    production.loc[production["label"] == "normal", "iou"] = np.nan
    with pytest.raises(Incomparable, match=f"{column}: 0004"):
        decide(predictions(20), production, Gate())


# ------------------------------------------------------------------------------------------------- properties

FAST = Gate(bootstrap=100, min_images=1)
answer = st.sampled_from(["normal", "anomalous", None])
row = st.tuples(answer, answer, st.integers(0, 10), st.integers(0, 10))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[pd.DataFrame, pd.DataFrame]:
    rows = draw(st.lists(row, min_size=4, max_size=24))
    base = predictions(len(rows), 0, categories=2)
    tables = []
    for side in (0, 1):
        table = base.assign(predicted=pd.Series([r[side] for r in rows], dtype=object))
        found = (table["label"] == "anomalous") & (table["predicted"] == "anomalous")
        table["iou"] = np.where(
            found, [r[2 + side] / 10 for r in rows], np.where(table["label"] == "anomalous", 0, np.nan)
        )
        tables.append(table)
    return tables[0], tables[1]


@settings(deadline=None, max_examples=25)
@given(pairs(), st.floats(0, 1), st.floats(0, 1))
def test_nothing_passes_under_a_floor(pair: Any, accuracy: float, iou: float) -> None:
    gate = FAST.model_copy(update={"accuracy": MetricRule(floor=accuracy), "iou": MetricRule(floor=iou)})
    candidate, production = pair
    reached = ((candidate["predicted"] == candidate["label"]).mean() >= accuracy - 1e-8) and (
        candidate["iou"].mean() >= iou - 1e-8
    )
    assert reached or not decide(candidate, production, gate).passed
    assert reached or not decide(candidate, None, gate).passed


@settings(deadline=None, max_examples=25)
@given(pairs())
def test_what_passes_measures_no_worse_and_something_better(pair: Any) -> None:
    decision = decide(*pair, FAST)
    differences = [found["difference"] for found in decision.metrics.values()]
    if decision.passed:
        assert min(differences) >= -0.01 and max(differences) > 0
    for found in decision.metrics.values():
        assert found["low"] <= found["high"]
    assert not decide(pair[0], pair[0], FAST).passed


@settings(deadline=None, max_examples=25)
@given(pairs(), st.integers(0, 1000))
def test_the_order_of_rows_does_not_matter(pair: Any, seed: int) -> None:
    shuffled = [table.sample(frac=1, random_state=seed + side) for side, table in enumerate(pair)]
    assert decide(*shuffled, FAST) == decide(*pair, FAST)


@settings(deadline=None, max_examples=25)
@given(pairs(), st.data())
def test_a_better_candidate_never_fails_where_a_worse_one_passes(pair: Any, data: st.DataObject) -> None:
    candidate, production = pair
    gate = FAST.model_copy(update={"accuracy": MetricRule(floor=0.3), "confidence": 0.6})
    better = candidate.copy()
    for i in data.draw(st.lists(st.integers(0, len(candidate) - 1), min_size=1)):
        better.loc[i, "predicted"] = better.loc[i, "label"]
        if better.loc[i, "label"] == "anomalous":
            better.loc[i, "iou"] = min(1.0, better.loc[i, "iou"] + 0.1)
    assert decide(better, production, gate).passed or not decide(candidate, production, gate).passed


# ------------------------------------------------------------------------------------------------- decisions


def decided(table: pd.DataFrame, overkill: int, iou: float, threshold: float = 0.5) -> pd.DataFrame:
    """The table with right decisions, but for `overkill` normal images that are flagged; regions overlap by `iou`."""
    decision = table["label"].to_numpy(dtype=object).copy()
    decision[np.flatnonzero(table["label"] == "normal")[:overkill]] = "anomalous"
    anomalous = (table["label"] == "anomalous").to_numpy()
    regions = {f"region_{name}": np.where(anomalous, iou if "iou" in name else 1.0, np.nan) for name in COMPARED}
    table = table.assign(decision=decision, **regions)
    table.attrs["threshold"] = threshold
    return table


def test_decisions_are_judged_and_not_letters() -> None:
    letters = predictions(wrong=300, iou=0.1)
    decision = decide(decided(letters, overkill=30, iou=0.4), None, Gate())
    assert decision.passed
    assert decision.metrics["accuracy"]["candidate"] == pytest.approx(1 - 30 / 600)
    assert decision.metrics["iou"]["candidate"] == pytest.approx(0.4)
    assert "The candidate is judged by its decisions: an image is flagged from a probability of 0.5 on." in (
        decision.reasons
    )


def test_each_model_is_judged_as_it_decides_in_production() -> None:
    candidate = decided(predictions(wrong=300), overkill=30, iou=0.5, threshold=0.2)
    for production in (predictions(wrong=60), decided(predictions(wrong=300), overkill=60, iou=0.4, threshold=0.7)):
        decision = decide(candidate, production, Gate())
        assert decision.metrics["accuracy"]["production"] == pytest.approx(0.9)
        assert verdicts(decision) == ("better", "better")
        words = "has no threshold: its letters are judged" if "decision" not in production else "of 0.7 on"
        assert any(reason.startswith("Production ") and words in reason for reason in decision.reasons)


def test_without_a_threshold_letters_are_judged_and_it_says_so() -> None:
    table = decided(predictions(), 0, 0.4).assign(decision=predictions()["predicted"])
    table.attrs["threshold"] = None
    decision = decide(table, None, Gate())
    assert decision.metrics["accuracy"] == decide(predictions(), None, Gate()).metrics["accuracy"]
    assert "The candidate has no threshold: its letters are judged." in decision.reasons


def test_decisions_without_regions_cannot_be_judged() -> None:
    table = decided(predictions(), 0, 0.4).drop(columns=["region_iou"])
    with pytest.raises(Incomparable, match="candidate table cannot be judged: .* no region_iou; evaluate again"):
        decide(table, None, Gate())
    with pytest.raises(Incomparable, match="a prediction other than normal, anomalous and null: row 3"):
        odd = predictions()["label"].where(np.arange(600) != 3, "perhaps")
        decide(decided(predictions(), 0, 0.4).assign(decision=odd), None, Gate())


def without_boxes(table: pd.DataFrame, share: float) -> pd.DataFrame:
    """The table with its boxes, of which the first anomalous images have none."""
    anomalous = table["label"] == "anomalous"
    alone = anomalous & (anomalous.cumsum() <= share * anomalous.sum())
    boxes = [[[1, 1, 9, 9]] if there else [] for there in anomalous & ~alone]
    return table.assign(boxes=boxes, iou=table["iou"].mask(alone))


def test_images_without_boxes_are_left_out_of_iou_and_counted() -> None:
    decision = decide(without_boxes(predictions(), 0.5), without_boxes(predictions(iou=0.3), 0.5), Gate())
    assert decision.passed and verdicts(decision) == ("equivalent", "better")
    assert decision.metrics["iou"]["candidate"] == 0.4
    assert "150 of 300 anomalous images have no boxes; they are left out of IoU." in decision.reasons


def test_an_iou_that_no_image_has_is_not_judged_and_keeps_no_floor() -> None:
    candidate, production = without_boxes(predictions(wrong=20), 1), without_boxes(predictions(), 1)
    for rival in (None, production):
        decision = decide(candidate, rival, Gate())
        assert not decision.passed and decision.metrics["iou"]["verdict"] == "not judged"
        assert decision.reasons[0] == (
            "IoU (overlap of marked and true defects) is not judged: no anomalous image has boxes. Whether the floor of"
            " 10.0% is kept cannot be said; add images with boxes, or set gate.iou.floor to 0 to decide without it."
        )
        decision = decide(candidate, rival, Gate(iou=MetricRule(floor=0)))
        assert decision.passed and decision.metrics["iou"]["candidate"] is None
        assert any("is not judged: no anomalous image has boxes" in reason for reason in decision.reasons)
        assert "300 of 300 anomalous images have no boxes; they are left out of IoU." in decision.reasons
        json.dumps(dataclasses.asdict(decision), allow_nan=False)
    assert not decide(candidate, production, Gate(iou=MetricRule(floor=0), rule="all_better")).passed
    assert not decide(production, candidate, Gate(iou=MetricRule(floor=0))).passed


def test_an_iou_that_lacks_or_is_there_against_the_boxes_is_refused() -> None:
    table = without_boxes(predictions(), 0.5)
    with pytest.raises(Incomparable, match="no IoU in .0, 1. on an anomalous image: row 598"):
        decide(table.assign(iou=table["iou"].mask(table["id"] == "0598")), None, Gate())
    with pytest.raises(Incomparable, match="an IoU on an image without boxes: row 0"):
        decide(table.assign(iou=table["iou"].where(table["id"] != "0000", 0.5)), None, Gate())
