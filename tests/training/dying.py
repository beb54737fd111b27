"""`adfm`, one process of which dies: run by `python` or `accelerate launch`, with the arguments of adfm after its name.

`ADFM_TEST_DEATH` holds the step, the process, and a folder: there it dies once, and leaves half a checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from adfm.cli import main
from adfm.training import checkpoints
from adfm.training.callbacks import MetricsCallback

step, rank, work = os.environ["ADFM_TEST_DEATH"].split(":")
original = MetricsCallback.on_log


def on_log(self: MetricsCallback, args: Any, state: Any, control: Any, **given: Any) -> None:
    mark = Path(f"{work}.died")
    if state.global_step == int(step) and os.environ.get("RANK", "0") == rank and not mark.exists():
        mark.touch()
        half = checkpoints.partial(Path(work)) / "checkpoint-99"
        half.mkdir(parents=True, exist_ok=True)
        (half / "adapter_model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, args, state, control, **given)


MetricsCallback.on_log = on_log  # type: ignore[method-assign,assignment]
sys.exit(main(sys.argv[2:]))
