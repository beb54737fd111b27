"""Plain verdicts: kind of model, comparison, next steps."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adfm.data import tiles
from adfm.data.tiles import Defect
from adfm.evaluation import metrics, references, verdict
from adfm.evaluation.verdict import Facts, Kind, Part
from adfm.models import loading, model_folder
from adfm.params import Model, Tile, load

EMBEDDED = Kind("embedded://tiny-base", True, True, 900_000, 320 * 320, True, (132, 12))
LARGE = Kind("Qwen/Qwen2.5-VL-7B-Instruct", weights=8_290_000_000, pixels=512 * 512, trained=True)
UNKNOWN: list[float | None] = [None] * 3
BLIND = {
    "balanced_accuracy": [0.5, 0.4, 0.6],
    references.BY_SCORE: UNKNOWN,
    "iou": [0.0, 0.0, 0.1],
    metrics.KIND: UNKNOWN,
}


def facts(
    balanced: float | None = 0.8,
    half: float = 0.05,
    compared: str | None = None,
    iou: float | None = 0.3,
    recall: float = 0.8,
    specificity: float = 0.8,
    labels: tuple[int, int] = (200, 200),
    **more: Any,
) -> Facts:
    """An evaluation on so many normal and defective images, with intervals of `half` to either side."""
    normal, anomalous = labels

    def around(value: float | None) -> list[float | None]:
        return [None] * 3 if value is None else [value, value - half, value + half]

    row = {metric: around(balanced) for metric in ("balanced_accuracy", references.BY_SCORE)}
    row |= {"iou": around(iou), metrics.KIND: UNKNOWN}
    blind = BLIND if balanced is not None else BLIND | {"balanced_accuracy": [None] * 3}
    rows = {"trained": row, "always_A": blind, "always_B": blind}
    comparison: dict[str, Any] = {"candidate": "trained", "detector": None, "verdict": compared, "sentence": ""}
    if compared:
        shift = {"detector": 0.15, "candidate": -0.15, "open": 0.0}[compared]
        comparison |= {"detector": "detector", "metric": "balanced_accuracy", "sentence": f"It is {compared}."}
        comparison["difference"] = around(shift)
        rows["detector"] = row
    measured: dict[str, Any] = {"images": normal + anomalous, "normal": normal, "anomalous": anomalous}
    measured["threshold"] = 0.4
    for name, rate in (("miss_rate", recall), ("overkill", specificity)):
        for end, value in zip(("", "_low", "_high"), around(1 - rate), strict=True):
            measured[f"{name}_at_threshold{end}"] = value if normal and anomalous else None
    values: dict[str, Any] = {
        "kind": EMBEDDED,
        "compared": comparison | {"rows": rows},
        "metrics": measured,
        "train": (132, 12),
        "images": 600,
    }
    return Facts(**values | more)


def rules(known: Facts) -> list[str]:
    return [step["rule"] for step in verdict.summarize(known)["steps"]]


def words(known: Facts) -> str:
    return " ".join(references.lines(verdict.summarize(known)))


CUT = tiles.propose([Defect(18, 18, 640, 640)] * 8, 320 * 320, None, Tile().overlap)
KINDS = {"scratch": Part(10, 2, 5), "dent": Part(90, 85, 40)}
CASES: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({}, ["gate"], ["is better than a blind answer: balanced accuracy by score 0.800 [0.750, 0.850], blind 0.500."]),
    ({"balanced": 0.5}, ["look"], ["is not shown to be better than a blind answer", "132 normal and 12 defective"]),
    ({"balanced": 0.52}, ["look"], ["If 0.520 is true, about 2,500 test images would tell (now 400)."]),
    ({"balanced": 0.3}, ["look"], ["trained is worse than a blind answer"]),
    ({"balanced": 0.5, "tiles": CUT}, ["look", "tiles"], ["set tile.size="]),
    ({"compared": "candidate"}, ["gate"], ["It is candidate."]),
    (
        {"compared": "detector", "detector": "models/detector"},
        ["detector"],
        ["`adfm predict --model models/detector IMAGES`", "Qwen2.5-VL-3B-Instruct (params/qwen2.5-vl-3b.yaml)"],
    ),
    ({"compared": "detector", "balanced": 0.5, "tiles": CUT}, ["look", "detector"], []),
    ({"compared": "detector", "tiles": CUT}, ["detector", "tiles"], []),
    ({"compared": "open", "half": 0.04}, ["gate"], ["It is open."]),
    ({"compared": "open", "half": 0.06}, ["images", "gate"], ["is known to ± 0.060"]),
    (
        {"recall": 0.6, "specificity": 0.95, "limit": ("evaluate.overkill_limit", 0.05)},
        ["rate", "gate"],
        [
            "Recall at the threshold is 0.600 [0.550, 0.650], specificity 0.950",
            "add defective images to train on (12 now)",
            "or raise evaluate.overkill_limit (0.05 now)",
        ],
    ),
    (
        {"recall": 0.6, "specificity": 0.95, "kinds": KINDS, "limit": ("evaluate.escape_limit", 0.05)},
        ["rate", "gate"],
        [
            "images of scratch to train on, of which 2 of 10 are flagged in test, with 5 in train",
            "or lower evaluate.escape_limit",
        ],
    ),
    (
        {"recall": 0.95, "specificity": 0.6, "limit": ("evaluate.overkill_limit", 0.3)},
        ["rate", "gate"],
        ["Specificity at the threshold is 0.600", "(132 now)", "or lower evaluate.overkill_limit (0.3 now)"],
    ),
    ({"recall": 0.75, "specificity": 0.82}, ["gate"], []),
    (
        {"half": 0.15, "labels": (20, 10), "kinds": KINDS, "images": 100},
        ["images", "gate"],
        ["is known to ± 0.150 with 10;", "First of scratch, of which 2 of 10", "evaluate.folds=5, which judges each"],
    ),
    (
        {"balanced": None, "labels": (0, 80)},
        ["labels", "gate"],
        ["All 80 test images are defective", "IoU 0.300 [0.250, 0.350], a blind answer not", "Add normal images"],
    ),
    (
        {"balanced": None, "labels": (0, 80), "iou": 0.02},
        ["labels", "look"],
        ["is not shown to locate them: IoU 0.020"],
    ),
    ({"balanced": None, "labels": (0, 80), "iou": None}, ["labels"], ["none has boxes"]),
    ({"balanced": None, "labels": (80, 0), "iou": None}, ["labels"], ["No test image is defective", "Add defective"]),
    (
        {"kind": Kind(""), "detector": "models/d e"},
        ["detector"],
        ["is a reference detector", "--model 'models/d e' IM"],
    ),
    ({"kind": dataclasses.replace(EMBEDDED, trained=False), "balanced": 0.5}, ["look"], ["Train it (`make repro`)"]),
    (
        {"kind": dataclasses.replace(EMBEDDED, cut=60)},
        ["longer", "gate"],
        ["sft.steps=60 ended the cold start", "PARAMS=params/photographs.yaml`, which allows 600."],
    ),
    ({"kind": dataclasses.replace(EMBEDDED, cut=700), "balanced": 0.5}, ["longer", "look"], ["learning; raise it."]),
    ({"kind": dataclasses.replace(LARGE, cut=60)}, ["gate"], []),
]


@pytest.mark.parametrize(("known", "steps", "parts"), CASES)
def test_the_next_steps_follow_from_the_figures(known: dict[str, Any], steps: list[str], parts: list[str]) -> None:
    assert rules(facts(**known)) == steps
    text = words(facts(**known))
    assert [part for part in parts if part not in text] == []


def test_letters_that_lean_to_one_side_are_no_better_than_blind_as_written() -> None:
    known = facts()
    known.compared["rows"]["trained"]["balanced_accuracy"] = [0.5, 0.45, 0.55]
    assert "is better than a blind answer" in words(known)
    assert "Its letters as written are not shown to be: 0.500 [0.450, 0.550]." in words(known)
    decided = {"balanced_accuracy_at_threshold": 0.53, "balanced_accuracy_at_threshold_low": 0.47}
    decided = known.metrics | decided | {"balanced_accuracy_at_threshold_high": 0.59}
    text = words(dataclasses.replace(known, metrics=decided))
    assert "Its decisions at the threshold are not shown to be: 0.530 [0.470, 0.590]." in text
    known.compared["rows"]["trained"][references.BY_SCORE] = [None] * 3
    assert rules(known) == ["look"] and "balanced accuracy as written 0.500" in words(known)


@pytest.mark.parametrize(
    ("change", "start"),
    [
        (
            (-0.174, -0.25, -0.1),
            "By IoU the detector is better: 0.335 (detector) and 0.161 (trained), difference +0.174 ",
        ),
        ((0.1, 0.05, 0.15), "By IoU trained is better: "),
        ((0.01, -0.05, 0.05), "By IoU the two cannot be told apart: "),
    ],
)
def test_boxes_are_compared_where_both_have_some(change: tuple[float, float, float], start: str) -> None:
    difference = dict(zip(("iou", "iou_low", "iou_high"), change, strict=True))
    known = facts(compared="open", difference=difference)
    rows = known.compared["rows"]
    rows |= {"trained": rows["trained"] | {"iou": [0.161] * 3}, "detector": rows["detector"] | {"iou": [0.335] * 3}}
    assert start in words(known)
    rows["detector"]["iou"] = [None] * 3
    assert "By IoU" not in words(known)


def test_kinds_named_right_are_compared_with_the_commonest() -> None:
    known = facts(compared="open")
    rows = known.compared["rows"]
    assert "names the kind" not in words(known)
    rows |= {"trained": rows["trained"] | {metrics.KIND: [0.991, 0.968, 0.999]}}
    rows |= {"always_A": rows["always_A"] | {metrics.KIND: [0.2] * 3}, "always_B": BLIND | {metrics.KIND: [0.0] * 3}}
    start = "trained names the kind right in 0.991 [0.968, 0.999] of the defective images "
    assert f"{start}(always the commonest 0.200)." in words(known)
    rows["detector"] = rows["detector"] | {metrics.KIND: [0.973] * 3}
    assert f"{start}(detector 0.973, always the commonest 0.200)." in words(known)


def test_a_cross_validation_is_named_and_not_proposed_again() -> None:
    metric = {"value": 0.81, "low": 0.7, "high": 0.9}
    crossed = {"images": 100, "metrics": {"balanced_accuracy_at_threshold": metric, "balanced_accuracy": metric}}
    text = words(facts(half=0.15, labels=(20, 10), images=100, crossed=crossed))
    assert "balanced accuracy at the threshold 0.810 [0.700, 0.900] on all 100 images." in text
    assert "evaluate.folds" not in text
    nothing = {"value": None, "low": None, "high": None}
    crossed["metrics"] = {"balanced_accuracy_at_threshold": nothing, "balanced_accuracy": nothing}
    assert "Cross-validation" not in words(facts(crossed=crossed))


def test_what_kind_of_model_it_is() -> None:
    assert verdict.summarize(facts())["model"] == (
        "trained is the embedded model (0.9 million weights on frozen pretrained features; sees about 320 x 320 "
        "pixels), with an adapter trained on 144 images, 12 of them defective."
    )
    assert verdict.summarize(facts(kind=LARGE))["model"] == (
        "trained is Qwen/Qwen2.5-VL-7B-Instruct (8.3 billion weights; sees about 512 x 512 pixels), with an adapter "
        "trained on other data than these."
    )
    base = loading.EMBEDDED["embedded://tiny-base"]
    kind = verdict.kind_of("embedded://tiny-base", Model())
    assert kind.embedded and not kind.trained and kind.weights == model_folder.parameters(base) > 500_000
    assert kind.pixels == verdict.kind_of(base, Model()).pixels > 0
    assert verdict.kind_of("embedded://tiny-base", Model(max_pixels=64 * 64)).pixels == 64 * 64


def test_the_settings_for_photographs_allow_the_steps_that_the_verdict_names() -> None:
    overlay = Path(verdict.__file__).parents[2] / "params" / "photographs.yaml"
    assert load(overlay).sft.steps == verdict._LONG


def test_larger_models_have_the_figures_of_the_documentation() -> None:
    text = (Path(verdict.__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    for larger in verdict.LARGER:
        name = Path(larger.overlay).stem
        rows = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", text, re.M)
        memory, hours = (row.split(" | ") for row in rows)
        assert (memory[0], memory[-1]) == (f"{larger.weights} GiB", f"{larger.memory} GiB")
        assert [int(cell.split()[-2]) for cell in hours[:2]] == list(larger.hours)
        settings_ = (Path(verdict.__file__).parents[2] / larger.overlay).read_text(encoding="utf-8")
        assert f"name: {larger.name} " in settings_


def test_check_names_the_next_larger_model() -> None:
    lines = verdict.expected(EMBEDDED, 3 * 2**30)
    assert lines[0].startswith("kind      the embedded model (0.9 million") and "about 3.0 GiB" in lines[2]
    assert lines[3].startswith("larger    Qwen/Qwen2.5-VL-3B-Instruct (params/qwen2.5-vl-3b.yaml), about 25.5 GiB")
    small = dataclasses.replace(LARGE, weights=2_000_000_000)
    assert "larger    Qwen/Qwen2.5-VL-3B" in verdict.expected(small, 2**30)[3]
    middle = dataclasses.replace(LARGE, weights=3_750_000_000)
    assert "larger    Qwen/Qwen2.5-VL-7B" in verdict.expected(middle, 2**30)[3]
    assert len(verdict.expected(LARGE, 2**30)) == 3


def test_kinds_are_counted_as_decided() -> None:
    table = pd.DataFrame(
        {
            "id": [*"abcd"],
            "label": ["anomalous"] * 3 + ["normal"],
            "defect": ["scratch", "scratch", "dent", None],
            "predicted": ["normal"] * 4,
        }
    )
    train = pd.DataFrame({"label": ["anomalous", "normal"], "defect": ["dent", None]})
    decided = table.assign(decision=["anomalous", "normal", "anomalous", "anomalous"], score=0.5, iou=np.nan)
    for name in metrics.COMPARED:
        decided = decided.assign(**{name: np.nan, f"region_{name}": np.nan})
    decided["regions"] = decided["predicted_boxes"] = [[]] * 4
    assert verdict.parts(decided, train) == {"scratch": Part(2, 1, 0), "dent": Part(1, 1, 1)}
    assert verdict.parts(table, train) == {"scratch": Part(2, 0, 0), "dent": Part(1, 0, 1)}


@settings(deadline=None, max_examples=200)
@given(
    balanced=st.none() | st.floats(0.1, 0.95),
    half=st.floats(0.001, 0.4),
    compared=st.sampled_from([None, "detector", "candidate", "open"]),
    iou=st.none() | st.floats(0, 0.9),
    recall=st.floats(0.01, 0.99),
    specificity=st.floats(0.01, 0.99),
    tiles=st.sampled_from([None, CUT]),
    images=st.integers(2, 500),
)
def test_there_are_one_or_two_steps_and_whole_sentences(
    balanced: float | None,
    half: float,
    compared: str | None,
    iou: float | None,
    recall: float,
    specificity: float,
    tiles: Any,
    images: int,
) -> None:
    labels = (images, images) if balanced is not None else (0, images)
    known = facts(balanced, half, compared, iou, recall, specificity, labels, tiles=tiles, detector="d", kinds=KINDS)
    summary = verdict.summarize(known)
    steps = [step["rule"] for step in summary["steps"]]
    assert 1 <= len(steps) <= 2 and len(set(steps)) == len(steps)
    text = references.lines(summary)
    assert all(line.rstrip().endswith((".", "once.")) and "None" not in line and "nan" not in line for line in text)
    if compared == "detector":
        assert "gate" not in steps
    if balanced is not None:
        better = balanced - half > 0.5
        assert better == ("trained is better than a blind answer" in text[1]) == ("look" not in steps)
    ranked = references.brief({"summary": summary})
    assert [line for _, line in ranked if line.startswith("Next: Register")] == []
    assert all(line.endswith(".") for _, line in ranked)


def test_an_evaluation_without_a_summary_has_none_on_the_screen() -> None:
    assert references.brief({"rows": {}}) == []
