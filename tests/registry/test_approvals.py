from __future__ import annotations

import base64
import hashlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from adfm import tracking
from adfm.errors import AdfmError
from adfm.params import Params
from adfm.registry import approvals
from adfm.registry.approvals import Watch, application, forged, register_webhook
from adfm.registry.promotion import history, promote, promote_approved, rollback
from adfm.registry.registration import read_artifact

SECRET = "a secret of the tests"
PARAMS = Params()


def event(model: str = "adfm", key: str = "approval", kind: str = "model_version_tag") -> bytes:
    data = {"name": model, "version": "1", "key": key, "value": "approved"}
    return json.dumps({"entity": kind, "action": "set", "timestamp": "now", "data": data}).encode()


def signed(body: bytes, delivery: str = "d1", at: float | None = None, secret: str = SECRET) -> dict[str, str]:
    """Headers as MLflow makes them."""
    sent = str(int(time.time() if at is None else at))
    digest = hmac.new(secret.encode(), f"{delivery}.{sent}.{body.decode()}".encode(), hashlib.sha256).digest()
    signature = "v1," + base64.b64encode(digest).decode()
    return {"X-MLflow-Delivery-Id": delivery, "X-MLflow-Timestamp": sent, "X-MLflow-Signature": signature}


@pytest.fixture
def watch() -> Watch:
    return Watch(PARAMS, poll=3600)


@pytest.fixture
def client(watch: Watch) -> Iterator[TestClient]:
    with TestClient(application(watch, SECRET, PARAMS)) as client:
        yield client


def test_a_webhook_of_mlflow_rings_once(client, watch):
    headers = signed(event())
    assert client.post("/", content=event(), headers=headers).status_code == 202
    assert watch.bell.is_set()
    watch.bell.clear()
    again = client.post("/", content=event(), headers=headers)
    assert (again.status_code, again.json()) == (200, {"detail": "it came before"})
    assert not watch.bell.is_set()
    assert client.post("/", content=event(), headers=signed(event(), "d2")).status_code == 202


def test_a_signature_of_mlflow_itself_is_taken(client):
    from mlflow.webhooks.delivery import _generate_hmac_signature

    sent = str(int(time.time()))
    signature = _generate_hmac_signature(SECRET, "d1", sent, event().decode())
    headers = {"X-MLflow-Delivery-Id": "d1", "X-MLflow-Timestamp": sent, "X-MLflow-Signature": signature}
    assert client.post("/", content=event(), headers=headers).status_code == 202


@pytest.mark.parametrize(
    ("body", "headers", "status", "says"),
    [
        (event(), dict, 401, "lacks the headers"),
        (event(), lambda: signed(event(), secret="another"), 401, "signature"),
        (event(), lambda: signed(event("other")), 401, "signature"),
        (event(), lambda: signed(event()) | {"X-MLflow-Delivery-Id": "d2"}, 401, "signature"),
        (event(), lambda: signed(event()) | {"X-MLflow-Signature": "v1,not base64"}, 401, "signature"),
        (event(), lambda: signed(event()) | {"X-MLflow-Signature": "v2,AAAA"}, 401, "lacks the headers"),
        (event(), lambda: signed(event()) | {"X-MLflow-Timestamp": "soon"}, 401, "lacks the headers"),
        (event(), lambda: signed(event(), at=1e9), 401, "clocks differ"),
        (event(), lambda: signed(event(), at=9e9), 401, "clocks differ"),
        (b"[]", lambda: signed(b"[]"), 400, "body"),
        (b"{", lambda: signed(b"{"), 400, "body"),
        (b" " * 1_000_001, dict, 413, "bytes"),
    ],
)
def test_what_is_forged_replayed_or_broken_does_not_ring(client, watch, body, headers, status, says, capsys):
    answer = client.post("/", content=body, headers=headers())
    assert answer.status_code == status
    assert says in answer.json()["detail"]
    assert says in capsys.readouterr().out
    assert not watch.bell.is_set()


@pytest.mark.parametrize(("minutes", "status"), [(-6, 401), (-4, 202), (4, 202), (6, 401)])
def test_clocks_that_differ_by_minutes(client, minutes, status):
    headers = signed(event(), at=time.time() + 60 * minutes)
    assert client.post("/", content=event(), headers=headers).status_code == status


@pytest.mark.parametrize("body", [event("other"), event(key="promoted_at"), event(kind="prompt_version_tag")])
def test_what_is_not_about_an_approval_does_not_ring(client, watch, body):
    assert client.post("/", content=body, headers=signed(body)).status_code == 200
    assert not watch.bell.is_set()


@given(
    st.dictionaries(st.sampled_from(["x-mlflow-delivery-id", "x-mlflow-timestamp", "x-mlflow-signature"]), st.text())
)
def test_no_headers_pass_without_the_secret(headers):
    assert forged(headers, event(), SECRET, 0.0)


def test_health(client, watch, monkeypatch):
    assert client.get("/health").status_code == 503
    looks = iter([AdfmError("MLflow is away"), RuntimeError("a bug"), None])
    looked = threading.Event()

    def look(params: Params, by: str) -> bool:
        outcome = next(looks)
        looked.set()
        if outcome:
            raise outcome
        return False

    def wait_for(status: int, text: str) -> None:
        deadline = time.monotonic() + 30
        while text not in (answer := client.get("/health")).text or answer.status_code != status:
            assert time.monotonic() < deadline, answer.text
            time.sleep(0.01)

    monkeypatch.setattr(approvals, "promote_approved", look)
    watch.start()
    wait_for(503, "MLflow is away")
    watch.bell.set()
    wait_for(503, "a bug")
    watch.bell.set()
    wait_for(200, "ok")
    watch.stop()


def test_the_service_wants_a_secret_and_a_free_address(monkeypatch):
    monkeypatch.delenv(approvals.SECRET, raising=False)
    with pytest.raises(AdfmError, match="ADFM_WEBHOOK_SECRET is not set"):
        approvals.serve(PARAMS, "127.0.0.1", 0, 15)
    monkeypatch.setenv(approvals.SECRET, "short")
    with pytest.raises(AdfmError, match="ADFM_WEBHOOK_SECRET is too short"):
        register_webhook("http://127.0.0.1:9/", PARAMS)
    monkeypatch.setenv(approvals.SECRET, SECRET)
    with pytest.raises(AdfmError, match="more than 0 seconds"):
        approvals.serve(PARAMS, "127.0.0.1", 0, float("nan"))
    with pytest.raises(AdfmError, match="--port 99999"):
        approvals.serve(PARAMS, "127.0.0.1", 99999, 15)
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(AdfmError, match=r"127\.0\.0\.1:\d+ cannot be listened on"),
    ):
        approvals.serve(PARAMS, "127.0.0.1", taken.getsockname()[1], 15)


class Channel(BaseHTTPRequestHandler):
    said: ClassVar[list[str]] = []
    status = 200

    def do_POST(self) -> None:
        self.said.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def channel(monkeypatch) -> Iterator[type[Channel]]:
    """A chat channel that is alerted."""
    Channel.said, Channel.status = [], 200
    with HTTPServer(("127.0.0.1", 0), Channel) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        monkeypatch.setenv("ADFM_ALERT_WEBHOOK", f"http://127.0.0.1:{http.server_port}/a-secret")
        yield Channel
        http.shutdown()
        thread.join()


def test_alerts_of_a_whole_life(store, add, channel):
    add(20)
    add(28, approve=False)
    tracking.client().set_model_version_tag("adfm", "2", "approval", "rejected")
    tracking.client().set_model_version_tag("adfm", "2", "approval_reason", "misses <!channel> & co")
    promote(add(30), PARAMS, "Ada")
    promote(add(38), PARAMS, "Ada")
    with pytest.raises(AdfmError):
        promote_approved(PARAMS)
    rollback(PARAMS, "Grace", why="false alarms")
    heads = [text.splitlines()[0] for text in channel.said]
    assert heads[0] == "version 1 of adfm: gate failed"
    assert heads[1:3] == ["version 2 of adfm: gate passed", "version 3 of adfm: gate passed"]
    assert heads[3].startswith("adfm: version 3 is in production, in place of none; promoted by Ada.")
    assert heads[4:6][1].startswith("adfm: version 4 is in production, in place of 3; promoted by Ada.")
    assert heads[6] == "adfm: version 2 was rejected: misses &lt;!channel&gt; &amp; co"
    assert heads[7].startswith(
        "adfm: version 1 was approved and cannot be promoted: its gate compared it with version none"
    )
    assert heads[7].endswith("decided again against version 4: gate failed; it cannot be promoted")
    assert heads[8] == "adfm: rolled back from version 4 to 3 by Grace. false alarms"
    assert len(heads) == 9


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:9/s3cret", "file:///etc/s3cret", "http://[s3cret", "https://s3 c"]
)
def test_an_alert_that_fails_is_told_without_its_address(monkeypatch, capsys, address):
    from adfm.registry.alerts import alert

    monkeypatch.setenv("ADFM_ALERT_WEBHOOK", address)
    alert("version 1 is in production")
    told = capsys.readouterr().err
    assert told.startswith("adfm: no alert was sent: ADFM_ALERT_WEBHOOK ")
    assert "s3" not in told


def test_an_alert_that_is_refused_fails_nothing(channel, capsys):
    from adfm.registry.alerts import alert

    channel.status = 404
    alert("x" * 10_000)
    assert "404" in capsys.readouterr().err
    assert [len(text) for text in channel.said] == [3000]


def test_fifty_promotions_that_race(server, add, monkeypatch):
    """Of five versions, all decided on with nothing in production; ten at a time."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "200")
    params = Params.model_validate({"register": {"model": "race"}})
    versions = [add(right, model="race") for right in (26, 28, 30, 32, 34)]

    def run(number: str) -> str:
        try:
            promote(number, params, by="a racer")
        except AdfmError as error:
            return str(error)
        return number

    with ThreadPoolExecutor(10) as threads:
        outcomes = list(threads.map(run, versions * 10))
    won = [outcome for outcome in outcomes if outcome in versions]
    assert len(outcomes) == 50 and len(won) == 1
    assert [lost for lost in outcomes if lost not in versions and "cannot be promoted" not in lost] == []
    aliases = tracking.client().get_registered_model("race").aliases
    assert {alias: str(number) for alias, number in aliases.items()} == {"production": won[0]}
    steps = history(params)
    assert [step.number for step in steps] == list(range(1, len(steps) + 1))
    counted = [step for step in steps if step.action == "promote" and not step.void]
    assert [(step.version, step.finished) for step in counted] == [(won[0], True)]
    assert sum(step.action in ("refuse", "decide") for step in steps) == 49
    assert {step.version for step in steps if step.action == "decide"} == {*versions} - {*won}
    for number in {*versions} - {*won}:  # whoever decided anew: it is one decision, and waits for an approval
        version = tracking.client().get_model_version("race", number)
        assert (version.tags["approval"], version.tags["gate_production_version"]) == ("pending", won[0])
        decided = read_artifact(version, "gate.json")
        assert hashlib.sha256(decided.encode()).hexdigest() == version.tags["gate_digest"]


def production(model: str) -> str | None:
    found = tracking.client().get_registered_model(model).aliases.get("production")
    return None if found is None else str(found)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_webhook_of_the_server_moves_production(server, add, service):
    address = service("belt")
    params = Params.model_validate({"register": {"model": "belt"}})
    register_webhook(f"{address}/", params)
    register_webhook(f"{address}/", params)
    assert [webhook.url for webhook in tracking.client().list_webhooks()].count(f"{address}/") == 1
    add(26, model="belt")
    wait_for(lambda: production("belt") == "1")
    assert history(params)[0].by.startswith("adfm approvals on ")


def test_without_webhooks_the_service_looks_by_itself(server, add, service):
    service("drum", poll=0.5)
    add(26, model="drum")
    wait_for(lambda: production("drum") == "1")


def test_a_webhook_that_does_not_arrive_is_told(server, monkeypatch):
    monkeypatch.setenv(approvals.SECRET, SECRET)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    with pytest.raises(AdfmError, match=r"adfm-approvals, and its test of http://127\.0\.0\.1:9/ failed"):
        register_webhook("http://127.0.0.1:9/", PARAMS)
    for webhook in tracking.client().list_webhooks():
        tracking.client().delete_webhook(webhook.webhook_id)
