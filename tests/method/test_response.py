import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adfm.method.response import parse
from adfm.records import Box

# Pieces of which nasty completions are made.
PIECES = st.sampled_from(
    [
        *("<think>", "</think>", "<rethink>", "</rethink>", "<answer>", "</answer>", "<THINK>", "</Answer>", "<think"),
        *("<thin\u212a>", "</an\u017fwer>", "A", "B", "a", "b", "[[", "]]", ",", "\u4e2d", "\ud800", "\x00", "\u202e"),
        *("[1,2,3,4]", "[4,3,2,1]", "[nan,1,2,3]", "[-inf,inf,1e999,1]", "[-5,.5,1e2,60.]", "[1,2,3,4,5]", "[x,y,z,w]"),
        *("[\u0661,\u0662,\u0663,\u0664]", "9" * 5000),
    ]
)
WILD = st.one_of(st.text(), st.lists(st.one_of(PIECES, st.text(max_size=3)), max_size=20).map("".join))
NUMBERS = st.floats(-1e6, 1e6, allow_nan=False).map(lambda number: round(number, 3))
BOXES = (
    st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS)
    .filter(lambda b: b[0] != b[2] and b[1] != b[3])
    .map(lambda b: Box(min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3])))
)
WORDS = st.text("abc ,.[]\n", max_size=20)


@given(WILD)
@example("")
@example("<think></think><rethink></rethink><answer></answer>")
@example("<answer>A")
@example("</answer>A<answer>")
@settings(deadline=None)
def test_any_string_is_read(completion):
    response = parse(completion)
    for text in (response.think, response.rethink):
        assert text is None or text in completion
    for box in response.boxes:
        assert all(map(math.isfinite, box))
        assert box.area > 0
    assert (response.answer is None) == (response.predicted_label is None)


@given(st.lists(BOXES, max_size=6), WORDS, WORDS, st.sampled_from("AaBb"), st.sampled_from(["", " ", "\n"]))
@settings(deadline=None)
def test_what_is_written_is_read(boxes, think, rethink, letter, space):
    written = "; ".join(f"[{space}{b.x1},{space}{b.y1}{space},{b.x2}, {b.y2}{space}]" for b in boxes)
    think = f"{think.replace('[', '')} {written} "
    tail = f"<rethink>{rethink}</rethink>{space}<answer>{space}{letter}{space}</answer>"
    response = parse(f"<think>{think}</think>{space}{tail}")
    assert response.think == think
    assert response.rethink == rethink
    assert response.answer == letter.upper()
    assert response.predicted_label == {"A": "anomalous", "B": "normal"}[letter.upper()]
    assert response.boxes == tuple(boxes)
    assert response.invalid == 0
    assert response.tags == ("<think>", "</think>", "<rethink>", "</rethink>", "<answer>", "</answer>")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "A.",
        "(A)",
        "A B",
        "AB",
        "AA",
        "abnormal",
        "normal",
        "Yes",
        "A or B",
        "A\u0300",
        "\uff21",
        "[A]",
        "\u0410",
        "<b>A</b>",
    ],
)
def test_only_a_clean_letter_is_an_answer(text):
    assert parse(f"<think>x</think><answer>{text}</answer>").answer is None


@pytest.mark.parametrize(
    "completion",
    [
        "A",
        "<answer>A",
        "A</answer>",
        "<answer>A</answer><answer>A</answer>",
        "<answer>A</answer><answer>",
        "<answer>A</answer></ANSWER>",
        "< answer>A</answer>",
    ],
)
def test_only_one_whole_stage_is_an_answer(completion):
    assert parse(completion).answer is None


def test_tags_in_any_case_and_order():
    response = parse("<ANSWER>b</answer> so <Think>first [1,2,3,4]</THINK> <think>second [5,6,7,8]</think>")
    assert (response.answer, response.think, response.rethink) == ("B", "first [1,2,3,4]", None)
    assert response.boxes == (Box(1, 2, 3, 4),)


def test_boxes_outside_think_are_not_read():
    assert parse("[1,2,3,4]<rethink>[1,2,3,4]</rethink><answer>[1,2,3,4]</answer><think>none").boxes == ()


@pytest.mark.parametrize(
    ("text", "boxes", "invalid"),
    [
        ("[-1,2.5,1e2,+4.]", [(-1, 2.5, 100, 4)], 0),
        ("[[1,2,3,4], [5,6,7,8]]", [(1, 2, 3, 4), (5, 6, 7, 8)], 0),
        ('{"bbox_2d": [1, 2, 3, 4]}', [(1, 2, 3, 4)], 0),
        ("[1,2,3] [1,2,3,4,5] [1,2,3,] [1,2,3,x] [[[2, 5, 4] [1,2,3,4", [], 6),
        ("[a,b,c,d] [] [ , , , ] [1] see [x, 1, 2, 3] [[", [], 0),
        ("[3,2,1,4] [1,4,3,2] [1,1,1,2] [nan,1,2,3] [0,0,inf,1] [0,0,1e999,1] [0,0,1,1e7]", [], 7),
    ],
)
def test_boxes(text, boxes, invalid):
    response = parse(f"<think>{text}</think>")
    assert (response.boxes, response.invalid) == (tuple(Box(*box) for box in boxes), invalid)
