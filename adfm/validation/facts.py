"""Measure each image of the shards: decoding, exposure, boxes, mask, and what it shares with other images."""

import hashlib
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adfm.data import duplicates, shards
from adfm.data.images import reduced
from adfm.data.readers.files import IMAGES
from adfm.errors import AdfmError
from adfm.params import Convert
from adfm.process import cpus
from adfm.process.progress import bar
from adfm.records import SPLITS

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[Any]
# Facts of which drift is measured: mean and standard deviation of the grey values of a thumbnail, 0 to 255; pixels.
FIGURES = ("brightness", "contrast", "width", "height")


def measure(folder: Path, settings: Convert) -> "pd.DataFrame":
    """Measure all images of shards.

    Returns:
        One row an image: columns of the shards, the facts of `_facts`, and what the image shares with others.

    Raises:
        AdfmError: There are no shards, they have other columns, or one cannot be read; they hold no images.
    """
    import pandas as pd

    columns = shards.table(folder).drop_columns(["boxes"]).to_pandas()
    if columns.empty:
        raise AdfmError(f"{folder}: the shards hold no images; make them again with `adfm convert`.")
    facts: list[dict[str, Any]] = []
    vectors = []
    progress = bar(total=len(columns), desc="validate images", unit="image")
    # Thumbnails take two kilobytes an image: they lie in a file, which is mapped.
    with TemporaryFile() as file, progress, ThreadPoolExecutor(cpus.count()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on damaged and on huge images: the facts say what matters of them
        for split in SPLITS:  # file by file: whether a row is in that of its split is a fact too
            if not any(folder.glob(f"{split}-*.parquet")):
                continue
            for batch in shards.batches(folder, split, shards.COLUMNS.schema.names):
                rows = list(pool.map(partial(_facts, split=split, settings=settings), batch.to_pylist()))
                thumbnails = np.stack([row.pop("thumbnail") for row in rows])
                facts += rows
                file.write(thumbnails.tobytes())
                vectors.append(duplicates.coarse(thumbnails))
                progress.update(len(rows))
        file.flush()
        table: pd.DataFrame = pd.concat([columns, pd.DataFrame(facts)], axis=1)
        # Copies have an expectation of their own: without contrast, they are not near-duplicates as well.
        contrasts = np.where(table["pixels"].duplicated(), 0, np.nan_to_num(table["contrast"]))
        looks = duplicates.Looks(duplicates.mapped(file), contrasts, np.concatenate(vectors))
        split = columns["split"].map({name: number for number, name in enumerate(SPLITS)}).fillna(0).to_numpy(np.int8)
        pairs = np.concatenate([duplicates.near_duplicates(looks), duplicates.near_duplicates_across(looks, split)])
    table["product"] = table["dataset"] + "/" + table["category"]
    table["is_anomalous"] = (table["label"] == "anomalous").astype(float)
    same_pixels = table.groupby("pixels")
    table["splits_with_pixels"] = same_pixels["split"].transform("nunique")
    table["labels_of_pixels"] = same_pixels["label"].transform("nunique")
    table["copy_of"] = same_pixels["id"].transform("first").where(same_pixels.cumcount() > 0, None)
    table["splits_with_part"] = table.groupby(["product", "group"])["split"].transform("nunique")
    for name in ("split", "label"):
        table[f"twin_in_other_{name}"] = _twins(table, pairs, name)
    return table


def _twins(table: "pd.DataFrame", pairs: Array, column: str) -> "pd.Series[Any]":
    """Return for each image the id of a near-duplicate that has another value in the column; `None` without one."""
    import pandas as pd

    twins: list[str | None] = [None] * len(table)
    ids, values = table["id"].tolist(), table[column].tolist()
    for one, other in pairs.tolist():
        if values[one] != values[other]:
            twins[one], twins[other] = ids[other], ids[one]
    return pd.Series(twins, dtype=object)


def _facts(row: dict[str, Any], split: str, settings: Convert) -> dict[str, Any]:
    """Measure a row of a shard of `split`; a fact is `None` where its question does not arise."""
    content = row["image"]["bytes"] if row["image"] else None
    image, its_size = _decode(content)
    width, height = size = row["width"] or 0, row["height"] or 0
    boxes = np.array(row["boxes"] or [], dtype=float).reshape(-1, 4)
    inside = bool((boxes >= 0).all() and (boxes <= [width, height, width, height]).all())
    solid = bool((boxes[:, :2] < boxes[:, 2:]).all())
    usable = boxes if inside and solid else boxes[:0]
    brightness, contrast, exposure, pixels, covered = math.nan, math.nan, None, content, True
    thumbnail: Array = np.zeros((duplicates.SIDE, duplicates.SIDE), np.float16)
    if image:
        plain = image if image.mode in ("L", "RGB") else image.convert("RGB")
        grey = np.asarray(plain.resize((32, 32), Image.Resampling.BOX).convert("L"))
        # 99 % of the cells within 5 % of that end.
        black, white = (grey < 13).mean() >= 0.99, (grey > 242).mean() >= 0.99
        brightness, exposure = float(grey.mean()), "black" if black else "white" if white else "fair"
        thumbnail, contrast = duplicates.thumbnail(image)
        covered = all(_shows_something(plain, box, size) for box in usable)
        # Of a JPEG these are the pixels at a smaller scale: the same for the same data, whatever its EXIF entries.
        pixels = f"{image.mode} {its_size} ".encode() + image.tobytes()
    return {
        "thumbnail": thumbnail,
        "split_is_of_file": row["split"] == split,
        "pixels": hashlib.sha256(pixels).hexdigest() if pixels else None,
        "image_decodes": image is not None,
        "image_has_stated_size": its_size == size if image else None,
        "brightness": brightness,
        "contrast": contrast,
        "exposure": exposure,
        "aspect": max(size) / max(1, min(size)),
        "box_count": len(boxes),
        "boxes_inside_image": inside,
        "boxes_have_area": solid,
        "boxes_cover_something": covered,
        "largest_box": max(((x2 - x1) * (y2 - y1) / max(1, width * height) for x1, y1, x2, y2 in usable), default=0.0),
        "names_are_of_file": _is_file_name(row["category"], row) or _is_file_name(row["defect"], row),
        "marked": bool(len(boxes)) if row["mask"] else None,
        **_mask_facts(row, size, usable, settings),
    }


def _shows_something(image: Image.Image, box: Array, size: tuple[int, int]) -> bool:
    """Return whether the image, perhaps decoded at a smaller scale than `size`, has more than one value in a box."""
    x1, y1, x2, y2 = box
    if min(x2 - x1, y2 - y1) < 2:
        return False
    across, down = image.width / size[0], image.height / size[1]
    place = (int(x1 * across), int(y1 * down), math.ceil(x2 * across), math.ceil(y2 * down))
    if min(place[2] - place[0], place[3] - place[1]) < 2:  # too small at this scale to tell
        return True
    bands = image.crop(place).getextrema()
    return any(low != high for low, high in (bands if isinstance(bands[0], tuple) else [bands]))


def _is_file_name(name: str | None, row: dict[str, Any]) -> bool:
    """Return whether a category or a defect type is named after its own image, as a shifted column makes it."""
    path = PurePosixPath(row["source"] or "")
    return bool(name) and (name in (path.name, path.stem) or PurePosixPath(name or "").suffix.lower() in IMAGES)


def _mask_facts(row: dict[str, Any], size: tuple[int, int], boxes: Array, settings: Convert) -> dict[str, bool | None]:
    names = ("mask_fits_image", "mask_agrees_with_label", "boxes_hold_mask", "boxes_cover_mask")
    facts: dict[str, bool | None] = dict.fromkeys(names)
    if not row["mask"]:
        return facts
    mask, _ = _decode(row["mask"]["bytes"])
    facts["mask_fits_image"] = mask is not None and mask.mode == "L" and mask.size == size
    if mask and facts["mask_fits_image"]:
        pixels: Array = np.asarray(mask)
        facts["mask_agrees_with_label"] = bool(pixels.any()) == (row["label"] == "anomalous")
        if len(boxes) and pixels.any():
            parts = [pixels[int(y1) : math.ceil(y2), int(x1) : math.ceil(x2)] for x1, y1, x2, y2 in boxes]
            facts["boxes_hold_mask"] = all(part.any() for part in parts)
            facts["boxes_cover_mask"] = _is_covered(pixels, boxes, settings)
    return facts


def _is_covered(pixels: Array, boxes: Array, settings: Convert) -> bool:
    """Return whether every defect of `convert.min_area` pixels and more lies in the boxes, if only in part."""
    from scipy import ndimage

    outside = pixels != 0
    for x1, y1, x2, y2 in boxes:
        outside[int(y1) : math.ceil(y2), int(x1) : math.ceil(x2)] = False
    if not outside.any():
        return True
    structure = ndimage.generate_binary_structure(2, 1 if settings.connectivity == 4 else 2)
    numbers, _ = ndimage.label(pixels, structure)
    return bool((np.bincount(numbers.ravel())[np.unique(numbers[outside])] < settings.min_area).all())


def _decode(content: bytes | None) -> tuple[Image.Image | None, tuple[int, int] | None]:
    try:
        return reduced(content or b"")
    except Exception:  # a damaged file makes Pillow raise nearly anything
        return None, None
