"""Sample sizes: how many test images of which kind a policy needs, and a data set has (`adfm gate --plan SHARDS`).

Calculated for a good candidate: its true error (escape rate, overkill, 1 - accuracy, 1 - IoU) is half of what the limit
allows, and it is as good as production, but differs from it on 12 % of the images.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.compute as pc
from scipy import special

from adfm import statistics
from adfm.data import shards as shards_
from adfm.evaluation.gate_metrics import METRICS, Bound, Metric, values
from adfm.evaluation.metrics import samples
from adfm.registry import gate
from adfm.registry.policy import Policy
from adfm.text import aligned, printable

POWERS = (0.8, 0.9)
ERROR = 0.5  # error of a good candidate, as a share of the error that the limit allows
DIFFERENT = 0.12  # share of the images on which two models that are equally good differ


@dataclass(frozen=True)
class Need:
    """The number of images that one question about one metric needs."""

    of: str  # whole, category or defect
    name: str  # of the category or kind of defect; empty for the whole
    metric: str
    question: str  # limit; margin, against production and against the anchor
    bound: float  # the limit or the margin
    kind: str  # which images count
    images: int  # how many of them there are
    needed: tuple[int | None, int | None]  # for each of POWERS; None where no number would do
    judged: bool  # whether the part has as many as Policy.enough

    @property
    def lacks(self) -> bool:
        """Whether there are fewer images than the lower power needs."""
        return self.needed[0] is None or self.images < self.needed[0]


def plan(policy: Policy, images: pd.DataFrame, look: int = 1) -> list[Need]:
    """Return the images that a policy needs for the whole, each category and each kind of defect.

    Args:
        policy: Limits, margins, level and budget.
        images: Table of shards or of predictions: `category`, `label`; `defect`, `boxes`, `dataset` if there are any;
            `mask_iou`, null where an image has no mask.
        look: How many candidates the images have judged, this one included.
    """
    level = policy.level_at(look)
    located = images["label"].isin(["anomalous"]) & (images["boxes"].map(len).gt(0) if "boxes" in images else True)
    # A table of right answers, so that every metric tells which images it counts.
    masked = images.reindex(columns=["mask_iou"])["mask_iou"].notna()
    overlaps = {"iou": np.where(located, 1.0, np.nan), "mask_iou": np.where(masked, 1.0, np.nan)}
    answers = images.assign(predicted=images["label"], **overlaps)
    counting = {name: ~np.isnan(each) for name, each in values(answers, policy.whole).items()}
    needs = []
    for name, bound in policy.whole.items():
        needs += _needs("whole", "", name, bound, int(counting[name].sum()), level, policy)
    for of, name, metric, where in gate.parts(images, policy):
        needs += _needs(of, name, metric, policy.parts[metric], int((where & counting[metric]).sum()), level, policy)
    return needs


def text(needs: list[Need], policy: Policy, look: int = 1) -> str:
    """Format a plan: the whole as a table, then the parts that lack images."""
    level = policy.level_at(look)
    head = ["metric", "asked", "images", *(f"for power {power:g}" for power in POWERS), ""]
    rows = []
    for need in (need for need in needs if need.of == "whole"):
        sign = ("≥" if METRICS[need.metric].higher else "≤") if need.question == "limit" else "loss <"
        numbers = ("-" if number is None else str(number) for number in need.needed)
        row = [METRICS[need.metric].title, f"{sign} {need.bound:.1%}", f"{need.images} {need.kind}", *numbers]
        rows.append([*row, "too few" if need.lacks else "enough"])
    lines = [*aligned([head, *rows]), "", *_gains(needs, policy, level), *_part_lines(needs, policy)]
    lines.append(
        f"Level {level:.2g} (look {look} of {policy.looks}). Assumed: errors are half of what a limit allows; a"
        f" candidate as good as production differs from it on {DIFFERENT:.0%} of the images."
    )
    return "\n".join(lines)


def of_shards(shards: Path, policy: Policy, look: int = 1) -> str:
    """Return the plan for the test split of shards as text.

    Raises:
        AdfmError: The shards cannot be read, or have no test split.
    """
    images = shards_.table(shards, "test").to_pandas()
    if "mask_iou" in policy.whole:  # the table is without masks
        masked = [pc.is_valid(rows["mask"]) for rows in shards_.batches(shards, "test", ["mask"])]
        images["mask_iou"] = np.where(np.concatenate(masked), 1.0, np.nan)
    words = text(plan(policy, images, look), policy, look)
    parts = len(np.unique(samples(images)))
    if parts < len(images):
        words += f"\nThe {len(images)} images show {parts} parts; images of one part are alike, so compare parts."
    return words


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
    if most >= 1:  # nothing is required
        return 0
    if entry.binary:
        return statistics.images_for_rate(ERROR * most, most, level, power)
    if most <= 0:
        return None
    return statistics.images_for_loss(math.sqrt(DIFFERENT), (1 - ERROR) * most, level, power)


def _gains(needs: list[Need], policy: Policy, level: float) -> list[str]:
    """The smallest gain that all images are likely to prove, for the metrics that a promotion may rest on."""
    images = {need.metric: need.images for need in needs if need.of == "whole"}
    judged = [name for name in images if METRICS[name].gain and images[name]]
    if policy.rule != "gain" or not judged:
        return []
    z = float(special.ndtri(POWERS[0]) - special.ndtri(level / len(judged)))
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
    return [*aligned([head, *rows]), ""]
