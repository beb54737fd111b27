"""The house: which package stands on which, and that imports only go down.

A room is a package of `adfm` or one of its modules; components and pipelines are a room each. A room stands on the
floor above the highest of those that it imports, late imports included.
"""

import ast
from collections import defaultdict
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = 10
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for folder in ("adfm", "components", "pipelines")
    for file in sorted((ROOT / folder).rglob("*.py"))
}


@cache
def imports(module: str) -> set[str]:
    """The modules of the project that a module imports; the package's face, `adfm/__init__.py`, does not count."""
    if module == "adfm":
        return set()
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            within = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= within & MODULES.keys() or {node.module}
    return names & MODULES.keys() - {module}


def room(module: str) -> str:
    first, *rest = module.split(".")
    return f"{first}.{rest[0]}" if first == "adfm" and rest else first


def rooms() -> dict[str, set[str]]:
    """Each room with those that it imports."""
    below: dict[str, set[str]] = defaultdict(set)
    for module in MODULES:
        below[room(module)] |= {room(name) for name in imports(module)} - {room(module)}
    return below


def floors() -> dict[str, int]:
    """The floor of each room; 1 is the ground."""
    below, floor = rooms(), dict[str, int]()
    for name in TopologicalSorter(below).static_order():
        floor[name] = 1 + max((floor[each] for each in below[name]), default=0)
    return floor


def test_no_module_imports_one_that_imports_it() -> None:
    TopologicalSorter({module: imports(module) for module in MODULES}).prepare()


def test_rooms_stand_on_one_another_without_a_circle() -> None:
    TopologicalSorter(rooms()).prepare()


def test_the_house_has_few_floors() -> None:
    assert max(floors().values()) <= FLOORS, sorted(floors().items(), key=lambda item: -item[1])


def test_nothing_imports_upward() -> None:
    """The package knows neither the components nor the pipelines, the method neither models nor data."""
    for module in MODULES:
        for name in imports(module):
            if module.startswith("adfm"):
                assert name.startswith("adfm"), f"{module} imports {name}"
            if module.startswith("adfm.method."):
                assert name.startswith(("adfm.method.", "adfm.errors", "adfm.records")), f"{module} imports {name}"
