import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from adfm.data import sources
from adfm.errors import AdfmError

FILES = {"a/b/1.png": b"one", "a/2.png": b"", "z.txt": b"three" * 1000}


def _tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def _manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def _source(folder: Path) -> Path:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def _nothing_left(out: Path) -> bool:
    return not list(out.parent.glob(out.name + "*"))


def test_a_folder_and_its_manifest(tmp_path: Path) -> None:
    source = _source(tmp_path / "source")
    sources.fetch(str(source), tmp_path / "out")
    assert _tree(tmp_path / "out") == FILES
    assert _manifest(tmp_path / "out") == {
        "source": str(source),
        "files": [
            {"path": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in sorted(FILES.items())
        ],
    }
    assert [path.name for path in tmp_path.iterdir() if path != source] == ["out"]


def test_a_file_uri_with_a_space(tmp_path: Path) -> None:
    source = _source(tmp_path / "my data")
    sources.fetch(source.as_uri(), tmp_path / "out")
    assert "%20" in source.as_uri()
    assert _tree(tmp_path / "out") == FILES


@pytest.mark.parametrize(
    "name", ['a "b"', "a\nb", "a\\b", "名前.png", "x" * 255, "%20", " ", "'; DROP TABLE files", "🔩"]
)
def test_names_of_any_kind(tmp_path: Path, name: str) -> None:
    source = _source(tmp_path / "source")
    (source / "a" / name).write_bytes(b"x")
    sources.fetch(str(source), tmp_path / "out")
    assert _tree(tmp_path / "out") == {**FILES, f"a/{name}": b"x"}
    assert f"a/{name}" in [file["path"] for file in _manifest(tmp_path / "out")["files"]]


def test_a_name_that_is_not_utf_8_is_read_as_latin_1(tmp_path: Path) -> None:
    source = _source(tmp_path / "source")
    Path(os.fsdecode(os.fsencode(source) + b"/gut\xe9.png")).write_bytes(b"x")
    sources.fetch(str(source), tmp_path / "out")
    assert _tree(tmp_path / "out") == {**FILES, "guté.png": b"x"}


def test_links_are_followed(tmp_path: Path) -> None:
    source = _source(tmp_path / "source")
    (source / "link").symlink_to(source / "a")
    sources.fetch(str(source), tmp_path / "out")
    assert _tree(tmp_path / "out")["link/b/1.png"] == b"one"
    assert not (tmp_path / "out" / "link").is_symlink()


def test_copies_are_independent_of_their_source(tmp_path: Path) -> None:
    source = _source(tmp_path / "source")
    sources.fetch(str(source), tmp_path / "out")
    (tmp_path / "out" / "z.txt").write_bytes(b"changed")
    assert (source / "z.txt").read_bytes() == FILES["z.txt"]


def test_all_that_cannot_be_copied_is_named_at_once(tmp_path: Path) -> None:
    source = _source(tmp_path / "source")
    (source / "nowhere").symlink_to("missing")
    (source / "a" / "loop").symlink_to(source)
    (source / "a" / "b" / "itself").symlink_to("itself")
    (source / "one").mkdir()
    (source / "two").mkdir()
    (source / "one" / "x").symlink_to(source / "two")  # a circle of two
    (source / "two" / "y").symlink_to(source / "one")
    os.mkfifo(source / "pipe")
    with pytest.raises(AdfmError) as error:
        sources.fetch(str(source), tmp_path / "out")
    for says in (
        "'nowhere' is a link that leads nowhere",
        "'a/b/itself' is a link that leads nowhere",
        "'pipe' is a pipe, a socket or a device",
        "'a/loop' is a link to a folder that holds it",
        "'one/x/y' is a link to a folder that holds it",
    ):
        assert says in str(error.value)
    assert _nothing_left(tmp_path / "out")


def test_a_pipe_for_an_archive_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.zip")
    with pytest.raises(AdfmError, match="x.zip: is a pipe or a device"):
        sources.fetch(str(tmp_path / "x.zip"), tmp_path / "out")


def test_names_of_a_folder_in_two_normalisations(tmp_path: Path) -> None:
    source = _source(tmp_path / "source")
    for name in ("\u00e9.png", "e\u0301.png"):
        (source / name).touch()
    with pytest.raises(AdfmError, match=r"source: .*\n.*Unicode normalisation .*e\\u0301.png"):
        sources.fetch(str(source), tmp_path / "out")
    assert _nothing_left(tmp_path / "out")


def test_what_arrived_is_counted(tmp_path: Path) -> None:
    source = _source(tmp_path / "source")
    assert sources.fetch(str(source), tmp_path / "out") == (len(FILES), sum(map(len, FILES.values())))


def test_a_fetched_folder_can_be_fetched_and_no_other_manifest_is_lost(tmp_path: Path) -> None:
    source = _source(tmp_path / "source")
    sources.fetch(str(source), tmp_path / "first")
    sources.fetch(str(tmp_path / "first"), tmp_path / "second")
    assert _manifest(tmp_path / "second")["files"] == _manifest(tmp_path / "first")["files"]
    (source / "manifest.json").write_text('{"images": []}')
    with pytest.raises(AdfmError, match="source: holds a manifest.json, which adfm writes itself; rename it"):
        sources.fetch(str(source), tmp_path / "third")
    assert _nothing_left(tmp_path / "third")


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("{}/missing", "missing: no such folder or archive"),
        ("file://{}/missing", "missing: no such folder or archive"),
        ("file://host/data", "write file:///absolute/path"),
        ("synthetic", r"Did you mean synthetic://\?"),
        ("s3:/bucket/x", r"Did you mean s3://\?"),
        ("{}/file.txt", r"is a file, but not an archive that adfm unpacks \(.zip, .tar"),
        ("{}/empty", "holds no file"),
        ("s4://bucket/x", "fetches nothing from s4://; did you mean s3://"),
        ("https://example.com/mvtec.tar.xz", "fetches nothing from https://"),
        ("s3://", "names no bucket"),
        ("dvc://repo:data", "write dvc://REPO@REV:PATH"),
        ("dvc://repo@v1", "write dvc://REPO@REV:PATH"),
        ("dvc://git@host:repo:data", "write dvc://REPO@REV:PATH"),
        ("dvc://repo@v1:../data", "write dvc://REPO@REV:PATH"),
        ("dvc://no/such/repo@v1:data", "the folder 'no/such/repo' does not exist"),
        ("synthetic://somewhere", "has no path"),
        ("synthetic://?sed=1", "unknown option 'sed'; did you mean 'seed'"),
        ("synthetic://?seed=one", "seed is 'one'; give a whole number"),
        ("synthetic://?images=-5", "images is '-5'"),
        ("synthetic://?images=", "images is ''"),
    ],
)
def test_a_wrong_uri(tmp_path: Path, uri: str, says: str) -> None:
    (tmp_path / "file.txt").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdfmError, match=says) as error:
        sources.fetch(uri.format(tmp_path), tmp_path / "out")
    assert uri.format(tmp_path) in str(error.value)
    assert _nothing_left(tmp_path / "out")


def test_out_and_source_must_not_hold_each_other(tmp_path: Path) -> None:
    source = _source(tmp_path / "source")
    for out in (source, source / "a" / "out", tmp_path):
        with pytest.raises(AdfmError, match="choose another folder"):
            sources.fetch(str(source), out)
    assert _tree(source) == FILES


def test_a_disk_that_is_full_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _source(tmp_path / "source")
    real = Path.open

    def full(path: Path, mode: str = "r", **options: Any) -> Any:
        return real(Path("/dev/full"), "wb") if path.name == "z.txt" and mode == "xb" else real(path, mode, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(AdfmError, match="No space left on device; free some space"):
        sources.fetch(str(source), tmp_path / "out")
    assert _nothing_left(tmp_path / "out")


def test_the_embedded_data_set(tmp_path: Path) -> None:
    sources.fetch("synthetic://?seed=3&images=20", tmp_path / "out")
    assert _manifest(tmp_path / "out")["source"] == "synthetic://?seed=3&images=20"
    assert len(list((tmp_path / "out").glob("*/t*/*/*.png"))) == 6 * 20
    assert sorted(file["path"] for file in _manifest(tmp_path / "out")["files"]) == sorted(_tree(tmp_path / "out"))
