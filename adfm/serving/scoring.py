"""A registered version as an MLflow pyfunc: `mlflow models serve -m models:/adfm@production --env-manager local`.

The version holds the adapter and names its base; nothing is merged, and nothing is pickled: MLflow imports this module
and calls `_load_pyfunc`. What comes in is a column `image` of base64, or of URIs. `data:` URIs are always read. Any
other kind could be used to read what only the server may read, so `ADFM_SERVE_URIS` has to name the places that may be
read, separated by white space: folders (`/data/line3`), `http(s)://host/path` and `s3://bucket/prefix`.

An image that the version's guard refuses (`adfm.evaluation.guard`) is answered `cannot judge`, never `normal`, and the
model is not asked. `ADFM_SERVE_LOG` names a file for counts (`adfm.serving.servelog`), and `ADFM_SHADOW` the folder of
a candidate that answers the same images for that log (`adfm.serving.shadow`).
"""

from __future__ import annotations

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
from typing import TYPE_CHECKING, Any

import yaml
from PIL import Image

from adfm.data.images import GreyRange
from adfm.errors import AdfmError
from adfm.models import model_folder
from adfm.models.predictor import Predictor
from adfm.params import Params
from adfm.serving import predict, servelog, shadow

if TYPE_CHECKING:
    import pandas as pd

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
        own, self._calibration, self._guard = predict.read_version(folder)
        self._batch_size = int(own["evaluate"]["batch_size"])
        params = predict.with_own(Params.model_validate({"evaluate": {"batch_size": self._batch_size}}), own)
        self.version = _version(folder)
        print(f"{self.version}: {self._calibration.summary}", file=sys.stderr)
        if self._guard is None:
            print(f"{self.version}: {predict.UNGUARDED}", file=sys.stderr)
        self._predictor = Predictor(folder / "model", params)
        self._grey_range = model_folder.grey_range(folder / "model")
        self._turns = shadow.Turns()  # MLflow's server has many threads
        self.shadow: shadow.Shadow | None = None

    def follow(self, folder: Path) -> None:
        """Has a candidate answer the same images, for the log; production is served whether or not it can be loaded.

        Args:
            folder: The files of the candidate's version.
        """
        try:
            candidate = Served(folder)
        except Exception as error:  # files of anybody make libraries raise anything
            shadow.warn(error)
            servelog.write([("failed", {"candidate": str(folder), "images": 0, "reason": str(error)})], self.version)
            return
        self.shadow = shadow.Shadow(candidate.answers, self._turns, self.version, candidate.version)

    def predict(self, data: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Answers photographs.

        Args:
            data: A column `image`, each base64 or a URI.
            params: There are none.

        Returns:
            A row an image, in the order of `data`, with `label`, `probability`, `threshold`, `boxes`, `reasoning` and
            `reason` as `adfm.serving.predict.readable` and `adfm.serving.predict.refused` give them; and `kind`, as
            `adfm.serving.predict.judge` gives it, if the model's prompt asks for the kind of a defect.

        Raises:
            MlflowException: Images cannot be read; all of them are listed, and none was answered. It is the server's
                answer 400.
        """
        import pandas as pd
        from mlflow.exceptions import MlflowException

        problems: dict[int, str] = {}
        contents = dict(_contents(data["image"], problems))
        with self._turns.production():
            judged = self._judge(contents, problems)
        if problems:
            listed = " ".join(f"Image {number}: {problem}." for number, problem in sorted(problems.items()))
            raise MlflowException.invalid_parameter_value(
                f"{len(problems)} of {len(data)} images cannot be read, and none was answered. {listed}"
            )
        rows = [judged[number][0] for number in contents]
        self._log(contents, judged)
        if self.shadow:
            self.shadow.offer([*contents.values()], rows)
        columns = [*predict.KEYS, predict.KIND] if self._predictor.kinds else predict.KEYS
        return pd.DataFrame(rows, columns=columns, dtype=object)

    def answers(self, contents: list[bytes]) -> list[dict[str, Any]]:
        """Rows as `predict` gives them for image files, one a file; one that cannot be read is refused.

        Args:
            contents: The files.
        """
        problems: dict[int, str] = {}
        judged = self._judge(dict(enumerate(contents)), problems, whole=False)
        return [
            judged[number][0] if number in judged else predict.refused(problems[number], self._calibration)
            for number in range(len(contents))
        ]

    def _judge(
        self, contents: dict[int, bytes], problems: dict[int, str], whole: bool = True
    ) -> dict[int, tuple[dict[str, Any], str | None]]:
        """Answers images, by their numbers.

        Args:
            contents: The files.
            problems: Gets those that cannot be read, and why.
            whole: Answer no more images once there is a problem; the rest is only read, for the list of problems.

        Returns:
            What `adfm.serving.predict.judge` gives for each.
        """
        judged: dict[int, tuple[dict[str, Any], str | None]] = {}
        for batch in predict.batches(_decoded(contents, problems, self._grey_range), self._batch_size):
            if whole and problems:
                continue
            rows = predict.judge(self._predictor, self._calibration, self._guard, batch)
            judged |= {number: row for (number, _), row in zip(batch, rows, strict=True)}
        return judged

    def _log(self, contents: dict[int, bytes], judged: dict[int, tuple[dict[str, Any], str | None]]) -> None:
        events: list[tuple[str, dict[str, Any]]] = [
            ("answered", {"labels": Counter(row["label"] for row, _ in judged.values())})
        ]
        events += (
            (
                "cannot judge",
                {"image": hashlib.sha256(contents[number]).hexdigest(), "kind": kind, "reason": row["reason"]},
            )
            for number, (row, kind) in judged.items()
            if kind
        )
        servelog.write(events, self.version)


def _load_pyfunc(path: str) -> Served:
    """What MLflow calls with the version's folder."""
    servelog.check()
    served = Served(Path(path))
    if candidate := os.environ.get(shadow.FOLDER):
        served.follow(Path(candidate))
    return served


def _version(folder: Path) -> str:
    """Name and number of a version, from the file that MLflow's client leaves in it; its folder's name without one."""
    try:
        about = yaml.safe_load((folder / "registered_model_meta").read_text(encoding="utf-8"))
        return f"{about['model_name']}/{about['model_version']}"
    except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError):
        return folder.name


def content(image: str) -> bytes:
    """The file that an entry of the column `image` stands for.

    Args:
        image: Base64, or a URI: `data:`, `file:` or an absolute path, `http(s):`, `s3:`.

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
    total = 0
    for number, image in enumerate(images, 1):
        try:
            read = content(image) if isinstance(image, str) else None
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
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise AdfmError("it is neither base64 nor a URI") from error


def _read(uri: str) -> bytes:
    if not any(_is_within(uri, place) for place in os.environ.get(URIS, "").split()):
        raise AdfmError(f"this server may not read there; {URIS} names the places that it may read")
    parts = urllib.parse.urlsplit(uri)
    try:
        if parts.scheme == "file":
            found = _file(_path(uri))
        elif parts.scheme == "s3":
            found = _object(parts.netloc, urllib.parse.unquote(parts.path[1:]))
        else:
            # No redirects: they could lead elsewhere.
            with urllib.request.build_opener(_NoRedirects).open(uri, timeout=_TIMEOUT) as answer:
                found = bytes(answer.read(_MOST_BYTES + 1))
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise AdfmError(f"it cannot be read ({error})") from error
    if len(found) > _MOST_BYTES:
        raise AdfmError(f"it has more than {_MOST_BYTES} bytes")
    return found


def _is_within(uri: str, place: str) -> bool:
    """Whether a URI lies in a place that may be read, however it is written."""
    if place.startswith("/"):
        place = Path(place).as_uri()
    try:
        asked, allowed = urllib.parse.urlsplit(uri), urllib.parse.urlsplit(place)
        if asked.scheme != allowed.scheme or asked.scheme not in ("file", "http", "https", "s3"):
            return False
        if asked.scheme == "file":
            return _path(uri).resolve().is_relative_to(_path(place).resolve())
    except (OSError, RuntimeError, ValueError):
        return False
    path, above = (urllib.parse.unquote(parts.path).rstrip("/") for parts in (asked, allowed))
    if asked.netloc != allowed.netloc or not asked.netloc or {".", ".."} & {*re.split(r"[/\\]", path)}:
        return False
    return path == above or path.startswith(f"{above}/")


def _path(uri: str) -> Path:
    parts = urllib.parse.urlsplit(uri)
    if parts.netloc not in ("", "localhost"):
        raise ValueError("it names another host")
    return Path(urllib.parse.unquote(parts.path))


def _file(path: Path) -> bytes:
    if not path.is_file():  # a pipe would never end
        raise ValueError("it is no file")
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
    except (BotoCoreError, ClientError) as error:
        raise ValueError(str(error)) from error


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        """Follows none; the answer is an error then."""
