"""The layout of MVTec LOCO AD.

<category>/train/good/000.png
<category>/validation/good/000.png
<category>/test/good/000.png
<category>/test/<logical_anomalies or structural_anomalies>/000.png
<category>/ground_truth/<the same>/000/000.png, 001.png ...    (a folder an image, a mask a defect)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from adfm.data.readers import files
from adfm.records import SPLITS, Sample


def matches(raw: Path) -> bool:
    """Whether there is a category in this layout, and one with masks: without any the labels are all there is."""
    categories = [folder for folder in files.categories(raw, _is_category) if _is_category(folder)]
    return any((folder / "ground_truth").is_dir() for folder in categories)


def read(raw: Path) -> Iterator[Sample]:
    """Yields the samples, category by category, by name. `split` is the folder's; `defect` is the kind of anomaly.

    A defect is what any of an image's masks marks, with whatever value: values number the defects. Folders are
    entered, and files ignored, as for MVTec AD.

    Args:
        raw: The raw data set; its name is the name of the data set.

    Raises:
        AdfmError: No image, an anomalous image without a mask, or images and masks without a place in the layout: all,
            in one error, after the last sample.
    """
    parts = ((folder, _category(raw, folder)) for folder in files.categories(raw, _is_category))
    return files.checked(raw, "loco", parts, [], files.ADD_MASK)


def _category(raw: Path, folder: Path) -> Iterator[Sample]:
    dataset, category = files.dataset_name(raw), folder.resolve().name
    for split in SPLITS:
        for kind in files.folders(folder / split):
            defect = None if kind.name == "good" else kind.name
            for image in files.images(kind):
                truth = folder / "ground_truth" / kind.name / image.stem
                masks = files.images(truth) or [truth / "000.png"]
                yield files.sample(raw, dataset, category, image, defect, masks, split)


def _is_category(folder: Path) -> bool:
    signs = ("validation/good", "test/logical_anomalies", "test/structural_anomalies")
    return any((folder / sign).is_dir() for sign in signs)
