"""What shards must satisfy before anything is trained on them: `adfm validate SHARDS`.

Every row of the shards becomes a row of a small table: its own columns and what its image, mask and boxes are found to
be (`_facts`). The expectations (`_suite`) are about that table. A failed one of severity `critical` stops a run, one of
severity `warning` does not. Only this file knows Great Expectations.
"""

from __future__ import annotations

import copy
import hashlib
import html
import io
import json
import math
import os
import re
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from adfm.data import masks, shards
from adfm.errors import AdfmError
from adfm.files import atomic_folder
from adfm.params import Convert, Params
from adfm.records import SPLITS, Label

if TYPE_CHECKING:
    import pandas as pd
    from great_expectations.core import ExpectationSuiteValidationResult
    from great_expectations.expectations.expectation import Expectation

Array = NDArray[Any]

# Ids of failing records that `validation.json` lists for an expectation; their number is always given.
MAX_IDS = 1000
# Ids that a line of `failures` shows.
_SHOWN_IDS = 10


def validate(folder: Path, out: Path, params: Params) -> bool:
    """Checks shards and writes the report, whether they pass or not.

    `out` holds `validation.json` (`passed`, `statistics`, and for each of the `expectations` what it says, column,
    severity, success, number and ids of failing images, what was observed, and the remedy), and the same as Great
    Expectations' Data Docs in `index.html`, a page that needs no network.

    Args:
        folder: The shards.
        out: Folder of the report.
        params: The section `validate`; `convert` and `split` say what is expected of boxes and of which splits.

    Returns:
        Whether every critical expectation holds.

    Raises:
        AdfmError: There are no shards, they have other columns, or one cannot be read.
    """
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # Great Expectations reads it when it is imported
    table = _table(folder, params.convert)
    suite = _suite(table, params)
    result = _run(table, suite)
    entries = _entries(suite, result)
    passed = all(entry["success"] for entry in entries if entry["severity"] == "critical")
    report = {"passed": passed, "statistics": _statistics(table, entries), "expectations": entries}
    with atomic_folder(out) as unfinished:
        (unfinished / "validation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (unfinished / "index.html").write_text(_page(result, _lines(entries)), encoding="utf-8")
    return passed


def failures(out: Path) -> list[str]:
    """One line for each expectation that did not hold, the critical ones first: what, how many, which, what to do."""
    return _lines(json.loads((out / "validation.json").read_text(encoding="utf-8"))["expectations"])


def _lines(entries: list[dict[str, Any]]) -> list[str]:
    failed = [entry for entry in entries if not entry["success"]]
    return [_line(entry) for entry in sorted(failed, key=lambda entry: bool(entry["severity"] == "warning"))]


def _line(entry: dict[str, Any]) -> str:
    found = f"observed {entry['observed']}"
    if entry["failing"] is not None:
        more = ", …" if entry["failing"] > _SHOWN_IDS else ""
        found = f"{entry['failing']} failing: {', '.join(entry['ids'][:_SHOWN_IDS])}{more}"
        values = [str(value) for value in entry["observed"] if value not in (None, False)]
        if values and entry["column"] != "id":
            found += f" ({entry['column']}: {', '.join(values[:_SHOWN_IDS])})"
    prefix = "warning: " if entry["severity"] == "warning" else ""
    return f"{prefix}{entry['what']}: {found}; {entry['remedy']}."


def _table(folder: Path, settings: Convert) -> pd.DataFrame:
    import pandas as pd

    small = shards.table(folder).drop_columns(["boxes"]).to_pandas()
    if small.empty:
        raise AdfmError(f"{folder}: the shards hold no images; make them anew with `adfm convert`.")
    facts: list[dict[str, Any]] = []
    progress = tqdm(total=len(small), desc="validate", unit="image", disable=None)
    with progress, ThreadPoolExecutor() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on damaged and on huge images: the table says what matters of it
        for split in SPLITS:
            if any(folder.glob(f"{split}-*.parquet")):
                for batch in shards.batches(folder, split, shards.SCHEMA.names):
                    facts += pool.map(partial(_facts, split=split, settings=settings), batch.to_pylist())
                    progress.update(batch.num_rows)
    table: pd.DataFrame = pd.concat([small, pd.DataFrame(facts)], axis=1)
    table["product"] = table["dataset"] + "/" + table["category"]
    table["is_anomalous"] = (table["label"] == "anomalous").astype(float)
    table["splits_with_image"] = table.groupby("image_sha256")["split"].transform("nunique")
    # Great Expectations names failing rows by the index, and takes very long over an index that has a name.
    return table.set_index(table["id"].fillna("without id")).rename_axis(index=None)


def _facts(row: dict[str, Any], split: str, settings: Convert) -> dict[str, Any]:
    """What is found of one row of a shard of `split`; `None` where a question does not arise."""
    content = row["image"]["bytes"] if row["image"] else None
    image = _decoded(content)
    width, height = size = row["width"] or 0, row["height"] or 0
    boxes = np.array(row["boxes"] or [], dtype=float).reshape(-1, 4)
    inside = bool((boxes >= 0).all() and (boxes <= [width, height, width, height]).all())
    solid = bool((boxes[:, :2] < boxes[:, 2:]).all())
    return {
        "split_is_of_file": row["split"] == split,
        "image_sha256": hashlib.sha256(content).hexdigest() if content else None,
        "image_decodes": image is not None,
        "image_has_stated_size": image.size == size if image else None,
        "aspect": max(size) / max(1, min(size)),
        "box_count": len(boxes),
        "boxes_inside_image": inside,
        "boxes_have_area": solid,
        **_mask_facts(row, size, boxes if inside and solid else boxes[:0], settings),
    }


def _mask_facts(row: dict[str, Any], size: tuple[int, int], boxes: Array, settings: Convert) -> dict[str, bool | None]:
    facts: dict[str, bool | None] = dict.fromkeys(
        ("mask_fits_image", "mask_agrees_with_label", "boxes_hold_mask", "boxes_cover_mask")
    )
    if row["mask"]:
        mask = _decoded(row["mask"]["bytes"])
        facts["mask_fits_image"] = mask is not None and mask.mode == "L" and mask.size == size
        if mask and facts["mask_fits_image"]:
            pixels: Array = np.asarray(mask)
            facts["mask_agrees_with_label"] = bool(pixels.any()) == (row["label"] == "anomalous")
            if len(boxes) and pixels.any():
                parts = [pixels[int(y1) : math.ceil(y2), int(x1) : math.ceil(x2)] for x1, y1, x2, y2 in boxes]
                facts["boxes_hold_mask"] = all(part.any() for part in parts)
                # What conversion would box if it merged nothing; merging makes boxes larger and loses none.
                defects = masks.to_boxes(pixels, 0, settings.connectivity, settings.min_area)
                signs = np.array([1, 1, -1, -1])  # of the outer box, x1, y1, -x2 and -y2 are the smaller ones
                facts["boxes_cover_mask"] = all((boxes * signs <= defect * signs).all(1).any() for defect in defects)
    return facts


def _decoded(content: bytes | None) -> Image.Image | None:
    try:
        image = Image.open(io.BytesIO(content or b""))
        image.load()
        return image
    except Exception:  # a damaged file makes Pillow raise nearly anything
        return None


def _suite(table: pd.DataFrame, params: Params) -> list[Expectation]:
    """The expectations, in the order of the report; their descriptions are unique."""
    from great_expectations import expectations as gxe
    from great_expectations.expectations.row_conditions import Column

    def expect(
        kind: Callable[..., Expectation], what: str, remedy: str, severity: str = "critical", **arguments: Any
    ) -> Expectation:
        return kind(description=what, meta={"remedy": remedy}, severity=severity, **arguments)

    def holds(column: str, what: str, remedy: str) -> Expectation:
        return expect(in_set, what, remedy, column=column, value_set=[True])

    between, in_set = gxe.ExpectColumnValuesToBeBetween, gxe.ExpectColumnValuesToBeInSet
    null, not_null = gxe.ExpectColumnValuesToBeNull, gxe.ExpectColumnValuesToNotBeNull
    normal, anomalous = Column("label") == "normal", Column("label") == "anomalous"

    limits = params.validate_
    low, high, aspect = limits.min_side, limits.max_side, limits.max_aspect
    images, share = limits.min_images_per_split, limits.min_label_share
    given = {"train": 1.0, "validation": params.split.validation, "test": params.split.test}
    splits = [split for split in SPLITS if given[split] > 0 or (table["split"] == split).any()]
    labels = list(get_args(Label))
    in_train = table[(table["split"] == "train") & table["label"].isin(labels)].groupby("product")["label"].nunique()
    complete = sorted(in_train.index[in_train == len(labels)])

    again = "convert the data set again"
    relabel = "correct the label or the annotation"
    frame = "make them [x1, y1, x2, y2], half-open, in pixels of the original image"
    agree = f"use the settings of convert that the shards were made with, or {again}"
    resize = "resize or remove these, or change validate.min_side or validate.max_side"
    crop = "crop or remove these, or change validate.max_aspect"
    more = "add images, change the section split, or lower validate.min_images_per_split"
    balance = "add images of the rarer label, or lower validate.min_label_share"

    suite = [
        expect(not_null, f"every image has its {name}", again, column=name)
        for name in shards.SMALL
        if name not in ("defect", "boxes")
    ]
    suite += [
        expect(gxe.ExpectColumnValuesToBeUnique, "ids are unique", "remove the doubles", column="id"),
        expect(in_set, "the label is one that is known", relabel, column="label", value_set=labels),
        holds("split_is_of_file", "the split is the one that the file is named after", again),
        holds("image_decodes", "the image decodes", f"replace or remove it, and {again}"),
        holds("image_has_stated_size", "the image has the stated width and height", again),
        expect(between, f"width is {low} to {high}", resize, column="width", min_value=low, max_value=high),
        expect(between, f"height is {low} to {high}", resize, column="height", min_value=low, max_value=high),
        expect(between, f"aspect ratio is at most {aspect:g}", crop, column="aspect", max_value=aspect),
        expect(null, "normal images have no defect type", relabel, column="defect", row_condition=normal),
        expect(in_set, "normal images have no box", relabel, column="box_count", value_set=[0], row_condition=normal),
        expect(
            between, "anomalous images have boxes", relabel, column="box_count", min_value=1, row_condition=anomalous
        ),
        expect(
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
        expect(
            between,
            "byte-identical images are in one split",
            "remove the doubles, or put them in one split",
            column="splits_with_image",
            max_value=1,
        ),
    ]
    for split in splits:
        suite += [
            expect(
                gxe.ExpectTableRowCountToBeBetween,
                f"{split} has at least {images} images",
                more,
                min_value=images,
                row_condition=Column("split") == split,
            ),
            expect(
                gxe.ExpectColumnMeanToBeBetween,
                f"{split} has a share of anomalous images from {share:g} to {1 - share:g}",
                balance,
                column="is_anomalous",
                min_value=share,
                max_value=1 - share,
                row_condition=Column("split") == split,
            ),
        ]
    suite.append(
        expect(
            in_set,
            "every category has both labels in train",
            "add images of the missing label, or expect less of these categories",
            "warning",
            column="product",
            value_set=complete,
        )
    )
    return suite


def _run(table: pd.DataFrame, suite: list[Expectation]) -> ExpectationSuiteValidationResult:
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    asset = context.data_sources.add_pandas("shards").add_dataframe_asset("images")
    batch = asset.add_batch_definition_whole_dataframe("all").get_batch(batch_parameters={"dataframe": table})
    result = batch.validate(gx.ExpectationSuite(name="shards", expectations=suite), result_format="COMPLETE")
    for found in result.results:
        # Plain values: Data Docs cannot print numpy's.
        found.result = json.loads(json.dumps(found.to_json_dict()["result"]))
    return result


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


# No script runs and nothing is fetched, whatever a category is called.
_HEAD = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em }
h5 { font: 600 1.1em monospace; margin: 1.6em 0 .4em } h6 { font-size: 1em; margin: 1em 0 .4em }
ul { list-style: none; padding: 0; columns: 4 } a { color: #0a58ca; text-decoration: none } i { font-style: normal }
table { border-collapse: collapse; width: 100% } td { overflow-wrap: anywhere }
th, td { border-bottom: 1px solid #ddd; padding: .35em .6em; text-align: left; vertical-align: top }
.table-responsive > table > * > tr > :first-child:not(:nth-last-child(2)) { width: 4em }
.table-responsive > table > * > tr > :nth-child(3) { width: 11em }
.show-scrollbars { max-height: 20em; overflow: auto } .text-danger { color: #b02a37 } .text-success { color: #146c43 }
.fa-times::before { content: "\\2717" } .fa-check-circle::before { content: "\\2713" }
.sticky-top, .sticky > :first-child, .collapse, [data-toggle="collapse"] { display: none }
</style></head>"""


def _page(result: ExpectationSuiteValidationResult, lines: list[str]) -> str:
    """What failed, above Great Expectations' Data Docs page without its scripts and style sheets from the web."""
    from great_expectations.render.renderer import ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaPageView

    result = copy.deepcopy(result)
    for found in result.results:  # the names of a data set are no markup
        found.result = json.loads(html.escape(json.dumps(found.result), quote=False))
    view: Any = DefaultJinjaPageView()  # untyped
    page: str = view.render(ValidationResultsPageRenderer().render(result))
    page = re.sub(r"(?s)<(script|style|footer)\b.*?</\1>|<(link|img)\b[^>]*>", "", page)
    page = re.sub(r'(?s)<a href="\.\./[^>]*>(.*?)</a>', r"\1", page)  # to pages of a site that is not there
    top = "".join(f"<p>{html.escape(line)}</p>" for line in lines or ["All expectations hold."])
    page = page.replace("</head>", _HEAD, 1).replace("<body>", f"<body><h2>Validation of the shards</h2>{top}", 1)
    return re.sub(r"\s*\n\s*", "\n", page)
