"""What a run needs and can be known before it starts: the model's weights, MLflow, room on the disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from adfm import tracking
from adfm.errors import AdfmError
from adfm.models import loading
from adfm.params import Params

# The embedded run writes about a quarter of it, DVC's cache included; a full disk shows itself late and everywhere.
FREE_BYTES = 2**30


def check(params: Params, out: Path | None = None) -> None:
    """Sees that the base model can be found, MLflow answers and the disk has room, and says what it found.

    Args:
        params: Reads `model`.
        out: JSON file to write when all is well. It says the same whatever the settings, so that a stage that depends
            on it waits for the check and does not run again because of it.

    Raises:
        AdfmError: Something is missing; everything that is missing is listed.
    """
    problems, found = [], []
    try:
        found.append(f"model     {loading.resolve(params.model.name, params.model.revision)}")
    except AdfmError as error:
        problems.append(str(error))
    try:
        found.append(f"tracking  {tracking.configure()}")
    except AdfmError as error:
        problems.append(str(error))
    free = shutil.disk_usage(Path.cwd()).free
    found.append(f"disk      {free / 2**30:.1f} GiB free")
    if free < FREE_BYTES:
        problems.append(
            f"{Path.cwd()} has {free / 2**30:.1f} GiB left on its disk; have {FREE_BYTES / 2**30:.0f} GiB at least."
        )
    if problems:
        raise AdfmError("\n  ".join(problems))
    print("\n".join(found))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(out.name + ".partial")
        partial.write_text(json.dumps({"ready": True}) + "\n", encoding="utf-8")
        partial.replace(out)
