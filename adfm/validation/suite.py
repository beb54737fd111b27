"""Data validation suite (Great Expectations): define the expectations of shards, and run them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from adfm.data import shards, tiles
from adfm.data.splits import kinds_of
from adfm.method import kinds as kinds_
from adfm.models import loading
from adfm.params import Params
from adfm.records import SPLITS, Label

if TYPE_CHECKING:
    import pandas as pd
    from great_expectations.core import ExpectationSuiteValidationResult
    from great_expectations.expectations.expectation import Expectation

MAX_IDS = 1000  # of failing records that `validation.json` lists for an expectation; their number is always given
EXAMPLES = 4  # images of an expectation that the page shows
_WHOLE = 0.95  # share of the image above which a box is taken for one round everything

# Classes of great_expectations.expectations.
_BETWEEN, _IN_SET = "ExpectColumnValuesToBeBetween", "ExpectColumnValuesToBeInSet"
_NULL, _NOT_NULL = "ExpectColumnValuesToBeNull", "ExpectColumnValuesToNotBeNull"
_CONTAIN, _ROWS = "ExpectColumnDistinctValuesToContainSet", "ExpectTableRowCountToBeBetween"
_DISTINCT, _LENGTHS = "ExpectColumnUniqueValueCountToBeBetween", "ExpectColumnValueLengthsToBeBetween"
MAX, MEAN = "ExpectColumnMaxToBeBetween", "ExpectColumnMeanToBeBetween"


def expect(
    kind: str, column: str | None, what: str, remedy: str, *, where: Mapping[str, Any] | None = None, **arguments: Any
) -> Expectation:
    """Return an expectation whose failure stops a run.

    Args:
        kind: A class of `great_expectations.expectations`.
        column: The column that it is about; `None`: the table.
        what: What is expected, unique in the suite.
        remedy: What to do where it does not hold.
        where: Only rows that have this value, or one of a list of values, in a column.
        **arguments: Those of the class, and `severity`.
    """
    from great_expectations import expectations
    from great_expectations.expectations.row_conditions import Column

    for name, value in (where or {}).items():
        condition = Column(name).is_in(value) if isinstance(value, list) else Column(name) == value
        arguments["row_condition"] = condition
    if column:
        arguments["column"] = column
    arguments = {"severity": "critical"} | arguments
    expectation: Expectation = getattr(expectations, kind)(description=what, meta={"remedy": remedy}, **arguments)
    return expectation


def warn(*args: Any, **arguments: Any) -> Expectation:
    """Return an expectation, as `expect`, whose failure is a warning: a person should check these images."""
    return expect(*args, **arguments, severity="warning")


def expectations(table: pd.DataFrame, defects: Sequence[tiles.Defect], params: Params) -> list[Expectation]:
    """Return the expectations of a table of facts, in the order of the report.

    The table, which `facts.measure` returns, gets further columns, which some expectations are about.
    """
    limits, kinds, held_out = params.validation, params.sft.kinds, params.split.holdout_categories
    low, high, aspect = limits.min_side, limits.max_side, limits.max_aspect
    has = {label: bool((table["label"] == label).any()) for label in get_args(Label)}
    defects_alone = kinds and not has["normal"]  # there are kinds to learn
    labels = ["anomalous"] if defects_alone else list(get_args(Label))
    if tile := params.tile.size:  # a model sees tiles then
        sides = table[["width", "height"]].clip(upper=tile)
        table["aspect"] = sides.max(axis=1) / sides.min(axis=1).clip(lower=1)

    again = "convert the data set again"
    relabel = "correct the label or the annotation"
    mark = "mark the defects, or train and evaluate on the label alone: these images count in no IoU"
    name_it = "name it, or metrics by defect type leave them out"
    frame = "make them [x1, y1, x2, y2], half-open, in pixels of the original image"
    agree = f"use the settings of convert that the shards were made with, or {again}"
    resize = "resize or remove these, or change validation.min_side or validation.max_side"
    resize += "" if tile else "; the defects of large ones want tile.size"
    crop = "crop or remove these, or change validation.max_aspect"
    apart = "put these images into one split, or remove all but one"
    parts = f"{apart}; if they show different parts, set split.near_duplicates to false"
    one_label = f"correct the label of one, or remove both, and {again}"
    missing = "add images of the missing label, or change the section split"
    if not has["normal"]:
        missing = "add normal images, or set sft.kinds to true, and the model learns to tell the kinds of defects"
    elif not has["anomalous"]:
        missing = "add images of defects: from normal ones alone there is nothing to learn here"
    normal, anomalous, train = {"label": "normal"}, {"label": "anomalous"}, {"split": "train"}

    def holds(column: str, what: str, remedy: str, where: Mapping[str, Any] | None = None) -> Expectation:
        return expect(_IN_SET, column, what, remedy, value_set=[True], where=where)

    suite = [
        *(expect(_NOT_NULL, name, f"every image has its {name}", again) for name in shards.COLUMNS.required),
        expect("ExpectColumnValuesToBeUnique", "id", "ids are unique", "remove the doubles"),
        expect(_IN_SET, "label", "the label is one that is known", relabel, value_set=list(get_args(Label))),
        holds("split_is_of_file", "the split is the one that the file is named after", again),
        holds("image_decodes", "the image decodes", f"replace or remove it, and {again}"),
        holds("image_has_stated_size", "the image has the stated width and height", again),
        expect(_BETWEEN, "width", f"width is {low} to {high}", resize, min_value=low, max_value=high),
        expect(_BETWEEN, "height", f"height is {low} to {high}", resize, min_value=low, max_value=high),
        expect(_BETWEEN, "aspect", f"aspect ratio is at most {aspect:g}", crop, max_value=aspect),
        expect(_NULL, "defect", "normal images have no defect type", relabel, where=normal),
        expect(_IN_SET, "box_count", "normal images have no box", relabel, value_set=[0], where=normal),
        holds("marked", "anomalous images that have a mask have boxes", relabel, anomalous),
        warn(_BETWEEN, "box_count", "anomalous images have boxes", mark, min_value=1, where=anomalous),
        warn(_NOT_NULL, "defect", "anomalous images have a defect type", name_it, where=anomalous),
        holds("boxes_inside_image", "boxes lie inside the image", frame),
        holds("boxes_have_area", "boxes have an area", frame),
        holds("mask_fits_image", "the mask decodes and has one channel and the image's size", again),
        holds("mask_agrees_with_label", "the mask shows a defect if and only if the label is anomalous", relabel),
        holds("boxes_hold_mask", "there is something of the mask in every box", agree),
        holds("boxes_cover_mask", f"defects of {params.convert.min_area} mask pixels and more lie in boxes", agree),
        expect(_BETWEEN, "splits_with_pixels", "images with the same pixels are in one split", apart, max_value=1),
        expect(_BETWEEN, "labels_of_pixels", "images with the same pixels have the same label", one_label, max_value=1),
        expect(_BETWEEN, "splits_with_part", "images of one part are in one split", again, max_value=1),
        expect(_CONTAIN, "label", f"train has {' and '.join(labels)} images", missing, value_set=labels, where=train),
        *(_of_kinds(table) if kinds else ()),
    ]
    if params.split.near_duplicates:
        suite.append(expect(_NULL, "twin_in_other_split", "near-identical images are in one split", parts))
    if held_out:
        what = "held-out categories are in test alone"
        suite.append(expect(_IN_SET, "split", what, again, value_set=["test"], where={"category": held_out}))
    suite += _of_splits(table, labels, defects_alone, params)
    return [*suite, *_warnings(table, labels, held_out), *_of_tiling(table, defects, params)]


def _of_splits(table: pd.DataFrame, labels: Sequence[str], defects_alone: bool, params: Params) -> list[Expectation]:
    limits, suite = params.validation, []
    given = {"train": 1.0, "validation": params.split.validation, "test": params.split.test}
    # A split without a share is not expected, unless the data set has it.
    splits = [split for split in SPLITS if given[split] > 0 or (table["split"] == split).any()]
    if "test" in splits and (least := limits.min_category_images):
        in_test = table[table["split"] == "test"].groupby("product")["label"]
        enough = [name for name, its in in_test if all((its == label).sum() >= least for label in labels)]
        what = f"every category has {least} and more images of each label in test"
        remedy = "add images of the missing label, or lower validation.min_category_images"
        suite.append(expect(_IN_SET, "product", what, remedy, value_set=enough))
    images, low = limits.min_images_per_split, limits.min_label_share
    high = 1 if defects_alone else 1 - low
    more = "add images, change the section split, or lower validation.min_images_per_split"
    balance = "add images of the rarer label, or lower validation.min_label_share"
    for split in splits:
        where, what = {"split": split}, f"{split} has a share of anomalous images from {low:g} to {high:g}"
        suite += [
            expect(_ROWS, None, f"{split} has at least {images} images", more, min_value=images, where=where),
            expect(MEAN, "is_anomalous", what, balance, min_value=low, max_value=high, where=where),
        ]
    return suite


def _of_kinds(table: pd.DataFrame) -> list[Expectation]:
    """Return the expectations of the defect types of train where the model is to name them (`sft.kinds`)."""
    single = {*kinds_.single(table["defect"][table["split"] == "train"].dropna())}  # of "dent+scratch" its parts
    kind = table["defect"].map(kinds_.written, na_action="ignore")
    table["kind"] = kind.where(kind.isin(single), None)
    few, most, longest, train = kinds_.FEWEST, kinds_.MOST, kinds_.LONGEST, {"split": "train"}
    what = f"train has {few} to {most} kinds of defects for the model to name"
    join = "name the defects, join rare kinds, or set sft.kinds to false"
    names = f"names of kinds have at most {longest} characters"
    shorten = "shorten them in the data set, or set sft.kinds to false"
    return [
        expect(_DISTINCT, "kind", what, join, min_value=few, max_value=most, where=train),
        expect(_LENGTHS, "kind", names, shorten, max_value=longest, where=train),
    ]


def _warnings(table: pd.DataFrame, labels: Sequence[str], held_out: Sequence[str]) -> list[Expectation]:
    """Return the expectations of images that are usable, but may not be what their owner means."""
    in_train = table[(table["split"] == "train") & table["label"].isin(labels)].groupby("product")["label"].nunique()
    complete = {*in_train.index[in_train == len(labels)], *table["product"][table["category"].isin(held_out)]}
    both = "add images of the missing label, or expect less of these categories"
    compare = "compare the two, and correct the label of one if they show the same part"
    blank = "remove boxes over blank parts of the image, and those less than 2 pixels wide or high"
    whole = "mark the defect itself: a box round everything does not say where it is"
    exposure = "check the exposure, and how images of 16 bits were scaled"
    columns = "check the columns or folders that they come from"
    several = "add images of it, or it is trained on and never judged, or judged and never trained on"
    own_name = "no category or defect type has the name of its file"
    suite = [
        warn(_IN_SET, "product", "every category has both labels in train", both, value_set=sorted(complete)),
        warn(_NULL, "twin_in_other_label", "near-identical images have the same label", compare),
        warn(_NULL, "copy_of", "every image is there once", "remove the copies, which count several times"),
        warn(_IN_SET, "boxes_cover_something", "every box covers something", blank, value_set=[True]),
        warn(_BETWEEN, "largest_box", "no box covers the whole image", whole, max_value=_WHOLE),
        warn(_IN_SET, "exposure", "the image is neither black nor white all over", exposure, value_set=["fair"]),
        warn(_IN_SET, "names_are_of_file", own_name, columns, value_set=[False]),
    ]
    if table["split"].nunique() > 1:
        what, defects = "every defect type is in more than one split", _in_several_splits(table, held_out)
        suite.append(warn(_IN_SET, "defect", what, several, value_set=defects, where={"label": "anomalous"}))
    return suite


def _in_several_splits(table: pd.DataFrame, held_out: Sequence[str]) -> list[str]:
    """Return the defect types whose kinds are all in more than one split, or in a held-out category."""
    known = table[table["label"] == "anomalous"]
    by_kind = known.assign(kind=known["defect"].map(kinds_of, na_action="ignore")).explode("kind")
    away = by_kind["category"].isin(held_out)
    shared = by_kind[~away].groupby("kind")["split"].nunique()
    kinds = {*shared.index[shared > 1], *by_kind["kind"][away].dropna()}
    return sorted(defect for defect in known["defect"].dropna().unique() if kinds.issuperset(kinds_of(defect)))


def _of_tiling(table: pd.DataFrame, defects: Sequence[tiles.Defect], params: Params) -> list[Expectation]:
    """Return whether `tile.size` can do something, and whether the model sees small defects large enough."""
    size = params.tile.size
    suite: list[Expectation] = []
    if size:
        table["longer_side"] = table[["width", "height"]].max(axis=1)
        larger = f"an image is larger than tile.size, {size}"
        boxes = "an image in train has boxes, which tile.size needs"
        lower = "lower tile.size, or set it to null: no image is cut, tiling does nothing"
        mark = "mark the defects, or set tile.size to null: without boxes nobody knows which tile is anomalous"
        suite += [
            warn(MAX, "longer_side", larger, lower, min_value=size + 1),
            expect(MAX, "box_count", boxes, mark, min_value=1, where={"split": "train"}),
        ]
    pixels = loading.pixels(params.model) or 0
    if proposal := tiles.propose(defects, pixels, size, params.tile.overlap):
        table["seen_side"] = math.floor(10 * proposal.now) / 10
        side = math.isqrt(pixels)
        what = (
            f"three quarters of the defects are at least {tiles.LEAST_SIDE} pixels wide and high to the model, which"
            f" sees about {side} x {side}"
        )
        remedy = (
            f"cut the images: tile.size={proposal.size} makes that {proposal.then:.0f} pixels; {proposal.tiles} tiles"
            f" an image of middling size cost about {proposal.tiles} times the time in evaluation and use"
        )
        suite.append(warn(MAX, "seen_side", what, remedy, min_value=tiles.LEAST_SIDE))
    return suite


def run(table: pd.DataFrame, suite: list[Expectation]) -> tuple[ExpectationSuiteValidationResult, dict[str, list[int]]]:
    """Check a table against expectations.

    Returns:
        The results, in which failing rows go by their ids; and the row numbers of a few of them, by expectation.
    """
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    asset = context.data_sources.add_pandas("shards").add_dataframe_asset("images")
    batch = asset.add_batch_definition_whole_dataframe("all").get_batch(batch_parameters={"dataframe": table})
    result = batch.validate(gx.ExpectationSuite(name="shards", expectations=suite), result_format="COMPLETE")
    ids = table["id"].fillna("without id").tolist()
    failing = {}
    for each in result.results:
        # Great Expectations names failing rows by the index, and adds a query for all of them.
        each.result.pop("unexpected_index_query", None)
        numbers = each.result.get("unexpected_index_list", [])[:MAX_IDS]
        if each.expectation_config and not each.success:
            failing[str(each.expectation_config.description)] = [int(number) for number in numbers[:EXAMPLES]]
        for name in ("unexpected_index_list", "partial_unexpected_index_list"):
            each.result[name] = [ids[number] for number in each.result.get(name, [])[:MAX_IDS]]
        # Plain values: Data Docs cannot print numpy's.
        each.result = json.loads(json.dumps(each.to_json_dict()["result"]))
    return result, failing


def entries(suite: list[Expectation], result: ExpectationSuiteValidationResult) -> list[dict[str, Any]]:
    """Return the results as plain dicts, in the order of the suite.

    Raises:
        RuntimeError: An expectation could not be evaluated, which is a bug here.
    """
    results = {each.expectation_config.description: each for each in result.results if each.expectation_config}
    entries = []
    for expectation in suite:
        each = results[expectation.description]
        if each.exception_info.get("raised_exception", True):
            raise RuntimeError(f"the expectation {expectation.description!r} failed to run: {each.exception_info}")
        values = [count["value"] for count in each.result.get("partial_unexpected_counts", [])]
        entries.append(
            {
                "what": expectation.description,
                "column": getattr(expectation, "column", None),
                "severity": expectation.severity,
                "success": each.success,
                "failing": each.result.get("unexpected_count"),
                "ids": each.result.get("unexpected_index_list", [])[:MAX_IDS],
                "observed": each.result.get("observed_value", values),
                "remedy": expectation.meta["remedy"] if expectation.meta else None,
            }
        )
    return entries
