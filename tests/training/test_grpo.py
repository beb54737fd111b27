from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adfm import tracking
from adfm.cli import main
from adfm.errors import AdfmError
from adfm.models import loading
from adfm.params import Health, Params
from adfm.training import checkpoints, grpo
from adfm.training.sft import sft


@pytest.fixture(scope="module")
def started(small_shards: Path, empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cold start of no steps: the model that GRPO starts from."""
    folder = tmp_path_factory.mktemp("started")
    shutil.copy(empty_database, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        sft(small_shards, folder / "sft", Params.model_validate({"sft": {"steps": 0}}))
    return folder / "sft"


def test_batch_that_does_not_divide_is_refused(small_shards: Path, started: Path, tmp_path: Path) -> None:
    params = Params.model_validate({"train": {"prompts_per_step": 3, "num_generations": 4, "micro_batch": 5}})
    with pytest.raises(AdfmError, match=r"train\.micro_batch: 5 does not divide the 12"):
        grpo.train(small_shards, started, tmp_path / "out", params)


def test_a_folder_without_adapter_is_refused(small_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(AdfmError, match="adfm sft"):
        grpo.train(small_shards, tmp_path, tmp_path / "out", Params())


@pytest.fixture(scope="module")
def trained(small_shards: Path, started: Path, params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training makes that nothing disturbs, with its MLflow store beside it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        grpo.train(small_shards, started, folder / "trained", params)
        torch.set_num_threads(threads)
    return folder / "trained"


def test_training_is_watched_and_changes_the_adapter(
    started: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    monkeypatch.chdir(trained.parent)
    before, after = (load_file(m / "adapter_model.safetensors") for m in (started, trained))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    description = json.loads((trained / "adfm.json").read_text())
    assert description["stage"] == "train" and description["base"]["name"] == "embedded://tiny-base"
    client = tracking.client()
    run = client.get_run(description["mlflow_run_id"])
    assert run.info.status == "FINISHED" and "mlflow_away" not in run.data.tags
    for figure in (
        "Overview/reward", "reward_std", "rewards/localization/mean", "rewards/localization/std",
        "Overview/utilisation", "Overview/balanced_accuracy",
        "utilisation/classification", "groups/all_right", "groups/all_wrong", "kl", "entropy",
        "completions/mean_length", "completions/clipped_ratio", "learning_rate", "grad_norm", "seconds/generation",
        "seconds/scoring", "seconds/backward", "answers/anomalous_share", "answers/normal_share",
        "images/anomalous_share",
    ):  # fmt: skip
        history = client.get_metric_history(run.info.run_id, figure)
        assert [point.step for point in history] == [1, 2, 3, 4], figure
    pictures = [file.path for file in client.list_artifacts(run.info.run_id, "completions")]
    assert pictures == ["completions/step-00000.png", "completions/step-00002.png"]
    [chart] = client.list_artifacts(run.info.run_id, "curves")
    assert chart.path == "curves/reward_curves.png" and (trained / "reward_curves.png").is_file()
    assert not list(trained.parent.glob("trained.*"))
    assert (trained / "trained_on.parquet").read_bytes() == (started / "trained_on.parquet").read_bytes()


def test_groups_without_variance_are_replaced(
    small_shards: Path, started: Path, tmp_path: Path, params: Params
) -> None:
    sampled = params.train.model_copy(
        update={"steps": 2, "dynamic_sampling": 3, "uncertainty_sampling": True, "beta": 0.0}
    )
    grpo.train(small_shards, started, tmp_path / "trained", params.model_copy(update={"train": sampled}))
    with (tmp_path / "trained" / "reward_curves.csv").open(newline="") as stream:
        steps = list(csv.DictReader(stream))
    assert len(steps) == 2
    for step in steps:
        assert float(step["utilisation"]) >= float(step["utilisation/drawn"]) > 0
        assert float(step["frac_reward_zero_std"]) == pytest.approx(1 - float(step["utilisation"]))


def test_sampling_and_optimizer_are_those_of_the_settings_and_nothing_of_the_model_folder(
    small_shards: Path, started: Path, tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import GenerationConfig, GenerationMixin, Trainer
    from transformers.generation.logits_process import MinPLogitsWarper

    def load(*arguments: Any, **named: Any) -> loading.Loaded:
        loaded = original_load(*arguments, **named)
        eager = GenerationConfig(do_sample=True, temperature=0.1, top_k=2, top_p=0.2, min_p=0.5, repetition_penalty=1.5)
        for model in (loaded.model, loaded.model.get_base_model()):
            model.generation_config.update(**eager.to_diff_dict())
        return loaded

    def processors(*arguments: Any, **named: Any) -> Any:
        made = original_processors(*arguments, **named)
        sampling.append({type(each).__name__: each for each in made})
        return made

    def optimizer(*arguments: Any) -> Any:
        made = original_optimizer(*arguments)
        optimizers.append(made)
        return made

    sampling: list[dict[str, Any]] = []
    optimizers: list[torch.optim.Optimizer] = []
    original_load, original_processors = loading.load, GenerationMixin._get_logits_processor
    original_optimizer = Trainer.create_optimizer
    monkeypatch.setattr(loading, "load", load)
    monkeypatch.setattr(GenerationMixin, "_get_logits_processor", processors)
    monkeypatch.setattr(Trainer, "create_optimizer", optimizer)
    changed = {"steps": 1, "temperature": 0.9, "top_p": 0.8, "top_k": 7, "weight_decay": 0.1, "adam_beta2": 0.95}
    for number, update in enumerate(({"steps": 1}, changed)):
        train = params.train.model_copy(update=update)
        grpo.train(small_shards, started, tmp_path / str(number), params.model_copy(update={"train": train}))
    default, published = sampling
    # 0 is what switches min_p off: without a value transformers takes the folder's.
    for made in sampling:
        assert isinstance(made["MinPLogitsWarper"], MinPLogitsWarper) and made["MinPLogitsWarper"].min_p == 0
    assert set(default) == {"SuppressTokensLogitsProcessor", "MinPLogitsWarper"}
    assert set(published) - set(default) == {"TemperatureLogitsWarper", "TopPLogitsWarper", "TopKLogitsWarper"}
    assert published["TemperatureLogitsWarper"].temperature == 0.9
    assert (published["TopPLogitsWarper"].top_p, published["TopKLogitsWarper"].top_k) == (0.8, 7)
    decays, betas = (
        [{group[name] for group in each.param_groups} for each in optimizers] for name in ("weight_decay", "betas")
    )
    assert decays == [{0.0}, {0.0, 0.1}]
    assert betas == [{(0.9, 0.999)}, {(0.9, 0.95)}]


def test_dynamic_sampling_refuses_groups_divided_among_processes(
    small_shards: Path, started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    params = Params.model_validate({"train": {"prompts_per_step": 3, "num_generations": 4, "dynamic_sampling": 1}})
    with pytest.raises(AdfmError, match=r"train\.dynamic_sampling: .* make train\.prompts_per_step a multiple of 2"):
        grpo.train(small_shards, started, tmp_path / "out", params)


ENDS = """
import os, signal, sys
from adfm.cli import main
from adfm.training import checkpoints, trainer
signal_, place = sys.argv[1].split()

def then(count, function):
    calls = []
    def ended(*given, **named):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), getattr(signal, signal_))
        return function(*given, **named)
    return ended

if place == "saving":  # written, and not yet renamed
    checkpoints.publish = then(2, checkpoints.publish)
elif place == "removing":  # an older checkpoint, half gone
    rmtree = checkpoints.shutil.rmtree
    end = then(1, rmtree)
    checkpoints.shutil.rmtree = lambda path, *given, **named: (
        end if os.path.exists(path) and "removed-" in str(path) else rmtree
    )(path, *given, **named)
else:
    trainer.utilisation = then(1, trainer.utilisation)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.timeout(900)
def test_a_training_that_is_killed_at_any_moment_resumes_bitwise(
    small_shards: Path, started: Path, trained: Path, tmp_path: Path, params: Params
) -> None:
    (tmp_path / "params.yaml").write_text(tracking.settings(params))
    verb = ["train", str(small_shards), str(started), "trained", "--set", "train.health.patience=0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    work = tmp_path / "trained.checkpoint"

    def ended(by: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", ENDS, by, *verb]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert not (tmp_path / "trained").exists()
        return done

    assert ended("SIGKILL saving").returncode == -signal.SIGKILL
    assert checkpoints.every(work) == [1]
    assert (checkpoints.partial(work) / "checkpoint-2" / "trainer_state.json").exists()
    run_id = json.loads((work / "identity.json").read_text())["mlflow_run_id"]

    done = ended("SIGTERM scoring")
    assert done.returncode == 75, done.stderr
    assert "an unfinished checkpoint is removed" in done.stdout
    assert "after step 2 of 4; the same command resumes from trained.checkpoint/checkpoint-2" in done.stderr
    assert checkpoints.every(work) == [1, 2]
    assert tracking.client().get_run(run_id).info.status == "KILLED"

    assert ended("SIGKILL removing").returncode == -signal.SIGKILL
    assert checkpoints.every(work) == [2, 3]

    assert main(verb) == 0
    for file in ("adapter_model.safetensors", "reward_curves.csv"):
        ours, other = (_but_for_time(folder / file) for folder in (tmp_path / "trained", trained))
        assert ours == other, file
    assert json.loads((tmp_path / "trained" / "adfm.json").read_text())["mlflow_run_id"] == run_id
    history = tracking.client().get_metric_history(run_id, "Overview/reward")
    assert [point.step for point in history] == [1, 2, 3, 4]


def _but_for_time(file: Path) -> Any:
    """The content of a file; of curves, without how long things took."""
    if file.suffix != ".csv":
        return file.read_bytes()
    with file.open() as stream:
        rows = list(csv.DictReader(stream))
    return [{k: v for k, v in row.items() if not k.startswith("seconds") and k != "step_time"} for row in rows]


def test_a_diverged_training_is_stopped_and_not_resumed(
    small_shards: Path, started: Path, tmp_path: Path, params: Params
) -> None:
    strict = params.train.model_copy(update={"health": Health(patience=2, min_utilisation=1.0)})
    ill = params.model_copy(update={"train": strict})
    with pytest.raises(AdfmError, match=r"(?s)steps 1 to 2: at most .* of the groups.*no checkpoint from before it"):
        grpo.train(small_shards, started, tmp_path / "trained", ill)
    assert not (tmp_path / "trained").exists()
    work = tmp_path / "trained.checkpoint"
    assert checkpoints.every(work) == []
    run_id = json.loads((work / "identity.json").read_text())["mlflow_run_id"]
    assert tracking.client().get_run(run_id).info.status == "FAILED"
    with pytest.raises(AdfmError, match="Nothing has changed since"):
        grpo.train(small_shards, started, tmp_path / "trained", ill)
    assert grpo._resume(work, small_shards, started, params) == run_id


def test_checkpoints_of_other_settings_are_not_used(
    small_shards: Path, started: Path, tmp_path: Path, params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "trained.checkpoint"
    grpo._identify(work, small_shards, started, params, "some-run")
    assert grpo._resume(work, small_shards, started, params) == "some-run"
    other = params.model_copy(update={"seed": 7})
    assert grpo._resume(work, small_shards, started, other) is None
    assert not work.exists() and (tmp_path / "trained.old.checkpoint" / "identity.json").is_file()
    output = capsys.readouterr().out
    assert (
        "of other data, model or settings: seed (0, now 7); they are set aside" in output and "starting over" in output
    )
