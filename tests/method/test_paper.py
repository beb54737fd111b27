import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adfm.method.coordinates import PUBLISHED, Frame
from adfm.method.paper import best_matching, paper
from adfm.models import families
from adfm.records import Box

VECTORS = [json.loads(line) for line in Path(__file__).with_name("vectors.jsonl").read_text("utf-8").splitlines()]
TRUTH = [Box(100, 100, 140, 140)]
REST = "<rethink>looked at twice</rethink><answer>A</answer>"


def test_vectors():
    assert len(VECTORS) == 600
    for case in VECTORS:
        terms = paper(case["completion"], case["label"], case["boxes"])
        expected = (case["format"], case["classification"], case["localization"], 0)
        assert terms == pytest.approx(expected, abs=1e-6), case


@pytest.mark.parametrize(
    ("predicted", "truth", "localization"),
    [
        ("[0,0,512,512]", TRUTH, (1600 / 512**2 + 0.3 + 0.5) / 1.5),
        ("[140,100,180,140]", TRUTH, (0 + 0.3 + 0.5) / 1.5),
        ("[180,100,220,140]", TRUTH, (-1 / 3 + 0.3 + 0.5) / 1.5),
        ("[140,140,100,100]", TRUTH, (0 + 0.3 + 0.5) / 1.5),  # inverted: no area, no hull, no IoU
        ("[100,100,140,140]", [*TRUTH, Box(0, 0, 9, 9)], (1 + 0.15 + 0.5) / 1.5),  # clipped below
        ("[100,100,140,140] [0,0,9,9] [9,9,20,20]", TRUTH, (1 / 3 - 0.03 + 0.5) / 1.5),
        ("[1,1,2,2] [1,1,2,2] [1,1,2,2]", [Box(510, 510, 511, 511)], (-(1 - 2 / 510**2) / 3 - 0.03 + 0.5) / 1.5),
        ("", TRUTH, 0.0),
        ("", [], 0.0),
        ("[1,1,2,2]", [], 0.5),
        ("[1,1,2,2][1,1,2,2]", [], -0.1),
    ],
)
def test_localization(predicted, truth, localization):
    terms = paper(f"<think>{predicted}</think>{REST}", "anomalous", truth)
    assert terms.localization == pytest.approx(min(1.0, localization), abs=1e-9)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("[1,2,3,4]", 1),
        ("[ 1 ,\n2.50 ,\u00a03 , 4 ]", 1),
        ("[[1,2,3,4],[5,6,7,8]]", 2),
        ("[\u0661,2,3,4]", 1),  # a digit of any script is a digit
        ("[-1,2,3,4]", 0),
        ("[+1,2,3,4]", 0),
        ("[1.,2,3,4]", 0),
        ("[.5,2,3,4]", 0),
        ("[1e2,2,3,4]", 0),
        ("[1,2,3]", 0),
        ("[1,2,3,4,5]", 0),
        ("[1 2 3 4]", 0),
        ("(1,2,3,4)", 0),
        ("[1,2,3,4", 0),
    ],
)
def test_what_is_a_box(text, count):
    terms = paper(f"<think>{text}</think>{REST}", "normal", [])
    assert terms.localization == {0: 0.0, 1: 0.5, 2: -0.1}[count]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (f"<think>[1,2,3,4] and more</think>{REST}", 1.2),
        (f"<think>[1,2,3,505] and more</think>{REST}", 1.1),
        (f"<think>[somewhere] and more</think>{REST}", 1.0),
        (f"<think>] and more [</think>{REST}", 1.0),
        (f"<think>somewhere</think>{REST}", 0.8),
        (f"<think> 0123456789 </think>{REST}", 0.8),  # ten characters are not longer than ten
        (f"<THINK>0123456789a</Think>{REST}", 0.9),
        (f"<think> \n</think>{REST}", 0.5),
        (f"<think>{REST}", 0.5),
        (f"</think><think>far too late{REST}", 0.5),
        (f"{REST}<think>far too late</think>", 0.9),
        ("<think><think>nested one</think></think>", 0.4),  # to the first closing tag
        ("<rethink>x</rethink>", 0.2),
        ("<answer>both</answer>", 0.1),
        ("<answer>yes, that one</answer>", 0.1),
        ("<answer>no</answer>", 0.0),
        ("A", 0.0),
        ("", 0.0),
    ],
)
def test_format(completion, expected):
    assert paper(completion, "anomalous", []).format == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("completion", "label", "expected"),
    [
        ("<answer> \n a </answer>", "anomalous", 1.0),
        ("<answer>a</answer><answer>b</answer>", "anomalous", 1.0),  # the first one
        ("<answer>abnormal</answer>", "normal", 0.8),
        ("<answer>a or b</answer>", "normal", 0.8),
        ("<answer>0123456789a</answer>", "anomalous", 0.0),
        (" 012345678a ", "anomalous", 0.8),  # without an answer, the whole completion
        ("b", "normal", 1.0),
        ("b", "anomalous", 0.0),
        ("<answer></answer>a", "anomalous", 0.0),
        ("", "normal", 0.0),
    ],
)
def test_classification(completion, label, expected):
    assert paper(completion, label, []).classification == expected


@given(st.sampled_from(VECTORS), st.integers(1, 4), st.integers(1, 4))
@settings(deadline=None, max_examples=50)
def test_a_place_pays_the_same_in_any_frame(case, x, y):
    text = "<think>spot [64,32,128,256] and [16,16,504,500]</think>" + REST
    written = f"spot [{64 * x},{32 * y},{128 * x},{256 * y}] and [{16 * x},{16 * y},{504 * x},{500 * y}]"
    scaled = f"<think>{written}</think>{REST}"
    boxes = [Box(*box) for box in case["boxes"]]
    there = [Box(box.x1 * x, box.y1 * y, box.x2 * x, box.y2 * y) for box in boxes]
    assert paper(scaled, "anomalous", there, Frame(504 * x, 504 * y)) == pytest.approx(paper(text, "anomalous", boxes))


# Frames as `Family.frame` gives them: Qwen2.5-VL with max_pixels 262144 on square and wide images, Qwen3-VL.
@pytest.mark.parametrize("frame", [PUBLISHED, Frame(728, 336), Frame(336, 728), Frame(1000, 1000)])
@given(data=st.data())
@settings(deadline=None, max_examples=50)
def test_every_box_inside_the_image_as_the_model_sees_it_is_paid_in_full_and_no_other(frame, data):
    x, y = st.integers(0, int(frame.width)), st.integers(0, int(frame.height))
    box = [data.draw(side) for side in (x, y, x, y)]
    assert paper(f"<think>there is {box}</think>{REST}", "normal", [], frame).format == pytest.approx(1.2)
    axis = data.draw(st.integers(0, 3))
    box[axis] = int(frame[axis % 2]) + data.draw(st.integers(1, 10**6))
    assert paper(f"<think>there is {box}</think>{REST}", "normal", [], frame).format == pytest.approx(1.1)


def test_the_published_frame_is_that_of_a_square_image_on_the_published_model():
    images = SimpleNamespace(patch_size=14, merge_size=2, size={"shortest_edge": 3136, "longest_edge": 262144})
    assert families.get("qwen2_5_vl").frame(SimpleNamespace(image_processor=images), 1024, 1024) == PUBLISHED
    corner = f"<think>there is [400, 400, 503, 503]</think>{REST}"
    assert paper(corner, "anomalous", TRUTH).format == pytest.approx(1.2)
    thousandths = families.get("qwen3_vl").frame(None, 1024, 1024)
    assert paper(corner, "anomalous", TRUTH, thousandths).format == pytest.approx(1.2)


@given(st.lists(st.lists(st.integers(-9, 9), min_size=3, max_size=3), min_size=1, max_size=4))
@settings(deadline=None)
def test_best_matching_is_the_best_of_all(gains):
    from itertools import permutations

    pairs = list(best_matching(gains))
    rows, columns = range(len(gains)), range(3)
    assert len(pairs) == min(len(gains), 3) == len({i for i, _ in pairs}) == len({j for _, j in pairs})
    k = len(pairs)
    best = max(
        sum(gains[i][j] for i, j in zip(some, others, strict=True))
        for some in permutations(rows, k)
        for others in permutations(columns, k)
    )
    assert sum(gains[i][j] for i, j in pairs) == best
