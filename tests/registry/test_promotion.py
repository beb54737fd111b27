from __future__ import annotations

import itertools
import json
import re
import shutil
import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import Mock

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from adfm import signing, tracking
from adfm.cli import main
from adfm.errors import AdfmError
from adfm.params import Params
from adfm.registry import decisions
from adfm.registry import history as history_
from adfm.registry.audit import audit
from adfm.registry.history import Step
from adfm.registry.promotion import Refused, history, promote, promote_approved, rollback
from adfm.registry.registration import register
from adfm.registry.submission import read_artifact

PARAMS = Params()
REGISTERED = ("model-36", "shards", "evaluation-36", "registration")  # what `add(36)` has registered, and where


def aliases(*, anchor: bool = False) -> dict[str, str]:
    """The aliases; the anchor has tests of its own."""
    here = tracking.client().get_registered_model("adfm").aliases
    return {alias: str(version) for alias, version in here.items() if anchor or alias != "anchor"}


def tags(version: str) -> dict[str, str]:
    return dict(tracking.client().get_model_version("adfm", version).tags)


def log() -> list[tuple[str, str, str]]:
    """The steps that count, but for the policy and the first decision on each version."""
    judged: set[str] = set()
    steps = []
    for step in history("adfm").counting:
        if step.action != "policy" and not (step.action == "judge" and step.version not in judged):
            steps.append((step.action, step.version, step.replaced if step.action != "judge" else ""))
        if step.action == "judge":
            judged.add(step.version)
    return steps


def last() -> Step:
    return history("adfm").counting[-1]


def moves() -> list[Step]:
    return [step for step in history("adfm").counting if step.action in history_.MOVES]


def tag(version: str, key: str, value: str) -> None:
    tracking.client().set_model_version_tag("adfm", version, key, value)


def approve(version: str, by: str = "Rita") -> None:
    tag(version, "approval_by", by)
    tag(version, "approval", "approved")


def test_approved_version_goes_into_production(store, add, capsys):
    assert add(28) == "1"
    promote("1", "adfm", "Ada")
    assert aliases(anchor=True) == {"production": "1", "anchor": "1"}
    assert tags("1")["promoted_by"] == "Ada"
    assert tags("1")["promoted_at"].endswith("+00:00")
    assert tags("1")["replaced_version"] == "none"
    assert capsys.readouterr().out.endswith("version 1 of adfm is in production; it replaced none\n")

    add(34)
    promote("2", "adfm")
    assert aliases() == {"production": "2", "previous": "1"}
    assert tags("2")["replaced_version"] == "1"
    assert tags("2")["promoted_by"]
    assert log() == [("promote", "1", "none"), ("promote", "2", "1")]
    first, second = moves()
    assert (first.by, first.at) == ("Ada", tags("1")["promoted_at"])
    words = f"gate passed on {tags('2')['gate_decided_at']} against version 1"
    assert (second.why, second.approval_by) == (words, "Rita")
    assert first.finished and second.finished


def test_without_approval_nothing_moves(store, add):
    add(28, approve=False)
    approvals = ("pending", "rejected", "Approved", " approved ", "x" * 5000, None)
    for approval in approvals:
        if approval is None:
            tracking.client().delete_model_version_tag("adfm", "1", "approval")
        else:
            tag("1", "approval", approval)
        text = repr(approval)[:50]
        with pytest.raises(
            AdfmError, match=f"approval is {text}.*: a reviewer sets it to exactly 'approved'"
        ) as refused:
            promote("1", "adfm")
        assert len(str(refused.value)) < 400
        assert text in last().why
        assert tags("1").get("approval") == (approval if approval in ("rejected", None) else "pending")
    assert aliases() == {}
    assert "promoted_at" not in tags("1")
    assert log() == [("refuse", "1", "")] * len(approvals)


def test_a_failed_gate_is_not_promoted_and_all_refusals_are_told(store, add):
    add(8, approve=False)
    with pytest.raises(AdfmError, match=r"(?s)gate's verdict is 'failed'.*tag approval is 'pending'"):
        promote("1", "adfm")
    approve("1")
    with pytest.raises(AdfmError, match="gate's verdict is 'failed'"):
        promote("1", "adfm")
    assert aliases() == {}


def gate_of(version: str) -> dict[str, object]:
    """The decision that the version carries, which its tags must repeat."""
    stored = tracking.client().get_model_version("adfm", version)
    decided = json.loads(read_artifact(stored, "gate.json"))
    assert decisions.digest(decided) == stored.tags["gate_digest"]
    assert stored.tags["gate"] == decided["verdict"]
    assert stored.tags["gate_production_version"] == (decided["production_version"] or "none")
    assert stored.tags["gate_decided_at"] == decided["decided_at"]
    return decided


def test_when_production_has_changed_the_gate_decides_again_and_the_reviewer_is_asked_again(store, add, tmp_path):
    for right in (26, 36, 34):
        add(right)
    promote("1", "adfm")
    reason = (
        "its gate compared it with version none (production), which is 1 now; its gate compared it with version none "
        "(the anchor), which is 1 now"
    )
    message = f"{reason}; decided against version 1: gate passed; approve again"
    with pytest.raises(Refused, match=re.escape(f"Version 2 of adfm cannot be promoted: {message}")):
        promote("2", "adfm", "Ada")
    assert aliases() == {"production": "1"}
    assert (tags("2")["approval"], tags("2")["approval_refused"]) == ("pending", message)
    assert tags("2")["approval_by"] == "none"
    assert log() == [("promote", "1", "none"), ("judge", "2", "")]
    step = last()
    assert (step.by, step.production, step.look) == ("adfm", "1", "2")
    assert step.why == f"{reason}; gate passed against version 1, anchor 1; look 2 of 20"
    decided = gate_of("2")
    assert (decided["verdict"], decided["decided_at"], decided["production_predictions"]) == (
        "passed",
        step.at,
        "as registered",
    )
    assert decided["rows"][0]["production"] == 26 / 40
    description = tracking.client().get_model_version("adfm", "2").description
    assert f"- Version 2: {reason}" in description and description.startswith("Gate: passed.")

    # Registration, which reads the shards, decides the same, so what is approved now stands.
    approve("2")
    register(tmp_path / "model-36", tmp_path / "shards", tmp_path / "evaluation-36", tmp_path / "out", PARAMS)
    assert gate_of("2") == decided
    assert tags("2")["approval"] == "approved"
    promote("2", "adfm")
    assert aliases() == {"production": "2", "previous": "1"}
    assert "approval_refused" not in tags("2")

    with pytest.raises(Refused, match=r"decided against version 2: gate (failed|cannot tell); it cannot be promoted"):
        promote("3", "adfm")
    assert gate_of("3")["verdict"] != "passed"
    approve("3")
    with pytest.raises(Refused, match="its gate's verdict is '(failed|cannot tell)'"):
        promote("3", "adfm")
    assert aliases() == {"production": "2", "previous": "1"}


def test_without_production_the_limits_decide_again(store, candidate):
    tracking.client().delete_model_version("adfm", "1")
    with pytest.raises(Refused, match="decided against version none: gate passed"):
        promote("2", "adfm")
    assert gate_of("2")["production_predictions"] is None
    approve("2")
    promote("2", "adfm")
    assert aliases() == {"production": "2"}


def test_what_nobody_has_approved_is_not_decided_again(store, add):
    add(36)
    add(26)
    promote("2", "adfm")
    before = gate_of("1")
    for approval in ("pending", "rejected"):
        tag("1", "approval", approval)
        with pytest.raises(Refused, match=r"which is 2 now.*: the gate decides again when it is approved"):
            promote("1", "adfm")
        assert gate_of("1") == before
        assert tags("1")["approval"] == approval


def _files(store: Path, number: str) -> Path:
    """The folder of a version's files in the store."""
    model = tracking.client().get_model_version("adfm", number).source.removeprefix("models:/")
    return store / "mlartifacts" / "models" / model / "artifacts"


def sign_again(store: Path, number: str) -> None:
    """As a submitter could who has the key and may write to the store."""
    with TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(_files(store, number), Path(folder) / "copy"))
        (copy / "model.sig").unlink()
        signing.sign(copy, signing.keys())
        shutil.copy(copy / "model.sig", _files(store, number) / "model.sig")


def test_a_changed_file_of_a_version_or_of_its_rival_is_not_judged(store, candidate):
    for path, number in itertools.product(("evaluation/predictions.parquet", "MLmodel", "model.sig"), ("2", "1")):
        file = _files(store, number) / path
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(AdfmError, match=re.escape(path)):
            promote("2", "adfm")
        file.write_bytes(content)
        if number == "2":
            assert tags("2")["approval"] == "pending" and last().action == "refuse"
            approve("2")
    assert aliases() == {"production": "1"}
    promote("2", "adfm")  # an approval outlives a fault of the version in production
    assert aliases() == {"production": "2", "previous": "1"}


def test_files_that_were_signed_again_after_the_decision_are_refused(store, add):
    add(26)
    file = _files(store, "1") / "lineage.json"
    file.write_text(file.read_text().replace('"git_commit": null', '"git_commit": "another"'))
    sign_again(store, "1")
    with pytest.raises(Refused, match="its files were changed, and signed again, after the gate decided"):
        promote("1", "adfm")
    assert aliases() == {}


def test_without_a_common_test_set_the_gate_cannot_tell(store, add, make_shards, make_model, make_evaluation, tmp_path):
    """Production was judged on other images, and the submitter did not evaluate it on these."""
    other = make_shards(tmp_path / "other", 7)
    model = make_model(tmp_path / "m", 1.0, other)
    register(model, other, make_evaluation(tmp_path / "e", other, 36), tmp_path / "out", PARAMS)
    promote(add(26), "adfm")
    approve("1")
    with pytest.raises(Refused, match="decided against version 2: gate cannot tell; it cannot be promoted"):
        promote("1", "adfm")
    decided = gate_of("1")
    assert decided["reasons"][0].startswith("Predictions of version 2 (production) on these test images are missing")


def test_the_gate_decides_again_once_also_if_two_ask(store, add, monkeypatch):
    add(26)
    add(36)
    promote("1", "adfm")
    original = history_.append

    def append(*arguments, **content):
        monkeypatch.setattr(history_, "append", original)
        with pytest.raises(Refused, match="approve again"):
            promote("2", "adfm", "first")
        approve("2")
        return original(*arguments, **content)

    monkeypatch.setattr(history_, "append", append)
    with pytest.raises(Refused, match="cannot be promoted"):
        promote("2", "adfm", "second")
    judged = [step for step in history("adfm").steps if step.action == "judge" and step.version == "2"]
    assert [step.void for step in judged] == [False, False, True]
    assert gate_of("2")["decided_at"] == judged[1].at
    if tags("2")["approval"] == "pending":
        approve("2")
    promote("2", "adfm")
    assert aliases() == {"production": "2", "previous": "1"}


def test_a_decision_that_another_is_writing_is_not_a_change_by_hand(store, add, monkeypatch):
    add(26)
    add(36)
    promote("1", "adfm")
    original = decisions.judge

    def judge(*arguments):
        monkeypatch.setattr(decisions, "judge", original)
        with pytest.raises(Refused, match="approve again"):
            promote("2", "adfm")
        return original(*arguments)

    monkeypatch.setattr(decisions, "judge", judge)
    with pytest.raises(Refused, match="approval is 'pending'"):
        promote("2", "adfm")
    gate_of("2")
    assert "approve again" in tags("2")["approval_refused"]


def test_production_that_changes_while_files_are_checked(store, add, monkeypatch):
    add(26)
    add(36)
    original = decisions.judge

    def judge(*arguments):
        monkeypatch.setattr(decisions, "judge", original)
        promote("1", "adfm")
        return original(*arguments)

    monkeypatch.setattr(decisions, "judge", judge)
    with pytest.raises(Refused, match="decided against version 1: gate passed; approve again"):
        promote("2", "adfm")
    assert aliases() == {"production": "1"}


def test_no_such_version(store, add):
    names = ("7", "latest", "")
    for version in names:
        with pytest.raises(AdfmError, match="its versions: none yet; `adfm register` makes one"):
            promote(version, "adfm")
    add(28)
    for version in names:
        with pytest.raises(AdfmError, match=rf"adfm has no version {version}; its versions: 1\."):
            promote(version, "adfm")


def test_what_is_in_production_is_not_promoted_again(store, add):
    add(28)
    promote("1", "adfm")
    with pytest.raises(AdfmError, match="it is in production already"):
        promote("1", "adfm")
    assert log() == [("promote", "1", "none"), ("refuse", "1", "")]
    assert tags("1")["approval"] == "approved"


def test_rollback_goes_back_step_by_step(store, add):
    for number, right in (("1", 26), ("2", 32), ("3", 40)):
        assert add(right) == number
        promote(number, "adfm")
    assert aliases() == {"production": "3", "previous": "2"}
    rollback("adfm", "Grace")
    assert aliases() == {"production": "2", "previous": "1"}
    assert tags("3")["rolled_back_by"] == "Grace"
    assert tags("3")["rolled_back_to"] == "2"
    assert tags("3")["approval"] == "withdrawn"
    assert tags("2")["restored_from"] == "3"
    assert tags("2")["restored_by"] == "Grace"
    assert tags("2")["restored_at"] == tags("3")["rolled_back_at"]

    with pytest.raises(AdfmError, match="approval is 'withdrawn'"):
        promote("3", "adfm")
    rollback("adfm")
    assert aliases() == {"production": "1"}
    with pytest.raises(AdfmError, match="replaced no version that is still there"):
        rollback("adfm")
    assert aliases() == {"production": "1"}
    assert log()[3:] == [("rollback", "2", "3"), ("refuse", "3", ""), ("rollback", "1", "2")]


def test_rollback_to_a_named_version(store, add):
    add(26)
    promote("1", "adfm")
    add(32)
    add(40)
    promote("3", "adfm")
    with pytest.raises(AdfmError, match="Version 2 of adfm was never in production; use `adfm promote`"):
        rollback("adfm", to="2")
    with pytest.raises(AdfmError, match="Version 3 of adfm is in production already"):
        rollback("adfm", to="3")
    with pytest.raises(AdfmError, match="has no version 9"):
        rollback("adfm", to="9")
    assert aliases() == {"production": "3", "previous": "1"}
    rollback("adfm", to="1")
    assert aliases() == {"production": "1"}


def test_nothing_to_roll_back(store, add):
    assert history("adfm").steps == []
    with pytest.raises(AdfmError, match="No version of adfm is in production"):
        rollback("adfm")
    add(28)
    with pytest.raises(AdfmError, match="No version of adfm is in production"):
        rollback("adfm")


def test_rollback_to_changed_or_deleted_files(store, two_promotions):
    file = _files(store, "1") / "MLmodel"
    file.write_text(file.read_text() + "# changed")
    with pytest.raises(AdfmError, match="Version 1 of adfm cannot return: .*MLmodel"):
        rollback("adfm")
    sign_again(store, "1")
    with pytest.raises(AdfmError, match="its files were changed, and signed again, since it was in production"):
        rollback("adfm")
    tracking.client().delete_model_version("adfm", "1")
    with pytest.raises(AdfmError, match="nothing to roll back to"):
        rollback("adfm")
    assert aliases() == {"production": "2"}


def test_the_newest_approved_version_is_promoted_and_older_ones_are_asked_again(store, add, capsys):
    assert not promote_approved("adfm")
    add(26)
    add(30, approve=False)
    add(36)
    with pytest.raises(
        Refused, match=r"Version 1 of adfm .*which is 3 now; .*; decided .*\nIts tag approval is 'pending' again"
    ):
        promote_approved("adfm", "cron")
    assert aliases() == {"production": "3"}
    assert tags("1")["approval"] == tags("2")["approval"] == "pending"
    assert "decided against version 3: gate" in tags("1")["approval_refused"]
    assert tags("3")["promoted_by"] == "cron"
    assert not promote_approved("adfm")
    assert log() == [("promote", "3", "none"), ("judge", "1", "")]


def test_an_approval_serves_once(store, add):
    """After a rollback past it, a version that is still tagged `approved` does not return by itself."""
    for right in (26, 32, 40):
        promote(add(right), "adfm")
    rollback("adfm", to="1")
    assert (tags("2")["approval"], tags("2")["gate_production_version"]) == ("approved", "1")
    assert not promote_approved("adfm")
    with pytest.raises(Refused, match="its approval was used: .* `adfm rollback --to 2`"):
        promote("2", "adfm")
    rollback("adfm", to="2", why="the camera was at fault")
    assert last().why == "the camera was at fault"
    # The one that was rolled back may be approved again.
    with pytest.raises(Refused, match="approval is 'withdrawn'"):
        promote("3", "adfm")
    approve("3")
    assert promote_approved("adfm")
    assert aliases() == {"production": "3", "previous": "2"}


def test_a_rejection_is_kept_with_its_reason(store, add, tmp_path):
    add(26, approve=False)
    tag("1", "approval", "rejected")
    assert not promote_approved("adfm")
    tag("1", "approval_reason", "x" * 5000)
    tag("1", "approval_by", "Ada")
    assert not promote_approved("adfm")
    assert not promote_approved("adfm")
    with pytest.raises(Refused, match="approval is 'rejected'"):
        promote("1", "adfm")
    assert tags("1")["approval"] == "rejected"
    assert [(step.action, step.by, len(step.why)) for step in history("adfm").counting][2:4] == [
        ("reject", "", 0),
        ("reject", "Ada", 2000),
    ]
    assert [step.action for step in history("adfm").counting][2:] == ["reject", "reject", "refuse"]
    assert aliases() == {}


def test_a_rejection_is_kept_when_the_gate_decides_again(store, add, tmp_path):
    add(26, approve=False)
    tag("1", "approval", "rejected")
    tag("1", "approval_reason", "misses scratches")
    promote(add(36), "adfm")
    register(tmp_path / "model-26", tmp_path / "shards", tmp_path / "evaluation-26", tmp_path / "out", PARAMS)
    assert tags("1")["approval"] == "pending"
    assert "approval_reason" not in tags("1")
    steps = [(step.action, step.why) for step in history("adfm").counting]
    assert ("reject", "misses scratches") in steps[-2:]


def test_a_gate_file_edited_by_hand_is_written_again_and_the_reviewer_asked_again(store, add):
    add(26)
    decided = gate_of("1")
    file = _files(store, "1") / "gate.json"
    for text in ("[]", "nonsense", json.dumps(decided | {"reasons": ["Everything is fine."]})):
        file.write_text(text)
        with pytest.raises(Refused, match="its page showed was not the decision that stands, and was written again"):
            promote("1", "adfm")
        assert gate_of("1") == decided
        assert aliases() == {} and tags("1")["approval"] == "pending"
        approve("1")
    promote("1", "adfm")


def test_tags_edited_by_hand_are_written_again_and_decide_nothing(store, add):
    add(8)
    tag("1", "gate", "passed")
    with pytest.raises(Refused, match="its gate's verdict is 'failed'"):
        promote("1", "adfm")
    assert tags("1")["gate"] == "failed"
    add(26)
    for key in ("gate", "gate_digest", "submitted_by"):
        tag("2", key, "something")
        with pytest.raises(Refused, match="what its page showed was not the decision"):
            promote("2", "adfm")
        gate_of("2")
        approve("2")
    assert aliases() == {}


def test_killed_between_gate_file_and_tags_the_next_call_finishes(store, add, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_model_artifact", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            add(26, approve=False)
    [judged] = [step for step in history("adfm").counting if step.action == "judge"]
    assert not judged.finished and "gate" not in tags("1")
    approve("1")  # of a page that showed nothing yet
    with pytest.raises(Refused, match="approve again"):
        promote("1", "adfm")
    gate_of("1")
    approve("1")
    promote("1", "adfm")
    assert aliases() == {"production": "1"}


def test_a_version_that_adfm_did_not_make(store, add):
    client = tracking.client()
    add(26)
    client.create_model_version("adfm", "s3://somewhere/else")
    assert promote_approved("adfm")
    with pytest.raises(Refused, match="no decision of the gate on it is in the history"):
        promote("2", "adfm")
    for key, value in tags("1").items():
        tag("2", key, value)
    with pytest.raises(Refused, match="no decision of the gate on it is in the history"):
        promote_approved("adfm")
    assert aliases() == {"production": "1"}


def test_production_that_was_deleted(store, add):
    for right in (26, 32, 38):
        promote(add(right), "adfm")
    tracking.client().delete_model_version("adfm", "3")
    assert aliases() == {"previous": "2"}
    with pytest.raises(AdfmError, match="adfm has no version 3"):
        promote("3", "adfm")
    assert log()[3:] == [("lost", "3", "3"), ("refuse", "3", "")]
    rollback("adfm")
    assert aliases() == {"production": "2", "previous": "1"}
    tracking.client().delete_model_version("adfm", "1")
    assert not promote_approved("adfm")
    assert aliases() == {"production": "2"}


def test_an_alias_on_a_deleted_version(store, add):
    """MLflow removes the aliases of a version that it deletes; this one was lost by other means."""
    promote(add(26), "adfm")
    with closing(sqlite3.connect(store / "mlflow.db")) as database:
        database.execute("UPDATE model_versions SET current_stage = 'Deleted_Internal' WHERE name = 'adfm'")
        database.commit()
    assert aliases() == {"production": "1"}
    add(36)
    assert tags("2")["gate_production_version"] == "none"
    promote("2", "adfm")
    assert aliases(anchor=True) == {"production": "2", "anchor": "2"}
    assert log() == [("promote", "1", "none"), ("lost", "1", "1"), ("anchor", "none", ""), ("promote", "2", "none")]


def test_an_alias_that_was_moved_by_hand_is_put_back(store, add, two_promotions, capsys):
    add(30, approve=False)
    tracking.client().set_registered_model_alias("adfm", "production", "3")
    assert not promote_approved("adfm")
    assert aliases() == {"production": "2", "previous": "1"}
    assert "by hand, production had been set to 3" in capsys.readouterr().out
    tracking.client().delete_registered_model_alias("adfm", "production")
    assert not promote_approved("adfm")
    assert aliases() == {"production": "2", "previous": "1"}
    assert log()[2:] == [("restore", "2", "3"), ("restore", "2", "none")]


def test_an_alias_that_was_set_before_the_history_began_is_taken_away(store, add, capsys):
    add(26, approve=False)
    tracking.client().set_registered_model_alias("adfm", "production", "1")
    assert not promote_approved("adfm")
    assert aliases() == {}
    assert log() == [("restore", "none", "1")]
    assert "by hand, production had been set to 1" in capsys.readouterr().out


def test_a_reviewer_moves_the_anchor_to_what_was_in_production_and_nowhere_else(store, add, two_promotions, capsys):
    add(38, approve=False)
    client = tracking.client()
    assert aliases(anchor=True) == {"production": "2", "previous": "1", "anchor": "1"}
    client.set_registered_model_alias("adfm", "anchor", "3")
    assert not promote_approved("adfm")
    assert aliases(anchor=True)["anchor"] == "1"
    assert "the anchor had been set to 3; put back to 1" in capsys.readouterr().out
    client.delete_registered_model_alias("adfm", "anchor")
    assert not promote_approved("adfm")
    assert aliases(anchor=True)["anchor"] == "1" and log()[-1][0] == "promote"
    client.set_registered_model_alias("adfm", "anchor", "2")
    approve("3")
    with pytest.raises(Refused, match=r"version 1 \(the anchor\), which is 2 now"):
        promote_approved("adfm")
    assert aliases(anchor=True)["anchor"] == history("adfm").anchor == "2"
    assert history("adfm").last("anchor").why == "moved from version 1 in MLflow"
    assert gate_of("3")["anchor_version"] == "2"
    client.delete_model_version("adfm", "2")
    assert not promote_approved("adfm")
    assert (history("adfm").production, history("adfm").anchor) == ("none", "none")
    rollback("adfm")
    assert aliases(anchor=True) == {"production": "1", "anchor": "1"}


def test_a_version_that_is_deleted_while_it_is_promoted_is_never_in_production(store, add, monkeypatch, capsys):
    add(26)
    original = history_.append

    def append(store, name, keys, seen, action, version, **content):
        if action == "promote":
            tracking.client().delete_model_version("adfm", "1")
        return original(store, name, keys, seen, action, version, **content)

    monkeypatch.setattr(history_, "append", append)
    with pytest.raises(AdfmError, match="Version 1 of adfm was deleted while it was promoted; it is not in production"):
        promote("1", "adfm")
    assert aliases() == {} and history("adfm").production == "none"
    assert ("lost", "1", "1") in log()
    assert "version 1 of adfm is in production" not in capsys.readouterr().out


def test_a_version_that_is_deleted_between_step_and_alias_is_lost(store, add, monkeypatch):
    add(26)
    original = MlflowClient.set_registered_model_alias

    def alias(self, *arguments):
        monkeypatch.setattr(MlflowClient, "set_registered_model_alias", original)
        self.delete_model_version("adfm", "1")
        return original(self, *arguments)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", alias)
    with pytest.raises(AdfmError, match="deleted while it was promoted"):
        promote("1", "adfm")
    assert log()[-2:] == [("lost", "1", "1"), ("anchor", "none", "")]


def test_what_mlflow_did_not_take_is_finished_by_the_next_that_comes(store, candidate, monkeypatch):
    """MLflow goes away at the n-th write after the step is in the history, which shows it until it is mended."""
    done: list[object] = []

    def dying(original, dies_at):
        def write(self, *arguments):
            done.append(arguments)
            if len(done) == dies_at:
                raise MlflowException("connection refused")
            return original(self, *arguments)

        return write

    for dies_at in (1, 2, 4, 6):
        done.clear()
        with monkeypatch.context() as patch:
            for name in ("set_registered_model_alias", "set_model_version_tag"):
                patch.setattr(MlflowClient, name, dying(getattr(MlflowClient, name), dies_at))
            with pytest.raises(AdfmError, match="connection refused"):
                promote("2", "adfm")
        assert not moves()[-1].finished
        assert "promote (unfinished)" in history_.table(history("adfm"))
        assert not promote_approved("adfm")
        assert aliases() == {"production": "2", "previous": "1"}
        assert tags("2")["replaced_version"] == "1"
        assert log()[-1] == ("promote", "2", "1")
        assert all(step.finished for step in moves())
        rollback("adfm")
        approve("2")
    assert log() == [("promote", "1", "none"), *[("promote", "2", "1"), ("rollback", "1", "2")] * 4]


def test_when_mlflow_goes_away_before_the_step_is_written_nothing_has_moved(store, candidate, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_model_version", Mock(side_effect=MlflowException("connection refused")))
        with pytest.raises(AdfmError, match="connection refused"):
            promote_approved("adfm")
    assert aliases() == {"production": "1"}
    assert tags("2")["approval"] == "approved"
    assert promote_approved("adfm")
    assert aliases() == {"production": "2", "previous": "1"}


def test_an_approval_that_is_taken_back_while_files_are_checked(store, add, monkeypatch):
    add(26)
    original = decisions.judge

    def judge(*arguments):
        tag("1", "approval", "rejected")
        return original(*arguments)

    monkeypatch.setattr(decisions, "judge", judge)
    with pytest.raises(Refused, match="approval is 'rejected'"):
        promote("1", "adfm")
    assert aliases() == {}


def test_the_history_outlives_versions(store, two_promotions):
    rollback("adfm", "Grace", why="too many\nfalse alarms")
    before = log()
    tracking.client().delete_registered_model("adfm")
    assert log() == before
    assert history_.table(history("adfm")).splitlines()[-1].endswith(r"Grace  too many\nfalse alarms")


def test_with_a_gap_in_the_history_nothing_moves(store, two_promotions):
    before, client = aliases(anchor=True), tracking.client()
    with closing(sqlite3.connect(store / "mlflow.db")) as database, closing(sqlite3.connect(":memory:")) as whole:
        database.backup(whole)
        for spoil in (
            lambda: client.delete_model_version("adfm-history", "3"),
            lambda: client.delete_model_version("adfm-history", "5"),
            lambda: client.set_model_version_tag("adfm-history", "2", "verdict", "failed"),
            lambda: client.delete_registered_model("adfm-history"),
        ):
            spoil()
            for act in (
                lambda: promote("1", "adfm"),
                lambda: promote_approved("adfm"),
                lambda: rollback("adfm"),
                lambda: register(*(Path(name) for name in REGISTERED), PARAMS),
            ):
                with pytest.raises(AdfmError, match="Nothing moves") as broken:
                    act()
                assert broken.value.exit_code == 2
            assert aliases(anchor=True) == before
            whole.backup(database)
    assert not promote_approved("adfm")


def test_a_forged_step_moves_nothing(store, candidate):
    tag("2", "approval", "pending")
    tags = {"action": "promote", "version": "2", "production": "2", "previous": "1", "before": history("adfm").head}
    tracking.client().create_model_version("adfm-history", "s3://x/y", tags=tags)
    assert not promote_approved("adfm")
    assert log() == [("promote", "1", "none")]
    approve("2")
    promote("2", "adfm")
    assert aliases() == {"production": "2", "previous": "1"}


def test_of_two_that_write_at_once_the_second_is_void(store, add, monkeypatch):
    promote(add(26), "adfm")
    first, second = add(32), add(36)
    original = history_.append

    def append(*arguments, **content):
        monkeypatch.setattr(history_, "append", original)
        promote(second, "adfm")
        return original(*arguments, **content)

    monkeypatch.setattr(history_, "append", append)
    with pytest.raises(Refused, match="which is 3 now"):
        promote(first, "adfm")
    assert aliases() == {"production": "3", "previous": "1"}
    assert log()[1:] == [("promote", "3", "1"), ("judge", "2", "")]
    assert [(step.action, step.version) for step in history("adfm").steps if step.void] == [("promote", "2")]
    assert "promote (void)" in history_.table(history("adfm"))

    monkeypatch.setattr(history_, "append", lambda *arguments, **content: overtaken(*arguments, **content))

    def overtaken(*arguments, **content):
        monkeypatch.setattr(history_, "append", original)
        rollback("adfm")
        return original(*arguments, **content)

    with pytest.raises(AdfmError, match="Somebody else moved production"):
        rollback("adfm")
    assert aliases() == {"production": "1"}


def test_an_approval_that_comes_while_the_gate_decides_again_is_void(store, add, tmp_path, monkeypatch):
    add(26, approve=False)
    promote(add(30), "adfm")
    original = MlflowClient.log_model_artifact

    def write(self, *arguments):
        tag("1", "approval", "approved")
        return original(self, *arguments)

    monkeypatch.setattr(MlflowClient, "log_model_artifact", write)
    register(tmp_path / "model-26", tmp_path / "shards", tmp_path / "evaluation-26", tmp_path / "out", PARAMS)
    assert tags("1")["gate_production_version"] == "2"
    assert tags("1")["approval"] == "pending"


def test_promotions_that_race(store, add):
    """Each was decided on with nothing in production, so only one may win, and the other gets the reason."""
    add(30)
    add(38)
    outcomes = {}

    def run(version: str) -> None:
        try:
            promote(version, "adfm")
            outcomes[version] = "promoted"
        except AdfmError as error:
            outcomes[version] = str(error)

    threads = [threading.Thread(target=run, args=(version,)) for version in ("1", "2")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [winner] = [version for version, outcome in outcomes.items() if outcome == "promoted"]
    [loser] = {"1", "2"} - {winner}
    assert f"which is {winner} now" in outcomes[loser]
    assert aliases() == {"production": winner}
    assert [step.version for step in moves()] == [winner]


def test_on_the_command_line(store, add, capsys):
    assert main(["promote"]) == 0
    assert capsys.readouterr().out == "no version of adfm is newly approved; nothing to do\n"
    add(26)
    assert main(["promote", "--by", "cron"]) == 0
    assert main(["promote"]) == 0
    assert capsys.readouterr().out.endswith("no version of adfm is newly approved; nothing to do\n")
    assert main(["registry", "log"]) == 0
    assert "promote  1        none         cron  gate passed on " in capsys.readouterr().out
    assert main(["registry", "log", "--json"]) == 0
    step = json.loads(capsys.readouterr().out)[-1]
    assert (step["action"], step["version"], step["by"], step["finished"]) == ("promote", "1", "cron", True)
    assert main(["rollback", "--why", "false alarms"]) == 1


def test_whole_life_on_a_server(server, add, tmp_path: Path):
    """Registration, promotion and rollback through HTTP, with artifacts that the server keeps."""
    add(26)
    promote("1", "adfm", "Ada")
    add(36)
    assert tags("2")["gate_production_version"] == "1"
    assert "evaluated again" not in tracking.client().get_model_version("adfm", "2").description
    promote("2", "adfm", "Ada")
    assert aliases() == {"production": "2", "previous": "1"}
    rollback("adfm", "Grace")
    assert aliases() == {"production": "1"}
    assert [step.by for step in moves()] == ["Ada", "Ada", "Grace"]
    assert "everything is as the signed history says" in audit("adfm")
    assert not (tmp_path / "mlflow.db").exists() and not (tmp_path / "mlartifacts").exists()


@pytest.mark.parametrize("act", [lambda: promote("1", "adfm"), lambda: rollback("adfm"), lambda: history("adfm")])
def test_server_that_is_not_there(monkeypatch, act):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(AdfmError, match=r"MLflow at http://127\.0\.0\.1:9 failed"):
        act()
