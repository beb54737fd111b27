"""Safe extraction of untrusted archives: `.zip`, `.tar`, `.tar.gz`, `.tar.xz`, `.tar.zst`.

Nothing is written outside the folder, links become copies, and no archive fills the disk or the memory.
"""

import errno
import gzip
import lzma
import posixpath
import shutil
import stat
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Self, cast

import pyarrow as pa

from adfm.data import codepages
from adfm.data.manifest import STATE, Ledger
from adfm.data.problems import ProblemList
from adfm.errors import AdfmError
from adfm.process.progress import bar

ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.zst")

# An archive may expand to 1 GiB, or to 100 times its size: photographs hardly shrink when they are packed, and black
# masks beside them do not change that.
_GROWTH = 100
_HARMLESS = 2**30
# A zip's table of contents is read into memory: some 300,000 files. A tar is unpacked as it is read.
_TABLE = 32 * 2**20
_LINKS = 100_000
_UTF8 = 0x800  # a zip's flag of a name in UTF-8
_PATH = 3000  # bytes; Linux takes 4,096, with the path of the folder


def is_archive(name: str) -> bool:
    """Return whether a file of that name is taken for an archive."""
    return name.lower().endswith(ENDINGS)


def unpack(archive: Path, folder: Path, ledger: Ledger, who: str) -> None:
    """Unpack an archive, which errors call `who`, and enter its files in the ledger of the folder.

    Raises:
        AdfmError: It is damaged, encrypted or expands too far; or holds names that lead out of the folder, come twice
            or suit no disk, devices, pipes, or links to anything but a file of the archive.
    """
    problems = ProblemList(who)
    links: dict[str, str] = {}
    grows = _growth(archive, folder, who)
    try:
        is_zip = archive.name.lower().endswith(".zip")
        members = _zip_members(archive, who, grows) if is_zip else _tar_members(archive, grows)
        for member in bar(members, desc="unpack", unit="file"):
            name = utf8(member.name)
            if member.complaint:
                problems.add(f"{name!r} {member.complaint}")
            elif member.content is None and member.target is None:  # a folder
                if complaint := refusal(f"{name}/file"):
                    problems.add(f"{name!r} {complaint}")
            elif path := admit(ledger, name, problems):
                if member.content:
                    store(ledger, path, member.content, problems)
                    continue
                links[path] = utf8(member.target or "")
                if len(links) > _LINKS:
                    raise AdfmError(f"{who}: holds more than {_LINKS} links; make an archive of files.")
        for name, target in links.items():
            for _ in range(40):  # a link to a link; some lead round in a circle
                target = links.get(target, target)
            source = folder / target
            if refusal(target) or not source.is_file():
                problems.add(f"{name!r} is a link to {target!r}, which is not a file of the archive")
                continue
            grows(source.stat().st_size)
            with source.open("rb") as content:
                store(ledger, name, content, problems)
    except NotImplementedError as error:
        raise AdfmError(f"{who}: cannot be unpacked ({error}); unpack it by hand and give the folder.") from error
    except (*_DAMAGED, OSError) as error:
        # Without a number it is gzip's; with this one, a header points before the file's beginning.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise AdfmError(f"{who}: is damaged ({error}); get it again.") from error
    problems.finish()


_DAMAGED = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, ValueError, OverflowError, RuntimeError, MemoryError),
)


def utf8(name: str) -> str:
    """Return the name, if it is UTF-8; otherwise its bytes as Latin-1, where every byte is a letter."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return name.encode(errors="surrogateescape").decode("latin-1")
    return name


def refusal(name: str) -> str | None:
    """Return why a file of that name (with `/`) cannot be written into a folder; `None` if it can."""
    parts = name.split("/")
    if "\0" in name:
        return "has a zero byte in its name; rename it"
    if name.startswith("/") or ".." in parts:
        return "leads out of the folder; this source is not to be trusted"
    if parts[-1] in ("", "."):
        return f"ends in {name[-2:]!r}, which is not the name of a file; rename it"
    if posixpath.normpath(name).split("/")[0].casefold() == STATE:
        return "has the name of a folder that adfm uses itself; rename it"
    if any(len(part.encode()) > 255 for part in parts):
        return "is longer than the 255 bytes that a disk takes; shorten it"
    if len(name.encode()) > _PATH:
        return f"is a path of more than {_PATH} bytes; shorten it"
    return None


def admit(ledger: Ledger, name: str, problems: ProblemList, origin: str | None = None) -> str | None:
    """Claim the path of a file in the folder, its name without `//` and `./`, and return it.

    If it cannot be stored, or another file has that place, return `None`, and add a problem of the file `origin`.
    """
    path, origin = posixpath.normpath(name), origin or name
    if complaint := refusal(name) or ledger.claim(path, origin):
        problems.add(f"{origin!r} {complaint}")
        return None
    return path


def store(ledger: Ledger, path: str, content: IO[bytes], problems: ProblemList) -> None:
    """Write a file and enter it in the ledger, or add the problem that its place is taken."""
    try:
        ledger.store(path, content)
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        problems.add(f"{path!r} is there twice, or is both a file and a folder")


def _growth(archive: Path, folder: Path, who: str) -> Callable[[int], None]:
    """Return a function to call with a number of bytes before they are written; it refuses too many."""
    free = shutil.disk_usage(folder).free
    most = max(_HARMLESS, _GROWTH * archive.stat().st_size)
    total = 0

    def grows(size: int) -> None:
        nonlocal total
        total += size
        if total > most:
            raise AdfmError(
                f"{who}: expands to more than {_GROWTH} times its size, as no archive of images does; if you trust it, "
                "unpack it by hand and give the folder."
            )
        if total > free:
            raise AdfmError(
                f"{who}: needs {total / 1e9:.1f} GB or more, and {free / 1e9:.1f} GB are free at {folder.parent}; free "
                "some space, or choose a folder on another disk."
            )

    return grows


class _Member(NamedTuple):
    name: str
    content: IO[bytes] | None = None  # of a file
    target: str | None = None  # of a link, from the archive's root; a folder has neither
    complaint: str | None = None


def _zip_members(archive: Path, who: str, grows: Callable[[int], None]) -> Iterator[_Member]:
    with archive.open("rb") as raw:
        end = zipfile._EndRecData(raw)  # type: ignore[attr-defined]
        if end and end[5] > _TABLE:
            raise AdfmError(
                f"{who}: holds too many files for a zip (its table of contents has {end[5] / 2**20:.0f} MiB, and is "
                f"read into memory up to {_TABLE // 2**20}); make a .tar of them, or give the folder."
            )
        file = zipfile.ZipFile(raw)
        members = file.infolist()
        # `zipfile` ends early where the length of an entry is damaged. Old programs count modulo 65,536.
        if (len(members) - end[4]) % 2**16:
            raise zipfile.BadZipFile("its table of contents has another number of files than it says")
        grows(sum(info.file_size for info in members))
        for info, name in zip(members, _zip_names(raw, members, who), strict=True):
            if info.flag_bits & 1:
                yield _Member(name, complaint="is encrypted; make an archive without a password")
                continue
            with file.open(info) as content:
                if stat.S_ISLNK(info.external_attr >> 16):
                    target = content.read(_PATH).decode(errors="surrogateescape")
                    yield _Member(name, target=_joined(name, target))
                elif name.endswith("/"):
                    complaint = "is a folder with content; rename it" if content.read(1) else None
                    yield _Member(name, complaint=complaint)
                else:
                    yield _Member(name, content=content)


def _zip_names(raw: IO[bytes], members: Sequence[zipfile.ZipInfo], who: str) -> Iterator[str]:
    """Yield the names of a zip's members, with `/`; refuse those whose encoding cannot be guessed."""
    encoding = "utf-8"
    names = [_zip_name(raw, info) for info in members]
    if ambiguous := [name for name in names if isinstance(name, bytes) and not name.isascii()]:
        try:
            encoding, example = codepages.decoder(ambiguous)
        except ValueError as error:
            raise AdfmError(
                f"{who}: its file names do not say their encoding: {error}; pack it again with names in UTF-8 (7-Zip: "
                "the parameter cu=on), or unpack it by hand and give the folder."
            ) from None
        if encoding != "utf-8":
            note = f"its file names do not say their encoding; they are read in code page {encoding}, as in {example!r}"
            print(f"adfm: {who}: {note}", file=sys.stderr)
    for name in names:
        text = name if isinstance(name, str) else name.decode(encoding)
        yield text.replace("\\", "/")  # as some programs of Windows separate folders


def _zip_name(raw: IO[bytes], info: zipfile.ZipInfo) -> str | bytes:
    """Return the name of a member if its encoding is known, otherwise its bytes."""
    if info.flag_bits & _UTF8:
        return info.orig_filename
    own = info.orig_filename.encode("cp437")  # by which `zipfile` has decoded them
    raw.seek(info.header_offset)
    header = raw.read(30)
    if len(header) < 30:
        raise zipfile.BadZipFile("it is cut off")
    name_size, extra_size = struct.unpack("<HH", header[26:])
    name, extra = raw.read(name_size), raw.read(extra_size)
    path, local = _unicode_path(own, info.extra), _unicode_path(own, extra)
    if name != own or local not in (None, path):
        raise zipfile.BadZipFile(f"two headers of one file name it {info.orig_filename!r} and {name!r}")
    return path or own


def _unicode_path(name: bytes, extra: bytes) -> str | None:
    """Return the name in UTF-8 that Info-ZIP and others write beside one in a code page; `None` if it is of another."""
    while len(extra) >= 4:
        kind, size = struct.unpack("<HH", extra[:4])
        if kind == 0x7075 and extra[4:9] == struct.pack("<BL", 1, zlib.crc32(name)):
            return extra[9 : 4 + size].decode()
        extra = extra[4 + size :]
    return None


_DECOMPRESSED: dict[str, Callable[[IO[bytes]], Any]] = {
    "gz": gzip.open,
    "tgz": gzip.open,
    "xz": lzma.open,
    "txz": lzma.open,
    "zst": lambda raw: pa.CompressedInputStream(raw, "zstd"),
}


def _tar_members(archive: Path, grows: Callable[[int], None]) -> Iterator[_Member]:
    with archive.open("rb") as raw:  # damage to a file in a plain tar is not noticed: it has no checksum of contents
        ending = archive.name.lower().rpartition(".")[2]
        stream = cast("IO[bytes]", _DECOMPRESSED[ending](raw) if ending in _DECOMPRESSED else raw)
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=StrictTarInfo, encoding="utf-8") as file:
            while info := file.next():
                file.members = []  # type: ignore[attr-defined]  # it would keep them all
                grows(info.size)
                if info.islnk():
                    yield _Member(info.name, target=posixpath.normpath(info.linkname))
                elif info.issym():
                    yield _Member(info.name, target=_joined(info.name, info.linkname))
                elif info.isdir():
                    yield _Member(info.name)
                elif info.isfile():
                    yield _Member(info.name, content=file.extractfile(info))
                else:
                    yield _Member(info.name, complaint="is a device or a pipe; make an archive of files")
        while rest := stream.read(2**20):
            grows(len(rest))


class StrictTarInfo(tarfile.TarInfo):
    """A header of a tar, whose damage is an error: a `TarFile` ends there in silence."""

    @classmethod
    def fromtarfile(cls, file: tarfile.TarFile) -> Self:
        """Read a header; refuse a damaged one, and a missing end mark."""
        try:
            return super().fromtarfile(file)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"a header is damaged, or the end is missing: {error}") from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Read a header; refuse a long name or long attributes."""
        info = super().frombuf(buf, encoding, errors)
        names = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        attributes = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        # `TarInfo` would read them into memory, however long they claim to be.
        if info.type in names + attributes and info.size > 2**20:
            raise tarfile.ReadError("a name or its attributes are longer than 1 MiB")
        return info


def _joined(name: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
