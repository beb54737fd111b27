from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adfm.data.readers import voc
from tests.data.readers.drawn import NASTY, by_source, never_fails_otherwise, problems, touch


def _xml(path: Path, *objects: tuple[str, object, object, object, object]) -> None:
    """An XML file; boxes as VOC has them, from 1 on and with the last pixel."""
    drawn = "".join(
        f"<object><name>{escape(name)}</name><pose>Left</pose><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
        "</object>"
        for name, x1, y1, x2, y2 in objects
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation><filename>old name.jpg</filename><size><width>0</width></size>{drawn}</annotation>\n")


def test_samples(tmp_path: Path) -> None:
    raw = tmp_path / "VOC2012"
    touch(raw, *(f"JPEGImages/{name}.jpg" for name in ("a", "b", "c c")), "SegmentationClass/a.png")
    _xml(raw / "Annotations/a.xml", ("dent", 11, 21, 30, 40), ("scratch & dent", 1, 1, 1, 1), ("dent", 0, 0, 8, 9))
    _xml(raw / "Annotations/b.xml")
    assert voc.matches(raw)
    found = by_source(voc.read, raw)
    assert found.keys() == {"JPEGImages/a.jpg", "JPEGImages/b.jpg", "JPEGImages/c c.jpg"}
    a = found["JPEGImages/a.jpg"]
    assert (a.label, a.defect, a.category, a.split) == ("anomalous", "dent+scratch & dent", "VOC2012", None)
    assert a.boxes == ((10, 20, 30, 40), (0, 0, 1, 1), (0, 0, 8, 9))
    assert {found[f"JPEGImages/{name}.jpg"].label for name in ("b", "c c")} == {"normal"}


@pytest.mark.parametrize(
    ("image", "xml", "split"),
    [
        ("1.jpg", "1.xml", None),
        ("1.jpg", "Annotations/1.xml", None),
        ("images/1.jpg", "annotations/1.xml", None),
        ("JPEGImages/x/1.jpg", "Annotations/x/1.xml", None),
        ("train/1.jpg", "train/1.xml", "train"),
        ("test/images/1.jpg", "test/annotations/1.xml", "test"),
        ("VOCdevkit/VOC2007/JPEGImages/1.jpg", "VOCdevkit/VOC2007/Annotations/1.xml", None),
    ],
)
def test_where_the_xml_file_of_an_image_may_be(tmp_path: Path, image: str, xml: str, split: str | None) -> None:
    touch(tmp_path, image)
    _xml(tmp_path / xml, ("dent", 2, 3, 4, 5))
    found = by_source(voc.read, tmp_path)
    assert (found[image].defect, found[image].boxes, found[image].split) == ("dent", ((1, 2, 4, 5),), split)


def test_splits_of_image_sets(tmp_path: Path) -> None:
    touch(tmp_path, *(f"JPEGImages/{n}.jpg" for n in range(5)))
    _xml(tmp_path / "Annotations/0.xml", ("dent", 1, 1, 2, 2))
    sets = tmp_path / "ImageSets" / "Main"
    sets.mkdir(parents=True)
    for name, content in (("train", "0\n1\n4\n"), ("val", "2\r\n4\n"), ("test", "3"), ("trainval", "0\n1\n2\n")):
        (sets / f"{name}.txt").write_text(content)
    splits = [sample.split for _, sample in sorted(by_source(voc.read, tmp_path).items())]
    assert splits == ["train", "train", "validation", "test", None]
    (sets / "train.txt").write_text("0\nseven\neight\n")
    assert problems(voc.read, tmp_path) == ["ImageSets/Main/train.txt: there are no images eight, seven"]


def test_everything_that_is_wrong_is_listed_in_one_error(tmp_path: Path) -> None:
    touch(tmp_path, *(f"images/{name}.jpg" for name in "abcdef"), "images/a.png")
    _xml(
        tmp_path / "annotations/a.xml",
        ("dent", 5, 5, 4, 9),
        ("dent", "nan", 5, 7, 9),
        ("dent", -9, 5, -2, 9),
        ("dent", "", 5, 7, 9),
        ("dent", "1,5", 5, 7, 9),
        ("", 1, 2, 3, 4),
        ("OK", 1, 2, 3, 4),
        ("dent", 1, 2, 3, 4),
    )
    _xml(tmp_path / "annotations/gone.xml", ("dent", 1, 2, 3, 4))
    (tmp_path / "annotations/b.xml").touch()
    (tmp_path / "annotations/c.xml").write_text("<annotation><object></annotation>")
    (tmp_path / "annotations/d.xml").write_text("<html/>")
    (tmp_path / "annotations/e.xml").write_bytes("<annotation><folder>\u00e9</folder></annotation>".encode("latin-1"))
    (tmp_path / "annotations/f.xml").write_text("<annotation><object/></annotation>")
    empty = "is inverted or has no area"
    assert problems(voc.read, tmp_path) == [
        "annotations/gone.xml: there is no image gone.* for it",
        "images/a.jpg: has the same name as images/a.png",
        f"annotations/a.xml: object 1: the box [4, 4, 4, 9] {empty}",
        "annotations/a.xml: object 2: the box [nan, 4, 7, 9] is not finite",
        "annotations/a.xml: object 3: the box [-9, 4, -2, 9] lies outside the image",
        "annotations/a.xml: object 4: bndbox has no number xmin, but ''",
        "annotations/a.xml: object 5: bndbox has no number xmin, but '1,5'",
        "annotations/a.xml: object 6: the class '' is no name",
        "annotations/a.xml: object 7: its class is 'OK', but every shape is taken for a defect; delete the shapes of"
        " this class, an image without any is normal",
        "annotations/b.xml: is no XML (no element found: line 1, column 0)",
        "annotations/c.xml: is no XML (mismatched tag: line 1, column 22)",
        "annotations/d.xml: is no Pascal VOC file: it begins with <html> instead of <annotation>",
        "annotations/e.xml: is no XML (not well-formed (invalid token): line 1, column 20)",
        "annotations/f.xml: object 1: the class None is no name",
    ]


def test_entities_that_grow_without_end_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg")
    laughs = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    document = f'<!DOCTYPE annotation [<!ENTITY l0 "laugh">{laughs}]><annotation>&l9;</annotation>'
    (tmp_path / "1.xml").write_text(document)
    (line,) = problems(voc.read, tmp_path)
    assert line.startswith("1.xml: is no XML (limit on input amplification factor (from DTD and entities) breached")


def test_entities_from_other_files_are_not_read(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg")
    (tmp_path / "secret").write_text("secret")
    document = (
        '<!DOCTYPE annotation [<!ENTITY e SYSTEM "secret">]><annotation><object><name>&e;</name></object></annotation>'
    )
    (tmp_path / "1.xml").write_text(document)
    assert problems(voc.read, tmp_path) == ["1.xml: is no XML (undefined entity &e;: line 1, column 77)"]


def test_a_data_set_without_any_xml_file_is_not_taken_for_normal(tmp_path: Path) -> None:
    touch(tmp_path, "JPEGImages/1.jpg")
    assert problems(voc.read, tmp_path) == [
        "no image has an XML file, beside it or in Annotations/ instead of JPEGImages/"
    ]


_side = st.integers(0, 5000)


@given(st.lists(st.tuples(_side, _side, st.integers(1, 900), st.integers(1, 900)), max_size=6, unique=True))
@settings(deadline=None, max_examples=40)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[int, int, int, int]]
) -> None:
    raw = tmp_path_factory.mktemp("voc")
    touch(raw, "1.jpg")
    _xml(raw / "1.xml", *(("dent", x + 1, y + 1, x + width, y + height) for x, y, width, height in drawn))
    assert by_source(voc.read, raw)["1.jpg"].boxes == tuple((x, y, x + w, y + h) for x, y, w, h in drawn)


@given(st.binary() | st.sampled_from(NASTY) | st.text().map(lambda text: f"<annotation>{text}</annotation>".encode()))
@settings(deadline=None, max_examples=80)
def test_whatever_is_in_the_file_the_error_is_one_for_people(content: bytes) -> None:
    never_fails_otherwise(voc.read, {"a.xml": content})
