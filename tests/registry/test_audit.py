from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from adfm import signing, tracking
from adfm.cli import main
from adfm.params import Params
from adfm.registry.audit import AuditFailed, audit
from adfm.registry.history import BrokenHistory
from adfm.registry.promotion import confirm_keys, history
from adfm.registry.reconcile import reconcile

PARAMS = Params()


def files_of(store: Path, number: str) -> Path:
    model = tracking.client().get_model_version("adfm", number).source.removeprefix("models:/")
    return store / "mlartifacts" / "models" / model / "artifacts"


@pytest.fixture
def plant(store: Path, two_promotions: None) -> Path:
    """Version 2 in production, version 1 previous and anchor."""
    return store


def test_all_is_well(plant, capsys):
    assert main(["audit"]) == 0
    text = capsys.readouterr().out.splitlines()[-5:]
    assert text[0] == "adfm: everything is as the signed history says"
    assert text[1] == "  - history: 5 signed steps, each naming the one before"
    assert [line.split(":")[0] for line in text[2:]] == ["  - production", "  - previous", "  - anchor"]


def test_nothing_is_well_too(store):
    assert audit("adfm").splitlines() == [
        "adfm: everything is as the signed history says",
        "  - history: 0 signed steps, each naming the one before",
    ]


def test_everything_that_is_wrong_is_listed_and_nothing_is_changed(plant, capsys):
    client = tracking.client()
    for number, file in (("1", "MLmodel"), ("2", "model/adfm.json")):
        path = files_of(plant, number) / file
        path.write_text(path.read_text() + " ")
    client.set_registered_model_alias("adfm", "production", "1")
    client.create_model_version("adfm-history", "s3://x/y", tags={"action": "promote", "version": "1"})
    with pytest.raises(AuditFailed) as failed:
        audit("adfm")
    message = str(failed.value)
    assert failed.value.exit_code == 2
    for text in (
        "adfm-history, version 6: it is not signed; it counts for nothing",
        "production: version 2: .*changed: model/adfm.json",
        "previous: version 1: .*changed: MLmodel",
        "anchor: version 1: .*changed: MLmodel",
        "the alias production is on 1, and the history says 2",
        "in order: history: 5 signed steps",
    ):
        assert re.search(text, message), text
    assert client.get_registered_model("adfm").aliases["production"] == 1
    assert main(["audit"]) == 2


def test_a_broken_history_fails_the_audit(plant):
    tracking.client().delete_model_version("adfm-history", "3")
    with pytest.raises(AuditFailed, match=r"has a gap: step 4 follows one"):
        audit("adfm")


def test_files_that_were_signed_again_are_not_those_that_were_promoted(plant, tmp_path):
    folder = files_of(plant, "2")
    (folder / "lineage.json").write_text((folder / "lineage.json").read_text() + " ")
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model.sig").unlink()
    signing.sign(copy, signing.keys())
    shutil.copy(copy / "model.sig", folder / "model.sig")
    with pytest.raises(AuditFailed, match="production: version 2: its files are not those with which it came into"):
        audit("adfm")


def test_a_new_key_of_the_service_takes_over(plant, tmp_path, monkeypatch, capsys):
    old = signing.keys()
    monkeypatch.setattr(signing, "FOLDER", tmp_path / "new-keys")
    new = signing.keys()
    (new.folder / "service" / "retired").mkdir()
    shutil.copy(old.folder / "service" / "own.pem", new.folder / "service" / "retired" / "old.pem")
    shutil.copy(old.folder / "submitters" / "own.pem", new.folder / "submitters" / "old.pem")
    with pytest.raises(BrokenHistory, match="confirm them with `adfm keys rotate`"):
        reconcile(tracking.client(), "adfm")
    assert main(["keys", "rotate", "--by", "Ada"]) == 0
    step = history("adfm").counting[-1]
    assert (step.action, step.by) == ("keys", "Ada")
    assert step.why == f"key {new.id} of the service confirms the steps up to 5"
    assert reconcile(tracking.client(), "adfm").history.production == "2"
    assert "everything is as the signed history says" in audit("adfm")
    # The old key is not one to confirm with.
    monkeypatch.setattr(signing, "FOLDER", old.folder)
    (old.folder / "service" / "own.pem").unlink()
    with pytest.raises((signing.BadKey, BrokenHistory)):
        confirm_keys("adfm")
