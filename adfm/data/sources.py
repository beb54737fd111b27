"""From anywhere to a folder: `adfm fetch URI DIR`.

    path/to/folder  file:///path/to/folder      copied
    data.zip  data.tar[.gz|.xz|.zst]            unpacked
    s3://bucket/prefix  s3://bucket/data.zip    downloaded; AWS_ENDPOINT_URL and the usual credentials of boto3
    synthetic://?seed=0&images=360              drawn

`manifest.json` in the folder says where the files came from and what they are.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import json
import lzma
import os
import posixpath
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, TypeVar, cast
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa
from tqdm import tqdm

from adfm.errors import AdfmError
from adfm.files import atomic_folder

SCHEMES = ("file", "s3", "synthetic")
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.zst")
MANIFEST = "manifest.json"
_JOURNAL = ".fetched.jsonl"
_CONNECTIONS = 16

T = TypeVar("T")


def fetch(uri: str, out: Path) -> None:
    """Brings a raw data set into a folder, with `manifest.json` {source, files: [{path, size, sha256}]}.

    An interrupted download from S3 goes on where it stopped.

    Args:
        uri: Where it is; see the module's docstring.
        out: Folder to make. An earlier result there stays until the new one is whole.

    Raises:
        AdfmError: The source cannot be understood, found, reached or trusted, or holds no file; the disk is full.
    """
    scheme, separator, _ = uri.partition("://")
    if not separator or scheme == "file":
        _fetch_local(uri, out)
    elif scheme == "s3":
        _fetch_s3(uri, out)
    elif scheme == "synthetic":
        _fetch_synthetic(uri, out)
    else:
        near = difflib.get_close_matches(scheme, SCHEMES, n=1, cutoff=0)[0]
        raise AdfmError(
            f"{uri}: adfm fetches nothing from {scheme}://; did you mean {near}://? Known: a folder, an archive, "
            + ", ".join(f"{known}://" for known in SCHEMES)
            + ". Download other data sets yourself and give their folder or archive."
        )


def digests(raw: Path, paths: Sequence[str]) -> list[str]:
    """SHA-256 of files of a fetched folder, from its manifest; what is not in a manifest is read.

    A file that cannot be read has the digest `""`; whoever reads it next says why.

    Args:
        raw: The folder.
        paths: Relative to it, with `/`.
    """
    known: dict[str, str] = {}
    if (raw / MANIFEST).is_file():
        try:
            known = {file["path"]: file["sha256"] for file in json.loads((raw / MANIFEST).read_text())["files"]}
        except (ValueError, KeyError, TypeError):
            known = {}  # the data set's own file of that name
    new = [path for path in paths if path not in known]
    known.update(zip(new, _hashed([raw / path for path in new], unreadable=""), strict=True))
    return [known[path] for path in paths]


def _finish(uri: str, folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    if not files:
        raise AdfmError(f"{uri}: holds no file; give a folder, archive or prefix that holds a data set.")
    entries = [
        {"path": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "sha256": sha256}
        for path, sha256 in zip(files, _hashed(files), strict=True)
    ]
    (folder / MANIFEST).write_text(json.dumps({"source": uri, "files": entries}, indent=1) + "\n")


def _hashed(paths: Sequence[Path], unreadable: str | None = None) -> Iterator[str]:
    def sha256(path: Path) -> str:
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            if unreadable is None:
                raise
            return unreadable

    with ThreadPoolExecutor() as pool:
        yield from _progress(pool.map(sha256, paths), "checksums", len(paths))


def _progress(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    bar: Iterable[T] = tqdm(items, desc=what, total=total, unit="file", disable=None)
    return bar


# ------------------------------------------------------------------------------------------------ folder and archive


def _fetch_local(uri: str, out: Path) -> None:
    if uri.startswith("file://"):
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost"):
            raise AdfmError(f"{uri}: names the host {parts.netloc!r}; write file:///absolute/path, with three slashes.")
        path = Path(unquote(parts.path))
    else:
        path = Path(uri).expanduser()
    if not path.exists():
        near = difflib.get_close_matches(uri.partition(":")[0], SCHEMES, n=1)
        hint = f" Did you mean {near[0]}://?" if near else ""
        raise AdfmError(f"{uri}: no such folder or archive; give one that is there, or s3:// or synthetic://.{hint}")
    if path.is_dir():
        source, target = path.resolve(), out.resolve()
        if source == target or source in target.parents or target in source.parents:
            raise AdfmError(f"{out}: the source {path} lies in it, or it in the source; choose another folder.")
    elif not path.name.lower().endswith(ARCHIVES):
        raise AdfmError(f"{uri}: is a file, but no archive that adfm unpacks ({', '.join(ARCHIVES)}); give its folder.")
    with atomic_folder(out) as folder:
        if path.is_dir():
            _copy(path, folder)
        else:
            _unpack(path, folder)
        _finish(uri, folder)


def _copy(source: Path, folder: Path) -> None:
    for path in _progress(_walk(source), "copy"):
        if not path.is_file():
            raise AdfmError(f"{path}: is a link that leads nowhere, or no ordinary file; mend or remove it.")
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if path.is_symlink() and path.resolve() in folder.resolve().parents:
                raise AdfmError(f"{path}: is a link to a folder that holds it; remove it.")
            yield from _walk(path)
        else:
            yield path


class _Member(NamedTuple):
    """One entry of an archive; `target` is what a link leads to, relative to the archive's root."""

    name: str
    kind: Literal["file", "folder", "link", "other"]
    target: str = ""
    content: IO[bytes] | None = None


def _unpack(archive: Path, folder: Path) -> None:
    """Unpacks without ever making a link: one that leads to a file of the archive becomes a copy of it."""
    links: dict[str, str] = {}
    try:
        members = _zip_members(archive) if archive.name.lower().endswith(".zip") else _tar_members(archive)
        for member in _progress(members, "unpack"):
            path = folder / _inside(member.name, f"{archive}: the member")
            if member.kind == "other":
                raise AdfmError(
                    f"{archive}: the member {member.name!r} is a device or a pipe; make an archive of files."
                )
            if member.kind == "link":
                links[member.name] = member.target
            if member.content:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    shutil.copyfileobj(member.content, file, 2**20)
        for name, target in links.items():
            source = folder / _inside(posixpath.normpath(target), f"{archive}: the member {name!r} is a link, and")
            if not source.is_file():
                raise AdfmError(
                    f"{archive}: the member {name!r} is a link to {target!r}, which is no file of the archive."
                )
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, path)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as error:
        raise AdfmError(f"{archive}: is damaged or encrypted ({error}); get it anew.") from error
    except OSError as error:
        if error.errno is None or isinstance(error, (FileExistsError, NotADirectoryError, IsADirectoryError)):
            raise AdfmError(f"{archive}: is damaged ({error}); get it anew.") from error
        raise


def _zip_members(archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            if stat.S_ISLNK(info.external_attr >> 16):
                target = file.read(info).decode(errors="replace")
                yield _Member(info.filename, "link", posixpath.join(posixpath.dirname(info.filename), target))
            elif info.is_dir():
                yield _Member(info.filename, "folder")
            else:
                with file.open(info) as content:
                    yield _Member(info.filename, "file", content=content)


_DECOMPRESSED: dict[str, Callable[[IO[bytes]], Any]] = {
    "gz": gzip.open,
    "tgz": gzip.open,
    "xz": lzma.open,
    "txz": lzma.open,
    "zst": lambda raw: pa.CompressedInputStream(raw, "zstd"),
}


def _tar_members(archive: Path) -> Iterator[_Member]:
    with archive.open("rb") as raw:
        ending = archive.name.lower().rpartition(".")[2]
        stream = cast("IO[bytes]", _DECOMPRESSED[ending](raw) if ending in _DECOMPRESSED else raw)
        with tarfile.open(fileobj=stream, mode="r|") as file:
            for info in file:
                if info.islnk():
                    yield _Member(info.name, "link", info.linkname)
                elif info.issym():
                    yield _Member(info.name, "link", posixpath.join(posixpath.dirname(info.name), info.linkname))
                elif info.isdir():
                    yield _Member(info.name, "folder")
                else:
                    yield _Member(info.name, "file" if info.isfile() else "other", content=file.extractfile(info))
        # tarfile takes an archive that is cut off between two members for a shorter one.
        if stream is raw:
            raw.seek(-tarfile.BLOCKSIZE, os.SEEK_END)
            if any(raw.read()):
                raise tarfile.ReadError("it is cut off")
        while stream.read(2**20):
            pass


def _inside(name: str, who: str) -> str:
    """`name`, if it is a path within the folder that is written."""
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise AdfmError(f"{who} {name!r} leads out of the folder; this source is not to be trusted.")
    return name


# ---------------------------------------------------------------------------------------------------------------- S3


class _Object(NamedTuple):
    key: str
    path: str
    size: int
    etag: str


def _fetch_s3(uri: str, out: Path) -> None:
    import boto3
    from boto3.exceptions import Boto3Error
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise AdfmError(f"{uri}: names no bucket; write s3://bucket/prefix.")
    settings = Config(
        connect_timeout=10,
        read_timeout=60,
        retries={"mode": "standard", "max_attempts": 4},
        max_pool_connections=_CONNECTIONS,
    )
    try:
        client = boto3.client("s3", config=settings)
    except (BotoCoreError, ValueError) as error:
        raise AdfmError(f"{uri}: {error}; check AWS_ENDPOINT_URL and AWS_PROFILE.") from error
    try:
        objects = _listed(client, bucket, prefix.strip("/"))
        if not objects:
            raise AdfmError(f"{uri}: the bucket is there, but nothing under that prefix; check its spelling.")
        with atomic_folder(out, keep_partial=True) as folder:
            _download(client, bucket, objects, uri, folder)
            if prefix.lower().endswith(ARCHIVES):
                archive = folder / objects[0].path
                _unpack(archive, folder)
                archive.unlink()
            _finish(uri, folder)
    except (BotoCoreError, ClientError, Boto3Error) as error:
        raise AdfmError(f"{uri}: {_remedy(error)} ({error})") from error


def _listed(client: Any, bucket: str, prefix: str) -> list[_Object]:
    """All objects below the prefix; of an archive that object alone, under a hidden name."""
    if prefix.lower().endswith(ARCHIVES):
        page = client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
        hidden = "." + posixpath.basename(prefix)
        return [_Object(i["Key"], hidden, i["Size"], i["ETag"]) for i in page.get("Contents", []) if i["Key"] == prefix]
    start = f"{prefix}/" if prefix else ""
    objects = []
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=start):
        for item in page.get("Contents", []):
            if not item["Key"].endswith("/"):  # the marks that consoles leave for empty folders
                path = _inside(item["Key"][len(start) :], f"s3://{bucket}: the key")
                objects.append(_Object(item["Key"], path, item["Size"], item["ETag"]))
    return objects


def _download(client: Any, bucket: str, objects: list[_Object], uri: str, folder: Path) -> None:
    """Downloads what is missing; the journal, a line a finished file, tells what an earlier attempt left whole."""
    from boto3.s3.transfer import TransferConfig

    journal = folder / _JOURNAL
    done = _journalled(journal, uri)
    kept = {
        item.path for item in objects if done.get(item.path) == item.etag and _size(folder / item.path) == item.size
    }
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in kept:
            path.unlink()

    def download(item: _Object) -> _Object:
        path = folder / item.path
        path.parent.mkdir(parents=True, exist_ok=True)
        client.download_file(bucket, item.key, str(path), Config=TransferConfig(use_threads=False))
        if path.stat().st_size != item.size:
            raise AdfmError(f"s3://{bucket}/{item.key} changed while it was downloaded; fetch again.")
        return item

    with journal.open("w") as log, ThreadPoolExecutor(_CONNECTIONS) as pool:
        print(json.dumps({"source": uri}), file=log)
        for item in objects:
            if item.path in kept:
                print(json.dumps({"path": item.path, "etag": item.etag}), file=log, flush=True)
        jobs = [pool.submit(download, item) for item in objects if item.path not in kept]
        try:
            for job in _progress(as_completed(jobs), "download", len(jobs)):
                item = job.result()
                print(json.dumps({"path": item.path, "etag": item.etag}), file=log, flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    journal.unlink()


def _journalled(journal: Path, uri: str) -> dict[str, str]:
    if not journal.is_file():
        return {}
    first, *rest = journal.read_text().splitlines() or [""]
    if first != json.dumps({"source": uri}):
        return {}
    done = {}
    for line in rest:
        try:
            entry = json.loads(line)
        except ValueError:  # the line in which it was killed
            break
        done[entry["path"]] = entry["etag"]
    return done


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _remedy(error: Exception) -> str:
    from botocore.exceptions import ClientError, NoCredentialsError, ParamValidationError, PartialCredentialsError

    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        return "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, ParamValidationError):
        return "that is no name of a bucket; write s3://bucket/prefix"
    if not isinstance(error, ClientError):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "Amazon S3"
        return f"{endpoint} cannot be reached; check AWS_ENDPOINT_URL and the network"
    code = error.response.get("Error", {}).get("Code", "")
    if code == "NoSuchBucket":
        return "there is no such bucket; check its name and AWS_ENDPOINT_URL"
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"):
        return "the server does not accept the credentials; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if code in ("AccessDenied", "403"):
        return "these credentials may not read there; ask for s3:ListBucket and s3:GetObject"
    if code in ("404", "NoSuchKey"):
        return "an object went away while it was to be downloaded; fetch again"
    return "the server refused; check the URI"


# --------------------------------------------------------------------------------------------------------- synthetic


def _fetch_synthetic(uri: str, out: Path) -> None:
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
    with atomic_folder(out) as folder:
        synthetic.generate(folder, **options)
        _finish(uri, folder)
