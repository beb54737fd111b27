"""The notification of a promotion, after real ones."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from adfm.kubeflow import notification
from adfm.kubeflow.notification import PROMOTION, Status, notify
from adfm.process.pod import STARTED
from adfm.registry.promotion import promote


@pytest.fixture
def sent(monkeypatch) -> list[str]:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    messages: list[str] = []
    monkeypatch.setattr(notification, "alert", messages.append)
    return messages


def test_what_was_promoted_is_said_and_nothing_if_nothing_was(store, add, sent, monkeypatch):
    succeeded = Status("SUCCEEDED", "", "local-pipeline-exit-handler-1", "exit-handler-1")
    version = add(30)
    assert notify(PROMOTION, succeeded, "run-1", "", "") == "adfm-promotion succeeded\nrun run-1"
    assert sent == []
    promote(version, "adfm", "adfm-promotion")
    text = notify(PROMOTION, succeeded, "run-2", "", "")
    assert text.splitlines()[1] == f"version {version} of adfm was promoted to production by adfm-promotion"
    assert sent == [text]
    monkeypatch.setenv(STARTED, (datetime.now(UTC) + timedelta(seconds=1)).isoformat())  # a later run
    assert "promoted" not in notify(PROMOTION, succeeded, "run-3", "", "").splitlines()[1]
    assert sent == [text]
