from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adfm.method import prompt
from adfm.models import families, loading
from adfm.params import Model
from adfm.records import Box
from experiments import tiny_model
from tests.models import random_models


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> loading.Loaded:
    folder = random_models.write("adfm_embedded", tmp_path_factory.mktemp("embedded"))
    return loading.load(str(folder), Model())


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_survives_the_tokenizer(embedded: loading.Loaded, text: str) -> None:
    tokenizer: Any = embedded.processor.tokenizer
    special = [token for token in tiny_model.SPECIAL if token in text]
    if not special:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text.encode("utf-8", "replace").decode()


def test_prompt_and_answers_are_short(embedded: loading.Loaded) -> None:
    tokenizer: Any = embedded.processor.tokenizer
    box = Box(120, 30, 450, 1000)
    assert len(tokenizer(prompt.target_completion("anomalous", [box], "scratch"))["input_ids"]) <= 24
    assert len(tokenizer(prompt.QUESTION.format(units=families.UNITS["thousandths"]))["input_ids"]) <= 60


def test_every_coordinate_is_one_token(embedded: loading.Loaded) -> None:
    tokenizer: Any = embedded.processor.tokenizer
    assert all(len(tokenizer(str(number))["input_ids"]) == 1 for number in tiny_model.COORDINATES)


def test_stage_tags_are_not_special_tokens(embedded: loading.Loaded) -> None:
    tokenizer: Any = embedded.processor.tokenizer
    text = prompt.target_completion("normal", [])
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_weights_are_within_the_embedded_size(embedded: loading.Loaded) -> None:
    weights = sum(p.numel() for p in embedded.model.parameters())
    assert 500_000 <= weights <= 3_000_000
