"""Atomic output: folders and files are written beside their place and renamed when whole."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adfm.errors import AdfmError

MODEL = "adfm.json"  # in the folder of every finished model

# Every folder that a stage finishes has one of these; a folder without any is not adfm's and never replaced.
FINISHED = (
    *("manifest.json", "conversion.json", "inspection.json", "validation.json", MODEL, "config.json"),
    *("metrics.json", "cross-validation.json", "gate.json", "report.html"),
)

_REMEDIES = {
    errno.ENOSPC: "free some space, or choose a folder on another disk",
    errno.EDQUOT: "free some of your quota, or choose a folder on another disk",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f), or choose a folder on another disk",
    errno.EACCES: "change the permissions, or choose another folder",
    errno.EPERM: "change the permissions, or choose another folder",
    errno.EROFS: "choose a folder that can be written",
}


@contextlib.contextmanager
def atomic_folder(out: Path, keep_partial: bool = False) -> Iterator[Path]:
    """Yield `<out>.partial` to write into, and rename it to `out` when the block ends without an exception.

    An earlier result at `out` stays as it is until the new one is whole.

    Args:
        out: The folder to make; its parents are made as needed.
        keep_partial: Keep the partial folder when the block fails, and yield it as it was left the next time.

    Raises:
        AdfmError: `out` is a file or holds something that no stage wrote; the disk is full or not writable.
    """
    out = Path(os.path.abspath(out))
    partial, old = out.with_name(out.name + ".partial"), out.with_name(out.name + ".old")
    try:
        if old.exists() and not out.exists():  # killed between the two renames below
            old.rename(out)
        _refuse_foreign(out)
        if partial.exists() and not keep_partial:
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        yield partial
        if old.exists():
            shutil.rmtree(old)
        if out.exists():
            out.rename(old)
        partial.rename(out)
        if old.exists():
            shutil.rmtree(old)
    except BaseException as error:
        if not keep_partial:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _REMEDIES:
            where = error.filename if isinstance(error.filename, str) else out
            raise AdfmError(f"{where}: {os.strerror(error.errno)}; {_REMEDIES[error.errno]}.") from error
        raise


def refuse_to_replace(out: Path, force: bool = False) -> None:
    """Refuse a folder that already holds the result of a stage; call it before the work starts.

    Args:
        out: The folder to write.
        force: Accept a folder that holds a model; that of another stage is refused all the same.

    Raises:
        AdfmError: `out` holds the result of a stage, or something that no stage wrote.
    """
    out = Path(os.path.abspath(out))
    for folder in (out, out.with_name(out.name + ".old")):  # the second: killed while one replaced the other
        finished = next((name for name in FINISHED if (folder / name).is_file()), None)
        if finished == MODEL and not force:
            raise AdfmError(
                f"{folder} holds a finished model, which is not replaced; choose another folder, or add --force"
            )
        if finished not in (None, MODEL):
            raise AdfmError(
                f"{folder} holds the result of another stage ({finished}), and a model is to be written there; choose "
                "another folder"
            )
    _refuse_foreign(out)


def _refuse_foreign(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise AdfmError(f"{out} is a file, and a folder is to be written there; choose another name.")
    if out.is_dir() and any(out.iterdir()) and not any((out / name).is_file() for name in FINISHED):
        raise AdfmError(f"{out} holds files that adfm did not write; empty it or choose another folder.")


def walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield every folder below and its files, sorted by name; links are followed.

    Raises:
        OSError: A folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        folders.sort()
        yield Path(place), sorted(files)


def digest(folder: Path) -> str:
    """Return the SHA-256, in hex, of the relative paths and contents of all files of a folder."""
    total = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(json.dumps([file.relative_to(folder).as_posix(), file_digest(file)]).encode())
    return total.hexdigest()


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield `<file>.partial` to write, and rename it to `file` when the block ends without an exception."""
    partial = file.with_name(f"{file.name}.partial")
    yield partial
    partial.replace(file)


def replace_text(text: str, file: Path) -> None:
    """Write text to a file atomically: readers never see half of it."""
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def replace_json(content: dict[str, Any], file: Path) -> None:
    """Write JSON to a file atomically, as `write_json`."""
    with replacing(file) as partial:
        write_json(content, partial)


def write_json(content: dict[str, Any], file: Path) -> None:
    """Write indented JSON."""
    # NaN is not JSON: jq and browsers refuse the whole file.
    file.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
