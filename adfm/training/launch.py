"""Training on one machine: in one process, or in one for each GPU through `accelerate launch`.

Several machines: `adfm.training.nodes`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from adfm import stopping, tracking
from adfm.errors import AdfmError
from adfm.files import refuse_to_replace
from adfm.models import hardware
from adfm.params import Params
from adfm.stopping import Stopped
from adfm.training import grpo


def on_gpus(shards: Path, model: Path, out: Path, params: Params, gpus: int) -> None:
    """Trains as `adfm.training.grpo.train` does, in as many processes as there are GPUs, or in this one.

    Raises:
        AdfmError: As `adfm.training.grpo.train`; or a process failed, or they were told to stop.
    """
    if gpus < 2:
        grpo.train(shards, model, out, params)
        return
    refuse_to_replace(out)
    hardware.shares(params.train, gpus)
    with TemporaryDirectory() as folder:
        settings = Path(folder) / "params.yaml"
        settings.write_text(tracking.settings(params), encoding="utf-8")
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
        launcher += ["--num_processes", str(gpus), "--mixed_precision", "no", "--dynamo_backend", "no"]
        with (
            subprocess.Popen([*launcher, "-m", *command(shards, model, out, settings)]) as processes,
            stopping.noticed("it is passed on to the processes", processes.terminate) as told,
        ):
            status = processes.wait()
    if status and told.is_set():
        raise Stopped(f"training in {gpus} processes was told to stop; the same command goes on, as said above")
    if status:
        raise AdfmError(f"training in {gpus} processes failed with status {status}; the reason is above.")


def command(shards: Path, model: Path, out: Path, settings: Path) -> list[str]:
    """The module that each process runs, and its arguments."""
    return ["adfm", "train", str(shards), str(model), str(out), "--params", str(settings)]


def cold_start(shards: Path, out: Path, params: Params) -> None:
    """Supervised cold start (stand-in)."""
    from adfm.training.warmup import warmup

    warmup(shards, out, params)
