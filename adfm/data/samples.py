"""Read the samples of a raw data set, with the category of `convert.category` and the part of `split.group`."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from adfm.data.readers import LAYOUTS, files
from adfm.data.readers.verdicts import is_verdict
from adfm.errors import AdfmError
from adfm.params import Convert
from adfm.records import Sample
from adfm.text import printable

# Folders named after how a data set is laid out, not after a product.
_STRUCTURE = re.compile(
    r"(train|training|val|valid|validation|test|testing|dev)[-_ ]?(set|data|images|imgs)?[-_ ]?\d*"
    r"|images?|imgs?|pictures|photos|jpegimages|jpegs?|pngs?|raw|data|datasets?|default"
    r"|labels?|annotations?|anns?|masks?|ground[-_ ]?truth|obj_\w+_data",
    re.IGNORECASE,
)
# Roboflow exports `IMG_1.jpg` as `IMG_1_jpg.rf.<hash>.jpg`, and an augmented copy of it under another hash.
_ROBOFLOW = re.compile(r"(.+)\.rf\.[0-9A-Za-z_-]+\.\w+")


def read(raw: Path, layout: str, settings: Convert) -> Iterator[Sample]:
    """Yield the samples of a data set.

    With `convert.category: folder` the category of an image is the first folder of its path that is not named after a
    split, a kind of content (`images`), a label or the image's defect. A folder that holds all others counts last.

    Raises:
        BadData: As the reader of the layout.
    """
    samples = LAYOUTS[layout].read(raw)
    if settings.category == "layout":
        return samples
    top = files.root(raw, lambda folder: len(files.folders(folder)) != 1) or raw
    depth = len(top.relative_to(raw).parts)
    # The category stays where the layout or a table gives one, and not the name of the data set.
    return (
        replace(sample, category=_folder(sample, depth)) if sample.category == sample.dataset else sample
        for sample in samples
    )


def _folder(sample: Sample, depth: int) -> str:
    folders, defects = sample.source.split("/")[:-1], (sample.defect or "").lower().split("+")
    for name in folders[depth:] + folders[:depth][::-1]:
        if not _STRUCTURE.fullmatch(name) and not is_verdict(name) and name.lower() not in defects:
            return name
    return sample.category


def photograph(source: str) -> str | None:
    """Return an identity that Roboflow's augmented copies of one photograph share; `None` for other images."""
    if ".rf." not in source:
        return None
    *folders, name = source.split("/")
    match = _ROBOFLOW.fullmatch(name)
    # Without folders of splits: copies lie in Roboflow's `train` and `valid`.
    return "/".join([*(one for one in folders if not _STRUCTURE.fullmatch(one)), match[1]]) if match else None


class Grouping(NamedTuple):
    """The setting `split.group`: which part an image shows, by a column or by a pattern in its path."""

    column: str | None = None
    pattern: re.Pattern[str] | None = None

    def part(self, sample: Sample) -> str | None:
        """Return the column's value, or the pattern's first group, or else its match; `None` without any."""
        if self.column is not None:
            return sample.columns.get(self.column) or None
        match = self.pattern.search(sample.source) if self.pattern else None
        return (match[1] if match.re.groups else match[0]) or None if match else None


class Survey:
    """Statistics of a first pass over the samples, with `split.group` as `setting`."""

    def __init__(self, setting: str | None) -> None:
        self.setting = setting
        self.images = 0
        self.categories: set[str] = set()
        self._columns: set[str] = set()
        self._sources: list[str] = []  # a few, for messages
        self._parts: dict[Grouping, Counter[str]] = {}
        self._unreadable = ""  # why the setting is not a regular expression
        if setting is not None:  # a column or an expression, which depends on the columns of all samples
            self._parts[Grouping(column=setting)] = Counter()
            try:
                self._parts[Grouping(pattern=re.compile(setting))] = Counter()
            except (re.error, OverflowError, RecursionError) as error:
                self._unreadable = str(error)

    def add(self, sample: Sample) -> None:
        """Count a sample."""
        self.images += 1
        self.categories.add(sample.category)
        self._columns.update(sample.columns)
        if len(self._sources) < 3:
            self._sources.append(sample.source)
        for grouping, parts in self._parts.items():
            if (part := grouping.part(sample)) is not None:
                parts[part] += 1

    def grouping(self) -> Grouping:
        """Return how to determine the part of each sample.

        Raises:
            AdfmError: `split.group` is neither a column nor a regular expression that any path matches, or all images
                are of one part.
        """
        if self.setting is None:
            return Grouping()
        columns = f"the columns are {', '.join(map(repr, sorted(self._columns)))}" if self._columns else "no column"
        if self.setting in self._columns:
            grouping, empty = Grouping(column=self.setting), f"the column {self.setting!r} is empty in every row"
        elif self._unreadable:
            raise AdfmError(
                f"split.group: {self.setting!r} is neither a column ({columns}) nor a regular expression"
                f" ({self._unreadable}); put a \\ before a character that means itself."
            )
        else:
            grouping = Grouping(pattern=re.compile(self.setting))
            empty = f"{self.setting!r} is neither a column ({columns}) nor in the path of any image"
        paths = ", ".join(map(printable, self._sources))
        parts = self._parts[grouping]
        if not parts:
            raise AdfmError(f"split.group: {empty}; paths are {paths}.")
        if len(parts) == 1 < parts.total() == self.images:
            raise AdfmError(
                f"split.group: {self.setting!r} makes all images one part, {next(iter(parts))!r}, so that they cannot"
                f" be divided ({columns}); paths are {paths}."
            )
        return grouping
