"""Fetch a raw data set from anywhere into a folder: `adfm fetch URI DIR`.

    path/to/folder  file:///path/to/folder      copied
    data.zip  data.tar[.gz|.xz|.zst]            unpacked
    s3://bucket/prefix  s3://bucket/data.zip    downloaded; keys and endpoint as adfm/data/s3.py says
    dvc://REPO@REV:PATH                         downloaded; a versioned data set: a Git URL or folder, a tag, a path
    synthetic://?seed=0&images=360              drawn

`manifest.json` in the folder says where the files came from and what they are.
"""

import contextlib
import difflib
import hashlib
import posixpath
import random
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from adfm.data import archives, s3
from adfm.data.manifest import STATE, Ledger
from adfm.data.problems import ProblemList
from adfm.data.readers.files import special_files
from adfm.errors import AdfmError, Unreachable
from adfm.files import atomic_folder, file_digest, walk
from adfm.process import retries
from adfm.process.environment import ca_remedy, without_login
from adfm.process.progress import bar

_CONNECTIONS = 16
T = TypeVar("T")


def fetch(uri: str, out: Path) -> tuple[int, int]:
    """Fetch a raw data set into a folder, with `manifest.json` {source, files: [{path, size, sha256}]}.

    An earlier result at `out` stays until the new one is whole. An interrupted download from S3 or DVC is resumed.

    Returns:
        The number of files, and of their bytes.

    Raises:
        AdfmError: The source cannot be understood, found, reached (`Unreachable`) or trusted, or holds no file, or two
            files that would become one; the disk is full.
    """
    scheme, separator, _ = uri.partition("://")
    fetch_from = _SOURCES.get(scheme if separator else "file")
    if fetch_from is None:
        near = difflib.get_close_matches(scheme, _SOURCES, n=1, cutoff=0)[0]
        raise AdfmError(
            f"{without_login(uri)}: adfm fetches nothing from {scheme}://; did you mean {near}://? Known: a folder, an"
            f" archive, {', '.join(f'{known}://' for known in _SOURCES)}. Download other data sets yourself and give"
            " their folder or archive."
        )
    try:
        return fetch_from(uri, out)
    except AdfmError as error:
        error.args = (without_login(str(error)),)  # the address of a Git repository may hold a token
        raise


def _parallel(work: Callable[[T], None], items: Iterable[T], what: str, stopped: threading.Event) -> None:
    """Work on items in threads, a few submitted at a time, and set `stopped` as soon as one has failed."""
    running: set[Future[None]] = set()
    with ThreadPoolExecutor(_CONNECTIONS) as pool, bar(desc=what, unit="file") as progress:
        try:
            for item in items:
                running.add(pool.submit(work, item))
                # Not all at once: memory does not grow with the number of items.
                if len(running) >= 4 * _CONNECTIONS:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    progress.update(sum(job.result() is None for job in done))
            for job in running:
                progress.update(job.result() is None)
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


def _fetch_local(uri: str, out: Path) -> tuple[int, int]:
    if uri.startswith("file://"):
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost"):
            raise AdfmError(f"{uri}: has the host {parts.netloc!r}; write file:///absolute/path, with three slashes.")
        path = Path(unquote(parts.path))
    else:
        path = Path(uri).expanduser()
    if not path.exists():
        near = difflib.get_close_matches(uri.partition(":")[0], _SOURCES, n=1)
        hint = f" Did you mean {near[0]}://?" if near else ""
        raise AdfmError(f"{uri}: no such folder or archive; give one that exists, s3://, dvc:// or synthetic://.{hint}")
    if path.is_dir():
        source, target = path.resolve(), out.resolve()
        if source == target or source in target.parents or target in source.parents:
            raise AdfmError(f"{out}: the source {path} lies in it, or it in the source; choose another folder.")
    else:
        _refuse_unknown_archive(uri, path.name)
        if not path.is_file():
            raise AdfmError(f"{uri}: is a pipe or a device; give an ordinary file or a folder.")
    with atomic_folder(out) as folder, contextlib.closing(Ledger(folder, uri)) as ledger:
        if path.is_dir():
            _copy(path, ledger)
        else:
            archives.unpack(path, folder, ledger, uri)
        return ledger.finish({"source": uri})


def _refuse_unknown_archive(uri: str, name: str) -> None:
    if not archives.is_archive(name):
        known = ", ".join(archives.ENDINGS)
        raise AdfmError(f"{uri}: is a file, but not an archive that adfm unpacks ({known}); give its folder.")


def _copy(source: Path, ledger: Ledger) -> None:
    problems = ProblemList(str(source))
    for problem in special_files(source):
        problems.add(problem)
    problems.finish()  # before anything is opened: a pipe would be waited for

    def copy(job: tuple[Path, str]) -> None:
        path, name = job
        with path.open("rb") as content:
            archives.store(ledger, name, content, problems)

    def jobs() -> Iterator[tuple[Path, str]]:
        for folder, files in walk(source):
            for path in (folder / file for file in files):
                name = archives.utf8(path.relative_to(source).as_posix())
                if admitted := archives.admit(ledger, name, problems):
                    yield path, admitted

    _parallel(copy, jobs(), "copy", threading.Event())
    problems.finish()


class _Content(NamedTuple):
    pieces: Iterable[bytes]
    md5: str = ""  # of the whole file, if it is known
    version: str = ""


class _Item(NamedTuple):  # a file of a source
    path: str  # in the data set
    tag: str  # of its content
    read: Callable[[int], _Content]  # from a byte on


class _Damaged(Exception):
    """A downloaded file differs from that of the source."""


def _download(items: Iterable[_Item], ledger: Ledger, again: tuple[type[Exception], ...] = (), tries: int = 1) -> None:
    """Download the files that no earlier attempt has finished, and remove those that the source no longer has."""
    parts = ledger.folder / STATE / "parts"
    parts.mkdir(exist_ok=True)
    stopped = threading.Event()

    def download(item: _Item) -> None:
        part = parts / hashlib.sha256(f"{item.path}\n{item.tag}".encode()).hexdigest()
        arrived = failures = damages = 0
        while not stopped.is_set():
            try:
                return receive(item, part)
            except _Damaged as error:
                part.unlink()
                damages += 1
                if damages > 2:
                    remedy = "check the network, and what is stored there"
                    raise AdfmError(f"{item.path}: arrives damaged ({error}); {remedy}.") from None
            except again:  # after the client's own tries, until `tries` in a row have brought no byte
                before, arrived = arrived, part.stat().st_size
                failures = 0 if arrived > before else failures + 1
                if failures >= tries:
                    raise
                if failures:
                    stopped.wait(min(2**failures, 20) * random.random())

    def receive(item: _Item, part: Path) -> None:
        sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        with part.open("a+b") as file:
            file.seek(0)  # the hashes are of the whole file, also of what an earlier try left
            while chunk := file.read(2**20):
                sha256.update(chunk)
                md5.update(chunk)
            content = item.read(file.tell())
            for chunk in content.pieces:
                file.write(chunk)
                sha256.update(chunk)
                md5.update(chunk)
                if stopped.is_set():
                    return
            size = file.tell()
        if content.md5 and content.md5 != md5.hexdigest():
            raise _Damaged(f"its MD5 is {md5.hexdigest()}, and should be {content.md5}")
        target = ledger.folder / item.path
        # An earlier try may have left a file in the place of a folder, or a folder in the place of this file.
        for above in target.parents[: item.path.count("/")]:
            if above.is_file():
                above.unlink(missing_ok=True)
        if target.is_dir():
            shutil.rmtree(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        part.replace(target)
        ledger.add(item.path, size, sha256.hexdigest(), item.tag, content.version)

    missing = (item for item in items if not ledger.holds(item.path, item.tag))
    _parallel(download, missing, "download", stopped)
    ledger.sweep()


def _fetch_s3(uri: str, out: Path) -> tuple[int, int]:
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    prefix = prefix.strip("/")
    start = f"{prefix}/" if prefix and not archives.is_archive(prefix) else prefix
    if not bucket:
        raise AdfmError(f"{uri}: names no bucket; write s3://bucket/prefix.")
    try:
        client = s3.client(_CONNECTIONS)
    except (BotoCoreError, ValueError) as error:
        raise AdfmError(f"{uri}: {error}; check {s3.prefix()}ENDPOINT_URL and AWS_PROFILE.") from error
    try:
        tries = client.meta.config.retries.get("total_max_attempts", 3)  # AWS_MAX_ATTEMPTS
        if not client.list_objects_v2(Bucket=bucket, Prefix=start, MaxKeys=1).get("Contents"):
            raise AdfmError(f"{uri}: the bucket is there, but nothing under that prefix; check its spelling.")
        with atomic_folder(out, keep_partial=True) as folder, contextlib.closing(Ledger(folder, uri)) as ledger:
            # Objects are listed while others are downloaded, so their problems are complete at the end only.
            problems = ProblemList(uri)
            _download(_objects(client, bucket, start, ledger, problems), ledger, (BotoCoreError,), tries)
            problems.finish()
            return _finish(uri, prefix, ledger, {"source": uri}, "etag")
    except (BotoCoreError, ClientError) as error:
        raise _s3_error(uri, error) from error
    finally:
        client.close()


def _finish(uri: str, path: str, ledger: Ledger, source: dict[str, str], tag: str) -> tuple[int, int]:
    """Unpack what was downloaded if it is an archive, and write the manifest."""
    archive = ledger.folder / STATE / posixpath.basename(path)
    if archive.is_file():
        archives.unpack(archive, ledger.folder, ledger, uri)
    return ledger.finish(source, tag)


def _objects(client: Any, bucket: str, start: str, ledger: Ledger, problems: ProblemList) -> Iterator[_Item]:
    """Yield all objects whose keys begin so, as they are listed; of an archive that object alone."""
    from botocore.exceptions import ClientError, FlexibleChecksumError

    def read(key: str, etag: str, size: int, offset: int) -> _Content:
        rest = {"Range": f"bytes={offset}-"} if offset else {}
        whole = 0 < size == offset  # downloaded completely, but not yet moved into place when fetch was stopped
        request = client.head_object if whole else partial(client.get_object, **rest)
        try:
            response = request(Bucket=bucket, Key=key, IfMatch=etag)
        except ClientError as error:
            if error.response["Error"]["Code"] == "InvalidRange":
                raise _Damaged("it is shorter there") from error
            raise _s3_error(f"s3://{bucket}/{key}", error) from error
        if offset and not whole and "ContentRange" not in response:
            raise _Damaged("the server does not resume where it stopped")

        def pieces() -> Iterator[bytes]:
            with contextlib.closing(response["Body"]) as body:
                try:
                    yield from body.iter_chunks(2**20)
                except FlexibleChecksumError as error:
                    raise _Damaged(str(error)) from error

        # The ETag is the MD5, unless the object came in parts or is encrypted with a key that the server does not own.
        plain = re.fullmatch('"[0-9a-f]{32}"', etag) and response.get("ServerSideEncryption", "AES256") == "AES256"
        md5 = etag.strip('"') if plain and "SSECustomerAlgorithm" not in response else ""
        version = response.get("VersionId", "")
        return _Content(() if whole else pieces(), md5, "" if version == "null" else version)

    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=start):
        for item in page.get("Contents", []):
            key, etag = item["Key"], item["ETag"]
            content = partial(read, key, etag, item["Size"])
            if archives.is_archive(start):
                if key == start:
                    yield _Item(f"{STATE}/{posixpath.basename(key)}", etag, content)
                return
            if key.endswith("/"):
                if item["Size"]:  # those without content are the marks that consoles leave for empty folders
                    problems.add(f"{key!r} has content, and a name that only a folder can have; rename it")
            elif path := archives.admit(ledger, key[len(start) :].lstrip("/"), problems, key):
                yield _Item(path, etag, content)


def _s3_error(where: str, error: Exception) -> AdfmError:
    from botocore import exceptions as boto

    # By then boto3 has tried 3 times (botocore/retries/standard.py), unless `AWS_MAX_ATTEMPTS` says otherwise.
    code = error.response.get("Error", {}).get("Code", "") if isinstance(error, boto.ClientError) else ""
    passes = code in ("RequestTimeout", "SlowDown") or retries.may_pass(  # the first has the status 400
        error, boto.ConnectTimeoutError, boto.ReadTimeoutError, boto.IncompleteReadError, boto.ResponseStreamingError
    )
    return (Unreachable if passes else AdfmError)(f"{where}: {_remedy(error)} ({error})")


def _remedy(error: Exception) -> str:
    from botocore.exceptions import ClientError, NoCredentialsError, ParamValidationError, PartialCredentialsError

    prefix = s3.prefix()
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        keys = f"{prefix}ACCESS_KEY_ID and {prefix}SECRET_ACCESS_KEY"
        return f"no credentials; set {keys}, or AWS_PROFILE (on a cluster: the secret adfm-s3)"
    if isinstance(error, ParamValidationError):
        return "that is not a name of a bucket; write s3://bucket/prefix"
    if not isinstance(error, ClientError):
        check = f"check {prefix}ENDPOINT_URL and the network, and fetch again: what has arrived is kept"
        return f"{s3.endpoint()} cannot be reached; {check}.{ca_remedy(error)}"
    code = error.response.get("Error", {}).get("Code", "")
    if error.operation_name.startswith("AssumeRole"):  # an error of AWS's service for roles, not of the bucket
        return "the role cannot be assumed; check the service account's annotation and whom the role trusts"
    if code in ("NoSuchBucket", "InvalidBucketName"):
        return f"the bucket does not exist; check its name and {prefix}ENDPOINT_URL"
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"):
        keys = s3.keys_prefix()
        return f"the server does not accept the credentials; check {keys}ACCESS_KEY_ID and {keys}SECRET_ACCESS_KEY"
    if code in ("AccessDenied", "403"):
        return "these credentials may not read there; ask for s3:ListBucket and s3:GetObject"
    if code in ("404", "NoSuchKey", "412", "PreconditionFailed"):
        return "it changed or went away while it was downloaded; fetch again"
    if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) in (429, 500, 502, 503, 504):
        return "the server is not able to reply now; fetch again in a minute: what has arrived is kept"
    return "the server refused; check the URI"


def _fetch_dvc(uri: str, out: Path) -> tuple[int, int]:
    place, _, path = uri.removeprefix("dvc://").rpartition(":")
    repo, _, rev = place.rpartition("@")
    path = posixpath.normpath(path.strip("/"))
    if not (repo and rev) or ":" in rev or path.startswith("."):
        raise AdfmError(
            f"{uri}: write dvc://REPO@REV:PATH: a Git URL or a folder, a tag, branch or commit, and a path in that "
            "repository, as in dvc://https://git.example.com/images.git@v1.2:data/line-3."
        )
    from dvc.api import DVCFileSystem
    from dvc.repo.open_repo import clean_repos

    if not re.match(r"[\w.+-]+(@|://)", repo):
        repo = str(Path(repo).expanduser())
        if not Path(repo).is_dir():
            raise AdfmError(f"{uri}: the folder {repo!r} does not exist; give that of a Git repository, or its URL.")
    try:
        with _translated(f"{uri}: the repository cannot be opened at {rev!r}; check both, and that Git may read it"):
            files = DVCFileSystem(repo, rev=rev)
            s3.configure_remotes(files.repo.config["remote"])
            commit = files.repo.get_rev()
        with _translated(f"{uri}: {path!r} cannot be listed; is it there at {rev!r}, and was it pushed (`dvc push`)?"):
            items = list(_tracked(uri, files, path))
        source = f"{uri} {commit}"
        with atomic_folder(out, keep_partial=True) as folder, contextlib.closing(Ledger(folder, source)) as ledger:
            _download(_admitted(items, uri, ledger), ledger)
            return _finish(uri, path, ledger, {"source": uri, "commit": commit}, "md5")
    finally:
        clean_repos()  # DVC keeps its clones otherwise


def _tracked(uri: str, files: Any, path: str) -> Iterator[_Item]:
    """Yield the files below a path of a DVC repository; of an archive that file alone."""

    def read(name: str, md5: str, offset: int) -> _Content:
        def pieces() -> Iterator[bytes]:
            problem = f"{uri}: {name} cannot be read; it may never have been pushed (`dvc push` where it is)"
            with _translated(problem), files.open(name) as content:
                content.seek(offset)
                while chunk := content.read(2**20):
                    yield chunk

        return _Content(pieces(), md5)

    if (about := files.info(path))["type"] == "file":
        _refuse_unknown_archive(uri, path)
        md5 = about.get("md5", "")
        yield _Item(f"{STATE}/{posixpath.basename(path)}", md5, partial(read, path, md5))
        return
    for root, _, inside in files.walk(path, detail=True):
        for file, info in inside.items():
            name, md5 = f"{root}/{file}", info.get("md5", "")
            yield _Item(name.removeprefix(path).lstrip("/"), md5, partial(read, name, md5))


def _admitted(items: Sequence[_Item], uri: str, ledger: Ledger) -> list[_Item]:
    if [item.path.startswith(f"{STATE}/") for item in items] == [True]:  # an archive
        return list(items)
    problems = ProblemList(uri)
    paths = [archives.admit(ledger, item.path, problems) for item in items]
    problems.finish()
    return [item._replace(path=path) for item, path in zip(items, paths, strict=True) if path]


@contextlib.contextmanager
def _translated(message: str) -> Iterator[None]:
    # DVC's remotes have dozens of exceptions of their own. They try again by themselves: S3 five times a request
    # (aiobotocore, s3fs), HTTP for some seconds (aiohttp-retry). Git does not.
    try:
        yield
    except AdfmError:
        raise
    except Exception as error:
        import aiohttp
        import asyncssh  # of Git by SSH
        from botocore.exceptions import NoCredentialsError

        *_, first = retries.causes(error)
        lost = (aiohttp.ServerDisconnectedError, aiohttp.ClientPayloadError, asyncssh.ConnectionLost)
        unavailable = re.search(r"unexpected http resp (429|5\d\d)", str(first))  # so says dulwich
        why = error.__cause__ or error
        reason = f"{why}: {str(first) or type(first).__name__}" if first not in (why, error) else str(why)
        if unavailable or retries.may_pass(error, *lost):
            raise Unreachable(f"{message} ({reason}).") from error
        no_keys = [each for each in retries.causes(error) if isinstance(each, NoCredentialsError)]
        remedy = f" There are {_remedy(no_keys[0])}." if no_keys else ca_remedy(error)
        raise AdfmError(f"{message} ({reason}).{remedy}") from error


def _fetch_synthetic(uri: str, out: Path) -> tuple[int, int]:
    from adfm.data import synthetic

    parts = urlsplit(uri)
    options: dict[str, int] = {}
    if parts.netloc or parts.path not in ("", "/"):
        raise AdfmError(f"{uri}: has no path; write synthetic:// or synthetic://?seed=0&images=360.")
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        if key not in ("seed", "images"):
            near = difflib.get_close_matches(key, ["seed", "images"], n=1, cutoff=0)[0]
            raise AdfmError(f"{uri}: unknown option {key!r}; did you mean {near!r}? Known: seed, images.")
        if not value.isdecimal():
            raise AdfmError(f"{uri}: {key} is {value!r}; give a whole number that is not negative.")
        options[key] = int(value)
    with atomic_folder(out) as folder, contextlib.closing(Ledger(folder, uri)) as ledger:
        synthetic.generate(folder, **options)
        for path in folder.rglob("*.png"):
            ledger.add(path.relative_to(folder).as_posix(), path.stat().st_size, file_digest(path))
        return ledger.finish({"source": uri})


_SOURCES = {"file": _fetch_local, "s3": _fetch_s3, "dvc": _fetch_dvc, "synthetic": _fetch_synthetic}
