"""The category and the part of each sample, as the settings ask for them."""

from dataclasses import replace
from pathlib import Path

import pytest

from adfm.data import samples
from adfm.errors import AdfmError
from adfm.params import Convert
from adfm.records import Sample
from tests.data.readers.layouts import image

SAMPLE = Sample(Path("line/a/1.png"), "a/1.png", "line", "line", "normal")


def _of(source: str, **more: str) -> Sample:
    return replace(SAMPLE, source=source, image=Path("line", source), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("names", "categories"),
    [
        (["bolt/1.png", "nut/2.png"], ["bolt", "nut"]),
        (["train/images/bolt/1.png", "valid/images/nut/2.png"], ["bolt", "nut"]),
        (["images/train2017/bolt/1.png", "images/val2017/2.png"], ["bolt", "line"]),
        (["bolt/images/1.png", "nut/JPEGImages/2.png"], ["bolt", "nut"]),
        (["obj_train_data/bolt/a/1.png", "obj_valid_data/nut/b/2.png"], ["bolt", "nut"]),
        (["export/bolt/1.png", "export/nut/2.png"], ["bolt", "nut"]),  # the archive has a folder of its own
        (["bolt/1.png", "bolt/2.png"], ["bolt", "bolt"]),
        (["bolt/images/1.png", "bolt/images/2.png"], ["bolt", "bolt"]),
        (["1.png", "2.png"], ["line", "line"]),
        (["images/1.png", "images/2.png"], ["line", "line"]),
        (["bolt/ok/1.png", "nut/scratch/2.png"], ["bolt", "nut"]),
        (["ok/bolt/1.png", "scratch/nut/2.png"], ["bolt", "nut"]),
        (["good/1.png", "Scratch/2.png"], ["line", "line"]),
    ],
)
def test_folders_become_categories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], categories: list[str]
) -> None:
    raw = tmp_path / "line"
    for name in names:
        image(raw, name)
    read = [_of(names[0]), _of(names[1], label="anomalous", defect="dent+scratch")]
    layout = samples.LAYOUTS["labelme"]._replace(read=lambda _: iter(read))
    monkeypatch.setitem(samples.LAYOUTS, "labelme", layout)
    by_folder = Convert(category="folder")
    assert [sample.category for sample in samples.read(raw, "labelme", by_folder)] == categories
    assert [sample.category for sample in samples.read(raw, "labelme", Convert())] == ["line", "line"]
    read[:] = [replace(sample, category="screw") for sample in read]  # of a table, or the layout
    assert [sample.category for sample in samples.read(raw, "labelme", by_folder)] == ["screw", "screw"]


@pytest.mark.parametrize(
    ("source", "photograph"),
    [
        ("train/images/IMG_1_jpg.rf.0a1b2c3d4e5f.jpg", "IMG_1_jpg"),
        ("valid/images/IMG_1_jpg.rf.ffff.jpg", "IMG_1_jpg"),
        ("bolt/train/IMG_1_png.rf.Zk2-_9.jpg", "bolt/IMG_1_png"),
        ("a.rf.b.rf.c.jpg", "a.rf.b"),
        ("train/IMG_1.jpg", None),
        ("x.rf.y/IMG_1.jpg", None),
        (".rf.0a1b.jpg", None),
    ],
)
def test_copies_of_one_photograph_by_roboflow(source: str, photograph: str | None) -> None:
    assert samples.photograph(source) == photograph


def _survey(setting: str | None, *its: Sample) -> samples.Survey:
    survey = samples.Survey(setting)
    for sample in its:
        survey.add(sample)
    return survey


@pytest.mark.parametrize(
    ("setting", "source", "part"),
    [
        (r"part(\d+)", "bolt/part12_v1.png", "12"),
        (r"part\d+", "bolt/part12_v1.png", "part12"),
        (r"^[^/]+", "bolt/part12_v1.png", "bolt"),
        (r"(x)?part", "bolt/part12_v1.png", None),
        (r"serial", "bolt/part12_v1.png", None),
        ("batch", "bolt/batch/1.png", "7"),  # a column comes first
    ],
)
def test_the_part_that_an_image_shows(setting: str, source: str, part: str | None) -> None:
    other = replace(_of("xpart0.png serial"), columns={"batch": "8"})
    sample = replace(_of(source), columns={"batch": "7"})
    assert _survey(setting, other, sample).grouping().part(sample) == part
    assert _survey(None, sample).grouping().part(sample) is None


def test_rows_without_a_value_have_no_part() -> None:
    some = [replace(SAMPLE, columns={"a": value}) for value in ("1", "")] + [SAMPLE]
    grouping = _survey("a", *some).grouping()
    assert [grouping.part(sample) for sample in some] == ["1", None, None]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("part(", r"'part\(' is neither a column \(the columns are 'batch', 'size'\) nor a regular expression"),
        ("seril", r"'seril' is neither a column .* nor in the path of any image; paths are a/1.png, b\\n/2.png\."),
        ("size", "the column 'size' is empty in every row"),
        ("a{99999999999}", "nor a regular expression"),
        ("png", r"'png' makes all images one part, 'png', so that they cannot be divided \(the columns are"),
    ],
)
def test_a_group_that_fits_nothing(setting: str, message: str) -> None:
    some = [replace(SAMPLE, columns={"batch": "1", "size": ""}), _of("b\n/2.png")]
    with pytest.raises(AdfmError, match=message):
        _survey(setting, *some).grouping()
