"""Alerts: one line to a chat channel when the gate decides and when production moves.

`ADFM_ALERT_WEBHOOK` holds the address of a Slack-compatible webhook; without it nothing is sent. The address is a
secret and appears in no message.
"""

from __future__ import annotations

import html
import json
import os
import sys
import urllib.request
from http.client import HTTPException

_TIMEOUT = 5  # seconds
_LONGEST = 3000  # characters; Slack refuses longer texts


def alert(text: str) -> None:
    """Posts `{"text": text}` to `ADFM_ALERT_WEBHOOK`; a failure is told on stderr and changes nothing else."""
    address = os.environ.get("ADFM_ALERT_WEBHOOK", "").strip()
    if not address:
        return
    if not address.startswith(("http://", "https://")):
        print("adfm: no alert was sent: ADFM_ALERT_WEBHOOK is not an http(s) address", file=sys.stderr)
        return
    shown = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    body = json.dumps({"text": html.escape(shown, quote=False)}).encode()  # `<…>` is a command to Slack
    try:
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT):
            pass
    except (OSError, ValueError, HTTPException) as error:
        reason = str(error) if isinstance(error, OSError) else type(error).__name__  # others quote the address
        print(f"adfm: no alert was sent: ADFM_ALERT_WEBHOOK failed: {reason}", file=sys.stderr)
