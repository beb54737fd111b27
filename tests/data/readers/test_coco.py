import json
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import ExifTags, Image

from adfm.data.problems import MissingImage
from adfm.data.readers import coco
from tests.data.readers.drawn import NASTY, by_source, dump, never_fails_otherwise, problems, touch

_CATEGORIES = [{"id": 1, "name": "scratch"}, {"id": 2, "name": "dent"}]

_APART = "if the file was put together from several, keep these as files of their own"


def _file(names: list[str], boxes: list[tuple[int, int, list[Any]]], **more: Any) -> dict[str, Any]:
    """A COCO file with one image a name, and annotations (image, category, bbox)."""
    return {
        "images": [{"id": n, "file_name": name, "width": 640, "height": 480} for n, name in enumerate(names)],
        "annotations": [
            {"id": n, "image_id": image, "category_id": category, "bbox": bbox, "iscrowd": 0, **more}
            for n, (image, category, bbox) in enumerate(boxes)
        ],
        "categories": [*_CATEGORIES],
    }


def test_samples(tmp_path: Path) -> None:
    raw = tmp_path / "line 1"
    touch(raw, "images/a.jpg", "images/b.PNG", "images/c.jpg")
    boxes = [(0, 2, [10, 20, 30.5, 40]), (0, 1, [0, 0, 1, 1]), (0, 2, [5, 5, 5, 5]), (2, 2, [1, 2, 3, 4])]
    dump(raw / "annotations" / "instances.json", _file(["a.jpg", "b.PNG", "c.jpg"], boxes))
    assert coco.matches(raw)
    samples = by_source(coco.read, raw)
    a, b, c = (samples[f"images/{name}"] for name in ("a.jpg", "b.PNG", "c.jpg"))
    assert (a.label, a.defect, a.dataset, a.category, a.split) == (
        "anomalous",
        "dent+scratch",
        "line 1",
        "line 1",
        None,
    )
    assert a.boxes == ((10, 20, 40.5, 60), (0, 0, 1, 1), (5, 5, 10, 10))
    assert (b.label, b.defect, b.boxes) == ("normal", None, ())
    assert (c.label, c.defect, c.boxes, c.normalized) == ("anomalous", "dent", ((1, 2, 4, 6),), False)


@pytest.mark.parametrize(
    ("file", "name", "image", "split"),
    [
        ("a.json", "1.jpg", "1.jpg", None),
        ("a.json", "x/1.jpg", "x/1.jpg", None),
        ("a.json", "1.jpg", "images/1.jpg", None),
        ("a.json", r"images\1.jpg", "images/1.jpg", None),
        ("a.json", "/data/upload/1.jpg", "images/1.jpg", None),
        ("train/_annotations.coco.json", "1.jpg", "train/1.jpg", "train"),
        ("valid/_annotations.coco.json", "1.jpg", "valid/1.jpg", "validation"),
        ("annotations/instances_val2017.json", "1.jpg", "val2017/1.jpg", "validation"),
        ("annotations/instances_val2017.json", "1.jpg", "images/val2017/1.jpg", "validation"),
        ("annotations/instances_test.json", "1.jpg", "images/1.jpg", "test"),
        ("annotations/all.json", "test/1.jpg", "images/test/1.jpg", "test"),
        ("annotations/train_test.json", "1.jpg", "images/1.jpg", None),
        ("deep/er/annotations/train.json", "1.jpg", "deep/er/images/1.jpg", "train"),
    ],
)
def test_where_an_image_and_its_split_may_be(
    tmp_path: Path, file: str, name: str, image: str, split: str | None
) -> None:
    touch(tmp_path, image)
    dump(tmp_path / file, _file([name], [(0, 1, [1, 1, 1, 1])]))
    samples = by_source(coco.read, tmp_path)
    assert samples[image].split == split
    assert coco.matches(tmp_path)


def test_two_files_with_images_of_the_same_names(tmp_path: Path) -> None:
    for number, part in enumerate(("train", "val"), start=1):
        touch(tmp_path, f"{part}2017/1.jpg")
        dump(tmp_path / f"annotations/instances_{part}2017.json", _file(["1.jpg"], [(0, number, [1, 1, 1, number])]))
    dump(tmp_path / "annotations" / "captions_train2017.json", {"images": [], "annotations": []})
    samples = by_source(coco.read, tmp_path)
    assert {(s.source, s.split, s.defect, s.boxes) for s in samples.values()} == {
        ("train2017/1.jpg", "train", "scratch", ((1, 1, 2, 2),)),
        ("val2017/1.jpg", "validation", "dent", ((1, 1, 2, 3),)),
    }


def test_polygons_of_one_annotation_belong_to_one_box(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg")
    parts = [[1, 1, 4, 1, 4, 4], [6, 6, 9, 6, 9, 9, 6.5, 9]]
    dump(tmp_path / "a.json", _file(["1.jpg"], [(0, 1, [1, 1, 8, 8])], segmentation=parts))
    (sample,) = coco.read(tmp_path)
    assert sample.boxes == ((1, 1, 9, 9),)
    assert sample.polygons == (((1, 1), (4, 1), (4, 4)), ((6, 6), (9, 6), (9, 9), (6.5, 9)))

    content = json.loads((tmp_path / "a.json").read_text())
    del content["annotations"][0]["bbox"]
    dump(tmp_path / "a.json", content)
    (sample,) = coco.read(tmp_path)
    assert sample.boxes == ((1, 1, 9, 9),)


@given(arrays.arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40))), st.booleans())
@settings(deadline=None, max_examples=60)
def test_run_lengths_are_the_mask_that_cocos_own_library_makes_them_from(
    tmp_path_factory: pytest.TempPathFactory, mask: Any, compressed: bool
) -> None:
    raw = tmp_path_factory.mktemp("rle")
    touch(raw, "1.jpg")
    height, width = mask.shape
    if compressed:
        packed = pycocotools.mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        drawn = {"size": packed["size"], "counts": packed["counts"].decode()}
    else:
        counts, value = [], False
        for pixel in mask.T.ravel().tolist():
            if not counts or pixel != value:
                counts += [0] if not counts and pixel else []
                counts.append(0)
                value = pixel
            counts[-1] += 1
        drawn = {"size": [height, width], "counts": counts}
    dump(raw / "a.json", _file(["1.jpg"], [(0, 1, [0, 0, width, height])], segmentation=drawn))
    (sample,) = coco.read(raw)
    (rle,) = sample.rles
    runs = [np.full(count, place % 2, bool) for place, count in enumerate(rle.counts)]
    assert (rle.height, rle.width) == (height, width)
    np.testing.assert_array_equal(np.concatenate(runs).reshape((height, width), order="F"), mask)


def test_everything_that_is_wrong_is_listed_in_one_error(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg", "not listed.jpg", "more/x.png", "more/y.png", "p/twice.jpg", "q/twice.jpg")
    nan, ok = float("nan"), [1, 1, 1, 1]
    content = _file(
        ["a.jpg", "b.jpg", "gone.jpg", "a.jpg", "twice.jpg", "../out.jpg"],
        [
            (0, 1, [5, 5, -2, 3]),
            (0, 1, [5, 5, 0, 3]),
            (0, 1, [nan, 5, 1, 3]),
            (0, 1, [-9, 5, 4, 3]),
            (0, 1, [1, 2, 3]),
            (9, 1, ok),
            (0, 9, ok),
            (0, 3, ok),
            (0, 1, ["1", 1, 1, 1]),
        ],
    )
    content["categories"] = [*_CATEGORIES, {"id": 3, "name": "Good"}, {"id": 1, "name": "crack"}]
    content["images"].append({"id": 1, "file_name": "b.jpg"})
    content["images"].append({"file_name": "b.jpg"})
    for drawn in (
        [[1, 1, 2, 2]],
        [[1, 1, 2, 2, 3]],
        {"size": [2, 2], "counts": [3]},
        {"size": [2, 2], "counts": "oo"},
        {"size": [2, 2], "counts": "é"},
        {"size": [2, 2], "counts": [5, -1]},
        "x",
    ):
        content["annotations"].append({"image_id": 0, "category_id": 1, "bbox": ok, "segmentation": drawn})
    content["annotations"] += [{"id": 0, "image_id": 0, "category_id": 1, "bbox": ok}, {"image_id": 0}, 7]
    dump(tmp_path / "a.json", content)
    (tmp_path / "comma.json").write_text('{"images": [],\n "annotations": [1, 2,]}')
    (tmp_path / "empty.json").touch()
    (tmp_path / "latin.json").write_bytes('{"images": []\n, "é": 1}'.encode("latin-1"))
    (tmp_path / "utf16.json").write_bytes('{"images": []}'.encode("utf-16"))  # read, and not an annotation file
    outside = "is inverted or has no area"
    nowhere = "it is neither where its path leads nor beside this file nor in its image folders"
    problem_lines = problems(coco.read, tmp_path)
    (comma,) = (line for line in problem_lines if line.startswith("comma.json: line 2, column 2"))
    assert "comma " in comma  # the rest is Python's, and differs from version to version
    assert [line for line in problem_lines if line != comma] == [
        f"a.json: category 1: another category has the same id; {_APART}",
        f"a.json: image 1: another image has the same id; {_APART}",
        "a.json: image no. 8: has no 'id'",
        f"a.json: annotation 0: the box [5, 5, 3, 8] {outside}",
        f"a.json: annotation 1: the box [5, 5, 5, 8] {outside}",
        "a.json: annotation 2: 'nan' is not a finite number",
        "a.json: annotation 3: the box [-9, 5, -5, 8] lies outside the image",
        "a.json: annotation 4: 'bbox' is [x, y, width, height], and has 3 numbers",
        "a.json: annotation 5: the image with the id 9 is missing",
        "a.json: annotation 6: the category with the id 9 is missing",
        "a.json: annotation 7: its class is 'Good', but every shape is taken for a defect; delete the shapes of this"
        " class, an image without any is normal",
        "a.json: annotation 8: '1' is text, and a number is needed; write it without quotation marks",
        "a.json: annotation no. 11: 'segmentation' is not a list of polygons [x, y, x, y, …]",
        "a.json: annotation no. 12: the run lengths sum to 3, not to 2 x 2",
        "a.json: annotation no. 13: the compressed run lengths break off",
        "a.json: annotation no. 14: the compressed run lengths are damaged",
        "a.json: annotation no. 15: run lengths and their size are whole numbers from 0",
        "a.json: annotation no. 16: 'segmentation' is not a list: 'x'",
        "a.json: annotation 0: another annotation has the same id",
        "a.json: annotation no. 18: has no 'category_id'",
        "a.json: annotation no. 19: is not a JSON object, so that it has no 'image_id'",
        f"a.json: image 2: image 'gone.jpg' is missing: {nowhere}",
        "a.json: image 3: a.jpg is listed before, in a.json; list each image once, with all of its annotations",
        f"a.json: image 4: image 'twice.jpg' is missing: {nowhere}",
        f"a.json: image 5: image '../out.jpg' is missing: {nowhere}",
        "empty.json: is empty",
        "latin.json: line 2: is not UTF-8 text; save the file with the encoding UTF-8"
        " (`iconv -t UTF-8 -f` with the encoding of the system that it comes from, such as GB18030, CP1252, CP932)",
        ".: images that are not in the annotations: not listed.jpg",
        "more: images that are not in the annotations: x.png, y.png",
        "p: images that are not in the annotations: twice.jpg",
        "q: images that are not in the annotations: twice.jpg",
    ]


def _one(raw: Path, bbox: Any, **more: Any) -> Any:
    """The sample of a data set of one image with one annotation."""
    touch(raw, "1.jpg")
    dump(raw / "a.json", _file(["1.jpg"], [(0, 1, bbox)], **more))
    (sample,) = coco.read(raw)
    return sample


def _refusal(raw: Path, bbox: Any, **more: Any) -> str:
    touch(raw, "1.jpg")
    dump(raw / "a.json", _file(["1.jpg"], [(0, 1, bbox)], **more))
    (problem,) = problems(coco.read, raw)
    assert problem.startswith("a.json: annotation 0: ")
    return problem


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (640, 480, (640, 480)),
        (640.0, "480", (640, 480)),
        (0, 0, None),
        (None, None, None),
        ("wide", 480, None),
        (-3, 480, None),
        (1e400, 480, None),
        (640.5, 480, None),
    ],
)
def test_the_size_that_the_file_states(tmp_path: Path, width: Any, height: Any, size: Any) -> None:
    touch(tmp_path, "1.jpg")
    content = _file(["1.jpg"], [])
    content["images"][0] |= {"width": width, "height": height}
    dump(tmp_path / "a.json", content)
    (sample,) = coco.read(tmp_path)
    assert sample.size == size


def test_ids_as_text_and_as_number_are_the_same(tmp_path: Path) -> None:
    """PyLabel writes the one, VIA the other."""
    touch(tmp_path, "1.jpg", "2.jpg")
    content = _file(["1.jpg", "2.jpg"], [(0, 1, [1, 1, 5, 5]), (1, 2, [2, 2, 5, 5])])
    content["annotations"][0] |= {"category_id": "1", "segmentation": None, "iscrowd": 0.0}
    content["annotations"][1] |= {"image_id": "1", "category_id": 2.0}
    dump(tmp_path / "a.json", content)
    assert [(s.defect, s.boxes) for s in coco.read(tmp_path)] == [
        ("scratch", ((1, 1, 6, 6),)),
        ("dent", ((2, 2, 7, 7),)),
    ]
    content["categories"].append({"id": "1", "name": "crack"})
    content["annotations"][0]["category_id"] = "01"
    dump(tmp_path / "a.json", content)
    assert problems(coco.read, tmp_path)[:2] == [
        f"a.json: category 1: another category has the same id; {_APART}",
        "a.json: annotation 0: the category with the id '01' is missing",
    ]


_SIDE = st.integers(4, 4000).map(lambda value: value / 4)


@given(st.tuples(_SIDE, _SIDE, _SIDE, _SIDE), st.floats(-400, 400).filter(lambda turn: turn % 360))
@settings(deadline=None, max_examples=40)
def test_a_turned_box_of_cvat(
    tmp_path_factory: pytest.TempPathFactory, sides: tuple[float, ...], rotation: float
) -> None:
    """`bbox` is that before the turn, which is clockwise about its center."""
    x, y, width, height = sides
    half = np.array([width + 1j * height, width - 1j * height, -width + 1j * height, -width - 1j * height]) / 2
    corners = complex(x + width / 2, y + height / 2) + half * np.exp(1j * np.deg2rad(rotation))
    expected = (corners.real.min(), corners.imag.min(), corners.real.max(), corners.imag.max())
    attributes = {"occluded": False, "rotation": rotation}
    raw = tmp_path_factory.mktemp("turned")
    sample = _one(raw, list(sides), segmentation=[], area=width * height, attributes=attributes)
    assert sample.boxes == (pytest.approx(expected),)
    assert sample.cut == (True,)
    outline = np.array([complex(*corner) for corner in sample.polygons[0]])
    assert (np.abs(outline[:, None] - corners).min(axis=0) < 1e-6 * (1 + np.abs(corners).max())).all()


def test_a_turned_shape_with_an_outline_is_its_outline(tmp_path: Path) -> None:
    outline = [[10, 10, 50, 10, 50, 20]]
    sample = _one(tmp_path, [5, 5, 9, 9], segmentation=outline, attributes={"rotation": 30.0})
    assert sample.boxes == ((10, 10, 50, 20),)
    sample = _one(tmp_path, [5, 5, 9, 9], attributes={"rotation": "left"})  # someone's own attribute
    assert sample.boxes == ((5, 5, 14, 14),)
    assert "its rotation is not a finite number" in _refusal(
        tmp_path, [5, 5, 9, 9], attributes={"rotation": float("inf")}
    )


def test_an_outline_past_the_edge_is_cut_off_if_the_size_is_known(tmp_path: Path) -> None:
    outline = [[-20, 10, 700, 10, 700, 50]]
    assert _one(tmp_path, [-20, 10, 720, 40], segmentation=outline).cut == (True,)
    assert _one(tmp_path, [10, 10, 720, 40]).cut == (False,)
    content = _file(["1.jpg"], [(0, 1, [-20, 10, 720, 40])], segmentation=outline)
    del content["images"][0]["width"]
    dump(tmp_path / "a.json", content)
    (sample,) = coco.read(tmp_path)
    assert sample.cut == (False,)


def _outline(x1: float, y1: float, x2: float, y2: float) -> list[list[float]]:
    return [[x1, y1, x2, y1, x2, y2, x1, y2]]


def test_a_box_that_its_outline_contradicts_is_refused(tmp_path: Path) -> None:
    outline = _outline(20, 30, 60, 50)
    assert _refusal(tmp_path, [20, 30, 60, 50], segmentation=outline) == (
        "a.json: annotation 0: 'bbox' [20, 30, 60, 50] is [x, y, width, height] in COCO, but its outline, which spans"
        " [20, 30, 60, 50], says that it is [x1, y1, x2, y2]; write all boxes as [x, y, width, height]"
    )
    assert "says that it is [center x, center y, width, height]" in _refusal(
        tmp_path, [40, 40, 40, 20], segmentation=outline
    )
    assert "says that it is [y1, x1, y2, x2]" in _refusal(tmp_path, [30, 20, 50, 60], segmentation=outline)
    assert "says that it is [y, x, height, width]" in _refusal(tmp_path, [30, 20, 20, 40], segmentation=outline)
    assert "has nothing in common with its outline" in _refusal(tmp_path, [200, 30, 60, 50], segmentation=outline)
    mask = {"size": [100, 100], "counts": [20 * 100 + 30, *[20, 80] * 39, 20, 4050]}
    mask["counts"][-1] = 100 * 100 - sum(mask["counts"][:-1])
    assert "[20, 30, 60, 50], says that it is [x1, y1, x2, y2]" in _refusal(
        tmp_path, [20, 30, 60, 50], segmentation=mask
    )
    assert _one(tmp_path, [20, 30, 40, 20], segmentation=mask).boxes == ((20, 30, 60, 50),)
    # An occluded part, a group of shapes: smaller than the box, and no other reading of it.
    assert _one(tmp_path, [10, 10, 100, 100], segmentation=outline).boxes == ((10, 10, 110, 110),)


def test_fractions_are_refused(tmp_path: Path) -> None:
    assert "not in fractions of the image" in _refusal(tmp_path, [0.1, 0.2, 0.3, 0.25])
    assert _one(tmp_path, [0, 0, 1, 1]).boxes == ((0, 0, 1, 1),)


_PLACE = st.tuples(st.integers(6, 300), st.integers(6, 300), st.integers(6, 300), st.integers(6, 300))


def _written(
    raw: Path, places: list[tuple[int, int, int, int]], kind: str, drawn: Any, corners: bool
) -> list[dict[str, Any]]:
    annotations = []
    for number, (x, y, width, height) in enumerate(places):
        area, outline = float(width * height), []
        x1, y1, x2, y2 = float(x), float(y), float(x + width), float(y + height)
        if kind == "outline":
            # With the last pixel or without, rounded either way.
            outline = _outline(*(side + drawn(st.sampled_from((-1, 0, 0.5, 1))) for side in (x1, y1, x2, y2)))
            area *= drawn(st.floats(0.05, 1))
        elif kind == "area, rounded":
            area = round(area) + drawn(st.sampled_from((-0.4, 0, 0.4)))
        elif kind == "area with the last pixel":
            area = float((width + 1) * (height + 1))
        bbox = [x1, y1, x2, y2] if corners else [x1, y1, x2 - x1, y2 - y1]
        annotation = {"id": number, "image_id": 0, "category_id": 1, "bbox": bbox, "area": area}
        annotations.append(annotation | {"segmentation": outline})
    touch(raw, "1.jpg")
    dump(raw / "a.json", _file(["1.jpg"], []) | {"annotations": annotations})
    return annotations


_KINDS = st.sampled_from(("outline", "area, rounded", "area with the last pixel"))


@given(st.lists(_PLACE, min_size=1, max_size=6, unique=True), _KINDS, st.data())
@settings(deadline=None, max_examples=60)
def test_boxes_that_agree_with_the_rest_of_the_file_are_never_refused(
    tmp_path_factory: pytest.TempPathFactory, places: list[tuple[int, int, int, int]], kind: str, data: st.DataObject
) -> None:
    raw = tmp_path_factory.mktemp("agree")
    _written(raw, places, kind, data.draw, corners=False)
    (sample,) = coco.read(raw)
    assert sorted(sample.boxes) == sorted((x, y, x + width, y + height) for x, y, width, height in places)


@given(st.lists(_PLACE, min_size=1, max_size=6, unique=True), _KINDS, st.data())
@settings(deadline=None, max_examples=60)
def test_corners_that_contradict_the_rest_of_the_file_are_always_refused(
    tmp_path_factory: pytest.TempPathFactory, places: list[tuple[int, int, int, int]], kind: str, data: st.DataObject
) -> None:
    """From 6 pixels on from the corner of the image, where the two readings differ enough to tell them apart."""
    raw = tmp_path_factory.mktemp("corners")
    _written(raw, places, kind, data.draw, corners=True)
    listed = problems(coco.read, raw)
    assert len(listed) == len(places)
    assert all("[x1, y1, x2, y2]; write all boxes" in problem for problem in listed)


def test_areas_of_masks_that_hit_those_of_corners_by_chance_are_no_contradiction(tmp_path: Path) -> None:
    places = [(10, 10, 20, 20, 300), (50, 50, 40, 40, 700), (5, 5, 25, 35, 600)]  # the last: (25 - 5) * (35 - 5)
    annotations = [
        {"id": n, "image_id": 0, "category_id": 1, "bbox": bbox, "area": area} for n, (*bbox, area) in enumerate(places)
    ]
    touch(tmp_path, "1.jpg")
    dump(tmp_path / "a.json", _file(["1.jpg"], []) | {"annotations": annotations})
    (sample,) = coco.read(tmp_path)
    assert len(sample.boxes) == 3


def test_outlines_as_one_flat_list_or_with_too_few_corners(tmp_path: Path) -> None:
    flat = _one(tmp_path, [20, 30, 40, 20], segmentation=[20, 30, 60, 30, 60, 50, 20, 50])
    assert (flat.boxes, flat.polygons) == (((20, 30, 60, 50),), (((20, 30), (60, 30), (60, 50), (20, 50)),))
    for outline in ([[1, 1, 2, 2]], [[1, 1, 2, 2], []]):
        few = _one(tmp_path, [20, 30, 40, 20], segmentation=outline)
        assert (few.boxes, few.polygons) == (((20, 30, 60, 50),), ())
        assert few.notes == ("an outline of fewer than three corners is left out; its box counts",)
    assert _one(tmp_path, [20, 30, 40, 20], segmentation=[[]]).notes == ()
    content = _file(["1.jpg"], [(0, 1, None)], segmentation=[[1, 1, 2, 2]])
    dump(tmp_path / "a.json", content)
    assert "a polygon needs 3 corners, and has 2" in problems(coco.read, tmp_path)[0]


def test_an_annotation_to_be_ignored_is_left_out(tmp_path: Path) -> None:
    sample = _one(tmp_path, [20, 30, 40, 20], ignore=1)
    assert (sample.label, sample.notes) == ("normal", ("an annotation that is marked to be ignored is left out",))
    assert _one(tmp_path, [20, 30, 40, 20], ignore=0).label == "anomalous"


def test_fiftyone(tmp_path: Path) -> None:
    touch(tmp_path, "data/1.jpg", "data/2.jpg")
    content = _file(["1.jpg", "2.jpg"], [(0, 0, [20.0, 30.0, 40.0, 20.0])], area=800.0, occluded=True)
    content["categories"] = [{"id": 0, "name": "scratch", "supercategory": None}]
    content |= {"info": {"description": "Exported from FiftyOne"}, "licenses": []}
    dump(tmp_path / "labels.json", content)
    samples = by_source(coco.read, tmp_path)
    assert samples["data/1.jpg"].boxes == ((20, 30, 60, 50),)
    assert samples["data/2.jpg"].label == "normal"


def test_an_image_that_was_deleted_is_not_one_of_another_split(tmp_path: Path) -> None:
    touch(tmp_path, "images/train/1.jpg", "images/val/2.jpg")
    dump(tmp_path / "annotations" / "instances_train.json", _file(["1.jpg", "2.jpg"], [(1, 1, [1, 1, 9, 9])]))
    listed = problems(coco.read, tmp_path)
    assert "annotations/instances_train.json: image 1: image '2.jpg' is missing" in listed[0]
    assert [isinstance(problem, MissingImage) for problem in listed] == [True, False]
    assert listed[1] == "images/val: images that are not in the annotations: 2.jpg"


@pytest.mark.parametrize(
    ("orientation", "size", "refused"), [(6, (64, 48), True), (6, (48, 64), False), (1, (64, 48), False)]
)
def test_label_studio_mixes_the_frames_of_a_photograph_on_its_side(
    tmp_path: Path, orientation: int, size: tuple[int, int], refused: bool
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", (64, 48)).save(tmp_path / "1.jpg", exif=exif)
    touch(tmp_path, "2.jpg")
    content = _file(["1.jpg", "2.jpg"], [(0, 1, [1, 1, 5, 5]), (1, 1, [1, 1, 5, 5])])
    content["images"][0] |= dict(zip(("width", "height"), size, strict=True))
    content["info"] = {"contributor": "Label Studio", "version": "1.0"}
    dump(tmp_path / "result.json", content)
    if refused:
        (problem,) = problems(coco.read, tmp_path)[:1]
        assert "1.jpg has an EXIF orientation" in problem and "export JSON instead" in problem
    else:
        assert len(list(coco.read(tmp_path))) == 2


def test_an_image_in_two_files(tmp_path: Path) -> None:
    touch(tmp_path, "images/1.jpg")
    for part in ("train", "val"):
        dump(tmp_path / f"annotations/instances_{part}.json", _file(["1.jpg"], []))
    assert problems(coco.read, tmp_path) == [
        "annotations/instances_val.json: image 0: images/1.jpg is listed before, in annotations/instances_train.json;"
        " an image belongs to one file (and so to one split), remove it from the other"
    ]


def test_no_coco_file(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    dump(tmp_path / "manifest.json", {"files": []})
    assert not coco.matches(tmp_path)
    assert problems(coco.read, tmp_path) == ["no JSON file with the lists images, annotations and categories"]


@given(
    st.dictionaries(
        st.text("abcdé ", min_size=1),
        st.lists(st.tuples(*[st.integers(0, 2**20).map(lambda n: n / 8)] * 2, *[st.integers(1, 800)] * 2), max_size=4),
        min_size=1,
        max_size=8,
    )
)
@settings(deadline=None, max_examples=40)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, drawn: dict[str, list[tuple[float, float, int, int]]]
) -> None:
    raw = tmp_path_factory.mktemp("coco")
    names = [f"{stem}.png" for stem in drawn]
    touch(raw, *(f"images/{name}" for name in names))
    boxes = [(n, 1, [x, y, w, h]) for n, its in enumerate(drawn.values()) for x, y, w, h in its]
    dump(raw / "annotations" / "a.json", _file(names, boxes))
    samples = by_source(coco.read, raw)
    assert {s.removeprefix("images/").removesuffix(".png"): list(f.boxes) for s, f in samples.items()} == {
        stem: [(x, y, x + w, y + h) for x, y, w, h in its] for stem, its in drawn.items()
    }


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(("id", "image_id", "category_id", "bbox", "segmentation", "size", "counts", "name")), inner
        )
    ),
    max_leaves=30,
)


@given(
    st.binary()
    | st.sampled_from(NASTY)
    | st.dictionaries(
        st.sampled_from(("images", "annotations", "categories")), st.lists(_JSON, max_size=4), min_size=3
    ).map(lambda content: json.dumps(content).encode())
)
@settings(deadline=None, max_examples=80)
def test_whatever_is_in_the_file_the_error_is_one_for_people(content: bytes) -> None:
    never_fails_otherwise(coco.read, {"a.json": content})


def test_a_panoptic_file_is_passed_over_beside_another_and_refused_alone(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.jpg")
    panoptic = _file(["a.jpg"], [])
    panoptic["annotations"] = [{"image_id": 0, "file_name": "a.png", "segments_info": [{"id": 1, "category_id": 1}]}]
    dump(tmp_path / "annotations/panoptic_train.json", panoptic)
    assert coco.matches(tmp_path)
    assert problems(coco.read, tmp_path) == [
        "annotations/panoptic_train.json: is a panoptic segmentation (segments_info); export instances"
    ]
    dump(tmp_path / "annotations/instances_train.json", _file(["a.jpg"], [(0, 1, [5, 5, 9, 9])]))
    assert by_source(coco.read, tmp_path)["images/a.jpg"].boxes == ((5, 5, 14, 14),)
