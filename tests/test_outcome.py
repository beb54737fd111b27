"""The end of a stage on the command line: what was written, the next command, and what an interrupt leaves."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adfm import cli, outcome
from adfm.params import Params
from adfm.training import checkpoints
from adfm.training.sft import sft
from tests.interrupts import heed_sigint

TRAIN = "adfm train data/shards models/sft models/trained"
EVALUATE = (
    "adfm evaluate models/trained data/shards evaluation --compare detector=models/detector --compare sft=models/sft"
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("ADFM_REPORTS", "DVC_STAGE", "KUBERNETES_SERVICE_HOST", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def finished(command: str, seconds: float = 1.0) -> list[str]:
    """The lines at the end of a command."""
    args = cli._parse(shlex.split(command)[1:])
    args.settings = Params()
    if args.name == "fetch":
        args.files, args.bytes = 12345, 6_700_000
    return outcome.finished(args, seconds).splitlines()


def next_command(command: str) -> str:
    line = finished(command)[-1]
    assert line.startswith("next: ")
    cli._parse(shlex.split(line.removeprefix("next: "))[1:])  # it can be typed
    return line.removeprefix("next: ")


def write(file: str, content: object) -> None:
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def models() -> list[str]:
    """The folders of finished models, in the order of the path."""
    folders = [f"models/{name}" for name in ("sft", "detector", "trained")]
    for folder, stage in zip(folders, ("sft", "detector", "train"), strict=True):
        write(f"{folder}/adfm.json", {"stage": stage})
    return folders


def test_the_first_commands_of_the_path_follow_one_another() -> None:
    assert next_command("adfm check") == "adfm fetch 'synthetic://?images=200' data/raw/synthetic"
    assert finished("adfm fetch x.zip 'data/raw/my line'") == [
        "wrote data/raw/my line: 12,345 files, 6.7 MB, in 1.0 s",
        "next: adfm convert 'data/raw/my line' data/shards",
    ]
    assert next_command("adfm convert data/raw/line data/shards") == "adfm validate data/shards"
    assert next_command("adfm validate data/shards") == "adfm sft data/shards models/sft"


def test_after_a_model_comes_the_first_that_is_missing_and_then_the_evaluation(models: list[str]) -> None:
    sft, detector, _ = (Path(folder, "adfm.json") for folder in models)
    assert next_command(TRAIN) == EVALUATE
    assert next_command("adfm detector data/shards models/detector") == EVALUATE
    detector.unlink()
    assert next_command(TRAIN) == "adfm detector data/shards models/detector"
    sft.unlink()
    assert next_command("adfm detector data/shards models/detector") == "adfm sft data/shards models/sft"
    other = TRAIN.replace("models/sft", "elsewhere/start")
    write("elsewhere/start/adfm.json", {"stage": "sft"})
    write("models/detector/adfm.json", {"stage": "detector"})
    assert next_command(other).endswith("--compare sft=elsewhere/start")


def test_what_follows_an_evaluation_and_a_registration_depends_on_them(models: list[str]) -> None:
    write("evaluation/evaluation.json", {"images": 1234})
    assert finished(EVALUATE, 75.4) == [
        "wrote evaluation: 1,234 images, 0.0 MB, in 1 min 15 s",
        "next: adfm register models/trained data/shards evaluation registration",
    ]
    assert len(finished(EVALUATE.replace("models/trained", "models/detector", 1))) == 1
    assert len(finished(EVALUATE.replace("models/trained", "models:/adfm/3", 1))) == 1

    register = "adfm register models/trained data/shards evaluation registration"
    write("registration/registration.json", {"model": "adfm", "version": "7", "gate": "passed"})
    assert finished(register, 7300) == [
        "wrote registration: version adfm/7, 0.0 MB, in 2 h 1 min",
        "next: adfm approve 7",
    ]
    write("registration/registration.json", {"model": "adfm", "version": "7", "gate": "failed"})
    assert len(finished(register)) == 1
    assert finished("adfm approve 7") == ["next: adfm promote 7"]
    assert finished("adfm promote 7") == finished("adfm audit") == []


def test_the_next_command_has_the_same_settings() -> None:
    settings = "--params params.yaml --params 'my own.yaml' --set convert.layout=coco --set seed=3"
    command = "adfm convert raw shards --params params.yaml --params 'my own.yaml' --layout coco --set seed=3"
    assert next_command(command) == f"adfm validate shards {settings}"


def test_parts_are_joined_when_all_are_there() -> None:
    write("parts/1/inspection.json", {})
    assert finished("adfm convert raw parts/1 --part 1/2") == []
    write("parts/2/inspection.json", {})
    assert next_command("adfm convert raw parts/2 --part 2/2") == "adfm convert raw data/shards --parts parts/1 parts/2"


def test_dvc_prints_its_next_stage_itself_and_programs_get_no_output(
    models: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(finished(TRAIN)) == 2
    monkeypatch.setenv("DVC_STAGE", "train")
    assert [line.partition(":")[0] for line in finished(TRAIN)] == ["wrote models/trained"]
    write("registration/registration.json", {"model": "adfm", "version": "7", "gate": "passed"})
    assert finished("adfm register models/trained data/shards evaluation registration")[-1] == "next: adfm approve 7"
    assert outcome.interrupted(cli._parse(TRAIN.split()[1:]), TRAIN.split()).endswith("\n  dvc repro")
    for name, value in (("ADFM_REPORTS", "/tmp"), ("KUBERNETES_SERVICE_HOST", "10.0.0.1"), ("RANK", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert finished(TRAIN) == []


@pytest.mark.parametrize(
    ("command", "folder", "message"),
    [
        ("adfm fetch s3://b/p raw", "raw.partial", "what was finished is kept in raw.partial; to continue"),
        ("adfm fetch s3://b/p raw", "", "nothing of it is kept; to start over"),
        ("adfm evaluate m s 'an evaluation'", "an evaluation.answers.partial", "an evaluation.answers.partial; to"),
        ("adfm sft s m", "m.partial", "nothing of it is kept; to start over"),
        ("adfm train s m t", "t.checkpoint/checkpoint-25", "checkpoints up to step 25 are kept in t.checkpoint; to"),
        ("adfm train s m t", "t.checkpoint", "nothing of it is kept; to start over"),
        ("adfm promote 3", "", "the same command completes what was begun"),
    ],
)
def test_an_interrupt_says_what_is_kept_and_the_command(command: str, folder: str, message: str) -> None:
    if folder:
        Path(folder).mkdir(parents=True)
    argv = shlex.split(command)[1:]
    text = outcome.interrupted(cli._parse(argv), ["adfm", *argv])
    assert message in text
    assert text.endswith(f"\n  {command}")


@pytest.mark.timeout(900)
def test_ctrl_c_in_a_training_says_which_checkpoint_is_kept(small_shards: Path, store: Path, here: Path) -> None:
    small = ["steps=500", "prompts_per_step=2", "num_generations=2", "max_completion_length=16", "checkpoint_every=1"]
    settings = [word for each in small for word in ("--set", f"train.{each}")]
    adfm = [sys.executable, "-m", "adfm"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    sft(small_shards, here / "start", Params.model_validate({"sft": {"steps": 0}}))
    command = ["train", str(small_shards), "start", "trained", *settings]
    process = subprocess.Popen(
        [*adfm, *command],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_sigint,
    )
    while not checkpoints.every(here / "trained.checkpoint"):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 130, error
    assert "Traceback" not in error
    step = checkpoints.every(here / "trained.checkpoint")[-1]
    assert f"adfm: interrupted; checkpoints up to step {step} are kept in trained.checkpoint" in error
    assert error.endswith(f"to continue, run the same command:\n  {shlex.join(['adfm', *command])}\n")
    assert not (here / "trained").exists()
