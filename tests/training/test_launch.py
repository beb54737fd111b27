"""Training in several processes of one machine."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from adfm.errors import AdfmError
from adfm.method.terms import Terms
from adfm.params import Params
from adfm.process import cpus
from adfm.process.stopping import Stopped
from adfm.tracking import settings
from adfm.training import checkpoints, grpo, launch
from adfm.training.callbacks import MetricsCallback
from adfm.training.sft import sft

# `accelerate launch --cpu --num_processes 2` starts one process.
IN_TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
# So cold that a completion does not depend on chance, and all rewards can be compared.
SMALL = {"steps": 3, "prompts_per_step": 2, "num_generations": 2, "max_completion_length": 16, "temperature": 1e-3}
OFTEN = {"checkpoint_every": 1, "pictures_every": 1, "beta": 0.0}
COLD = Params.model_validate({"sft": {"steps": 0}, "train": SMALL | OFTEN})


@pytest.fixture(scope="module")
def undisturbed(small_shards: Path, empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `sft`, and `trained` by one process that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder)
        shutil.copy(empty_database, folder / "mlflow.db")
        sft(small_shards, folder / "sft", COLD)
        grpo.train(small_shards, folder / "sft", folder / "trained", COLD)
    return folder


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_PAUSE", 0.0)


def run_as(patch: pytest.MonkeyPatch, *command: object) -> None:
    """Has `launch` start this in the place of `python -m`."""
    patch.setattr(launch, "_launcher", lambda gpus: [str(part) for part in command])


def run_code(patch: pytest.MonkeyPatch, code: str) -> None:
    """Has `launch` start one process that runs the code; `out` is its model's folder."""
    start = "import os, pathlib, signal, sys; from adfm.training import launch; out = pathlib.Path(sys.argv[5])"
    run_as(patch, sys.executable, "-c", f"{start}\n{code}")


def train(folder: Path, gpus: int = 0, **settings: object) -> None:
    params = Params.model_validate({"train": settings})
    launch.on_gpus(folder / "shards", folder / "sft", folder / "trained", params, gpus)


def test_several_gpus_are_used_by_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = launch._launcher(2)
    assert command[1:6] == ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    assert command[command.index("--num_processes") + 1] == "2" and command[-1] == "-m"
    monkeypatch.setenv("OMP_NUM_THREADS", "8")  # of the pod: each process has its share
    monkeypatch.setattr(cpus, "count", lambda: 8)
    command = launch._launcher(4)
    assert command[command.index("--num_cpu_threads_per_process") + 1] == "2"
    assert launch._launcher(1) == launch._launcher(0) == [sys.executable, "-m"]
    run_code(monkeypatch, "from adfm.params import load; assert load([pathlib.Path(sys.argv[7])], []).seed == 3")
    launch.on_gpus(tmp_path / "s", tmp_path / "m", tmp_path / "o", Params(seed=3), 0)


def test_processes_that_die_are_started_three_times_from_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "_PAUSE", 0.1)
    run_code(monkeypatch, "print('start', flush=True); os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(AdfmError) as caught:
        train(tmp_path)
    text = str(caught.value)
    assert text.startswith("training died 3 times from its beginning on without a later checkpoint")
    assert "its process was killed by SIGKILL" in text and "\n" not in text and not isinstance(caught.value, Stopped)
    log = capfd.readouterr().out.splitlines()
    assert log == [
        "start",
        "training died: its process was killed by SIGKILL; try 2 of 3 in 0.1 s, from its beginning",
        "start",
        "training died: its process was killed by SIGKILL; try 3 of 3 in 0.2 s, from its beginning",
        "start",
    ]


def test_a_later_checkpoint_gives_as_many_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code = """
work = out.with_name("trained.checkpoint")
starts = len(list(work.glob("start-*")))
(work / f"start-{starts}").mkdir(parents=True)
(work / "checkpoint-1").mkdir(exist_ok=True)
if starts == 2:
    (work / "checkpoint-5").mkdir()
os.kill(os.getpid(), signal.SIGSEGV)
"""
    run_code(monkeypatch, code)
    with pytest.raises(AdfmError, match="died 3 times from .*checkpoint-5 on .*SIGSEGV"):
        train(tmp_path)
    tries = [line.partition("; ")[2] for line in capfd.readouterr().out.splitlines() if "training died" in line]
    first, later = (f"from {tmp_path / 'trained.checkpoint' / name}" for name in ("checkpoint-1", "checkpoint-5"))
    # The first start reached checkpoint-1, the third checkpoint-5.
    assert tries == [f"try {n} of 3 in 0 s, {place}" for n, place in ((2, first), (3, first), (2, later), (3, later))]


@pytest.mark.parametrize(
    ("code", "expected", "starts"),
    [
        ("raise AdfmError('bad data\\nin shard 3')", "^bad data\nin shard 3$", 1),
        ("raise Unreachable('MLflow is away')", "process exited with 1 .MLflow is away", 3),
        ("raise TypeError('a bug')", "^TypeError: a bug$", 1),
        ("raise RuntimeError('NCCL error\\nand more')", "process exited with 1 .RuntimeError: NCCL error.", 3),
        ("raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')", "^RuntimeError: CUDA out of memory", 1),
        ("raise RuntimeError('CUDA error: device-side assert triggered')", "^RuntimeError: .* assert triggered$", 1),
        ("raise ConnectionResetError(104, 'reset')", "ConnectionResetError: .*reset", 3),
        ("raise FileNotFoundError(2, 'gone')", "^FileNotFoundError: .*gone$", 1),
        ("os._exit(2)", "exited with status 2", 1),
        ("os.abort()", "killed by SIGABRT", 3),
    ],
)
def test_only_transient_errors_are_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, expected: str, starts: int
) -> None:
    run_code(
        monkeypatch,
        f"""
(out.parent / f"start-{{len(list(out.parent.glob('start-*')))}}").touch()
from adfm.errors import AdfmError, Unreachable
with launch.reported():
    {code}
""",
    )
    with pytest.raises(AdfmError, match=expected):
        train(tmp_path)
    assert len(list(tmp_path.glob("start-*"))) == starts


@pytest.mark.parametrize(
    "code",
    [
        "from adfm.process.stopping import Stopped\nwith launch.reported(): raise Stopped('after step 3')",
        "os.kill(os.getpid(), signal.SIGTERM)",
        "sys.exit(130)",
    ],
)
def test_a_training_stopped_by_a_signal_is_not_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    run_code(monkeypatch, f"(out.parent / 'start').mkdir()\n{code}")
    with pytest.raises(Stopped, match="after step 3|resumes"):
        train(tmp_path)


def test_a_sigterm_is_passed_on_and_stops_a_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = tmp_path / "ready"
    code = "signal.signal(signal.SIGTERM, lambda *_: os._exit(75))\n(out.parent / 'ready').touch()\nsignal.pause()"
    run_code(monkeypatch, code)

    def terminate() -> None:
        while not ready.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate).start()
    with pytest.raises(Stopped, match="resumes"):
        train(tmp_path)

    ready.unlink()
    monkeypatch.setattr(launch, "_PAUSE", 60.0)
    run_code(monkeypatch, "(out.parent / 'ready').touch(); os.kill(os.getpid(), signal.SIGKILL)")
    threading.Thread(target=terminate).start()
    begun = time.monotonic()
    with pytest.raises(Stopped, match="resumes"):
        train(tmp_path)
    assert time.monotonic() - begun < 30


def test_a_complete_model_counts_though_its_process_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_code(monkeypatch, "out.mkdir(); (out / 'adfm.json').write_text('{}'); os.kill(os.getpid(), signal.SIGKILL)")
    train(tmp_path)
    with pytest.raises(AdfmError, match="holds a finished model"):
        train(tmp_path)


def test_the_cold_start_runs_in_a_process_of_its_own_and_is_started_again(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code = """
import runpy
if not (mark := pathlib.Path("died")).exists():
    mark.touch()
    os.kill(os.getpid(), signal.SIGKILL)
sys.argv[0:2] = ["adfm"]
runpy.run_module("adfm", run_name="__main__")
"""
    run_as(monkeypatch, sys.executable, "-c", f"import os, pathlib, signal, sys\n{code}")
    launch.cold_start(small_shards, tmp_path / "sft", COLD)
    assert json.loads((tmp_path / "sft" / "adfm.json").read_text())["stage"] == "sft"
    assert "was killed by SIGKILL; try 2 of 3 in 0 s, from its beginning" in capfd.readouterr().out


RANK = """
import os, pathlib, signal, sys, time
from adfm.errors import AdfmError
from adfm.training import launch
rank, folder = os.environ["RANK"], pathlib.Path(sys.argv[5]).parent
start = len(list(folder.glob(f"start-{rank}-*")))
(folder / f"start-{rank}-{start}").write_text(str(os.getpid()))
with launch.reported():
"""


def run_ranks(patch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    """Has `launch` start two processes by accelerate."""
    script = folder / "rank.py"
    script.write_text(RANK + code)
    run_as(patch, *launch._launcher(2)[:-1], script)


@pytest.mark.timeout(120)
def test_an_error_of_one_of_two_processes_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
    if rank == "0":
        raise AdfmError("the loss is not a number")
    time.sleep(1)
    raise RuntimeError("connection closed by peer")
"""
    run_ranks(monkeypatch, tmp_path, code)
    with pytest.raises(AdfmError, match="^the loss is not a number$"):
        train(tmp_path, 2)
    assert len(list(tmp_path.glob("start-0-*"))) == 1


@pytest.mark.timeout(120)
def test_a_dead_one_of_two_processes_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code = """
    if rank == "1" and start == 0:
        while not (folder / "start-0-0").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    if start == 0:
        time.sleep(60)
"""
    run_ranks(monkeypatch, tmp_path, code)
    train(tmp_path, 2)
    log = capfd.readouterr()
    assert "training died: process 1 of several was killed by SIGKILL; try 2 of 3 in 0 s, from its beginning" in log.out
    assert "ChildFailedError" in log.err


@pytest.mark.timeout(120)
def test_processes_end_with_their_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
    if start == 0:
        while rank == "0" and not (folder / "start-1-0").exists():
            time.sleep(0.05)
        time.sleep(0.5)
        if rank == "0":
            os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
"""
    run_ranks(monkeypatch, tmp_path, code)
    train(tmp_path, 2)
    for rank in (0, 1):
        pid = (tmp_path / f"start-{rank}-0").read_text()
        state = Path("/proc", pid, "stat")
        assert not state.exists() or ") Z " in state.read_text()


def test_a_batch_that_does_not_divide_starts_nothing(tmp_path: Path) -> None:
    with pytest.raises(AdfmError, match="in each of 5 processes does not divide the 48"):
        launch.on_gpus(tmp_path / "s", tmp_path / "m", tmp_path / "o", Params(), 5)


@pytest.mark.timeout(600)
def test_sigterm_stops_two_processes_together_with_a_checkpoint(small_shards: Path, tmp_path: Path) -> None:
    small = {"steps": 500, "prompts_per_step": 2, "num_generations": 2, "max_completion_length": 16}
    params = Params.model_validate({"sft": {"steps": 0}, "train": small | {"checkpoint_every": 1}})
    sft(small_shards, tmp_path / "sft", params)
    (tmp_path / "params.yaml").write_text(settings(params))
    command = launch.command(small_shards, tmp_path / "sft", tmp_path / "trained", tmp_path / "params.yaml")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = subprocess.Popen([*IN_TWO, *command], env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "trained.checkpoint" / "checkpoint-1").is_dir():
        assert processes.poll() is None
        time.sleep(0.05)
    processes.terminate()
    output = processes.communicate()[1]
    assert processes.returncode and "adfm: stopped with the first process" in output, output
    newest = checkpoints.last(tmp_path / "trained.checkpoint")
    assert newest and (newest / "rng_state_1.pth").is_file()
    assert f"the same command resumes from {newest}" in output

    from adfm import tracking

    (run,) = tracking.client().search_runs([tracking.experiment("adfm")], "tags.stage = 'train'")
    assert run.info.status == "KILLED"


@pytest.mark.timeout(600)
def test_two_processes_resume_a_checkpoint_of_one_with_the_same_result(
    small_shards: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = COLD
    stop_at_step(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        grpo.train(small_shards, undisturbed / "sft", tmp_path / "trained", params)
    assert (tmp_path / "trained.checkpoint" / "checkpoint-1").is_dir()

    (tmp_path / "params.yaml").write_text(settings(params))
    command = launch.command(small_shards, undisturbed / "sft", tmp_path / "trained", tmp_path / "params.yaml")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*IN_TWO, *command], check=True, env=environment, cwd=tmp_path)

    description = json.loads((tmp_path / "trained" / "adfm.json").read_text())
    assert yaml.safe_load(settings(Params.model_validate(description["params"]))) == yaml.safe_load(settings(params))
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob("*.checkpoint"))
    assert finished_with_the_curves_of(undisturbed, tmp_path) == description["mlflow_run_id"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_process_is_restarted_from_its_checkpoint(
    small_shards: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    processes: int,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    work = tmp_path / "trained.checkpoint"
    monkeypatch.setenv("ADFM_TEST_DEATH", f"2:{processes - 1}:{work}")
    run_as(monkeypatch, *launch._launcher(processes)[:-1], Path(__file__).with_name("dying.py"))
    launch.on_gpus(small_shards, undisturbed / "sft", tmp_path / "trained", COLD, processes)

    log = capfd.readouterr().out
    who = "process 1 of several" if processes == 2 else "its process"
    assert f"training died: {who} was killed by SIGKILL" in log
    assert f"try 2 of 3 in 0 s, from {work / 'checkpoint-1'}" in log
    assert "an unfinished checkpoint is removed" in log and not work.exists()
    finished_with_the_curves_of(undisturbed, tmp_path)


def finished_with_the_curves_of(undisturbed: Path, folder: Path) -> str:
    """Compares the training in a folder with the undisturbed one; the id of its one run."""
    for figure in ("step", *(f"rewards/{term}/mean" for term in Terms._fields), "completions/mean_length"):
        values, expected = (curve(each / "trained" / "reward_curves.csv", figure) for each in (folder, undisturbed))
        assert len(expected) == 3 and values == pytest.approx(expected, abs=1e-6), figure

    from adfm import tracking

    (run,) = tracking.client().search_runs([tracking.experiment("adfm")], "tags.stage = 'train'")
    assert run.info.status == "FINISHED"
    return str(run.info.run_id)


def stop_at_step(step: int, patch: pytest.MonkeyPatch) -> None:
    """Interrupts the next training at this step, once its checkpoint before it is written."""
    original = MetricsCallback.on_log

    def on_log(self: MetricsCallback, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt
        original(self, args, state, control, **given)

    patch.setattr(MetricsCallback, "on_log", on_log)


def curve(file: Path, figure: str) -> list[float]:
    with file.open(newline="") as stream:
        return [float(row[figure]) for row in csv.DictReader(stream)]
