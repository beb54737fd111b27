"""What a stranger reads and fills in first: it parses, and what it names exists."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from adfm import __version__

ROOT = Path(__file__).parents[1]
FORMS = sorted(path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
PAGES = [ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md")]


def load(path: str | Path) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    citation = load("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == __version__
    assert {"message", "title", "authors"} <= citation.keys()
    (paper,) = citation["references"]
    assert "2508.04175" in paper["url"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert all({"family-names", "given-names"} == author.keys() for author in paper["authors"])


def test_the_changelog_has_a_section_for_what_comes_or_for_this_version() -> None:
    headings = re.findall(r"^## \[([^\]]+)\](.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings
    for name, rest in headings:
        assert (name, rest) == ("Unreleased", "") or re.fullmatch(r" - \d{4}-\d\d-\d\d", rest), name
    assert {"Unreleased", __version__} & {name for name, _ in headings}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_an_issue_form_is_one_that_github_takes(form: Path) -> None:
    content = load(form)
    assert {"name", "description", "body"} <= content.keys()
    ids = [field["id"] for field in content["body"] if field["type"] != "markdown"]
    assert ids and len(ids) == len(set(ids))
    for field in content["body"]:
        assert field["type"] in ("checkboxes", "dropdown", "input", "markdown", "textarea")
        assert field["attributes"]["label"]
    assert any(field.get("validations", {}).get("required") for field in content["body"])


@pytest.mark.parametrize("name", ["bug.yml", "dataset.yml"])
def test_reports_ask_for_versions_and_hardware(name: str) -> None:
    (field,) = [field for field in load(f".github/ISSUE_TEMPLATE/{name}")["body"] if field["id"] == "env"]
    assert "`adfm env`" in field["attributes"]["description"]
    assert field["validations"]["required"] is True


def test_vulnerabilities_and_conduct_have_a_private_form() -> None:
    private = "https://github.com/adfm/adfm/security/advisories/new"
    assert private in [link["url"] for link in load(".github/ISSUE_TEMPLATE/config.yml")["contact_links"]]
    assert all(private in (ROOT / name).read_text() for name in ("SECURITY.md", "CODE_OF_CONDUCT.md"))


def test_updates_are_grouped_and_monthly() -> None:
    updates = {each["package-ecosystem"]: each for each in load(".github/dependabot.yml")["updates"]}
    assert updates.keys() == {"pip", "github-actions", "docker"}
    assert all(each["schedule"]["interval"] == "monthly" and each["groups"] for each in updates.values())
    folders = updates["docker"]["directories"]
    assert all(any(ROOT.glob(f"{folder}/*".strip("/"))) for folder in folders)


def test_hooks_run_programs_of_the_environment() -> None:
    hooks = [hook for repository in load(".pre-commit-config.yaml")["repos"] for hook in repository["hooks"]]
    assert [hook["id"] for hook in hooks] == ["ruff-check", "ruff-format", "mypy", "shellcheck", "zizmor"]
    pins = (ROOT / "requirements.txt").read_text()
    for hook in hooks:
        assert hook["language"] == "system"
        program = hook["entry"].split()[0]
        assert shutil.which(program), f"{program} is not installed; make setup installs it"
        assert re.search(rf"^{program}(-py)?==", pins, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\(([^):#\s]+)(?:#[^)]*)?\)", text)
    named = re.findall(r"`(\.?(?:[\w.-]+/)*[\w.-]+\.(?:py|md|sh|txt|toml|ya?ml|cff)|(?:[\w.-]+/)+)`", text)
    arguments = re.findall(r"^(?:pytest|\| .*`pytest) -n0 ([\w./ -]+?)(?: -k .*)?$", text, re.MULTILINE)
    paths = {path for path in [*links, *named, *" ".join(arguments).split()] if "NAME" not in path}
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_contributing_names_targets_of_make_and_its_example_test() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"`?make ([a-z-]+)", text))
    assert targets >= {"setup", "lint", "test", "repro", "coverage"}
    makefile = (ROOT / "Makefile").read_text()
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []
    for file, name in re.findall(r"pytest -n0 (\S+\.py) -k (\w+)", text):
        assert re.search(rf"def test_\w*{name}", (ROOT / file).read_text()), f"{file} has no test {name}"
