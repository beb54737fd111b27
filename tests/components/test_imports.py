"""What a component may import where it is defined."""

import ast
import sys
from pathlib import Path

import pytest

COMPONENTS = sorted((Path(__file__).parents[2] / "components").glob("*/component.py"))


@pytest.mark.parametrize("file", COMPONENTS, ids=lambda file: file.parent.name)
def test_a_component_imports_nothing_but_the_standard_library_and_kfp(file: Path) -> None:
    roots = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or "").split(".")[0])
    assert roots <= set(sys.stdlib_module_names) | {"kfp"}


def test_every_body_is_a_stage() -> None:
    for file in COMPONENTS:
        for function in (node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)):
            last = function.body[-1]
            assert isinstance(last, ast.With), f"{file.parent.name}: {function.name}"
            assert ast.unparse(last.items[0]) == "tasks.stage()", f"{file.parent.name}: {function.name}"
            before = [node for node in function.body[1:-1] if not isinstance(node, ast.ImportFrom)]
            assert not before, f"{file.parent.name}: {function.name}"


def test_there_is_a_component_for_every_stage() -> None:
    stages = {"check", "fetch", "convert", "warmup", "train", "evaluate", "register"}  # `convert` validates as well
    assert {file.parent.name for file in COMPONENTS} == stages | {"promote", "notify"}
