"""Find the image that a list of annotations names, by a path or URL written on another machine.

An image is where its path says, as far as that path exists in the data set. A bare name counts beside the list and in
its image folders only: `0001.png` of `instances_train.json` is never the one in `val`.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from adfm.data.readers.annotations import split_of, walk, within
from adfm.data.readers.files import folders, is_image
from adfm.records import Split

_IMAGE_FOLDERS = frozenset(("images", "image", "imgs", "img", "data", "jpegimages", "upload", "media"))
_UPLOAD = re.compile(r"(?:^|/)upload/\d+/[^/]+$")  # of Label Studio: a number stands for the project


class Places(NamedTuple):
    """Where the images of one annotation file may be.

    Args:
        bases: Folders that a path with folders in it may start from.
        bare: Folders that a bare name may be in; the first group that has it counts.
        only: The one folder with images, if there is just one.
    """

    bases: list[Path]
    bare: list[list[Path]]
    only: list[Path]


def places(raw: Path, file: Path, split: Split | None) -> Places:
    """Where the images of an annotation file may be.

    Args:
        raw: The data set.
        file: The annotation file, in `raw`.
        split: The split that the file is about.
    """
    around = [base for base in dict.fromkeys((file.parent, file.parent.parent, raw)) if base.is_relative_to(raw)]
    inside = [folder for base in around for folder in folders(base)]
    general = [folder for folder in inside if folder.name.lower() in _IMAGE_FOLDERS]
    bases = list(dict.fromkeys([*around, *general]))
    candidates = [file.parent, *inside, *(folder for base in general for folder in folders(base))]
    its_own = [folder for folder in dict.fromkeys(candidates) if folder != raw and _is_named_after(folder, file, split)]
    its_own += [inner for folder in its_own for inner in folders(folder) if inner.name.lower() in _IMAGE_FOLDERS]
    if any(map(_has_images, its_own)):
        return Places(bases, [[folder for folder in its_own if _has_images(folder)]], [])
    with_images = [folder for folder in walk(raw) if _has_images(folder)]
    return Places(bases, [[file.parent], bases], with_images if len(with_images) == 1 else [])


def find(raw: Path, name: str, where: Places) -> Path | None:
    """The image that an annotation file means by a name; `None` if it is not there.

    Args:
        raw: The data set.
        name: A path, absolute or relative, with `/` or backslashes, or a URL.
        where: Where the file's images may be.

    Raises:
        ValueError: There are several.
    """
    plain = _plain(name)
    parts = [part for part in plain.split("/") if part not in ("", ".", "..")]
    tails = ["/".join(parts[start:]) for start in range(len(parts))]
    for tail in dict.fromkeys((name, *tails)):  # as it is first: a backslash may be part of a name
        groups = [[base] for base in where.bases] if "/" in tail else where.bare
        if "/" not in tail and (len(parts) == 1 or _UPLOAD.search(plain)):
            groups = [*groups, where.only]
        for group in groups:
            paths = list(dict.fromkeys(path for folder in group if (path := within(raw, folder, tail))))
            if len(paths) > 1:
                several = ", ".join(path.relative_to(raw).as_posix() for path in paths)
                raise ValueError(f"the image {name!r} may be any of {several}; write its folder with it")
            if paths:
                return paths[0]
    return None


def _plain(name: str) -> str:
    """The path in a URL, in one of Label Studio's storages (`/data/local-files/?d=`) or of Windows."""
    plain = name.replace("\\", "/")
    if "?d=" in plain or "?filepath=" in plain:
        plain = re.split(r"\?(?:d|filepath)=", plain)[1].split("&")[0]
        plain = urllib.parse.unquote(plain)
    elif "://" in plain:
        scheme, plain = plain.split("://", 1)
        plain = urllib.parse.unquote(re.split("[?#]", plain)[0]) if scheme.lower() in ("http", "https") else plain
    elif plain.startswith(("/data/upload/", "/upload/")):
        plain = urllib.parse.unquote(plain)
    return plain


def _is_named_after(folder: Path, file: Path, split: Split | None) -> bool:
    """Whether a folder is that of `instances_<folder>.json`, or of the split that the file is about."""
    if split:
        return split_of(folder.name) == split
    return f"_{file.stem}".endswith(f"_{folder.name}")


def _has_images(folder: Path) -> bool:
    return any(is_image(path) and not path.name.startswith(".") for path in _entries(folder))


def _entries(folder: Path) -> Iterator[Path]:
    try:
        yield from folder.iterdir()
    except OSError:
        return
