"""Pascal VOC's masks: SegmentationObject and SegmentationClass, as VOC itself, CVAT and LabelMe write them."""

import io
from collections.abc import Container
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adfm.data import contents
from adfm.data.readers.annotations import Shape, nfc
from adfm.data.readers.files import DataSet, NoImage, folder_names, images, images_within, walk
from adfm.data.readers.shapes import bitmap, check_mask_size, patches
from adfm.data.readers.textfiles import text
from adfm.data.readers.verdicts import class_name

_LABELMAP = "labelmap.txt"
# LabelMe's script once kept other files in the folders without PNG.
_CLASS = ("SegmentationClass", "SegmentationClassPNG")
_OBJECT = ("SegmentationObject", "SegmentationObjectPNG")
_VOID = (224, 224, 192)  # the border round objects, of index 255
# Folders of pictures that are not of the data set: masks, and what LabelMe draws of them.
_PICTURES = (_CLASS[0], _OBJECT[0], "AnnotationsVisualization")
_BACKGROUND = frozenset(("background", "_background_"))
_COVERED = 0.5  # the part of a mask's box within an object's box, from which on it is the object's mask

_Color = tuple[int, int, int]


class Masks(NamedTuple):
    """The masks of an image, of which one at least is there."""

    classes: Path | None
    objects: Path | None
    base: Path


def pictures(raw: Path, folder: Path) -> bool:
    """Whether a folder, or one that it is in, holds masks or what is drawn of them."""
    return any(name.startswith(_PICTURES) for name in folder_names(raw, folder / "image"))


def beside(folder: Path) -> bool:
    """Whether a folder has masks as VOC has them."""
    return any((folder / name).is_dir() for name in (*_CLASS, *_OBJECT))


class Classes:
    """The masks of a data set, and the names of the classes in them; `own` are names of folders of images."""

    def __init__(self, data: DataSet, own: Container[str]) -> None:
        self._data, self._own = data, own
        self._files = lru_cache(maxsize=4)(lambda folder: {nfc(mask.stem): mask for mask in images(folder)})
        self._used: set[str] = set()
        self._bases: dict[Path, Path | None] = {}
        self._names: dict[Path, dict[_Color, str] | None] = {}

    def find(self, image: Path) -> Masks | None:
        """Return the masks of an image, which have its name and, in their folder, its path."""
        if image.parent not in self._bases:
            self._bases[image.parent] = next(filter(beside, self._data.above(image)), None)
        base = self._bases[image.parent]
        if base is None:
            return None
        inner = image.relative_to(base).parts
        inner = inner[1:] if inner[0].lower() in self._own and len(inner) > 1 else inner
        stem = nfc(image.stem)
        classes, objects = (
            next((file for name in names if (file := self._files((base / name).joinpath(*inner[:-1])).get(stem))), None)
            for names in (_CLASS, _OBJECT)
        )
        self._used.update(self._data.relative(path) for path in (classes, objects) if path)
        return Masks(classes, objects, base) if classes or objects else None

    def add_orphans(self) -> None:
        """Add the masks that no image has to the problems, after all images."""
        for folder in walk(self._data.raw):
            for mask in sorted(images_within(folder)) if folder.name in (*_CLASS, *_OBJECT) else ():
                where = self._data.relative(mask)
                if where not in self._used:
                    self._data.add(where, NoImage(f"its image {mask.stem}.* is missing"))

    def shapes(self, masks: Masks) -> list[Shape]:
        """Return a shape for every object, or for every patch of a class where only classes are drawn."""
        by_color = self._of(masks.base) is not None and (masks.base / _LABELMAP).is_file()
        classes, objects = (_colors(path, by_color) if path else None for path in (masks.classes, masks.objects))
        if classes is not None and objects is not None and classes.shape != objects.shape:
            raise ValueError("is of another size than the mask in SegmentationClass")
        either = objects if objects is not None else classes
        assert either is not None
        size = (either.shape[1], either.shape[0])
        shapes: list[Shape] = []
        for color in _drawn(either):
            pixels = either == color
            if objects is None:
                shapes += patches(self._name(masks, color), pixels, size)
            else:
                name = "defect" if classes is None else self._name(masks, _most(classes[pixels]))
                shapes.append(bitmap(name, pixels, 0, 0, size))
        return shapes

    def _name(self, masks: Masks, color: int) -> str:
        names, rgb = self._of(masks.base), (color & 255, color >> 8 & 255, color >> 16)
        if names is not None and rgb not in names:
            raise ValueError(f"has the colour {rgb}, which no class in the list of classes has")
        if names is None and rgb not in _palette():
            remedy = f"add labelmap.txt with a line `name:{rgb[0]},{rgb[1]},{rgb[2]}::` a class"
            raise ValueError(f"has the colour {rgb}, and no list says which class that is; {remedy}")
        return f"class {_palette()[rgb]}" if names is None else names[rgb]

    def _of(self, base: Path) -> dict[_Color, str] | None:
        if base not in self._names:
            self._names[base] = None
            for file, read in ((base / _LABELMAP, _labelmap), (base / "class_names.txt", _class_names)):
                with self._data.at(file):
                    if self._names[base] is None and file.is_file():
                        self._names[base] = read(text(file))
        return self._names[base]


def added(boxed: list[Shape], masked: list[Shape]) -> tuple[list[Shape], list[str]]:
    """Return the shapes of an image, and notes: the objects of its XML file, and the masks that are of none of them."""
    if not boxed:
        return masked, []
    boxes = [one.box for one in boxed]
    alone = [one for one in masked if all(box.intersection(one.box) < _COVERED * one.box.area for box in boxes)]
    notes = ["a mask without an object of its own is a defect too"] if alone else []
    return [*boxed, *alone], notes


def _colors(path: Path, by_color: bool) -> NDArray[np.uint32]:
    """Return the colours of a mask, [height, width], as 0xBBGGRR."""
    try:
        with Image.open(io.BytesIO(contents.read(path))) as file:
            check_mask_size(*file.size)
            gray = file.mode in ("1", "L")
            # Without a list of colours the numbers in a palette are the classes; they become VOC's colours.
            if gray or (file.mode == "P" and not by_color):
                values = np.asarray(file).astype(np.uint8)
                if gray and np.count_nonzero(np.bincount(values.ravel())[1:]) == 1:
                    values = np.minimum(values, 1)  # the only value is a defect, even 255
                return np.array([_code(color) for color in _palette()], np.uint32)[values]
            four_bytes = np.asarray(file.convert("RGB").convert("RGBX"))
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise ValueError(f"the mask cannot be read ({error})") from error
    return np.asarray(np.ascontiguousarray(four_bytes).view("<u4")[..., 0] & 0xFFFFFF, np.uint32)


def _drawn(colors: NDArray[np.uint32]) -> list[int]:
    row = np.ascontiguousarray(colors).ravel()
    # Neighbours are mostly of one colour; only the first of each run is sorted.
    runs = np.unique(row[np.flatnonzero(np.diff(row, prepend=row[:1] ^ 1))])
    return [int(color) for color in runs if color not in (0, _code(_VOID))]  # neither background nor border


def _most(colors: NDArray[np.uint32]) -> int:
    # The class of an object is the one that most of its pixels have.
    values, counts = np.unique(colors, return_counts=True)
    counts[(values == 0) | (values == _code(_VOID))] = 0
    if not counts.any():
        raise ValueError("has an object that the mask in SegmentationClass gives no class; paint it there as well")
    return int(values[counts.argmax()])


def _code(rgb: _Color) -> int:
    return rgb[0] | rgb[1] << 8 | rgb[2] << 16


def _labelmap(content: str) -> dict[_Color, str]:
    # CVAT's list has lines `name:r,g,b:parts:actions`.
    names = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, rest = line.partition(":")
        try:
            red, green, blue = map(int, rest.partition(":")[0].split(","))
        except ValueError as error:
            raise ValueError(f"line {number}: is not a class and its colour, `name:r,g,b::`") from error
        if (red, green, blue) != (0, 0, 0) and name.strip().lower() not in _BACKGROUND:
            names[red, green, blue] = class_name(name)
    return names


def _class_names(content: str) -> dict[_Color, str]:
    # LabelMe's list has a name a line, the background first.
    names = [line.strip() for line in content.splitlines() if line.strip() and line.strip() != "__ignore__"]
    first = 0 if names and names[0].lower() in _BACKGROUND else 1
    colors = list(_palette())
    return {colors[index]: class_name(name) for index, name in enumerate(names, start=first) if 0 < index < 255}


@cache
def _palette() -> dict[_Color, int]:
    # The bits of a number, by threes, are the highest of red, green and blue.
    channels = [
        [sum((number >> 3 * place + channel & 1) << 7 - place for place in range(8)) for channel in range(3)]
        for number in range(256)
    ]
    return {(red, green, blue): number for number, (red, green, blue) in enumerate(channels)}
