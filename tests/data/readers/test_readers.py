import shutil
from pathlib import Path

import pytest

from adfm.data import readers
from adfm.errors import AdfmError
from adfm.records import Sample
from tests.data.readers import layouts
from tests.data.readers.layouts import DRAWN, LAYOUTS, Truth


def truth(raw: Path, sample: Sample) -> Truth:
    masks = tuple(mask.relative_to(raw).as_posix() for mask in sample.masks)
    return Truth(sample.category, sample.defect, masks, sample.split, sample.group)


@pytest.mark.parametrize("name", LAYOUTS)
def test_samples(name: str, tmp_path: Path) -> None:
    layout, build = LAYOUTS[name]
    expected = build(tmp_path)
    samples = list(readers.LAYOUTS[layout].read(tmp_path))
    assert {sample.source: truth(tmp_path, sample) for sample in samples} == expected
    assert len(samples) == len(expected)
    for sample in samples:
        assert sample.image == tmp_path / sample.source
        assert sample.label == ("anomalous" if sample.defect else "normal")
        assert sample.dataset == (sample.source.split("/")[0] if name == "mmad" else tmp_path.name)
    assert list(readers.LAYOUTS[layout].read(tmp_path)) == samples


@pytest.mark.parametrize("name", [*LAYOUTS, *DRAWN])
def test_exactly_one_layout_matches(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name][0] if name in LAYOUTS else name
    (LAYOUTS[name][1] if name in LAYOUTS else DRAWN[name])(tmp_path)
    assert [known for known, of in readers.LAYOUTS.items() if of.matches and of.matches(tmp_path)] == [layout]
    assert readers.detect(tmp_path)[0] == layout
    assert list(readers.LAYOUTS[layout].read(tmp_path))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("outer", ["VisA_2022 (1)", "наборы данных/set"])
def test_a_data_set_in_folders_of_its_own(name: str, outer: str, tmp_path: Path) -> None:
    layout, build = LAYOUTS[name]
    if name == "dtd-synthetic" and "/" in outer:
        pytest.skip("has two such folders of its own")
    expected = build(tmp_path / outer)
    (tmp_path / "manifest.json").write_text("{}")
    assert readers.detect(tmp_path)[0] == layout
    sources = {sample.source for sample in readers.LAYOUTS[layout].read(tmp_path)}
    assert sources == {f"{outer}/{source}" for source in expected}


@pytest.mark.parametrize("name", LAYOUTS)
def test_hidden_files_are_ignored(name: str, tmp_path: Path) -> None:
    layout, build = LAYOUTS[name]
    expected = build(tmp_path)
    for source in expected:
        hidden = (tmp_path / source).parent / f"._{Path(source).name}"
        hidden.touch()
    for folder in (".cache", "__MACOSX"):
        shutil.copytree(tmp_path, tmp_path / folder, ignore=lambda *_: [".cache", "__MACOSX"])
    samples = list(readers.LAYOUTS[layout].read(tmp_path))
    assert {sample.source: truth(tmp_path, sample) for sample in samples} == expected
    assert readers.detect(tmp_path)[0] == layout


def test_every_layout_is_described() -> None:
    assert all(layout.form for layout in readers.LAYOUTS.values())
    assert [name for name, layout in readers.LAYOUTS.items() if not layout.matches] == ["visa-1cls"]


def test_detection_says_what_was_seen(tmp_path: Path) -> None:
    layouts.mvtec(tmp_path)
    assert readers.detect(tmp_path) == (
        "mvtec",
        "bottle/ground_truth/broken_large/ (1 .png), bottle/ground_truth/contamination/ (1 .png),"
        " bottle/test/broken_large/ (1 .png), bottle/test/contamination/ (1 .png), bottle/test/good/ (1 .png),"
        " bottle/train/good/ (3 .png), metal_nut/ground_truth/broken_large/ (1 .png),"
        " metal_nut/ground_truth/contamination/ (1 .png)",
    )


def test_an_unknown_layout_is_an_error_that_says_what_was_seen(tmp_path: Path) -> None:
    for name in ("photos/1.png", "notes/1.txt", "more/x/y.png", "a.JPG", "b.jpg", "README"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(AdfmError) as error:
        readers.detect(tmp_path)
    seen = (
        "Seen there: more/x/ (1 .png), notes/ (1 .txt), and 1 more folders, 2 .jpg, 1 without extension. The layouts"
        " are:"
    )
    assert seen in str(error.value)
    assert "\n  btad: <category>/train/ok/*.png" in str(error.value)


def test_images_in_the_only_folder_are_seen_too(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    for name in ("img/1.png", "labels.csv"):
        (tmp_path / name).touch()
    with pytest.raises(AdfmError, match=r"Seen there: img/ \(1 \.png\), 1 \.csv\."):
        readers.detect(tmp_path)


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AdfmError, match=r"Seen there: nothing\."):
        readers.detect(tmp_path)


def test_two_layouts_in_one_folder_are_an_error_that_asks_which(tmp_path: Path) -> None:
    layouts.mvtec(tmp_path)
    layouts.btad(tmp_path)
    with pytest.raises(AdfmError, match="may be in any of these layouts: mvtec, btad") as error:
        readers.detect(tmp_path)
    assert "--layout mvtec" in str(error.value)
    with pytest.raises(AdfmError, match="03/test/ko/0000.bmp: has no mask|03/train/ok: no place in the layout"):
        list(readers.LAYOUTS["mvtec"].read(tmp_path))


def test_mmad_with_one_part_alone_is_mmad(tmp_path: Path) -> None:
    layouts.goodsad(tmp_path / "GoodsAD")
    (tmp_path / "mmad.json").write_text("{}")
    assert readers.detect(tmp_path)[0] == "mmad"


def test_one_category_of_visa_is_visa_although_its_table_looks_like_ones_own(tmp_path: Path) -> None:
    layouts.visa(tmp_path)
    for other in ("candle", "split_csv"):
        shutil.rmtree(tmp_path / other)
    assert readers.detect(tmp_path)[0] == "visa"
    assert readers.detect(tmp_path / "pcb1")[0] == "visa"


@pytest.mark.parametrize("layout", readers.LAYOUTS)
def test_a_layout_without_an_image(layout: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdfmError, match=rf"\(layout {'mvtec' if layout == 'visa-1cls' else layout}\)"):
        list(readers.LAYOUTS[layout].read(tmp_path))


def test_the_only_folder_is_among_what_was_seen(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    (tmp_path / "notes.md").touch()
    with pytest.raises(AdfmError, match=r"Seen there: photos/ \(1 \.png\), 1 \.md\."):
        readers.detect(tmp_path)
