"""The layout of KolektorSDD.

kos01/Part0.jpg
kos01/Part0_label.bmp    (of every image)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from adfm.data.masks import load_mask
from adfm.data.readers import files
from adfm.records import Sample


def matches(raw: Path) -> bool:
    """Whether there is a folder of images and `_label.bmp` files."""
    return any(_is_item(folder) for folder in files.categories(raw, _is_item))


def read(raw: Path) -> Iterator[Sample]:
    """Yields the samples, folder by folder, by name. The data set fixes no split.

    An image is normal where its label file, which is opened for that, shows nothing. There is one category,
    `kolektor`; kinds of defects are not told apart, so `defect` is `defect`. A folder has the surfaces of one
    commutator, so it is the `group`. Folders are entered, and files ignored, as for MVTec AD.

    Args:
        raw: The raw data set; its name is the name of the data set.

    Raises:
        AdfmError: No image, an image without a label file, label files without an image or that cannot be read: all, in
            one error, after the last sample.
    """
    problems: list[str] = []
    parts = ((folder, _item(raw, folder, problems)) for folder in files.categories(raw, _is_item))
    return files.checked(raw, "kolektor", parts, problems)


def _item(raw: Path, folder: Path, problems: list[str]) -> Iterator[Sample]:
    dataset, group = files.dataset_name(raw), files.relative(raw, folder)
    images = files.images(folder)
    labels = {label.stem: label for label in images if label.stem.endswith("_label")}
    for image in images:
        if image.stem.endswith("_label"):
            continue
        label = labels.get(f"{image.stem}_label", folder / f"{image.stem}_label.bmp")
        normal = False
        try:
            normal = not load_mask(label).any()
        except FileNotFoundError:
            pass  # is among what is missing
        except Exception as error:  # a damaged file makes Pillow raise nearly anything
            problems.append(f"{files.relative(raw, label)}: cannot be read ({error})")
        yield Sample(
            image=image,
            source=files.relative(raw, image),
            dataset=dataset,
            category="kolektor",
            label="normal" if normal else "anomalous",
            defect=None if normal else "defect",
            masks=(label,),
            group=group,
        )


def _is_item(folder: Path) -> bool:
    return any(path.suffix.lower() == ".bmp" for path in folder.glob("*_label.*"))
