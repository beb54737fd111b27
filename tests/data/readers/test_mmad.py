import json
from pathlib import Path
from typing import Any

import pytest

from adfm.data.problems import BadData
from adfm.data.readers import mmad
from tests.data.readers import layouts


def rewrite(raw: Path, changes: dict[str, Any]) -> None:
    content = json.loads((raw / "mmad.json").read_text())
    (raw / "mmad.json").write_text(json.dumps(content | changes))


def lines(raw: Path) -> list[str]:
    with pytest.raises(BadData) as error:
        list(mmad.read(raw))
    return error.value.problems


@pytest.mark.parametrize("prefix", ["", "bottle/", "DS-MVTec/bottle/"])
def test_where_the_path_of_a_mask_may_begin(prefix: str, tmp_path: Path) -> None:
    layouts.mmad(tmp_path)
    image, mask = "DS-MVTec/bottle/image/broken_large/000.png", "mask/broken_large/000_mask.png"
    rewrite(tmp_path, {image: {"mask_path": prefix + mask}})
    masks = {sample.source: sample.masks for sample in mmad.read(tmp_path)}
    assert masks[image] == (tmp_path / "DS-MVTec/bottle" / mask,)


def test_all_masks_in_the_folder_of_an_image_are_its(tmp_path: Path) -> None:
    layouts.mmad(tmp_path)
    folder = "MVTec-LOCO/screw_bag/ground_truth/logical_anomalies/000"
    layouts.mask(tmp_path, f"{folder}/001.png")
    masks = {sample.source: sample.masks for sample in mmad.read(tmp_path)}
    assert masks["MVTec-LOCO/screw_bag/test/logical_anomalies/000.png"] == (
        tmp_path / folder / "000.png",
        tmp_path / folder / "001.png",
    )


def test_everything_that_is_wrong_is_listed_in_one_error(tmp_path: Path) -> None:
    layouts.mmad(tmp_path)
    (tmp_path / "VisA/candle/test/bad/000.JPG").unlink()
    (tmp_path / "GoodsAD/drink_can/ground_truth/opened/001.png").unlink()
    image = "DS-MVTec/bottle/image/broken_large/000.png"
    loco = "MVTec-LOCO/screw_bag/test/logical_anomalies/000.png"
    rewrite(tmp_path, {"../x.png": {}, "VisA/x.png": {}, image: {"mask_path": None}, loco: {"mask_path": "/x.png"}})
    long = f"VisA/candle/test/good/{'y' * 300}.png"
    rewrite(tmp_path, {long: {}})
    assert lines(tmp_path) == [
        "mmad.json: '../x.png' is not a path of a data set, category, good or defect, and image",
        f"{image}: has no mask",
        "GoodsAD/drink_can/test/opened/001.jpg: has no mask GoodsAD/drink_can/ground_truth/opened/001.png",
        f"mmad.json: '/x.png', the mask of {loco}, is not a path in the data set",
        "VisA/candle/test/bad/000.JPG: does not exist",
        f"{long}: does not exist",
        "mmad.json: 'VisA/x.png' is not a path of a data set, category, good or defect, and image",
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"a": {},\n}', "mmad.json: Invalid JSON: trailing comma at line 2 column 1"),
        ("[]", "mmad.json: Input should be an object"),
        ('{"a/b/c/d.png": 3}', "mmad.json: ['a/b/c/d.png'] Input should be an object"),
        ("{}", "no image in any place of the layout"),
    ],
)
def test_no_such_json(content: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "mmad.json").write_text(content)
    assert lines(tmp_path) == [problem]
