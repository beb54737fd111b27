"""Print the section of a version in CHANGELOG.md, for the release on GitHub.

    python scripts/release-notes.py 0.2.0 [CHANGELOG.md]

Exits with 1 where the changelog has no dated section of that version, or an empty one. Standard library only.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def notes(changelog: str, version: str) -> str:
    """The text under a version's heading, `## [0.2.0] - 2027-01-31`, up to the next version or the links at the end.

    Raises:
        ValueError: There is no such heading, or nothing under it.
    """
    heading = re.compile(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", re.MULTILINE).search(changelog)
    if not heading:
        raise ValueError(f"has no section '## [{version}] - YYYY-MM-DD'; give Unreleased its version and date")
    text = re.split(r"^## |^\[[^\]]+\]: ", changelog[heading.end() :], maxsplit=1, flags=re.MULTILINE)[0].strip()
    if not text:
        raise ValueError(f"says nothing under [{version}]")
    return text


def main(arguments: list[str]) -> None:
    """Parse the command line and print the notes."""
    if len(arguments) not in (1, 2):
        sys.exit("usage: release-notes.py VERSION [CHANGELOG]")
    file = Path(arguments[1] if len(arguments) == 2 else "CHANGELOG.md")
    try:
        print(notes(file.read_text(), arguments[0]))
    except (OSError, ValueError) as error:
        sys.exit(f"{file}: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
