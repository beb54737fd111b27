from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adfm.data.problems import MissingImage
from adfm.data.readers import cvat
from adfm.data.readers.shapes import pixels
from adfm.records import Sample
from tests.data.readers.drawn import NASTY, by_source, never_fails_otherwise, problems, touch

_META = (
    "<meta><task><id>1</id><name>parts</name><labels><label><name>scratch</name><color>#fa3253</color><type>any</type>"
    "<attributes></attributes></label></labels></task><dumped>2025-01-01 00:00:00+00:00</dumped></meta>"
)


def _image(name: str, *shapes: str, number: int = 0, **more: object) -> str:
    attributes = {"id": number, "name": name, "width": 128, "height": 96} | more
    written = " ".join(f"{key}={quoteattr(str(value))}" for key, value in attributes.items())
    return f"  <image {written}>\n{''.join(shapes)}  </image>\n"


def _shape(tag: str, label: str = "scratch", inside: str = "", **attributes: object) -> str:
    attributes = {"label": label, "source": "manual", "occluded": 0} | attributes
    written = " ".join(f"{key}={quoteattr(str(value))}" for key, value in attributes.items())
    return f"    <{tag} {written}>\n{inside}    </{tag}>\n"


def _box(*sides: object, **more: object) -> str:
    names = ("xtl", "ytl", "xbr", "ybr")
    return _shape("box", **dict(zip(names, sides, strict=True)), z_order=0, **more)


def _export(path: Path, *images: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    document = f"<annotations>\n  <version>1.1</version>\n  {_META}\n{''.join(images)}</annotations>\n"
    path.write_text(f'<?xml version="1.0" encoding="utf-8"?>\n{document}', encoding="utf-8")


def _sample(tmp_path: Path, *shapes: str, **more: object) -> Sample:
    touch(tmp_path, "images/1.jpg")
    _export(tmp_path / "annotations.xml", _image("1.jpg", *shapes, **more))
    return by_source(cvat.read, tmp_path)["images/1.jpg"]


def test_samples(tmp_path: Path) -> None:
    raw = tmp_path / "task_1"
    touch(raw, "images/a.jpg", "images/cam 1/b.jpg")
    attribute = '      <attribute name="severity">low</attribute>\n'
    _export(
        raw / "annotations.xml",
        _image("a.jpg", _box("20.00", "30.00", "60.50", "50.00"), _box(1, 2, 3, 4, label="dent", inside=attribute)),
        _image("cam 1/b.jpg", number=1),
    )
    assert cvat.matches(raw)
    samples = by_source(cvat.read, raw)
    a, b = samples["images/a.jpg"], samples["images/cam 1/b.jpg"]
    assert (a.boxes, a.defect, a.size, a.category) == (
        ((20, 30, 60.5, 50), (1, 2, 3, 4)),
        "dent+scratch",
        (128, 96),
        "task_1",
    )
    assert (b.label, b.split, b.size) == ("normal", None, (128, 96))


@pytest.mark.parametrize(
    ("image", "name", "subset", "split"),
    [
        ("images/1.jpg", "1.jpg", None, None),
        ("images/Train/1.jpg", "1.jpg", "Train", "train"),
        ("images/1.jpg", "1.jpg", "Validation", "validation"),
        ("images/default/cam/1.jpg", "cam/1.jpg", "default", None),
        ("1.jpg", "1.jpg", None, None),
        ("test/1.jpg", "test/1.jpg", None, "test"),
        ("images/cam/1.jpg", "cam\\1.jpg", None, None),
        ("images/frame_000001.PNG", "frame_000001", None, None),
    ],
)
def test_where_the_images_are(tmp_path: Path, image: str, name: str, subset: str | None, split: str | None) -> None:
    touch(tmp_path, image)
    more = {"subset": subset, "task_id": 3} if subset else {}
    _export(tmp_path / "annotations.xml", _image(name, _box(1, 2, 3, 4), **more))
    samples = by_source(cvat.read, tmp_path)
    assert (samples[image].boxes, samples[image].split) == (((1, 2, 3, 4),), split)


def test_a_frame_of_several_image_files_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "images/frame_1.png", "images/frame_1.jpg", "images/frame_1.PGM", "images/frame_2.png")
    _export(tmp_path / "annotations.xml", _image("frame_1"), _image("frame_2"))
    assert problems(cvat.read, tmp_path)[0] == (
        "annotations.xml: image 'frame_1': may be any of the images images/frame_1.jpg, images/frame_1.png,"
        " images/frame_1.PGM; keep one, or give the others other names"
    )


def test_several_tasks_beside_each_other(tmp_path: Path) -> None:
    touch(tmp_path, "one/images/1.jpg", "two/images/1.jpg")
    _export(tmp_path / "one/annotations.xml", _image("1.jpg", _box(1, 2, 3, 4)))
    _export(tmp_path / "two/annotations.xml", _image("1.jpg"))
    labels = {source: sample.label for source, sample in by_source(cvat.read, tmp_path).items()}
    assert labels == {"one/images/1.jpg": "anomalous", "two/images/1.jpg": "normal"}


def test_turned_boxes_and_ellipses(tmp_path: Path) -> None:
    sample = _sample(
        tmp_path,
        _box(24, 44, 104, 52, rotation="90.00"),
        _box(24, 44, 104, 52, rotation="0.00"),
        _shape("ellipse", cx="64.00", cy="48.00", rx="30.00", ry="4.00", rotation="90.00"),
    )
    turned, plain, ellipse = sample.boxes
    assert turned == pytest.approx((60, 8, 68, 88))
    assert plain == (24, 44, 104, 52)
    assert ellipse == pytest.approx((60, 18, 68, 78))
    assert sample.cut == (True, False, True)
    assert len(sample.polygons) == 2


def test_a_box_turns_clockwise(tmp_path: Path) -> None:
    (outline,) = _sample(tmp_path, _box(10, 10, 30, 20, rotation="30.00")).polygons
    (left, top), (right, lower), *_ = outline
    assert right > left and lower > top  # the upper side falls to the right


def test_polygons_and_polylines(tmp_path: Path) -> None:
    sample = _sample(
        tmp_path,
        _shape("polygon", points="10.00,20.00;30.00,20.50;30.00,40.00"),
        _shape("polyline", label="crack", points="5.00,5.00;25.00,5.00"),
    )
    assert sample.boxes == ((10, 20, 30, 40), (5, 4.5, 25, 5.5))
    assert sample.polygons == (((10, 20), (30, 20.5), (30, 40)),)
    assert sample.notes == ("a polyline is the box round it",)


def test_a_mask(tmp_path: Path) -> None:
    sample = _sample(tmp_path, _shape("mask", rle="1, 2, 1, 2", left=10, top=20, width=3, height=2))
    assert sample.boxes == ((11, 20, 13, 22),)
    expected = np.zeros((96, 128), bool)
    expected[20:22, 10:13] = [[False, True, True], [False, True, True]]
    assert (pixels(sample.rles[0]) == expected).all()


@given(st.data())
@settings(deadline=None, max_examples=50)
def test_masks_are_read_as_they_are_written(data: st.DataObject) -> None:
    width, height = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    bits = np.array(data.draw(st.lists(st.booleans(), min_size=width * height, max_size=width * height)))
    counts = [0]
    for bit in bits:  # as CVAT does: runs of the flat mask, background first
        if bit == len(counts) % 2:
            counts.append(0)
        counts[-1] += 1
    rle = ", ".join(map(str, counts))
    assert (cvat._pixels(rle, width, height) == bits.reshape(height, width)).all()


def test_a_group_is_one_defect(tmp_path: Path) -> None:
    sample = _sample(
        tmp_path,
        _box(10, 10, 20, 20, group_id=1),
        _box(30, 10, 40, 25, group_id=1),
        _box(50, 50, 60, 60, group_id=1, label="dent"),
        _box(70, 70, 80, 80),
    )
    assert sample.boxes == ((10, 10, 40, 25), (50, 50, 60, 60), (70, 70, 80, 80))
    assert sample.notes == ("shapes of one group and class are one defect",)


@pytest.mark.parametrize(
    ("tags", "label", "defect"),
    [
        (("scratch",), "anomalous", "scratch"),
        (("scratch", "dent"), "anomalous", "dent+scratch"),
        (("good",), "normal", None),
        (("NG",), "anomalous", "defect"),
    ],
)
def test_tags_are_labels_of_the_image(tmp_path: Path, tags: tuple[str, ...], label: str, defect: str | None) -> None:
    sample = _sample(tmp_path, *(_shape("tag", label=tag) for tag in tags))
    assert (sample.label, sample.defect, sample.boxes) == (label, defect, ())
    assert sample.located == (label == "normal")


def test_tags_beside_shapes_and_points(tmp_path: Path) -> None:
    sample = _sample(tmp_path, _shape("tag", label="reviewed"), _box(1, 2, 3, 4))
    assert (sample.defect, sample.boxes) == ("scratch", ((1, 2, 3, 4),))
    assert sample.notes == ("tags beside shapes are left out",)
    sample = _sample(tmp_path, _shape("points", label="pore", points="3.00,4.00;5.00,6.00"), _box(1, 2, 3, 4))
    assert (sample.defect, sample.boxes, sample.located) == ("pore+scratch", (), False)
    assert sample.notes == ("a point has no extent: the image is anomalous, but has no boxes",)


def test_everything_that_is_wrong_is_listed_in_one_error(tmp_path: Path) -> None:
    touch(tmp_path, "images/1.jpg", "images/2.jpg", "images/more.jpg", "elsewhere/gone.jpg")
    _export(
        tmp_path / "annotations.xml",
        _image(
            "1.jpg",
            _box(5, 5, 4, 9),
            _box("nan", 5, 7, 9),
            _box("", 5, 7, 9),
            _box(1, 2, 3, 4, label="OK"),
            _box(1, 2, 3, 4, rotation="inf"),
            _shape("polygon", points="1,2;3,4"),
            _shape("polygon", points="1,2;3;4,5"),
            _shape("mask", rle="1, 2", left=0, top=0, width=2, height=2),
            _shape("mask", rle="1, x", left=0, top=0, width=2, height=2),
            _shape("mask", rle="0, 4", left=127, top=0, width=2, height=2),
            _shape("mask", rle="0, 4", left=0, top=0, width="9" * 9, height=9),
            _shape("mask", rle="4", left=0, top=0, width=2, height=2),
            _shape("ellipse", cx=5, cy=5, rx=0, ry=3),
            _shape("skeleton"),
            _shape("cuboid"),
        ),
        _image("2.jpg", _shape("tag", label="good"), _shape("tag", label="scratch")),
        _image("1.jpg"),
        _image("gone.jpg"),
        _image("../../secret.jpg"),
    )
    area = "is not an area; draw a rectangle, polygon, ellipse or mask in its place"
    gone = "the image is missing in images/ beside the file; export with the images"
    problem_lines = problems(cvat.read, tmp_path)
    assert problem_lines == [
        "annotations.xml: image '1.jpg': shape 1: box: the box [5, 5, 4, 9] is inverted or has no area",
        "annotations.xml: image '1.jpg': shape 2: box: xtl is 'nan', which is not a finite number",
        "annotations.xml: image '1.jpg': shape 3: box: xtl is '', which is not a finite number",
        "annotations.xml: image '1.jpg': shape 4: box: its class is 'OK', but every shape is taken for a defect; delete"
        " the shapes of this class, an image without any is normal",
        "annotations.xml: image '1.jpg': shape 5: box: rotation is 'inf', which is not a finite number",
        "annotations.xml: image '1.jpg': shape 6: polygon: a polygon needs 3 corners, and has 2",
        "annotations.xml: image '1.jpg': shape 7: polygon: '3' is not a point",
        "annotations.xml: image '1.jpg': shape 8: mask: its rle does not have 4 pixels, as its width and height do",
        "annotations.xml: image '1.jpg': shape 9: mask: its rle has something else than whole numbers",
        "annotations.xml: image '1.jpg': shape 10: mask: its mask of 2x2 at 127, 0 reaches out of the image of 128x96",
        "annotations.xml: image '1.jpg': shape 11: mask: a mask of 999999999x9 pixels is too large, or empty",
        "annotations.xml: image '1.jpg': shape 12: mask: its mask shows nothing",
        "annotations.xml: image '1.jpg': shape 13: ellipse: the ellipse with the radii 0 and 3 has no area",
        f"annotations.xml: image '1.jpg': shape 14: skeleton: {area}",
        f"annotations.xml: image '1.jpg': shape 15: cuboid: {area}",
        "annotations.xml: image '2.jpg': the image is labelled both normal and not: good, scratch",
        "annotations.xml: image '1.jpg': images/1.jpg is listed before, in annotations.xml as number 1; keep one",
        f"annotations.xml: image 'gone.jpg': {gone}",
        f"annotations.xml: image '../../secret.jpg': {gone}",
        "elsewhere: images that are not in the annotations: gone.jpg",
        "images: images that are not in the annotations: more.jpg",
    ]
    assert [type(problem) for problem in problem_lines].count(MissingImage) == 2


def test_a_tag_that_contradicts_the_shapes(tmp_path: Path) -> None:
    touch(tmp_path, "images/1.jpg")
    _export(tmp_path / "annotations.xml", _image("1.jpg", _shape("tag", label="ok"), _box(1, 2, 3, 4)))
    assert problems(cvat.read, tmp_path) == [
        "annotations.xml: image '1.jpg': a tag says that it is normal, but shapes are drawn on it; remove one of them"
    ]


def test_the_format_for_videos_is_refused_by_name(tmp_path: Path) -> None:
    touch(tmp_path, "images/frame_000000.PNG")
    _export(tmp_path / "annotations.xml", '<track id="0" label="scratch"><box frame="0"/></track>')
    assert cvat.matches(tmp_path)
    assert problems(cvat.read, tmp_path)[0] == (
        "annotations.xml: has tracks: it is 'CVAT for video'; export the task as 'CVAT for images 1.1'"
    )


@given(
    st.binary().map(lambda content: b"<annotations><image>" + content)
    | st.sampled_from(NASTY)
    | st.text().map(lambda text: f"<annotations><image name={quoteattr(text)}/></annotations>".encode(errors="replace"))
)
@settings(deadline=None, max_examples=60)
def test_whatever_is_in_the_file_the_error_is_one_for_people(content: bytes) -> None:
    never_fails_otherwise(cvat.read, {"annotations.xml": content})


def test_entities_that_grow_without_end_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg")
    laughs = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    document = f'<!DOCTYPE annotations [<!ENTITY l0 "laugh">{laughs}]><annotations>&l9;</annotations>'
    (tmp_path / "annotations.xml").write_text(document)
    assert "limit on input amplification factor" in problems(cvat.read, tmp_path)[0]
