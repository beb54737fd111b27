"""Supervise a training: run it in processes of its own, and restart it from its checkpoint if one of them dies.

One process, or one for each GPU through `accelerate launch`; several machines: `adfm.kubeflow.nodes`.
"""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import IO

from adfm import tracking
from adfm.errors import AdfmError, Unreachable
from adfm.files import MODEL, refuse_to_replace, replace_json
from adfm.params import Params
from adfm.process import cpus, retries
from adfm.process.stopping import Stopped, defer_sigterm
from adfm.training import checkpoints

# Starts from the same checkpoint. A later checkpoint gives as many again: a fault that comes every few hours, such as
# a memory leak, must not end a training that advances. One that comes before the next checkpoint would come every time.
TRIES = 3
_PAUSE = 30.0  # seconds before the second start; twice as many before each later one
_GRACE = 35.0  # seconds; torchrun and accelerate give their processes 30
_STOPPED = "training was stopped; the same command resumes it from its last checkpoint"
_INTERRUPTED = (130, 143)  # of `adfm`, by SIGINT and SIGTERM
_REPORTS = "ADFM_REPORTS"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def on_gpus(shards: Path, model: Path, out: Path, params: Params, gpus: int) -> None:
    """Train as `adfm.training.grpo.train` does, in as many processes as there are GPUs, or in one.

    If a process dies (killed, e.g. for memory, crashed, hung in NCCL, or without MLflow at its start), all are started
    again from the last checkpoint, three times from each, after 30 and 60 s, with a line in the log.

    Raises:
        AdfmError: As `adfm.training.grpo.train`; processes died too often; or (`Stopped`) SIGTERM has come.
    """
    from adfm.models import hardware  # here: pipelines are compiled where NumPy is not installed

    hardware.batch_split(params.train, max(gpus, 1))
    _supervise(gpus, lambda settings: command(shards, model, out, settings), out, params)


def cold_start(shards: Path, out: Path, params: Params) -> None:
    """Run `adfm.training.sft.sft` in a process of its own, from its beginning again if it dies: it has no checkpoints.

    Raises:
        AdfmError: As `adfm.training.sft.sft`; the process died too often; or (`Stopped`) SIGTERM has come.
    """
    _supervise(1, lambda settings: ["adfm", "sft", str(shards), str(out), "--params", str(settings)], out, params)


def command(shards: Path, model: Path, out: Path, settings: Path) -> list[str]:
    """Return the module that each process runs, and its arguments."""
    return ["adfm", "train", str(shards), str(model), str(out), "--params", str(settings)]


@contextmanager
def reported() -> Iterator[None]:
    """Report the exception that ends the body to the process that started this one here, if one did."""
    # By a file: the launcher of several processes exits with 1 whatever they exit with
    # (torch/distributed/elastic/multiprocessing).
    folder = os.environ.get(_REPORTS)
    if folder and sys.platform == "linux":
        # This process ends with that one: after a restart two trainings would write the same checkpoints.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        yield
    except Exception as error:
        if folder:
            text = str(error) if isinstance(error, AdfmError) else f"{type(error).__name__}: {error}".splitlines()[0]
            replace_json({"kind": _kind(error), "text": text}, Path(folder) / f"{os.environ.get('RANK', '0')}.json")
        raise


# What a process reports: `permanent`: a person has to fix it; `transient`: the same may work again. Of several
# processes, the first of these kinds is the reason: processes that lost another one end with a transient error.
_KINDS: dict[str, type[AdfmError]] = {"permanent": AdfmError, "stopped": Stopped, "transient": Unreachable}

# PyTorch's errors of a device, and of a process that lost another one, are RuntimeErrors like those of its mathematics,
# which would come again (`probability tensor contains either inf, nan`): their text tells them apart.
_LOST = re.compile(r"CUDA|NCCL|RCCL|HIP error|gloo|connection|broken pipe|socket|time[d ]*out", re.IGNORECASE)
# Device errors that a restart does not cure: such mathematics on a GPU, the wrong wheel or driver, too little memory.
_PERMANENT = re.compile(
    r"device-side assert|no kernel image|driver version|NVIDIA driver|invalid device|out of memory", re.IGNORECASE
)


def _kind(error: Exception) -> str:
    if isinstance(error, Stopped):
        return "stopped"
    if isinstance(error, AdfmError):
        return "transient" if isinstance(error, Unreachable) else "permanent"
    text = str(error)
    device = isinstance(error, RuntimeError) and _LOST.search(text) and not _PERMANENT.search(text)
    return "transient" if device or retries.may_pass(error) else "permanent"


def _launcher(gpus: int) -> list[str]:
    if gpus < 2:
        return [sys.executable, "-m"]
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", str(gpus)]
    threads = ["--num_cpu_threads_per_process", str(cpus.threads(gpus))]
    return [sys.executable, *launcher, *threads, "--mixed_precision", "no", "--dynamo_backend", "no", "-m"]


def _supervise(gpus: int, verb: Callable[[Path], list[str]], out: Path, params: Params) -> None:
    """Run a verb of adfm, which writes `out`, and start it again while it dies and has tries left."""
    refuse_to_replace(out)
    work = out.with_name(out.name + ".checkpoint")
    running: list[subprocess.Popen[bytes]] = []

    def terminate() -> None:
        for process in running:
            process.terminate()  # nothing for one that has ended

    with TemporaryDirectory() as folder, defer_sigterm("it is passed on to the training", terminate) as terminated:
        settings = Path(folder) / "params.yaml"
        settings.write_text(tracking.settings(params), encoding="utf-8")
        tries, pause = 1, _PAUSE
        while True:
            before = _newest(work)
            end = _run([*_launcher(gpus), *verb(settings)], gpus > 1, Path(mkdtemp(dir=folder)), running, terminated)
            if end is None:
                return
            if (out / MODEL).is_file():  # a folder gets its name when all of it is written and MLflow's run has ended
                print(f"training ended ({end}) after it had written {out}, which is complete", flush=True)
                return
            if not isinstance(end, Unreachable):
                raise end
            newest = _newest(work)
            start = work / f"checkpoint-{newest}" if newest else "its beginning"
            if newest > before:
                tries, pause = 1, _PAUSE
            if tries == TRIES:
                raise AdfmError(
                    f"training died {TRIES} times from {start} on without a later checkpoint: {end}. If it was "
                    "killed for memory, give the task more (adfm/kubeflow/resources.py) or lower "
                    "train.prompts_per_step or train.micro_batch; else look for the fault in the log above."
                )
            tries += 1
            print(f"training died: {end}; try {tries} of {TRIES} in {pause:g} s, from {start}", flush=True)
            deadline = time.monotonic() + pause
            while time.monotonic() < deadline and not terminated.is_set():
                time.sleep(0.1)  # `Event.wait` could block the signal's handler, which sets the event
            if terminated.is_set():
                raise Stopped(_STOPPED)
            pause *= 2


def _run(
    command: list[str],
    several: bool,
    reports: Path,
    running: list[subprocess.Popen[bytes]],
    terminated: threading.Event,
) -> AdfmError | None:
    """Run a process, or PyTorch's launcher of several, add it to `running`, and return the error that it ended with."""
    environment = os.environ | {_REPORTS: str(reports)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE if several else None)
    running.append(process)
    if terminated.is_set():  # while there was no process to pass SIGTERM on to
        process.terminate()
    tail: deque[bytes] = deque(maxlen=100)
    copier = threading.Thread(target=_copy, args=(process.stderr, tail), daemon=True)
    copier.start()
    try:
        status = process.wait()
    except BaseException:  # Ctrl-C, which has reached the process as well, or a second SIGTERM
        _stop(process)
        raise
    copier.join(5)  # a process that is left over may hold the pipe
    log = b"".join(tail).decode(errors="replace")
    return _end(status, several, log, reports, terminated.is_set()) if status else None


def _copy(stream: IO[bytes] | None, tail: deque[bytes]) -> None:
    """Pass on what a process writes, as it comes, and keep the end of it."""
    with stream or nullcontext():
        while stream and (chunk := os.read(stream.fileno(), 2**16)):
            tail.append(chunk)
            sys.stderr.buffer.write(chunk)
            sys.stderr.buffer.flush()


def _stop(process: subprocess.Popen[bytes]) -> None:
    for seconds, force in ((5, process.terminate), (_GRACE, process.kill)):
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            force()


def _end(status: int, several: bool, log: str, reports: Path, terminated: bool) -> AdfmError:
    """Return why a process, or PyTorch's launcher of several, ended with a status other than 0."""
    errors = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(reports.glob("*.json"))]
    error = min(errors, key=lambda each: [*_KINDS].index(each["kind"]), default=None)
    if error and error["kind"] != "transient":
        return _KINDS[error["kind"]](error["text"])
    # `subprocess` gives minus the signal's number for a process that was killed.
    if terminated or (not several and status in (-signal.SIGINT, -signal.SIGTERM, *_INTERRUPTED)):
        return Stopped(_STOPPED)
    if not several and status > 0 and error is None:
        return AdfmError(f"training exited with status {status}; the reason is above.")
    # The launcher's log says which process died first, and of what.
    first = re.search(r"Root Cause.*?rank +: (\d+).*?exitcode +: (-?\d+)", log, re.DOTALL)
    if first:
        who, status = f"process {first[1]} of several", int(first[2])
    else:
        who = "one process of several" if several else "its process"
    how = f"{who} was killed by {signal.Signals(-status).name}" if status < 0 else f"{who} exited with {status}"
    return Unreachable(f"{how} ({error['text'].splitlines()[0]})" if error else how)


def _newest(work: Path) -> int:
    return max(checkpoints.every(work), default=0)
