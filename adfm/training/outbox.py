"""Buffered MLflow logging: a local journal first, sent by a thread, so that a server outage does not stop training.

The folder contains, for each MLflow run,

    <run>.jsonl      a line each: metrics of a step, a picture, how the run ended
    <run>.sent       how many bytes of it MLflow has
    <run>/…          the pictures that it does not have yet
"""

import json
import os
import shutil
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any, Self

from PIL import Image
from tqdm import tqdm

from adfm import tracking
from adfm.errors import AdfmError
from adfm.process import environment
from adfm.process.environment import without_login

_LINES = 10  # a request; MLflow takes 1,000 metrics in one, and a step has fewer than 100
_LONGEST_PAUSE = 60.0  # seconds between two attempts
_LAST_TRY = 60.0  # seconds to send the rest when training ends


class Outbox:
    """Store metrics and pictures of a run, and send them in order once MLflow accepts them.

    As a context manager, it ends by sending what it can, and after a body that ended well prints how to send the rest.

    Args:
        folder: Folder of the journals; those of other runs are sent first, unless the runs were deleted.
        run_id: The run.
    """

    def __init__(self, folder: Path, run_id: str) -> None:
        self._folder, self._journal = folder, folder / f"{run_id}.jsonl"
        for other in set(folder.glob("*.jsonl")) - {self._journal}:
            try:
                _finish(other)
            except Exception as error:  # whatever the store's client raises
                print(f"{other}: still not sent: {error if isinstance(error, AdfmError) else _reason(error)}")
        folder.mkdir(parents=True, exist_ok=True)
        # A training that was killed repeats the steps after its last checkpoint: they are not stored again.
        entries = _repaired(self._journal)
        self._step = max((entry.get("step", 0) for entry in entries), default=0)
        self._pictures = {entry.get("picture") for entry in entries}
        self._news, self._closing = threading.Event(), threading.Event()
        self._away_since: int | None = None
        self._news.set()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def add(self, metrics: dict[str, float], step: int) -> None:
        """Store the metrics of a step."""
        if step > self._step:
            self._step = step
            self._write({"step": step, "figures": metrics})

    def add_picture(self, picture: Image.Image, name: str) -> None:
        """Store a picture as the artifact `name` of the run."""
        if name not in self._pictures:
            self._pictures.add(name)
            file = self._journal.with_suffix("") / name
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file)
            self._write({"picture": name})

    def __enter__(self) -> Self:  # noqa: D105
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:  # noqa: D105
        if kind is None:
            self._write({"end": "FINISHED"})
        self._closing.set()
        self._news.set()
        self._thread.join(_LAST_TRY)
        if not _is_sent(self._journal):
            folder = _to_workspace(self._journal)
            if kind is None:
                tqdm.write(
                    "MLflow is still away. The model is written all the same; the metrics and pictures that MLflow "
                    f"lacks are in {folder}. When it is back, send them: adfm resend {folder}"
                )
        elif kind is None:
            _remove(self._journal)

    def _write(self, entry: dict[str, Any]) -> None:
        line = json.dumps({**entry, "time": round(time.time() * 1000)}, allow_nan=False)
        with self._journal.open("a", encoding="utf-8") as journal:
            journal.write(line + "\n")
        self._news.set()

    def _run(self) -> None:
        pause = 1.0
        while True:
            self._news.wait()
            self._news.clear()
            try:
                _send(self._journal)
                self._report_recovery()
                pause = 1.0
            except Exception as error:  # whatever the store's client raises: it must not end the training
                if self._away_since is None:
                    self._away_since = self._step
                    tqdm.write(
                        f"MLflow does not answer ({_reason(error)}); training continues, and its metrics from step "
                        f"{self._step} on are kept in {self._folder}"
                    )
                if self._closing.is_set():
                    return
                self._closing.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                self._news.set()
            if self._closing.is_set() and not self._news.is_set():
                return

    def _report_recovery(self) -> None:
        if self._away_since is not None:
            steps = f"steps {self._away_since} to {self._step}"
            _tag(self._journal.stem, steps)
            self._away_since = None
            tqdm.write(f"MLflow is back and has the metrics of {steps}")


def resend(folder: Path) -> None:
    """Send what a training could not, with the times at which it happened, and remove what was sent.

    Raises:
        AdfmError: `folder` contains no journal, MLflow fails, runs were deleted, or lines damaged; the rest is sent.
    """
    journals = sorted(folder.glob("*.jsonl"))
    if not journals:
        raise AdfmError(f"{folder} contains no unsent metrics; training keeps them in a folder <OUT>.unsent.")
    problems = []
    with tracking.store_errors(tracking.configure()):
        for journal in journals:
            try:
                _finish(journal)
                print(f"run {journal.stem}: done")
            except AdfmError as error:
                problems.append(str(error))
    if problems:
        raise AdfmError("\n".join(problems))


def _finish(journal: Path) -> None:
    """Send the rest of a journal and remove it; refuse it if MLflow does not have the run, or lines are damaged."""
    _require_run(journal)  # before anything is done to a file that may be somebody else's
    _repaired(journal)
    if not _is_sent(journal):
        _tag(journal.stem, "the last ones")
        _send(journal)
    lines = journal.read_bytes().split(b"\n")[:-1]
    damaged = [number for number, line in enumerate(lines, start=1) if not _entry(line)]
    if damaged:
        raise AdfmError(
            f"{journal}: line {', '.join(map(str, damaged[:5]))}{', …' if damaged[5:] else ''} cannot be read, as "
            "after a crash of the machine. All others are in MLflow. Repair it and send again, or remove the file."
        )
    _remove(journal)


def _require_run(journal: Path) -> None:
    import mlflow
    from mlflow.exceptions import MlflowException

    run, place = journal.stem, without_login(mlflow.get_tracking_uri())
    keep = f"Nothing is lost: all of it is still there. If its metrics are not needed, remove {journal}"
    try:
        if mlflow.MlflowClient().get_run(run).info.lifecycle_stage == "active":
            return
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise AdfmError(
            f"run {run}: MLflow at {place} does not have it; was it deleted for good, or did the training use another "
            f"server? Then set MLFLOW_TRACKING_URI and send again. {keep}"
        ) from None
    raise AdfmError(
        f"run {run}: was deleted in MLflow at {place}. Restore it (`mlflow runs restore --run-id {run}`) and send "
        f"again. {keep}"
    )


def _to_workspace(journal: Path) -> Path:
    """Move a journal out of the copy of the workspace that DVC removes, if it is in one; return its folder."""
    if environment.home() == Path.cwd():
        return journal.parent
    folder = environment.home() / os.path.relpath(journal.parent)
    folder.mkdir(parents=True, exist_ok=True)
    for path in (journal, journal.with_suffix(".sent"), journal.with_suffix("")):
        if path.exists():
            shutil.move(path, folder / path.name)
    return folder


def _send(journal: Path) -> None:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    if not journal.is_file():
        return
    store, run = MlflowClient(), journal.stem
    with journal.open("rb") as stream, tracking.short_timeouts():
        stream.seek(_sent(journal))
        while lines := [line for line in islice(stream, _LINES) if line.endswith(b"\n")]:
            entries = [entry for line in lines if (entry := _entry(line))]
            metrics = [
                Metric(name, value, entry["time"], entry["step"])
                for entry in entries
                for name, value in entry.get("figures", {}).items()
            ]
            if metrics:  # MLflow stores those once that are sent twice, because a process died in between
                store.log_batch(run, metrics)
            for entry in entries:
                picture = journal.with_suffix("") / entry.get("picture", "")
                if "picture" in entry and picture.is_file():
                    store.log_artifact(run, str(picture), str(Path(entry["picture"]).parent))
                    picture.unlink()
                if "end" in entry:
                    store.set_terminated(run, entry["end"], entry["time"])
            journal.with_suffix(".sent").write_text(str(_sent(journal) + sum(map(len, lines))))


def _repaired(journal: Path) -> list[dict[str, Any]]:
    """Return the entries of a journal; cut off a line that a killed process had half written."""
    if not journal.is_file():
        return []
    text = journal.read_bytes()
    lines = text[: text.rfind(b"\n") + 1]
    if lines != text:
        journal.write_bytes(lines)
    return [entry for line in lines.splitlines() if (entry := _entry(line))]


def _entry(line: bytes) -> dict[str, Any] | None:
    """Return the entry of a line; `None` if the line is damaged."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    complete = isinstance(entry, dict) and "time" in entry and ("figures" not in entry or "step" in entry)
    return entry if complete else None


def _sent(journal: Path) -> int:
    """Return how many bytes of a journal MLflow has; 0, so that all is sent again, if no line ends there."""
    try:
        sent = int(journal.with_suffix(".sent").read_text())
        with journal.open("rb") as stream:
            stream.seek(max(sent - 1, 0))
            return sent if stream.read(1) == b"\n" else 0
    except (OSError, ValueError):
        return 0


def _is_sent(journal: Path) -> bool:
    return not journal.is_file() or _sent(journal) == journal.stat().st_size  # no file: failed before the first step


def _remove(journal: Path) -> None:
    shutil.rmtree(journal.with_suffix(""), ignore_errors=True)
    for file in (journal.with_suffix(".sent"), journal):
        file.unlink(missing_ok=True)
    if not any(journal.parent.iterdir()):
        journal.parent.rmdir()


def _tag(run: str, what: str) -> None:
    from mlflow import MlflowClient

    with tracking.short_timeouts():
        before = MlflowClient().get_run(run).data.tags.get("mlflow_away")
        MlflowClient().set_tag(run, "mlflow_away", f"{before}; {what}" if before else what)


def _reason(error: Exception) -> str:
    return tracking.reason(error)[:120]
