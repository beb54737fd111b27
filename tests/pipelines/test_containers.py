"""The pipeline's tasks in containers of the image that `make image TARGETS=cpu` builds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from adfm import __version__, params
from adfm.data.conversion import convert
from adfm.data.sources import fetch
from adfm.files import digest
from adfm.process.environment import CA_FILE, CA_FOLDER
from pipelines import containers

pytestmark = pytest.mark.timeout(1200)

ROOT = Path(__file__).parents[2]
IMAGE = "localhost/adfm:cpu"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which containers of the image run; `BUILDER` has it, `COMMIT` is what it is of."""
    folder = tmp_path_factory.mktemp("podman")
    given = os.environ | {"ADFM_CPU_IMAGE": IMAGE, "ADFM_GPU_IMAGE": IMAGE, "PYTHONPATH": str(ROOT)}
    if shutil.which("podman") and shutil.which("runc"):
        given.setdefault("CONTAINERS_CONF", str(Path(__file__).with_name("containers.conf")))
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    commit = head.stdout.strip() or "unknown"  # as the Makefile has it
    commits = {builder: _built_from(builder, given) for builder in ("podman", "docker") if shutil.which(builder)}
    if commit not in commits.values():
        assert not ("CI" in os.environ and any(commits.values())), f"{IMAGE} is of {commits}, not of {commit}"
        pytest.skip(f"NOT TESTED: there is no image {IMAGE} of this commit; build it with `make image TARGETS=cpu`")
    builder = next(builder for builder in commits if commits[builder] == commit)
    given |= {"BUILDER": builder, "COMMIT": commit}
    if builder == "docker":
        yield given
        return
    address = f"unix://{folder}/podman.sock"
    with subprocess.Popen([builder, "system", "service", "--time", "0", address], env=given) as service:
        for _ in range(100):
            if (folder / "podman.sock").exists():
                break
            time.sleep(0.1)
        yield given | {"DOCKER_HOST": address}
        service.terminate()


def _built_from(builder: str, environment: dict[str, str]) -> str:
    """The commit that the image was built from; empty if there is no image."""
    label = '{{index .Config.Labels "org.opencontainers.image.revision"}}'
    command = [builder, "image", "inspect", "--format", label, IMAGE]
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip()


def run(folder: Path, environment: dict[str, str], *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.training", "run", "--in-containers", "--root", "out", *argv]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_private_authority_is_where_a_cluster_mounts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADFM_CA_BUNDLE", str(tmp_path / "company.pem"))
    monkeypatch.setenv("AWS_CA_BUNDLE", "/tmp/of-this-process.pem")
    monkeypatch.setenv("AWS_REGION", "any")
    client = MagicMock()
    client.containers.create.return_value.wait.return_value = {"StatusCode": 0}
    assert containers._run(client, IMAGE, ["true"], {"data": {"bind": "/data", "mode": "rw"}}) == 0
    options = client.containers.create.call_args.kwargs
    authority = {"bind": f"{CA_FOLDER}/{CA_FILE}", "mode": "ro"}
    assert options["volumes"][str(tmp_path / "company.pem")] == authority
    assert "data" in options["volumes"]
    assert "AWS_REGION" in options["environment"]
    assert "AWS_CA_BUNDLE" not in options["environment"]


def test_data_stages_give_in_containers_what_they_give_here(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = ["--set", "fetch.source=synthetic://?images=20", "--set", "validation.min_images_per_split=1000"]
    done = run(tmp_path, environment, *strict)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "is not fit to train on" in done.stdout
    assert not list((tmp_path / "out").rglob("train"))

    settings = params.load(None, strict[1::2])
    monkeypatch.chdir(tmp_path)
    fetch(settings.fetch.source, Path(settings.fetch.name))
    convert(Path(settings.fetch.name), Path("shards"), settings)
    (shards,) = (tmp_path / "out").rglob("convert/shards")
    assert digest(shards) == digest(Path("shards"))


@pytest.fixture(scope="module")
def without_package(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The image, but its packages are not found."""
    file = tmp_path_factory.mktemp("image") / "Containerfile"
    file.write_text(f"FROM {IMAGE}\nENV PATH=/usr/local/bin:/usr/bin:/bin\n")
    name = "localhost/adfm:without-package"
    command = [environment["BUILDER"], "build", "--tag", name, "--file", str(file), str(file.parent)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return name


def test_an_image_without_the_package_is_reported_before_anything_is_started(
    tmp_path: Path, environment: dict[str, str], without_package: str
) -> None:
    for image, message in {
        "localhost/nothing:here": "there is no image localhost/nothing:here here",
        without_package: f"the image {without_package} ",
    }.items():
        done = run(tmp_path, environment | {"ADFM_GPU_IMAGE": image})
        assert done.returncode == 1
        assert message in done.stderr
        assert "make it with `make image`" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "mlflow.db").exists()


def test_the_image_says_what_it_is_and_is_not_root(environment: dict[str, str]) -> None:
    command = [environment["BUILDER"], "image", "inspect", IMAGE]
    inspected = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    (image,) = json.loads(inspected)
    assert image["Config"]["User"] == "1000:1000"
    labels = image["Config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.revision"] == environment["COMMIT"]
