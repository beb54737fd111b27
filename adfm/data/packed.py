"""A raw data set as one archive (stand-in)."""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


def pack(folder: Path, archive: Path) -> None:
    """Write a folder into an uncompressed tar, the same bytes for the same files."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime = member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member

    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w") as tar:
        tar.add(folder, folder.name, filter=plain)


@contextmanager
def opened(archive: Path) -> Iterator[Path]:
    """The folder that was packed, unpacked for the body."""
    with TemporaryDirectory() as place, tarfile.open(archive) as tar:
        tar.extractall(place, filter="data")
        yield Path(place) / archive.stem
