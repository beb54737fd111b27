import math
import time
from itertools import pairwise

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from adfm.method import rewards
from adfm.method.coordinates import Frame
from adfm.method.rewards import PROFILES, in_training
from adfm.records import Box

SIDE = 512
FRAME = Frame(SIDE, SIDE)
LETTER = {"anomalous": "A", "normal": "B"}
WRONG = {"anomalous": "B", "normal": "A"}
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
# Strings of which a careless reader would take quadratic time, or choke: each by its length.
HUGE = {
    "opening tags": lambda n: "<think>" * (n // 7),
    "answers": lambda n: "<answer>" * (n // 8) + "A",
    "nested": lambda n: "<think>" * (n // 15) + "</think>" * (n // 15),
    "brackets": lambda n: "<think>" + "[" * n + "</think>",
    "spaces": lambda n: "<think>" + "[ 1 " + " " * n + "</think>",
    "commas": lambda n: "<think>" + "[1," * (n // 3) + "</think>",
    "one number": lambda n: "<think>[" + "9" * n + ",1,2,3]</think>",
    "one fraction": lambda n: "<think>[0." + "1" * n + ",1,2,3]</think>",
    "boxes": lambda n: "<think>" + "[1,1,2,2]" * (n // 9) + "</think>",
    "letters": lambda n: "<answer>" + "A" * n + "</answer>",
}

LABELS = st.sampled_from(["anomalous", "normal"])


def calibrated(completion, label, boxes, frame=FRAME):
    """The reward, on images of 512 x 512 by default."""
    return rewards.calibrated(completion, label, boxes, frame)


@st.composite
def box(draw, left=0, top=0, right=SIDE, bottom=SIDE):
    """A box of at least one pixel within the given one, half-open."""
    x1, y1 = draw(st.integers(left, right - 1)), draw(st.integers(top, bottom - 1))
    return Box(x1, y1, draw(st.integers(x1 + 1, right)), draw(st.integers(y1 + 1, bottom)))


TRUTH = st.lists(box(), min_size=1, max_size=8)


@st.composite
def apart(draw, smallest=1):
    """Boxes that do not touch each other, each within its own cell of 128 pixels, and the cells."""
    cells = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=smallest, max_size=8, unique=True))
    cells = [(128 * x, 128 * y, 128 * x + 128, 128 * y + 128) for x, y in cells]
    return [draw(box(*cell)) for cell in cells], cells


def answer(boxes=(), letter="A"):
    """A clean completion."""
    regions = " ".join(f"[{b[0]}, {b[1]}, {b[2]}, {b[3]}]" for b in boxes)
    return f"<think>I see {regions}.</think>\n<rethink>Each looked at again.</rethink>\n<answer>{letter}</answer>"


def localization(boxes, truth):
    return calibrated(answer(boxes), "anomalous", truth).localization


def misses(predicted, truth):
    return all(predicted.intersection(defect) == 0 for defect in truth)


# 1. Bounds and maxima.


@given(WILD, LABELS, st.lists(box(), max_size=8), st.sampled_from([Frame(512, 512), Frame(1000, 1000), Frame(84, 56)]))
@settings(deadline=None)
def test_1_every_term_lies_between_0_and_1(completion, label, truth, frame):
    terms = calibrated(completion, label, truth, frame)
    assert all(0 <= term <= 1 for term in terms)
    assert terms.total == sum(terms[:3])
    assert all(map(math.isfinite, PROFILES["paper"](completion, label, truth, frame)))


@given(TRUTH, st.data())
@settings(deadline=None)
def test_1_exactly_the_true_boxes_are_the_only_maximum(truth, data):
    assert calibrated(answer(truth), "anomalous", truth)[:3] == (1, 1, 1)
    changes = st.one_of(
        st.lists(box(), max_size=8),
        st.lists(st.sampled_from(truth), max_size=9),
        st.lists(st.one_of(box(), st.sampled_from(truth)), max_size=9),
        st.tuples(st.integers(0, len(truth) - 1), box()).map(lambda c: [*truth[: c[0]], c[1], *truth[c[0] + 1 :]]),
    )
    other = data.draw(changes)
    assume(sorted(other) != sorted(truth))
    terms = calibrated(answer(other), "anomalous", truth)
    assert terms.localization < 1
    assert terms.total < 3
    assert calibrated(answer(truth, "B"), "anomalous", truth).total < 3


@given(WILD, st.lists(box(), max_size=8))
@settings(deadline=None)
def test_1_the_clean_answer_without_a_box_is_a_maximum_on_a_normal_image(completion, boxes):
    assert calibrated(answer(letter="B"), "normal", []) == (1, 1, 1, 1)
    assert calibrated("<think>Even.</think><rethink>None.</rethink><answer>b</answer>", "normal", []).total == 3
    assert calibrated(completion, "normal", []).total <= 3
    assert calibrated(answer(boxes, "A"), "normal", []).total <= 1


# 2. Strict rise with IoU, and with nearness where nothing overlaps.


@given(box(), box(), box())
@example(Box(0, 0, 512, 511), Box(0, 0, 512, 510), Box(0, 0, 512, 512))
@example(Box(7, 7, 8, 8), Box(0, 0, 512, 512), Box(0, 0, 512, 511))
@settings(deadline=None)
def test_2_one_box_pays_by_its_iou(defect, one, other):
    other, one = sorted((one, other), key=defect.iou)
    assume(one.iou(defect) > other.iou(defect))
    assert localization([one], [defect]) > localization([other], [defect])


@given(apart(), st.data())
@settings(deadline=None)
def test_2_each_matched_box_pays_by_its_iou(defects_and_cells, data):
    truth, cells = defects_and_cells
    predicted = [data.draw(box(*cell)) for cell in cells]
    i = data.draw(st.integers(0, len(truth) - 1))
    worse, better = sorted((predicted[i], data.draw(box(*cells[i]))), key=truth[i].iou)
    assume(better.iou(truth[i]) > worse.iou(truth[i]))
    rest = predicted[:i] + predicted[i + 1 :]
    assert localization([better, *rest], truth) > localization([worse, *rest], truth)


@given(TRUTH, box(), box(), st.data())
@settings(deadline=None)
def test_2_also_where_true_boxes_overlap_each_other(truth, one, other, data):
    # Jaccard distance keeps the triangle inequality: with the others in place, its own defect is a box's best match.
    i = data.draw(st.integers(0, len(truth) - 1))
    other, one = sorted((one, other), key=truth[i].iou)
    assume(one.iou(truth[i]) > other.iou(truth[i]))
    rest = truth[:i] + truth[i + 1 :]
    assert localization([one, *rest], truth) > localization([other, *rest], truth)


@given(box(100, 100, 400, 400), st.floats(0, 2 * math.pi), st.integers(1, 60), st.integers(1, 60), st.integers(0, 3))
@settings(deadline=None)
def test_2_nearer_is_better_where_nothing_overlaps(defect, direction, near, step, others):
    def shifted(distance):
        x, y = distance * math.cos(direction), distance * math.sin(direction)
        return Box(*(round(v, 3) for v in (defect.x1 + x, defect.y1 + y, defect.x2 + x, defect.y2 + y)))

    rest = [Box(4 + 10 * i, 4, 8 + 10 * i, 8) for i in range(others)]
    one, other = shifted(400 + near), shifted(400 + near + step)
    truth = [defect, *rest]
    assume(misses(one, truth[:1]) and misses(other, truth[:1]))
    assert localization([one, *rest], truth) > localization([other, *rest], truth) > 0


@given(st.integers(-300, 300), st.integers(-300, 300))
def test_2_sliding_along_a_defect_is_not_flat(near, far):
    near, far = sorted((near, far), key=abs)
    assume(abs(near) < abs(far))
    defect = Box(200, 0, 240, 512)
    at = [Box(100, 236 + y, 140, 276 + y) for y in (near, far)]
    assert localization(at[:1], [defect]) > localization(at[1:], [defect])


# 3. Misses and spurious boxes cost.


@given(TRUTH, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_3_every_further_miss_costs(truth, random):
    random.shuffle(truth)
    pays = [localization(truth[:count], truth) for count in range(len(truth) + 1)]
    assert all(fewer < more for fewer, more in pairwise(pays))


@given(TRUTH, st.lists(box(), max_size=8), box(), st.data())
@settings(deadline=None)
def test_3_a_box_that_touches_nothing_always_costs(truth, predicted, spurious, data):
    truth = [defect for defect in truth if not spurious.intersection(defect)]
    assume(truth)
    predicted = data.draw(st.one_of(st.just(predicted), st.lists(st.sampled_from(truth), max_size=8)))
    assert localization([*predicted, spurious], truth) < localization(predicted, truth)


@given(apart(), st.data())
@settings(deadline=None)
def test_3_a_box_said_twice_costs(defects_and_cells, data):
    truth, _ = defects_and_cells
    boxes = data.draw(st.lists(st.sampled_from(truth), min_size=1, unique=True))
    assert localization([*boxes, data.draw(st.sampled_from(boxes))], truth) < localization(boxes, truth)


@given(
    TRUTH,
    st.sampled_from(["[9,9,1,1]", "[5,5,5,5]", "[nan,1,2,3]", "[0,0,inf,inf]", "[600,600,700,700]", "[-9,-9,-1,-1]"]),
)
@settings(deadline=None)
def test_3_what_is_no_box_of_the_image_is_spurious(truth, text):
    for boxes in ([], truth):
        plain = answer(boxes)
        spoilt = plain.replace("see", f"see {text}")
        assert calibrated(spoilt, "anomalous", truth).localization < calibrated(plain, "anomalous", truth).localization


# 4. No insight, next to no pay.


@given(TRUTH, st.integers(1, 8))
@settings(deadline=None)
@example([Box(0, 0, 512, 511)], 1)
@example([Box(0, 0, 512, 256), Box(0, 256, 512, 511)], 2)
def test_4_boxing_the_whole_image_earns_little(truth, times):
    whole = Box(0, 0, SIDE, SIDE)
    assume(whole not in truth)
    assert localization([whole] * times, truth) < 0.15


@given(TRUTH, st.lists(box(), min_size=1, max_size=8))
@settings(deadline=None)
def test_4_missing_earns_little(truth, boxes):
    boxes = [one for one in boxes if misses(one, truth)]
    assume(boxes)
    assert 0 < localization(boxes, truth) < localization([], truth) < 0.15


# 5. Normal images.


@given(st.lists(box(), min_size=2, max_size=10))
@settings(deadline=None)
def test_5_one_region_rejected_is_free_and_more_are_not(boxes):
    pays = [calibrated(answer(boxes[:count], "B"), "normal", []).total for count in range(len(boxes) + 1)]
    assert pays[0] == pays[1] == 3
    assert all(more < fewer for fewer, more in pairwise(pays[1:]))


@pytest.mark.parametrize(
    "completion", ["", "B", "<answer>B</answer>", "<think> </think><answer>B</answer>", "<think>Even.</think>"]
)
def test_5_doing_nothing_is_not_paid_as_localization(completion):
    assert calibrated(completion, "normal", []).localization == 0


@given(WILD, st.lists(box(), max_size=4), st.sampled_from(["A", "", "normal", "AB"]))
@settings(deadline=None)
def test_5_localization_on_a_normal_image_needs_the_right_letter(wild, boxes, letter):
    assert calibrated(answer(boxes, letter), "normal", []).localization == 0
    if calibrated(wild, "normal", []).classification == 0:
        assert calibrated(wild, "normal", []).localization == 0


# The number of regions.


@pytest.mark.parametrize(
    ("written", "true", "paid"),
    [(0, 1, 0), (1, 1, 1), (2, 1, 1 / 2), (0, 3, 0), (1, 3, 1 / 3), (2, 3, 2 / 3), (3, 3, 1), (4, 3, 3 / 4)],
)
def test_the_number_of_regions_pays_by_how_near_it_is(written, true, paid):
    regions, truth = ([Box(x, y, x + 9, y + 9) for x in range(0, 10 * n, 10)] for n, y in ((written, 0), (true, 99)))
    assert calibrated(answer(regions), "anomalous", truth).regions == pytest.approx(paid)
    assert calibrated(answer(regions, "B"), "anomalous", truth).regions == 0
    assert calibrated(answer(regions, "B"), "normal", []).regions == pytest.approx(1 / max(1, written))
    assert calibrated(answer(regions), "normal", []).regions == 0
    assert calibrated(answer(regions), "anomalous", list(map(list, truth))).regions == pytest.approx(paid)


def test_a_region_written_again_or_not_a_box_is_not_one_more():
    truth = [Box(0, 0, 9, 9), Box(20, 0, 29, 9)]
    assert calibrated(answer(truth[:1] * 2), "anomalous", truth).regions == 0.5
    assert calibrated(answer(truth[:1]).replace("see", "see [1,2,3]"), "anomalous", truth).regions == 0.5
    assert calibrated(answer(truth).replace("see", "see [1,2,3]"), "anomalous", truth).regions == pytest.approx(2 / 3)


@given(st.one_of(WILD, st.builds(answer, st.lists(box(), max_size=4), st.sampled_from(["A", "B", "x"]))), LABELS, TRUTH)
@settings(deadline=None)
def test_the_number_of_regions_never_pays_more_than_the_letter(completion, label, truth):
    terms = calibrated(completion, label, truth if label == "anomalous" else [])
    assert 0 <= terms.regions <= terms.classification


@pytest.mark.parametrize("completion", ["B", "<answer>B</answer>", "<think> </think><answer>B</answer>"])
def test_doing_nothing_is_not_a_number_of_regions(completion):
    assert calibrated(completion, "normal", []).regions == 0


# 6. Only a clean letter.


@given(LABELS, st.text(max_size=12), st.lists(box(), max_size=3))
@settings(deadline=None)
@example("normal", "abnormal", [])
@example("anomalous", "normal", [])
@example("anomalous", "A.", [])
@example("anomalous", "</ANSWER>", [])
def test_6_text_that_merely_contains_the_letter_earns_nothing(label, text, truth):
    right = LETTER[label]
    for content in (text, f"{text}{right}", f"{right}{text}"):
        clean = content.strip().lower() == right.lower()
        assert calibrated(answer(truth, content), label, truth).classification == clean


# 7. Any string, quickly.


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", HUGE)
def test_7_time_is_linear(name, profile):
    def seconds(length):
        text = HUGE[name](length)
        start = time.process_time()
        assert all(map(math.isfinite, PROFILES[profile](text, "anomalous", [Box(1, 1, 9, 9), Box(50, 50, 60, 60)])))
        return time.process_time() - start

    seconds(100)  # imports what is imported late
    # Sixteen times the length takes sixteen times as long; were it quadratic, 256 times.
    assert min(seconds(160_000) for _ in range(2)) < 80 * max(min(seconds(10_000) for _ in range(3)), 0.002)


def test_7_more_boxes_than_anyone_looks_at_earn_less_still():
    truth = [Box(1, 1, 2, 2)]
    pays = [localization(truth * count, truth) for count in (999, 1000, 1001, 1002)]
    assert pays == sorted(pays, reverse=True)
    assert len(set(pays)) == 4


# 8. Order.


@given(TRUTH, st.lists(box(), max_size=8), st.randoms(use_true_random=False), st.sampled_from(["", "[9,9,1,1]"]))
@settings(deadline=None)
def test_8_order_does_not_matter_to_the_last_bit(truth, predicted, random, invalid):
    predicted = predicted + truth[:2]
    shuffled, shuffled_truth = random.sample(predicted, len(predicted)), random.sample(truth, len(truth))
    for label in LETTER:
        one = calibrated(answer(predicted) + invalid, label, truth)
        assert one == calibrated(answer(shuffled) + invalid, label, shuffled_truth)


# Beyond the eight.


@given(TRUTH, st.lists(box(), max_size=8), st.sampled_from(["B", "", "abnormal"]))
@settings(deadline=None)
def test_without_the_right_letter_the_same_boxes_pay_half(truth, predicted, letter):
    paid = calibrated(answer(predicted, letter), "anomalous", truth).localization
    assert paid == localization(predicted, truth) / 2 > 0


@given(TRUTH, box())
@settings(deadline=None)
def test_an_anomalous_answer_without_a_region_pays_less_than_one_that_names_any(truth, region):
    for label, boxes in (("anomalous", truth), ("normal", [])):
        nowhere, somewhere = (calibrated(answer(regions), label, boxes) for regions in ([], [region]))
        assert (nowhere.format, somewhere.format) == (0.75, 1)
        assert nowhere.total < somewhere.total - 0.19
        no_box = calibrated(answer().replace("see", "see [9,9,1,1] [1,2,3]"), label, boxes)
        assert no_box.format == 0.75
    assert (
        calibrated("<answer>A</answer>", "normal", []).format == calibrated("<answer>B</answer>", "normal", []).format
    )


@given(LABELS, st.one_of(WILD, st.builds(answer, st.lists(box(), max_size=4), st.sampled_from(["A", "B", "x"]))))
@settings(deadline=None)
def test_in_a_set_without_boxes_only_form_and_letter_are_paid(label, completion):
    terms = in_training("calibrated", completion, label, [], FRAME, located=False)
    usual = calibrated(completion, label, [])
    assert terms.localization == 0
    assert terms.classification == usual.classification
    assert usual.format <= terms.format <= usual.format + 0.25


@given(LABELS, st.lists(box(), max_size=4))
@settings(deadline=None)
def test_in_a_set_without_boxes_no_place_is_asked_for(label, boxes):
    for letter in LETTER.values():
        right = letter == LETTER[label]
        assert in_training("calibrated", answer(boxes, letter), label, [], FRAME, located=False) == (1, right, 0, 0)


@given(TRUTH)
@settings(deadline=None)
def test_the_right_letter_alone_beats_the_right_boxes_with_the_wrong_letter(truth):
    letter_only = calibrated(answer([]), "anomalous", truth).total
    assert letter_only > calibrated(answer(truth, "B"), "anomalous", truth).total > 1


@given(st.lists(box(), max_size=4))
def test_where_no_true_box_is_known_all_boxes_pay_the_same(boxes):
    assert calibrated(answer(boxes), "anomalous", []) == (1, 1, 0, 0)


@given(TRUTH, st.lists(box(), max_size=4), st.sampled_from([0.5, 2.0, 4.0]))
@settings(deadline=None)
def test_the_frame_is_only_a_unit(truth, predicted, scale):
    there = [[Box(*(v * scale for v in one)) for one in boxes] for boxes in (predicted, truth)]
    scaled = calibrated(answer(there[0]), "anomalous", there[1], Frame(SIDE * scale, SIDE * scale))
    assert scaled.localization == pytest.approx(localization(predicted, truth), abs=1e-3)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>Even.</think><rethink>No region.</rethink><answer>B</answer>", 1),
        (" <think>Even.</think> \n <rethink>No region.</rethink>\n\n<answer> b </answer>\n", 1),
        ("<rethink>No region.</rethink><think>Even.</think><answer>B</answer>", 0.75),
        ("<think>Even.<rethink>No region.</rethink></think><answer>B</answer>", 0.75),
        ("<think>Even.</think><rethink>No region.</rethink><answer>normal</answer>", 0.5),
        ("<think>Even.</think><think>Even.</think><rethink>No region.</rethink><answer>B</answer>", 0.5),
        ("<think> </think><rethink></rethink><answer>B</answer>", 0.25),
        ("<think>Even.</think><rethink>No reg", 0.25),
        ("B", 0),
        ("", 0),
    ],
)
def test_format(completion, expected):
    assert calibrated(completion, "normal", []).format == expected


@given(LABELS, st.text("x ", min_size=1, max_size=200))
def test_length_is_not_paid(label, text):
    assume(text.strip())
    for letter in LETTER.values():
        form = f"<think>x</think><rethink>x</rethink><answer>{letter}</answer>"
        assert calibrated(form, label, []) == calibrated(form.replace("x", text), label, [])


@given(st.one_of(WILD, st.lists(box(), max_size=4).map(answer)), st.sampled_from(sorted(PROFILES)))
def test_in_training_no_place_is_paid_where_only_the_label_is_known(completion, profile):
    paid = in_training(profile, completion, "anomalous", [], FRAME)
    usual = PROFILES[profile](completion, "anomalous", [], FRAME)
    assert paid.localization == 0
    assert (paid.format, paid.classification) == (usual.format, usual.classification)


@given(LABELS, TRUTH, st.lists(box(), max_size=4), st.sampled_from(sorted(PROFILES)))
@settings(deadline=None)
def test_in_training_all_else_is_paid_as_by_the_profile(label, truth, predicted, profile):
    boxes, completion = truth if label == "anomalous" else [], answer(predicted)
    assert in_training(profile, completion, label, boxes, FRAME) == PROFILES[profile](completion, label, boxes, FRAME)
