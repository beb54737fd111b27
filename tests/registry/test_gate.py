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
from adfm.evaluation.gate_metrics import METRICS, Bound, Metric
from adfm.evaluation.metrics import COMPARED
from adfm.registry import gate
from adfm.registry.gate import Answer, Decision, decide
from adfm.registry.policy import Policy, dumps, loads
from adfm.registry.tables import Incomparable, read


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


def answers(decision: Decision, question: str, of: str = "whole", name: str = "") -> dict[str, Answer]:
    """The answers to one question by metric."""
    return {
        row.metric: answer
        for row in decision.rows
        if (row.of, row.name) == (of, name)
        for answer in row.answers
        if answer.question == question
    }


def flipped(table: pd.DataFrame, rows: Any) -> pd.DataFrame:
    """The table with the other answer in some rows."""
    other = {"normal": "anomalous", "anomalous": "normal"}
    table = table.copy()
    table.loc[rows, "predicted"] = table.loc[rows, "predicted"].map(other)
    return table


def policy(**changes: Any) -> Policy:
    """The default policy with other settings; `whole_iou={...}` changes one metric."""
    values = Policy().model_dump()
    for key, value in changes.items():
        part, _, metric = key.partition("_")
        if part in ("whole", "parts") and metric:
            values[part][metric] = values[part].get(metric, {}) | value
        else:
            values[key] = value
    return Policy.model_validate(values)


# One look has the whole level.
ONE = policy(looks=1)


def test_the_first_version_passes_on_its_limits() -> None:
    decision = decide(predictions(), None, None, Policy())
    assert decision.verdict == "passed"
    assert decision.headline == "There is no model in production yet: the limits alone decide."
    assert {row.metric for row in decision.rows} == {"accuracy", "iou", "escape_rate", "overkill"}
    accuracy = next(row for row in decision.rows if row.metric == "accuracy")
    assert (accuracy.candidate, accuracy.production, accuracy.images) == (0.9, None, 600)


def test_no_escape_of_n_has_the_exact_limit() -> None:
    decision = decide(predictions(wrong=0), None, None, ONE)
    (bound,) = (answers(decision, "limit")["escape_rate"].bound,)
    assert bound == pytest.approx(1 - 0.05 ** (1 / 300))


@pytest.mark.parametrize(
    ("escapes", "verdict"),
    [(0, "passed"), (85, "passed"), (105, "cannot tell"), (125, "failed")],
)
def test_a_limit_is_kept_broken_or_cannot_be_told(escapes: int, verdict: str) -> None:
    table = flipped(predictions(wrong=0), predictions()["id"].index[::2][:escapes])
    decision = decide(table, None, None, policy(looks=1, whole_accuracy={"limit": None}, parts={}))
    assert decision.verdict == verdict
    assert answers(decision, "limit")["escape_rate"].verdict == verdict
    if verdict == "passed":
        assert not any("Escape" in reason for reason in decision.reasons)
    else:
        assert decision.reasons[0].startswith(f"Escape rate: {escapes / 300:.1%} of 300 anomalous images")
        assert "limit of 35.0%" in decision.reasons[0] or "the limit is 35.0%" in decision.reasons[0]


def test_too_few_images_cannot_tell_and_it_says_how_many_would() -> None:
    decision = decide(predictions(20, 0), None, None, policy(looks=1, whole_escape_rate={"limit": 0.05}))
    answer = answers(decision, "limit")["escape_rate"]
    assert decision.verdict == "cannot tell" and answer.verdict == "cannot tell"
    assert answer.needed is not None and answer.needed == 59  # 1 - 0.05 ** (1 / 59) < 0.05
    assert f"About {answer.needed} anomalous images would tell." in decision.reasons[0]
    enough = decide(predictions(2 * answer.needed, 0), None, None, policy(looks=1, whole_escape_rate={"limit": 0.05}))
    assert answers(enough, "limit")["escape_rate"].verdict == "passed"


def test_the_same_model_again_gains_nothing() -> None:
    decision = decide(predictions(), predictions().sample(frac=1, random_state=0), None, Policy())
    assert decision.verdict == "failed" and decision.headline.startswith("No better than production: accuracy 90.0%")
    assert decision.reasons[0] == decision.headline and not decision.changed
    assert decide(predictions(), predictions(), None, policy(rule="noninferior")).passed


@pytest.mark.parametrize("candidate", [predictions(wrong=30), predictions(iou=0.6)])
def test_a_gain_in_accuracy_or_iou_passes(candidate: pd.DataFrame) -> None:
    decision = decide(candidate, predictions(), None, Policy())
    assert decision.passed and decision.headline.startswith("Better than production: ")
    assert [answer.verdict for answer in answers(decision, "gain").values()].count("passed") == 1


def test_a_gain_that_may_be_chance_is_not_a_gain() -> None:
    decision = decide(predictions(wrong=57), predictions(), None, Policy())
    assert decision.verdict == "cannot tell"
    assert decision.headline.startswith("No gain over production is shown") and "images would show" in decision.headline


def test_the_error_over_both_metrics_is_kept_at_the_level() -> None:
    # Five images won and none lost: p = 1/32 alone is below 5 %, and above half of it.
    decision = decide(predictions(wrong=55), predictions(), None, ONE)
    gain = answers(decision, "gain")["accuracy"]
    assert gain.bound == pytest.approx(1 / 32) and gain.verdict == "cannot tell"
    assert answers(decide(predictions(wrong=54), predictions(), None, ONE), "gain")["accuracy"].verdict == "passed"


def test_more_escapes_fail_whatever_the_accuracy_gains() -> None:
    anomalous = predictions()["label"] == "anomalous"
    normals, defects = np.flatnonzero(~anomalous), np.flatnonzero(anomalous)
    production = flipped(predictions(wrong=0), np.concatenate([normals[:75], defects[:15]]))
    candidate = flipped(predictions(wrong=0), np.concatenate([normals[:15], defects[100:145]]))
    decision = decide(candidate, production, None, Policy())
    assert answers(decision, "gain")["accuracy"].verdict == "passed"
    assert decision.verdict == "failed"
    assert any("Escape rate: 15.0% against 5.0% in production: worse by 10.0 points" in r for r in decision.reasons)


def test_a_loss_within_the_margin_needs_enough_images_to_be_shown() -> None:
    small = decide(predictions(60, 7, iou=0.7), predictions(60, 6), None, ONE)
    answer = answers(small, "production")["escape_rate"]
    assert small.verdict == "cannot tell" and answer.verdict == "cannot tell"
    assert answer.needed is not None and answer.needed > 30
    assert any(f"About {answer.needed} anomalous images would tell." in reason for reason in small.reasons)


def test_small_losses_do_not_add_up_against_the_anchor() -> None:
    anchor, production = predictions(2000, wrong=40), predictions(2000, wrong=160)
    candidate = predictions(2000, wrong=170, iou=0.6)
    assert decide(candidate, production, None, Policy()).passed
    decision = decide(candidate, production, anchor, Policy())
    assert decision.verdict == "failed"
    assert any("of the anchor: worse by" in reason for reason in decision.reasons)


def test_looks_spend_the_level_and_a_used_up_budget_asks_for_new_images() -> None:
    levels = [decide(predictions(), None, None, policy(looks=3), look).level for look in (1, 2, 3)]
    assert sum(levels) == pytest.approx(0.05) and levels == sorted(levels, reverse=True)
    decision = decide(predictions(wrong=0), predictions(), None, policy(looks=3), 4)
    assert decision.verdict == "cannot tell" and "New test images are due" in decision.reasons[0]


def test_a_category_that_falls_stops_a_better_model() -> None:
    production = predictions(1600, 160, categories=8)
    candidate = predictions(1600, 40, categories=8)
    there = production.index[production["category"] == "part-3"]
    production.loc[there, "predicted"] = production.loc[there, "label"]
    candidate.loc[there, "predicted"] = candidate.loc[there, "label"]
    assert decide(candidate, production, None, Policy()).passed
    decision = decide(flipped(candidate, there[:50]), production, None, Policy())
    assert answers(decision, "gain")["accuracy"].verdict == "passed" and decision.verdict == "failed"
    assert answers(decision, "production", "category", "part-3")["accuracy"].verdict == "failed"
    assert answers(decision, "production", "category", "part-4")["accuracy"].verdict == "passed"
    assert any("of category part-3" in reason and "worse by 25.0 points" in reason for reason in decision.reasons)


def test_a_kind_of_defect_that_falls_stops_a_better_model() -> None:
    kinds = np.where(np.arange(1600) % 8 == 0, "crack", "scratch")
    production, candidate = (
        table.assign(defect=np.where(table["label"] == "anomalous", kinds, None))
        for table in (predictions(1600, 160), predictions(1600, 0))
    )
    cracks = candidate.index[candidate["defect"] == "crack"]
    assert len(cracks) == 200
    decision = decide(flipped(candidate, cracks[20:90]), production, None, Policy())
    assert answers(decision, "production", "defect", "crack")["escape_rate"].verdict == "failed"
    assert decision.verdict == "failed" and "accuracy" not in answers(decision, "production", "defect", "crack")


def test_a_small_category_is_not_judged_unless_its_fall_is_certain() -> None:
    candidate, production = predictions(wrong=0), predictions()
    for table in (candidate, production):
        table.loc[560:599, "category"] = "rare"
    one = decide(flipped(candidate, [599]), production, None, Policy())
    assert one.passed and answers(one, "production", "category", "rare")["accuracy"].verdict == "not judged"
    assert any("Too few images to judge alone" in reason and "rare" in reason for reason in one.reasons)
    many = decide(flipped(candidate, list(range(575, 600))), production, None, Policy())
    assert answers(many, "production", "category", "rare")["accuracy"].verdict == "failed"
    assert many.verdict == "failed"


def test_equal_categories_of_two_data_sets_are_told_apart() -> None:
    table = predictions(categories=1).assign(dataset=["a", "b"] * 300)
    names = {row.name for row in decide(table, None, None, Policy()).rows if row.of == "category"}
    assert names == {"a/part-0", "b/part-0"}


def test_views_of_one_part_are_not_taken_for_independent() -> None:
    alone = predictions(600, 60)
    views = alone.assign(group=[f"part {number // 20}" for number in range(600)])
    bounds = [answers(decide(table, None, None, ONE), "limit")["escape_rate"].bound for table in (alone, views)]
    assert bounds[0] is not None and bounds[1] is not None and bounds[1] > bounds[0] + 0.02


def test_an_unparseable_answer_is_wrong() -> None:
    table = predictions(wrong=0)
    table.loc[0:299, "predicted"] = None
    decision = decide(table, None, None, Policy())
    assert {row.metric: row.candidate for row in decision.rows if row.of == "whole"} == {
        "accuracy": 0.5,
        "escape_rate": 0.5,
        "overkill": 0.5,
        "iou": 0.4,
    }


def test_images_whose_decision_changed_are_listed_with_both_answers() -> None:
    production = predictions(wrong=2)
    production.loc[5, "predicted"] = None
    decision = decide(predictions(wrong=0), production, None, Policy())
    assert decision.changed == [
        {"id": "0000", "category": "part-0", "label": "anomalous", "candidate": "anomalous", "production": "normal"},
        {"id": "0001", "category": "part-0", "label": "normal", "candidate": "normal", "production": "anomalous"},
        {"id": "0005", "category": "part-2", "label": "normal", "candidate": "normal", "production": "unparseable"},
    ]


def test_the_operating_point_is_that_of_the_line_and_not_of_the_test_set() -> None:
    point = decide(predictions(wrong=60), None, None, policy(looks=1, defect_rate=0.01)).operating_point
    assert point["escapes"][0] == pytest.approx(10_000 * 0.01 * 0.1)
    assert point["false_calls"][0] == pytest.approx(10_000 * 0.99 * 0.1)
    assert point["precision"][0] == pytest.approx(0.01 * 0.9 / (0.01 * 0.9 + 0.99 * 0.1))
    assert all(low < value < high for value, low, high in (point[n] for n in ("escapes", "false_calls", "precision")))


def test_what_was_trained_on_fails_and_what_is_not_known_cannot_tell() -> None:
    proved = {"images": 600, "against": {"candidate": 900}, "problems": [], "proved": True}
    assert decide(predictions(), None, None, Policy(), separation=proved).passed
    unknown = decide(predictions(), None, None, Policy(), separation=proved | {"proved": False})
    assert unknown.verdict == "cannot tell" and "is not known which images" in unknown.reasons[0]
    leak = {"kind": "same bytes", "ids": ["0003", "0004"], "of": "production"}
    leaked = decide(predictions(), None, None, Policy(), separation=proved | {"proved": False, "problems": [leak]})
    assert leaked.verdict == "failed"
    assert leaked.reasons[0].startswith("2 test images were in the training or validation data of the production")


def test_a_further_metric_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def dents(table: pd.DataFrame) -> Any:
        return np.where(table["defect"] == "scratch", table["predicted"] != "anomalous", np.nan).astype(float)

    entry = Metric("missed scratches", False, "scratches", dents, True, False, Bound(limit=0.15, margin=0.1), Bound())
    monkeypatch.setitem(METRICS, "scratches", entry)
    decision = decide(predictions(wrong=150), predictions(wrong=0), None, Policy())
    assert answers(decision, "limit")["scratches"].verdict == "failed"
    assert answers(decision, "production")["scratches"].verdict == "failed"
    assert any(reason.startswith("Missed scratches: 25.0% of 300 scratches") for reason in decision.reasons)
    assert any("missed scratches" in cells for cells in gate.table(dataclasses.asdict(decision)))
    assert loads(dumps(Policy())).whole["scratches"].limit == 0.15
    assert decide(predictions(), None, None, loads("whole: {scratches: {limit: 0.3}}")).passed


def masked(table: pd.DataFrame, iou: float) -> pd.DataFrame:
    """The table with an IoU of every second anomalous image with its mask."""
    return table.assign(mask_iou=np.where(np.arange(len(table)) % 4 == 0, iou, np.nan))


def test_the_iou_with_masks_is_judged_where_a_policy_names_it() -> None:
    better, production = masked(predictions(), 0.6), masked(predictions(), 0.4)
    judging = policy(whole_mask_iou={"limit": 0.3, "margin": 0.05})
    decision = decide(better, production, None, judging)
    assert decision.passed and decision.headline.startswith("Better than production: mask IoU 60.0% against 40.0%")
    (row,) = [row for row in decision.rows if row.metric == "mask_iou"]
    assert row.images == 150 and {answer.question for answer in row.answers} == {"limit", "production", "gain"}
    assert decide(production, better, None, judging).verdict == "failed"
    assert decide(masked(predictions(), 0.1), None, None, judging).reasons[0].startswith("Mask IoU: 10.0% over 150")
    # Named without a limit, it is a gain all the same.
    assert decide(better, production, None, policy(whole_mask_iou={})).passed


def test_the_iou_with_masks_changes_nothing_where_no_policy_names_it() -> None:
    candidate, production = predictions(wrong=54), predictions()
    before = decide(candidate, production, None, ONE)
    assert decide(masked(candidate, 0.1), masked(production, 0.4), None, ONE) == before
    assert "mask_iou" not in {row.metric for row in before.rows}


def test_without_masks_an_iou_with_them_cannot_be_told() -> None:
    judging = policy(whole_mask_iou={"margin": 0.05})
    for candidate, production in (
        (predictions(wrong=30), predictions()),
        (masked(predictions(wrong=30), 0.5), predictions()),
        (predictions(wrong=30), masked(predictions(), 0.5)),
    ):
        decision = decide(candidate, production, None, judging)
        assert decision.verdict == "cannot tell" and decision.reasons[0].startswith("Mask IoU: cannot be told")
        json.dumps(dataclasses.asdict(decision), allow_nan=False)


def test_of_decisions_the_regions_are_compared_with_the_mask() -> None:
    table = decided(predictions(wrong=300), overkill=0, iou=0.4)
    table.loc[0, "decision"] = "normal"
    decision = decide(table, None, None, policy(whole_mask_iou={"limit": 0.1}))
    assert measured(decision, "mask_iou")[0] == pytest.approx(0.4 * 299 / 300)


def test_the_table_begins_with_escapes_and_shows_parts_that_are_open() -> None:
    decision = decide(predictions(wrong=30), predictions(), None, Policy())
    header, *rows = gate.table(dataclasses.asdict(decision))
    assert header[:2] == ["verdict", "metric"] and all(len(row) == len(header) for row in rows)
    assert [row[1] for row in rows] == ["escape rate", "overkill", "accuracy", "IoU"]
    assert rows[2][0] == "better" and rows[0][0] == "passed"
    assert rows[0][header.index("candidate")].startswith("5.0% (")
    assert rows[0][header.index("difference")].startswith("-5.0% (at worst ")
    failing = decide(predictions(wrong=300), predictions(), None, Policy())
    assert any("category part-1" in row[1] for row in gate.table(dataclasses.asdict(failing)))


@pytest.mark.parametrize("convert", [pd.DataFrame.convert_dtypes, lambda t: t.astype(object), lambda t: t])
def test_any_column_type_gives_the_same_decision(convert: Any) -> None:
    candidate, production = predictions(wrong=30), predictions()
    candidate.loc[0:9, "predicted"] = None
    expected = decide(candidate, production, None, Policy())
    assert decide(convert(candidate), convert(production), None, Policy()) == expected


def test_a_decision_is_json() -> None:
    for production in (None, predictions(wrong=80)):
        decided = dataclasses.asdict(decide(predictions(), production, production, Policy()))
        assert json.loads(json.dumps(decided, allow_nan=False)) == decided


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
        (changed(3, "mask_iou", 0.3), r"IoU with a mask on a normal image: row 3 \(0003\)"),
        (changed(4, "mask_iou", 1.1), r"IoU with a mask that is not in \[0, 1\].*row 4 \(0004\)"),
    ],
)
def test_a_broken_table_is_refused_on_either_side(table: pd.DataFrame, message: str) -> None:
    with pytest.raises(Incomparable, match=f"(?s)The candidate table.*{message}") as caught:
        decide(table, predictions(20), None, Policy())
    assert isinstance(caught.value, AdfmError) and caught.value.exit_code == 2
    with pytest.raises(Incomparable, match=f"(?s)The production table.*{message}"):
        decide(predictions(20), table, None, Policy())


def test_all_that_is_wrong_is_said_at_once() -> None:
    table = changed(3, "predicted", "A")
    table.loc[4, "iou"] = None
    table.loc[7, "label"] = "?"
    with pytest.raises(Incomparable) as caught:
        decide(table, None, None, Policy())
    assert all(key in str(caught.value) for key in ("0003", "0004", "0007"))


def test_other_images_are_refused() -> None:
    with pytest.raises(Incomparable, match=r"1 only in the first \(0000\), 0 only in the second \(none\)"):
        decide(predictions(20), predictions(20).iloc[1:], None, Policy())


def test_tables_made_in_another_way_are_refused(tmp_path: Path) -> None:
    candidate, production = predictions(wrong=0), predictions()
    candidate.attrs = {"prompt": "a", "split": "test"}
    production.attrs = {"prompt": "b", "split": "test"}
    for name, table in (("candidate", candidate), ("production", production)):
        table.to_parquet(tmp_path / name)
    with pytest.raises(Incomparable, match="not evaluated in the same way(?s:.*)- prompt: a and b$"):
        decide(read(tmp_path / "candidate"), read(tmp_path / "production"), None, Policy())
    production.attrs["prompt"] = "a"
    assert decide(candidate, production, None, Policy()).passed


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
        decide(predictions(20), production, None, Policy())


# ------------------------------------------------------------------------------------------------- properties

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


LOOSE = policy(looks=1, level=0.4, parts={}, enough=1)


@settings(deadline=None, max_examples=12)
@given(pairs(), st.floats(0, 1), st.floats(0, 1))
def test_nothing_passes_beyond_a_limit(pair: Any, escapes: float, overkill: float) -> None:
    judging = policy(looks=1, level=0.4, whole_escape_rate={"limit": escapes}, whole_overkill={"limit": overkill})
    candidate, production = pair
    wrong = candidate["predicted"] != candidate["label"]
    rates = wrong.groupby(candidate["label"]).mean()
    kept = rates["anomalous"] <= escapes and rates["normal"] <= overkill
    assert kept or not decide(candidate, production, None, judging).passed
    assert kept or not decide(candidate, None, None, judging).passed


@settings(deadline=None, max_examples=12)
@given(pairs())
def test_what_passes_measures_a_gain_and_no_loss_beyond_a_margin(pair: Any) -> None:
    decision = decide(*pair, None, LOOSE)
    whole = [row for row in decision.rows if row.of == "whole"]
    gains = {r.metric: (r.candidate or 0) - (r.production or 0) for r in whole}
    if decision.passed:
        assert max(gains["accuracy"], gains["iou"]) > 0
        assert gains["escape_rate"] < 0.05 and gains["overkill"] < 0.05
        assert min(gains["accuracy"], gains["iou"]) > -0.05
    assert not decide(pair[0], pair[0], None, LOOSE).passed


@settings(deadline=None, max_examples=12)
@given(pairs(), st.integers(0, 1000))
def test_the_order_of_rows_does_not_matter(pair: Any, seed: int) -> None:
    shuffled = [table.sample(frac=1, random_state=seed + side) for side, table in enumerate(pair)]
    assert decide(*shuffled, None, Policy()) == decide(*pair, None, Policy())


@settings(deadline=None, max_examples=12)
@given(pairs(), st.data())
def test_a_better_candidate_never_fails_where_a_worse_one_passes(pair: Any, data: st.DataObject) -> None:
    candidate, production = pair
    better = candidate.copy()
    for i in data.draw(st.lists(st.integers(0, len(candidate) - 1), min_size=1)):
        better.loc[i, "predicted"] = better.loc[i, "label"]
    loose = policy(looks=1, level=0.4, parts={}, whole_accuracy={"limit": 0.3}, whole_escape_rate={"limit": 0.8})
    assert decide(better, production, None, loose).passed or not decide(candidate, production, None, loose).passed


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


def measured(decision: Decision, metric: str) -> tuple[float | None, float | None]:
    """Candidate and production of a metric over all images."""
    return next((r.candidate, r.production) for r in decision.rows if (r.of, r.metric) == ("whole", metric))


def test_decisions_are_judged_and_not_letters() -> None:
    letters = predictions(wrong=300, iou=0.1)
    decision = decide(decided(letters, overkill=30, iou=0.4), None, None, Policy())
    assert decision.passed
    assert measured(decision, "overkill")[0] == pytest.approx(0.1)
    assert measured(decision, "iou")[0] == pytest.approx(0.4)
    assert "The candidate is judged by its decisions: an image is flagged from a probability of 0.5 on." in (
        decision.reasons
    )


def test_each_model_is_judged_as_it_decides_in_production() -> None:
    candidate = decided(predictions(wrong=300), overkill=15, iou=0.6, threshold=0.2)
    for production in (predictions(wrong=60), decided(predictions(wrong=300), overkill=60, iou=0.4, threshold=0.7)):
        decision = decide(candidate, production, None, Policy())
        assert measured(decision, "accuracy")[1] == pytest.approx(0.9)
        assert decision.passed
        words = "has no threshold: its letters are judged" if "decision" not in production else "of 0.7 on"
        assert any(reason.startswith("Production ") and words in reason for reason in decision.reasons)


def test_without_a_threshold_letters_are_judged_and_it_says_so() -> None:
    table = decided(predictions(), 0, 0.4).assign(decision=predictions()["predicted"])
    table.attrs["threshold"] = None
    decision = decide(table, None, None, Policy())
    assert measured(decision, "accuracy") == measured(decide(predictions(), None, None, Policy()), "accuracy")
    assert "The candidate has no threshold: its letters are judged." in decision.reasons


def test_decisions_without_regions_cannot_be_judged() -> None:
    table = decided(predictions(), 0, 0.4).drop(columns=["region_iou"])
    with pytest.raises(Incomparable, match="candidate table cannot be judged: .* no region_iou; evaluate again"):
        decide(table, None, None, Policy())
    with pytest.raises(Incomparable, match="a prediction other than normal, anomalous and null: row 3"):
        odd = predictions()["label"].where(np.arange(600) != 3, "perhaps")
        decide(decided(predictions(), 0, 0.4).assign(decision=odd), None, None, Policy())


def without_boxes(table: pd.DataFrame, share: float) -> pd.DataFrame:
    """The table with its boxes, of which the first anomalous images have none."""
    anomalous = table["label"] == "anomalous"
    alone = anomalous & (anomalous.cumsum() <= share * anomalous.sum())
    boxes = [[[1, 1, 9, 9]] if there else [] for there in anomalous & ~alone]
    return table.assign(boxes=boxes, iou=table["iou"].mask(alone))


def test_images_without_boxes_are_left_out_of_iou_and_counted() -> None:
    candidate, production = without_boxes(predictions(iou=0.6), 0.5), without_boxes(predictions(iou=0.3), 0.5)
    decision = decide(candidate, production, None, Policy())
    assert decision.passed and measured(decision, "iou") == (0.6, 0.3)
    assert "150 of 300 anomalous images have no boxes; they are left out of IoU." in decision.reasons


def test_an_iou_that_no_image_has_cannot_be_told_unless_the_policy_does_not_ask() -> None:
    candidate, production = without_boxes(predictions(wrong=20), 1), without_boxes(predictions(), 1)
    for baseline in (None, production):
        decision = decide(candidate, baseline, None, Policy())
        assert decision.verdict == "cannot tell"
        assert decision.reasons[0].startswith("IoU: cannot be told, there are no anomalous images with boxes")
        decision = decide(candidate, baseline, None, policy(whole_iou={"limit": None, "margin": None}))
        assert decision.passed and measured(decision, "iou")[0] is None
        assert "300 of 300 anomalous images have no boxes; they are left out of IoU." in decision.reasons
        json.dumps(dataclasses.asdict(decision), allow_nan=False)


def test_an_iou_that_lacks_or_is_there_against_the_boxes_is_refused() -> None:
    table = without_boxes(predictions(), 0.5)
    with pytest.raises(Incomparable, match="no IoU in .0, 1. on an anomalous image: row 598"):
        decide(table.assign(iou=table["iou"].mask(table["id"] == "0598")), None, None, Policy())
    with pytest.raises(Incomparable, match="an IoU on an image without boxes: row 0"):
        decide(table.assign(iou=table["iou"].where(table["id"] != "0000", 0.5)), None, None, Policy())
