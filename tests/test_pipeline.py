"""`dvc.yaml`: its lists against the code, and the whole path once, on the smallest settings that make sense."""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from adfm.params import load
from tests.small import SMALL

pytestmark = pytest.mark.timeout(1200)

ROOT = Path(__file__).parents[1]
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())
FUNCTIONS = {
    "check": "adfm/preflight.py",
    "fetch": "adfm/data/sources.py",
    "convert": "adfm/data/conversion.py",
    "validate": "adfm/data/validation.py",
    "warmup": "adfm/training/warmup.py",
    "train": "adfm/training/grpo.py",
    "evaluate": "adfm/evaluation/evaluate.py",
    "register": "adfm/registry/registration.py",
}
# Nothing in these can change a result.
AROUND = {f"adfm/{name}.py" for name in ("__init__", "errors", "files", "outbox", "params", "stopping", "tracking")}


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
                if stem.parts[0] == "adfm" and (ROOT / file).is_file():
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
    assert set(FUNCTIONS) == set(PIPELINE["stages"])
    listed = set().union(*(files(d) for d in PIPELINE["stages"][stage]["deps"] if d.startswith("adfm/")))
    used = {file.as_posix() for file in reached(Path(FUNCTIONS[stage]))} - AROUND
    assert {file for file in listed if not file.endswith("__init__.py")} == {
        file for file in used if not file.endswith("__init__.py")
    }


class Checkout:
    """A copy of the project in a Git repository of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("adfm", "dvc.yaml", ".dvcignore", ".gitignore"):
            source = ROOT / name
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / name, ignore=ignored) if source.is_dir() else shutil.copy(source, folder)
        (folder / ".dvc").mkdir()
        for name in ("config", ".gitignore", "plots.html"):
            shutil.copy(ROOT / ".dvc" / name, folder / ".dvc")
        self.settings(*SMALL)
        self.run("git", "init", "-q")
        self.commit()

    def settings(self, *overrides: str) -> None:
        params = load(ROOT / "params.yaml", overrides).model_dump(by_alias=True)
        (self.folder / "params.yaml").write_text(yaml.safe_dump(params))

    def run(self, *command: str, status: int = 0) -> str:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "DVC_", "GIT_"))}
        environment |= {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def dvc(self, *arguments: str, status: int = 0) -> str:
        return self.run(sys.executable, "-m", "dvc", *arguments, status=status)

    def commit(self) -> None:
        self.run("git", "add", "-A")
        self.run("git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-q", "-m", "state")

    def repro(self) -> list[str]:
        """Runs what has to run; returns the stages that ran."""
        said = self.dvc("repro").splitlines()
        return [line.split("'")[1] for line in said if line.startswith("Running stage ")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout, in a path with a space, in which the whole path has run; every test leaves it in that state."""
    checkout = Checkout(tmp_path_factory.mktemp("a checkout"))
    assert checkout.repro() == list(FUNCTIONS)
    checkout.commit()
    return checkout


def test_a_model_that_is_not_there_stops_the_run_before_data_is_touched(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    checkout.settings(*SMALL, "model.name=/no/such/model")
    said = checkout.dvc("repro", status=255)
    assert "adfm: error: model.name" in said
    assert "/no/such/model" in said
    assert "Traceback" not in said
    assert not (tmp_path / "data").exists()


def test_the_whole_path_ends_in_a_registered_version(finished: Checkout) -> None:
    for output in ("models/trained/adfm.json", "evaluation/metrics.json", "registration/registration.json"):
        assert (finished.folder / output).is_file()
    assert json.loads((finished.folder / "registration" / "gate.json").read_text())["passed"] is True
    assert not list(finished.folder.rglob("*.partial"))
    assert finished.run("git", "status", "--short") == ""


def test_a_second_run_runs_nothing(finished: Checkout) -> None:
    assert finished.repro() == []


def test_a_changed_setting_runs_only_what_depends_on_it(finished: Checkout) -> None:
    finished.settings(*SMALL, "gate.category_max_loss=0.2")
    assert finished.repro() == ["check", "register"]
    finished.settings(*SMALL)
    assert finished.repro() == ["check", "register"]  # and not from DVC's run-cache


def test_metrics_and_plots_are_shown_without_a_network(finished: Checkout) -> None:
    shown = json.loads(finished.dvc("metrics", "show", "--json"))
    assert set(shown[""]["data"]) == {f"evaluation/metrics/{name}.json" for name in ("base", "warmup", "trained")}
    assert "balanced_accuracy" in finished.dvc("metrics", "diff", "--all")
    finished.dvc("plots", "show")
    page = (finished.folder / "dvc_plots" / "index.html").read_text()
    assert 'src="http' not in page
    assert page.count("vegaEmbed('#") == sum(isinstance(plot, dict) for plot in PIPELINE["plots"])
    shutil.rmtree(finished.folder / "dvc_plots")
