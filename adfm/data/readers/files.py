"""What all readers share: the data set, what counts as an image, and folders in a fixed order."""

import base64
import codecs
import contextlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

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
_SPLITS: dict[Split, str] = {"train": "train training", "validation": "val valid validation", "test": "test testing"}
SPLIT_NAMES = {name: split for split, names in _SPLITS.items() for name in names.split()}
_DEPTH = 100  # `walk` goes no deeper

T = TypeVar("T")
_Sign = Callable[[Path], bool]  # of a folder: whether it has something
_exists = os.path.exists  # unlike that of `Path`, false for a name that no file can have


class NoImage(ValueError):
    """The image of an annotation is not in the data set; `DataSet` makes a `MissingImage` of it."""


class DataSet:
    """A raw data set while a reader reads it: its problems, and the images that its annotation files list."""

    def __init__(self, raw: Path, layout: str) -> None:
        self.raw, self.layout, self.name = raw, layout, dataset_name(raw)
        self.problems: list[str] = []
        self.empty = True  # until the first sample
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

    @contextlib.contextmanager
    def at(self, where: Path | str) -> Iterator[None]:
        """Collect a `ValueError` in the block as a problem."""
        try:
            yield
        except ValueError as error:
            self.add(where, error)

    def claim(self, image: Path, where: str, remedy: str = "keep one") -> None:
        """Record where an image is listed; raise `ValueError` if another place lists it too."""
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
        """An image of the data set, anomalous if it has a defect; masks of a normal image are dropped."""
        self.empty = False
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
        self, is_category: _Sign, samples: Callable[["DataSet", Path], Iterable[Sample]], remedy: str = ""
    ) -> Iterator[Sample]:
        """Yield the samples of each of the `categories`; see `checked`."""
        return self.checked(((folder, samples(self, folder)) for folder in categories(self.raw, is_category)), remedy)

    def checked(self, parts: Iterable[tuple[Path | None, Iterable[Sample]]], remedy: str = "") -> Iterator[Sample]:
        """Yield all samples, then raise one `BadData` with every problem.

        Args:
            parts: The samples by folder. Every image in a folder has to be the image or the mask of a sample, unless
                the folder is `None`.
            remedy: What to do about a mask that does not exist, for the message.
        """
        for folder, samples in parts:
            used: set[str] = set()  # of this folder alone, so that memory is that of the largest part
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
            if folder:
                self.problems += _strays(self.raw, folder, used)
        self.finish()

    def finish(self, nothing: str = "no image in any place of the layout", read: bool | None = None) -> None:
        """Raise `BadData` if there are problems, or, as the problem `nothing`, if nothing was read: no sample."""
        read = not self.empty if read is None else read
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
    """List the folders in a folder, by name, without hidden ones; a missing one has none, an unreadable is refused."""
    if not _is_readable(folder):
        return []
    with os.scandir(folder) as entries:
        return sorted(folder / entry.name for entry in entries if not is_hidden(entry.name) and entry.is_dir())


def listing(folder: Path, *endings: str) -> Paths:
    """List the files in a folder, as `folders` does, whose names in lower case have one of some endings."""
    if not _is_readable(folder):
        return Paths(folder)
    # scandir knows what is a folder; a stat of each file of a large one takes seconds.
    with os.scandir(folder) as entries:
        files = (entry for entry in entries if entry.name.lower().endswith(endings) and not is_hidden(entry.name))
        return Paths(folder, sorted(entry.name for entry in files if not holds_true(entry.is_dir)))


def images(folder: Path) -> Paths:
    """List the images in a folder; see `listing`."""
    return listing(folder, *_ENDINGS)


def images_within(folder: Path) -> Iterator[Path]:
    """Yield the images in a folder and below it, in no order; not those behind a link."""
    if _is_readable(folder):
        for path in folder.glob("**/*"):
            is_image = path.name.lower().endswith(_ENDINGS) and not path.is_dir()
            if is_image and not any(map(is_hidden, path.relative_to(folder).parts)):
                yield path


def walk(folder: Path, depth: int = 99, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Yield a folder and those in it, `depth` levels down, by name."""
    real = folder.resolve()
    if real in above:  # a link leads round
        return
    yield folder
    for inside in folders(folder) if depth else []:
        yield from walk(inside, depth - 1, above | {real})


def split_of(*names: str) -> Split | None:
    """Return the split in the first name that has just one: `instances_train2017`, `valid`, `Test` and the like."""
    for name in names:
        splits = {SPLIT_NAMES[word] for word in re.findall("[a-z]+", name.lower()) if word in SPLIT_NAMES}
        if len(splits) == 1:
            return splits.pop()
    return None


def folder_names(raw: Path, path: Path) -> list[str]:
    """List the names of the folders between a file and the data set, the nearest first."""
    return list(path.relative_to(raw).parts[-2::-1])


def refuse_special(raw: Path) -> None:
    """Raise `AdfmError` if a raw data set has a pipe, socket, device or link to nowhere or round in it."""
    # A reader would wait for a pipe that is called `a.png`, and never leave a link that leads round.
    if problems := list(islice(special_files(raw), 51)):
        listed = "\n  ".join(problems[:50] + ["and more"] * (len(problems) > 50))
        raise AdfmError(f"{raw}: holds what is not a file or a folder; remove it:\n  {listed}")


def special_files(raw: Path) -> Iterator[str]:
    """Yield a problem for everything in a folder that is neither a file, nor a folder, nor a link to one outside of it.

    It opens nothing; a folder that cannot be listed raises `AdfmError`.
    """
    done: set[Path] = set()  # several links may lead to one folder

    def visit(folder: Path, name: str, above: frozenset[Path]) -> Iterator[str]:
        inside = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_file(follow_symlinks=False):  # what nearly all are; it asks the disk for nothing more
                        continue
                    target = Path(os.path.realpath(entry.path) if entry.is_symlink() else entry.path)
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


def root(raw: Path, holds: _Sign) -> Path | None:
    """Return the folder that holds the data set: `raw`, or one reached by entering the only folder, at most 3 times."""
    folder = raw
    for _ in range(4):  # archives nest a data set in folders of its name
        if holds(folder):
            return folder
        inside = folders(folder)
        if len(inside) != 1:
            break
        folder = inside[0]
    return None


def holds(raw: Path, sign: _Sign) -> bool:
    """Whether a data set, or a folder at most two levels down, shows a sign of a layout."""
    return root(raw, lambda folder: any(map(sign, walk(folder, 2)))) is not None


def categories(raw: Path, is_category: _Sign) -> list[Path]:
    """List the folders that should be categories: all beside one that is, in the `root`, or the data set itself."""
    if is_category(raw):
        return [raw]
    # A folder beside a category should be one: else `checked` reports its images.
    top = root(raw, lambda folder: any(is_category(inside) for inside in folders(folder)))
    return folders(top) if top else []


def has_category(raw: Path, is_category: _Sign, part: str = "") -> bool:
    """Whether there is a category of a layout, and one that has a folder `part`."""
    return any(is_category(folder) and (folder / part).is_dir() for folder in categories(raw, is_category))


def relative(raw: Path, path: Path) -> str:
    """Return a path relative to its data set, with `/`."""
    return path.relative_to(raw).as_posix()


def dataset_name(raw: Path) -> str:
    """Return the name of the folder of a data set; of a link, that of the folder that it leads to."""
    return raw.resolve().name if raw.name in ("", "..") or raw.is_symlink() else raw.name


def listed_path(bases: Sequence[Path], name: str) -> Path | None:
    """Return the path that a data set's own file gives, under the first folder where it exists, else the first."""
    if name.startswith("/") or ".." in name.split("/") or not name.strip("./") or "\0" in name:
        return None  # it leads out of the data set, or nowhere
    paths = (base / name for base in bases)
    return next((path for path in paths if _exists(path)), bases[0] / name)


def partners(raw: Path, folder: Path, own: Container[str], other: Container[str]) -> list[Path]:
    """List the folders where the annotations of a folder of images may be, or the other way round.

    For `a/images/b` and annotations in `labels`: itself, `a/b`, `a/labels/b`; for `a` also `a/labels`. `own` and
    `other` are names, in lower case, of folders of its kind and of the other.
    """
    parts = folder.relative_to(raw).parts
    at = max((place for place, part in enumerate(parts) if part.lower() in own), default=len(parts))
    base, rest = raw.joinpath(*parts[:at]), parts[at + 1 :]
    beside = [base, *(inside for inside in folders(base) if inside.name.lower() in other)]
    return list(dict.fromkeys([folder, *(inside.joinpath(*rest) for inside in beside)]))


def within(raw: Path, folder: Path, name: str, there: _Sign = os.path.isfile) -> Path | None:
    """Resolve a path relative to a folder; `None` if it is not `there`, or leads out of the data set."""
    path = Path(os.path.normpath(folder.relative_to(raw) / name))
    if path.is_absolute() or path.parts[:1] == ("..",):
        return None
    # Functions of `os.path` are false for a name that no file can have, for which those of `Path` raise.
    return raw / path if there(raw / path) else None


def _strays(raw: Path, folder: Path, used: Container[str]) -> list[str]:
    """Return a problem for every folder below `folder` that has images other than the `used` ones."""
    names: dict[Path, list[str]] = defaultdict(list)
    for stray in sorted(path for path in images_within(folder) if str(path) not in used):
        # Masks of normal images do no harm.
        if stray.relative_to(folder).parts[:2] not in (("ground_truth", "good"), ("ground_truth", "ok")):
            names[stray.parent].append(stray.name)
    what = "no place in the layout, or no image for the mask"
    return [f"{relative(raw, parent)}: {what}: {', '.join(stray)}" for parent, stray in names.items()]


def content(image: Path) -> bytes:
    """Return the bytes of an image file, or of the image in the `imageData` of a JSON file of LabelMe."""
    read = contents.read(image)
    return base64.b64decode(json.loads(read).get("imageData") or "") if image.suffix.lower() == ".json" else read


def _is_readable(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    if not os.access(folder, os.R_OK | os.X_OK):
        raise AdfmError(f"{folder}: cannot be read; change its permissions.")
    return True


def is_hidden(name: str) -> bool:
    """Whether a name is that of a file or folder of a system or tool, not of the data set."""
    return name.startswith((".", "__MACOSX"))  # the latter: of archives that macOS packs


def holds_true(kind: Callable[[], bool]) -> bool:
    """Call a directory entry's `is_dir` or `is_file`."""
    try:
        return kind()
    except OSError:  # a link to itself
        return False
