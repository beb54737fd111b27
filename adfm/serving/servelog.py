"""The log of a served version: JSON lines that count answers, refusals, and differences to a shadow.

`ADFM_SERVE_LOG` names the file. Without it, everything but the counts of answered requests is written to stderr. A line
has `event`, `time` (UTC) and `version`, and by `event`:

- `answered`: a request; `labels` counts its images by label.
- `cannot judge`: one image; `image` is the SHA-256 of its file, `kind` is for counting (`adfm.evaluation.guard`, or
  `no answer`), and `reason` for people.
- `compared`: images that the shadow answered as well; `images`, and of those `differ`.
- `differs`: one of these; `image`, `in` (`label` or `boxes`), `production` and `shadow` with both answers.
- `dropped`: `images` that the shadow had no time for.
- `failed`: `images` that the shadow failed at, and why (`reason`).
"""

import json
import os
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adfm.errors import AdfmError
from adfm.text import printable

FILE = "ADFM_SERVE_LOG"
_ROUTINE = ("answered", "compared")  # too many for stderr
_LATEST = 20  # images with a difference that are listed


class BadLog(AdfmError):
    """A file is not a log of a served version, or cannot be read or written."""

    exit_code = 2


def check() -> None:
    """Raise `BadLog` if the file named by `ADFM_SERVE_LOG` cannot be written; called when a version is loaded."""
    file = os.environ.get(FILE)
    if not file:
        return
    try:
        Path(file).open("a").close()
    except OSError as error:
        raise BadLog(f"{FILE}: {file} cannot be written ({error.strerror}); name a file that can.") from error


def write(events: Iterable[tuple[str, dict[str, Any]]], version: str) -> None:
    """Append events, each a name and its values, about a version (`adfm/7`); never fail, as an answer depends on it."""
    about = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "version": version}
    lines = [(event, json.dumps({"event": event, **about, **values})) for event, values in events]
    file = os.environ.get(FILE)
    if file:
        try:
            # Opened for each request and written at once: processes may share it, and it may be moved away.
            with Path(file).open("a", encoding="utf-8") as log:
                log.write("".join(f"{line}\n" for _, line in lines))
            return
        except OSError as error:
            print(f"adfm: {FILE}: {file} cannot be written ({error.strerror})", file=sys.stderr)
    for event, line in lines:
        if event not in _ROUTINE:
            print(line, file=sys.stderr)


def read(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Yield the lines of logs, in their order.

    Raises:
        BadLog: A file cannot be read, or a line is not one of a log; a last line that was cut off is left out.
    """
    for file in files:
        try:
            with file.open(encoding="utf-8") as log:
                for number, line in enumerate(log, 1):
                    try:
                        entry = json.loads(line)
                        if not (isinstance(entry, dict) and isinstance(entry["event"], str)):
                            raise ValueError
                    except (ValueError, LookupError) as error:
                        if line.endswith("\n"):  # else it is being written
                            message = f"{file}, line {number}: it is not a line of a log that {FILE} names."
                            raise BadLog(message) from error
                    else:
                        yield entry
        except (OSError, UnicodeDecodeError) as error:
            raise BadLog(f"{file} cannot be read ({error}).") from error


def summary(entries: Iterable[dict[str, Any]]) -> str:
    """Count answers, refusals by kind, and differences between production and shadow, and list the latest of these.

    Raises:
        BadLog: A line lacks what its event has.
    """
    latest: deque[str] = deque(maxlen=_LATEST)
    labels, kinds, shadow, changes = (Counter[str]() for _ in range(4))
    for entry in entries:
        try:
            event = entry["event"]
            if event == "answered":
                labels.update({str(label): int(count) for label, count in entry["labels"].items()})
            elif event == "cannot judge":
                kinds[str(entry["kind"])] += 1
            elif event == "differs":
                own, other = (str(entry[side]["label"]) for side in ("production", "shadow"))
                changes[f"{own}, shadow {other}" if own != other else f"both {own}, boxes apart"] += 1
                latest.append(f"  {entry['time']}  {entry['image']}  {own}, shadow {other}")
            elif event in ("compared", "dropped", "failed"):
                shadow[event] += int(entry["images"])
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise BadLog(f"{json.dumps(entry)[:300]} is not a line of a log that {FILE} names.") from error
    answered, compared = labels.total(), shadow["compared"]
    lines = [_line("images answered", answered), *_counts(labels, answered)]
    if kinds:
        lines += ["why they cannot be judged", *_counts(kinds, answered)]
    if shadow:
        lines += [_line("images of the shadow", compared), *_counts(changes, compared)]
        lines += [_line(f"  {event}", shadow[event]) for event in ("dropped", "failed") if shadow[event]]
    if latest:
        lines += ["latest differences (time, SHA-256 of the image's file)", *latest]
    return "\n".join(map(printable, lines))


def _counts(counts: Counter[str], total: int) -> list[str]:
    return [
        _line(f"  {name}", count) + (f" {count / total:8.2%}" if total else "") for name, count in counts.most_common()
    ]


def _line(name: str, count: int) -> str:
    return f"{name:36} {count:>9,}"
