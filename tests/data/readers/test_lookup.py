import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adfm.data.readers.files import NoImage, split_of
from adfm.data.readers.lookup import Images
from tests.data.readers.drawn import touch


def _located(raw: Path, file: str, name: str) -> str:
    path = raw / file
    path.parent.mkdir(parents=True, exist_ok=True)
    return Images(raw).locate(name, path.parent, path.stem).relative_to(raw).as_posix()


@pytest.mark.parametrize(
    ("file", "name", "images", "image"),
    [
        # beside the file, and in folders for images
        ("a.json", "1.jpg", "1.jpg|images/1.jpg", "1.jpg"),
        ("labels.json", "1.jpg", "data/1.jpg|extra/1.jpg", "data/1.jpg"),
        ("result.json", "images/1.jpg", "images/1.jpg|1.jpg", "images/1.jpg"),
        (
            "annotations/instances_default.json",
            "1.jpg",
            "images/default/1.jpg|images/other/1.jpg",
            "images/default/1.jpg",
        ),
        ("annotations/instances_default.json", "x/1.jpg", "images/default/x/1.jpg", "images/default/x/1.jpg"),
        ("annotations/instances_default.json", "1.jpg", "images/1.jpg", "images/1.jpg"),
        ("annotations/train.json", "1.jpg", "train/images/1.jpg|val/images/1.jpg", "train/images/1.jpg"),
        ("annotations/instances_train2017.json", "1.jpg", "train2017/1.jpg|train2014/1.jpg", "train2017/1.jpg"),
        ("annotations/v2/instances_val.json", "1.jpg", "images/valid/1.jpg|images/train/1.jpg", "images/valid/1.jpg"),
        ("labels/val/a.json", "1.jpg", "images/val/1.jpg|images/train/1.jpg", "images/val/1.jpg"),
        ("line/labels/a.json", "1.jpg", "line/images/1.jpg|images/1.jpg", "line/images/1.jpg"),
        ("anything/a.json", "1.jpg", "whatever/1.jpg", "whatever/1.jpg"),
        # paths
        ("json/a.json", "../b/1.jpg", "b/1.jpg|images/1.jpg", "b/1.jpg"),
        ("json/a.json", r"..\b\1.jpg", "b/1.jpg|images/1.jpg", "b/1.jpg"),
        ("x/y/a.json", "b/1.jpg", "b/1.jpg|x/b/1.jpg", "x/b/1.jpg"),
        ("a.json", r"C:\me\line 3\1.jpg", "line 3/1.jpg|images/1.jpg", "line 3/1.jpg"),
        ("a.json", "/home/me/line3/1.jpg", "line3/1.jpg|images/1.jpg", "line3/1.jpg"),
        ("a.json", r"..\..\media\upload\4\ab-1.jpg", "images/ab-1.jpg|other/2.jpg", "images/ab-1.jpg"),
        ("a.json", "/data/upload/4/ab-1.jpg", "pile/ab-1.jpg", "pile/ab-1.jpg"),
        ("a.json", "JPEGImages/1.jpg", "images/1.jpg", "images/1.jpg"),
        ("annotations/a.json", "a..b.jpg", "images/a..b.jpg", "images/a..b.jpg"),
        # URLs
        ("a.json", "/data/local-files/?d=line3/part%201.jpg", "line3/part 1.jpg", "line3/part 1.jpg"),
        ("a.json", "/data/local-files/?d=D%3A%5Cline3%5C1.jpg&x=1", "line3/1.jpg|line4/1.jpg", "line3/1.jpg"),
        ("a.json", "http://host:8080/data/local-files/?d=x/line3/1.jpg", "line3/1.jpg|line4/1.jpg", "line3/1.jpg"),
        ("a.json", "s3://bucket/line3/a#1&b.jpg", "line3/a#1&b.jpg", "line3/a#1&b.jpg"),
        ("a.json", "https://x.org/line3/1%C3%A9.jpg?X-Amz-Date=1", "line3/1é.jpg", "line3/1é.jpg"),
        ("a.json", "part%201.jpg", "part%201.jpg|part 1.jpg", "part%201.jpg"),
        # names that are the same
        ("a.json", "IMG_1.JPG", "IMG_1.jpg", "IMG_1.jpg"),
        ("a.json", "1.jpg", "1.jpg|1.JPG", "1.jpg"),
        ("a.json", "\u00e9/\u00e9.jpg", "e\u0301/e\u0301.jpg", "e\u0301/e\u0301.jpg"),
        ("a.json", "a\\b.jpg", "a\\b.jpg|b.jpg", "a\\b.jpg"),
    ],
)
def test_where_an_image_is(tmp_path: Path, file: str, name: str, images: str, image: str) -> None:
    touch(tmp_path, *images.split("|"))
    assert _located(tmp_path, file, name) == image


@pytest.mark.parametrize(
    ("file", "name", "images"),
    [
        ("annotations/instances_train.json", "2.jpg", "images/train/1.jpg images/val/2.jpg"),
        ("annotations/instances_train.json", "2.jpg", "train/1.jpg val/2.jpg"),
        ("annotations/instances_train.json", "2.jpg", "images/train/1.jpg images/2.jpg"),
        ("annotations/instances_train.json", "2.jpg", "val/2.jpg"),
        ("annotations/instances_train.json", "val/2.jpg", "images/train/2.jpg"),
        ("train/_annotations.coco.json", "2.jpg", "train/1.jpg valid/2.jpg"),
        ("labels.json", "2.jpg", "line3/1.jpg line4/2.jpg"),
        ("line3/a.json", "2.jpg", "line3/1.jpg images/2.jpg"),
        ("line4/a.json", "line3/2.jpg", "line3/1.jpg line4/2.jpg"),
        ("line4/a.json", "line3/2.jpg", "line4/2.jpg"),
        ("line4/a.json", "../line3/2.jpg", "line3/1.jpg line4/2.jpg"),
        ("line4/a.json", "/me/line3/2.jpg", "line3/1.jpg line4/2.jpg"),
        ("a.json", "/me/line3/2.jpg", "line4/2.jpg"),
        ("a.json", "img_1.jpg", "IMG_1.jpg"),
        ("a.json", "1.bmp", "1.jpg"),
        ("a.json", "", "1.jpg"),
        ("a.json", "..", "1.jpg"),
        ("a.json", "1.jpg/", "2.jpg"),
        ("a.json", "\0", "1.jpg"),
        ("a.json", "x/\ud800.jpg", "1.jpg"),
        ("a.json", "x" * 5000 + "/1.jpg", "x/1.jpg"),
    ],
)
def test_an_image_that_is_missing_is_not_replaced_by_another(tmp_path: Path, file: str, name: str, images: str) -> None:
    touch(tmp_path, *images.split())
    with pytest.raises(NoImage, match="is missing"):
        _located(tmp_path, file, name)


@pytest.mark.parametrize(
    ("name", "images"),
    [
        ("1.jpg", ("images/1.jpg", "data/1.jpg")),
        ("1.Jpg", ("1.jpg", "1.JPG")),
    ],
)
def test_an_image_that_may_be_any_of_several(tmp_path: Path, name: str, images: tuple[str, ...]) -> None:
    touch(tmp_path, *images)
    with pytest.raises(ValueError, match="may be any of") as error:
        _located(tmp_path, "a.json", name)
    assert not isinstance(error.value, NoImage)


_FOLDERS = ("", "train", "val", "images", "images/train", "images/val", "line3", "annotations", "data", "line3/images")
_NAMES = ("1.jpg", "2.JPG", "\u00e9.png", "e\u0301.png")
_places = st.tuples(st.sampled_from(_FOLDERS), st.sampled_from(_NAMES)).map("/".join)
_parts = st.sampled_from(("..", ".", "train", "val", "images", "line3", "x", "C:", "%2e%2e", "data", "upload", "?d="))


@given(
    st.sets(_places, min_size=1, max_size=6),
    st.sampled_from(_FOLDERS),
    st.sampled_from(("a", "train", "instances_val2017", "_annotations.coco", "train_test")),
    st.lists(_parts, max_size=4),
    st.sampled_from(_NAMES),
    st.sampled_from(("/", "\\", "//")),
    st.sampled_from(("", "/", "s3://bucket/", "/data/local-files/?d=")),
)
@settings(deadline=None, max_examples=100)
def test_an_image_is_one_of_the_data_set_and_has_the_name_and_split_that_are_asked_for(
    tmp_path_factory: pytest.TempPathFactory,
    images: set[str],
    folder: str,
    stem: str,
    parts: list[str],
    last: str,
    separator: str,
    start: str,
) -> None:
    outside = tmp_path_factory.mktemp("lookup")
    raw = outside / "raw"
    touch(outside, *_NAMES, "train/1.jpg", "x/1.jpg")
    touch(raw, *(image.lstrip("/") for image in images))
    (raw / folder).mkdir(parents=True, exist_ok=True)
    name = start + separator.join([*parts, last])
    try:
        path = Images(raw).locate(name, raw / folder, stem)
    except ValueError:
        return
    where = path.relative_to(raw)
    assert path.is_file() and ".." not in where.parts
    assert where.as_posix() in {image.lstrip("/") for image in images}
    assert unicodedata.normalize("NFC", path.name).lower() == unicodedata.normalize("NFC", last).lower()
    split, its = split_of(stem, *reversed(folder.split("/"))), split_of(*where.parts[-2::-1])
    if not start and not set(parts) - {".", "x"} and path.parent != raw / folder:
        assert None in (split, its) or split == its


def test_names_are_listed_once_for_each_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, *(f"images/{number}.jpg" for number in range(50)))
    (tmp_path / "annotations").mkdir()
    listed: list[Path] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(Path(folder)) or scandir(folder))
    pictures = Images(tmp_path)
    for number in range(50):
        pictures.locate(f"{number}.jpg", tmp_path / "annotations", "train")
    assert len(listed) < 20
