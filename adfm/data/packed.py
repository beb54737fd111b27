"""Pack a raw data set into an uncompressed tar, and read it from there without unpacking its images."""

# Kubeflow moves an artifact file by file, one after another; an archive is one file, and above `LARGEST` a few.

import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, NamedTuple, cast

from adfm.data import contents
from adfm.data.archives import StrictTarInfo
from adfm.data.readers.files import IMAGES, refuse_special
from adfm.errors import AdfmError
from adfm.files import walk

# Bytes of an archive; what does not fit goes into further ones. KFP's launcher cannot upload more than 48.8 GiB a file
# to S3: it leaves the AWS SDK at 10,000 parts of 5 MiB (`uploadFile` in backend/src/v2/objectstore/object_store.go).
LARGEST = 40 * 2**30
_ENDING = ".tar"


def pack(folder: Path, archive: Path) -> None:
    """Write the files of a folder into an archive; the same names and contents give the same bytes.

    Folders are kept, also empty ones; links become what they lead to, as in `fetch`. Names are kept byte by byte, in
    UTF-8 or not; times, owners and permissions are not. An earlier archive stays until the new one is whole.

    Args:
        folder: The data set.
        archive: `<name of the data set>.tar`; above `LARGEST`, `<name>.1-of-2.tar` and so on are made instead, each a
            tar of its own.

    Raises:
        AdfmError: There is a pipe, a device, or a link to nowhere or round; the archive cannot be written.
    """
    refuse_special(folder)  # before anything is opened: a pipe would be waited for
    partials: list[Path] = []
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        entries = _entries(folder)
        entry = next(entries, None)
        while entry or not partials:
            partials.append(archive.with_name(f"{archive.name}.{len(partials) + 1}.partial"))
            with tarfile.open(partials[-1], "w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:
                while entry and (not tar.offset or tar.offset + (entry.size or 0) <= LARGEST):
                    _add(tar, entry)
                    entry = next(entries, None)
        for earlier in (archive, *_matching(archive, "[0-9]*-of-[0-9]*")):
            earlier.unlink(missing_ok=True)
        for partial, volume in zip(partials, _volume_names(archive, len(partials)), strict=True):
            partial.replace(volume)
    except OSError as error:
        remedy = "see that the files can be read and that there is as much space as they take"
        raise AdfmError(f"{folder} cannot be packed into {archive} ({error}); {remedy}.") from error
    finally:
        for partial in partials:
            with suppress(OSError):
                partial.unlink()


class _Entry(NamedTuple):
    name: str  # in the archive
    path: Path
    size: int | None  # bytes; `None` for a folder


def _entries(folder: Path) -> Iterator[_Entry]:
    for place, names in walk(folder):
        inside = place.relative_to(folder)
        if inside.parts:
            yield _Entry(inside.as_posix(), place, None)
        for name in names:
            yield _Entry((inside / name).as_posix(), place / name, (place / name).stat().st_size)


def _add(tar: tarfile.TarFile, entry: _Entry) -> None:
    info = tarfile.TarInfo(entry.name)  # time and owner, which differ between machines, are 0
    if entry.size is None:
        info.type, info.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(info)
    else:
        with entry.path.open("rb") as content:
            info.size = os.fstat(content.fileno()).st_size
            tar.addfile(info, content)
    tar.members = []  # type: ignore[attr-defined]  # it would keep them all


def _volume_names(archive: Path, count: int) -> list[Path]:
    if count == 1:
        return [archive]
    return [archive.with_suffix(f".{number}-of-{count}{_ENDING}") for number in range(1, count + 1)]


def _matching(archive: Path, numbers: str) -> list[Path]:
    return list(archive.parent.glob(f"{escape(archive.stem)}.{numbers}{_ENDING}"))


@contextmanager
def opened(archive: Path) -> Iterator[Path]:
    """Yield the folder of a packed data set, to be read in the block.

    Folders and all files but images are unpacked into a temporary folder. An image has a file of its size there that
    takes no space, so that listing and `stat` are true; `adfm.data.contents.read` reads its bytes from the archive.
    The folder has the name of the archive, without `.tar`.

    Raises:
        AdfmError: It is not there, damaged, or not such an archive.
    """
    with TemporaryDirectory(prefix="adfm-") as temporary, ExitStack() as stack:
        raw = Path(os.path.realpath(temporary), archive.name.removesuffix(_ENDING))
        raw.mkdir()
        several = _matching(archive, "1-of-[0-9]*")
        count = int(several[0].stem.rpartition("-")[2]) if several else 1
        for volume in _volume_names(archive, count):  # a missing one is an error
            try:
                file = stack.enter_context(volume.open("rb"))
            except OSError as error:
                raise AdfmError(f"{volume}: cannot be read ({error.strerror}); fetch the data set again.") from error
            stack.enter_context(contents.lying_in(file.fileno(), _unpack(volume, file, raw)))
        yield raw


def _unpack(archive: Path, file: IO[bytes], raw: Path) -> dict[str, int]:
    """Unpack all files but images, and return where in the archive the images are, by their paths."""
    offsets: dict[str, int] = {}
    # All files get the time of the archive: a conversion that is resumed with another archive begins again.
    time = os.fstat(file.fileno()).st_mtime_ns
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=StrictTarInfo, encoding="utf-8") as tar:
            while member := tar.next():
                tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                is_plain = member.isdir() or member.type == tarfile.REGTYPE
                if not is_plain or {"", ".."} & set(member.name.split("/")):
                    raise AdfmError(f"{archive}: holds {member.name!r}, which adfm does not pack; fetch it instead.")
                path = raw / member.name
                if member.isdir():
                    path.mkdir(parents=True, exist_ok=True)
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.name.lower().endswith(tuple(IMAGES)):
                    # Without permissions: to open it past `contents.read` is an error, unless one is root.
                    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0), "wb") as stand_in:
                        stand_in.truncate(member.size)
                    offsets[str(path)] = member.offset_data
                else:
                    with cast("IO[bytes]", tar.extractfile(member)) as content, path.open("xb") as target:
                        shutil.copyfileobj(content, target)
                os.utime(path, ns=(time, time))
            file.seek(tar.offset)
            # A header of zeros ends a tar. Less than this follows the true one: zeros up to a whole record.
            if file.read(2 * tarfile.RECORDSIZE).strip(b"\0") or file.read(1):
                raise tarfile.ReadError("more follows its end")
    except (tarfile.TarError, EOFError, ValueError, FileExistsError, NotADirectoryError) as error:
        raise AdfmError(f"{archive}: is damaged, or not a tar ({error}); fetch the data set again.") from error
    except OSError as error:
        where = f"{archive}: cannot be opened in {raw.parent}"
        raise AdfmError(f"{where} ({error}); free some space there, or set TMPDIR.") from error
    return offsets
