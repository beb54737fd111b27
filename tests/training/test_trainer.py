from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adfm.method import prompt, rewards
from adfm.method.coordinates import Frame
from adfm.params import Params
from adfm.records import Box
from adfm.training import trainer

WEIGHTS = torch.ones(3)


def test_utilisation_of_constructed_groups() -> None:
    same, right, wrong = [1.0, 1.0, 0.5], [1.0, 1.0, 0.2], [1.0, 0.0, 0.2]
    terms = torch.tensor([same, same, same, right, right, wrong, wrong, wrong])
    shares = trainer.utilisation(terms, WEIGHTS, group=2)
    assert shares == {
        "utilisation": 0.5,
        "utilisation/format": 0.0,
        "utilisation/classification": 0.25,
        "utilisation/localization": 0.25,
        "groups/all_right": 0.5,
        "groups/all_wrong": 0.25,
    }


def test_terms_that_cancel_out_have_no_variance() -> None:
    shares = trainer.utilisation(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), WEIGHTS, group=2)
    assert shares["utilisation"] == 0.0 and shares["utilisation/format"] == 1.0


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=3, max_size=3), min_size=8, max_size=8))
def test_utilisation_does_not_depend_on_order(rows: list[list[float]]) -> None:
    terms = torch.tensor(rows)
    turned = torch.cat([terms[4:].flip(0), terms[:4].flip(0)])
    assert trainer.utilisation(terms, WEIGHTS, 4) == trainer.utilisation(turned, WEIGHTS, 4)


def test_reward_functions_pay_what_the_profile_pays() -> None:
    box = Box(100, 100, 300, 300)
    texts = [prompt.target_completion("anomalous", [box], "spot"), prompt.target_completion("normal", []), "nonsense"]
    columns: dict[str, Any] = {
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "label": ["anomalous", "normal", "anomalous"],
        "regions": [[list(box)], [], [list(box)]],
        "frame": [[1000, 1000]] * 3,
    }
    for profile, score in rewards.PROFILES.items():
        for function in trainer.reward_functions(profile):
            expected = [
                getattr(score(text, label, [Box(*b) for b in regions], Frame(1000, 1000)), function.__name__)
                for text, label, regions in zip(texts, columns["label"], columns["regions"], strict=True)
            ]
            assert function(**columns, prompts=[], completion_ids=[]) == expected


def test_the_kind_is_a_term_where_kinds_are_asked_for() -> None:
    known = ("dent", "scratch")
    texts = [prompt.target_completion("anomalous", [], "dent", kinds=known), prompt.target_completion("normal", [])]
    columns: dict[str, Any] = {
        "completions": [[{"role": "assistant", "content": text}] for text in (*texts, *texts)],
        "label": ["anomalous", "anomalous", "normal", "normal"],
        "defect": ["dent", "dent", None, None],
        "regions": [[]] * 4,
        "frame": [[1000, 1000]] * 4,
    }
    functions = trainer.reward_functions("calibrated", kinds=known)
    assert [function.__name__ for function in functions] == [*trainer.TERMS, "kind"]
    terms = torch.tensor([function(**columns) for function in functions]).T
    assert terms[:, -1].tolist() == [1, 0, 0, 1]
    without = terms[:, :-1]
    assert without.T.tolist() == [function(**columns) for function in trainer.reward_functions("calibrated")]
    shares = trainer.utilisation(terms, torch.ones(terms.shape[1]), group=2)
    assert shares["utilisation/kind"] == 1
    assert "utilisation/kind" not in trainer.utilisation(without, torch.ones(without.shape[1]), 2)


def test_without_boxes_localization_never_contributes_to_the_advantage() -> None:
    boxes = [[], [Box(100, 100, 300, 300)], [Box(1, 1, 9, 9), Box(500, 500, 600, 600)]]
    columns: dict[str, Any] = {
        "completions": [
            [{"role": "assistant", "content": prompt.target_completion("anomalous", some)}] for some in boxes
        ],
        "label": ["anomalous"] * 3,
        "regions": [[]] * 3,
        "frame": [[1000, 1000]] * 3,
    }
    for profile in rewards.PROFILES:
        terms = dict(zip(trainer.TERMS, (of(**columns) for of in trainer.reward_functions(profile)), strict=True))
        assert (terms["localization"], terms["classification"]) == ([0, 0, 0], [1, 1, 1])


def test_in_a_set_without_boxes_an_anomalous_answer_needs_no_region() -> None:
    columns: dict[str, Any] = {
        "completions": [[{"role": "assistant", "content": prompt.target_completion("anomalous", [])}]] * 2,
        "label": ["anomalous", "normal"],
        "regions": [[], []],
        "frame": [[1000, 1000]] * 2,
    }
    for located, form in ((True, [1, 0.75]), (False, [1, 1])):
        terms = [function(**columns) for function in trainer.reward_functions("calibrated", located)]
        assert terms == [form, [1, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("changed", "corrected"),
    [({}, True), ({"top_p": 0.9}, False), ({"top_k": 50}, False), ({"temperature": 0.9}, True)],
)
def test_vllm_is_corrected_for_unless_rare_tokens_are_cut_off(changed: dict[str, Any], corrected: bool) -> None:
    from trl import GRPOConfig

    params = Params.model_validate({"train": changed})
    config = GRPOConfig(**trainer.trl_settings(params))
    assert config.vllm_importance_sampling_correction is corrected
    assert (config.top_p, config.top_k, config.min_p) == (params.train.top_p, params.train.top_k, 0.0)
