import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from adfm.data.readers import labelme
from tests.data.readers.drawn import NASTY, by_source, dump, never_fails_otherwise, problems, touch


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
    found = by_source(labelme.read, raw)
    a, c = found["a.jpg"], found["x/c.png"]
    assert (a.label, a.defect, a.dataset, a.category) == ("anomalous", "dent+scratch", "line", "line")
    assert a.boxes == ((10, 40, 30.5, 50.25), (1, 2, 5, 9.5), (1, 2, 5, 9))
    assert a.polygons == (((1, 2), (5, 2), (3, 9.5)), ((1, 2), (5, 2), (5, 9)))
    assert [found[name].label for name in ("b.jpg", "no file.jpg")] == ["normal", "normal"]
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
    found = by_source(labelme.read, tmp_path)
    assert (found[image].defect, found[image].split) == ("dent", split)


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


def test_everything_that_is_wrong_is_listed_in_one_error(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}.jpg" for name in "abc"), "p/x.jpg", "q/x.jpg")
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
            _shape("dent", *two, kind="polygon"),
            _shape("dent", *two, kind="line"),
            _shape("dent", two[0], kind="point"),
            _shape("dent", two[0], two[0], kind="circle"),
            _shape(" good ", *two),
            _shape("", *two),
            _shape("dent", *corners, kind="mask"),
            _shape("dent", *corners, kind="mask", mask="!"),
            _shape("dent", *corners, kind="mask", mask=_png(full[1:])),
            _shape("dent", *corners, kind="mask", mask=_png(~full)),
            _shape("dent", (79, 1), (83, 4), kind="mask", mask=_png(full)),
            {"points": two},
            {"label": "dent", "points": [[1], 2]},
            3,
        ),
    )
    dump(tmp_path / "again.json", _file("a.jpg"))
    (tmp_path / "b.json").write_text('{"shapes": [],\n}')
    dump(tmp_path / "c.json", {"imagePath": "c.jpg"})
    dump(tmp_path / "e.json", _file("e.jpg", imageData="iVBO"))
    (tmp_path / "empty.json").touch()
    dump(tmp_path / "f.json", _file("f.jpg"))
    dump(tmp_path / "list.json", [])
    dump(tmp_path / "x.json", _file("x.jpg"))
    found = problems(labelme.read, tmp_path)
    (comma,) = (line for line in found if line.startswith("b.json: line "))
    no_area = "has no area; draw a rectangle, polygon, circle or mask in its place"
    assert [line for line in found if line != comma] == [
        "a.json: shape 1: the box [5, 5, 5, 9] is inverted or has no area",
        "a.json: shape 2: 'nan' is no finite number",
        "a.json: shape 3: the box [-5, -5, -1, 9] lies outside the image",
        "a.json: shape 4: a rectangle has 2 points, not 1",
        "a.json: shape 5: a polygon needs 3 corners, and has 2",
        f"a.json: shape 6: a shape of the type 'line' {no_area}",
        f"a.json: shape 7: a shape of the type 'point' {no_area}",
        "a.json: shape 8: the box [1, 1, 1, 1] is inverted or has no area",
        "a.json: shape 9: its class is 'good', but every shape is taken for a defect; delete the shapes of this class,"
        " an image without any is normal",
        "a.json: shape 10: the class '' is no name",
        "a.json: shape 11: has no 'mask'",
        "a.json: shape 12: its mask cannot be read (it is no base64 text)",
        "a.json: shape 13: its mask is 5x3, and its corners span 5x4",
        "a.json: shape 14: its mask shows nothing",
        "a.json: shape 15: its corners 79, 1 and 83, 4 do not lie in an image of 80x60",
        "a.json: shape 16: has no 'label'",
        "a.json: shape 17: '[1]' is no point [x, y]",
        "a.json: shape 18: is no JSON object, so that it has no 'label'",
        "again.json: a.jpg has a file before, a.json",
        "c.json: has no 'shapes'",
        "e.json: there is no image 'e.jpg', neither beside this file nor in the folders round it; the file holds a copy"
        " of it, to be had with `labelmetk extract-image e.json` (pip install labelme-toolkit)",
        "empty.json: is empty",
        "f.json: there is no image 'f.jpg', neither beside this file nor in the folders round it",
        "list.json: is no JSON object, so that it has no 'shapes'",
        "x.json: the image 'x.jpg' may be any of p/x.jpg, q/x.jpg; write its folder with it",
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
        unique_by=str,
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
