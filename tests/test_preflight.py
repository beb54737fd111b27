"""What is checked before a run: everything that is missing is said at once."""

from pathlib import Path

import pytest

from adfm import preflight
from adfm.errors import AdfmError
from adfm.params import Model, Params, load


@pytest.fixture(autouse=True)
def _elsewhere(store: Path) -> None:
    """The current folder holds nothing but an empty store of MLflow."""


def test_what_is_written_does_not_depend_on_the_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preflight.check(Params(), tmp_path / "reports" / "check.json")
    first = (tmp_path / "reports" / "check.json").read_bytes()
    preflight.check(Params(seed=1), tmp_path / "reports" / "check.json")
    assert (tmp_path / "reports" / "check.json").read_bytes() == first
    shown = capsys.readouterr().out
    assert "tiny_base" in shown
    assert str(tmp_path / "mlflow.db") in shown


def test_everything_that_is_missing_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(preflight, "FREE_BYTES", 2**62)
    with pytest.raises(AdfmError) as caught:
        preflight.check(Params(model=Model(name="/no/such/model")), tmp_path / "check.json")
    for what in ("/no/such/model", "http://127.0.0.1:9", "on its disk"):
        assert what in str(caught.value)
    assert not (tmp_path / "check.json").exists()


def test_a_batch_that_does_not_divide_among_the_gpus_and_an_adapter_on_nothing_are_said() -> None:
    params = load(None, ["train.prompts_per_step=3", "train.num_generations=2", "lora.target_modules=[no_proj]"])
    with pytest.raises(AdfmError) as caught:
        preflight.check(params, gpus=4)
    for what in ("1 in each of 4 processes does not divide the 6 completions", "'no_proj' matches no module"):
        assert what in str(caught.value)
