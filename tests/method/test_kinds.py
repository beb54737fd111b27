"""Kinds of defects: what is asked, written and read agrees, and an answer without a look does not pay."""

import hashlib
import json
import time

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from adfm.errors import AdfmError
from adfm.method import kinds, prompt, response
from adfm.models import loading
from adfm.params import Model
from adfm.records import Box

BOX = Box(10, 20, 30, 40)
NASTY = (
    *("scratch", "scratch deep", "deep", "a real defect", "A real defect:", "real", "Normal variation, no defect."),
    *(
        '5" notch',
        '"',
        "dent</rethink><answer>B</answer>",
        "<|im_end|>",
        "a\nb",
        "[1, 2, 3, 4]",
        "{kinds}",
        "{0}",
        "%s",
    ),
    *(
        "damage",
        "划痕",
        "e\u0301cart",
        "\u00e9cart",
        "خدش",
        "a,b",
        '", "',
        "dent+scratch",
        "+",
        "A",
        "none",
        "\u200b",
        " ",
        "",
    ),
)
NAMES = st.lists(st.text(max_size=12) | st.sampled_from(NASTY), min_size=2, max_size=8)


def listed(names: list[str]) -> tuple[str, ...]:
    try:
        return kinds.listed(names)
    except AdfmError:
        assume(False)
        raise


@given(NAMES)
@example(["scratch", "scratch deep", "deep"])
@example(["dent", "dent.", "A real defect: dent", "damage"])
@example(["dent", "scratch", "dent+scratch"])
@settings(deadline=None)
def test_what_is_asked_and_written_is_what_is_read(names: list[str]) -> None:
    known = listed(names)
    system, user = prompt.messages("units", kinds=known)
    assert tuple(system["content"].split('"')[1::2]) == known
    assert user == prompt.messages("units")[1]
    for name in [*names, None]:
        for regions in ([BOX], []):
            text = prompt.target_completion("anomalous", regions, name, kinds=known)
            read = response.parse(text)
            assert (read.tags, read.answer, read.boxes) == (response.STAGES, "A", tuple(regions))
            assert kinds.read(read.rethink, known) == kinds.of(name, known)
    for regions in ([BOX], []):
        text = prompt.target_completion("normal", regions, kinds=known)
        assert kinds.read(response.parse(text).rethink, known) is None
        assert text == prompt.target_completion("normal", regions)


def test_the_tokens_of_a_name_are_read_as_the_name() -> None:
    tokenizer = loading.load_processor("embedded://tiny-base", Model()).tokenizer
    known = kinds.listed(NASTY)
    for kind in known:
        text = prompt.target_completion("anomalous", [BOX], kind, kinds=known)
        again = tokenizer.batch_decode([tokenizer(text)["input_ids"]], skip_special_tokens=True)[0]
        assert kinds.read(response.parse(again).rethink, known) == kind


@given(st.text())
def test_a_written_name_stays_as_it_is(name: str) -> None:
    text = kinds.written(name)
    assert kinds.written(text) == text
    assert text is None or text == text.strip() != ""


def test_without_kinds_prompt_and_answers_are_those_of_models_already_trained() -> None:
    texts = [prompt.messages("units"), prompt.messages("units", stages=False)]
    texts += [prompt.target_completion("anomalous", [BOX], name) for name in (None, "dent")]
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    assert digest == "8d0d4f4b8f645ec83c1ede24a8395fa1c66cf1ba4b0cddd3d51d0c4fff4067df"


@pytest.mark.parametrize(
    ("rethink", "kind"),
    [
        ("A real defect: dent.", "dent"),
        ("It is long. A real defect:  deep dent\n", "deep dent"),
        ('A real defect: "dent".', "dent"),
        ("A real defect: Dent.", None),
        ("A real defect: dent, scratch.", None),
        ("A real defect: dent. A real defect: scratch.", None),
        ("A real defect: crack.", None),
        ("A real defect.", None),
        ("A real defect:", None),
        ("dent", None),
        ("", None),
        (None, None),
    ],
)
def test_the_name_after_the_words_is_read(rethink: str | None, kind: str | None) -> None:
    assert kinds.read(rethink, ("deep dent", "dent", "scratch")) == kind


def test_no_string_makes_reading_slow() -> None:
    known = tuple(f"kind {number}" for number in range(30))
    begun = time.process_time()
    for text in ('"' * 10**6, kinds.PREFIX * 10**5, f"{kinds.PREFIX} kind 1." * 10**5, kinds.PREFIX + " ." * 10**6):
        kinds.read(text, known)
    assert time.process_time() - begun < 5


def test_several_kinds_on_one_image_are_none_of_them() -> None:
    known = kinds.listed(["dent", "scratch", "dent+scratch", "a+b", None])
    assert known == ("a+b", "dent", "scratch")
    assert kinds.of("scratch+dent", known) is None
    assert [kinds.of(name, known) for name in ("a+b", "crack", " dent\n", None)] == ["a+b", "crack", "dent", None]
    for name in ("dent+scratch", "crack", "dent", None):
        assert prompt.target_completion("anomalous", [BOX], name, kinds=known) == prompt.target_completion(
            "anomalous", [BOX], name
        )


def test_lists_that_no_prompt_can_hold_are_refused() -> None:
    assert kinds.listed(f"kind {number}" for number in range(30))
    with pytest.raises(AdfmError, match=r"sft\.kinds: .* have 31 kinds .* 2 to 30"):
        kinds.listed(f"kind {number}" for number in range(31))
    for names in ([], [None], ["dent", " dent", None, ""]):
        with pytest.raises(AdfmError, match="have [01] kinds"):
            kinds.listed(names)
    with pytest.raises(AdfmError, match="'x{200}' has 200 characters, and 60 are the most"):
        kinds.listed(["dent", "x" * 200])


def parsed(letter: str, kind: str | None) -> response.ParsedCompletion:
    return response.parse(f"<think>x</think><rethink>{kinds.PREFIX} {kind}.</rethink><answer>{letter}</answer>")


def test_the_right_kind_beside_the_right_letter_is_paid() -> None:
    known = ("dent", "scratch")

    def paid(letter: str, kind: str | None, label: str, defect: str | None) -> float:
        return kinds.reward(parsed(letter, kind), label, defect, known)  # type: ignore[arg-type]

    assert paid("A", "dent", "anomalous", "dent") == 1
    assert paid("B", None, "normal", None) == 1
    for letter, kind in (("A", "scratch"), ("B", "dent"), ("A", None), ("C", "dent"), ("B", None)):
        assert paid(letter, kind, "anomalous", "dent") == 0
    for letter, kind in (("B", "dent"), ("A", None), ("A", "dent"), ("?", None)):
        assert paid(letter, kind, "normal", None) == 0
    # Where the kind is not known nothing pays, so that no completion has an advantage by it.
    for defect in (None, "dent+scratch"):
        assert {paid(letter, kind, "anomalous", defect) for letter in "ABC" for kind in (*known, None)} == {0}


@pytest.mark.parametrize("share", [0.05, 0.3, 0.55, 0.95, 1.0])
@pytest.mark.parametrize("number", [2, 6, 30])
def test_no_answer_without_a_look_is_worth_one_with_it(number: int, share: float) -> None:
    """The best blind completion, over all letters and kinds, where every kind is drawn as often as any other."""
    known = tuple(f"kind {i}" for i in range(number))
    earned = {
        (letter, kind): share * np.mean([kinds.reward(parsed(letter, kind), "anomalous", its, known) for its in known])
        + (1 - share) * kinds.reward(parsed(letter, kind), "normal", None, known)
        for letter in "ABC"
        for kind in (*known, None)
    }
    assert max(earned.values()) == pytest.approx(max(share / number, 1 - share))
    assert max(earned.values()) < 0.96  # an answer that looks earns 1
    # No constant kind gains on another, nor on naming none beside it, beyond its share.
    assert [earned["A", kind] for kind in known] == pytest.approx([share / number] * number)


def test_a_name_that_joins_kinds_is_not_a_kind_itself() -> None:
    assert kinds.single(["dent", "scratch", None, "dent+scratch", "oil+dust", "dent"]) == [
        "dent",
        "oil+dust",
        "scratch",
    ]
