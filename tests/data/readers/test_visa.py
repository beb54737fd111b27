import csv
import shutil
from pathlib import Path

import pytest

from adfm.data.problems import BadData
from adfm.data.readers import visa
from tests.data.readers import layouts


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def lines(raw: Path) -> list[str]:
    with pytest.raises(BadData) as error:
        list(visa.read(raw))
    return error.value.problems


def test_without_a_table_no_split_is_fixed(tmp_path: Path) -> None:
    truths = layouts.visa(tmp_path)
    shutil.rmtree(tmp_path / "split_csv")
    samples = {sample.source: sample for sample in visa.read(tmp_path)}
    assert samples.keys() == truths.keys()
    for source, truth in truths.items():
        assert samples[source].split is None
        assert samples[source].defect == truth.defect
        assert samples[source].masks == tuple(tmp_path / mask for mask in truth.masks)


def test_a_table_from_a_spreadsheet_with_categories_that_are_not_there(tmp_path: Path) -> None:
    truths = layouts.visa(tmp_path)
    table = tmp_path / "split_csv/1cls.csv"
    before = rows(table)
    more = [["fryum", "train", "normal", "fryum/Data/Images/Normal/0.JPG", ""]]
    layouts.table(table, before + more, encoding="utf-8-sig")  # with a byte order mark; the lines end in CRLF
    assert table.read_bytes().startswith(b"\xef\xbb\xbfobject") and b"\r\n" in table.read_bytes()
    assert {sample.source: sample.split for sample in visa.read(tmp_path)} == {
        source: truth.split for source, truth in truths.items()
    }


def test_names_with_commas_quotes_newlines_and_other_scripts(tmp_path: Path) -> None:
    layouts.visa(tmp_path)
    table = tmp_path / "split_csv/1cls.csv"
    name = layouts.image(tmp_path, 'candle/Data/Images/Normal/蜡烛 "a",\n1.JPG')
    layouts.table(table, [*rows(table), ["candle", "test", "normal", name, ""]])
    assert next(sample for sample in visa.read(tmp_path) if sample.source == name).split == "test"


def test_everything_that_is_wrong_is_listed_in_one_error(tmp_path: Path) -> None:
    layouts.visa(tmp_path)
    table = tmp_path / "split_csv/1cls.csv"
    before = rows(table)
    before[1] = ["candle", "valid", "good", before[1][3], ""]
    before[2][3] = "candle/Data/Images/Normal/0009.JPG"
    before[3][3] = "pcb1/Data/Images/Normal/0000.JPG"
    before[4][4] = ""
    before[5] = [*before[5][:3], "../secret.JPG", "/etc/passwd"]
    layouts.table(table, [*before, before[6]])
    (tmp_path / "pcb1/Data/Masks/Anomaly/000.png").unlink()
    (tmp_path / "pcb1/image_anno.csv").write_text("image;label\n")
    where, pcb = "split_csv/1cls.csv, line", "pcb1/Data/Images"
    assert lines(tmp_path) == [
        f"{where} 2: label 'good' is neither normal nor anomaly",
        f"{where} 2: split 'valid' is neither train nor test",
        "candle/Data/Images/Normal/0009.JPG: does not exist",
        f"{where} 4: image '{pcb}/Normal/0000.JPG' or mask '' is not a path within candle",
        "candle/Data/Images/Anomaly/000.JPG: has no mask",
        f"{where} 6: image '../secret.JPG' or mask '/etc/passwd' is not a path within candle",
        "candle/Data/Images/Anomaly: no place in the layout, or no image for the mask: 001.JPG",
        "candle/Data/Images/Normal: no place in the layout, or no image for the mask: 0000.JPG, 0001.JPG, 0002.JPG",
        "candle/Data/Masks/Anomaly: no place in the layout, or no image for the mask: 000.png, 001.png",
        "pcb1/image_anno.csv: has no column image, label",
        f"{pcb}/Anomaly/000.JPG: has no mask pcb1/Data/Masks/Anomaly/000.png",
        f"{pcb}/Normal/0000.JPG: is listed twice",
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "has no column object, split, label, image, mask"),
        (b"object,split,image,mask\n", "has no column label"),
        (b"object,split,label,image,mask\n\xff\n", "cannot be read ("),
        (b'object,split,label,image,mask\n"' + b"x" * 200_000, "cannot be read (field larger than field limit"),
    ],
)
def test_a_table_that_cannot_be_used_is_said_once(content: bytes, problem: str, tmp_path: Path) -> None:
    layouts.visa(tmp_path)
    (tmp_path / "split_csv/1cls.csv").write_bytes(content)
    about = [line for line in lines(tmp_path) if line.startswith("split_csv")]
    assert len(about) == 1
    assert about[0].startswith(f"split_csv/1cls.csv: {problem}")
