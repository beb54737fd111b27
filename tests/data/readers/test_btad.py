from pathlib import Path

import pytest

from adfm.data.problems import BadData
from adfm.data.readers import btad, files
from tests.data.readers import layouts


def test_masks_of_good_images_are_no_matter(tmp_path: Path) -> None:
    truths = layouts.btad(tmp_path)
    layouts.mask(tmp_path, "01/ground_truth/ok/0001.png", value=0)
    assert {sample.source for sample in btad.read(tmp_path)} == truths.keys()


def test_everything_that_is_wrong_is_listed_in_one_error(tmp_path: Path) -> None:
    layouts.btad(tmp_path)
    (tmp_path / "03/ground_truth/ko/0000.bmp").unlink()
    (tmp_path / "02/test/ko/0000.png").unlink()
    layouts.image(tmp_path, "01/train/ko/0009.bmp")
    with pytest.raises(BadData) as error:
        list(btad.read(tmp_path))
    assert error.value.problems == [
        "01/train/ko: no place in the layout, or no image for the mask: 0009.bmp",
        "02/ground_truth/ko: no place in the layout, or no image for the mask: 0000.png",
        f"03/test/ko/0000.bmp: has no mask 03/ground_truth/ko/0000.png{files.ADD_MASK}",
    ]
