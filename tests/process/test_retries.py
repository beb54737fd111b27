"""Which errors of real clients, against real sockets, may pass by themselves; and the work that is tried again."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import http.server
import os
import shutil
import socket
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adfm import preflight, tracking
from adfm.data import sources
from adfm.errors import AdfmError, Unreachable
from adfm.models import loading, versions
from adfm.params import Model, Params
from adfm.process import retries

STAYS = ("401", "403", "404", "501", "tls")
PASSES = ("refused", "reset", "silent", "name", "429", "500", "503")


@pytest.fixture(autouse=True)
def connections() -> Iterator[None]:
    """Clients of libraries that a server refuses leave a connection to the garbage collector, which warns of it."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")


@pytest.mark.usefixtures("pod")
def test_work_is_tried_again_with_growing_pauses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)

    def work() -> int:
        if len(pauses) < 2:
            raise Unreachable("S3 is away\nmore of it")
        return len(pauses)

    assert retries.again(work, "fetch", pause=3) == 2
    assert pauses == [3, 6]
    assert capsys.readouterr().out.splitlines() == [
        "fetch: try 1 of 5 failed, the next is in 3 s: S3 is away",
        "fetch: try 2 of 5 failed, the next is in 6 s: S3 is away",
    ]


@pytest.mark.usefixtures("pod")
def test_the_last_try_raises_and_what_stays_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)

    def away() -> None:
        raise Unreachable("away")

    with pytest.raises(Unreachable, match="away"):
        retries.again(away, "fetch")
    assert pauses == [10, 20, 40, 80]

    def wrong() -> None:
        raise AdfmError("no such bucket")

    pauses.clear()
    with pytest.raises(AdfmError, match="no such bucket"):
        retries.again(wrong, "fetch")
    assert pauses == []


def test_outside_a_pod_work_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    tries: list[None] = []

    def away() -> None:
        tries.append(None)
        raise Unreachable("away")

    with pytest.raises(Unreachable):
        retries.again(away, "fetch")
    assert len(tries) == 1


@contextlib.contextmanager
def serving(reply: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """A web server that replies to every request so; its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            reply(self)

        do_POST = do_HEAD = do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def send(handler: http.server.BaseHTTPRequestHandler, status: int, body: bytes = b"{}", **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def reset(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def address(what: str) -> Iterator[str]:
    """The address of a server that does what one of `STAYS` and `PASSES` says."""
    with contextlib.ExitStack() as opened:
        if what == "name":
            yield "http://no-such-host.invalid"
        elif what in ("refused", "silent"):
            bound = opened.enter_context(socket.socket())
            bound.bind(("127.0.0.1", 0))
            if what == "silent":
                bound.listen()
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        elif what == "reset":
            yield opened.enter_context(serving(reset))
        elif what == "tls":
            yield opened.enter_context(serving(lambda handler: send(handler, 200))).replace("http:", "https:")
        else:
            yield opened.enter_context(serving(lambda handler: send(handler, int(what))))


def kinds(work: Callable[[], object]) -> type[AdfmError]:
    with pytest.raises(AdfmError) as caught:
        work()
    return type(caught.value)


@pytest.mark.parametrize("what", [*STAYS, *PASSES])
def test_mlflow(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with address(what) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
        assert kinds(tracking.configure) is (Unreachable if what in PASSES else AdfmError)


@pytest.mark.parametrize(
    ("what", "put"), [("404", False), ("413", True), ("503", False), ("503", True), ("cut", False), ("reset", True)]
)
def test_files_of_mlflow(what: str, put: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """MLflow's client leaves some of requests' exceptions as they are, and others in the text of its own."""
    import mlflow
    from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository

    def reply(handler: http.server.BaseHTTPRequestHandler) -> None:
        if handler.path.endswith("?path=0"):
            return send(handler, 200, b'{"files": [{"path": "a.txt", "is_dir": false, "file_size": 9}]}')
        if what.isdigit():
            return send(handler, int(what))
        if what == "cut":
            handler.send_response(200)
            handler.send_header("Content-Length", "9")
            handler.end_headers()
            handler.wfile.write(b"half")
        return reset(handler)

    (tmp_path / "a.txt").touch()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with serving(reply) as server:
        store: Any = MlflowArtifactsRepository("mlflow-artifacts:/0", tracking_uri=server)
        with pytest.raises(AdfmError) as caught, tracking.store_errors(server):
            if put:
                store.log_artifact(str(tmp_path / "a.txt"))
            mlflow.artifacts.download_artifacts("mlflow-artifacts:/0", dst_path=str(tmp_path), tracking_uri=server)
    assert type(caught.value) is (AdfmError if what in ("404", "413") else Unreachable)
    assert server in str(caught.value) and (not what.isdigit() or what in str(caught.value))


def test_a_version_that_cannot_be_downloaded_now_is_not_called_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import mlflow
    from mlflow.exceptions import MlflowException

    def away(*_: object, **__: object) -> None:
        raise MlflowException(
            "failures occurred while downloading:\n(Caused by ResponseError('too many 503 error responses'))"
        )

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", away)
    version: Any = SimpleNamespace(name="adfm", version="1", tags={})
    assert kinds(lambda: versions.download(version, tmp_path)) is Unreachable
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", [*STAYS, *(what for what in PASSES if what != "silent")])
def test_s3(what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    s3_settings(monkeypatch, tmp_path)
    with address(what) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server)
        kind = kinds(lambda: sources.fetch("s3://data/images", tmp_path / "raw"))
    assert kind is (Unreachable if what in PASSES else AdfmError)


def s3_settings(patch: pytest.MonkeyPatch, folder: Path) -> None:
    import boto3

    patch.setattr(boto3, "DEFAULT_SESSION", None)  # it remembers credentials
    for name in [name for name in os.environ if name.startswith(("AWS_", "ADFM_S3_"))]:
        patch.delenv(name)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "key")
    patch.setenv("AWS_CONFIG_FILE", str(folder / "none"))
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "none"))
    patch.setenv("AWS_MAX_ATTEMPTS", "1")


@pytest.mark.parametrize("what", [*STAYS, *(what for what in PASSES if what != "silent"), "offline"])
def test_hub(what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # its own tries take 23 s
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", what == "offline")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with address("404" if what == "offline" else what) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server)
        kind = kinds(lambda: loading.resolve("owner/model", "0" * 40))
    close_session()
    assert kind is (Unreachable if what in PASSES else AdfmError)


@pytest.mark.parametrize(("what", "passes"), [("refused", True), ("503", True), ("404", False)])
def test_file_servers_of_the_hub(what: str, passes: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Weights come by hf_xet, whose errors are RuntimeErrors."""
    from huggingface_hub import close_session, constants
    from huggingface_hub.utils import _xet

    def reply(handler: http.server.BaseHTTPRequestHandler) -> None:
        base = f"http://{handler.headers['Host']}"
        if "/tree/" in handler.path:
            file = b'{"type": "file", "path": "model.safetensors", "size": 9, "oid": "0"}'
            return send(handler, 200, b"[%b]" % file)
        if "/resolve/" in handler.path:
            links: dict[str, Any] = {
                "X-Xet-Hash": "c" * 64,
                "X-Xet-Refresh-Route": f"{base}/token",
                "X-Linked-Size": "9",
            }
            return send(handler, 200, b"", ETag='"b"', **links, **{"X-Repo-Commit": "0" * 40})
        if handler.path == "/token":
            links = {"X-Xet-Cas-Url": files, "X-Xet-Access-Token": "t", "X-Xet-Token-Expiration": "9999999999"}
            return send(handler, 200, **links)
        return send(handler, 200)

    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "10ms")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with address(what) as files, serving(reply) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server)
        template = server + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        _xet.abort_xet_session()  # type: ignore[no-untyped-call]
        kind = kinds(lambda: loading.resolve("owner/model", "0" * 40))
        close_session()
    assert kind is (Unreachable if passes else AdfmError)


@pytest.mark.parametrize(
    ("what", "passes"), [("refused", True), ("name", True), ("503", True), ("404", False), ("401", False)]
)
def test_dvc_whose_git_server_does_not_answer(what: str, passes: bool, tmp_path: Path) -> None:
    with address(what) as server:
        kind = kinds(lambda: sources.fetch(f"dvc://{server}/images.git@v1:data", tmp_path / "raw"))
    assert kind is (Unreachable if passes else AdfmError)


def test_the_error_of_a_git_server_has_its_cause(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import asyncssh
    import dvc.api
    from dvc.scm import CloneError

    def refuse(error: Exception) -> None:
        def clone(*_: object, **__: object) -> None:
            try:
                raise error
            except type(error) as cause:
                raise CloneError("Failed to clone repo 'git@example.com:a.git'") from cause

        monkeypatch.setattr(dvc.api, "DVCFileSystem", clone)

    refuse(asyncssh.ConnectionLost("Connection lost"))
    fetch = functools.partial(sources.fetch, "dvc://git@example.com:a.git@v1:data", tmp_path / "raw")
    assert kinds(fetch) is Unreachable
    refuse(asyncssh.PermissionDenied("Permission denied for user git on host example.com"))
    with pytest.raises(AdfmError, match="Permission denied for user git on host") as caught:
        fetch()
    assert not isinstance(caught.value, Unreachable)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Git repository with a folder in DVC, whose files are nowhere."""
    folder = tmp_path_factory.mktemp("repository")
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
    (folder / "data").mkdir()
    (folder / "data" / "a.png").write_text("image")
    commands = (["git", "init", "-q"], ["dvc", "init", "-q"], ["dvc", "add", "-q", "data"], ["git", "add", "-A"])
    for command in (*commands, ["git", *identity, "commit", "-qm", "images"]):
        subprocess.run(command, cwd=folder, check=True)
    shutil.rmtree(folder / ".dvc" / "cache")
    return folder


# aiohttp leaves the sockets that were refused to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("what", "passes"), [("refused", True), ("503", True), ("404", False), ("403", False)])
def test_dvc_whose_remote_does_not_answer(what: str, passes: bool, repository: Path, tmp_path: Path) -> None:
    with address(what) as server:
        subprocess.run(["dvc", "remote", "add", "-q", "-f", "-d", "images", server], cwd=repository, check=True)
        subprocess.run(["git", "add", "-A"], cwd=repository, check=True)
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        subprocess.run(["git", *identity, "commit", "-qm", what], cwd=repository, check=True)
        kind = kinds(lambda: sources.fetch(f"dvc://{repository}@HEAD:data", tmp_path / "raw"))
    assert kind is (Unreachable if passes else AdfmError)


def test_a_check_is_unreachable_if_nothing_else_is_wrong(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with address("refused") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
        assert kinds(lambda: preflight.check(Params())) is Unreachable
        assert kinds(lambda: preflight.check(Params(model=Model(name="/no/such/model")))) is AdfmError


@pytest.mark.usefixtures("pod")
def test_fetch_from_s3_resumes_where_the_server_went_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    s3_settings(monkeypatch, tmp_path)
    content = {"a.png": b"first", "b.png": b"second"}
    requests: list[str] = []

    def reply(handler: http.server.BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0].removeprefix("/data").removeprefix("/images/")
        tags = {name: hashlib.md5(each, usedforsecurity=False).hexdigest() for name, each in content.items()}
        if not path:
            items = "".join(
                f"<Contents><Key>images/{name}</Key><ETag>&quot;{tag}&quot;</ETag><Size>{len(content[name])}</Size>"
                "</Contents>"
                for name, tag in tags.items()
            )
            listing = f"<ListBucketResult><IsTruncated>false</IsTruncated>{items}</ListBucketResult>"
            return send(handler, 200, listing.encode())
        requests.append(path)
        if path == "b.png" and requests.count("b.png") < 3:
            while not (tmp_path / "raw.partial" / "a.png").exists():  # the two files are read side by side
                time.sleep(0.01)
            return send(handler, 503, b"")
        return send(handler, 200, content[path], ETag=f'"{tags[path]}"')

    with serving(reply) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server)
        work = functools.partial(sources.fetch, "s3://data/images", tmp_path / "raw")
        assert retries.again(work, "fetch", pause=0.01) == (2, 11)
    assert sorted(requests) == ["a.png", "b.png", "b.png", "b.png"]
    assert capsys.readouterr().out.count("fetch: try") == 2
    assert (tmp_path / "raw" / "b.png").read_bytes() == b"second"
