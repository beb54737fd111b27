"""What readers share: what counts as an image, going through folders in a fixed order, one error for everything."""

from __future__ import annotations

import base64
import codecs
import json
import os
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, overload

from pydantic import TypeAdapter, ValidationError

from adfm.data import contents
from adfm.data.problems import BadData
from adfm.errors import AdfmError
from adfm.records import Sample

IMAGES = frozenset(
    (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".heic", ".heif", ".avif", ".pgm", ".ppm")
)

_ENDINGS = tuple(IMAGES)
ADD_MASK = "; add it, or, where no image has one, convert the labels alone with --layout folders"
_DEPTH = 100

T = TypeVar("T")


class Paths(Sequence[Path]):
    """The paths of some files of a folder, in memory as names alone: as `Path` each would take a kilobyte."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self._folder = folder
        self._names = list(names)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> Paths: ...
    def __getitem__(self, index: int | slice) -> Path | Paths:
        """The path at a place, or those of a range."""
        names = self._names[index]
        return self._folder / names if isinstance(names, str) else Paths(self._folder, names)


def folders(folder: Path) -> list[Path]:
    """The folders in a folder, by name.

    Hidden ones (`.x`, `__MACOSX`) do not count.

    Args:
        folder: May be missing: it has none then.

    Raises:
        AdfmError: `folder` cannot be read.
    """
    if not _is_readable(folder):
        return []
    with os.scandir(folder) as entries:
        return sorted(folder / entry.name for entry in entries if not is_hidden(entry.name) and entry.is_dir())


def refuse_special(raw: Path) -> None:
    """Refuse a raw data set with a pipe, socket, device or link to nowhere or round in it; call it before reading.

    A reader would wait for a pipe that is called `a.png`, and never leave a link that leads round.

    Raises:
        AdfmError: There is one; all of them are listed, up to 50.
    """
    problems = list(islice(special_files(raw), 51))
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems[:50])
        more = "\n  and more" if len(problems) > 50 else ""
        raise AdfmError(f"{raw}: holds what is not a file or a folder; remove it:\n{listed}{more}")


def special_files(raw: Path) -> Iterator[str]:
    """A problem for everything in a folder that is neither a file, nor a folder, nor a link to one outside of itself.

    Goes through each folder once, whatever links lead there, and opens nothing.

    Raises:
        AdfmError: A folder cannot be read.
    """
    done: set[Path] = set()

    def walk(folder: Path, name: str, above: frozenset[Path]) -> Iterator[str]:
        inside = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_file(follow_symlinks=False):  # what nearly all are; it asks the disk for nothing more
                        continue
                    path = folder / entry.name
                    target = Path(os.path.realpath(path)) if entry.is_symlink() else path
                    if target.is_dir():
                        inside.append((entry.name, target))
                    elif not target.exists():
                        yield f"{name + entry.name!r} is a link that leads nowhere"
                    elif not target.is_file():
                        yield f"{name + entry.name!r} is a pipe, a socket or a device, not an ordinary file"
        except OSError as error:
            raise AdfmError(f"{folder}: cannot be read ({error.strerror}); change its permissions.") from error
        for entry_name, path in sorted(inside):
            if path in above:
                yield f"{name + entry_name!r} is a link to a folder that holds it"
            elif len(above) == _DEPTH:
                yield f"{name + entry_name!r} lies more than {_DEPTH} folders deep"
            elif path not in done:
                yield from walk(path, f"{name}{entry_name}/", above | {path})
        done.add(folder)

    top = raw.resolve()
    yield from walk(top, "", frozenset([top]))


def images(folder: Path) -> Sequence[Path]:
    """The images in a folder, by name; hidden ones do not count.

    Args:
        folder: May be missing: it has none then.

    Raises:
        AdfmError: `folder` cannot be read.
    """
    if not _is_readable(folder):
        return []
    # scandir knows what is a folder; asking the disk for each file of a large one takes seconds.
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if _has_image_name(entry.name) and not holds_true(entry.is_dir)]
    return Paths(folder, sorted(name for name in names if not is_hidden(name)))


def images_within(folder: Path) -> Iterator[Path]:
    """The images in a folder and in those below it, in no order, but not behind a link to a folder.

    Hidden ones do not count, nor do those in hidden folders.

    Raises:
        AdfmError: `folder` cannot be read.
    """
    if _is_readable(folder):
        for path in folder.glob("**/*"):
            if is_image(path) and not any(is_hidden(part) for part in path.relative_to(folder).parts):
                yield path


def is_image(path: Path) -> bool:
    """Whether the name is an image's, in upper or lower case, and no folder has it."""
    return _has_image_name(path.name) and not path.is_dir()


def _has_image_name(name: str) -> bool:
    return name.lower().endswith(_ENDINGS)


def root(raw: Path, holds: Callable[[Path], bool]) -> Path | None:
    """The folder of the data set: `raw`, or what is reached by going, three times at most, into the only folder.

    Args:
        raw: Where to begin.
        holds: Whether a folder is a data set's.
    """
    folder = raw
    for _ in range(3):
        if holds(folder):
            return folder
        inside = folders(folder)
        if len(inside) != 1:
            return None
        folder = inside[0]
    return folder if holds(folder) else None


def categories(raw: Path, is_category: Callable[[Path], bool]) -> list[Path]:
    """The folders that should be categories: those beside any that is one, or the data set's only one.

    Args:
        raw: A folder of categories, one category itself, or a folder that `root` leads from to either.
        is_category: Whether a folder is a category in the layout that is looked for.
    """
    if is_category(raw):
        return [raw]
    top = root(raw, lambda folder: any(is_category(inside) for inside in folders(folder)))
    return folders(top) if top else []


def relative(raw: Path, path: Path) -> str:
    """A path in a data set, relative to it, with `/`."""
    return path.relative_to(raw).as_posix()


def dataset_name(raw: Path) -> str:
    """The name of the folder of a data set; that of the folder that it leads to, if it is a link."""
    return raw.resolve().name if raw.name in ("", "..") or raw.is_symlink() else raw.name


def sample(
    raw: Path,
    dataset: str,
    category: str,
    image: Path,
    defect: str | None,
    masks: Iterable[Path] = (),
    split: str | None = None,
    **more: Any,
) -> Sample:
    """An image of a data set, anomalous if it has a defect.

    Args:
        raw: The data set.
        dataset: Its name.
        category: The product.
        image: The image, in `raw`.
        defect: What is wrong with it; `None` if it is normal.
        masks: Files that say where the defect is; those of a normal image are dropped.
        split: The split that the data set fixes.
        more: Other fields of `Sample`.
    """
    return Sample(
        image=image,
        source=relative(raw, image),
        dataset=dataset,
        category=category,
        label="anomalous" if defect else "normal",
        defect=defect,
        masks=tuple(masks) if defect else (),
        split=split,
        **more,
    )


def listed_path(bases: Sequence[Path], name: str) -> Path | None:
    """The path that a data set's own file gives, under the first of some folders where it exists, else the first.

    Args:
        bases: Folders that it may be relative to.
        name: The path, with `/`.

    Returns:
        `None` where the path would lead out of the data set, or nowhere.
    """
    if name.startswith("/") or ".." in name.split("/") or not name.strip("./") or "\0" in name:
        return None
    paths = (base / name for base in bases)
    return next((path for path in paths if _exists(path)), bases[0] / name)


def parse(raw: Path, file: Path, form: TypeAdapter[T], problems: list[str]) -> T | None:
    """Reads a JSON file of a data set.

    Args:
        raw: The data set.
        file: The file, in UTF-8, with or without a byte order mark.
        form: What should be in it.
        problems: What is wrong with it is added here, one line each; a line and column where it is not JSON.

    Returns:
        What is in it, or `None` where something is wrong.
    """
    try:
        return form.validate_json(file.read_bytes().removeprefix(codecs.BOM_UTF8))
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_input=False):
            place = "".join(f"[{part!r}]" for part in detail["loc"])
            problems.append(f"{relative(raw, file)}: {place}{' ' if place else ''}{detail['msg']}")
    except OSError as error:
        problems.append(f"{relative(raw, file)}: cannot be read ({error})")
    return None


def checked(
    raw: Path,
    layout: str,
    parts: Iterable[tuple[Path | None, Iterable[Sample]]],
    problems: list[str],
    remedy: str = "",
) -> Iterator[Sample]:
    """Yields all samples, and then raises one error about everything that was wrong.

    What is wrong: an image or mask that does not exist, an anomalous image without a mask, an image that comes twice,
    no image at all, and the reader's own problems. Memory is that of the largest part.

    Args:
        raw: The data set.
        layout: Name of its layout.
        parts: The samples, folder by folder. Every image in a folder has to be the image or the mask of a sample,
            unless the folder is `None`.
        problems: What the reader finds; it may add to it until the last sample.
        remedy: What to do about a mask that does not exist, for the message.

    Raises:
        AdfmError: There are problems.
    """
    empty = True
    for folder, samples in parts:
        used: set[str] = set()
        for sample in samples:
            if str(sample.image) in used:
                problems.append(f"{sample.source}: is listed twice")
            if not _exists(sample.image):
                problems.append(f"{sample.source}: does not exist")
            if sample.label == "anomalous" and not sample.masks:
                problems.append(f"{sample.source}: has no mask")
            problems += [
                f"{sample.source}: has no mask {relative(raw, mask)}{remedy}"
                for mask in sample.masks
                if not _exists(mask)
            ]
            used.update(map(str, (sample.image, *sample.masks)))
            yield sample
        empty = empty and not used
        if folder:
            problems += strays(raw, folder, used)
    if empty and not problems:
        problems.append("no image in any place of the layout")
    refuse(raw, layout, problems)


def strays(raw: Path, folder: Path, used: Container[str]) -> list[str]:
    """One problem for every folder below `folder` that has images other than the `used` ones.

    Masks of normal images, in `ground_truth/good` or `ground_truth/ok`, are no matter.
    """
    names: dict[Path, list[str]] = defaultdict(list)
    for stray in sorted(path for path in images_within(folder) if str(path) not in used):
        if stray.relative_to(folder).parts[:2] not in (("ground_truth", "good"), ("ground_truth", "ok")):
            names[stray.parent].append(stray.name)
    return [
        f"{relative(raw, parent)}: no place in the layout, or no image for the mask: {', '.join(stray)}"
        for parent, stray in names.items()
    ]


def refuse(raw: Path, layout: str, problems: Iterable[str]) -> None:
    """Raises one error about everything that is wrong with a data set, if anything is.

    Args:
        raw: The data set.
        layout: Name of its layout.
        problems: One line each, `file: what is wrong`.

    Raises:
        BadData: There are problems.
    """
    listed = list(problems)
    if listed:
        raise BadData(raw, layout, listed)


def content(image: Path) -> bytes:
    """The bytes of an image file, or of the image that a JSON file of LabelMe holds in its `imageData`.

    Raises:
        OSError: The file cannot be read.
        ValueError: The JSON file holds no image.
    """
    read = contents.read(image)
    if image.suffix.lower() != ".json":
        return read
    encoded = json.loads(read).get("imageData")
    return base64.b64decode(encoded or "")


def _is_readable(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    if not os.access(folder, os.R_OK | os.X_OK):
        raise AdfmError(f"{folder}: cannot be read; change its permissions.")
    return True


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # its name is too long, for one
        return False


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is one of a system or tool, not of the data set."""
    return name.startswith((".", "__MACOSX"))


def holds_true(kind: Callable[[], bool]) -> bool:
    """What a directory entry's `is_dir` or `is_file` says; false for a link to itself, for which they raise."""
    try:
        return kind()
    except OSError:
        return False
