"""Format the gate's decision: a version's description in MLflow (Markdown), and one screen of a terminal."""

import html
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adfm import tracking
from adfm.evaluation import references
from adfm.evaluation.calibration import Calibration
from adfm.evaluation.plots import TITLES
from adfm.registry import gate
from adfm.text import aligned, markdown, printable

if TYPE_CHECKING:
    from mlflow.entities import Run

LONGEST = 5000  # characters of a description: the width of its column in MLflow's SQL schema
LINES, WIDTH = 24, 100  # of a terminal
REPORT = "evaluation/report/report.html"  # artifact of the run `evaluate`

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
    """A part of the description."""

    name: str  # of its lines, for the note on what was left out; empty: they always stay
    matters: int  # rank: the lowest is shortened first
    lines: list[str]  # sentences, rows of a table or items of a list, each whole
    head: str = ""  # before the first line: a sentence, or a table's header
    most: int | None = None  # lines that are included even where there is room for more
    separator: str = "\n"
    caption: str = ""  # below a table, which MLflow draws without a space after it
    left_out: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.left_out = len(self.lines) - len(self.lines[: self.most])
        self.lines = self.lines[: self.most]

    def __str__(self) -> str:
        return self.head + self.separator.join(self.lines) + (self.caption and f"\n\n{self.caption}")


def text(
    decided: dict[str, Any],  # the decision as JSON values, with what registration adds to it
    origin: dict[str, Any],  # the lineage
    measured: dict[str, Any],  # the candidate's metrics
    calibration: Calibration,
    version: str,
    evaluated_by: "Run | None",  # None where MLflow does not have the run
    policy_difference: Sequence[str] = (),
    trained_by: "Run | None" = None,
    compared: Mapping[str, Any] | None = None,  # the evaluation's references.json, by which the gate does not judge
) -> str:
    """Return the description of a version in Markdown: the decision, its reasons, and how to approve.

    Beyond `LONGEST` characters the least important sentences and rows are left out; the text says so. Nothing in it
    that comes from data or from people is markup.
    """
    table = gate.table(decided)
    whole = 1 + sum(row["of"] == "whole" for row in decided["rows"])
    reasons = _Block("reasons", 7, [f"- {markdown(reason)}" for reason in _reasons(decided)], most=_MOST_REASONS)
    headline, passed = f"**{markdown(decided['headline'])}**", decided["verdict"] == "passed"
    facts = [f"- {fact}" for fact in (*_facts(decided), markdown(calibration.summary))]
    rests_on = _heading("What the decision rests on")
    differences = [f"- {markdown(line)}" for line in policy_difference]
    differs = "**The submitter's policy differs** from the registered one, which judged:\n\n"
    blocks = [
        # The list of versions has the beginning, as plain text.
        _Block("", 99, [f"Gate: {decided['verdict']}.", headline, markdown(_circumstances(decided))], separator="\n\n"),
        _Block("links", 8, [*_links(evaluated_by, trained_by)], separator=" "),
        *([] if passed else [reasons]),
        _table("", 97, table[:whole], "In brackets the confidence limit, by which the gate judges."),
        _table("rows of the table", 4, [table[0], *table[whole:]], "The parts that failed or are open.", _MOST_PARTS),
        *([reasons] if passed else []),  # which are notes alone then
        _Block("", 96, [_next_step(decided, version)], _heading("Approval")),
        _Block("sentences on operating point, looks, separation and threshold", 6, facts, rests_on),
        *_changed(decided),
        _Block("differences of the policy", 5, differences, differs),
        *_references(compared or {"rows": {}, "sentence": ""}),
        _Block("sentence on the origin", 2, [_origin(origin)], _heading("Origin")),
        _Block("further metrics", 1, _besides(measured, compared)),
    ]
    return _fitted(blocks)


def screen(decided: dict[str, Any], version: str = "", verdict: Sequence[tuple[int, str]] = ()) -> str:
    """Return the decision on one screen: verdict, headline, table, what is open, and the next commands.

    Predictions that are not registered have no `version`. Of the sentences of `verdict`, which `references.brief`
    ranks, those of a high rank are left out first.
    """
    title = f"version {version}: gate {decided['verdict']}" if version else f"gate {decided['verdict']}"
    above = [title, *_wrapped(decided["headline"]), *_wrapped(_circumstances(decided)), "", *_whole(decided), ""]
    below = [""]
    if decided["verdict"] != "passed":
        below += _wrapped(f"It cannot be promoted. {_remedy(decided['verdict'])}")
    elif version:
        below += _wrapped(f"To promote it, check it in MLflow first; then `adfm approve {version}` and `adfm promote`")
    room = LINES - 1 - len(above) - len(below)  # a prompt fits below
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
    """Choose the sentences of the lowest rank that fit into so many lines, and keep their order."""
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
    """On which images, and against which versions, the gate judged, and what would tell where that is open."""
    kinds = " and ".join(f"{count:,} {label}" for label, count in decided["images"].items())
    compared = [
        f"version {decided[f'{role}_version']} {words}"
        for role, words in (("production", "in production"), ("anchor", "(the anchor)"))
        if decided.get(f"{role}_version")
    ]
    against = f", against {' and '.join(compared)}" if compared else ""
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


def _facts(decided: dict[str, Any]) -> Iterator[str]:
    point, separation = decided["operating_point"], decided["separation"]
    if {"escapes", "false_calls", "precision"} <= point.keys():
        (escapes, *_, most_escapes), (calls, *_, most_calls) = point["escapes"], point["false_calls"]
        precision, least, _ = point["precision"]
        yield (
            f"**On the line**, where {point['defect_rate']:.2%} of the parts are defective, {escapes:,.0f} of 10,000 "
            f"parts are escapes (at most {most_escapes:,.0f}) and {calls:,.0f} are false calls (at most "
            f"{most_calls:,.0f}); {precision:.0%} of the flagged parts are defective (at least {least:.0%})."
        )
    looks = f"this is candidate {decided['look']} of the {decided['looks']} that this test set may judge"
    yield f"**Looks**: {looks}; the level of this look is {decided['level']:.2g}."
    if separation and separation["problems"]:
        images = len({key for problem in separation["problems"] for key in problem["ids"]})
        yield f"**Separation failed**: {images:,} test images were in the training or validation data."
    elif separation is None or not separation["proved"]:
        yield "**Separation** of test and training images is not proved."
    else:
        models = separation["against"].items()
        seen = " and ".join(f"{count:,} of {'the ' * (name == 'candidate')}{markdown(name)}" for name, count in models)
        proof = f"none of {separation['images']:,} test images is among the training and validation images ({seen})."
        yield f"**Separation**: {proof}"


def _changed(decided: dict[str, Any]) -> list[_Block]:
    """Count the images that candidate and production decide differently, and list a few, new escapes first."""
    changes = sorted(decided["changed"], key=lambda change: [*_CHANGES].index(_kind(change)))
    if not changes:
        return []
    kinds = [_kind(change) for change in changes]
    counts = ", ".join(f"{kinds.count(kind):,} {words}" for kind, words in _CHANGES.items() if kind in kinds)
    columns = ("label", "production", "candidate", "category", "id")
    rows = [columns, *([change[column] for column in columns] for change in changes)]
    sentence = f"**{len(changes):,} images are decided otherwise than in production**: {counts}."
    caption = "Label of each image, and what production and candidate decide."
    return [
        _Block("", 95, [sentence], _heading("Changes from production")),
        _table("images that are decided otherwise", 5, rows, caption, _MOST_CHANGED),
    ]


def _kind(change: dict[str, Any]) -> tuple[str, bool, bool]:
    """Label of the image, and whether candidate and production are right."""
    label = change["label"]
    return label, change["candidate"] == label, change["production"] == label


def _next_step(decided: dict[str, Any], version: str) -> str:
    if decided["verdict"] != "passed":
        return f"**It cannot be promoted.** {_remedy(decided['verdict'])}"
    policy = decided.get("policy") or {}
    approvers = [markdown(_clipped(name)) for name in policy.get("approvers", [])]
    others = " and others" * (len(approvers) > 8)
    who = f" May approve: {', '.join(approvers[:8])}{others}." if approvers else ""
    if policy.get("team_of_one") is False:
        who += " Not the one who submitted it."
    return (
        "**To approve it**, press the pencil of `approval` in the table *Tags* of this page, enter `approved` and press"
        f" *Save*, with your name in the tag `approval_by`; or run `adfm approve {version}`. The approvals service, or"
        " `adfm promote`, then puts it into production. To turn it down enter `rejected`, with the reason in the tag"
        f" `approval_reason`.{who} MLflow's own button **Promote model** only copies the version to another model, and"
        " an alias that is moved by hand is put back: neither promotes."
    )


def _remedy(verdict: str) -> str:
    if verdict == "failed":
        return "Fix what the reasons name, train, and register again."
    return "Add the images that would tell, evaluate candidate and production on them, and register again."


def _links(evaluated_by: "Run | None", trained_by: "Run | None") -> Iterator[str]:
    """Link MLflow's pages with report and curves; a run of another store has none."""
    if evaluated_by:
        place = tracking.run_page(evaluated_by, f"artifacts/{REPORT}")
        yield f"[The report]({place}) shows images with true and predicted boxes beside the model's own words."
    if trained_by:
        yield f"[The curves of the training]({tracking.run_page(trained_by)}) show how it learned."


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
    rows = compared["rows"].items()
    values = {name: {metric: [each[0], None, None] for metric, each in row.items()} for name, row in rows}
    steps = (compared.get("summary") or {}).get("steps", [])
    done = [f"Next: {step['text']}" for step in steps if step.get("rule") == "gate"]  # it is registered already
    lines = [" ".join(printable(line)[:_SENTENCE].split()) for line in compared["lines"] if line not in done]
    lines = [f"- {_with_commands(line)}" for line in lines]
    heading = _heading("Comparison with the reference models, by which the gate does not judge")
    table = references.table({"rows": values})
    caption = "The 95 % intervals are in `evaluation/comparison.md`, an artifact of the version."
    return [
        _Block("sentences on model, references and next steps", 9, lines, heading),
        _table("rows of references, which the gate does not judge", 2, table, caption),
    ]


def _with_commands(line: str) -> str:
    """Escape a line, but keep commands between backticks as code."""
    plain = re.compile(r"&#96;((?:[A-Za-z0-9 /=-]|&#46;|&#95;|&#58;)+)&#96;")
    return plain.sub(lambda match: f"`{html.unescape(match[1])}`", markdown(line))


def _besides(measured: dict[str, Any], compared: Mapping[str, Any] | None) -> list[str]:
    in_table = references.METRICS if compared and compared["rows"] else {}
    values = [(TITLES.get(name, name), measured.get(name)) for name in _BESIDES if name not in in_table]
    parts = [f"{title} {value:.3f}" for title, value in values if value is not None]
    return [f"Besides: {', '.join(parts)}."] if parts else []


def _fitted(blocks: list[_Block]) -> str:
    """Join the blocks, and shorten them until they fit."""
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
    """Format a table, whose first row is the header, without the columns that are empty."""
    kept = [column for column in zip(*rows, strict=True) if any(cell != "-" for cell in column[1:])]
    # MLflow draws tables without padding or lines: spaces that do not break keep the columns apart.
    cells = ([f" {markdown(_clipped(cell))}{_GAP} |" for cell in row] for row in zip(*kept, strict=True))
    header, *lines = [f"|{''.join(row)}" for row in cells] or [""]
    return _Block(name, matters, lines, f"{header}\n|{' --- |' * len(kept)}\n", most, caption=caption)


def _clipped(text: str) -> str:
    text = printable(text)
    return text if len(text) <= _NAME else f"{text[: _NAME // 2]}…{text[-_NAME // 2 + 1 :]}"


def _whole(decided: dict[str, Any]) -> list[str]:
    """Format the table of the whole, without the columns that are empty or do not fit."""
    whole = sum(row["of"] == "whole" for row in decided["rows"])
    rows = gate.table(decided)[: whole + 1]
    columns = {name: column for name, *column in zip(*rows, strict=True) if any(cell != "-" for cell in column)}
    for name in ("", "anchor", "images", "margin", "limit"):  # which the reasons and gate.json have
        columns.pop(name, None)
        lines = aligned([*zip(*([name, *column] for name, column in columns.items()), strict=True)])
        if max(map(len, lines)) <= WIDTH:
            break
    return lines


def _wrapped(sentence: str, indent: str = "") -> list[str]:
    return textwrap.wrap(printable(sentence), WIDTH, subsequent_indent=indent) or [""]
