import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adfm.data.problems import MissingImage
from adfm.data.readers import via
from tests.data.readers.drawn import NASTY, by_source, dump, never_fails_otherwise, problems, touch

Json = dict[str, Any]

_RECT = {"name": "rect", "x": 20, "y": 30, "width": 40, "height": 20}


def _region(shape: Json, **attributes: Any) -> Json:
    return {"shape_attributes": shape, "region_attributes": attributes}


def _export(images: dict[str, list[Json]], size: int = 6, **attributes: dict[str, str]) -> Json:
    """What `Export Annotations (as json)` writes; `touch` makes files of 6 bytes."""
    return {
        f"{name}{size}": {
            "filename": name,
            "size": size,
            "regions": regions,
            "file_attributes": attributes.get(name.split(".")[0], {}),
        }
        for name, regions in images.items()
    }


def _project(images: dict[str, list[Json]], region: Json | None = None) -> Json:
    metadata = _export(images)
    return {
        "_via_settings": {"ui": {}, "core": {"default_filepath": ""}, "project": {"name": "line"}},
        "_via_img_metadata": metadata,
        "_via_attributes": {"region": region or {}, "file": {}},
        "_via_data_format_version": "2.0.10",
        "_via_image_id_list": list(metadata),
    }


@pytest.mark.parametrize("kind", ["export", "project", "version 1"])
def test_samples(tmp_path: Path, kind: str) -> None:
    raw = tmp_path / "line 1"
    touch(raw, "images/a.png", "images/b.png")
    polygon = {"name": "polygon", "all_points_x": [5, 25, 25], "all_points_y": [5, 5, 45]}
    images = {"a.png": [_region(_RECT, type="scratch"), _region(polygon, type="dent")], "b.png": []}
    content = _project(images) if kind == "project" else _export(images)
    if kind == "version 1":
        for entry in content.values():
            entry["regions"] = {str(place): region for place, region in enumerate(entry["regions"])}
            entry |= {"fileref": "", "base64_img_data": ""}
    dump(raw / "via_region_data.json", content)
    assert via.matches(raw)
    a, b = by_source(via.read, raw).values()
    assert (a.label, a.defect, a.category, a.split) == ("anomalous", "dent+scratch", "line 1", None)
    assert a.boxes == ((20, 30, 60, 50), (5, 5, 25, 45))
    assert a.polygons == (((5, 5), (25, 5), (25, 45)),)
    assert (a.cut, a.notes) == ((False, True), ())
    assert (b.label, b.boxes) == ("normal", ())


def _from_export(content: Json, header: str) -> str:
    """`Export Annotations (as csv)`."""
    out = io.StringIO()
    out.write(header + "\n")
    write = csv.writer(out, quoting=csv.QUOTE_MINIMAL).writerow
    for entry in content.values():
        whole, count = json.dumps(entry["file_attributes"]), len(entry["regions"])
        for place, region in enumerate(entry["regions"]):
            drawn = [json.dumps(region[key]) for key in ("shape_attributes", "region_attributes")]
            write([entry["filename"], entry["size"], whole, count, place, *drawn])
        if not count:
            write([entry["filename"], entry["size"], whole, 0, 0, "{}", "{}"])
    return out.getvalue()


@pytest.mark.parametrize("hash_", ["", "#"])
def test_csv(tmp_path: Path, hash_: str) -> None:
    touch(tmp_path, "a.png", "b, c.png")
    images = {"a.png": [_region(_RECT, name="scratch"), _region(_RECT | {"x": 0}, name="dent")], "b, c.png": []}
    header = "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes"
    (tmp_path / "via_export_csv.csv").write_text(_from_export(_export(images), hash_ + header))
    assert via.matches(tmp_path)
    a, b = by_source(via.read, tmp_path).values()
    assert (a.defect, a.boxes) == ("dent+scratch", ((20, 30, 60, 50), (0, 30, 40, 50)))
    assert b.label == "normal"


def test_version_3(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png")
    content = {
        "project": {"pid": "1", "rev": "1", "data_format_version": "3.1.1", "vid_list": ["1", "2"]},
        "config": {"file": {"loc_prefix": {"1": "", "2": "", "3": "", "4": ""}}},
        "attribute": {
            "1": {"aname": "Class", "anchor_id": "FILE1_Z0_XY1", "type": 4, "options": {"0": "scratch", "1": "dent"}},
        },
        "file": {
            "1": {"fid": "1", "fname": "a.png", "type": 2, "loc": 1, "src": ""},
            "2": {"fid": "2", "fname": "b.png", "type": 2, "loc": 1, "src": ""},
        },
        "metadata": {
            "1_a": {"vid": "1", "flg": 0, "z": [], "xy": [2, 20.5, 30, 40, 20], "av": {"1": "0"}},
            "1_b": {"vid": "1", "flg": 0, "z": [], "xy": [7, 1, 1, 9, 1, 9, 9], "av": {"1": "1"}},
            "1_c": {"vid": "1", "flg": 0, "z": [], "xy": [4, 50, 50, 10, 5], "av": {"1": "1"}},
        },
        "view": {"1": {"fid_list": ["1"]}, "2": {"fid_list": ["2"]}},
    }
    dump(tmp_path / "via_project.json", content)
    assert via.matches(tmp_path)
    a, b = by_source(via.read, tmp_path).values()
    assert (a.defect, b.label) == ("dent+scratch", "normal")
    assert a.boxes == ((20.5, 30, 60.5, 50), (1, 1, 9, 9), pytest.approx((40, 45, 60, 55)))


@given(
    st.tuples(*[st.floats(-50, 500)] * 2, *[st.floats(0.5, 300)] * 2),
    st.floats(-7, 7),
    st.sampled_from(("circle", "ellipse", "polygon", "polyline")),
)
@settings(deadline=None, max_examples=60)
def test_shapes_against_a_formula(
    tmp_path_factory: pytest.TempPathFactory, sides: tuple[float, float, float, float], theta: float, kind: str
) -> None:
    raw = tmp_path_factory.mktemp("via")
    touch(raw, "a.png")
    x, y, across, down = sides
    shape: Json
    turn = np.exp(1j * np.linspace(0, 2 * np.pi, 20_001))
    if kind == "circle":
        shape, points = {"cx": x, "cy": y, "r": across}, across * turn
    elif kind == "ellipse":
        shape = {"cx": x, "cy": y, "rx": across, "ry": down, "theta": theta}
        points = (across * turn.real + 1j * down * turn.imag) * np.exp(1j * theta)
    else:
        points = np.array([0, across, across + 1j * down, 1j * down]) * np.exp(1j * theta)
        shape = {"all_points_x": (x + points.real).tolist(), "all_points_y": (y + points.imag).tolist()}
    points = points + complex(x, y)
    expected = [points.real.min(), points.imag.min(), points.real.max(), points.imag.max()]
    if kind == "polyline":  # at least a pixel wide
        for low, high in ((0, 2), (1, 3)):
            middle = (expected[low] + expected[high]) / 2
            if expected[high] - expected[low] < 1:
                expected[low] = middle - 0.5 if middle < 0 else max(middle - 0.5, 0)
                expected[high] = expected[low] + 1
    dump(raw / "a.json", _export({"a.png": [_region({"name": kind} | shape, label="dent")]}))
    if expected[2] <= 1e-3 or expected[3] <= 1e-3:
        return
    (sample,) = via.read(raw)
    np.testing.assert_allclose(sample.boxes[0], expected, rtol=1e-5, atol=1e-3)
    assert len(sample.polygons) == (kind != "polyline")


def test_a_line_is_a_pixel_wide_at_least(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    line = {"name": "polyline", "all_points_x": [5, 5], "all_points_y": [5, 45]}
    dump(tmp_path / "a.json", _export({"a.png": [_region(line, type="scratch")]}))
    (sample,) = via.read(tmp_path)
    assert (sample.boxes, sample.polygons) == (((4.5, 5, 5.5, 45),), ())


def test_the_attribute_that_is_the_class(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")

    def drawn(*regions: Json, **declared: Any) -> Any:
        dump(tmp_path / "a.json", _project({"a.png": list(regions)}, declared))
        (sample,) = via.read(tmp_path)
        return sample.defect, sample.notes

    assert drawn(_region(_RECT, damage="scratch", note="")) == ("scratch", ())
    assert drawn(_region(_RECT, Label="scratch", severity="high")) == (
        "scratch",
        ("the attribute 'severity' of regions is left out",),
    )
    assert drawn(_region(_RECT)) == ("defect", ("no region has a class; all are called defect",))
    assert drawn(_region(_RECT, type={"dent": True, "crack": True, "x": False})) == ("crack+dent", ())
    options = {"type": "radio", "options": {"1": "dent", "2": ""}}
    assert drawn(_region(_RECT, type="1"), type=options) == ("dent", ())
    dump(tmp_path / "a.json", _export({"a.png": [_region(_RECT, colour="red", depth="2")]}))
    assert problems(via.read, tmp_path)[0] == (
        "a.json: the regions have the attributes 'colour', 'depth'; call the class 'class', and rename the others"
    )


def test_attributes_of_the_file_are_labels(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}.png" for name in "abcd"))
    labels = {
        name: {"label": word, "caption": "x"} for name, word in zip("abcd", ("OK", "NG", "dent", ""), strict=True)
    }
    content = _export({"a.png": [], "b.png": [], "c.png": [], "d.png": []}, **labels)
    dump(tmp_path / "a.json", content)
    samples = by_source(via.read, tmp_path)
    assert [(sample.label, sample.defect, sample.located) for sample in samples.values()] == [
        ("normal", None, True),
        ("anomalous", "defect", False),
        ("anomalous", "dent", False),
        ("normal", None, True),
    ]
    assert samples["a.png"].notes == ("the attribute 'label' is taken for the label of the image",)
    for entry in content.values():
        entry["file_attributes"]["caption"] = entry["file_attributes"]["label"]
    dump(tmp_path / "a.json", content)
    assert problems(via.read, tmp_path)[0] == (
        "a.json: the attribute 'caption' of files is the label of some images, and 'dent' for others; call it label if"
        " that is a defect"
    )
    for entry in content.values():
        del entry["file_attributes"]["caption"]
    content["a.png6"]["regions"] = [_region(_RECT, type="dent")]
    dump(tmp_path / "a.json", content)
    assert problems(via.read, tmp_path) == [
        "a.json: a.png is labelled normal, and 1 regions are drawn on it; correct either"
    ]


def test_another_file_of_that_name_is_noted_and_nothing_is_cut_off(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    circle = {"name": "circle", "cx": 5, "cy": 5, "r": 9}
    dump(tmp_path / "a.json", _export({"a.png": [_region(circle, type="dent")]}, size=12345))
    (sample,) = via.read(tmp_path)
    assert sample.cut == (False,)
    assert sample.notes == ("the image file is not the one that was annotated: it has another size in bytes",)


def test_everything_that_is_wrong_is_listed_in_one_error(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png", "not listed.png")
    regions = [
        _region({"name": "point", "cx": 5, "cy": 5}, type="dent"),
        _region(_RECT | {"width": 0}, type="dent"),
        _region(_RECT | {"x": "20"}, type="dent"),
        _region(_RECT, type=""),
        _region(_RECT, type="good"),
        _region({"name": "polygon", "all_points_x": [1], "all_points_y": [1, 2]}, type="dent"),
        _region({"name": "circle", "cx": 5, "cy": 5, "r": -1}, type="dent"),
    ]
    content = _export({"a.png": regions, "gone.png": []}) | {"again": _export({"a.png": []})["a.png6"]}
    dump(tmp_path / "a.json", content)
    problem_lines = problems(via.read, tmp_path)
    assert problem_lines == [
        "a.json: a.png: region 0: a shape of the kind 'point' has no area; draw a rectangle, circle, ellipse or"
        " polygon",
        "a.json: a.png: region 1: the box [20, 30, 20, 50] is inverted or has no area",
        "a.json: a.png: region 2: '20' is text, and a number is needed; write it without quotation marks",
        "a.json: a.png: region 3: it has no 'type'; choose one, or delete the region",
        "a.json: a.png: region 4: its class is 'good', but every shape is taken for a defect; delete the shapes of"
        " this class, an image without any is normal",
        "a.json: a.png: region 5: its points are 1 x and 2 y, not two or more of each",
        "a.json: a.png: region 6: the ellipse with the radii -1 and -1 has no area",
        "a.json: image 'gone.png' is missing: it is neither where its path leads nor beside this file nor in its image"
        " folders",
        "a.json: a.png is listed before, in a.json; keep one",
        ".: images that are not in the annotations: b.png, not listed.png",
    ]
    assert [isinstance(problem, MissingImage) for problem in problem_lines].index(True) == 7


def test_no_file_of_via(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    dump(tmp_path / "other.json", {"a": {"filename": 1}})
    assert not via.matches(tmp_path)
    assert problems(via.read, tmp_path) == ["no JSON or CSV file of VIA: none with regions and file_attributes"]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(("a.jpg", "OK", "rect", "polygon")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                (
                    "name",
                    "x",
                    "y",
                    "width",
                    "height",
                    "cx",
                    "r",
                    "all_points_x",
                    "all_points_y",
                    "type",
                    "xy",
                    "av",
                    "vid",
                )
            ),
            inner,
        )
    ),
    max_leaves=15,
)


@given(
    st.sampled_from(NASTY)
    | st.lists(st.tuples(_JSON, _JSON), max_size=3).map(
        lambda drawn: json.dumps(
            _export({"a.jpg": [{"shape_attributes": a, "region_attributes": b} for a, b in drawn]})
        ).encode()
    )
    | st.tuples(_JSON, _JSON, _JSON, _JSON).map(
        lambda parts: json.dumps(
            {
                "project": {},
                "attribute": {"1": parts[0]},
                "metadata": {"m": parts[1], "n": {"vid": "1", "xy": parts[2]}},
            }
            | {"view": {"1": {"fid_list": ["1"]}}, "file": {"1": {"fname": "a.jpg"}, "2": parts[3]}, "config": {}}
        ).encode()
    )
)
@settings(deadline=None, max_examples=120)
def test_whatever_is_in_the_file_the_error_is_one_for_people(content: bytes) -> None:
    never_fails_otherwise(via.read, {"a.json": content})


@given(st.binary(max_size=80))
@settings(deadline=None)
def test_whatever_is_in_the_table_the_error_is_one_for_people(content: bytes) -> None:
    header = b"filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes\n"
    never_fails_otherwise(via.read, {"a.csv": header + b"a.jpg,6,{},1,0," + content})
