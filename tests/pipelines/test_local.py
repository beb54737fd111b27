"""The pipelines, run on this machine in subprocesses on the smallest settings that make sense."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelines import promotion, training
from pipelines.command import main

pytestmark = pytest.mark.timeout(1200)


def run(*argv: str) -> int:
    return main(training.PIPELINES, training.options, training.arguments, ["run", *argv])


def output(root: Path, task: str, name: str) -> Path:
    """What a task wrote, wherever the runner has put it."""
    (found,) = root.rglob(f"{task}/{name}")
    return found


def tags(database: Path) -> dict[str, str]:
    with sqlite3.connect(database) as store:
        rows: Sequence[Any] = store.execute("select key, value from model_version_tags").fetchall()
    store.close()
    return dict(rows)


def test_the_whole_path_gives_the_metrics_of_the_functions(here: Path, small: list[str], channel: list[str]) -> None:
    assert run("--root", "out", "--parts", "2", *small) == 0
    root = here / "out"

    from adfm import cli, params
    from adfm.data.conversion import convert
    from adfm.data.sources import fetch
    from adfm.evaluation.evaluate import evaluate
    from adfm.files import digest
    from adfm.training.grpo import train
    from adfm.training.warmup import warmup

    cli.set_environment()
    asked = params.load(None, small[1::2])
    fetch(asked.fetch.source, Path("raw"))
    convert(Path("raw"), Path("shards"), asked)
    assert digest(output(root, "convert", "shards")) == digest(Path("shards"))
    warmup(Path("shards"), Path("warmup"), asked)
    train(Path("shards"), Path("warmup"), Path("trained"), asked)
    models: dict[str, str | Path] = {"base": asked.model.name, "warmup": Path("warmup"), "trained": Path("trained")}
    evaluate(models, Path("shards"), Path("evaluation"), asked)
    by_pipeline = json.loads((output(root, "evaluate", "evaluation") / "metrics.json").read_text())
    assert by_pipeline == json.loads(Path("evaluation/metrics.json").read_text())

    registration = json.loads((output(root, "register", "registration") / "registration.json").read_text())
    assert registration["version"] == "1"
    found = tags(here / "mlflow.db")
    assert found["kfp_run_id"]
    assert found["data_revision"] == "synthetic://?images=20"
    for task in ("validate", "evaluate", "register"):
        assert output(root, task, "page").read_text().lstrip().lower().startswith("<!doctype html")
    assert "version 1 of adfm: gate" in channel[-1]
    assert channel[-1].startswith("adfm-training succeeded")
    assert found["kfp_run_id"] in channel[-1]


def test_data_that_are_not_fit_stop_the_run_before_a_model_is_touched(
    here: Path, small: list[str], channel: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("--root", "out", *small, "--set", "validate.min_images_per_split=1000") == 1
    captured = capfd.readouterr()
    assert "is not fit to train on" in captured.out
    assert "adfm-training: error:" in captured.err
    assert not list((here / "out").glob("*/warmup"))
    assert not list((here / "out").glob("*/train"))
    assert channel == [text for text in channel if text.startswith("adfm-training failed")]
    assert len(channel) == 1


def test_a_training_that_fails_is_told(here: Path, small: list[str], channel: list[str]) -> None:
    steps = ("--set", "warmup.steps=0", "--set", "train.micro_batch=3")
    assert run("--root", "out", *small, *steps) == 1
    assert list((here / "out").glob("*/warmup"))
    assert not list((here / "out").glob("*/evaluate"))
    assert [text.split("\n")[0] for text in channel] == ["adfm-training failed"]


def test_a_promotion_without_an_approval_moves_nothing(here: Path, channel: list[str]) -> None:
    argv = ["run", "--root", "out"]
    assert main(promotion.PIPELINES, promotion.options, promotion.arguments, argv) == 0
    assert "step" in output(here / "out", "promote", "history").read_text()
    assert channel[-1].startswith("adfm-promotion succeeded")


def test_settings_that_do_not_parse_start_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "params.yaml").write_text("train: {steps: many}\nsede: 1\n")
    assert run("--root", "out") == 1
    error = capsys.readouterr().err
    assert "params.yaml line 1: train.steps" in error
    assert "there is no setting sede; the nearest is seed" in error
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--gpu-type", "nvidia.com/gpus"], "there is no GPU type 'nvidia.com/gpus'; the nearest is nvidia.com/gpu"),
        (["--num-gpus", "-1"], "'-1' is not a whole number from 0 on"),
        (["--num-nodes", "0"], "'0' is not a whole number from 1 on"),
        (["--parts", "two"], "'two' is not a whole number from 0 on"),
        (["--node-selector", "a100"], "'a100' is not KEY=VALUE"),
        (["--toleration", "gpu:Never"], "'gpu:Never' is not KEY[=VALUE][:EFFECT]"),
    ],
)
def test_what_no_cluster_could_follow_starts_nothing(
    here: Path, option: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as status:
        run("--root", "out", *option)
    assert status.value.code == 2
    assert said in capsys.readouterr().err
    assert not (here / "out").exists()


def test_options_become_the_arguments_of_the_pipeline() -> None:
    import argparse

    from adfm.params import Params

    parser = argparse.ArgumentParser()
    training.options(parser)
    asked = "--parts 3 --gpu-type nvidia.com/mig-1g.5gb --num-gpus 2 --node-selector pool=gpu --data-revision 7"
    args = parser.parse_args([*asked.split(), "--toleration", "gpu:NoSchedule", "--toleration", "team=vision"])
    pipeline, given = training.arguments(args, Params())
    assert pipeline is training.training
    assert given == {
        "data_revision": "7",
        "parts": ["1/3", "2/3", "3/3"],
        "gpu_type": "nvidia.com/mig-1g.5gb",
        "num_gpus": 2,
        "node_selector": {"pool": "gpu"},
        "tolerations": [
            {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"},
            {"key": "team", "operator": "Equal", "value": "vision"},
        ],
        "ui": "",
    }
    pipeline, given = training.arguments(parser.parse_args(["--num-nodes", "2"]), Params())
    assert (pipeline, given["num_nodes"]) == (training.training_on_nodes, 2)
