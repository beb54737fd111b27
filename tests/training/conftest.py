from __future__ import annotations

from pathlib import Path

import pytest

from adfm.params import Params


@pytest.fixture(autouse=True)
def _own_store(store: Path) -> None:
    """Every test has an embedded store of its own, in the current folder."""


@pytest.fixture(scope="session")
def params() -> Params:
    """The default run at its smallest."""
    return Params.model_validate(
        {
            "model": {"max_pixels": 96 * 96},
            "sft": {"steps": 2, "batch_size": 4},
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
