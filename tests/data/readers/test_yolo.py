import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adfm.data.problems import BadData, MissingImage
from adfm.data.readers import yolo
from tests.data.readers.drawn import NASTY, by_source, never_fails_otherwise, problems, touch


def _write(raw: Path, **files: str) -> None:
    for name, content in files.items():
        path = raw / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def test_samples(tmp_path: Path) -> None:
    raw = tmp_path / "line"
    touch(raw, *(f"images/train/{name}.jpg" for name in "abcd"), "images/val/a.png", "images/test/e.png")
    _write(
        raw,
        **{
            "data.yaml": "path: .\ntrain: images/train\nval: images/val\nnames:\n  0: scratch\n  1: dent\n",
            "labels/train/a.txt": "1 0.5 0.5 0.25 0.5\n0 0.25 0.25 0.5 0.5\n\n1 0.75 0.75 0.125 0.125\n",
            "labels/train/b.txt": "",
            "labels/train/d.txt": "0 0.1 0.2 0.5 0.2 0.5 0.9\n",
            "labels/val/a.txt": "0 0.5 0.5 1 1",
        },
    )
    assert yolo.matches(raw)
    samples = by_source(yolo.read, raw)
    a, b, c, d = (samples[f"images/train/{name}.jpg"] for name in "abcd")
    assert (a.label, a.defect, a.category, a.dataset) == ("anomalous", "dent+scratch", "line", "line")
    assert a.boxes == ((0.375, 0.25, 0.625, 0.75), (0, 0, 0.5, 0.5), (0.6875, 0.6875, 0.8125, 0.8125))
    assert (b.label, b.boxes, c.label, c.boxes) == ("normal", (), "normal", ())
    assert d.polygons == (((0.1, 0.2), (0.5, 0.2), (0.5, 0.9)),)
    assert d.boxes == ((0.1, 0.2, 0.5, 0.9),)
    assert all(sample.normalized for sample in samples.values())
    assert samples["images/val/a.png"].boxes == ((0, 0, 1, 1),)
    assert (a.split, samples["images/val/a.png"].split, samples["images/test/e.png"].split) == (
        "train",
        "validation",
        "test",
    )


@pytest.mark.parametrize(
    ("image", "label", "split"),
    [
        ("a.jpg", "a.txt", None),
        ("a.jpg", "labels/a.txt", None),
        ("images/a.jpg", "labels/a.txt", None),
        ("images/a.jpg", "images/a.txt", None),
        ("obj_train_data/a.jpg", "obj_train_data/a.txt", "train"),
        ("valid/images/a.jpg", "valid/labels/a.txt", "validation"),
        ("images/test/x/a.jpg", "labels/test/x/a.txt", "test"),
        ("train/a.jpg", "train/labels/a.txt", "train"),
        ("Images/Train/a.JPG", "Labels/Train/a.txt", "train"),
    ],
)
def test_where_the_text_file_of_an_image_may_be(tmp_path: Path, image: str, label: str, split: str | None) -> None:
    touch(tmp_path, image)
    _write(tmp_path, **{label: "3 0.5 0.5 0.5 0.5\n", "README.roboflow.txt": "exported with care\n"})
    samples = by_source(yolo.read, tmp_path)
    assert (samples[image].defect, samples[image].boxes, samples[image].split) == (
        "class 3",
        ((0.25, 0.25, 0.75, 0.75),),
        split,
    )


def test_images_in_folders_of_a_split_are_seen(tmp_path: Path) -> None:
    _write(tmp_path, **{"data.yaml": "train: images/train\nnames: [a]\n"})
    assert not yolo.matches(tmp_path)
    touch(tmp_path, "images/train/gear/1.jpg")
    assert yolo.matches(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("data.yaml", "names: [a, b]\nnc: 2\n"),
        ("dataset.yml", "train: ../train/images\nval: /home/me/val\nnames: {0: a, '1': b}\n"),
        ("classes.txt", "a\nb\n"),
        ("labels/classes.txt", "a\r\nb\r\n"),
        ("obj.names", "a\nb\n\n"),
        ("data/voc.names", "a\nb\n"),
        ("labels/_darknet.labels", "a\nb\n"),
        ("Classes.txt", "a\nb\n"),
        ("labels/CLASSES.TXT", "a\nb\n"),
        ("OBJ.Names", "a\nb\n"),
    ],
)
def test_where_the_names_of_the_classes_may_be(tmp_path: Path, file: str, content: str) -> None:
    touch(tmp_path, "images/1.jpg")
    _write(tmp_path, **{"labels/1.txt": "1 0.5 0.5 0.5 0.5", file: content})
    assert by_source(yolo.read, tmp_path)["images/1.jpg"].defect == "b"


@pytest.mark.parametrize("name", ["no", "off", "y", "null", "1.0", "2024-01-01", "0x1f", "~"])
def test_names_that_yaml_takes_for_something_else_stay_as_they_are_written(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "1.jpg")
    _write(tmp_path, **{"1.txt": "0 0.5 0.5 0.5 0.5", "data.yaml": f"names:\n  - {name}\n"})
    assert by_source(yolo.read, tmp_path)["1.jpg"].defect == name


@pytest.mark.parametrize("number", ["1", "1.0", "1.000000000000000000e+00", "01"])
def test_a_class_may_be_written_as_numpy_does(tmp_path: Path, number: str) -> None:
    touch(tmp_path, "1.jpg")
    _write(tmp_path, **{"1.txt": f"{number} 5.0e-01 0.5 2.5e-01 0.5\n", "classes.txt": "a\nb\n"})
    assert yolo.matches(tmp_path)
    sample = by_source(yolo.read, tmp_path)["1.jpg"]
    assert (sample.defect, sample.boxes) == ("b", ((0.375, 0.25, 0.625, 0.75),))


def test_boxes_that_reach_out_a_little_and_turned_ones_are_cut_at_the_edge(tmp_path: Path) -> None:
    touch(tmp_path, "images/1.jpg")
    lines = [
        "0 0.5 0.5 0.5 0.5",
        "0 0.9 0.5 0.205 0.5",
        "0 1.0001 0.9 0.99 1.0 0.9 0.99 0.89 0.9",
        "0 -0.3 0.5 0.1 -0.2 0.5 0.1 0.2 0.6",
        "0 0.5 0.5 0.6 0.5 1.003 0.7",
    ]
    _write(tmp_path, **{"labels/1.txt": "\n".join(lines)})
    sample = by_source(yolo.read, tmp_path)["images/1.jpg"]
    assert sample.boxes[3] == (-0.3, -0.2, 0.5, 0.6)
    assert sample.cut == (False, True, True, True, True)
    _write(tmp_path, **{"labels/1.txt": "0 0.9 0.5 0.25 0.5\n0 0.5 0.5 0.6 0.5 1.3 0.7\n0 9 9 8 9 8 8 9 8\n"})
    assert problems(yolo.read, tmp_path) == [
        "labels/1.txt: line 1: the box [0.775, 0.25, 1.025, 0.75] reaches out of the image; draw it again",
        "labels/1.txt: line 2: 1.3 is not a fraction of the image; write positions and sizes from 0 to 1, not pixels",
        "labels/1.txt: line 3: 9 is not a fraction of the image; write positions and sizes from 0 to 1, not pixels",
    ]


def test_a_name_is_the_same_in_both_forms_of_unicode(tmp_path: Path) -> None:
    touch(tmp_path, unicodedata.normalize("NFD", "images/größe.jpg"))
    _write(tmp_path, **{unicodedata.normalize("NFC", "labels/größe.txt"): "0 0.5 0.5 0.5 0.5"})
    assert [sample.label for sample in yolo.read(tmp_path)] == ["anomalous"]


def test_the_same_line_twice_counts_once_and_is_noted(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "2.jpg")
    _write(
        tmp_path, **{"1.txt": "0 0.5 0.5 0.5 0.5\n0 0.50 0.5 0.5 0.5\n1 0.5 0.5 0.5 0.5\n", "2.txt": "0 .5 .5 .5 .5"}
    )
    one, two = by_source(yolo.read, tmp_path).values()
    assert (len(one.boxes), len(one.notes), one.defect, two.notes) == (2, 1, "class 0+class 1", ())


def test_an_annotation_without_its_image_is_a_problem_that_may_be_skipped(tmp_path: Path) -> None:
    touch(tmp_path, "images/1.jpg")
    _write(
        tmp_path,
        **{
            "labels/1.txt": "0 0.5 0.5 0.5 0.5",
            "labels/2.txt": "0 0.5 0.5 0.5 0.5",
            "labels/classes.txt": "a",
            "data.yaml": "train: train.txt\nnames: [a]",
            "train.txt": "./images/1.jpg\n/home/me/set/images/1.jpg\nimages/3.jpg\n../../etc/passwd\n",
        },
    )
    listed = problems(yolo.read, tmp_path)
    assert listed == [
        "train.txt: line 3: image 'images/3.jpg' is missing",
        "train.txt: line 4: image '../../etc/passwd' is missing",
        "labels/2.txt: its image 2.* is missing",
    ]
    assert all(isinstance(problem, MissingImage) for problem in listed)


@pytest.mark.parametrize(
    ("places", "splits"),
    [
        ("train: images/train\nval: images/val\ntest: images/val", ["train", "test"]),
        ("train: images/train\nval: images/train", [None, "validation"]),
        ("train: images\nval: images\ntest: images/val", [None, "test"]),
        ("train: images\nval: images/val", ["train", "validation"]),
        ("train: images/train\nval: images", ["train", "validation"]),
        ("train: a.txt\nval: b.txt", [None, "validation"]),
        ("train: /home/me/set/images/train\nval: ../images/val", ["train", "validation"]),
        ("train: /home/me/train/images\nval:\ntest: null", ["train", "validation"]),  # not images/, which is both
        ("train: ~\nval: C:\\\\sets\\\\images\\\\train", ["validation", "validation"]),
    ],
)
def test_images_in_two_splits_are_said_and_never_both_trained_on_and_measured_on(
    tmp_path: Path, places: str, splits: list[str | None]
) -> None:
    touch(tmp_path, "images/train/1.jpg", "images/val/2.jpg")
    _write(
        tmp_path,
        **{
            "labels/train/1.txt": "0 0.5 0.5 0.5 0.5",
            "a.txt": "images/train/1.jpg",
            "b.txt": "images/val/2.jpg\nimages/train/1.jpg\n",
            "data.yaml": f"{places}\nnames: [a]",
        },
    )
    samples = by_source(yolo.read, tmp_path)
    assert [sample.split for sample in samples.values()] == splits
    plain = ("home" in places and "../" in places) or "sets" in places
    assert any(sample.notes for sample in samples.values()) != plain


def test_splits_of_the_yaml_file(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "b/2.jpg", "c/3.jpg", "d/train/4.jpg", "e/5.jpg")
    _write(
        tmp_path,
        **{
            "data.yaml": "train: [./a, ../c]\nval: ['b', c]\ntest: lists/test.txt\nnames: [x]",
            "lists/test.txt": "./e/5.jpg\n\n",
            "a/1.txt": "0 0.5 0.5 0.5 0.5",
        },
    )
    splits = {source: sample.split for source, sample in by_source(yolo.read, tmp_path).items()}
    assert splits == {
        "a/1.jpg": "train",
        "b/2.jpg": "validation",
        "c/3.jpg": None,  # in two of them
        "d/train/4.jpg": "train",
        "e/5.jpg": "test",
    }


def test_everything_that_is_wrong_is_listed_in_one_error(tmp_path: Path) -> None:
    touch(tmp_path, *(f"images/{name}" for name in ("a.jpg", "b.jpg", "c.jpg", "same.jpg", "same.png", "two.jpg")))
    lines = [
        "0 0.5 0.5 0.1 0.1 0.93",
        "0 0.5 0.5 0.1",
        "0 0.5 0.5 0.1 0.1 0.2 0.2 0.3",
        "0 0.5 0.5 0.1 0.1 0.2",
        "0 312 200 50 60",
        "0 nan 0.5 0.1 0.1",
        "0 0.5 0.5 -0.1 0.1",
        "0 0.5 0.5 0 0.1",
        "0 1.01 0.5 0.01 0.1",
        "7 0.5 0.5 0.1 0.1",
        "1.5 0.5 0.5 0.1 0.1",
        "2 0.5 0.5 0.1 0.1",
        "0 half 0.5 0.1 0.1",
        "0 0.5 0.5 0.1 0.1",
    ]
    _write(
        tmp_path,
        **{
            "data.yaml": "names: [scratch, dent, ok]",
            "labels/a.txt": "\n".join(lines),
            "labels/same.txt": "",
            "labels/two.txt": "",
            "images/two.txt": "",
            "labels/gone.txt": "",
            "elsewhere/1.txt": "0 0.5 0.5 0.1 0.1",
        },
    )
    (tmp_path / "labels/b.txt").write_bytes("0 0.5 0.5 0.1 0.1 é\n".encode("latin-1"))
    (tmp_path / "labels/c.txt").write_text(" \n")
    confidence = "has 6 numbers: the last is a confidence, and predictions are not labels"
    assert problems(yolo.read, tmp_path) == [
        "elsewhere/1.txt: its image 1.* is missing",
        f"labels/a.txt: line 1: {confidence}",
        "labels/a.txt: line 2: is neither class, cx, cy, width, height nor class and points: has 4 numbers",
        "labels/a.txt: line 3: is neither class, cx, cy, width, height nor class and points: has 8 numbers",
        f"labels/a.txt: line 4: {confidence}",
        "labels/a.txt: line 5: 312 is not a fraction of the image; write positions and sizes from 0 to 1, not pixels",
        "labels/a.txt: line 6: a position or size is 'nan', which is not a finite number",
        "labels/a.txt: line 7: its width or height is -0.1: the box was drawn upwards or to the left, and where it is"
        " depends on the tool; draw it again",
        "labels/a.txt: line 8: the box [0.5, 0.45, 0.5, 0.55] is inverted or has no area",
        "labels/a.txt: line 9: the box [1.005, 0.45, 1.015, 0.55] lies outside the image",
        "labels/a.txt: line 10: the class 7 has no name; there are 0, 1, 2",
        "labels/a.txt: line 11: the class '1.5' is not a whole number from 0",
        "labels/a.txt: line 12: its class is 'ok', but every shape is taken for a defect; delete the shapes of this"
        " class, an image without any is normal",
        "labels/a.txt: line 13: a position or size is 'half', which is not a finite number",
        "labels/b.txt: line 1: is not UTF-8 text; save the file with the encoding UTF-8"
        " (`iconv -t UTF-8 -f` with the encoding of the system that it comes from, such as GB18030, CP1252, CP932)",
        "images/same.jpg: has the same name as images/same.png",
        "images/two.txt: has the same name as labels/two.txt",
        "labels/gone.txt: its image gone.* is missing",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("names: [a\n", "data.yaml: while parsing a flow sequence"),
        ("names: a", "data.yaml: 'names' is neither a list of names nor names under their numbers"),
        ("names: {a: 0}", "data.yaml: 'names' is neither a list of names nor names under their numbers"),
        ("names: [a]\nkpt_shape: [17, 3]", "data.yaml: kpt_shape says that the labels are points of a pose"),
        ("names: [[a]]", "data.yaml: 'names' is neither a list of names nor names under their numbers"),
        ("nc: 2\nnames: [a]", "data.yaml: 'nc' is 2, but there are 1 names; correct one of them"),
        ("names:\n  0: a\n  0: b\n", "data.yaml: line 2: the key '0' is there more than once"),
        ("", "data.yaml: is empty"),
    ],
)
def test_a_bad_yaml_file(tmp_path: Path, content: str, message: str) -> None:
    touch(tmp_path, "1.jpg")
    _write(tmp_path, **{"data.yaml": content, "1.txt": "0 0.5 0.5 0.5 0.5"})
    assert problems(yolo.read, tmp_path)[0].startswith(message)


def test_two_lists_of_names(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg")
    _write(tmp_path, **{"data.yaml": "names: [a]", "old/data.yaml": "names: [b]", "1.txt": "0 0.5 0.5 0.5 0.5"})
    assert problems(yolo.read, tmp_path) == ["data.yaml, old/data.yaml: name the classes differently; keep one of them"]


def test_lists_of_names_that_do_not_contradict_each_other_complete_each_other(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg")
    _write(tmp_path, **{"train/_darknet.labels": "a\n", "valid/_darknet.labels": "a\nb\n", "1.txt": "1 .5 .5 .1 .1"})
    assert by_source(yolo.read, tmp_path)["1.jpg"].defect == "b"
    _write(tmp_path, **{"data.yaml": "names: [b, a]"})
    assert problems(yolo.read, tmp_path) == [
        "data.yaml, train/_darknet.labels, valid/_darknet.labels: name the classes differently; keep one of them"
    ]


def test_a_data_set_without_any_label_is_not_taken_for_normal(tmp_path: Path) -> None:
    touch(tmp_path, "images/1.jpg", "images/2.jpg")
    _write(tmp_path, **{"data.yaml": "names: [a]", "labels/1.txt": ""})
    assert problems(yolo.read, tmp_path) == [
        "no image has a text file with a defect, beside it or in labels/ instead of images/"
    ]


_grid = st.integers(0, 1000)


@given(
    st.lists(
        st.tuples(_grid, _grid, _grid, _grid).filter(lambda c: c[0] != c[1] and c[2] != c[3]),
        max_size=5,
        unique_by=lambda c: (*sorted(c[:2]), *sorted(c[2:])),
    )
)
@settings(deadline=None, max_examples=40)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, corners: list[tuple[int, int, int, int]]
) -> None:
    raw = tmp_path_factory.mktemp("yolo")
    touch(raw, "images/1.jpg", "images/2.jpg")
    boxes = [(min(a, b), min(c, d), max(a, b), max(c, d)) for a, b, c, d in corners]
    lines = [
        f"0 {(x1 + x2) / 2000} {(y1 + y2) / 2000} {(x2 - x1) / 1000} {(y2 - y1) / 1000}" for x1, y1, x2, y2 in boxes
    ]
    _write(raw, **{"labels/1.txt": "\n".join(lines), "labels/2.txt": "0 0.5 0.5 0.5 0.5"})
    read = by_source(yolo.read, raw)["images/1.jpg"].boxes
    assert [side * 1000 for box in read for side in box] == pytest.approx([side for box in boxes for side in box])


_word = st.text("0123456789.-+e", max_size=6) | st.floats().map(repr) | st.integers(-1, 3).map(str)


@given(st.lists(_word | st.sampled_from(["0.5", "1.01", "1e999", "٣", "nan", "0x1"]), min_size=1, max_size=12))
@settings(deadline=None, max_examples=200)
def test_a_line_is_read_exactly_or_refused(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> None:
    raw = tmp_path_factory.mktemp("yolo")
    touch(raw, "images/1.jpg", "images/2.jpg")
    _write(raw, **{"labels/1.txt": " ".join(words), "labels/2.txt": "0 0.5 0.5 0.5 0.5"})
    try:
        sample = by_source(yolo.read, raw)["images/1.jpg"]
    except BadData as error:
        assert error.problems[0].startswith("labels/1.txt: line 1: ")
        return
    if not any(word.strip() for word in words):
        assert sample.label == "normal"
        return
    words = " ".join(words).split()
    number, *values = map(float, words)
    assert sample.defect == f"class {number:.0f}"
    if len(values) == 4:
        cx, cy, width, height = values
        expected = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
    else:
        expected = (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
    assert sample.boxes == (expected,)


@given(
    st.binary()
    | st.sampled_from(NASTY)
    | st.lists(st.lists(st.floats() | st.integers(-1, 3), min_size=4, max_size=8), max_size=3).map(
        lambda lines: "\n".join(" ".join(map(str, line)) for line in lines).encode()
    ),
    st.sampled_from(["a.txt", "b.txt", "data.yaml", "classes.txt", "_darknet.labels"]),
)
@settings(deadline=None, max_examples=100)
def test_whatever_is_in_the_file_the_error_is_one_for_people(content: bytes, name: str) -> None:
    never_fails_otherwise(yolo.read, {"a.txt": b"0 0.5 0.5 0.5 0.5", name: content})


def test_labels_may_lie_deep(tmp_path: Path) -> None:
    touch(tmp_path, "images/train/gear/cam1/a.jpg")
    _write(tmp_path, **{"labels/train/gear/cam1/a.txt": "0 0.5 0.5 0.25 0.5\n"})
    assert yolo.matches(tmp_path)
    (sample,) = by_source(yolo.read, tmp_path).values()
    assert (sample.boxes, sample.split) == (((0.375, 0.25, 0.625, 0.75),), "train")
