"""Shapes, their samples, and file names, for the readers of annotation tools; errors as in `textfiles`."""

import math
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adfm.data.problems import Unlisted
from adfm.data.readers.files import DataSet, images, relative, walk
from adfm.data.readers.textfiles import lines
from adfm.records import Box, Polygon, Rle, Sample, Split


@dataclass(frozen=True)
class Shape:
    """One defect that a person drew."""

    name: str  # its class
    box: Box
    polygons: tuple[Polygon, ...] = ()
    rle: Rle | None = None  # of a brush or bitmap
    cut: bool = False  # whether the box is cut off at the edge of the image; see `Sample`


def sample(
    data: DataSet,
    image: Path,
    shapes: Sequence[Shape],
    split: Split | None = None,
    notes: Iterable[str] = (),
    points: Iterable[str] = (),
    label: str | None = None,
    **more: Any,
) -> Sample:
    """Return the sample of an image: anomalous if it has shapes, points or a label, else normal.

    `points` are the classes of defects that are marked with a point: then nothing says where the defects are. `label`,
    the defect that a label of the whole image names, counts where nothing is drawn. `more` are further fields.
    """
    names = {*points, *(shape.name for shape in shapes)}
    if points:
        notes = (*notes, "a point has no extent: the image is anomalous, but has no boxes")
    if points or (label and not shapes):
        more["located"] = False
        names = names or {str(label)}
    else:
        # In reverse, so that of equal shapes the first one stays.
        keys = {(shape.name, *(round(side, 6) for side in shape.box)): shape for shape in reversed(shapes)}
        if len(keys) < len(shapes):
            notes = (*notes, "the same box of the same class is drawn more than once; it counts once")
        shapes = [*keys.values()][::-1]
        more |= {
            "boxes": tuple(shape.box for shape in shapes),
            "polygons": tuple(polygon for shape in shapes for polygon in shape.polygons),
            "rles": tuple(shape.rle for shape in shapes if shape.rle),
            "cut": tuple(shape.cut for shape in shapes),
        }
    # Sorted, so that classes that occur together are one defect in whatever order they were drawn.
    defect = "+".join(sorted(names)) or None
    return data.sample(data.name, image, defect, split=split, notes=tuple(dict.fromkeys(notes)), **more)


def box(x1: float, y1: float, x2: float, y2: float, side: float = math.inf) -> Box:
    """Return a half-open box; refuse one without area or outside the image. `side` is 1 for fractions of the image."""
    text = f"the box {bracketed((x1, y1, x2, y2))}"
    if not all(math.isfinite(value) for value in (x1, y1, x2, y2)):
        raise ValueError(f"{text} is not finite")
    if x2 <= x1 or y2 <= y1:
        raise ValueError(f"{text} is inverted or has no area")
    if x2 <= 0 or y2 <= 0 or x1 >= side or y1 >= side:
        raise ValueError(f"{text} lies outside the image")
    return Box(x1, y1, x2, y2)


def bracketed(numbers: Iterable[float]) -> str:
    """Format numbers as a list, for messages."""
    return f"[{', '.join(f'{value:g}' for value in numbers)}]"


def enclosing(points: Iterable[tuple[float, float]], side: float = math.inf) -> Box:
    """Return the box round some points; see `box`."""
    xs, ys = zip(*points, strict=True)
    return box(min(xs), min(ys), max(xs), max(ys), side)


def outlined(name: str, points: Sequence[tuple[float, float]], cut: bool = False, side: float = math.inf) -> Shape:
    """Return a shape with an outline: the box round it, and the outline; see `box` and `polygon`."""
    outline = polygon(points)
    return Shape(name, enclosing(outline, side), (outline,), cut=cut)


def polygon(points: Sequence[tuple[float, float]]) -> Polygon:
    """Return a closed outline; refuse one of fewer than three corners."""
    if len(points) < 3:
        raise ValueError(f"a polygon needs 3 corners, and has {len(points)}")
    return tuple(points)


def nfc(name: str) -> str:
    """Return a name in Unicode's composed form."""
    # macOS writes `é` as two characters, other systems as one.
    return unicodedata.normalize("NFC", name)


def shapes_of_lines(
    data: DataSet, file: Path, shape: Callable[[list[str]], Shape], blanks: str = ""
) -> Iterator[Shape]:
    """Yield the shapes of a text file that has one a line; `blanks` separate words as a blank does."""
    where, to_blank = data.relative(file), str.maketrans(blanks, " " * len(blanks))
    with data.at(where):
        for place, line in enumerate(lines(file), start=1):
            with data.at(f"{where}: line {place}"):
                if words := line.translate(to_blank).split():
                    yield shape(words)


def by_stem(paths: Iterable[Path]) -> dict[str, tuple[str, ...]]:
    """Group paths by their stem in Unicode's composed form."""
    groups: dict[str, tuple[str, ...]] = defaultdict(tuple)
    for path in paths:
        groups[nfc(path.stem)] += (str(path),)  # as text: a `Path` takes several times the memory
    return groups


def unlisted(data: DataSet) -> Iterator[str]:
    """Yield a problem for every folder with images that no annotation file lists, or with images of one name."""
    for folder in walk(data.raw):
        there = images(folder)
        yield from same_names(data.raw, there)
        if names := [image.name for image in there if str(image) not in data.listed]:
            yield Unlisted(f"{data.relative(folder)}: images that are not in the annotations: {', '.join(names)}")


def same_names(raw: Path, paths: Iterable[Path]) -> Iterator[str]:
    """Yield a problem for every two images of a folder whose names differ in Unicode normalisation only."""
    names: dict[str, str] = {}
    for path in paths:
        if (other := names.setdefault(nfc(path.name), path.name)) != path.name:
            yield f"{relative(raw, path)}: {path.name!a} and {other!a} are one name to people; rename or remove one"
