"""What a prediction is worth: localisation of one image, and detection and localisation of a whole table.

The protocol: one greedy answer an image. An answer that cannot be parsed counts as the wrong letter in every metric and
is never dropped; an image answered `normal` has no predicted box. Localisation is measured on anomalous images only.

Every metric is a function of weighted sums over images, so the value (all weights 1) and its bootstrap resamples
(weights = how often each image was drawn) come from the same lines of code. Images of one physical sample (column
`group`) are drawn together: they are alike, and taken for independent they would make intervals too narrow.

The bootstrap serves what has no better interval (AUROC, F1, calibration). Rates and means over images have the gate's
confidence limits instead, exact for rates (`adfm.statistics`): a bootstrap of 64 defects without a miss
gives a miss rate of [0, 0], and the truth may be 5 %.

A defective image is *flagged* if its decision is anomalous; whatever is not flagged has escaped. It is *located* if it
is flagged and its boxes overlap the true ones with an IoU of at least `LOCATED`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adfm import statistics
from adfm.errors import AdfmError
from adfm.records import Box
from adfm.text import printable

if TYPE_CHECKING:
    import pandas as pd

_SURE = 1e-4  # scores nearer to 0 or 1 than this say no more
Floats = NDArray[np.float64]
Measure = Callable[[Floats], dict[str, Floats]]

HEADLINE = ("accuracy", "balanced_accuracy", "recall", "specificity", "auroc", "iou", "box_f1", "parse_rate")
"""The metrics that tables and figures show; `summarize` has more."""

KIND = "kind_right"
"""A further metric, of a table with a column `predicted_kind`."""

BOTH_LABELS = (
    *("accuracy", "balanced_accuracy", "precision", "recall", "specificity", "f1", "auroc", "ece", "ece_of_score"),
    *("overkill", "miss_rate"),
)
"""The metrics of the decision; images of one label do not show it, since always the same answer is right on them."""

NO_NORMAL_IMAGE = (
    "There are no normal images, so recall, specificity, escapes, overkill and AUROC are not measured: always "
    "answering A would be right on every image."
)

SIZES = ("small", "medium", "large")

LOCALIZATION = (
    "iou",
    "mask_iou",
    "matched_iou",
    "true_positives",
    "false_positives",
    "false_negatives",
    "area_share",
)

COMPARED = LOCALIZATION[:-1]
"""Those of them that depend on the predicted boxes."""

AT_THRESHOLD = ("accuracy", "balanced_accuracy", "overkill", "miss_rate", "iou")
"""The metrics that are also reported for decisions at the threshold."""

BINS = 10
"""Of the expected calibration error: few enough for a hundred images to say something about each."""

LOCATED = 0.5
"""IoU with the true boxes from which a flagged defect counts as located; of a single box, from which it is true."""

OUTCOMES = {
    "missed": "m",
    "missed, unparseable": "x",
    "overkill": "o",
    "overkill, unparseable": "u",
    "elsewhere": "e",
    "located": "l",
    "flagged": "f",
    "passed": "p",
}
"""What becomes of an image, with a letter for each: escapes and overkill first. A flagged defect without true boxes is
`flagged`; with them it is `located` or marked `elsewhere`."""


def localize(
    truth: Sequence[Box], predicted: Sequence[Box], width: int, height: int, mask: NDArray[Any] | None = None
) -> dict[str, float | int | None]:
    """Compares predicted boxes with the ground truth of one image.

    All boxes are first put on the pixel grid: clipped to the image, then a pixel belongs to a box if its centre does
    (an edge at 3.5 rounds to 3, one at 3.51 to 4). A box that holds no pixel after that, or has a coordinate that is
    not a number, covers nothing; a predicted one still counts as a false positive.

    Args:
        truth: Ground-truth boxes, original pixels, half-open; empty on a normal image.
        predicted: Predicted boxes, original pixels; empty on an image answered `normal`.
        width: Width of the image in pixels.
        height: Height of the image in pixels.
        mask: Pixel mask of shape (height, width), defect where it is not 0; or `None`.

    Returns:
        `iou`, union of the predicted boxes against union of the true boxes, in pixels; `mask_iou`, union of the
        predicted boxes against the mask (`None` without a mask, or with an empty one); `matched_iou`, mean IoU of the
        min(n, m) pairs of the assignment with the largest total IoU (`None` without a predicted box); `true_positives`,
        `false_positives`, `false_negatives`, boxes, a pair being true from IoU 0.5; `area_share`, the union of the true
        boxes as a share of the image. Where there is no truth, all are `None`: nothing is to be located.

    Raises:
        AdfmError: The mask has another size than the image.
    """
    from scipy.optimize import linear_sum_assignment

    targets, found = _on_grid(truth, width, height), _on_grid(predicted, width, height)
    if not len(targets):
        return dict.fromkeys(LOCALIZATION)

    # Only the grid lines on which some box begins or ends matter: between them coverage is constant.
    columns, rows = (np.unique(np.concatenate([targets, found])[:, [i, i + 2]]) for i in (0, 1))
    cells = np.outer(np.diff(rows), np.diff(columns))
    true, guess = _paint(targets, columns, rows), _paint(found, columns, rows)

    overlap = _pairwise_iou(targets, found)
    matched = overlap[linear_sum_assignment(overlap, maximize=True)]
    hits = int((matched >= LOCATED).sum())
    return {
        "iou": float(cells[true & guess].sum() / cells[true | guess].sum()),
        "mask_iou": _mask_iou(mask, found, width, height) if mask is not None else None,
        "matched_iou": float(matched.mean()) if len(matched) else None,
        "true_positives": hits,
        "false_positives": len(predicted) - hits,
        "false_negatives": len(targets) - hits,
        "area_share": float(cells[true].sum() / (width * height)),
    }


def _on_grid(boxes: Sequence[Box], width: int, height: int) -> NDArray[np.int64]:
    """Boxes as whole pixels inside the image, (n, 4); those that hold no pixel are left out."""
    inside = np.clip(np.asarray(boxes, dtype=float).reshape(-1, 4), 0, [width, height, width, height])
    edges = np.ceil(inside - 0.5)
    whole = (edges[:, 0] < edges[:, 2]) & (edges[:, 1] < edges[:, 3])
    return np.asarray(edges[whole], dtype=np.int64)


def _paint(boxes: NDArray[np.int64], columns: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The union of boxes on the grid between the given lines, (len(rows) - 1, len(columns) - 1)."""
    canvas = np.zeros((len(rows) - 1, len(columns) - 1), dtype=bool)
    for (x1, x2), (y1, y2) in zip(
        np.searchsorted(columns, boxes[:, [0, 2]]), np.searchsorted(rows, boxes[:, [1, 3]]), strict=True
    ):
        canvas[y1:y2, x1:x2] = True
    return canvas


def _mask_iou(mask: NDArray[Any], found: NDArray[np.int64], width: int, height: int) -> float | None:
    if mask.shape != (height, width):
        raise AdfmError(f"A mask of shape {mask.shape} cannot belong to an image of {width} x {height} pixels.")
    defect = mask != 0
    if not defect.any():
        return None
    guess = _paint(found, np.arange(width + 1), np.arange(height + 1))
    return float((defect & guess).sum() / (defect | guess).sum())


def _pairwise_iou(left: NDArray[np.int64], right: NDArray[np.int64]) -> Floats:
    """IoU of every box of `left` with every box of `right`, (n, m)."""
    corner = np.maximum(left[:, None, :2], right[None, :, :2])
    opposite = np.minimum(left[:, None, 2:], right[None, :, 2:])
    shared = np.clip(opposite - corner, 0, None).prod(axis=-1)
    left_area, right_area = ((boxes[:, 2:] - boxes[:, :2]).prod(axis=-1) for boxes in (left, right))
    return np.asarray(shared / (left_area[:, None] + right_area - shared))


def summarize(table: pd.DataFrame, resamples: int, seed: int, small: float, large: float) -> dict[str, Any]:
    """All metrics of a prediction table, with 95 % intervals.

    Args:
        table: Prediction table, one row an image.
        resamples: Bootstrap resamples.
        seed: Seed of the resampling; the order of the rows does not matter.
        small: Defects below this share of the image's area are `small`.
        large: Defects from this share on are `large`; `medium` are those between.

    Returns:
        `overall`, and by name `datasets`, `categories`, `defects` (the images with a defect of that type, against the
        normal ones of the categories that have it) and `sizes` (recall and localisation only). Each has the counts
        `images`, `anomalous`, `normal`, `unparseable`, `without_boxes` (anomalous, but only the label is known: left
        out of IoU and all that compares boxes), and for each metric of `measure` its value and `<metric>_low`,
        `<metric>_high`; `None` where it is not defined (no such image), and those of `BOTH_LABELS` throughout where no
        image of the table is normal.
    """
    defects_alone = without_normal(table)
    located = ("recall", "miss_rate", "iou", "mask_iou", "matched_iou", "box_f1", "iou_10", "iou_30", "iou_50")

    def described(part: pd.DataFrame, names: Sequence[str] | None = None) -> dict[str, Any]:
        measured = _measured(part, resamples, seed, names)
        return _decision_left_out(measured) if defects_alone else measured

    def grouped(keys: pd.Series[Any]) -> dict[str, dict[str, Any]]:
        return {str(key): described(part) for key, part in table.groupby(keys, sort=True)}

    categories, normal = category_names(table), table["label"] == "normal"

    def with_normals(defect: Any) -> pd.DataFrame:
        chosen = table["defect"] == defect
        part: pd.DataFrame = table[chosen | (normal & categories.isin(categories[chosen]))]
        return part

    share = table["area_share"].astype(float)
    sizes = {"small": share < small, "medium": (share >= small) & (share < large), "large": share >= large}
    return {
        "overall": described(table),
        "datasets": grouped(table["dataset"]),
        "categories": grouped(categories),
        "defects": {
            str(defect): described(with_normals(defect)) for defect in sorted(table["defect"].dropna().unique())
        },
        "sizes": {size: described(table[chosen], located) for size, chosen in sizes.items() if chosen.any()},
    }


def without_normal(table: pd.DataFrame) -> bool:
    """Whether no image of a prediction table is normal, so that `BOTH_LABELS` are not measured."""
    return not (table["label"] == "normal").any()


def _decision_left_out(intervals: dict[str, Any]) -> dict[str, Any]:
    left_out = {f"{name}{end}" for name in BOTH_LABELS for end in ("", "_low", "_high")}
    return {name: None if name in left_out else value for name, value in intervals.items()}


def overall(table: pd.DataFrame, resamples: int, seed: int, names: Sequence[str] | None = None) -> dict[str, Any]:
    """The counts and metrics of a table as a whole: `overall` of `summarize`, without the parts."""
    measured = _measured(table, resamples, seed, names)
    return _decision_left_out(measured) if without_normal(table) else measured


def _measured(table: pd.DataFrame, resamples: int, seed: int, names: Sequence[str] | None = None) -> dict[str, Any]:
    anomalous = int((table["label"] == "anomalous").sum())
    counts = {
        "images": len(table),
        "anomalous": anomalous,
        "normal": len(table) - anomalous,
        "unparseable": int(table["predicted"].isna().sum()),
        "without_boxes": without_boxes(table),
    }
    table = table.sort_values("id")
    intervals = _with_intervals(measure(table), samples(table), resamples, seed, 0.95, names)
    return counts | intervals | limits_of_means(table, names)


def without_boxes(table: pd.DataFrame) -> int:
    """How many anomalous images of a prediction table have nothing to locate, since only their label is known."""
    return int(((table["label"] == "anomalous") & table["iou"].isna()).sum())


def difference(
    candidate: pd.DataFrame, reference: pd.DataFrame, resamples: int, seed: int, level: float = 0.95
) -> dict[str, float | None]:
    """Candidate minus reference for every metric, with paired intervals: both see the same images.

    Args:
        candidate: Prediction table; its column `group`, if it has one, is that of both.
        reference: Prediction table of the same images, in any order.
        resamples: Bootstrap resamples.
        seed: Seed of the resampling.
        level: Coverage of the two-sided interval.

    Returns:
        For each metric of `measure` that both have the difference, and its `<metric>_low` and `<metric>_high`; `None`
        as of `summarize`.

    Raises:
        AdfmError: The tables do not hold the same images.
    """
    same_images(candidate, reference)
    candidate, reference = candidate.sort_values("id"), reference.sort_values("id")
    left, right = measure(candidate), measure(reference)

    def change(weights: Floats) -> dict[str, Floats]:
        after, before = left(weights), right(weights)
        return {name: after[name] - before[name] for name in after if name in before}

    intervals = _with_intervals(change, samples(candidate), resamples, seed, level)
    intervals |= _paired_limits(candidate, reference, (1 - level) / 2)
    return _decision_left_out(intervals) if without_normal(candidate) else intervals


def as_decided(table: pd.DataFrame) -> pd.DataFrame:
    """A prediction table as it counts in production: decisions at the threshold in the place of the letters.

    `predicted` is the column `decision`. An image that is flagged has all `regions` for `predicted_boxes`, whatever its
    letter, and one that is not has none; the localisation columns follow.

    Args:
        table: Prediction table. Without a column `decision` (of an evaluation before there were thresholds) the letters
            decide, and it is given back as it is.

    Raises:
        AdfmError: It has decisions, but not the localisation of the regions.
    """
    if "decision" not in table:
        return table
    if missing := [f"region_{name}" for name in COMPARED if f"region_{name}" not in table]:
        raise AdfmError(
            f"The prediction table has a column decision, but no {', '.join(missing)}; evaluate again, `adfm evaluate`."
        )
    flagged = (table["decision"] == "anomalous").to_numpy(dtype=bool)
    regions = {name: table[f"region_{name}"].to_numpy(dtype=float, na_value=np.nan) for name in COMPARED}
    # Without a box: an overlap of 0 where there is something to overlap, no matched pair, every defect missed.
    nothing = {name: np.where(np.isnan(values), np.nan, 0.0) for name, values in regions.items()}
    nothing["matched_iou"] = np.full(len(table), np.nan)
    nothing["false_negatives"] = regions["true_positives"] + regions["false_negatives"]
    judged = table.assign(
        predicted=table["decision"], **{name: np.where(flagged, regions[name], nothing[name]) for name in COMPARED}
    )
    if "regions" in table:
        boxes = [list(boxes) if flag else [] for boxes, flag in zip(table["regions"], flagged, strict=True)]
        judged["predicted_boxes"] = np.fromiter(boxes, dtype=object, count=len(boxes))
    return judged


def operating_point(table: pd.DataFrame, at: float | None, resamples: int, seed: int) -> dict[str, float | None]:
    """What decisions at a threshold, chosen on other images, do on these.

    Args:
        table: Prediction table with decisions.
        at: The threshold; `None` if the letter decides.
        resamples: Bootstrap resamples; the threshold is the same in all of them.
        seed: Seed of the resampling.

    Returns:
        `threshold`, and for each metric of `AT_THRESHOLD` `<metric>_at_threshold` with `_low` and `_high`; `None`
        without a threshold.
    """
    intervals = None
    if at is not None:
        judged = as_decided(table).sort_values("id")
        intervals = _with_intervals(measure(judged), samples(judged), resamples, seed, 0.95, AT_THRESHOLD)
        intervals |= limits_of_means(judged, AT_THRESHOLD)
    return {"threshold": at} | _at_threshold(intervals)


def more_images(values: Mapping[str, Any], width: float = 0.05) -> str:
    """What more test images would buy: how wide the intervals of recall and specificity are, and would be.

    It is about decisions at the threshold where there is one, else about letters. Images of one part count as one
    (`limits_of_means`), so the interval is that of fewer images; new images are taken to have as many a part.

    Args:
        values: Metrics of a model, as `summarize` and `operating_point` give them.
        width: The half width of an interval to plan for.

    Returns:
        A sentence; an empty text where neither rate is measured.
    """
    at = "_at_threshold" if values.get("threshold") is not None else ""
    now, more, enough = [], [], []
    for title, label, miss in (("recall", "defective", "miss_rate"), ("specificity", "normal", "overkill")):
        images, error = values.get("anomalous" if label == "defective" else "normal"), values.get(f"{miss}{at}")
        low, high = (values.get(f"{miss}{at}_{end}") for end in ("low", "high"))
        if not images or error is None or low is None or high is None:
            continue
        rate, present = 1 - error, (high - low) / 2
        parts = min(images, statistics.images_for_half_width(rate, present + 1e-6))
        needed = math.ceil(statistics.images_for_half_width(rate, width) * images / parts)
        now.append(f"the {title} of {rate:.3f} is measured to ± {present:.3f} with {images:,} {label} images")
        more.append(f"± {statistics.half_width(rate, 4 * parts):.3f}")
        enough.append(f"{needed:,} {label}")
    if not now:
        return ""
    how = " at the threshold" if at else ""
    return (
        f"More test images: {' and '.join(now)}{how}; four times as many would make it {' and '.join(more)};"
        f" ± {width:g} takes about {' and '.join(enough)} images."
    )


def operating_difference(
    candidate: pd.DataFrame,
    at: float | None,
    reference: pd.DataFrame,
    reference_at: float | None,
    resamples: int,
    seed: int,
) -> dict[str, float | None]:
    """Candidate minus reference, each at its own threshold: as `operating_point`, paired as `difference` does."""
    if at is None or reference_at is None:
        return _at_threshold(None)
    return _at_threshold(difference(as_decided(candidate), as_decided(reference), resamples, seed))


def _at_threshold(intervals: dict[str, float | None] | None) -> dict[str, float | None]:
    names = [(name, end) for name in AT_THRESHOLD for end in ("", "_low", "_high")]
    return {f"{name}_at_threshold{end}": intervals[name + end] if intervals else None for name, end in names}


def reliability(probability: Floats, anomalous: NDArray[np.bool_]) -> list[tuple[float, float, int]]:
    """The points of a reliability diagram: for each of `BINS` bins of equally many images, from low to high.

    Args:
        probability: Probabilities of a defect, (n,); NaN is left out.
        anomalous: Which images have one, (n,).

    Returns:
        Mean probability, share of anomalous images, and the number of images of each bin. Images with the same
        probability share a bin, so that there may be fewer bins, and unequal ones.
    """
    known = ~np.isnan(probability)
    probability, anomalous = probability[known], anomalous[known]
    bins = _equal_mass_bins(probability)
    return [
        (float(probability[there].mean()), float(anomalous[there].mean()), int(there.sum()))
        for there in (bins == number for number in np.unique(bins))
    ]


def _equal_mass_bins(probability: Floats) -> NDArray[np.int64]:
    """The number of each image's bin; images with the same probability have the same, so that no order matters."""
    from scipy.stats import rankdata

    middle = (rankdata(probability) - 0.5) / max(1, len(probability))
    return np.asarray(np.floor(middle * BINS), dtype=np.int64)


def same_images(candidate: pd.DataFrame, reference: pd.DataFrame) -> None:
    """Raises AdfmError, naming them, where two prediction tables do not hold the same images once each."""
    for name, table in (("first", candidate), ("second", reference)):
        if not len(table):
            raise AdfmError(f"The {name} of the two prediction tables is empty: there is nothing to compare.")
        if repeated := sorted(table["id"][table["id"].duplicated()].astype(str).unique()):
            raise AdfmError(f"The {name} of the two prediction tables has ids more than once: {listed(repeated)}.")
    left, right = set(candidate["id"]), set(reference["id"])
    if left != right:
        raise AdfmError(
            f"The two prediction tables are not of the same images: {len(left - right)} only in the first"
            f" ({listed(sorted(left - right, key=str)) or 'none'}), {len(right - left)} only in the second"
            f" ({listed(sorted(right - left, key=str)) or 'none'}). Evaluate both models on the same shards."
        )


def listed(names: Sequence[object], most: int = 10) -> str:
    """Names for an error message: the first few, and how many more."""
    more = len(names) - most
    return ", ".join(printable(str(name)) for name in names[:most]) + (f" and {more} more" if more > 0 else "")


def category_names(table: pd.DataFrame) -> pd.Series[Any]:
    """The category of each image; `dataset/category` where the table has more than one data set."""
    if "dataset" in table and table["dataset"].nunique() > 1:
        return table["dataset"].astype(str) + "/" + table["category"].astype(str)
    return table["category"]


def values(table: pd.DataFrame) -> dict[str, float | None]:
    """The metrics of `measure` for a prediction table as it is; `None` where one is not defined."""
    return {name: _number(value[0]) for name, value in measure(table)(np.ones((1, len(table)))).items()}


def measure(table: pd.DataFrame) -> Measure:
    """The metrics of a prediction table, as a function of how often each image counts.

    Detection takes `anomalous` as the positive class and an unparseable answer as the wrong one: `accuracy`,
    `balanced_accuracy`, `precision`, `recall`, `specificity`, `f1`, `overkill` (1 - specificity: normal images not
    passed), `miss_rate` (1 - recall), and `parse_rate`, the share of parseable answers. `auroc` ranks images by
    `score`, ties counting half; one without a score ranks as wrongly as can be (a defect below, a normal image above
    all others).

    `ece` is the expected calibration error of `probability`, `ece_of_score` that of the raw `score`: images are put
    into `BINS` bins of equally many (equal-mass bins; those with the same value stay together), and the distance
    between a bin's mean probability and its share of defects is averaged over the images. Images without a score are
    left out. It is never 0 by chance alone: about 0.04 with 768 images and perfect probabilities, 0.10 with 100.

    Localisation is over anomalous images: `iou`, `mask_iou` (where there is a mask) and `matched_iou` (where a box was
    predicted) are means over images; `iou_10`, `iou_30`, `iou_50` are shares of images with an IoU of at least 0.1,
    0.3, 0.5; `box_f1` is over all boxes (micro), at IoU 0.5.

    `kind_right`, of a table with the columns `kind` and `predicted_kind`: the share of the defective images of one
    known kind that are answered anomalous with this kind.

    Args:
        table: Prediction table of n images. Without `score` or a localisation column its metrics are NaN.

    Returns:
        A function of weights (weightings, n) that gives for each metric an array (weightings,), NaN where it is not
        defined. `np.ones((1, n))` gives the metrics of the table as it is.
    """
    anomalous = (table["label"] == "anomalous").to_numpy(dtype=bool)
    parsed = table["predicted"].notna().to_numpy(dtype=bool)
    right = parsed & (table["predicted"].astype(object) == table["label"].astype(object)).to_numpy(dtype=bool)
    sums: dict[str, NDArray[Any]] = {
        "images": np.ones(len(table)),
        "parsed": parsed,
        "anomalous": anomalous,
        "normal": ~anomalous,
        "hits": anomalous & right,
        "passes": ~anomalous & right,
    }
    names = ["score", "iou", "mask_iou", "matched_iou", "true_positives", "false_positives", "false_negatives"]
    score, *numbers = table.reindex(columns=names).to_numpy(dtype=float, na_value=np.nan).T
    for name, values in zip(names[1:], numbers, strict=True):
        sums[name] = np.where(anomalous, np.nan_to_num(values), 0.0)
        sums[f"has_{name}"] = anomalous & ~np.isnan(values)
    for percent in (10, 30, 50):
        sums[f"iou_{percent}"] = sums["has_iou"] & (sums["iou"] >= percent / 100)
    kind_is_right = kinds_right(table)
    if kind_is_right is not None:
        sums["has_kind"], sums["kind_right"] = ~np.isnan(kind_is_right), np.nan_to_num(kind_is_right)
    summands = np.column_stack(list(sums.values())).astype(float)
    auroc = _auroc(score if "score" in table else None, anomalous)
    probability = table.reindex(columns=["probability"]).to_numpy(dtype=float, na_value=np.nan)[:, 0]
    ece, ece_of_score = _calibration_error(probability, anomalous), _calibration_error(score, anomalous)

    def metrics(weights: Floats) -> dict[str, Floats]:
        total = dict(zip(sums, (weights @ summands).T, strict=True))
        with np.errstate(divide="ignore", invalid="ignore"):
            recall, specificity = total["hits"] / total["anomalous"], total["passes"] / total["normal"]
            flagged = total["hits"] + total["normal"] - total["passes"]
            boxes = 2 * total["true_positives"] + total["false_positives"] + total["false_negatives"]
            return {
                "accuracy": (total["hits"] + total["passes"]) / total["images"],
                "balanced_accuracy": (recall + specificity) / 2,
                "precision": total["hits"] / flagged,
                "recall": recall,
                "specificity": specificity,
                "f1": 2 * total["hits"] / (total["anomalous"] + flagged),
                "auroc": auroc(weights),
                "ece": ece(weights),
                "ece_of_score": ece_of_score(weights),
                "parse_rate": total["parsed"] / total["images"],
                "overkill": 1 - specificity,
                "miss_rate": 1 - recall,
                "box_f1": 2 * total["true_positives"] / boxes,
                **{name: total[name] / total[f"has_{name}"] for name in ("iou", "mask_iou", "matched_iou")},
                **{name: total[name] / total["has_iou"] for name in ("iou_10", "iou_30", "iou_50")},
                **({} if kind_is_right is None else {KIND: total["kind_right"] / total["has_kind"]}),
            }

    return metrics


def _auroc(score: Floats | None, anomalous: NDArray[np.bool_]) -> Callable[[Floats], Floats]:
    """Area under the ROC curve as the probability that a defect outranks a normal image (Mann-Whitney)."""
    if score is None:
        return lambda weights: np.full(len(weights), np.nan)
    scores = _ranks(score, anomalous)
    defects, normals = np.flatnonzero(anomalous), np.flatnonzero(~anomalous)
    normals = normals[np.argsort(scores[normals])]
    first, last = (np.searchsorted(scores[normals], scores[defects], side) for side in ("left", "right"))

    def auroc(weights: Floats) -> Floats:
        # below[:, i]: weight of the i lowest normal images.
        below = np.zeros((len(weights), len(normals) + 1))
        np.cumsum(weights[:, normals], axis=1, out=below[:, 1:])
        wins = (weights[:, defects] * (below[:, first] + below[:, last])).sum(axis=1) / 2
        return np.asarray(wins / (weights[:, defects].sum(axis=1) * below[:, -1]))

    return auroc


def _calibration_error(probability: Floats, anomalous: NDArray[np.bool_]) -> Callable[[Floats], Floats]:
    """The expected calibration error over equal-mass bins, recomputed in every resample."""
    known = np.flatnonzero(~np.isnan(probability))
    known = known[np.argsort(probability[known], kind="stable")]
    distinct, starts = np.unique(probability[known], return_index=True)
    excess = probability[known] - anomalous[known]

    def error(weights: Floats) -> Floats:
        if not len(distinct):
            return np.full(len(weights), np.nan)
        counted = weights[:, known]
        times = np.add.reduceat(counted, starts, axis=1)  # of each distinct probability
        total = times.sum(axis=1, keepdims=True)
        # As `_equal_mass_bins`, of an image repeated as often as it counts.
        middle = (np.cumsum(times, axis=1) - times / 2) / np.where(total > 0, total, 1)
        bins = np.clip(np.floor(middle * BINS), 0, BINS - 1).astype(np.int64)
        places = bins + BINS * np.arange(len(weights))[:, None]
        over = np.add.reduceat(counted * excess, starts, axis=1)
        sums = np.bincount(places.ravel(), over.ravel(), minlength=BINS * len(weights)).reshape(-1, BINS)
        return np.asarray(np.abs(sums).sum(axis=1) / total[:, 0])

    return error


def best_threshold(anomalous: NDArray[np.bool_], score: Floats) -> float:
    """The score from which on images are called anomalous, for the best balanced accuracy on other images.

    It is where a logistic regression of the label on the score's log-odds, both labels weighing the same, says one half
    (Platt, 1999, Probabilistic outputs for support vector machines). What is best on the images themselves follows
    chance: with 60 to 80 of normally distributed log-odds it costs 0.005 to 0.011 on others, this 0.002 to 0.003.
    Scores that part the labels have it in the middle between the two.

    Args:
        anomalous: Which images have a defect, (n,), n > 0.
        score: Their scores in [0, 1], (n,), without NaN.

    Returns:
        A score; with defective images alone their lowest, without any 1; one half if scores do not rise with defects.
    """
    from scipy.special import expit, logit
    from sklearn.linear_model import LogisticRegression

    if anomalous.all():
        return float(score.min())
    if not anomalous.any():
        return 1.0
    if (least := score[anomalous].min()) > (most := score[~anomalous].max()):
        return float(most + least) / 2
    odds = logit(np.clip(score, _SURE, 1 - _SURE))
    fitted = LogisticRegression(class_weight="balanced").fit(odds[:, None], anomalous)
    slope, intercept = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    return float(expit(-intercept / slope)) if slope > 0 else 0.5


def ranked(table: pd.DataFrame) -> tuple[NDArray[np.bool_], Floats]:
    """Which images are anomalous, and the scores to rank all by; a missing one stands where it is most wrong."""
    anomalous = (table["label"] == "anomalous").to_numpy(dtype=bool)
    return anomalous, _ranks(table["score"].to_numpy(dtype=float, na_value=np.nan), anomalous)


def _ranks(score: Floats, anomalous: NDArray[np.bool_]) -> Floats:
    return np.where(np.isnan(score), np.where(anomalous, -1.0, 2.0), score)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _with_intervals(
    measured: Measure,
    sample: NDArray[np.int64],
    resamples: int,
    seed: int,
    level: float,
    names: Sequence[str] | None = None,
) -> dict[str, float | None]:
    """Each metric with its percentile interval; resamples in which it is not defined are left out."""
    values = measured(np.ones((1, len(sample))))
    drawn = [measured(weights) for weights in bootstrap_weights(sample, resamples, seed)]
    result: dict[str, float | None] = {}
    for name in names or values:
        value = float(values[name][0])
        draws = np.concatenate([part[name] for part in drawn])
        draws = draws[~np.isnan(draws)]
        if np.isnan(value) or not len(draws):
            result |= {name: None, f"{name}_low": None, f"{name}_high": None}
        else:
            low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
            result |= {name: value, f"{name}_low": float(low), f"{name}_high": float(high)}
    return result


def limits_of_means(table: pd.DataFrame, names: Sequence[str] | None = None) -> dict[str, float | None]:
    """The 95 % limits of rates and means, for a table ordered by id."""
    limits: dict[str, tuple[float, float]] = {}
    group = groups(table)
    for name, values in _of_images(table).items():
        counting = ~np.isnan(values)
        if counting.any():
            of_images = None if group is None else group[counting]
            limits[name] = confidence_limits(values[counting], of_images, name not in _CONTINUOUS)
    if {"recall", "specificity"} <= limits.keys():
        # Of the mean of two independent rates (MOVER; Newcombe 1998, Statistics in Medicine 17:873).
        rates = {name: float(np.nanmean(_of_images(table)[name])) for name in ("recall", "specificity")}
        below, above = (math.hypot(*(rates[name] - limits[name][end] for name in rates)) / 2 for end in (0, 1))
        middle = sum(rates.values()) / 2
        limits["balanced_accuracy"] = middle - below, middle + above
    chosen = [name for name in limits if names is None or name in names]
    return {f"{name}{end}": limits[name][place] for name in chosen for place, end in enumerate(("_low", "_high"))}


def confidence_limits(
    values: Floats, group: NDArray[np.int64] | None = None, binary: bool = True, alpha: float = 0.025
) -> tuple[float, float]:
    """Lower and upper confidence limit of a mean of values in [0, 1], each at level `alpha`; exact for rates.

    Args:
        values: Array (images,), without NaN; 0 and 1 if `binary`.
        group: Array (images,), which images show one part; `None`: each shows another.
        binary: Whether it is a rate.
        alpha: Level of each limit.
    """
    at_most = statistics.rate_at_most if binary else statistics.mean_at_most
    return 1 - at_most(1 - values, alpha, group), at_most(values, alpha, group)


def _paired_limits(candidate: pd.DataFrame, reference: pd.DataFrame, alpha: float) -> dict[str, float | None]:
    """Limits of candidate minus reference, for tables in the same order; not of means over different images."""
    limits: dict[str, float | None] = {}
    group, before = groups(candidate), _of_images(reference)
    for name, after in _of_images(candidate).items():
        counting = ~np.isnan(after)
        if name not in before or not counting.any() or not np.array_equal(counting, ~np.isnan(before[name])):
            continue
        change = (after - before[name])[counting]
        of_images = None if group is None else group[counting]
        limits[f"{name}_low"], limits[f"{name}_high"] = difference_limits(
            change, of_images, name not in _CONTINUOUS, alpha
        )
    return limits


def difference_limits(
    change: Floats, group: NDArray[np.int64] | None = None, binary: bool = True, alpha: float = 0.025
) -> tuple[float, float]:
    """Lower and upper confidence limit of a mean change on the same images, each at level `alpha`.

    Args:
        change: Array (images,) of differences in [-1, 1]; -1, 0 or 1 if `binary`.
        group: As in `confidence_limits`.
        binary: As in `confidence_limits`.
        alpha: Level of each limit.
    """
    low, high = (statistics.loss_at_most(sign * change, alpha, group, binary) for sign in (-1, 1))
    return -low, high


_CONTINUOUS = ("iou", "mask_iou", "matched_iou")


def _of_images(table: pd.DataFrame) -> dict[str, Floats]:
    """For each metric that is a mean over images, each image's value, (n,); NaN where an image does not count."""
    anomalous = (table["label"] == "anomalous").to_numpy(dtype=bool)
    parsed = table["predicted"].notna().to_numpy(dtype=bool)
    right = parsed & (table["predicted"].astype(object) == table["label"].astype(object)).to_numpy(dtype=bool)
    flagged = anomalous & right | ~anomalous & ~right  # a normal image that is not passed
    numbers = table.reindex(columns=[*_CONTINUOUS]).to_numpy(dtype=float, na_value=np.nan).T
    localisation = {
        name: np.where(anomalous, values, np.nan) for name, values in zip(_CONTINUOUS, numbers, strict=True)
    }
    iou = localisation["iou"]

    def over(images: NDArray[np.bool_], values: NDArray[np.bool_]) -> Floats:
        return np.where(images, values.astype(float), np.nan)

    return {
        "accuracy": right.astype(float),
        "precision": over(flagged, anomalous),
        "recall": over(anomalous, right),
        "miss_rate": over(anomalous, ~right),
        "specificity": over(~anomalous, right),
        "overkill": over(~anomalous, ~right),
        "parse_rate": parsed.astype(float),
        **localisation,
        **{f"iou_{percent}": over(~np.isnan(iou), iou >= percent / 100) for percent in (10, 30, 50)},
        **({} if (kind_is_right := kinds_right(table)) is None else {KIND: kind_is_right}),
    }


def kinds_right(table: pd.DataFrame) -> Floats | None:
    """For each image whether it is answered anomalous with its own kind, (n,); NaN where no kind is known.

    `None` if the model's prompt does not ask for the kind.
    """
    if "predicted_kind" not in table:
        return None
    pairs = kind_pairs(table)
    return np.array([np.nan if actual in (None, NORMAL) else float(actual == its) for actual, its in pairs])


NO_KIND, NORMAL = "(no kind)", "(normal)"
"""In the table of kinds: an image answered anomalous, or without a letter, without a kind; and a normal image or one
that is answered so."""


def kind_pairs(table: pd.DataFrame) -> list[tuple[str | None, str]]:
    """For each image its kind, `None` if it is defective and not of one known kind, and the kind that it is given.

    Either may be `NORMAL`, the latter `NO_KIND`.
    """
    normal, given = ((table[name] == "normal").to_numpy(dtype=bool) for name in ("label", "predicted"))
    flagged = (table["predicted"] == "anomalous").to_numpy(dtype=bool) & table["predicted_kind"].notna().to_numpy()
    actual = np.where(normal, NORMAL, table["kind"].astype(object).where(table["kind"].notna(), None))
    predicted = np.where(flagged, table["predicted_kind"].astype(object), np.where(given, NORMAL, NO_KIND))
    return list(zip(actual.tolist(), predicted.tolist(), strict=True))


def kinds_confusion(table: pd.DataFrame) -> tuple[list[str], list[str], list[list[int]]]:
    """The confusion table of kinds: names of its rows (actual) and columns (given), and the counts.

    Defective images that are not of one known kind are left out. The row and column `NORMAL`, and the column `NO_KIND`,
    come last; `NORMAL` has no row where no image is normal.
    """
    counts = Counter(pair for pair in kind_pairs(table) if pair[0] is not None)
    last = {NO_KIND: 1, NORMAL: 2}
    rows = sorted({str(actual) for actual, _ in counts}, key=lambda name: (last.get(name, 0), name))
    given = {name for _, name in counts} | {name for name in rows if name != NORMAL} | {NO_KIND, NORMAL}
    columns = sorted(given, key=lambda name: (last.get(name, 0), name))
    return rows, columns, [[counts[actual, name] for name in columns] for actual in rows]


def outcomes(table: pd.DataFrame) -> pd.Series[Any]:
    """For each image one of `OUTCOMES`; the IoU is that of the table's boxes."""
    import pandas as pd

    anomalous = (table["label"] == "anomalous").to_numpy(dtype=bool)
    flagged, passed = ((table["predicted"] == word).to_numpy(dtype=bool) for word in ("anomalous", "normal"))
    iou = table["iou"].to_numpy(dtype=float, na_value=np.nan)
    cases = {
        "missed": anomalous & passed,
        "overkill": ~anomalous & flagged,
        "elsewhere": anomalous & flagged & (iou < LOCATED),
        "located": anomalous & flagged & (iou >= LOCATED),
        "flagged": anomalous & flagged & np.isnan(iou),
        "passed": ~anomalous & passed,
        "missed, unparseable": anomalous,
        "overkill, unparseable": ~anomalous,
    }
    return pd.Series(np.select([*cases.values()], [*cases], ""), table.index)


def groups(table: pd.DataFrame) -> NDArray[np.int64] | None:
    """`samples` of a prediction table, or `None` where each image is its own."""
    sample = samples(table)
    return sample if len(np.unique(sample)) < len(sample) else None


def samples(table: pd.DataFrame) -> NDArray[np.int64]:
    """The number of each image's physical sample, counted from 0: its `group`; an image without one is its own."""
    import pandas as pd

    if "group" not in table:
        return np.arange(len(table))
    alone = pd.Series([f"image {number}" for number in range(len(table))], index=table.index)
    named = "group " + table["group"].astype(object).where(table["group"].notna(), "").astype(str)
    return np.asarray(pd.factorize(named.where(table["group"].notna(), alone))[0])


def bootstrap_weights(sample: NDArray[np.int64], resamples: int, seed: int) -> Iterator[Floats]:
    """How often each image is drawn in each bootstrap resample, (some resamples, images), a few megabytes at a time.

    As many physical samples are drawn as there are, each with all its images.
    """
    random = np.random.default_rng(seed)
    samples = int(sample.max()) + 1
    most = max(1, 200_000 // len(sample))
    for start in range(0, resamples, most):
        count = min(most, resamples - start)
        drawn = random.integers(samples, size=(count, samples)) + samples * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * samples).reshape(count, samples)
        yield times[:, sample].astype(float)
