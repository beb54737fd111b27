"""What is submitted for which event of GitHub."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from adfm.errors import AdfmError
from pipelines import trigger
from pipelines.trigger import arguments

COMMIT = "a" * 40
LOCK = "stages:\n  fetch:\n    outs:\n    - path: data/raw/line\n      md5: 0123.dir\n"


def arguments_of(event: str, payload: dict[str, Any], lock: Path) -> list[str]:
    return arguments(event, payload, "https://github.com/someone/line", COMMIT, lock)


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    (tmp_path / "dvc.lock").write_text(LOCK)
    return tmp_path / "dvc.lock"


def test_a_changed_lock_is_trained_on_at_its_commit(lock: Path) -> None:
    source = f"fetch.source=dvc://https://github.com/someone/line@{COMMIT}:data/raw/line"
    assert arguments_of("push", {}, lock) == ["--data-revision", "0123.dir", "--set", source]


def test_a_bucket_says_what_is_new(lock: Path) -> None:
    payload = {"client_payload": {"source": "s3://bucket/line", "revision": "7f3"}}
    assert arguments_of("repository_dispatch", payload, lock) == [
        *("--data-revision", "7f3", "--set", "fetch.source=s3://bucket/line")
    ]


def test_by_hand_settings_are_chosen_and_a_schedule_has_none(lock: Path) -> None:
    payload = {"inputs": {"arguments": "--set train.steps=50 --num-gpus 2"}}
    assert arguments_of("workflow_dispatch", payload, lock) == ["--set", "train.steps=50", "--num-gpus", "2"]
    assert arguments_of("workflow_dispatch", {"inputs": None}, lock) == []
    assert arguments_of("schedule", {}, lock) == []


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"stages: {}", b"stages: {fetch: {outs: []}}", b"[", b"\xff"),
        LOCK.replace("0123.dir", "null").encode(),
        f"<<<<<<< HEAD\n{LOCK}=======\n{LOCK}>>>>>>> line\n".encode(),
    ],
)
def test_a_lock_without_data_is_reported(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "dvc.lock").write_bytes(text)
    with pytest.raises(AdfmError, match="does not have the output of the stage fetch"):
        arguments_of("push", {}, tmp_path / "dvc.lock")


def test_an_event_that_lacks_something_is_reported(lock: Path) -> None:
    with pytest.raises(AdfmError, match="client_payload"):
        arguments_of("repository_dispatch", {"client_payload": {"source": "s3://bucket/line"}}, lock)
    with pytest.raises(AdfmError, match="nothing is trained for the event 'issues'"):
        arguments_of("issues", {}, lock)


def test_a_quotation_mark_that_is_not_closed_is_reported(lock: Path) -> None:
    with pytest.raises(AdfmError, match="the input `arguments`: No closing quotation in"):
        arguments_of("workflow_dispatch", {"inputs": {"arguments": "--set 'train.steps=50"}}, lock)


def test_without_an_event_it_says_where_it_belongs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_EVENT_PATH", raising=False)
    with pytest.raises(SystemExit, match="no event of GitHub Actions here"):
        runpy.run_path(str(trigger.__file__), run_name="__main__")
