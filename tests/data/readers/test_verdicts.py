import pytest

from adfm.data.readers.verdicts import class_name, defect_type, is_verdict


@pytest.mark.parametrize("answer", ["OK", " good", "NG", "Defective", "no defect", "No_Defect", "passed", "faulty"])
def test_words_that_say_whether_an_image_is_normal(answer: str) -> None:
    assert is_verdict(answer)


@pytest.mark.parametrize("answer", ["scratch", "left", "", None, 1, ["OK"]])
def test_others(answer: object) -> None:
    assert not is_verdict(answer)


@pytest.mark.parametrize(
    ("answers", "defect"),
    [
        ([], None),
        ([" "], None),
        (["OK"], ""),
        (["OK", "good "], ""),
        (["defect-free"], ""),
        (["NG"], "defect"),
        (["NG", "scratch"], "scratch"),
        (["scratch", "dent"], "dent+scratch"),
    ],
)
def test_the_defect_that_answers_name(answers: list[str], defect: str | None) -> None:
    assert defect_type(answers) == defect


def test_answers_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="labelled both normal and not: OK, scratch"):
        defect_type(["OK", "scratch"])


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("", "is not a name"),
        ("a\nb", "is not a name"),
        (7, "is not a name"),
        ("No defect", "every shape is taken"),
    ],
)
def test_names_that_no_class_of_defects_has(name: object, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        class_name(name)
    assert class_name(" scratch ") == "scratch"
