"""The approvals service: every few seconds it does what submitters and reviewers have asked for in MLflow.

It makes versions of submissions, registers a policy that a reviewer has set, promotes what is approved, and writes down
what is rejected. It only asks MLflow and listens on no port. After each look that went well it touches a file, by whose
age `adfm approvals health` tells whether it is well.
"""

from __future__ import annotations

import functools
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

from adfm import tracking
from adfm.errors import AdfmError
from adfm.params import Params
from adfm.registry import reconcile
from adfm.registry.promotion import promote_approved
from adfm.registry.reconcile import Refused
from adfm.registry.registration import NoPolicy, accept
from adfm.text import printable

POLL = 5.0
"""Seconds between two looks at MLflow."""

HEARTBEAT = Path("approvals.heartbeat")
"""The file that is touched, in the working folder."""

_LATE = 300  # seconds without a look that went well, besides the polls: files may be large


def serve(params: Params, poll: float = POLL) -> None:
    """Looks at MLflow every `poll` seconds, until SIGTERM or SIGINT; what it is doing then is finished first.

    What is cut off all the same is completed by the next promotion, rollback or service.

    Args:
        params: Reads `register`.
        poll: Seconds.

    Raises:
        AdfmError: `poll` is not more than 0.
    """
    if not 0 < poll < float("inf"):
        raise AdfmError(f"--poll {poll:g}: more than 0 seconds should lie between two looks at MLflow.")
    over = threading.Event()

    def end(*_: object) -> None:
        over.set()

    before = [(each, signal.signal(each, end)) for each in (signal.SIGTERM, signal.SIGINT)]
    try:
        _say(f"approvals of {params.mlflow.registered_model}: looking at MLflow every {poll:g} s")
        problem = "it has not looked at MLflow yet"
        while not over.is_set():
            now = look(params)
            if now and now != problem:
                _say(now)
            if problem and not now:
                _say("MLflow answers")
            problem = now
            if not problem:
                HEARTBEAT.touch()
            over.wait(poll)
        HEARTBEAT.unlink(missing_ok=True)
    finally:
        for each, handler in before:
            signal.signal(each, handler)


def look(params: Params) -> str:
    """Does once what there is to do.

    Returns:
        What is wrong; empty when all is well. That an approval was refused, or a policy is missing, is not wrong.
    """
    by, problems = f"adfm approvals on {socket.gethostname()}", []

    def accept_all() -> None:
        with reconcile.client() as store:
            accept(store, params)

    for act in (accept_all, lambda: promote_approved(params.mlflow.registered_model, by)):
        try:
            act()
        except NoPolicy as error:
            _say_once(str(error))
        except Refused as error:
            _say(str(error))
        except AdfmError as error:
            problems.append(str(error))
        except ModuleNotFoundError:  # no later look would have it
            raise
        except Exception:  # the service continues; its health tells
            problems.append(traceback.format_exc())
    sys.stdout.flush()
    return "\n".join(dict.fromkeys(problems))


def health(poll: float = POLL) -> None:
    """Checks that a service in this working folder has looked at MLflow lately, for a probe.

    Raises:
        AdfmError: It has not.
    """
    most = 3 * poll + _LATE
    try:
        age = time.time() - HEARTBEAT.stat().st_mtime
    except OSError as error:
        raise AdfmError(f"{HEARTBEAT}: {error.strerror}; no look at MLflow has gone well yet.") from error
    if age > most:
        raise AdfmError(f"the last look at MLflow that went well was {age:.0f} s ago; its output says what is wrong.")
    print(f"the last look at MLflow that went well was {age:.0f} s ago")


@functools.cache
def _say_once(text: str) -> None:
    _say(text)


def _say(text: str) -> None:
    print(tracking.now(), printable(text), flush=True)
