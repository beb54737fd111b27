"""Fixtures that several folders of tests use."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from tests.servers import free_port

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def pytest_configure(config: pytest.Config) -> None:
    # On a disk, databases and checkpoints wait for it at every commit. In a container /dev/shm may have 64 MB only.
    memory = Path("/dev/shm")
    if memory.is_dir() and shutil.disk_usage(memory).free > 4e9:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files with long tests first: a worker that began one of them last would run alone at the end.
    longest: dict[Path, float] = {}
    for item in items:
        limit = item.get_closest_marker("timeout")
        longest[item.path] = max(longest.get(item.path, 0), limit.args[0] if limit else 0)
    items.sort(key=lambda item: -longest[item.path])


@pytest.fixture(scope="module", autouse=True)
def exclude_libraries_from_gc() -> None:
    """Leave the libraries out of garbage collection: each `Trainer.train` collects, for seconds once all are loaded."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def mvtec_folder(tmp_path: Path) -> Path:
    """A small data set in the MVTec AD layout: 2 categories, each 4 normal to train, 10 normal and 2 x 5 defective."""
    root = tmp_path / "raw" / "tiny"
    rng = np.random.default_rng(0)
    for category in ("bolt", "tile"):
        for folder, count in (("train/good", 4), ("test/good", 10), ("test/hole", 5), ("test/stain", 5)):
            for number in range(count):
                image = rng.integers(0, 255, (32, 48, 3), dtype=np.uint8)
                path = root / category / folder / f"{number:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.parent.name != "good":
                    mask = np.zeros((32, 48), np.uint8)
                    mask[4 + number : 10 + number, 20:28] = 255
                    image[mask > 0] = 255
                    mask_path = root / category / "ground_truth" / path.parent.name / f"{number:03d}_mask.png"
                    mask_path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask).save(mask_path)
                Image.fromarray(image).save(path)
    return root


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded data set at its smallest, as shards."""
    from adfm.data import synthetic
    from adfm.data.conversion import convert
    from adfm.params import Params

    folder = tmp_path_factory.mktemp("small")
    synthetic.generate(folder / "raw", images=20)
    convert(folder / "raw", folder / "shards", Params())
    return folder / "shards"


@pytest.fixture(scope="session")
def label_shards(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as shards of which only the labels are known."""
    from dataclasses import replace

    from adfm.data import shards

    folder = tmp_path_factory.mktemp("labels") / "shards"
    folder.mkdir()
    records = (replace(record, boxes=(), mask=None) for record in shards.read(small_shards))
    shards.write(records, folder, shard_images=1000)
    return folder


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedded store without runs; MLflow takes seconds to make one, and a copy takes none."""
    from adfm import tracking

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


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real S3 server, which has the users `owner` and `stranger` (scripts/s3-server.sh)."""
    if not shutil.which("radosgw"):
        missing = "NOT TESTED: there is no S3 server; install it with scripts/install-test-packages.sh"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    script = Path(__file__).parents[1] / "scripts" / "s3-server.sh"
    folder = tmp_path_factory.mktemp("s3") / "server"
    port = free_port()
    subprocess.run([script, "start", folder, str(port)], check=True, timeout=240)
    yield f"http://127.0.0.1:{port}"
    subprocess.run([script, "stop", folder], check=True)


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A client of the S3 server with an empty bucket `data`; the environment has its address and the owner's keys."""
    import boto3

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "owner")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "owner-secret")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it remembers credentials
    client = boto3.client("s3")
    client.create_bucket(Bucket="data")
    yield client
    for page in client.get_paginator("list_object_versions").paginate(Bucket="data"):
        for item in [*page.get("Versions", []), *page.get("DeleteMarkers", [])]:
            client.delete_object(Bucket="data", Key=item["Key"], VersionId=item["VersionId"])
    client.delete_bucket(Bucket="data")
    client.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The Chromium that the system has, headless and quiet. Without it tests are skipped, and fail where `CI` is set.

    One a module: while it runs, no other test could call `asyncio.run`.
    """
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        message = "There is no chromium on the PATH: pages are not tested in a browser."
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    from playwright.sync_api import sync_playwright

    quiet = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=[*quiet, "--disable-sync"])
        yield started
        started.close()
