"""The layout of MVTec LOCO AD.

<category>/train/good/000.png
<category>/validation/good/000.png
<category>/test/good/000.png
<category>/test/<logical_anomalies or structural_anomalies>/000.png
<category>/ground_truth/<the same>/000/000.png, 001.png ...    (a folder an image, a mask a defect)
"""

from collections.abc import Iterator
from pathlib import Path

from adfm.data.readers import files
from adfm.records import SPLITS, Sample

FORM = (
    "<category>/validation/good/*.png, <category>/test/logical_anomalies/*.png,"
    " <category>/ground_truth/logical_anomalies/<image>/*.png"
)


def matches(raw: Path) -> bool:
    """Whether there is a category in this layout, and one with masks."""
    # Without masks the labels are all there is: then it is the layout `folders`.
    return files.has_category(raw, _is_category, "ground_truth")


def read(raw: Path) -> Iterator[Sample]:
    """Yield the samples by category and name, as `mvtec.read` does; `defect` is the kind of anomaly."""
    # In masks any value but 0 is a defect: values number the defects.
    return files.DataSet(raw, "loco").by_category(_is_category, _category, files.ADD_MASK)


def _category(data: files.DataSet, folder: Path) -> Iterator[Sample]:
    for split in SPLITS:
        for kind in files.folders(folder / split):
            defect = None if kind.name == "good" else kind.name
            for image in files.images(kind):
                truth = folder / "ground_truth" / kind.name / image.stem
                masks = files.images(truth) or [truth / "000.png"]  # `checked` reports what does not exist
                yield data.sample(folder.resolve().name, image, defect, masks, split)


def _is_category(folder: Path) -> bool:
    signs = ("validation/good", "test/logical_anomalies", "test/structural_anomalies")
    return any((folder / sign).is_dir() for sign in signs)
