import hashlib
import io
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adfm.data import conversion, duplicates, inspection, masks, shards, show, sources, splits
from adfm.data.problems import BadData, MissingImage
from adfm.data.readers import LAYOUTS
from adfm.errors import AdfmError
from adfm.params import Convert, Params
from adfm.records import Record, Sample
from adfm.serving.predict import decode
from tests.data.readers.layouts import LAYOUTS as LAYOUTS_OF_TESTS
from tests.memory import peaks


def _converted(raw: Path, **settings: object) -> dict[str, Record]:
    out = raw.parent / "shards"
    conversion.convert(raw, out, Params.model_validate({"convert": settings}))
    return {record.source: record for record in shards.read(out)}


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_records(mvtec_folder: Path) -> None:
    records = _converted(mvtec_folder)
    assert len(records) == 48
    assert len({record.id for record in records.values()}) == 48
    record = records["bolt/test/hole/003.png"]
    raw = (mvtec_folder / record.source).read_bytes()
    assert record.image == raw
    assert record.sha256 == hashlib.sha256(raw).hexdigest()
    assert (record.width, record.height) == (48, 32)
    assert (record.dataset, record.category, record.defect, record.label) == ("tiny", "bolt", "hole", "anomalous")
    assert record.boxes == ((20, 7, 28, 13),)
    mask = Image.open(io.BytesIO(record.mask or b""))
    assert (mask.mode, mask.format, mask.size) == ("L", "PNG", (48, 32))
    assert (
        np.asarray(mask).tolist()
        == np.asarray(Image.open(mvtec_folder / "bolt/ground_truth/hole/003_mask.png")).tolist()
    )
    normal = records["bolt/test/good/003.png"]
    assert (normal.mask, normal.boxes, normal.defect, normal.label) == (None, (), None, "normal")
    assert all(record.split == "train" for source, record in records.items() if "/train/" in source)
    assert Counter(r.split for r in records.values()) == {"train": 8 + 18, "validation": 6, "test": 16}


def test_the_report_says_what_was_converted_and_how(mvtec_folder: Path) -> None:
    records = _converted(mvtec_folder, layout="mvtec", dilation=0.1)
    report = json.loads((mvtec_folder.parent / "shards" / "conversion.json").read_text())
    assert report["layout"] == {"name": "mvtec", "detected": False, "seen": None}
    assert report["params"]["convert"]["dilation"] == 0.1
    assert report["params"]["split"]["validation"] == 0.1
    assert (report["images"], report["normal"], report["anomalous"]) == (48, 28, 20)
    assert report["files"] == {"total": 68, "images": 48, "annotations_and_masks": 20, "left_out": 0}
    assert report["left_out"] == report["notes"] == report["moved"] == report["warnings"] == []
    assert report["boxes"] == {"before_dilation": 20, "after_dilation": 20}
    assert report["fingerprint"] == shards.fingerprint(mvtec_folder.parent / "shards")
    expected = Counter((r.split, r.category, r.label, r.defect) for r in records.values())
    assert {tuple(row.values())[:4]: row["images"] for row in report["counts"]} == expected


def test_the_same_input_gives_the_same_bytes_wherever_it_lies(mvtec_folder: Path, tmp_path: Path) -> None:
    _converted(mvtec_folder)
    sources.fetch(str(mvtec_folder), tmp_path / "elsewhere" / "tiny")  # with a manifest
    _converted(tmp_path / "elsewhere" / "tiny")
    one, other = _contents(mvtec_folder.parent / "shards"), _contents(tmp_path / "elsewhere" / "shards")
    reports = [json.loads(contents.pop("conversion.json")) for contents in (one, other)]
    assert one == other
    assert "bolt/train/good/ (4 .png)" in reports[0]["layout"].pop("seen")
    assert "1 .json" in reports[1]["layout"].pop("seen")
    assert reports[0] == reports[1]


def test_fragments_are_counted_before_and_after_dilation(mvtec_folder: Path) -> None:
    mask = np.zeros((32, 48), np.uint8)
    mask[4:8, 4:8] = mask[4:8, 10:14] = 255
    Image.fromarray(mask).save(mvtec_folder / "bolt/ground_truth/hole/000_mask.png")
    records = _converted(mvtec_folder, dilation=0.1)
    assert records["bolt/test/hole/000.png"].boxes == ((4, 4, 14, 8),)
    report = json.loads((mvtec_folder.parent / "shards" / "conversion.json").read_text())
    assert report["boxes"] == {"before_dilation": 21, "after_dilation": 20}


@pytest.mark.parametrize("mode", ["RGB.jpg", "L.png", "RGB.png"])
def test_common_images_are_embedded_byte_for_byte(mvtec_folder: Path, mode: str) -> None:
    kind, _, extension = mode.partition(".")
    (mvtec_folder / "bolt/test/good/000.png").unlink()
    path = mvtec_folder / f"bolt/test/good/000.{extension}"
    Image.new(kind, (40, 30), 77).save(path)
    assert _converted(mvtec_folder)[f"bolt/test/good/000.{extension}"].image == path.read_bytes()


def test_other_images_become_rgb(mvtec_folder: Path) -> None:
    folder = mvtec_folder / "bolt/test/good"
    for path in folder.iterdir():
        path.unlink()
    rgb = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    grey16 = np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40)
    image = Image.fromarray(rgb)
    image.save(folder / "a.bmp")
    image.save(folder / "b.webp", lossless=True)
    Image.fromarray(np.dstack([rgb, np.full((30, 40), 255, np.uint8)])).save(folder / "c.png")
    image.convert("CMYK").save(folder / "d.tif")
    Image.fromarray(grey16).save(folder / "e.png")
    image.quantize(16).save(folder / "f.png")
    records = _converted(mvtec_folder)

    def pixels(name: str) -> np.ndarray:
        decoded = Image.open(io.BytesIO(records[f"bolt/test/good/{name}"].image))
        assert (decoded.mode, decoded.format) == ("RGB", "PNG")
        return np.asarray(decoded)

    for name in ("a.bmp", "b.webp", "c.png", "d.tif"):
        assert pixels(name).tolist() == rgb.tolist(), name
    scaled = np.rint(grey16 / 65535 * 255).astype(np.uint8)
    assert pixels("e.png").tolist() == np.dstack([scaled] * 3).tolist()
    assert pixels("f.png").tolist() == np.asarray(image.quantize(16).convert("RGB")).tolist()


def test_grey_values_of_more_than_8_bits_are_scaled_by_one_range_a_set(mvtec_folder: Path) -> None:
    rng = np.random.default_rng(0)
    files = {"bolt/train/good/000.png": (300, 2000), "tile/test/good/001.png": (1000, 4095)}
    for name, (low, high) in files.items():
        values = rng.integers(low, high + 1, (30, 40)).astype(np.uint16)
        values[0, :2] = low, high
        Image.fromarray(values).save(mvtec_folder / name)
    records = _converted(mvtec_folder)
    out = mvtec_folder.parent / "shards"
    assert json.loads((out / "conversion.json").read_text())["grey_range"] == [300, 4095]
    assert shards.grey_range(out) == (300, 4095)
    for name, (low, high) in files.items():
        with Image.open(io.BytesIO(records[name].image)) as image:
            shades = np.asarray(image)[0, :2, 0].tolist()
            assert shades == [round((value - 300) / 3795 * 255) for value in (low, high)]
            # What a trained model is shown later is what it was shown in training.
            assert decode((mvtec_folder / name).read_bytes(), shards.grey_range(out)).tobytes() == image.tobytes()
    with pytest.raises(AdfmError, match="more than 8 bits, and the model was trained on none such"):
        decode((mvtec_folder / name).read_bytes())


def test_photographs_that_may_be_annotated_either_way_are_refused_beside_stored_ones(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    mask = np.zeros((30, 40), np.uint8)
    mask[3:13, 2:22] = 255
    drawn = {"size": [30, 40], "counts": list(masks.encoded(mask).counts)}  # on the picture as it is stored
    coco: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "dent"}]}
    for number, orientation in enumerate((6, 3, 1), 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        pixels = np.random.default_rng(number).integers(0, 255, (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(raw / f"{number}.jpg", exif=exif)
        coco["images"].append({"id": number, "file_name": f"{number}.jpg", "width": 40, "height": 30})
        annotation = {"id": number, "image_id": number, "category_id": 1, "bbox": [2, 3, 20, 10], "iscrowd": 0}
        coco["annotations"].append(annotation | {"segmentation": drawn, "area": 200})
    (raw / "a.json").write_text(json.dumps(coco))
    with pytest.raises(AdfmError) as refused:
        _converted(raw)
    assert "2.jpg: has an EXIF orientation" in str(refused.value)
    assert "1.jpg" not in str(refused.value) and "3.jpg" not in str(refused.value)
    Image.fromarray(np.random.default_rng(9).integers(0, 255, (30, 40, 3), np.uint8)).save(raw / "2.jpg")
    records = _converted(raw)
    assert records["1.jpg"].boxes == ((17, 2, 27, 22),)
    assert records["2.jpg"].boxes == records["3.jpg"].boxes == ((2, 3, 22, 13),)


@pytest.mark.parametrize(
    ("orientation", "mask_is_upright"),
    # Only of quarter turns does the size tell that a mask is upright already.
    [*((orientation, False) for orientation in range(2, 9)), *((orientation, True) for orientation in range(5, 9))],
)
def test_a_turned_photograph_becomes_upright_and_its_mask_with_it(
    mvtec_folder: Path, orientation: int, mask_is_upright: bool
) -> None:
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[4:10, 6:20] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    (mvtec_folder / "bolt/test/hole/000.png").unlink()
    image_path = mvtec_folder / "bolt/test/hole/000.JPG"
    mask_path = mvtec_folder / "bolt/ground_truth/hole/000_mask.png"
    Image.fromarray(pixels).save(image_path, quality=100, exif=exif)
    record = None
    Image.fromarray(pixels[..., 0]).save(mask_path)
    if mask_is_upright:
        record = _converted(mvtec_folder)["bolt/test/hole/000.JPG"]
        Image.open(io.BytesIO(record.mask or b"")).save(mask_path)
    upright = _converted(mvtec_folder)["bolt/test/hole/000.JPG"]
    if record:
        assert upright == record
    shown = Image.open(io.BytesIO(upright.image))
    assert shown.size == (upright.width, upright.height) == ((40, 30) if orientation < 5 else (30, 40))
    assert shown.getexif().get(0x0112, 1) == 1
    white = np.argwhere(np.asarray(shown)[..., 0] > 127)
    (y1, x1), (y2, x2) = white.min(axis=0), white.max(axis=0) + 1
    assert upright.boxes == ((x1, y1, x2, y2),)


def test_bad_files_are_listed_in_full_and_nothing_is_lost(mvtec_folder: Path) -> None:
    _converted(mvtec_folder)
    before = _contents(mvtec_folder.parent / "shards")
    truth = mvtec_folder / "bolt/ground_truth/hole"
    Image.fromarray(np.zeros((32, 48), np.uint8)).save(truth / "000_mask.png")
    Image.fromarray(np.full((32, 47), 255, np.uint8)).save(truth / "001_mask.png")
    (truth / "002_mask.png").write_text("no image")
    speck = np.zeros((32, 48), np.uint8)
    speck[3, 3] = 255
    Image.fromarray(speck).save(truth / "003_mask.png")
    (mvtec_folder / "bolt/test/good/000.png").write_bytes(b"")
    truncated = mvtec_folder / "tile/test/stain/000.png"
    truncated.write_bytes(truncated.read_bytes()[:2000])
    Image.fromarray(np.zeros((9, 9), np.float32)).save(mvtec_folder / "tile/train/good/9.tif")
    with pytest.raises(AdfmError) as error:
        _converted(mvtec_folder)
    text = str(error.value)
    assert "of 7 problems" in text
    for part in (
        "bolt/test/hole/000.png: is anomalous, but its mask bolt/ground_truth/hole/000_mask.png shows no defect",
        "bolt/test/hole/001.png: is 48x32, but its mask bolt/ground_truth/hole/001_mask.png is 47x32",
        "bolt/test/hole/002.png: its mask bolt/ground_truth/hole/002_mask.png cannot be read",
        "bolt/test/hole/003.png: every defect is smaller than convert.min_area (4 pixels)",
        "bolt/test/good/000.png: cannot be read",
        "tile/test/stain/000.png: cannot be read",
        "tile/train/good/9.tif: cannot be read (its pixels are floating point",
    ):
        assert part in text
    assert _contents(mvtec_folder.parent / "shards") == before
    assert sorted(path.name for path in mvtec_folder.parent.iterdir()) == ["shards", "tiny"]


def test_pillow_guards_against_decompression_bombs(mvtec_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)  # an image of more than twice as many is refused
    with pytest.raises(AdfmError, match="decompression bomb"):
        _converted(mvtec_folder)


def test_a_file_that_changes_while_it_is_converted(mvtec_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = mvtec_folder / "bolt/test/good/001.png"
    real = splits.assign

    def assign(*arguments: Any) -> Any:
        shutil.copy(mvtec_folder / "bolt/test/good/000.png", changed)
        return real(*arguments)

    monkeypatch.setattr(splits, "assign", assign)
    with pytest.raises(AdfmError, match="bolt/test/good/001.png has changed since it was inspected; convert again"):
        _converted(mvtec_folder)
    monkeypatch.setattr(splits, "assign", lambda *arguments: (changed.unlink(missing_ok=True), real(*arguments))[1])
    with pytest.raises(AdfmError, match="bolt/test/good/001.png cannot be read any more"):
        _converted(mvtec_folder)
    assert sorted(path.name for path in mvtec_folder.parent.iterdir()) == ["tiny"]


def test_identical_images_share_a_split_but_not_an_id(mvtec_folder: Path) -> None:
    for number in range(1, 10):
        shutil.copy(mvtec_folder / "bolt/test/good/000.png", mvtec_folder / f"bolt/test/good/{number:03d}.png")
    same = [record for source, record in _converted(mvtec_folder).items() if source.startswith("bolt/test/good")]
    assert len({record.id for record in same}) == 10
    assert len({record.sha256 for record in same}) == len({record.split for record in same}) == 1


def test_no_such_folder_or_layout(tmp_path: Path, mvtec_folder: Path) -> None:
    with pytest.raises(AdfmError, match="no such folder; get a data set there with `adfm fetch"):
        conversion.convert(tmp_path / "missing", tmp_path / "out", Params())
    with pytest.raises(AdfmError, match="the layout 'mvtek' is unknown; did you mean 'mvtec'"):
        _converted(mvtec_folder, layout="mvtek")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdfmError, match="Seen there: nothing"):
        conversion.convert(tmp_path / "empty", tmp_path / "out", Params())
    assert not (tmp_path / "out").exists()


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    for images, part in ((10, "few"), (80, "many")):
        folder = tmp_path / part / "bolt" / "train" / "good"
        folder.mkdir(parents=True)
        for number in range(images):
            noise[0, 0] = number
            Image.fromarray(noise).save(folder / f"{number}.png", compress_level=0)
    assert sum(path.stat().st_size for path in folder.iterdir()) > 20 * 2**20
    few, many = peaks(
        _convert_in_small_groups, *((tmp_path / part, tmp_path / f"{part}.out") for part in ("few", "many"))
    )
    assert many < few + 3 * 2**20


def _convert_in_small_groups(raw: Path, out: Path) -> None:
    shards._GROUP_BYTES = 2**20
    conversion.convert(raw, out, Params())


def test_only_a_few_items_are_ahead_of_a_slow_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def double(number: int) -> int:
        started.append(number)
        return 2 * number

    monkeypatch.setattr("adfm.process.cpus.count", lambda: 2)
    with ThreadPoolExecutor(2) as pool:
        results = conversion.map_in_order(pool, double, range(100))
        assert next(results) == 0
        time.sleep(0.2)
        assert 1 <= len(started) <= 5
        assert list(results) == [2 * number for number in range(1, 100)]


class Killed(BaseException):
    """As good as SIGKILL: nothing catches it."""


def _counted(monkeypatch: pytest.MonkeyPatch, until: int = 10**9) -> list[str]:
    """The sources of the images that are looked at from now on, up to the one at which the conversion is killed."""
    seen: list[str] = []
    real = inspection.inspect

    def inspect(sample: Sample, settings: Convert) -> Any:
        seen.append(sample.source)
        if len(seen) > until:
            raise Killed
        return real(sample, settings)

    monkeypatch.setattr(inspection, "inspect", inspect)
    return seen


def test_a_killed_conversion_goes_on_where_it_was(
    mvtec_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "RUN", 10)
    settings = Params.model_validate({"convert": {"shard_images": 5}})
    conversion.convert(mvtec_folder, tmp_path / "at-once", settings)

    with monkeypatch.context() as patched:
        _counted(patched, until=24)
        with pytest.raises(Killed):
            conversion.convert(mvtec_folder, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()

    written: list[Path] = []
    real = shards.write_one

    def write_one(records: Any, path: Path) -> None:
        if len(written) == 3:
            path.with_name(path.name + ".partial").write_bytes(b"half a shard")
            raise Killed
        written.append(path)
        real(records, path)

    with monkeypatch.context() as patched:
        seen = _counted(patched)
        patched.setattr(shards, "write_one", write_one)
        with pytest.raises(Killed):
            conversion.convert(mvtec_folder, tmp_path / "out", settings)
    assert len(seen) == 48 - 20
    assert not (tmp_path / "out").exists()

    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("*.parquet")}
    assert len(finished) == 3
    with monkeypatch.context() as patched:
        seen = _counted(patched)
        conversion.convert(mvtec_folder, tmp_path / "out", settings)
    assert seen == []
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished} == finished
    assert _contents(tmp_path / "out") == _contents(tmp_path / "at-once")


def test_only_what_has_changed_is_looked_at_again(
    mvtec_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "RUN", 10)
    bad = mvtec_folder / "tile/test/stain/004.png"
    good = bad.read_bytes()
    bad.write_bytes(good[:500])
    for again in (False, True):
        with monkeypatch.context() as patched:
            seen = _counted(patched)
            with pytest.raises(AdfmError, match="\n    tile/test/stain/004.png: cannot be read"):
                conversion.convert(mvtec_folder, tmp_path / "out", Params())
        assert len(seen) == (0 if again else 48)
    bad.write_bytes(good)
    with monkeypatch.context() as patched:
        seen = _counted(patched)
        conversion.convert(mvtec_folder, tmp_path / "out", Params())
    assert len(seen) == 8  # the last run
    conversion.convert(mvtec_folder, tmp_path / "at-once", Params())
    assert _contents(tmp_path / "out") == _contents(tmp_path / "at-once")


def test_other_settings_use_nothing_of_what_is_finished(
    mvtec_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "RUN", 10)
    with monkeypatch.context() as patched:
        _counted(patched, until=44)
        with pytest.raises(Killed):
            conversion.convert(mvtec_folder, tmp_path / "out", Params())
    seen = _counted(monkeypatch)
    conversion.convert(mvtec_folder, tmp_path / "out", Params.model_validate({"convert": {"dilation": 0.0}}))
    assert len(seen) == 48


@pytest.mark.parametrize("of", [1, 3, 7])
def test_parts_make_the_same_shards(
    mvtec_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: int
) -> None:
    monkeypatch.setattr(conversion, "RUN", 10)
    params = Params.model_validate({"convert": {"layout": "mvtec", "shard_images": 7}})
    conversion.convert(mvtec_folder, tmp_path / "at-once", params)
    seen = _counted(monkeypatch)
    parts = [tmp_path / f"part{number}" for number in range(1, of + 1)]
    for number, part in enumerate(parts, start=1):
        elsewhere = tmp_path / f"machine{number}" / "tiny"
        shutil.copytree(mvtec_folder, elsewhere, copy_function=shutil.copyfile)  # with times of its own
        conversion.inspect_part(elsewhere, part, params, number, of)
        conversion.inspect_part(elsewhere, part, params, number, of)  # over an earlier result
    assert Counter(seen).total() == 2 * 48
    conversion.convert(mvtec_folder, tmp_path / "out", params, parts[::-1])
    assert Counter(seen).total() == 2 * 48
    assert _contents(tmp_path / "out") == _contents(tmp_path / "at-once")


def test_parts_that_make_no_whole(mvtec_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "RUN", 10)
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))

    def refused(*parts: Path) -> str:
        with pytest.raises(AdfmError) as error:
            conversion.convert(mvtec_folder, tmp_path / "out", Params(), parts)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    conversion.inspect_part(mvtec_folder, one, Params(), 1, 2)
    assert "part 2 of 2 is missing" in refused(one)
    assert f"{two}: is not a part of a conversion" in refused(one, two)
    conversion.inspect_part(mvtec_folder, two, Params(), 1, 2)
    assert f"{two}: is part 1 of 2, and so is {one}" in refused(one, two)
    other = Params.model_validate({"convert": {"dilation": 0.1, "min_area": 9}})
    conversion.inspect_part(mvtec_folder, two, other, 2, 2)
    assert f"{two}: was made with dilation 0.1, min_area 9" in refused(one, two)
    conversion.inspect_part(mvtec_folder, three, Params(), 2, 3)
    assert "some are parts of 2 and others of 3" in refused(one, three)
    conversion.inspect_part(mvtec_folder, two, Params(), 2, 2)
    (mvtec_folder / "bolt/test/hole/004.png").write_bytes(b"")  # in the second run
    assert f"these parts were made from other raw data:\n  {two}" in refused(one, two)
    (mvtec_folder / "bolt/test/good/000.png").unlink()
    assert f"other raw data:\n  {one}\n  {two}" in refused(one, two)


def test_a_held_out_category_is_named_as_it_is(mvtec_folder: Path, tmp_path: Path) -> None:
    params = Params.model_validate({"split": {"holdout_categories": ["tiel"]}})
    with pytest.raises(AdfmError, match="has no category 'tiel'; did you mean 'tile'. There are: bolt, tile"):
        conversion.convert(mvtec_folder, tmp_path / "out", params)
    params = Params.model_validate({"split": {"holdout_categories": ["tile"]}})
    conversion.convert(mvtec_folder, tmp_path / "out", params)
    assert {record.split for record in shards.read(tmp_path / "out") if record.category == "tile"} == {"test"}


def test_near_duplicates_share_a_split_and_are_reported(mvtec_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = Image.open(mvtec_folder / "bolt/test/good/000.png").resize((480, 320), Image.Resampling.BICUBIC)
    for number in range(10):
        picture.save(mvtec_folder / f"bolt/test/good/{number:03d}.png", compress_level=number)
    for number in range(4):
        (mvtec_folder / f"bolt/train/good/{number:03d}.png").unlink()
        picture.save(mvtec_folder / f"bolt/train/good/{number:03d}.jpg", quality=70 + number)
    copies = [r for source, r in _converted(mvtec_folder).items() if source.startswith("bolt") and "good" in source]
    assert len({record.split for record in copies}) == 1
    report = json.loads((mvtec_folder.parent / "shards" / "conversion.json").read_text())
    assert report["near_duplicates"]["clusters"] == 1
    assert len(report["warnings"]) == 1
    assert "images of bolt look like copies of one picture" in report["warnings"][0]
    assert "adfm: warning: " in capsys.readouterr().err

    params = Params.model_validate({"split": {"near_duplicates": False}})
    conversion.convert(mvtec_folder, mvtec_folder.parent / "shards", params)
    report = json.loads((mvtec_folder.parent / "shards" / "conversion.json").read_text())
    assert report["near_duplicates"]["clusters"] == report["near_duplicates"]["clusters_in_several_splits"] == 1
    assert report["moved"] == report["warnings"] == []


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 99).save(buffer, "PNG")
    for images, part in ((100, "few"), (800, "many")):
        folder = tmp_path / part / "bolt" / "train" / "good"
        folder.mkdir(parents=True)
        for number in range(images):
            (folder / f"{number:05d}.png").write_bytes(buffer.getvalue() + b"%d" % number)
    few, many = peaks(
        _convert_in_short_runs, *((tmp_path / part, tmp_path / f"{part}.out") for part in ("few", "many"))
    )
    assert many < few + 700 * 2500


def _convert_in_short_runs(raw: Path, out: Path) -> None:
    conversion.RUN = 50
    conversion.convert(raw, out, Params())


def _mmad(raw: Path, images: int) -> dict[str, str]:
    """MMAD with `images` of each label of two products in MVTec-AD, all in DS-MVTec too, half of these as JPEG.

    Returns:
        Path of the copy by path of the original.
    """
    listed: dict[str, Any] = {}
    copies = {}
    for category in ("bottle", "cable"):
        for kind in ("good", "broken"):
            for number in range(images):
                name = f"MVTec-AD/{category}/test/{kind}/{number:03d}.png"
                copy = f"DS-MVTec/{category}/image/{kind}/{number:03d}.{'jpg' if number % 2 else 'png'}"
                rng = np.random.default_rng(list(name.encode()))
                picture = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((96, 96))
                for path in (name, copy):
                    (raw / path).parent.mkdir(parents=True, exist_ok=True)
                    picture.save(raw / path)
                    drawn = f"{'mask' if path == copy else 'ground_truth'}/{kind}/{number:03d}_mask.png"
                    if kind != "good":
                        mask = raw.joinpath(*path.split("/")[:2], drawn)
                        mask.parent.mkdir(parents=True, exist_ok=True)
                        Image.fromarray(np.pad(np.full((9, 9), 255, np.uint8), ((20, 67), (30, 57)))).save(mask)
                    listed[path] = {"mask_path": None if kind == "good" else drawn, "conversation": []}
                copies[name] = copy
    (raw / "mmad.json").write_text(json.dumps(listed))
    return copies


def test_a_share_of_mmad_is_for_training_and_no_picture_straddles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copies = _mmad(tmp_path / "raw", images=15)
    split = {"validation": 0.0, "test": 0.8}
    conversion.convert(tmp_path / "raw", tmp_path / "official", Params.model_validate({"split": split}))
    assert {record.split for record in shards.read(tmp_path / "official")} == {"test"}
    assert "no image is for training" in capsys.readouterr().err
    params = Params.model_validate({"split": split | {"redivide": True}})
    conversion.convert(tmp_path / "raw", tmp_path / "divided", params)
    assert "no image is for training" not in capsys.readouterr().err
    of = {record.source: record for record in shards.read(tmp_path / "divided")}
    assert all(of[name].split == of[copy].split for name, copy in copies.items())
    counts = Counter((record.category, record.label, record.split) for record in of.values())
    expected = {"train": 6, "test": 24}
    assert counts == {
        (category, label, split): images
        for category in ("bottle", "cable")
        for label in ("normal", "anomalous")
        for split, images in expected.items()
    }


def _labelme(raw: Path, name: str, *labels: str, image: bytes | None = None) -> None:
    """An image and its JSON file with a box for each label."""
    path = raw / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(list(name.encode())).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((96, 72)).save(path)
    if image is not None:
        path.write_bytes(image)
    shapes = [
        {"label": label, "points": [[10, 10], [30 + 9 * number, 30]], "shape_type": "rectangle", "flags": {}}
        for number, label in enumerate(labels)
    ]
    content = {"shapes": shapes, "imagePath": path.name, "imageData": None, "imageWidth": 96, "imageHeight": 72}
    path.with_suffix(".json").write_text(json.dumps(content))


def _and_problems(monkeypatch: pytest.MonkeyPatch, *problems: str) -> None:
    """Readers of LabelMe have these problems, too."""
    layout = LAYOUTS["labelme"]

    def read(raw: Path) -> Iterator[Sample]:
        yield from layout.read(raw)
        raise BadData(raw, "labelme", problems)

    monkeypatch.setitem(LAYOUTS, "labelme", layout._replace(read=read))


def _report(raw: Path, **split: object) -> dict[str, Any]:
    """The report of a conversion that skips missing images."""
    params = Params.model_validate({"convert": {"layout": "labelme", "missing": "skip"}, "split": split})
    conversion.convert(raw, raw.parent / "shards", params)
    report: dict[str, Any] = json.loads((raw.parent / "shards" / "conversion.json").read_text())
    return report


def test_every_file_is_in_the_report_and_on_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _and_problems(monkeypatch, MissingImage("gone\n.json: image 'gone.png' is missing"))
    raw = tmp_path / "li\x1b[31mne"
    for number in range(12):
        _labelme(raw, f"{number:02}.png", *(["scratch"] * 2 if number % 2 else []))
    shapes = json.loads((raw / "03.json").read_text())
    shapes["shapes"] = shapes["shapes"][:1] * 2
    (raw / "03.json").write_text(json.dumps(shapes))
    (raw / "<b>\n.gif").write_bytes(b"GIF89a")
    (raw / "README.md").write_text("hello")
    report = _report(raw)
    assert report["files"] == {"total": 26, "images": 12, "annotations_and_masks": 12, "left_out": 2}
    assert [(row["kind"], row["files"], row["examples"]) for row in report["left_out"]] == [
        (".gif", 1, ["<b>\n.gif"]),
        (".md", 1, ["README.md"]),
    ]
    assert report["missing"] == {"annotations": 1, "examples": ["gone\n.json: image 'gone.png' is missing"]}
    assert [(row["images"], row["examples"]) for row in report["notes"]] == [(1, ["03.png"])]
    output = capsys.readouterr()
    assert "warning: 1 .gif left out: adfm does not read this format" in output.err
    lines = output.out.splitlines()
    assert lines[0] == f"{tmp_path / 'shards'}: li\\x1b[31mne, layout labelme"
    rows = {tuple(line.split()[:2]) for line in lines}
    assert {("images", "12"), ("normal", "6"), ("anomalous", "6"), ("left", "out"), ("skipped", "1")} <= rows
    assert "<b>\\n.gif" in output.out
    assert "\x1b" not in output.out + output.err
    assert len(lines) <= 25


@pytest.mark.parametrize("name", LAYOUTS_OF_TESTS)
def test_every_layout_accounts_for_its_files(name: str, tmp_path: Path) -> None:
    layout, build = LAYOUTS_OF_TESTS[name]
    raw = tmp_path / "raw"
    truths = build(raw)
    (raw / "notes.pdf").write_bytes(b"%PDF")
    conversion.convert(raw, tmp_path / "out", Params.model_validate({"convert": {"layout": layout}}))
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    on_disk = {path.relative_to(raw).as_posix() for path in raw.rglob("*") if path.is_file()} - {"manifest.json"}
    masks = {mask for truth in truths.values() for mask in truth.masks}
    left_out = {example for row in report["left_out"] for example in row["examples"]}
    assert report["files"]["total"] == len(on_disk)
    assert report["files"]["images"] == report["images"] == len(truths)
    assert report["files"]["left_out"] == len(left_out)
    assert "notes.pdf" in left_out
    assert not left_out & (masks | truths.keys())
    assert report["files"]["annotations_and_masks"] == len(on_disk - truths.keys() - left_out) >= len(masks)


def test_other_problems_are_not_skipped_with_missing_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _and_problems(monkeypatch, MissingImage("gone.json: image 'gone.png' is missing"), "2.json: is not JSON")
    _labelme(tmp_path / "line", "1.png", "scratch")
    with pytest.raises(AdfmError, match="2.json: is not JSON") as error:
        _report(tmp_path / "line")
    assert "gone" not in str(error.value)


def test_a_part_says_how_far_it_is(mvtec_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conversion.inspect_part(mvtec_folder, tmp_path / "part", Params(), 1, 1)
    assert "part 1 of 1, 48 of 48 images inspected" in capsys.readouterr().out


@pytest.mark.parametrize("copy", ["bytes", "PNG", "BMP", "decoded JPEG", "blank"])
def test_one_picture_under_two_labels_is_refused(mvtec_folder: Path, copy: str) -> None:
    good = mvtec_folder / "bolt/test/good"
    bad = {name: mvtec_folder / f"bolt/test/hole/{name}.png" for name in ("000", "001")}
    for name, path in bad.items():
        picture = Image.open(path).resize((480, 320), Image.Resampling.BICUBIC)
        if copy == "blank":  # no near-duplicate, as it has no contrast
            picture = Image.new("RGB", (480, 320), "grey" if name == "000" else "white")
        mask_path = mvtec_folder / f"bolt/ground_truth/hole/{name}_mask.png"
        Image.open(mask_path).resize((480, 320)).save(mask_path)
        path.unlink()
        if copy == "decoded JPEG":
            picture.save(path.with_suffix(".jpg"), quality=80)
            Image.open(path.with_suffix(".jpg")).save(good / f"9{name}.png")
            continue
        picture.save(path)
        match copy:
            case "bytes":
                shutil.copy(path, good / f"9{name}.png")
            case "PNG":
                picture.save(good / f"9{name}.png", compress_level=1)
            case "BMP" | "blank":
                picture.save(good / f"9{name}.bmp")
    with pytest.raises(AdfmError) as error:
        _converted(mvtec_folder)
    message = str(error.value)
    assert "is labelled normal, but …, the same picture, is anomalous; correct the label" in message.splitlines()[0]
    assert "(2 of 2 problems, layout mvtec)" in message.splitlines()[0]
    for name in bad:
        assert f"    bolt/test/good/9{name}." in message
        assert f"bolt/test/hole/{name}." in message
    assert sorted(path.name for path in mvtec_folder.parent.iterdir()) == ["tiny"]


def test_pictures_that_look_alike_may_have_two_labels(mvtec_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = Image.open(mvtec_folder / "bolt/test/good/000.png").resize((480, 320), Image.Resampling.BICUBIC)
    picture.save(mvtec_folder / "bolt/test/good/000.png")
    pixels = np.asarray(picture).copy()
    pixels[100:102, 100:102] ^= 255
    mask = np.zeros((320, 480), np.uint8)
    mask[98:104, 98:104] = 255
    Image.fromarray(pixels).save(mvtec_folder / "bolt/test/hole/000.png")
    Image.fromarray(mask).save(mvtec_folder / "bolt/ground_truth/hole/000_mask.png")
    records = _converted(mvtec_folder)
    assert records["bolt/test/good/000.png"].split == records["bolt/test/hole/000.png"].split
    report = json.loads((mvtec_folder.parent / "shards" / "conversion.json").read_text())
    assert report["near_duplicates"]["two_labels"] == {
        "pairs": 1,
        "examples": [["bolt/test/good/000.png", "bolt/test/hole/000.png"]],
    }
    assert "1 pair of pictures that look like copies: one is normal and one anomalous" in capsys.readouterr().err


def test_copies_with_other_boxes_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "line"
    _labelme(raw, "0.png", "scratch")
    for number, labels in enumerate((["scratch"], ["dent"], ["scratch", "scratch"]), start=1):
        _labelme(raw, f"{number}.png", *labels, image=(raw / "0.png").read_bytes())
    assert _report(raw)["identical_images_marked_differently"] == {"pictures": 1, "examples": [["0.png", "2.png"]]}
    assert "copies of 1 picture have different boxes or defects, e.g. 0.png and 2.png" in capsys.readouterr().err


def test_a_group_is_found_in_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "RUN", 10)
    raw = tmp_path / "line"
    for number in range(40):
        _labelme(raw, f"part{number // 4:02}/view{number % 4}.png", *(["dent"] if number % 8 < 4 else []))
    _labelme(raw, "other/0.png")
    report = _report(raw, group=r"part(\d+)/")
    assert report["parts"]["split.group"] == {"parts": 10, "images": 40}
    records = list(shards.read(tmp_path / "shards"))
    assert {record.group for record in records} == {*(f"{number:02}" for number in range(10)), None}
    assert Counter(len({r.split for r in records if r.group == f"{part:02}"}) for part in range(10)) == {1: 10}
    assert {record.split for record in records} == {"train", "validation", "test"}
    with pytest.raises(AdfmError, match="split.group: 'lot' is neither a column"):
        _report(raw, group="lot")


def test_parts_with_another_group_make_no_whole(mvtec_folder: Path, tmp_path: Path) -> None:
    params = Params.model_validate({"split": {"group": r"\d+"}})
    conversion.inspect_part(mvtec_folder, tmp_path / "part", params, 1, 1)
    with pytest.raises(AdfmError, match=r"was made with group '\\\\d\+'"):
        conversion.convert(mvtec_folder, tmp_path / "out", Params(), [tmp_path / "part"])
    conversion.convert(mvtec_folder, tmp_path / "out", params, [tmp_path / "part"])
    conversion.convert(mvtec_folder, tmp_path / "at-once", params)
    assert _contents(tmp_path / "out") == _contents(tmp_path / "at-once")


def test_copies_by_roboflow_are_moved_to_the_more_held_out_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "line"
    for split, hashes in (("train", "abc"), ("valid", "de"), ("test", "f")):
        for number in range(6):
            for one in hashes if split == "train" or number < 2 else hashes[:0]:
                _labelme(raw, f"{split}/IMG_{number}_jpg.rf.{one * 8}.png", *(["dent"] if number % 2 else []))
        _labelme(raw, f"{split}/only_{split}.png", "dent")
    report = _report(raw)
    records = {record.source: record for record in shards.read(tmp_path / "shards")}
    assert {records[name].split for name in records if "IMG_0" in name or "IMG_1" in name} == {"test"}
    assert {records[name].split for name in records if "IMG_2" in name} == {"train"}
    assert records["train/IMG_0_jpg.rf.aaaaaaaa.png"].group == "IMG_0_jpg"
    assert report["parts"]["roboflow"] == {"parts": 6, "images": 24}
    assert report["moved"] == [
        {"because": "part", "from": "train", "to": "test", "images": 6},
        {"because": "part", "from": "validation", "to": "test", "images": 4},
    ]
    assert "6  images from train to test: the same part or photograph is there" in capsys.readouterr().out
    assert _report(raw, redivide=True)["moved"] == []


def test_folders_become_categories(mvtec_folder: Path) -> None:
    raw = mvtec_folder.parent / "line"
    for folder in ("bolt", "nut"):
        for number in range(6):
            _labelme(raw, f"{folder}/{number}.png", *(["dent"] if number % 2 else []))
    params = {"convert": {"category": "folder"}, "split": {"holdout_categories": ["nut"]}}
    conversion.convert(raw, raw.parent / "shards", Params.model_validate(params))
    records = list(shards.read(raw.parent / "shards"))
    assert Counter(record.category for record in records) == {"bolt": 6, "nut": 6}
    assert {record.split for record in records if record.category == "nut"} == {"test"}


def test_a_pipe_or_endless_link_is_refused_before_anything_is_read(mvtec_folder: Path, tmp_path: Path) -> None:
    os.mkfifo(mvtec_folder / "bolt" / "test" / "good" / "a.png")
    os.mkfifo(mvtec_folder / "x.json")
    (mvtec_folder / "bolt" / "round").symlink_to(mvtec_folder)
    with pytest.raises(
        AdfmError, match="(?s)'x.json' is a pipe.*'bolt/test/good/a.png' is a pipe|'bolt/round' is a link"
    ):
        conversion.convert(mvtec_folder, tmp_path / "shards", Params())
    with pytest.raises(AdfmError, match="'x.json' is a pipe"):
        show.show(mvtec_folder, tmp_path / "sheet.html", Params())
    assert not (tmp_path / "shards").exists()


def test_two_bursts_of_one_scene_are_not_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest of each picture are those of its own burst, so that no pair tells of the other burst."""
    rng = np.random.default_rng(0)
    for scene in range(6):
        picture, moved = (np.kron(rng.normal(size=(32, 32)), np.ones((4, 4))) for _ in range(2))
        for number in range(30):
            noise = rng.normal(size=picture.shape)
            image = 128 + 30 * (picture + 0.009 * (number % 2) * moved) + 0.3 * noise
            path = tmp_path / "raw" / "line" / ("bad" if scene % 2 else "good") / f"{scene}-{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.clip(np.rint(image), 0, 255).astype(np.uint8)).save(path)

    def divided(out: Path) -> list[str]:
        conversion.convert(tmp_path / "raw", out, Params())
        table = shards.table(out).to_pandas()
        scenes = table["source"].str.extract(r"(\d)-\d+\.png")[0]
        return [str(scene) for scene, splits in table["split"].groupby(scenes) if splits.nunique() > 1]

    assert divided(tmp_path / "shards") == []
    monkeypatch.setattr(duplicates, "near_duplicates_across", lambda *_: np.empty((0, 2), np.int64))
    assert divided(tmp_path / "without")
