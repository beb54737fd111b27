"""The pipelines, run on this machine in subprocesses on the smallest settings that make sense."""

from __future__ import annotations

import argparse
import builtins
from pathlib import Path

import pytest

from adfm.data.conversion import convert
from adfm.data.sources import fetch
from adfm.files import digest
from adfm.params import Params, load
from pipelines import promotion, training
from pipelines.command import main
from tests.small import SMALL

pytestmark = pytest.mark.timeout(1200)


def run(*argv: str) -> int:
    return main(training.PIPELINES, training.options, training.arguments, ["run", *argv])


def test_data_that_are_not_fit_end_the_run_and_are_reported(
    here: Path, small: list[str], channel: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    unfit = ("--set", "validation.min_images_per_split=1000")
    assert run("--root", "out", "--parts", "2", *small, *unfit) == 1
    captured = capfd.readouterr()
    assert "is not fit to train on" in captured.out
    assert "Traceback" not in captured.out
    assert "adfm-training: error:" in captured.err
    assert not list((here / "out").glob("*/train"))
    assert list((here / "mlartifacts").rglob("validation/index.html"))  # the report of the failure is in MLflow
    assert len(channel) == 1
    assert "failed" in channel[0]
    assert builtins.print.__module__ == "builtins"  # KFP's indents, and parts side by side would leave it there

    assert len(list((here / "out").rglob("inspect-part/inspected"))) == 2
    (joined,) = (here / "out").rglob("convert-parts/shards")
    fetch("synthetic://?images=20", here / "synthetic")
    convert(here / "synthetic", here / "whole", load(None, SMALL))
    assert digest(joined) == digest(here / "whole")


def test_a_promotion_without_an_approval_moves_nothing(here: Path) -> None:
    argv = ["run", "--root", "out"]
    assert main(promotion.PIPELINES, promotion.options, promotion.arguments, argv) == 0
    (history,) = (here / "out").rglob("promote/history")
    assert "step" in history.read_text()


def test_settings_that_do_not_parse_start_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "params.yaml").write_text("train: {steps: many}\nsede: 1\n")
    assert run("--root", "out") == 1
    error = capsys.readouterr().err
    assert "params.yaml line 1: train.steps" in error
    assert "unknown setting `sede`; did you mean `seed`?" in error
    assert not (here / "out").exists()


def test_a_trainjob_without_a_cluster_starts_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--root", "out", "--num-nodes", "2") == 1
    assert "--num-nodes: a TrainJob needs a cluster; leave it out here." in capsys.readouterr().err
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--gpu-type", "nvidia.com/gpus"], "unknown GPU type 'nvidia.com/gpus'; the nearest is nvidia.com/gpu"),
        (["--num-gpus", "-1"], "'-1' is not a whole number from 0 on"),
        (["--num-nodes", "0"], "'0' is not a whole number from 1 on"),
        (["--parts", "two"], "'two' is not a whole number from 0 on"),
        (["--node-selector", "a100"], "'a100' is not KEY=VALUE"),
        (["--toleration", "gpu:Never"], "'gpu:Never' is not KEY[=VALUE][:EFFECT]"),
    ],
)
def test_what_no_cluster_could_follow_starts_nothing(
    here: Path, option: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as status:
        run("--root", "out", *option)
    assert status.value.code == 2
    assert message in capsys.readouterr().err
    assert not (here / "out").exists()


def test_options_become_the_arguments_of_the_pipeline() -> None:
    parser = argparse.ArgumentParser()
    parser.set_defaults(verb="submit")
    training.options(parser)
    options = "--gpu-type nvidia.com/mig-1g.5gb --num-gpus 2 --node-selector pool=gpu --data-revision 7"
    args = parser.parse_args([*options.split(), "--toleration", "gpu:NoSchedule", "--toleration", "team=vision"])
    pipeline, values = training.arguments(args, Params())
    assert pipeline is training.training
    assert values == {
        "data_revision": "7",
        "gpu_type": "nvidia.com/mig-1g.5gb",
        "num_gpus": 2,
        "node_selector": {"pool": "gpu"},
        "tolerations": [
            {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"},
            {"key": "team", "operator": "Equal", "value": "vision"},
        ],
        "ui": "",
    }


@pytest.mark.parametrize(
    ("options", "variant", "values"),
    [
        ([], "training", {}),
        (["--parts", "1"], "training-in-parts", {"parts": ["1/1"]}),
        (["--parts", "3"], "training-in-parts", {"parts": ["1/3", "2/3", "3/3"]}),
        # One machine too, when its checkpoints have to outlive a pod.
        (["--num-nodes", "1"], "training-on-nodes", {"num_nodes": 1}),
        (
            ["--num-nodes", "2", "--parts", "2"],
            "training-in-parts-on-nodes",
            {"parts": ["1/2", "2/2"], "num_nodes": 2},
        ),
    ],
)
def test_options_choose_the_variant(options: list[str], variant: str, values: dict[str, object]) -> None:
    parser = argparse.ArgumentParser()
    parser.set_defaults(verb="submit")
    training.options(parser)
    pipeline, arguments = training.arguments(parser.parse_args(options), Params())
    assert pipeline is training.PIPELINES[variant]
    assert {name: value for name, value in arguments.items() if name in ("parts", "num_nodes")} == values
    assert set(arguments) < set(pipeline.component_spec.inputs)
