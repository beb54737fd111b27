"""Settings and verbs under their names before 0.1.0."""

from pathlib import Path

import pytest
import yaml

from adfm.cli import main
from adfm.params import RENAMED, Params, load, loads, merged, new_name, note_renamed

SHIPPED = (Path(__file__).parents[1] / "params.yaml").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _nothing_is_noted_yet() -> None:
    note_renamed.cache_clear()


def old_text() -> str:
    """The shipped settings with the names before 0.1.0."""
    text = SHIPPED
    for old in sorted(RENAMED, reverse=True):  # a section after its keys
        *section, name = old.split(".")
        before = f"\n{'  ' * len(section)}{RENAMED[old]}:"
        assert before in text
        start = text.index(f"\n{new_name(section[0])}:") if section else 0
        at = text.index(before, start)
        text = text[:at] + f"\n{'  ' * len(section)}{name}:" + text[at + len(before) :]
    return text


def test_a_file_with_old_names_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tmp_path / "params.yaml"
    old.write_text(old_text().replace("model: adfm #", "model: line-3 #"), encoding="utf-8")
    assert {"warmup", "validate", "register"} <= yaml.safe_load(old.read_text()).keys()
    assert load(old) == load(None, ["mlflow.registered_model=line-3"])
    assert load(old).mlflow.registered_model == "line-3"
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith(f"{old}: ")
    assert "`train.favour_doubt` is now `train.uncertainty_sampling`" in err
    assert "`register.model` is now `mlflow.registered_model`" in err


def test_a_file_with_old_names_is_written_with_the_new_names(tmp_path: Path) -> None:
    old = tmp_path / "params.yaml"
    old.write_text(old_text(), encoding="utf-8")
    assert merged(old) == SHIPPED


def test_overrides_with_old_names_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["warmup.steps=3", "register.model=line", "train.resample=2", "seed=1"]
    params = loads("", overrides)
    assert (params.sft.steps, params.mlflow.registered_model, params.train.dynamic_sampling) == (3, "line", 2)
    assert "--set warmup.steps=3: `warmup` is now `sft`" in capsys.readouterr().err


def test_an_old_and_a_new_name_of_one_setting_are_refused() -> None:
    with pytest.raises(Exception, match=r"line 3: sft is set already in line 1"):
        loads("warmup:\n  steps: 3\nsft:\n  steps: 4\n")


def test_new_names_are_noted_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert loads(SHIPPED) == Params()
    assert not capsys.readouterr().err


def test_an_old_verb_runs_under_its_new_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["warmup", "--help"])
    out, err = capsys.readouterr()
    assert "`adfm warmup` is now `adfm sft`" in err
    assert "usage: adfm sft" in out


def test_an_experiment_runs_under_the_verb_that_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", "--help"]) == 0
    out, err = capfd.readouterr()
    assert "`adfm ablate` is now `python -m experiments ablation`" in err
    assert "usage: python -m experiments ablation" in out
