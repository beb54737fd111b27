"""Checks before a run: base model and adapter, MLflow, disk space, and the machine that trains."""

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

# The embedded run writes about a quarter of it, DVC's cache included.
FREE = 1  # GiB


def check(params: Params, out: Path | None = None, gpus: int = 0) -> None:
    """Check that the base model is complete and takes the adapter, that MLflow answers and the disk has room.

    Prints the results, what kind of model it is, what to expect of it, and the next larger one. Training refuses what
    is refused here, by the same functions. Estimates only warn.

    Args:
        params: Reads `model`, `lora`, `train`, `evaluate` and `mlflow`.
        out: JSON file to write if all is well.
        gpus: GPUs of the machines that train, if those are not this one; their hardware is not checked.

    Raises:
        AdfmError: Something is missing; all of it is listed. It is `Unreachable` if only servers did not answer.
    """
    problems: list[AdfmError | str] = []
    lines, warnings = [], []
    try:
        folder = loading.resolve(params.model.name, params.model.revision)
        network = loading.outline(folder)
        decoding.Scorer(loading.load_processor(params.model.name, params.model).tokenizer)
        problems += adapters.problems(network, params.lora)
        problems += hardware.batch_problems(params.train, gpus) if gpus else hardware.problems(params)
        warnings += [] if gpus or problems else hardware.memory_warnings(params)
        lines.append(f"model     {folder}")
        if not problems:
            memory = hardware.total(hardware.memory(network, params, gpus or 1))
            lines += verdict.expected(verdict.kind_of(params.model.name, params.model), memory)
    except AdfmError as error:
        problems.append(error)
    try:
        uri = tracking.configure()
        with tracking.store_errors(uri):
            tracking.find_experiment(params.mlflow.experiment)
            tracking.given_run(uri)
        lines.append(f"tracking  {environment.without_login(uri)}")
    except AdfmError as error:
        problems.append(error)
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    lines.append(f"disk      {free:.1f} GiB free")
    if free < FREE:
        problems.append(f"{Path.cwd()} has {free:.1f} GiB left on its disk; have {FREE} GiB at least.")
    if problems:
        # The pipeline's task retries what is unreachable, and nothing else.
        kind = Unreachable if all(isinstance(problem, Unreachable) for problem in problems) else AdfmError
        raise kind("\n  ".join(map(str, problems)))
    print("\n".join(lines + [f"warning   {warning}" for warning in warnings]))
    if out:
        # The same text whatever the settings, so that a stage of DVC that depends on it does not run again for them.
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_text(json.dumps({"ready": True}) + "\n", out)
