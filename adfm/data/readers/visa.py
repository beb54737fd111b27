"""The layout of VisA as it is published; its 1cls form, which the authors' script makes, is that of MVTec AD.

<category>/Data/Images/Normal/0000.JPG
<category>/Data/Images/Anomaly/000.JPG
<category>/Data/Masks/Anomaly/000.png
<category>/image_anno.csv    image,label,mask: the kinds of defects
split_csv/1cls.csv           object,split,label,image,mask
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from adfm.data.readers import files
from adfm.records import Sample

FORM = "<category>/Data/Images/<Normal or Anomaly>/*.JPG, <category>/Data/Masks/Anomaly/*.png, split_csv/1cls.csv"


class _Image(NamedTuple):
    path: Path
    normal: bool
    mask: Path | None
    split: str | None


def matches(raw: Path) -> bool:
    """Whether there is a category in this layout."""
    return files.has_category(raw, _is_category)


def read(raw: Path) -> Iterator[Sample]:
    """Yield the samples by category; see `mvtec.read` for the folders.

    Images, labels, masks and `split` are what `split_csv/1cls.csv` lists, in its order; without it, what the folders
    hold, by name and without a split. `defect` is the label in `image_anno.csv`, such as `melt`, else `anomaly`.
    """
    return files.DataSet(raw, "visa").by_category(_is_category, _category)


def _category(data: files.DataSet, folder: Path) -> Iterator[Sample]:
    table = folder.parent / "split_csv" / "1cls.csv"
    images = _from_table(data, table, folder) if folder != data.raw and table.is_file() else _from_folders(folder)
    kinds = folder / "image_anno.csv"
    rows = _rows(data, kinds, ("image", "label")) if kinds.is_file() else ()
    defects = {PurePosixPath(row["image"]).name: row["label"] for _, row in rows if row["label"] not in ("", "normal")}
    for image in images:
        defect = None if image.normal else defects.get(image.path.name, "anomaly")
        yield data.sample(folder.resolve().name, image.path, defect, [image.mask] if image.mask else [], image.split)


def _from_folders(folder: Path) -> Iterator[_Image]:
    truth = folder / "Data" / "Masks" / "Anomaly"
    masks = {mask.stem: mask for mask in files.images(truth)}
    for image in files.images(folder / "Data" / "Images" / "Anomaly"):
        yield _Image(image, False, masks.get(image.stem, truth / f"{image.stem}.png"), None)
    for image in files.images(folder / "Data" / "Images" / "Normal"):
        yield _Image(image, True, None, None)


def _from_table(data: files.DataSet, table: Path, folder: Path) -> Iterator[_Image]:
    for place, row in _rows(data, table, ("object", "split", "label", "image", "mask")):
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
            yield _Image(image, row["label"] == "normal", mask, row["split"])
        data.problems += [f"{place}: {what}" for what in wrong]


def _rows(data: files.DataSet, table: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    where = data.relative(table)
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")  # a cell that is missing is empty
            if missing := [column for column in columns if column not in (reader.fieldnames or ())]:
                data.add(where, f"has no column {', '.join(missing)}")
                return
            for row in reader:
                yield f"{where}, line {reader.line_num}", {column: row[column] for column in columns}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        data.add(where, f"cannot be read ({error})")


def _is_category(folder: Path) -> bool:
    return (folder / "Data" / "Images").is_dir()
