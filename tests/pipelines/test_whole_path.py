"""The whole path by both doors, `dvc repro` and the pipeline, once each on the smallest settings that make sense."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from adfm.files import digest
from adfm.params import load
from pipelines import training
from pipelines.command import main
from tests.small import SMALL, SMALL_POLICY

pytestmark = pytest.mark.timeout(1200)

ROOT = Path(__file__).parents[2]
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())
ALWAYS = ["production"]


class Checkout:
    """A copy of the project in a Git repository of its own."""

    def __init__(self, folder: Path, database: Path) -> None:
        self.folder = folder
        shutil.copy(database, folder)
        for name in ("adfm", "dvc.yaml", ".dvcignore", ".gitignore"):
            source = ROOT / name
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / name, ignore=ignored) if source.is_dir() else shutil.copy(source, folder)
        (folder / ".dvc").mkdir()
        for name in ("config", ".gitignore", "plots.html"):
            shutil.copy(ROOT / ".dvc" / name, folder / ".dvc")
        shutil.copytree(ROOT / ".dvc" / "plots", folder / ".dvc" / "plots")
        self.settings(*SMALL)
        (folder / "gate.yaml").write_text(SMALL_POLICY)
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
        output = self.dvc("repro").splitlines()
        return [line.split("'")[1] for line in output if line.startswith("Running stage ")]


@pytest.fixture(scope="module")
def finished(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout, in a path with a space, in which the whole path has run; every test leaves it in that state."""
    checkout = Checkout(tmp_path_factory.mktemp("a checkout"), empty_database)
    assert checkout.repro() == list(PIPELINE["stages"])
    checkout.commit()
    return checkout


def test_a_model_that_is_not_there_stops_the_run_before_data_is_touched(empty_database: Path, tmp_path: Path) -> None:
    checkout = Checkout(tmp_path, empty_database)
    checkout.settings(*SMALL, "model.name=/no/such/model")
    output = checkout.dvc("repro", status=255)
    assert "adfm: error: model.name" in output
    assert "/no/such/model" in output
    assert "Traceback" not in output
    assert not (tmp_path / "data").exists()


def test_the_whole_path_ends_in_a_registered_version(finished: Checkout) -> None:
    for output in ("models/trained/adfm.json", "evaluation/metrics.json", "registration/registration.json"):
        assert (finished.folder / output).is_file()
    assert json.loads((finished.folder / "registration" / "gate.json").read_text())["verdict"] == "passed"
    assert not list(finished.folder.rglob("*.partial"))
    assert finished.run("git", "status", "--short") == ""


def test_a_second_run_only_looks_what_is_in_production(finished: Checkout) -> None:
    assert finished.repro() == ALWAYS


def test_a_changed_setting_runs_only_what_depends_on_it(finished: Checkout) -> None:
    (finished.folder / "gate.yaml").write_text(SMALL_POLICY + "enough: 50\n")
    assert finished.repro() == [*ALWAYS, "register"]
    (finished.folder / "gate.yaml").write_text(SMALL_POLICY)
    assert finished.repro() == [*ALWAYS, "register"]  # and not from DVC's run-cache


def test_a_promotion_makes_stale_what_judges(finished: Checkout, tmp_path: Path) -> None:
    checkout = Checkout.__new__(Checkout)
    checkout.folder = tmp_path / "copy"
    shutil.copytree(finished.folder, checkout.folder, symlinks=True)
    checkout.run(sys.executable, "-m", "adfm", "approve", "1")
    checkout.run(sys.executable, "-m", "adfm", "promote", "1")
    checkout.dvc("repro", "--single-item", "production")
    assert json.loads(checkout.dvc("status", "--json")).keys() == {"evaluate", "register", *ALWAYS}

    checkout.settings(*SMALL, "train.learning_rate=3e-4")
    ran = checkout.repro()
    assert {*ALWAYS, "train"} <= {*ran} and ran[-2:] == ["evaluate", "register"]
    evaluated = json.loads((checkout.folder / "evaluation" / "evaluation.json").read_text())["models"]
    assert list(evaluated) == ["detector", "base", "sft", "production", "trained"]
    assert json.loads((checkout.folder / "registration" / "gate.json").read_text())["production_version"] == "1"
    assert json.loads((checkout.folder / "registration" / "registration.json").read_text())["version"] == "2"
    assert checkout.repro() == ALWAYS


def test_metrics_and_plots_are_shown_without_a_network(finished: Checkout) -> None:
    metrics = json.loads(finished.dvc("metrics", "show", "--json"))
    names = ("always_A", "always_B", "detector", "base", "sft", "trained")
    assert set(metrics[""]["data"]) == {f"evaluation/metrics/{name}.json" for name in names}
    assert "balanced_accuracy" in finished.dvc("metrics", "diff", "--all")
    finished.dvc("plots", "show")
    page = (finished.folder / "dvc_plots" / "index.html").read_text()
    assert 'src="http' not in page
    assert page.count("vegaEmbed('#") == sum(isinstance(plot, dict) for plot in PIPELINE["plots"])
    shutil.rmtree(finished.folder / "dvc_plots")


def test_the_pipeline_gives_the_shards_and_metrics_of_the_stages(
    finished: Checkout, here: Path, small: list[str], channel: list[str]
) -> None:
    argv = ["run", "--root", "out", *small]
    assert main(training.PIPELINES, training.options, training.arguments, argv) == 0

    def output(task: str, name: str) -> Path:
        """What a task wrote, wherever the runner has put it."""
        (path,) = (here / "out").rglob(f"{task}/{name}")
        return path

    assert digest(output("convert", "shards")) == digest(finished.folder / "data" / "shards")
    by_stages = json.loads((finished.folder / "evaluation" / "metrics.json").read_text())
    assert json.loads((output("evaluate", "evaluation") / "metrics.json").read_text()) == by_stages

    registration = json.loads((output("register", "registration") / "registration.json").read_text())
    assert registration["version"] == "1"
    with sqlite3.connect(here / "mlflow.db") as store:
        tags = dict(store.execute("select key, value from model_version_tags").fetchall())
    store.close()
    assert tags["data_revision"] == "synthetic://?images=20"
    for task, name in (("convert", "validation_report"), ("evaluate", "evaluation_report"), ("register", "gate_page")):
        assert output(task, name).read_text().lstrip().lower().startswith("<!doctype html")
    assert tags["kfp_run_id"]
    assert "version 1" in channel[-1]
