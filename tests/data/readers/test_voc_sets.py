from pathlib import Path

import pytest

from adfm.data.problems import MissingImage
from adfm.data.readers import voc
from tests.data.readers.drawn import by_source, problems, touch


def _raw(tmp_path: Path, *images: str, **lists: str) -> Path:
    """A data set with images and lists; in the names of lists `__` is a `/`."""
    touch(tmp_path, *images)
    for image in images:
        file = tmp_path / image.replace("JPEGImages", "Annotations").replace(".jpg", ".xml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("<annotation/>")
    for name, content in lists.items():
        file = tmp_path / "ImageSets" / f"{name.replace('__', '/')}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return tmp_path


def _splits(raw: Path) -> list[str | None]:
    return [sample.split for _, sample in sorted(by_source(voc.read, raw).items())]


def _notes(raw: Path) -> list[str]:
    return [note for _, sample in sorted(by_source(voc.read, raw).items()) for note in sample.notes]


_FIVE = tuple(f"JPEGImages/{number}.jpg" for number in range(5))


def test_splits_of_main(tmp_path: Path) -> None:
    lists = {"Main__train": "0\n1\n", "Main__val": "2\r\n", "Main__test": "3", "Main__trainval": "0\n1\n2\n"}
    raw = _raw(tmp_path, *_FIVE, **lists)
    assert _splits(raw) == ["train", "train", "validation", "test", None]
    assert _notes(raw) == []


def test_names_with_folders_as_cvat_writes_them(tmp_path: Path) -> None:
    images = [f"JPEGImages/cam{number % 2}/{number}.jpg" for number in range(4)]
    raw = _raw(tmp_path, *images, Main__Train="cam0/0\ncam1/1\n", Main__Validation="cam0/2\n", Main__Test="cam1/3\n")
    assert _splits(raw) == ["train", "validation", "train", "test"]


@pytest.mark.parametrize("line", ["0.jpg", "./0", "JPEGImages/0.jpg", '"0"', "JPEGImages\\0.jpg"])
def test_ways_to_write_a_name(tmp_path: Path, line: str) -> None:
    assert _splits(_raw(tmp_path, "JPEGImages/0.jpg", Main__test=line)) == ["test"]


def test_an_image_in_several_lists_is_in_the_most_held_out(tmp_path: Path) -> None:
    raw = _raw(tmp_path, *_FIVE[:3], Main__train="0\n1\n2\n", Main__val="1\n2\n", Main__test="2\n")
    assert _splits(raw) == ["train", "validation", "test"]
    assert _notes(raw) == [
        "an image that ImageSets lists in validation and in train is in validation",
        "an image that ImageSets lists in test and in train, validation is in test",
    ]


def test_an_image_that_only_trainval_lists_is_in_train(tmp_path: Path) -> None:
    raw = _raw(tmp_path, *_FIVE[:2], Main__trainval="0\n", Main__test="1\n")
    assert _splits(raw) == ["train", "test"]
    assert _notes(raw) == ["an image that ImageSets lists in trainval alone is in train"]


def test_lists_of_a_class_are_taken_where_there_is_no_other(tmp_path: Path) -> None:
    raw = _raw(tmp_path, *_FIVE[:2], Main__test_scratch_train="0  1\n", Main__scratch_val="1 -1\n", Main__scratch="x\n")
    assert _splits(raw) == ["train", "validation"]
    (raw / "ImageSets/Main/test.txt").write_text("0\n1\n")
    assert _splits(raw) == ["test", "test"]


def test_segmentation_and_layout(tmp_path: Path) -> None:
    raw = _raw(tmp_path, *_FIVE[:2], Segmentation__val="0\n", Layout__test="1  1\n1  2\n")
    assert _splits(raw) == ["validation", "test"]
    (raw / "ImageSets/Main").mkdir()
    (raw / "ImageSets/Main/train.txt").write_text("0\n1\n")
    assert _splits(raw) == ["train", "train"]


def test_names_without_an_image_are_refused(tmp_path: Path) -> None:
    raw = _raw(
        tmp_path, *_FIVE[:1], Main__train="0\nseven\neight\n", Main__val="".join(f"{n}\n" for n in range(10, 30))
    )
    listed = problems(voc.read, raw)
    assert listed == [
        "ImageSets/Main/train.txt: images eight, seven are missing",
        "ImageSets/Main/val.txt: images 10, 11, 12, 13, 14, 15, 16, 17, 18, 19 and 10 more are missing",
    ]
    assert {type(problem) for problem in listed} == {MissingImage}


def test_a_list_that_cannot_be_read(tmp_path: Path) -> None:
    raw = _raw(tmp_path, *_FIVE[:1], Main__train="")
    (raw / "ImageSets/Main/train.txt").write_bytes(b"\xff0\n")
    assert problems(voc.read, raw)[0].startswith("ImageSets/Main/train.txt: line 1: is not UTF-8 text")


def test_lists_of_images_and_xml_files_as_paddle_has_them(tmp_path: Path) -> None:
    raw = _raw(tmp_path, *_FIVE[:2])
    (raw / "train.txt").write_text("JPEGImages/0.jpg Annotations/0.xml\n")
    (raw / "val.txt").write_text("./JPEGImages/1.jpg ./Annotations/1.xml\n")
    assert _splits(raw) == ["train", "validation"]


def test_a_text_file_beside_the_images_is_not_a_list(tmp_path: Path) -> None:
    raw = _raw(tmp_path, "test/0.jpg")
    (raw / "train.txt").write_text("This set was taken by a train.\n")
    assert _splits(raw) == ["test"]


def test_lists_in_another_folder_of_imagesets(tmp_path: Path) -> None:
    lists = {"fold1__train": "0\n1\n", "fold1__val": "2\n", "fold1__test": "3\n"}
    raw = _raw(tmp_path, *_FIVE, **lists)
    assert _splits(raw) == ["train", "train", "validation", "test", None]
    _raw(tmp_path, fold2__train="2\n3\n", fold2__test="0\n")
    assert problems(voc.read, raw) == [
        "ImageSets/fold1: one of 2 folders of lists (fold1, fold2), which may divide the images differently; keep one"
        " of them, or move its lists to ImageSets/Main"
    ]
    _raw(tmp_path, Main__test="4\n")
    assert _splits(raw) == [None, None, None, None, "test"]
