import base64
import io
import json
import math
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from adfm.data.problems import MissingImage
from adfm.data.readers import detect, labelme
from adfm.records import Sample
from tests.data.readers.drawn import NASTY, by_source, dump, never_fails_otherwise, problems, same_box, touch


def _shape(label: str, *points: tuple[float, float], kind: str | None = "rectangle", **more: Any) -> dict[str, Any]:
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}, **more}


def _file(image: str, *shapes: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": image,
        "imageData": None,
        "imageHeight": 60,
        "imageWidth": 80,
        **more,
    }


def _png(pixels: Any) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_samples(tmp_path: Path) -> None:
    raw = tmp_path / "line"
    touch(raw, "a.jpg", "b.jpg", "no file.jpg", "x/c.png")
    dump(
        raw / "a.json",
        _file(
            "a.jpg",
            _shape("scratch", (30.5, 40), (10, 50.25)),
            _shape("dent", (1, 2), (5, 2), (3, 9.5), kind="polygon"),
            _shape("dent", (1, 2), (5, 2), (5, 9), kind=None),
        ),
    )
    dump(raw / "b.json", _file("b.jpg"))
    dump(raw / "x" / "c.json", _file("c.png", _shape("dent", (40, 30), (43, 34), kind="circle")))
    dump(raw / "manifest.json", {"files": []})
    assert labelme.matches(raw)
    samples = by_source(labelme.read, raw)
    a, c = samples["a.jpg"], samples["x/c.png"]
    assert (a.label, a.defect, a.dataset, a.category) == ("anomalous", "dent+scratch", "line", "line")
    assert a.boxes == ((10, 40, 30.5, 50.25), (1, 2, 5, 9.5), (1, 2, 5, 9))
    assert a.polygons == (((1, 2), (5, 2), (3, 9.5)), ((1, 2), (5, 2), (5, 9)))
    assert [samples[name].label for name in ("b.jpg", "no file.jpg")] == ["normal", "normal"]
    assert c.boxes == ((35, 25, 45, 35),)
    (circle,) = c.polygons
    assert all(math.dist((40, 30), corner) == pytest.approx(5) for corner in circle)
    area = abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in zip(circle, circle[1:] + circle[:1], strict=True))) / 2
    assert area == pytest.approx(math.pi * 25, rel=0.01)


@pytest.mark.parametrize(
    ("file", "name", "image", "split"),
    [
        ("a.json", "a.jpg", "a.jpg", None),
        ("json/a.json", "..\\images\\a.jpg", "images/a.jpg", None),
        ("ann/a.json", "a.jpg", "img/a.jpg", None),
        ("ann/a.json", "a.jpg", "a.jpg", None),
        ("a.json", "a.jpg", "images/a.jpg", None),
        ("a.json", r"C:\Users\me\a.jpg", "a.jpg", None),
        ("train/a.json", "a.jpg", "train/a.jpg", "train"),
        ("labels/val/a.json", "../../images/val/a.jpg", "images/val/a.jpg", "validation"),
        ("line/labels/a.json", "a.jpg", "line/images/a.jpg", None),
    ],
)
def test_where_an_image_may_be(tmp_path: Path, file: str, name: str, image: str, split: str | None) -> None:
    touch(tmp_path, image)
    dump(tmp_path / file, _file(name, _shape("dent", (1, 1), (2, 2))))
    samples = by_source(labelme.read, tmp_path)
    assert (samples[image].defect, samples[image].split) == ("dent", split)


@pytest.mark.parametrize(
    "spot", [(slice(2, 7), slice(3, 5)), (slice(0, 1), slice(0, 12)), (slice(0, 10), slice(0, 12))]
)
def test_a_mask_lies_where_its_corners_say(tmp_path: Path, spot: tuple[slice, slice]) -> None:
    touch(tmp_path, "a.jpg")
    part = np.zeros((10, 12), bool)
    part[spot] = True
    drawn = _shape("dent", (20, 30), (31, 39), kind="mask", mask=_png(part))
    dump(tmp_path / "a.json", _file("a.jpg", drawn))
    (sample,) = labelme.read(tmp_path)
    expected = np.zeros((60, 80), bool)
    expected[30:40, 20:32] = part
    (rle,) = sample.rles
    runs = [np.full(count, place % 2, bool) for place, count in enumerate(rle.counts)]
    np.testing.assert_array_equal(np.concatenate(runs).reshape((rle.height, rle.width), order="F"), expected)
    rows, columns = np.nonzero(expected)
    assert sample.boxes == ((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1),)


def _only_sample(raw: Path, *shapes: dict[str, Any], **more: Any) -> Sample:
    touch(raw, "a.jpg")
    dump(raw / "a.json", _file("a.jpg", *shapes, **more))
    (sample,) = labelme.read(raw)
    return sample


def test_an_oriented_rectangle_has_the_box_round_its_corners(tmp_path: Path) -> None:
    corners = ((20.0, 30.0), (60.0, 50.0), (56.0, 58.0), (16.0, 38.0))
    for kind in ("oriented_rectangle", "rotation"):
        sample = _only_sample(tmp_path, _shape("scratch", *corners, kind=kind))
        assert (sample.boxes, sample.polygons) == (((16, 30, 60, 58),), (corners,))


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        (_shape("pit", (6, 8), (18, 8), kind="circle"), (-6, -4, 18, 20)),
        (_shape("pit", (-4.2, 20), (30, 18), (28, 40), kind="polygon"), (-4.2, 18, 30, 40)),
        (_shape("pit", (70, 50), (90, 70)), (70, 50, 90, 70)),
        (_shape("pit", (78, 8), (81, 11), kind="mask", mask=_png(np.full((4, 4), True))), (78, 8, 80, 12)),
        (_shape("pit", (-2, -3), (1, 0), kind="mask", mask=_png(np.full((4, 4), True))), (0, 0, 2, 1)),
        (_shape("pit", (1.4, 2.6), (4.9, 5.1), kind="mask", mask=_png(np.full((4, 4), True))), (1, 3, 5, 7)),
    ],
)
def test_what_reaches_out_of_the_image_is_cut_off(
    tmp_path: Path, shape: dict[str, Any], box: tuple[float, ...]
) -> None:
    sample = _only_sample(tmp_path, shape)
    assert (sample.boxes, sample.cut, sample.size) == ((box,), (True,), (80, 60))


@pytest.mark.parametrize(
    ("points", "box"),
    [
        (((10, 20), (40, 20)), (10, 19.5, 40, 20.5)),
        (((10, 20), (10, 40)), (9.5, 20, 10.5, 40)),
        (((0, 0), (0, 9)), (0, 0, 1, 9)),
        (((80, 60), (80, 20)), (79, 20, 80, 60)),
        (((10, 20), (40, 25)), (10, 20, 40, 25)),
        (((-5, 20), (90, 20)), (-5, 19.5, 90, 20.5)),
    ],
)
@pytest.mark.parametrize("kind", ["line", "linestrip", "polygon"])
def test_a_line_is_at_least_a_pixel_wide_and_high(
    tmp_path: Path, kind: str, points: tuple[tuple[float, float], ...], box: tuple[float, ...]
) -> None:
    sample = _only_sample(tmp_path, _shape("scratch", *points, kind=kind))
    assert (sample.boxes, sample.polygons, sample.label) == ((box,), (), "anomalous")


def test_a_polygon_without_area_is_a_line(tmp_path: Path) -> None:
    sample = _only_sample(tmp_path, _shape("scratch", (10, 20), (40, 20), (20, 20), kind="polygon"))
    assert (sample.boxes, sample.polygons) == (((10, 19.5, 40, 20.5),), ())


def test_pieces_of_one_label_and_group_are_one_defect(tmp_path: Path) -> None:
    one, two = ((10.0, 10.0), (40.0, 12.0), (40.0, 18.0)), ((80.0, 30.0), (110.0, 32.0), (110.0, 38.0))
    sample = _only_sample(
        tmp_path,
        _shape("scratch", *one, kind="polygon") | {"group_id": 1},
        _shape("dent", (1, 1), (2, 2)) | {"group_id": 1},
        _shape("scratch", *two, kind="polygon") | {"group_id": 1},
        _shape("scratch", (5, 5), (7, 7)),
        _shape("scratch", (5, 5), (8, 8)) | {"group_id": 2},
    )
    assert sample.boxes == ((10, 10, 110, 38), (1, 1, 2, 2), (5, 5, 7, 7), (5, 5, 8, 8))
    assert sample.polygons == (one, two)


def test_a_group_has_an_outline_if_all_of_its_pieces_have_an_area(tmp_path: Path) -> None:
    part = np.full((2, 2), True)
    area = [
        _shape("dent", (0, 0), (4, 0), (4, 4), kind="polygon"),
        _shape("dent", (5, 5), (7, 8)),
        _shape("dent", (1, 1), (2, 2), kind="mask", mask=_png(part)),
        _shape("dent", (9, 9), (10, 10), kind="mask", mask=_png(part)),
    ]
    sample = _only_sample(tmp_path, *(shape | {"group_id": 0} for shape in area))
    assert sample.boxes == ((0, 0, 11, 11),)
    assert sample.polygons == (((0, 0), (4, 0), (4, 4)), ((5, 5), (7, 5), (7, 8), (5, 8)))
    (rle,) = sample.rles
    runs = [np.full(count, place % 2, bool) for place, count in enumerate(rle.counts)]
    rows, columns = np.nonzero(np.concatenate(runs).reshape((rle.height, rle.width), order="F"))
    assert {(x, y) for x, y in zip(columns.tolist(), rows.tolist(), strict=True)} == {
        (x, y) for first in (1, 9) for x in (first, first + 1) for y in (first, first + 1)
    }
    lines = [*area[:2], _shape("dent", (20, 20), (30, 20), kind="line"), _shape("dent", (40, 9), kind="point")]
    sample = _only_sample(tmp_path, *(shape | {"group_id": 0} for shape in lines))
    assert (sample.boxes, sample.polygons) == (((0, 0, 40.5, 20.5),), ())


def test_a_point_has_no_extent_so_that_its_image_has_a_label_alone(tmp_path: Path) -> None:
    sample = _only_sample(tmp_path, _shape("pore", (9, 9), kind="point"), _shape("dent", (1, 1), (3, 3)))
    assert (sample.label, sample.defect, sample.located) == ("anomalous", "dent+pore", False)
    assert sample.boxes == sample.cut == sample.polygons == sample.rles == ()
    assert sample.notes == ("a point has no extent: the image is anomalous, but has no boxes",)
    grouped = [_shape("pore", (x, 9), kind="point") | {"group_id": 3} for x in (9, 30)]
    assert not _only_sample(tmp_path, *grouped).located


def test_shapes_to_be_ignored_are_left_out(tmp_path: Path) -> None:
    ignored = [_shape(name, (1, 1), (2, 2)) for name in ("__ignore__", "_background_")]
    sample = _only_sample(tmp_path, *ignored)
    assert (sample.label, sample.boxes) == ("normal", ())
    assert sample.notes == tuple(f"a shape labelled {name} is left out" for name in ("__ignore__", "_background_"))


def test_the_size_is_that_of_the_file_if_it_states_one(tmp_path: Path) -> None:
    assert _only_sample(tmp_path, imageWidth=80.0).size == (80, 60)
    assert _only_sample(tmp_path, imageWidth=None).size is None
    assert _only_sample(tmp_path, imageWidth=-1, imageHeight=-1).size is None


def _images_of(raw: Path, *touched: str, **files: dict[str, Any]) -> dict[str, tuple[str | None, tuple[str, ...]]]:
    """The defect and notes of every image; a JSON file a keyword, `__` for `/`."""
    touch(raw, *touched)
    for name, content in files.items():
        dump(raw / f"{name.replace('__', '/')}.json", content)
    return {sample.source: (sample.defect, sample.notes) for sample in labelme.read(raw)}


_STALE = ("imagePath names an image that is not the one with the file's own name; the latter counts",)


def test_the_name_of_the_file_counts_more_than_a_stale_path(tmp_path: Path) -> None:
    one, two = (_file("2.jpg", _shape(name, (1, 1), (2, 2))) for name in ("dent", "pit"))
    assert _images_of(tmp_path / "shifted", "1.jpg", "2.jpg", **{"1": one, "2": two}) == {
        "1.jpg": ("dent", _STALE),
        "2.jpg": ("pit", ()),
    }
    assert _images_of(tmp_path / "alone", "1.jpg", "2.jpg", **{"1": one}) == {
        "1.jpg": ("dent", _STALE),
        "2.jpg": (None, ()),
    }
    assert _images_of(tmp_path / "apart", "images/1.jpg", "images/2.jpg", json__1=one, json__2=two) == {
        "images/1.jpg": ("dent", _STALE),
        "images/2.jpg": ("pit", ()),
    }
    assert _images_of(tmp_path / "gone", "images/1.jpg", json__1=one) == {"images/1.jpg": ("dent", _STALE)}


def test_a_path_and_a_name_that_lead_to_two_images_in_another_folder_are_not_decided_by_guessing(
    tmp_path: Path,
) -> None:
    touch(tmp_path, "images/1.jpg", "images/2.jpg")
    dump(tmp_path / "json/1.json", _file("2.jpg"))
    assert problems(labelme.read, tmp_path) == [
        "json/1.json: imagePath leads to images/2.jpg, and its own name to images/1.jpg; correct imagePath, or rename"
    ]


def test_names_in_another_normalisation_or_case_of_the_extension(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Prüfling_é") for form in ("NFC", "NFD"))
    dent = _shape("dent", (1, 1), (2, 2))
    sources = _images_of(
        tmp_path,
        f"{decomposed}1.png",
        f"{decomposed}2.png",
        "IMG_1.jpg",
        "é/x.png",
        **{
            f"{decomposed}1": _file(f"{composed}1.png", dent),
            f"{composed}2": _file(f"{composed}2.png", dent),
            "IMG_1": _file("IMG_1.JPG", dent),
            "y": _file("é/x.PNG", dent),
        },
    )
    assert sources == dict.fromkeys((f"{decomposed}1.png", f"{decomposed}2.png", "IMG_1.jpg", "é/x.png"), ("dent", ()))


def test_images_whose_names_differ_in_normalisation_only(tmp_path: Path) -> None:
    touch(tmp_path, "\u00e9.png", "e\u0301.png", "a.png")
    dump(tmp_path / "a.json", _file("a.png"))
    assert problems(labelme.read, tmp_path) == [
        "\u00e9.png: '\\xe9.png' and 'e\\u0301.png' are one name to people; rename or remove one"
    ]


@pytest.mark.parametrize(("right", "wrong"), [("gb18030", "cp437"), ("utf-8", "cp437"), ("cp932", "cp437")])
def test_names_that_were_garbled_when_the_archive_was_unpacked(tmp_path: Path, right: str, wrong: str) -> None:
    garbled = "検査1".encode(right).decode(wrong)
    touch(tmp_path, f"{garbled}.png")
    dump(tmp_path / f"{garbled}.json", _file("検査1.png"))
    (problem,) = problems(labelme.read, tmp_path)
    assert problem.endswith("the file's own name is its imagePath '検査1.png', garbled; unpack the archive again")


def test_an_image_in_the_file_is_read_if_there_is_no_other(tmp_path: Path) -> None:
    raw = tmp_path / "line"
    data = _png(np.zeros((60, 80), np.uint8))
    dump(raw / "x/a.json", _file(r"C:\me\a.jpg", _shape("dent", (1, 1), (2, 2)), imageData=data))
    dump(raw / "x/b.json", _file("../old name.dcm", imageData=data))
    assert labelme.matches(raw) and detect(raw)[0] == "labelme"
    a, b = labelme.read(raw)
    assert (a.source, a.image, a.defect, a.boxes) == ("x/a.jpg", raw / "x/a.json", "dent", ((1, 1, 2, 2),))
    assert (b.source, b.image, b.label) == ("x/b.png", raw / "x/b.json", "normal")
    touch(raw, "x/a.jpg")
    assert [sample.image.name for sample in labelme.read(raw)] == ["a.jpg", "b.json"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_encodings_with_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    touch(tmp_path, "a.jpg")
    content = json.dumps(_file("a.jpg", _shape("Lötstelle", (1, 1), (2, 2))), ensure_ascii=False)
    (tmp_path / "a.json").write_bytes(content.encode(encoding))
    assert labelme.matches(tmp_path)
    assert [sample.defect for sample in labelme.read(tmp_path)] == ["Lötstelle"]


def test_everything_that_is_wrong_is_listed_in_one_error(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}.jpg" for name in "abcghi"), "i.png", "p/x.jpg", "q/x.jpg")
    full, corners = np.full((4, 5), True), ((1.0, 1.0), (5.0, 4.0))
    two = [(1.0, 1.0), (2.0, 2.0)]
    dump(
        tmp_path / "a.json",
        _file(
            "a.jpg",
            _shape("dent", (5, 5), (5, 9)),
            _shape("dent", (5, math.nan), (5, 9)),
            _shape("dent", (-5, -5), (-1, 9)),
            _shape("dent", (5, 5)),
            _shape("dent", *two, kind="oriented_rectangle"),
            _shape("dent", *two, kind="cuboid"),
            _shape("dent", kind="point"),
            _shape("dent", two[0], two[0], kind="circle"),
            _shape(" good ", *two),
            _shape("", *two),
            _shape("dent", *corners, kind="mask"),
            _shape("dent", *corners, kind="mask", mask="!"),
            _shape("dent", *corners, kind="mask", mask=_png(full[1:])),
            _shape("dent", *corners, kind="mask", mask=_png(~full)),
            _shape("dent", (80, 1), (84, 4), kind="mask", mask=_png(full)),
            {"points": two},
            {"label": "dent", "points": [[1], 2]},
            3,
            _shape("dent", *two) | {"group_id": "1"},
            _shape("dent", *two, kind=[]),  # type: ignore[arg-type]
        ),
    )
    dump(tmp_path / "again.json", _file("g.jpg"))
    dump(tmp_path / "g2.json", _file("g.jpg"))
    (tmp_path / "b.json").write_text('{"shapes": [],\n}')
    dump(tmp_path / "c.json", {"imagePath": "c.jpg"})
    dump(tmp_path / "copy of a.json", _file("a.jpg"))
    dump(tmp_path / "e.json", _file("e.jpg", imageData="iVBO"))
    (tmp_path / "empty.json").touch()
    dump(tmp_path / "f.json", _file("f.jpg"))
    dump(tmp_path / "h.json", _file("h.jpg", _shape("dent", *corners, kind="mask", mask=_png(full)), imageWidth=None))
    dump(tmp_path / "i.json", _file("i.jpg"))
    dump(tmp_path / "k.json", _file("k.jpg", imageWidth="80"))
    dump(tmp_path / "l.json", _file("l.jpg", imageWidth=10**30))
    dump(tmp_path / "list.json", [])
    dump(tmp_path / "x.json", _file("x.jpg"))
    listed = problems(labelme.read, tmp_path)
    (comma,) = (line for line in listed if line.startswith("b.json: line "))
    unknown = "is unknown; draw a rectangle, oriented_rectangle, polygon, circle, line, linestrip, point, mask instead"
    nowhere = "it is neither where its path leads nor beside this file nor in its image folders"
    assert [line for line in listed if line != comma] == [
        "a.json: shape 1: the box [5, 5, 5, 9] is inverted or has no area",
        "a.json: shape 2: 'nan' is not a finite number",
        "a.json: shape 3: the box [-5, -5, -1, 9] lies outside the image",
        "a.json: shape 4: a shape of the type rectangle does not have 1 point",
        "a.json: shape 5: a shape of the type oriented_rectangle does not have 2 points",
        f"a.json: shape 6: the type of the shape, 'cuboid', {unknown}",
        "a.json: shape 7: a shape of the type point does not have 0 points",
        "a.json: shape 8: the ellipse with the radii 0 and 0 has no area",
        "a.json: shape 9: its class is 'good', but every shape is taken for a defect; delete the shapes of this class,"
        " an image without any is normal",
        "a.json: shape 10: the class '' is not a name",
        "a.json: shape 11: has no 'mask'",
        "a.json: shape 12: its mask cannot be read (it is not base64 text)",
        "a.json: shape 13: its mask is 5x3, and its corners span 5x4",
        "a.json: shape 14: its mask shows nothing",
        "a.json: shape 15: its mask lies outside the image",
        "a.json: shape 16: has no 'label'",
        "a.json: shape 17: '[1]' is not a point [x, y]",
        "a.json: shape 18: is not a JSON object, so that it has no 'label'",
        "a.json: shape 19: 'group_id' is neither a whole number nor null: '1'",
        f"a.json: shape 20: the type of the shape, '[]', {unknown}",
        "c.json: has no 'shapes'",
        "copy of a.json: imagePath leads to a.jpg, which a.json is named after; correct imagePath",
        "e.json: imageData is not an image in base64 (it is in no format of images); put the image beside this file",
        "empty.json: is empty",
        f"f.json: image 'f.jpg' is missing: {nowhere}",
        "g2.json: its image g.jpg belongs to again.json as well; keep one of the two files",
        "h.json: shape 1: a mask needs the imageWidth and imageHeight of the file",
        "i.json: may be the file of any of i.jpg, i.png; remove all but one, or give them other names",
        "k.json: '80' x 60 is not a size in pixels",
        "l.json: 1000000000000000000000000000000 x 60 is not a size in pixels",
        f"x.json: image 'x.jpg' is missing: {nowhere}",
    ]
    assert [line for line in listed if isinstance(line, MissingImage)] == [
        f"{name}.json: image '{name}.jpg' is missing: {nowhere}" for name in "fx"
    ]


def test_a_data_set_without_any_file_is_not_taken_for_normal(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg")
    assert not labelme.matches(tmp_path)
    assert problems(labelme.read, tmp_path) == ["no LabelMe file: no JSON file with shapes"]


_side = st.floats(0, 4000, width=32)


@given(
    st.lists(
        st.lists(st.tuples(_side, _side), min_size=2, max_size=6, unique_by=(lambda p: p[0], lambda p: p[1])),
        max_size=4,
        unique_by=same_box,
    )
)
@settings(deadline=None, max_examples=40)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[list[tuple[float, float]]]
) -> None:
    raw = tmp_path_factory.mktemp("labelme")
    touch(raw, "1.jpg")
    shapes = [_shape("dent", *points, kind="rectangle" if len(points) == 2 else "polygon") for points in drawn]
    dump(raw / "1.json", _file("1.jpg", *shapes))
    sample = by_source(labelme.read, raw)["1.jpg"]
    extents = [np.array(points) for points in drawn]
    assert sample.boxes == tuple((*points.min(axis=0), *points.max(axis=0)) for points in extents)
    assert sample.polygons == tuple(tuple(points) for points in drawn if len(points) > 2)


_triangle = st.lists(st.tuples(_side, _side), min_size=3, max_size=3, unique_by=(lambda p: p[0], lambda p: p[1]))


@given(st.lists(st.tuples(st.sampled_from(("dent", "pit")), st.sampled_from((None, 0, 1)), _triangle), max_size=8))
@settings(deadline=None, max_examples=40)
def test_a_group_is_one_box_round_all_of_its_pieces(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[str, int | None, list[tuple[float, float]]]]
) -> None:
    shapes = [_shape(name, *points, kind="polygon") | {"group_id": group} for name, group, points in drawn]
    sample = _only_sample(tmp_path_factory.mktemp("groups"), *shapes)
    defects: dict[object, list[tuple[float, float]]] = {}
    for place, (name, group, points) in enumerate(drawn):
        defects.setdefault(place if group is None else (name, group), []).extend(points)
    boxes = {place: (*np.min(points, axis=0), *np.max(points, axis=0)) for place, points in defects.items()}
    names = {place: drawn[place][0] if isinstance(place, int) else place[0] for place in defects}
    # One box of a name counts once, whatever outline it was drawn as; here equal boxes have equal outlines.
    once = {(names[place], box): tuple(defects[place]) for place, box in boxes.items()}
    assume(all(tuple(defects[place]) == once[names[place], box] for place, box in boxes.items()))
    assert set(sample.boxes) == set(boxes.values())
    assert set(sample.polygons) == {tuple(points) for _, _, points in drawn}


@given(st.tuples(_side, _side), st.floats(0.5, 500), st.floats(0, 2 * math.pi))
@settings(deadline=None, max_examples=40)
def test_the_box_of_a_circle_has_its_diameter(
    tmp_path_factory: pytest.TempPathFactory, centre: tuple[float, float], radius: float, angle: float
) -> None:
    edge = (centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle))
    sample = _only_sample(tmp_path_factory.mktemp("circle"), _shape("pit", centre, edge, kind="circle"))
    ((x1, y1, x2, y2),) = sample.boxes
    assert ((x1 + x2) / 2, (y1 + y2) / 2) == pytest.approx(centre, abs=1e-6)
    assert (x2 - x1, y2 - y1) == pytest.approx((2 * radius, 2 * radius))
    assert all(x1 - 1e-6 <= x <= x2 + 1e-6 and y1 - 1e-6 <= y <= y2 + 1e-6 for x, y in sample.polygons[0])


@given(st.lists(st.tuples(st.floats(-9, 99), st.floats(-9, 69)), min_size=1, max_size=4))
@settings(deadline=None, max_examples=60)
def test_the_box_of_a_line_holds_its_points_and_a_pixel_of_the_image(
    tmp_path_factory: pytest.TempPathFactory, points: list[tuple[float, float]]
) -> None:
    assume(max(x for x, _ in points) >= 1 and max(y for _, y in points) >= 1)
    sample = _only_sample(tmp_path_factory.mktemp("line"), _shape("scratch", *points, kind="linestrip"))
    for x1, y1, x2, y2 in sample.boxes:
        assert x2 - x1 >= 1 - 1e-9 and y2 - y1 >= 1 - 1e-9
        assert all(x1 - 1e-9 <= x <= x2 + 1e-9 and y1 - 1e-9 <= y <= y2 + 1e-9 for x, y in points)
    assert bool(sample.boxes) == (len(points) > 1)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=10,
)
_KIND = st.sampled_from(("rectangle", "polygon", "circle", "mask", "line", None)) | _JSON


@given(
    st.binary()
    | st.sampled_from(NASTY)
    | st.lists(
        st.fixed_dictionaries(
            {"label": st.text(max_size=3) | _JSON, "points": _JSON, "shape_type": _KIND}, optional={"mask": st.text()}
        )
    ).map(lambda shapes: json.dumps(_file("a.jpg", *shapes)).encode())
)
@settings(deadline=None, max_examples=80)
def test_whatever_is_in_the_file_the_error_is_one_for_people(content: bytes) -> None:
    never_fails_otherwise(labelme.read, {"a.json": content})


def test_json_files_of_something_else_are_left_alone(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    dump(tmp_path / "a.json", _file("a.jpg", _shape("dent", (1, 2), (5, 9))))
    dump(tmp_path / "classes.json", ["dent", "scratch"])
    dump(tmp_path / "settings.json", {"labels": ["dent"]})
    assert by_source(labelme.read, tmp_path).keys() == {"a.jpg", "b.jpg"}
    dump(tmp_path / "b.json", [])  # an image has its name: it is the annotation, and damaged
    assert problems(labelme.read, tmp_path) == ["b.json: is not a JSON object, so that it has no 'shapes'"]


def test_a_json_file_elsewhere_may_have_the_name_of_its_image(tmp_path: Path) -> None:
    touch(tmp_path, "cam1/a.jpg", "cam2/a.jpg")
    dump(tmp_path / "a.json", _file("cam1/a.jpg", _shape("dent", (1, 2), (5, 9))))
    samples = by_source(labelme.read, tmp_path)
    assert {source: sample.label for source, sample in samples.items()} == {
        "cam1/a.jpg": "anomalous",
        "cam2/a.jpg": "normal",
    }


def test_flags_are_the_labels_of_images_on_which_nothing_is_drawn(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    drawn = _shape("dent", (1, 2), (5, 9))
    dump(tmp_path / "a.json", _file("a.jpg", flags={"OK": False, "scratch": True}))
    dump(tmp_path / "b.json", _file("b.jpg", flags={"OK": True, "scratch": False}))
    dump(tmp_path / "c.json", _file("c.jpg", drawn, flags={"OK": False, "scratch": True}))
    dump(tmp_path / "d.json", _file("d.jpg", flags={"checked": True}))
    samples = by_source(labelme.read, tmp_path)
    assert [samples[f"{name}.jpg"].label for name in "abcd"] == ["anomalous", "normal", "anomalous", "normal"]
    assert (samples["a.jpg"].defect, samples["a.jpg"].located, samples["a.jpg"].boxes) == ("scratch", False, ())
    assert samples["a.jpg"].notes == ("nothing is drawn on the image: its flag is taken for its label",)
    assert (samples["c.jpg"].defect, samples["c.jpg"].located, samples["d.jpg"].notes) == ("dent", True, ())


def test_flags_that_contradict_the_shapes_or_may_mean_anything_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    dump(tmp_path / "a.json", _file("a.jpg", _shape("dent", (1, 2), (5, 9)), flags={"ok": True}))
    dump(tmp_path / "b.json", _file("b.jpg", flags={"scratch": True}))
    assert problems(labelme.read, tmp_path) == [
        "a.json: its flag 'ok' says that it is normal, but shapes are drawn on it; remove one",
        "b.json: nothing is drawn on the image, but its flag 'scratch' is set; if that is a defect, draw it or give all"
        " files a flag 'ok' (true or false) beside it; if it says something else, remove it",
    ]
