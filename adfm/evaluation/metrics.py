"""Detection and localisation metrics of one image and of a prediction table, with 95 % intervals.

An answer that cannot be parsed counts as the wrong letter in every metric and is never dropped; an image answered
`normal` has no predicted box. Localisation is measured on anomalous images only. A defective image is *flagged* if its
decision is anomalous, else it has escaped; it is *located* if it is flagged with an IoU of at least `LOCATED`.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import optimize, special

from adfm import statistics
from adfm.errors import AdfmError
from adfm.records import Box
from adfm.text import printable

_ALPHA = 0.025  # of each limit of a 95 % interval
_SURE = 1e-4  # scores nearer to 0 or 1 than this are clipped
Floats = NDArray[np.float64]
Names = Sequence[str] | None  # of metrics; `None`: all
Groups = NDArray[np.int64] | None  # for each image the number of its part; `None` where each shows another one
# Each metric as a function of how often each image counts: the value (all weights 1) and its bootstrap resamples come
# from the same lines of code.
Measure = Callable[[Floats], dict[str, Floats]]

# The metrics that tables and figures show; `summarize` has more.
HEADLINE = ("accuracy", "balanced_accuracy", "recall", "specificity", "auroc", "iou", "box_f1", "parse_rate")
KIND = "kind_right"  # a further metric, of a table with a column `predicted_kind`

# Metrics of the decision. Images of one label do not show it, since always the same answer is right on them.
BOTH_LABELS = (
    *("accuracy", "balanced_accuracy", "precision", "recall", "specificity", "f1", "auroc", "ece", "ece_of_score"),
    *("overkill", "miss_rate"),
)
NO_NORMAL_IMAGE = (
    "There are no normal images, so recall, specificity, escapes, overkill and AUROC are not measured: always "
    "answering A would be right on every image."
)

SIZES = ("small", "medium", "large")
_OVERLAPS = ("iou", "mask_iou", "matched_iou")
_BOXES = ("true_positives", "false_positives", "false_negatives")
COMPARED = (*_OVERLAPS, *_BOXES)  # what depends on the predicted boxes
LOCALIZATION = (*COMPARED, "area_share")
AT_THRESHOLD = ("accuracy", "balanced_accuracy", "overkill", "miss_rate", "iou")  # also reported at the threshold
ENDS = ("", "_low", "_high")  # of the names of a value and its limits

BINS = 10  # of the expected calibration error: few enough for a hundred images to fill each
LOCATED = 0.5  # least IoU of a located defect with all of its boxes, and of a single box that is true

# What becomes of an image, with a letter for each: escapes and overkill first. A flagged defect without true boxes is
# `flagged`; with them it is `located` or marked `elsewhere`.
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


def localize(
    truth: Sequence[Box], predicted: Sequence[Box], width: int, height: int, mask: NDArray[Any] | None = None
) -> dict[str, float | int | None]:
    """Compare predicted boxes with the ground truth of one image; all boxes are original pixels, half-open.

    They are first put on the pixel grid: clipped to the image, then a pixel belongs to a box if its centre does (an
    edge at 3.5 rounds to 3, one at 3.51 to 4). A box that then holds no pixel, or has a NaN, covers nothing; a
    predicted one still counts as a false positive. `mask`, (height, width), is not 0 on the defect.

    Returns:
        `iou`, union of the predicted boxes against union of the true boxes, in pixels; `mask_iou`, union of the
        predicted boxes against the mask (`None` without a mask, or with an empty one); `matched_iou`, mean IoU of the
        min(n, m) pairs of the assignment with the largest total IoU (`None` without a predicted box); `true_positives`,
        `false_positives`, `false_negatives`, boxes, a pair being true from IoU 0.5; `area_share`, the union of the true
        boxes as a share of the image. All are `None` without true boxes.

    Raises:
        AdfmError: The mask has another size than the image.
    """
    targets, boxes = _on_grid(truth, width, height), _on_grid(predicted, width, height)
    if not len(targets):
        return dict.fromkeys(LOCALIZATION)

    # Only the grid lines on which some box begins or ends matter: between them coverage is constant.
    columns, rows = (np.unique(np.concatenate([targets, boxes])[:, [i, i + 2]]) for i in (0, 1))
    cells = np.outer(np.diff(rows), np.diff(columns))
    true, guess = _paint(targets, columns, rows), _paint(boxes, columns, rows)

    overlap = _pairwise_iou(targets, boxes)
    matched = overlap[optimize.linear_sum_assignment(overlap, maximize=True)]
    hits = int((matched >= LOCATED).sum())
    return {
        "iou": float(cells[true & guess].sum() / cells[true | guess].sum()),
        "mask_iou": _mask_iou(mask, boxes, width, height) if mask is not None else None,
        "matched_iou": float(matched.mean()) if len(matched) else None,
        "true_positives": hits,
        "false_positives": len(predicted) - hits,
        "false_negatives": len(targets) - hits,
        "area_share": float(cells[true].sum() / (width * height)),
    }


def _on_grid(boxes: Sequence[Box], width: int, height: int) -> NDArray[np.int64]:
    """Return boxes as whole pixels inside the image, (n, 4), without those that hold no pixel."""
    inside = np.clip(np.asarray(boxes, dtype=float).reshape(-1, 4), 0, [width, height, width, height])
    edges = np.ceil(inside - 0.5)
    return np.asarray(edges[(edges[:, 0] < edges[:, 2]) & (edges[:, 1] < edges[:, 3])], dtype=np.int64)


def _paint(boxes: NDArray[np.int64], columns: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return the union of boxes on the grid between the given lines, (len(rows) - 1, len(columns) - 1)."""
    canvas = np.zeros((len(rows) - 1, len(columns) - 1), dtype=bool)
    across, down = np.searchsorted(columns, boxes[:, [0, 2]]), np.searchsorted(rows, boxes[:, [1, 3]])
    for (x1, x2), (y1, y2) in zip(across, down, strict=True):
        canvas[y1:y2, x1:x2] = True
    return canvas


def _mask_iou(mask: NDArray[Any], boxes: NDArray[np.int64], width: int, height: int) -> float | None:
    if mask.shape != (height, width):
        raise AdfmError(f"A mask of shape {mask.shape} cannot belong to an image of {width} x {height} pixels.")
    defect = mask != 0
    if not defect.any():
        return None
    guess = _paint(boxes, np.arange(width + 1), np.arange(height + 1))
    return float((defect & guess).sum() / (defect | guess).sum())


def _pairwise_iou(left: NDArray[np.int64], right: NDArray[np.int64]) -> Floats:
    """Return the IoU of every box of `left` with every box of `right`, (n, m)."""
    corner = np.maximum(left[:, None, :2], right[None, :, :2])
    opposite = np.minimum(left[:, None, 2:], right[None, :, 2:])
    shared = np.clip(opposite - corner, 0, None).prod(axis=-1)
    left_area, right_area = ((boxes[:, 2:] - boxes[:, :2]).prod(axis=-1) for boxes in (left, right))
    return np.asarray(shared / (left_area[:, None] + right_area - shared))


def is_defective(table: pd.DataFrame) -> NDArray[np.bool_]:
    """Return which images of a table are labelled anomalous, (n,)."""
    return table["label"].isin(["anomalous"]).to_numpy(dtype=bool)


def numbers(table: pd.DataFrame, column: str) -> Floats:
    """Return a column as floats, (n,); NaN where it is empty, and everywhere if the table does not have it."""
    return table.reindex(columns=[column])[column].to_numpy(dtype=float, na_value=np.nan)


def category_names(table: pd.DataFrame) -> "pd.Series[Any]":
    """The category of each image; `dataset/category` where the table has more than one data set."""
    if "dataset" in table and table["dataset"].nunique() > 1:
        return table["dataset"].astype(str) + "/" + table["category"].astype(str)
    return table["category"]


def without_normal(table: pd.DataFrame) -> bool:
    """Whether no image of a prediction table is normal, so that `BOTH_LABELS` are not measured."""
    return not (table["label"] == "normal").any()


def without_boxes(table: pd.DataFrame) -> int:
    """How many anomalous images of a prediction table have nothing to locate, since only their label is known."""
    return int(((table["label"] == "anomalous") & table["iou"].isna()).sum())


def groups(table: pd.DataFrame) -> Groups:
    """`samples` of a prediction table, or `None` where each image is its own."""
    sample = samples(table)
    return sample if len(np.unique(sample)) < len(sample) else None


def samples(table: pd.DataFrame) -> NDArray[np.int64]:
    """The number of each image's physical sample, counted from 0: its `group`; an image without one is its own."""
    if "group" not in table:
        return np.arange(len(table))
    keys = [f"image {i}" if pd.isna(group) else f"group {group}" for i, group in enumerate(table["group"])]
    return np.asarray(pd.factorize(np.array(keys, dtype=object))[0])


def same_images(candidate: pd.DataFrame, reference: pd.DataFrame) -> None:
    """Raise AdfmError, naming them, where two prediction tables do not hold the same images once each."""
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


def decide(table: pd.DataFrame, probability: Floats, threshold: float | None) -> NDArray[Any]:
    """Return the label of each image at a threshold; its letter, or `None`, without a probability or a threshold."""
    letters = table["predicted"].astype(object).where(table["predicted"].notna(), None).to_numpy()
    if threshold is None:
        return letters
    by_probability = np.where(probability >= threshold, "anomalous", "normal").astype(object)
    return np.where(np.isnan(probability), letters, by_probability)


def as_decided(table: pd.DataFrame) -> pd.DataFrame:
    """A prediction table as it counts in production: decisions at the threshold in the place of the letters.

    An image that is flagged has all `regions` for `predicted_boxes`, whatever its letter; one that is not has none. A
    table without a column `decision` is returned as it is.

    Raises:
        AdfmError: It has decisions, but not the localisation of the regions.
    """
    if "decision" not in table:
        return table
    if missing := [f"region_{name}" for name in COMPARED if f"region_{name}" not in table]:
        columns = f"a column decision, but no {', '.join(missing)}"
        raise AdfmError(f"The prediction table has {columns}; evaluate again, `adfm evaluate`.")
    flagged = (table["decision"] == "anomalous").to_numpy(dtype=bool)
    regions = {name: numbers(table, f"region_{name}") for name in COMPARED}
    # Without a box: an overlap of 0 where there is something to overlap, no matched pair, every defect missed.
    nothing = {name: np.where(np.isnan(values), np.nan, 0.0) for name, values in regions.items()}
    nothing["matched_iou"] = np.full(len(table), np.nan)
    nothing["false_negatives"] = regions["true_positives"] + regions["false_negatives"]
    compared = {name: np.where(flagged, regions[name], nothing[name]) for name in COMPARED}
    judged = table.assign(predicted=table["decision"], **compared)
    if "regions" in table:
        boxes = [list(boxes) if flag else [] for boxes, flag in zip(table["regions"], flagged, strict=True)]
        judged["predicted_boxes"] = np.fromiter(boxes, dtype=object, count=len(boxes))
    return judged


def outcomes(table: pd.DataFrame) -> "pd.Series[Any]":
    """For each image one of `OUTCOMES`; the IoU is that of the table's boxes."""
    anomalous, iou = is_defective(table), numbers(table, "iou")
    flagged, passed = ((table["predicted"] == word).to_numpy(dtype=bool) for word in ("anomalous", "normal"))
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


def confusion(table: pd.DataFrame) -> NDArray[np.int64]:
    """Count the normal, and the anomalous, images that were answered normal, anomalous, or unparseably, (2, 3)."""
    normal, flagged = ((table["predicted"] == word).to_numpy(dtype=bool) for word in ("normal", "anomalous"))
    anomalous = is_defective(table)
    answers = (normal, flagged, ~normal & ~flagged)
    return np.array([[int((label & answer).sum()) for answer in answers] for label in (~anomalous, anomalous)])


def summarize(table: pd.DataFrame, resamples: int, seed: int, small: float, large: float) -> dict[str, Any]:
    """Measure a prediction table, as a whole and in parts, with 95 % intervals.

    Args:
        table: Prediction table, one row an image; the order of the rows does not matter.
        resamples: Bootstrap resamples.
        seed: Seed of the resampling.
        small: Defects below this share of the image's area are `small`.
        large: Defects from this share on are `large`; `medium` are those between.

    Returns:
        `overall`, and by name `datasets`, `categories`, `defects` (the images with a defect of that type, against the
        normal ones of the categories that have it) and `sizes` (recall and localisation only), each as of `overall`.
    """
    defects_alone = without_normal(table)
    located = ("recall", "miss_rate", "iou", "mask_iou", "matched_iou", "box_f1", "iou_10", "iou_30", "iou_50")

    def described(part: pd.DataFrame, names: Names = None) -> dict[str, Any]:
        return overall(part, resamples, seed, names, defects_alone)

    categories, normal = category_names(table), table["label"] == "normal"
    defects = {}
    for defect in sorted(table["defect"].dropna().unique()):
        chosen = table["defect"] == defect
        defects[str(defect)] = described(table[chosen | (normal & categories.isin(categories[chosen]))])
    share = table["area_share"].astype(float)
    sizes = {"small": share < small, "medium": (share >= small) & (share < large), "large": share >= large}
    return {
        "overall": described(table),
        "datasets": {str(name): described(part) for name, part in table.groupby("dataset")},
        "categories": {str(name): described(part) for name, part in table.groupby(categories)},
        "defects": defects,
        "sizes": {size: described(table[chosen], located) for size, chosen in sizes.items() if chosen.any()},
    }


def overall(
    table: pd.DataFrame, resamples: int, seed: int, names: Names = None, defects_alone: bool | None = None
) -> dict[str, Any]:
    """Measure a prediction table as a whole, with 95 % intervals; all metrics, or some by `names`.

    Returns the counts `images`, `anomalous`, `normal`, `unparseable`, `without_boxes` (anomalous, but only the label is
    known), and for each metric of `measure` its value and `<metric>_low`, `<metric>_high`; `None` where it is not
    defined, and `BOTH_LABELS` with `defects_alone` (no image is normal).
    """
    anomalous = int(is_defective(table).sum())
    counts = {
        "images": len(table),
        "anomalous": anomalous,
        "normal": len(table) - anomalous,
        "unparseable": int(table["predicted"].isna().sum()),
        "without_boxes": without_boxes(table),
    }
    defects_alone = without_normal(table) if defects_alone is None else defects_alone
    table = table.sort_values("id")
    intervals = _bootstrapped(measure(table), samples(table), resamples, seed, names) | limits_of_means(table, names)
    return counts | (_decision_left_out(intervals) if defects_alone else intervals)


def _decision_left_out(intervals: dict[str, Any]) -> dict[str, Any]:
    left_out = {f"{name}{end}" for name in BOTH_LABELS for end in ENDS}
    return {name: None if name in left_out else value for name, value in intervals.items()}


def difference(candidate: pd.DataFrame, reference: pd.DataFrame, resamples: int, seed: int) -> dict[str, float | None]:
    """Measure candidate minus reference for every metric that both have, as `overall`, with paired 95 % intervals.

    The tables are of the same images, in any order; a column `group` of the candidate is that of both.

    Raises:
        AdfmError: The tables do not hold the same images.
    """
    same_images(candidate, reference)
    candidate, reference = candidate.sort_values("id"), reference.sort_values("id")
    left, right = measure(candidate), measure(reference)

    def change(weights: Floats) -> dict[str, Floats]:
        after, before = left(weights), right(weights)
        return {name: after[name] - before[name] for name in after if name in before}

    intervals = _bootstrapped(change, samples(candidate), resamples, seed)
    group, before = groups(candidate), of_images(reference)
    for name, after in of_images(candidate).items():
        # A mean over other images of each model, such as precision, is not a mean of differences.
        if name in before and np.array_equal(np.isnan(after), np.isnan(before[name])) and not np.isnan(after).all():
            limits = difference_limits(after - before[name], group, name not in _OVERLAPS)
            intervals[f"{name}_low"], intervals[f"{name}_high"] = limits
    return _decision_left_out(intervals) if without_normal(candidate) else intervals


def values(table: pd.DataFrame) -> dict[str, float | None]:
    """The metrics of `measure` for a prediction table as it is; `None` where one is not defined."""
    measured = {name: float(value[0]) for name, value in measure(table)(np.ones((1, len(table)))).items()}
    return {name: None if math.isnan(value) else value for name, value in measured.items()}


def measure(table: pd.DataFrame) -> Measure:
    """The metrics of a prediction table, as a function of how often each image counts.

    Detection takes `anomalous` as the positive class and an unparseable answer as the wrong one. Localisation is over
    anomalous images: `iou`, `mask_iou` (where there is a mask) and `matched_iou` (where a box was predicted) are means
    over images; `iou_10`, `iou_30`, `iou_50` are shares of images with an IoU of at least 0.1, 0.3, 0.5; `box_f1` is
    over all boxes (micro), at IoU 0.5. `kind_right` is the share of the defective images of one known kind that are
    answered anomalous with this kind; of a table with the columns `kind` and `predicted_kind`.

    The function takes weights (weightings, n), and returns for each metric an array (weightings,), NaN where it is not
    defined. `np.ones((1, n))` gives the metrics of the table as it is.
    """
    anomalous, score, means = is_defective(table), numbers(table, "score"), of_images(table)
    columns = {name: np.nan_to_num(values) for name, values in means.items()}
    columns |= {f"has_{name}": ~np.isnan(values) for name, values in means.items()}
    columns |= {name: np.where(anomalous, np.nan_to_num(numbers(table, name)), 0.0) for name in _BOXES}
    summands = np.column_stack(list(columns.values())).astype(float)
    auroc = _auroc(*ranked(table)) if "score" in table else lambda weights: np.full(len(weights), np.nan)
    ece, ece_of_score = (_calibration_error(each, anomalous) for each in (numbers(table, "probability"), score))

    def metrics(weights: Floats) -> dict[str, Floats]:
        total = dict(zip(columns, (weights @ summands).T, strict=True))
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = {name: total[name] / total[f"has_{name}"] for name in means}
            hits, boxes = total["recall"], 2 * total["true_positives"]
            return mean | {
                "balanced_accuracy": (mean["recall"] + mean["specificity"]) / 2,
                "f1": 2 * hits / (total["has_recall"] + total["has_precision"]),
                "auroc": auroc(weights),
                "ece": ece(weights),
                "ece_of_score": ece_of_score(weights),
                "box_f1": boxes / (boxes + total["false_positives"] + total["false_negatives"]),
            }

    return metrics


def of_images(table: pd.DataFrame) -> dict[str, Floats]:
    """For each metric that is a mean over images, each image's value, (n,); NaN where an image does not count."""
    anomalous = is_defective(table)
    parsed = table["predicted"].notna().to_numpy(dtype=bool)
    right = parsed & (table["predicted"].astype(object) == table["label"].astype(object)).to_numpy(dtype=bool)
    flagged = anomalous == right  # a normal image that is answered wrongly, or not at all, too
    overlaps = {name: np.where(anomalous, numbers(table, name), np.nan) for name in _OVERLAPS}
    iou = overlaps["iou"]

    def over(images: NDArray[np.bool_], values: NDArray[np.bool_]) -> Floats:
        return np.where(images, values.astype(float), np.nan)

    means = {
        "accuracy": right.astype(float),
        "precision": over(flagged, anomalous),
        "recall": over(anomalous, right),
        "miss_rate": over(anomalous, ~right),
        "specificity": over(~anomalous, right),
        "overkill": over(~anomalous, ~right),
        "parse_rate": parsed.astype(float),
        **overlaps,
        **{f"iou_{percent}": over(~np.isnan(iou), iou >= percent / 100) for percent in (10, 30, 50)},
    }
    if "predicted_kind" in table:
        pairs = kind_pairs(table)
        means[KIND] = np.array([np.nan if kind in (None, NORMAL) else float(kind == given) for kind, given in pairs])
    return means


def _auroc(anomalous: NDArray[np.bool_], scores: Floats) -> Callable[[Floats], Floats]:
    """Area under the ROC curve as the probability that a defect outranks a normal image (Mann-Whitney)."""
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
    """The expected calibration error of `BINS` equal-mass bins, recomputed in every resample; NaN is left out."""
    # It is never 0 by chance alone: about 0.04 with 768 images and perfect probabilities, 0.10 with 100.
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
        # The bins of `reliability`, of an image repeated as often as it counts.
        middle = (np.cumsum(times, axis=1) - times / 2) / np.where(total > 0, total, 1)
        bins = np.clip(np.floor(middle * BINS), 0, BINS - 1).astype(np.int64)
        places = bins + BINS * np.arange(len(weights))[:, None]
        over = np.add.reduceat(counted * excess, starts, axis=1)
        sums = np.bincount(places.ravel(), over.ravel(), minlength=BINS * len(weights)).reshape(-1, BINS)
        return np.asarray(np.abs(sums).sum(axis=1) / total[:, 0])

    return error


def reliability(probability: Floats, anomalous: NDArray[np.bool_]) -> list[tuple[float, float, int]]:
    """The points of a reliability diagram: for each of `BINS` bins of equally many images, from low to high.

    A point is mean probability, share of anomalous images, and the number of images of a bin; NaN is left out. Images
    with the same probability share a bin, so that there may be fewer bins, and unequal ones.
    """
    known = ~np.isnan(probability)
    probability, anomalous = probability[known], anomalous[known]
    # Ties have one rank, so that the order of the images does not matter.
    bins = np.floor((pd.Series(probability).rank().to_numpy() - 0.5) / max(1, len(probability)) * BINS)
    return [
        (float(probability[there].mean()), float(anomalous[there].mean()), int(there.sum()))
        for there in (bins == number for number in np.unique(bins))
    ]


def ranked(table: pd.DataFrame) -> tuple[NDArray[np.bool_], Floats]:
    """Which images are anomalous, and the scores to rank all by; a missing one stands where it is most wrong."""
    anomalous, score = is_defective(table), numbers(table, "score")
    return anomalous, np.where(np.isnan(score), np.where(anomalous, -1.0, 2.0), score)


def operating_point(table: pd.DataFrame, at: float | None, resamples: int, seed: int) -> dict[str, float | None]:
    """Measure decisions at a threshold that was chosen on other images; `at` is `None` if the letter decides.

    Returns `threshold`, and for each metric of `AT_THRESHOLD` `<metric>_at_threshold` with `_low` and `_high`; `None`
    without a threshold. The threshold is the same in all resamples.
    """
    measured = None if at is None else overall(as_decided(table), resamples, seed, AT_THRESHOLD)
    return {"threshold": at} | _at_threshold(measured)


def operating_difference(
    candidate: pd.DataFrame, at: float | None, other: pd.DataFrame, other_at: float | None, resamples: int, seed: int
) -> dict[str, float | None]:
    """Candidate minus other, each at its own threshold: as `operating_point`, paired as `difference` does."""
    if at is None or other_at is None:
        return _at_threshold(None)
    return _at_threshold(difference(as_decided(candidate), as_decided(other), resamples, seed))


def _at_threshold(intervals: dict[str, float | None] | None) -> dict[str, float | None]:
    names = [(name, end) for name in AT_THRESHOLD for end in ENDS]
    return {f"{name}_at_threshold{end}": intervals[name + end] if intervals else None for name, end in names}


def best_threshold(anomalous: NDArray[np.bool_], score: Floats) -> float:
    """Fit the score from which on images are called anomalous, for the best balanced accuracy on other images.

    It is where a logistic regression of the label on the score's log-odds, both labels weighing the same, gives one
    half (Platt, 1999, Probabilistic outputs for support vector machines). With defective images alone it is their
    lowest score, without any 1; one half if scores, in [0, 1], do not rise with defects.
    """
    from sklearn.linear_model import LogisticRegression

    if anomalous.all():
        return float(score.min())
    if not anomalous.any():
        return 1.0
    if (least := score[anomalous].min()) > (most := score[~anomalous].max()):
        return float(most + least) / 2
    # The threshold that is best on the images themselves follows chance: with 60 to 80 of normally distributed log-odds
    # it costs 0.005 to 0.011 on others, this 0.002 to 0.003.
    odds = special.logit(np.clip(score, _SURE, 1 - _SURE))
    fitted = LogisticRegression(class_weight="balanced").fit(odds[:, None], anomalous)
    slope, intercept = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    return float(special.expit(-intercept / slope)) if slope > 0 else 0.5


def with_limits(values: Mapping[str, Any], name: str) -> tuple[float | None, float | None, float | None]:
    """Return value, lower and upper limit of a metric; `None` for what `values` does not have."""
    return values.get(name), values.get(f"{name}_low"), values.get(f"{name}_high")


def written(value: float | None, low: float | None = None, high: float | None = None, sign: str = "") -> str:
    """Write a value and, where it has them, its limits, as `0.950 [0.917, 0.972]`; `-` without a value."""
    if value is None:
        return "-"
    return f"{value:{sign}.3f}" + ("" if low is None or high is None else f" [{low:{sign}.3f}, {high:{sign}.3f}]")


def rates(values: Mapping[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Return recall and specificity with their limits, where they are measured; at the threshold where there is one.

    `values` are metrics of a model, as `summarize` and `operating_point` return them.
    """
    at = "_at_threshold" if values.get("threshold") is not None else ""
    measured = {}
    for name, miss in (("recall", "miss_rate"), ("specificity", "overkill")):
        error, low, high = with_limits(values, miss + at)
        if error is not None and low is not None and high is not None:
            measured[name] = 1 - error, 1 - high, 1 - low
    return measured


def images_needed(rate: float, half: float, images: int, width: float) -> tuple[int, int]:
    """Return how many independent images a measured interval stands for, and how many images make one of `width`.

    `half` is half of the interval of a rate measured on `images`, `width` half of the interval to plan for.
    """
    # Images of one part count as one, so the interval is that of fewer images; new ones have as many a part.
    parts = min(images, statistics.images_for_half_width(rate, half + 1e-6))
    return parts, math.ceil(statistics.images_for_half_width(rate, width) * images / parts)


def more_images(values: Mapping[str, Any]) -> str:
    """Write how wide the intervals of recall and specificity are, and would be with more test images; empty without.

    `values` are those of `rates`, `width` is half of the interval to plan for.
    """
    now, more, enough, width = [], [], [], 0.05  # half of the interval to plan for
    for title, (rate, low, high) in rates(values).items():
        label, key = ("defective", "anomalous") if title == "recall" else ("normal", "normal")
        images, half = values[key], (high - low) / 2
        parts, needed = images_needed(rate, half, images, width)
        now.append(f"the {title} of {rate:.3f} is measured to ± {half:.3f} with {images:,} {label} images")
        more.append(f"± {statistics.half_width(rate, 4 * parts):.3f}")
        enough.append(f"{needed:,} {label}")
    if not now:
        return ""
    how = " at the threshold" if values.get("threshold") is not None else ""
    return (
        f"More test images: {' and '.join(now)}{how}; four times as many would make it {' and '.join(more)};"
        f" ± {width:g} takes about {' and '.join(enough)} images."
    )


def limits_of_means(table: pd.DataFrame, names: Names = None) -> dict[str, float]:
    """Return the 95 % limits of rates and means, for a table ordered by id."""
    # A bootstrap of 64 defects without a miss would give a miss rate of [0, 0], and the truth may be 5 %.
    images, group = of_images(table), groups(table)
    limits = {
        name: confidence_limits(values, group, name not in _OVERLAPS)
        for name, values in images.items()
        if not np.isnan(values).all()
    }
    if {"recall", "specificity"} <= limits.keys():
        # Of the mean of two independent rates (MOVER; Newcombe 1998, Statistics in Medicine 17:873).
        both = {name: float(np.nanmean(images[name])) for name in ("recall", "specificity")}
        below, above = (math.hypot(*(both[name] - limits[name][end] for name in both)) / 2 for end in (0, 1))
        middle = sum(both.values()) / 2
        limits["balanced_accuracy"] = middle - below, middle + above
    chosen = [name for name in limits if names is None or name in names]
    return {f"{name}{end}": limits[name][place] for name in chosen for place, end in enumerate(ENDS[1:])}


def confidence_limits(values: Floats, group: Groups = None, binary: bool = True) -> tuple[float, float]:
    """Return the lower and upper 95 % confidence limit of a mean of values in [0, 1]; exact for rates (`binary`).

    `values` is NaN where an image does not count; `group` numbers the images that show one part, or is `None`.
    """
    values, group = _counted(values, group)
    at_most = statistics.rate_at_most if binary else statistics.mean_at_most
    return 1 - at_most(1 - values, _ALPHA, group), at_most(values, _ALPHA, group)


def difference_limits(change: Floats, group: Groups = None, binary: bool = True) -> tuple[float, float]:
    """Return the lower and upper 95 % confidence limit of a mean change, in [-1, 1], on the same images.

    `change` is -1, 0 or 1 if `binary`; NaN, and `group`, as in `confidence_limits`.
    """
    change, group = _counted(change, group)
    low, high = (statistics.loss_at_most(sign * change, _ALPHA, group, binary) for sign in (-1, 1))
    return -low, high


def _counted(values: Floats, group: Groups) -> tuple[Floats, Groups]:
    counting = ~np.isnan(values)
    return values[counting], None if group is None else group[counting]


def _bootstrapped(
    measured: Measure, sample: NDArray[np.int64], resamples: int, seed: int, names: Names = None
) -> dict[str, float | None]:
    """Each metric with its percentile interval; resamples in which it is not defined are left out."""
    values = measured(np.ones((1, len(sample))))
    drawn = [measured(weights) for weights in bootstrap_weights(sample, resamples, seed)]
    result: dict[str, float | None] = {}
    for name in names or values:
        value, draws = float(values[name][0]), np.concatenate([part[name] for part in drawn])
        draws = draws[~np.isnan(draws)]
        interval: list[float | None] = [None] * 3
        if not math.isnan(value) and len(draws):
            interval = [value, *np.quantile(draws, [_ALPHA, 1 - _ALPHA]).tolist()]
        result |= {f"{name}{end}": each for end, each in zip(ENDS, interval, strict=True)}
    return result


def bootstrap_weights(sample: NDArray[np.int64], resamples: int, seed: int) -> Iterator[Floats]:
    """How often each image is drawn in each bootstrap resample, (some resamples, images), a few megabytes at a time.

    As many physical samples are drawn as there are, each with all its images.
    """
    # As many physical samples are drawn as there are, each with all its images. They are alike; taken for independent
    # they would make intervals too narrow.
    random = np.random.default_rng(seed)
    samples = int(sample.max()) + 1
    most = max(1, 200_000 // len(sample))
    for start in range(0, resamples, most):
        count = min(most, resamples - start)
        drawn = random.integers(samples, size=(count, samples)) + samples * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * samples).reshape(count, samples)
        yield times[:, sample].astype(float)


# ------------------------------------------------------------------------------------------------- kinds of defects

# In the table of kinds: an image answered anomalous, or without a letter, without a kind; and a normal image or one
# that is answered so.
NO_KIND, NORMAL = "(no kind)", "(normal)"


def kind_pairs(table: pd.DataFrame) -> list[tuple[str | None, str]]:
    """For each image its kind, `None` if it is defective and not of one known kind, and the kind that it is given.

    Either may be `NORMAL`, the latter `NO_KIND`.
    """
    normal, given = ((table[name] == "normal").to_numpy(dtype=bool) for name in ("label", "predicted"))
    flagged = (table["predicted"] == "anomalous").to_numpy(dtype=bool) & table["predicted_kind"].notna().to_numpy()
    actual = np.where(normal, NORMAL, table["kind"].astype(object).where(table["kind"].notna(), None))
    predicted = np.where(flagged, table["predicted_kind"].astype(object), np.where(given, NORMAL, NO_KIND))
    return list(zip(actual.tolist(), predicted.tolist(), strict=True))


def kinds_confusion(table: pd.DataFrame) -> dict[str, Any]:
    """Return the confusion table of kinds: names of its `rows` (actual) and `columns` (given), and the `counts`.

    Defective images that are not of one known kind are left out. The row and column `NORMAL`, and the column `NO_KIND`,
    come last; `NORMAL` has no row where no image is normal.
    """
    # Defective images that are not of one known kind are left out.
    counts = Counter(pair for pair in kind_pairs(table) if pair[0] is not None)
    last = {NO_KIND: 1, NORMAL: 2}
    rows = sorted({str(actual) for actual, _ in counts}, key=lambda name: (last.get(name, 0), name))
    given = {name for _, name in counts} | {name for name in rows if name != NORMAL} | {NO_KIND, NORMAL}
    columns = sorted(given, key=lambda name: (last.get(name, 0), name))
    return {"rows": rows, "columns": columns, "counts": [[counts[actual, name] for name in columns] for actual in rows]}
