from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from adfm.errors import AdfmError
from adfm.method import prompt, rewards
from adfm.method.coordinates import Frame
from adfm.params import Params
from adfm.records import Box
from adfm.training import grpo
from adfm.training.warmup import warmup

WEIGHTS = torch.ones(3)


@pytest.fixture(scope="module")
def started(small_shards: Path, empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warm-up of no steps: the model that GRPO starts from."""
    folder = tmp_path_factory.mktemp("started")
    shutil.copy(empty_database, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        warmup(small_shards, folder / "warmup", Params.model_validate({"warmup": {"steps": 0}}))
    return folder / "warmup"


def test_utilisation_of_constructed_groups() -> None:
    same, right, wrong = [1.0, 1.0, 0.5], [1.0, 1.0, 0.2], [1.0, 0.0, 0.2]
    terms = torch.tensor([same, same, same, right, right, wrong, wrong, wrong])
    shares = grpo.utilisation(terms, WEIGHTS, group=2)
    assert shares == {
        "utilisation": 0.5,
        "utilisation/format": 0.0,
        "utilisation/classification": 0.25,
        "utilisation/localization": 0.25,
        "groups/all_right": 0.5,
        "groups/all_wrong": 0.25,
    }


def test_terms_that_cancel_out_teach_nothing() -> None:
    shares = grpo.utilisation(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), WEIGHTS, group=2)
    assert shares["utilisation"] == 0.0 and shares["utilisation/format"] == 1.0


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=3, max_size=3), min_size=8, max_size=8))
def test_utilisation_does_not_depend_on_order(rows: list[list[float]]) -> None:
    terms = torch.tensor(rows)
    turned = torch.cat([terms[4:].flip(0), terms[:4].flip(0)])
    assert grpo.utilisation(terms, WEIGHTS, 4) == grpo.utilisation(turned, WEIGHTS, 4)


def test_reward_functions_pay_what_the_profile_pays() -> None:
    box = Box(100, 100, 300, 300)
    texts = [prompt.answer("anomalous", [box], "spot"), prompt.answer("normal", []), "nonsense"]
    columns: dict[str, Any] = {
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "label": ["anomalous", "normal", "anomalous"],
        "regions": [[list(box)], [], [list(box)]],
        "frame": [[1000, 1000]] * 3,
    }
    for profile, score in rewards.PROFILES.items():
        for function in grpo.reward_functions(profile):
            expected = [
                getattr(score(text, label, [Box(*b) for b in regions], Frame(1000, 1000)), function.__name__)
                for text, label, regions in zip(texts, columns["label"], columns["regions"], strict=True)
            ]
            assert function(**columns, prompts=[], completion_ids=[]) == expected


def test_batch_that_does_not_divide_is_refused(small_shards: Path, started: Path, tmp_path: Path) -> None:
    params = Params.model_validate({"train": {"prompts_per_step": 3, "num_generations": 4, "micro_batch": 5}})
    with pytest.raises(AdfmError, match=r"train\.micro_batch: 5 does not divide the 12"):
        grpo.train(small_shards, started, tmp_path / "out", params)


def test_a_folder_without_adapter_is_refused(small_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(AdfmError, match="adfm warmup"):
        grpo.train(small_shards, tmp_path, tmp_path / "out", Params())


def test_training_is_watched_and_changes_the_adapter(
    small_shards: Path, started: Path, tmp_path: Path, params: Params
) -> None:
    from mlflow import MlflowClient
    from safetensors.torch import load_file

    grpo.train(small_shards, started, tmp_path / "trained", params)

    before, after = (load_file(m / "adapter_model.safetensors") for m in (started, tmp_path / "trained"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    description = json.loads((tmp_path / "trained" / "adfm.json").read_text())
    assert description["stage"] == "train" and description["base"]["name"] == "embedded://tiny-base"
    client = MlflowClient()
    run = client.get_run(description["mlflow_run_id"])
    for figure in (
        "reward", "reward_std", "rewards/localization/mean", "rewards/localization/std", "utilisation",
        "utilisation/classification", "groups/all_right", "groups/all_wrong", "kl", "entropy",
        "completions/mean_length", "completions/clipped_ratio", "learning_rate", "grad_norm", "seconds/generation",
        "seconds/scoring", "seconds/backward",
    ):  # fmt: skip
        history = client.get_metric_history(run.info.run_id, figure)
        assert [point.step for point in history] == [1, 2, 3, 4], figure
    pictures = [file.path for file in client.list_artifacts(run.info.run_id, "completions")]
    assert pictures == ["completions/step-00000.png", "completions/step-00002.png"]
    assert not (tmp_path / "trained.checkpoint").exists()


def test_groups_that_teach_nothing_are_drawn_anew(
    small_shards: Path, started: Path, tmp_path: Path, params: Params
) -> None:
    sampled = params.train.model_copy(update={"steps": 2, "resample": 3, "favour_doubt": True, "beta": 0.0})
    grpo.train(small_shards, started, tmp_path / "trained", params.model_copy(update={"train": sampled}))
    with (tmp_path / "trained" / "reward_curves.csv").open(newline="") as stream:
        steps = list(csv.DictReader(stream))
    assert len(steps) == 2
    for step in steps:
        assert float(step["utilisation"]) >= float(step["utilisation/drawn"]) > 0
        assert float(step["frac_reward_zero_std"]) == pytest.approx(1 - float(step["utilisation"]))


def test_groups_that_processes_would_share_are_not_drawn_anew(
    small_shards: Path, started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    params = Params.model_validate({"train": {"prompts_per_step": 3, "num_generations": 4, "resample": 1}})
    with pytest.raises(AdfmError, match=r"train\.resample: .* make train\.prompts_per_step a multiple of 2"):
        grpo.train(small_shards, started, tmp_path / "out", params)


def test_killed_training_goes_on_from_its_last_checkpoint(
    small_shards: Path, started: Path, tmp_path: Path, params: Params
) -> None:
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json", by_alias=True)))
    command = [sys.executable, "-m", "adfm", "train", str(small_shards), str(started), "trained"]
    checkpoints = tmp_path / "trained.checkpoint"
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not (checkpoints / "checkpoint-2" / "trainer_state.json").exists():
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "trained").exists()
    run_id = json.loads((checkpoints / "identity.json").read_text())["mlflow_run_id"]
    survived = json.loads((sorted(checkpoints.glob("checkpoint-*"))[-1] / "trainer_state.json").read_text())

    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    with (tmp_path / "trained" / "reward_curves.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    assert [float(row["reward"]) for row in rows][: survived["global_step"]] == [
        row["reward"] for row in survived["log_history"] if "reward" in row
    ]
    assert json.loads((tmp_path / "trained" / "adfm.json").read_text())["mlflow_run_id"] == run_id


def test_checkpoints_of_other_settings_are_not_used(
    small_shards: Path, started: Path, tmp_path: Path, params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "trained.checkpoint"
    grpo._identify(work, small_shards, started, params, "some-run")
    assert grpo._resume(work, small_shards, started, params) == "some-run"
    other = params.model_copy(update={"seed": 7})
    assert grpo._resume(work, small_shards, started, other) is None
    assert not work.exists() and "starting anew" in capsys.readouterr().out
