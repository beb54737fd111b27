"""Data sets as they should not be: each is converted as documented, or refused with every bad file named."""

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adfm.data import conversion, shards
from adfm.errors import AdfmError
from adfm.params import Params
from adfm.records import Record

RGB = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
GOOD = "bolt/test/good"
HOLE = "bolt/test/hole"
TRUTH = "bolt/ground_truth/hole"


def _convert(raw: Path) -> dict[str, Record]:
    conversion.convert(raw, raw.parent / "shards", Params())
    return {record.source: record for record in shards.read(raw.parent / "shards")}


def _refusal(raw: Path) -> str:
    """Two more bad files stand beside what is tried: they are always listed too."""
    (raw / "tile/train/good/003.png").write_bytes(b"")
    (raw / "tile/ground_truth/stain/004_mask.png").write_text("no mask")
    with pytest.raises(AdfmError) as error:
        _convert(raw)
    text = str(error.value)
    assert "tile/train/good/003.png: cannot be read (it is empty)" in text
    assert "tile/test/stain/004.png: its mask" in text
    assert sorted(path.name for path in raw.parent.iterdir()) == ["tiny"]
    return text


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1500])


def _truncated_jpeg(path: Path) -> None:
    Image.fromarray(RGB).save(path, "JPEG", quality=95)
    path.write_bytes(path.read_bytes()[:1500])


def _huge(path: Path) -> None:
    """A few kilobytes that say they are 120 megapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 12_000, 10_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def _flipped_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 900] ^= 4
    path.write_bytes(content)


def _animated(kind: str, **more: object) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        frames = [Image.fromarray(np.roll(RGB, 5 * step, axis=1)) for step in range(3)]
        frames[0].save(path, kind, save_all=True, append_images=frames[1:], **more)

    return write


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a truncated PNG": (_truncated, "image file is truncated"),
    "a truncated JPEG": (_truncated_jpeg, "cannot be read (image file is truncated"),
    "a PNG with a flipped bit": (_flipped_bit, "broken data stream"),
    "zero bytes": (lambda path: path.write_bytes(b""), "cannot be read (it is empty)"),
    "a text": (lambda path: path.write_text("hello"), "cannot be read (it is not an image)"),
    "a page": (lambda path: path.write_text("<html><body>404</body></html>"), "cannot be read (it is not an image)"),
    "120 megapixels": (_huge, "cannot be read (Image size (120000000 pixels) exceeds limit of"),
    "a GIF of three frames": (_animated("GIF"), "it has 3 frames or pages"),
    "an animated PNG": (_animated("PNG"), "it has 3 frames or pages"),
    "an animated WebP": (_animated("WEBP"), "it has 3 frames or pages"),
    "a TIFF of three pages": (_animated("TIFF"), "it has 3 frames or pages"),
    "floating point": (lambda path: Image.fromarray(RGB[..., 0] / 255.0).convert("F").save(path, "TIFF"), "floating"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_image_that_is_refused(mvtec_folder: Path, what: str) -> None:
    spoil, said = REFUSED[what]
    spoil(mvtec_folder / GOOD / "002.png")
    text = _refusal(mvtec_folder)
    assert said in text
    assert f"{GOOD}/002.png: cannot be read (" in text
    assert " problems, layout mvtec)" in text


def test_120_megapixels_are_never_decoded(mvtec_folder: Path) -> None:
    _huge(mvtec_folder / GOOD / "002.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _refusal(mvtec_folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


MASKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another size": (lambda path: Image.new("L", (47, 32), 255).save(path), "is 48x32, but its mask"),
    "turned": (lambda path: Image.new("L", (32, 48), 255).save(path), "is 48x32, but its mask"),
    "empty": (lambda path: Image.new("L", (48, 32)).save(path), "is anomalous, but its mask"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:60]), "its mask"),
    "zero bytes": (lambda path: path.write_bytes(b""), "its mask"),
    "a speck": (lambda path: _speck(path), "every defect is smaller than convert.min_area (4 pixels)"),
    "120 megapixels": (_huge, "its mask"),
}


def _speck(path: Path) -> None:
    mask = Image.new("L", (48, 32))
    mask.putpixel((3, 3), 255)
    mask.save(path)


@pytest.mark.parametrize("what", MASKS)
def test_a_mask_that_is_refused(mvtec_folder: Path, what: str) -> None:
    spoil, said = MASKS[what]
    spoil(mvtec_folder / TRUTH / "002_mask.png")
    assert f"{HOLE}/002.png: {said}" in _refusal(mvtec_folder)


def test_a_full_mask_is_a_defect_all_over(mvtec_folder: Path) -> None:
    Image.new("L", (48, 32), 255).save(mvtec_folder / TRUTH / "002_mask.png")
    assert _convert(mvtec_folder)[f"{HOLE}/002.png"].boxes == ((0, 0, 48, 32),)


def test_a_mask_without_an_image_and_an_image_without_a_mask(mvtec_folder: Path) -> None:
    (mvtec_folder / TRUTH / "001_mask.png").unlink()
    (mvtec_folder / HOLE / "003.png").unlink()
    text = _refusal(mvtec_folder)
    assert f"{HOLE}/001.png" in text
    assert "003_mask.png" in text


def test_an_image_of_one_pixel(mvtec_folder: Path) -> None:
    Image.new("RGB", (1, 1), (9, 9, 9)).save(mvtec_folder / GOOD / "002.png")
    record = _convert(mvtec_folder)[f"{GOOD}/002.png"]
    assert (record.width, record.height) == (1, 1)


def test_images_of_other_kinds_become_rgb(mvtec_folder: Path) -> None:
    folder = mvtec_folder / GOOD
    Image.fromarray(RGB).convert("CMYK").save(folder / "000.png", "JPEG")
    Image.fromarray((RGB[..., 0].astype(np.uint16) << 8) + 7).save(folder / "001.png")
    Image.fromarray(RGB).quantize(9).save(folder / "002.png")
    Image.fromarray(np.dstack([RGB, RGB[..., :1]])).save(folder / "003.png")
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(RGB).save(folder / "004.png", exif=exif)
    Image.fromarray(RGB).save(folder / "005.png", "GIF")
    records = _convert(mvtec_folder)
    for number, size in enumerate([(48, 32)] * 4 + [(32, 48), (48, 32)]):
        record = records[f"{GOOD}/{number:03d}.png"]
        assert (record.width, record.height) == size
        assert record.image.startswith(b"\x89PNG")


NAMES = {
    "spaces": " a  b ",
    "quotes": 'it\'s "so"',
    "a newline": "a\nb",
    "another script": "零件 Ωмега दोष",
    "a combined letter": "e\u0301",
    "right to left": "\u05d0\u05d1",
    "255 bytes": "x" * 251,
    "255 bytes of letters of three": "面" * 83 + "ab",
    "what a shell would do": "$(touch x);`*?#%20&",
    "a backslash": "a\\b",
}


@pytest.mark.parametrize("what", NAMES)
def test_a_name(mvtec_folder: Path, what: str) -> None:
    name = f"{NAMES[what]}.png"
    (mvtec_folder / GOOD / "001.png").rename(mvtec_folder / GOOD / name)
    assert f"{GOOD}/{name}" in _convert(mvtec_folder)


def test_a_name_that_is_no_text(mvtec_folder: Path) -> None:
    (mvtec_folder / GOOD / "001.png").rename(mvtec_folder / GOOD / os.fsdecode(b"\xff\xfe.png"))
    assert rf"{GOOD}/\udcff\udcfe.png: its name is not UTF-8; rename it" in _refusal(mvtec_folder)


def test_a_bad_file_is_one_line_whatever_its_name(mvtec_folder: Path) -> None:
    (mvtec_folder / GOOD / "a\nb\x1b[31m.png").write_bytes(b"")
    assert rf"{GOOD}/a\nb\x1b[31m.png: cannot be read" in _refusal(mvtec_folder)


def test_a_category_and_a_defect_with_any_name(mvtec_folder: Path) -> None:
    for folder in ("test", "ground_truth"):
        (mvtec_folder / "bolt" / folder / "hole").rename(mvtec_folder / "bolt" / folder / "Löcher, groß")
    (mvtec_folder / "bolt").rename(mvtec_folder / "Schraube 6'")
    record = _convert(mvtec_folder)["Schraube 6'/test/Löcher, groß/000.png"]
    assert (record.category, record.defect) == ("Schraube 6'", "Löcher, groß")


def test_links_that_lead_round_or_nowhere(mvtec_folder: Path) -> None:
    (mvtec_folder / "bolt/test/loop").symlink_to("..")
    (mvtec_folder / "tile/train/up").symlink_to(mvtec_folder)
    (mvtec_folder / GOOD / "000.png").unlink()
    (mvtec_folder / GOOD / "000.png").symlink_to("nowhere")
    (mvtec_folder / GOOD / "001.png").unlink()
    (mvtec_folder / GOOD / "001.png").symlink_to("001.png")
    with pytest.raises(AdfmError) as error:
        _convert(mvtec_folder)
    for problem in (
        "'bolt/test/loop' is a link to a folder that holds it",
        "'tile/train/up' is a link to a folder that holds it",
        f"'{GOOD}/000.png' is a link that leads nowhere",
        f"'{GOOD}/001.png' is a link that leads nowhere",
    ):
        assert problem in str(error.value)


def test_two_layouts_in_one_folder(mvtec_folder: Path, tmp_path: Path) -> None:
    yolo = mvtec_folder / "images"
    yolo.mkdir()
    (mvtec_folder / "labels").mkdir()
    Image.fromarray(RGB).save(yolo / "1.png")
    (mvtec_folder / "labels" / "1.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (mvtec_folder / "data.yaml").write_text("names: [hole]\n")
    with pytest.raises(AdfmError, match=r"mvtec.*yolo"):
        conversion.convert(mvtec_folder, tmp_path / "out", Params())
    assert not list(tmp_path.glob("out*"))


def test_an_output_that_cannot_be_written(mvtec_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AdfmError, match="file is a file, and a folder is to be written there"):
        conversion.convert(mvtec_folder, tmp_path / "file", Params())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(AdfmError, match="holds files that adfm did not write"):
        conversion.convert(mvtec_folder, tmp_path / "mine", Params())
    with pytest.raises(AdfmError, match="/sys/shards.partial: Operation not permitted; change the permissions"):
        conversion.convert(mvtec_folder, Path("/sys/shards"), Params())
    assert (tmp_path / "mine" / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "mine"


def test_a_disk_that_is_full_half_way(mvtec_folder: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands for the full disk: a shard does not fit, what came before does."""
    for path in sorted((mvtec_folder / GOOD).iterdir()):
        pixels = np.random.default_rng(int(path.stem)).integers(0, 255, (300, 300, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    conversion.convert(mvtec_folder, tmp_path / "at-once", Params())
    program = (
        "import resource, signal, sys\n"
        "from adfm.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", program, "convert", str(mvtec_folder), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "adfm: error: " in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["at-once", "raw"]
    conversion.convert(mvtec_folder, tmp_path / "out", Params())
    assert (tmp_path / "out" / "conversion.json").read_bytes() == (
        tmp_path / "at-once" / "conversion.json"
    ).read_bytes()


def test_an_earlier_result_survives_a_refusal(mvtec_folder: Path) -> None:
    _convert(mvtec_folder)
    out = mvtec_folder.parent / "shards"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (mvtec_folder / GOOD / "002.png").write_bytes(b"")
    with pytest.raises(AdfmError, match="it is empty"):
        _convert(mvtec_folder)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    shutil.rmtree(out)


def test_a_report_of_unprintable_names_is_json(mvtec_folder: Path) -> None:
    (mvtec_folder / "bolt").rename(mvtec_folder / "b\no\x1blt")
    _convert(mvtec_folder)
    report = json.loads((mvtec_folder.parent / "shards" / "conversion.json").read_text())
    assert {row["category"] for row in report["counts"]} == {"b\no\x1blt", "tile"}
