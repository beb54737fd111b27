"""What all readers share: the data set, what counts as an image, and folders in a fixed order."""

from __future__ import annotations

import base64
import codecs
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from pydantic import TypeAdapter, ValidationError

from adfm.data import contents
from adfm.data.problems import BadData, MissingImage
from adfm.errors import AdfmError
from adfm.records import Sample, Split

IMAGES = frozenset(
    (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".heic", ".heif", ".avif", ".pgm", ".ppm")
)

_ENDINGS = tuple(IMAGES)
ADD_MASK = "; add it, or, where no image has one, convert the labels alone with --layout folders"
SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
NO_IMAGE = "no image in any place of the layout"  # what several layouts say of an empty data set
_DEPTH = 100

T = TypeVar("T")


class NoImage(ValueError):
    """The image of an annotation is not in the data set; `DataSet` makes a `MissingImage` of it."""


class _Collector(NamedTuple):
    data: DataSet
    where: Path | str

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if isinstance(error, ValueError):
            self.data.add(self.where, error)
        return isinstance(error, ValueError)


class DataSet:
    """A raw data set while a reader reads it: its problems, and the images that its annotation files list."""

    def __init__(self, raw: Path, layout: str) -> None:
        self.raw, self.layout, self.name = raw, layout, dataset_name(raw)
        self.problems: list[str] = []
        # By the path of the image, as text: a `Path` takes several times the memory.
        self.listed: dict[str, str] = {}

    def relative(self, path: Path) -> str:
        """A path in the data set, relative to it, with `/`."""
        return relative(self.raw, path)

    def split(self, path: Path, *names: str) -> Split | None:
        """The split in the first of some names that has one, else in the nearest folder of a file that has."""
        return split_of(*names, *folder_names(self.raw, path))

    def above(self, path: Path) -> list[Path]:
        """The folders that a file or folder of the data set is in, the nearest first."""
        return [each for each in path.parents if each.is_relative_to(self.raw)]

    def add(self, where: Path | str, problem: ValueError | str) -> None:
        """Collect a problem, as `where: what is wrong`; a `MissingImage` for `NoImage`."""
        line = f"{self.relative(where) if isinstance(where, Path) else where}: {problem}"
        self.problems.append(MissingImage(line) if isinstance(problem, NoImage) else line)

    def at(self, where: Path | str) -> _Collector:
        """In the block, collect a `ValueError` as a problem, and leave the block."""
        return _Collector(self, where)

    def claim(self, image: Path, where: str, remedy: str = "keep one") -> None:
        """Note where an image is listed.

        Raises:
            ValueError: It is listed before.
        """
        if before := self.listed.get(str(image)):
            raise ValueError(f"{self.relative(image)} is listed before, in {before}; {remedy}")
        self.listed[str(image)] = where

    def sample(
        self,
        category: str,
        image: Path,
        defect: str | None,
        masks: Iterable[Path] = (),
        split: str | None = None,
        dataset: str | None = None,
        **more: Any,
    ) -> Sample:
        """An image of the data set, anomalous if it has a defect; masks of a normal image are dropped.

        The name of the data set is that of the folder, unless it is given; `more` are other fields of `Sample`.
        """
        return Sample(
            image=image,
            source=self.relative(image),
            dataset=dataset or self.name,
            category=category,
            label="anomalous" if defect else "normal",
            defect=defect,
            masks=tuple(masks) if defect else (),
            split=split,
            **more,
        )

    def parse(self, file: Path, form: TypeAdapter[T]) -> T | None:
        """Read a JSON file, in UTF-8; `None`, and problems, where it is not as `form` says."""
        where = self.relative(file)
        try:
            return form.validate_json(file.read_bytes().removeprefix(codecs.BOM_UTF8))
        except ValidationError as error:
            for detail in error.errors(include_url=False, include_input=False):
                place = "".join(f"[{part!r}]" for part in detail["loc"])
                self.add(where, f"{place}{' ' if place else ''}{detail['msg']}")
        except OSError as error:
            self.add(where, f"cannot be read ({error})")
        return None

    def by_category(
        self,
        is_category: Callable[[Path], bool],
        samples: Callable[[DataSet, Path], Iterable[Sample]],
        remedy: str = "",
    ) -> Iterator[Sample]:
        """Yield the samples category by category, as `checked` does; see `categories`."""
        return self.checked(((folder, samples(self, folder)) for folder in categories(self.raw, is_category)), remedy)

    def checked(self, parts: Iterable[tuple[Path | None, Iterable[Sample]]], remedy: str = "") -> Iterator[Sample]:
        """Yield all samples, and then raise one error about everything that was wrong.

        What is wrong: an image or mask that does not exist, an anomalous image without a mask or a shape, an
        image that comes twice, no image at all, and the problems collected so far. Memory is that of the largest part.

        Args:
            parts: The samples, folder by folder. Every image in a folder has to be the image or the mask of a sample,
                unless the folder is `None`.
            remedy: What to do about a mask that does not exist, for the message.

        Raises:
            BadData: There are problems.
        """
        empty = True
        for folder, samples in parts:
            used: set[str] = set()
            for sample in samples:
                if str(sample.image) in used:
                    self.add(sample.source, "is listed twice")
                if not _exists(sample.image):
                    self.add(sample.source, "does not exist")
                if sample.label == "anomalous" and not (sample.masks or sample.boxes):
                    self.add(sample.source, "has no mask")
                missing = (mask for mask in sample.masks if not _exists(mask))
                self.problems += [f"{sample.source}: has no mask {self.relative(mask)}{remedy}" for mask in missing]
                used.update(map(str, (sample.image, *sample.masks)))
                yield sample
            empty = empty and not used
            if folder:
                self.problems += _strays(self.raw, folder, used)
        self.finish(not empty, NO_IMAGE)

    def finish(self, read: bool, nothing: str) -> None:
        """Check the problems, after everything has been read.

        Raises:
            BadData: There are problems, or nothing was read: then the problem is `nothing`.
        """
        if problems := self.problems or ([] if read else [nothing]):
            raise BadData(self.raw, self.layout, problems)


class Paths:
    """The paths of some files of a folder, in memory as names alone: as `Path` each would take a kilobyte."""

    def __init__(self, folder: Path, names: Iterable[str] = ()) -> None:
        self._folder, self._names = folder, list(names)

    def __len__(self) -> int:
        """Return their number."""
        return len(self._names)

    def __iter__(self) -> Iterator[Path]:
        """Yield the paths."""
        return (self._folder / name for name in self._names)


def folders(folder: Path) -> list[Path]:
    """The folders in a folder, by name, without hidden ones; a missing one has none, an unreadable one is refused."""
    if not _is_readable(folder):
        return []
    with os.scandir(folder) as entries:
        return sorted(folder / entry.name for entry in entries if not is_hidden(entry.name) and entry.is_dir())


def listing(folder: Path, *endings: str) -> Paths:
    """The files in a folder, as in `folders`, whose names have an ending (in lower case; theirs may be in upper)."""
    if not _is_readable(folder):
        return Paths(folder)
    # scandir knows what is a folder; asking the disk for each file of a large one takes seconds.
    with os.scandir(folder) as entries:
        files = (entry for entry in entries if entry.name.lower().endswith(endings) and not is_hidden(entry.name))
        return Paths(folder, sorted(entry.name for entry in files if not holds_true(entry.is_dir)))


def images(folder: Path) -> Paths:
    """The images in a folder, as in `listing`."""
    return listing(folder, *_ENDINGS)


def images_within(folder: Path) -> Iterator[Path]:
    """Yield the images in a folder, as in `folders`, and in those below it, in no order, but not behind a link."""
    if _is_readable(folder):
        for path in folder.glob("**/*"):
            is_image = path.name.lower().endswith(_ENDINGS) and not path.is_dir()
            if is_image and not any(map(is_hidden, path.relative_to(folder).parts)):
                yield path


def walk(folder: Path, depth: int = 99, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Yield a folder and those in it, `depth` levels down, by name; none of them twice in one another by a link.

    `above` are the folders that it is in, resolved.
    """
    real = folder.resolve()
    if real in above:
        return
    yield folder
    for inside in folders(folder) if depth else []:
        yield from walk(inside, depth - 1, above | {real})


def split_of(*names: str) -> Split | None:
    """The split in the first name that has just one: `instances_train2017`, `valid`, `Test` and the like."""
    for name in names:
        splits = {SPLIT_NAMES[word] for word in re.findall("[a-z]+", name.lower()) if word in SPLIT_NAMES}
        if len(splits) == 1:
            return splits.pop()
    return None


def folder_names(raw: Path, path: Path) -> list[str]:
    """The names of the folders between a file and the data set, the nearest first."""
    return list(path.relative_to(raw).parts[-2::-1])


def refuse_special(raw: Path) -> None:
    """Refuse a raw data set with a pipe, socket, device or link to nowhere or round in it; call it before reading.

    Raises:
        AdfmError: There is one; all of them are listed, up to 50.
    """
    # A reader would wait for a pipe that is called `a.png`, and never leave a link that leads round.
    problems = list(islice(special_files(raw), 51))
    if problems:
        listed = "\n  ".join(problems[:50] + ["and more"] * (len(problems) > 50))
        raise AdfmError(f"{raw}: holds what is not a file or a folder; remove it:\n  {listed}")


def special_files(raw: Path) -> Iterator[str]:
    """Yield a problem for everything in a folder that is neither a file, nor a folder, nor a link to one outside of it.

    Goes through each folder once, whatever links lead there, and opens nothing.

    Raises:
        AdfmError: A folder cannot be read.
    """
    done: set[Path] = set()

    def visit(folder: Path, name: str, above: frozenset[Path]) -> Iterator[str]:
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
                yield from visit(path, f"{name}{entry_name}/", above | {path})
        done.add(folder)

    top = raw.resolve()
    yield from visit(top, "", frozenset([top]))


def root(raw: Path, holds: Callable[[Path], bool]) -> Path | None:
    """The folder of the data set: `raw`, or the one reached by going, three times at most, into the only folder."""
    folder = raw
    for _ in range(3):
        if holds(folder):
            return folder
        inside = folders(folder)
        if len(inside) != 1:
            return None
        folder = inside[0]
    return folder if holds(folder) else None


def holds(raw: Path, sign: Callable[[Path], bool]) -> bool:
    """Whether a data set, or a folder not more than two down in it, shows a sign of a layout."""
    return root(raw, lambda folder: any(map(sign, walk(folder, 2)))) is not None


def categories(raw: Path, is_category: Callable[[Path], bool]) -> list[Path]:
    """The folders that should be categories: those beside any that is one, in the `root`, or the data set itself."""
    if is_category(raw):
        return [raw]
    top = root(raw, lambda folder: any(is_category(inside) for inside in folders(folder)))
    return folders(top) if top else []


def has_category(raw: Path, is_category: Callable[[Path], bool], part: str = "") -> bool:
    """Whether there is a category of a layout, and one that has a certain folder."""
    return any(is_category(folder) and (folder / part).is_dir() for folder in categories(raw, is_category))


def relative(raw: Path, path: Path) -> str:
    """A path in a data set, relative to it, with `/`."""
    return path.relative_to(raw).as_posix()


def dataset_name(raw: Path) -> str:
    """The name of the folder of a data set; that of the folder that it leads to, if it is a link."""
    return raw.resolve().name if raw.name in ("", "..") or raw.is_symlink() else raw.name


def listed_path(bases: Sequence[Path], name: str) -> Path | None:
    """The path that a data set's own file gives, under the first of some folders where it exists, else the first.

    `None` where the path, written with `/`, would lead out of the data set, or nowhere.
    """
    if name.startswith("/") or ".." in name.split("/") or not name.strip("./") or "\0" in name:
        return None
    paths = (base / name for base in bases)
    return next((path for path in paths if _exists(path)), bases[0] / name)


def _strays(raw: Path, folder: Path, used: Container[str]) -> list[str]:
    """One problem for every folder below `folder` that has images other than the `used` ones."""
    names: dict[Path, list[str]] = defaultdict(list)
    for stray in sorted(path for path in images_within(folder) if str(path) not in used):
        # Masks of normal images do no harm.
        if stray.relative_to(folder).parts[:2] not in (("ground_truth", "good"), ("ground_truth", "ok")):
            names[stray.parent].append(stray.name)
    return [
        f"{relative(raw, parent)}: no place in the layout, or no image for the mask: {', '.join(stray)}"
        for parent, stray in names.items()
    ]


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
    """Whether a folder exists; an `AdfmError` if it cannot be read."""
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
    return name.startswith((".", "__MACOSX"))  # the latter: of archives that macOS packs


def holds_true(kind: Callable[[], bool]) -> bool:
    """What a directory entry's `is_dir` or `is_file` says; false for a link to itself, for which they raise."""
    try:
        return kind()
    except OSError:
        return False
