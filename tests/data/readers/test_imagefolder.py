import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adfm.data.problems import BadData, MissingImage
from adfm.data.readers import imagefolder, table
from tests.data.readers.drawn import NASTY, by_source, never_fails_otherwise, problems, same_place, touch


def _lines(path: Path, *rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def _objects(*boxes: list[float], categories: list[Any] | None = None) -> dict[str, Any]:
    return {"bbox": list(boxes), "categories": [0] * len(boxes) if categories is None else categories}


def test_samples(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        touch(tmp_path, f"{split}/0001.png", f"{split}/sub/0002.png")
        _lines(
            tmp_path / split / "metadata.jsonl",
            {"file_name": "0001.png", "objects": _objects([302.0, 109.0, 73.0, 52.0], [1, 2, 3, 4], categories=[0, 3])},
            {"file_name": "sub/0002.png", "objects": _objects(), "width": 640, "height": 480, "lot": 7},
        )
    assert imagefolder.matches(tmp_path)
    samples = by_source(imagefolder.read, tmp_path)
    one, two = samples["train/0001.png"], samples["train/sub/0002.png"]
    assert (one.label, one.defect) == ("anomalous", "class 0+class 3")
    assert one.boxes == ((302, 109, 375, 161), (1, 2, 4, 6))
    assert (two.label, two.boxes, two.size, two.columns) == ("normal", (), (640, 480), {"lot": "7"})
    assert [sample.split for sample in samples.values()] == ["test"] * 2 + ["train"] * 2 + ["validation"] * 2


def test_a_line_of_jsonl_ends_at_a_line_feed_alone(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "2.png")
    rows = [{"file_name": f"{number}.png", "label": "crack", "note": "two\u2028lines\x85"} for number in (1, 2)]
    content = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "metadata.jsonl").write_bytes(content.encode())
    assert [sample.defect for sample in imagefolder.read(tmp_path)] == ["crack", "crack"]


_NEW = """- name: objects
    struct:
    - name: bbox
      list:
        list: float32
        length: 4
    - name: categories
      list:
        class_label:
          names:
            '0': scratch
            '1': no
"""
_OLD = """- name: objects
    sequence:
    - name: bbox
      sequence: float32
      length: 4
    - name: categories
      dtype:
        class_label:
          names:
            0: scratch
            1: no
"""


@pytest.mark.parametrize("features", [_NEW, _OLD])
def test_the_names_of_the_classes_are_in_the_readme(tmp_path: Path, features: str) -> None:
    touch(tmp_path, "train/1.png")
    (tmp_path / "README.md").write_text(
        f"---\nlicense: mit\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  {features}---\n# Parts\n"
    )
    _lines(tmp_path / "train/metadata.jsonl", {"file_name": "1.png", "objects": _objects([1, 2, 3, 4], categories=[1])})
    assert by_source(imagefolder.read, tmp_path)["train/1.png"].defect == "no"
    _lines(tmp_path / "train/metadata.jsonl", {"file_name": "1.png", "objects": _objects([1, 2, 3, 4], categories=[2])})
    assert problems(imagefolder.read, tmp_path) == [
        "train/metadata.jsonl: line 1: the class 2 has no name in README.md; there are 0, 1"
    ]


@pytest.mark.parametrize(
    "objects",
    [
        {"bbox": [[1, 2, 3, 4]], "category": ["dent"]},
        {"id": [5], "area": [12], "bbox": [[1, 2, 3, 4]], "labels": ["dent"]},
        [{"bbox": [1, 2, 3, 4], "category": "dent"}],
    ],
)
def test_the_forms_of_objects(tmp_path: Path, objects: Any) -> None:
    touch(tmp_path, "1.png")
    _lines(tmp_path / "metadata.jsonl", {"file_name": "1.png", "objects": objects})
    sample = by_source(imagefolder.read, tmp_path)["1.png"]
    assert (sample.defect, sample.boxes) == ("dent", ((1, 2, 4, 6),))


def test_labels_of_images(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{number}.png" for number in range(6)), "masks/5.png")
    (tmp_path / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: label\n    dtype:\n      class_label:\n        names:\n"
        "          '0': bad\n          '1': good\n---\n"
    )
    _lines(
        tmp_path / "metadata.jsonl",
        {"file_name": "0.png", "label": 0},
        {"file_name": "1.png", "label": 1},
        {"file_name": "2.png", "label": "OK", "text": "a part"},
        {"file_name": "3.png", "label": "scratch"},
        {"file_name": "4.png", "text": "NG"},
        {"file_name": "5.png", "label": "hole", "mask_file_name": "masks/5.png"},
    )
    samples = list(by_source(imagefolder.read, tmp_path).values())
    assert [sample.defect for sample in samples] == ["defect", None, None, "scratch", "defect", "hole"]
    assert [sample.label for sample in samples] == ["anomalous", "normal", "normal"] + ["anomalous"] * 3
    assert [sample.located for sample in samples] == [False, True, True, False, False, True]
    assert samples[5].masks == (tmp_path / "masks/5.png",)
    assert samples[2].columns == {"text": "a part"}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_metadata_in_a_table(tmp_path: Path, kind: str) -> None:
    touch(tmp_path, "1.png", "2.png", "3.png")
    drawn = _objects([1, 2, 3, 4], categories=["dent"])
    if kind == "csv":
        buffer = io.StringIO()
        rows = (
            ("file_name", "label", "objects"),
            ("1.png", "", json.dumps(drawn)),
            ("2.png", "good", ""),
            ("3.png", "ng", ""),
        )
        csv.writer(buffer).writerows(rows)
        (tmp_path / "metadata.csv").write_text(buffer.getvalue())
    else:
        columns = {
            "file_name": ["1.png", "2.png", "3.png"],
            "label": [None, "good", "ng"],
            "objects": [drawn, None, None],
        }
        pq.write_table(pa.table(columns), tmp_path / "metadata.parquet")
    assert imagefolder.matches(tmp_path) and not table.matches(tmp_path)
    one, two, three = by_source(imagefolder.read, tmp_path).values()
    assert (one.boxes, one.defect) == (((1, 2, 4, 6),), "dent")
    assert (two.label, three.label, three.located) == ("normal", "anomalous", False)


def test_everything_that_is_wrong_is_listed_in_one_error(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{number}.png" for number in range(9)), "more/x.png")
    rows = [
        {"file_name": "gone.png", "label": "ok"},
        {"file_name": "../1.png", "label": "ok"},
        {"label": "ok"},
        {"file_name": "0.png"},
        {"file_name": "1.png", "label": 0},
        {"file_name": "2.png", "label": True},
        {"file_name": "3.png", "label": "good", "objects": _objects([1, 2, 3, 4])},
        {"file_name": "4.png", "objects": _objects([1, 2, 3, -4])},
        {"file_name": "5.png", "objects": {"bbox": [[1, 2, 3, 4]], "categories": []}},
        {"file_name": "6.png", "objects": _objects([1, 2, 3])},
        {"file_name": "7.png", "label": "ng", "bbox": [[1, 2, 3, 4]]},
        {"file_name": "8.png", "label": "ok", "split": "later"},
        {"file_name": "0.png", "label": "ok"},
    ]
    _lines(tmp_path / "metadata.jsonl", *rows)
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write("{'file_name': 1}\n[]\n")
    listed = problems(imagefolder.read, tmp_path)
    assert [line.removeprefix("metadata.jsonl: line ") for line in listed] == [
        "1: image 'gone.png' is missing",
        "2: image '../1.png' is missing",
        "3: None is not the name of a file; write one in 'file_name'",
        "4: has neither 'objects' nor a 'label'; a normal image has the label `normal`, or empty lists",
        "5: the label 0 is a number without a name; write names, or dataset_info in README.md",
        "6: 'True' is neither a name nor a number of a class",
        "7: the label is 'good', but defects are marked on the image",
        "8: the box [1, 2, 4, -2] is inverted or has no area",
        "9: 'objects' has 1 boxes, but not as many categories",
        "10: the box [1, 2, 3] is not [x, y, width, height]",
        "11: 'bbox' may say where the defects are; write them in 'objects'",
        "12: the split 'later' is not train, validation or test",
        "13: 0.png is listed before, in metadata.jsonl: line 4; keep one of the rows",
        "14: is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
        "15: is not a JSON object",
        "more: images that are not in the annotations: x.png",
    ]
    assert [isinstance(line, MissingImage) for line in listed] == [True, True] + [False] * 14


def test_a_table_of_boxes_by_that_name_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "1.png")
    (tmp_path / "metadata.csv").write_text("file_name,label,xmin,ymin,xmax,ymax\n1.png,ng,1,2,3,4\n")
    assert problems(imagefolder.read, tmp_path) == [
        "metadata.csv: the columns xmax, xmin, ymax, ymin are not of this layout; rename the file to read it as layout"
        " csv"
    ]


_side = st.floats(0, 4000, allow_nan=False)


@given(st.lists(st.tuples(_side, _side, st.floats(1, 900), st.floats(1, 900)), max_size=4, unique_by=same_place))
@settings(deadline=None, max_examples=40)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, boxes: list[tuple[float, float, float, float]]
) -> None:
    raw = tmp_path_factory.mktemp("imagefolder")
    touch(raw, "1.png")
    _lines(raw / "metadata.jsonl", {"file_name": "1.png", "objects": _objects(*map(list, boxes))})
    assert by_source(imagefolder.read, raw)["1.png"].boxes == tuple((x, y, x + w, y + h) for x, y, w, h in boxes)


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.sampled_from(["bbox", "categories"]), inside),
    max_leaves=12,
)


@given(
    st.dictionaries(
        st.sampled_from(["objects", "label", "text", "split", "width", "height", "mask_file_name", "x"]), _json
    )
)
@settings(deadline=None, max_examples=200)
def test_whatever_a_row_holds_it_is_read_or_refused_with_its_line(
    tmp_path_factory: pytest.TempPathFactory, row: dict[str, Any]
) -> None:
    raw = tmp_path_factory.mktemp("imagefolder")
    touch(raw, "1.png")
    _lines(raw / "metadata.jsonl", {"file_name": "1.png"} | row)
    try:
        list(imagefolder.read(raw))
    except BadData as error:
        assert error.problems[0].startswith("metadata.jsonl: line 1: ")


@given(
    st.binary() | st.sampled_from(NASTY),
    st.sampled_from(["metadata.jsonl", "metadata.csv", "metadata.parquet", "README.md"]),
)
@settings(deadline=None, max_examples=100)
def test_whatever_is_in_the_file_the_error_is_one_for_people(content: bytes, name: str) -> None:
    row = b'{"file_name": "a.jpg", "label": "ok"}'
    never_fails_otherwise(imagefolder.read, {"metadata.jsonl": row, name: content})
