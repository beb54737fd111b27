from pathlib import Path

import pytest

from adfm.data import readers
from adfm.errors import AdfmError


def test_a_known_layout_is_detected(mvtec_folder: Path) -> None:
    assert readers.detect(mvtec_folder) == "mvtec"
    assert readers.READERS["mvtec"]


def test_an_unknown_layout_is_an_error_that_says_what_was_seen(tmp_path: Path) -> None:
    for name in ("images/1.png", "labels/1.txt", "a.JPG", "b.jpg", "coco.json", "README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(AdfmError) as error:
        readers.detect(tmp_path)
    seen = "Seen there: images/, labels/, 2 files .jpg, 1 files .json, 1 files without extension."
    assert seen in str(error.value)


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AdfmError, match="Seen there: nothing"):
        readers.detect(tmp_path)
