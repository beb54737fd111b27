from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from adfm.errors import AdfmError
from adfm.method import prompt
from adfm.models import decoding, loading
from adfm.params import Evaluate, Model
from adfm.records import Box, Label
from tests import qwen
from tests.models.generation import generate

BASE = "embedded://tiny-base"
TOKENIZERS = ["embedded", *qwen.FAMILIES]
# Ends of completions: what is written before the letter, and the letter as it may be written.
DECISIONS = [
    "<answer>A</answer>",
    "<answer> A</answer>",
    "<answer>a</answer>",
    "<answer>\nA</answer>",
    "<answer>\tb\n</answer>",
]
THOUGHTS = "<think>Suspicious: [10, 20, 30, 40]</think><rethink>A real defect: dent.</rethink>"


@functools.cache
def scorer(name: str) -> decoding.Scorer:
    return decoding.Scorer(tokenizer(name))


@functools.cache
def tokenizer(name: str) -> Any:
    return loading.load_processor(BASE, Model()).tokenizer if name == "embedded" else qwen.tokenizer(name)


def tokens_of(name: str, text: str) -> list[int]:
    return list(tokenizer(name)(text, add_special_tokens=False)["input_ids"])


@functools.cache
def completing(name: str, before: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """The tokens of the whole vocabulary that write `A`, and `B`, behind some tokens, by writing each of them."""
    kind = tokenizer(name)
    written = kind.batch_decode([[*before, token] for token in range(len(kind))], skip_special_tokens=True)
    sides: dict[str, list[int]] = {"a": [], "b": []}
    for token, text in enumerate(written):
        if letter := re.search(r"<answer>\s*([ab])\s*(<|$)", text, re.IGNORECASE):
            sides[letter[1].lower()].append(token)
    return sides["a"], sides["b"]


def scripted(name: str, known: dict[int, dict[int, float]]) -> Callable[[int], Any]:
    """Logits as `Scorer` asks for them: `known` by position and token; all others are noise that is far less likely."""
    rng = np.random.default_rng(0)

    def logits(at: int) -> Any:
        whole = rng.normal(-60, 3, len(tokenizer(name)))
        for token, probability in known.get(at, {}).items():
            whole[token] = math.log(probability)
        return whole[scorer(name).tokens]

    return logits


@pytest.mark.parametrize("decision", DECISIONS)
@pytest.mark.parametrize("odds", [0.9, 0.1, 0.5, 1e-6])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_known_odds_of_the_letter_come_out_as_they_went_in(name: str, odds: float, decision: str) -> None:
    text = THOUGHTS + decision
    tokens = tokens_of(name, text)
    position = next(
        i for i in range(len(tokens)) if re.search(r"<answer>\s*[ab]", tokenizer(name).decode(tokens[: i + 1]), re.I)
    )
    a, b = completing(name, tuple(tokens[position - 3 : position]))
    assert tokens[position] in a + b
    # Every token that completes the decision has a part of the probability, the first the most.
    shares = {token: odds * share for token, share in zip(a, parts(len(a)), strict=True)}
    shares |= {token: (1 - odds) * share for token, share in zip(b, parts(len(b)), strict=True)}
    score = scorer(name).letter(tokens, text, scripted(name, {position: shares}))
    assert score == pytest.approx(odds, abs=1e-4)


def parts(count: int) -> list[float]:
    shares = np.geomspace(1, 0.01, count)
    return list(shares / shares.sum())


@pytest.mark.parametrize("family", qwen.FAMILIES)
def test_the_real_tokenizers_never_write_the_letter_as_a_token_of_its_own(family: str) -> None:
    pieces = [tokenizer(family).decode([token]) for token in tokens_of(family, "<answer>A</answer>")]
    assert ">A" in pieces and "A" not in pieces
    texts = [tokenizer(family).decode([token]) for token in scorer(family).tokens]
    assert {">A", ">a", "A", " A", "a", ">B", ">b", "B", " B", "b"} <= set(texts)
    assert len(texts) <= 128  # what vLLM gives probabilities of


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("label", ["anomalous", "normal"])
@pytest.mark.parametrize("regions", [[Box(10, 20, 30, 40)], []])
def test_every_supervised_answer_parts_where_the_branches_are(name: str, label: Label, regions: list[Box]) -> None:
    text = prompt.target_completion(label, regions, "scratch")
    tokens = tokens_of(name, text)
    for fork in decoding.BRANCHES:
        at = scorer(name)._position(tokens, text, fork)
        assert at is not None
        side = fork.side(text)
        assert side == (label if fork.tag == "<rethink>" or not regions else "anomalous")
        split = scorer(name)._split(tokens[:at], fork)
        assert side and tokens[at] in [scorer(name).tokens[i] for i in split[side]]
        assert len(split["anomalous"]) and len(split["normal"])


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("label", ["anomalous", "normal"])
@given(think=st.floats(0.001, 0.999), rethink=st.floats(0.001, 0.999), letter=st.floats(0.001, 0.999))
@settings(max_examples=20, deadline=None)
def test_the_score_of_the_branches_has_the_geometric_mean_of_their_odds(
    name: str, label: Label, think: float, rethink: float, letter: float
) -> None:
    text = prompt.target_completion(label, [Box(10, 20, 30, 40)] if label == "anomalous" else [], "dent")
    tokens = tokens_of(name, text)
    known = {}
    for fork, odds in zip((*decoding.BRANCHES, decoding.LETTER), (think, rethink, letter), strict=True):
        at = scorer(name)._position(tokens, text, fork)
        assert at is not None
        split = scorer(name)._split(tokens[:at], fork)
        known[at] = {
            scorer(name).tokens[split["anomalous"][0]]: odds,
            scorer(name).tokens[split["normal"][0]]: 1 - odds,
        }
    score = scorer(name).branch(tokens, text, scripted(name, known))
    odds = math.sqrt(think / (1 - think) * rethink / (1 - rethink))
    assert score == pytest.approx(odds / (1 + odds), abs=1e-4)


def test_words_of_its_own_have_the_score_of_the_letter() -> None:
    text = "<think>I see a scratch.</think><rethink>It is deep.</rethink><answer>A</answer>"
    tokens = tokens_of("embedded", text)
    logits = scripted("embedded", {len(tokens) - 2: dict(zip(tokens_of("embedded", "AB"), (0.8, 0.2), strict=True))})
    for score in (scorer("embedded").letter, scorer("embedded").branch):
        assert score(tokens, text, logits) == pytest.approx(0.8, abs=1e-4)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<answer>",
        "<answer>A",
        "<answer>AB</answer>",
        "<answer>C</answer>",
        "A",
        "<answer>A</answer><answer>B</answer>",
    ],
)
def test_without_a_clean_letter_there_is_no_score(text: str) -> None:
    tokens = tokens_of("embedded", text)
    for score in (scorer("embedded").letter, scorer("embedded").branch):
        assert score(tokens, text, scripted("embedded", {})) is None


@given(st.text(alphabet=st.sampled_from("<>/answerthikABab \n[1,2]"), max_size=60))
@settings(max_examples=200, deadline=None)
def test_no_text_makes_the_score_fail(text: str) -> None:
    tokens = tokens_of("embedded", text)
    for score in (scorer("embedded").letter, scorer("embedded").branch):
        value = score(tokens, tokenizer("embedded").decode(tokens), scripted("embedded", {}))
        assert value is None or 0 <= value <= 1


def test_odds_that_are_not_known_are_no_score() -> None:
    text = "<think>I see.</think><rethink>Sure.</rethink><answer>A</answer>"
    tokens = tokens_of("embedded", text)
    assert scorer("embedded").letter(tokens, text, lambda at: np.full(len(scorer("embedded").tokens), -np.inf)) is None


def test_the_mean_of_samples_leaves_out_those_without_a_letter() -> None:
    assert decoding.mean_of_samples([0.9, None, 0.3], [[0.5, 0.1, None], [1.0, 0.2, None]]) == [0.75, None, 0.3]


def test_a_tokenizer_that_cannot_write_the_letters_is_refused() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {"<unk>": 0, "<answer>": 1, "</answer>": 2, "<": 3}
    made = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("letter", "isolated")
    with pytest.raises(AdfmError, match="cannot be told apart"):
        decoding.Scorer(PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>"))


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("a<answer>B</answer>", "a<answer>B</answer>"),
        ("a<answer>B</answer>\n\nMore <answer>A</answer>", "a<answer>B</answer>"),
        ("a<answer>B", "a<answer>B"),
        ("", ""),
    ],
)
def test_what_follows_the_answer_is_dropped(completion: str, expected: str) -> None:
    assert decoding.until_stop(completion) == expected


# ------------------------------------------------------------------------------------------ a model that generates


@pytest.fixture(scope="module")
def embedded() -> loading.Loaded:
    return loading.load(BASE, Model())


@pytest.fixture(scope="module")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], loading.Loaded]:
    """Untrained models by family, with the real vocabulary."""

    @functools.cache
    def model(family: str) -> loading.Loaded:
        qwen.save_model(family, folder := tmp_path_factory.mktemp(family))
        return loading.load(folder, Model())

    return model


def follow(loaded: loading.Loaded, tokens: list[int], at: int, odds: dict[int, float]) -> Any:
    """Makes a model write `tokens`, with the given probabilities at one of them; returns the hook to remove."""
    written = []

    def script(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        position = len(written)
        written.append(position)
        known = odds if position == at else {tokens[min(position, len(tokens) - 1)]: 1.0}
        logits = torch.full_like(logits, -30.0)
        for token, probability in known.items():
            logits[..., token] = math.log(probability)
        return logits

    return loaded.model.get_output_embeddings().register_forward_hook(script)


@pytest.mark.parametrize("family", qwen.FAMILIES)
@pytest.mark.parametrize(("written", "odds"), [("A", 0.9), ("B", 0.1), ("A", 0.6)])
def test_a_model_with_the_real_tokenizer_gets_the_odds_that_it_has(
    family: str, written: str, odds: float, small_models: Callable[[str], loading.Loaded]
) -> None:
    """Through `generate` itself: an untrained model is made to write an answer and to be so sure of its letter."""
    loaded = small_models(family)
    text = f"<think>I see.</think><rethink>Sure.</rethink><answer>{written}</answer>"
    kind = loaded.processor.tokenizer
    tokens = list(kind(text, add_special_tokens=False)["input_ids"])
    [a], [b] = (kind(text, add_special_tokens=False)["input_ids"][-1:] for text in ("<answer>A", "<answer>B"))
    hook = follow(loaded, tokens, tokens.index(a if written == "A" else b), {a: odds, b: 1 - odds})
    try:
        [completion], [score] = generate(loaded, [Image.new("RGB", (56, 56))], Evaluate(max_new_tokens=60))
    finally:
        hook.remove()
    assert completion == text and score == pytest.approx(odds, abs=1e-4)


def test_a_folder_s_settings_for_chat_are_not_taken_over(tmp_path: Path, embedded: loading.Loaded) -> None:
    """Qwen2.5-VL's folders have a repetition penalty, which `generate` takes over by default."""
    import shutil

    folder = tmp_path / "chatty"
    shutil.copytree(loading.resolve(BASE, None), folder)
    chat = {
        "do_sample": True,
        "repetition_penalty": 1.8,
        "temperature": 0.6,
        "top_k": 3,
        "top_p": 0.5,
        "no_repeat_ngram_size": 2,
    }
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | chat))
    image, how = Image.new("RGB", (128, 128), "gray"), Evaluate(max_new_tokens=40)
    chatty = loading.load(folder, Model())
    for setting in chat:
        assert not getattr(chatty.model.generation_config, setting)
    assert generate(chatty, [image], how) == generate(embedded, [image], how)


def test_sampled_scores_are_the_same_each_time_and_leave_the_answer_alone(embedded: loading.Loaded) -> None:
    images = [Image.new("RGB", (128, 128), color) for color in ("gray", "white")]
    greedy = generate(embedded, images, Evaluate(max_new_tokens=40, score="letter"))
    state = torch.get_rng_state()
    first, second = (generate(embedded, images, Evaluate(max_new_tokens=40, samples=3)) for _ in range(2))
    assert first == second and first[0] == greedy[0] and first[1] != greedy[1]
    assert torch.equal(torch.get_rng_state(), state)
