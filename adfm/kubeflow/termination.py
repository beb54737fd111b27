"""The termination message of a container: one line about why it ended, for the notification.

Kubernetes keeps at most 4096 bytes of it in the container's status (`state.terminated.message`). Argo Workflows 4.0
puts it behind the exit code, `main: Error (exit code 1): <line>` (`inferFailedReason` in controller/operator.go).
"""

import os
from contextlib import suppress
from pathlib import Path

from adfm.text import one_line

FILE = Path("/dev/termination-log")


def leave(text: str) -> None:
    """Write a text in one line (`one_line`) as the termination message of this container; never fail.

    Outside a pod nothing is written. A later line replaces an earlier one.
    """
    line = one_line(text)
    with suppress(OSError), os.fdopen(os.open(FILE, os.O_WRONLY | os.O_TRUNC), "wb") as stream:
        stream.write(line[:1000].encode(errors="backslashreplace"))  # characters of at most 4 bytes
