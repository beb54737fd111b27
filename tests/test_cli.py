"""The command line: its verbs, its errors and exit codes, and what happens around the functions that it calls."""

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from adfm import cli
from adfm.cli import main
from adfm.params import Train
from adfm.verbs import VERBS
from tests.interrupts import heed_sigint

HEAVY = "datasets great_expectations matplotlib mlflow numpy pandas peft pydantic scipy sklearn torch transformers trl"
WITHOUT_SETTINGS = {"completion", "env"}
FIRST_WORDS = {name.partition(" ")[0] for name in VERBS}
SHELLS = ("bash", "zsh", "tcsh", "fish")
LINE = json.dumps({"completion": "<answer>B</answer>", "label": "normal", "boxes": []}) + "\n"


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    file = tmp_path / "completions.jsonl"
    file.write_text(LINE * 3)
    return file


def adfm(*arguments: str | Path, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "adfm", *map(str, arguments)], stderr=subprocess.PIPE, text=True, **options
    )


def test_help_lists_every_verb_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, adfm.cli\n"
        "try: adfm.cli.main(['--help'])\n"
        f"finally: sys.stderr.write(' '.join(set({HEAVY.split()}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert all(f"\n  {verb} " in done.stdout for verb in VERBS)
    assert "adfm evaluate models/trained data/shards evaluation" in done.stdout


@pytest.mark.parametrize("verb", sorted(VERBS.keys() - WITHOUT_SETTINGS))
def test_every_verb_takes_settings(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*verb.split(), "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "--params FILE" in printed
    assert "--set KEY=VALUE" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "--set", "seed=1"], "adfm: error: unknown verb `trian`; did you mean `train`?\n"),
        (["--set", "seed=1", "audit"], "adfm: error: the verb comes first: adfm <verb> --set ...\n"),
        (["wombat"], "adfm: error: unknown verb `wombat`; `adfm --help` lists all verbs\n"),
        (["audit", "--sett=seed=1"], "adfm audit: error: unknown option `--sett`; did you mean `--set`?\n"),
        (["policy", "show", "--params", "a", "--wombat"], "`--wombat`; `adfm policy show --help` lists all options\n"),
        (["validate", "shards", "report", "more"], "adfm validate: error: unexpected argument `more`\n"),
    ],
)
def test_a_suggestion_is_made_only_if_one_is_near(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(message)


def test_without_a_verb_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 0
    without = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert capsys.readouterr().out == without


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers of all verbs."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in below:
        for each in action.choices.values():
            yield from leaves(each)
    if not below:
        yield parser


def test_the_help_describes_every_verb_that_the_parser_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    names = [leaf.prog.removeprefix("adfm ") for leaf in leaves(cli._parser()[0])]
    assert sorted(names) == sorted(VERBS)
    for line in cli._help().partition("\nfrom a data set to production")[0].splitlines()[3:]:
        assert len(line) <= 80 and not line.startswith(" " * 20), line  # a line a verb, on any terminal


@pytest.mark.parametrize("name", VERBS)
def test_the_help_of_a_verb_has_examples_that_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    printed = capsys.readouterr().out
    assert VERBS[name].about[:40] in printed
    examples = printed.partition("\nexamples:\n")[2].partition("\n\nexit codes:\n")[0].splitlines()
    assert 1 <= len(examples) <= 3
    for example in examples:
        program, *arguments = shlex.split(example)
        assert program == "adfm" and cli._parse(arguments).name == name
    assert re.search(r"exit codes:\n  0 +\w", printed)


def test_the_profiles_of_score_are_those_of_the_settings(lines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for profile in get_args(Train.model_fields["profile"].annotation):
        assert main(["score", str(lines), "--profile", profile]) == 0
        by_flag = capsys.readouterr().out
        assert main(["score", str(lines), "--set", f"train.profile={profile}"]) == 0
        assert capsys.readouterr().out == by_flag
        assert len(by_flag.splitlines()) == 3


def test_settings_come_from_the_file_that_is_named(
    lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("train: {profile: paper}")
    main(["score", str(lines), "--params", str(tmp_path / "mine.yaml")])
    from_file = capsys.readouterr().out
    main(["score", str(lines), "--profile", "paper"])
    assert capsys.readouterr().out == from_file


def test_params_writes_settings_files_laid_over_one_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, overlay = tmp_path / "params.yaml", tmp_path / "overlay.yaml"
    base.write_text("seed: 1 # kept\ntrain:\n  steps: 5 # too\n")
    overlay.write_text("train: {steps: 6} # the reason")
    files = ["--params", str(base), "--params", str(overlay), "--set", "seed=2"]
    assert main(["params", *files]) == 0
    assert capsys.readouterr().out == "seed: 2 # kept\ntrain:\n  steps: 6 # too\n"
    assert main(["params", str(base), *files]) == 0
    assert base.read_text() == "seed: 2 # kept\ntrain:\n  steps: 6 # too\n"
    overlay.write_text("train: {stepz: 6}")
    assert main(["params", str(base), *files]) == 1
    assert f"{overlay} line 1: unknown setting `train.stepz`" in capsys.readouterr().err
    assert base.read_text().startswith("seed: 2")


def test_wrong_settings_stop_every_verb_before_it_starts(lines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", str(lines), "--set", "train.stepz=1", "--set", "seed=x"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("adfm: error: these settings are wrong:\n")
    assert "train.steps" in printed.err
    assert "seed should be" in printed.err


def test_an_error_is_one_message_and_a_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", str(tmp_path / "none"), str(tmp_path / "raw")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("adfm: error: ")
    assert str(tmp_path / "none") in error
    assert not (tmp_path / "raw").exists()


def test_layout_is_a_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for way in (["--layout", "mvtek"], ["--set", "convert.layout=mvtek"]):
        assert main(["convert", str(tmp_path), str(tmp_path / "shards"), *way]) == 1
        assert "mvtec" in capsys.readouterr().err


def test_a_comparison_needs_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "models/trained", "data/shards", "evaluation", "--compare", "models/sft"])
    assert stop.value.code == 2
    assert "'models/sft' is not NAME=MODEL" in capsys.readouterr().err


def test_raw_data_becomes_shards_and_every_reason_against_them_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("ADFM_REPORTS", "DVC_STAGE", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)

    def block() -> list[str]:
        return [line.partition(" MB, in ")[0] for line in capsys.readouterr().out.splitlines()[-2:]]

    def size(folder: str) -> str:
        return f"{sum(file.stat().st_size for file in Path(folder).rglob('*') if file.is_file()) / 1e6:.1f}"

    assert main(["fetch", "synthetic://?images=24", "raw"]) == 0
    files = json.loads(Path("raw/manifest.json").read_text())["files"]
    megabytes = f"{sum(file['size'] for file in files) / 1e6:.1f}"
    assert block() == [f"wrote raw: {len(files)} files, {megabytes}", "next: adfm convert raw data/shards"]
    assert main(["convert", "raw", "shards", "--layout", "mvtec"]) == 0
    images = json.loads(Path("shards/conversion.json").read_text())["images"]
    following = "next: adfm validate shards --set convert.layout=mvtec"
    assert block() == [f"wrote shards: {images} images, {size('shards')}", following]
    small = ["--set", "validation.min_images_per_split=1", "--set", "validation.min_label_share=0"]
    assert main(["validate", "shards", "good", *small]) == 0
    assert block()[0] == f"wrote good: {images} images checked, {size('good')}"
    assert (tmp_path / "good" / "index.html").is_file()
    capsys.readouterr()

    strict = ["--set", "validation.min_images_per_split=1000", "--set", "validation.min_side=1000"]
    assert main(["validate", "shards", *strict]) == 1
    error = capsys.readouterr().err
    assert "shards is not fit to train on; the report is reports/validation/index.html" in error
    report = json.loads((tmp_path / "reports" / "validation" / "validation.json").read_text())
    failed = [entry["what"] for entry in report["expectations"] if not entry["success"]]
    assert len(failed) >= 4  # three splits too small, and the images
    assert all(what in error for what in failed)


def test_nothing_is_reported_or_uploaded(lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MLFLOW_LOG_ARTIFACTS", "1")
    monkeypatch.setenv("DO_NOT_TRACK", "yes")
    for name in ("GX_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    main(["score", str(lines)])
    assert "HF_MLFLOW_LOG_ARTIFACTS" not in os.environ
    assert os.environ["DO_NOT_TRACK"] == "yes"
    assert os.environ["GX_ANALYTICS_ENABLED"] == "false"
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_a_reader_that_stops_reading_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "many.jsonl"
    file.write_text(LINE * 20000)
    process = adfm("score", file, stdout=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.readline()
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait() == 141


def test_a_name_in_a_message_steers_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", str(tmp_path / "\x1b[2J\x9b31m\u202egood.jsonl")]) != 0
    error = capsys.readouterr().err
    assert "\\x1b[2J\\x9b31m\\u202egood.jsonl" in error and error.endswith("\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_a_full_disk_is_one_message(lines: Path) -> None:
    with Path("/dev/full").open("w") as full:
        process = adfm("score", lines, stdout=full)
        _, error = process.communicate()
    assert error == "adfm: error: output: no space is left on the disk; free some and start again.\n"
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("sent", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_an_interrupt_leaves_nothing_that_looks_finished(
    sent: signal.Signals, status: int, word: str, tmp_path: Path
) -> None:
    source, raw = "synthetic://?images=1000", tmp_path / "raw"
    process = adfm("fetch", source, raw, start_new_session=True, preexec_fn=heed_sigint)
    try:
        while not list((tmp_path / "raw.partial").rglob("*.png")):  # the processes that draw are at work
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, sent)  # a terminal and a shell send it to all processes of a command
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status
    assert f"adfm: {word}; nothing of it is kept; to start over, run the same command:\n  adfm fetch " in error
    assert "Traceback" not in error
    assert not (tmp_path / "raw").exists()


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("completion") / "adfm.bash"
    with file.open("w") as out, contextlib.redirect_stdout(out):
        assert main(["completion", "bash"]) == 0
    return file


def completed(script: Path, *words: str) -> set[str]:
    """What bash offers for the last word of a command line."""
    code = (
        'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        '$(complete -p adfm | sed "s/.*-F \\([^ ]*\\) .*/\\1/"); printf "%s\\n" "${COMPREPLY[@]}"'
    )
    command = ["bash", "--norc", "-c", code, "bash", str(script), "adfm", *words]
    return set(subprocess.run(command, capture_output=True, text=True, check=True, cwd=script.parent).stdout.split())


def test_bash_completes_verbs_options_choices_and_files(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert completed(script, "") >= FIRST_WORDS
    assert completed(script, "tra") == {"train"}
    assert completed(script, "policy", "") >= {"set", "show"}
    assert completed(script, "train", "--f") == {"--force"}
    assert completed(script, "train", "adfm.b") == {"adfm.bash"}
    assert completed(script, "evaluate", "adfm.b") == {"adfm.bash"}
    assert completed(script, "show", "--split", "v") == {"validation"}
    assert completed(script, "completion", "") >= set(SHELLS)


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_a_script_with_all_verbs(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in FIRST_WORDS)
    if program := shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([program, "-n", tmp_path / "script"], check=True)
