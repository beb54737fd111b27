"""The outbox against an MLflow server that goes away; here, because the server's fixtures are."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from mlflow import MlflowClient
from PIL import Image

from adfm import tracking
from adfm.errors import AdfmError
from adfm.params import Params
from adfm.training import grpo, trainer
from adfm.training.outbox import Outbox, resend
from adfm.training.sft import sft


class Server:
    """An MLflow server that can go away and come back."""

    def __init__(self, start: Callable[..., AbstractContextManager[str]], home: Path, database: Path) -> None:
        self._start, self._home, self._database = start, home, database
        self._running, self._port = ExitStack(), 0

    def start(self) -> str:
        uri = self._running.enter_context(self._start(self._home, self._database, port=self._port))
        self._port = urlsplit(uri).port or 0
        return uri

    def stop(self) -> None:
        self._running.close()


@pytest.fixture
def away(
    start_mlflow: Callable[..., AbstractContextManager[str]],
    empty_database: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Server]:
    server = Server(start_mlflow, tmp_path / "server", empty_database)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.start())
    monkeypatch.chdir(tmp_path)
    yield server
    server.stop()


def begin() -> str:
    return tracking.client().create_run(tracking.experiment("adfm")).info.run_id


def steps(run: str, figure: str = "reward") -> list[int]:
    return [point.step for point in MlflowClient().get_metric_history(run, figure)]


def wait_for(message: str, capsys: pytest.CaptureFixture[str]) -> None:
    seen = ""
    deadline = time.monotonic() + 200
    while message not in seen:
        assert time.monotonic() < deadline, seen
        time.sleep(0.05)
        seen += capsys.readouterr().out


def test_metrics_are_kept_while_the_server_is_away_and_sent_in_order(
    away: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, folder = begin(), tmp_path / "trained.unsent"
    with Outbox(folder, run) as outbox:
        outbox.add({"reward": 0.1}, 1)
        while not steps(run):
            time.sleep(0.05)
        away.stop()
        outbox.add({"reward": 0.2}, 2)
        outbox.add_picture(Image.new("RGB", (8, 8)), "completions/step-00002.png")
        wait_for("MLflow does not answer", capsys)
        outbox.add({"reward": 0.3}, 3)
        away.start()
        wait_for("MLflow is back", capsys)
        outbox.add({"reward": 0.4}, 4)
        outbox.add({"reward": 9.9}, 4)  # as after a kill: a step that was taken is not taken again
    assert [point.value for point in MlflowClient().get_metric_history(run, "reward")] == [0.1, 0.2, 0.3, 0.4]
    assert [file.path for file in MlflowClient().list_artifacts(run, "completions")] == ["completions/step-00002.png"]
    finished = MlflowClient().get_run(run)
    assert finished.info.status == "FINISHED"
    assert finished.data.tags["mlflow_away"] == "steps 2 to 3"
    assert not folder.exists()


@pytest.mark.timeout(900)
def test_a_server_that_never_comes_back_costs_no_training(
    away: Server,
    small_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = {"steps": 3, "prompts_per_step": 2, "num_generations": 2, "max_completion_length": 16, "pictures_every": 1}
    params = Params.model_validate({"sft": {"steps": 0}, "train": small})
    sft(small_shards, tmp_path / "sft", params)
    score, seen = trainer.utilisation, []

    def stop_the_server(*given: Any) -> dict[str, float]:
        seen.append(1)
        if len(seen) == 2:
            away.stop()
        return score(*given)

    monkeypatch.setattr(trainer, "utilisation", stop_the_server)
    grpo.train(small_shards, tmp_path / "sft", Path("trained"), params)
    message = capsys.readouterr().out
    assert message.count("MLflow does not answer") == 1
    assert "The model is written all the same" in message and "adfm resend trained.unsent" in message
    run = json.loads((tmp_path / "trained" / "adfm.json").read_text())["mlflow_run_id"]
    with pytest.raises(AdfmError, match="MLflow at"):
        resend(Path("trained.unsent"))

    away.start()
    resend(Path("trained.unsent"))
    assert steps(run, "Overview/reward") == [1, 2, 3]
    assert len(MlflowClient().list_artifacts(run, "completions")) == 3
    assert MlflowClient().get_run(run).info.status == "FINISHED"
    assert not (tmp_path / "trained.unsent").exists()


def test_what_a_killed_process_left_is_sent_once(store: Path) -> None:
    run, folder = begin(), store / "trained.unsent"
    folder.mkdir()
    lines = [f'{{"step": {step}, "figures": {{"reward": {step}.0}}, "time": {step}}}\n' for step in (1, 2)]
    (folder / f"{run}.jsonl").write_text("".join(lines) + '{"step": 3, "fig')
    (folder / f"{run}.sent").write_text("")  # it had sent the first, and not recorded it
    MlflowClient().log_metric(run, "reward", 1.0, timestamp=1, step=1)
    with Outbox(folder, run) as outbox:
        outbox.add({"reward": 3.0}, 3)
    assert steps(run) == [1, 2, 3]
    assert not folder.exists()


def test_unsent_metrics_of_an_earlier_run_are_sent_by_the_next(store: Path, capsys: Any) -> None:
    folder, (earlier, deleted, run) = store / "trained.unsent", [begin() for _ in range(3)]
    folder.mkdir()
    for each in (earlier, deleted):
        (folder / f"{each}.jsonl").write_text('{"step": 7, "figures": {"reward": 0.5}, "time": 1}\n')
    MlflowClient().delete_run(deleted)
    with Outbox(folder, run):
        assert steps(earlier) == [7]
    assert [file.name for file in folder.iterdir()] == [f"{deleted}.jsonl"]
    assert f"mlflow runs restore --run-id {deleted}" in capsys.readouterr().out


def test_unsent_metrics_of_a_deleted_run_are_kept_until_it_is_restored(store: Path, capsys: Any) -> None:
    folder, (deleted, gone, kept) = store / "trained.unsent", sorted(begin() for _ in range(3))
    folder.mkdir()
    line = '{"step": 7, "figures": {"reward": 0.5}, "time": 1}\n'
    for run in (deleted, gone, kept):
        (folder / f"{run}.jsonl").write_text(line)
    picture = folder / deleted / "completions" / "step-00007.png"
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(picture)
    with (folder / f"{deleted}.jsonl").open("a") as journal:
        journal.write('{"picture": "completions/step-00007.png", "time": 1}\n')
    MlflowClient().delete_run(deleted)
    with closing(sqlite3.connect(store / "mlflow.db")) as database, database:
        database.execute("DELETE FROM runs WHERE run_uuid = ?", (gone,))  # as `mlflow gc` does

    with pytest.raises(AdfmError) as error:
        resend(folder)
    first, second = str(error.value).splitlines()
    assert f"run {deleted}: was deleted" in first and f"mlflow runs restore --run-id {deleted}" in first
    assert f"run {gone}: " in second and "does not have it" in second and "MLFLOW_TRACKING_URI" in second
    assert f"remove {folder / f'{gone}.jsonl'}" in second
    assert steps(kept) == [7] and f"run {kept}: done" in capsys.readouterr().out
    left = [deleted, f"{deleted}.jsonl", f"{gone}.jsonl"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(left) and picture.is_file()

    (folder / f"{gone}.jsonl").unlink()
    command = [sys.executable, "-m", "mlflow", "runs", "restore", "--run-id", deleted]
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{store / 'mlflow.db'}"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    resend(folder)
    assert steps(deleted) == [7]
    assert [file.path for file in MlflowClient().list_artifacts(deleted, "completions")] != []
    assert not folder.exists()


@pytest.mark.parametrize("sent", ["", "x", "5", "9999"])
def test_a_count_that_is_not_of_the_journal_loses_nothing(sent: str, store: Path) -> None:
    run, folder = begin(), store / "trained.unsent"
    folder.mkdir()
    lines = [f'{{"step": {step}, "figures": {{"reward": {step}.0}}, "time": {step}}}\n' for step in (1, 2)]
    (folder / f"{run}.jsonl").write_text("".join(lines))
    (folder / f"{run}.sent").write_text(sent)
    resend(folder)
    assert steps(run) == [1, 2]
    assert not folder.exists()


def test_damaged_lines_are_reported_and_all_others_sent(store: Path) -> None:
    folder, (damaged, run) = store / "trained.unsent", sorted(begin() for _ in range(2))
    folder.mkdir()
    line = '{"step": 7, "figures": {"reward": 0.5}, "time": 1}\n'
    (folder / f"{run}.jsonl").write_text(line)
    journal = folder / f"{damaged}.jsonl"
    journal.write_bytes(b'\0\0\xff\n3\n{"step": 6}\n' + line.encode())
    with pytest.raises(AdfmError, match=rf"{damaged}\.jsonl: line 1, 2, 3 cannot be read.* All others are in MLflow"):
        resend(folder)
    assert steps(damaged) == steps(run) == [7]
    assert list(folder.glob("*.jsonl")) == [journal]
    with Outbox(folder, damaged) as outbox:  # a training that resumes does not fail for it
        outbox.add({"reward": 0.6}, 8)
    assert steps(damaged) == [7, 8]


def test_a_file_that_is_not_of_a_run_is_left_as_it_is(store: Path) -> None:
    file = store / "images.jsonl"
    file.write_text('{"of": "somebody else"}\n{"without": "an end of line"}')
    with pytest.raises(AdfmError, match="run images: .* does not have it"):
        resend(store)
    assert file.read_text().endswith('line"}')


def test_unsent_metrics_outlive_the_copy_in_which_dvc_runs_an_experiment(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(store))
    copy = store / ".dvc" / "tmp" / "exps" / "tmp7"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    run = begin()
    monkeypatch.setattr("adfm.training.outbox._send", lambda _: 1 / 0)
    with Outbox(Path("models/trained.unsent"), run) as outbox:
        outbox.add({"reward": 0.5}, 1)
        outbox.add_picture(Image.new("RGB", (8, 8)), "completions/step-00001.png")
    monkeypatch.undo()
    monkeypatch.chdir(store)
    assert f"adfm resend {store}/models/trained.unsent" in capsys.readouterr().out
    resend(Path("models/trained.unsent"))
    assert steps(run) == [1]
    assert len(MlflowClient().list_artifacts(run, "completions")) == 1
    assert not Path("models/trained.unsent").exists()


def test_a_training_that_fails_before_its_first_step_ends_with_its_own_error(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Outbox(tmp_path / "trained.unsent", "0" * 32):
        raise ZeroDivisionError


def test_a_folder_without_a_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdfmError, match=r"contains no unsent metrics.*<OUT>\.unsent"):
        resend(tmp_path)
