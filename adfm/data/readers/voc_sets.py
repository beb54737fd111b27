"""Pascal VOC's ImageSets: lists of the images of train, validation and test."""

import re
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

from adfm.data.readers.annotations import nfc
from adfm.data.readers.files import IMAGES, DataSet, NoImage, listing, split_of, walk
from adfm.data.readers.textfiles import lines
from adfm.records import Split

# The first of these places that lists an image decides.
_FOLDERS = ("ImageSets/Main", "ImageSets/Segmentation", "ImageSets/Layout", "ImageSets/Action", "ImageSets", ".")
_HELD_OUT: tuple[Split, ...] = ("test", "validation", "train")  # the most held-out first
_COLUMNS = re.compile(r"(\s+-?\d+)+$")  # of lists of a class or of parts: whether, or which, object
_MANY = 10


class _List(NamedTuple):
    file: Path
    split: Split | None  # `None`: train and validation together
    names: frozenset[str]  # of images


class Lists:
    """The lists of a data set, read when an image needs them; names may leave out the folder, one of `own`."""

    def __init__(self, data: DataSet, own: Container[str]) -> None:
        self._data, self._own = data, own
        self._lists: dict[Path, list[list[_List]]] = {}
        self._seen: dict[Path, set[str]] = {}

    def split(self, image: Path) -> tuple[Split | None, list[str]]:
        """Return the split of an image, and notes; by the names of its folders where there are no lists."""
        for base in self._data.above(image):
            if places := self._of(base):
                return self._listed(image, base, places)
        return self._data.split(image), []

    def add_missing(self) -> None:
        """Add the names that no image has to the problems, after all images."""
        for base, places in self._lists.items():
            for one in (one for place in places for one in place):
                if missing := sorted(one.names - self._seen[base]):
                    names = ", ".join(missing[:_MANY]) + f" and {len(missing) - _MANY} more" * (len(missing) > _MANY)
                    self._data.add(one.file, NoImage(f"images {names} are missing"))

    def _listed(self, image: Path, base: Path, places: list[list[_List]]) -> tuple[Split | None, list[str]]:
        whole = nfc(image.relative_to(base).as_posix()[: -len(image.suffix)])
        first, slash, rest = whole.partition("/")
        names = {whole, rest} if slash and first.lower() in self._own else {whole}
        lists = [[one for one in place if names & one.names] for place in places]
        if any(lists):
            self._seen[base] |= names
        splits = next(({one.split for one in place} for place in lists if place), set())
        if not splits:
            return None, []
        if splits == {None}:
            return "train", ["an image that ImageSets lists in trainval alone is in train"]
        held_out, *others = (split for split in _HELD_OUT if split in splits)
        note = f"an image that ImageSets lists in {held_out} and in {', '.join(reversed(others))} is in {held_out}"
        return held_out, [note] if others else []

    def _of(self, base: Path) -> list[list[_List]]:
        if base not in self._lists:
            places = [self._place(base, folder) for folder in _FOLDERS]
            places = places if any(places) else self._further(base)
            self._lists[base], self._seen[base] = places if any(places) else [], set()
        return self._lists[base]

    def _place(self, base: Path, folder: str) -> list[_List]:
        files = listing(base / folder, ".txt")
        plain = [file for file in files if _is_plain(file.stem)]
        of_classes = [file for file in files if folder != "." and _is_plain(_last(file.stem))]
        lists = [self._read(file, folder, file in plain) for file in plain or of_classes]
        # A list beside ImageSets is one of images and XML files, as PaddleDetection has them.
        return [one for one in lists if one and (folder != "." or any("/" in name for name in one.names))]

    def _further(self, base: Path) -> list[list[_List]]:
        # Folders of ImageSets that VOC does not have, such as ImageSets/fold1.
        folders = walk(base / "ImageSets")
        inside = [each for each in folders if any(_is_plain(file.stem) for file in listing(each, ".txt"))]
        if len(inside) > 1:
            names = ", ".join(folder.name for folder in inside[:_MANY])
            what = f"one of {len(inside)} folders of lists ({names}), which may divide the images differently"
            self._data.add(inside[0], f"{what}; keep one of them, or move its lists to ImageSets/Main")
        return [self._place(base, folder.relative_to(base).as_posix()) for folder in inside[:1]]

    def _read(self, file: Path, folder: str, plain: bool) -> _List | None:
        columns = not plain or folder.endswith(("Layout", "Action"))
        with self._data.at(file):
            filled = [line.strip() for line in lines(file) if line.strip()]
            names = {_name(_COLUMNS.sub("", line) if columns else line) for line in filled}
            return _List(file, split_of(_last(file.stem)), frozenset(names))
        return None


def _is_plain(stem: str) -> bool:
    return stem.lower() == "trainval" or (split_of(stem) is not None and stem.isalpha())


def _last(stem: str) -> str:
    return stem.rsplit("_", 1)[-1]


def _name(line: str) -> str:
    """Return the name in a line, without quotes, a leading `./`, the suffix of images, and the XML file after it."""
    name = nfc(line.strip().strip('"').replace("\\", "/"))
    image, blank, annotation = name.rpartition(" ")
    if blank and annotation.endswith(".xml"):
        name = image.strip()
    stem, dot, suffix = name.rpartition(".")
    return (stem if dot and f".{suffix.lower()}" in IMAGES else name).removeprefix("./")
