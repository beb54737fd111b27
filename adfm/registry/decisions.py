"""Decisions on versions: made from a version's signed files with the registered policy, recorded and published.

The same files, models to compare, policy and look give the same decision. So the history keeps its digest, and what
people read (gate.json, tags, description) can be written again from the files at any time.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from adfm import signing, tracking
from adfm.data import hashes
from adfm.errors import AdfmError
from adfm.evaluation import calibration as calibration_
from adfm.evaluation import metrics, references, separation
from adfm.files import file_digest, write_json
from adfm.registry import gate, page, policy, tables
from adfm.registry import history as history_
from adfm.registry.history import NOBODY, History, Step
from adfm.registry.reconcile import Registry, record_rejection
from adfm.registry.submission import (
    AS_REGISTERED,
    CHECKED,
    FREE,
    TEST_IMAGES,
    TRAINED_ON,
    Submission,
    Unfit,
    check,
    fetch,
    read_artifact,
    version_uri,
)

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


@dataclass(frozen=True)
class Judgement:
    """A decision with what it is based on."""

    decided: dict[str, Any]  # the decision as JSON values, without its time
    submission: Submission  # the version's verified files, as long as they exist
    fields: dict[str, str]  # of a step `judge` of the history


def judge(registry: Registry, version: "ModelVersion", to: Path) -> Judgement:
    """Decide on a version against production and anchor of the history, with the registered policy.

    It requires a registered policy, and downloads the files of all versions to the folder `to`.

    Raises:
        Unverified: Its files, or those of a version that it is compared with, are not what was signed.
        AdfmError: Its parts do not fit together, tables cannot be compared, or files cannot be read.
    """
    history, number = registry.history, str(version.version)
    submission = fetch(version_uri(version), registry.keys, to)
    own = check(submission, registry.name)
    registered = policy.registered(history.policy)
    against = {"production": history.production, "anchor": history.anchor}
    others = {other: _fetch_other(registry, other, to) for other in {*against.values()} - {NOBODY, number}}
    if history.anchor == history.production:
        del against["anchor"]
    # Without those of a role where nothing is in production, or the anchor itself is judged.
    there = {role: others[other] for role, other in against.items() if other in others}
    predictions = {role: _predictions(submission, role, other) for role, other in there.items()}
    missing = [
        f"Predictions of version {against[role]} ({role}) on these test images are missing; `adfm register` makes them."
        for role, tables_ in predictions.items()
        if tables_ is None
    ]
    production, origin = predictions.get("production") or (None, None)
    anchor, _ = predictions.get("anchor") or (None, None)
    fingerprint = str(submission.origin["data"]["test"])
    look = look_number(history, fingerprint, number)
    separation = check_separation(submission, others.get(history.production))
    decision = gate.decide(own, production, anchor, registered, look, separation)
    decided = dataclasses.asdict(decision) | {
        "split": submission.about["split"],
        "fingerprint": fingerprint,
        "policy": registered.model_dump(mode="json"),
        "production_version": None if history.production == NOBODY else history.production,
        "anchor_version": None if history.anchor == NOBODY else history.anchor,
        "production_predictions": origin,
    }
    if missing:
        verdict = "failed" if decision.verdict == "failed" else "cannot tell"
        decided |= {"verdict": verdict, "reasons": [*missing, *decided["reasons"]]}
    decided = json.loads(json.dumps(decided, allow_nan=False))  # as a reader of the file has it
    fields = {
        "production": history.production,
        "anchor": history.anchor,
        "decision": digest(decided),
        "verdict": decided["verdict"],
        "manifest": submission.manifest,
        "submission": str(version.source).removeprefix("models:/"),
        "submitted_by": str(submission.origin.get("submitted_by", "")),
        "signer": submission.signer,
        "contents": submission.contents,
        "fingerprint": fingerprint,
        "look": str(look),
        "policy": policy.digest(registered),
    }
    return Judgement(decided, submission, fields)


def stands(history: History, version: str) -> Step | None:
    """Return the last decision on a version, unless production, anchor or policy have changed since."""
    step = history.last("judge", version=version)
    if step is None or history.policy is None:
        return None
    now = (history.production, history.anchor, policy.digest(policy.registered(history.policy)))
    return step if (step.production, step.anchor, step.policy) == now else None


def look_number(history: History, fingerprint: str, version: str) -> int:
    """Return how many versions a test set had judged when it first judged this one, this one included."""
    judged = [step.version for step in history.counting if step.action == "judge" and step.fingerprint == fingerprint]
    return list(dict.fromkeys([*judged, version])).index(version) + 1


def digest(decided: dict[str, Any]) -> str:
    """Return the SHA-256 of a decision as canonical JSON, without its time."""
    timeless = {key: value for key, value in decided.items() if key != "decided_at"}
    text = json.dumps(timeless, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def parse(decided: dict[str, Any]) -> gate.Decision:
    """Return a decision from its JSON values."""
    rows = [gate.Row(**row | {"answers": [gate.Answer(**each) for each in row["answers"]]}) for row in decided["rows"]]
    kept = {field.name: decided[field.name] for field in dataclasses.fields(gate.Decision)}
    return gate.Decision(**kept | {"rows": rows})


def publish(registry: Registry, version: "ModelVersion", judgement: Judgement, step: Step, why: str = "") -> None:
    """Write a decision on its version for people: gate.json, tags, description. An earlier approval is void.

    Done twice, or by two processes, it does the same. `step` is the decision's in the history; the description says
    `why` it was decided again.
    """
    store, number = registry.store, str(version.version)
    record_rejection(registry, version)
    # `pending` first and last: an approval that arrives in between is of a page with another decision.
    history_.tag(store, version, approval="pending", approval_by=NOBODY)
    decided = judgement.decided | {"decided_at": step.at}
    with TemporaryDirectory() as folder:
        file = Path(folder) / "gate.json"
        write_json(decided, file)
        with history_.permission_errors("the experiment of the submissions", "write"):
            store.log_model_artifact(str(version.source).removeprefix("models:/"), str(file))
    for key in ("approval_reason", "approval_refused"):
        if key in version.tags:
            store.delete_model_version_tag(version.name, number, key)
    submission = judgement.submission
    due = tags(submission) | decision_tags(step)
    # Each costs two requests: MLflow's client asks first whether the model is a prompt.
    history_.tag(store, version, **{key: text for key, text in due.items() if version.tags.get(key) != text})
    text = page.text(
        decided | {"reasons": [why, *decided["reasons"]]} if why else decided,
        submission.origin,
        submission.measured,
        submission.calibration,
        number,
        tracking.find_run(submission.about.get("mlflow_run_id")),
        policy_difference=policy_difference(submission, registry.history),
        trained_by=tracking.find_run(version.run_id),
        compared=references.read(submission.folder / "evaluation"),
    )
    store.update_model_version(version.name, number, text)
    history_.tag(store, version, approval="pending", approval_by=NOBODY)
    history_.finish(store, registry.name, step)


def policy_difference(submission: Submission, history: History) -> list[str]:
    """List the differences of the submitter's policy from the registered one."""
    registered = policy.registered(history.policy)
    try:
        own = policy.loads((submission.folder / policy.FILE).read_text(encoding="utf-8"), policy.FILE)
    except (OSError, UnicodeDecodeError, policy.PolicyError):
        return ["the submitter's gate.yaml cannot be read"]
    return policy.difference(registered, own)


def decision_tags(step: Step) -> dict[str, str]:
    """Return the tags that repeat a decision."""
    return {
        "gate": step.verdict,
        "gate_decided_at": step.at,
        "gate_production_version": step.production,
        "gate_anchor_version": step.anchor,
        "gate_look": step.look,
        "gate_digest": step.decision,
        "gate_step": str(step.number),
        "submitted_by": step.submitted_by,
        "signed_by": step.signer,
    }


def is_published(version: "ModelVersion", step: Step) -> bool:
    """Whether the version's gate.json and tags are those of a decision."""
    if not decision_tags(step).items() <= version.tags.items():
        return False
    try:
        return digest(json.loads(read_artifact(version, "gate.json"))) == step.decision
    except (ValueError, AttributeError, OSError):
        return False


def check_separation(submission: Submission, production: Submission | None) -> dict[str, Any]:
    """Check by their hashes that no test image was in the training data of the candidate or of production."""
    test = _hashes(submission.folder / TEST_IMAGES)
    if test is None:  # a version without hashes of its images: nothing is proved
        return {"images": 0, "against": {}, "unknown": ["candidate"], "problems": [], "alike": [], "proved": False}
    models = {"candidate": submission} | ({"production": production} if production else {})
    seen = {name: _hashes(files.folder / TRAINED_ON) for name, files in models.items()}
    try:
        near_duplicates = bool(submission.settings["split"]["near_duplicates"])
        file = submission.folder / CHECKED
        checked = pq.read_table(file, schema=separation.PAIRS) if file.is_file() else None
        return dict(separation.compare(test, seen, checked, near_duplicates))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Unfit(f"its {CHECKED} or params.yaml is broken ({error!r})") from error


def _hashes(file: Path) -> pa.Table | None:
    try:
        return hashes.read(file) if file.is_file() else None
    except AdfmError as error:
        raise Unfit(str(error)) from error


def _fetch_other(registry: Registry, number: str, to: Path) -> Submission:
    try:
        return fetch(version_uri(registry.version(number)), registry.keys, to)
    except signing.Unverified as error:
        raise AdfmError(
            f"Version {number} of {registry.name}, which new versions are compared with, is not what was signed: "
            f"{error}\nNothing is judged until it is whole again, or another is in production and the anchor: "
            "`adfm audit`, `adfm rollback`."
        ) from error


def _predictions(submission: Submission, role: str, other: Submission) -> tuple[pd.DataFrame, str] | None:
    """Another version's predictions on the candidate's test images: its own, or those of the submission."""
    if other.protocol() == submission.protocol():
        return tables.read(other.predictions), AS_REGISTERED
    try:
        about = json.loads((submission.folder / "rivals" / "rivals.json").read_text(encoding="utf-8"))[role]
        if about["manifest"] != other.manifest:
            return None
        return tables.read(submission.folder / "rivals" / f"{role}.parquet"), str(about["predictions"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def tags(submission: Submission) -> dict[str, str]:
    """Return the tags that describe a version."""
    origin, measured, calibration = submission.origin, submission.measured, submission.calibration
    data, base = origin["data"], origin.get("base") or {}
    texts = {
        **{key: origin.get(key) for key in ("artifact_digest", "protocol", "git_commit", "git_dirty")},
        "evaluation_digest": file_digest(submission.predictions),
        "test_fingerprint": data["test"],
        "data_fingerprint": data.get("trained_on"),
        "dvc_md5": data.get("dvc_md5"),
        "base_model": base.get("name"),
        "base_revision": base.get("revision"),
        **{name: f"{measured[name]:.4f}" for name in metrics.HEADLINE if measured.get(name) is not None},
        "threshold": "none" if calibration.threshold is None else f"{calibration.threshold:.6g}",
    }
    file = submission.folder / "evaluation" / calibration_.FILE
    if file.is_file():
        limit = "".join(f"{kind} <= {share:g}" for kind, share in calibration.limit.items())
        texts |= {"threshold_limit": limit or "none", "calibration": calibration.method}
        texts[calibration_.DIGEST_TAG] = file_digest(file)
    # A submitter's tag must not pass for one of adfm's.
    texts |= {key: value for key, value in origin.get("tags", {}).items() if key.startswith(FREE)}
    return {key: str(value) for key, value in texts.items() if value is not None}
