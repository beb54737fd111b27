"""The gate's decision for people: a version's description in MLflow (Markdown), and one screen of a terminal."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adfm import tracking
from adfm.evaluation import references
from adfm.evaluation.calibration import Calibration
from adfm.evaluation.plots import TITLES
from adfm.registry import gate
from adfm.text import markdown, printable

if TYPE_CHECKING:
    from mlflow.entities import Run

LONGEST = 5000
"""Characters of a description: the width of its column in MLflow's SQL schema."""

LINES, WIDTH = 24, 100
"""The screen that `screen` fits."""

REPORT = "evaluation/report/report.html"
"""Artifact of the run `evaluate`."""

_MOST_REASONS = 6
_MOST_PARTS = 6
_MOST_CHANGED = 5
_NAME = 60  # characters of a name in a table
_GAP = "\u00a0" * 3
_SENTENCE = 500  # characters of a sentence on model, references or next steps
_BESIDES = ("balanced_accuracy", "auroc", "box_f1", "parse_rate", "ece")
# What the change of a decision on an image means, the worst first.
_CHANGES = {
    ("anomalous", False, True): "new escapes",
    ("normal", False, True): "good parts newly flagged",
    ("anomalous", True, False): "defects that production misses",
    ("normal", True, False): "good parts that production flags",
    ("anomalous", False, False): "defects that both miss",
    ("normal", False, False): "good parts that both flag",
}


@dataclass
class _Block:
    """A part of the description. The blocks that matter least lose their last lines first, if all are too long.

    Args:
        name: What its lines are, for the note on what was left out; empty: they always stay.
        matters: Its rank: the lowest is shortened first.
        lines: Sentences, rows of a table or items of a list, each whole.
        head: Stands before the first line: a sentence, or a table's header.
        most: Lines that are shown even where there is room for more.
        separator: Between the lines.
        caption: Stands below a table, which MLflow draws without a space after it.
    """

    name: str
    matters: int
    lines: list[str]
    head: str = ""
    most: int | None = None
    separator: str = "\n"
    caption: str = ""
    left_out: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.left_out = len(self.lines) - len(self.lines[: self.most])
        self.lines = self.lines[: self.most]

    def __str__(self) -> str:
        return self.head + self.separator.join(self.lines) + (self.caption and f"\n\n{self.caption}")


def text(
    decided: dict[str, Any],
    origin: dict[str, Any],
    measured: dict[str, Any],
    calibration: Calibration,
    version: str,
    evaluated_by: Run | None,
    policy_difference: Sequence[str] = (),
    trained_by: Run | None = None,
    compared: Mapping[str, Any] | None = None,
) -> str:
    """The description of a version, in Markdown: the decision, what it rests on, and how to approve.

    What does not fit is left out by whole sentences and rows, the least important first; the text says so.

    Args:
        decided: The decision as JSON values, with what registration adds to it.
        origin: The lineage.
        measured: The candidate's metrics.
        calibration: The version's calibration.
        version: Its number.
        evaluated_by: The run that evaluated it; `None` if MLflow does not have it.
        policy_difference: What the submitter's policy says otherwise than the registered one.
        trained_by: The run that trained it; `None` if MLflow does not have it.
        compared: The evaluation's `references.json`; the gate does not judge by it.

    Returns:
        At most `LONGEST` characters. Nothing in it that comes from data or from people is markup.
    """
    table = gate.table(decided)
    whole = 1 + sum(row["of"] == "whole" for row in decided["rows"])
    reasons = _Block("reasons", 7, [f"- {markdown(reason)}" for reason in _reasons(decided)], most=_MOST_REASONS)
    passed = decided["verdict"] == "passed"
    facts = [*_facts(decided), markdown(calibration.summary)]
    blocks = [
        # The list of versions shows the beginning, as plain text.
        _Block("", 99, [f"Gate: {decided['verdict']}."]),
        _Block("", 99, [f"**{markdown(decided['headline'])}**"]),
        _Block("", 98, [markdown(_circumstances(decided))]),
        _Block("links", 8, _links(evaluated_by, trained_by), separator=" "),
        *([] if passed else [reasons]),
        _table("", 97, table[:whole], "In brackets the confidence limit, by which the gate judges."),
        _table("rows of the table", 4, [table[0], *table[whole:]], "The parts that failed or are open.", _MOST_PARTS),
        *([reasons] if passed else []),  # which are notes alone then
        _Block("", 96, [_next_step(decided, version)], _heading("Approval")),
        _Block(
            "sentences on operating point, looks, separation and threshold",
            6,
            [f"- {fact}" for fact in facts],
            _heading("What the decision rests on"),
        ),
        *_changed(decided),
        _Block("differences of the policy", 5, [f"- {markdown(line)}" for line in policy_difference], _POLICY),
        *_references(compared or {"rows": {}, "sentence": ""}),
        _Block("sentence on the origin", 2, [_origin(origin)], _heading("Origin")),
        _Block("further metrics", 1, _besides(measured, compared)),
    ]
    return _fitted(blocks)


def screen(decided: dict[str, Any], version: str = "", verdict: Sequence[tuple[int, str]] = ()) -> str:
    """The decision on one screen: verdict, headline, the table of the whole, what is open, and the next commands.

    Args:
        decided: The decision as JSON values.
        version: Number of the version; empty for predictions that are not registered.
        verdict: The evaluation's verdict, as `references.brief` gives it; those of a high rank are left out first.

    Returns:
        At most `LINES - 1` lines of at most `WIDTH` characters, so that a prompt fits below.
    """
    title = f"version {version}: gate {decided['verdict']}" if version else f"gate {decided['verdict']}"
    above = [title, *_wrapped(decided["headline"]), *_wrapped(_circumstances(decided)), ""]
    above += [*_aligned(decided), ""]
    below = ["", *(line for sentence in _commands(decided, version) for line in _wrapped(sentence))]
    room = LINES - 1 - len(above) - len(below)
    lines: list[str] = []
    reasons = _reasons(decided)
    least = sum(len(_wrapped(f"- {reason}", "  ")) for reason in reasons[:1]) + (len(reasons) > 1)
    summary = _chosen(verdict, room - least - 1)
    room -= len(summary) + bool(summary)
    for number, reason in enumerate(reasons):
        item = _wrapped(f"- {reason}", "  ")
        rest = len(reasons) - number - 1
        if len(lines) + len(item) > room - bool(rest):
            lines.append(f"- and {rest + 1} more reasons, in gate.json")
            break
        lines += item
    return "\n".join([*above, *lines, *([""] if lines and summary else []), *summary, *below])


def _chosen(verdict: Sequence[tuple[int, str]], room: int) -> list[str]:
    """The sentences of the lowest rank that fit into so many lines of the screen, in their order."""
    lines = [_wrapped(sentence, "  ") for _, sentence in verdict]
    chosen = set()
    for place in sorted(range(len(lines)), key=lambda place: verdict[place][0]):
        if len(lines[place]) <= room:
            chosen.add(place)
            room -= len(lines[place])
    return [line for place in sorted(chosen) for line in lines[place]]


def _reasons(decided: dict[str, Any]) -> list[str]:
    return [reason for reason in decided["reasons"] if reason != decided["headline"]]


def _circumstances(decided: dict[str, Any]) -> str:
    """What was judged, against what, and what would tell where that is open."""
    kinds = " and ".join(f"{count:,} {label}" for label, count in decided["images"].items())
    rivals = [
        f"version {decided[f'{rival}_version']} {words}"
        for rival, words in (("production", "in production"), ("anchor", "(the anchor)"))
        if decided.get(f"{rival}_version")
    ]
    against = f", against {' and '.join(rivals)}" if rivals else ""
    split = f" of the {decided['split']} split" if decided.get("split") else ""
    return " ".join([f"Judged on {kinds} images{split}{against}.", *_needed(decided)])


def _needed(decided: dict[str, Any]) -> list[str]:
    """How many images of which kind would tell what is open, if what was measured is true."""
    largest: dict[tuple[str, str, str], tuple[int, int]] = {}
    for row in decided["rows"]:
        for answer in row["answers"]:
            if answer["verdict"] == "cannot tell" and answer["needed"] and answer["question"] != "gain":
                place = answer["kind"], row["of"], row["name"]
                largest[place] = max(largest.get(place, (0, 0)), (answer["needed"], row["images"]))
    if decided["verdict"] != "cannot tell" or not largest:
        return []

    def words(place: tuple[str, str, str], needed: int, there: int) -> str:
        kind, of, name = place
        return f"{needed:,} {kind}{f' of {of} {_clipped(name)}' if name else ''} (now {there:,})"

    parts = [words(place, *counts) for place, counts in largest.items()]
    rest = f", and more of {len(parts) - 3} further parts" if len(parts) > 3 else ""
    return [f"About {', '.join(parts[:3])}{rest} would tell."]


def _facts(decided: dict[str, Any]) -> list[str]:
    """Operating point, looks and separation, a sentence each."""
    return [*_operating_point(decided["operating_point"]), _looks(decided), _separation(decided["separation"])]


def _operating_point(point: dict[str, Any]) -> list[str]:
    """Escapes, false calls and precision at the plant's share of defects, each as value, lower and upper limit."""
    if not {"escapes", "false_calls", "precision"} <= point.keys():
        return []
    (escapes, *_, most_escapes), (calls, *_, most_calls) = point["escapes"], point["false_calls"]
    precision, least, _ = point["precision"]
    return [
        f"**On the line**, where {point['defect_rate']:.2%} of the parts are defective, {escapes:,.0f} of 10,000 parts "
        f"are escapes (at most {most_escapes:,.0f}) and {calls:,.0f} are false calls (at most {most_calls:,.0f}); "
        f"{precision:.0%} of the flagged parts are defective (at least {least:.0%})."
    ]


def _looks(decided: dict[str, Any]) -> str:
    return (
        f"**Looks**: this is candidate {decided['look']} of the {decided['looks']} that this test set may judge; the "
        f"level of this look is {decided['level']:.2g}."
    )


def _separation(separation: dict[str, Any] | None) -> str:
    if separation is None:
        return "**Separation** of test and training images is not proved."
    against = " and ".join(
        f"{images:,} of {'the ' * (name == 'candidate')}{markdown(name)}"
        for name, images in separation["against"].items()
    )
    if separation["problems"]:
        images = len({key for problem in separation["problems"] for key in problem["ids"]})
        return f"**Separation failed**: {images:,} test images were in the training or validation data."
    if not separation["proved"]:
        return "**Separation** of test and training images is not proved."
    return (
        f"**Separation**: none of {separation['images']:,} test images is among the training and validation images "
        f"({against})."
    )


def _changed(decided: dict[str, Any]) -> list[_Block]:
    """The images that candidate and production decide differently: how many, and the first few, new escapes first."""
    order = [*_CHANGES]
    changes = sorted(decided["changed"], key=lambda change: order.index(_kind(change)))
    if not changes:
        return []
    kinds = [_kind(change) for change in changes]
    counts = ", ".join(f"{kinds.count(kind):,} {words}" for kind, words in _CHANGES.items() if kind in kinds)
    columns = ("label", "production", "candidate", "category", "id")
    rows = [[change[column] for column in columns] for change in changes]
    sentence = f"**{len(changes):,} images are decided otherwise than in production**: {counts}."
    return [
        _Block("", 95, [sentence], _heading("Changes from production")),
        _table(
            "images that are decided otherwise",
            5,
            [columns, *rows],
            "Label of each image, and what production and candidate decide.",
            _MOST_CHANGED,
        ),
    ]


def _kind(change: dict[str, Any]) -> tuple[str, bool, bool]:
    """Label of the image, and whether candidate and production are right."""
    label = change["label"]
    return label, change["candidate"] == label, change["production"] == label


_POLICY = "**The submitter's policy differs** from the registered one, which judged:\n\n"


def _next_step(decided: dict[str, Any], version: str) -> str:
    if decided["verdict"] != "passed":
        return f"**It cannot be promoted.** {_remedy(decided)}"
    policy = decided.get("policy") or {}
    approvers = [markdown(_clipped(name)) for name in policy.get("approvers", [])]
    who = ""
    if approvers:
        who = f" May approve: {', '.join(approvers[:8])}{' and others' * (len(approvers) > 8)}."
    if policy.get("team_of_one") is False:
        who += " Not the one who submitted it."
    return (
        "**To approve it**, press the pencil of `approval` in the table *Tags* of this page, enter `approved` and press"
        f" *Save*, with your name in the tag `approval_by`; or run `adfm approve {version}`. The approvals service, or"
        " `adfm promote`, then puts it into production. To turn it down enter `rejected`, with the reason in the tag"
        f" `approval_reason`.{who} MLflow's own button **Promote model** only copies the version to another model, and"
        " an alias that is moved by hand is put back: neither promotes."
    )


def _remedy(decided: dict[str, Any]) -> str:
    if decided["verdict"] == "failed":
        return "Fix what the reasons name, train, and register again."
    return "Add the images that would tell, evaluate candidate and production on them, and register again."


def _commands(decided: dict[str, Any], version: str) -> list[str]:
    if decided["verdict"] != "passed":
        return [f"It cannot be promoted. {_remedy(decided)}"]
    if not version:
        return []
    return [f"To promote it, look at it in MLflow first; then `adfm approve {version}` and `adfm promote`"]


def _links(evaluated_by: Run | None, trained_by: Run | None) -> list[str]:
    """Where MLflow's own pages show report and curves; nothing for a run of another store."""
    links = []
    if evaluated_by:
        place = tracking.run_page(evaluated_by, f"artifacts/{REPORT}")
        links.append(f"[The report]({place}) shows images with true and predicted boxes beside the model's own words.")
    if trained_by:
        links.append(f"[The curves of the training]({tracking.run_page(trained_by)}) show how it learned.")
    return links


def _origin(origin: dict[str, Any]) -> str:
    base, data = origin["base"] or {}, origin["data"]
    dirty = ", with changes that are not committed" if origin["git_dirty"] == "true" else ""

    def known(value: Any) -> str:
        return markdown(_clipped(str(value))) if value else "unknown"

    return (
        f"Base model {known(base.get('name'))} (revision {known(base.get('revision'))}). Trained on data "
        f"{known(data['trained_on'])} (DVC {known(data['dvc_md5'])}), with code {known(origin['git_commit'])}{dirty}."
    )


def _references(compared: Mapping[str, Any]) -> list[_Block]:
    """The evaluation's verdict in words, and the figures of the models beside the blind answers."""
    if not compared["rows"]:
        return []
    # Without the intervals, which would wrap in every cell.
    values = {
        name: {metric: [value[0], None, None] for metric, value in row.items()}
        for name, row in compared["rows"].items()
    }
    steps = (compared.get("summary") or {}).get("steps", [])
    done = [f"Next: {step['text']}" for step in steps if step.get("rule") == "gate"]  # it is registered already
    lines = [" ".join(printable(line)[:_SENTENCE].split()) for line in compared["lines"] if line not in done]
    return [
        _Block(
            "sentences on model, references and next steps",
            9,
            [f"- {_with_commands(line)}" for line in lines],
            _heading("Comparison with the reference models, by which the gate does not judge"),
        ),
        _table(
            "rows of references, which the gate does not judge",
            2,
            references.table({"rows": values}),
            "The 95 % intervals are in `evaluation/comparison.md`, an artifact of the version.",
        ),
    ]


def _with_commands(line: str) -> str:
    """The line as `markdown` makes it, but with commands between backticks as code."""
    plain = re.compile(r"&#96;((?:[A-Za-z0-9 /=-]|&#46;|&#95;|&#58;)+)&#96;")
    return plain.sub(lambda match: f"`{html.unescape(match[1])}`", markdown(line))


def _besides(measured: dict[str, Any], compared: Mapping[str, Any] | None) -> list[str]:
    shown = references.METRICS if compared and compared["rows"] else {}
    values = [(TITLES.get(name, name), measured.get(name)) for name in _BESIDES if name not in shown]
    parts = [f"{title} {value:.3f}" for title, value in values if value is not None]
    return [f"Besides: {', '.join(parts)}."] if parts else []


def _fitted(blocks: list[_Block]) -> str:
    """The blocks as one text, shortened until it fits."""
    for block in sorted(blocks, key=lambda block: block.matters):
        while block.name and block.lines and len(_joined(blocks)) > LONGEST:
            block.lines.pop()
            block.left_out += 1
    return _joined(blocks)


def _joined(blocks: list[_Block]) -> str:
    parts = [str(block) for block in blocks if block.lines]
    if left_out := [f"{block.left_out:,} {block.name}" for block in blocks if block.left_out]:
        parts.append(f"Left out here: {', '.join(left_out)}; `gate.json`, an artifact of the version, has all.")
    return "\n\n".join(parts)


def _heading(text: str) -> str:
    return f"#### **{text}**\n\n"


def _table(name: str, matters: int, rows: Sequence[Sequence[str]], caption: str, most: int | None = None) -> _Block:
    """A table, whose first row is the header, without the columns that are empty."""
    kept = [column for column in zip(*rows, strict=True) if any(cell != "-" for cell in column[1:])]
    header, *lines = [_row(row) for row in zip(*kept, strict=True)] or [""]
    rule = f"|{' --- |' * len(kept)}"
    return _Block(name, matters, lines, f"{header}\n{rule}\n", most, caption=caption)


def _row(cells: Sequence[str]) -> str:
    # MLflow draws tables without padding or lines: spaces that do not break keep the columns apart.
    return f"|{''.join(f' {markdown(_clipped(cell))}{_GAP} |' for cell in cells)}"


def _clipped(text: str) -> str:
    """A name that is too long for a table, shortened to its ends."""
    text = printable(text)
    return text if len(text) <= _NAME else f"{text[: _NAME // 2]}…{text[-_NAME // 2 + 1 :]}"


def _aligned(decided: dict[str, Any]) -> list[str]:
    """The table of the whole, aligned, without the columns that are empty or do not fit."""
    whole = sum(row["of"] == "whole" for row in decided["rows"])
    rows = gate.table(decided)[: whole + 1]
    columns = {name: column for name, *column in zip(*rows, strict=True) if any(cell != "-" for cell in column)}
    for name in ("", "anchor", "images", "margin", "limit"):  # which the reasons and gate.json have
        columns.pop(name, None)
        widths = [max(map(len, (name, *column))) for name, column in columns.items()]
        if sum(widths) + 2 * len(widths) - 2 <= WIDTH:
            break
    lines = zip(*([name, *column] for name, column in columns.items()), strict=True)
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _wrapped(sentence: str, indent: str = "") -> list[str]:
    return textwrap.wrap(printable(sentence), WIDTH, subsequent_indent=indent) or [""]
