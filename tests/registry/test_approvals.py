from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import mlflow
import pytest
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from adfm import tracking
from adfm.cli import main
from adfm.errors import AdfmError
from adfm.params import Params
from adfm.registry import approvals, decisions
from adfm.registry.approvals import HEARTBEAT, health, run_once, serve
from adfm.registry.promotion import history, promote, promote_approved, rollback
from adfm.registry.submission import read_artifact

PARAMS = Params()


def tag(version: str, key: str, value: str, model: str = "adfm") -> None:
    tracking.client().set_model_version_tag(model, version, key, value)


def test_an_approval_without_a_name_waits_for_it(store, add, capsys):
    """In MLflow's pages a reviewer sets one tag after the other, and the service may look in between."""
    add(26, approve=False)
    tag("1", "approval", "approved")
    assert run_once(PARAMS.mlflow) == "" and run_once(PARAMS.mlflow) == ""
    version = tracking.client().get_model_version("adfm", "1")
    assert version.tags["approval"] == "approved" and "approval_by is missing" in version.tags["approval_refused"]
    assert capsys.readouterr().out.count("is approved and waits") == 1
    assert history("adfm").production == "none"
    assert [step.action for step in history("adfm").counting] == ["policy", "judge"]
    tag("1", "approval_by", "Rita")
    assert run_once(PARAMS.mlflow) == ""
    assert history("adfm").production == "1" and history("adfm").move.approval_by == "Rita"


def test_a_look_that_fails_is_reported_and_the_rest_is_done(store, add, monkeypatch, capsys):
    def fail(*arguments: object) -> None:
        raise RuntimeError("a bug")

    add(26)
    with monkeypatch.context() as patch:
        patch.setattr(approvals, "accept", fail)
        assert "a bug" in run_once(PARAMS.mlflow)
    assert history("adfm").production == "1"
    add(30)
    monkeypatch.setattr(decisions, "judge", fail)
    assert "a bug" in run_once(PARAMS.mlflow)


def test_health(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdfmError, match="no poll of MLflow has succeeded yet"):
        health()
    HEARTBEAT.touch()
    health()
    os.utime(HEARTBEAT, (0, time.time() - 400))
    with pytest.raises(AdfmError, match="was 400 s ago"):
        health(poll=5)
    health(poll=60)
    assert main(["approvals", "health"]) == 1


def test_the_service_touches_its_heartbeat_only_when_all_is_well(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    problems = iter(["MLflow is away", "MLflow is away", "", ""])
    beats = []

    def one(params: Params) -> str:
        beats.append(HEARTBEAT.exists())
        problem = next(problems, None)
        if problem is None:
            os.kill(os.getpid(), 15)
        return problem or ""

    monkeypatch.setattr(approvals, "run_once", one)
    serve(PARAMS.mlflow, 0.01)
    assert beats == [False, False, False, True, True]
    assert not HEARTBEAT.exists()
    assert capsys.readouterr().out.count("MLflow is away") == 1


@pytest.mark.parametrize("poll", [0.0, -1.0, float("nan"), float("inf")])
def test_the_service_wants_a_pause(poll):
    with pytest.raises(AdfmError, match="more than 0 seconds"):
        serve(PARAMS.mlflow, poll)


class Channel(BaseHTTPRequestHandler):
    messages: ClassVar[list[str]] = []
    status = 200

    def do_POST(self) -> None:
        self.messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
        self.send_response(self.status)
        self.send_header("Location", "/login")
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def channel(monkeypatch) -> Iterator[type[Channel]]:
    """A chat channel that is alerted."""
    Channel.messages, Channel.status = [], 200
    with HTTPServer(("127.0.0.1", 0), Channel) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        monkeypatch.setenv("ADFM_ALERT_WEBHOOK", f"http://127.0.0.1:{http.server_port}/a-secret")
        yield Channel
        http.shutdown()
        thread.join()


def test_alerts_of_a_whole_life(store, add, channel):
    add(8, approve=False)
    add(28, approve=False)
    tag("2", "approval", "rejected")
    tag("2", "approval_reason", "misses <!channel> & co")
    promote(add(30), "adfm", "Ada")
    promote(add(38), "adfm", "Ada")
    tag("1", "approval", "yes")
    with pytest.raises(AdfmError):
        promote_approved("adfm")
    rollback("adfm", "Grace", why="false alarms")
    heads = [text.splitlines()[0] for text in channel.messages]
    begins = [
        "adfm: policy changed by ",
        "version 1 of adfm: gate failed",
        "version 2 of adfm: gate passed",
        "version 3 of adfm: gate passed",
        "adfm: version 3 is in production, in place of none; promoted by Ada.",
        "version 4 of adfm: gate passed",
        "adfm: version 4 is in production, in place of 3; promoted by Ada.",
        "adfm: version 2 was rejected: misses &lt;!channel&gt; &amp; co",
        "adfm: version 1 was approved and cannot be promoted: its tag approval is 'yes'",
        "adfm: rolled back from version 4 to 3 by Grace. false alarms",
    ]
    assert [head[: len(begin)] for head, begin in zip(heads, begins, strict=True)] == begins


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:9/s3cret", "file:///etc/s3cret", "http://[s3cret", "https://s3 c"]
)
def test_an_alert_that_fails_is_told_without_its_address(monkeypatch, capsys, address):
    from adfm.registry.alerts import alert

    monkeypatch.setattr("adfm.registry.alerts._PAUSE", 0)
    monkeypatch.setenv("ADFM_ALERT_WEBHOOK", address)
    alert("version 1 is in production")
    error = capsys.readouterr().err
    assert error.startswith("adfm: no alert was sent: ADFM_ALERT_WEBHOOK ")
    assert "s3" not in error


def test_an_alert_that_is_refused_fails_nothing(channel, capsys):
    from adfm.registry.alerts import alert

    channel.status = 404
    alert("x" * 10_000)
    assert "404" in capsys.readouterr().err
    assert [len(text) for text in channel.messages] == [3000]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_an_alert_that_is_redirected_is_not_taken_for_sent(channel, capsys, status):
    """urllib would get the page that it is sent to, without the message."""
    from adfm.registry.alerts import alert

    channel.status = status
    alert("version 1 is in production")
    assert channel.messages == ["version 1 is in production"]
    assert "should be the address that this one redirects to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("statuses", "tries"), [([429, 200], 2), ([503, 200], 2), ([500, 500, 200], 2), ([403, 200], 1)]
)
def test_an_alert_is_tried_once_more_where_that_may_help(channel, capsys, monkeypatch, statuses, tries):
    from adfm.registry.alerts import alert

    monkeypatch.setattr("adfm.registry.alerts._PAUSE", 0)
    monkeypatch.setattr(Channel, "status", property(lambda _: statuses[len(Channel.messages) - 1]))
    alert("version 1 is in production")
    assert channel.messages == ["version 1 is in production"] * tries
    assert ("no alert was sent" in capsys.readouterr().err) == (statuses[tries - 1] != 200)


def test_six_promotions_that_race(server, add, monkeypatch):
    """Of three versions, all decided on with nothing in production; all at a time."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "200")
    params = Params.model_validate({"mlflow": {"registered_model": "race"}})
    versions = [add(right, model="race") for right in (26, 30, 34)]

    def run(number: str) -> str:
        try:
            promote(number, params.mlflow.registered_model, by="a racer")
        except AdfmError as error:
            return str(error)
        return number

    with ThreadPoolExecutor(6) as threads:
        outcomes = list(threads.map(run, versions * 2))
    won = [outcome for outcome in outcomes if outcome in versions]
    assert len(outcomes) == 6 and len(won) == 1
    assert [lost for lost in outcomes if lost not in versions and "cannot be promoted" not in lost] == []
    aliases = tracking.client().get_registered_model("race").aliases
    assert {alias: str(number) for alias, number in aliases.items()} == {"production": won[0], "anchor": won[0]}
    read = history(params.mlflow.registered_model)
    assert [step.number for step in read.steps] == list(range(1, len(read.steps) + 1))
    moved = [step for step in read.counting if step.action == "promote"]
    assert [(step.version, step.finished) for step in moved] == [(won[0], True)]
    again = {step.version for step in read.counting if step.action == "judge" and step.production == won[0]}
    assert again == {*versions} - {*won}
    for number in {*versions} - {*won}:  # whoever decided again: it is one decision, and waits for an approval
        version = tracking.client().get_model_version("race", number)
        assert (version.tags["approval"], version.tags["gate_production_version"]) == ("pending", won[0])
        assert decisions.digest(json.loads(read_artifact(version, "gate.json"))) == version.tags["gate_digest"]


def test_a_file_that_is_being_written_is_read_again(monkeypatch):
    errors = [MlflowException("Connection broken: IncompleteRead(0 bytes read, 5018 more expected)")] * 2

    def download(uri: str, dst_path: str) -> str:
        if errors:
            raise errors.pop()
        (Path(dst_path) / "gate.json").write_text("whole", encoding="utf-8")
        return f"{dst_path}/gate.json"

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", download)
    monkeypatch.setattr("adfm.registry.submission.time.sleep", lambda seconds: None)
    version = ModelVersion("line", "3", 0)
    assert read_artifact(version, "gate.json") == "whole"
    errors.append(MlflowException("no such file"))
    with pytest.raises(MlflowException, match="no such file"):
        read_artifact(version, "gate.json")


def production(model: str) -> str | None:
    here = tracking.client().get_registered_model(model).aliases.get("production")
    return None if here is None else str(here)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240  # on a machine that does much else
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_service_moves_production_within_seconds_of_the_tag(server, add, service):
    add(26, approve=False, model="belt")
    service("belt", poll=5)
    wait_for(HEARTBEAT.exists)
    tag("1", "approval_by", "Rita", "belt")
    began = time.monotonic()
    tag("1", "approval", "approved", "belt")
    wait_for(lambda: production("belt") == "1")
    seconds = time.monotonic() - began
    params = Params.model_validate({"mlflow": {"registered_model": "belt"}})
    assert history(params.mlflow.registered_model).move.by.startswith("adfm approvals on ")
    print(f"from tag to alias: {seconds:.1f} s")
    assert seconds < 60
