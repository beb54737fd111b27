"""DeepPCB: pairs of a template and a tested image of one part of a board, and a text file with boxes in pixels.

PCBData/group00041/00041/00041000_temp.jpg    and    00041000_test.jpg
PCBData/group00041/00041_not/00041000.txt     x1 y1 x2 y2 class, a line a defect
PCBData/trainval.txt and test.txt             group00041/00041/00041000.jpg group00041/00041_not/00041000.txt
"""

from collections.abc import Iterator
from pathlib import Path

from adfm.data.readers.annotations import Shape, box, sample, shapes_of_lines
from adfm.data.readers.files import DataSet, NoImage, folders, holds, images, listing, walk
from adfm.data.readers.textfiles import lines
from adfm.records import Sample, Split

FORM = "<group>/<part>/*_temp.jpg, <group>/<part>/*_test.jpg, <group>/<part>_not/*.txt"
_CLASSES = {"1": "open", "2": "short", "3": "mousebite", "4": "spur", "5": "copper", "6": "pin-hole"}
_NOTES = "_not"  # ends the name of the folder of text files
_LISTS: dict[str, Split] = {"trainval.txt": "train", "test.txt": "test"}


def matches(raw: Path) -> bool:
    """Whether there is a folder of images, with one of its text files beside it, near the top."""
    return holds(raw, lambda folder: bool(_parts(folder)))


def read(raw: Path) -> Iterator[Sample]:
    """Yield the images, folder by folder: templates are normal, tested images have the defects of their text file.

    Both images of a part are one `group`. `split` is train for those in trainval.txt, and test for those in test.txt.
    """
    data = DataSet(raw, "deeppcb")
    splits: dict[Path, Split] = {}
    for folder in walk(raw):
        _add_lists(data, folder, splits)
        for part in _parts(folder):
            yield from _samples(data, part, splits)
    data.finish()


def _parts(folder: Path) -> list[Path]:
    # A folder of images has one of text files beside it.
    return [path for path in folders(folder) if listing(path.with_name(path.name + _NOTES), ".txt")]


def _add_lists(data: DataSet, folder: Path, splits: dict[Path, Split]) -> None:
    # A part is the name of its images up to `_temp` or `_test`.
    for name, split in _LISTS.items():
        where = data.relative(folder / name)
        with data.at(where):
            for number, line in enumerate(lines(folder / name) if (folder / name).is_file() else (), start=1):
                words = line.replace("\\", "/").split()
                if len(words) != 2 or not words[1].endswith(".txt") or ".." in words[0].split("/"):
                    continue  # other data sets have lists of these names too
                part = folder / Path(words[0].lstrip("/")).with_suffix("")  # the file has `_test` before the suffix
                with data.at(f"{where}: line {number}"):
                    if not any((part.parent / f"{part.name}_test{suffix}").is_file() for suffix in (".jpg", ".png")):
                        raise NoImage(f"image {words[0]!r} is missing")
                    if splits.setdefault(part, split) != split:
                        raise ValueError(f"{words[0]!r} is in the other list too; keep it in one")


def _samples(data: DataSet, folder: Path, splits: dict[Path, Split]) -> Iterator[Sample]:
    notes = folder.with_name(folder.name + _NOTES)
    files = {file.stem: file for file in listing(notes, ".txt")}
    for image in images(folder):
        part, _, kind = image.stem.rpartition("_")
        with data.at(image):
            if kind not in ("temp", "test") or not part:
                raise ValueError("is neither a template, …_temp, nor a tested image, …_test; remove it")
            if kind == "test" and part not in files:
                raise ValueError(f"has no text file {notes.name}/{part}.txt")
            shapes = shapes_of_lines(data, files.pop(part), _shape, blanks=",") if kind == "test" else ()
            yield sample(data, image, list(shapes), splits.get(folder / part), group=part)
    for stem, file in files.items():
        data.add(file, NoImage(f"its image {stem}_test.* is missing"))


def _shape(words: list[str]) -> Shape:
    if len(words) != 5 or not all(word.isascii() and word.isdecimal() and len(word) < 10 for word in words):
        raise ValueError(f"is not x1, y1, x2, y2 in pixels and a class: {' '.join(words)[:60]!r}")
    if words[4] not in _CLASSES:
        raise ValueError(f"the class {words[4]} has no name; there are {', '.join(_CLASSES)}")
    return Shape(_CLASSES[words[4]], box(*map(float, words[:4])))
