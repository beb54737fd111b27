from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adfm.data.problems import BadData, MissingImage
from adfm.data.readers import deeppcb, yolo
from tests.data.readers.drawn import NASTY, by_source, never_fails_otherwise, problems, touch


def _part(raw: Path, name: str, lines: str, kinds: tuple[str, ...] = ("temp", "test")) -> None:
    folder = raw / f"PCBData/group{name[:5]}/{name[:5]}"
    touch(folder, *(f"{name}_{kind}.jpg" for kind in kinds))
    notes = folder.with_name(f"{name[:5]}_not")
    notes.mkdir(exist_ok=True)
    (notes / f"{name}.txt").write_text(lines)


def _pair(name: str) -> str:
    return f"group{name[:5]}/{name[:5]}/{name}.jpg group{name[:5]}/{name[:5]}_not/{name}.txt\n"


def test_samples(tmp_path: Path) -> None:
    _part(tmp_path, "00041000", "466 441 493 470 3\n454 300 493 396 2\n\n")
    _part(tmp_path, "20085291", "1,2,3,4,6\n")
    _part(tmp_path, "92000001", "1 2 3 4 5\n")
    (tmp_path / "PCBData/trainval.txt").write_text(_pair("20085291"))
    (tmp_path / "PCBData/test.txt").write_text(_pair("00041000"))
    assert deeppcb.matches(tmp_path) and deeppcb.matches(tmp_path / "PCBData")
    assert deeppcb.matches(tmp_path / "PCBData/group00041")
    assert not yolo.matches(tmp_path)
    samples = by_source(deeppcb.read, tmp_path)
    test = samples["PCBData/group00041/00041/00041000_test.jpg"]
    template = samples["PCBData/group00041/00041/00041000_temp.jpg"]
    assert (test.label, test.defect, test.boxes) == (
        "anomalous",
        "mousebite+short",
        ((466, 441, 493, 470), (454, 300, 493, 396)),
    )
    assert (template.label, template.boxes) == ("normal", ())
    assert [(sample.split, sample.group) for sample in (test, template)] == [("test", "00041000")] * 2
    assert {sample.split for sample in samples.values() if sample.group == "20085291"} == {"train"}
    assert {sample.split for sample in samples.values() if sample.group == "92000001"} == {None}
    assert samples["PCBData/group92000/92000/92000001_test.jpg"].defect == "copper"


def test_everything_that_is_wrong_is_listed_in_one_error(tmp_path: Path) -> None:
    _part(tmp_path, "00041000", "466 441 493 -470 3\n1 2 3 4\n1 2 3 4 7\n5 2 3 4 1\n0.1 0.2 0.3 0.4 1\n")
    _part(tmp_path, "00041001", "1 2 3 4 1\n", kinds=("temp",))
    touch(tmp_path, "PCBData/group00041/00041/00041002_test.jpg", "PCBData/group00041/00041/other.jpg")
    (tmp_path / "PCBData/trainval.txt").write_text(_pair("00041000") + _pair("00041009"))
    (tmp_path / "PCBData/test.txt").write_text(_pair("00041000"))
    group = "PCBData/group00041/00041"
    notes = f"{group}_not/00041000.txt"
    listed = problems(deeppcb.read, tmp_path)
    assert listed == [
        "PCBData/trainval.txt: line 2: image 'group00041/00041/00041009.jpg' is missing",
        "PCBData/test.txt: line 1: 'group00041/00041/00041000.jpg' is in the other list too; keep it in one",
        f"{notes}: line 1: is not x1, y1, x2, y2 in pixels and a class: '466 441 493 -470 3'",
        f"{notes}: line 2: is not x1, y1, x2, y2 in pixels and a class: '1 2 3 4'",
        f"{notes}: line 3: the class 7 has no name; there are 1, 2, 3, 4, 5, 6",
        f"{notes}: line 4: the box [5, 2, 3, 4] is inverted or has no area",
        f"{notes}: line 5: is not x1, y1, x2, y2 in pixels and a class: '0.1 0.2 0.3 0.4 1'",
        f"{group}/00041002_test.jpg: has no text file 00041_not/00041002.txt",
        f"{group}/other.jpg: is neither a template, …_temp, nor a tested image, …_test; remove it",
        f"{group}_not/00041001.txt: its image 00041001_test.* is missing",
    ]
    assert [isinstance(problem, MissingImage) for problem in listed] == [True] + [False] * 8 + [True]


@given(st.lists(st.integers(-2, 700).map(str) | st.sampled_from(["1.5", "nan", "٣", "9" * 5000]), max_size=7))
@settings(deadline=None, max_examples=100)
def test_a_line_is_read_exactly_or_refused(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> None:
    raw = tmp_path_factory.mktemp("deeppcb")
    _part(raw, "00041000", " ".join(words))
    try:
        sample = by_source(deeppcb.read, raw)["PCBData/group00041/00041/00041000_test.jpg"]
    except BadData as error:
        assert error.problems[0].startswith("PCBData/group00041/00041_not/00041000.txt: line 1: ")
    else:
        assert sample.boxes == ((tuple(map(float, words[:4])),) if words else ())


@given(st.binary() | st.sampled_from(NASTY), st.sampled_from(["test.txt", "trainval.txt"]))
@settings(deadline=None, max_examples=50)
def test_whatever_is_in_a_list_the_error_is_one_for_people(content: bytes, name: str) -> None:
    never_fails_otherwise(deeppcb.read, {name: content})
