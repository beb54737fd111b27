from __future__ import annotations

import json
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import Mock

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from adfm import files, tracking
from adfm.cli import main
from adfm.errors import AdfmError
from adfm.files import file_digest
from adfm.params import Params
from adfm.registry import history as history_
from adfm.registry import promotion
from adfm.registry.promotion import Refused, history, promote, promote_approved, rollback
from adfm.registry.registration import download, register

PARAMS = Params.model_validate({"gate": {"bootstrap": 200, "min_images": 20}})


def aliases() -> dict[str, str]:
    found = tracking.client().get_registered_model("adfm").aliases
    return {alias: str(version) for alias, version in found.items()}


def tags(version: str) -> dict[str, str]:
    return dict(tracking.client().get_model_version("adfm", version).tags)


def log() -> list[tuple[str, str, str]]:
    return [(step.action, step.version, step.replaced) for step in history(PARAMS)]


def tag(version: str, key: str, value: str) -> None:
    tracking.client().set_model_version_tag("adfm", version, key, value)


def test_approved_version_goes_into_production(store, add, capsys):
    assert add(28) == "1"
    promote("1", PARAMS, "Ada")
    assert aliases() == {"production": "1"}
    assert tags("1")["promoted_by"] == "Ada"
    assert tags("1")["promoted_at"].endswith("+00:00")
    assert tags("1")["replaced_version"] == "none"
    assert capsys.readouterr().out.endswith("version 1 of adfm is in production; it replaced none\n")

    add(34)
    promote("2", PARAMS)
    assert aliases() == {"production": "2", "previous": "1"}
    assert tags("2")["replaced_version"] == "1"
    assert tags("2")["promoted_by"]
    assert log() == [("promote", "1", "none"), ("promote", "2", "1")]
    first, second = history(PARAMS)
    assert (first.by, first.at) == ("Ada", tags("1")["promoted_at"])
    assert second.why == f"gate passed on {tags('2')['gate_decided_at']} against version 1"
    assert all(step.finished for step in (first, second))


@pytest.mark.parametrize("approval", [None, "pending", "rejected", "Approved", " approved "])
def test_without_approval_nothing_moves(store, add, approval):
    add(28, approve=False)
    if approval is None:
        tracking.client().delete_model_version_tag("adfm", "1", "approval")
    else:
        tag("1", "approval", approval)
    with pytest.raises(AdfmError, match=rf"approval is {approval!r}: a reviewer sets it to exactly 'approved'"):
        promote("1", PARAMS)
    assert aliases() == {}
    assert "promoted_at" not in tags("1")
    assert log() == [("refuse", "1", "")]
    assert repr(approval) in history(PARAMS)[0].why


def test_a_failed_gate_is_not_promoted_and_all_refusals_are_told(store, add):
    add(20, approve=False)
    with pytest.raises(AdfmError, match=r"(?s)tag gate is 'failed'.*tag approval is 'pending'"):
        promote("1", PARAMS)
    tag("1", "approval", "approved")
    with pytest.raises(AdfmError, match="tag gate is 'failed'"):
        promote("1", PARAMS)
    assert aliases() == {}


def gate_of(version: str) -> dict[str, object]:
    """The decision that the version carries, which its tags must repeat."""
    found = tracking.client().get_model_version("adfm", version)
    with TemporaryDirectory() as folder:
        file = download(found, "gate.json", Path(folder))
        assert file_digest(file) == found.tags["gate_digest"]
        decided = json.loads(file.read_text())
    assert found.tags["gate"] == ("passed" if decided["passed"] else "failed")
    assert found.tags["gate_production_version"] == (decided["production_version"] or "none")
    assert found.tags["gate_decided_at"] == decided["decided_at"]
    return decided


def test_when_production_has_changed_the_gate_decides_anew_and_the_reviewer_is_asked_again(store, add, tmp_path):
    for right in (26, 36, 34):
        add(right)
    promote("1", PARAMS)
    said = (
        "its gate compared it with version none, and in production is 1; decided again against version 1: gate passed"
    )
    with pytest.raises(Refused, match=rf"Version 2 of adfm cannot be promoted: {said}; approve again"):
        promote("2", PARAMS, "Ada")
    assert aliases() == {"production": "1"}
    assert (tags("2")["approval"], tags("2")["approval_refused"]) == ("pending", f"{said}; approve again")
    assert log() == [("promote", "1", "none"), ("decide", "2", "")]
    step = history(PARAMS)[-1]
    assert (step.by, step.why) == ("Ada", said)
    decided = gate_of("2")
    assert (decided["passed"], decided["decided_at"], decided["production_predictions"]) == (
        True,
        step.at,
        "as registered",
    )
    assert decided["metrics"]["accuracy"]["production"] == 26 / 40
    description = tracking.client().get_model_version("adfm", "2").description
    assert description.startswith(f"Version 2: {said}.\n\n**Gate passed** on {step.at}")
    assert "against version 1 in production (as registered)" in description

    # Registration, which reads the shards, decides the same, so what is approved now stands.
    tag("2", "approval", "approved")
    register(tmp_path / "model-36", tmp_path / "shards", tmp_path / "evaluation-36", tmp_path / "out", PARAMS)
    assert gate_of("2") == decided
    assert tags("2")["approval"] == "approved"
    promote("2", PARAMS)
    assert aliases() == {"production": "2", "previous": "1"}
    assert "approval_refused" not in tags("2")

    with pytest.raises(Refused, match=r"decided again against version 2: gate failed; it cannot be promoted"):
        promote("3", PARAMS)
    assert not gate_of("3")["passed"]
    tag("3", "approval", "approved")
    with pytest.raises(Refused, match="its tag gate is 'failed'"):
        promote("3", PARAMS)
    assert aliases() == {"production": "2", "previous": "1"}


def test_without_production_the_floors_decide_anew(store, add):
    promote(add(26), PARAMS)
    add(36)
    tracking.client().delete_model_version("adfm", "1")
    with pytest.raises(Refused, match="decided again against version none: gate passed"):
        promote("2", PARAMS)
    assert gate_of("2")["production_predictions"] is None
    tag("2", "approval", "approved")
    promote("2", PARAMS)
    assert aliases() == {"production": "2"}


@pytest.mark.parametrize("approval", ["pending", "rejected"])
def test_what_nobody_has_approved_is_not_decided_anew(store, add, approval):
    add(36)
    add(26)
    promote("2", PARAMS)
    tag("1", "approval", approval)
    before = gate_of("1")
    with pytest.raises(Refused, match="in production is 2: the gate decides anew when it is approved"):
        promote("1", PARAMS)
    assert gate_of("1") == before
    assert tags("1")["approval"] == approval


def _spoil_predictions(store: Path, number: str) -> None:
    [file] = [
        path
        for path in (store / "mlartifacts" / "models").glob("*/artifacts/evaluation/predictions.parquet")
        if file_digest(path) == tags(number)["evaluation_digest"]
    ]
    file.write_bytes(b"")


def _forget_settings(store: Path, number: str) -> None:
    for file in (store / "mlartifacts" / "models").glob("*/artifacts/gate.json"):
        if file_digest(file) == tags(number)["gate_digest"]:
            decided = json.loads(file.read_text())
            del decided["settings"]
            file.write_text(json.dumps(decided))
            tag(number, "gate_digest", file_digest(file))
            break


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda store: tag("1", "test_fingerprint", "of other images"), "version 1 was evaluated on other images"),
        (lambda store: tag("2", "protocol", "{}"), "version 1 was evaluated on other images or in another way"),
        (lambda store: _spoil_predictions(store, "1"), "the predictions of version 1 are not those"),
        (lambda store: _spoil_predictions(store, "2"), "the predictions of version 2 are not those"),
        (lambda store: _forget_settings(store, "2"), "gate.json does not have the settings of a gate"),
    ],
)
def test_what_cannot_be_compared_is_not_decided_anew(store, add, spoil, says):
    add(26)
    add(36)
    promote("1", PARAMS)
    spoil(store)
    before = tags("2")
    with pytest.raises(Refused, match=rf"(?s)cannot decide anew.*{says}.*run `adfm register` again.*'pending' again"):
        promote("2", PARAMS)
    assert aliases() == {"production": "1"}
    assert tags("2") == before | {"approval": "pending", "approval_refused": tags("2")["approval_refused"]}
    assert log()[1:] == [("refuse", "2", "")]


def test_the_gate_decides_anew_once_also_if_two_ask(store, add, monkeypatch):
    add(26)
    add(36)
    promote("1", PARAMS)
    original = history_.append

    def append(*arguments, **content):
        monkeypatch.setattr(history_, "append", original)
        with pytest.raises(Refused, match="decided again"):
            promote("2", PARAMS, "first")
        tag("2", "approval", "approved")
        return original(*arguments, **content)

    monkeypatch.setattr(history_, "append", append)
    with pytest.raises(Refused, match="decided again"):
        promote("2", PARAMS, "second")
    assert [(step.action, step.by) for step in history(PARAMS)][1:] == [("decide", "first"), ("decide", "second")]
    assert gate_of("2")["decided_at"] == history(PARAMS)[1].at
    assert tags("2")["approval"] == "approved"  # of the decision that stands
    promote("2", PARAMS)
    assert aliases() == {"production": "2", "previous": "1"}


def test_a_decision_that_another_is_writing_is_no_change_by_hand(store, add, monkeypatch):
    add(26)
    add(36)
    promote("1", PARAMS)
    original = promotion._changed

    def changed(candidate):
        monkeypatch.setattr(promotion, "_changed", original)
        with pytest.raises(Refused, match="decided again"):
            promote("2", PARAMS)
        return original(candidate)

    monkeypatch.setattr(promotion, "_changed", changed)
    with pytest.raises(Refused, match="approval is 'pending'"):
        promote("2", PARAMS)
    gate_of("2")
    assert "approve again" in tags("2")["approval_refused"]


def test_production_that_changes_while_files_are_checked(store, add, monkeypatch):
    add(26)
    add(36)
    original = promotion.check_unchanged

    def check(*arguments):
        monkeypatch.setattr(promotion, "check_unchanged", original)
        promote("1", PARAMS)
        return original(*arguments)

    monkeypatch.setattr(promotion, "check_unchanged", check)
    with pytest.raises(Refused, match="decided again against version 1: gate passed; approve again"):
        promote("2", PARAMS)
    assert aliases() == {"production": "1"}


def test_changed_files_are_not_promoted(store, add):
    add(28)
    [file] = (store / "mlartifacts" / "models").glob("*/artifacts/model/adapter_config.json")
    file.write_text('{"r": 200}')
    with pytest.raises(AdfmError, match=r"Version 1 of adfm: its model files have the digest .* `adfm register`"):
        promote("1", PARAMS)
    assert aliases() == {}


@pytest.mark.parametrize("version", ["7", "latest", ""])
def test_no_such_version(store, add, version):
    with pytest.raises(AdfmError, match="its versions: none yet; `adfm register` makes one"):
        promote(version, PARAMS)
    add(28)
    with pytest.raises(AdfmError, match=rf"adfm has no version {version}; its versions: 1\."):
        promote(version, PARAMS)


def test_what_is_in_production_is_not_promoted_again(store, add):
    add(28)
    promote("1", PARAMS)
    with pytest.raises(AdfmError, match="it is in production already"):
        promote("1", PARAMS)
    assert log() == [("promote", "1", "none"), ("refuse", "1", "")]
    assert tags("1")["approval"] == "approved"


def test_rollback_goes_back_step_by_step(store, add):
    for number, right in (("1", 26), ("2", 32), ("3", 40)):
        assert add(right) == number
        promote(number, PARAMS)
    assert aliases() == {"production": "3", "previous": "2"}
    rollback(PARAMS, "Grace")
    assert aliases() == {"production": "2", "previous": "1"}
    assert tags("3")["rolled_back_by"] == "Grace"
    assert tags("3")["rolled_back_to"] == "2"
    assert tags("3")["approval"] == "withdrawn"
    assert tags("2")["restored_from"] == "3"
    assert tags("2")["restored_by"] == "Grace"
    assert tags("2")["restored_at"] == tags("3")["rolled_back_at"]

    with pytest.raises(AdfmError, match="approval is 'withdrawn'"):
        promote("3", PARAMS)
    rollback(PARAMS)
    assert aliases() == {"production": "1"}
    with pytest.raises(AdfmError, match="replaced no version that is still there"):
        rollback(PARAMS)
    assert aliases() == {"production": "1"}
    assert log()[3:] == [("rollback", "2", "3"), ("refuse", "3", ""), ("rollback", "1", "2")]


def test_rollback_to_a_named_version(store, add):
    add(26)
    promote("1", PARAMS)
    add(32)
    add(40)
    promote("3", PARAMS)
    with pytest.raises(AdfmError, match="Version 2 of adfm was never in production; use `adfm promote`"):
        rollback(PARAMS, to="2")
    with pytest.raises(AdfmError, match="Version 3 of adfm is in production already"):
        rollback(PARAMS, to="3")
    with pytest.raises(AdfmError, match="has no version 9"):
        rollback(PARAMS, to="9")
    assert aliases() == {"production": "3", "previous": "1"}
    rollback(PARAMS, to="1")
    assert aliases() == {"production": "1"}


def test_nothing_to_roll_back(store, add):
    assert history(PARAMS) == []
    with pytest.raises(AdfmError, match="No version of adfm is in production"):
        rollback(PARAMS)
    add(28)
    with pytest.raises(AdfmError, match="No version of adfm is in production"):
        rollback(PARAMS)


def test_rollback_to_changed_or_deleted_files(store, add):
    add(26)
    promote("1", PARAMS)
    add(36)
    promote("2", PARAMS)
    [file] = [
        path
        for path in (store / "mlartifacts" / "models").glob("*/artifacts/model/adfm.json")
        if tags("1")["artifact_digest"] == files.digest(path.parent)
    ]
    file.write_text("{}")
    with pytest.raises(AdfmError, match="Version 1 of adfm: its model files"):
        rollback(PARAMS)
    tracking.client().delete_model_version("adfm", "1")
    with pytest.raises(AdfmError, match="nothing to roll back to"):
        rollback(PARAMS)
    assert aliases() == {"production": "2"}


def test_the_newest_approved_version_is_promoted_and_older_ones_are_asked_again(store, add, capsys):
    assert not promote_approved(PARAMS)
    add(26)
    add(30, approve=False)
    add(36)
    with pytest.raises(
        Refused, match=r"Version 1 of adfm .*in production is 3; decided again .*\nIts tag approval is 'pending' again"
    ):
        promote_approved(PARAMS, "cron")
    assert aliases() == {"production": "3"}
    assert tags("1")["approval"] == tags("2")["approval"] == "pending"
    assert "decided again against version 3: gate failed" in tags("1")["approval_refused"]
    assert tags("3")["promoted_by"] == "cron"
    assert not promote_approved(PARAMS)
    assert log() == [("promote", "3", "none"), ("decide", "1", "")]


def test_an_approval_serves_once(store, add):
    """After a rollback past it, a version that is still tagged `approved` does not return by itself."""
    for right in (26, 32, 40):
        promote(add(right), PARAMS)
    rollback(PARAMS, to="1")
    assert (tags("2")["approval"], tags("2")["gate_production_version"]) == ("approved", "1")
    assert not promote_approved(PARAMS)
    with pytest.raises(Refused, match="its approval was used: .* `adfm rollback --to 2`"):
        promote("2", PARAMS)
    rollback(PARAMS, to="2", why="the camera was at fault")
    assert history(PARAMS)[-1].why == "the camera was at fault"
    # The one that was rolled back may be approved anew.
    with pytest.raises(Refused, match="approval is 'withdrawn'"):
        promote("3", PARAMS)
    tag("3", "approval", "approved")
    assert promote_approved(PARAMS)
    assert aliases() == {"production": "3", "previous": "2"}


def test_a_rejection_is_kept_with_its_reason(store, add, tmp_path):
    add(26, approve=False)
    tag("1", "approval", "rejected")
    assert not promote_approved(PARAMS)
    tag("1", "approval_reason", "x" * 5000)
    tag("1", "approval_by", "Ada")
    assert not promote_approved(PARAMS)
    assert not promote_approved(PARAMS)
    with pytest.raises(Refused, match="approval is 'rejected'"):
        promote("1", PARAMS)
    assert tags("1")["approval"] == "rejected"
    assert [(step.action, step.by, len(step.why)) for step in history(PARAMS)][:2] == [
        ("reject", "", 0),
        ("reject", "Ada", 2000),
    ]
    assert [step.action for step in history(PARAMS)] == ["reject", "reject", "refuse"]
    assert aliases() == {}


def test_a_rejection_is_kept_when_the_gate_decides_anew(store, add, tmp_path):
    add(26, approve=False)
    tag("1", "approval", "rejected")
    tag("1", "approval_reason", "misses scratches")
    promote(add(36), PARAMS)
    register(tmp_path / "model-26", tmp_path / "shards", tmp_path / "evaluation-26", tmp_path / "out", PARAMS)
    assert tags("1")["approval"] == "pending"
    assert "approval_reason" not in tags("1")
    assert [(step.action, step.why) for step in history(PARAMS)][1:] == [("reject", "misses scratches")]


@pytest.mark.parametrize(("key", "value"), [("approval", "x" * 5000), ("approval", " Approved ")])
def test_an_approval_that_is_none_is_asked_for_again(store, add, key, value):
    add(26, approve=False)
    tag("1", key, value)
    with pytest.raises(Refused) as refused:
        promote_approved(PARAMS)
    assert len(str(refused.value)) < 400
    assert tags("1")["approval"] == "pending"
    assert aliases() == {}


def _edit_gate(store: Path, **changes: object) -> Path:
    [file] = (store / "mlartifacts" / "models").glob("*/artifacts/gate.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return file


def test_a_gate_file_edited_by_hand(store, add):
    add(20)
    _edit_gate(store, passed=True)
    tag("1", "gate", "passed")
    with pytest.raises(Refused, match=r"gate.json is not the decision that was registered"):
        promote("1", PARAMS)
    assert aliases() == {}
    assert "gate.json" in history(PARAMS)[0].why
    assert tags("1")["approval"] == "pending"


def test_gate_tags_edited_by_hand(store, add):
    add(20)
    tag("1", "gate", "passed")
    with pytest.raises(Refused, match=r"gate.json says otherwise than its tags gate \('passed'\)"):
        promote("1", PARAMS)
    assert aliases() == {}


@pytest.mark.parametrize("text", ["[]", "nonsense"])
def test_a_broken_gate_file_with_its_digest_in_order(store, add, text):
    add(26)
    file = _edit_gate(store)
    file.write_text(text)
    tag("1", "gate_digest", file_digest(file))
    with pytest.raises(Refused, match=r"gate.json is not the decision that was registered"):
        promote("1", PARAMS)
    assert aliases() == {}


def test_a_version_without_tags(store, add):
    client = tracking.client()
    add(26)
    client.create_model_version("adfm", "s3://somewhere/else")
    assert promote_approved(PARAMS)
    with pytest.raises(Refused, match=r"(?s)tag gate is None.*tag approval is None.*compared it with version None"):
        promote("2", PARAMS)
    tag("2", "approval", "approved")
    with pytest.raises(Refused, match="tag gate is None"):
        promote_approved(PARAMS)
    assert aliases() == {"production": "1"}


def test_production_that_was_deleted(store, add):
    for right in (26, 32, 38):
        promote(add(right), PARAMS)
    tracking.client().delete_model_version("adfm", "3")
    assert aliases() == {"previous": "2"}
    with pytest.raises(AdfmError, match="adfm has no version 3"):
        promote("3", PARAMS)
    assert log()[3:] == [("lost", "3", "3"), ("refuse", "3", "")]
    rollback(PARAMS)
    assert aliases() == {"production": "2", "previous": "1"}
    tracking.client().delete_model_version("adfm", "1")
    assert not promote_approved(PARAMS)
    assert aliases() == {"production": "2"}


def test_an_alias_on_a_deleted_version(store, add):
    """MLflow removes the aliases of a version that it deletes; this one was lost by other means."""
    import sqlite3
    from contextlib import closing

    promote(add(26), PARAMS)
    with closing(sqlite3.connect(store / "mlflow.db")) as database:
        database.execute("UPDATE model_versions SET current_stage = 'Deleted_Internal' WHERE name = 'adfm'")
        database.commit()
    assert aliases() == {"production": "1"}
    add(36)
    assert tags("2")["gate_production_version"] == "none"
    promote("2", PARAMS)
    assert aliases() == {"production": "2"}
    assert log() == [("promote", "1", "none"), ("lost", "1", "1"), ("promote", "2", "none")]


def test_an_alias_that_was_moved_by_hand_is_put_back(store, add, capsys):
    promote(add(26), PARAMS)
    promote(add(36), PARAMS)
    add(30, approve=False)
    tracking.client().set_registered_model_alias("adfm", "production", "3")
    assert not promote_approved(PARAMS)
    assert aliases() == {"production": "2", "previous": "1"}
    assert "by hand, production had been set to 3" in capsys.readouterr().out
    tracking.client().delete_registered_model_alias("adfm", "production")
    assert not promote_approved(PARAMS)
    assert aliases() == {"production": "2", "previous": "1"}
    assert log()[2:] == [("restore", "2", "3"), ("restore", "2", "none")]


def test_a_history_begins_with_what_is_in_production(store, add):
    add(26)
    tracking.client().set_registered_model_alias("adfm", "production", "1")
    promote(add(36), PARAMS)
    assert aliases() == {"production": "2", "previous": "1"}
    assert log() == [("found", "1", "none"), ("promote", "2", "1")]


@pytest.mark.parametrize("dies_at", [1, 2, 4, 6])
def test_what_mlflow_did_not_take_is_finished_by_the_next_that_comes(store, add, monkeypatch, dies_at):
    """MLflow goes away at the n-th write after the step is in the history, which shows it until it is mended."""
    promote(add(26), PARAMS)
    add(36)
    done = []

    def dying(original):
        def write(self, *arguments):
            done.append(arguments)
            if len(done) == dies_at:
                raise MlflowException("connection refused")
            return original(self, *arguments)

        return write

    with monkeypatch.context() as patch:
        for name in ("set_registered_model_alias", "set_model_version_tag"):
            patch.setattr(MlflowClient, name, dying(getattr(MlflowClient, name)))
        with pytest.raises(AdfmError, match="connection refused"):
            promote("2", PARAMS)
    assert not history(PARAMS)[-1].finished
    assert "promote (unfinished)" in history_.table(history(PARAMS))
    assert not promote_approved(PARAMS)
    assert aliases() == {"production": "2", "previous": "1"}
    assert tags("2")["replaced_version"] == "1"
    assert log() == [("promote", "1", "none"), ("promote", "2", "1")]
    assert all(step.finished for step in history(PARAMS))


def test_when_mlflow_goes_away_before_the_step_is_written_nothing_has_moved(store, add, monkeypatch):
    promote(add(26), PARAMS)
    add(36)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_model_version", Mock(side_effect=MlflowException("connection refused")))
        with pytest.raises(AdfmError, match="connection refused"):
            promote_approved(PARAMS)
    assert aliases() == {"production": "1"}
    assert tags("2")["approval"] == "approved"
    assert promote_approved(PARAMS)
    assert aliases() == {"production": "2", "previous": "1"}


def test_an_approval_that_is_taken_back_while_files_are_checked(store, add, monkeypatch):
    add(26)
    original = promotion.check_unchanged

    def check(*arguments):
        tag("1", "approval", "rejected")
        return original(*arguments)

    monkeypatch.setattr(promotion, "check_unchanged", check)
    with pytest.raises(Refused, match="approval is 'rejected'"):
        promote("1", PARAMS)
    assert aliases() == {}


def test_the_history_outlives_versions_and_shows_what_was_deleted_of_it(store, add):
    promote(add(26), PARAMS)
    promote(add(36), PARAMS)
    rollback(PARAMS, "Grace", why="too many\nfalse alarms")
    client = tracking.client()
    client.delete_registered_model("adfm")
    assert log() == [("promote", "1", "none"), ("promote", "2", "1"), ("rollback", "1", "2")]
    client.delete_model_version("adfm-history", "2")
    lines = history_.table(history(PARAMS)).splitlines()
    assert lines[0].split() == ["step", "at", "(UTC)", "what", "version", "in", "place", "of", "by", "why"]
    assert lines[2].split() == ["2", "deleted"]
    assert lines[3].endswith("Grace  too many false alarms")
    assert len(lines) == 4


def test_what_others_put_into_the_history_is_passed_over(store, add):
    promote(add(26), PARAMS)
    tracking.client().create_model_version("adfm-history", "s3://x/y", tags={"action": "promote", "follows": "²"})
    assert log() == [("promote", "1", "none")]
    promote(add(36), PARAMS)
    assert aliases() == {"production": "2", "previous": "1"}


def test_of_two_that_write_at_once_the_second_is_void(store, add, monkeypatch):
    promote(add(26), PARAMS)
    first, second = add(32), add(36)
    original = history_.append

    def append(*arguments, **content):
        monkeypatch.setattr(history_, "append", original)
        promote(second, PARAMS)
        return original(*arguments, **content)

    monkeypatch.setattr(history_, "append", append)
    with pytest.raises(Refused, match="in production is 3"):
        promote(first, PARAMS)
    assert aliases() == {"production": "3", "previous": "1"}
    assert log()[1:] == [("promote", "3", "1"), ("promote", "2", "1"), ("decide", "2", "")]
    assert [step.void for step in history(PARAMS)] == [False, False, True, False]
    assert "promote (void)" in history_.table(history(PARAMS))

    monkeypatch.setattr(history_, "append", lambda *arguments, **content: overtaken(*arguments, **content))

    def overtaken(*arguments, **content):
        monkeypatch.setattr(history_, "append", original)
        rollback(PARAMS)
        return original(*arguments, **content)

    with pytest.raises(AdfmError, match="Somebody else moved production"):
        rollback(PARAMS)
    assert aliases() == {"production": "1"}


def test_an_approval_that_comes_while_the_gate_decides_anew_is_void(store, add, tmp_path, monkeypatch):
    add(26, approve=False)
    promote(add(30), PARAMS)
    original = MlflowClient.log_model_artifact

    def write(self, *arguments):
        tag("1", "approval", "approved")
        return original(self, *arguments)

    monkeypatch.setattr(MlflowClient, "log_model_artifact", write)
    register(tmp_path / "model-26", tmp_path / "shards", tmp_path / "evaluation-26", tmp_path / "out", PARAMS)
    assert tags("1")["gate_production_version"] == "2"
    assert tags("1")["approval"] == "pending"


def test_promotions_that_race(store, add):
    """Each was decided on with nothing in production, so only one may win, and the other is told why."""
    add(30)
    add(38)
    outcomes = {}

    def run(version: str) -> None:
        try:
            promote(version, PARAMS)
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
    assert f"in production is {winner}" in outcomes[loser]
    assert aliases() == {"production": winner}
    assert [step.version for step in history(PARAMS) if step.action == "promote" and not step.void] == [winner]


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
    [step] = json.loads(capsys.readouterr().out)
    assert (step["action"], step["version"], step["by"], step["finished"]) == ("promote", "1", "cron", True)
    assert main(["rollback", "--why", "false alarms"]) == 1


def test_whole_life_on_a_server(server, add, tmp_path: Path):
    """Registration, promotion and rollback through HTTP, with artifacts that the server keeps."""
    add(26)
    promote("1", PARAMS, "Ada")
    add(36)
    assert tags("2")["gate_production_version"] == "1"
    assert "evaluated again" not in tracking.client().get_model_version("adfm", "2").description
    promote("2", PARAMS, "Ada")
    assert aliases() == {"production": "2", "previous": "1"}
    rollback(PARAMS, "Grace")
    assert aliases() == {"production": "1"}
    assert [step.by for step in history(PARAMS)] == ["Ada", "Ada", "Grace"]
    assert not (tmp_path / "mlflow.db").exists() and not (tmp_path / "mlartifacts").exists()


@pytest.mark.parametrize("act", [lambda: promote("1", PARAMS), lambda: rollback(PARAMS), lambda: history(PARAMS)])
def test_server_that_is_not_there(monkeypatch, act):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(AdfmError, match=r"MLflow at http://127\.0\.0\.1:9 failed"):
        act()
