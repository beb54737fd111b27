"""The promotion gate: may the candidate take production's place? A pure function of prediction tables and a policy.

It judges what a model does in production: decisions at the threshold (the column `decision`, and the regions of flagged
images), or the letters of a table that has none.

For all images, for each category and for each kind of defect, every metric of `policy.METRICS` answers up to four
questions, each with `passed`, `failed` or `cannot tell`:

- `limit`: the confidence limit of its value is on the good side of the policy's limit;
- `production`: the confidence limit of its loss against production, on the same images, is below the margin;
- `anchor`: the same against the anchor, the best version that was ever in production, so that small losses cannot
  add up;
- `gain`, of all images alone: it is better than in production. Accuracy or IoU has to be, or another gain that the
  policy names (Holm's correction over them), unless it asks for non-inferiority alone.

A value beyond its limit, or a measured loss beyond its margin, fails if chance is excluded. What is neither shown to be
good nor shown to be bad is `cannot tell`, with the number of images that would tell. The version passes if every answer
does; a part with too few images is not judged, unless its fall is certain among all parts (Bonferroni).

The level of every answer is what `policy.level` leaves for this look: how many candidates the same test images have
judged before. docs/gate.md has the formulas, their sources and the measured error rates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from adfm import statistics
from adfm.evaluation.gate_metrics import METRICS, Bound, Floats, Metric
from adfm.evaluation.metrics import category_names, listed, samples, without_boxes
from adfm.registry import tables
from adfm.registry.policy import Policy
from adfm.text import printable

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

Verdict = Literal["passed", "failed", "cannot tell", "not judged"]

_MOST_DECIMALS = 9  # 0.9 - 0.89 is to be 0.01


@dataclass(frozen=True)
class Answer:
    """The answer to one question about one metric.

    Args:
        question: `limit`, `production`, `anchor` or `gain`.
        verdict: `passed`, `failed`, `cannot tell`; `not judged` where there are too few images.
        bound: The confidence limit of the value, or of the loss; of `gain` the p-value. `None` without images.
        limit: What it is compared with: the policy's limit or margin; of `gain` the level.
        needed: Number of images that would tell, if the measured value is true; `None` if no more are needed, or
            no number would do.
        kind: Which images these are.
    """

    question: str
    verdict: Verdict
    bound: float | None
    limit: float | None
    needed: int | None
    kind: str


@dataclass(frozen=True)
class Row:
    """One metric, over all images or a part of them.

    Args:
        of: `whole`, `category` or `defect`.
        name: Name of the category or of the kind of defect; empty for the whole.
        metric: Its name in `METRICS`.
        images: How many images count.
        candidate: Value of the candidate; `None` where no image counts.
        production: Value of production; `None` if there is none.
        anchor: Value of the anchor; `None` if there is none.
        answers: One for each question.
    """

    of: str
    name: str
    metric: str
    images: int
    candidate: float | None
    production: float | None
    anchor: float | None
    answers: list[Answer]


@dataclass(frozen=True)
class Decision:
    """What the gate decided, and why; `dataclasses.asdict` gives JSON values.

    Args:
        verdict: `passed`; `failed`; `cannot tell`, if nothing failed and something could not be told.
        headline: Whether accuracy or IoU is better than in production, in words.
        reasons: The decision in words: first what failed, then what cannot be told, then what else to know.
        rows: Every metric, of the whole first.
        changed: Images that candidate and production decide differently: `id`, `category`, `label`, and both answers.
        images: Number of `normal` and `anomalous` images.
        level: Level of each answer at this look.
        look: The number of this candidate among those that the test images have judged.
        looks: The policy's budget.
        operating_point: `defect_rate`; at it `precision`, and per 10,000 parts `escapes` and `false_calls`, each a list
            of value, lower and upper limit; missing where a rate cannot be measured.
        separation: The proof that no test image was trained on, as `adfm.evaluation.separation.compare` gives it.
    """

    verdict: Verdict
    headline: str
    reasons: list[str]
    rows: list[Row]
    changed: list[dict[str, Any]]
    images: dict[str, int]
    level: float
    look: int
    looks: int
    operating_point: dict[str, Any]
    separation: dict[str, Any] | None

    @property
    def passed(self) -> bool:
        """Whether the candidate may go on to approval."""
        return self.verdict == "passed"


def decide(
    candidate: pd.DataFrame,
    production: pd.DataFrame | None,
    anchor: pd.DataFrame | None,
    policy: Policy,
    look: int = 1,
    separation: dict[str, Any] | None = None,
) -> Decision:
    """Judges a candidate's predictions by a policy, against those of production and of the anchor on the same images.

    Args:
        candidate: Prediction table: `id`, `category`, `label`, `predicted`, `iou`; `defect`; `dataset` if there is more
            than one, `group` where images show one part. With `decision` and `region_*`, these are judged. `attrs`,
            where two tables have them, say how they were made; `threshold` may differ.
        production: Prediction table of the version in production, or `None` if there is none yet.
        anchor: Prediction table of the anchor, or `None` if there is none or it is in production.
        policy: What is asked.
        look: The number of this candidate among those that the test images have judged.
        separation: What `adfm.evaluation.separation.compare` gives; `None` if it was not compared.

    Raises:
        Incomparable: A table is broken (all that is wrong with it is listed), or two are not of the same images or were
            not made in the same way.
    """
    notes = [tables.what_decides("The candidate", candidate)]
    judged = {"candidate": tables.checked(candidate, "candidate")}
    for name, table in (("production", production), ("anchor", anchor)):
        if table is not None:
            notes.append(tables.what_decides(name.capitalize(), table))
            judged[name] = tables.checked(table, name)
            tables.check_pair(judged["candidate"], judged[name], name)
    order = judged["candidate"].sort_values("id")["id"]
    judged = {name: table.set_index("id").loc[order].reset_index() for name, table in judged.items()}
    first = judged["candidate"]
    values = {
        name: {metric: METRICS[metric].values(table) for metric in policy.whole} for name, table in judged.items()
    }
    level = statistics.level_of_look(min(look, policy.looks), policy.looks, policy.level)
    group = samples(first) if "group" in first and first["group"].notna().any() else None

    rows = _whole(values, group, policy, level)
    rows += _parts(first, values, group, policy, level)
    answers = [(row, answer) for row in rows for answer in row.answers if answer.question != "gain"]
    failed = [_sentence(row, answer) for row, answer in answers if answer.verdict == "failed"]
    unclear = [_sentence(row, answer) for row, answer in answers if answer.verdict == "cannot tell"]
    headline, gain = _gain(rows, production is not None)
    if policy.rule == "gain" and gain != "passed":
        (failed if gain == "failed" else unclear).insert(0, headline)
    if look > policy.looks:
        unclear.insert(
            0,
            f"The budget of this test set is used up: it has judged {look - 1} candidates, and {policy.looks} were "
            "planned. New test images are due; then evaluate production and candidate on them.",
        )
    _separate(separation, failed, unclear, notes)
    if without := without_boxes(first):
        notes.append(
            f"{without} of {int((first['label'] == 'anomalous').sum())} anomalous images have no boxes; they are left "
            "out of IoU."
        )
    if small := {row.name for row in rows if row.answers and all(a.verdict == "not judged" for a in row.answers)}:
        notes.append(
            f"Too few images to judge alone (fewer than {policy.enough}): {listed(sorted(small))}; only a certain fall "
            "would count."
        )
    return Decision(
        verdict="failed" if failed else "cannot tell" if unclear else "passed",
        headline=headline,
        reasons=failed + unclear + notes,
        rows=rows,
        changed=_changed(first, judged.get("production")),
        images={label: int((first["label"] == label).sum()) for label in ("normal", "anomalous")},
        level=level,
        look=look,
        looks=policy.looks,
        operating_point=_operating_point(values["candidate"], group, policy, level),
        separation=separation,
    )


def table(decided: dict[str, Any]) -> list[list[str]]:
    """A decision as a table for people: header and rows of plain text.

    Escapes and overkill come first: they are what a plant pays for. Of the parts only those are shown that failed or
    cannot be told.

    Args:
        decided: A decision as JSON values.
    """
    rows = [row for row in decided["rows"] if row["of"] == "whole" or _open(row)]
    # Sorting keeps the order of the rest: the whole before its parts, escapes and overkill before accuracy and IoU.
    rows.sort(key=lambda row: (row["of"] != "whole", METRICS[row["metric"]].higher))
    header = ["verdict", "metric", "candidate", "limit", "production", "difference", "margin", "anchor", "images"]
    return [header, *([*_cells(row)] for row in rows)]


def _cells(row: dict[str, Any]) -> Iterator[str]:
    answers = {answer["question"]: answer for answer in row["answers"]}
    title = METRICS[row["metric"]].title
    sign, towards_worse = ("≥", -1) if METRICS[row["metric"]].higher else ("≤", 1)

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    def bound(question: str, text: str) -> str:
        answer = answers.get(question)
        return text if answer is None or answer["bound"] is None else f"{text} ({share(answer['bound'])})"

    def loss(rival: str) -> str:
        """Candidate minus rival, and the largest loss that cannot be excluded."""
        if row[rival] is None or row["candidate"] is None:
            return "-"
        text = f"{row['candidate'] - row[rival]:+.1%}"
        answer = answers.get(rival)
        return text if answer is None else f"{text} (at worst {towards_worse * answer['bound']:+.1%})"

    yield _row_verdict(row)
    yield f"{title}, {row['of']} {row['name']}" if row["name"] else title
    yield bound("limit", share(row["candidate"]))
    yield f"{sign} {share(answers['limit']['limit'])}" if "limit" in answers else "-"
    yield share(row["production"])
    yield loss("production")
    margin = answers.get("production", answers.get("anchor"))
    yield share(margin["limit"]) if margin else "-"
    yield loss("anchor")
    yield str(row["images"])


def _row_verdict(row: dict[str, Any]) -> str:
    verdicts = [answer["verdict"] for answer in row["answers"] if answer["question"] != "gain"]
    better = any(answer["question"] == "gain" and answer["verdict"] == "passed" for answer in row["answers"])
    worst = next((verdict for verdict in ("failed", "cannot tell", "passed") if verdict in verdicts), "not judged")
    return "better" if worst == "passed" and better else worst


def _open(row: dict[str, Any]) -> bool:
    return _row_verdict(row) in ("failed", "cannot tell")


def _whole(
    values: dict[str, dict[str, Floats]], group: NDArray[np.int64] | None, policy: Policy, level: float
) -> list[Row]:
    everything = np.ones(len(next(iter(values["candidate"].values()))), dtype=bool)
    rows = [
        _row("whole", "", name, values, group, everything, policy.whole[name], policy, level, level)
        for name in policy.whole
    ]
    if "production" not in values:
        return rows
    paired = {name: _paired(values, name, "production", group, everything) for name in policy.whole}
    parts = {name: pair for name, pair in paired.items() if METRICS[name].gain and len(pair[0])}
    gains = [row for row in rows if row.metric in parts]
    p = [statistics.gain_p(-loss, of, METRICS[name].binary) for name, (loss, of) in parts.items()]
    for row, chance, holds in zip(gains, p, statistics.holm(p, level) if p else [], strict=True):
        loss = parts[row.metric][0]
        gain = -float(loss.mean())
        verdict: Verdict = "passed" if holds else "failed" if gain <= 0 else "cannot tell"
        needed = None
        if verdict == "cannot tell":
            needed = _more(len(loss), statistics.images_for_loss(_spread(loss), gain, level / len(gains), policy.power))
        row.answers.append(Answer("gain", verdict, chance, level, needed, METRICS[row.metric].over))
    return rows


def _parts(
    first: pd.DataFrame,
    values: dict[str, dict[str, Floats]],
    group: NDArray[np.int64] | None,
    policy: Policy,
    level: float,
) -> list[Row]:
    """Rows of the categories and of the kinds of defect, where there is more than one."""
    parts = [("category", category_names(first).astype(str))]
    if "defect" in first:
        kinds = first["defect"].where(first["label"].isin(["anomalous"]) & first["defect"].notna())
        parts.append(("defect", kinds))
    places = [
        (of, str(name), (column == name).to_numpy(dtype=bool, na_value=False), metric)
        for of, column in parts
        for name in (sorted(column.dropna().unique()) if column.nunique() > 1 else [])
        for metric, bound in policy.parts.items()
        # A kind of defect has no normal images, and accuracy over it is 1 - its escape rate.
        if metric in policy.whole and (of == "category" or METRICS[metric].over.startswith("anomalous"))
    ]
    counted = [(of, name, where, metric) for of, name, where, metric in places if _counts(values, metric, where)]
    # A fall has to be certain among all of them.
    certain = level / max(1, len(counted))
    return [
        _row(of, name, metric, values, group, where, policy.parts[metric], policy, level, certain)
        for of, name, where, metric in counted
    ]


def _counts(values: dict[str, dict[str, Floats]], metric: str, where: NDArray[np.bool_]) -> int:
    return int((~np.isnan(values["candidate"][metric][where])).sum())


def _row(
    of: str,
    name: str,
    metric: str,
    values: dict[str, dict[str, Floats]],
    group: NDArray[np.int64] | None,
    where: NDArray[np.bool_],
    bound: Bound,
    policy: Policy,
    level: float,
    certain: float,
) -> Row:
    """A metric over the images `where`; `certain` is the level at which a failure counts."""
    entry = METRICS[metric]
    counting = where & ~np.isnan(values["candidate"][metric])
    images = int(counting.sum())
    means = {rival: _mean(of_rival[metric][counting]) for rival, of_rival in values.items()}
    answers = []
    if bound.limit is not None:
        of_images = None if group is None else group[counting]
        answers.append(
            _limit(entry, values["candidate"][metric][counting], of_images, bound.limit, level, certain, policy)
        )
    for rival in ("production", "anchor"):
        if rival in values and bound.margin is not None:
            loss, of_images = _paired(values, metric, rival, group, counting)
            answers.append(_loss(entry, rival, loss, of_images, bound.margin, level, certain, policy))
    if of != "whole" and images < policy.enough:
        answers = [_too_few(answer, policy.enough) for answer in answers]
    return Row(of, name, metric, images, means["candidate"], means.get("production"), means.get("anchor"), answers)


def _mean(values: Floats) -> float | None:
    known = values[~np.isnan(values)]  # a rival's table may lack the column
    return round(float(known.mean()), _MOST_DECIMALS) if len(known) else None


def _paired(
    values: dict[str, dict[str, Floats]],
    metric: str,
    rival: str,
    group: NDArray[np.int64] | None,
    where: NDArray[np.bool_],
) -> tuple[Floats, NDArray[np.int64] | None]:
    """Loss of the candidate against a rival on each image that counts, positive where it is worse; their groups."""
    loss = values["candidate"][metric] - values[rival][metric]
    counting = where & ~np.isnan(loss)
    loss = -loss[counting] if METRICS[metric].higher else loss[counting]
    return loss, None if group is None else group[counting]


def _limit(
    entry: Metric,
    values: Floats,
    group: NDArray[np.int64] | None,
    limit: float,
    level: float,
    certain: float,
    policy: Policy,
) -> Answer:
    """Whether the value is on the good side of its limit; reckoned as a cost, which is to be small."""
    cost, most = (1 - values, 1 - limit) if entry.higher else (values, limit)
    at_most = statistics.rate_at_most if entry.binary else statistics.mean_at_most
    if not len(cost):
        needed = statistics.images_for_rate(0.0, most, level, policy.power)
        return Answer("limit", "cannot tell", None, limit, needed, entry.over)
    upper, lower = at_most(cost, level, group), 1 - at_most(1 - cost, certain, group)
    measured, needed = float(cost.mean()), None
    verdict: Verdict = "passed" if upper < most or most >= 1 else "failed" if lower > most else "cannot tell"
    if verdict == "cannot tell":
        if entry.binary:
            needed = (
                statistics.images_for_rate(measured, most, level, policy.power)
                if measured < most
                else statistics.images_for_rate(1 - measured, 1 - most, certain, policy.power)
            )
        elif measured != most:
            needed = statistics.images_for_loss(_spread(cost), abs(most - measured), level, policy.power)
        needed = _more(len(cost), needed)
    return Answer("limit", verdict, 1 - upper if entry.higher else upper, limit, needed, entry.over)


def _loss(
    entry: Metric,
    rival: str,
    loss: Floats,
    group: NDArray[np.int64] | None,
    margin: float,
    level: float,
    certain: float,
    policy: Policy,
) -> Answer:
    """Whether the candidate is worse than a rival by less than the margin."""
    if not len(loss):
        return Answer(rival, "cannot tell", None, margin, None, entry.over)
    upper = statistics.loss_at_most(loss, level, group, entry.binary)
    lower = -statistics.loss_at_most(-loss, certain, group, entry.binary)
    measured, needed = float(loss.mean()), None
    verdict: Verdict = "passed" if upper < margin else "failed" if measured >= margin and lower > 0 else "cannot tell"
    if verdict == "cannot tell":
        gap = margin - max(0.0, measured) if measured < margin else measured
        needed = _more(len(loss), statistics.images_for_loss(_spread(loss), gap, level, policy.power))
    return Answer(rival, verdict, round(upper, _MOST_DECIMALS), margin, needed, entry.over)


def _too_few(answer: Answer, enough: int) -> Answer:
    if answer.verdict == "failed":
        return answer
    return Answer(answer.question, "not judged", answer.bound, answer.limit, enough, answer.kind)


def _spread(loss: Floats) -> float:
    return float(loss.std())


def _more(images: int, needed: int | None) -> int | None:
    """A number of images that would tell is larger than the number that did not."""
    return None if needed is None else max(needed, images + 1)


def _gain(rows: list[Row], compared: bool) -> tuple[str, Verdict]:
    """Whether accuracy or IoU is better than in production, in words and as a verdict."""
    if not compared:
        return "There is no model in production yet: the limits alone decide.", "passed"
    gains = [(row, answer) for row in rows for answer in row.answers if answer.question == "gain"]
    verdicts = [answer.verdict for _, answer in gains]

    def words(row: Row, answer: Answer) -> str:
        return f"{METRICS[row.metric].title} {row.candidate:.1%} against {row.production:.1%} (p = {answer.bound:.2g})"

    better = [words(row, answer) for row, answer in gains if answer.verdict == "passed"]
    if better:
        return f"Better than production: {' and '.join(better)}.", "passed"
    every = ", ".join(words(row, answer) for row, answer in gains)
    if "cannot tell" in verdicts:
        needed = [
            f"about {answer.needed} {answer.kind} would show the gain in {METRICS[row.metric].title}, if it is real"
            for row, answer in gains
            if answer.needed
        ]
        return f"No gain over production is shown: {every}; {'; '.join(needed)}.", "cannot tell"
    return f"No better than production: {every or 'nothing to compare'}.", "failed"


def _sentence(row: Row, answer: Answer) -> str:
    """Why an answer is not `passed`, and what would help."""
    entry = METRICS[row.metric]
    name = entry.title[0].upper() + entry.title[1:] + (f" of {row.of} {printable(row.name)}" if row.name else "")
    if row.candidate is None or answer.bound is None or answer.limit is None:
        would = f"; {answer.needed} would" if answer.needed else ""
        return (
            f"{name}: cannot be told, there are no {answer.kind}{would}. A policy that does not ask for it has limit "
            "and margin null."
        )
    if answer.question == "limit":
        side = "below" if entry.higher else "above"
        words = f"{name}: {row.candidate:.1%} {'of' if entry.binary else 'over'} {row.images} {answer.kind}"
        if answer.verdict == "failed":
            return f"{words}, certainly {side} the limit of {answer.limit:.1%}."
        least = "as low" if entry.higher else "as high"
        words += f"; it may be {least} as {answer.bound:.1%}, and the limit is {answer.limit:.1%}"
    else:
        rival = row.production if answer.question == "production" else row.anchor
        worse = (rival or 0) - row.candidate if entry.higher else row.candidate - (rival or 0)
        against = "in production" if answer.question == "production" else "of the anchor"
        words = f"{name}: {row.candidate:.1%} against {rival:.1%} {against}"
        if answer.verdict == "failed":
            return f"{words}: worse by {_points(worse)}, and {_points(answer.limit)} are allowed."
        words += f"; it may be worse by {_points(answer.bound)}, and {_points(answer.limit)} are allowed"
    if answer.needed:
        return f"{words}. About {answer.needed} {answer.kind} would tell."
    return f"{words}. It lies so close that no number of images would tell."


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"


def _separate(separation: dict[str, Any] | None, failed: list[str], unclear: list[str], notes: list[str]) -> None:
    """Puts the proof that no test image was trained on where it belongs."""
    if separation is None:
        notes.append("That no test image was trained on is not proved here; `adfm register` proves it.")
        return
    for problem in separation["problems"]:
        failed.insert(
            0,
            f"{len(problem['ids'])} test images were in the training or validation data of the {problem['of']} "
            f"({problem['kind']}): {listed(problem['ids'])}. Divide the data again, train, and register.",
        )
    if not separation["proved"] and not separation["problems"]:
        unclear.insert(
            0, "It is not known which images the models were trained on, so that no test image was is not proved."
        )


def _changed(candidate: pd.DataFrame, production: pd.DataFrame | None) -> list[dict[str, Any]]:
    if production is None:
        return []

    def answers(table: pd.DataFrame) -> list[str]:
        return [answer if isinstance(answer, str) else "unparseable" for answer in table["predicted"].astype(object)]

    rows = zip(
        candidate["id"],
        category_names(candidate),
        candidate["label"],
        answers(candidate),
        answers(production),
        strict=True,
    )
    return [
        {"id": str(key), "category": str(category), "label": str(label), "candidate": after, "production": before}
        for key, category, label, after, before in rows
        if after != before
    ]


def _operating_point(
    values: dict[str, Floats], group: NDArray[np.int64] | None, policy: Policy, level: float
) -> dict[str, Any]:
    """What the measured rates mean on the line, where the share of defects is the plant's and not the test set's."""
    point: dict[str, Any] = {"defect_rate": policy.defect_rate}
    rates = []
    for name in ("escape_rate", "overkill"):
        each = values.get(name, np.array([]))
        counting = ~np.isnan(each)
        if not counting.any():
            return point
        of_images = None if group is None else group[counting]
        # Half the level each, since the limits of the precision need those of both rates.
        low = 1 - statistics.rate_at_most(1 - each[counting], level / 2, of_images)
        high = statistics.rate_at_most(each[counting], level / 2, of_images)
        rates.append((float(each[counting].mean()), low, high))
    at = statistics.at_prevalence(rates[0], rates[1], policy.defect_rate)
    return point | {name: list(limits) for name, limits in at.items()}
