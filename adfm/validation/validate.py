"""What shards must satisfy before anything is trained on them: `adfm validate SHARDS`.

Every row of the shards becomes a row of a small table: its own columns and what its image, mask and boxes are found to
be (`_facts`). The expectations (`_suite`) are about that table. A failed one of severity `critical` stops a run, one of
severity `warning` does not. Only this file knows Great Expectations.

A report carries the `statistics` of its shards. Against those of an earlier report, that of the shards on which the
version in production was trained, drift is measured.
"""

from __future__ import annotations

import copy
import hashlib
import html
import json
import math
import os
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory, TemporaryFile
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adfm import tracking
from adfm.data import duplicates, folds, pictures, shards, tiles
from adfm.data.images import reduced
from adfm.data.readers.files import IMAGES
from adfm.data.splits import kinds_of
from adfm.errors import AdfmError
from adfm.files import atomic_folder, write_json
from adfm.method import kinds as kinds_
from adfm.models import loading
from adfm.params import Convert, Params
from adfm.process import cpus, retries
from adfm.process.progress import bar
from adfm.records import SPLITS, Label
from adfm.text import printable

if TYPE_CHECKING:
    import pandas as pd
    from great_expectations.core import ExpectationSuiteValidationResult
    from great_expectations.expectations.expectation import Expectation

Array = NDArray[Any]

# Ids of failing records that `validation.json` lists for an expectation; their number is always given.
MAX_IDS = 1000
# Ids that a line of `failures` shows.
_SHOWN_IDS = 10
# Pictures of failing images that the page shows for an expectation; their side in pixels; characters for all of them.
_PICTURES = 4
_PICTURE_SIDE = 200
_PICTURES_LENGTH = 3_000_000
# Share of the image above which a box is noticed as one round everything.
_WHOLE = 0.95

_PRODUCTION = "production"


def validate(folder: Path, out: Path, params: Params) -> bool:
    """Judges shards, writes the report, and logs it as a run in MLflow, whether they pass or not.

    An MLflow that cannot be reached is said and no error: there is no drift from production and no run then.

    Args:
        folder: The shards.
        out: Folder of the report, as `judge` writes it; the artifact `validation` of the run.
        params: Reads `validate`, `convert`, `split`, `register` and `sft.kinds`.

    Returns:
        Whether every critical expectation holds.

    Raises:
        AdfmError: There are no shards, they have other columns, or one cannot be read; `validation.reference` is
            neither `production` nor a report.
    """
    reference, reachable = None, True
    try:
        retries.again(tracking.configure, "MLflow")
    except AdfmError as error:
        reachable = False
        print(f"adfm: warning: the validation is not logged, nor compared with production: {error}", file=sys.stderr)
    if params.validation.reference == _PRODUCTION:
        reference = _of_production(params.mlflow.registered_model) if reachable else None
    elif params.validation.reference is not None:
        reference = _of_file(Path(params.validation.reference))
    passed = judge(folder, out, params, reference)
    if reachable:
        _log(folder, out, params, passed)
    return passed


def require(folder: Path, out: Path, params: Params) -> None:
    """Validates shards and prints what was found; offers cross-validation to a small set.

    Raises:
        AdfmError: As of `validate`; or the shards are not fit to train on: every failure is listed; or they cannot be
            divided into `evaluate.folds`.
    """
    fit = validate(folder, out, params)
    said = f"{folder} is {'fit' if fit else 'not fit'} to train on; the report is {out / 'index.html'}"
    found = failures(out)
    lines = "\n  ".join([said + ":" * (not fit), *found])
    if not fit:
        raise AdfmError(lines)
    print(lines)
    if params.evaluate.folds:
        folds.assign(folder, params)  # before anything is trained
    elif offer := folds.offer(folder, params):
        print(f"note: {offer}.")


def judge(folder: Path, out: Path, params: Params, reference: Mapping[str, Any] | None = None) -> bool:
    """Judges shards and writes the report, whether they pass or not.

    `out` holds `validation.json` (`passed`, `statistics`, and for each of the `expectations` what it says, column,
    severity, success, number and ids of failing images, what was observed, and the remedy), and the same as Great
    Expectations' Data Docs with pictures of what failed in `index.html`, a page that needs no network.

    Memory does not grow with the number of images, but for about two kilobytes of facts on each.

    Args:
        folder: The shards.
        out: Folder of the report.
        params: The section `validate`; `convert` and `split` say what is expected of boxes and of which splits, `model`
            and `tile` at which size defects are seen, and `sft.kinds` of the kinds of defects: with it, all images
            may be defective.
        reference: The `statistics` of the report that drift is measured against; `None`: it is not.

    Returns:
        Whether every critical expectation holds.

    Raises:
        AdfmError: There are no shards, they have other columns, or one cannot be read.
    """
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # Great Expectations reads it when it is imported
    table = _table(folder, params.convert)
    train = _profile(table[table["split"] == "train"])
    suite = _suite(table, params) + _tiling(table, tiles.defects_of(folder), params)
    if reference is not None:
        suite += _drift(table, train, reference["train"], params)
    result, failing = _run(table, suite)
    entries = _entries(suite, result)
    passed = all(entry["success"] for entry in entries if entry["severity"] == "critical")
    statistics = _statistics(table, entries) | {"train": train}
    report = {"passed": passed, "statistics": statistics, "expectations": entries}
    shown = _pictures(folder, table, failing)
    with atomic_folder(out) as unfinished:
        write_json(report, unfinished / "validation.json")
        (unfinished / "index.html").write_text(_page(result, entries, shown), encoding="utf-8")
    return passed


def failures(out: Path) -> list[str]:
    """One line for each expectation that did not hold, the critical ones first: what, how many, which, what to do."""
    return _lines(json.loads((out / "validation.json").read_text(encoding="utf-8"))["expectations"])


def _lines(entries: list[dict[str, Any]]) -> list[str]:
    return [_line(entry) for entry in _failed(entries)]


def _failed(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    failed = [entry for entry in entries if not entry["success"]]
    return sorted(failed, key=lambda entry: bool(entry["severity"] == "warning"))


def _line(entry: dict[str, Any]) -> str:
    found = f"observed {entry['observed']}"
    if entry["failing"] is not None:
        more = ", …" if entry["failing"] > _SHOWN_IDS else ""
        found = f"{entry['failing']} failing: {', '.join(entry['ids'][:_SHOWN_IDS])}{more}"
        values = [str(value) for value in entry["observed"] if value not in (None, False)]
        if values and entry["column"] != "id":
            found += f" ({entry['column']}: {', '.join(values[:_SHOWN_IDS])})"
    prefix = "warning: " if entry["severity"] == "warning" else ""
    return printable(f"{prefix}{entry['what']}: {found}; {entry['remedy']}.")


def _table(folder: Path, settings: Convert) -> pd.DataFrame:
    import pandas as pd

    small = shards.table(folder).drop_columns(["boxes"]).to_pandas()
    if small.empty:
        raise AdfmError(f"{folder}: the shards hold no images; make them anew with `adfm convert`.")
    facts: dict[str, list[Any]] = defaultdict(list)
    vectors = []
    progress = bar(total=len(small), desc="validate images", unit="image")
    with TemporaryFile() as file, progress, ThreadPoolExecutor(cpus.count()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on damaged and on huge images: the table says what matters of it
        for split in SPLITS:
            if any(folder.glob(f"{split}-*.parquet")):
                for batch in shards.batches(folder, split, shards.SCHEMA.names):
                    thumbnails: list[Array] = []
                    for found, thumbnail in pool.map(
                        partial(_facts, split=split, settings=settings), batch.to_pylist()
                    ):
                        thumbnails.append(thumbnail)
                        for name, value in found.items():
                            facts[name].append(value)
                    file.write(np.stack(thumbnails).tobytes())
                    vectors.append(duplicates.coarse(np.stack(thumbnails)))
                    progress.update(batch.num_rows)
        file.flush()
        copies = pd.Series(facts["pixels"], dtype=object).duplicated()  # another expectation is about them
        looks = (
            np.memmap(file, np.float16, "r").reshape(-1, duplicates.SIDE, duplicates.SIDE),
            np.where(copies, 0, np.nan_to_num(facts["contrast"])),
            np.concatenate(vectors),
        )
        split = small["split"].map({name: number for number, name in enumerate(SPLITS)}).fillna(0).to_numpy(np.int8)
        pairs = np.concatenate([duplicates.near_duplicates(*looks), duplicates.near_duplicates_across(*looks, split)])
    table: pd.DataFrame = pd.concat([small, pd.DataFrame(facts)], axis=1)
    table["product"] = table["dataset"] + "/" + table["category"]
    table["is_anomalous"] = (table["label"] == "anomalous").astype(float)
    same_pixels = table.groupby("pixels")
    table["splits_with_pixels"] = same_pixels["split"].transform("nunique")
    table["labels_of_pixels"] = same_pixels["label"].transform("nunique")
    first = same_pixels["id"].transform("first")
    table["copy_of"] = first.where(same_pixels.cumcount() > 0, None)
    table["splits_with_part"] = table.groupby(["product", "group"])["split"].transform("nunique")
    for name in ("split", "label"):
        table[f"twin_in_other_{name}"] = _twins(table, pairs, name)
    return table


def _twins(table: pd.DataFrame, pairs: Array, column: str) -> pd.Series[Any]:
    """For each image, the id of a near-duplicate that has another value in the column; `None` without one."""
    import pandas as pd

    twins: list[str | None] = [None] * len(table)
    ids, values = table["id"].tolist(), table[column].tolist()
    for one, other in pairs.tolist():
        if values[one] != values[other]:
            twins[one], twins[other] = ids[other], ids[one]
    return pd.Series(twins, dtype=object)


def _facts(row: dict[str, Any], split: str, settings: Convert) -> tuple[dict[str, Any], Array]:
    """What is found of one row of a shard of `split`; `None` where a question does not arise. And its thumbnail."""
    content = row["image"]["bytes"] if row["image"] else None
    image, its_size = _decoded(content)
    width, height = size = row["width"] or 0, row["height"] or 0
    boxes = np.array(row["boxes"] or [], dtype=float).reshape(-1, 4)
    inside = bool((boxes >= 0).all() and (boxes <= [width, height, width, height]).all())
    solid = bool((boxes[:, :2] < boxes[:, 2:]).all())
    usable = boxes if inside and solid else boxes[:0]
    brightness, contrast, exposure, pixels = math.nan, math.nan, None, content
    covered = True
    thumbnail: Array = np.zeros((duplicates.SIDE, duplicates.SIDE), np.float16)
    if image:
        plain = image if image.mode in ("L", "RGB") else image.convert("RGB")
        grey = np.asarray(plain.resize((32, 32), Image.Resampling.BOX).convert("L"))
        brightness, exposure = float(grey.mean()), _exposure(grey)
        thumbnail, contrast = duplicates.thumbnail(image)
        covered = all(_shows_something(plain, box, size) for box in usable)
        # Of a JPEG these are the pixels at a smaller scale: the same for the same data, whatever its EXIF entries.
        pixels = f"{image.mode} {its_size} ".encode() + image.tobytes()
    facts = {
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
    return facts, thumbnail


def _exposure(grey: Array) -> str:
    """`black` or `white` where at least 99 % of the cells of a thumbnail are within 5 % of that end, else `fair`."""
    if (grey < 13).mean() >= 0.99:
        return "black"
    return "white" if (grey > 242).mean() >= 0.99 else "fair"


def _shows_something(image: Image.Image, box: Array, size: tuple[int, int]) -> bool:
    """Whether the image, which may be decoded at a smaller scale than `size`, has more than one value in a box."""
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
    """Whether a category or a defect type is named after its own image, as a shifted column makes it."""
    path = PurePosixPath(row["source"] or "")
    return bool(name) and (name in (path.name, path.stem) or PurePosixPath(name or "").suffix.lower() in IMAGES)


def _mask_facts(row: dict[str, Any], size: tuple[int, int], boxes: Array, settings: Convert) -> dict[str, bool | None]:
    facts: dict[str, bool | None] = dict.fromkeys(
        ("mask_fits_image", "mask_agrees_with_label", "boxes_hold_mask", "boxes_cover_mask")
    )
    if row["mask"]:
        mask, _ = _decoded(row["mask"]["bytes"])
        facts["mask_fits_image"] = mask is not None and mask.mode == "L" and mask.size == size
        if mask and facts["mask_fits_image"]:
            pixels: Array = np.asarray(mask)
            facts["mask_agrees_with_label"] = bool(pixels.any()) == (row["label"] == "anomalous")
            if len(boxes) and pixels.any():
                parts = [pixels[int(y1) : math.ceil(y2), int(x1) : math.ceil(x2)] for x1, y1, x2, y2 in boxes]
                facts["boxes_hold_mask"] = all(part.any() for part in parts)
                facts["boxes_cover_mask"] = _covered(pixels, boxes, settings)
    return facts


def _covered(pixels: Array, boxes: Array, settings: Convert) -> bool:
    """Whether all pixels of defects of `convert.min_area` pixels and more lie in boxes, if only with a part of them."""
    from scipy import ndimage

    outside = pixels != 0
    for x1, y1, x2, y2 in boxes:
        outside[int(y1) : math.ceil(y2), int(x1) : math.ceil(x2)] = False
    if not outside.any():
        return True
    structure = ndimage.generate_binary_structure(2, 1 if settings.connectivity == 4 else 2)
    numbers, _ = ndimage.label(pixels, structure)
    return bool((np.bincount(numbers.ravel())[np.unique(numbers[outside])] < settings.min_area).all())


def _decoded(content: bytes | None) -> tuple[Image.Image | None, tuple[int, int] | None]:
    """As of `reduced`; `None` twice where there is no image or it cannot be decoded."""
    try:
        return reduced(content or b"")
    except Exception:  # a damaged file makes Pillow raise nearly anything
        return None, None


def _expect(
    kind: Callable[..., Expectation], what: str, remedy: str, severity: str = "critical", **arguments: Any
) -> Expectation:
    return kind(description=what, meta={"remedy": remedy}, severity=severity, **arguments)


def _suite(table: pd.DataFrame, params: Params) -> list[Expectation]:
    """The expectations, in the order of the report; their descriptions are unique."""
    from great_expectations import expectations as gxe
    from great_expectations.expectations.row_conditions import Column

    def holds(column: str, what: str, remedy: str) -> Expectation:
        return _expect(in_set, what, remedy, column=column, value_set=[True])

    between, in_set = gxe.ExpectColumnValuesToBeBetween, gxe.ExpectColumnValuesToBeInSet
    null, not_null = gxe.ExpectColumnValuesToBeNull, gxe.ExpectColumnValuesToNotBeNull
    normal, anomalous = Column("label") == "normal", Column("label") == "anomalous"

    limits = params.validation
    low, high, aspect = limits.min_side, limits.max_side, limits.max_aspect
    images, share = limits.min_images_per_split, limits.min_label_share
    given = {"train": 1.0, "validation": params.split.validation, "test": params.split.test}
    splits = [split for split in SPLITS if given[split] > 0 or (table["split"] == split).any()]
    kinds = params.sft.kinds
    defects_alone = kinds and not (table["label"] == "normal").any()  # there are kinds to learn
    labels, held_out = ["anomalous"] if defects_alone else list(get_args(Label)), params.split.holdout_categories
    if tile := params.tile.size:  # a model sees tiles then
        sides = table[["width", "height"]].clip(upper=tile)
        table["aspect"] = sides.max(axis=1) / sides.min(axis=1).clip(lower=1)
    in_train = table[(table["split"] == "train") & table["label"].isin(labels)].groupby("product")["label"].nunique()
    complete = {*in_train.index[in_train == len(labels)], *table["product"][table["category"].isin(held_out)]}
    in_test = {
        product
        for product, found in table[table["split"] == "test"].groupby("product")["label"]
        if all((found == label).sum() >= limits.min_category_images for label in labels)
    }

    again = "convert the data set again"
    relabel = "correct the label or the annotation"
    frame = "make them [x1, y1, x2, y2], half-open, in pixels of the original image"
    agree = f"use the settings of convert that the shards were made with, or {again}"
    resize = "resize or remove these, or change validation.min_side or validation.max_side"
    resize += "" if params.tile.size else "; the defects of large ones want tile.size"
    crop = "crop or remove these, or change validation.max_aspect"
    more = "add images, change the section split, or lower validation.min_images_per_split"
    apart = "put these images into one split, or remove all but one"
    judged = "add images of the missing label, or lower validation.min_category_images"
    balance = "add images of the rarer label, or lower validation.min_label_share"
    lacking = "add images of the missing label, or change the section split"
    if not (table["label"] == "normal").any():
        lacking = "add normal images, or set sft.kinds to true, and the model learns to tell the kinds of defects"
    elif not (table["label"] == "anomalous").any():
        lacking = "add images of defects: from normal ones alone there is nothing to learn here"

    suite = [
        _expect(not_null, f"every image has its {name}", again, column=name)
        for name in shards.SMALL
        if name not in ("defect", "boxes", "group")
    ]
    suite += [
        _expect(gxe.ExpectColumnValuesToBeUnique, "ids are unique", "remove the doubles", column="id"),
        _expect(in_set, "the label is one that is known", relabel, column="label", value_set=list(get_args(Label))),
        holds("split_is_of_file", "the split is the one that the file is named after", again),
        holds("image_decodes", "the image decodes", f"replace or remove it, and {again}"),
        holds("image_has_stated_size", "the image has the stated width and height", again),
        _expect(between, f"width is {low} to {high}", resize, column="width", min_value=low, max_value=high),
        _expect(between, f"height is {low} to {high}", resize, column="height", min_value=low, max_value=high),
        _expect(between, f"aspect ratio is at most {aspect:g}", crop, column="aspect", max_value=aspect),
        _expect(null, "normal images have no defect type", relabel, column="defect", row_condition=normal),
        _expect(in_set, "normal images have no box", relabel, column="box_count", value_set=[0], row_condition=normal),
        _expect(
            in_set,
            "anomalous images that have a mask have boxes",
            relabel,
            column="marked",
            value_set=[True],
            row_condition=anomalous,
        ),
        _expect(
            between,
            "anomalous images have boxes",
            "mark the defects, or train and evaluate on the label alone: these images count in no IoU",
            "warning",
            column="box_count",
            min_value=1,
            row_condition=anomalous,
        ),
        _expect(
            not_null,
            "anomalous images have a defect type",
            "name it, or metrics by defect type leave them out",
            "warning",
            column="defect",
            row_condition=anomalous,
        ),
        holds("boxes_inside_image", "boxes lie inside the image", frame),
        holds("boxes_have_area", "boxes have an area", frame),
        holds("mask_fits_image", "the mask decodes and has one channel and the image's size", again),
        holds("mask_agrees_with_label", "the mask shows a defect if and only if the label is anomalous", relabel),
        holds("boxes_hold_mask", "there is something of the mask in every box", agree),
        holds("boxes_cover_mask", f"defects of {params.convert.min_area} mask pixels and more lie in boxes", agree),
        _expect(
            between, "images with the same pixels are in one split", apart, column="splits_with_pixels", max_value=1
        ),
        _expect(
            between,
            "images with the same pixels have the same label",
            f"correct the label of one, or remove both, and {again}",
            column="labels_of_pixels",
            max_value=1,
        ),
        _expect(between, "images of one part are in one split", again, column="splits_with_part", max_value=1),
        _expect(
            gxe.ExpectColumnDistinctValuesToContainSet,
            f"train has {' and '.join(labels)} images",
            lacking,
            column="label",
            value_set=labels,
            row_condition=Column("split") == "train",
        ),
    ]
    if kinds:
        suite += _kinds(table)
    if params.split.near_duplicates:
        suite.append(
            _expect(
                null,
                "near-identical images are in one split",
                f"{apart}; if they show different parts, set split.near_duplicates to false",
                column="twin_in_other_split",
            )
        )
    if held_out:
        suite.append(
            _expect(
                in_set,
                "held-out categories are in test alone",
                again,
                column="split",
                value_set=["test"],
                row_condition=Column("category").is_in(held_out),
            )
        )
    if "test" in splits and limits.min_category_images:
        what = f"every category has {limits.min_category_images} and more images of each label in test"
        suite.append(_expect(in_set, what, judged, column="product", value_set=sorted(in_test)))
    for split in splits:
        suite += [
            _expect(
                gxe.ExpectTableRowCountToBeBetween,
                f"{split} has at least {images} images",
                more,
                min_value=images,
                row_condition=Column("split") == split,
            ),
            _expect(
                gxe.ExpectColumnMeanToBeBetween,
                f"{split} has a share of anomalous images from {share:g} to {1 if defects_alone else 1 - share:g}",
                balance,
                column="is_anomalous",
                min_value=share,
                max_value=1 if defects_alone else 1 - share,
                row_condition=Column("split") == split,
            ),
        ]
    return [*suite, *_notices(table, complete, held_out)]


def _kinds(table: pd.DataFrame) -> list[Expectation]:
    """What is expected of the defect types of train where the model is to name them (`sft.kinds`)."""
    from great_expectations import expectations as gxe
    from great_expectations.expectations.row_conditions import Column

    train = Column("split") == "train"
    single = {*kinds_.single(table["defect"][table["split"] == "train"].dropna())}  # of "dent+scratch" its parts
    table["kind"] = table["defect"].map(
        lambda defect: kind if (kind := kinds_.written(defect)) in single else None, na_action="ignore"
    )
    return [
        _expect(
            gxe.ExpectColumnUniqueValueCountToBeBetween,
            f"train has {kinds_.FEWEST} to {kinds_.MOST} kinds of defects for the model to name",
            "name the defects, join rare kinds, or set sft.kinds to false",
            column="kind",
            min_value=kinds_.FEWEST,
            max_value=kinds_.MOST,
            row_condition=train,
        ),
        _expect(
            gxe.ExpectColumnValueLengthsToBeBetween,
            f"names of kinds have at most {kinds_.LONGEST} characters",
            "shorten them in the data set, or set sft.kinds to false",
            column="kind",
            max_value=kinds_.LONGEST,
            row_condition=train,
        ),
    ]


def _notices(table: pd.DataFrame, complete: set[str], held_out: Sequence[str]) -> list[Expectation]:
    """Expectations whose failure is a warning: the images are usable, and a person should look at them.

    Args:
        table: One row an image.
        complete: The products with both labels in train.
        held_out: The categories that are wholly test.
    """
    from great_expectations import expectations as gxe
    from great_expectations.expectations.row_conditions import Column

    def notice(kind: Callable[..., Expectation], what: str, remedy: str, **arguments: Any) -> Expectation:
        return _expect(kind, what, remedy, "warning", **arguments)

    between, in_set = gxe.ExpectColumnValuesToBeBetween, gxe.ExpectColumnValuesToBeInSet
    null = gxe.ExpectColumnValuesToBeNull
    known = table[table["label"] == "anomalous"]
    by_kind = known.assign(kind=known["defect"].map(kinds_of, na_action="ignore")).explode("kind")
    away = by_kind["category"].isin(held_out)
    shared = by_kind[~away].groupby("kind")["split"].nunique()
    kinds = {*shared.index[shared > 1], *by_kind["kind"][away].dropna()}
    several = [defect for defect in known["defect"].dropna().unique() if kinds.issuperset(kinds_of(defect))]
    suite = [
        notice(
            in_set,
            "every category has both labels in train",
            "add images of the missing label, or expect less of these categories",
            column="product",
            value_set=sorted(complete),
        ),
        notice(
            null,
            "near-identical images have the same label",
            "compare the two, and correct the label of one if they show the same part",
            column="twin_in_other_label",
        ),
        notice(null, "every image is there once", "remove the copies, which count several times", column="copy_of"),
        notice(
            in_set,
            "every box covers something",
            "remove boxes over blank parts of the image, and those less than 2 pixels wide or high",
            column="boxes_cover_something",
            value_set=[True],
        ),
        notice(
            between,
            "no box covers the whole image",
            "mark the defect itself: a box round everything does not say where it is",
            column="largest_box",
            max_value=_WHOLE,
        ),
        notice(
            in_set,
            "the image is neither black nor white all over",
            "look at the exposure, and at how images of 16 bits were scaled",
            column="exposure",
            value_set=["fair"],
        ),
        notice(
            in_set,
            "no category or defect type has the name of its file",
            "look at the columns or folders that they come from",
            column="names_are_of_file",
            value_set=[False],
        ),
    ]
    if table["split"].nunique() > 1:
        suite.append(
            notice(
                in_set,
                "every defect type is in more than one split",
                "add images of it, or it is trained on and never judged, or judged and never trained on",
                column="defect",
                value_set=sorted(several),
                row_condition=Column("label") == "anomalous",
            )
        )
    return suite


def _tiling(table: pd.DataFrame, defects: Sequence[tiles.Defect], params: Params) -> list[Expectation]:
    """Whether `tile.size` can do something, and whether the model sees small defects large enough."""
    from great_expectations import expectations as gxe
    from great_expectations.expectations.row_conditions import Column

    largest, size = gxe.ExpectColumnMaxToBeBetween, params.tile.size
    suite: list[Expectation] = []
    if size:
        table["longer_side"] = table[["width", "height"]].max(axis=1)
        suite += [
            _expect(
                largest,
                f"an image is larger than tile.size, {size}",
                "lower tile.size, or set it to null: no image is cut, tiling does nothing",
                "warning",
                column="longer_side",
                min_value=size + 1,
            ),
            _expect(
                largest,
                "an image in train has boxes, which tile.size needs",
                "mark the defects, or set tile.size to null: without boxes nobody knows which tile is anomalous",
                column="box_count",
                min_value=1,
                row_condition=Column("split") == "train",
            ),
        ]
    pixels = loading.pixels(params.model) or 0
    if proposal := tiles.propose(defects, pixels, size, params.tile.overlap):
        table["seen_side"] = math.floor(10 * proposal.now) / 10
        side = math.isqrt(pixels)
        suite.append(
            _expect(
                largest,
                f"three quarters of the defects are at least {tiles.LEAST_SIDE} pixels wide and high to the model, "
                f"which sees about {side} x {side}",
                f"cut the images: tile.size={proposal.size} makes that {proposal.then:.0f} pixels; {proposal.tiles} "
                f"tiles an image of middling size cost about {proposal.tiles} times the time in evaluation and use",
                "warning",
                column="seen_side",
                min_value=tiles.LEAST_SIDE,
            )
        )
    return suite


def _drift(
    table: pd.DataFrame, train: Mapping[str, Any], before: Mapping[str, Any], params: Params
) -> list[Expectation]:
    """Warnings of drift of the training split, `train`, from an earlier one.

    Shares of categories and of defects are compared by `distance`. Of each figure of the images, the mean must lie
    within `validation.max_shift` standard deviations of the earlier mean: Glass's delta, the difference of the means
    over the standard deviation of the reference group (Glass, "Primary, Secondary, and Meta-Analysis of Research",
    1976), of which 0.2 is called small, 0.5 medium and 0.8 large (Cohen, "Statistical Power Analysis", 1988).
    """
    from great_expectations import expectations as gxe
    from great_expectations.expectations.row_conditions import Column

    limits = params.validation
    remedy = "see `statistics` in both reports; if the line has changed, train and evaluate on new images of it"
    suite = []
    for name in ("categories", "defects"):
        table[f"drift_of_{name}"] = distance(train[name], before[name])
        what = f"the shares of {name} in train are those of the reference, to a distance of {limits.max_drift:g}"
        kind, column = gxe.ExpectColumnMaxToBeBetween, f"drift_of_{name}"
        suite.append(_expect(kind, what, remedy, "warning", column=column, max_value=limits.max_drift))
    for name in _FIGURES:
        mean, deviation = before[name]["mean"], before[name]["deviation"]
        if mean is not None:
            what = f"mean {name} in train is that of the reference, to {limits.max_shift:g} standard deviations"
            room = max(limits.max_shift * deviation, 1e-6)
            suite.append(
                _expect(
                    gxe.ExpectColumnMeanToBeBetween,
                    what,
                    remedy,
                    "warning",
                    column=name,
                    min_value=mean - room,
                    max_value=mean + room,
                    row_condition=Column("split") == "train",
                )
            )
    return suite


def distance(counts: Mapping[str, int], before: Mapping[str, int]) -> float:
    """The Jensen-Shannon distance of two distributions p and q, given as counts; 0 if equal, 1 if they share nothing.

    sqrt(1/2 sum p log2(2 p / (p + q)) + 1/2 sum q log2(2 q / (p + q))): the root of the divergence of Lin ("Divergence
    measures based on the Shannon entropy", IEEE Transactions on Information Theory 37, 1991), which, unlike the
    population stability index (PSI), is finite when a category is new. For small changes it is sqrt(PSI / (8 ln 2)):
    0.13 is a PSI of 0.1, commonly read as some change, and 0.21 one of 0.25, a large one.
    """
    if not counts or not before:
        return float(bool(counts) != bool(before))
    names = sorted({*counts, *before})
    p, q = (np.array([these.get(name, 0) for name in names], float) for these in (counts, before))
    p, q = p / p.sum(), q / q.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [np.where(r > 0, r * np.log2(2 * r / (p + q)), 0).sum() for r in (p, q)]
    return float(np.sqrt(max(0.0, sum(parts) / 2)))


def _run(
    table: pd.DataFrame, suite: list[Expectation]
) -> tuple[ExpectationSuiteValidationResult, dict[str, list[int]]]:
    """The results, in which failing rows go by their ids, and for each expectation the numbers of a few of them."""
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    asset = context.data_sources.add_pandas("shards").add_dataframe_asset("images")
    batch = asset.add_batch_definition_whole_dataframe("all").get_batch(batch_parameters={"dataframe": table})
    result = batch.validate(gx.ExpectationSuite(name="shards", expectations=suite), result_format="COMPLETE")
    ids = table["id"].fillna("without id").tolist()
    failing = {}
    for found in result.results:
        # Great Expectations names failing rows by the index, and adds a query for all of them.
        found.result.pop("unexpected_index_query", None)
        numbers = found.result.get("unexpected_index_list", [])[:MAX_IDS]
        if found.expectation_config and not found.success:
            failing[str(found.expectation_config.description)] = [int(number) for number in numbers[:_PICTURES]]
        for name in ("unexpected_index_list", "partial_unexpected_index_list"):
            found.result[name] = [ids[number] for number in found.result.get(name, [])[:MAX_IDS]]
        # Plain values: Data Docs cannot print numpy's.
        found.result = json.loads(json.dumps(found.to_json_dict()["result"]))
    return result, failing


def _entries(suite: list[Expectation], result: ExpectationSuiteValidationResult) -> list[dict[str, Any]]:
    """The results as plain dicts, in the order of the suite."""
    results = {found.expectation_config.description: found for found in result.results if found.expectation_config}
    entries = []
    for expectation in suite:
        found = results[expectation.description]
        if found.exception_info.get("raised_exception", True):
            raise RuntimeError(f"the expectation {expectation.description!r} failed to run: {found.exception_info}")
        values = [count["value"] for count in found.result.get("partial_unexpected_counts", [])]
        entries.append(
            {
                "what": expectation.description,
                "column": getattr(expectation, "column", None),
                "severity": expectation.severity,
                "success": found.success,
                "failing": found.result.get("unexpected_count"),
                "ids": found.result.get("unexpected_index_list", [])[:MAX_IDS],
                "observed": found.result.get("observed_value", values),
                "remedy": expectation.meta["remedy"] if expectation.meta else None,
            }
        )
    return entries


# What is measured of images: mean and standard deviation of the grey values, 0 to 255, of a thumbnail; pixels.
_FIGURES = ("brightness", "contrast", "width", "height")


def _profile(table: pd.DataFrame) -> dict[str, Any]:
    """What drift is measured by: images of each category and defect, mean and standard deviation of each figure."""
    defects = table["defect"].fillna(table["label"])
    profile: dict[str, Any] = {}
    for name, values in (("categories", table["product"]), ("defects", defects)):
        profile[name] = {str(value): int(count) for value, count in values.value_counts().sort_index().items()}
    for name in _FIGURES:
        figures: Array = table[name].dropna().to_numpy(float)
        profile[name] = {
            "mean": float(figures.mean()) if figures.size else None,
            "deviation": float(figures.std()) if figures.size else None,
        }
    return profile


def _of_file(path: Path) -> dict[str, Any]:
    """The statistics of a report, which `path` is the folder or the `validation.json` of."""
    file = path / "validation.json" if path.is_dir() else path
    try:
        return _checked(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise AdfmError(
            f"validation.reference: {file} is not the report of a validation ({error!r}); make one with "
            "`adfm validate`, or say production, or null."
        ) from error


def _of_production(model: str) -> dict[str, Any] | None:
    """The statistics of the shards that the version in production was trained on; `None` if there are none."""
    import mlflow
    from mlflow.exceptions import MlflowException

    store = mlflow.MlflowClient()
    try:
        version = store.get_model_version_by_alias(model, _PRODUCTION)
        everywhere = [experiment.experiment_id for experiment in store.search_experiments()]
        filter_ = f"tags.validated = '{version.tags['data_fingerprint']}'"
        run = store.search_runs(everywhere, filter_, max_results=1)[0].info
        with TemporaryDirectory() as folder, tracking.store_errors(mlflow.get_tracking_uri()):
            # Not `runs:/`: while its server is down, MLflow reports such a file as missing.
            artifact = f"{run.artifact_uri}/validation/validation.json"
            found = mlflow.artifacts.download_artifacts(artifact, dst_path=folder)
            return _checked(json.loads(Path(found).read_text(encoding="utf-8")))
    except (AdfmError, MlflowException, OSError, ValueError, LookupError, TypeError) as error:
        if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":  # nothing is in production
            print(f"adfm: warning: no drift is measured: production has no report ({error})", file=sys.stderr)
        return None


def _checked(report: Any) -> dict[str, Any]:
    """The statistics of a report; raises `LookupError` or `TypeError` if they are not such as drift is measured by."""
    train = report["statistics"]["train"]
    for name in ("categories", "defects"):
        sum(train[name].values())
    for name in _FIGURES:
        train[name]["mean"], train[name]["deviation"]
    return dict(report["statistics"])


def _log(folder: Path, out: Path, params: Params, passed: bool) -> None:
    """Logs the report. The tag `validated` is what a report of production is found by; see `_of_production`."""
    import mlflow

    tags = {"validated": shards.fingerprint(folder)} if passed else {}
    statistics = json.loads((out / "validation.json").read_text(encoding="utf-8"))["statistics"]
    try:
        with tracking.start_run("validate", params, tags):
            mlflow.log_metrics({f"validation/{name}": statistics[name] for name in ("images", "failed", "warnings")})
            mlflow.log_artifacts(str(out), "validation")
    except AdfmError as error:
        print(f"adfm: warning: the validation is not logged: {error}", file=sys.stderr)


def _statistics(table: pd.DataFrame, entries: list[dict[str, Any]]) -> dict[str, Any]:
    failed = [entry["severity"] for entry in entries if not entry["success"]]
    counts = table.groupby(["split", "label"]).size()
    return {
        "images": len(table),
        "splits": {split: {label: int(counts.get((split, label), 0)) for label in get_args(Label)} for split in SPLITS},
        "categories": int(table["product"].nunique()),
        "expectations": len(entries),
        "failed": failed.count("critical"),
        "warnings": failed.count("warning"),
    }


def _pictures(folder: Path, table: pd.DataFrame, failing: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Figures of the first rows that fail each expectation, as many as a page can hold."""
    wanted = {number for numbers in failing.values() for number in numbers}
    figures = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on damaged and on huge images
        for number, row in pictures.rows(folder, wanted):
            lines = table[["id", "source", "product", "label", "split"]].iloc[number].fillna("?").tolist()
            picture = pictures.of_row(row, _PICTURE_SIDE)
            figures[number] = pictures.figure(picture, lines[0], lines[1], " · ".join(lines[2:]))
    shown, length = {}, 0
    for what, numbers in failing.items():
        shown[what] = "".join(figures[number] for number in numbers)
        length += len(shown[what])
        if length > _PICTURES_LENGTH:
            shown[what] = ""
    return shown


_HEAD = f"""<meta http-equiv="Content-Security-Policy" content="{pictures.POLICY}">
<style>{pictures.STYLE}</style>"""
_HEAD += """<style>
:root { color-scheme: light dark }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }
h5 { font: 600 1.1em monospace; margin: 1.6em 0 .4em } h6 { font-size: 1em; margin: 1em 0 .4em }
ul { list-style: none; padding: 0; columns: 4 }
a { color: light-dark(#0a58ca, #78b4ff); text-decoration: none } i { font-style: normal }
table { border-collapse: collapse; width: 100% } td { overflow-wrap: anywhere }
th, td { border-bottom: 1px solid #8884; padding: .35em .6em; text-align: left; vertical-align: top }
.table-responsive > table > * > tr > :first-child:not(:nth-last-child(2)) { width: 4em }
.table-responsive > table > * > tr > :nth-child(3) { width: 11em }
.show-scrollbars { max-height: 20em; overflow: auto } .text-danger { color: light-dark(#b02a37, #ff8078) }
.text-success { color: light-dark(#146c43, #56d364) }
.fa-times::before { content: "\\2717" } .fa-check-circle::before { content: "\\2713" }
.sticky-top, .sticky > :first-child, .collapse, [data-toggle="collapse"] { display: none }
</style></head>"""


def _page(result: ExpectationSuiteValidationResult, entries: list[dict[str, Any]], shown: Mapping[str, str]) -> str:
    """What failed, with pictures, above Great Expectations' Data Docs without scripts and style sheets from the web."""
    from great_expectations.render.renderer import ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaPageView

    result = copy.deepcopy(result)
    for found in result.results:  # the names of a data set are no markup
        found.result = json.loads(html.escape(json.dumps(found.result), quote=False))
    view: Any = DefaultJinjaPageView()  # untyped
    page: str = view.render(ValidationResultsPageRenderer().render(result))
    page = re.sub(r"(?s)<(script|style|footer)\b.*?</\1>|<(link|img)\b[^>]*>", "", page)
    page = re.sub(r'(?s)<a href="\.\./[^>]*>(.*?)</a>', r"\1", page)  # to pages of a site that is not there
    top = "".join(
        f'<p>{html.escape(_line(entry))}</p><div class="pictures">{shown[entry["what"]]}</div>'
        for entry in _failed(entries)
    )
    top = top or "<p>All expectations hold.</p>"
    page = page.replace("</head>", _HEAD, 1).replace("<body>", f"<body><h2>Validation of the shards</h2>{top}", 1)
    return re.sub(r"\s*\n\s*", "\n", page)
