"""The file by which `dvc repro` notices that another version is in production."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from adfm import tracking
from adfm.errors import AdfmError
from adfm.evaluation.evaluate import models_to_compare, read_production
from adfm.files import digest
from adfm.registry.production import in_production, write

if TYPE_CHECKING:
    from mlflow import MlflowClient


def _versions(store: MlflowClient, *digests: str) -> None:
    store.create_registered_model("adfm")
    for each in digests:
        store.create_model_version("adfm", "file:///nowhere", tags={"artifact_digest": each})


def test_without_a_store_nothing_is_in_production_and_none_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for uri in (None, f"sqlite:///{tmp_path}/other.db"):
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        if uri:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        write(tmp_path / "reports" / "production.json", "adfm")
        about = json.loads((tmp_path / "reports" / "production.json").read_text())
        assert about == {"model": "adfm", "production": None, "anchor": None}
    assert [path.name for path in tmp_path.iterdir()] == ["reports"]


def test_the_file_changes_with_the_versions_and_with_nothing_else(store: Path) -> None:
    file, client = store / "production.json", tracking.client()

    def written() -> str:
        write(file, "adfm")
        return file.read_text()

    empty = written()
    assert written() == empty
    _versions(client, "one", "two")
    assert written() == empty
    client.set_registered_model_alias("adfm", "production", "1")
    first = written()
    assert json.loads(first) == {
        "model": "adfm",
        "production": {"version": "1", "artifact_digest": "one"},
        "anchor": None,
    }
    client.set_registered_model_alias("adfm", "anchor", "1")  # the same version is compared with once
    client.set_model_version_tag("adfm", "1", "approval", "approved")
    assert written() == first
    client.set_registered_model_alias("adfm", "production", "2")
    assert json.loads(written())["anchor"] == {"version": "1", "artifact_digest": "one"}
    client.delete_registered_model_alias("adfm", "production")
    assert json.loads(written()) == {
        "model": "adfm",
        "production": None,
        "anchor": {"version": "1", "artifact_digest": "one"},
    }


def test_a_server_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(AdfmError, match=r"MLflow at http://127\.0\.0\.1:9 failed"):
        write(tmp_path / "production.json", "adfm")
    assert not list(tmp_path.iterdir())


def test_the_candidate_is_not_compared_with_itself(store: Path) -> None:
    model = store / "trained"
    model.mkdir()
    (model / "adfm.json").write_text("{}")
    _versions(tracking.client(), digest(model), "another")
    for alias, version in (("production", "2"), ("anchor", "1")):
        tracking.client().set_registered_model_alias("adfm", alias, version)
    about = in_production("adfm")
    assert models_to_compare(about, model) == {"production": "models:/adfm/2"}
    (model / "adfm.json").write_text("{ }")
    assert models_to_compare(about, model) == {"production": "models:/adfm/2", "anchor": "models:/adfm/1"}
    assert models_to_compare(about, "embedded://tiny-base").keys() == {"production", "anchor"}
    unknown = about | {"production": {"version": "3", "artifact_digest": None}}
    assert "production" in models_to_compare(unknown, "embedded://tiny-base")
    assert models_to_compare(about, "models:/adfm/2") == {"anchor": "models:/adfm/1"}
    assert models_to_compare(about, "models:/adfm@production") == {"anchor": "models:/adfm/1"}


def test_what_was_written_is_read(store: Path) -> None:
    write(store / "production.json", "adfm")
    assert read_production(store / "production.json") == in_production("adfm")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": "adfm", "production": {"version": "1"}, "anchor": null}'])
def test_a_file_that_says_something_else_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "production.json"
    file.write_text(text)
    with pytest.raises(AdfmError, match=r"production\.json cannot be read .*adfm production"):
        read_production(file)
    with pytest.raises(AdfmError, match="cannot be read"):
        read_production(tmp_path / "nowhere.json")
