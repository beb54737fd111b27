"""How many test images of which kind a policy needs, against what a data set has: `adfm gate --plan SHARDS`.

Reckoned for a good candidate: one whose error (escape rate, overkill, 1 - accuracy, 1 - IoU) is in truth half of what
the limit allows, and that is as good as production, but differs from it on 12 % of the images. A candidate closer to
a limit needs more images; the gate says how many when it cannot tell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from adfm import statistics
from adfm.evaluation.gate_metrics import METRICS, Bound, Metric
from adfm.evaluation.metrics import category_names, samples
from adfm.registry.policy import Policy
from adfm.text import printable

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

POWERS = (0.8, 0.9)
ERROR = 0.5
"""Error of a good candidate, as a share of the error that the limit allows."""
DIFFERENT = 0.12
"""Share of the images on which two models that are equally good differ."""


@dataclass(frozen=True)
class Need:
    """What one question about one metric needs.

    Args:
        of: `whole`, `category` or `defect`.
        name: Name of the category or kind of defect; empty for the whole.
        metric: Its name in `policy.METRICS`.
        question: `limit`; `margin`, against production and against the anchor.
        bound: The limit or the margin.
        kind: Which images count.
        images: How many of them there are.
        needed: Images needed for each of `POWERS`; `None` where no number would do.
        judged: Whether the part has the images without which it is not judged (`Policy.enough`).
    """

    of: str
    name: str
    metric: str
    question: str
    bound: float
    kind: str
    images: int
    needed: tuple[int | None, int | None]
    judged: bool

    @property
    def lacks(self) -> bool:
        """Whether there are fewer images than the lower power needs."""
        return self.needed[0] is None or self.images < self.needed[0]


def plan(policy: Policy, images: pd.DataFrame, look: int = 1) -> list[Need]:
    """What a policy needs of test images, for the whole, each category and each kind of defect.

    Args:
        policy: What is asked.
        images: One row an image: `category`, `label`; `defect`, `boxes` and `dataset` if there are any; `mask_iou`,
            null where an image has no mask. The table of shards or a prediction table.
        look: The number of the candidate among those that the images judge.
    """
    level = statistics.level_of_look(min(look, policy.looks), policy.looks, policy.level)
    anomalous = images["label"].isin(["anomalous"])
    located = anomalous & (images["boxes"].map(len).gt(0) if "boxes" in images else True)
    # A table of right answers, so that every metric tells which images it counts.
    masked = images.reindex(columns=["mask_iou"])["mask_iou"].notna()
    answers = images.assign(
        predicted=images["label"], iou=np.where(located, 1.0, np.nan), mask_iou=np.where(masked, 1.0, np.nan)
    )
    counting = {name: ~np.isnan(METRICS[name].values(answers)) for name in policy.whole}
    everything = np.ones(len(images), dtype=bool)
    needs = [
        need
        for name, bound in policy.whole.items()
        for need in _needs("whole", "", name, bound, int(counting[name].sum()), level, policy)
    ]
    for of, label, where in _parts(images, everything, anomalous.to_numpy(dtype=bool)):
        for name, bound in policy.parts.items():
            # A kind of defect has no normal images, and accuracy over it is 1 - its escape rate.
            if name in counting and (of == "category" or METRICS[name].over.startswith("anomalous")):
                needs += _needs(of, label, name, bound, int((where & counting[name]).sum()), level, policy)
    return needs


def text(needs: list[Need], policy: Policy, look: int = 1) -> str:
    """A plan for people: the whole as a table, then the parts that lack images."""
    level = statistics.level_of_look(min(look, policy.looks), policy.looks, policy.level)
    head = ["metric", "asked", "images", *(f"for power {power:g}" for power in POWERS), ""]
    rows = [
        [
            METRICS[need.metric].title,
            f"{_sign(need)} {need.bound:.1%}" if need.question == "limit" else f"loss < {need.bound:.1%}",
            f"{need.images} {need.kind}",
            *("-" if number is None else str(number) for number in need.needed),
            "too few" if need.lacks else "enough",
        ]
        for need in needs
        if need.of == "whole"
    ]
    lines = [*_aligned([head, *rows]), "", *_gains(needs, policy, level), *_part_lines(needs, policy)]
    lines.append(
        f"Level {level:.2g} (look {look} of {policy.looks}). Assumed: errors are half of what a limit allows; a"
        f" candidate as good as production differs from it on {DIFFERENT:.0%} of the images."
    )
    return "\n".join(lines)


def of_shards(shards: Path, policy: Policy, look: int = 1) -> str:
    """The plan for the test split of shards, in words.

    Raises:
        AdfmError: The shards cannot be read, or have no test split.
    """
    import pyarrow.compute as pc

    from adfm.data.shards import batches, table

    images = table(shards, "test").to_pandas()
    if "mask_iou" in policy.whole:  # the table is without masks
        masked = [
            pc.is_valid(rows["mask"]).to_numpy(zero_copy_only=False) for rows in batches(shards, "test", ["mask"])
        ]
        images["mask_iou"] = np.where(np.concatenate(masked), 1.0, np.nan)
    words = text(plan(policy, images, look), policy, look)
    parts = len(np.unique(samples(images)))
    if parts < len(images):
        words += f"\nThe {len(images)} images show {parts} parts; images of one part are alike, so compare parts."
    return words


def _parts(
    images: pd.DataFrame, everything: NDArray[np.bool_], anomalous: NDArray[np.bool_]
) -> list[tuple[str, str, NDArray[np.bool_]]]:
    columns = [("category", category_names(images).astype(str), everything)]
    if "defect" in images:
        columns.append(("defect", images["defect"], anomalous))
    return [
        (of, str(name), (column == name).to_numpy(dtype=bool, na_value=False) & where)
        for of, column, where in columns
        for name in (sorted(column[where].dropna().unique()) if column[where].nunique() > 1 else [])
    ]


def _needs(of: str, name: str, metric: str, bound: Bound, images: int, level: float, policy: Policy) -> list[Need]:
    entry, judged = METRICS[metric], of == "whole" or images >= policy.enough
    needs = []
    if bound.limit is not None:
        first, second = (_for_limit(entry, bound.limit, level, power) for power in POWERS)
        needs.append(Need(of, name, metric, "limit", bound.limit, entry.over, images, (first, second), judged))
    if bound.margin is not None:
        least, more = (statistics.images_for_loss(math.sqrt(DIFFERENT), bound.margin, level, power) for power in POWERS)
        needs.append(Need(of, name, metric, "margin", bound.margin, entry.over, images, (least, more), judged))
    return needs


def _for_limit(entry: Metric, limit: float, level: float, power: float) -> int | None:
    most = 1 - limit if entry.higher else limit
    if most >= 1:  # nothing is asked
        return 0
    if entry.binary:
        return statistics.images_for_rate(ERROR * most, most, level, power)
    if most <= 0:
        return None
    return statistics.images_for_loss(math.sqrt(DIFFERENT), (1 - ERROR) * most, level, power)


def _sign(need: Need) -> str:
    return "≥" if METRICS[need.metric].higher else "≤"


def _gains(needs: list[Need], policy: Policy, level: float) -> list[str]:
    """The smallest gain that all images are likely to show, for the metrics that a promotion may rest on."""
    images = {need.metric: need.images for need in needs if need.of == "whole"}
    judged = [name for name in images if METRICS[name].gain and images[name]]
    if policy.rule != "gain" or not judged:
        return []
    z = float(stats.norm.isf(level / len(judged)) + stats.norm.ppf(POWERS[0]))
    least = [f"{METRICS[name].title} by {100 * z * math.sqrt(DIFFERENT / images[name]):.1f} points" for name in judged]
    return [f"The smallest gain that is shown with power {POWERS[0]:g}: {' or '.join(least)}.", ""]


def _part_lines(needs: list[Need], policy: Policy) -> list[str]:
    """One line for each part and label of images, with the most that any metric needs."""
    most: dict[tuple[str, str, str], Need] = {}
    for need in needs:
        key = (need.of, need.name, need.kind.split(" with ")[0])
        if need.of != "whole" and (key not in most or (need.needed[0] or 0) > (most[key].needed[0] or 0)):
            most[key] = need
    rows = []
    for (of, name, _), need in most.items():
        if need.judged and not need.lacks:
            continue
        state = "too few" if need.judged else f"not judged below {policy.enough}"
        numbers = ("-" if number is None else str(max(number, policy.enough)) for number in need.needed)
        rows.append([f"{of} {printable(name)}", f"{need.images} {need.kind}", *numbers, state])
    if not most:
        return []
    if not rows:
        return ["Every category and kind of defect has enough images.", ""]
    head = ["part", "images", *(f"for power {power:g}" for power in POWERS), ""]
    return [*_aligned([head, *rows]), ""]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
