import base64
import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from adfm.data.problems import BadData, MissingImage
from adfm.data.readers import supervisely
from adfm.data.readers.shapes import pixels
from adfm.records import Sample
from tests.data.readers.drawn import NASTY, by_source, dump, never_fails_otherwise, problems, touch


def _object(geometry: str, title: str = "scratch", **more: Any) -> dict[str, Any]:
    return {
        "id": 497489556,
        "classId": 1661459,
        "description": "",
        "geometryType": geometry,
        "labelerLogin": "max",
        "createdAt": "2020-07-24T07:30:39.202Z",
        "updatedAt": "2020-07-24T07:41:12.753Z",
        "tags": [],
        "classTitle": title,
    } | more


def _points(*exterior: tuple[float, float], interior: Any = ()) -> dict[str, Any]:
    return {"points": {"exterior": list(exterior), "interior": list(interior)}}


def _bitmap(mask: np.ndarray, left: int, top: int) -> dict[str, Any]:
    """As Supervisely's documentation packs it."""
    image = Image.fromarray(np.array(mask, np.uint8), mode=None)
    image.putpalette([0, 0, 0, 255, 255, 255])
    file = io.BytesIO()
    image.save(file, format="PNG", transparency=0, optimize=0)
    return {"bitmap": {"data": base64.b64encode(zlib.compress(file.getvalue())).decode(), "origin": [left, top]}}


def _ann(*objects: Any, tags: Any = (), **more: Any) -> dict[str, Any]:
    size = {"height": 96, "width": 128}
    return {"description": "", "tags": list(tags), "size": size, "objects": list(objects)} | more


def _meta(raw: Path, *titles: str, **more: Any) -> None:
    classes = [{"title": title, "shape": "any", "color": "#ff0000", "geometry_config": {}} for title in titles]
    dump(raw / "meta.json", {"classes": classes, "tags": [], "projectType": "images"} | more)


def _sample(raw: Path, *objects: Any, **more: Any) -> Sample:
    _meta(raw, "scratch")
    touch(raw, "ds0/img/1.jpg")
    dump(raw / "ds0/ann/1.jpg.json", _ann(*objects, **more))
    return by_source(supervisely.read, raw)["ds0/img/1.jpg"]


def test_samples(tmp_path: Path) -> None:
    raw = tmp_path / "parts"
    _meta(raw / "project", "scratch")
    touch(raw, "project/train/img/a.b.jpg", "project/test/img/1.png", "project/test/datasets/val/img/2.png")
    touch(raw, "project/train/masks_human/a.b.png")
    dump(raw / "project/train/ann/a.b.jpg.json", _ann(_object("rectangle", **_points((10, 20), (29, 39)))))
    dump(raw / "project/test/ann/1.png.json", _ann())
    dump(raw / "project/test/datasets/val/ann/2.png.json", _ann())
    dump(raw / "project/train/img_info/a.b.jpg.json", {"name": "a.b.jpg"})
    assert supervisely.matches(raw)
    samples = by_source(supervisely.read, raw)
    first = samples["project/train/img/a.b.jpg"]
    assert (first.boxes, first.defect, first.size, first.category) == (
        ((10, 20, 30, 40),),
        "scratch",
        (128, 96),
        "parts",
    )
    assert {source: (sample.label, sample.split) for source, sample in samples.items()} == {
        "project/train/img/a.b.jpg": ("anomalous", "train"),
        "project/test/img/1.png": ("normal", "test"),
        "project/test/datasets/val/img/2.png": ("normal", "validation"),
    }


def test_shapes(tmp_path: Path) -> None:
    triangle = ((10.0, 20.0), (29.0, 20.0), (29.0, 39.0))
    parts = [{"exterior": [[50, 50], [59, 50], [59, 59]], "interior": []}, {"exterior": [[80, 50], [89, 50], [89, 59]]}]
    sample = _sample(
        tmp_path,
        _object("polygon", **_points(*triangle)),
        _object("polygon", **_points((10.5, 20.5), (30.5, 20.5), (30.5, 40.5))),
        _object("multipolygon", parts=parts),
        _object("line", title="crack", **_points((5, 5), (24, 5))),
    )
    assert sample.boxes == ((10, 20, 30, 40), (10.5, 20.5, 30.5, 40.5), (50, 50, 90, 60), (5, 5, 25, 6))
    assert sample.polygons[0] == triangle and len(sample.polygons) == 4
    assert sample.notes == ("a line is the box round it",)


def test_a_polygon_with_a_hole_is_a_mask(tmp_path: Path) -> None:
    hole = [[14, 24], [25, 24], [25, 35], [14, 35]]
    sample = _sample(tmp_path, _object("polygon", **_points((10, 20), (29, 20), (29, 39), (10, 39), interior=[hole])))
    mask = pixels(sample.rles[0])
    assert sample.boxes == ((10, 20, 30, 40),)
    assert mask[20, 10] and mask[39, 29] and not mask[30, 20] and not mask[19, 10]


_bits = st.integers(1, 9).flatmap(
    lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=9)
)


@given(_bits.filter(lambda rows: any(map(any, rows))), st.integers(0, 119), st.integers(0, 87))
@settings(deadline=None, max_examples=40)
def test_bitmaps(tmp_path_factory: pytest.TempPathFactory, rows: list[list[bool]], left: int, top: int) -> None:
    mask = np.array(rows)
    sample = _sample(tmp_path_factory.mktemp("bitmaps"), _object("bitmap", **_bitmap(mask, left, top)))
    expected = np.zeros((96, 128), bool)
    expected[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    assert (pixels(sample.rles[0]) == expected).all()


def test_the_bitmap_of_the_documentation(tmp_path: Path) -> None:
    data = (
        "eJzrDPBz5+WS4mJgYOD19HAJAtLMIMwIInOeqf8BUmwBPiGuQPr///9Lb86/C2QxlgT5BTM4PLuRBuTwebo4hlTMSa44cOHAB6DqY0yORgq8"
        "YkAZBk9XP5d1TglNANAFGzA="
    )
    sample = _sample(tmp_path, _object("bitmap", bitmap={"data": data, "origin": [5, 6]}))
    assert pixels(sample.rles[0])[6:9, 5:8].tolist() == [[True, True, True], [True, False, False], [True, True, True]]


def test_early_versions_wrote_the_geometry_for_the_class(tmp_path: Path) -> None:
    _meta(tmp_path, classes=[{"title": "scratch", "shape": "rectangle", "color": "#ff0000"}])
    touch(tmp_path, "ds/img/1.jpg")
    old = {"description": "", "tags": [], "bitmap": None, "classTitle": "scratch", **_points((10, 20), (29, 39))}
    packed = {"classTitle": "scratch", **_bitmap(np.ones((2, 2)), 3, 4), **_points()}
    dump(tmp_path / "ds/ann/1.json", _ann(old, packed))
    assert by_source(supervisely.read, tmp_path)["ds/img/1.jpg"].boxes == ((10, 20, 30, 40), (3, 4, 5, 6))


def test_tags(tmp_path: Path) -> None:
    tag = {"id": 86458971, "tagId": 28283797, "name": "val", "value": None, "labelerLogin": "alexxx"}
    sample = _sample(tmp_path, tags=[tag, tag | {"name": "situated", "value": "outside"}])
    assert (sample.label, sample.split) == ("normal", "validation")
    assert sample.notes == ("tags of an image are left out",)
    dump(tmp_path / "meta.json", {"classes": [], "tags": [{"name": "dent", "value_type": "none"}]})
    dump(tmp_path / "ds0/ann/1.jpg.json", _ann(tags=["dent"]))
    labelled = by_source(supervisely.read, tmp_path)["ds0/img/1.jpg"]
    assert (labelled.label, labelled.defect, labelled.located) == ("anomalous", "dent", False)
    dump(tmp_path / "ds0/ann/1.jpg.json", _ann(tags=["good"]))
    assert by_source(supervisely.read, tmp_path)["ds0/img/1.jpg"].label == "normal"


def test_a_point_makes_an_image_anomalous_without_boxes(tmp_path: Path) -> None:
    sample = _sample(tmp_path, _object("point", title="pore", **_points((3, 4))))
    assert (sample.label, sample.defect, sample.boxes, sample.located) == ("anomalous", "pore", (), False)


def test_everything_that_is_wrong_is_listed_in_one_error(tmp_path: Path) -> None:
    _meta(tmp_path, "scratch")
    touch(tmp_path, *(f"ds/img/{name}" for name in ("1.jpg", "2.jpg", "3.jpg", "4.jpg", "4.png")), "other/5.jpg")
    bomb = base64.b64encode(zlib.compress(b"\0" * 100)).decode()
    dump(
        tmp_path / "ds/ann/1.jpg.json",
        _ann(
            _object("rectangle", **_points((10, 20))),
            _object("rectangle", **_points((-10, 20), (-3, 40))),
            _object("polygon", **_points((10, 20), (11, 21))),
            _object("bitmap", bitmap={"data": "?", "origin": [1, 2]}),
            _object("bitmap", bitmap={"data": bomb, "origin": [1, 2]}),
            _object("bitmap", **_bitmap(np.ones((3, 3)), 126, 0)),
            _object("graph", nodes={}),
            _object("rectangle", title="good", **_points((10, 20), (29, 39))),
            _object("multipolygon", parts=[]),
            3,
        ),
    )
    (tmp_path / "ds/ann/2.jpg.json").write_text("{")
    dump(tmp_path / "ds/ann/4.json", _ann())
    dump(tmp_path / "ds/ann/gone.jpg.json", _ann())
    listed = problems(supervisely.read, tmp_path)
    unread = "its mask cannot be read"
    assert [problem.partition(": object ")[2] for problem in listed[:10]] == [
        "1: a rectangle has 2 points or more, not 1",
        "2: the box [-10, 20, -2, 41] lies outside the image",
        "3: a polygon needs 3 corners, and has 2",
        f"4: {unread} (it is not base64 text)",
        *[listed[4].partition(": object ")[2]],
        "6: its mask of 3x3 at 126, 0 reaches out of the image of 128x96",
        "7: a shape of the type 'graph' is not read; draw a rectangle, polygon, line or bitmap",
        "8: its class is 'good', but every shape is taken for a defect; delete the shapes of this class, an image"
        " without any is normal",
        "9: has no polygon",
        "10: is not a JSON object, so that it has no 'classTitle'",
    ]
    assert listed[4].startswith(f"ds/ann/1.jpg.json: object 5: {unread} (")
    assert listed[10:] == [
        "ds/ann/2.jpg.json: line 1, column 2: is not JSON (Expecting property name enclosed in double quotes)",
        "ds/img/3.jpg: its ann/3.jpg.json is missing; export the annotations as well",
        "ds/ann/4.json: belongs to 4.jpg and 4.png; rename one",
        "ds/ann/gone.jpg.json: its image img/gone.jpg is missing",
        "other: images outside img/, move them there: 5.jpg",
    ]
    assert isinstance(listed[-2], MissingImage)


@given(st.binary() | st.sampled_from(NASTY))
@settings(deadline=None, max_examples=60)
def test_whatever_is_in_the_file_the_error_is_one_for_people(content: bytes) -> None:
    never_fails_otherwise(supervisely.read, {"meta.json": content})


_json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.sampled_from(("scratch", "bitmap", "polygon")),
    lambda inside: (
        st.lists(inside, max_size=3)
        | st.dictionaries(
            st.sampled_from(("exterior", "interior", "data", "origin", "width", "height")), inside, max_size=3
        )
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(("classTitle", "geometryType", "points", "bitmap", "parts", "tags")), _json, max_size=5
    ),
    _json,
    _json,
)
@settings(deadline=None, max_examples=80)
def test_whatever_an_object_is_the_error_is_one_for_people(
    tmp_path_factory: pytest.TempPathFactory, drawn: dict[str, Any], size: Any, tags: Any
) -> None:
    raw = tmp_path_factory.mktemp("any")
    _meta(raw, "scratch")
    touch(raw, "ds0/img/1.jpg")
    dump(raw / "ds0/ann/1.jpg.json", _ann({"classTitle": "scratch"} | drawn, size=size, tags=[]) | {"tags": tags})
    try:
        assert list(supervisely.read(raw))
    except BadData as error:
        str(error).encode()


def test_tags_are_the_labels_of_images_without_objects_where_one_is_a_verdict(tmp_path: Path) -> None:
    _sample(tmp_path)
    meta = {"classes": [{"title": "scratch", "shape": "rectangle"}], "tags": [{"name": "ok"}, {"name": "dent"}]}
    dump(tmp_path / "meta.json", meta)
    dump(tmp_path / "ds0/ann/1.jpg.json", _ann(tags=["dent"]))
    labelled = by_source(supervisely.read, tmp_path)["ds0/img/1.jpg"]
    assert (labelled.label, labelled.defect, labelled.located, labelled.notes) == ("anomalous", "dent", False, ())
    drawn = _object("rectangle", **_points((1, 2), (5, 9)))
    dump(tmp_path / "ds0/ann/1.jpg.json", _ann(drawn, tags=["dent"]))
    samples = by_source(supervisely.read, tmp_path)["ds0/img/1.jpg"]
    assert (samples.defect, samples.located, samples.notes) == ("scratch", True, ("tags of an image are left out",))
    dump(tmp_path / "ds0/ann/1.jpg.json", _ann(drawn, tags=["ok"]))
    assert problems(supervisely.read, tmp_path) == [
        "ds0/ann/1.jpg.json: a tag says that it is normal, but objects are drawn on it; remove one of them"
    ]
