"""What installing a package brings, by the metadata of the packages that are installed here."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# The files of pins are made for this one; newer ones need fewer packages.
PYTHON = {"python_version": "3.11", "python_full_version": "3.11.0"}

PROJECT: dict[str, Any] = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def requirements(*extras: str) -> list[str]:
    """The core's requirements in pyproject.toml, and those of extras; extras of extras are resolved."""
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        for line in PROJECT["optional-dependencies"][extra]:
            requirement = Requirement(line)
            lines += requirements(*requirement.extras) if requirement.name == PROJECT["name"] else [line]
    return lines


def closure(lines: Iterable[str]) -> set[str]:
    """The distributions that `pip install` of these requirements brings; what is not installed here brings itself."""
    reached: set[str] = set()
    todo = [Requirement(line) for line in lines]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        extras = {"", *requirement.extras}
        if {f"{name}[{extra}]" for extra in extras} <= reached:
            continue
        reached |= {name, *(f"{name}[{extra}]" for extra in extras)}
        try:
            needed = [Requirement(line) for line in distribution(name).requires or ()]
        except PackageNotFoundError:
            continue
        todo += [
            each
            for each in needed
            if each.marker is None or any(each.marker.evaluate({**PYTHON, "extra": extra}) for extra in extras)
        ]
    return {name for name in reached if "[" not in name}
