from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache
from PIL import Image
from safetensors.numpy import save_file

from adfm import tracking
from adfm.data import hashes
from adfm.data import shards as shards_
from adfm.evaluation import metrics
from adfm.evaluation.calibration import DECIDED, Calibration
from adfm.evaluation.predictions import PREDICTIONS
from adfm.files import digest
from adfm.params import Params
from adfm.records import Box, Record
from adfm.registry.promotion import promote
from adfm.registry.registration import register
from adfm.training.sft import trained_on
from tests.servers import free_port, running


@contextmanager
def mlflow(home: Path, database: Path, *options: str, port: int = 0, **environment: str) -> Iterator[str]:
    """An MLflow server in a process of its own, which keeps the artifacts; its address.

    In a `home` that an earlier one had, at its `port`, it is the same server started again.
    """
    home.mkdir(exist_ok=True)
    if not (home / "mlflow.db").exists():
        shutil.copy(database, home / "mlflow.db")
    port = port or free_port()
    uri = f"http://127.0.0.1:{port}"
    where = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", "sqlite:///mlflow.db", "--artifacts-destination", str(home / "files")]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "mlflow", "server", *where, *stores, *options]
    with running(command, f"{uri}/health", home / "log", os.environ | quiet | environment):
        yield uri


@pytest.fixture(scope="session")
def start_mlflow() -> Callable[..., AbstractContextManager[str]]:
    return mlflow


@pytest.fixture(scope="session")
def mlflow_server(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an MLflow server; its tests share it, so each takes a registered model of its own."""
    with mlflow(tmp_path_factory.mktemp("server") / "home", empty_database) as uri:
        yield uri


@pytest.fixture
def server(mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same, named by `MLFLOW_TRACKING_URI`."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.chdir(tmp_path)
    return mlflow_server


# What the models of these tests fulfil: 26 of 40 right is enough without production, 6 more right are a gain.
POLICY = """\
level: 0.45
whole:
  accuracy: {limit: 0.5, margin: 0.9}
  iou: {limit: null, margin: 0.9}
  escape_rate: {limit: null, margin: 0.9}
  overkill: {limit: null, margin: 0.9}
parts: {}
"""


@pytest.fixture(scope="session")
def add_in(
    make_shards: Callable[..., Path], make_model: Callable[..., Path], make_evaluation: Callable[..., Path]
) -> Callable[[Path], Callable[..., str]]:
    """What `add` does, with shards, models and evaluations in a folder."""

    def add_in(folder: Path) -> Callable[..., str]:
        shards = make_shards(folder / "shards")

        def add(right: int, approve: bool = True, model: str = "adfm") -> str:
            params = Params.model_validate({"mlflow": {"registered_model": model}})
            Path("gate.yaml").write_text(POLICY)  # here, where the test is in a folder of its own
            trained = make_model(folder / f"model-{right}", float(right), shards)
            evaluation = make_evaluation(folder / f"evaluation-{right}", shards, right, iou=0.3 + right / 100)
            register(trained, shards, evaluation, folder / "registration", params)
            client = tracking.client()
            number = str(max(int(version.version) for version in client.search_model_versions(f"name = '{model}'")))
            if approve:
                client.set_model_version_tag(model, number, "approval_by", "Rita")
                client.set_model_version_tag(model, number, "approval", "approved")
            return number

        return add

    return add_in


@pytest.fixture
def add(
    add_in: Callable[[Path], Callable[..., str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Registers and, if wanted, approves the next model, which judges `right` of 40 images rightly; its version."""
    monkeypatch.chdir(tmp_path)
    Path("gate.yaml").write_text(POLICY)
    return add_in(tmp_path)


@pytest.fixture(scope="session")
def with_a_candidate(
    empty_database: Path, add_in: Callable[[Path], Callable[..., str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with an embedded store, made once: version 1 is in production, version 2 is better and approved."""
    folder = tmp_path_factory.mktemp("with-a-candidate")
    shutil.copy(empty_database, folder / "mlflow.db")
    with _working_in(folder):
        add = add_in(folder)
        promote(add(26), "adfm")
        add(36)
    return folder


@pytest.fixture(scope="session")
def with_two_promotions(with_a_candidate: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after version 2 was promoted."""
    folder = tmp_path_factory.mktemp("with-two-promotions")
    _copy_store(with_a_candidate, folder)
    with _working_in(folder):
        promote("2", "adfm")
    return folder


@pytest.fixture
def candidate(store: Path, add: Callable[..., str], with_a_candidate: Path) -> None:
    """The store has version 1, of 26 right, in production, and version 2, of 36, approved."""
    _copy_store(with_a_candidate, store)


@pytest.fixture
def two_promotions(store: Path, add: Callable[..., str], with_two_promotions: Path) -> None:
    """The store has version 2, of 36 right, in production, which replaced version 1, of 26."""
    _copy_store(with_two_promotions, store)


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "ADFM_KEYS"):
            patch.delenv(name, raising=False)
        yield


def _copy_store(folder: Path, to: Path) -> None:
    """Copies an embedded store with its files and keys; the database has the places of files."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    places = ("experiments.artifact_location", "runs.artifact_uri", "logged_models.artifact_location")
    with closing(sqlite3.connect(to / "mlflow.db")) as database, database:
        for table, column in (place.split(".") for place in (*places, "model_versions.storage_location")):
            database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (str(folder), str(to)))
    _artifact_repos_cache.clear()  # MLflow finds a model's folder by its id, which is the same in the other store


@pytest.fixture
def service() -> Iterator[Callable[..., None]]:
    """Starts `adfm approvals serve` for a model, in a process of its own, in the current folder.

    The server is the one that `MLFLOW_TRACKING_URI` names then.
    """
    started = []

    def start(model: str, poll: float = 0.5) -> None:
        options = ["--poll", str(poll), "--set", f"mlflow.registered_model={model}"]
        log_file = Path("approvals.log").resolve()
        with log_file.open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "adfm", "approvals", "serve", *options],
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            )
        started.append((process, log_file))
        deadline = time.monotonic() + 120
        while "polling MLflow every" not in log_file.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log_file.read_text()
            time.sleep(0.05)

    yield start
    for process, log_file in started:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        print(log_file.read_text())  # for a test that failed


def _record(number: int, shade: int) -> Record:
    anomalous = number % 2 == 0
    png = io.BytesIO()
    pixels = np.random.default_rng([shade, number]).integers(0, 256, (20, 20, 3), np.uint8)
    Image.fromarray(pixels).save(png, "PNG")
    return Record(
        id=f"{number:03d}",
        image=png.getvalue(),
        mask=None,
        width=20,
        height=20,
        dataset="line",
        category=("bolt", "tile")[number // 2 % 2],
        defect="hole" if anomalous else None,
        label="anomalous" if anomalous else "normal",
        boxes=(Box(5, 5, 15, 15),) if anomalous else (),
        split="train" if number >= 40 else "test",
        source=f"{number:03d}.png",
        sha256=hashlib.sha256(png.getvalue()).hexdigest(),
    )


@pytest.fixture(scope="session")
def make_shards() -> Callable[[Path, int], Path]:
    """Shards of 40 test images in two categories, half of them anomalous; another shade is another data set."""

    def make(folder: Path, shade: int = 100) -> Path:
        folder.mkdir(parents=True)
        shards_.write((_record(number, shade) for number in range(44)), folder, 1000)
        return folder

    return make


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """A folder like those that training writes; the weight makes it one model or another."""

    def make(folder: Path, weight: float, shards: Path, run_id: str | None = None) -> Path:
        folder.mkdir(parents=True)
        save_file({"lora_A.weight": np.full((2, 2), weight, np.float32)}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text('{"r": 2}')
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        description = {
            "stage": "train",
            "base": {"name": "embedded://tiny-base", "revision": None},
            "family": "qwen3_vl",
            "prompt": [{"role": "user", "content": "Inspect."}],
            "mlflow_run_id": run_id,
            "data_fingerprint": shards_.fingerprint(shards),
            "params": Params(seed=5).model_dump(mode="json", by_alias=True),
        }
        (folder / "adfm.json").write_text(json.dumps(description))
        hashes.write(trained_on(shards), folder / hashes.FILE)
        return folder

    return make


@pytest.fixture(scope="session")
def make_evaluation() -> Callable[..., Path]:
    """A folder like those that evaluation writes, of a model that judges `right` of the 40 test images rightly.

    Where it finds a defect, it boxes it with the overlap `iou`; it marks that region too where it rejects the defect.
    With `model`, the evaluation has a calibration of it and decisions, flagged from `threshold` on; scores are 0.9 and
    0.1. Without, it is one of before there were thresholds.
    """

    def make(
        folder: Path, shards: Path, right: int, iou: float = 0.5, model: Path | None = None, threshold: float = 0.5
    ) -> Path:
        (folder / "plots").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(folder / "plots" / "confusion.png")
        other = {"normal": "anomalous", "anomalous": "normal"}
        rows: list[dict[str, Any]] = []
        for number, row in enumerate(shards_.table(shards, "test").to_pylist()):
            predicted = row["label"] if number < right else other[row["label"]]
            located = row["label"] == predicted == "anomalous"
            anomalous = row["label"] == "anomalous"
            answer = "A" if predicted == "anomalous" else "B"
            rows.append(
                {key: row[key] for key in ("id", "source", "dataset", "category", "defect", "label", "boxes")}
                | {"predicted": predicted, "score": 0.9 if answer == "A" else 0.1}
                | {"predicted_boxes": [[5, 5, 15, 5 + 10 * iou]] if located else []}
                | {"regions": [[5, 5, 15, 5 + 10 * iou]] if anomalous else []}
                | {"completion": f"<think>it</think><rethink>so</rethink><answer>{answer}</answer>"}
            )
            if anomalous:
                hit = located and iou >= 0.5
                rows[-1] |= {"iou": iou * located, "matched_iou": iou if located else None, "area_share": 0.25}
                rows[-1] |= {"true_positives": int(hit), "false_negatives": int(not hit)}
                rows[-1] |= {"false_positives": int(located and not hit)}
                regions = metrics.localize([Box(5, 5, 15, 15)], [Box(5, 5, 15, 5 + 10 * iou)], 20, 20)
                rows[-1] |= {f"region_{name}": regions[name] for name in metrics.COMPARED}
        table, schema = pd.DataFrame(rows).reindex(columns=PREDICTIONS.names), PREDICTIONS
        if model:
            limit = {"overkill": Params().evaluate.overkill_limit}
            fitted = Calibration(threshold=threshold, limit=limit, images=40, model=digest(model))
            table, schema = fitted.apply(table), DECIDED
            table.attrs["threshold"] = threshold
            (folder / "calibration.json").write_text(fitted.model_dump_json())
        pq.write_table(pa.Table.from_pandas(table, schema=schema, preserve_index=False), folder / "predictions.parquet")
        table = pd.read_parquet(folder / "predictions.parquet")
        measured = metrics.summarize(table, 50, 0, 0.01, 0.05)["overall"]
        if model:
            measured |= metrics.operating_point(table, threshold, 50, 0)
        about = {
            "candidate": "trained",
            "split": "test",
            "fingerprint": shards_.fingerprint(shards, "test"),
            "settings": Params().evaluate.model_dump(),
        }
        (folder / "metrics.json").write_text(json.dumps({"trained": measured}))
        (folder / "evaluation.json").write_text(json.dumps(about))
        return folder

    return make
