import shutil
from pathlib import Path

import pytest

from adfm.data import readers
from adfm.data.problems import BadData
from adfm.data.readers import files, mvtec
from adfm.errors import AdfmError
from tests.memory import peaks


def test_samples(mvtec_folder: Path) -> None:
    samples = list(mvtec.read(mvtec_folder))
    assert len(samples) == 2 * 24
    assert {sample.dataset for sample in samples} == {"tiny"}
    by_source = {sample.source: sample for sample in samples}
    hole = by_source["bolt/test/hole/003.png"]
    assert hole.image == mvtec_folder / "bolt/test/hole/003.png"
    assert hole.masks == (mvtec_folder / "bolt/ground_truth/hole/003_mask.png",)
    assert (hole.category, hole.label, hole.defect, hole.split) == ("bolt", "anomalous", "hole", "test")
    good = by_source["tile/train/good/000.png"]
    assert (good.category, good.label, good.defect, good.masks, good.split) == ("tile", "normal", None, (), "train")
    assert {(s.label, s.split) for s in samples} == {("normal", "train"), ("normal", "test"), ("anomalous", "test")}


def test_masks_are_paired_by_name_whatever_their_order_or_extension(mvtec_folder: Path) -> None:
    truth = mvtec_folder / "bolt" / "ground_truth" / "hole"
    (truth / "000_mask.png").rename(truth / "zz_mask.PNG")
    (mvtec_folder / "bolt/test/hole/000.png").rename(mvtec_folder / "bolt/test/hole/zz.JPG")
    (truth / "001_mask.png").rename(truth / "001.bmp")
    masks = {sample.source: sample.masks for sample in mvtec.read(mvtec_folder)}
    assert masks["bolt/test/hole/zz.JPG"] == (truth / "zz_mask.PNG",)
    assert masks["bolt/test/hole/001.png"] == (truth / "001.bmp",)
    assert masks["bolt/test/hole/002.png"] == (truth / "002_mask.png",)


def test_a_data_set_that_nests_its_own_name(mvtec_folder: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    shutil.copytree(mvtec_folder, outer / "tiny" / "tiny")
    (outer / "manifest.json").write_text("{}")
    samples = list(mvtec.read(outer))
    assert len(samples) == 48
    assert samples[0].source == "tiny/tiny/bolt/test/good/000.png"
    assert {sample.category for sample in samples} == {"bolt", "tile"}
    assert readers.detect(outer)[0] == "mvtec"


def test_one_category_alone_within_a_folder_or_as_the_folder(mvtec_folder: Path) -> None:
    shutil.rmtree(mvtec_folder / "tile")
    assert {sample.category for sample in mvtec.read(mvtec_folder)} == {"bolt"}
    samples = list(mvtec.read(mvtec_folder / "bolt"))
    assert len(samples) == 24
    assert {(sample.dataset, sample.category) for sample in samples} == {("bolt", "bolt")}


def test_what_is_no_part_of_the_data_set_is_ignored(mvtec_folder: Path) -> None:
    for name in (
        "readme.txt",
        "bolt/license.txt",
        "bolt/train/good/.DS_Store",
        "bolt/test/good/._000.png",
        "__MACOSX/bolt/test/good/._000.png",
        ".cache/x/000.png",
        "bolt/train/good/.ipynb_checkpoints/000.png",
        "bolt/ground_truth/good/000_mask.png",
    ):
        path = mvtec_folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert len(list(mvtec.read(mvtec_folder))) == 48


def test_everything_that_is_wrong_is_listed_in_one_error(mvtec_folder: Path) -> None:
    (mvtec_folder / "bolt/ground_truth/hole/000_mask.png").unlink()
    shutil.rmtree(mvtec_folder / "tile/ground_truth/stain")
    (mvtec_folder / "tile/test/hole/002.png").unlink()
    for name in ("bolt/train/hole/a.png", "bolt/Test/good/b.png", "nail/training/c.jpg", "bolt/test/hole/deep/d.png"):
        (mvtec_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (mvtec_folder / name).touch()
    with pytest.raises(BadData) as error:
        list(mvtec.read(mvtec_folder))
    lines = error.value.problems
    assert sorted(lines) == [
        "bolt/Test/good: no place in the layout, or no image for the mask: b.png",
        f"bolt/test/hole/000.png: has no mask bolt/ground_truth/hole/000_mask.png{files.ADD_MASK}",
        "bolt/test/hole/deep: no place in the layout, or no image for the mask: d.png",
        "bolt/train/hole: no place in the layout, or no image for the mask: a.png",
        "nail/training: no place in the layout, or no image for the mask: c.jpg",
        "tile/ground_truth/hole: no place in the layout, or no image for the mask: 002_mask.png",
        *(
            f"tile/test/stain/{n:03d}.png: has no mask tile/ground_truth/stain/{n:03d}_mask.png{files.ADD_MASK}"
            for n in range(5)
        ),
    ]


def test_memory_does_not_grow_with_the_number_of_categories(tmp_path: Path) -> None:
    for number in (2, 12):
        raw = tmp_path / str(number)
        for category in range(number):
            for name in ("test/good", "test/hole", "ground_truth/hole"):
                folder = raw / f"c{category:02d}" / name
                folder.mkdir(parents=True)
                for image in range(100):
                    (folder / f"{image:03d}.png").touch()
        assert sum(1 for _ in mvtec.read(raw)) == number * 200
    _, few, many = peaks(_read_through, (tmp_path / "2",), (tmp_path / "2",), (tmp_path / "12",))
    assert many < 1.2 * few


def _read_through(raw: Path) -> None:
    for _ in mvtec.read(raw):
        pass


def test_a_layout_without_an_image(tmp_path: Path) -> None:
    (tmp_path / "bolt" / "train" / "good").mkdir(parents=True)
    with pytest.raises(AdfmError, match="no image in any place of the layout"):
        list(mvtec.read(tmp_path))
