"""The notes of a release are its section of the changelog."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/release-notes.py"
CHANGELOG = """\
# Changelog

## [Unreleased]

### Added

- Later.

## [1.2.0] - 2027-01-31

### Added

- A verb, see [the docs](docs/x.md).

### Fixed

- A bug.

## [1.1.0] - 2026-12-01

## [11.2.0]

- Without a date.

[1.2.0]: https://github.com/adfm/adfm/releases/tag/v1.2.0
"""


def run(tmp_path: Path, version: str, changelog: str = CHANGELOG) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "CHANGELOG.md"
    file.write_text(changelog)
    return subprocess.run([sys.executable, SCRIPT, version, file], capture_output=True, text=True, check=False)


def test_the_section_of_the_version_is_printed(tmp_path: Path) -> None:
    done = run(tmp_path, "1.2.0")
    assert done.returncode == 0
    assert done.stdout == "### Added\n\n- A verb, see [the docs](docs/x.md).\n\n### Fixed\n\n- A bug.\n"


def test_the_last_section_ends_before_the_links(tmp_path: Path) -> None:
    done = run(
        tmp_path, "1.2.0", CHANGELOG[: CHANGELOG.index("## [1.1.0]")] + CHANGELOG[CHANGELOG.index("[1.2.0]: ") :]
    )
    assert done.returncode == 0
    assert done.stdout.endswith("- A bug.\n")


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("1.1.0", "says nothing under [1.1.0]"),
        ("11.2.0", "has no section '## [11.2.0] - YYYY-MM-DD'"),
        ("2.0.0", "has no section '## [2.0.0] - YYYY-MM-DD'"),
        ("1.2.0.*", "has no section"),
    ],
)
def test_a_version_without_notes_is_an_error(version: str, message: str, tmp_path: Path) -> None:
    done = run(tmp_path, version)
    assert done.returncode == 1
    assert message in done.stderr and str(tmp_path / "CHANGELOG.md") in done.stderr
    assert done.stdout == ""
