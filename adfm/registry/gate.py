"""The promotion gate: whether a candidate may replace the version in production.

It judges what a model does in production: decisions at the threshold (the column `decision`, and the regions of flagged
images), or the letters of a table without one. Over all images, each category and each kind of defect, every metric of
`gate_metrics.METRICS` answers up to four questions, by confidence limits:

- `limit`: its value is on the good side of the policy's limit.
- `production`, `anchor` (the best version ever in production): its loss on the same images is below the margin.
- `gain`, over all images only: it is better than in production.

A version passes if every answer is `passed`. docs/gate.md has the formulas, their sources and the measured error rates.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from adfm import statistics
from adfm.evaluation import gate_metrics
from adfm.evaluation.gate_metrics import METRICS, Bound
from adfm.evaluation.metrics import Floats, Groups, category_names, listed, samples, without_boxes
from adfm.registry import tables
from adfm.registry.policy import Policy
from adfm.text import printable

Verdict = Literal["passed", "failed", "cannot tell", "not judged"]

_DECIMALS = 9  # without rounding, 0.9 - 0.89 is not 0.01


@dataclass(frozen=True)
class Answer:
    """The answer to one question about one metric."""

    question: str  # limit, production, anchor or gain
    verdict: Verdict  # `not judged` where there are too few images
    bound: float | None  # confidence limit of the value or of the loss; of a gain the p-value; None without images
    limit: float | None  # the policy's limit or margin; of a gain the level
    needed: int | None  # images that would tell, if the measured value is true; None if none or no number would
    kind: str  # which images these are


@dataclass(frozen=True)
class Row:
    """One metric, over all images or a part of them."""

    of: str  # whole, category or defect
    name: str  # of the category or kind of defect; empty for the whole
    metric: str  # its name in METRICS
    images: int  # how many count
    candidate: float | None  # None where no image counts
    production: float | None  # None if nothing is in production
    anchor: float | None  # None without an anchor
    answers: list[Answer]


@dataclass(frozen=True)
class Decision:
    """The gate's decision with its reasons; `dataclasses.asdict` gives JSON values."""

    verdict: str  # passed; failed; `cannot tell`, if nothing failed and an answer is open
    headline: str  # whether accuracy or IoU is better than in production
    reasons: list[str]  # what failed, then what cannot be told, then notes
    rows: list[Row]  # of the whole first
    changed: list[dict[str, Any]]  # images that candidate and production decide differently, with both answers
    images: dict[str, int]  # number of `normal` and `anomalous` images
    level: float  # of each answer at this look
    look: int  # how many candidates the test images have judged, this one included
    looks: int  # the policy's budget
    # `defect_rate`; at it `precision`, and per 10,000 parts `escapes` and `false_calls`, each a list of value, lower
    # and upper limit; missing where a rate cannot be measured
    operating_point: dict[str, Any]
    separation: dict[str, Any] | None  # proof that no test image was trained on (`adfm.evaluation.separation`)

    @property
    def passed(self) -> bool:
        """Whether the candidate may be approved."""
        return self.verdict == "passed"


def decide(
    candidate: pd.DataFrame,
    production: pd.DataFrame | None,  # None if nothing is in production
    anchor: pd.DataFrame | None,  # None if there is none, or it is in production
    policy: Policy,
    look: int = 1,  # how many candidates the test images have judged, this one included
    separation: dict[str, Any] | None = None,  # of adfm.evaluation.separation.compare; None if not compared
) -> Decision:
    """Judge a candidate's predictions by a policy, against those of production and anchor on the same images.

    A prediction table has `id`, `category`, `label`, `predicted`, `iou`; `defect`; `dataset` if there is more than one,
    `group` where images show one part. With `decision` and `region_*`, these are judged. `attrs`, where two tables have
    them, say how they were made; `threshold` may differ.

    Raises:
        Incomparable: A table is broken (every fault is listed), or two are not of the same images, made the same way.
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
    judge = _Judge(
        {name: gate_metrics.values(table, policy.whole) for name, table in judged.items()},
        samples(first) if "group" in first and first["group"].notna().any() else None,
        policy,
        policy.level_at(look),
    )
    rows = [*judge.whole(), *judge.parts(first)]
    answers = [(row, answer) for row in rows for answer in row.answers if answer.question != "gain"]
    failed = [_sentence(row, answer) for row, answer in answers if answer.verdict == "failed"]
    unclear = [_sentence(row, answer) for row, answer in answers if answer.verdict == "cannot tell"]
    headline, gain = _gain(rows, production is not None)
    if policy.rule == "gain" and gain != "passed":
        (failed if gain == "failed" else unclear).insert(0, headline)
    if look > policy.looks:
        used = f"The budget of this test set is used up: it has judged {look - 1} candidates, and {policy.looks} were "
        used += "planned. New test images are due; then evaluate production and candidate on them."
        unclear.insert(0, used)
    if separation is None:
        notes.append("That no test image was trained on is not proved here; `adfm register` proves it.")
    elif not separation["proved"] and not separation["problems"]:
        unknown = "It is not known which images the models were trained on, so that no test image was is not proved."
        unclear.insert(0, unknown)
    for problem in separation["problems"] if separation else []:
        seen = f"{len(problem['ids'])} test images were in the training or validation data of the {problem['of']} "
        seen += f"({problem['kind']}): {listed(problem['ids'])}. Divide the data again, train, and register."
        failed.insert(0, seen)
    images = {label: int((first["label"] == label).sum()) for label in ("normal", "anomalous")}
    if without := without_boxes(first):
        notes.append(f"{without} of {images['anomalous']} anomalous images have no boxes; they are left out of IoU.")
    if small := {row.name for row in rows if row.answers and all(a.verdict == "not judged" for a in row.answers)}:
        few = f"Too few images to judge alone (fewer than {policy.enough}): {listed(sorted(small))}"
        notes.append(f"{few}; only a certain fall would count.")
    return Decision(
        verdict="failed" if failed else "cannot tell" if unclear else "passed",
        headline=headline,
        reasons=failed + unclear + notes,
        rows=rows,
        changed=_changed(first, judged["production"]) if production is not None else [],
        images=images,
        level=judge.level,
        look=look,
        looks=policy.looks,
        operating_point=judge.operating_point(),
        separation=separation,
    )


def parts(table: pd.DataFrame, policy: Policy) -> Iterator[tuple[str, str, str, NDArray[np.bool_]]]:
    """Yield what a policy judges of each category and kind of defect, where there is more than one.

    Yields:
        `category` or `defect`, its name, the name of a metric, and which images belong to the part.
    """
    columns = {"category": category_names(table).astype(str)}
    if "defect" in table:
        columns["defect"] = table["defect"].where(table["label"].isin(["anomalous"]))
    for of, column in columns.items():
        names = sorted(column.dropna().unique())
        for name in names if len(names) > 1 else []:
            where = (column == name).to_numpy(dtype=bool, na_value=False)
            for metric in policy.parts:
                # A kind of defect has no normal images, and accuracy over it is 1 - its escape rate.
                if metric in policy.whole and (of == "category" or METRICS[metric].over.startswith("anomalous")):
                    yield of, str(name), metric, where


def table(decided: dict[str, Any]) -> list[list[str]]:
    """Return a decision (JSON values) as text, header first: the whole, and the parts that failed or cannot be told."""
    rows = [row for row in decided["rows"] if row["of"] == "whole" or _row_verdict(row) in ("failed", "cannot tell")]
    # Escapes and overkill first: they are what a plant pays for. Sorting keeps the order of the rest.
    rows.sort(key=lambda row: (row["of"] != "whole", METRICS[row["metric"]].higher))
    header = ["verdict", "metric", "candidate", "limit", "production", "difference", "margin", "anchor", "images"]
    return [header, *([*_cells(row)] for row in rows)]


def _cells(row: dict[str, Any]) -> Iterator[str]:
    answers = {answer["question"]: answer for answer in row["answers"]}
    title = METRICS[row["metric"]].title
    sign, towards_worse = ("≥", -1) if METRICS[row["metric"]].higher else ("≤", 1)

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    def loss(baseline: str) -> str:
        """Candidate minus baseline, and the largest loss that cannot be excluded."""
        if row[baseline] is None or row["candidate"] is None:
            return "-"
        text = f"{row['candidate'] - row[baseline]:+.1%}"
        answer = answers.get(baseline)
        return text if answer is None else f"{text} (at worst {towards_worse * answer['bound']:+.1%})"

    limit = answers.get("limit")
    margin = answers.get("production", answers.get("anchor"))
    yield _row_verdict(row)
    yield f"{title}, {row['of']} {row['name']}" if row["name"] else title
    yield share(row["candidate"]) + (f" ({share(limit['bound'])})" if limit and limit["bound"] is not None else "")
    yield f"{sign} {share(limit['limit'])}" if limit else "-"
    yield share(row["production"])
    yield loss("production")
    yield share(margin["limit"]) if margin else "-"
    yield loss("anchor")
    yield str(row["images"])


def _row_verdict(row: dict[str, Any]) -> str:
    verdicts = [answer["verdict"] for answer in row["answers"] if answer["question"] != "gain"]
    better = any(answer["question"] == "gain" and answer["verdict"] == "passed" for answer in row["answers"])
    worst = next((verdict for verdict in ("failed", "cannot tell", "passed") if verdict in verdicts), "not judged")
    return "better" if worst == "passed" and better else worst


@dataclass(frozen=True)
class _Judge:
    """The values of each image, and how a policy judges them."""

    values: dict[str, dict[str, Floats]]  # by model and metric; NaN where an image does not count
    group: Groups
    policy: Policy
    level: float  # of every answer: the share of the policy's level that is spent on this look

    def whole(self) -> list[Row]:
        everything = np.ones(len(next(iter(self.values["candidate"].values()))), dtype=bool)
        rows = [self.row("whole", "", name, everything, bound, self.level) for name, bound in self.policy.whole.items()]
        if "production" not in self.values:
            return rows
        gains = {}
        for row in rows:
            loss, group = self.loss(row.metric, "production", everything)
            if METRICS[row.metric].gain and len(loss):
                p = statistics.gain_p(-loss, group, METRICS[row.metric].binary)
                gains[row.metric] = row, loss, p
        # Any of the gains is enough for a promotion; Holm keeps the error over all of them at the level.
        holds = statistics.holm([p for *_, p in gains.values()], self.level)
        for (row, loss, p), better in zip(gains.values(), holds, strict=True):
            gain, needed = -float(loss.mean()), None
            verdict: Verdict = "passed" if better else "failed" if gain <= 0 else "cannot tell"
            if verdict == "cannot tell":
                needed = self.images_for_loss(loss, gain, self.level / len(gains))
            row.answers.append(Answer("gain", verdict, p, self.level, needed, METRICS[row.metric].over))
        return rows

    def parts(self, table: pd.DataFrame) -> list[Row]:
        values, bounds = self.values["candidate"], self.policy.parts
        judged = [
            (of, name, metric, where)
            for of, name, metric, where in parts(table, self.policy)
            if not np.isnan(values[metric][where]).all()
        ]
        # A part fails only if its fall is certain among all parts (Bonferroni).
        certain = self.level / max(1, len(judged))
        return [self.row(of, name, metric, where, bounds[metric], certain) for of, name, metric, where in judged]

    def row(self, of: str, name: str, metric: str, where: NDArray[np.bool_], bound: Bound, certain: float) -> Row:
        """Judge a metric over the images `where`; `certain` is the level at which a failure counts."""
        counting = where & ~np.isnan(self.values["candidate"][metric])
        images, enough = int(counting.sum()), self.policy.enough
        means = {model: _mean(values[metric][counting]) for model, values in self.values.items()}
        answers = []
        if bound.limit is not None:
            answers.append(self.limit_answer(metric, counting, bound.limit, certain))
        # The anchor as well: small losses against each production in turn would add up.
        for baseline in ("production", "anchor"):
            if baseline in self.values and bound.margin is not None:
                answers.append(self.loss_answer(metric, baseline, counting, bound.margin, certain))
        if of != "whole" and images < enough:
            answers = [
                each if each.verdict == "failed" else replace(each, verdict="not judged", needed=enough)
                for each in answers
            ]
        return Row(of, name, metric, images, means["candidate"], means.get("production"), means.get("anchor"), answers)

    def groups(self, where: NDArray[np.bool_]) -> Groups:
        return None if self.group is None else self.group[where]

    def loss(self, metric: str, baseline: str, where: NDArray[np.bool_]) -> tuple[Floats, Groups]:
        """Return the loss on each image that counts, positive where the candidate is worse, and the images' parts."""
        loss = self.values["candidate"][metric] - self.values[baseline][metric]
        counting = where & ~np.isnan(loss)
        return (-loss if METRICS[metric].higher else loss)[counting], self.groups(counting)

    def images_for_loss(self, loss: Floats, margin: float, level: float) -> int:
        # More than there are: these did not tell.
        return max(len(loss) + 1, statistics.images_for_loss(float(loss.std()), margin, level, self.policy.power))

    def limit_answer(self, metric: str, where: NDArray[np.bool_], limit: float, certain: float) -> Answer:
        entry, group, power = METRICS[metric], self.groups(where), self.policy.power
        values = self.values["candidate"][metric][where]
        # As a cost, which is to be small, both directions take the same formulas.
        cost, most = (1 - values, 1 - limit) if entry.higher else (values, limit)
        at_most = statistics.rate_at_most if entry.binary else statistics.mean_at_most
        if not len(cost):
            needed = statistics.images_for_rate(0.0, most, self.level, power)
            return Answer("limit", "cannot tell", None, limit, needed, entry.over)
        upper, lower = at_most(cost, self.level, group), 1 - at_most(1 - cost, certain, group)
        measured, needed = float(cost.mean()), None
        verdict: Verdict = "passed" if upper < most or most >= 1 else "failed" if lower > most else "cannot tell"
        if verdict == "cannot tell" and entry.binary:
            if measured < most:
                needed = statistics.images_for_rate(measured, most, self.level, power)
            else:
                needed = statistics.images_for_rate(1 - measured, 1 - most, certain, power)
            needed = None if needed is None else max(needed, len(cost) + 1)
        elif verdict == "cannot tell" and measured != most:
            needed = self.images_for_loss(cost, abs(most - measured), self.level)
        return Answer("limit", verdict, 1 - upper if entry.higher else upper, limit, needed, entry.over)

    def loss_answer(
        self, metric: str, baseline: str, where: NDArray[np.bool_], margin: float, certain: float
    ) -> Answer:
        entry, (loss, group) = METRICS[metric], self.loss(metric, baseline, where)
        if not len(loss):
            return Answer(baseline, "cannot tell", None, margin, None, entry.over)
        upper = statistics.loss_at_most(loss, self.level, group, entry.binary)
        lower = -statistics.loss_at_most(-loss, certain, group, entry.binary)
        measured, needed = float(loss.mean()), None
        # A measured loss beyond the margin fails only if chance is excluded: the candidate is worse at all.
        worse = measured >= margin and lower > 0
        verdict: Verdict = "passed" if upper < margin else "failed" if worse else "cannot tell"
        if verdict == "cannot tell":
            gap = margin - max(0.0, measured) if measured < margin else measured
            needed = self.images_for_loss(loss, gap, self.level)
        return Answer(baseline, verdict, round(upper, _DECIMALS), margin, needed, entry.over)

    def operating_point(self) -> dict[str, Any]:
        """Convert the measured rates to the plant's share of defects, which is not the test set's."""
        point: dict[str, Any] = {"defect_rate": self.policy.defect_rate}
        rates = []
        for name in ("escape_rate", "overkill"):
            each = self.values["candidate"].get(name, np.array([]))
            counting = ~np.isnan(each)
            if not counting.any():
                return point
            events, group = each[counting], self.groups(counting)
            # Half the level each, since the limits of the precision need those of both rates.
            low = 1 - statistics.rate_at_most(1 - events, self.level / 2, group)
            rates.append((float(events.mean()), low, statistics.rate_at_most(events, self.level / 2, group)))
        at = statistics.at_prevalence(rates[0], rates[1], self.policy.defect_rate)
        return point | {name: list(limits) for name, limits in at.items()}


def _mean(values: Floats) -> float | None:
    known = values[~np.isnan(values)]  # the baseline's table may lack the column
    return round(float(known.mean()), _DECIMALS) if len(known) else None


def _gain(rows: list[Row], compared: bool) -> tuple[str, Verdict]:
    """Whether accuracy or IoU is better than in production, in words and as a verdict."""
    if not compared:
        return "There is no model in production yet: the limits alone decide.", "passed"
    gains = [(row, answer) for row in rows for answer in row.answers if answer.question == "gain"]

    def words(row: Row, answer: Answer) -> str:
        return f"{METRICS[row.metric].title} {row.candidate:.1%} against {row.production:.1%} (p = {answer.bound:.2g})"

    if better := [words(row, answer) for row, answer in gains if answer.verdict == "passed"]:
        return f"Better than production: {' and '.join(better)}.", "passed"
    every = ", ".join(words(row, answer) for row, answer in gains)
    if any(answer.verdict == "cannot tell" for _, answer in gains):
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
        nothing = f"{name}: cannot be told, there are no {answer.kind}{would}"
        return f"{nothing}. A policy that does not ask for it has limit and margin null."
    if answer.question == "limit":
        side = "below" if entry.higher else "above"
        words = f"{name}: {row.candidate:.1%} {'of' if entry.binary else 'over'} {row.images} {answer.kind}"
        if answer.verdict == "failed":
            return f"{words}, certainly {side} the limit of {answer.limit:.1%}."
        least = "as low" if entry.higher else "as high"
        words += f"; it may be {least} as {answer.bound:.1%}, and the limit is {answer.limit:.1%}"
    else:
        baseline = row.production if answer.question == "production" else row.anchor
        worse = (baseline or 0) - row.candidate if entry.higher else row.candidate - (baseline or 0)
        against = "in production" if answer.question == "production" else "of the anchor"
        words = f"{name}: {row.candidate:.1%} against {baseline:.1%} {against}"
        if answer.verdict == "failed":
            return f"{words}: worse by {_points(worse)}, and {_points(answer.limit)} are allowed."
        words += f"; it may be worse by {_points(answer.bound)}, and {_points(answer.limit)} are allowed"
    if answer.needed:
        return f"{words}. About {answer.needed} {answer.kind} would tell."
    return f"{words}. It lies so close that no number of images would tell."


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"


def _changed(candidate: pd.DataFrame, production: pd.DataFrame) -> list[dict[str, Any]]:
    rows = candidate.assign(category=category_names(candidate))[["id", "category", "label"]].astype(str)
    for name, table in (("candidate", candidate), ("production", production)):
        rows[name] = table["predicted"].astype(object).where(table["predicted"].notna(), "unparseable")
    return cast("list[dict[str, Any]]", rows[rows["candidate"] != rows["production"]].to_dict("records"))
