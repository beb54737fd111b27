"""The drawing of the packages against the imports that it is made of."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_drawing_is_that_of_the_imports() -> None:
    drawn = runpy.run_path(str(ROOT / "scripts" / "draw-house.py"))["svg"]()
    kept = (ROOT / "docs" / "images" / "house.svg").read_text(encoding="utf-8")
    assert kept == drawn, "the imports have changed: python scripts/draw-house.py"
