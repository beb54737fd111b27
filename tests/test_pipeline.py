"""`dvc.yaml`: its lists against the code."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())
FUNCTIONS = {
    "check": "adfm/preflight.py",
    "fetch": "adfm/data/sources.py",
    "convert": "adfm/data/conversion.py",
    "validate": "adfm/validation/validate.py",
    "sft": "adfm/training/sft.py",
    "detector": "adfm/training/detector.py",
    "train": "adfm/training/grpo.py",
    "folds": "adfm/training/folds.py",
    "evaluate": "adfm/evaluation/evaluate.py",
    "register": "adfm/registry/registration.py",
}
# Nothing in these can change a result.
AROUND = {
    *(
        f"adfm/{name}.py"
        for name in (
            *("__init__", "descriptions", "errors", "files", "method/terms", "params", "tracking"),
            "training/outbox",
        )
    ),
    *(f"adfm/process/{name}.py" for name in ("cpus", "environment", "pod", "progress", "retries", "stopping")),
}
# Trainings draw their curves; no model is trained again because a chart looks different.
DRAWING = {stage: {"adfm/drawing.py"} for stage in ("sft", "train")}


def imported(module: Path) -> Iterator[Path]:
    """The files of adfm that a file imports, late imports included."""
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            stem = Path(*name.split("."))
            for file in (stem.with_suffix(".py"), stem / "__init__.py"):
                # The package's face imports the public functions, when they are used: for users, not for stages.
                if stem.parts[0] == "adfm" and (ROOT / file).is_file() and file != Path("adfm/__init__.py"):
                    yield file


def reached(module: Path) -> set[Path]:
    found, left = set[Path](), [module]
    while left:
        if (file := left.pop()) not in found:
            found.add(file)
            left += imported(file)
    return found


def files(dependency: str) -> set[str]:
    path = ROOT / dependency
    found = path.rglob("*.py") if path.is_dir() else [path]
    return {file.relative_to(ROOT).as_posix() for file in found if file.suffix == ".py"}


@pytest.mark.parametrize("stage", FUNCTIONS)
def test_a_stage_depends_on_the_modules_that_it_uses(stage: str) -> None:
    always = {name for name, its in PIPELINE["stages"].items() if its.get("always_changed")}
    assert set(FUNCTIONS) == set(PIPELINE["stages"]) - always
    assert always == {"production"}
    listed = set().union(*(files(d) for d in PIPELINE["stages"][stage]["deps"] if d.startswith("adfm/")))
    used = {file.as_posix() for file in reached(Path(FUNCTIONS[stage]))} - AROUND - DRAWING.get(stage, set())
    assert {file for file in listed if not file.endswith("__init__.py")} == {
        file for file in used if not file.endswith("__init__.py")
    }
