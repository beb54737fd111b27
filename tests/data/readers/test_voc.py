import tempfile
import unicodedata
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from adfm.data.problems import BadData, MissingImage
from adfm.data.readers import voc
from adfm.records import Sample
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
    touch(raw, *(f"JPEGImages/{name}.jpg" for name in ("a", "b", "c c")))
    _xml(raw / "Annotations/a.xml", ("dent", 11, 21, 30, 40), ("scratch & dent", 1, 1, 1, 1), ("dent", 0, 0, 8, 9))
    _xml(raw / "Annotations/b.xml")
    assert voc.matches(raw)
    samples = by_source(voc.read, raw)
    assert samples.keys() == {"JPEGImages/a.jpg", "JPEGImages/b.jpg", "JPEGImages/c c.jpg"}
    a = samples["JPEGImages/a.jpg"]
    assert (a.label, a.defect, a.category, a.split) == ("anomalous", "dent+scratch & dent", "VOC2012", None)
    assert a.boxes == ((10, 20, 30, 40), (0, 0, 1, 1), (0, 0, 8, 9))
    assert {samples[f"JPEGImages/{name}.jpg"].label for name in ("b", "c c")} == {"normal"}


@pytest.mark.parametrize(
    ("image", "xml", "split"),
    [
        ("1.jpg", "1.xml", None),
        ("1.jpg", "Annotations/1.xml", None),
        ("images/1.jpg", "annotations/1.xml", None),
        ("JPEGImages/x/1.jpg", "Annotations/x/1.xml", None),
        ("train/1.jpg", "train/1.xml", "train"),
        ("test/images/1.jpg", "test/annotations/1.xml", "test"),
        ("train/images/cracks/1.jpg", "train/annotations/1.xml", "train"),
        ("IMAGES/1.jpg", "ANNOTATIONS/1.xml", None),
        ("data/1.jpg", "labels/1.xml", None),
        ("data/cam1/1.jpg", "labels/cam1/1.xml", None),
        ("images/train/1.jpg", "annotations/train/1.xml", "train"),
        ("images/train/1.jpg", "annotations/1.xml", "train"),
        ("cracks/1.jpg", "lable/1.xml", None),
        ("JPEGImages/a/b/c/1.jpg", "Annotations/a/b/c/1.xml", None),
        ("VOCdevkit/VOC2007/JPEGImages/1.jpg", "VOCdevkit/VOC2007/Annotations/1.xml", None),
    ],
)
def test_where_the_xml_file_of_an_image_may_be(tmp_path: Path, image: str, xml: str, split: str | None) -> None:
    touch(tmp_path, image)
    _xml(tmp_path / xml, ("dent", 2, 3, 4, 5))
    assert voc.matches(tmp_path)
    samples = by_source(voc.read, tmp_path)
    assert (samples[image].defect, samples[image].boxes, samples[image].split) == ("dent", ((1, 2, 4, 5),), split)


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
        f"annotations/a.xml: object 1: the box [4, 4, 4, 9] {empty}",
        "annotations/a.xml: object 2: xmin of bndbox is 'nan', which is not a finite number",
        "annotations/a.xml: object 3: the box [-9, 4, -2, 9] lies outside the image",
        "annotations/a.xml: object 4: xmin of bndbox is '', which is not a finite number",
        "annotations/a.xml: object 5: xmin of bndbox is '1,5', which is not a finite number",
        "annotations/a.xml: object 6: the class '' is not a name",
        "annotations/a.xml: object 7: its class is 'OK', but every shape is taken for a defect; delete the shapes of"
        " this class, an image without any is normal",
        "images/a.jpg: has the same name as images/a.png",
        "annotations/b.xml: is not XML (no element found: line 1, column 0)",
        "annotations/c.xml: is not XML (mismatched tag: line 1, column 22)",
        "annotations/d.xml: is not a Pascal VOC file: it begins with <html> instead of <annotation>",
        "annotations/e.xml: is not UTF-8 text; save the file with the encoding UTF-8, and declare that",
        "annotations/f.xml: object 1: the class None is not a name",
        "annotations/gone.xml: its image gone.* is missing",
    ]


def test_entities_that_grow_without_end_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg")
    laughs = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    document = f'<!DOCTYPE annotation [<!ENTITY l0 "laugh">{laughs}]><annotation>&l9;</annotation>'
    (tmp_path / "1.xml").write_text(document)
    (line,) = problems(voc.read, tmp_path)
    assert line.startswith("1.xml: is not XML (limit on input amplification factor (from DTD and entities) breached")


def test_entities_from_other_files_are_not_read(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg")
    (tmp_path / "secret").write_text("secret")
    document = (
        '<!DOCTYPE annotation [<!ENTITY e SYSTEM "secret">]><annotation><object><name>&e;</name></object></annotation>'
    )
    (tmp_path / "1.xml").write_text(document)
    assert problems(voc.read, tmp_path) == ["1.xml: is not XML (undefined entity &e;: line 1, column 77)"]


def test_a_data_set_without_any_xml_file_is_not_taken_for_normal(tmp_path: Path) -> None:
    touch(tmp_path, "JPEGImages/1.jpg")
    assert problems(voc.read, tmp_path) == [
        "no image has an XML file, beside it or in Annotations/ instead of JPEGImages/, or a mask"
    ]


def _object(path: Path, *objects: str, size: str = "", more: str = "") -> None:
    """An XML file of objects of the class dent."""
    drawn = "".join(f"<object><name>dent</name>{content}</object>" for content in objects)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation>{size}{more}{drawn}</annotation>")


def _bndbox(*sides: object, more: str = "") -> str:
    names = ("xmin", "ymin", "xmax", "ymax")
    inside = "".join(f"<{name}>{side}</{name}>" for name, side in zip(names, sides, strict=True))
    return f"<bndbox>{inside}{more}</bndbox>"


def _robndbox(*values: object) -> str:
    names = ("cx", "cy", "w", "h", "angle")
    inside = "".join(f"<{name}>{value}</{name}>" for name, value in zip(names, values, strict=True))
    return f"<type>robndbox</type><robndbox>{inside}</robndbox>"


def _rotation(degrees: object) -> str:
    return (
        "<attributes><attribute><name>occluded</name><value>False</value></attribute>"
        f"<attribute><name>rotation</name><value>{degrees}</value></attribute></attributes>"
    )


def _sample(tmp_path: Path, *objects: str, size: str = "", more: str = "") -> Sample:
    touch(tmp_path, "1.jpg")
    _object(tmp_path / "1.xml", *objects, size=size, more=more)
    return by_source(voc.read, tmp_path)["1.jpg"]


@pytest.mark.parametrize(
    ("size", "stated"),
    [
        ("<size><width>128</width><height>96</height><depth>3</depth></size>", (128, 96)),
        ("<size><width>128.0</width><height> 96 </height></size>", (128, 96)),
        ("<size><width>0</width><height>0</height><depth>0</depth></size>", None),
        ("<size><width>128</width><height></height></size>", None),
        ("<size/>", None),
        ("", None),
        ("<imagesize><nrows>96</nrows><ncols>128</ncols></imagesize>", (128, 96)),
    ],
)
def test_the_size_of_the_image_is_that_of_the_file_if_it_states_one(
    tmp_path: Path, size: str, stated: tuple[int, int] | None
) -> None:
    assert _sample(tmp_path, size=size).size == stated


def test_a_box_that_begins_before_the_image_is_refused_with_its_place(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg")
    _object(tmp_path / "1.xml", _bndbox(-1, 0, 9, 9), _bndbox(-3, 1, 9, 9), _bndbox(1, -2, 9, 9))
    assert problems(voc.read, tmp_path) == [
        "1.xml: object 2: the box [-3, 0, 9, 9] begins before the image",
        "1.xml: object 3: the box [0, -2, 9, 9] begins before the image",
    ]


def test_numbers_with_a_decimal_point_are_positions_from_zero(tmp_path: Path) -> None:
    boxes = _sample(tmp_path, _bndbox("24.0", "44.5", "104.25", "52.0"), _bndbox("1.0", "1", "5", "6")).boxes
    assert boxes == ((24, 44.5, 104.25, 52), (0, 0, 5, 6))


def test_every_bndbox_of_an_object_is_a_box(tmp_path: Path) -> None:
    sample = _sample(tmp_path, _bndbox(1, 1, 5, 5) + _bndbox(11, 11, 15, 15) + "<difficult>1</difficult>")
    assert (sample.boxes, sample.defect) == (((0, 0, 5, 5), (10, 10, 15, 15)), "dent")


def test_a_box_that_cvat_turned(tmp_path: Path) -> None:
    sample = _sample(tmp_path, _bndbox("24.0", "44.0", "104.0", "52.0") + _rotation("90.0"))
    assert sample.boxes[0] == pytest.approx((60, 8, 68, 88))
    assert sample.cut == (True,)
    assert [tuple(map(round, corner)) for corner in sample.polygons[0]] == [(68, 8), (68, 88), (60, 88), (60, 8)]


@pytest.mark.parametrize("rotation", ["0.0", "0", "360.0"])
def test_a_box_that_cvat_did_not_turn(tmp_path: Path, rotation: str) -> None:
    sample = _sample(tmp_path, _bndbox(11, 21, 30, 40) + _rotation(rotation))
    assert (sample.boxes, sample.polygons, sample.cut) == (((10, 20, 30, 40),), (), (False,))


_coordinate = st.floats(10, 1000).map(lambda value: round(value, 2))
_length = st.floats(1, 500).map(lambda value: round(value, 2))


def _enclosing(cx: float, cy: float, width: float, height: float, radians: float) -> list[float]:
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (width / 2, height / 2)
    turn = np.array([[np.cos(radians), -np.sin(radians)], [np.sin(radians), np.cos(radians)]])
    xs, ys = (turn @ corners.T) + np.array([[cx], [cy]])
    return [xs.min(), ys.min(), xs.max(), ys.max()]


@given(_coordinate, _coordinate, _length, _length, st.integers(1, 359))
@settings(deadline=None, max_examples=60)
def test_turned_boxes_are_enclosed(cx: float, cy: float, width: float, height: float, degrees: int) -> None:
    expected = _enclosing(cx, cy, width, height, np.radians(degrees))
    assume(expected[2] > 1 and expected[3] > 1)
    sides = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder)
        written = [f"{side:.4f}" for side in sides]
        assume(float(written[2]) > 0 and float(written[3]) > 0)
        touch(raw, "1.jpg")
        drawn = (_bndbox(*written) + _rotation(degrees), _robndbox(cx, cy, width, height, np.radians(degrees)))
        _object(raw / "1.xml", *drawn)
        sample = by_source(voc.read, raw)["1.jpg"]
    for samples in sample.boxes:
        assert samples == pytest.approx(expected, abs=1e-3)


def test_the_corners_of_dior_r(tmp_path: Path) -> None:
    corners = {"left_top": (20, 10), "right_top": (30, 20), "right_bottom": (20, 30), "left_bottom": (10, 20)}
    inside = "".join(f"<x_{at}>{x}</x_{at}><y_{at}>{y}</y_{at}>" for at, (x, y) in corners.items())
    assert _sample(tmp_path, f"<robndbox>{inside}</robndbox><angle>45</angle>").boxes == ((10, 10, 30, 30),)


def test_outlines_of_labelme_and_roboflow(tmp_path: Path) -> None:
    corners = [(10, 20), (30, 20), (30, 50)]
    labelme = "".join(f"<pt><x>{x}</x><y>{y}</y></pt>" for x, y in corners)
    roboflow = "".join(f"<x{n}>{x}</x{n}><y{n}>{y}</y{n}>" for n, (x, y) in enumerate(corners, start=1))
    sample = _sample(
        tmp_path,
        f"<deleted>0</deleted><polygon><username>x</username>{labelme}</polygon>",
        _bndbox(12, 22, 29, 49) + f"<polygon>{roboflow}</polygon>",
        f"<deleted>1</deleted><polygon>{labelme}</polygon>",
    )
    assert sample.boxes == ((10, 20, 30, 50), (11, 21, 29, 49))
    assert sample.polygons == (tuple(corners), tuple(corners))
    assert sample.notes == ("an object that LabelMe marks as deleted is left out",)


def test_objects_that_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg")
    triangle = "<polygon><x1>50</x1><y1>50</y1><x2>60</x2><y2>50</y2><x3>60</x3><y3>60</y3></polygon>"
    _object(
        tmp_path / "1.xml",
        _bndbox(1, 1, 5, 5) + triangle,
        _bndbox(1, 1, 5, 5, more="<rotation>15</rotation>"),
        _bndbox(1, 1, 5, 5) + _rotation("much"),
        _bndbox(1, 1, 5, 5) + _rotation("nan"),
        _robndbox(5, 5, 0, 5, 1),
        _robndbox(5, 5, "1e999", 5, 1),
        "<robndbox><cx>3</cx></robndbox>",
        "<polygon><x1>50</x1><y1>50</y1></polygon>",
        "<attributes>rotation=30.0</attributes>" + triangle,
        "<point><x>3</x><y>4</y></point>",
    )
    assert problems(voc.read, tmp_path) == [
        "1.xml: object 1: its bndbox is [0, 0, 5, 5], but its polygon spans [50, 50, 60, 60]; correct one of them",
        "1.xml: object 2: its bndbox has a rotation, and tools differ in what that means; export boxes without it",
        "1.xml: object 3: its attribute rotation is 'much', which is not a finite number",
        "1.xml: object 4: its attribute rotation is 'nan', which is not a finite number",
        "1.xml: object 5: the turned box of 0x5 has no area",
        "1.xml: object 6: w of robndbox is '1e999', which is not a finite number",
        "1.xml: object 7: cy of robndbox is None, which is not a finite number",
        "1.xml: object 8: a polygon needs 3 corners, and has 1",
        "1.xml: object 9: the attribute rotation turns a polygon, which LabelMe does not know; export another format",
        "1.xml: object 10: has neither a bndbox nor a robndbox nor a polygon",
    ]


def test_objects_in_another_place_are_not_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg")
    (tmp_path / "1.xml").write_text(
        f"<annotation><objects><object>{_bndbox(1, 1, 5, 5)}</object></objects></annotation>"
    )
    assert problems(voc.read, tmp_path) == [
        "1.xml: has objects, but not directly in <annotation>; export it as Pascal VOC again"
    ]


def test_a_file_that_says_segmented_without_a_mask_is_not_normal(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg")
    _object(tmp_path / "1.xml", more="<segmented>1</segmented>")
    assert problems(voc.read, tmp_path) == [
        "1.xml: 'segmented' is 1, but there is neither an object nor a mask 1.png in SegmentationClass; add the mask,"
        " export boxes, or write 0 if nothing is wrong with the part"
    ]
    _object(tmp_path / "1.xml", _bndbox(1, 1, 5, 5), more="<segmented>1</segmented>")
    assert by_source(voc.read, tmp_path)["1.jpg"].boxes == ((0, 0, 5, 5),)


def test_an_xml_file_belongs_to_one_image(tmp_path: Path) -> None:
    touch(tmp_path, "train/images/crazing/1.jpg", "train/images/scratches/1.jpg", "train/images/scratches/2.jpg")
    _xml(tmp_path / "train/annotations/1.xml", ("dent", 2, 3, 4, 5))
    _xml(tmp_path / "train/annotations/scratches/2.xml", ("dent", 2, 3, 4, 5))
    _xml(tmp_path / "train/annotations/2.xml", ("dent", 2, 3, 4, 5))
    assert problems(voc.read, tmp_path) == [
        "train/annotations/1.xml: may belong to an image in train/images/crazing or to one in train/images/scratches;"
        " put it beside the image that it is for, or into a folder of the same name",
        "train/annotations/2.xml: its image 2.* is missing",
    ]


def test_a_missing_image_can_be_skipped(tmp_path: Path) -> None:
    touch(tmp_path, "JPEGImages/1.jpg")
    for name in ("1", "2"):
        _xml(tmp_path / f"Annotations/{name}.xml", ("dent", 2, 3, 4, 5))
    with pytest.raises(BadData) as error:
        list(voc.read(tmp_path))
    assert [type(problem) for problem in error.value.problems] == [MissingImage]


def test_the_stem_of_the_file_beats_the_name_in_it(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    _object(tmp_path / "a.xml", _bndbox(1, 1, 5, 5), more="<filename>b.jpg</filename><path>C:\\b.jpg</path>")
    samples = by_source(voc.read, tmp_path)
    assert (samples["a.jpg"].label, samples["b.jpg"].label) == ("anomalous", "normal")


def test_composed_and_decomposed_names_are_the_same(tmp_path: Path) -> None:
    touch(tmp_path, unicodedata.normalize("NFD", "JPEGImages/é.jpg"))
    _xml(tmp_path / unicodedata.normalize("NFC", "Annotations/é.xml"), ("dent", 2, 3, 4, 5))
    assert [sample.defect for sample in by_source(voc.read, tmp_path).values()] == ["dent"]


def test_the_export_of_cvat_for_images_is_not_taken_for_voc(tmp_path: Path) -> None:
    touch(tmp_path, "images/1.jpg")
    (tmp_path / "annotations.xml").write_text("<annotations><image/></annotations>")
    assert not voc.matches(tmp_path)


def test_what_labelme_draws_of_the_annotations_is_not_of_the_data_set(tmp_path: Path) -> None:
    touch(tmp_path, "JPEGImages/1.jpg", "AnnotationsVisualization/1.jpg", "SegmentationClassVisualization/1.jpg")
    _xml(tmp_path / "Annotations/1.xml", ("dent", 2, 3, 4, 5))
    assert by_source(voc.read, tmp_path).keys() == {"JPEGImages/1.jpg"}


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
