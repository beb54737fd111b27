from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from adfm.errors import AdfmError
from adfm.evaluation import metrics
from adfm.evaluation.calibration import Calibration
from adfm.records import Box

WIDTH, HEIGHT = 17, 11


def predictions(
    images: int, seed: int = 0, skill: float = 0.8, parsed: float = 0.95, categories: int = 3
) -> pd.DataFrame:
    """A prediction table of `images` images; tables of one size differ between seeds only in what was predicted."""
    fixed, rng = np.random.default_rng(99), np.random.default_rng(seed)
    anomalous = fixed.permutation(np.arange(images) % 2 == 0)
    share = np.where(anomalous, fixed.random(images) * 0.1, np.nan)
    defect = np.where(anomalous, fixed.choice(["scratch", "dent"], images), None)
    right = rng.random(images) < skill
    readable = rng.random(images) < parsed
    flagged = readable & (anomalous == right)
    iou = np.where(anomalous, np.where(flagged, rng.random(images), 0.0), np.nan)
    return pd.DataFrame(
        {
            "id": [f"{i:05}" for i in range(images)],
            "dataset": "parts",
            "category": [f"part-{i % categories}" for i in range(images)],
            "defect": defect,
            "label": np.where(anomalous, "anomalous", "normal"),
            "predicted": np.where(readable, np.where(flagged, "anomalous", "normal"), None),
            "score": np.where(readable, np.round(0.3 * flagged + 0.7 * rng.random(images), 1), np.nan),
            "iou": iou,
            "mask_iou": iou * 0.9,
            "matched_iou": np.where(iou > 0, iou, np.nan),
            "true_positives": np.where(anomalous, iou >= 0.5, np.nan),
            "false_positives": np.where(anomalous, (iou < 0.5) & flagged, np.nan),
            "false_negatives": np.where(anomalous, iou < 0.5, np.nan),
            "area_share": share,
        }
    )


# ------------------------------------------------------------------------------------------------- one image


def test_half_shifted_box_has_a_third_of_the_union() -> None:
    measured = metrics.localize([Box(0, 0, 4, 4)], [Box(2, 0, 6, 4)], 10, 10)
    assert measured["iou"] == pytest.approx(1 / 3)
    assert measured["matched_iou"] == pytest.approx(1 / 3)
    assert (measured["true_positives"], measured["false_positives"], measured["false_negatives"]) == (0, 1, 1)
    assert measured["area_share"] == pytest.approx(0.16)
    assert measured["mask_iou"] is None


def test_iou_is_of_unions_and_does_not_depend_on_counts() -> None:
    halves = [Box(0, 0, 2, 4), Box(2, 0, 4, 4), Box(1, 1, 3, 3)]
    measured = metrics.localize([Box(0, 0, 4, 4)], halves, 10, 10)
    assert measured["iou"] == 1.0
    assert (measured["true_positives"], measured["false_positives"], measured["false_negatives"]) == (1, 2, 0)


def test_nothing_predicted_on_a_defect_is_zero_and_not_undefined() -> None:
    mask = np.zeros((10, 10), np.uint8)
    mask[0:4, 0:4] = 255
    measured = metrics.localize([Box(0, 0, 4, 4), Box(6, 6, 8, 8)], [], 10, 10, mask)
    assert measured["iou"] == 0.0 and measured["mask_iou"] == 0.0
    assert measured["matched_iou"] is None
    assert (measured["true_positives"], measured["false_positives"], measured["false_negatives"]) == (0, 0, 2)


def test_a_normal_image_has_nothing_to_locate() -> None:
    measured = metrics.localize([], [Box(0, 0, 4, 4)], 10, 10, np.zeros((10, 10), np.uint8))
    assert set(measured) == set(metrics.LOCALIZATION)
    assert all(value is None for value in measured.values())


@pytest.mark.parametrize(
    "box",
    [
        Box(4, 4, 4, 8),
        Box(8, 8, 4, 4),
        Box(20, 20, 30, 30),
        Box(-9, 0, 0, 9),
        Box(math.nan, 0, 4, 4),
        Box(math.inf, 0, math.inf, 4),
        Box(1.6, 1.6, 2.4, 2.4),
    ],
)
def test_a_box_without_a_pixel_covers_nothing_and_counts_as_false(box: Box) -> None:
    measured = metrics.localize([Box(0, 0, 4, 4)], [Box(0, 0, 4, 4), box], 10, 10)
    assert measured["iou"] == 1.0 and measured["matched_iou"] == 1.0
    assert (measured["true_positives"], measured["false_positives"], measured["false_negatives"]) == (1, 1, 0)


def test_predicted_boxes_end_at_the_image() -> None:
    measured = metrics.localize([Box(6, 6, 10, 10)], [Box(6, 6, math.inf, 1e300)], 10, 10)
    assert measured["iou"] == 1.0 and measured["true_positives"] == 1


def test_an_edge_on_a_half_rounds_down() -> None:
    assert metrics.localize([Box(0, 0, 3, 4)], [Box(0, 0, 3.5, 4)], 10, 10)["iou"] == 1.0
    assert metrics.localize([Box(0, 0, 4, 4)], [Box(0, 0, 3.51, 4)], 10, 10)["iou"] == 1.0


def test_mask_iou_counts_mask_pixels() -> None:
    mask = np.zeros((10, 10), bool)
    mask[0, 0:4] = mask[0:4, 0] = True
    measured = metrics.localize([Box(0, 0, 4, 4)], [Box(0, 0, 4, 4)], 10, 10, mask)
    assert measured["iou"] == 1.0
    assert measured["mask_iou"] == pytest.approx(7 / 16)


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(AdfmError, match=r"\(10, 20\).*10 x 20"):
        metrics.localize([Box(0, 0, 4, 4)], [], 10, 20, np.ones((10, 20)))


def test_pairs_are_assigned_for_the_largest_total() -> None:
    truth = [Box(0, 0, 10, 10), Box(2, 0, 12, 10)]
    predicted = [Box(2, 0, 12, 10), Box(4, 0, 14, 10)]
    best = max((truth[0].iou(a) + truth[1].iou(b)) / 2 for a, b in itertools.permutations(predicted))
    assert metrics.localize(truth, predicted, 20, 20)["matched_iou"] == pytest.approx(best)


coordinate = st.one_of(st.integers(-3, 20).map(float), st.floats(-3, 20))
boxes = st.lists(st.builds(Box, coordinate, coordinate, coordinate, coordinate), max_size=4)


def pixels(box: Box) -> Any:
    """The pixels whose centre is in a box."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return (box.x1 <= x) & (x < box.x2) & (box.y1 <= y) & (y < box.y2)


def share(left: Any, right: Any) -> float:
    return float((left & right).sum() / (left | right).sum())


@settings(deadline=None)
@given(boxes, boxes, st.integers(0, 2**32))
def test_localisation_equals_counting_pixels(truth: list[Box], predicted: list[Box], seed: int) -> None:
    mask = np.random.default_rng(seed).random((HEIGHT, WIDTH)) < 0.2
    nothing = np.zeros_like(mask)
    true, guess = ([drawn for box in side if (drawn := pixels(box)).any()] for side in (truth, predicted))
    covered, guessed = (np.logical_or.reduce([nothing, *side]) for side in (true, guess))
    measured = metrics.localize(truth, predicted, WIDTH, HEIGHT, mask)
    if not true:
        assert set(measured.values()) == {None}
        return

    assert measured["iou"] == pytest.approx(share(covered, guessed))
    assert measured["area_share"] == pytest.approx(covered.mean())
    assert measured["mask_iou"] == pytest.approx(share(mask, guessed))

    few, many = sorted([true, guess], key=len)
    table = [[share(a, b) for b in many] for a in few]
    totals = [
        sum(row[at] for row, at in zip(table, chosen, strict=True))
        for chosen in itertools.permutations(range(len(many)), len(few))
    ]
    assert measured["matched_iou"] == (pytest.approx(max(totals) / len(few)) if few else None)
    hits = measured["true_positives"]
    assert hits is not None and 0 <= hits <= len(few)
    assert hits + (measured["false_positives"] or 0) == len(predicted)
    assert hits + (measured["false_negatives"] or 0) == len(true)


@settings(deadline=None)
@given(boxes, boxes, st.randoms())
def test_the_order_of_boxes_does_not_matter(truth: list[Box], predicted: list[Box], random: Any) -> None:
    before = metrics.localize(truth, predicted, WIDTH, HEIGHT)
    after = metrics.localize(random.sample(truth, len(truth)), random.sample(predicted, len(predicted)), WIDTH, HEIGHT)
    for name in ("iou", "area_share"):
        assert before[name] == after[name]
    assert before["matched_iou"] == pytest.approx(after["matched_iou"])


@settings(deadline=None)
@given(boxes)
def test_the_truth_itself_is_perfect(truth: list[Box]) -> None:
    measured = metrics.localize(truth, truth, WIDTH, HEIGHT)
    assume(measured["iou"] is not None)
    assert measured["iou"] == 1.0 and measured["matched_iou"] == 1.0 and measured["false_negatives"] == 0


# ------------------------------------------------------------------------------------------------- a table


@settings(deadline=None, max_examples=25)
@given(st.integers(4, 60), st.integers(0, 1000), st.floats(0, 1), st.floats(0, 1))
def test_detection_agrees_with_scikit_learn(images: int, seed: int, skill: float, parsed: float) -> None:
    table = predictions(images, seed, skill, parsed)
    truth = (table["label"] == "anomalous").to_numpy()
    missing = table["predicted"].isna().to_numpy()
    answered = np.where(missing, ~truth, table["predicted"] == "anomalous")  # an unreadable answer is the wrong one
    score = np.where(missing, np.where(truth, -1, 2), table["score"])
    measured = metrics.values(table)
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(truth, answered),
        "balanced_accuracy": sklearn.metrics.balanced_accuracy_score(truth, answered),
        "precision": sklearn.metrics.precision_score(truth, answered, zero_division=np.nan),
        "recall": sklearn.metrics.recall_score(truth, answered),
        "specificity": sklearn.metrics.recall_score(truth, answered, pos_label=False),
        "f1": sklearn.metrics.f1_score(truth, answered),
        "auroc": sklearn.metrics.roc_auc_score(truth, score),
        "parse_rate": 1 - missing.mean(),
    }
    for name, value in expected.items():
        assert measured[name] == (None if np.isnan(value) else pytest.approx(value)), name
    assert measured["overkill"] == pytest.approx(1 - expected["specificity"])
    assert measured["miss_rate"] == pytest.approx(1 - expected["recall"])


def test_localisation_of_a_table_is_over_its_anomalous_images() -> None:
    table = pd.DataFrame(
        {
            "id": list("abcde"),
            "label": ["anomalous"] * 4 + ["normal"],
            "predicted": ["anomalous", "anomalous", "normal", None, "anomalous"],
            "iou": [0.5, 0.3, 0.0, 0.0, None],
            "mask_iou": [0.4, None, 0.0, 0.0, None],
            "matched_iou": [0.7, 0.3, None, None, None],
            "true_positives": [2, 0, 0, 0, None],
            "false_positives": [1, 1, 0, 0, None],
            "false_negatives": [0, 1, 1, 1, None],
        }
    )
    measured = metrics.values(table)
    assert measured["iou"] == pytest.approx(0.2)
    assert measured["mask_iou"] == pytest.approx(0.4 / 3)
    assert measured["matched_iou"] == pytest.approx(0.5)
    assert [measured[f"iou_{p}"] for p in (10, 30, 50)] == [0.5, 0.5, 0.25]
    assert measured["box_f1"] == pytest.approx(4 / 9)
    assert measured["auroc"] is None


def test_a_model_that_is_never_understood_is_wrong_everywhere() -> None:
    table = predictions(40, parsed=0.0)
    measured = metrics.summarize(table, 50, 0, 0.01, 0.05)["overall"]
    for name in ("accuracy", "balanced_accuracy", "recall", "specificity", "precision", "f1", "auroc", "parse_rate"):
        assert measured[name] == 0.0, name
    assert measured["overkill"] == measured["miss_rate"] == 1.0
    assert measured["unparseable"] == measured["images"] == 40


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 3), min_size=6, max_size=30), st.integers(0, 1000))
def test_a_weight_counts_an_image_that_often(counts: list[int], seed: int) -> None:
    assume(sum(counts))
    table = predictions(len(counts), seed)
    weighted = metrics.measure(table)(np.array([counts], dtype=float))
    repeated = metrics.values(table.loc[np.repeat(table.index, counts)])
    for name, value in repeated.items():
        assert weighted[name][0] == pytest.approx(np.nan if value is None else value, nan_ok=True), name


def test_summary_does_not_depend_on_the_order_of_rows() -> None:
    table = predictions(90)
    shuffled = table.sample(frac=1, random_state=1)
    assert metrics.summarize(table, 100, 3, 0.01, 0.05) == metrics.summarize(shuffled, 100, 3, 0.01, 0.05)


def test_intervals_hold_the_value_and_have_the_width_of_theory() -> None:
    table = predictions(1000, parsed=1.0)
    measured = metrics.summarize(table, 2000, 0, 0.01, 0.05)["overall"]
    for name in metrics.HEADLINE:
        assert measured[f"{name}_low"] <= measured[name] <= measured[f"{name}_high"], name
    half = 1.96 * math.sqrt(measured["accuracy"] * (1 - measured["accuracy"]) / 1000)
    assert measured["accuracy_high"] - measured["accuracy"] == pytest.approx(half, rel=0.1)
    assert measured["accuracy"] - measured["accuracy_low"] == pytest.approx(half, rel=0.1)


def test_no_miss_among_64_defects_is_not_a_miss_rate_of_zero() -> None:
    table = predictions(128, parsed=1.0)
    table["label"] = np.where(np.arange(128) % 2 == 0, "anomalous", "normal")
    table["predicted"] = table["label"]
    measured = metrics.summarize(table, 20, 0, 0.01, 0.05)["overall"]
    most = 1 - 0.025 ** (1 / 64)
    for name, ends in (("miss_rate", (0, most)), ("overkill", (0, most)), ("recall", (1 - most, 1))):
        assert (measured[f"{name}_low"], measured[f"{name}_high"]) == pytest.approx(ends, abs=1e-9)
    assert measured["accuracy_low"] == pytest.approx(0.025 ** (1 / 128))
    assert measured["balanced_accuracy_low"] == pytest.approx(1 - most / math.sqrt(2))


@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 1000))
def test_limits_of_a_rate_are_those_of_clopper_and_pearson(images: int, events: int, seed: int) -> None:
    from scipy.stats import binomtest

    events = min(events, images)
    values = np.random.default_rng(seed).permutation(np.arange(images) < events).astype(float)
    exact = binomtest(events, images).proportion_ci(0.95, "exact")
    assert metrics.confidence_limits(values) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_what_becomes_of_an_image() -> None:
    rows = [
        ("anomalous", "normal", 0.0, "missed"),
        ("anomalous", None, 0.0, "missed, unparseable"),
        ("anomalous", "anomalous", 0.49, "elsewhere"),
        ("anomalous", "anomalous", 0.5, "located"),
        ("anomalous", "anomalous", None, "flagged"),
        ("normal", "anomalous", None, "overkill"),
        ("normal", None, None, "overkill, unparseable"),
        ("normal", "normal", None, "passed"),
    ]
    table = pd.DataFrame(rows, columns=["label", "predicted", "iou", "outcome"])
    assert metrics.outcomes(table).tolist() == table["outcome"].tolist()
    assert set(metrics.OUTCOMES) == set(table["outcome"])
    # Escapes and overkill are those that the gate counts.
    escapes = table["outcome"].str.startswith("missed").sum() / (table["label"] == "anomalous").sum()
    assert metrics.values(table)["miss_rate"] == pytest.approx(escapes)


def test_summary_by_group() -> None:
    table = predictions(300)
    measured = metrics.summarize(table, 20, 0, 0.01, 0.05)
    assert set(measured["categories"]) == {"part-0", "part-1", "part-2"}
    for category, values in measured["categories"].items():
        assert values["accuracy"] == metrics.values(table[table["category"] == category])["accuracy"]
    assert set(measured["defects"]) == {"dent", "scratch"}
    dents = table[table["defect"] == "dent"]
    assert measured["defects"]["dent"]["recall"] == pytest.approx((dents["predicted"] == "anomalous").mean())
    assert measured["defects"]["dent"]["iou"] == pytest.approx(dents["iou"].mean())
    assert "specificity" not in measured["sizes"]["small"]
    small, large = table["area_share"] < 0.01, table["area_share"] >= 0.05
    assert [*measured["sizes"]] == ["small", "medium", "large"]
    assert measured["sizes"]["small"]["images"] == small.sum() and measured["sizes"]["large"]["images"] == large.sum()
    assert measured["sizes"]["large"]["iou"] == pytest.approx(table[large]["iou"].mean())
    assert sum(size["images"] for size in measured["sizes"].values()) == measured["overall"]["anomalous"]
    json.dumps(measured, allow_nan=False)


def test_a_defect_is_judged_against_the_normal_images_of_the_categories_that_have_it() -> None:
    table = predictions(300)
    table.loc[(table["category"] == "part-0") & (table["defect"] == "dent"), "defect"] = "scratch"
    measured = metrics.summarize(table, 20, 0, 0.01, 0.05)["defects"]["dent"]
    elsewhere = table["category"] != "part-0"
    part = table[elsewhere & ((table["label"] == "normal") | (table["defect"] == "dent"))]
    truth, missing = part["label"] == "anomalous", part["predicted"].isna()
    answered = np.where(missing, ~truth, part["predicted"] == "anomalous")
    score = np.where(missing, np.where(truth, -1, 2), part["score"])
    assert measured["images"] == len(part) and measured["anomalous"] == truth.sum()
    assert measured["balanced_accuracy"] == pytest.approx(sklearn.metrics.balanced_accuracy_score(truth, answered))
    assert measured["precision"] == pytest.approx(sklearn.metrics.precision_score(truth, answered))
    assert measured["auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(truth, score))


def test_sizes_begin_at_their_thresholds() -> None:
    table = predictions(6).assign(label="anomalous", iou=0.0, area_share=[0.0, 0.009, 0.01, 0.049, 0.05, 1.0])
    sizes = metrics.summarize(table, 5, 0, 0.01, 0.05)["sizes"]
    assert {size: values["images"] for size, values in sizes.items()} == {"small": 2, "medium": 2, "large": 2}
    assert [*metrics.summarize(table, 5, 0, 0.02, 0.02)["sizes"]] == ["small", "large"]


def test_anomalous_images_without_boxes_are_left_out_of_localisation_and_counted() -> None:
    table = predictions(200, 3)
    alone = (table["label"] == "anomalous") & (table["id"] < "00100")
    located = [*metrics.LOCALIZATION]
    reduced = metrics.summarize(table.assign(**{name: table[name].mask(alone) for name in located}), 10, 0, 0.01, 0.1)
    assert reduced["overall"]["without_boxes"] == alone.sum() > 0
    kept = metrics.summarize(table[~alone], 10, 0, 0.01, 0.1)["overall"]
    for name in ("iou", "iou_30", "matched_iou", "box_f1"):
        assert reduced["overall"][name] == pytest.approx(kept[name])
    assert reduced["overall"]["recall"] == metrics.summarize(table, 10, 0, 0.01, 0.1)["overall"]["recall"]
    nothing = metrics.summarize(table.assign(**dict.fromkeys(located, np.nan)), 10, 0, 0.01, 0.1)
    assert (nothing["overall"]["iou"], nothing["overall"]["box_f1"], nothing["sizes"]) == (None, None, {})


def test_what_is_not_defined_is_none() -> None:
    normal = predictions(40)[lambda t: t["label"] == "normal"]
    measured = metrics.summarize(normal, 20, 0, 0.01, 0.05)
    assert measured["overall"]["recall"] is None and measured["overall"]["recall_low"] is None
    assert measured["overall"]["balanced_accuracy"] is None and measured["overall"]["auroc"] is None
    assert measured["overall"]["iou"] is None and measured["overall"]["box_f1"] is None
    assert measured["overall"]["specificity"] is not None
    assert measured["sizes"] == {} and measured["defects"] == {}


def test_categories_are_told_apart_by_data_set_only_where_there_are_several() -> None:
    table = predictions(6)
    assert metrics.category_names(table).tolist() == table["category"].tolist()
    table["dataset"] = ["a", "b"] * 3
    assert metrics.category_names(table).tolist()[:2] == ["a/part-0", "b/part-1"]


# ------------------------------------------------------------------------------------------------- samples


def test_without_groups_every_image_is_a_sample_of_its_own() -> None:
    table = predictions(60)
    assert metrics.samples(table).tolist() == [*range(60)]
    expected = metrics.summarize(table, 50, 0, 0.01, 0.05)
    assert metrics.summarize(table.assign(group=None), 50, 0, 0.01, 0.05) == expected
    assert metrics.summarize(table.assign(group=table["id"]), 50, 0, 0.01, 0.05) == expected


def test_images_of_one_group_are_one_sample_and_others_are_not() -> None:
    table = predictions(6).assign(group=["a", None, "b", "a", None, "image 1"])
    assert metrics.samples(table).tolist() == [0, 1, 2, 0, 3, 4]


def test_whole_samples_are_drawn_and_as_many_as_there_are() -> None:
    sample = np.array([0, 1, 0, 2, 3, 3, 3])
    weights = np.concatenate([*metrics.bootstrap_weights(sample, 500, 0)])
    assert weights.shape == (500, 7)
    assert (weights[:, 0] == weights[:, 2]).all() and np.ptp(weights[:, 4:], axis=1).max() == 0
    assert (weights[:, [0, 1, 3, 4]].sum(axis=1) == 4).all()
    assert weights.mean(axis=0) == pytest.approx(1, abs=0.2)


def test_pictures_of_the_same_part_say_no_more_than_one_of_them() -> None:
    table = predictions(200)
    copies = pd.concat([table.assign(id=table["id"] + str(copy), group=table["id"]) for copy in range(4)])
    once, fourfold = (metrics.summarize(t, 2000, 0, 0.01, 0.05)["overall"] for t in (table, copies))
    naive = metrics.summarize(copies.drop(columns="group"), 2000, 0, 0.01, 0.05)["overall"]

    def width(measured: dict[str, Any]) -> float:
        return float(measured["accuracy_high"] - measured["accuracy_low"])

    assert width(fourfold) == pytest.approx(width(once), rel=0.1)
    assert width(naive) == pytest.approx(width(once) / 2, rel=0.15)
    changed = copies.assign(predicted="anomalous")
    paired, alone = (metrics.difference(changed, t, 1000, 0) for t in (copies, copies.drop(columns="group")))
    assert paired["accuracy"] == alone["accuracy"]
    whole = metrics.difference(changed.drop(columns="group"), copies, 1000, 0)
    assert width(paired) == pytest.approx(2 * width(whole), rel=0.2)


# ------------------------------------------------------------------------------------------------- at the threshold


# --------------------------------------------------------------------------------------------------- further images


def test_what_more_test_images_would_buy() -> None:
    table = predictions(80, parsed=1.0)
    anomalous = table["label"] == "anomalous"
    table["predicted"] = table["label"]
    table.loc[table[anomalous].index[:4], "predicted"] = "normal"  # a recall of 36 / 40
    overall = metrics.summarize(table, 10, 0, 0.01, 0.05)["overall"]
    assert metrics.more_images(overall) == (
        "More test images: the recall of 0.900 is measured to ± 0.104 with 40 defective images and the specificity of"
        " 1.000 is measured to ± 0.044 with 40 normal images; four times as many would make it ± 0.050 and ± 0.011;"
        " ± 0.05 takes about 158 defective and 36 normal images."
    )
    at_threshold = overall | metrics.operating_point(decided(80, 0, 0.5), 0.5, 10, 0)
    assert "images at the threshold; four times" in metrics.more_images(at_threshold)
    alone = metrics.summarize(table[anomalous], 10, 0, 0.01, 0.05)["overall"]
    assert "specificity" not in metrics.more_images(alone) and metrics.more_images({}) == ""


def test_images_of_one_part_count_as_one_in_what_more_would_buy() -> None:
    table = predictions(40, parsed=1.0).assign(group=[f"{i}" for i in range(40)])
    many = pd.concat([table.assign(id=table["id"] + f" {n}") for n in range(5)], ignore_index=True)
    once, five = (
        int(
            metrics.more_images(metrics.summarize(each, 10, 0, 0.01, 0.05)["overall"])
            .split(" takes about ")[1]
            .split()[0]
            .replace(",", "")
        )
        for each in (table, many)
    )
    assert five == pytest.approx(5 * once, rel=0.1)


def decided(images: int, seed: int, at: float | None, skill: float = 0.8) -> pd.DataFrame:
    """A prediction table with decisions; the regions are the marked boxes, or poor ones where nothing was marked."""
    table = predictions(images, seed, skill)
    for name in metrics.COMPARED:
        table[f"region_{name}"] = np.where(table["predicted"] == "anomalous", table[name], np.nan)
    unmarked = (table["label"] == "anomalous") & (table["predicted"] != "anomalous")
    values = {"iou": 0.25, "mask_iou": 0.2, "matched_iou": 0.25, "true_positives": 0}
    for name, value in (values | {"false_positives": 2, "false_negatives": 1}).items():
        table.loc[unmarked, f"region_{name}"] = value
    return Calibration(threshold=at).apply(table)


def test_without_a_threshold_decisions_are_what_was_written() -> None:
    for at in (None, 0.5):
        table = decided(200, 0, at)
        expected = {name: value for name, value in metrics.values(table).items() if "ece" not in name}
        measured = metrics.values(metrics.as_decided(table))
        assert ({name: measured[name] for name in expected} == expected) is (at is None)
    assert metrics.as_decided(predictions(20)).equals(predictions(20))


def test_the_regions_of_a_flagged_image_are_its_boxes_whatever_its_letter() -> None:
    table = pd.DataFrame(
        {
            "label": "anomalous",
            "predicted": ["normal", "anomalous", "anomalous", None],
            "score": [0.9, 0.1, 0.9, np.nan],
            "regions": [[[0, 0, 5, 5]]] * 4,
            "predicted_boxes": [[], [[0, 0, 5, 5]], [[0, 0, 5, 5]], []],
            "iou": [0.0, 0.6, 0.6, 0.0],
            **{f"region_{name}": 0.6 if "iou" in name else 1.0 for name in metrics.COMPARED},
        }
    )
    judged = metrics.as_decided(Calibration(threshold=0.5).apply(table))
    assert judged["predicted"].fillna("").tolist() == ["anomalous", "normal", "anomalous", ""]
    assert judged["iou"].tolist() == [0.6, 0, 0.6, 0]
    assert judged["false_negatives"].tolist() == [1, 2, 1, 2]  # both true boxes are missed where nothing is marked
    assert judged["false_positives"].tolist() == [1, 0, 1, 0]
    assert [len(boxes) for boxes in judged["predicted_boxes"]] == [1, 0, 1, 0]
    assert np.isnan(judged["matched_iou"]).tolist() == [False, True, False, True]


def test_decisions_without_the_regions_are_refused() -> None:
    with pytest.raises(AdfmError, match="no region_iou, .* evaluate again"):
        metrics.as_decided(predictions(20).assign(decision="normal"))


def test_the_operating_point_is_what_the_decisions_do() -> None:
    table = decided(500, 2, 0.7)
    measured = metrics.operating_point(table, 0.7, 500, 0)
    defects, normal = (table[table["label"] == label] for label in ("anomalous", "normal"))
    # An image without score and letter is wrong.
    assert measured["overkill_at_threshold"] == pytest.approx(1 - (normal["score"] < 0.7).mean())
    assert measured["miss_rate_at_threshold"] == pytest.approx(1 - (defects["score"] >= 0.7).mean())
    for name in metrics.AT_THRESHOLD:
        value, low, high = (measured[f"{name}_at_threshold{end}"] for end in ("", "_low", "_high"))
        assert value is not None and low is not None and high is not None and low < value < high
    nothing = metrics.operating_point(table, None, 20, 0)
    assert set(nothing.values()) == {None} and nothing.keys() == measured.keys()


def test_two_operating_points_are_compared_each_at_its_own_threshold() -> None:
    left, right = decided(500, 1, 0.4, skill=0.9), decided(500, 2, 0.8, skill=0.6)
    measured = metrics.operating_difference(left, 0.4, right, 0.8, 200, 0)
    one, other = metrics.operating_point(left, 0.4, 20, 0), metrics.operating_point(right, 0.8, 20, 0)
    for name in metrics.AT_THRESHOLD:
        name = f"{name}_at_threshold"
        assert measured[name] == pytest.approx((one[name] or 0) - (other[name] or 0))
    same = metrics.operating_difference(left, 0.4, left, 0.4, 20, 0)
    assert {same[f"{name}_at_threshold"] for name in metrics.AT_THRESHOLD} == {0.0}
    assert set(metrics.operating_difference(left, 0.5, right, None, 20, 0).values()) == {None}


# ------------------------------------------------------------------------------------------------- calibration error


def probabilities(images: int, seed: int, shift: float = 0.0) -> pd.DataFrame:
    """Images that are anomalous with the predicted probability, or with one that is `shift` lower."""
    rng = np.random.default_rng(seed)
    probability = rng.uniform(shift, 1, images)
    label = np.where(rng.random(images) < probability - shift, "anomalous", "normal")
    return pd.DataFrame({"label": label, "predicted": "normal", "score": 0.5, "probability": probability})


def test_the_calibration_error_of_right_probabilities_is_nearly_nothing() -> None:
    assert metrics.values(probabilities(200_000, 0))["ece"] == pytest.approx(0, abs=0.01)


def test_the_calibration_error_is_by_how_much_probabilities_are_off() -> None:
    assert metrics.values(probabilities(200_000, 1, shift=0.2))["ece"] == pytest.approx(0.2, abs=0.01)


def test_a_known_calibration_error() -> None:
    labels = ["anomalous"] * 6 + ["normal"] * 4
    table = pd.DataFrame({"label": labels, "predicted": "normal", "score": 0.9, "probability": [0.8] * 5 + [0.4] * 5})
    measured = metrics.values(table)
    assert measured["ece_of_score"] == pytest.approx(0.3)  # one bin: 0.9 predicted, 0.6 true
    assert measured["ece"] == pytest.approx(0.5 * (1 - 0.8) + 0.5 * (0.4 - 0.2))
    points = metrics.reliability(table["probability"].to_numpy(), (table["label"] == "anomalous").to_numpy())
    assert np.array(points) == pytest.approx(np.array([[0.4, 0.2, 5], [0.8, 1.0, 5]]))


def test_images_without_a_score_are_left_out_of_the_calibration_error() -> None:
    table = probabilities(300, 2)
    unscored = pd.concat([table, table.head(50).assign(probability=np.nan)])
    assert metrics.values(unscored)["ece"] == pytest.approx(metrics.values(table)["ece"])
    assert metrics.values(table.assign(probability=np.nan))["ece"] is None


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60), st.randoms())
def test_no_order_of_the_images_matters_to_the_diagram(images: list[tuple[float, bool]], random: Any) -> None:
    def points(images: list[tuple[float, bool]]) -> Any:
        return np.array(metrics.reliability(np.array([p for p, _ in images]), np.array([y for _, y in images])))

    measured = points(images)
    assert measured[:, 2].sum() == len(images) and len(measured) <= metrics.BINS
    assert (np.diff(measured[:, 0]) > 0).all()
    random.shuffle(images)
    assert points(images) == pytest.approx(measured)


# ------------------------------------------------------------------------------------------------- two tables


def test_a_model_differs_from_itself_by_nothing() -> None:
    table = predictions(80).assign(probability=lambda table: table["score"])
    measured = metrics.difference(table, table.sample(frac=1, random_state=0), 200, 0)
    assert {value for name, value in measured.items() if not name.endswith(("_low", "_high"))} == {0.0}
    # That 80 images do not tell them apart does not prove them equal.
    assert measured["accuracy_low"] == -(measured["accuracy_high"] or 0) < -0.03
    assert measured["miss_rate_low"] == -(measured["miss_rate_high"] or 0) < measured["accuracy_low"]


def test_difference_is_candidate_minus_reference() -> None:
    worse, better = predictions(600, 1, skill=0.7), predictions(600, 2, skill=0.9)
    measured = metrics.difference(better, worse, 500, 0)
    for name in ("accuracy", "balanced_accuracy", "recall", "specificity", "iou"):
        change, low, high = (measured[name + end] for end in ("", "_low", "_high"))
        after, before = metrics.values(better)[name], metrics.values(worse)[name]
        assert change is not None and low is not None and high is not None and after is not None and before is not None
        assert change == pytest.approx(after - before)
        assert 0 < low < change < high
    swapped = metrics.difference(worse, better, 500, 0)
    assert swapped["iou"] == -(measured["iou"] or 0)
    assert swapped["iou_low"] == pytest.approx(-(measured["iou_high"] or 0))


def test_pairing_makes_the_interval_narrow() -> None:
    table = predictions(400)
    changed = table.copy()
    flipped = table.index[table["predicted"].notna()][:8]
    changed.loc[flipped, "predicted"] = table.loc[flipped, "predicted"].map(
        {"normal": "anomalous", "anomalous": "normal"}
    )
    paired = metrics.difference(changed, table, 1000, 0)
    alone = metrics.summarize(table, 1000, 0, 0.01, 0.05)["overall"]
    width = (paired["accuracy_high"] or 0) - (paired["accuracy_low"] or 0)
    assert 0 < width < 0.5 * (alone["accuracy_high"] - alone["accuracy_low"])


def test_other_images_are_refused_and_named() -> None:
    table = predictions(10)
    with pytest.raises(AdfmError, match=r"2 only in the first \(00000, 00001\), 1 only in the second \(00009\)"):
        metrics.difference(table.iloc[:9], table.iloc[2:], 10, 0)
    with pytest.raises(AdfmError, match=r"more than once: 00003"):
        metrics.difference(pd.concat([table, table.iloc[3:4]]), table, 10, 0)
    with pytest.raises(AdfmError, match="empty"):
        metrics.difference(table, table.iloc[:0], 10, 0)


# ------------------------------------------------------------------------------------------------------ kinds


def with_kinds(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    with_kind = pd.Series(rng.choice(["scratch", "dent", "none"], len(table)), dtype=object)
    return table.assign(kind=table["defect"], predicted_kind=with_kind.where(with_kind != "none", None))


def test_the_kind_is_right_where_letter_and_kind_are() -> None:
    table = with_kinds(predictions(200))
    table.loc[table.index[table["label"] == "anomalous"][:7], "kind"] = None  # several on one image, or none known
    known = table[(table["label"] == "anomalous") & table["kind"].notna()]
    right = (known["predicted"] == "anomalous") & (known["predicted_kind"] == known["kind"])
    measured = metrics.summarize(table, 20, 0, 0.01, 0.05)
    assert measured["overall"]["kind_right"] == pytest.approx(right.mean())
    exact = scipy.stats.binomtest(int(right.sum()), len(right)).proportion_ci(method="exact")
    assert measured["overall"]["kind_right_low"] == pytest.approx(exact.low, abs=1e-6)
    assert measured["overall"]["kind_right_high"] == pytest.approx(exact.high, abs=1e-6)
    for kind in ("scratch", "dent"):
        assert measured["defects"][kind]["kind_right"] == pytest.approx(right[known["kind"] == kind].mean())


def test_kinds_change_no_other_metric_and_a_reference_without_them_none() -> None:
    plain, other = predictions(60), predictions(60, seed=1)
    with_kind = with_kinds(plain)
    both = metrics.values(with_kind)
    assert both.pop("kind_right") is not None
    assert both == metrics.values(plain)
    assert metrics.difference(with_kind, other, 10, 0) == metrics.difference(plain, other, 10, 0)
    assert "kind_right" in metrics.difference(with_kind, with_kinds(other, 1), 10, 0)


def test_the_table_of_kinds_counts_every_image_whose_kind_is_known() -> None:
    table = with_kinds(predictions(200))
    table.loc[table.index[table["label"] == "anomalous"][:7], "kind"] = None
    rows, columns, counts = metrics.kinds_confusion(table).values()
    assert rows == ["dent", "scratch", "(normal)"] and columns == ["dent", "scratch", "(no kind)", "(normal)"]
    assert np.sum(counts) == 193
    normal = table[table["label"] == "normal"]
    assert counts[2][3] == (normal["predicted"] == "normal").sum()
    answered = (table["kind"] == "dent") & (table["predicted"] == "normal")
    assert counts[0][3] == answered.sum()
    right = counts[0][0] + counts[1][1]
    assert metrics.values(table)["kind_right"] == pytest.approx(right / sum(map(sum, counts[:2])))


def test_among_defects_alone_the_decision_is_not_measured() -> None:
    table = with_kinds(predictions(80))
    defects, other = (each[each["label"] == "anomalous"] for each in (table, predictions(80, seed=1)))
    measured = metrics.summarize(defects, 10, 0, 0.01, 0.05)
    change = metrics.difference(defects, other, 10, 0)
    for of in (measured["overall"], change, *measured["defects"].values(), *measured["categories"].values()):
        for name in metrics.BOTH_LABELS:
            assert of[name] is None and of[f"{name}_low"] is None and of[f"{name}_high"] is None
        assert of["iou"] is not None and of["parse_rate"] is not None
    assert measured["overall"]["kind_right"] is not None
    json.dumps([measured, change], allow_nan=False)
