"""Raw data and shards as DVC keeps them: pushed to a real S3 server, pulled on a second machine, fetched as `dvc://`."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from adfm.data import shards, sources
from adfm.errors import AdfmError
from adfm.params import load

pytestmark = pytest.mark.timeout(1200)

ROOT = Path(__file__).parents[1]


class Machine:
    """A checkout of the project with the stages of `dvc.yaml` up to `validate`; no models, no GPU."""

    def __init__(self, folder: Path, server: str) -> None:
        self.folder = folder
        self._environment = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(folder.parent),
            "OMP_NUM_THREADS": "1",
            "AWS_ACCESS_KEY_ID": "owner",
            "AWS_SECRET_ACCESS_KEY": "owner-secret",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self._server = server

    def start(self, raw: Path) -> None:
        for name in ("adfm", ".dvcignore", ".gitignore"):
            source = ROOT / name
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, self.folder / name, ignore=ignored) if source.is_dir() else shutil.copy(
                source, self.folder
            )
        stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
        kept = {name: stages[name] for name in ("check", "fetch", "convert", "validate")}
        kept["check"]["cmd"] = "mkdir -p reports && echo '{}' > reports/check.json"  # what it looks at is not here
        (self.folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": kept}))
        self.settings(f"fetch.source={raw}")
        self.run("git", "init", "-q", "-b", "main")
        (self.folder / ".dvc").mkdir()
        shutil.copy(ROOT / ".dvc" / "config", self.folder / ".dvc")
        shutil.copy(ROOT / ".dvc" / ".gitignore", self.folder / ".dvc")
        self.dvc("remote", "add", "-d", "storage", "s3://data/adfm")
        self.dvc("remote", "modify", "storage", "endpointurl", self._server)

    def settings(self, *overrides: str) -> None:
        small = ["fetch.name=line", "validation.min_images_per_split=1", "validation.min_label_share=0", *overrides]
        file = self.folder / "params.yaml"
        params = load(file if file.exists() else ROOT / "params.yaml", small).model_dump(by_alias=True)
        file.write_text(yaml.safe_dump(params))

    def run(self, *command: str | Path) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self._environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def dvc(self, *arguments: str) -> str:
        return self.run(sys.executable, "-m", "dvc", *arguments)

    def repro(self, *arguments: str) -> list[str]:
        """Runs what has to run up to `validate`; returns the stages that ran."""
        said = self.dvc("repro", *arguments).splitlines()
        return [line.split("'")[1] for line in said if line.startswith("Running stage ")]

    def commit(self, tag: str) -> str:
        self.run("git", "add", "-A")
        self.run("git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-q", "-m", tag)
        self.run("git", "tag", tag)
        return self.run("git", "rev-parse", tag).strip()

    def raw_hash(self) -> str:
        return yaml.safe_load((self.folder / "dvc.lock").read_text())["stages"]["fetch"]["outs"][0]["md5"]


def _images(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


@pytest.fixture
def first(s3: Any, s3_server: str, tmp_path: Path, mvtec_folder: Path) -> Iterator[Machine]:
    """A machine that has made and pushed the versions v1 and, with one more image, v2 of a data set."""
    machine = Machine(tmp_path / "first", s3_server)
    machine.folder.mkdir()
    machine.start(mvtec_folder)
    assert machine.repro("convert") == ["check", "fetch", "convert"]
    machine.commit("v1")
    machine.dvc("push")
    before = machine.raw_hash()

    Image.effect_noise((48, 32), 90).convert("RGB").save(mvtec_folder / "bolt" / "train" / "good" / "new.png")
    assert machine.repro("convert") == []  # DVC looks at the setting, not at what lies there
    assert machine.repro("-sf", "fetch") == ["fetch"]
    assert machine.repro("validate") == ["convert", "validate"]
    assert machine.raw_hash() != before
    machine.commit("v2")
    machine.dvc("push")
    yield machine


def test_two_machines_and_two_versions(
    first: Machine, s3: Any, s3_server: str, tmp_path: Path, mvtec_folder: Path
) -> None:
    # A second machine goes on from the shards, and raw data never come near it.
    subprocess.run(["git", "clone", "-q", first.folder, tmp_path / "second"], check=True)
    second = Machine(tmp_path / "second", s3_server)
    second.dvc("pull", "data/shards")
    assert shards.fingerprint(second.folder / "data/shards") == shards.fingerprint(first.folder / "data/shards")
    assert second.repro("--allow-missing", "validate") == []
    second.settings("validation.max_aspect=7.5")
    assert second.repro("--allow-missing", "validate") == ["check", "validate"]
    assert (second.folder / "reports/validation/validation.json").is_file()
    assert not (second.folder / "data/raw").exists()

    # Both versions can be fetched: from the checkout that has them, and from a clone that has nothing but the remote.
    versions = {}
    for repo, tag in ((str(first.folder), "v1"), (first.folder.as_uri(), "v2")):
        uri, out = f"dvc://{repo}@{tag}:data/raw/line", tmp_path / tag
        sources.fetch(uri, out)
        manifest = json.loads((out / "manifest.json").read_text())
        assert (manifest["source"], manifest["commit"]) == (uri, first.run("git", "rev-parse", tag).strip())
        assert [file["path"] for file in manifest["files"]] == sorted(_images(out))
        assert not [path for path in out.rglob("*") if path.is_symlink()]
        versions[tag] = _images(out)
    assert versions["v2"] == _images(mvtec_folder)
    assert versions["v1"] == {name: image for name, image in versions["v2"].items() if not name.endswith("new.png")}

    # One object is missing in the remote: its file is named, the others are kept, and the next fetch goes on with them.
    lost, sound = "bolt/train/good/new.png", "bolt/train/good/000.png"
    [md5] = [file["md5"] for file in manifest["files"] if file["path"] == lost]
    key = f"adfm/files/md5/{md5[:2]}/{md5[2:]}"
    content = s3.get_object(Bucket="data", Key=key)["Body"].read()
    s3.delete_object(Bucket="data", Key=key)
    with pytest.raises(AdfmError, match=f"{lost} cannot be read; it may never have been pushed"):
        sources.fetch(uri, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    kept = _images(tmp_path / "out.partial")
    assert kept.items() <= versions["v2"].items() and lost not in kept
    s3.put_object(Bucket="data", Key=key, Body=b"-" * len(content))
    with pytest.raises(AdfmError, match=f"{lost}: arrives damaged"):
        sources.fetch(uri, tmp_path / "out")
    s3.put_object(Bucket="data", Key=key, Body=content)
    before = {name: (tmp_path / "out.partial" / name).stat().st_mtime_ns for name in _images(tmp_path / "out.partial")}
    sources.fetch(uri, tmp_path / "out")
    assert _images(tmp_path / "out") == versions["v2"]
    assert before == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in before}
    assert sound in versions["v2"]

    for wrong, says in (
        (f"dvc://{first.folder}@v9:data/raw/line", "cannot be opened at 'v9'; .*unknown Git revision 'v9'"),
        (f"dvc://{tmp_path}@v1:data/raw/line", "cannot be opened at 'v1'; .*is not a git repository"),
        (f"dvc://{first.folder}@v1:data/nowhere", "'data/nowhere' cannot be listed; is it there"),
        (f"dvc://{first.folder}@v1:params.yaml", "is a file, but not an archive that adfm unpacks"),
    ):
        with pytest.raises(AdfmError, match=says) as error:
            sources.fetch(wrong, tmp_path / "wrong")
        assert wrong in str(error.value)
    assert not list(tmp_path.glob("wrong*"))
