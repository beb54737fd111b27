from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adfm.data.readers import severstal
from adfm.data.readers.shapes import pixels
from adfm.errors import AdfmError
from tests.data.readers import layouts
from tests.data.readers.drawn import NASTY, by_source, problems, touch

HEADER = "ImageId,ClassId,EncodedPixels\n"


def _table(raw: Path, *rows: str) -> None:
    (raw / "train.csv").write_text(HEADER + "".join(f"{row}\n" for row in rows))


def test_each_patch_of_a_class_is_a_defect(tmp_path: Path) -> None:
    touch(tmp_path, "train_images/a.jpg", "train_images/b.jpg")
    # Columns 0 and 1 of rows 10 to 13; one pixel in the last corner; by a corner alone, pixels of columns 3 and 4.
    _table(tmp_path, "a.jpg,3,11 4 267 4 770 1 1027 1 409600 1", "a.jpg,1,257 2")
    samples = by_source(severstal.read, tmp_path)
    sample = samples["train_images/a.jpg"]
    assert (sample.label, sample.defect, sample.category) == ("anomalous", "class 1+class 3", "steel")
    assert (sample.size, sample.split) == ((1600, 256), None)
    assert sample.boxes == ((3, 1, 5, 3), (0, 10, 2, 14), (1599, 255, 1600, 256), (1, 0, 2, 2))
    expected = np.zeros((256, 1600), bool)
    expected[10:14, :2] = expected[1, 3] = expected[2, 4] = expected[255, 1599] = expected[:2, 1] = True
    assert (np.logical_or.reduce([pixels(rle) for rle in sample.rles]) == expected).all()
    normal = samples["train_images/b.jpg"]
    assert (normal.label, normal.boxes, normal.size) == ("normal", (), None)


@given(st.lists(st.integers(1, 3000), max_size=9), st.integers(1, 9))
def test_run_lengths_are_those_of_a_mask(gaps: list[int], length: int) -> None:
    expected = np.zeros(256 * 1600, bool)
    starts = np.cumsum([gap + length for gap in gaps]) + 1
    for start in starts:
        expected[start - 1 : start - 1 + length] = True
    if gaps:
        decoded = severstal._decoded(" ".join(f"{start} {length}" for start in starts))
        assert (decoded.ravel(order="F") == expected).all()


def test_images_to_be_judged_are_not_read(tmp_path: Path) -> None:
    truths = layouts.severstal(tmp_path)
    assert (tmp_path / "test_images/0000f269f.jpg").is_file()
    assert by_source(severstal.read, tmp_path).keys() == truths.keys()


def test_everything_that_is_wrong_is_listed_in_one_error(tmp_path: Path) -> None:
    touch(tmp_path, *(f"train_images/{name}.jpg" for name in "abcdefgh"), "train_images/more/x.jpg")
    _table(
        tmp_path,
        "a.jpg,1,1 2",
        "a.jpg,1,9 2",
        "b.jpg,5,1 2",
        "c.jpg,1,",
        "d.jpg,1,1 2 3",
        "e.jpg,1,0 2",
        "f.jpg,1,409600 2",
        "g.jpg,1,5 2 6 1",
        "h.jpg,1",
        "z.jpg,1,1 2",
    )
    assert problems(severstal.read, tmp_path) == [
        "train.csv: line 3: 'a.jpg' has the class 1 in line 2 already; keep one of them",
        "train.csv: line 4: ClassId is '5', not one of 1, 2, 3, 4",
        "train.csv: line 10: has 2 cells, and the first line has 3",
        "train.csv: line 11: image 'z.jpg' is missing in train_images",
        "train.csv: line 5: EncodedPixels is not pairs of start and length: ''",
        "train.csv: line 6: EncodedPixels is not pairs of start and length: '1 2 3'",
        *(
            f"train.csv: line {line}: the pair `{pair}` of EncodedPixels is empty, begins within the pair before it or"
            " leaves the pixels, the 409600 of 1600x256"
            for line, pair in ((7, "0 2"), (8, "409600 2"), (9, "6 1"))
        ),
        "train_images/more: no place in the layout, or no image for the mask: x.jpg",
    ]


def test_another_table_is_not_this_layout(tmp_path: Path) -> None:
    touch(tmp_path, "train_images/a.jpg")
    (tmp_path / "train.csv").write_text("ImageId_ClassId,EncodedPixels\na.jpg_1,1 2\n")
    assert not severstal.matches(tmp_path)
    assert problems(severstal.read, tmp_path) == [
        "train.csv: line 1: the columns are 'ImageId_ClassId,EncodedPixels', not 'ImageId,ClassId,EncodedPixels'"
    ]


@pytest.mark.parametrize("content", [*NASTY, *(HEADER.encode() + nasty for nasty in NASTY)])
def test_a_damaged_table_is_an_error_or_samples(content: bytes, tmp_path: Path) -> None:
    touch(tmp_path, "train_images/a.jpg")
    (tmp_path / "train.csv").write_bytes(content)
    severstal.matches(tmp_path)
    try:
        assert list(severstal.read(tmp_path))
    except AdfmError as error:
        str(error).encode()  # can be printed
