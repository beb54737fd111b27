"""What a component may import where it is defined."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPONENTS = sorted((ROOT / "components").glob("*/component.py"))


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names.add(module if module.startswith("adfm") else module.split(".")[0])
    return names


@pytest.mark.parametrize("file", COMPONENTS, ids=lambda file: file.parent.name)
def test_a_component_imports_nothing_but_the_standard_library_kfp_and_the_table_of_resources(file: Path) -> None:
    assert imports(file) <= set(sys.stdlib_module_names) | {"kfp", "adfm.kubeflow.resources"}


def test_the_table_of_resources_loads_no_library() -> None:
    code = "import adfm.kubeflow.resources, sys; print({name.split('.')[0] for name in sys.modules})"
    loaded = ast.literal_eval(subprocess.check_output([sys.executable, "-S", "-c", code], text=True, cwd=ROOT))
    assert loaded <= set(sys.stdlib_module_names) | {"__main__", "adfm"}


def test_every_body_is_a_stage() -> None:
    for file in COMPONENTS:
        for function in (node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)):
            last = function.body[-1]
            assert isinstance(last, ast.With), f"{file.parent.name}: {function.name}"
            stage = "tasks.stage(tolerant=True)" if function.name == "notify" else "tasks.stage()"
            assert ast.unparse(last.items[0]) == stage, f"{file.parent.name}: {function.name}"
            before = [ast.unparse(node) for node in function.body[1:-1]]  # the limits of CPUs come before NumPy
            ours = [line for line in before if "adfm" in line]
            assert ours == ["from adfm.kubeflow import tasks"], f"{file.parent.name}: {function.name}"
            assert all(line.startswith(("from pathlib", "from tempfile")) for line in before if line not in ours)


def test_the_helpers_of_stages_import_no_library_that_makes_threads() -> None:
    code = "import adfm.kubeflow.tasks, sys; print({'numpy', 'pyarrow', 'torch', 'pandas'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"set()\n"


def test_there_is_a_component_for_every_stage() -> None:
    stages = {"check", "fetch", "convert", "sft", "train", "evaluate", "register"}  # `convert` validates as well
    assert {file.parent.name for file in COMPONENTS} == stages | {"promote", "notify"}
