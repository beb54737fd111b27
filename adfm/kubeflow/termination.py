"""The termination message of a container: one line about why it ended, for the notification.

Kubernetes keeps it in the container's status (`state.terminated.message`, at most 4096 bytes), and Argo Workflows puts
it behind the exit code: `main: Error (exit code 1): <line>` (`inferFailedReason` in workflow/controller/operator.go,
Argo 4.0), where `adfm.kubeflow.workflows` reads it.
"""

import os
from contextlib import suppress
from pathlib import Path

from adfm.text import one_line

FILE = Path("/dev/termination-log")

_LONGEST = 1000  # characters


def leave(text: str) -> None:
    """Write a text in one line (`one_line`) as the termination message of this container; never fail.

    Outside a pod nothing is written. A later line replaces an earlier one.
    """
    line = one_line(text)
    with suppress(OSError), os.fdopen(os.open(FILE, os.O_WRONLY | os.O_TRUNC), "wb") as stream:
        stream.write(line[:_LONGEST].encode(errors="backslashreplace"))
