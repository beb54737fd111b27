"""The signed history of a model: every decision, move of production and change of policy, by whom and why.

Each step is a version of the registered model `<model>-history`, its fields in tags. It is signed by the service's key
and names, in `before`, the digest of the step that it follows. Production is what the history says, and the aliases
follow it. Readers pass over steps without a valid signature; `adfm audit` lists them.
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
from adfm.errors import AdfmError, Unusable
from adfm.text import aligned, printable

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

NOBODY = "none"  # in the place of a version, where there is none
MOVES = ("promote", "rollback", "restore", "lost")  # actions that say which version is in production
NOTES = ("refuse", "reject")  # actions on which nothing else depends
LONGEST = 2000  # characters of a reason that are kept

_ABOUT = (
    "Who was in production, when and why: one version a step, which `adfm registry log` prints and `adfm audit` "
    "checks. adfm writes and signs it; a step that somebody else writes counts for nothing. See the tags of a version."
)
_SOURCE = "adfm:/history"  # there are no files; MLflow wants an address
# What MLflow answers when others were faster: after its own three tries, or in the words of SQLite, PostgreSQL, MySQL.
_TAKEN = ("Giving up after", "IntegrityError", "UniqueViolation", "Duplicate entry", "database is locked")
_PATIENCE = 60  # seconds of retries, when many write at once


class BrokenHistory(Unusable):
    """Steps of the history are missing or unconfirmed: nothing may move until a person has checked it."""


class Forbidden(Unusable):
    """MLflow denies the account what adfm needs."""


@dataclass(frozen=True)
class Step:
    """One step of the history. All but the last four fields are signed.

    Actions: `judge`: the gate decided. `policy`: a policy was registered. `promote`, `rollback`. `reject`: a reviewer
    turned the version down; `refuse`: adfm did. `anchor`: a reviewer moved the anchor. `keys`: the service's key was
    replaced. `restore`: an alias was moved by hand and was put back. `lost`: the version in production was deleted.
    """

    action: str
    version: str  # what the step is about; `none` if it is not about a version
    production: str = ""  # in production after a move; of a judgement, what it compared with
    previous: str = ""  # what a rollback after this move returns to
    replaced: str = ""  # in production before a move
    anchor: str = ""  # from this step on; of a judgement, what it compared with
    by: str = ""
    why: str = ""
    approval_by: str = ""  # the version's tag of this name
    decision: str = ""  # digest of the gate's decision
    verdict: str = ""
    manifest: str = ""  # digest of the signed list of the version's files
    submission: str = ""  # id of the logged model that was submitted
    submitted_by: str = ""
    signer: str = ""  # id of the key that signed the version
    contents: str = ""  # digests of model, judged predictions and test images: tell one candidate from another
    fingerprint: str = ""  # of the test set
    look: str = ""  # how many versions the test set had judged, this one included
    policy: str = ""  # digest of the policy; of a step `policy`, its text
    before: str = ""  # digest of the step that it follows; empty for the first
    mark: str = ""  # tells the step from another with the same content
    number: int = 0  # its place
    at: str = ""  # by the tracking server's clock: UTC, ISO 8601
    finished: bool = False  # whether aliases and tags were seen to agree with it
    void: bool = False  # whether another step came first, so that this one does not count


_SIGNED = [field.name for field in fields(Step) if field.name not in ("number", "at", "finished", "void")]


@dataclass(frozen=True)
class History:
    """The history as one reader sees it."""

    steps: list[Step]  # also those that are void, oldest first
    head: str  # digest of the last one that counts; empty without any
    ignored: dict[int, str]  # numbers of versions that are not steps, and why

    @cached_property
    def counting(self) -> list[Step]:
        """The steps that count, oldest first."""
        return [step for step in self.steps if not step.void]

    @property
    def move(self) -> Step | None:
        """The last move, which says who is in production."""
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
        return next((s for s in reversed(self.counting) if s.action in actions and version in (None, s.version)), None)

    def move_to(self, version: str) -> Step | None:
        """The last move that brought a version into production, or put it back."""
        return next((s for s in reversed(self.counting) if s.action in MOVES and s.production == version), None)

    def since(self, earlier: History) -> list[Step]:
        """The steps that count and that an earlier reading did not have."""
        return self.counting[len(earlier.counting) :]


def read(store: MlflowClient, name: str, keys: signing.Keys) -> History:
    """Read and verify the history of model `name`.

    Steps by a key of the service count, and steps by a retired one where a step by another follows them.

    Raises:
        BrokenHistory: Steps are missing, or the last ones are by a retired key and none by another follows.
        Forbidden: The account may not read it.
    """
    # First the head: a step that is written meanwhile is not missing then.
    model = registered_model(store, _name(name))
    if model is None:
        return History([], "", {})
    chain = _Chain(name, keys)
    for version in sorted(versions(_name(name)), key=lambda version: int(version.version)):
        chain.add(version)
    return chain.whole(str(model.tags.get("head", "")))


class _Chain:
    """Puts the steps together as they come, oldest first."""

    # Of two that follow the same one, the first counts and the other is void, for every reader alike: MLflow gives
    # every version the next number once, writes its tags with it, and does not use a number again.

    def __init__(self, name: str, keys: signing.Keys) -> None:
        self._name, self._keys = name, keys
        self._steps: list[Step] = []
        self._ignored: dict[int, str] = {}
        self._digests: list[str] = [""]  # of the steps that count
        # Steps by retired keys since the last one that counts: (step, digest). They count once one by another key
        # follows them, so that what a retired key signs from then on moves nothing.
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
            stranger = f"its key {key[:40]!r} is not of the service"
            self._ignored[number] = "its fields are not what was signed" if known else stranger
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
    store: MlflowClient, name: str, keys: signing.Keys, seen: History, action: str, version: str, **content: str
) -> Step:
    """Sign and write a step, with further fields of `Step`, that was decided on the history `seen`.

    Returns:
        The step as the history now has it. It is `void` if a step that matters to it came first; read the history again
        then. One that came after `NOTES` only, or is one, is written again instead.

    Raises:
        BadKey: The own key is not one of the service.
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
        tags = {key: text for key, text in texts.items() if text} | signature
        with permission_errors(_name(name), "write"):
            make_model(store, _name(name), _ABOUT)
            # MLflow cannot compare and swap an alias. A new version takes no lock that a process could die with.
            retry_on_conflict(partial(store.create_model_version, _name(name), _SOURCE, tags=tags, description=words))
        # MLflow's client repeats a request whose reply was lost: the first of the two versions counts.
        now = read(store, name, keys)
        step = next(step for step in now.steps if step.mark == texts["mark"])
        if not step.void:
            head = f"{step.number} {_digest(name, step)}"
            retry_on_conflict(partial(store.set_registered_model_tag, _name(name), "head", head))
            return step
        if action not in NOTES and any(each.action not in NOTES for each in now.since(seen)):
            return step
        if time.monotonic() > deadline:
            raise AdfmError(f"The history of {name} is written to by many at once; try again.")
        seen = now


def retry_on_conflict(write: Callable[[], object]) -> None:
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
def permission_errors(what: str, do: str = "read") -> Iterator[None]:
    """Turn MLflow's refusal of the account in the block into an error that says what to do."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        # MLflow's basic-auth also denies accounts other than an administrator's what does not exist.
        if error.error_code != "PERMISSION_DENIED":
            raise
        raise Forbidden(
            f"MLflow does not let this account {do} {what}: either it is missing, or somebody else made it, or the "
            "account has no rights on it. Nothing moved. An administrator makes the registered models and grants the "
            "rights with the script that docs/server.md names."
        ) from error


def tag(store: MlflowClient, version: ModelVersion, **tags: str) -> None:
    """Set tags of a version."""
    for key, value in tags.items():
        retry_on_conflict(partial(store.set_model_version_tag, version.name, str(version.version), key, value))


def finish(store: MlflowClient, name: str, step: Step) -> None:
    """Mark a step as finished: aliases and tags agree with it."""
    retry_on_conflict(partial(store.set_model_version_tag, _name(name), str(step.number), "finished", "true"))


def table(history: History) -> str:
    """Format the history as text: one line per step, with those that were deleted or do not count."""
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
        else:
            what = "ignored" if number in history.ignored else "deleted"
            rows.append((str(number), "", what, "", "", "", history.ignored.get(number, "")))
    return "\n".join(aligned([[" ".join(printable(cell).split()) for cell in row] for row in rows]))


def versions(registered: str) -> list[ModelVersion]:
    """Return all versions of a registered model, in no order; none if it does not exist."""
    import mlflow

    return list(mlflow.search_model_versions(filter_string=f"name = '{registered}'"))


def registered_model(store: MlflowClient, name: str) -> RegisteredModel | None:
    """Return a registered model; `None` if it does not exist."""
    with permission_errors(name), suppress_error("RESOURCE_DOES_NOT_EXIST"):
        return store.get_registered_model(name)
    return None


def make_model(store: MlflowClient, name: str, description: str | None = None) -> None:
    """Create a registered model unless it exists."""
    if registered_model(store, name) is None:
        with suppress_error("RESOURCE_ALREADY_EXISTS"):  # another process has made it meanwhile
            store.create_registered_model(name, description=description)


@contextmanager
def suppress_error(code: str) -> Iterator[None]:
    """Suppress MLflow's errors of one code in the block."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != code:
            raise


def _text(name: str, texts: dict[str, str]) -> str:
    """What is signed of a step: canonical JSON of its fields and of the model that it is about."""
    signed = {field: texts[field] for field in _SIGNED if texts.get(field)}
    return json.dumps({"model": name} | signed, sort_keys=True, separators=(",", ":"))


def _digest(name: str, step: Step) -> str:
    return hashlib.sha256(_text(name, {field: getattr(step, field) for field in _SIGNED}).encode()).hexdigest()


def _name(name: str) -> str:
    return f"{name}-history"
