import shutil
from pathlib import Path

import pytest

from adfm.data.problems import BadData
from adfm.data.readers import files, loco
from tests.data.readers import layouts


def test_masks_of_all_extensions_in_the_images_folder_are_its(tmp_path: Path) -> None:
    layouts.loco(tmp_path)
    folder = tmp_path / "screw_bag/ground_truth/structural_anomalies/000"
    layouts.mask(folder, "001.BMP")
    masks = {sample.source: sample.masks for sample in loco.read(tmp_path)}
    assert masks["screw_bag/test/structural_anomalies/000.png"] == (folder / "000.png", folder / "001.BMP")


def test_without_a_validation_part(tmp_path: Path) -> None:
    layouts.loco(tmp_path)
    for category in ("breakfast_box", "screw_bag"):
        shutil.rmtree(tmp_path / category / "validation")
    assert loco.matches(tmp_path)
    assert {sample.split for sample in loco.read(tmp_path)} == {"train", "test"}


def test_everything_that_is_wrong_is_listed_in_one_error(tmp_path: Path) -> None:
    layouts.loco(tmp_path)
    truth = tmp_path / "breakfast_box/ground_truth"
    shutil.rmtree(truth / "logical_anomalies/000")
    (tmp_path / "breakfast_box/test/structural_anomalies/000.png").unlink()
    layouts.image(tmp_path, "screw_bag/train/x.png")
    (tmp_path / "screw_bag/test/good/000.png").unlink()
    (tmp_path / "screw_bag/test/good/000.png").symlink_to("nowhere.png")
    with pytest.raises(BadData) as error:
        list(loco.read(tmp_path))
    assert error.value.problems == [
        "breakfast_box/test/logical_anomalies/000.png: has no mask"
        f" breakfast_box/ground_truth/logical_anomalies/000/000.png{files.ADD_MASK}",
        "breakfast_box/ground_truth/structural_anomalies/000: no place in the layout, or no image for the mask:"
        " 000.png",
        "screw_bag/test/good/000.png: does not exist",
        "screw_bag/train: no place in the layout, or no image for the mask: x.png",
    ]
