"""Read image files of a raw data set, which may lie in an archive; image files are opened nowhere else.

`adfm.data.packed.opened` makes a folder in which images have their name and size alone, and registers here where in the
archive their bytes are.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class _Archive(NamedTuple):
    descriptor: int
    offsets: Mapping[str, int]


_archives: list[_Archive] = []


def read(path: Path) -> bytes:
    """Read an image or mask file, from its folder or from an archive that is open; threads may share it.

    Raises:
        OSError: It is not there or cannot be read.
    """
    for archive in _archives:
        offset = archive.offsets.get(os.path.normpath(path))
        if offset is not None:
            return _read(archive.descriptor, offset, path.stat().st_size, path)
    return path.read_bytes()


def _read(descriptor: int, offset: int, size: int, path: Path) -> bytes:
    pieces = []
    while size:
        piece = os.pread(descriptor, size, offset)  # has no position that threads could move
        if not piece:
            raise OSError(errno.EIO, "the archive ends within this file", str(path))
        pieces.append(piece)
        offset, size = offset + len(piece), size - len(piece)
    return b"".join(pieces)


@contextmanager
def lying_in(descriptor: int, offsets: Mapping[str, int]) -> Iterator[None]:
    """Let `read` take files from an archive in the block.

    Args:
        descriptor: Of the open archive.
        offsets: Where the bytes of a file begin, by its absolute, normalised path. A file of that size must be there.
    """
    archive = _Archive(descriptor, offsets)
    _archives.append(archive)
    try:
        yield
    finally:
        _archives.remove(archive)
