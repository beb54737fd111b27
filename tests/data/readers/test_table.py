import csv
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adfm.data.readers import table
from tests.data.readers.drawn import NASTY, by_source, never_fails_otherwise, problems, touch

_HEADER = "image,label,defect,x1,y1,x2,y2\n"


def test_samples(tmp_path: Path) -> None:
    raw = tmp_path / "line"
    touch(raw, "a.jpg", "images/b.png", "sub/c d.jpg", "e.jpg")
    (raw / "parts.csv").write_text(
        _HEADER + "a.jpg,anomalous,dent,1,2,3.5,4\n"
        "b.png,normal,,,,,\n"
        "sub\\c d.jpg,NG,,10,20,30,40\n"
        "a.jpg,anomalous,crack,5,5,6,6\n"
        "e.jpg,OK,good,,,,\n\n"
    )
    assert table.matches(raw)
    found = by_source(table.read, raw)
    a, b, c, e = (found[name] for name in ("a.jpg", "images/b.png", "sub/c d.jpg", "e.jpg"))
    assert (a.label, a.defect, a.dataset, a.category) == ("anomalous", "crack+dent", "line", "line")
    assert a.boxes == ((1, 2, 3.5, 4), (5, 5, 6, 6))
    assert (b.label, b.defect, b.boxes) == (e.label, e.defect, e.boxes) == ("normal", None, ())
    assert (c.label, c.defect, c.boxes, c.split, c.normalized) == (
        "anomalous",
        "defect",
        ((10, 20, 30, 40),),
        None,
        False,
    )


def test_categories_splits_and_masks(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "2.jpg", "3.jpg", "masks/1.png", "masks/1 b.png")
    (tmp_path / "t.csv").write_text(
        "split,mask,category,label,image\n"
        "train,masks/1.png,bolt,1,1.jpg\n"
        "train,masks/1 b.png,bolt,1,1.jpg\n"
        "Val,,nut,0,2.jpg\n"
        ",,,0,3.jpg\n"
    )
    found = by_source(table.read, tmp_path)
    one = found["1.jpg"]
    assert (one.label, one.defect, one.category, one.split, one.boxes) == ("anomalous", "defect", "bolt", "train", ())
    assert one.masks == (tmp_path / "masks/1.png", tmp_path / "masks/1 b.png")
    assert (found["2.jpg"].category, found["2.jpg"].split) == ("nut", "validation")
    assert (found["3.jpg"].category, found["3.jpg"].split) == (tmp_path.name, None)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_tables_of_any_spreadsheet(tmp_path: Path, encoding: str, newline: str, delimiter: str) -> None:
    touch(tmp_path, "größe, neu.jpg")
    rows = [
        ["Image ", "LABEL", "Defect", "x1", "y1", "x2", "y2"],
        ["größe, neu.jpg", "ng", "Kratzer", "1", "2", "3", "4"],
    ]
    text = newline.join(delimiter.join(f'"{cell}"' for cell in row) for row in rows)
    (tmp_path / "t.CSV").write_bytes(text.encode(encoding))
    assert table.matches(tmp_path)
    (sample,) = table.read(tmp_path)
    assert (sample.source, sample.defect, sample.boxes) == ("größe, neu.jpg", "Kratzer", ((1, 2, 3, 4),))


def test_everything_that_is_wrong_is_listed_in_one_error(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}.jpg" for name in "abcdef"), "not listed.jpg", "m.png", "x/y.png")
    (tmp_path / "parts.csv").write_text(
        "image;label;defect;x1;y1;x2;y2;mask;split\n"
        "a.jpg;ng;dent;1,5;2;3;4;;\n"
        "a.jpg;ng;dent;one;2;3;4;;\n"
        "a.jpg;ng;dent;nan;2;3;4;;\n"
        "a.jpg;ng;dent;5;2;3;4;;\n"
        "a.jpg;ng;dent;-5;2;-3;4;;\n"
        "a.jpg;ng;dent;1;;3;4;;\n"
        "a.jpg;ng;dent;;;;;;\n"
        "a.jpg;ng;dent;1;2;3;4;m.png;\n"
        "a.jpg;ng;ok;1;2;3;4;;\n"
        "a.jpg;ng;dent;;;;;gone.png;\n"
        "gone.jpg;ng;dent;1;2;3;4;;\n"
        "../../a.jpg;ng;dent;1;2;3;4;;\n"
        "a.jpg;perhaps;;;;;;;\n"
        "a.jpg;ok;dent;;;;;;\n"
        "a.jpg;ok;;1;2;3;4;;\n"
        "a.jpg;ok;;;;;;;later\n"
        "a.jpg;ok\n"
        "b.jpg;ng;dent;1;2;3;4;;train\n"
        "b.jpg;ok;;;;;;;train\n"
        "b.jpg;ng;dent;1;2;3;4;;train\n"
        "b.jpg;ng;dent;1;2;3;5;;test\n"
        "b.jpg;ng;dent;;;;;m.png;train\n"
        "c.jpg;ok;;;;;;;\n"
        "c.jpg;ok;;;;;;;\n"
    )
    either = "the label is ng, so that either x1, y1, x2 and y2 or a mask is needed, not both"
    none = "the label is ok, but there is a defect, a box or a mask"
    known = "normal, good, ok, 0, or anomalous, anomaly, defective, defect, bad, ng, ko, nok, 1"
    assert problems(table.read, tmp_path) == [
        "parts.csv: line 2: x1 is '1,5'; write it with a decimal point: 1.5",
        "parts.csv: line 3: x1 is 'one', which is no number",
        "parts.csv: line 4: the box [nan, 2, 3, 4] is not finite",
        "parts.csv: line 5: the box [5, 2, 3, 4] is inverted or has no area",
        "parts.csv: line 6: the box [-5, 2, -3, 4] lies outside the image",
        "parts.csv: line 7: y1 is '', which is no number",
        f"parts.csv: line 8: {either}",
        f"parts.csv: line 9: {either}",
        "parts.csv: line 10: its class is 'ok', but every shape is taken for a defect; delete the shapes of this class,"
        " an image without any is normal",
        f"parts.csv: line 11: there is no file 'gone.png' in {tmp_path.name}",
        f"parts.csv: line 12: there is no file 'gone.jpg' in {tmp_path.name}",
        f"parts.csv: line 13: there is no file '../../a.jpg' in {tmp_path.name}",
        f"parts.csv: line 14: the label 'perhaps' is unknown; write {known}",
        f"parts.csv: line 15: {none}",
        f"parts.csv: line 16: {none}",
        "parts.csv: line 17: the split 'later' is none of train, validation, test",
        "parts.csv: line 18: has 2 cells, and the first line has 9",
        "parts.csv: line 20: line 19 has another label for the same image: anomalous, not normal",
        "parts.csv: line 21: repeats line 19",
        "parts.csv: line 22: line 19 has another split for the same image: train, not test",
        "parts.csv: line 23: line 19 has another way of marking for the same image: box, not mask",
        "parts.csv: line 25: repeats line 24",
        ".: images that are not in the annotations: d.jpg, e.jpg, f.jpg, m.png, not listed.jpg",
        "x: images that are not in the annotations: y.png",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "t.csv: is empty"),
        (_HEADER.encode(), "t.csv: has no rows"),
        (
            b"Image,Label,defects,x1,y1,x2,y2\n",
            "t.csv: line 1: there is no column 'defects'; the nearest is 'defect' (known: image, label, defect, x1, y1,"
            " x2, y2, category, split, mask)",
        ),
        (
            b"image,image,x1,x2,y1\n",
            "t.csv: line 1: the column 'image' is there 2 times; the column 'label' is missing; the column 'y2' is"
            " missing (known: image, label, defect, x1, y1, x2, y2, category, split, mask)",
        ),
        ("image,label\nä.jpg,ok\n".encode("latin-1"), "t.csv: line 2: is not UTF-8 text; save the file with the"),
        ("image,label\na é.jpg,ok\n".encode("latin-1"), "t.csv: line 2: is not UTF-8 text; save the file with the"),
        (b'image,label\na.jpg,"ok', "t.csv: line 2: is no CSV (unexpected end of data)"),
    ],
)
def test_a_bad_table(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    assert problems(table.read, tmp_path)[0].startswith(message)


def test_one_table_is_wanted(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    assert problems(table.read, tmp_path) == [
        "one CSV file is wanted, with at least the columns image and label; there are: none"
    ]
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text(_HEADER + "a.jpg,ok,,,,,\n")
    (tmp_path / "other.csv").write_text("part,price\n1,2\n")
    assert problems(table.read, tmp_path) == [
        "one CSV file is wanted, with at least the columns image and label; there are: a.csv, b.csv"
    ]
    (tmp_path / "b.csv").unlink()
    assert by_source(table.read, tmp_path)["a.jpg"].label == "normal"


_side = st.floats(0, 4000, allow_nan=False)


@given(
    st.dictionaries(
        st.text("a;,\"é'", min_size=1, max_size=5),
        st.lists(st.tuples(_side, _side, st.floats(1, 900), st.floats(1, 900)), max_size=3, unique=True),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(",;\t"),
    st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=40)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    drawn: dict[str, list[tuple[float, float, float, float]]],
    delimiter: str,
    random: Any,
) -> None:
    raw = tmp_path_factory.mktemp("table")
    boxes = {f"{stem}.png": [(x, y, x + w, y + h) for x, y, w, h in its] for stem, its in drawn.items()}
    touch(raw, *boxes)
    rows = [
        {"image": name, "label": "bad", **dict(zip(("x1", "y1", "x2", "y2"), box, strict=True))}
        for name, its in boxes.items()
        for box in its
    ]
    rows += [{"image": name, "label": "good"} for name, its in boxes.items() if not its]
    random.shuffle(rows)
    columns = ["image", "label", "x1", "y1", "x2", "y2"]
    random.shuffle(columns)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    (raw / "t.csv").write_text(buffer.getvalue())
    found = {source: sorted(sample.boxes) for source, sample in by_source(table.read, raw).items()}
    assert found == {name: sorted(its) for name, its in boxes.items()}


_CELL = st.text(max_size=4) | st.sampled_from(("a.jpg", "1", "0", "nan", "1e400", "train"))


@given(
    st.binary()
    | st.sampled_from(NASTY)
    | st.lists(st.lists(_CELL, min_size=7, max_size=7), max_size=4).map(
        lambda rows: (_HEADER + "\n".join(",".join(row) for row in rows)).encode(errors="replace")
    )
)
@settings(deadline=None, max_examples=100)
def test_whatever_is_in_the_file_the_error_is_one_for_people(content: bytes) -> None:
    never_fails_otherwise(table.read, {"t.csv": content})
