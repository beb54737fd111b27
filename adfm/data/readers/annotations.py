"""What the readers of drawn annotations share: shapes and what is wrong with them, text and JSON files, names.

A function that meets bad data raises `ValueError` with what is wrong; the reader adds where, and continues.
"""

from __future__ import annotations

import codecs
import json
import math
import mmap
import os
import re
import unicodedata
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from adfm.data.problems import MissingImage, Unlisted
from adfm.data.readers import files
from adfm.data.readers.files import Paths, folders, holds_true, images, relative, root
from adfm.records import Box, Polygon, Rle, Sample, Split

_T = TypeVar("_T")

_UTF_16 = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
_KINDS: dict[type, str] = {dict: "an object", list: "a list", str: "a text"}
SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
POINT = "a point has no extent: the image is anomalous, but has no boxes"  # a note


class NoImage(ValueError):
    """The image of an annotation is not in the data set; `problem` makes a `MissingImage` of it."""


def problem(where: str, error: ValueError) -> str:
    """The line that a reader lists for an error: `where: what is wrong`; a `MissingImage` for a missing image."""
    line = f"{where}: {error}"
    return MissingImage(line) if isinstance(error, NoImage) else line


@dataclass(frozen=True)
class Shape:
    """One defect that a person drew.

    Args:
        name: Its class.
        box: Round it.
        polygons: Its outlines, if it was drawn with any.
        rle: Its mask, if it was drawn with a brush.
        cut: Whether the box is cut off at the edge of the image, however far it reaches out; see `Sample`.
    """

    name: str
    box: Box
    polygons: tuple[Polygon, ...] = ()
    rle: Rle | None = None
    cut: bool = False


def sample(
    raw: Path, image: Path, shapes: Sequence[Shape], split: Split | None = None, notes: Iterable[str] = (), **more: Any
) -> Sample:
    """An image with shapes is anomalous, one without is normal; its category is the name of the data set.

    The defect is the class of the shapes; of several classes, their names by the alphabet, joined by `+`. A shape of
    the same class and box as an earlier one counts once, with a note.

    Args:
        raw: The data set.
        image: The image, in `raw`.
        shapes: What is drawn on it.
        split: The split that the data set fixes.
        notes: As in `Sample`.
        more: Other fields of `Sample`.
    """
    unique = list({(shape.name, *(round(side, 6) for side in shape.box)): shape for shape in reversed(shapes)}.values())
    if len(unique) < len(shapes):
        notes = (*notes, "the same box of the same class is drawn more than once; it counts once")
    shapes = unique[::-1]
    return _of_classes(
        raw,
        image,
        (shape.name for shape in shapes),
        split,
        notes,
        boxes=tuple(shape.box for shape in shapes),
        polygons=tuple(polygon for shape in shapes for polygon in shape.polygons),
        rles=tuple(shape.rle for shape in shapes if shape.rle),
        cut=tuple(shape.cut for shape in shapes),
        **more,
    )


def labelled(
    raw: Path, image: Path, names: Iterable[str], split: Split | None = None, notes: Iterable[str] = (), **more: Any
) -> Sample:
    """An anomalous image of which nothing says where its defects are.

    Args:
        raw: The data set.
        image: The image, in `raw`.
        names: The classes of the defects.
        split: The split that the data set fixes.
        notes: As in `Sample`.
        more: Other fields of `Sample`.
    """
    return _of_classes(raw, image, names, split, notes, located=False, **more)


def _of_classes(
    raw: Path, image: Path, names: Iterable[str], split: Split | None, notes: Iterable[str], **more: Any
) -> Sample:
    dataset, defect = files.dataset_name(raw), "+".join(sorted(set(names))) or None
    unique = tuple(dict.fromkeys(notes))
    return files.sample(raw, dataset, dataset, image, defect, split=split, notes=unique, **more)


def number(value: object) -> float:
    """A finite number of JSON.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, str):
        raise ValueError(f"{value[:40]!r} is text, and a number is needed; write it without quotation marks")
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e15:  # nan is not below
        raise ValueError(f"{str(value)[:40]!r} is not a finite number")
    return float(value)


def point(value: object) -> tuple[float, float]:
    """A point `[x, y]` of JSON.

    Raises:
        ValueError: It is not one.
    """
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{str(value)[:40]!r} is not a point [x, y]")
    return number(value[0]), number(value[1])


def box(x1: float, y1: float, x2: float, y2: float, side: float = math.inf) -> Box:
    """A box that has an area and touches the image.

    Args:
        x1: The left side; the others accordingly.
        y1: The upper side.
        x2: The right side, one past the last pixel.
        y2: The lower side.
        side: Width and height of the image, if known: 1 for a box in fractions of it.

    Raises:
        ValueError: It is inverted, empty, not finite, or lies outside the image.
    """
    text = f"the box {bracketed((x1, y1, x2, y2))}"
    if not all(math.isfinite(value) for value in (x1, y1, x2, y2)):
        raise ValueError(f"{text} is not finite")
    if x2 <= x1 or y2 <= y1:
        raise ValueError(f"{text} is inverted or has no area")
    if x2 <= 0 or y2 <= 0 or x1 >= side or y1 >= side:
        raise ValueError(f"{text} lies outside the image")
    return Box(x1, y1, x2, y2)


def bracketed(numbers: Iterable[float]) -> str:
    """Numbers in a list, for messages."""
    return f"[{', '.join(f'{value:g}' for value in numbers)}]"


def enclosing(points: Iterable[tuple[float, float]], side: float = math.inf) -> Box:
    """The box round some points; see `box`."""
    xs, ys = zip(*points, strict=True)
    return box(min(xs), min(ys), max(xs), max(ys), side)


def polygon(points: Sequence[tuple[float, float]]) -> Polygon:
    """A closed outline.

    Raises:
        ValueError: It has fewer than three corners.
    """
    if len(points) < 3:
        raise ValueError(f"a polygon needs 3 corners, and has {len(points)}")
    return tuple(points)


def member(value: object, key: str, kind: type[_T]) -> _T:
    """What a JSON object has under a key.

    Raises:
        ValueError: It is not an object, has no such key, or something of another kind there.
    """
    if not isinstance(value, dict):
        raise ValueError(f"is not a JSON object, so that it has no {key!r}")
    if key not in value:
        raise ValueError(f"has no {key!r}")
    if not isinstance(value[key], kind):
        raise ValueError(f"{key!r} is not {_KINDS[kind]}: {str(value[key])[:40]!r}")
    return value[key]  # type: ignore[no-any-return]


def nfc(name: str) -> str:
    """A name in Unicode's composed form: macOS writes `é` as two characters, other systems as one."""
    return unicodedata.normalize("NFC", name)


def text(path: Path) -> str:
    """A text file in UTF-8, with or without byte order mark, or in UTF-16 with one.

    Raises:
        ValueError: It cannot be read, is empty, or in another encoding.
    """
    content = contents(path)
    if not content.strip():
        raise ValueError("is empty")
    return _decoded(content)


def lines(path: Path) -> list[str]:
    """The lines of a text file as in `text`; an empty file has none.

    Raises:
        ValueError: It cannot be read, or is in another encoding.
    """
    return _decoded(contents(path)).splitlines()


def shapes_of_lines(
    raw: Path, file: Path, shape: Callable[[list[str]], Shape], problems: list[str], blanks: str = ""
) -> list[Shape]:
    """The shapes of a text file that has one in each line.

    Args:
        raw: The data set.
        file: The file.
        shape: Makes a shape of the words of a line; raises `ValueError` if they are not one.
        problems: Gets what is wrong, with the file and the line.
        blanks: Characters that separate words as blanks do.
    """
    where, shapes = relative(raw, file), []
    to_blank = str.maketrans(blanks, " " * len(blanks))
    try:
        content = lines(file)
    except ValueError as error:
        problems.append(f"{where}: {error}")
        return []
    for place, line in enumerate(content, start=1):
        try:
            if words := line.translate(to_blank).split():
                shapes.append(shape(words))
        except ValueError as error:
            problems.append(f"{where}: line {place}: {error}")
    return shapes


def contents(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error


def encoding_of(content: bytes) -> str:
    """The encoding of a text file, by its byte order mark or the lack of one."""
    return "utf-16" if content.startswith(tuple(_UTF_16)) else "utf-8-sig"


def _decoded(content: bytes) -> str:
    encoding = encoding_of(content)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"line {line}: is not {encoding.removesuffix('-sig').upper()} text; save the file with the encoding UTF-8"
            " (`iconv -t UTF-8 -f` with the encoding of the system that it comes from, such as GB18030, CP1252, CP932)"
        ) from error


def parsed(path: Path) -> Any:
    """A JSON file.

    Raises:
        ValueError: It cannot be read, or is not JSON; says the line and the column.
    """
    content = text(path)
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        comma = content[: error.pos].rstrip().endswith(",") and content[error.pos :].lstrip()[:1] in "]}"
        hint = "; take away the comma before it" if comma else ""
        raise ValueError(f"line {error.lineno}, column {error.colno}: is not JSON ({error.msg}){hint}") from error
    except (RecursionError, ValueError) as error:  # brackets nested too deep, an integer of thousands of digits
        raise ValueError(f"is not JSON that can be read ({error})") from error


def mentions(path: Path, *words: bytes) -> bool:
    """Whether all words are in a file, however large it is."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            encoding = _UTF_16.get(content[:2])
            sought = [word.decode().encode(encoding) for word in words] if encoding else words
            return all(content.find(word) >= 0 for word in sought)
    except (OSError, ValueError):  # an empty file cannot be mapped
        return False


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


def walk(folder: Path, depth: int = 99, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """A folder and those in it, by name; none of them twice in one another by way of a link.

    Args:
        folder: Where to begin.
        depth: How many levels to go down.
        above: The folders that it is in, resolved.
    """
    real = folder.resolve()
    if real in above:
        return
    yield folder
    for inside in folders(folder) if depth else []:
        yield from walk(inside, depth - 1, above | {real})


def holds(raw: Path, sign: Callable[[Path], bool]) -> bool:
    """Whether a data set, or a folder not more than two down in it, shows a sign of a layout."""
    return root(raw, lambda folder: any(map(sign, walk(folder, 2)))) is not None


def listing(folder: Path, suffix: str) -> Sequence[Path]:
    """The files of a folder with a suffix, in upper or lower case, by name; hidden ones do not count."""
    if not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
        return []
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.lower().endswith(suffix) and holds_true(entry.is_file)]
    return Paths(folder, sorted(name for name in names if not name.startswith(".")))


def by_stem(paths: Iterable[Path]) -> dict[str, tuple[str, ...]]:
    """Paths by their stem in Unicode's composed form; as text, since a `Path` takes several times the memory."""
    groups: dict[str, tuple[str, ...]] = {}
    for path in paths:
        stem = nfc(path.stem)
        groups[stem] = (*groups.get(stem, ()), str(path))
    return groups


def partners(raw: Path, folder: Path, own: Container[str], other: Container[str]) -> list[Path]:
    """Folders where the annotations of a folder of images may be, or the other way round.

    For `a/images/b` and annotations in `labels`: itself, `a/b`, `a/labels/b`; for `a` also `a/labels`.

    Args:
        raw: The data set.
        folder: A folder in it.
        own: Names, in lower case, of folders of its kind.
        other: Names, in lower case, of folders of the other kind.
    """
    parts = folder.relative_to(raw).parts
    at = max((place for place, part in enumerate(parts) if part.lower() in own), default=len(parts))
    base, rest = raw.joinpath(*parts[:at]), parts[at + 1 :]
    beside = [base, *(inside for inside in folders(base) if inside.name.lower() in other)]
    return list(dict.fromkeys([folder, *(inside.joinpath(*rest) for inside in beside)]))


def paired(
    raw: Path,
    folder: Path,
    suffix: str,
    own: Container[str],
    other: Container[str],
    counts: Callable[[Path], bool],
    problems: list[str],
) -> Iterator[tuple[Path, Path | None]]:
    """Yields the images of a folder, each with the annotation file of its name, which may be in a partner folder.

    Args:
        raw: The data set.
        folder: A folder in it, which may hold images, annotation files, or both.
        suffix: Of annotation files, in lower case.
        own: As in `partners`, for images.
        other: As in `partners`, for annotation files.
        counts: Whether a file that belongs to no image is an annotation file.
        problems: Gets two images or two annotation files of one name, and annotation files without an image.
    """
    pictures = by_stem(images(folder))
    places = partners(raw, folder, own, other) if pictures else []
    files = by_stem(file for place in places for file in listing(place, suffix))
    for stem, same in pictures.items():
        for path, *several in filter(None, (same, files.get(stem))):
            if several:
                others = ", ".join(relative(raw, Path(other)) for other in several)
                problems.append(f"{relative(raw, Path(path))}: has the same name as {others}")
        for image in same:
            yield Path(image), Path(files[stem][0]) if stem in files else None

    stems: set[str] | None = None
    for file in listing(folder, suffix):
        if stems is None:
            theirs = [
                place for place in partners(raw, folder, other, own) if folder in partners(raw, place, own, other)
            ]
            stems = {nfc(image.stem) for place in theirs for image in images(place)}
        if nfc(file.stem) not in stems and counts(file):
            where = relative(raw, file)
            problems.append(MissingImage(f"{where}: there is no image {file.stem}.* for it"))


def within(raw: Path, folder: Path, name: str, there: Callable[[Path], bool] = Path.is_file) -> Path | None:
    """What a relative path, seen from a folder, leads to; `None` if that is not there or not in the data set."""
    path = Path(os.path.normpath(folder.relative_to(raw) / name))
    if path.is_absolute() or path.parts[:1] == ("..",):
        return None
    try:
        return raw / path if there(raw / path) else None
    except (OSError, ValueError):  # a name that no file can have
        return None


def unlisted(raw: Path, known: Container[str]) -> Iterator[str]:
    """One problem for every folder with images whose paths are not in `known`, or with images of the same name."""
    for folder in walk(raw):
        there = images(folder)
        yield from same_names(raw, there)
        names = [image.name for image in there if str(image) not in known]
        if names:
            where = relative(raw, folder)
            yield Unlisted(f"{where}: images that are not in the annotations: {', '.join(names)}")


def same_names(raw: Path, paths: Iterable[Path]) -> Iterator[str]:
    """One problem for every two images of a folder whose names differ in Unicode normalisation only."""
    names: dict[str, str] = {}
    for path in paths:
        other = names.setdefault(nfc(path.name), path.name)
        if other != path.name:
            where = relative(raw, path)
            yield f"{where}: {path.name!a} and {other!a} are one name to people; rename or remove one"
