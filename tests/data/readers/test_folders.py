import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from adfm.data import inspection, readers
from adfm.data.problems import BadData
from adfm.data.readers import folders
from adfm.errors import AdfmError
from adfm.params import Convert
from adfm.records import Sample
from tests.data.readers import layouts
from tests.data.readers.drawn import touch
from tests.data.readers.layouts import image, mask


def read(raw: Path) -> dict[str, Sample]:
    samples = {sample.source: sample for sample in folders.read(raw)}
    assert len(samples) == len(list(folders.read(raw)))
    return samples


def labels(raw: Path) -> dict[str, tuple[str, str | None]]:
    return {source: (sample.category, sample.defect) for source, sample in read(raw).items()}


def problems(raw: Path) -> list[str]:
    with pytest.raises(BadData) as error:
        list(folders.read(raw))
    return error.value.problems


@pytest.mark.parametrize(
    "normal", ["good", "OK", "Normal", "pass", "Passed", "free", "defect_free", "no defect", "non-defective"]
)
def test_a_normal_folder_makes_those_beside_it_defects(normal: str, tmp_path: Path) -> None:
    touch(tmp_path, f"{normal}/a.jpg", "NG/b.jpg", "deep scratch/c.JPG")
    assert readers.detect(tmp_path)[0] == "folders"
    assert labels(tmp_path) == {
        f"{normal}/a.jpg": (tmp_path.name, None),
        "NG/b.jpg": (tmp_path.name, "NG"),
        "deep scratch/c.JPG": (tmp_path.name, "deep scratch"),
    }
    assert not any(sample.located for sample in folders.read(tmp_path))


def test_words_that_all_folders_share_do_not_count(tmp_path: Path) -> None:
    touch(tmp_path / "casting", "train/def_front/a.jpeg", "train/ok_front/b.jpeg", "test/ok_front/c.jpeg")
    touch(tmp_path / "tiles", "MT_Free/Imgs/a.jpg", "MT_Fray/Imgs/b.jpg", "MT_Blow_Hole/Imgs/c.jpg")
    assert [sample.defect for sample in folders.read(tmp_path / "casting")] == ["def", None, None]
    assert [sample.defect for sample in folders.read(tmp_path / "tiles")] == ["Blow_Hole", "Fray", None]


def test_folders_within_a_general_one_name_the_defects_unless_they_are_numbers(tmp_path: Path) -> None:
    touch(tmp_path, "OK/S0001/a.jpg", "NG/scratch/S0002/b.jpg", "NG/2024-01-05/c.jpg", "NG/d.jpg")
    defects = {source: defect for source, (_, defect) in labels(tmp_path).items()}
    assert defects == {
        "OK/S0001/a.jpg": None,
        "NG/scratch/S0002/b.jpg": "scratch",
        "NG/2024-01-05/c.jpg": "NG",
        "NG/d.jpg": "NG",
    }


def test_folders_that_are_in_normal_and_anomalous_ones_are_categories(tmp_path: Path) -> None:
    touch(tmp_path, "OK/bolt/a.jpg", "OK/nut/b.jpg", "NG/bolt/dent/c.jpg", "NG/nut/d.jpg")
    assert labels(tmp_path) == {
        "OK/bolt/a.jpg": ("bolt", None),
        "OK/nut/b.jpg": ("nut", None),
        "NG/bolt/dent/c.jpg": ("bolt", "dent"),
        "NG/nut/d.jpg": ("nut", "NG"),
    }


def test_a_split_may_lack_normal_images(tmp_path: Path) -> None:
    touch(tmp_path, "train/bolt/good/a.jpg", "valid/bolt/crack/b.jpg", "test/bolt/crack/c.jpg")
    assert {source: (s.defect, s.split) for source, s in read(tmp_path).items()} == {
        "train/bolt/good/a.jpg": (None, "train"),
        "valid/bolt/crack/b.jpg": ("crack", "validation"),
        "test/bolt/crack/c.jpg": ("crack", "test"),
    }


@pytest.mark.parametrize(
    "name",
    ["good_2", "not_broken", "no_crack", "positive", "0", "unlabeled", "labels", "crack_ground_truth", "ok parts"],
)
def test_a_folder_that_may_be_either_is_refused(name: str, tmp_path: Path) -> None:
    touch(tmp_path, "good/a.jpg", f"{name}/b.jpg", "crack/c.jpg")
    (problem,) = problems(tmp_path)
    assert problem.startswith(f"{name}: it is not clear whether {name!r} is normal; rename the folder to good")


def test_a_contradiction_of_folders_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "good/a.jpg", "good/ng/b.jpg", "NG/good/c.jpg")
    assert problems(tmp_path) == [
        "NG/good: lies in NG, but is called good; rename one of the two",
        "good/ng: lies in good, but is called ng; rename one of the two",
    ]


def test_without_a_normal_folder_every_image_is_anomalous_if_a_person_says_so(tmp_path: Path) -> None:
    touch(tmp_path, "crazing/a.jpg", "rolled-in_scale/b.jpg", "patches/1/c.jpg")
    with pytest.raises(AdfmError, match="is in no layout"):
        readers.detect(tmp_path)
    samples = read(tmp_path)
    assert {s.defect for s in samples.values()} == {"crazing", "rolled-in_scale", "patches"}
    assert {s.notes for s in samples.values()} == {
        ("no folder is called good or alike, so that every image is anomalous",)
    }


@pytest.mark.parametrize("names", [["a.jpg", "b.jpg"], ["photos/a.jpg", "b.jpg"]])
def test_images_without_folders_of_kinds_are_refused(names: list[str], tmp_path: Path) -> None:
    touch(tmp_path, *names)
    assert not folders.matches(tmp_path)
    assert any(
        "no folder says whether its images are normal" in problem and "called good" in problem
        for problem in problems(tmp_path)
    )


def test_images_beside_the_kinds_are_refused_and_those_above_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "bolt/good/a.jpg", "bolt/crack/b.jpg", "figure.jpg", "bolt/test/c.jpg", "bolt/test/d.jpg")
    samples = list(folders.read(tmp_path))
    assert [sample.source for sample in samples] == ["bolt/crack/b.jpg", "bolt/good/a.jpg"]
    touch(tmp_path, "nut/crack/d.jpg")
    assert [problem.split(":")[0] for problem in problems(tmp_path)] == ["nut/crack"]


@pytest.mark.parametrize("name", ["x.json", "good/a.xml", "labels.csv", "metadata.jsonl"])
def test_annotations_that_nobody_reads_are_not_passed_over(name: str, tmp_path: Path) -> None:
    touch(tmp_path, "good/a.jpg", "bad/b.jpg")
    assert folders.matches(tmp_path)
    (tmp_path / name).write_text("")
    assert not folders.matches(tmp_path)
    with pytest.raises(AdfmError, match=f"{name} may say more .* --layout folders"):
        readers.detect(tmp_path)
    assert len(read(tmp_path)) == 2


@pytest.mark.parametrize(
    ("photo", "drawn"),
    [
        ("crack/0.jpg", "mask/crack/0.png"),
        ("crack/0.jpg", "masks/crack/0_mask.png"),
        ("test/crack/0.png", "ground_truth/crack/0_mask.png"),
        ("test/crack/0.png", "test/masks/crack/0.png"),
        ("crack/images/0.jpg", "crack/masks/0.png"),
        ("images/crack/0.jpg", "masks/crack/0.jpg"),
        ("crack/0.jpg", "ground_truth/0.png"),
        ("crack/0.jpg", "crack_mask/0.png"),
        ("crack/0.png", "crack/0_mask.png"),
        ("crack/0.bmp", "crack/0-GT.bmp"),
        ("crack/0.jpg", "crack/0.png"),
        ("crack/0.bmp", "crack/0.png"),
        ("crack/u\u0308.jpg", "mask/crack/\u00fc.png"),
    ],
)
def test_masks_in_folders_and_beside(photo: str, drawn: str, tmp_path: Path) -> None:
    for name in ("good/0.jpg", photo):
        image(tmp_path, name)
    mask(tmp_path, drawn)
    samples = read(tmp_path)
    assert samples.keys() == {"good/0.jpg", photo}
    assert samples[photo].masks == (tmp_path / drawn,)
    assert (samples[photo].defect, samples["good/0.jpg"].masks) == ("crack", ())
    row = inspection.inspect(samples[photo], Convert())
    assert (row["boxes"], row["problems"]) == ([[10, 5, 14, 8]], [])


def test_a_mask_that_is_missing_where_others_are_there_is_an_error_that_names_the_image(tmp_path: Path) -> None:
    touch(tmp_path, "good/0.jpg", "crack/0.jpg", "crack/1.jpg", "mask/crack/0.png", "dent/0.jpg")
    assert problems(tmp_path) == [
        "crack/1.jpg: has no mask, but other images of this kind have one; add it, or remove all of them to train on"
        " the labels alone"
    ]
    (tmp_path / "crack/1.jpg").unlink()
    assert read(tmp_path)["dent/0.jpg"].masks == ()


def test_masks_of_no_image_of_several_and_several_of_one_are_errors(tmp_path: Path) -> None:
    touch(tmp_path, "good/0.jpg", "crack/0.jpg", "mask/crack/0.png", "mask/crack/1.png", "mask/dent/2.png")
    assert [problem.split(";")[0] for problem in problems(tmp_path)] == [
        "mask/crack: no image for the mask: 1.png",
        "mask/dent: no image for the mask: 2.png",
    ]
    other = tmp_path / "other"
    touch(other, "good/0.jpg", "crack/0.jpg", "dent/0.jpg", "masks/0.png")
    assert problems(other) == [
        "masks/0.png: may be the mask of dent/0.jpg, and of another image; put masks into a folder for each folder of"
        " images"
    ]
    several = tmp_path / "several"
    touch(several, "good/0.jpg", "crack/0.jpg", "masks/crack/0.png", "masks/crack/0_mask.png")
    assert problems(several) == ["crack/0.jpg: has several masks, keep one: masks/crack/0.png, masks/crack/0_mask.png"]


def test_two_photographs_of_one_name_are_not_taken_for_a_photograph_and_its_mask(tmp_path: Path) -> None:
    for name in ("good/0.jpg", "good/0.png", "crack/1.jpg", "crack/1.jpeg"):
        image(tmp_path, name)
    assert problems(tmp_path) == [
        "crack/1.jpeg: has the same name as 1.jpg, which is not its mask; keep one",
        "good/0.jpg: has the same name as 0.png, which is not its mask; keep one",
    ]


def test_a_mask_by_its_name_without_an_image_is_not_taken_for_a_photograph(tmp_path: Path) -> None:
    touch(tmp_path, "good/0.jpg", "crack/0_mask.png", "crack/1.jpg")
    (problem,) = problems(tmp_path)
    assert problem.startswith("crack/0_mask.png: is a mask by its name, but the image 0.* beside it is missing")


def test_a_normal_image_with_a_defect_in_its_mask_is_refused(tmp_path: Path) -> None:
    image(tmp_path, "good/0.jpg")
    mask(tmp_path, "mask/good/0.png")
    image(tmp_path, "crack/0.jpg")
    row = inspection.inspect(read(tmp_path)["good/0.jpg"], Convert())
    assert row["problems"] == ["good/0.jpg: is normal, but defects are marked on it"]


def test_a_black_mask_in_the_folder_of_a_defect_leaves_the_label_alone(tmp_path: Path) -> None:
    for number, value in enumerate((0, 255)):
        image(tmp_path, f"uneven/{number}.jpg")
        mask(tmp_path, f"mask/uneven/{number}.png", value)
    image(tmp_path, "good/0.jpg")
    samples = read(tmp_path)
    row = inspection.inspect(samples["uneven/0.jpg"], Convert())
    assert (row["label"], row["defect"], row["boxes"], row["mask"]) == ("anomalous", "uneven", [], None)
    assert row["notes"] == ["its mask shows no defect, so that its label is all that is known"]
    assert row["problems"] == []
    row = inspection.inspect(samples["uneven/1.jpg"], Convert())
    assert (len(row["boxes"]), row["mask"] is None, row["notes"]) == (1, False, [])


def test_where_masks_alone_say_what_is_normal_every_image_needs_one(tmp_path: Path) -> None:
    layouts.images_and_masks(tmp_path)
    rows = {source: inspection.inspect(sample, Convert()) for source, sample in read(tmp_path).items()}
    assert {source: row["label"] for source, row in rows.items()} == {
        f"{split}/images/{number}.jpg": label
        for split in ("train", "val")
        for number, label in enumerate(("normal", "anomalous"))
    }
    image(tmp_path, "train/images/7.jpg")
    (problem,) = problems(tmp_path)
    assert problem.startswith("train/images/7.jpg: has no mask, and no folder that says whether it is normal; add")
    (tmp_path / "train/images/good").mkdir()
    (tmp_path / "train/images/7.jpg").rename(tmp_path / "train/images/good/7.jpg")
    assert read(tmp_path)["train/images/good/7.jpg"].label == "normal"
    assert folders.matches(tmp_path)


def test_names_that_are_no_text_for_a_prompt_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "good/a.jpg", "cra\nck/b.jpg")
    (problem,) = problems(tmp_path)
    assert "is not a name" in problem


def test_a_damaged_mask_beside_is_left_to_conversion(tmp_path: Path) -> None:
    touch(tmp_path, "good/a.jpg", "crack/b.jpg", "crack/b.png")
    assert read(tmp_path)["crack/b.jpg"].masks == (tmp_path / "crack/b.png",)


@settings(deadline=None)  # files are written
@given(
    st.dictionaries(
        st.tuples(
            st.sampled_from(["bolt", "nut"]),
            st.sampled_from(["train", "test"]),
            st.sampled_from(["good", "NG", "crack", "deep_dent"]),
            st.integers(0, 2),
        ),
        st.booleans(),
        min_size=1,
    ),
    st.sampled_from(["mask/{kind}/{name}.png", "{kind}/mask/{name}_mask.png", "{kind}/{name}_gt.png"]),
    st.sampled_from(["{split}/{category}", "{category}/{split}", "{category}"]),
)
def test_any_tree_of_such_folders_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    tree: dict[tuple[str, str, str, int], bool],
    form: str,
    place: str,
) -> None:
    raw = tmp_path_factory.mktemp("tree")
    masked = {(place.format(category=c, split=s), kind) for (c, s, kind, _), drawn in tree.items() if drawn}
    expected = {}
    for category, split, kind, number in (*tree, ("bolt", "train", "good", 9), ("nut", "train", "good", 9)):
        base = place.format(category=category, split=split)
        name = f"{base}/{kind}/{number}.jpg"
        masks = []
        if kind != "good" and (base, kind) in masked:
            masks = [f"{base}/{form.format(kind=kind, name=number)}"]
        touch(raw, name, *masks)
        defect = None if kind == "good" else kind
        expected[name] = (category, defect, split if "split" in place else None, masks)
    assert {
        source: (s.category, s.defect, s.split, [m.relative_to(raw).as_posix() for m in s.masks])
        for source, s in read(raw).items()
    } == expected


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    touch(tmp_path, "good/a.jpg", "crack/b.jpg")
    os.mkfifo(tmp_path / "crack/b.png")
    assert read(tmp_path)["crack/b.jpg"].masks == (tmp_path / "crack/b.png",)


def test_images_are_not_opened(tmp_path: Path) -> None:
    touch(tmp_path, "good/a.jpg", "bad/b.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "open", lambda *_: pytest.fail("opened"))
        assert len(read(tmp_path)) == 2
