"""The layout of BTAD (beanTech).

<category>/train/ok/0000.bmp
<category>/test/ok/0000.bmp
<category>/test/ko/0000.bmp
<category>/ground_truth/ko/0000.png    (or .bmp: masks are images of the same name)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from adfm.data.readers import files
from adfm.records import Sample


def matches(raw: Path) -> bool:
    """Whether there is a category in this layout, and one with masks: without any the labels are all there is."""
    categories = [folder for folder in files.categories(raw, _is_category) if _is_category(folder)]
    return any((folder / "ground_truth").is_dir() for folder in categories)


def read(raw: Path) -> Iterator[Sample]:
    """Yields the samples, category by category, by name. `split` is the official one, `train` or `test`.

    BTAD names no kinds of defect: `defect` is the name of the folder, `ko`. Folders are entered, and files ignored,
    as for MVTec AD.

    Args:
        raw: The raw data set; its name is the name of the data set.

    Raises:
        AdfmError: No image, an anomalous image without a mask, or images and masks without a place in the layout: all,
            in one error, after the last sample.
    """
    parts = ((folder, _category(raw, folder)) for folder in files.categories(raw, _is_category))
    return files.checked(raw, "btad", parts, [], files.ADD_MASK)


def _category(raw: Path, folder: Path) -> Iterator[Sample]:
    dataset, category = files.dataset_name(raw), folder.resolve().name
    truth = folder / "ground_truth" / "ko"
    masks = {mask.stem: mask for mask in files.images(truth)}
    for split, kind in (("train", "ok"), ("test", "ko"), ("test", "ok")):
        for image in files.images(folder / split / kind):
            mask = masks.get(image.stem, truth / f"{image.stem}.png")
            yield files.sample(raw, dataset, category, image, None if kind == "ok" else kind, [mask], split)


def _is_category(folder: Path) -> bool:
    return any((folder / sign).is_dir() for sign in ("train/ok", "test/ok", "test/ko"))
