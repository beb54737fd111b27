"""The signed history of a model: every decision, move of production and change of policy, by whom and why.

Each step is a version of the registered model `<model>-history`, its fields in tags. MLflow gives every version the
next number once, whoever asks, writes its tags with it, and does not use a number again: steps have one order, which is
the same for all readers. The times are the server's.

A step is signed by the service's key and names, in `before`, the digest of the step that it follows. Of two that follow
the same one, the first counts and the other is void, for every reader alike: MLflow cannot compare and swap an alias,
so production is what the history says, and the aliases follow it. No lock is held while files are checked, and a
process that dies leaves none behind. Readers pass over steps without a valid signature; `adfm audit` lists them.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from adfm import signing
from adfm.errors import AdfmError
from adfm.registry.alerts import alert
from adfm.text import printable

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from adfm.signing import Keys

NOBODY = "none"
"""Stands for a version where there is none."""

MOVES = ("promote", "rollback", "restore", "lost")
"""Actions that say which version is in production."""

NOTES = ("refuse", "reject")
"""Actions on which nothing else depends."""

LONGEST = 2000
"""Characters of a reason that are kept."""

_ABOUT = (
    "Who was in production, when and why: one version a step, which `adfm registry log` prints and `adfm audit` "
    "checks. adfm writes and signs it; a step that somebody else writes counts for nothing. See the tags of a version."
)
_SOURCE = "adfm:/history"  # there are no files; MLflow wants an address
# What MLflow answers when others were faster: after its own three tries, or in the words of SQLite, PostgreSQL, MySQL.
_TAKEN = ("Giving up after", "IntegrityError", "UniqueViolation", "Duplicate entry", "database is locked")
_PATIENCE = 60  # seconds to go on, when many write at once


class BrokenHistory(AdfmError):
    """Steps of the history are missing or unconfirmed: nothing may move until a person has looked."""

    exit_code = 2


class Forbidden(AdfmError):
    """MLflow denies the account what adfm needs."""

    exit_code = 2


@dataclass(frozen=True)
class Step:
    """One step of the history. All but the last four fields are signed.

    Args:
        action: `judge`: the gate decided; `policy`: a policy was registered; `promote`; `rollback`; `reject`: a
            reviewer turned the version down; `refuse`: adfm did; `anchor`: a reviewer moved the anchor; `keys`: the
            service's key was replaced; `restore`: an alias had been moved by hand and was put back; `lost`: the version
            in production was deleted.
        version: The version that the step is about; `none` if there is none.
        production: After a move the version in production; of a judgement, the one that it compared with.
        previous: The version to which a rollback returns after a move; `none` if there is none.
        replaced: The version that was in production before a move; `none` if there was none.
        anchor: The anchor from this step on; of a judgement, the one that it compared with.
        by: Who, or what, took the step.
        why: The reason.
        approval_by: Who approved, as the version's tag `approval_by` has it.
        decision: Digest of the gate's decision.
        verdict: Its verdict.
        manifest: Digest of the signed list of the version's files.
        submission: Id of the logged model that was submitted.
        submitted_by: Who submitted it.
        signer: Id of the key that signed the version.
        contents: Digests of model, judged predictions and test images: tells one candidate from another.
        fingerprint: Fingerprint of the test set.
        look: How many versions the test set had judged, this one included.
        policy: Digest of the policy; of a step `policy`, the policy's text.
        before: Digest of the step that it follows; empty for the first.
        mark: Tells the step from another with the same content.
        number: Its place.
        at: When it was written, by the tracking server's clock: UTC, ISO 8601.
        finished: Whether aliases and tags were seen to agree with it.
        void: Whether another step came first, so that this one does not count.
    """

    action: str
    version: str
    production: str = ""
    previous: str = ""
    replaced: str = ""
    anchor: str = ""
    by: str = ""
    why: str = ""
    approval_by: str = ""
    decision: str = ""
    verdict: str = ""
    manifest: str = ""
    submission: str = ""
    submitted_by: str = ""
    signer: str = ""
    contents: str = ""
    fingerprint: str = ""
    look: str = ""
    policy: str = ""
    before: str = ""
    mark: str = ""
    number: int = 0
    at: str = ""
    finished: bool = False
    void: bool = False


_SIGNED = [field.name for field in fields(Step) if field.name not in ("number", "at", "finished", "void")]


@dataclass(frozen=True)
class History:
    """The history as one reader sees it.

    Args:
        steps: Those that count and those that are void, oldest first.
        head: Digest of the last one that counts; empty if there is none.
        ignored: Numbers of versions that are no steps, and why.
    """

    steps: list[Step]
    head: str
    ignored: dict[int, str]

    @cached_property
    def counting(self) -> list[Step]:
        """The steps that count, oldest first."""
        return [step for step in self.steps if not step.void]

    @property
    def move(self) -> Step | None:
        """The move that says who is in production."""
        return self.last(*MOVES)

    @property
    def production(self) -> str:
        """The version in production, or `none`."""
        return self.move.production if self.move else NOBODY

    @property
    def anchor(self) -> str:
        """The version that losses are measured from over many promotions, or `none`."""
        return next((s.anchor for s in reversed(self.counting) if s.anchor and s.action != "judge"), NOBODY)

    @property
    def policy(self) -> str | None:
        """The text of the registered policy."""
        step = self.last("policy")
        return step.policy if step else None

    def last(self, *actions: str, version: str | None = None) -> Step | None:
        """The last step with one of these actions, about this version if one is given."""
        return next(
            (s for s in reversed(self.counting) if s.action in actions and version in (None, s.version)),
            None,
        )

    def was_in_production(self, version: str) -> bool:
        """Whether a version was ever in production."""
        return self.was_brought_by(version) is not None

    def was_brought_by(self, version: str) -> Step | None:
        """The last move that brought a version into production, or put it back."""
        return next((s for s in reversed(self.counting) if s.action in MOVES and s.production == version), None)

    def since(self, earlier: History) -> list[Step]:
        """The steps that count and that an earlier reading did not have."""
        return self.counting[len(earlier.counting) :]


def read(store: MlflowClient, name: str, keys: Keys) -> History:
    """The history of model `name`.

    Args:
        store: MLflow's client.
        name: Name of the model.
        keys: Keys of the service count. Steps by a retired one count where a step by another follows them.

    Raises:
        BrokenHistory: Steps are missing, or the last ones are by a retired key and none by another follows.
        Forbidden: The account may not read it.
    """
    head = _head(store, name)  # first: a step that is written meanwhile is not missing then
    if head is None:
        return History([], "", {})
    read_ = _Chain(name, keys)
    for version in sorted(versions(store, _name(name)), key=lambda version: int(version.version)):
        read_.add(version)
    return read_.whole(head)


class _Chain:
    """Puts the steps together as they come, oldest first."""

    def __init__(self, name: str, keys: Keys) -> None:
        self._name, self._keys = name, keys
        self._steps: list[Step] = []
        self._ignored: dict[int, str] = {}
        self._digests: list[str] = [""]  # of the steps that count
        # Steps by retired keys since the last one that counts: (step, digest). They count once another follows them.
        self._tail: list[tuple[Step, str]] = []
        self._confirmed = False  # whether a step by a key that is not retired is there
        self._strangers = False  # whether a key that is not known has signed a step

    def add(self, version: ModelVersion) -> None:
        number, tags = int(version.version), version.tags
        text = _text(self._name, tags)
        key, signature = tags.get("key", ""), tags.get("signature", "")
        if not signature or not {"action", "version"} <= tags.keys():
            self._ignored[number] = "it is not signed"
            return
        if not signing.check_text(text, signature, key, self._keys, retired=True):
            known = key in self._keys.service or key in self._keys.retired
            self._strangers |= not known
            reason = "its fields are not what was signed" if known else f"its key {key[:40]!r} is not of the service"
            self._ignored[number] = reason
            return
        at = datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).isoformat(timespec="seconds")
        texts: dict[str, Any] = {field: tags.get(field, "") for field in _SIGNED}
        step = Step(**texts, number=number, at=at, finished="finished" in tags)
        self._place(step, hashlib.sha256(text.encode()).hexdigest(), key in self._keys.retired)

    def _place(self, step: Step, digest: str, retired: bool) -> None:
        ends = [self._digests[-1], *(digest for _, digest in self._tail)]
        if retired and step.before == ends[-1]:
            self._tail.append((step, digest))
        elif not retired and step.before in ends:
            self._confirm(ends.index(step.before))
            self._steps.append(step)
            self._digests.append(digest)
            self._confirmed = True
        elif step.before in self._digests or step.before in ends:
            self._steps.append(replace(step, void=True))
        elif retired:
            self._ignored[step.number] = "it is by a retired key and follows a step that is not there"
        else:
            raise BrokenHistory(
                f"The history of {self._name} has a gap: step {step.number} follows one that is not there (any more). "
                "Nothing moves. Find out who changed it (`adfm audit`), and bring it back from a backup."
            )

    def _confirm(self, count: int) -> None:
        for step, digest in self._tail[:count]:
            self._steps.append(step)
            self._digests.append(digest)
        for step, _ in self._tail[count:]:
            self._ignored[step.number] = "it is by a retired key, and no step by another key follows it"
        self._tail = []
        self._steps.sort(key=lambda step: step.number)

    def whole(self, head: str) -> History:
        """The history, if its last steps are there and confirmed; `head` is what its writers noted as its end."""
        if self._tail and not self._confirmed:
            raise BrokenHistory(
                f"The history of {self._name} is signed by keys that are retired, up to step "
                f"{self._tail[-1][0].number}, and nothing by the key of today follows. Nothing moves. If the steps are "
                "right (`adfm registry log` shows them), confirm them with `adfm keys rotate`."
            )
        if self._strangers and not self._confirmed:
            raise BrokenHistory(
                f"The history of {self._name} is signed, and not with a key in {self._keys.folder}/service. Nothing "
                f"moves. Name the folder of the right keys in {signing.VARIABLE}; if somebody else has begun "
                f"{_name(self._name)}, an administrator deletes it."
            )
        number, _, digest = head.partition(" ")
        if digest and digest not in (*self._digests, *(digest for _, digest in self._tail)):
            raise BrokenHistory(
                f"The history of {self._name} ended with step {printable(number)[:20]}, which is not there (any more), "
                f"or is signed by a key that is not in {self._keys.folder}/service. Nothing moves. Find out who "
                "deleted or changed it, and bring it back from a backup."
            )
        self._confirm(0)
        return History(self._steps, self._digests[-1], self._ignored)


def append(
    store: MlflowClient, name: str, keys: Keys, seen: History, action: str, version: str, **content: str
) -> Step:
    """Signs and writes a step.

    Args:
        store: MLflow's client.
        name: Name of the model.
        keys: The own key must be one of the service.
        seen: The history that the step was decided on.
        action: See `Step`.
        version: The version that it is about.
        content: Further fields of `Step`.

    Returns:
        The step as the history now has it. It is `void` if a step that matters to it came first; look again then. One
        that came after mere `NOTES`, or is one, is written again instead.

    Raises:
        Forbidden: The account may not write it.
    """
    texts = {"action": action, "version": version[:100] or NOBODY}
    texts |= {key: value if key == "policy" else value[:LONGEST] for key, value in content.items() if value}
    words = f"{action}: version {texts['version']}"
    if "replaced" in texts:
        words += f" in place of {texts['replaced']}"
    deadline = time.monotonic() + _PATIENCE
    while True:
        texts |= {"before": seen.head, "mark": uuid.uuid4().hex}
        signature = {"key": keys.id, "signature": signing.sign_text(_text(name, texts), keys)}
        _write(store, name, {key: text for key, text in texts.items() if text} | signature, words)
        # An answer that was lost on its way is asked for again by MLflow's client: the first of the two counts.
        now = read(store, name, keys)
        step = next(step for step in now.steps if step.mark == texts["mark"])
        if not step.void:
            insist(partial(store.set_registered_model_tag, _name(name), "head", f"{step.number} {_digest(name, step)}"))
            return step
        if action not in NOTES and any(each.action not in NOTES for each in now.since(seen)):
            return step
        if time.monotonic() > deadline:
            raise AdfmError(f"The history of {name} is written to by many at once; try again.")
        seen = now


def _write(store: MlflowClient, name: str, tags: dict[str, str], words: str) -> None:
    from mlflow.exceptions import MlflowException

    def write() -> None:
        store.create_model_version(_name(name), _SOURCE, tags=tags, description=words)

    with allowed(_name(name), "write"):
        try:
            insist(write)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            create_model(store, _name(name), _ABOUT)
            insist(write)


def insist(write: Callable[[], object]) -> None:
    """Retry a write on conflict with others, with random pauses, for up to 60 s."""
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


@contextmanager
def allowed(what: str, do: str = "read") -> Iterator[None]:
    """Turn MLflow's refusal of the account into an error that says what to do.

    MLflow's basic-auth refuses accounts other than an administrator's where a registered model is missing, too.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "PERMISSION_DENIED":
            raise
        raise Forbidden(
            f"MLflow does not let this account {do} {what}: either it is missing, or somebody else made it, or the "
            "account has no rights on it. Nothing moved. An administrator makes the registered models and grants the "
            "rights with the script that docs/server.md names."
        ) from error


def tag(store: MlflowClient, version: ModelVersion, **tags: str) -> None:
    """Sets tags of a version."""
    for key, value in tags.items():
        insist(partial(store.set_model_version_tag, version.name, str(version.version), key, value))


def note_rejection(store: MlflowClient, version: ModelVersion, history: History, keys: Keys) -> None:
    """Writes down that the version's tag `approval` is `rejected`, if it is and the history does not have it.

    Args:
        store: MLflow's client.
        version: A version with its tags; `approval_reason` and `approval_by` are kept with the rejection.
        history: The history of its model.
        keys: The own key is one of the service.
    """
    if version.tags.get("approval") != "rejected":
        return
    name, number = version.name, str(version.version)
    why, by = version.tags.get("approval_reason", "")[:LONGEST], version.tags.get("approval_by", "")[:LONGEST]
    by = "" if by == NOBODY else by
    judged = history.last("judge", version=number)
    decision = judged.decision if judged else ""
    known = history.last("reject", version=number)
    if known and (known.why, known.by, known.decision) == (why, by, decision):
        return
    append(store, name, keys, history, "reject", number, why=why, by=by, decision=decision)
    words = f"{name}: version {number} was rejected" + f" by {by}" * bool(by) + f": {why}" * bool(why)
    print(printable(words))
    alert(words)


def finish(store: MlflowClient, name: str, step: Step) -> None:
    """Notes that aliases and tags agree with a step."""
    insist(lambda: store.set_model_version_tag(_name(name), str(step.number), "finished", "true"))


def table(history: History) -> str:
    """The history as text: a line a step, with those that were deleted or do not count."""
    rows = [("step", "at (UTC)", "what", "version", "in place of", "by", "why")]
    steps = {step.number: step for step in history.steps}
    for number in range(1, max((*steps, *history.ignored), default=0) + 1):
        if step := steps.get(number):
            if step.void and step.action in NOTES:
                continue  # it was written again
            unfinished = step.action in (*MOVES, "judge") and not (step.void or step.finished)
            state = " (void)" * step.void + " (unfinished)" * unfinished
            why = step.why + f" (approved by {step.approval_by})" * bool(step.approval_by)
            at = step.at.removesuffix("+00:00").replace("T", " ")
            replaced = step.replaced if step.action in MOVES else ""
            rows.append((str(number), at, step.action + state, step.version, replaced, step.by, why))
        elif number in history.ignored:
            rows.append((str(number), "", "ignored", "", "", "", history.ignored[number]))
        else:
            rows.append((str(number), "", "deleted", "", "", "", ""))
    cells = [[" ".join(printable(cell).split()) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(6)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[6]]).rstrip()
        for row in cells
    )


def versions(store: MlflowClient, registered: str) -> list[ModelVersion]:
    """All versions of a registered model, in no order; none if there is no such model."""
    result: list[ModelVersion] = []
    token = None
    while True:
        page = store.search_model_versions(f"name = '{registered}'", max_results=1000, page_token=token)
        result += page
        token = page.token
        if not token:
            return result


def _text(name: str, texts: dict[str, str]) -> str:
    """What is signed of a step: canonical JSON of its fields and of the model that it is about."""
    signed = {field: texts[field] for field in _SIGNED if texts.get(field)}
    return json.dumps({"model": name} | signed, sort_keys=True, separators=(",", ":"))


def _digest(name: str, step: Step) -> str:
    return hashlib.sha256(_text(name, {field: getattr(step, field) for field in _SIGNED}).encode()).hexdigest()


def _name(name: str) -> str:
    return f"{name}-history"


def _head(store: MlflowClient, name: str) -> str | None:
    """Number and digest of the last step, as its writer noted them; `None` if there is no history."""
    from mlflow.exceptions import MlflowException

    with allowed(_name(name)):
        try:
            return str(store.get_registered_model(_name(name)).tags.get("head", ""))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None


def create_model(store: MlflowClient, name: str, description: str | None = None) -> None:
    """Make a registered model, unless somebody else has made it meanwhile."""
    from mlflow.exceptions import MlflowException

    try:
        store.create_registered_model(name, description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
