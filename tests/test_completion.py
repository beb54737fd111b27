"""Completion in shells: the script that bash runs, and scripts that the other shells can be given."""

import shutil
import subprocess
from pathlib import Path

import pytest

from adfm import cli, completion
from adfm.verbs import VERBS

FIRST_WORDS = {name.partition(" ")[0] for name in VERBS}


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("completion") / "adfm.bash"
    file.write_text(completion.script(cli._parser()[0], "bash"))
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
    assert completed(script, "completion", "") >= set(completion.SHELLS)


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_shell_gets_a_script_with_all_verbs(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in FIRST_WORDS)
    if program := shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([program, "-n", tmp_path / "script"], check=True)
