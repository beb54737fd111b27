import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adfm.data.problems import BadData
from adfm.data.readers import real_iad
from tests.data.readers import layouts


def edit(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def lines(raw: Path) -> list[str]:
    with pytest.raises(BadData) as error:
        list(real_iad.read(raw))
    return error.value.problems


def test_views_of_a_part_are_a_group_and_one_without_a_mask_is_normal(tmp_path: Path) -> None:
    layouts.real_iad(tmp_path)
    part = [sample for sample in real_iad.read(tmp_path) if sample.group == "toy/NG/AK/S0001"]
    assert [sample.label for sample in part] == ["anomalous"] * 3 + ["normal"] * 2
    assert all(sample.unmarked_is_normal for sample in part)


def test_categories_and_json_files_in_folders_of_their_own_as_published(tmp_path: Path) -> None:
    truths = layouts.real_iad(tmp_path / "realiad_1024")
    for name in ("toy", "toy_brick"):
        for kind in ("realiad_jsons", "realiad_jsons_sv"):
            (tmp_path / "realiad_jsons" / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / f"realiad_1024/{name}.json", tmp_path / f"realiad_jsons/{kind}/{name}.json")
        (tmp_path / f"realiad_1024/{name}.json").unlink()
        edit(tmp_path / f"realiad_jsons/realiad_jsons_sv/{name}.json", lambda content: content["test"].clear())
    assert real_iad.matches(tmp_path)
    assert {sample.source for sample in real_iad.read(tmp_path)} == {f"realiad_1024/{source}" for source in truths}


def test_images_that_the_json_does_not_name_are_left_out(tmp_path: Path) -> None:
    layouts.real_iad(tmp_path)
    edit(tmp_path / "toy.json", lambda content: content["test"].clear())
    samples = [sample for sample in real_iad.read(tmp_path) if sample.category == "toy"]
    assert len(samples) == 5


def test_paths_that_begin_at_the_category(tmp_path: Path) -> None:
    truths = layouts.real_iad(tmp_path)

    def lengthen(content: Any) -> None:
        for entry in content["train"] + content["test"]:
            entry["image_path"] = "toy/" + entry["image_path"]
            entry["mask_path"] = entry["mask_path"] and "toy/" + entry["mask_path"]

    edit(tmp_path / "toy.json", lengthen)
    assert {sample.source for sample in real_iad.read(tmp_path)} == truths.keys()


def test_everything_that_is_wrong_is_listed_in_one_error(tmp_path: Path) -> None:
    layouts.real_iad(tmp_path)
    shutil.copytree(tmp_path / "toy", tmp_path / "usb")
    shutil.copytree(tmp_path / "toy", tmp_path / "zipper")
    (tmp_path / "zipper.json").write_text('{\n  "meta": {},\n}')
    gone = sorted((tmp_path / "toy/NG/AK/S0001").glob("*_C1_*"))
    for path in gone:
        path.unlink()

    def spoil(content: Any) -> None:
        content["train"][0]["image_path"] = "../../secret.jpg"
        content["train"].append(content["train"][1])
        content["test"][-3]["mask_path"] = "/etc/passwd"

    edit(tmp_path / "toy_brick.json", spoil)
    jpg, png = (path.relative_to(tmp_path).as_posix() for path in gone)
    assert lines(tmp_path) == [
        f"{jpg}: does not exist",
        f"{jpg}: has no mask {png}",
        "toy_brick.json: '../../secret.jpg' is not a path in the data set",
        "toy_brick/OK/S0001/toy_brick_0001_C2_20230922.jpg: is listed twice",
        "toy_brick.json: '/etc/passwd' is not a path in the data set",
        "usb: has no usb.json",
        "zipper.json: Invalid JSON: trailing comma at line 3 column 1",
    ]


def test_keys_that_are_missing_or_of_another_kind(tmp_path: Path) -> None:
    layouts.real_iad(tmp_path)

    def spoil(content: Any) -> None:
        del content["meta"]["normal_class"], content["train"][0]["image_path"]
        content["test"][0]["mask_path"] = 3
        content["test"][1] = None

    edit(tmp_path / "toy.json", spoil)
    assert lines(tmp_path) == [
        "toy.json: ['meta']['normal_class'] Field required",
        "toy.json: ['train'][0]['image_path'] Field required",
        "toy.json: ['test'][0]['mask_path'] Input should be a valid string",
        "toy.json: ['test'][1] Input should be an object",
    ]


def test_json_files_that_differ_and_images_in_two_sizes(tmp_path: Path) -> None:
    layouts.real_iad(tmp_path / "realiad_256")
    shutil.copytree(tmp_path / "realiad_256", tmp_path / "realiad_512")
    edit(tmp_path / "realiad_512/toy.json", lambda content: content["test"].clear())
    assert lines(tmp_path) == [
        "the images are there more than once, keep one: realiad_256, realiad_512",
        "realiad_256/toy: has several JSON files that differ, keep one: realiad_256/toy.json, realiad_512/toy.json",
    ]
