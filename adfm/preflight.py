"""What a run needs and can be known before it starts: the model, MLflow, room on the disk, a machine to train on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from adfm import tracking
from adfm.errors import AdfmError, Unreachable
from adfm.evaluation import verdict
from adfm.files import replace_text
from adfm.models import adapters, decoding, hardware, loading
from adfm.params import Params
from adfm.process import environment

# The embedded run writes about a quarter of it, DVC's cache included; a full disk shows itself late and everywhere.
FREE_BYTES = 2**30


def check(params: Params, out: Path | None = None, gpus: int = 0) -> None:
    """Check that the base model is whole and takes the adapter, that MLflow answers and the disk has room; print it.

    Also printed: what kind of model it is, what to expect of it, and the next larger one.

    What is refused here, training refuses as well, by the same functions. Estimates only warn.

    Args:
        params: Reads `model`, `lora` and `train`.
        out: JSON file to write when all is well. It says the same whatever the settings, so that a stage that depends
            on it waits for the check and does not run again because of it.
        gpus: GPUs of the machines that train, if they are others than this one; what they have is not looked at.

    Raises:
        AdfmError: Something is missing; everything that is missing is listed. It is `Unreachable` if nothing is missing
            but a server's answer.
    """
    problems, found, warnings, unreachable = [], [], [], 0
    try:
        folder = loading.resolve(params.model.name, params.model.revision)
        network = loading.outline(folder)
        decoding.Scorer(loading.load_processor(params.model.name, params.model).tokenizer)
        problems += adapters.problems(network, params.lora)
        problems += hardware.batch_problems(params.train, gpus) if gpus else hardware.problems(params)
        warnings += [] if gpus or problems else hardware.memory_warnings(params)
        found.append(f"model     {folder}")
        if not problems:
            memory = hardware.total(hardware.memory(network, params, gpus or 1))
            found += verdict.expected(verdict.kind_of(params.model.name, params.model), memory)
    except AdfmError as error:
        problems.append(str(error))
        unreachable += isinstance(error, Unreachable)
    try:
        uri = tracking.configure()
        with tracking.store_errors(uri):
            tracking.find_experiment(params.mlflow.experiment)
            tracking.given_run(uri)
        found.append(f"tracking  {environment.without_login(uri)}")
    except AdfmError as error:
        problems.append(str(error))
        unreachable += isinstance(error, Unreachable)
    free = shutil.disk_usage(Path.cwd()).free
    found.append(f"disk      {free / 2**30:.1f} GiB free")
    if free < FREE_BYTES:
        problems.append(
            f"{Path.cwd()} has {free / 2**30:.1f} GiB left on its disk; have {FREE_BYTES / 2**30:.0f} GiB at least."
        )
    if problems:
        raise (Unreachable if unreachable == len(problems) else AdfmError)("\n  ".join(problems))
    print("\n".join(found + [f"warning   {warning}" for warning in warnings]))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_text(json.dumps({"ready": True}) + "\n", out)
