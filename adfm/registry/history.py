"""The history of production: who was it, when and why. It also decides between two that move production at once.

Each step is a version of the registered model `<model>-history`, its particulars in tags. MLflow gives every version
the next number once, whoever asks, writes its tags with it, and does not use a number again: steps have one order,
which is the same for all readers, and a step that somebody deletes leaves a gap. The times are the server's.

MLflow cannot compare and swap an alias. So production is what the history says, and the aliases follow it. A move names
the move that it `follows`; if another one came between, it is void, for every reader alike. No lock is held while files
are checked, and a process that dies leaves none behind.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from adfm.registry.alerts import alert

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

MOVES = ("found", "promote", "rollback", "restore", "lost")
"""Steps that say who is in production; the others, `reject`, `refuse` and `decide`, move nothing."""

_ABOUT = (
    "Who was in production, when and why: one version a step, which `adfm registry log` prints. adfm writes it; nobody "
    "else should. See the tags of a version."
)
LONGEST = 2000
"""Characters of a reason that are kept."""

_SOURCE = "adfm:/history"  # there are no files; MLflow wants an address
# What MLflow answers when others were faster: after its own three tries, or in the words of SQLite, PostgreSQL, MySQL.
_TAKEN = ("Giving up after", "IntegrityError", "UniqueViolation", "Duplicate entry", "database is locked")
_PATIENCE = 60  # seconds to go on, when many write at once


@dataclass(frozen=True)
class Step:
    """One step of the history.

    Args:
        number: Its place.
        at: When it was written, by the tracking server's clock: UTC, ISO 8601.
        action: `promote`; `rollback`; `reject`: a reviewer turned the version down; `refuse`: adfm did; `decide`: the
            gate decided anew, because production had changed; `found`: it was in production when the history began;
            `restore`: an alias had been moved by hand and was put back; `lost`: the version in production was deleted.
        version: The version that the step is about.
        production: The version in production after a move; `none` if there is none.
        previous: The version to which a rollback returns after a move; `none` if there is none.
        replaced: The version that was in production before a move; `none` if there was none.
        by: Who, or what, took the step.
        why: The reason.
        approval_by: Who approved, as the version's tag `approval_by` has it.
        decision: Digest of the gate's decision that the version had.
        follows: Number of the move that the step was taken after; 0 if there was none.
        finished: Whether aliases and tags were seen to agree with the move.
        void: Whether another move came between, so that this one does not count.
        mark: What tells the step from another with the same content.
    """

    number: int
    at: str
    action: str
    version: str
    production: str = ""
    previous: str = ""
    replaced: str = ""
    by: str = ""
    why: str = ""
    approval_by: str = ""
    decision: str = ""
    follows: int = 0
    finished: bool = False
    void: bool = False
    mark: str = ""


def read(store: MlflowClient, name: str) -> list[Step]:
    """Every step in the history of model `name`, oldest first."""
    steps: list[Step] = []
    last = 0
    for version in sorted(versions(store, _name(name)), key=lambda version: int(version.version)):
        number, tags = int(version.version), version.tags
        if not {"action", "version"} <= tags.keys() or not tags.get("follows", "").isdecimal():
            continue  # made by somebody else
        follows, moves = int(tags["follows"]), tags["action"] in MOVES
        void = moves and last > follows
        if moves and not void:
            last = number
        texts: dict[str, Any] = {field.name: tags[field.name] for field in fields(Step) if field.name in tags}
        at = datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).isoformat(timespec="seconds")
        made = {"number": number, "at": at, "follows": follows, "finished": "finished" in tags, "void": void}
        steps.append(Step(**texts | made))
    return steps


def last_move(steps: list[Step]) -> Step | None:
    """The move that says who is in production."""
    return next((step for step in reversed(steps) if step.action in MOVES and not step.void), None)


def append(store: MlflowClient, name: str, action: str, version: str, follows: int, **content: str) -> Step:
    """Writes a step.

    Args:
        store: MLflow's client.
        name: Name of the model.
        action: See `Step`.
        version: The version that it is about.
        follows: Number of the last move that was known when it was taken.
        content: Further fields of `Step`.

    Returns:
        The step as the history now has it; `void` if it is a move and another one came first.
    """
    from mlflow.exceptions import MlflowException

    mark = uuid.uuid4().hex
    texts = {"action": action, "version": version[:100], "follows": str(follows), "mark": mark}
    texts |= {key: value[:LONGEST] for key, value in content.items() if value}
    words = f"{action}: version {texts['version']}"
    if "replaced" in texts:
        words += f" in place of {texts['replaced']}"

    def write() -> None:
        store.create_model_version(_name(name), _SOURCE, tags=texts, description=words)

    try:
        insist(write)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        _create(store, name)
        insist(write)
    # An answer that was lost on its way is asked for again by MLflow's client: the first of the two counts.
    return next(step for step in read(store, name) if step.mark == mark)


def insist(write: Callable[[], object]) -> None:
    """Writes once more as long as MLflow says that others were faster."""
    from mlflow.exceptions import MlflowException

    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            write()
            return
        except MlflowException as error:
            if not any(sign in str(error) for sign in _TAKEN) or time.monotonic() > deadline:
                raise
            time.sleep(random.uniform(0.05, 0.5))


def tag(store: MlflowClient, version: ModelVersion, **tags: str) -> None:
    """Sets tags of a version."""
    for key, value in tags.items():
        insist(partial(store.set_model_version_tag, version.name, str(version.version), key, value))


def finish(store: MlflowClient, name: str, step: Step) -> None:
    """Notes that aliases and tags agree with a move."""
    insist(lambda: store.set_model_version_tag(_name(name), str(step.number), "finished", "true"))


def decision(version: ModelVersion) -> str:
    """Digest of the gate's decision that a version has now; empty if it has none."""
    return str(version.tags.get("gate_digest", ""))


def note_rejection(store: MlflowClient, version: ModelVersion, steps: list[Step] | None = None) -> None:
    """Writes down that the version's tag `approval` is `rejected`, if it is and the history does not have it.

    Args:
        store: MLflow's client.
        version: A version with its tags; `approval_reason` and `approval_by` are kept with the rejection.
        steps: The history, if it is known.
    """
    if version.tags.get("approval") != "rejected":
        return
    name, number = version.name, str(version.version)
    steps = read(store, name) if steps is None else steps
    why, by = version.tags.get("approval_reason", "")[:LONGEST], version.tags.get("approval_by", "")[:LONGEST]
    known = [step for step in steps if step.action == "reject" and step.version == number]
    if known and (known[-1].why, known[-1].decision) == (why, decision(version)):
        return
    move = last_move(steps)
    follows = move.number if move else 0
    append(store, name, "reject", number, follows, why=why, by=by, decision=decision(version))
    words = f"version {number} was rejected" + f" by {by}" * bool(by) + f": {why}" * bool(why)
    print(f"{name}: {words}")
    alert(f"{name}: {words}")


def table(steps: list[Step]) -> str:
    """The history as text: a line a step, and one for every step that was deleted."""
    rows = [("step", "at (UTC)", "what", "version", "in place of", "by", "why")]
    number = 0
    for step in steps:
        rows += [(str(gone), "", "deleted", "", "", "", "") for gone in range(number + 1, step.number)]
        number = step.number
        state = " (void)" * step.void + " (unfinished)" * (step.action in MOVES and not (step.void or step.finished))
        why = " ".join(step.why.split()) + f" (approved by {step.approval_by})" * bool(step.approval_by)
        at = step.at.removesuffix("+00:00").replace("T", " ")
        rows.append((str(number), at, step.action + state, step.version, step.replaced, step.by, why))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[6]]).rstrip()
        for row in rows
    )


def versions(store: MlflowClient, registered: str) -> list[ModelVersion]:
    """All versions of a registered model, in no order; none if there is no such model."""
    found: list[ModelVersion] = []
    token = None
    while True:
        page = store.search_model_versions(f"name = '{registered}'", max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _name(name: str) -> str:
    return f"{name}-history"


def _create(store: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        store.create_registered_model(_name(name), description=_ABOUT)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
