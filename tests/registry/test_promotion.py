from __future__ import annotations

import multiprocessing
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from adfm import files, tracking
from adfm.errors import AdfmError
from adfm.params import Params
from adfm.registry import promotion
from adfm.registry.promotion import history, promote, rollback
from adfm.registry.registration import register

PARAMS = Params.model_validate({"gate": {"bootstrap": 200}})


def aliases() -> dict[str, str]:
    found = tracking.client().get_registered_model("adfm").aliases
    return {alias: str(version) for alias, version in found.items()}


def tags(version: str) -> dict[str, str]:
    return dict(tracking.client().get_model_version("adfm", version).tags)


def tag(version: str, key: str, value: str) -> None:
    tracking.client().set_model_version_tag("adfm", version, key, value)


@pytest.fixture
def add(make_shards, make_model, make_evaluation, tmp_path):
    """Registers and, if wanted, approves the next model, which judges `right` of 40 images rightly."""
    shards = make_shards(tmp_path / "shards")

    def add(right: int, approve: bool = True) -> str:
        model = make_model(tmp_path / f"model-{right}", float(right), shards)
        evaluation = make_evaluation(tmp_path / f"evaluation-{right}", shards, right, iou=0.3 + right / 100)
        register(model, shards, evaluation, tmp_path / "registration", PARAMS)
        versions = tracking.client().search_model_versions("name = 'adfm'")
        number = str(max(int(version.version) for version in versions))
        if approve:
            tag(number, "approval", "approved")
        return number

    return add


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
    assert [(e["action"], e["version"], e["replaced"]) for e in history(PARAMS)] == [
        ("promote", "1", "none"),
        ("promote", "2", "1"),
    ]
    assert history(PARAMS)[0]["by"] == "Ada"


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
    assert history(PARAMS) == []


def test_a_failed_gate_is_not_promoted_and_all_refusals_are_told(store, add):
    add(20, approve=False)
    with pytest.raises(AdfmError, match=r"(?s)tag gate is 'failed'.*tag approval is 'pending'"):
        promote("1", PARAMS)
    tag("1", "approval", "approved")
    with pytest.raises(AdfmError, match="tag gate is 'failed'"):
        promote("1", PARAMS)
    assert aliases() == {}


def test_a_decision_against_another_production_does_not_count(store, add, tmp_path, make_shards):
    add(26)
    add(36)
    add(34)
    promote("2", PARAMS)
    with pytest.raises(AdfmError, match=r"compared it with version none, and in production is 2: run `adfm register`"):
        promote("3", PARAMS)
    assert aliases() == {"production": "2"}
    # As the message says: the gate decides anew, on the same version, and what was approved is void.
    register(tmp_path / "model-26", tmp_path / "shards", tmp_path / "evaluation-26", tmp_path / "out", PARAMS)
    assert tags("1")["gate"] == "failed"
    assert tags("1")["approval"] == "pending"
    assert tags("1")["gate_production_version"] == "2"


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
    assert len(history(PARAMS)) == 1


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
    assert [(e["action"], e["version"], e["replaced"]) for e in history(PARAMS)][3:] == [
        ("rollback", "2", "3"),
        ("rollback", "1", "2"),
    ]


def test_rollback_to_a_named_version(store, add):
    for number, right in (("1", 26), ("2", 32), ("3", 40)):
        add(right)
        if number != "2":
            tracking.client().set_model_version_tag(
                "adfm", number, "gate_production_version", "1" if right > 26 else "none"
            )
            promote(number, PARAMS)
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
    assert [entry["version"] for entry in history(PARAMS)] == [winner]


def _hold(lock: str, held: multiprocessing.synchronize.Event, release: multiprocessing.synchronize.Event) -> None:
    with FileLock(lock):
        held.set()
        release.wait(60)


def test_another_process_that_promotes_is_waited_for_and_named(store, add, monkeypatch):
    add(28)
    monkeypatch.setattr(promotion, "_PATIENCE", 0.2)
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(store / "mlflow.db.lock"), held, release))
    other.start()
    try:
        assert held.wait(60)
        with pytest.raises(AdfmError, match=r"Another promotion has held .*mlflow\.db\.lock for 0\.2 s"):
            promote("1", PARAMS)
        assert aliases() == {}
    finally:
        release.set()
        other.join()
    promote("1", PARAMS)
    assert aliases() == {"production": "1"}


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
    assert [entry["by"] for entry in history(PARAMS)] == ["Ada", "Ada", "Grace"]
    assert list((tmp_path / "server" / "files").rglob("adapter_model.safetensors"))
    assert not (tmp_path / "mlflow.db").exists() and not (tmp_path / "mlartifacts").exists()


@pytest.mark.parametrize("act", [lambda: promote("1", PARAMS), lambda: rollback(PARAMS), lambda: history(PARAMS)])
def test_server_that_is_not_there(monkeypatch, act):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(AdfmError, match=r"MLflow at http://127\.0\.0\.1:9 failed"):
        act()
