"""`s3://` against a real server, and against a network that fails."""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from adfm.data import sources
from adfm.errors import AdfmError

FILES = {"a/b/1.png": b"one", "a/2.png": b"", "z.txt": b"three" * 1000}


def _tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json" and ".fetch" not in path.parts
    }


def _manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def _nothing_left(out: Path) -> bool:
    return not list(out.parent.glob(out.name + "*"))


def _put(s3: Any, prefix: str, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        s3.put_object(Bucket="data", Key=f"{prefix}/{name}", Body=content)


@pytest.fixture
def tiny(s3: Any) -> Any:
    _put(s3, "sets/tiny", FILES)
    s3.put_object(Bucket="data", Key="sets/tiny/empty/", Body=b"")
    s3.put_object(Bucket="data", Key="sets/tiny2/other.png", Body=b"other")
    return s3


@pytest.mark.parametrize("uri", ["s3://data/sets/tiny", "s3://data/sets/tiny/"])
def test_a_prefix(tiny: Any, tmp_path: Path, uri: str) -> None:
    sources.fetch(uri, tmp_path / "out")
    assert _tree(tmp_path / "out") == FILES
    assert _manifest(tmp_path / "out") == {
        "source": uri,
        "files": [
            {
                "path": name,
                "size": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                "etag": f'"{hashlib.md5(content).hexdigest()}"',
            }
            for name, content in sorted(FILES.items())
        ],
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / ".fetch").exists()


def test_a_whole_bucket_of_more_than_a_page(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = boto3.client

    def client(*args: Any, **options: Any) -> Any:
        made = create(*args, **options)
        made.meta.events.register("provide-client-params.s3.ListObjectsV2", lambda params, **_: params | {"MaxKeys": 2})
        return made

    monkeypatch.setattr(boto3, "client", client)
    sources.fetch("s3://data", tmp_path / "out")
    assert _tree(tmp_path / "out") == {
        **{f"sets/tiny/{name}": content for name, content in FILES.items()},
        "sets/tiny2/other.png": b"other",
    }


def test_names_of_any_kind(s3: Any, tmp_path: Path) -> None:
    files = {name: name.encode() for name in ('a "b".png', "a\nb", "名前.png", "a+b%20c?d#e&f=g", "x" * 255, "..a/b..")}
    _put(s3, "names", files)
    sources.fetch("s3://data/names", tmp_path / "out")
    assert _tree(tmp_path / "out") == files


def test_an_archive_in_a_bucket_is_unpacked(s3: Any, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for name, content in FILES.items():
            file.writestr(name, content)
    s3.upload_file(str(tmp_path / "x.zip"), "data", "sets/x.zip")
    s3.put_object(Bucket="data", Key="sets/x.zip.md5", Body=b"not of the archive")
    sources.fetch("s3://data/sets/x.zip", tmp_path / "out")
    assert _tree(tmp_path / "out") == FILES
    assert [file["path"] for file in _manifest(tmp_path / "out")["files"]] == sorted(FILES)

    s3.put_object(Bucket="data", Key="sets/x.zip", Body=(tmp_path / "x.zip").read_bytes()[:-30])
    with pytest.raises(AdfmError, match="s3://data/sets/x.zip: is damaged"):
        sources.fetch("s3://data/sets/x.zip", tmp_path / "cut")
    s3.upload_file(str(tmp_path / "x.zip"), "data", "sets/x.zip")
    sources.fetch("s3://data/sets/x.zip", tmp_path / "cut")
    assert _tree(tmp_path / "cut") == FILES


def test_an_object_in_several_parts(s3: Any, tmp_path: Path) -> None:
    content = os.urandom(9 * 2**20)
    s3.upload_fileobj(io.BytesIO(content), "data", "big/x.bin")
    assert "-" in s3.head_object(Bucket="data", Key="big/x.bin")["ETag"]
    sources.fetch("s3://data/big", tmp_path / "out")
    assert _tree(tmp_path / "out") == {"x.bin": content}
    assert _manifest(tmp_path / "out")["files"][0]["sha256"] == hashlib.sha256(content).hexdigest()


def test_a_versioned_bucket(s3: Any, tmp_path: Path) -> None:
    s3.put_object(Bucket="data", Key="set/before", Body=b"x")
    s3.put_bucket_versioning(Bucket="data", VersioningConfiguration={"Status": "Enabled"})
    for content in (b"old", b"new"):
        version = s3.put_object(Bucket="data", Key="set/x.png", Body=content)["VersionId"]
    s3.put_object(Bucket="data", Key="set/gone", Body=b"x")
    s3.delete_object(Bucket="data", Key="set/gone")
    sources.fetch("s3://data/set", tmp_path / "out")
    assert _tree(tmp_path / "out") == {"before": b"x", "x.png": b"new"}
    assert [file.get("version") for file in _manifest(tmp_path / "out")["files"]] == [None, version]


def test_keys_that_no_folder_can_hold(s3: Any, tmp_path: Path) -> None:
    _put(s3, "bad", {"../../evil": b"x", "good": b"x", "x" * 256: b"x", ".fetch/ledger.sqlite": b"x"})
    with pytest.raises(AdfmError, match="(?s)s3://data/bad: .*evil' leads out.*longer than the 255 bytes") as error:
        sources.fetch("s3://data/bad", tmp_path / "out")
    assert ".fetch/ledger.sqlite' has the name of a folder that adfm uses" in str(error.value)
    assert set(_tree(tmp_path)) == {"out.partial/good"}

    _put(s3, "both", {"a": b"x", "a/b": b"x"})
    with pytest.raises(AdfmError, match="is both a file and a folder"):
        sources.fetch("s3://data/both", tmp_path / "both")


def test_keys_with_empty_parts_and_dots_arrive_under_their_path(s3: Any, tmp_path: Path) -> None:
    _put(s3, "set", {"a//1.png": b"1", "./2.png": b"2", "a/./3.png": b"3", "/4.png": b"4", "A/1.PNG": b"5", "b//": b""})
    sources.fetch("s3://data/set", tmp_path / "out")
    assert _tree(tmp_path / "out") == {"a/1.png": b"1", "2.png": b"2", "a/3.png": b"3", "4.png": b"4", "A/1.PNG": b"5"}


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (("a//1.png", "a/1.png"), "'set/a/1.png' becomes the same file as 'set/a//1.png'"),
        (("/a.png", "a.png"), "'set/a.png' becomes the same file as 'set//a.png'"),
        (("a", "a/1.png"), "'set/a/1.png' is both a file and a folder, because of 'set/a'"),
        (("a/.",), "'set/a/.' ends in '/.', which is not the name of a file"),
        (("a/",), "'set/a/' has content, and a name that only a folder can have"),
        (("\u00e9", "e\u0301"), "Unicode normalisation"),
    ],
)
def test_keys_of_which_one_would_be_lost(s3: Any, tmp_path: Path, keys: tuple[str, ...], says: str) -> None:
    _put(s3, "set", {key: key.encode() for key in keys})
    with pytest.raises(AdfmError, match=f"s3://data/set: (?s:.*){says}"):
        sources.fetch("s3://data/set", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_an_earlier_attempt_left_in_the_place_of_a_file_or_folder_is_removed(s3: Any, tmp_path: Path) -> None:
    _put(s3, "set", {"a/1.png": b"1", "b": b"2", "../evil": b"x"})
    with pytest.raises(AdfmError, match="evil"):
        sources.fetch("s3://data/set", tmp_path / "out")
    for key in ("a/1.png", "b", "../evil"):
        s3.delete_object(Bucket="data", Key=f"set/{key}")
    _put(s3, "set", {"a": b"3", "b/2.png": b"4"})
    sources.fetch("s3://data/set", tmp_path / "out")
    assert _tree(tmp_path / "out") == {"a": b"3", "b/2.png": b"4"}


def test_any_keys_are_all_there_or_named(s3: Any, tmp_path: Path) -> None:
    parts = st.sampled_from(["a", "A", "", ".", "b.png", "\u00e9", "e\u0301"])
    keys = st.lists(
        st.lists(parts, min_size=1, max_size=3).map("/".join).filter(bool), min_size=1, max_size=4, unique=True
    )

    @settings(deadline=None, max_examples=25, phases=[Phase.generate])
    @given(keys=keys)
    def check(keys: list[str]) -> None:
        for item in s3.list_objects_v2(Bucket="data").get("Contents", []):
            s3.delete_object(Bucket="data", Key=item["Key"])
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        _put(s3, "set", {key: key.encode() for key in keys})
        try:
            files, _ = sources.fetch("s3://data/set", tmp_path / "out")
        except AdfmError as error:
            assert any(repr(f"set/{key}") in str(error) for key in keys), error
        else:
            assert files == len(keys)
            assert sorted(_tree(tmp_path / "out").values()) == sorted(key.encode() for key in keys)

    check()


# ------------------------------------------------------------------------------------------------ what may not be read


def test_a_bucket_or_prefix_that_is_not_there(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(AdfmError, match="s3://nowhere/x: the bucket does not exist"):
        sources.fetch("s3://nowhere/x", tmp_path / "out")
    with pytest.raises(AdfmError, match="s3://Not a bucket!/x: that is not a name of a bucket"):
        sources.fetch("s3://Not a bucket!/x", tmp_path / "out")
    for uri in ("s3://data/sets/tin", "s3://data/sets/missing.zip"):
        with pytest.raises(AdfmError, match=f"{uri}: the bucket is there, but nothing under that prefix"):
            sources.fetch(uri, tmp_path / "out")
    assert _nothing_left(tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "secret", "says"),
    [
        (None, None, "no credentials; set AWS_ACCESS_KEY_ID"),
        ("nobody", "owner-secret", "does not accept the credentials; check AWS_ACCESS_KEY_ID"),
        ("owner", "wrong", "does not accept the credentials; check AWS_ACCESS_KEY_ID"),
        ("stranger", "stranger-secret", "these credentials may not read there; ask for s3:ListBucket and s3:GetObject"),
    ],
)
def test_a_wrong_key(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None, secret: str | None, says: str
) -> None:
    for name, value in (("AWS_ACCESS_KEY_ID", key), ("AWS_SECRET_ACCESS_KEY", secret)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    with pytest.raises(AdfmError, match=f"s3://data/sets/tiny: .*{says}"):
        sources.fetch("s3://data/sets/tiny", tmp_path / "out")
    assert _nothing_left(tmp_path / "out")


def test_a_policy_that_allows_the_list_and_not_every_object(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allow(*statements: tuple[str, str]) -> None:
        everyone = [
            {"Effect": "Allow", "Principal": "*", "Action": f"s3:{action}", "Resource": f"arn:aws:s3:::{resource}"}
            for action, resource in statements
        ]
        tiny.put_bucket_policy(Bucket="data", Policy=json.dumps({"Version": "2012-10-17", "Statement": everyone}))

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "stranger")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "stranger-secret")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    allow(("ListBucket", "data"), ("GetObject", "data/sets/tiny/a/*"))
    with pytest.raises(AdfmError, match="s3://data/sets/tiny/z.txt: these credentials may not read there"):
        sources.fetch("s3://data/sets/tiny", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    allow(("ListBucket", "data"), ("GetObject", "data/*"))
    sources.fetch("s3://data/sets/tiny", tmp_path / "out")
    assert _tree(tmp_path / "out") == FILES


def test_an_endpoint_that_nobody_answers_at(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(AdfmError, match=f"s3://data/sets/tiny: {endpoint} cannot be reached"):
            sources.fetch("s3://data/sets/tiny", tmp_path / "out")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "no endpoint")
    with pytest.raises(AdfmError, match="check AWS_ENDPOINT_URL"):
        sources.fetch("s3://data/sets/tiny", tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------- bad network


class Network:
    """Between client and server: hands on what they say, until it fails as it is told to.

    Attributes:
        budget: Bytes that it still brings from the server before the line goes dead for everyone.
        silent: Whether it stalls when the budget is used up, instead of closing the connections.
        cut: Bytes after which it cuts each connection.
        replace: What it puts in the place of what in an answer, and how often it still does.
        asked: The paths of all GET requests for objects.
        brought: Bytes that came from the server.
    """

    def __init__(self, server: str) -> None:
        self.budget: float = float("inf")
        self.silent = False
        self.cut: float = float("inf")
        self.replace: tuple[bytes, bytes, int] = (b"", b"", 0)
        self.asked: list[str] = []
        self.brought = 0
        host, port = server.removeprefix("http://").split(":")
        self._server = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.budget <= 0 and not self.silent:
                    client.close()
                    continue
                server = socket.create_connection(self._server)
                threading.Thread(target=self._requests, args=(client, server), daemon=True).start()
                threading.Thread(target=self._answers, args=(client, server), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(2**16):
                self.asked += re.findall(r"GET /data/(\S+) HTTP", data.decode("latin-1"))
                server.sendall(data)
        _hang_up(client, server)

    def _answers(self, client: socket.socket, server: socket.socket) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while passed < self.cut and (data := server.recv(2**14)):
                while self.budget <= 0 and self.silent:
                    time.sleep(0.01)
                with self._lock:
                    old, new, times = self.replace
                    if times and old in data:
                        data = data.replace(old, new)
                        self.replace = old, new, times - 1
                    data = data[: int(max(min(len(data), self.budget, self.cut - passed), 0))]
                    self.budget -= len(data)
                    self.brought += len(data)
                passed += len(data)
                client.sendall(data)
                if self.budget <= 0 and not self.silent:
                    break
        _hang_up(client, server)


def _hang_up(*lines: socket.socket) -> None:
    for line in lines:
        with contextlib.suppress(OSError):
            line.shutdown(socket.SHUT_RDWR)
        line.close()


@pytest.fixture
def network(s3: Any, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    network = Network(s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", network.address)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    yield network
    network.close()


def test_a_server_that_is_killed_twenty_times(s3: Any, network: Network, tmp_path: Path) -> None:
    files = {f"{number % 3}/{number:02d}.png": os.urandom(150_000) for number in range(30)}
    files["large.bin"] = os.urandom(1_500_000)
    _put(s3, "set", files)
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    total = sum(map(len, files.values()))
    for killed in range(20):
        whole = _tree(partial)
        network.asked.clear()
        network.budget = total // 21
        with pytest.raises(AdfmError, match=f"s3://data/set: {network.address} cannot be reached.*what has arrived"):
            sources.fetch("s3://data/set", out)
        assert not {f"set/{name}" for name in whole} & set(network.asked), killed
        assert whole.items() <= _tree(partial).items() <= files.items()
        assert not out.exists()
    assert len(_tree(partial)) > 10
    network.budget = float("inf")
    sources.fetch("s3://data/set", out)
    assert _tree(out) == files
    assert [(file["path"], file["sha256"]) for file in _manifest(out)["files"]] == [
        (name, hashlib.sha256(content).hexdigest()) for name, content in sorted(files.items())
    ]
    assert network.brought < 1.1 * total  # files go on where they stopped
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_arrived_whole_but_was_not_put_in_its_place_is_not_asked_for_again(
    s3: Any, network: Network, tmp_path: Path
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    files = {"a.png": os.urandom(150_000), "empty.png": b""}
    _put(s3, "set", files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sources.fetch("s3://data/set", tmp_path / "out")
    assert network.asked.count("set/a.png") == 1
    sources.fetch("s3://data/set", tmp_path / "out")
    assert _tree(tmp_path / "out") == files
    assert network.asked.count("set/a.png") == 1


def test_a_network_that_cuts_every_connection_is_lived_with(s3: Any, network: Network, tmp_path: Path) -> None:
    content = os.urandom(5_000_000)
    s3.upload_fileobj(io.BytesIO(content), "data", "set/large.bin")
    network.cut = 250_000
    sources.fetch("s3://data/set", tmp_path / "out")
    assert _tree(tmp_path / "out") == {"large.bin": content}
    assert network.asked.count("set/large.bin") >= 20
    assert network.brought < 1.1 * len(content)


@pytest.mark.parametrize("times", [1, 1000])
def test_what_arrives_damaged_is_not_taken(s3: Any, network: Network, tmp_path: Path, times: int) -> None:
    _put(s3, "set", {"x.png": b"-" * 1000 + b"RIGHT" + b"-" * 1000})
    network.replace = b"RIGHT", b"WRONG", times
    if times == 1:
        sources.fetch("s3://data/set", tmp_path / "out")
        assert b"RIGHT" in _tree(tmp_path / "out")["x.png"]
        assert network.asked == ["set/x.png"] * 2
    else:
        with pytest.raises(AdfmError, match=r"x.png: arrives damaged \(its MD5 is .*\); check the network"):
            sources.fetch("s3://data/set", tmp_path / "out")
        assert not _tree(tmp_path)


def test_an_object_that_changes_between_two_attempts(s3: Any, network: Network, tmp_path: Path) -> None:
    old, new = os.urandom(300_000), os.urandom(300_000)
    _put(s3, "set", {"x.png": old, "gone.png": b"x", "empty/gone.png": b"x", "kept.png": b"x"})
    network.budget = 100_000
    with pytest.raises(AdfmError, match="cannot be reached"):
        sources.fetch("s3://data/set", tmp_path / "out")
    network.budget = float("inf")
    _put(s3, "set", {"x.png": new})
    for name in ("gone.png", "empty/gone.png"):
        s3.delete_object(Bucket="data", Key=f"set/{name}")
    sources.fetch("s3://data/set", tmp_path / "out")
    assert _tree(tmp_path / "out") == {"x.png": new, "kept.png": b"x"}
    assert not (tmp_path / "out" / "empty").exists()


@pytest.fixture
def refused_at_the_end(s3: Any, tmp_path: Path) -> str:
    """A prefix of which everything has been fetched to `out.partial`, and then it was refused for one of its keys."""
    _put(s3, "set", {"0.png": b"x" * 1000, "1.png": b"x" * 1000, "2.png": b"x" * 1000, "../evil": b"x"})
    with pytest.raises(AdfmError, match="evil' leads out"):
        sources.fetch("s3://data/set", tmp_path / "out")
    assert set(_tree(tmp_path / "out.partial")) == {"0.png", "1.png", "2.png"}
    s3.delete_object(Bucket="data", Key="set/../evil")
    return "s3://data/set"


def test_a_file_that_is_lost_or_cut_between_two_attempts_is_fetched_again(
    refused_at_the_end: str, network: Network, tmp_path: Path
) -> None:
    (tmp_path / "out.partial" / "0.png").unlink()
    (tmp_path / "out.partial" / "1.png").write_bytes(b"x")
    sources.fetch(refused_at_the_end, tmp_path / "out")
    assert _tree(tmp_path / "out") == {f"{number}.png": b"x" * 1000 for number in range(3)}
    assert sorted(network.asked) == ["set/0.png", "set/1.png"]


@pytest.mark.parametrize("ledger", [None, b"", b"no ledger" * 1000])
def test_a_partial_download_of_another_source_or_of_nobody_is_not_mixed_in(
    refused_at_the_end: str, tiny: Any, tmp_path: Path, ledger: bytes | None
) -> None:
    if ledger is not None:
        (tmp_path / "out.partial" / ".fetch" / "ledger.sqlite").write_bytes(ledger)
    sources.fetch("s3://data/sets/tiny", tmp_path / "out")
    assert _tree(tmp_path / "out") == FILES


def test_a_killed_download_leaves_nothing_that_looks_finished_and_is_resumed(
    s3: Any, network: Network, tmp_path: Path
) -> None:
    files = {f"{number:03d}": b"x" * 1000 for number in range(60)}
    _put(s3, "kill", files)
    code = (
        "import sys, pathlib; from adfm.data import sources; sources.fetch('s3://data/kill', pathlib.Path(sys.argv[1]))"
    )
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    network.silent, network.budget = True, 60_000  # some 25 of the files, each with its header, and the list of them
    process = subprocess.Popen([sys.executable, "-c", code, str(out)])
    while process.poll() is None and len(list(partial.glob("???"))) < 8:
        time.sleep(0.005)
    process.kill()
    process.wait()
    network.silent, network.budget = False, float("inf")
    assert not out.exists()
    left = len(_tree(partial))
    assert 8 <= left < 60
    network.asked.clear()
    sources.fetch("s3://data/kill", out)
    assert _tree(out) == files
    assert len(network.asked) <= 60 - left + 16  # killed between a file's renaming and its entry: at most one a thread
