"""A registered version as an MLflow pyfunc: `mlflow models serve -m models:/adfm@production --env-manager local`.

MLflow imports this module and calls `_load_pyfunc`. The input is a column `image` of base64 or URIs. `ADFM_SERVE_URIS`
names the places that may be read, `ADFM_SERVE_LOG` a file for counts (`adfm.serving.servelog`), and `ADFM_SHADOW` the
folder of a candidate that answers the same images for that log (`adfm.serving.shadow`).
"""

import base64
import binascii
import hashlib
import http.client
import os
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from mlflow.exceptions import MlflowException
from PIL import Image

from adfm.data.images import GreyRange
from adfm.errors import AdfmError
from adfm.serving import predict, servelog, shadow

Judged = dict[int, tuple[dict[str, Any], str | None]]
"""By the number of an image, its row and the kind of reason, as `adfm.serving.predict.LoadedModel.judge`."""

# Folders (`/data/line3`), `http(s)://host/path` and `s3://bucket/prefix`, separated by white space. A client could
# otherwise use the server to read what only the server reaches; `data:` URIs are always read.
URIS = "ADFM_SERVE_URIS"
_MOST_BYTES = 256_000_000  # of all the images of a request
_TIMEOUT = 10  # seconds to wait for a server that has an image


class Served:
    """A version that answers requests, one at a time.

    Args:
        folder: The version's files.

    Raises:
        AdfmError: It cannot be loaded.
    """

    def __init__(self, folder: Path) -> None:
        self.version = _version(folder)
        self._model = predict.of_version(folder, self.version)
        self._model.report(threshold=True)
        self._turns = shadow.Turns()  # MLflow's server has many threads
        self.shadow: shadow.Shadow | None = None

    def follow(self, folder: Path) -> None:
        """Let the candidate in a folder answer the same images, for the log; without it, production is served alone."""
        try:
            candidate = Served(folder)
        except Exception as error:  # files of anybody make libraries raise anything
            message = f"adfm: {shadow.FOLDER}: the shadow cannot be loaded, only production answers: {error}"
            print(message, file=sys.stderr)
            servelog.write([("failed", {"candidate": str(folder), "images": 0, "reason": str(error)})], self.version)
            return
        self.shadow = shadow.Shadow(candidate.answers, self._turns, self.version, candidate.version)

    def predict(self, data: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Return a row of `LoadedModel.judge` for each photograph, base64 or a URI in the column `image`.

        Raises:
            MlflowException: Images cannot be read; all of them are listed, and none was answered.
        """
        problems: dict[int, str] = {}
        contents = dict(_contents(data["image"], problems))
        with self._turns.production():
            judged = self._judge(contents, problems, whole=True)
        if problems:
            listed = " ".join(f"Image {number}: {problem}." for number, problem in sorted(problems.items()))
            raise MlflowException.invalid_parameter_value(  # the server's answer 400
                f"{len(problems)} of {len(data)} images cannot be read, and none was answered. {listed}"
            )
        rows = [judged[number][0] for number in contents]
        self._log(contents, judged)
        if self.shadow:
            self.shadow.offer([*contents.values()], rows)
        columns = [*predict.KEYS, predict.KIND] if self._model.predictor.kinds else predict.KEYS
        return pd.DataFrame(rows, columns=columns, dtype=object)

    def answers(self, contents: list[bytes]) -> list[dict[str, Any]]:
        """Return a row for each image file, as `predict` does; one that cannot be read is refused."""
        problems: dict[int, str] = {}
        judged = self._judge(dict(enumerate(contents)), problems, whole=False)
        return [
            judged[number][0] if number in judged else predict.refused(problems[number], self._model.calibration)
            for number in range(len(contents))
        ]

    def _judge(self, contents: dict[int, bytes], problems: dict[int, str], whole: bool) -> Judged:
        """Answer the images that can be read, and add the others to `problems`."""
        judged: Judged = {}
        for batch in predict.batches(_decoded(contents, problems, self._model.grey_range), self._model.batch_size):
            if whole and problems:  # the request is refused; the rest is only read, for the list of problems
                continue
            numbers, images = zip(*batch, strict=True)
            judged |= zip(numbers, self._model.judge(images), strict=True)
        return judged

    def _log(self, contents: dict[int, bytes], judged: Judged) -> None:
        labels = Counter(row["label"] for row, _ in judged.values())
        events: list[tuple[str, dict[str, Any]]] = [("answered", {"labels": labels})]
        for number, (row, kind) in judged.items():
            if kind:
                image = hashlib.sha256(contents[number]).hexdigest()
                events.append(("cannot judge", {"image": image, "kind": kind, "reason": row["reason"]}))
        servelog.write(events, self.version)


def _load_pyfunc(path: str) -> Served:
    # MLflow calls it by this name.
    servelog.check()
    served = Served(Path(path))
    if candidate := os.environ.get(shadow.FOLDER):
        served.follow(Path(candidate))
    return served


def _version(folder: Path) -> str:
    try:  # the file is one that MLflow's client leaves in a version
        about = yaml.safe_load((folder / "registered_model_meta").read_text(encoding="utf-8"))
        return f"{about['model_name']}/{about['model_version']}"
    except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError):
        return folder.name


def content(image: str) -> bytes:
    """Return the file of an entry: base64, or a URI (`data:`, `file:` or an absolute path, `http(s):`, `s3:`).

    Raises:
        AdfmError: It is neither, may not be read, or cannot be read; the message is the reason alone.
    """
    if re.match(r"data:", image, re.IGNORECASE):
        about, _, text = image.partition(",")
        return _base64(text) if about.lower().endswith(";base64") else urllib.parse.unquote_to_bytes(text)
    if "://" in image[:20]:
        return _read(image)
    try:
        return _base64(image)
    except AdfmError:
        if image.startswith("/"):
            return _read(Path(image).as_uri())
        raise


def _contents(images: Iterable[object], problems: dict[int, str]) -> Iterator[tuple[int, bytes]]:
    total = 0  # bytes of the request, whose images are in memory together
    for number, image in enumerate(images, 1):
        try:
            read = content(image) if isinstance(image, str) else b""
            if not read:
                raise AdfmError("it is empty")
            total += len(read)
            if total > _MOST_BYTES:
                raise AdfmError(f"with it, the request has more than {_MOST_BYTES} bytes; send several")
            yield number, read
        except AdfmError as error:
            problems[number] = str(error)


def _decoded(
    contents: dict[int, bytes], problems: dict[int, str], bounds: GreyRange | None
) -> Iterator[tuple[int, Image.Image]]:
    for number, read in contents.items():
        try:
            yield number, predict.decode(read, bounds)
        except AdfmError as error:
            problems[number] = str(error)


def _base64(text: str) -> bytes:
    try:  # without white space, as tools break lines
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise AdfmError("it is neither base64 nor a URI") from error


def _read(uri: str) -> bytes:
    if not any(_is_within(uri, place) for place in os.environ.get(URIS, "").split()):
        raise AdfmError(f"this server may not read there; {URIS} names the places that it may read")
    parts = urllib.parse.urlsplit(uri)
    try:
        if parts.scheme == "file":
            read = _file(_path(uri))
        elif parts.scheme == "s3":
            read = _object(parts.netloc, urllib.parse.unquote(parts.path[1:]))
        else:
            # Without redirects, which could lead elsewhere.
            with urllib.request.build_opener(_NoRedirects).open(uri, timeout=_TIMEOUT) as answer:
                read = bytes(answer.read(_MOST_BYTES + 1))
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise AdfmError(f"it cannot be read ({error})") from error
    if len(read) > _MOST_BYTES:
        raise AdfmError(f"it has more than {_MOST_BYTES} bytes")
    return read


def _is_within(uri: str, place: str) -> bool:
    if place.startswith("/"):
        place = Path(place).as_uri()
    try:
        parts, allowed = urllib.parse.urlsplit(uri), urllib.parse.urlsplit(place)
        if parts.scheme != allowed.scheme or parts.scheme not in ("file", "http", "https", "s3"):
            return False
        if parts.scheme == "file":
            return _path(uri).resolve().is_relative_to(_path(place).resolve())
    except (OSError, RuntimeError, ValueError):
        return False
    # The whole of `netloc`: no login, no other port; and no way up, also where a server takes a backslash for a slash.
    path, above = (urllib.parse.unquote(each.path).rstrip("/") for each in (parts, allowed))
    if parts.netloc != allowed.netloc or not parts.netloc or {".", ".."} & {*re.split(r"[/\\]", path)}:
        return False
    return path == above or path.startswith(f"{above}/")


def _path(uri: str) -> Path:
    parts = urllib.parse.urlsplit(uri)
    if parts.netloc not in ("", "localhost"):
        raise ValueError("it names another host")
    return Path(urllib.parse.unquote(parts.path))


def _file(path: Path) -> bytes:
    if not path.is_file():  # a pipe would never end
        raise ValueError("it is not an ordinary file")
    with path.open("rb") as file:
        return file.read(_MOST_BYTES + 1)


def _object(bucket: str, key: str) -> bytes:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client = boto3.client("s3", config=Config(connect_timeout=_TIMEOUT, read_timeout=_TIMEOUT))
        with client.get_object(Bucket=bucket, Key=key)["Body"] as body:
            return bytes(body.read(_MOST_BYTES + 1))
    except (BotoCoreError, ClientError) as error:  # neither is an OSError
        raise ValueError(str(error)) from error


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        """Follow none; the answer is an error then."""
