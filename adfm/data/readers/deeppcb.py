"""DeepPCB: pairs of a template and a tested image of one part of a board, and a text file with boxes in pixels.

PCBData/group00041/00041/00041000_temp.jpg    and    00041000_test.jpg
PCBData/group00041/00041_not/00041000.txt     x1 y1 x2 y2 class, a line a defect
PCBData/trainval.txt and test.txt             group00041/00041/00041000.jpg group00041/00041_not/00041000.txt
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from adfm.data.problems import MissingImage
from adfm.data.readers.annotations import Shape, box, holds, lines, listing, sample, shapes_of_lines, walk
from adfm.data.readers.files import folders, images, refuse, relative
from adfm.records import Sample, Split

_CLASSES = {"1": "open", "2": "short", "3": "mousebite", "4": "spur", "5": "copper", "6": "pin-hole"}
_NOTES = "_not"
_LISTS: dict[str, Split] = {"trainval.txt": "train", "test.txt": "test"}


def matches(raw: Path) -> bool:
    """Whether there is a folder of images, with one of its text files beside it, near the top."""
    return holds(raw, lambda folder: bool(_parts(folder)))


def read(raw: Path) -> Iterator[Sample]:
    """Yields the images, folder by folder: templates are normal, tested images have the defects of their text file.

    Both images of a part are one `group`. `split` is train for those in trainval.txt, and test for those in test.txt.

    Args:
        raw: The raw data set; its name is the name of the data set and of the category.

    Raises:
        AdfmError: Everything that is wrong in the text files, images without one and the reverse, and images of other
            names: in one error, after the last sample.
    """
    problems: list[str] = []
    splits: dict[Path, Split] = {}
    empty = True
    for folder in walk(raw):
        _add_lists(raw, folder, splits, problems)
        for part in _parts(folder):
            for one in _samples(raw, part, splits, problems):
                empty = False
                yield one
    if empty and not problems:
        problems.append("no image in any place of the layout")
    refuse(raw, "deeppcb", problems)


def _parts(folder: Path) -> list[Path]:
    """The folders of images in a folder, which have one of text files beside them."""
    inside = {path.name: path for path in folders(folder)}
    return [
        inside[name.removesuffix(_NOTES)]
        for name, path in inside.items()
        if name.endswith(_NOTES) and name.removesuffix(_NOTES) in inside and listing(path, ".txt")
    ]


def _add_lists(raw: Path, folder: Path, splits: dict[Path, Split], problems: list[str]) -> None:
    """Takes the splits of the parts, which are the names of their images up to `_temp` or `_test`."""
    for file in (folder / name for name in _LISTS if (folder / name).is_file()):
        where = relative(raw, file)
        try:
            content = lines(file)
        except ValueError as error:
            problems.append(f"{where}: {error}")
            continue
        for number, line in enumerate(content, start=1):
            words = line.replace("\\", "/").split()
            if len(words) != 2 or not words[1].endswith(".txt") or ".." in words[0].split("/"):
                continue  # not a list of DeepPCB
            part = folder / Path(words[0].lstrip("/")).with_suffix("")
            split = _LISTS[file.name]
            if not any((part.parent / f"{part.name}_test{suffix}").is_file() for suffix in (".jpg", ".png")):
                problems.append(MissingImage(f"{where}: line {number}: there is no image {words[0]!r}"))
            elif splits.setdefault(part, split) != split:
                problems.append(f"{where}: line {number}: {words[0]!r} is in the other list too; keep it in one")


def _samples(raw: Path, folder: Path, splits: dict[Path, Split], problems: list[str]) -> Iterator[Sample]:
    notes = folder.with_name(folder.name + _NOTES)
    files = {file.stem: file for file in listing(notes, ".txt")}
    for image in images(folder):
        part, _, kind = image.stem.rpartition("_")
        where = relative(raw, image)
        if kind not in ("temp", "test") or not part:
            problems.append(f"{where}: is neither a template, …_temp, nor a tested image, …_test; remove it")
            continue
        shapes: list[Shape] = []
        if kind == "test":
            file = files.pop(part, None)
            if file:
                shapes = shapes_of_lines(raw, file, _shape, problems, blanks=",")
            else:
                problems.append(f"{where}: has no text file {notes.name}/{part}.txt")
        yield sample(raw, image, shapes, splits.get(folder / part), group=part)
    for stem, file in files.items():
        problems.append(MissingImage(f"{relative(raw, file)}: there is no image {stem}_test.* for it"))


def _shape(words: list[str]) -> Shape:
    if len(words) != 5 or not all(word.isascii() and word.isdecimal() and len(word) < 10 for word in words):
        raise ValueError(f"is not x1, y1, x2, y2 in pixels and a class: {' '.join(words)[:60]!r}")
    if words[4] not in _CLASSES:
        raise ValueError(f"the class {words[4]} has no name; there are {', '.join(_CLASSES)}")
    return Shape(_CLASSES[words[4]], box(*map(float, words[:4])))
