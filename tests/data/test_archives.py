import gzip
import io
import os
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adfm.data import archives, sources
from adfm.errors import AdfmError
from tests.memory import peaks

FILES = {"a/b/1.png": b"one", "a/2.png": b"", "z.txt": b"three" * 1000}


def _tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def _tar(path: Path, mode: str = "w", *extra: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, mode) as file:
        for name, content in FILES.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
        for info, content in extra:
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def _zip(path: Path, *extra: tuple[zipfile.ZipInfo | str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.mkdir("a")
        for name, content in [*FILES.items(), *extra]:
            file.writestr(name, content)
    return path


def _zst(path: Path) -> Path:
    plain = _tar(path.with_name("plain"))
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(plain.read_bytes())
    plain.unlink()
    return path


ARCHIVES: dict[str, Callable[[Path], Path]] = {
    "x.zip": _zip,
    "x.tar": _tar,
    "x.tar.gz": lambda path: _tar(path, "w:gz"),
    "x.TGZ": lambda path: _tar(path, "w:gz"),
    "x.tar.xz": lambda path: _tar(path, "w:xz"),
    "x.txz": lambda path: _tar(path, "w:xz"),
    "x.tar.zst": _zst,
}


def _info(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def _zip_link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive(tmp_path: Path, name: str) -> None:
    sources.fetch(str(ARCHIVES[name](tmp_path / name)), tmp_path / "out")
    assert _tree(tmp_path / "out") == FILES
    assert '"z.txt"' in (tmp_path / "out" / "manifest.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", name]


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.tar.xz", "x.tar.zst"])
def test_an_archive_that_is_cut_off_anywhere(tmp_path: Path, name: str) -> None:
    whole = ARCHIVES[name](tmp_path / name).read_bytes()

    @settings(deadline=None, max_examples=40)
    @given(length=st.integers(0, len(whole) - 1))
    def cut(length: int) -> None:
        (tmp_path / name).write_bytes(whole[:length])
        try:
            sources.fetch(str(tmp_path / name), tmp_path / "out")
        except AdfmError as error:
            assert str(tmp_path / name) in str(error)
            assert [path.name for path in tmp_path.iterdir()] == [name]
        else:  # only what a tar is filled up with is missing
            assert name.startswith("x.tar") and _tree(tmp_path / "out") == FILES
            shutil.rmtree(tmp_path / "out")

    cut()


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.tar.xz", "x.tar.zst"])
def test_a_damaged_archive_is_refused_or_holds_only_what_can_be_named(tmp_path: Path, name: str) -> None:
    whole = ARCHIVES[name](tmp_path / name).read_bytes()
    outside = tmp_path / "outside"
    outside.mkdir()

    @settings(deadline=None, max_examples=40)
    @given(place=st.integers(0, len(whole) - 1), bit=st.integers(0, 7))
    def flip(place: int, bit: int) -> None:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        (tmp_path / name).write_bytes(damaged)
        try:
            sources.fetch(str(tmp_path / name), outside / "out")
        except AdfmError as error:
            assert str(tmp_path / name) in str(error)
            assert not any(outside.iterdir())
        else:
            assert [path.name for path in outside.iterdir()] == ["out"]
            shutil.rmtree(outside / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", name]

    flip()


def test_links_within_an_archive_become_copies(tmp_path: Path) -> None:
    links = [
        (_info("first", tarfile.SYMTYPE, "second"), b""),
        (_info("second", tarfile.SYMTYPE, "a/b/1.png"), b""),
        (_info("hard", tarfile.LNKTYPE, "a/b/1.png"), b""),
        (_info("a/soft", tarfile.SYMTYPE, "../z.txt"), b""),
    ]
    sources.fetch(str(_tar(tmp_path / "x.tar", "w", *links)), tmp_path / "tar")
    one = {"first": b"one", "second": b"one", "hard": b"one"}
    assert _tree(tmp_path / "tar") == {**FILES, **one, "a/soft": FILES["z.txt"]}
    sources.fetch(str(_zip(tmp_path / "x.zip", (_zip_link("a/soft"), b"b/1.png"))), tmp_path / "zip")
    assert _tree(tmp_path / "zip") == {**FILES, "a/soft": b"one"}
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


def test_all_members_that_are_not_to_be_trusted_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("secret")
    members = {
        _info("../evil"): "leads out of the folder",
        _info("a/../../evil"): "leads out of the folder",
        _info("/tmp/evil"): "leads out of the folder",
        _info("./.fetch/ledger.sqlite"): "has the name of a folder that adfm uses itself",
        _info("evil/" + "x" * 256): "is longer than the 255 bytes",
        _info(
            "absolute", tarfile.SYMTYPE, "/etc/passwd"
        ): "is a link to '/etc/passwd', which is not a file of the archive",
        _info("a/up", tarfile.SYMTYPE, "../../outside"): "is a link to '../outside', which is not a file",
        _info("hard", tarfile.LNKTYPE, "../outside"): "is a link to '../outside', which is not a file",
        _info("folder", tarfile.SYMTYPE, "a"): "is a link to 'a', which is not a file",
        _info("missing", tarfile.SYMTYPE, "nowhere"): "is a link to 'nowhere', which is not a file",
        _info("circle", tarfile.SYMTYPE, "circle"): "is a link to 'circle', which is not a file",
        _info("z.txt"): "is there twice",
        _info("z.txt/inside"): "is both a file and a folder",
        _info("character", tarfile.CHRTYPE): "is a device or a pipe",
        _info("block", tarfile.BLKTYPE): "is a device or a pipe",
        _info("pipe", tarfile.FIFOTYPE): "is a device or a pipe",
    }
    archive = _tar(tmp_path / "x.tar", "w", *((member, b"") for member in members))
    with pytest.raises(AdfmError) as error:
        sources.fetch(str(archive), tmp_path / "out")
    for member, says in members.items():
        [line] = [line for line in str(error.value).splitlines() if line.startswith(f"  {member.name!r} ")]
        assert says in line
    assert len(str(error.value).splitlines()) == 1 + len(members)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "x.tar"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("../evil", b"x"),
        ("/evil", b"x"),
        ("..\\evil", b"x"),
        (_zip_link("evil"), b"/etc/passwd"),
        (_zip_link("evil"), b"../x.zip"),
        ("evil/" + "x" * 300, b"x"),
    ],
)
def test_a_zip_member_that_is_not_to_be_trusted(tmp_path: Path, name: Any, content: bytes) -> None:
    with pytest.raises(AdfmError, match="evil"):
        sources.fetch(str(_zip(tmp_path / "x.zip", (name, content))), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]


def test_a_link_first_and_then_a_file_through_it(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    members = [(_info("door", tarfile.SYMTYPE, "../outside"), b""), (_info("door/evil"), b"x")]
    with pytest.raises(AdfmError, match="door"):
        sources.fetch(str(_tar(tmp_path / "x.tar", "w", *members)), tmp_path / "out")
    assert not any((tmp_path / "outside").iterdir())


@settings(deadline=None, max_examples=200)
@given(name=st.text(st.sampled_from("./a\0"), max_size=12))
def test_no_name_leads_out(name: str) -> None:
    if not archives.refusal(name):
        assert "\0" not in name
        assert os.path.abspath(f"/root/{name}").startswith("/root")
        assert not os.path.abspath(f"/root/{name}").startswith("/root/.fetch")


def test_of_very_many_bad_members_the_first_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    archive = _tar(tmp_path / "x.tar", "w", *((_info(f"../{number}"), b"") for number in range(60)))
    with pytest.raises(AdfmError, match=r"'\.\./49' leads out") as error:
        sources.fetch(str(archive), tmp_path / "out")
    assert str(error.value).endswith("\n  and 10 more")


def test_an_encrypted_zip(tmp_path: Path) -> None:
    content = bytearray(_zip(tmp_path / "x.zip").read_bytes())
    for at in range(len(content)):  # the flag in both headers of every member
        if content[at : at + 4] == b"PK\x03\x04":
            content[at + 6] |= 1
        elif content[at : at + 4] == b"PK\x01\x02":
            content[at + 8] |= 1
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(AdfmError, match="(?s)x.zip: .*'a/b/1.png' is encrypted.*'z.txt' is encrypted"):
        sources.fetch(str(tmp_path / "x.zip"), tmp_path / "out")


def test_a_compression_that_python_does_not_know(tmp_path: Path) -> None:
    content = _zip(tmp_path / "x.zip").read_bytes().replace(struct.pack("<H", 8), struct.pack("<H", 9))  # deflate64
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(AdfmError, match="x.zip: cannot be unpacked"):
        sources.fetch(str(tmp_path / "x.zip"), tmp_path / "out")


def test_names_in_other_encodings(tmp_path: Path) -> None:
    info = _info("gut\udce9.png")  # Latin-1
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as file:
        file.addfile(info)
    sources.fetch(str(tmp_path / "x.tar"), tmp_path / "tar")
    assert list(_tree(tmp_path / "tar")) == ["guté.png"]

    (tmp_path / "x.zip").write_bytes(  # code page 437, in which zip is written when it does not say UTF-8
        _zip(tmp_path / "x.zip", ("caf_.png", b"x"), ("名前.png", b"y"), ("a\\b.png", b"z"))
        .read_bytes()
        .replace(b"caf_.png", b"caf\x82.png")
    )
    sources.fetch(str(tmp_path / "x.zip"), tmp_path / "zip")
    assert _tree(tmp_path / "zip") == {**FILES, "café.png": b"x", "名前.png": b"y", "a/b.png": b"z"}


class _Named(zipfile.ZipInfo):
    """A member whose name is written in the given bytes, without the flag of UTF-8."""

    def __init__(self, name: bytes, extra: bytes = b"") -> None:
        super().__init__(name.decode("latin-1"))
        self._bytes, self.extra = name, extra

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:  # noqa: N802
        return self._bytes, self.flag_bits & ~0x800


def _unicode_path(name: str, of: bytes) -> bytes:
    """The extra field by which Info-ZIP writes a name in UTF-8 beside the one in a code page."""
    data = struct.pack("<BL", 1, zlib.crc32(of)) + name.encode()
    return struct.pack("<HH", 0x7075, len(data)) + data


def test_a_zip_of_windows_says_which_code_page_its_names_are_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [(_Named("line\\零件1.png".encode("cp936")), b"1"), (_Named("line/划痕\\b.png".encode("cp936")), b"2")]
    sources.fetch(str(_zip(tmp_path / "x.zip", *members)), tmp_path / "out")
    assert _tree(tmp_path / "out") == {**FILES, "line/零件1.png": b"1", "line/划痕/b.png": b"2"}
    assert "they are read in code page cp936, as in" in capsys.readouterr().err


def test_a_zip_of_macos_has_names_in_utf_8_without_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["划痕/e\u0301.png", "деталь.png"]
    members = [(_Named(name.encode()), name.encode()) for name in names]
    sources.fetch(str(_zip(tmp_path / "x.zip", *members)), tmp_path / "out")
    assert _tree(tmp_path / "out") == {**FILES, **{name: name.encode() for name in names}}
    assert "code page" not in capsys.readouterr().err


def test_the_unicode_path_of_info_zip_counts_if_it_belongs_to_the_name(tmp_path: Path) -> None:
    own, other = "零件.png".encode("cp936"), b"Pr\x81fung.png"
    members = [
        (_Named(own, _unicode_path("零件2.png", own)), b"1"),
        (_Named(other, _unicode_path("stale.png", b"x")), b"2"),
    ]
    sources.fetch(str(_zip(tmp_path / "x.zip", *members)), tmp_path / "out")
    assert _tree(tmp_path / "out") == {**FILES, "零件2.png": b"1", "Prüfung.png": b"2"}


def test_names_in_an_encoding_that_cannot_be_told_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdfmError, match="x.zip: its file names do not say their encoding: .*cp437.*names in UTF-8"):
        sources.fetch(str(_zip(tmp_path / "x.zip", (_Named(b"\x82.png"), b"x"))), tmp_path / "out")


@settings(deadline=None, max_examples=60)
@given(names=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), min_size=1, max_size=3))
@pytest.mark.parametrize("codec", ["utf-8", "flag", "cp936", "cp437", "cp866"])
def test_any_names_arrive_as_they_are_or_are_refused(
    tmp_path_factory: pytest.TempPathFactory, codec: str, names: list[str]
) -> None:
    names = ["".join(char for char in name if codec in ("flag", "utf-8") or _encodes(char, codec)) for name in names]
    if codec == "flag":  # `zipfile` itself cuts a name at a zero byte when it writes one
        names = [name.partition("\0")[0] for name in names]
    names = [name.strip("/\\.\0") for name in names]
    names = list(dict.fromkeys(f"{name}.png" for name in names))
    tmp_path = tmp_path_factory.mktemp("names")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for name in names:
            file.writestr(name if codec == "flag" else _Named(name.encode(codec)), name.encode())
    try:
        files, _ = sources.fetch(str(tmp_path / "x.zip"), tmp_path / "out")
    except AdfmError as error:
        assert str(tmp_path / "x.zip") in str(error)
        return
    tree = _tree(tmp_path / "out")
    assert files == len(tree) == len(names)
    assert sorted(tree.values()) == sorted(name.encode() for name in names)
    if codec in ("flag", "utf-8") and all(ord(char) < 128 or ord(char) > 0x7FF for name in names for char in name):
        assert set(tree) == {os.path.normpath(name.replace("\\", "/")) for name in names}


def _encodes(char: str, codec: str) -> bool:
    return char.encode(codec, errors="ignore") != b""


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("a.png", "./a.png"), "'./a.png' becomes the same file as 'a.png'"),
        (("b//a.png", "b/a.png"), "'b/a.png' becomes the same file as 'b//a.png'"),
        (("\u00e9.png", "e\u0301.png"), "has the same name as .* but for its Unicode normalisation"),
        (("\u00e9/1.png", "e\u0301/2.png"), "has the same name as .* but for its Unicode normalisation"),
        (("b", "b/a.png"), "'b/a.png' is both a file and a folder, because of 'b'"),
        (("b/a.png", "b"), "'b' is both a file and a folder, because of 'b/a.png'"),
        (("b\\a.png", "b/a.png"), "'b/a.png' is there twice"),
        (("a/.",), "ends in '/.', which is not the name of a file"),
    ],
)
def test_members_that_would_become_one_file(tmp_path: Path, names: tuple[str, ...], says: str) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for name in names:
            file.writestr(name, b"x")
    with pytest.raises(AdfmError, match=says):
        sources.fetch(str(tmp_path / "x.zip"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_that_differ_in_case_are_refused_where_the_disk_ignores_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = str(_zip(tmp_path / "x.zip", ("Z.TXT", b"x"), ("A/3.png", b"y")))
    sources.fetch(archive, tmp_path / "out")
    assert _tree(tmp_path / "out") == {**FILES, "Z.TXT": b"x", "A/3.png": b"y"}
    monkeypatch.setattr("adfm.data.manifest.ignores_case", lambda _: True)
    with pytest.raises(AdfmError, match="(?s)'Z.TXT' differs from 'z.txt' only in case.*'A/3.png' differs") as error:
        sources.fetch(archive, tmp_path / "other")
    assert len(str(error.value).splitlines()) == 3


def test_folder_entries_of_a_zip(tmp_path: Path) -> None:
    sources.fetch(str(_zip(tmp_path / "x.zip", ("b\\", b""), ("b\\c.png", b"x"))), tmp_path / "out")
    assert _tree(tmp_path / "out") == {**FILES, "b/c.png": b"x"}
    with pytest.raises(AdfmError, match="'c/' is a folder with content"):
        sources.fetch(str(_zip(tmp_path / "x.zip", ("c/", b"content"))), tmp_path / "other")


# ------------------------------------------------------------------------------------------------------------ damage


class _Stored:
    """In the place of the ledger: keeps the files in memory, so that thousands of archives are unpacked quickly."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, {}

    def claim(self, path: str, origin: str) -> None:
        pass

    def store(self, path: str, content: IO[bytes]) -> None:
        if path in self.files:
            raise FileExistsError
        self.files[path] = content.read()


def _small_zip(streamed: bool, zip64: bool) -> bytes:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: int) -> int:
            raise io.UnsupportedOperation

        tell = seek

    buffer = Pipe() if streamed else io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content, kind in (("a/1.png", b"one", 0), ("photo", b"22" * 9, 8), ("é.txt", b"", 0)):
            info = zipfile.ZipInfo(name)
            info.compress_type = kind
            with file.open(info, "w", force_zip64=zip64) as member:
                member.write(content)
    return buffer.getvalue()


@pytest.mark.parametrize(("streamed", "zip64"), [(False, False), (True, False), (False, True)])
def test_a_zip_with_any_bit_flipped_is_whole_or_refused(tmp_path: Path, streamed: bool, zip64: bool) -> None:
    whole = _small_zip(streamed, zip64)
    _flip_every_bit(tmp_path / "x.zip", whole, {"a/1.png": b"one", "photo": b"22" * 9, "é.txt": b""})


@pytest.mark.parametrize("ending", ["gz", "xz"])
def test_a_compressed_tar_with_any_bit_flipped_is_whole_or_refused(tmp_path: Path, ending: str) -> None:
    path = _tar(tmp_path / f"x.tar.{ending}", f"w:{ending}")
    _flip_every_bit(path, path.read_bytes(), FILES)


def _flip_every_bit(path: Path, whole: bytes, files: dict[str, bytes]) -> None:
    refused = 0
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        ledger = _Stored(path.parent)
        try:
            archives.unpack(path, path.parent, ledger, "x")  # type: ignore[arg-type]
        except AdfmError:
            refused += 1
        else:
            assert ledger.files == files, bit
    assert refused > 100


def test_a_tar_with_a_damaged_header_does_not_end_there(tmp_path: Path) -> None:
    whole = bytearray(_tar(tmp_path / "x.tar").read_bytes())
    for bit in range(0, 8 * 512, 3):
        damaged = bytearray(whole)
        damaged[1024 + bit // 8] ^= 1 << bit % 8  # the header of the second file
        (tmp_path / "x.tar").write_bytes(damaged)
        ledger = _Stored(tmp_path)
        try:
            archives.unpack(tmp_path / "x.tar", tmp_path, ledger, "x")  # type: ignore[arg-type]
        except AdfmError as error:
            assert "is damaged" in str(error)
        else:
            assert ledger.files == FILES, bit  # a space beside the checksum


def test_a_tar_that_ends_after_a_file_of_zeros_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(_tar(tmp_path / "x.tar", "w", (_info("black"), bytes(512))).read_bytes()[:-1])
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[: whole.index(b"black") + 1024])
    with pytest.raises(AdfmError, match="x.tar: is damaged .*the end is missing"):
        sources.fetch(str(tmp_path / "x.tar"), tmp_path / "out")


def test_two_links_of_one_name(tmp_path: Path) -> None:
    links = [(_info("link", tarfile.SYMTYPE, "z.txt"), b""), (_info("link", tarfile.SYMTYPE, "a/2.png"), b"")]
    with pytest.raises(AdfmError, match="'link' is there twice"):
        sources.fetch(str(_tar(tmp_path / "x.tar", "w", *links)), tmp_path / "out")


# -------------------------------------------------------------------------------------------------------------- bombs


def _zeros(size: int) -> bytes:
    return gzip.compress(bytes(2**20), 9) * (size // 2**20)  # members of gzip, one after the other


def test_a_zip_bomb_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_HARMLESS", 2**20)
    monkeypatch.setattr("adfm.data.manifest.Ledger.store", lambda *_: pytest.fail("something was written"))
    archive = _zip(tmp_path / "x.zip", ("zeros", bytes(2**24)))
    assert 100 * archive.stat().st_size < 2**24
    with pytest.raises(AdfmError, match="x.zip: expands to more than 100 times its size"):
        sources.fetch(str(archive), tmp_path / "out")


@pytest.mark.parametrize("ending", ["gz", "xz"])
def test_a_tar_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    monkeypatch.setattr(archives, "_HARMLESS", 2**20)
    archive = _tar(tmp_path / f"x.tar.{ending}", f"w:{ending}", (_info("zeros"), bytes(2**23)))
    with pytest.raises(AdfmError, match="expands to more than 100 times its size"):
        sources.fetch(str(archive), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]


def test_a_bomb_after_the_end_of_a_tar_or_in_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_HARMLESS", 2**20)
    archive = _tar(tmp_path / "x.tar.gz", "w:gz")
    archive.write_bytes(archive.read_bytes() + _zeros(2**25))
    with pytest.raises(AdfmError, match="expands to more than 100 times its size"):
        sources.fetch(str(archive), tmp_path / "out")

    info = _info("././@PaxHeader", tarfile.XHDTYPE)
    info.size = 2**25
    (tmp_path / "y.tar.gz").write_bytes(gzip.compress(info.tobuf()) + _zeros(2**25))
    (peak,) = peaks(_refused, (tmp_path / "y.tar.gz", "a name or its attributes are longer than 1 MiB"))
    assert peak < 2**24


def test_many_links_to_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_HARMLESS", 2**20)
    links = [(_info(f"link{number}", tarfile.LNKTYPE, "z.txt"), b"") for number in range(1000)]
    with pytest.raises(AdfmError, match="expands to more than 100 times its size"):
        sources.fetch(str(_tar(tmp_path / "x.tar.xz", "w:xz", *links)), tmp_path / "out")


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz"])
def test_an_archive_that_does_not_fit_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9000, 5000, 4000))
    with pytest.raises(AdfmError, match=f"{name}: needs .* GB or more, and .* are free at {tmp_path}; free some space"):
        sources.fetch(str(ARCHIVES[name](tmp_path / name)), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_black_masks_are_no_bomb(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for number in range(20):
            file.writestr(f"{number}_mask.bmp", bytes(2**20))
    assert 500 * (tmp_path / "x.zip").stat().st_size < 20 * 2**20
    sources.fetch(str(tmp_path / "x.zip"), tmp_path / "out")
    assert len(_tree(tmp_path / "out")) == 20


def test_memory_does_not_grow_with_the_number_of_entries_of_a_tar(tmp_path: Path) -> None:
    for files in (100, 1000):
        path = tmp_path / f"{files}.tar"
        with path.open("wb") as file:
            for number in range(files):
                file.write(_info(f"{number % 10}/{number:07d}.png").tobuf())
                for folder in range(9):
                    file.write(_info(f"{folder}/{number}", tarfile.DIRTYPE).tobuf())
            file.write(bytes(1024))
    few, many = peaks(
        sources.fetch, *((str(tmp_path / f"{files}.tar"), tmp_path / str(files)) for files in (100, 1000))
    )
    assert len(_tree(tmp_path / "1000")) == 1000
    assert many < few + 2**20  # the entries of the second would be 10 MiB


def test_a_zip_of_too_many_entries(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for number in range(15_000):
            file.writestr(zipfile.ZipInfo(f"category/test/{number:015d}.png"), b"")
    refusal = r"x.zip: holds too many files for a zip .* make a .tar of them"
    _, peak = peaks(_refused, *2 * [(tmp_path / "x.zip", refusal)])
    assert peak < 2**20


def _refused(archive: Path, why: str) -> None:
    archives._HARMLESS = archives._TABLE = 2**20
    with pytest.raises(AdfmError, match=why):
        sources.fetch(str(archive), archive.parent / "out")
