from __future__ import annotations

from pathlib import Path

import pytest

from adfm.evaluation.gate_metrics import METRICS, Bound
from adfm.registry.policy import Policy, PolicyError, difference, digest, dumps, load, loads, registered

SHIPPED = Path(__file__).parents[2] / "gate.yaml"


def test_the_shipped_policy_is_the_default() -> None:
    assert load(SHIPPED) == loads("") == Policy()
    assert [*Policy().whole] == [*Policy().parts] == [name for name, metric in METRICS.items() if metric.asked]
    assert [*METRICS][:2] == ["accuracy", "iou"]


def test_a_metric_of_which_nothing_is_asked_is_in_a_policy_that_names_it() -> None:
    assert METRICS["mask_iou"].whole == METRICS["mask_iou"].parts == Bound()
    assert [*Policy().whole] == [*Policy().parts] == ["accuracy", "iou", "escape_rate", "overkill"]
    masks = loads("whole: {mask_iou: {margin: 0.1}}")
    assert masks.whole == Policy().whole | {"mask_iou": Bound(margin=0.1)} and masks.parts == Policy().parts
    assert registered(dumps(masks)) == masks
    assert "mask_iou" in loads("whole: {mask_iou: {}}").whole


def test_without_a_file_the_default_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load() == Policy()
    (tmp_path / "gate.yaml").write_text("looks: 3")
    assert load().looks == 3


def test_a_policy_survives_its_text_and_keeps_its_digest() -> None:
    policy = loads("level: 0.1\nwhole: {iou: {limit: null, margin: null}}\napprovers: [Ünal]")
    assert loads(dumps(policy)) == policy and digest(loads(dumps(policy))) == digest(policy) != digest(Policy())


def test_a_registered_policy_does_not_ask_for_a_metric_that_is_added_later(monkeypatch: pytest.MonkeyPatch) -> None:
    before, text = Policy(), dumps(Policy())
    monkeypatch.setitem(METRICS, "more", METRICS["escape_rate"])
    assert registered(text) == before != Policy() == registered("")
    assert digest(registered(text)) == digest(before)
    assert loads(text).whole["more"] == METRICS["escape_rate"].whole


def test_what_a_policy_says_otherwise_is_listed_by_key() -> None:
    own = loads("level: 0.1\nwhole: {iou: {margin: null}}\napprovers: [anna]")
    assert difference(Policy(), own) == [
        "level: 0.1 instead of 0.05",
        "whole.iou.margin: null instead of 0.05",
        "approvers: ['anna'] instead of []",
    ]
    assert difference(own, own) == []
    fewer = registered("whole: {iou: {limit: 0.1, margin: 0.05}}\nparts: {}")
    assert "whole.overkill.limit: not asked instead of 0.4" in difference(Policy(), fewer)
    assert "whole.overkill.limit: 0.4 instead of not asked" in difference(fewer, Policy())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("whole: {recal: {limit: 1}}", "gate.yaml line 1: whole: unknown metric 'recal'"),
        ("whole: {iou: {limt: 1}}", "unknown setting `whole.iou.limt`; did you mean `whole.iou.limit`?"),
        ("whole: {iou: {foo: 1}}", "unknown setting `whole.iou.foo`; gate.yaml lists all settings"),
        ("looks: 0", "looks should be greater than 0, not 0"),
        ("parts: 3", "parts should be a section with keys, not 3"),
        ("enough: 5\nenough: 6", "gate.yaml line 2: enough is set already in line 1"),
        ("whole: [", "gate.yaml line 1 is not YAML"),
    ],
)
def test_a_policy_that_cannot_be_used_names_line_and_key(text: str, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        loads(text)
    assert message in str(caught.value) and caught.value.exit_code == 2


def test_a_file_that_cannot_be_read_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "gate.yaml").write_bytes(b"\xff\xfe")
    for file in (tmp_path / "gate.yaml", tmp_path / "missing.yaml"):
        with pytest.raises(PolicyError, match="cannot be read") as caught:
            load(file)
        assert caught.value.exit_code == 2
