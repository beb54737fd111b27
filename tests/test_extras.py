"""The core of the package works alone, and what is missing names its extra."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from adfm import extras
from adfm.extras import EXTRAS
from tests.packages import PROJECT, closure, requirements

ROOT = Path(__file__).parents[1]


def imports(tree: ast.AST) -> Iterator[str]:
    """The top-level modules that code imports, without those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]
        yield from imports(node)


def third_party() -> set[str]:
    modules = {name for file in (ROOT / "adfm").rglob("*.py") for name in imports(ast.parse(file.read_text()))}
    return modules - set(sys.stdlib_module_names) - {"adfm"}


def test_every_import_is_in_the_core_or_in_the_extra_that_the_message_names() -> None:
    distributions = packages_distributions()
    core = closure(requirements())
    gpu = {canonicalize_name(Requirement(line).name) for line in PROJECT["optional-dependencies"]["gpu"]}
    by_module = {module: extra for extra, modules in EXTRAS.items() for module in modules}
    brought = {extra: closure(requirements(extra)) for extra in EXTRAS}
    wrong = []
    for module in sorted(third_party()):
        if canonicalize_name(module) in gpu:
            continue
        brings = {canonicalize_name(name) for name in distributions[module]}
        where = core if module not in by_module else brought[by_module[module]]
        if not brings & where or (module in by_module and brings & core):
            wrong.append(module)
    assert wrong == []
    assert by_module.keys() <= third_party() | {"docker", "kfp"}  # those two: components/ and pipelines/


WITHOUT_EXTRAS = f"""
import sys

missing = {set().union(*EXTRAS.values())!r}

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *more):
        return None if name.partition(".")[0] in missing else self.finder.find_spec(name, *more)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path = [Without(finder) for finder in sys.meta_path]
"""


def core_alone(script: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs Python in which no module of an extra is found."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS + script],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(cwd)},
        capture_output=True,
        text=True,
        check=False,
    )


def adfm(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return core_alone(f"from adfm.cli import main; sys.exit(main({list(arguments)!r}))", cwd)


def test_readers_conversion_metrics_and_the_gate_need_no_extra(mvtec_folder: Path, tmp_path: Path) -> None:
    assert adfm("fetch", str(mvtec_folder), "raw/set", cwd=tmp_path).returncode == 0
    converted = adfm("convert", "raw/set", "shards", cwd=tmp_path)
    assert converted.returncode == 0, converted.stderr
    planned = adfm("gate", "--plan", "shards", "--policy", str(ROOT / "gate.yaml"), cwd=tmp_path)
    assert planned.returncode == 0 and "accuracy" in planned.stdout, planned.stderr
    imported = core_alone("import adfm.data.readers, adfm.evaluation.metrics, adfm.registry.gate", tmp_path)
    assert imported.returncode == 0, imported.stderr


@pytest.mark.parametrize(
    ("arguments", "module", "extra"),
    [
        (["fetch", "s3://bucket/set", "raw"], "botocore", "data"),
        (["registry", "log"], "mlflow", "registry"),
        (["approvals", "serve"], "mlflow", "registry"),  # a service that survives other errors
        (["detector", "shards", "out"], "torch", "train"),
    ],
)
def test_a_verb_without_its_extra_fails_with_the_line_that_installs_it(
    arguments: list[str], module: str, extra: str, tmp_path: Path
) -> None:
    done = adfm(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"adfm: error: this needs {module}, which is not installed: "
        f'pip install "adfm[{extra}]", or "adfm[all]" for every verb.'
    ]


def test_other_modules_that_are_missing_are_not_explained_away(monkeypatch: pytest.MonkeyPatch) -> None:
    assert extras.missing(ModuleNotFoundError("no", name="adfm.nothing")) is None
    assert extras.missing(ModuleNotFoundError("no", name=None)) is None
    broken = "mlflow.nothing"  # a part of a package that is installed
    assert importlib.util.find_spec("mlflow") is not None
    assert extras.missing(ModuleNotFoundError("no", name=broken)) is None
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert "adfm[registry]" in (extras.missing(ModuleNotFoundError("no", name=broken)) or "")
