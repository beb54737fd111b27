from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import save_file

from adfm import tracking
from adfm.data import shards as shards_
from adfm.evaluation import metrics
from adfm.evaluation.evaluate import PREDICTIONS
from adfm.params import Params
from adfm.records import Box, Record


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedded store without runs; MLflow takes seconds to make one, and a copy takes none."""
    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder)
        tracking.configure()
    return folder / "mlflow.db"


@pytest.fixture
def store(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty embedded store in the current folder."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def server(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An MLflow server that keeps the artifacts, in a process of its own; `MLFLOW_TRACKING_URI` names it."""
    home = tmp_path / "server"
    home.mkdir()
    shutil.copy(empty_database, home / "mlflow.db")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    options = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", "sqlite:///mlflow.db", "--artifacts-destination", str(home / "files")]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *options, *stores],
            cwd=home,
            env=os.environ | quiet,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (home / "log").read_text()
                time.sleep(0.1)
        else:
            pytest.fail((home / "log").read_text())
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
        monkeypatch.chdir(tmp_path)
        yield uri
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


def _record(number: int, shade: int) -> Record:
    anomalous = number % 2 == 0
    png = io.BytesIO()
    Image.fromarray(np.full((20, 20, 3), shade, np.uint8)).save(png, "PNG")
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
        sha256=f"{shade:064d}",
    )


@pytest.fixture
def make_shards() -> Callable[[Path, int], Path]:
    """Shards of 40 test images in two categories, half of them anomalous; another shade is another data set."""

    def make(folder: Path, shade: int = 100) -> Path:
        folder.mkdir(parents=True)
        shards_.write((_record(number, shade) for number in range(44)), folder, 1000)
        return folder

    return make


@pytest.fixture
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
        return folder

    return make


@pytest.fixture
def make_evaluation() -> Callable[..., Path]:
    """A folder like those that evaluation writes, of a model that judges `right` of the 40 test images rightly.

    Where it finds a defect, it boxes it with the overlap `iou`.
    """

    def make(folder: Path, shards: Path, right: int, iou: float = 0.5) -> Path:
        (folder / "plots").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(folder / "plots" / "confusion.png")
        other = {"normal": "anomalous", "anomalous": "normal"}
        rows: list[dict[str, Any]] = []
        for number, row in enumerate(shards_.table(shards, "test").to_pylist()):
            predicted = row["label"] if number < right else other[row["label"]]
            found = row["label"] == predicted == "anomalous"
            anomalous = row["label"] == "anomalous"
            answer = "A" if predicted == "anomalous" else "B"
            rows.append(
                {key: row[key] for key in ("id", "source", "dataset", "category", "defect", "label", "boxes")}
                | {"predicted": predicted, "score": 0.9 if answer == "A" else 0.1}
                | {"predicted_boxes": [[5, 5, 15, 5 + 10 * iou]] if found else []}
                | {"completion": f"<think>it</think><rethink>so</rethink><answer>{answer}</answer>"}
            )
            if anomalous:
                hit = found and iou >= 0.5
                rows[-1] |= {"iou": iou * found, "matched_iou": iou if found else None, "area_share": 0.25}
                rows[-1] |= {"true_positives": int(hit), "false_negatives": int(not hit)}
                rows[-1] |= {"false_positives": int(found and not hit)}
        table = pd.DataFrame(rows).reindex(columns=PREDICTIONS.names)
        pq.write_table(
            pa.Table.from_pandas(table, schema=PREDICTIONS, preserve_index=False), folder / "predictions.parquet"
        )
        measured = metrics.summarize(pd.read_parquet(folder / "predictions.parquet"), 50, 0, 0.01, 0.05)["overall"]
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
