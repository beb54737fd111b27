"""Training on what there is: one process, several GPUs of a machine, several machines."""

from __future__ import annotations

from pathlib import Path

from adfm.params import Params
from adfm.training.grpo import train


def launch(
    shards: Path, model: Path, out: Path, params: Params, num_gpus: int, num_nodes: int, gpu_type: str, image: str
) -> None:
    """Trains as `adfm.training.grpo.train` does."""
    train(shards, model, out, params)
