"""The documentation as a site: it builds without a warning, and each page is there."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    if missing := [name for name in ("mkdocs", "material", "mkdocstrings") if not importlib.util.find_spec(name)]:
        message = f"NOT TESTED: the site cannot be built without {', '.join(missing)}; install it with make setup"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # an advertisement of the theme
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert built.returncode == 0 and not built.stderr, built.stdout + built.stderr

    pages = sorted((ROOT / "docs").glob("*.md"))
    folders = [tmp_path / ("" if page.stem == "index" else page.stem) / "index.html" for page in pages]
    assert [str(file) for file in folders if not file.is_file()] == []
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2].partition("plugins:")[0]
    assert sorted(page.name for page in pages) == sorted(
        line.split()[-1] for line in navigation.splitlines() if ".md" in line
    )
    assert 'href="https://fonts' not in (tmp_path / "index.html").read_text(encoding="utf-8")
