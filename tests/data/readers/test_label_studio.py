import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from adfm.data.problems import MissingImage
from adfm.data.readers import label_studio
from tests.data.readers.drawn import NASTY, by_source, dump, never_fails_otherwise, problems, touch

Json = dict[str, Any]


def _region(kind: str, value: Json, *names: str, size: tuple[int, int] = (128, 96), **more: Any) -> Json:
    return {
        "original_width": size[0],
        "original_height": size[1],
        "image_rotation": 0,
        "value": value | {kind: list(names)},
        "id": f"r{abs(hash(str(value))) % 10**6}",
        "from_name": "label",
        "to_name": "image",
        "type": kind,
        "origin": "manual",
    } | more


def _rectangle(x: float, y: float, width: float, height: float, name: str = "scratch", rotation: float = 0) -> Json:
    """A rectangle in pixels of an image of 128x96."""
    value = {"x": x / 1.28, "y": y / 0.96, "width": width / 1.28, "height": height / 0.96, "rotation": rotation}
    return _region("rectanglelabels", value, name)


def _choice(choice: str, name: str = "quality") -> Json:
    result = {"value": {"choices": [choice]}, "id": "c1", "from_name": name, "to_name": "image", "type": "choices"}
    return result | {"origin": "manual"}


def _annotation(*results: Json, identifier: int = 1, **more: Any) -> Json:
    return {
        "id": identifier,
        "completed_by": 1,
        "result": list(results),
        "was_cancelled": False,
        "ground_truth": False,
        "created_at": "2024-05-02T10:00:00.000000Z",
        "lead_time": 4.2,
        "prediction": {},
        "result_count": len(results),
    } | more


def _task(identifier: int, image: str, *annotations: Json, **more: Any) -> Json:
    return {
        "id": identifier,
        "annotations": list(annotations),
        "file_upload": image.split("/")[-1],
        "drafts": [],
        "predictions": [],
        "data": {"image": image},
        "meta": {},
        "inner_id": identifier,
        "total_annotations": len(annotations),
        "project": 4,
    } | more


def test_samples(tmp_path: Path) -> None:
    raw = tmp_path / "line 1"
    touch(raw, "images/cb0618f6-a.png", "images/d1e2f3a4-b.png")
    prediction = {"result": [_rectangle(1, 1, 9, 9)], "model_version": "1"}
    dump(
        raw / "project-4-at-2024-05-02.json",
        [
            _task(1, "/data/upload/4/cb0618f6-a.png", _annotation(_rectangle(20, 30, 40, 20))),
            _task(2, "/data/upload/4/d1e2f3a4-b.png", _annotation(), predictions=[prediction]),
        ],
    )
    assert label_studio.matches(raw)
    a, b = by_source(label_studio.read, raw).values()
    assert (a.source, a.label, a.defect, a.category, a.size) == (
        "images/cb0618f6-a.png",
        "anomalous",
        "scratch",
        "line 1",
        (128, 96),
    )
    assert a.boxes == (pytest.approx((20, 30, 60, 50)),)
    assert (a.normalized, a.polygons, a.cut) == (False, (), (False,))
    assert (b.label, b.boxes, b.located) == ("normal", (), True)


@pytest.mark.parametrize(
    ("url", "file"),
    [
        ("/data/local-files/?d=line3/part%201.png", "line3/part 1.png"),
        ("/data/local-files/?d=home/me/set/line3/part%201.png", "images/part 1.png"),
        ("/data/local-files?d=line3/a.png", "line3/a.png"),
        ("http://localhost:8080/data/local-files/?d=line3/a.png", "line3/a.png"),
        ("/data/upload/4/cb0618f6-a.png", "a.png"),
        ("/data/upload/4/cb0618f6-part_1.png", "images/part 1.png"),
        ("/data/upload/4/cb0618f6-%E9%9D%A2.png", "images/cb0618f6-面.png"),
        ("/data/upload/4/cb0618f6-a.png", "media/upload/4/cb0618f6-a.png"),
        ("/storage-data/uploaded/?filepath=upload/4/cb0618f6-a.png", "shots/cb0618f6-a.png"),
        ("s3://bucket/line3/a%20.png", "line3/a%20.png"),
        ("s3://bucket/line3/part 1.png", "line3/part 1.png"),
        ("https://example.com/x/a%20b.png?X-Amz-Signature=1", "images/a b.png"),
        (r"C:\Users\me\set\a.png", "images/a.png"),
    ],
)
def test_where_an_image_may_be(tmp_path: Path, url: str, file: str) -> None:
    touch(tmp_path, file, "others/x.png")
    normal = _annotation()
    dump(tmp_path / "export.json", [_task(1, url, normal), _task(2, "/data/local-files/?d=others/x.png", normal)])
    if file == "shots/cb0618f6-a.png":  # a folder that no path names counts only if it is the only one
        assert "is missing" in problems(label_studio.read, tmp_path)[0]
        (tmp_path / "others/x.png").unlink()
        dump(tmp_path / "export.json", [_task(1, url, normal)])
    assert file in by_source(label_studio.read, tmp_path)


def test_a_bare_name_is_not_looked_for_in_folders_that_the_path_does_not_name(tmp_path: Path) -> None:
    touch(tmp_path, "line4/a.png", "line5/b.png")
    dump(tmp_path / "export.json", [_task(1, "/data/local-files/?d=line3/a.png", _annotation())])
    listed = problems(label_studio.read, tmp_path)
    assert "export.json: task 1: image '/data/local-files/?d=line3/a.png' is missing: it is neither" in listed[0]
    assert isinstance(listed[0], MissingImage)


@pytest.mark.parametrize(
    ("rotation", "expected"), [(90, (100, 100, 200, 400)), (0, (200, 100, 500, 200)), (180, (-100, 0, 200, 100))]
)
def test_a_turn_is_in_pixels_about_the_corner(tmp_path: Path, rotation: float, expected: tuple[float, ...]) -> None:
    """An image of 1000x500: its percentages are longer across than down."""
    touch(tmp_path, "a.png")
    value = {"x": 20, "y": 20, "width": 30, "height": 20, "rotation": rotation}
    region = _region("rectanglelabels", value, "dent", size=(1000, 500))
    dump(tmp_path / "export.json", [_task(1, "a.png", _annotation(region))])
    (sample,) = label_studio.read(tmp_path)
    assert sample.boxes == (pytest.approx(expected),)
    assert sample.cut == (rotation != 0,)


_PERCENT = st.floats(0, 100).map(lambda value: round(value, 6))


@given(
    st.tuples(_PERCENT, _PERCENT, st.floats(0.1, 100), st.floats(0.1, 100)),
    st.floats(-720, 720),
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_turned_shapes_against_matrices(
    tmp_path_factory: pytest.TempPathFactory,
    sides: tuple[float, float, float, float],
    rotation: float,
    size: tuple[int, int],
    is_ellipse: bool,
) -> None:
    raw = tmp_path_factory.mktemp("turned")
    touch(raw, "a.png")
    keys, kind = ("x", "y", "width", "height"), "rectanglelabels"
    if is_ellipse:
        keys, kind = ("x", "y", "radiusX", "radiusY"), "ellipselabels"
    value = dict(zip(keys, sides, strict=True)) | {"rotation": rotation}
    dump(raw / "export.json", [_task(1, "a.png", _annotation(_region(kind, value, "dent", size=size)))])

    at = np.array(sides).reshape(2, 2) * size / 100
    turn = np.exp(1j * np.deg2rad(rotation))
    if is_ellipse:
        angle = np.linspace(0, 2 * np.pi, 20_001)
        points = at[1, 0] * np.cos(angle) + 1j * at[1, 1] * np.sin(angle)
    else:
        points = np.array([0, at[1, 0], at[1, 0] + 1j * at[1, 1], 1j * at[1, 1]])
    points = complex(*at[0]) + points * turn
    expected = (points.real.min(), points.imag.min(), points.real.max(), points.imag.max())
    if expected[2] <= 1e-6 or expected[3] <= 1e-6:
        return  # outside
    (sample,) = label_studio.read(raw)
    np.testing.assert_allclose(sample.boxes[0], expected, rtol=1e-5, atol=1e-5 * max(size))
    outline = np.array(sample.polygons).reshape(-1, 2) if sample.polygons else np.array(sample.boxes).reshape(-1, 2)
    slack = 1e-5 * max(size)
    assert (outline.min(0) >= np.array(expected[:2]) - slack).all()
    assert (outline.max(0) <= np.array(expected[2:]) + slack).all()


def _packed(mask: np.ndarray[Any, Any], literally: bool) -> list[int]:
    """Label Studio's run lengths of an image in one colour, opaque where the mask is."""
    values = np.repeat(mask.ravel(), 4).astype(np.uint8) * 255
    values[: values.size : 4] //= 2  # a red of 127, so that runs are short
    bits = f"{values.size:032b}" + f"{7:05b}" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    if literally:
        for first in range(0, values.size, 256):
            part = values[first : first + 256]
            bits += "0" + "10" + f"{len(part) - 1:08b}" + "".join(f"{value:08b}" for value in part)
    else:
        edges = [0, *(np.flatnonzero(np.diff(values)) + 1), values.size]
        for first, end in itertools.pairwise(edges):
            bits += "1" + "11" + f"{end - first - 1:016b}" + f"{values[first]:08b}"
    bits += "0" * (8 - len(bits) % 8)
    return [int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)]


@given(arrays.arrays(bool, st.tuples(st.integers(1, 30), st.integers(1, 30))), st.booleans())
@settings(deadline=None, max_examples=50)
def test_a_brush_mask_is_read(tmp_path_factory: pytest.TempPathFactory, mask: Any, literally: bool) -> None:
    raw = tmp_path_factory.mktemp("brush")
    touch(raw, "a.png")
    height, width = mask.shape
    value = {"format": "rle", "rle": _packed(mask, literally)}
    region = _region("brushlabels", value, "stain", size=(width, height))
    dump(raw / "export.json", [_task(1, "a.png", _annotation(region))])
    if not mask.any():
        assert "its mask shows nothing" in problems(label_studio.read, raw)[0]
        return
    (sample,) = label_studio.read(raw)
    (rle,) = sample.rles
    runs = [np.full(count, place % 2, bool) for place, count in enumerate(rle.counts)]
    np.testing.assert_array_equal(np.concatenate(runs).reshape((height, width), order="F"), mask)
    rows, columns = np.nonzero(mask)
    assert sample.boxes == ((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1),)


@given(st.lists(st.integers(0, 255), max_size=40))
@settings(deadline=None)
def test_damaged_masks_are_an_error(rle: list[int]) -> None:
    content = [_task(1, "a.jpg", _annotation(_region("brushlabels", {"format": "rle", "rle": rle}, "stain")))]
    never_fails_otherwise(label_studio.read, {"a.json": json.dumps(content).encode()})


def test_polygons_and_regions_in_several_results(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    outline = [[10, 10], [50, 10], [50, 50]]
    rectangle = _rectangle(20, 30, 40, 20)["value"]
    del rectangle["rectanglelabels"]
    results = [
        _region("polygonlabels", {"points": outline, "closed": True}, "dent", id="p"),
        _region("rectangle", rectangle, id="r") | {"value": rectangle},
        _region("labels", rectangle, "scratch", id="r"),
        _region("choices", rectangle, "severe", id="r", from_name="severity"),
    ]
    dump(tmp_path / "export.json", [_task(1, "a.png", _annotation(*results))])
    (sample,) = label_studio.read(tmp_path)
    assert sample.defect == "dent+scratch"
    assert sample.boxes == (pytest.approx((12.8, 9.6, 64, 48)), pytest.approx((20, 30, 60, 50)))
    assert len(sample.polygons) == 1
    assert sample.notes == ()


def test_without_sizes_shapes_are_fractions(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    region = {"type": "rectanglelabels", "value": {"x": 10, "y": 20, "width": 30, "height": 40, "rotation": 0}}
    region["value"]["rectanglelabels"] = ["dent"]
    dump(tmp_path / "export.json", [_task(1, "a.png", _annotation(region))])
    (sample,) = label_studio.read(tmp_path)
    assert (sample.boxes, sample.normalized, sample.size) == ((pytest.approx((0.1, 0.2, 0.4, 0.6)),), True, None)
    region["value"]["rotation"] = 3
    dump(tmp_path / "export.json", [_task(1, "a.png", _annotation(region))])
    assert "a turned region without original_width" in problems(label_studio.read, tmp_path)[0]


def test_choices_about_the_image_are_labels(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}.png" for name in "abcd"))
    tasks = [
        _task(1, "a.png", _annotation(_choice("OK"), _choice("left", "side"))),
        _task(2, "b.png", _annotation(_choice("NG"))),
        _task(3, "c.png", _annotation(_choice("Scratch"))),
        _task(4, "d.png", _annotation(_choice("NG"), _rectangle(20, 30, 40, 20, "dent"))),
    ]
    dump(tmp_path / "export.json", tasks)
    a, b, c, d = (by_source(label_studio.read, tmp_path)[f"{name}.png"] for name in "abcd")
    assert (a.label, a.notes) == (
        "normal",
        (
            "the choice 'quality' is taken for the label of the image",
            "the choice 'side' is not about a defect and is left out",
        ),
    )
    assert (b.label, b.defect, b.boxes, b.located) == ("anomalous", "defect", (), False)
    assert (c.label, c.defect, c.located) == ("anomalous", "Scratch", False)
    assert (d.label, d.defect, d.located, len(d.boxes)) == ("anomalous", "dent", True, 1)


def test_choices_of_which_nobody_knows_what_they_say_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    dump(tmp_path / "export.json", [_task(1, "a.png", _annotation(_choice("left", "side")))])
    assert "which choice means a defect is not known" in problems(label_studio.read, tmp_path)[0]


def test_what_is_not_a_label_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}.png" for name in "abcdefghij"))
    ok = _rectangle(20, 30, 40, 20)
    truth = _annotation(ok, identifier=12, ground_truth=True)
    twice = (_annotation(ok, identifier=1), _annotation(ok, identifier=2))
    tasks = [
        _task(1, "a.png"),
        _task(2, "b.png", _annotation(ok, was_cancelled=True)),
        _task(3, "c.png", _annotation(ok, identifier=8), _annotation(identifier=9)),
        _task(4, "d.png", *twice),
        _task(5, "e.png", _annotation(identifier=11), truth),
        _task(6, "a.png", _annotation()),
        _task(7, "f.png", _annotation(_choice("OK"), ok)),
        _task(8, "g.png", _annotation(_region("keypointlabels", {"x": 5, "y": 5, "width": 1}, "dent"))),
        _task(9, "h.png", _annotation(_rectangle(1, 1, 5, 5) | {"image_rotation": 90})),
        _task(10, "i.png", _annotation(_rectangle(1, 1, 5, 5) | {"original_width": 99}, _rectangle(9, 9, 5, 5))),
        _task(11, "j.png", _annotation(_region("rectanglelabels", {"x": 1, "y": 1, "width": 1, "height": 1}))),
        _task(12, "gone.png", _annotation()),
        _task(13, "x", _annotation()),
    ]
    dump(tmp_path / "export.json", tasks)
    problem_lines = problems(label_studio.read, tmp_path)
    assert problem_lines == [
        "export.json: task 1: a.png has no submitted annotation (a prediction is not one); annotate it, or set"
        " convert.missing to skip to leave such images out",
        "export.json: task 2: b.png was skipped; annotate it, or set convert.missing to skip to leave such images out",
        "export.json: task 3: the annotations 8, 9 of c.png differ; delete all but one, or mark one as ground truth",
        "export.json: task 6: a.png is listed before, in task 1 of export.json; keep one",
        "export.json: task 7: annotation 1: the image is labelled normal, and 1 defects are drawn on it; correct"
        " either",
        "export.json: task 8: annotation 1: result 1: a point has no area; draw a rectangle, polygon, ellipse or mask"
        " in its place",
        "export.json: task 9: annotation 1: result 1: the image was turned by 90 degrees in Label Studio; turn the"
        " file, and annotate that",
        "export.json: task 10: annotation 1: its results state different sizes of the image",
        "export.json: task 11: annotation 1: result 1: the region has no label; choose one, or delete it",
        "export.json: task 12: image 'gone.png' is missing: it is neither where its path leads nor beside this file"
        " nor in its image folders",
        "export.json: task 13: its data should have the path of one image; the keys that have one: none",
    ]
    assert [isinstance(problem, MissingImage) for problem in problem_lines].count(True) == 3
    assert isinstance(problem_lines[0], MissingImage) and isinstance(problem_lines[1], MissingImage)

    dump(tmp_path / "export.json", [tasks[3], tasks[4]])
    for name in "abcfghij":
        (tmp_path / f"{name}.png").unlink()
    d, e = by_source(label_studio.read, tmp_path).values()
    assert d.boxes == e.boxes
    assert d.notes == ("of several annotations that agree, the first counts",)
    assert e.notes == ("of several annotations, the one marked as ground truth counts",)


def test_annotations_without_ids_that_differ(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    one, other = _annotation(_rectangle(20, 30, 40, 20)), _annotation()
    del one["id"]
    other["id"] = [None]
    dump(tmp_path / "export.json", [_task(1, "a.png", one, other)])
    assert "the annotations None, [None] of a.png differ" in problems(label_studio.read, tmp_path)[0]


def test_json_min(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}.png" for name in "abc"))
    value = _rectangle(20, 30, 40, 20)["value"] | {"original_width": 128, "original_height": 96}
    rest = {"annotator": 1, "created_at": "2024", "updated_at": "2024", "lead_time": 3.1}
    entries = [
        {"image": "/data/upload/4/cb0618f6-a.png", "id": 1, "label": [value], "annotation_id": 5} | rest,
        {"image": "/data/upload/4/cb0618f6-b.png", "id": 2, "quality": "OK", "annotation_id": 6} | rest,
        {"image": "/data/upload/4/cb0618f6-c.png", "id": 3, "quality": "NG", "annotation_id": 7} | rest,
    ]
    dump(tmp_path / "export.json", entries)
    assert label_studio.matches(tmp_path)
    a, b, c = by_source(label_studio.read, tmp_path).values()
    assert (a.defect, a.boxes, a.size) == ("scratch", (pytest.approx((20, 30, 60, 50)),), (128, 96))
    assert (b.label, c.label, c.located) == ("normal", "anomalous", False)
    entries.append(entries[0] | {"label": [], "annotation_id": 8})
    entries[2]["annotation_id"] = None
    dump(tmp_path / "export.json", entries)
    assert problems(label_studio.read, tmp_path) == [
        "export.json: task 1: the annotations 5, 8 of a.png differ; delete all but one, or mark one as ground truth",
        "export.json: task 3: c.png has no submitted annotation (a prediction is not one); annotate it, or set"
        " convert.missing to skip to leave such images out",
    ]


def test_a_file_a_task(tmp_path: Path) -> None:
    """As a storage that annotations are synchronised to has them."""
    touch(tmp_path, "images/a.png", "images/b.png")
    dump(tmp_path / "1.json", _annotation(_rectangle(20, 30, 40, 20)) | {"task": {"id": 1, "data": {"image": "a.png"}}})
    dump(tmp_path / "2.json", _task(2, "b.png", _annotation()))
    assert label_studio.matches(tmp_path)
    assert [sample.label for sample in label_studio.read(tmp_path)] == ["anomalous", "normal"]


def test_no_file_of_label_studio(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    dump(tmp_path / "other.json", [{"id": 1}])
    assert not label_studio.matches(tmp_path)
    assert problems(label_studio.read, tmp_path) == [
        "no JSON file of Label Studio: no list of tasks with data and annotations"
    ]


_KEYS = [
    *("id", "data", "annotations", "result", "value", "points", "x", "y", "width", "height", "image", "rle"),
    *("radiusX", "rectanglelabels", "choices", "original_width", "original_height", "image_rotation"),
]
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(("a.jpg", "OK", "x")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(_KEYS),
            inner,
        )
    ),
    max_leaves=20,
)


@given(
    st.sampled_from(NASTY)
    | st.lists(_JSON, max_size=3).map(lambda results: json.dumps([_task(1, "a.jpg", _annotation(*results))]).encode())
    | st.lists(_JSON, max_size=3).map(
        lambda values: json.dumps(
            [_task(1, "a.jpg", _annotation(*({"value": value, "original_width": 9, "id": value} for value in values)))]
        ).encode()
    )
    | _JSON.map(lambda content: json.dumps([{"annotation_id": 1, "image": "a.jpg", "label": content}]).encode())
)
@settings(deadline=None, max_examples=150)
def test_whatever_is_in_the_file_the_error_is_one_for_people(content: bytes) -> None:
    never_fails_otherwise(label_studio.read, {"a.json": content})
