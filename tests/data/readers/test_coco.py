import json
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from adfm.data.readers import coco
from tests.data.readers.drawn import NASTY, by_source, dump, never_fails_otherwise, problems, touch

_CATEGORIES = [{"id": 1, "name": "scratch"}, {"id": 2, "name": "dent"}]


def _file(names: list[str], boxes: list[tuple[int, int, list[Any]]], **more: Any) -> dict[str, Any]:
    """A COCO file with one image a name, and annotations (image, category, bbox)."""
    return {
        "images": [{"id": n, "file_name": name, "width": 640, "height": 480} for n, name in enumerate(names)],
        "annotations": [
            {"id": n, "image_id": image, "category_id": category, "bbox": bbox, "iscrowd": 0, **more}
            for n, (image, category, bbox) in enumerate(boxes)
        ],
        "categories": _CATEGORIES,
    }


def test_samples(tmp_path: Path) -> None:
    raw = tmp_path / "line 1"
    touch(raw, "images/a.jpg", "images/b.PNG", "images/c.jpg")
    boxes = [(0, 2, [10, 20, 30.5, 40]), (0, 1, [0, 0, 1, 1]), (0, 2, [5, 5, 5, 5]), (2, 2, [1, 2, 3, 4])]
    dump(raw / "annotations" / "instances.json", _file(["a.jpg", "b.PNG", "c.jpg"], boxes))
    assert coco.matches(raw)
    found = by_source(coco.read, raw)
    a, b, c = (found[f"images/{name}"] for name in ("a.jpg", "b.PNG", "c.jpg"))
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
    found = by_source(coco.read, tmp_path)
    assert found[image].split == split
    assert coco.matches(tmp_path)


def test_two_files_with_images_of_the_same_names(tmp_path: Path) -> None:
    for number, part in enumerate(("train", "val"), start=1):
        touch(tmp_path, f"{part}2017/1.jpg")
        dump(tmp_path / f"annotations/instances_{part}2017.json", _file(["1.jpg"], [(0, number, [1, 1, 1, number])]))
    dump(tmp_path / "annotations" / "captions_train2017.json", {"images": [], "annotations": []})
    found = by_source(coco.read, tmp_path)
    assert {(s.source, s.split, s.defect, s.boxes) for s in found.values()} == {
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
    dump(raw / "a.json", _file(["1.jpg"], [(0, 1, [0, 0, 1, 1])], segmentation=drawn))
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
    nowhere = "neither where its path leads nor beside this file nor in a folder of images that belongs to it"
    found = problems(coco.read, tmp_path)
    (comma,) = (line for line in found if line.startswith("comma.json: line 2, column 2"))
    assert "comma " in comma  # the rest is Python's, and differs from version to version
    assert [line for line in found if line != comma] == [
        "a.json: category 1: another category has the same id",
        "a.json: image 1: another image has the same id",
        "a.json: image no. 8: has no 'id'",
        f"a.json: annotation 0: the box [5, 5, 3, 8] {outside}",
        f"a.json: annotation 1: the box [5, 5, 5, 8] {outside}",
        "a.json: annotation 2: 'nan' is no finite number",
        "a.json: annotation 3: the box [-9, 5, -5, 8] lies outside the image",
        "a.json: annotation 4: 'bbox' is [x, y, width, height], and has 3 numbers",
        "a.json: annotation 5: there is no image with the id 9",
        "a.json: annotation 6: there is no category with the id 9",
        "a.json: annotation 7: its class is 'Good', but every shape is taken for a defect; delete the shapes of this"
        " class, an image without any is normal",
        "a.json: annotation 8: '1' is no finite number",
        "a.json: annotation no. 10: a polygon needs 3 corners, and has 2",
        "a.json: annotation no. 11: 'segmentation' is no list of polygons [x, y, x, y, …]",
        "a.json: annotation no. 12: the run lengths sum to 3, not to 2 x 2",
        "a.json: annotation no. 13: the compressed run lengths break off",
        "a.json: annotation no. 14: the compressed run lengths are damaged",
        "a.json: annotation no. 15: run lengths and their size are whole numbers from 0",
        "a.json: annotation no. 16: 'segmentation' is no list: 'x'",
        "a.json: annotation 0: another annotation has the same id",
        "a.json: annotation no. 18: has no 'category_id'",
        "a.json: annotation no. 19: is no JSON object, so that it has no 'image_id'",
        f"a.json: image 2: there is no image 'gone.jpg', {nowhere}",
        "a.json: image 3: a.jpg is listed before, in a.json",
        f"a.json: image 4: there is no image 'twice.jpg', {nowhere}",
        f"a.json: image 5: there is no image '../out.jpg', {nowhere}",
        "empty.json: is empty",
        "latin.json: line 2: is not UTF-8 text; save the file with the encoding UTF-8"
        " (`iconv -t UTF-8 -f` with the encoding of the system that it comes from, such as GB18030, CP1252, CP932)",
        ".: images that are not in the annotations: not listed.jpg",
        "more: images that are not in the annotations: x.png, y.png",
        "p: images that are not in the annotations: twice.jpg",
        "q: images that are not in the annotations: twice.jpg",
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
    found = by_source(coco.read, raw)
    assert {s.removeprefix("images/").removesuffix(".png"): list(f.boxes) for s, f in found.items()} == {
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
