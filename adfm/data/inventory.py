"""Inventory of a raw data set: which files are converted, used as annotations, or left out, and why."""

import os
import re
from collections.abc import Container, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from adfm.data.manifest import MANIFEST
from adfm.data.problems import EXAMPLES
from adfm.data.readers.files import IMAGES, holds_true, is_hidden

# Readers do not report which of these they have read.
_ANNOTATIONS = (".json", ".jsonl", ".xml", ".txt", ".csv", ".tsv", ".yaml", ".yml", ".names", ".labels", ".data")
_UNREAD = frozenset(
    (
        # images
        *(".gif", ".apng", ".svg", ".psd", ".xcf", ".ai", ".eps", ".ico", ".icns", ".tga", ".dds", ".pcx", ".exr"),
        *(".hdr", ".pfm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".jpf", ".jxl", ".jxr", ".jpe", ".jif", ".dib"),
        *(".dcm", ".dicom", ".nii", ".czi", ".lif", ".fit", ".fits"),
        *(".raw", ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".orf", ".rw2", ".raf", ".pef"),
        *(".mp4", ".m4v", ".avi", ".mov", ".mkv", ".webm", ".wmv", ".mpg", ".mpeg", ".flv", ".ogv"),
        # arrays and tables
        *(".npy", ".npz", ".mat", ".h5", ".hdf5", ".pkl", ".pickle", ".pt", ".tfrecord", ".parquet", ".arrow", ".mdb"),
        *(".xls", ".xlsx", ".xlsm", ".ods"),
    )
)
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_PAPERS = re.compile(r"(readme|licen[cs]e|changelog|citation)\b.*", re.IGNORECASE)
# Not opened to see whether they are images.
_NOT_SNIFFED = (".md", ".rst", ".pdf", ".html", ".htm", ".db", ".py", ".ipynb", ".log", ".ini", ".sh")
_SUFFIX = re.compile(r"\.(?=.*[a-z])[a-z0-9_+-]{1,10}")
_MOST_KINDS = 100  # rows of `left_out`, whatever names a data set has

HIDDEN = "hidden: the name, or that of a folder, begins with a dot or __MACOSX"
UNREAD = "adfm does not read this format; save images as PNG, tables as CSV"
ARCHIVE = "an archive within the data set; unpack it"
MISNAMED = "an image whose name does not end as an image's; rename it"
UNUSED = "an image that the layout does not use"
BROKEN = "cannot be read, or a link to nowhere"
OTHER = "neither an image nor an annotation"

LOST = (UNREAD, ARCHIVE, MISNAMED, BROKEN)  # of files that may hold images which the user expects to be converted
_ORDER = (*LOST, UNUSED, OTHER, HIDDEN)


class Inventory(NamedTuple):
    """Numbers of files of a data set."""

    files: int
    images: int  # converted
    annotations: int  # files of annotations, and masks that are used
    left_out: list[dict[str, Any]]  # all others, by kind (mostly the suffix): `kind`, `reason`, `files`, `examples`


def take(raw: Path, images: Container[str], masks: Container[str]) -> Inventory:
    """Count the files of a data set by their use: `images` converted, `masks` used, as relative paths with `/`."""
    converted = annotations = 0
    left_out: dict[tuple[str, str], dict[str, Any]] = {}
    for path, is_file in _walk(raw):
        if path in images:
            converted += 1
        elif path in masks:
            annotations += 1
        elif path != MANIFEST:  # that of `adfm fetch` does not count
            name = path.rpartition("/")[2]
            suffix = PurePosixPath(name).suffix.lower()
            reason = _reason(raw, path, suffix, is_file)
            if reason is None:
                annotations += 1
                continue
            kind = _kind(name, suffix)
            if len(left_out) >= _MOST_KINDS and (kind, reason) not in left_out:
                kind = "other"
            row = left_out.setdefault((kind, reason), {"kind": kind, "reason": reason, "files": 0, "examples": []})
            row["files"] += 1
            if len(row["examples"]) < EXAMPLES:
                row["examples"].append(path)
    rows = sorted(left_out.values(), key=lambda row: (_ORDER.index(row["reason"]), -row["files"], row["kind"]))
    total = converted + annotations + sum(row["files"] for row in rows)
    return Inventory(total, converted, annotations, rows)


def _walk(raw: Path) -> Iterator[tuple[str, bool]]:
    """Yield the path of every file below `raw`, and whether it is a file, not a link to nowhere."""
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while pending:
        folder, above = pending.pop()
        names, folders, broken = list[str](), set[str](), set[str]()
        try:
            status = (raw / folder).stat()
            identity = (status.st_dev, status.st_ino)
            if identity in above:  # by a link within itself
                continue
            with os.scandir(raw / folder) as entries:
                for entry in entries:  # an entry takes three times the memory of its name
                    names.append(entry.name)
                    if holds_true(entry.is_dir):
                        folders.add(entry.name)
                    elif not holds_true(entry.is_file):
                        broken.add(entry.name)
        except OSError:  # a folder that its reader did not need, or had refused
            continue
        yield from ((f"{folder}{name}", name not in broken) for name in sorted(names) if name not in folders)
        pending += ((f"{folder}{name}/", above | {identity}) for name in sorted(folders, reverse=True))


def _reason(raw: Path, path: str, suffix: str, is_file: bool) -> str | None:
    if any(map(is_hidden, path.split("/"))):
        return HIDDEN
    if not is_file:
        return BROKEN
    for suffixes, reason in ((IMAGES, UNUSED), (_UNREAD, UNREAD), (_ARCHIVES, ARCHIVE)):
        if suffix in suffixes:
            return reason
    if suffix in _NOT_SNIFFED or _PAPERS.match(path.rpartition("/")[2]):
        return OTHER
    if suffix in _ANNOTATIONS:
        return None  # it is not left out
    try:
        with (raw / path).open("rb", buffering=0) as file:
            return MISNAMED if _is_image(file.read(16)) else OTHER
    except OSError:
        return BROKEN


def _is_image(start: bytes) -> bool:
    return (
        # PNG, JPEG, GIF, TIFF, JPEG 2000, BMP, WebP, HEIF and AVIF.
        start.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  "))
        or (start[:2] == b"BM" and start[6:10] == bytes(4))
        or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
        or start[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypavif")
    )


def _kind(name: str, suffix: str) -> str:
    if _SUFFIX.fullmatch(suffix):
        return suffix
    if _SUFFIX.fullmatch(name.lower()):  # .gitignore
        return name
    return "other" if suffix else "no suffix"
