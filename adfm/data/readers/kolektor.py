"""The layout of KolektorSDD.

kos01/Part0.jpg
kos01/Part0_label.bmp    (of every image)
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from adfm.data.masks import load_mask
from adfm.data.readers import files
from adfm.records import Sample

FORM = "<part>/*.jpg, <part>/*_label.bmp"


def matches(raw: Path) -> bool:
    """Whether there is a folder of images and `_label.bmp` files."""
    return files.has_category(raw, _is_item)


def read(raw: Path) -> Iterator[Sample]:
    """Yield the samples by folder and name; see `mvtec.read` for the folders. The data set fixes no split.

    An image is normal where its label file, which is opened for that, shows nothing.
    """
    return files.DataSet(raw, "kolektor").by_category(_is_item, _item)


def _item(data: files.DataSet, folder: Path) -> Iterator[Sample]:
    images = files.images(folder)
    labels = {label.stem: label for label in images if label.stem.endswith("_label")}
    for image in (image for image in images if not image.stem.endswith("_label")):
        label = labels.get(f"{image.stem}_label", folder / f"{image.stem}_label.bmp")
        normal = False
        try:
            normal = label.exists() and not load_mask(label).any()  # `checked` reports one that does not exist
        except Exception as error:  # a damaged file makes Pillow raise nearly anything
            data.add(label, f"cannot be read ({error})")
        # A folder has the surfaces of one commutator.
        one = data.sample("kolektor", image, None if normal else "defect", [label], group=data.relative(folder))
        yield replace(one, masks=(label,))  # of a normal image too: `checked` has to know it


def _is_item(folder: Path) -> bool:
    return any(path.suffix.lower() == ".bmp" for path in folder.glob("*_label.*"))
