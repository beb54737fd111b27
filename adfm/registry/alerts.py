"""Alerts to the Slack-compatible webhook `ADFM_ALERT_WEBHOOK`, whose address is a secret and appears in no message."""

import html
import json
import os
import sys
import time
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from adfm.process.environment import ca_remedy
from adfm.text import shortened

_TIMEOUT = 5  # seconds
_PAUSE = 2  # seconds before the second and last try
_LONGEST = 3000  # characters; Slack refuses longer texts


def announce(text: str) -> None:
    """Print a message, and send it as an alert."""
    print(text)
    alert(text)


def alert(text: str) -> None:
    """Post `{"text": text}` to `ADFM_ALERT_WEBHOOK`; a failure is reported on stderr and changes nothing else."""
    address = os.environ.get("ADFM_ALERT_WEBHOOK", "").strip()
    if not address:
        return
    if not address.startswith(("http://", "https://")):
        print("adfm: no alert was sent: ADFM_ALERT_WEBHOOK is not an http(s) address", file=sys.stderr)
        return
    escaped = html.escape(shortened(text, _LONGEST), quote=False)  # `<…>` is a command to Slack
    body = json.dumps({"text": escaped}).encode()
    try:
        try:
            _post(address, body)
        except OSError as error:
            # Only an address that cannot be reached, or answers 429 or 5xx, may answer a second time.
            if isinstance(error, HTTPError) and error.code != 429 and error.code < 500:
                raise
            time.sleep(_PAUSE)
            _post(address, body)
    except (OSError, ValueError, HTTPException) as error:
        reason = str(error) if isinstance(error, OSError) else type(error).__name__  # others quote the address
        if isinstance(error, HTTPError) and error.code < 400:
            reason += "; it should be the address that this one redirects to"
        print(f"adfm: no alert was sent: ADFM_ALERT_WEBHOOK failed: {reason}.{ca_remedy(error)}", file=sys.stderr)


class _NoRedirect(HTTPRedirectHandler):
    # A redirect is an error: urllib would follow it with a GET, without the message, and take its 200 for success.
    def redirect_request(self, *_: Any) -> None:
        return None


def _post(address: str, body: bytes) -> None:
    request = Request(address, body, {"Content-Type": "application/json"})
    with build_opener(_NoRedirect).open(request, timeout=_TIMEOUT):
        pass
