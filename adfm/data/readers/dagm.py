"""The layout of DAGM 2007.

Class1/Train/0001.PNG
Class1/Train/Label/0001_label.PNG    (of images with a defect alone)
Class1/Test/0001.PNG
Class1/Test/Label/0001_label.PNG
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from adfm.data.readers import files
from adfm.records import Sample


def matches(raw: Path) -> bool:
    """Whether there is a class in this layout."""
    return any(_is_category(folder) for folder in files.categories(raw, _is_category))


def read(raw: Path) -> Iterator[Sample]:
    """Yields the samples, class by class, by name. `split` is the official one; `train` has defects too.

    An image without a label file is normal. Every class has one kind of defect, which has no name: `defect` is
    `defect`. Labels are coarse ellipses round the defects. Folders are entered, and files ignored, as for MVTec AD.

    Args:
        raw: The raw data set; its name is the name of the data set.

    Raises:
        AdfmError: No image, a label without an image, or images without a place in the layout: all in one error, after
            the last sample.
    """
    parts = ((folder, _category(raw, folder)) for folder in files.categories(raw, _is_category))
    return files.checked(raw, "dagm", parts, [])


def _category(raw: Path, folder: Path) -> Iterator[Sample]:
    dataset, category = files.dataset_name(raw), folder.resolve().name
    for split, part in (("train", "Train"), ("test", "Test")):
        labels = {label.stem: label for label in files.images(folder / part / "Label")}
        for image in files.images(folder / part):
            label = labels.get(f"{image.stem}_label")
            defect, masks = ("defect", [label]) if label else (None, [])
            yield files.sample(raw, dataset, category, image, defect, masks, split)


def _is_category(folder: Path) -> bool:
    return (folder / "Train" / "Label").is_dir() or (folder / "Test" / "Label").is_dir()
