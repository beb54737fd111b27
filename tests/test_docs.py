"""The documentation against the code and the files that it points to."""

import re
from pathlib import Path

import pytest

from adfm.data.readers import LAYOUTS
from adfm.kubeflow.resources import RESOURCES
from adfm.params import Params
from tests.data.readers.exports import EXPORTS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TOOLS = (ROOT / "docs" / "tools.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_to_files(page: Path) -> None:
    targets = re.findall(r'\]\(([^)#:\s]+)(?:#[^)]*)?\)|<img src="([^":]+)"', page.read_text())
    assert [target for pair in targets for target in pair if target and not (page.parent / target).exists()] == []


def test_every_layout_is_in_the_tables_of_tools() -> None:
    assert LAYOUTS.keys() - set(re.findall(r"`([\w-]+)`", TOOLS)) == set()
    readme = set(re.findall(r"`([\w-]+)`", (ROOT / "README.md").read_text()))
    assert LAYOUTS.keys() - readme == set()


def test_every_export_has_its_picture_in_tools_and_no_other_is_kept() -> None:
    pictures = {path.stem for path in (ROOT / "docs" / "images" / "tools").iterdir()}
    assert pictures == set(EXPORTS) == set(re.findall(r"images/tools/([\w-]+)\.jpg", TOOLS))


def test_settings_in_own_images_exist() -> None:
    sections = Params().model_dump()
    names = re.findall(r"`(convert|split|tile)\.([a-z_.]+)", (ROOT / "docs" / "own-images.md").read_text())
    assert names
    for section, path in names:
        value = sections[section]
        for name in path.rstrip(".").split("."):
            assert name in value, f"{section}.{path}"
            value = value[name]


def test_the_table_of_tasks_in_the_readme_is_that_of_the_resources() -> None:
    row = r"^\| `([a-z-]+)` \| (cpu|gpu) \| (\d+) \| (\d+) GiB \| (yes|no) \| (on|off) \|"
    rows = {task: cells for task, *cells in re.findall(row, (ROOT / "README.md").read_text(), re.MULTILINE)}
    assert rows == {
        task: [
            "gpu" if entry.gpu else "cpu",
            entry.cpu,
            entry.memory.removesuffix("Gi"),
            "yes" if entry.gpu else "no",
            "on" if entry.cached else "off",
        ]
        for task, entry in RESOURCES.items()
    }
