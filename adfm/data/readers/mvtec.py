"""The layout of MVTec AD, and of MPDD, DTD-Synthetic, GoodsAD and VisA's 1cls form.

<category>/train/good/000.png
<category>/test/good/000.png
<category>/test/<defect>/000.png
<category>/ground_truth/<defect>/000_mask.png    (or 000.png)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from adfm.data.readers import files
from adfm.records import Sample

# Folders of BTAD and MVTec LOCO, which are alike.
_OTHERS = ("train/ok", "test/ok", "validation/good", "test/logical_anomalies", "test/structural_anomalies")


def matches(raw: Path) -> bool:
    """Whether there is a category in this layout, and one with masks: without any the labels are all there is."""
    categories = [folder for folder in files.categories(raw, _is_category) if _is_category(folder)]
    return any((folder / "ground_truth").is_dir() for folder in categories)


def read(raw: Path) -> Iterator[Sample]:
    """Yields the samples, category by category, by name. `split` is the official one, `train` or `test`.

    A mask has its image's name, with or without `_mask`, and an extension of its own. A folder that holds one folder
    alone is entered until there are categories; a data set may also be one category itself. Files and folders whose
    names start with a dot are ignored, as are files that are no images, and masks of good images.

    Args:
        raw: The raw data set; its name is the name of the data set.

    Raises:
        AdfmError: No image, an anomalous image without a mask, or images and masks without a place in the layout: all,
            in one error, after the last sample.
    """
    parts = ((folder, _category(raw, folder)) for folder in files.categories(raw, _is_category))
    return files.checked(raw, "mvtec", parts, [], files.ADD_MASK)


def _category(raw: Path, folder: Path) -> Iterator[Sample]:
    dataset, category = files.dataset_name(raw), folder.resolve().name
    kinds = [*(("test", kind) for kind in files.folders(folder / "test")), ("train", folder / "train" / "good")]
    for split, kind in kinds:
        normal = kind.name == "good"
        truth = folder / "ground_truth" / kind.name
        masks = {} if normal else {mask.stem: mask for mask in files.images(truth)}
        for image in files.images(kind):
            mask = masks.get(f"{image.stem}_mask") or masks.get(image.stem) or truth / f"{image.stem}_mask.png"
            yield files.sample(raw, dataset, category, image, None if normal else kind.name, [mask], split)


def _is_category(folder: Path) -> bool:
    if any((folder / other).is_dir() for other in _OTHERS):
        return False
    if (folder / "train/good").is_dir() or (folder / "test/good").is_dir():
        return True
    return (folder / "test").is_dir() and (folder / "ground_truth").is_dir()
