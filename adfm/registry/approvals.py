"""The approvals service: follows what reviewers decide in MLflow, within seconds.

MLflow's webhook only rings the bell. What it says is not believed: the service then looks at MLflow itself, as it does
every few seconds anyway, because MLflow keeps its webhooks in memory and gives up after three tries. So a webhook that
is forged, replayed or lost can move nothing; the signature keeps strangers from ringing.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from adfm import tracking
from adfm.errors import AdfmError
from adfm.params import Params
from adfm.registry.promotion import Refused, promote_approved

if TYPE_CHECKING:
    from mlflow.entities.webhook import Webhook
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

SECRET = "ADFM_WEBHOOK_SECRET"
WINDOW = 300
"""Seconds that a webhook's time may differ from this machine's, either way."""

_EVENT: Literal["model_version_tag.set"] = "model_version_tag.set"
_MOST_BYTES = 1_000_000  # a tag's value has up to 100,000 characters


class Watch:
    """Looks for decisions when the bell rings, and every `poll` seconds.

    Args:
        params: Reads `register.model`.
        poll: Seconds.
    """

    def __init__(self, params: Params, poll: float) -> None:
        self.bell = threading.Event()
        self.problem = "it has not looked at MLflow yet"
        self._params, self._poll, self._over = params, poll, False
        self._looked = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="approvals", daemon=True)

    def start(self) -> None:
        """Looks for the first time, at once."""
        self.bell.set()
        self._thread.start()

    def stop(self) -> None:
        """Ends after what is being done; what is cut off is finished by the next promotion, rollback or service."""
        self._over = True
        self.bell.set()
        self._thread.join(60)

    def health(self) -> str:
        """What is wrong; empty when all is well. That an approval was refused is not wrong."""
        late = time.monotonic() - self._looked
        if late > 3 * self._poll + 120:
            return f"it has not finished looking at MLflow for {late:.0f} s"
        return self.problem

    def _run(self) -> None:
        by = f"adfm approvals on {socket.gethostname()}"
        while True:
            self.bell.wait(self._poll)
            self.bell.clear()
            if self._over:
                return
            problem = ""
            try:
                promote_approved(self._params, by)
            except Refused as error:
                _say(str(error))
            except AdfmError as error:
                problem = str(error)
            except Exception:  # the service goes on; its health tells
                problem = traceback.format_exc()
            if problem and problem != self.problem:
                _say(problem)
            if self.problem and not problem:
                _say(f"MLflow answers; looking for approvals every {self._poll:g} s and when a webhook comes")
            self.problem, self._looked = problem, time.monotonic()
            sys.stdout.flush()


def serve(params: Params, host: str, port: int, poll: float) -> None:
    """Serves `POST /` for MLflow's webhooks and `GET /health`, until it is told to end (SIGTERM, SIGINT).

    Args:
        params: Reads `register.model`.
        host: Address to listen on.
        port: Port; 0: a free one, which is printed.
        poll: Seconds between two looks at MLflow when no webhook comes.

    Raises:
        AdfmError: `ADFM_WEBHOOK_SECRET` is not set, or the address cannot be listened on.
    """
    import uvicorn

    secret = _secret()
    if not poll > 0:
        raise AdfmError(f"--poll {poll:g}: more than 0 seconds should lie between two looks at MLflow.")
    if not 0 <= port < 65536:
        raise AdfmError(f"--port {port}: a port is a number from 0 to 65535.")
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise AdfmError(
            f"{host}:{port} cannot be listened on: {error}. Choose others with --host and --port."
        ) from error
    watch = Watch(params, poll)
    server = uvicorn.Server(uvicorn.Config(application(watch, secret, params), log_level="warning", access_log=False))
    with listener:
        _say(f"approvals of {params.register_.model}: listening on http://{host}:{listener.getsockname()[1]}")
        watch.start()
        # uvicorn ends well at a signal, and then raises it once more.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            pass
        finally:
            watch.stop()


def application(watch: Watch, secret: str, params: Params) -> Starlette:
    """The web application: a webhook in order rings `watch`'s bell.

    Answers 202 to a webhook that rings, 200 to one that does not concern approvals or came before, 401 to one that is
    not signed or too old, 400 and 413 to what is not a webhook of MLflow.
    """
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    seen: dict[str, float] = {}  # delivery -> when it may be forgotten

    def answer(status: int, text: str) -> Response:
        if status >= 400:
            _say(f"webhook refused: {text}")
        return JSONResponse({"detail": text}, status)

    async def webhook(request: Request) -> Response:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > _MOST_BYTES:
                return answer(413, f"it has more than {_MOST_BYTES} bytes")
        if problem := forged(request.headers, bytes(body), secret, time.time()):
            return answer(401, problem)
        try:
            event = json.loads(body)
            data = event["data"]
            about = (f"{event['entity']}.{event['action']}", data.get("name"), data.get("key"))
        except (ValueError, KeyError, TypeError, AttributeError):
            return answer(400, "its body is not that of a webhook of MLflow")
        for delivery in [delivery for delivery, until in seen.items() if until < time.monotonic()]:
            del seen[delivery]
        delivery = request.headers["x-mlflow-delivery-id"]
        if delivery in seen:
            return answer(200, "it came before")
        seen[delivery] = time.monotonic() + 2 * WINDOW
        if about not in [(_EVENT, params.register_.model, key) for key in ("approval", "approval_reason")]:
            return answer(200, "it is not about an approval")
        watch.bell.set()
        return answer(202, "looking at MLflow")

    async def health(request: Request) -> Response:
        problem = watch.health()
        return JSONResponse({"status": problem or "ok"}, 503 if problem else 200)

    return Starlette(routes=[Route("/", webhook, methods=["POST"]), Route("/health", health)])


def forged(headers: Mapping[str, str], body: bytes, secret: str, at: float) -> str | None:
    """What is wrong with a webhook's signature; `None` if MLflow made it with this secret, just now.

    The signature is `v1,` and the base64 of HMAC-SHA256(secret, "<delivery id>.<time>.<body>"), as of
    https://www.standardwebhooks.com.

    Args:
        headers: `X-MLflow-Delivery-Id`, `X-MLflow-Timestamp` (seconds since 1970) and `X-MLflow-Signature`.
        body: The request's body.
        secret: What MLflow was given when the webhook was made.
        at: The time, in seconds since 1970.
    """
    delivery, sent = headers.get("x-mlflow-delivery-id", ""), headers.get("x-mlflow-timestamp", "")
    version, _, signature = headers.get("x-mlflow-signature", "").partition(",")
    if not (delivery and sent.isascii() and sent.isdigit() and len(sent) < 12 and version == "v1"):
        return "it lacks the headers of a signed webhook; is the secret set in MLflow?"
    expected = hmac.digest(secret.encode(), f"{delivery}.{sent}.".encode() + body, hashlib.sha256)
    try:
        given = base64.b64decode(signature, validate=True)
    except (binascii.Error, ValueError):
        given = b""
    if not hmac.compare_digest(given, expected):
        return f"its signature is not made with {SECRET}"
    if abs(at - int(sent)) > WINDOW:
        return (
            f"it was sent {at - int(sent):.0f} s ago by the sender's clock, and {WINDOW} are allowed: it is replayed, "
            "late, or the two clocks differ"
        )
    return None


def register_webhook(url: str, params: Params) -> None:
    """Makes MLflow send its webhooks to the service, and tries it; one that is there for the address is renewed.

    Args:
        url: Where MLflow reaches the service.
        params: Reads `register.model`, which names the webhook.

    Raises:
        AdfmError: `ADFM_WEBHOOK_SECRET` is not set, MLflow refuses the address, or the service did not answer well.
    """
    from mlflow import MlflowClient

    secret, name = _secret(), f"{params.register_.model}-approvals"
    uri = tracking.configure()
    with tracking.store_errors(uri), tracking.impatient(timeout=20, retries=2):
        store = MlflowClient()
        webhooks: list[Webhook] = []
        token = None
        while True:
            page = store.list_webhooks(page_token=token)
            webhooks += page
            token = page.token
            if not token:
                break
        same = next((webhook for webhook in webhooks if webhook.url == url), None)
        if same:
            webhook = store.update_webhook(same.webhook_id, name=name, events=[_EVENT], secret=secret, status="ACTIVE")
        else:
            webhook = store.create_webhook(name, url, [_EVENT], description="adfm approvals serve", secret=secret)
        result = store.test_webhook(webhook.webhook_id)
    if not result.success:
        told = result.error_message or f"it answered {result.response_status}: {result.response_body}"
        raise AdfmError(
            f"MLflow has the webhook {name}, and its test of {url} failed: {told[:300]}\nSee that the service runs "
            f"there with the same {SECRET}, and that MLflow may call it (docs/approval.md lists its settings)."
        )
    print(f"MLflow sends changes of tags to {url}; a test arrived")


def _secret() -> str:
    secret = os.environ.get(SECRET, "")
    if len(secret) < 16:
        raise AdfmError(
            f"{SECRET} is {'too short' if secret else 'not set'}: put the same random text of 16 characters or more "
            "there for `adfm approvals serve` and `register-webhook`; `openssl rand -hex 32` makes one."
        )
    return secret


def _say(text: str) -> None:
    print(tracking.now(), text, flush=True)
