import csv
import io
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adfm.data.problems import MissingImage
from adfm.data.readers import table
from tests.data.readers.drawn import NASTY, by_source, never_fails_otherwise, problems, same_place, touch

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
    samples = by_source(table.read, raw)
    a, b, c, e = (samples[name] for name in ("a.jpg", "images/b.png", "sub/c d.jpg", "e.jpg"))
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
    samples = by_source(table.read, tmp_path)
    one = samples["1.jpg"]
    assert (one.label, one.defect, one.category, one.split, one.boxes) == ("anomalous", "defect", "bolt", "train", ())
    assert one.masks == (tmp_path / "masks/1.png", tmp_path / "masks/1 b.png")
    assert (samples["2.jpg"].category, samples["2.jpg"].split) == ("nut", "validation")
    assert (samples["3.jpg"].category, samples["3.jpg"].split) == (tmp_path.name, None)


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
    assert problems(table.read, tmp_path) == [
        "parts.csv: line 2: x1 is '1,5'; write it with a decimal point: 1.5",
        "parts.csv: line 3: x1 is 'one', which is not a finite number",
        "parts.csv: line 4: x1 is 'nan', which is not a finite number",
        "parts.csv: line 5: the box [5, 2, 3, 4] is inverted or has no area",
        "parts.csv: line 6: the box [-5, 2, -3, 4] lies outside the image",
        "parts.csv: line 7: y1 is '', which is not a finite number",
        f"parts.csv: line 8: {either}",
        f"parts.csv: line 9: {either}",
        "parts.csv: line 10: its class is 'ok', but every shape is taken for a defect; delete the shapes of this class,"
        " an image without any is normal",
        f"parts.csv: line 11: file 'gone.png' is missing in {tmp_path.name}",
        f"parts.csv: line 12: file 'gone.jpg' is missing in {tmp_path.name}",
        f"parts.csv: line 13: file '../../a.jpg' is missing in {tmp_path.name}",
        "parts.csv: line 14: the label 'perhaps' is unknown; write normal or anomalous, OK or NG, or 0 or 1",
        f"parts.csv: line 15: {none}",
        f"parts.csv: line 16: {none}",
        "parts.csv: line 17: the split 'later' is not train, validation or test",
        "parts.csv: line 18: has 2 cells, and the first line has 9",
        "parts.csv: line 20: line 19 has another label for 'b.jpg': anomalous, not normal",
        "parts.csv: line 22: line 19 has another split for 'b.jpg': train, not test",
        "parts.csv: line 23: line 19 has another way of marking for 'b.jpg': box, not mask",
        *(
            f"{name}: is in no row of parts.csv, in its column 'image'; add a row (for a normal image its name and"
            " `normal`, the other cells empty), or remove the image"
            for name in ("d.jpg", "e.jpg", "f.jpg", "m.png", "not listed.jpg", "x/y.png")
        ),
    ]


def test_a_row_whose_image_is_not_there_may_be_skipped(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "elsewhere/b.jpg")
    (tmp_path / "t.csv").write_text(
        "image,label\na.jpg,ok\nelsewhere/b.jpg,ok\nb.jpg,ok\n/etc/passwd,ok\n../a.jpg,ok\n"
    )
    listed = problems(table.read, tmp_path)
    assert listed == [
        f"t.csv: line {line}: file {name!r} is missing in {tmp_path.name}"
        for line, name in ((4, "b.jpg"), (5, "/etc/passwd"), (6, "../a.jpg"))
    ]
    assert all(isinstance(problem, MissingImage) for problem in listed)


def test_a_repeated_row_counts_once_and_is_noted(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    (tmp_path / "t.csv").write_text(
        _HEADER + "a.jpg,ng,dent,1,2,3,4\na.jpg,ng,dent,1,2,3,4\na.jpg,ng,crack,1,2,3,4\nb.jpg,ok,,,,,\nb.jpg,ok,,,,,\n"
        "c.jpg,ok,,,,,\n"
    )
    a, b, c = by_source(table.read, tmp_path).values()
    note = "a row of the table is repeated; it counts once"
    assert (a.boxes, a.notes, b.notes, c.notes) == (((1, 2, 3, 4), (1, 2, 3, 4)), (note,), (note,), ())


_TF = "filename,width,height,class,xmin,ymin,xmax,ymax\n"


def test_the_tables_of_roboflow_one_in_each_split(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        touch(tmp_path, f"{split}/a_jpg.rf.1.jpg")
        row = "a_jpg.rf.1.jpg,640,480,scratch,0,30,60,480\n"
        (tmp_path / split / "_annotations.csv").write_text(_TF + row + "a_jpg.rf.1.jpg,640,480,dent,1,30,60,50\n")
    (tmp_path / "README.roboflow.txt").write_text("exported\n")
    assert table.matches(tmp_path)
    samples = by_source(table.read, tmp_path)
    assert [sample.split for sample in samples.values()] == ["test", "train", "validation"]
    for sample in samples.values():
        assert (sample.label, sample.defect, sample.size) == ("anomalous", "dent+scratch", (640, 480))
        assert (sample.boxes, sample.notes) == (((0, 30, 60, 480), (1, 30, 60, 50)), ())


def test_an_image_in_no_row_is_refused_with_the_table_and_its_column(tmp_path: Path) -> None:
    touch(tmp_path, "train/a.jpg", "train/b.jpg", "valid/c.jpg")
    for split in ("train", "valid"):
        (tmp_path / split / "_annotations.csv").write_text(_TF)
    (tmp_path / "train/_annotations.csv").write_text(_TF + "a.jpg,128,96,scratch,20,30,60,50\n")
    (tmp_path / "valid/_annotations.csv").write_text(_TF + "c.jpg,128,96,normal,,,,\n")
    remedy = "; add a row (for a normal image its name and `normal`, the other cells empty), or remove the image"
    assert problems(table.read, tmp_path) == [
        f"train/b.jpg: is in no row of train/_annotations.csv, in its column 'filename'{remedy}"
    ]
    (tmp_path / "train/b.jpg").unlink()
    samples = by_source(table.read, tmp_path)
    assert [sample.label for sample in samples.values()] == ["anomalous", "normal"]


@pytest.mark.parametrize(
    ("csv_file", "image", "split"),
    [
        ("images/train_labels.csv", "images/train/1.jpg", "train"),
        ("images/test_labels.csv", "images/test/1.jpg", "test"),
        ("data/train_labels.csv", "images/1.jpg", "train"),
        ("annotations/val.csv", "images/val/1.jpg", "validation"),
        ("labels.csv", "1.jpg", None),
        ("src/pack/data/labels.csv", "src/pack/data/images/1.jpg", None),
    ],
)
def test_where_the_images_of_a_table_may_be(tmp_path: Path, csv_file: str, image: str, split: str | None) -> None:
    touch(tmp_path, image)
    (tmp_path / csv_file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / csv_file).write_text(_TF + "1.jpg,0,0,scratch,20,30,60,50\n")
    assert table.matches(tmp_path)
    sample = by_source(table.read, tmp_path)[image]
    assert (sample.split, sample.size) == (split, None)


def test_what_the_rows_of_such_a_table_must_not_say(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "images/a.jpg", "b.jpg")
    (tmp_path / "t.csv").write_text(
        _TF + "b.jpg,128,96,scratch,0.1,0.2,0.5,0.9\n"
        "b.jpg,128,96,good,20,30,60,50\n"
        "b.jpg,128,96,,20,30,60,50\n"
        "b.jpg,128,96,,,,,\n"
        "b.jpg,128,96,scratch,,,,\n"
        "b.jpg,128,96,1,,,,\n"
        "b.jpg,128,9.5,scratch,20,30,60,50\n"
        "b.jpg,128,96,scratch,20,30,60,50\n"
        "b.jpg,96,128,scratch,20,30,60,50\n"
        "a.jpg,128,96,scratch,20,30,60,50\n"
        "images/a.jpg,128,96,7,20,30,60,50\n"
        "b.jpg,128,96,scratch,20,30,60\n"
    )
    assert [line.removeprefix("t.csv: line ") for line in problems(table.read, tmp_path)[:-1]] == [
        "2: the box [0.1, 0.2, 0.5, 0.9] is not larger than a pixel; write pixels, not fractions",
        "3: its class is 'good', but every shape is taken for a defect; delete the shapes of this class, an image"
        " without any is normal",
        "4: the class '' is not a name",
        "5: its class is empty; write `normal`, or the kind of the defect",
        "6: the class is scratch, so that either x1, y1, x2 and y2 or a mask is needed, not both",
        "7: its class is '1', which may mean either; write `normal`, or the kind of the defect",
        "8: '128' x '9.5' is not a size in pixels",
        "10: line 9 has another size for 'b.jpg': (128, 96), not (96, 128)",
        "11: the file 'a.jpg' may be any of a.jpg, images/a.jpg; write its folder with it",
        "13: has 7 cells, and the first line has 8",
    ]


@pytest.mark.parametrize(
    ("content", "labels"),
    [
        ("image,label\na.jpg,OK\nb.jpg,NG\n", ["", "defect"]),
        ("a.jpg,OK\nb.jpg,NG\n", ["", "defect"]),
        ("file_name;target\na.jpg;0\nb.jpg;1\n", ["", "defect"]),
        ("path|class\na.jpg|good\nb.jpg|scratch\n", ["", "scratch"]),
        ("Filename  Class\n a.jpg  good \n'b.jpg'  scratch\n".replace("'", '"'), ["", "scratch"]),
        ("image,defect\na.jpg,no\nb.jpg,yes\n", ["", "defect"]),
        ("image,defect\na.jpg,none\nb.jpg,crack\n", ["", "crack"]),
        (",image,is_defective\n0,a.jpg,False\n1,b.jpg,True\n", ["", "defect"]),
        ("sep=;\nimage;label;defect\na.jpg;ok;-\nb.jpg;bad;dent\n", ["", "dent"]),
        ("image,label,,\na.jpg,ok,,\nb.jpg,bad,,,,\n", ["", "defect"]),
        ("a.jpg  0.0  mono\nb.jpg  1.0  poly\n", ["", "defect"]),
        ("image,label\nb.jpg,bad\nb.jpg,bad\na.jpg,good\n", ["", "defect"]),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_table_of_labels_alone(tmp_path: Path, content: str, labels: list[str], encoding: str) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "t.csv").write_bytes(content.encode(encoding))
    assert table.matches(tmp_path)
    a, b = sorted(by_source(table.read, tmp_path).values(), key=lambda sample: sample.source)
    assert [sample.defect or "" for sample in (a, b)] == labels
    assert (a.label, a.located, b.label, b.located, b.boxes, b.masks) == ("normal", True, "anomalous", False, (), ())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "image,label\na.jpg,scratch\n",
            "line 2: the label 'scratch' is unknown; write normal or anomalous, OK or NG,",
        ),
        ("image,class\na.jpg,0\n", "line 2: its class is '0', which may mean either; write `normal`, or the kind"),
        ("image,class\na.jpg,no\n", "line 2: its class is 'no', which may mean either; write `normal`, or the kind"),
        ("image,class\na.jpg,\n", "line 2: its class is empty; write `normal`, or the kind of the defect"),
        ("a.jpg 0.5 mono\n", "line 1: the probability 0.5 is not below or above 0.5, from 0 to 1"),
        ("a.jpg 1.7 mono\n", "line 1: the probability 1.7 is not below or above 0.5, from 0 to 1"),
        ("image,label,x,y,w,h\na.jpg,ng,1,2,3,4\n", "line 1: 'h', 'w', 'x', 'y' may say where the defects are; write"),
        (
            "image,label,splits\na.jpg,ok,train\n",
            "line 1: the column 'splits' is unknown; the nearest is 'split' (known:",
        ),
        ("img,label\na.jpg,ok\n", "line 1: the column 'img' is unknown; the nearest is 'image'; the column 'image' is"),
        ("a.jpg,1,2,3\n", "line 1: the column 'a.jpg' is unknown; the nearest is"),
        ("image,label,xmin,ymin,xmax\na.jpg,2,3,4,5\n", "line 1: the column 'y2' is missing (known:"),
        ("image,label,xmin,ymin,xmax,ymax\na.jpg,2,3,4,5,6\n", "line 2: the label '2' is unknown; write"),
    ],
)
def test_what_may_mean_either_is_refused(tmp_path: Path, content: str, message: str) -> None:
    touch(tmp_path, "a.jpg")
    (tmp_path / "t.csv").write_text(content)
    assert problems(table.read, tmp_path)[0].startswith(f"t.csv: {message}")


def test_the_probabilities_of_elpv(tmp_path: Path) -> None:
    data = tmp_path / "src/elpv_dataset/data"
    chances = ("1.0                 ", "0.3333333333333333  ", "0.6666666666666666  ", "0.0                 ")
    touch(data, *(f"images/cell{number:04}.png" for number in range(4)))
    (data / "labels.csv").write_text(
        "".join(f"images/cell{number:04}.png  {chance}mono\n" for number, chance in enumerate(chances))
    )
    assert table.matches(tmp_path)
    samples = list(by_source(table.read, tmp_path).values())
    assert [sample.label for sample in samples] == ["anomalous", "normal", "anomalous", "normal"]
    assert [any("uncertain" in note for note in sample.notes) for sample in samples] == [False, True, True, False]
    assert samples[1].columns == {"type": "mono", "probability": "0.3333333333333333"}
    assert not samples[0].located


def test_retinanet_s_table_has_no_names_of_columns(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "annotations.csv").write_text("a.jpg,837,346,981,456,dent\na.jpg,215,312,279,391,crack\nb.jpg,,,,,\n")
    a, b = by_source(table.read, tmp_path).values()
    assert (a.boxes, a.defect, b.label) == (((837, 346, 981, 456), (215, 312, 279, 391)), "crack+dent", "normal")


def test_further_columns_are_for_split_group(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "t.csv").write_text(
        "image,label,Part,Shift,x1,y1,x2,y2,width,height\n"
        "a.jpg,ng,17,late,1,2,3,4,9,9\na.jpg,ng,17,early,5,6,7,8,9,9\nb.jpg,ok,18,late,,,,,9,9\n"
    )
    a, b = by_source(table.read, tmp_path).values()
    assert (a.columns, b.columns) == ({"part": "17"}, {"part": "18", "shift": "late"})
    assert a.notes == b.notes == ("columns that only split.group reads: part, shift",)
    assert a.size == (9, 9)


def test_the_class_may_be_in_the_column_label_beside_a_box(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    (tmp_path / "export.csv").write_text('"image","xmin","ymin","xmax","ymax","label"\n"a.jpg",1.5,2,3,4,"dent"\n')
    sample = by_source(table.read, tmp_path)["a.jpg"]
    assert (sample.defect, sample.boxes) == ("dent", ((1.5, 2, 3, 4),))


def test_a_name_is_the_same_in_both_forms_of_unicode(tmp_path: Path) -> None:
    touch(tmp_path, unicodedata.normalize("NFD", "prüfung/é.jpg"))
    (tmp_path / "t.csv").write_text(unicodedata.normalize("NFC", "image,label\nprüfung/é.jpg,ok\n"))
    assert [sample.label for sample in table.read(tmp_path)] == ["normal"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "t.csv: is empty"),
        (_HEADER.encode(), "t.csv: has no rows"),
        (
            b"Image,Label,defects,x1,y1,x2,y2\n",
            "t.csv: line 1: the column 'defects' is unknown; the nearest is 'defect' (known: image, label, defect, x1,"
            " y1, x2, y2, category, split, mask)",
        ),
        (
            b"image,image,x1,x2,y1\n",
            "t.csv: line 1: the column 'image' is there 2 times; the column 'label' is missing; the column 'y2' is"
            " missing (known: image, label, defect, x1, y1, x2, y2, category, split, mask)",
        ),
        ("image,label\nä.jpg,ok\n".encode("latin-1"), "t.csv: line 2: is not UTF-8 text; save the file with the"),
        ("image,label\na é.jpg,ok\n".encode("latin-1"), "t.csv: line 2: is not UTF-8 text; save the file with the"),
        ("image,label\na.jpg,ok".encode("utf-16")[:-1], "t.csv: line 2: is not UTF-16 text"),
        (b'image,label\na.jpg,"ok', "t.csv: line 2: is not CSV (unexpected end of data)"),
    ],
)
def test_a_bad_table(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    assert problems(table.read, tmp_path)[0].startswith(message)


def test_several_tables(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    assert problems(table.read, tmp_path) == ["a CSV file with at least the columns image and label is missing"]
    (tmp_path / "a.csv").write_text(_HEADER + "a.jpg,ok,,,,,\n")
    (tmp_path / "b.csv").write_text(_HEADER + "b.jpg,ok,,,,,\na.jpg,ok,,,,,\n")
    (tmp_path / "other.csv").write_text("part,price\n1,2\n")
    assert problems(table.read, tmp_path) == ["b.csv: line 3: 'a.jpg' is in a.csv too; keep one of them"]
    (tmp_path / "b.csv").write_text(_HEADER + "b.jpg,ok,,,,,\n")
    assert [sample.label for sample in by_source(table.read, tmp_path).values()] == ["normal", "normal"]


_side = st.floats(0, 4000, allow_nan=False)


@given(
    st.dictionaries(
        st.text("a;,\"é'", min_size=1, max_size=5),
        st.lists(st.tuples(_side, _side, st.floats(2, 900), st.floats(2, 900)), max_size=3, unique_by=same_place),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(",;\t|"),
    st.sampled_from(
        (("image", "label", "x1", "y1", "x2", "y2"), ("filename", "class", "xmin", "ymin", "xmax", "ymax"))
    ),
    st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=40)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    drawn: dict[str, list[tuple[float, float, float, float]]],
    delimiter: str,
    names: tuple[str, ...],
    random: Any,
) -> None:
    raw = tmp_path_factory.mktemp("table")
    boxes = {f"{stem}.png": [(x, y, x + w, y + h) for x, y, w, h in its] for stem, its in drawn.items()}
    touch(raw, *boxes)
    rows = [dict(zip(names, (name, "bad", *box), strict=True)) for name, its in boxes.items() for box in its]
    rows += [dict(zip(names, (name, "good"), strict=False)) for name, its in boxes.items() if not its]
    random.shuffle(rows)
    columns = list(names)
    random.shuffle(columns)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    (raw / "t.csv").write_text(buffer.getvalue())
    samples = {source: sorted(sample.boxes) for source, sample in by_source(table.read, raw).items()}
    assert samples == {name: sorted(its) for name, its in boxes.items()}


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


def test_a_table_that_cannot_be_read_is_the_only_problem(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "labels.csv").write_text("image,label,defect,x,y,w,h\na.jpg,anomalous,scratch,20,30,40,20\n")
    (problem,) = problems(table.read, tmp_path)
    assert problem.startswith("labels.csv: line 1: 'h', 'w', 'x', 'y' may say where the defects are")
