"""The promotion gate: may the candidate take production's place? A pure function of two prediction tables.

It judges what a model does in production: decisions at the threshold (the column `decision`, and the regions of flagged
images), or the letters of a table that has none.

Each metric, accuracy and IoU over all images, gets a verdict:

- `worse`: it measures worse than production by more than `max_loss`;
- `better`: it measures better by `min_gain` and by the share `min_relative_gain` of production's value, and a gain of
  zero is excluded with the required confidence;
- `equivalent`: neither.

`gate.rule` joins them: by default no metric is `worse` and at least one is `better`. Whatever the rule, every metric
must reach its floor, and in no category may accuracy or IoU fall by more than `category_max_loss`. Without a production
model the floors alone decide.

In a small category chance alone moves the metrics far; so a fall counts if the required confidence says that there is a
fall at all. With many categories some fall by chance; so that confidence is of all of them together (Bonferroni: each
of k comparisons is judged at 1 - (1 - confidence) / k). A fall that may be chance is told, not punished.

A loss is judged by what was measured, not by the lower end of its interval: a few hundred images cannot prove that one
point was not lost, and a gate that asked for it would stay shut. The reasons say which loss cannot be excluded, and how
many images would exclude it. With fewer than `min_images` normal or anomalous images nothing is judged.

Anomalous images without boxes are left out of IoU. Where no image has any, IoU is `not judged`: it is neither worse nor
better, and a floor above 0 counts as missed, since nobody can say that it is kept.

Confidence is that of a paired bootstrap: the same images are drawn again and again for both models; `low` and `high`
are what the difference falls short of, and exceeds, in `1 - confidence` of the draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adfm.errors import AdfmError
from adfm.evaluation.metrics import as_decided, category_names, difference, listed, same_images, values, without_boxes
from adfm.params import Gate, MetricRule

if TYPE_CHECKING:
    import pandas as pd

_TITLES = {
    "accuracy": "Accuracy (images judged correctly)",
    "iou": "IoU (overlap of marked and true defects)",
}
_COLUMNS = ("id", "category", "label", "predicted", "iou")
_RULES = {
    "none_worse_one_better": "No metric may be worse than in production, and at least one must be better",
    "none_worse": "No metric may be worse than in production",
    "all_better": "Every metric must be better than in production",
}
# Draws that should lie beyond a bound, so that the bound is more than one extreme draw.
_BEYOND = 5


class Incomparable(AdfmError):
    """The tables cannot be judged: they are broken, or not of the same images."""

    exit_code = 2


@dataclass(frozen=True)
class Decision:
    """What the gate decided, and why; `dataclasses.asdict` gives JSON values.

    Args:
        passed: Whether the candidate may go on to approval.
        metrics: For `accuracy` and `iou`: `candidate`, `production`, `difference` (candidate minus production), its
            bounds `low` and `high`, `verdict` (`better`, `equivalent`, `worse`, `no production`, `not judged`),
            `floor_kept`, and the `rule`. What is not known is `None`: without production, or IoU without any boxes.
        categories: For each category: `images`, and for each metric the same five numbers and `fallen`, whether it fell
            by more than the limit, for certain. IoU is `None` where a category has no anomalous image with boxes.
        reasons: The decision in words, first what made it fail, last the rule.
    """

    passed: bool
    metrics: dict[str, dict[str, Any]]
    categories: dict[str, dict[str, Any]]
    reasons: list[str]


def read(file: Path) -> pd.DataFrame:
    """A prediction table from a Parquet file, as evaluation writes them.

    Raises:
        Incomparable: It cannot be read.
    """
    import pandas as pd

    try:
        return pd.read_parquet(file)
    except (OSError, ValueError, KeyError) as error:
        raise Incomparable(
            f"{file} cannot be read as a prediction table ({error}); `adfm evaluate` writes it."
        ) from error


def decide(candidate: pd.DataFrame, production: pd.DataFrame | None, gate: Gate, seed: int = 0) -> Decision:
    """Judges a candidate's predictions against production's on the same images.

    Args:
        candidate: Prediction table: `id`, `category`, `label`, `predicted`, `iou`; `dataset` if there is more than one,
            `group` where images show one part. With `decision` and `region_*`, these are judged. `attrs`, where both
            tables have them, say how they were made; `threshold` may differ.
        production: Prediction table of the model in production, or `None` if there is none yet.
        gate: Floors, tolerances and confidence.
        seed: Seed of the bootstrap; the order of the rows does not matter.

    Raises:
        Incomparable: A table is broken (all that is wrong with it is listed), the two are not of the same images or
            were not made in the same way, or there are too few images.
    """
    judged = [_what_decides("The candidate", candidate)]
    candidate = _checked(candidate, "candidate")
    if production is not None:
        judged.append(_what_decides("Production", production))
        production = _checked(production, "production")
        _check_pair(candidate, production)
    _check_enough(candidate, gate.min_images)

    rules = {"accuracy": gate.accuracy, "iou": gate.iou}
    failures: list[str] = []
    notes: list[str] = []

    metrics = _compare(candidate, production, gate.confidence, gate.bootstrap, seed)
    for name, found in metrics.items():
        found["floor_kept"] = _reaches_floor(found, rules[name])
        found["verdict"] = _verdict(found, rules[name])
        failed = found["verdict"] == "worse" or not found["floor_kept"]
        (failures if failed else notes).append(_sentence(name, found, rules[name], gate, len(candidate)))
        found["rule"] = rules[name].model_dump()
    if without := without_boxes(candidate):
        of_all = f"{without} of {int((candidate['label'] == 'anomalous').sum())} anomalous images"
        notes.append(f"{of_all} have no boxes; they are left out of IoU.")
    notes += judged
    verdicts = [found["verdict"] for found in metrics.values()]
    if production is None:
        notes.append("There is no model in production yet: the floors alone decide.")
    else:
        notes.append(f"The rule: {_RULES[gate.rule][0].lower()}{_RULES[gate.rule][1:]}.")
        if gate.rule == "none_worse_one_better" and "better" not in verdicts:
            failures.append("Neither metric is better than in production: there is nothing to gain from the candidate.")
        if gate.rule == "all_better" and verdicts != ["better", "better"]:
            failures.append("Not every metric is better than in production.")

    parts = list(candidate.groupby(category_names(candidate), sort=True))
    level = 1 - (1 - gate.confidence) / sum(1 + int(part["iou"].notna().any()) for _, part in parts)
    draws = max(gate.bootstrap, math.ceil(_BEYOND / (1 - level)))
    categories: dict[str, dict[str, Any]] = {}
    for key, part in parts:
        other = None if production is None else production[production["id"].isin(part["id"])]
        compared = _compare(part, other, level, draws, seed)
        categories[str(key)] = {"images": len(part), **compared}
        for name, found in compared.items():
            gain, _, most = _gain(found, rules[name])
            found["fallen"] = -gain > gate.category_max_loss and most < 0
            if -gain > gate.category_max_loss:
                words = (
                    f"{key}: {_TITLES[name]} is worse by {_points(-gain)} than in production ({len(part)} images);"
                    f" {_points(gate.category_max_loss)} are allowed"
                )
                if found["fallen"]:
                    failures.append(f"{words}.")
                else:
                    notes.append(f"{words}, but with so few images this may be chance, and it does not count.")
    notes.sort(key=lambda note: note.startswith("The rule: "))
    return Decision(not failures, metrics, categories, failures + notes)


def _compare(
    candidate: pd.DataFrame, production: pd.DataFrame | None, confidence: float, resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """For each metric both values, the difference, and its bounds, each one-sided at `confidence`."""
    before = dict.fromkeys(_TITLES) if production is None else values(production)
    after, change = values(candidate), {}
    if production is not None:
        change = difference(candidate, production, resamples, seed, level=2 * confidence - 1)

    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 9)  # 0.9 - 0.89 is to be 0.01

    return {
        name: {
            "candidate": rounded(after[name]),
            "production": rounded(before[name]),
            "difference": rounded(change.get(name)),
            "low": rounded(change.get(f"{name}_low")),
            "high": rounded(change.get(f"{name}_high")),
        }
        for name in _TITLES
    }


def _gain(found: dict[str, Any], rule: MetricRule) -> tuple[float, float, float]:
    """By how much the candidate is better (negative: worse), at least and at most; zeros where nothing is compared."""
    if found["difference"] is None:
        return 0.0, 0.0, 0.0
    if rule.direction == "higher":
        return found["difference"], found["low"], found["high"]
    return -found["difference"], -found["high"], -found["low"]


def _reaches_floor(found: dict[str, Any], rule: MetricRule) -> bool:
    value: float | None = found["candidate"]
    if value is None:
        return rule.floor <= 0 if rule.direction == "higher" else rule.floor >= 1
    return value >= rule.floor if rule.direction == "higher" else value <= rule.floor


def _verdict(found: dict[str, Any], rule: MetricRule) -> str:
    if found["candidate"] is None:
        return "not judged"
    if found["difference"] is None:
        return "no production"
    gain, least, _ = _gain(found, rule)
    if -gain > rule.max_loss:
        return "worse"
    enough = gain >= rule.min_gain and gain >= rule.min_relative_gain * abs(found["production"])
    return "better" if enough and least > 0 else "equivalent"


def _sentence(name: str, found: dict[str, Any], rule: MetricRule, gate: Gate, images: int) -> str:
    limit = "floor" if rule.direction == "higher" else "ceiling"
    if found["verdict"] == "not judged":
        words = f"{_TITLES[name]} is not judged: no anomalous image has boxes."
        if found["floor_kept"]:
            return words
        nothing = 0 if rule.direction == "higher" else 1
        return (
            f"{words} Whether the {limit} of {rule.floor:.1%} is kept cannot be said; add images with boxes, or set"
            f" gate.{name}.floor to {nothing} to decide without it."
        )
    gain, least, _ = _gain(found, rule)
    words = f"{_TITLES[name]}: {found['candidate']:.1%}"
    if found["verdict"] != "no production":
        words += f" against {found['production']:.1%} in production, {found['verdict']}"
    if found["verdict"] == "better":
        words += f" by {_points(gain)} (at least {_points(least)} with {gate.confidence:.0%} confidence)"
    elif found["verdict"] == "worse":
        words += f" by {_points(-gain)}; {_points(rule.max_loss)} are allowed"
    elif found["verdict"] == "equivalent" and -least > rule.max_loss:
        words += f" (a loss of up to {_points(-least)} cannot be excluded with {gate.confidence:.0%} confidence"
        if rule.max_loss > 0:
            # An interval narrows with the square root of the number of images.
            words += f"; about {math.ceil(images * ((gain - least) / rule.max_loss) ** 2)} images would be needed"
        words += ")"
    return f"{words}. The {limit} of {rule.floor:.1%} is {'kept' if found['floor_kept'] else 'missed'}."


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"


def _what_decides(name: str, table: pd.DataFrame) -> str:
    """Whether letters or decisions are judged, in words."""
    if "decision" not in table or table.attrs.get("threshold", 0) is None:
        return f"{name} has no threshold: its letters are judged."
    at = f" from a probability of {table.attrs['threshold']:.6g} on" if "threshold" in table.attrs else ""
    return f"{name} is judged by its decisions: an image is flagged{at or ' by the column decision'}."


def _checked(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The columns that the gate looks at; raises Incomparable with everything that is wrong with them."""
    import pandas as pd

    if missing := [column for column in _COLUMNS if column not in table]:
        there = ", ".join(map(str, table.columns)) or "none"
        raise Incomparable(f"The {name} table has no column {' and no column '.join(missing)}; it has {there}.")
    if not len(table):
        raise Incomparable(f"The {name} table is empty: evaluate the model first.")
    try:
        table = as_decided(table)
    except AdfmError as error:
        raise Incomparable(f"The {name} table cannot be judged: {error}") from error
    table = table[[column for column in (*_COLUMNS, "dataset", "group", "boxes") if column in table]]
    rows = table["id"].astype(object)
    iou = pd.to_numeric(table["iou"], errors="coerce").astype(float)
    anomalous = table["label"].isin(["anomalous"])
    # Only the label is known where there is nothing to overlap with.
    located = table["boxes"].map(len).gt(0) if "boxes" in table else anomalous
    faults = {
        "a missing id": rows.isna(),
        "an id that occurs more than once": rows.duplicated(keep=False) & rows.notna(),
        "no category or data set": table[["category", *(["dataset"] if "dataset" in table else [])]].isna().any(axis=1),
        "a label other than normal and anomalous": ~table["label"].isin(["normal", "anomalous"]),
        "a prediction other than normal, anomalous and null": ~table["predicted"].isin(["normal", "anomalous"])
        & table["predicted"].notna(),
        "no IoU in [0, 1] on an anomalous image": anomalous & located & ~iou.between(0, 1),
        "an IoU on an image without boxes": anomalous & ~located & table["iou"].notna(),
        "an IoU on a normal image": ~anomalous & table["iou"].notna(),
    }
    wrong = [
        f"{fault}: {listed([f'row {row} ({key})' for row, key in zip(where.nonzero()[0], rows[where], strict=True)])}"
        for fault, where in ((fault, found.to_numpy(dtype=bool)) for fault, found in faults.items())
        if where.any()
    ]
    if not anomalous.any():
        wrong.append("no anomalous image, so IoU cannot be judged")
    if wrong:
        raise Incomparable(f"The {name} table cannot be judged:\n" + "\n".join(f"- {fault}" for fault in wrong))
    return table.assign(iou=iou)


def _check_pair(candidate: pd.DataFrame, production: pd.DataFrame) -> None:
    """Raises Incomparable where the tables are not of the same images, labelled alike."""
    try:
        same_images(candidate, production)
    except AdfmError as error:
        raise Incomparable(f"Candidate (first) and production (second) cannot be compared. {error}") from error
    left, right = candidate.attrs, production.attrs
    if unlike := [key for key in left if key in right and key != "threshold" and left[key] != right[key]]:
        raise Incomparable(
            "Candidate and production were not evaluated in the same way; evaluate both anew with `adfm evaluate`:\n"
            + "\n".join(f"- {key}: {left[key]} and {right[key]}" for key in unlike)
        )
    both = candidate.merge(production, on="id", suffixes=("", "_production"))
    wrong = [
        f"- {column}: {listed(sorted(both['id'][differs], key=str))}"
        for column in ("label", "category", "dataset")
        if f"{column}_production" in both and (differs := both[column] != both[f"{column}_production"]).any()
    ]
    if wrong:
        raise Incomparable(
            "Candidate and production were evaluated on data that differ for the same ids; evaluate both on the same"
            " shards:\n" + "\n".join(wrong)
        )


def _check_enough(candidate: pd.DataFrame, least: int) -> None:
    counts = {label: int((candidate["label"] == label).sum()) for label in ("normal", "anomalous")}
    if few := [f"{count} {label}" for label, count in counts.items() if count < least]:
        raise Incomparable(
            f"Too few images to tell two models apart: {' and '.join(few)}; at least {least} of each would do"
            " (gate.min_images). Evaluate on more."
        )
