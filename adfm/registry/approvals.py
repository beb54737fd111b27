"""The approvals service: polls MLflow every few seconds, and does what submitters and reviewers have requested.

It makes versions of submissions, registers the policy, promotes what is approved, and records what is rejected.
"""

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
from adfm.params import Mlflow
from adfm.registry import reconcile
from adfm.registry.promotion import promote_approved
from adfm.registry.reconcile import Refused
from adfm.registry.registration import NoPolicy, accept
from adfm.text import printable

POLL = 5.0  # seconds between two polls
HEARTBEAT = Path("approvals.heartbeat")  # every successful poll touches it: its age is the service's health
_LATE = 300  # seconds without a successful poll, besides the pauses: files may be large


def serve(place: Mlflow, poll: float = POLL) -> None:
    """Poll MLflow until SIGTERM or SIGINT, and finish what has begun then; `poll` is in seconds, and more than 0."""
    if not 0 < poll < float("inf"):
        raise AdfmError(f"--poll {poll:g}: more than 0 seconds should lie between two polls of MLflow.")
    over = threading.Event()
    before = [(each, signal.signal(each, lambda *_: over.set())) for each in (signal.SIGTERM, signal.SIGINT)]
    try:
        _log(f"approvals of {place.registered_model}: polling MLflow every {poll:g} s")
        problem = "it has not polled MLflow yet"
        while not over.is_set():
            now = run_once(place)
            if now and now != problem:
                _log(now)
            if problem and not now:
                _log("MLflow answers")
            problem = now
            if not problem:
                HEARTBEAT.touch()
            over.wait(poll)
        HEARTBEAT.unlink(missing_ok=True)
    finally:
        for each, handler in before:
            signal.signal(each, handler)


def run_once(place: Mlflow) -> str:
    """Do once what submitters and reviewers have requested.

    Returns:
        What is wrong; empty when all is well. That an approval was refused, or a policy is missing, is not wrong.
    """
    by, problems = f"adfm approvals on {socket.gethostname()}", []

    def accept_all() -> None:
        with reconcile.client() as store:
            accept(store, place)

    for act in (accept_all, lambda: promote_approved(place.registered_model, by)):
        try:
            act()
        except NoPolicy as error:
            _log_once(str(error))
        except Refused as error:
            _log(str(error))
        except AdfmError as error:
            problems.append(str(error))
        except ModuleNotFoundError:  # no later poll would have it
            raise
        except Exception:  # the service continues; its health tells
            problems.append(traceback.format_exc())
    sys.stdout.flush()
    return "\n".join(dict.fromkeys(problems))


def health(poll: float = POLL) -> None:
    """Check that a service in this working folder has polled MLflow lately, for a probe; raise AdfmError if not."""
    try:
        age = time.time() - HEARTBEAT.stat().st_mtime
    except OSError as error:
        raise AdfmError(f"{HEARTBEAT}: {error.strerror}; no poll of MLflow has succeeded yet.") from error
    if age > 3 * poll + _LATE:
        raise AdfmError(f"the last successful poll of MLflow was {age:.0f} s ago; its output says what is wrong.")
    print(f"the last successful poll of MLflow was {age:.0f} s ago")


@functools.cache
def _log_once(text: str) -> None:
    _log(text)


def _log(text: str) -> None:
    print(tracking.now(), printable(text), flush=True)
