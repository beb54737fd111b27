from __future__ import annotations

from pathlib import Path

import pytest

from adfm.params import Params


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded MLflow store is made in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def params() -> Params:
    """The default run at its smallest."""
    return Params.model_validate(
        {
            "warmup": {"steps": 2, "batch_size": 4},
            "train": {
                "steps": 4,
                "prompts_per_step": 2,
                "num_generations": 4,
                "checkpoint_every": 1,
                "pictures_every": 2,
                "max_completion_length": 40,
            },
            "evaluate": {"batch_size": 32, "max_new_tokens": 40},
        }
    )
