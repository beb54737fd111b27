"""Read image files of a raw data set, which may lie in an archive; image files are opened nowhere else."""

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

# Of each open archive the descriptor, and where the bytes of its images begin, by path: in the folder that
# `adfm.data.packed.opened` makes, images have their name and size alone.
_archives: list[tuple[int, Mapping[str, int]]] = []


def read(path: Path) -> bytes:
    """Read an image or mask file, from its folder or from an archive that is open; threads may share it.

    Raises:
        OSError: It is not there or cannot be read.
    """
    for descriptor, offsets in _archives:
        if (offset := offsets.get(os.path.normpath(path))) is not None:
            return _read(descriptor, offset, path.stat().st_size, path)
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
    """Let `read` take files from an archive in the block; at the absolute, normalised paths are files of their size."""
    archive = descriptor, offsets
    _archives.append(archive)
    try:
        yield
    finally:
        _archives.remove(archive)
