"""The layout of DAGM 2007.

Class1/Train/0001.PNG
Class1/Train/Label/0001_label.PNG    (of images with a defect alone)
Class1/Test/0001.PNG
Class1/Test/Label/0001_label.PNG
"""

from collections.abc import Iterator
from pathlib import Path

from adfm.data.readers import files
from adfm.records import Sample

FORM = "<class>/<Train or Test>/*.PNG, <class>/<Train or Test>/Label/*_label.PNG"


def matches(raw: Path) -> bool:
    """Whether there is a class in this layout."""
    return files.has_category(raw, _is_category)


def read(raw: Path) -> Iterator[Sample]:
    """Yield the samples by class and name, as `mvtec.read` does. `train` has defects too; no label file: normal."""
    return files.DataSet(raw, "dagm").by_category(_is_category, _category)


def _category(data: files.DataSet, folder: Path) -> Iterator[Sample]:
    for split, part in (("train", "Train"), ("test", "Test")):
        labels = {label.stem: label for label in files.images(folder / part / "Label")}
        for image in files.images(folder / part):
            label = labels.get(f"{image.stem}_label")
            # Every class has one kind of defect, which has no name; the label is a coarse ellipse round it.
            defect, masks = ("defect", [label]) if label else (None, [])
            yield data.sample(folder.resolve().name, image, defect, masks, split)


def _is_category(folder: Path) -> bool:
    return (folder / "Train" / "Label").is_dir() or (folder / "Test" / "Label").is_dir()
