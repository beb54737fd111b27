from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from adfm import files, tracking
from adfm.data import shards as shards_
from adfm.errors import AdfmError
from adfm.params import Params
from adfm.registry import lineage


def test_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text("1")
    (folder / "sub" / "b").write_text("2")
    digest = files.digest(folder)
    assert len(digest) == 64
    shutil.copytree(folder, tmp_path / "copy")
    assert files.digest(tmp_path / "copy") == digest
    (folder / "a").write_text("3")
    assert files.digest(folder) != digest
    (folder / "a").write_text("1")
    (folder / "sub" / "b").rename(folder / "sub" / "c")
    assert files.digest(folder) != digest
    (folder / "sub" / "c").rename(folder / "sub" / "b")
    assert files.digest(folder) == digest
    (folder / "empty").touch()
    assert files.digest(folder) != digest


def test_dvc_md5_is_what_dvc_itself_wrote(tmp_path: Path) -> None:
    command = "mkdir -p data/shards; echo 1 > data/shards/a; echo 22 > data/shards/b"
    stages = {"stages": {"convert": {"cmd": command, "outs": ["data/shards"]}}}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump(stages))
    for arguments in (["init", "--no-scm", "--quiet"], ["repro", "--quiet"]):
        subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=tmp_path, check=True)
    shards = tmp_path / "data" / "shards"
    md5 = yaml.safe_load((tmp_path / "dvc.lock").read_text())["stages"]["convert"]["outs"][0]["md5"]
    assert md5.endswith(".dir")
    assert lineage.dvc_md5(shards) == md5
    assert lineage.dvc_md5(tmp_path / "data") is None
    (shards / "c").write_text("more, by hand")
    assert lineage.dvc_md5(shards) is None


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    """A `dvc.lock` as DVC writes it, of the folder `shards` beside it."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a").write_text("1")
    out = {"path": "shards", "hash": "md5", "md5": "d41d.dir", "size": 1, "nfiles": 1}
    stages = {"fetch": {"cmd": "adfm fetch"}, "convert": {"cmd": "adfm convert", "outs": [out]}}
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}, sort_keys=False))
    assert lineage.dvc_md5(tmp_path / "shards") == "d41d.dir"
    return tmp_path / "dvc.lock"


def test_a_conflict_that_git_itself_left(lock: Path) -> None:
    def git(*arguments: str, status: int = 0) -> None:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        assert subprocess.run(command, cwd=lock.parent, capture_output=True).returncode == status

    git("init", "--quiet", "--initial-branch=main")
    git("add", "dvc.lock")
    git("commit", "--message=1")
    for branch, md5 in (("other", "aaaa.dir"), ("main", "bbbb.dir")):
        git("checkout", "-B", branch)
        lock.write_text(lock.read_text().replace("d41d.dir", md5))
        git("commit", "--all", "--message=2")
        git("checkout", "--detach", "HEAD~1")
    git("checkout", "main")
    git("merge", "other", status=1)
    with pytest.raises(AdfmError, match=r"dvc\.lock: line \d+: has Git's conflict markers.*--theirs.*nothing is lost"):
        lineage.dvc_md5(lock.parent / "shards")
    git("checkout", "--theirs", "dvc.lock")
    assert lineage.dvc_md5(lock.parent / "shards") == "aaaa.dir"


def test_a_lock_that_lacks_the_data_is_said(lock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("schema: '2.0'\n", "", lock.read_text().replace("d41d.dir", "null")):
        lock.write_text(text)
        assert lineage.dvc_md5(lock.parent / "shards") is None
        assert f"note: {lock} does not list {lock.parent / 'shards'} as it is now" in capsys.readouterr().out
    lock.unlink()
    assert lineage.dvc_md5(lock.parent / "shards") is None
    assert capsys.readouterr().out == ""


def test_a_lock_that_is_cut_off_is_explained_or_counts_for_nothing(lock: Path) -> None:
    text, seen = lock.read_text().rstrip(), set()
    for length in range(len(text)):
        lock.write_text(text[:length])
        try:
            seen.add(lineage.dvc_md5(lock.parent / "shards"))
        except AdfmError as error:
            assert "dvc.lock: " in str(error) and "nothing is lost" in str(error)
            seen.add("refused")
    assert seen == {None, "refused"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "schema: '2.0'\nstages:\n",
        "stages: [1]",
        "stages: {convert: }",
        "stages: {convert: {outs: }}",
        "stages: {convert: {outs: [{path: shards, size: 1, nfiles: 1}, {md5: d41d.dir}, 3]}}",
    ],
)
def test_a_lock_that_lacks_something_counts_for_nothing(text: str, lock: Path) -> None:
    lock.write_text(text)
    assert lineage.dvc_md5(lock.parent / "shards") is None


@pytest.mark.parametrize("text", [b"- 1", b"\xff\xfe", b"stages: {\n"])
def test_a_lock_that_dvc_did_not_write(text: bytes, lock: Path) -> None:
    lock.write_bytes(text)
    with pytest.raises(AdfmError, match=r"dvc\.lock: .*git checkout dvc.lock.*nothing is lost"):
        lineage.dvc_md5(lock.parent / "shards")


def test_lineage_of_a_training(store, make_shards, make_model, tmp_path) -> None:
    shards = make_shards(tmp_path / "shards")
    with tracking.start_run("train", Params(), {"git_commit": "c0ffee", "library.torch": "1.2.3"}) as run:
        pass
    model = make_model(tmp_path / "model", 1.0, shards, run.info.run_id)
    origin = lineage.lineage(model, shards, Params(seed=9), tracking.find_run(run.info.run_id))
    assert origin["artifact_digest"] == files.digest(model)
    assert origin["base"] == {"name": "embedded://tiny-base", "revision": None}
    assert origin["data"]["trained_on"] == origin["data"]["judged_on"] == shards_.fingerprint(shards)
    assert origin["data"]["test"] == shards_.fingerprint(shards, "test")
    assert origin["data"]["dvc_md5"] is None
    # The training's code and libraries, not those of the moment of registration.
    assert origin["git_commit"] == "c0ffee"
    assert origin["libraries"]["torch"] == "1.2.3"
    assert (origin["trained_with"]["seed"], origin["judged_with"]["seed"]) == (5, 9)
    assert origin["training_run"] == run.info.run_id


def test_lineage_judged_on_other_data(make_shards, make_model, tmp_path) -> None:
    trained_on, judged_on = make_shards(tmp_path / "trained"), make_shards(tmp_path / "judged", 50)
    model = make_model(tmp_path / "model", 1.0, trained_on)
    files = sorted(judged_on.iterdir())
    size = sum(file.stat().st_size for file in files)
    out = {"path": "judged", "md5": "d41d.dir", "size": size, "nfiles": len(files)}
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"stages": {"convert": {"outs": [out]}}}))
    assert lineage.dvc_md5(judged_on) == "d41d.dir"
    origin = lineage.lineage(model, judged_on, Params(), None)
    assert origin["data"]["trained_on"] != origin["data"]["judged_on"]
    assert origin["data"]["dvc_md5"] is None
    assert origin["libraries"]["python"] == ".".join(map(str, sys.version_info[:3]))
