"""The layout of MVTec AD, and of MPDD, DTD-Synthetic, GoodsAD and VisA's 1cls form.

<category>/train/good/000.png
<category>/test/good/000.png
<category>/test/<defect>/000.png
<category>/ground_truth/<defect>/000_mask.png    (or 000.png)
"""

from collections.abc import Iterator
from pathlib import Path

from adfm.data.readers import files
from adfm.records import Sample

FORM = (
    "<category>/train/good/*.png, <category>/test/<good or defect>/*.png, <category>/ground_truth/<defect>/*_mask.png"
)
# Folders of BTAD and MVTec LOCO, which are alike.
_OTHERS = ("train/ok", "test/ok", "validation/good", "test/logical_anomalies", "test/structural_anomalies")


def matches(raw: Path) -> bool:
    """Whether there is a category in this layout, and one with masks."""
    # Without masks the labels are all there is: then it is the layout `folders`.
    return files.has_category(raw, _is_category, "ground_truth")


def read(raw: Path) -> Iterator[Sample]:
    """Yield the samples, category by category, by name. `split` is the official one, `train` or `test`.

    A folder that holds one folder alone is entered until there are categories; a data set may also be one category
    itself. Hidden files and folders are ignored, as are files that are not images, and masks of good images.
    """
    return files.DataSet(raw, "mvtec").by_category(_is_category, _category, files.ADD_MASK)


def _category(data: files.DataSet, folder: Path) -> Iterator[Sample]:
    kinds = [*(("test", kind) for kind in files.folders(folder / "test")), ("train", folder / "train" / "good")]
    for split, kind in kinds:
        defect = None if kind.name == "good" else kind.name
        truth = folder / "ground_truth" / kind.name
        masks = {mask.stem: mask for mask in files.images(truth)} if defect else {}
        for image in files.images(kind):
            # VisA's 1cls form has no `_mask`; extensions differ from the image's. `checked` reports a missing mask.
            mask = masks.get(f"{image.stem}_mask") or masks.get(image.stem) or truth / f"{image.stem}_mask.png"
            yield data.sample(folder.resolve().name, image, defect, [mask], split)


def _is_category(folder: Path) -> bool:
    if any((folder / other).is_dir() for other in _OTHERS):
        return False
    has_good = (folder / "train/good").is_dir() or (folder / "test/good").is_dir()
    return has_good or ((folder / "test").is_dir() and (folder / "ground_truth").is_dir())
