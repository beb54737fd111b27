"""Problems are grouped by cause, and the message stays short however many there are."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from adfm.data.problems import EXAMPLES, BadData, MissingImage, Unlisted, grouped
from adfm.text import printable


def test_problems_with_one_cause_are_one_group() -> None:
    problems = [
        "a 1.json: shape 3: a shape of the type 'line' has no area; draw a polygon",
        "b/c.json: shape 12: a shape of the type 'point' has no area; draw a polygon",
        "c.json: line 3, column 4: is not JSON (Expecting value)",
    ]
    assert grouped(problems) == {
        "a shape of the type … has no area; draw a polygon": problems[:2],
        "is not JSON (Expecting value)": problems[2:],
    }


def test_a_cause_keeps_what_all_its_problems_say() -> None:
    text = "a.json: annotation {0}: 'bbox' [{0}, 2, 3, 4] is [x, y, width, height] in COCO, and 'area' is 5"
    [cause] = grouped(text.format(number) for number in range(3))
    assert cause == "'bbox' … is [x, y, width, height] in COCO, and 'area' is 5"


def test_the_first_line_says_the_most_frequent_cause() -> None:
    problems = ["x.txt: is empty", *(f"{n}.json: image '{n}.png' is missing" for n in range(30))]
    first, *lines = str(BadData(Path("line"), "labelme", problems)).splitlines()
    assert first == "line: image … is missing (30 of 31 problems, layout labelme)"
    assert lines[0] == "  image … is missing: 30"
    assert lines[1 : EXAMPLES + 1] == [f"    {problem}" for problem in problems[1 : EXAMPLES + 1]]
    assert lines[EXAMPLES + 1 :][:3] == ["    and 20 more", "  is empty: 1", "    x.txt: is empty"]


def test_what_the_message_leaves_out_is_in_a_file(tmp_path: Path) -> None:
    problems = [f"{n}.png: cannot be read" for n in range(EXAMPLES + 1)]
    listing = tmp_path / "shards.problems.txt"
    error = BadData(tmp_path, "coco", problems).written(listing)
    assert str(listing) in str(error)
    assert [line.strip() for line in listing.read_text().splitlines()[1:]] == problems

    few = BadData(tmp_path, "coco", problems[1:])
    listing.unlink()
    assert few.written(listing) is few
    assert not listing.exists()


def test_a_problem_keeps_its_kind_and_counts_once() -> None:
    problems = [MissingImage("a.json: x"), "a.json: x", "b.json: y"]
    assert [type(one) for one in BadData(Path("line"), "coco", problems).problems] == [MissingImage, str]


@given(st.lists(st.text(), min_size=1))
def test_no_problem_is_lost_and_the_message_can_be_printed(problems: list[str]) -> None:
    error = BadData(Path("line"), "coco", problems)
    assert sorted(one for its in grouped(problems).values() for one in its) == sorted(problems)
    assert all(printable(line) == line for line in str(error).split("\n"))


def test_images_without_an_annotation_come_after_what_they_follow_from() -> None:
    left = [Unlisted(f"{name}: images that are not in the annotations: a.png") for name in "pq"]
    causes = list(grouped([*left, "via.json: image 'a.png' is missing"]))
    assert causes == ["image 'a.png' is missing", "images that are not in the annotations: a.png"]
