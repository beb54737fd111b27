import hashlib
import io
import json
import os
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer

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


# ------------------------------------------------------------------------------------------------------------ folders


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


def test_a_file_uri_with_a_space(tmp_path: Path) -> None:
    source = _source(tmp_path / "my data")
    sources.fetch(source.as_uri(), tmp_path / "out")
    assert "%20" in source.as_uri()
    assert _tree(tmp_path / "out") == FILES


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


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda source: (source / "x").symlink_to("nowhere"), "x: is a link that leads nowhere"),
        (lambda source: (source / "a" / "x").symlink_to(source), "x: is a link to a folder that holds it"),
        (lambda source: os.mkfifo(source / "x"), "x: is a link that leads nowhere, or no ordinary file"),
    ],
)
def test_what_cannot_be_copied(tmp_path: Path, make: Callable[[Path], None], says: str) -> None:
    source = _source(tmp_path / "source")
    make(source)
    with pytest.raises(AdfmError, match=says):
        sources.fetch(str(source), tmp_path / "out")
    assert _nothing_left(tmp_path / "out")


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("{}/missing", "missing: no such folder or archive"),
        ("file://{}/missing", "missing: no such folder or archive"),
        ("file://host/data", "write file:///absolute/path"),
        ("synthetic", r"Did you mean synthetic://\?"),
        ("s3:/bucket/x", r"Did you mean s3://\?"),
        ("{}/file.txt", r"is a file, but no archive that adfm unpacks \(.zip, .tar"),
        ("{}/empty", "holds no file"),
        ("s4://bucket/x", "fetches nothing from s4://; did you mean s3://"),
        ("https://example.com/mvtec.tar.xz", "fetches nothing from https://"),
        ("s3://", "names no bucket"),
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


def test_digests_come_from_the_manifest_and_else_from_the_files(tmp_path: Path) -> None:
    sources.fetch(str(_source(tmp_path / "source")), tmp_path / "out")
    (tmp_path / "out" / "z.txt").write_bytes(b"changed")
    (tmp_path / "out" / "new").write_bytes(b"new")
    sha256 = [hashlib.sha256(content).hexdigest() for content in (FILES["z.txt"], b"new")]
    assert sources.digests(tmp_path / "out", ["z.txt", "new", "missing"]) == [*sha256, ""]
    (tmp_path / "out" / "manifest.json").write_text('{"name": "of somebody else"}')
    assert sources.digests(tmp_path / "out", ["new"]) == sha256[1:]


# ----------------------------------------------------------------------------------------------------------- archives


def _tar(path: Path, mode: str, *extra: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, mode) as file:
        for name, content in FILES.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
        for info, content in extra:
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def _zip(path: Path, *extra: tuple[zipfile.ZipInfo | str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.mkdir("a")
        for name, content in [*FILES.items(), *extra]:
            file.writestr(name, content)
    return path


def _zst(path: Path) -> Path:
    plain = _tar(path.with_name("plain"), "w")
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(plain.read_bytes())
    return path


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("x.zip", _zip),
        ("x.tar", lambda path: _tar(path, "w")),
        ("x.tar.gz", lambda path: _tar(path, "w:gz")),
        ("x.TGZ", lambda path: _tar(path, "w:gz")),
        ("x.tar.xz", lambda path: _tar(path, "w:xz")),
        ("x.txz", lambda path: _tar(path, "w:xz")),
        ("x.tar.zst", _zst),
    ],
)
def test_an_archive(tmp_path: Path, name: str, make: Callable[[Path], Path]) -> None:
    archive = make(tmp_path / name)
    sources.fetch(str(archive), tmp_path / "out")
    assert _tree(tmp_path / "out") == FILES
    assert [file["path"] for file in _manifest(tmp_path / "out")["files"]] == sorted(FILES)

    whole = archive.read_bytes()
    for share in (0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
        archive.write_bytes(whole[: int(len(whole) * share)])
        try:
            sources.fetch(str(archive), tmp_path / "cut")
        except AdfmError as error:
            assert f"{name}: is damaged" in str(error)
            assert _nothing_left(tmp_path / "cut")
        else:  # only what a tar is filled up with is missing
            assert name == "x.tar" and _tree(tmp_path / "cut") == FILES


def _info(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def _zip_link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def test_links_within_an_archive_become_copies(tmp_path: Path) -> None:
    links = [
        (_info("hard", tarfile.LNKTYPE, "a/b/1.png"), b""),
        (_info("a/soft", tarfile.SYMTYPE, "../z.txt"), b""),
    ]
    sources.fetch(str(_tar(tmp_path / "x.tar", "w", *links)), tmp_path / "tar")
    assert _tree(tmp_path / "tar") == {**FILES, "hard": b"one", "a/soft": FILES["z.txt"]}
    sources.fetch(str(_zip(tmp_path / "x.zip", (_zip_link("a/soft"), b"b/1.png"))), tmp_path / "zip")
    assert _tree(tmp_path / "zip") == {**FILES, "a/soft": b"one"}
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize(
    "member",
    [
        _info("../evil"),
        _info("a/../../evil"),
        _info("/tmp/evil"),
        _info("evil", tarfile.SYMTYPE, "/etc/passwd"),
        _info("evil", tarfile.SYMTYPE, "../outside"),
        _info("a/evil", tarfile.SYMTYPE, "b"),
        _info("evil", tarfile.LNKTYPE, "../outside"),
        _info("evil", tarfile.SYMTYPE, "missing"),
        _info("evil", tarfile.CHRTYPE),
        _info("evil", tarfile.FIFOTYPE),
    ],
    ids=lambda info: f"{info.name}-{info.type.decode()}-{info.linkname}",
)
def test_a_member_that_is_not_to_be_trusted(tmp_path: Path, member: tarfile.TarInfo) -> None:
    (tmp_path / "outside").write_text("secret")
    archive = _tar(tmp_path / "x.tar", "w", (member, b""))
    with pytest.raises(AdfmError, match=f"member {member.name!r}|member '{member.name}'"):
        sources.fetch(str(archive), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "x.tar"]


@pytest.mark.parametrize(("name", "content"), [("../evil", b"x"), ("/evil", b"x"), (_zip_link("evil"), b"/etc/passwd")])
def test_a_zip_member_that_is_not_to_be_trusted(tmp_path: Path, name: Any, content: bytes) -> None:
    with pytest.raises(AdfmError, match="evil"):
        sources.fetch(str(_zip(tmp_path / "x.zip", (name, content))), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]


def test_a_link_first_and_then_a_file_through_it(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    members = [(_info("door", tarfile.SYMTYPE, "../outside"), b""), (_info("door/evil"), b"x")]
    with pytest.raises(AdfmError, match="door"):
        sources.fetch(str(_tar(tmp_path / "x.tar", "w", *members)), tmp_path / "out")
    assert not any((tmp_path / "outside").iterdir())


def test_a_name_that_is_a_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(AdfmError, match="x.tar: is damaged"):
        sources.fetch(str(_tar(tmp_path / "x.tar", "w", (_info("z.txt/inside"), b"x"))), tmp_path / "out")


@settings(deadline=None, max_examples=200)
@given(name=st.text(st.sampled_from("./a\0"), max_size=12))
def test_no_name_leads_out(name: str) -> None:
    try:
        inside = sources._inside(name, "the member")
    except AdfmError:
        assert name.startswith("/") or "\0" in name or ".." in name.split("/")
    else:
        assert os.path.abspath(f"/root/{inside}").startswith("/root")


# ----------------------------------------------------------------------------------------------------------------- S3


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Moto answers as S3 does, but accepts every key."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it remembers credentials
    client = boto3.client("s3")
    client.create_bucket(Bucket="data")
    for name, content in FILES.items():
        client.put_object(Bucket="data", Key=f"sets/tiny/{name}", Body=content)
    client.put_object(Bucket="data", Key="sets/tiny/empty/", Body=b"")
    client.put_object(Bucket="data", Key="sets/tiny2/other.png", Body=b"other")
    yield client
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="data"):
        for item in page.get("Contents", []):
            client.delete_object(Bucket="data", Key=item["Key"])
    client.delete_bucket(Bucket="data")
    client.close()


@pytest.mark.parametrize("uri", ["s3://data/sets/tiny", "s3://data/sets/tiny/"])
def test_a_prefix(s3: Any, tmp_path: Path, uri: str) -> None:
    sources.fetch(uri, tmp_path / "out")
    assert _tree(tmp_path / "out") == FILES
    assert _manifest(tmp_path / "out")["source"] == uri
    assert [file["path"] for file in _manifest(tmp_path / "out")["files"]] == sorted(FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_whole_bucket_of_more_than_a_page(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "2")
    sources.fetch("s3://data", tmp_path / "out")
    assert _tree(tmp_path / "out") == {
        **{f"sets/tiny/{name}": content for name, content in FILES.items()},
        "sets/tiny2/other.png": b"other",
    }


def test_an_archive_in_a_bucket_is_unpacked(s3: Any, tmp_path: Path) -> None:
    archive = _tar(tmp_path / "x.tar.xz", "w:xz")
    s3.upload_file(str(archive), "data", "sets/x.tar.xz")
    sources.fetch("s3://data/sets/x.tar.xz", tmp_path / "out")
    assert _tree(tmp_path / "out") == FILES


def test_an_object_in_several_parts(s3: Any, tmp_path: Path) -> None:
    content = os.urandom(9 * 2**20)
    s3.upload_fileobj(io.BytesIO(content), "data", "big/x.bin")
    assert "-" in s3.head_object(Bucket="data", Key="big/x.bin")["ETag"]
    sources.fetch("s3://data/big", tmp_path / "out")
    assert _tree(tmp_path / "out") == {"x.bin": content}


def _gets(s3: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys that are downloaded from now on."""
    keys: list[str] = []
    create = boto3.client

    def client(*args: Any, **options: Any) -> Any:
        made = create(*args, **options)
        made.meta.events.register("before-call.s3.GetObject", lambda params, **_: keys.append(params["url_path"]))
        return made

    monkeypatch.setattr(boto3, "client", client)
    return keys


def test_an_interrupted_download_goes_on_where_it_stopped(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put_object(Bucket="data", Key="sets/tiny/same-size", Body=b"old")
    partial = tmp_path / "out.partial"
    partial.mkdir()
    listed = {item["Key"]: item["ETag"] for item in s3.list_objects_v2(Bucket="data")["Contents"]}
    journal = [{"source": "s3://data/sets/tiny"}]
    for name, content in {"a/b/1.png": b"one", "z.txt": b"cut off", "same-size": b"old", "deleted": b"x"}.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(content)
        journal.append({"path": name, "etag": listed.get(f"sets/tiny/{name}", "gone")})
    (partial / ".fetched.jsonl").write_text("\n".join(json.dumps(line) for line in journal) + '\n{"path": "a/2.p')
    s3.put_object(Bucket="data", Key="sets/tiny/same-size", Body=b"new")

    keys = _gets(s3, monkeypatch)
    sources.fetch("s3://data/sets/tiny", tmp_path / "out")
    assert _tree(tmp_path / "out") == {**FILES, "same-size": b"new"}
    assert sorted(key.rpartition("/tiny/")[2] for key in keys) == ["a/2.png", "same-size", "z.txt"]


def test_a_partial_download_of_another_source_is_not_mixed_in(s3: Any, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "stray.png").write_bytes(b"x")
    (tmp_path / "out.partial" / ".fetched.jsonl").write_text(
        '{"source": "s3://other"}\n{"path": "stray.png", "etag": ""}'
    )
    sources.fetch("s3://data/sets/tiny", tmp_path / "out")
    assert _tree(tmp_path / "out") == FILES


def test_a_killed_download_leaves_nothing_that_looks_finished_and_is_resumed(s3: Any, tmp_path: Path) -> None:
    for number in range(60):
        s3.put_object(Bucket="data", Key=f"kill/{number:03d}", Body=b"x" * 1000)
    code = (
        "import sys, pathlib; from adfm.data import sources; sources.fetch('s3://data/kill', pathlib.Path(sys.argv[1]))"
    )
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    process = subprocess.Popen([sys.executable, "-c", code, str(out)])
    while process.poll() is None and len(list(partial.glob("???"))) < 8:
        threading.Event().wait(0.01)
    process.kill()
    process.wait()
    assert not out.exists()
    assert 8 <= len(list(partial.glob("???"))) < 60
    sources.fetch("s3://data/kill", out)
    assert _tree(out) == {f"{number:03d}": b"x" * 1000 for number in range(60)}


def test_a_key_that_leads_out(s3: Any, tmp_path: Path) -> None:
    s3.put_object(Bucket="data", Key="bad/../../evil", Body=b"x")
    with pytest.raises(AdfmError, match="evil"):
        sources.fetch("s3://data/bad", tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_bucket_or_prefix_that_is_not_there(s3: Any, tmp_path: Path) -> None:
    with pytest.raises(AdfmError, match="s3://nowhere/x: there is no such bucket"):
        sources.fetch("s3://nowhere/x", tmp_path / "out")
    with pytest.raises(AdfmError, match="s3://Not a bucket!/x: that is no name of a bucket"):
        sources.fetch("s3://Not a bucket!/x", tmp_path / "out")
    for uri in ("s3://data/sets/tin", "s3://data/sets/missing.zip"):
        with pytest.raises(AdfmError, match=f"{uri}: the bucket is there, but nothing under that prefix"):
            sources.fetch(uri, tmp_path / "out")
    assert _nothing_left(tmp_path / "out")


def test_no_credentials(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    with pytest.raises(AdfmError, match="no credentials; set AWS_ACCESS_KEY_ID"):
        sources.fetch("s3://data/sets/tiny", tmp_path / "out")


def test_an_endpoint_that_nobody_answers_at(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(AdfmError, match=f"{endpoint} cannot be reached"):
            sources.fetch("s3://data/sets/tiny", tmp_path / "out")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "no endpoint")
    with pytest.raises(AdfmError, match="check AWS_ENDPOINT_URL"):
        sources.fetch("s3://data/sets/tiny", tmp_path / "out")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("InvalidAccessKeyId", "does not accept the credentials"),
        ("SignatureDoesNotMatch", "does not accept the credentials"),
        ("AccessDenied", "may not read there"),
    ],
)
def test_a_wrong_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: Any, code: str, says: str) -> None:
    """Moto accepts every key, so this server answers as S3 does to a wrong one."""
    import http.server

    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as refusing:
        threading.Thread(target=refusing.serve_forever).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{refusing.server_port}")
        with pytest.raises(AdfmError, match=says):
            sources.fetch("s3://data/sets/tiny", tmp_path / "out")
        refusing.shutdown()


# ---------------------------------------------------------------------------------------------------------- synthetic


def test_the_embedded_data_set(tmp_path: Path) -> None:
    sources.fetch("synthetic://?seed=3&images=20", tmp_path / "out")
    assert _manifest(tmp_path / "out")["source"] == "synthetic://?seed=3&images=20"
    assert len(list((tmp_path / "out").glob("*/t*/*/*.png"))) == 6 * 20
