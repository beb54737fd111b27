"""Retries inside a pod, with backoff, of work that failed by a transient network error."""

import errno
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from adfm.errors import Unreachable
from adfm.process import pod

T = TypeVar("T")

_TYPES = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLEOFError, ssl.SSLZeroReturnError)
_ERRNOS = {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH}


def again(work: Callable[[], T], what: str, tries: int = 5, pause: float = 10.0) -> T:
    """In a pod, retry work on `Unreachable`, with pauses of 10, 20, 40 and 80 s by default; elsewhere run it once.

    Args:
        work: A function that resumes, or can be called twice.
        what: Its name in the log, which gets a line for every try that failed.
        tries: How often to try, the first time included.
        pause: Seconds before the second try; each later pause is twice the one before.

    Raises:
        Unreachable: The last try's. Every other exception is raised at once.
    """
    # Kubeflow Pipelines does not retry a failed task (docs/training.md). In a terminal a wrong address shows at once.
    for number in range(1, tries if pod.inside() else 1):
        try:
            return work()
        except Unreachable as error:
            reason = str(error).splitlines()[0]
            print(f"{what}: try {number} of {tries} failed, the next is in {pause:g} s: {reason}", flush=True)
        time.sleep(pause)
        pause *= 2
    return work()


def may_pass(error: BaseException, *types: type[BaseException]) -> bool:
    """Return whether an error of a client is transient: the same call may succeed in a minute.

    It is if a connection was refused, reset or timed out, a name was not resolved, or a server replied with a status
    that `is_transient`. Wrong keys, names, addresses and certificates are not.

    Args:
        error: What the client raised.
        types: Further transient errors of the client, which do not come from one of a socket.
    """
    # boto3, requests, httpx, aiohttp and dulwich wrap the socket's error.
    for each in causes(error):
        status = _status(each)
        if status is not None:  # a server replied: what went wrong before does not count
            return is_transient(status)
        if isinstance(each, (*_TYPES, *types)) or (isinstance(each, OSError) and each.errno in _ERRNOS):
            return True
    return False


def is_transient(status: int) -> bool:
    """Return whether an HTTP status is transient: timeout (408), too many requests (429), 5xx but 501."""
    return status in (408, 429) or (500 <= status < 600 and status != 501)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and those that it was raised from or while handling, or that it holds, the newest first."""
    while error is not None:
        yield error
        within = next((each for each in error.args if isinstance(each, BaseException)), None)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__) or within


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error: botocore's `ClientError`, those of requests and httpx, and aiohttp's."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(response, "status_code", getattr(error, "status", None))
    return status if isinstance(status, int) else None
