"""A packed data set is converted to the same bytes as its folder, whatever its layout, and no image is unpacked."""

import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adfm.data import contents, conversion, inspection, packed, show, sources
from adfm.data.readers.files import IMAGES
from adfm.errors import AdfmError
from adfm.params import Convert, Params
from adfm.records import Sample
from tests.data.readers.exports import EXPORTS, parts
from tests.data.readers.layouts import LAYOUTS
from tests.memory import peaks

SPLIT = {"split": {"validation": 0.2, "test": 0.2}}
_watched: list[list[str]] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watched:
        _watched[-1].append(os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else "")


sys.addaudithook(_watch)  # there is no way to take one away


@contextmanager
def _opened_files() -> Iterator[list[str]]:
    """Every file that Python opens in the block: `open`, `os.open` and `mmap` of anyone, Pillow included."""
    _watched.append([])
    try:
        yield _watched[-1]
    finally:
        _watched.pop()


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _outcome(raw: Path, out: Path, params: Params) -> dict[str, bytes] | str:
    """All files of the shards; of a refusal its text, without the folder's name."""
    try:
        conversion.convert(raw, out, params)
    except AdfmError as error:
        return str(error).replace(str(raw), "RAW").replace(str(out), "OUT")
    return _files(out)


def _same_from_an_archive(raw: Path, settings: dict[str, Any] | None = None) -> dict[str, bytes] | str:
    """Convert a data set from its folder and from its archive, and hold them against each other."""
    params = Params.model_validate(settings or {})
    place = raw.parent.parent / "packed"
    place.mkdir()
    archive = place / f"{raw.name}.tar"
    packed.pack(raw, archive)
    expected = _outcome(raw, place / "one", params)
    with packed.opened(archive) as stand_in, _opened_files() as names:
        outcome = _outcome(stand_in, place / "other", params)
        within = [name for name in names if name.startswith(str(stand_in))]
    assert outcome == expected
    assert not [name for name in within if name.lower().endswith(tuple(IMAGES))]
    assert not stand_in.exists()
    return outcome


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name: str, tmp_path: Path) -> None:
    layout, build = LAYOUTS[name]
    raw = tmp_path / "raw" / name
    build(raw)
    assert isinstance(_same_from_an_archive(raw, {"convert": {"layout": layout}}), dict)


@pytest.mark.parametrize("name", EXPORTS)
def test_every_export(name: str, tmp_path: Path) -> None:
    EXPORTS[name].write(tmp_path / "raw" / "line", parts(12))
    assert isinstance(_same_from_an_archive(tmp_path / "raw" / "line", SPLIT), dict)


def _masks_beside(raw: Path) -> None:
    """Masks beside their images, which a reader opens to know them."""
    for number in range(12):
        stem = f"scratch/{number:02d}" if number % 2 else f"good/{number:02d}"
        _image(raw / f"{stem}.jpg", number)
        if number % 2:
            _mask(raw / f"{stem}.png")


def _turned(raw: Path) -> None:
    """COCO of Label Studio, of which a reader asks every image for its orientation."""
    images = [{"id": number, "file_name": f"{number}.jpg", "width": 48, "height": 32} for number in range(6)]
    boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [4, 4, 8, 8]} for n in range(3)]
    for entry in images:
        turn = Image.Exif()
        turn[274] = 6 if entry["id"] == 5 else 1
        _image(raw / "images" / str(entry["file_name"]), int(str(entry["id"])), exif=turn)
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "scratch"}]}
    (raw / "result.json").write_text(json.dumps(content | {"info": {"contributor": "Label Studio"}}))


def _turned_and_marked(raw: Path) -> None:
    _turned(raw)
    text = (raw / "result.json").read_text().replace('"image_id": 2', '"image_id": 5')
    (raw / "result.json").write_text(text)


def _contradicted(raw: Path) -> None:
    """The same pixels in files of two formats, under two labels: they are decoded once more."""
    for number in range(8):
        _image(raw / ("scratch" if number % 2 else "good") / f"{number}.png", number // 2)


def _damaged(raw: Path) -> None:
    _masks_beside(raw)
    for name in ("good/00.jpg", "scratch/01.png", "scratch/03.jpg"):
        (raw / name).write_bytes((raw / name).read_bytes()[:200])
    (raw / "good/02.jpg").write_bytes(b"")
    (raw / "good/04.jpg").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def _left_out(raw: Path) -> None:
    """What conversion leaves out, with names that are hard: it opens some of it to know what it is."""
    _masks_beside(raw)
    (raw / "empty").mkdir()
    (raw / ".cache").mkdir()
    for name in (".cache/0.png", "__MACOSX", "notes.pdf", "more.zip", "LICENSE", "Bild ü.txt", "new\nline", "x" * 250):
        (raw / name).write_bytes(b"some")
    shutil.copy(raw / "good/00.jpg", raw / "photograph")
    shutil.copy(raw / "good/02.jpg", raw / "good" / "Prüf\u0308ling {0} %s.jpg")


def _not_utf8(raw: Path) -> None:
    _masks_beside(raw)
    shutil.copy(raw / "good/00.jpg", os.fsdecode(os.fsencode(raw / "good") + b"/\xb0-\xff.jpg"))


@pytest.mark.parametrize(
    "build",
    [_masks_beside, _turned, _turned_and_marked, _contradicted, _damaged, _left_out, _not_utf8],
    ids=lambda build: build.__name__,
)
def test_hard_cases(build: Callable[[Path], None], tmp_path: Path) -> None:
    raw = tmp_path / "raw" / "line.v2"
    raw.mkdir(parents=True)
    build(raw)
    refused = build in (_turned_and_marked, _contradicted, _damaged, _not_utf8)
    assert isinstance(_same_from_an_archive(raw, SPLIT), str if refused else dict)


def test_a_fetched_data_set_in_parts_on_several_machines(mvtec_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(conversion, "RUN", 10)
    sources.fetch(str(mvtec_folder), tmp_path / "fetched" / "tiny")
    packed.pack(tmp_path / "fetched" / "tiny", tmp_path / "tiny.tar")
    folders = []
    for part in (1, 2, 3):  # each machine gets a copy at another time
        copy = tmp_path / f"machine{part}" / "tiny.tar"
        copy.parent.mkdir()
        shutil.copyfile(tmp_path / "tiny.tar", copy)
        os.utime(copy, (part, part))
        folders.append(tmp_path / f"part{part}")
        with packed.opened(copy) as raw:
            conversion.inspect_part(raw, folders[-1], Params(), part, 3)
    with packed.opened(tmp_path / "tiny.tar") as raw:
        conversion.convert(raw, tmp_path / "joined", Params(), folders)
    conversion.convert(tmp_path / "fetched" / "tiny", tmp_path / "whole", Params())
    assert _files(tmp_path / "joined") == _files(tmp_path / "whole")


def test_a_resumed_conversion_knows_another_archive(mvtec_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Its images may have the same names and sizes."""
    monkeypatch.setattr(conversion, "RUN", 10)
    packed.pack(mvtec_folder, tmp_path / "tiny.tar")
    looked_at: list[str] = []
    real = inspection.inspect

    def inspect(sample: Sample, settings: Convert) -> Any:
        looked_at.append(sample.file)
        return real(sample, settings)

    monkeypatch.setattr(inspection, "inspect", inspect)
    monkeypatch.setattr(conversion, "_write", lambda *_: 1 / 0)
    counts = []
    for time in (None, None, 7):
        if time:
            os.utime(tmp_path / "tiny.tar", (time, time))
        looked_at.clear()
        with packed.opened(tmp_path / "tiny.tar") as raw, pytest.raises(ZeroDivisionError):
            conversion.convert(raw, tmp_path / "shards", Params())
        counts.append(len(looked_at))
    assert counts == [48, 0, 48]


def test_show_reads_it_too(mvtec_folder: Path, tmp_path: Path) -> None:
    packed.pack(mvtec_folder, tmp_path / "tiny.tar")
    with packed.opened(tmp_path / "tiny.tar") as raw:
        page = show.show(raw, tmp_path / "page.html", Params(), images=6).read_text()
    assert page.count("data:image/") >= 6 and "cannot be read" not in page


def test_the_same_files_give_the_same_bytes(mvtec_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy" / "other"
    shutil.copytree(mvtec_folder, copy)
    for path in copy.rglob("*"):
        path.chmod(0o700)
        os.utime(path, (1, 1))
    packed.pack(mvtec_folder, tmp_path / "one.tar")
    packed.pack(copy, tmp_path / "new" / "other.tar")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "new" / "other.tar").read_bytes()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["other.tar"]


def test_anyone_can_unpack_it(mvtec_folder: Path, tmp_path: Path) -> None:
    (mvtec_folder / "empty").mkdir()
    packed.pack(mvtec_folder, tmp_path / "tiny.tar")
    shutil.unpack_archive(tmp_path / "tiny.tar", tmp_path / "tiny", filter="data")
    for path in mvtec_folder.rglob("*"):
        copy = tmp_path / "tiny" / path.relative_to(mvtec_folder)
        assert copy.is_dir() if path.is_dir() else copy.read_bytes() == path.read_bytes()


def test_images_take_no_space_and_have_their_size(tmp_path: Path) -> None:
    raw = tmp_path / "raw" / "line"
    raw.mkdir(parents=True)
    (raw / "large.tiff").write_bytes(bytes(range(256)) * 2**14)
    (raw / "small.PNG").write_bytes(b"x")
    (raw / "empty.png").touch()
    (raw / "labels.csv").write_text("image,label\n")
    packed.pack(raw, tmp_path / "line.tar")
    with packed.opened(tmp_path / "line.tar") as folder:
        assert folder.name == "line"
        assert {path.name: path.stat().st_size for path in folder.iterdir()} == {
            "large.tiff": 2**22,
            "small.PNG": 1,
            "empty.png": 0,
            "labels.csv": 12,
        }
        assert sum(path.stat().st_blocks for path in folder.iterdir()) * 512 < 2**16
        assert [path.stat().st_mode & 0o777 for path in folder.glob("*.png")] == [0]  # to open it is an error
        assert (folder / "labels.csv").read_text() == "image,label\n"
        with ThreadPoolExecutor(8) as pool:
            names = ["large.tiff", "small.PNG", "empty.png", "labels.csv"] * 50
            for name, content in zip(names, pool.map(lambda name: contents.read(folder / name), names), strict=True):
                assert content == (raw / name).read_bytes()
        with pytest.raises(FileNotFoundError):
            contents.read(folder / "none.png")
    assert not folder.parent.exists()


def test_two_archives_at_a_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(name.encode())
        packed.pack(tmp_path / name, tmp_path / f"{name}.tar")
    with packed.opened(tmp_path / "a.tar") as a, packed.opened(tmp_path / "b.tar") as b:
        assert (contents.read(a / "0.png"), contents.read(b / "0.png")) == (b"a", b"b")


def test_what_kfp_cannot_upload_as_one_file_is_in_several(
    mvtec_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "packed" / "tiny.tar"
    packed.pack(mvtec_folder, archive)
    whole = archive.stat().st_size
    monkeypatch.setattr(packed, "LARGEST", whole // 3)
    packed.pack(mvtec_folder, archive)
    volumes = sorted(archive.parent.iterdir())
    count = len(volumes)
    assert [path.name for path in volumes] == [f"tiny.{number}-of-{count}.tar" for number in range(1, count + 1)]
    assert 3 <= count <= 5
    assert all(path.stat().st_size <= whole // 3 + 2 * tarfile.RECORDSIZE for path in volumes)
    expected = {path.relative_to(mvtec_folder): path.read_bytes() for path in mvtec_folder.rglob("*") if path.is_file()}
    with packed.opened(archive) as folder:
        assert folder.name == "tiny"
        paths = [path for path in folder.rglob("*") if path.is_file()]
        assert {path.relative_to(folder): contents.read(path) for path in paths} == expected
    volumes[-1].unlink()
    with pytest.raises(AdfmError, match=rf"tiny\.{count}-of-{count}\.tar: cannot be read"), packed.opened(archive):
        pass
    monkeypatch.undo()
    packed.pack(mvtec_folder, archive)
    assert list(archive.parent.iterdir()) == [archive]


def test_links_become_what_they_lead_to(mvtec_folder: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw" / "linked"
    raw.mkdir()
    (raw / "bolt").symlink_to(mvtec_folder / "bolt")
    (raw / "readme.txt").symlink_to(mvtec_folder / "bolt/test/good/000.png")
    packed.pack(raw, tmp_path / "linked.tar")
    with packed.opened(tmp_path / "linked.tar") as folder:
        assert len([path for path in folder.rglob("*.png") if not path.is_symlink()]) == 34
        assert (folder / "readme.txt").read_bytes() == (mvtec_folder / "bolt/test/good/000.png").read_bytes()


def test_what_cannot_be_packed(mvtec_folder: Path, tmp_path: Path) -> None:
    os.mkfifo(mvtec_folder / "a.png")
    with pytest.raises(AdfmError, match=r"'a\.png' is a pipe"):
        packed.pack(mvtec_folder, tmp_path / "tiny.tar")
    (mvtec_folder / "a.png").unlink()
    (tmp_path / "file").touch()
    with pytest.raises(AdfmError, match="cannot be packed into .*file/tiny.tar"):
        packed.pack(mvtec_folder, tmp_path / "file" / "tiny.tar")
    assert not (tmp_path / "tiny.tar").exists()


def _tar(path: Path, *members: tuple[str, bytes, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(content), "/etc/passwd"
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(
    "member",
    [
        ("../out.png", tarfile.REGTYPE),
        ("/out.png", tarfile.REGTYPE),
        ("a.png", tarfile.SYMTYPE),
        ("a", tarfile.FIFOTYPE),
    ],
)
def test_what_pack_does_not_write_is_refused(member: tuple[str, bytes], tmp_path: Path) -> None:
    _tar(tmp_path / "line.tar", (*member, b""))
    with pytest.raises(AdfmError, match="line.tar: holds .* does not pack"), packed.opened(tmp_path / "line.tar"):
        pass


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    _tar(tmp_path / "line.tar", *[("a.png", tarfile.REGTYPE, b"1"), ("a.png", tarfile.REGTYPE, b"2")])
    with pytest.raises(AdfmError, match="is damaged, .*File exists"), packed.opened(tmp_path / "line.tar"):
        pass


@pytest.mark.parametrize("keep", [0, 0.3, 0.99])
def test_a_damaged_archive(keep: float, mvtec_folder: Path, tmp_path: Path) -> None:
    packed.pack(mvtec_folder, tmp_path / "tiny.tar")
    whole = (tmp_path / "tiny.tar").read_bytes()
    (tmp_path / "tiny.tar").write_bytes(whole[: int(keep * whole.rstrip(b"\0").__len__())])
    with pytest.raises(AdfmError, match="is damaged, or not a tar"), packed.opened(tmp_path / "tiny.tar"):
        pass
    with pytest.raises(AdfmError, match="none.tar: cannot be read"), packed.opened(tmp_path / "none.tar"):
        pass


@pytest.mark.parametrize("size", [512, 10240])
def test_an_archive_with_a_piece_of_zeros(size: int, tmp_path: Path) -> None:
    """Zeros end a tar: what lies behind them would be missing without a word."""
    _tar(tmp_path / "line.tar", *((f"{number}.png", tarfile.REGTYPE, bytes(600)) for number in range(30)))
    whole = bytearray((tmp_path / "line.tar").read_bytes())
    whole[7 * 1536 : 7 * 1536 + size] = bytes(size)  # begins with the header of the eighth file
    (tmp_path / "line.tar").write_bytes(whole)
    with pytest.raises(AdfmError, match="is damaged, .*more follows its end"), packed.opened(tmp_path / "line.tar"):
        pass


def _pack_and_open(folder: Path) -> None:
    archive = folder.with_suffix(".tar")
    packed.pack(folder, archive)
    with packed.opened(archive):
        pass


def test_memory_is_that_of_the_names(tmp_path: Path) -> None:
    folders = [tmp_path / "few", tmp_path / "many"]
    for folder, count in zip(folders, (100, 2100), strict=True):
        folder.mkdir()
        for number in range(count):
            (folder / f"{number:06d}.png").write_bytes(bytes(500))
    # The first call makes Python's table of names grow, by far more.
    few, many = peaks(_pack_and_open, *((folder,) for folder in [folders[1], *folders]))[1:]
    assert (many - few) / 2000 < 500


def _image(path: Path, seed: int, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def _mask(path: Path) -> None:
    pixels = np.zeros((32, 48), np.uint8)
    pixels[8:16, 10:20] = 255
    Image.fromarray(pixels).save(path)
