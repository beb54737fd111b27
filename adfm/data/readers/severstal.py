"""The layout of Severstal's steel defect detection, as Kaggle publishes it: masks as run lengths in a table.

train.csv                   ImageId,ClassId,EncodedPixels: a row a class of an image, none for a normal image
train_images/0002cc93b.jpg
test_images/*.jpg           without labels, and not read
"""

import csv
import io
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adfm.data.readers.annotations import Shape, sample
from adfm.data.readers.files import DataSet, NoImage, images, root
from adfm.data.readers.shapes import patches
from adfm.data.readers.textfiles import text
from adfm.records import Sample

FORM = "train.csv with the columns ImageId, ClassId, EncodedPixels; train_images/*.jpg"
_TABLE = "train.csv"
_IMAGES = "train_images"
_COLUMNS = ["ImageId", "ClassId", "EncodedPixels"]
_CLASSES = ("1", "2", "3", "4")
_SIZE = (1600, 256)  # width and height of every image; the table does not state it


def matches(raw: Path) -> bool:
    """Whether there is a folder `train_images`, and a `train.csv` of run lengths beside it."""
    if not (folder := root(raw, _is_data_set)):
        return False
    try:
        with (folder / _TABLE).open("rb") as file:
            return file.readline(200).decode("utf-8-sig").strip().split(",") == _COLUMNS
    except (OSError, ValueError):
        return False


def read(raw: Path) -> Iterator[Sample]:
    """Yield the images in `train_images`, by name. The data set fixes no split: those in `test_images` have no labels.

    An image in no row is normal. A row is the mask of one class, `class 1` to `class 4`; each patch of it, connected by
    sides or corners, is a defect with a box and a mask. The table is in memory.
    """
    data = DataSet(raw, "severstal")
    folder = root(raw, _is_data_set)
    return data.checked([(folder / _IMAGES, _samples(data, folder))] if folder else [])


def _samples(data: DataSet, folder: Path) -> Iterator[Sample]:
    there = images(folder / _IMAGES)
    rows = _rows(data, folder / _TABLE, {image.name for image in there})
    for image in there:
        shapes: list[Shape] = []
        for kind, (line, encoded) in rows[image.name].items():
            with data.at(f"{data.relative(folder / _TABLE)}: line {line}"):
                shapes += patches(f"class {kind}", _decoded(encoded), _SIZE)
        # Without shapes nothing was drawn, on no size.
        yield replace(sample(data, image, shapes, size=_SIZE if shapes else None), category="steel")


def _rows(data: DataSet, table: Path, names: set[str]) -> dict[str, dict[str, tuple[int, str]]]:
    rows: dict[str, dict[str, tuple[int, str]]] = defaultdict(dict)  # line and run lengths, by image and class
    where = data.relative(table)
    with data.at(where):
        try:
            reader = csv.reader(io.StringIO(text(table), newline=""), strict=True)
            if (header := next(reader)) != _COLUMNS:
                raise ValueError(f"line 1: the columns are {','.join(header)[:60]!r}, not {','.join(_COLUMNS)!r}")
            for cells in filter(None, reader):
                with data.at(f"{where}: line {reader.line_num}"):
                    if len(cells) != len(_COLUMNS):
                        raise ValueError(f"has {len(cells)} cells, and the first line has {len(_COLUMNS)}")
                    name, kind, encoded = cells
                    if name not in names:
                        raise NoImage(f"image {name[:60]!r} is missing in {_IMAGES}")
                    if kind not in _CLASSES:
                        raise ValueError(f"ClassId is {kind[:40]!r}, not one of {', '.join(_CLASSES)}")
                    if kind in rows[name]:
                        line, _ = rows[name][kind]
                        raise ValueError(f"{name!r} has the class {kind} in line {line} already; keep one of them")
                    rows[name][kind] = reader.line_num, encoded
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: is not CSV ({error})") from error
    return rows


def _decoded(encoded: str) -> NDArray[np.bool_]:
    # Pairs of start, from 1, and length, which count pixels column by column.
    words = encoded.split()
    if not words or len(words) % 2 or not all(word.isascii() and word.isdecimal() for word in words):
        raise ValueError(f"EncodedPixels is not pairs of start and length: {encoded[:40]!r}")
    width, height = _SIZE
    pixels = np.zeros(width * height, np.bool_)
    end = 0
    for start, length in zip(map(int, words[::2]), map(int, words[1::2]), strict=True):
        if start <= end or length < 1 or start - 1 + length > pixels.size:
            pair, all_pixels = f"the pair `{start} {length}` of EncodedPixels", f"the {pixels.size} of {width}x{height}"
            raise ValueError(f"{pair} is empty, begins within the pair before it or leaves the pixels, {all_pixels}")
        end = start - 1 + length
        pixels[start - 1 : end] = True
    return pixels.reshape(width, height).T


def _is_data_set(folder: Path) -> bool:
    return (folder / _TABLE).is_file() and (folder / _IMAGES).is_dir()
