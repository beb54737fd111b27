"""The log of a served version: JSON lines that count answers, refusals, and differences to a shadow.

`ADFM_SERVE_LOG` names the file; processes and servers may share it, and it may be moved away at any time. Without it,
everything but the counts of answered requests is written to stderr. `adfm served FILE` prints a table of it. A line has
`event`, `time` (UTC) and `version`, and by `event`:

- `answered`: a request; `labels` counts its images by label.
- `cannot judge`: one image; `image` is the SHA-256 of its file, `kind` is for counting (`adfm.evaluation.guard`, or
  `no answer`), and `reason` for people.
- `compared`: images that the shadow answered as well; `images`, and of those `differ`.
- `differs`: one of these; `image`, `in` (`label` or `boxes`), `production` and `shadow` with both answers.
- `dropped`: `images` that the shadow had no time for.
- `failed`: `images` that the shadow failed at, and why (`reason`).
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adfm.data.problems import printable
from adfm.errors import AdfmError

FILE = "ADFM_SERVE_LOG"

_ROUTINE = ("answered", "compared")  # too many for stderr


def check() -> None:
    """Refuse a log that cannot be written, when a version is loaded.

    Raises:
        AdfmError: The file named by `ADFM_SERVE_LOG` cannot be opened.
    """
    file = os.environ.get(FILE)
    if not file:
        return
    try:
        Path(file).open("a").close()
    except OSError as error:
        raise AdfmError(
            f"{FILE}: {file} cannot be written ({error.strerror}); name a file in a folder that can."
        ) from error


def write(events: Iterable[tuple[str, dict[str, Any]]], version: str) -> None:
    """Appends events, each a name and its values; never fails, because an answer depends on it.

    Args:
        events: Names as above, and the values beside `time` and `version`.
        version: The version in production, `adfm/7`.
    """
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    lines = [
        (event, json.dumps({"event": event, "time": time, "version": version, **values})) for event, values in events
    ]
    file = os.environ.get(FILE)
    if file:
        try:
            with Path(file).open("a", encoding="utf-8") as log:
                log.write("".join(f"{line}\n" for _, line in lines))
            return
        except OSError as error:
            print(f"adfm: {FILE}: {file} cannot be written ({error.strerror})", file=sys.stderr)
    for event, line in lines:
        if event not in _ROUTINE:
            print(line, file=sys.stderr)


def read(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The lines of logs, in their order.

    Raises:
        AdfmError: A file cannot be read, or a line is not one of a log; a last line that was cut off is left out.
    """
    for file in files:
        try:
            with file.open(encoding="utf-8") as log:
                for number, line in enumerate(log, 1):
                    yield from _parse(line, file, number)
        except (OSError, UnicodeDecodeError) as error:
            raise AdfmError(f"{file} cannot be read ({error}).") from error


def _parse(line: str, file: Path, number: int) -> Iterator[dict[str, Any]]:
    try:
        entry = json.loads(line)
        if not (isinstance(entry, dict) and isinstance(entry["event"], str)):
            raise ValueError
        yield entry
    except (ValueError, LookupError) as error:
        if line.endswith("\n"):
            raise AdfmError(f"{file}, line {number}: it is not a line of a log that {FILE} names.") from error


def summary(entries: Iterable[dict[str, Any]], most: int = 20) -> str:
    """Counts for people: answers, refusals by kind, differences between production and shadow, and where they are.

    Args:
        entries: Lines of a log.
        most: Images that differ to list, the latest ones.
    """
    labels: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    shadow: Counter[str] = Counter()
    changes: Counter[str] = Counter()
    differences: list[str] = []
    for entry in entries:
        event, images = entry["event"], int(entry.get("images", 0))
        if event == "answered":
            labels.update(entry["labels"])
        elif event == "cannot judge":
            kinds[str(entry["kind"])] += 1
        elif event == "differs":
            own, other = entry["production"]["label"], entry["shadow"]["label"]
            changes[f"{own}, the shadow: {other}" if own != other else f"both {own}, boxes apart"] += 1
            differences.append(f"  {entry['time']}  {entry['image']}  {own} -> {other}")
        elif event in ("compared", "dropped", "failed"):
            shadow[event] += images
            shadow["differ"] += int(entry.get("differ", 0))
    lines = [f"images answered     {labels.total()}", *_counts(labels, labels.total())]
    if kinds:
        lines += [f"cannot judge        {kinds.total()}", *_counts(kinds, labels.total())]
    if shadow:
        lines += [
            f"compared to shadow  {shadow['compared']}, {shadow['dropped']} dropped, {shadow['failed']} failed",
            f"differ              {shadow['differ']}{_share(shadow['differ'], shadow['compared'])}",
            *_counts(changes, shadow["compared"]),
        ]
    if differences:
        lines += [f"the latest {min(most, len(differences))} of them (SHA-256 of the file)", *differences[-most:]]
    return "\n".join(map(printable, lines))


def _counts(counts: Counter[str], total: int) -> list[str]:
    return [f"  {name:28} {count}{_share(count, total)}" for name, count in counts.most_common()]


def _share(count: int, total: int) -> str:
    return f" ({count / total:.2%})" if total else ""
