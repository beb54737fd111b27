"""The layout of VisA as it is published; its 1cls form, which the authors' script makes, is that of MVTec AD.

<category>/Data/Images/Normal/0000.JPG
<category>/Data/Images/Anomaly/000.JPG
<category>/Data/Masks/Anomaly/000.png
<category>/image_anno.csv    image,label,mask: the kinds of defects
split_csv/1cls.csv           object,split,label,image,mask
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from adfm.data.readers import files
from adfm.records import Sample


class _Image(NamedTuple):
    path: Path
    normal: bool
    mask: Path | None
    split: str | None


def matches(raw: Path) -> bool:
    """Whether there is a category in this layout."""
    return any(_is_category(folder) for folder in files.categories(raw, _is_category))


def read(raw: Path) -> Iterator[Sample]:
    """Yields the samples, category by category.

    With `split_csv/1cls.csv` the images, their labels, masks and `split` are what it lists, in its order; it may list
    categories that are not there. Without it they are what is in the folders, by name, and no split is fixed. `defect`
    is the label in `image_anno.csv`, such as `melt` or `bubble,scratch`, and `anomaly` where that does not say.
    Folders are entered, and files ignored, as for MVTec AD.

    Args:
        raw: The raw data set; its name is the name of the data set.

    Raises:
        AdfmError: No image, an anomalous image without a mask, images and masks that a file names and that do not
            exist, or that exist and are not named, rows that cannot be understood: all in one error, after the last
            sample.
    """
    problems: list[str] = []
    parts = ((folder, _category(raw, folder, problems)) for folder in files.categories(raw, _is_category))
    return files.checked(raw, "visa", parts, problems)


def _category(raw: Path, folder: Path, problems: list[str]) -> Iterator[Sample]:
    dataset, category = files.dataset_name(raw), folder.resolve().name
    table = folder.parent / "split_csv" / "1cls.csv"
    listed = _listed(raw, table, folder, problems) if folder != raw and table.is_file() else _found(folder)
    defects = _defects(raw, folder / "image_anno.csv", problems)
    for image in listed:
        defect = None if image.normal else defects.get(image.path.name, "anomaly")
        masks = [image.mask] if image.mask else []
        yield files.sample(raw, dataset, category, image.path, defect, masks, image.split)


def _found(folder: Path) -> Iterator[_Image]:
    data = folder / "Data"
    masks = {mask.stem: mask for mask in files.images(data / "Masks" / "Anomaly")}
    for image in files.images(data / "Images" / "Anomaly"):
        yield _Image(image, False, masks.get(image.stem, data / "Masks" / "Anomaly" / f"{image.stem}.png"), None)
    for image in files.images(data / "Images" / "Normal"):
        yield _Image(image, True, None, None)


def _listed(raw: Path, table: Path, folder: Path, problems: list[str]) -> Iterator[_Image]:
    for place, row in _rows(raw, table, ("object", "split", "label", "image", "mask"), problems):
        if row["object"] != folder.name:
            continue
        image = files.listed_path([folder.parent], row["image"])
        mask = files.listed_path([folder.parent], row["mask"]) if row["mask"] else None
        wrong = []
        if row["label"] not in ("normal", "anomaly"):
            wrong.append(f"label {row['label']!r} is neither normal nor anomaly")
        if row["split"] not in ("train", "test"):
            wrong.append(f"split {row['split']!r} is neither train nor test")
        if image is None or not image.is_relative_to(folder) or (row["mask"] and mask is None):
            wrong.append(f"image {row['image']!r} or mask {row['mask']!r} is not a path within {folder.name}")
        elif not wrong:
            normal = row["label"] == "normal"
            yield _Image(image, normal, None if normal else mask, row["split"])
        problems += [f"{place}: {what}" for what in wrong]


def _defects(raw: Path, table: Path, problems: list[str]) -> dict[str, str]:
    """The kinds of defects by the name of the image file."""
    if not table.is_file():
        return {}
    rows = _rows(raw, table, ("image", "label"), problems)
    return {PurePosixPath(row["image"]).name: row["label"] for _, row in rows if row["label"] not in ("", "normal")}


def _rows(raw: Path, table: Path, columns: Sequence[str], problems: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV, each with its place; a cell that is missing is empty."""
    name = files.relative(raw, table)
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            missing = [column for column in columns if column not in (reader.fieldnames or ())]
            if missing:
                problems.append(f"{name}: has no column {', '.join(missing)}")
                return
            for row in reader:
                yield f"{name}, line {reader.line_num}", {column: row[column] for column in columns}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problems.append(f"{name}: cannot be read ({error})")


def _is_category(folder: Path) -> bool:
    return (folder / "Data" / "Images").is_dir()
