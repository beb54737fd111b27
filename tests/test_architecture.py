"""The house: which package stands on which, and that imports only go down.

A room is a package of `adfm` or one of its modules; components and pipelines are a room each. A room stands on the
floor above the highest of those that it imports, late imports included.
"""

import ast
from collections import defaultdict
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from adfm.params import Params

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


def one_key_of_params(code: str) -> list[str]:
    """The functions that take all settings, `params`, and read one section alone, or one key that is in none."""
    narrow = []
    for function in (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef)):
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        uses = {node for node in ast.walk(function) if isinstance(node, ast.Name) and node.id == "params"}
        reads = [node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute) and node.value in uses]
        takes_all = "params" in {argument.arg for argument in arguments}
        passes_on = len(reads) < len(uses) or set(reads) - Params.model_fields.keys()  # as a whole, or to a method
        if takes_all and not passes_on and len(set(reads)) == 1:
            narrow.append(f"{function.name} reads params.{reads[0]} alone")
    return narrow


def test_no_function_takes_all_settings_to_read_one_section() -> None:
    """Such a function takes that section, so that its signature says what it depends on."""
    narrow = {module: one_key_of_params(file.read_text("utf-8")) for module, file in MODULES.items()}
    assert {module: names for module, names in narrow.items() if module.startswith("adfm") and names} == {}


@pytest.mark.parametrize(
    ("body", "narrow"),
    [
        ("return params.model.name + params.model.revision", ["f reads params.model alone"]),
        ("return params.seed", ["f reads params.seed alone"]),
        ("def inner():\n        return params.mlflow\n    return inner", ["f reads params.mlflow alone"]),
        ("return params.seed, params.model", []),
        ("return params.model.name, g(params)", []),
        ("return params.model_dump()", []),
        ("return 0", []),
    ],
)
def test_functions_that_read_one_section_are_noticed(body: str, narrow: list[str]) -> None:
    assert one_key_of_params(f"def f(x, *, params):\n    {body}\n") == narrow
