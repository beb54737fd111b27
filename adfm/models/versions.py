"""Find, download and verify registered versions, `models:/<name>/<version>` or `models:/<name>@<alias>`."""

import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from adfm import signing, tracking
from adfm.errors import AdfmError, Unreachable
from adfm.files import digest
from adfm.text import printable

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>\d+)|@(?P<alias>[^/@]+))")


def fetch(model: str | Path, to: Path) -> tuple[str | Path, str]:
    """Download and verify a registered version into a folder of the caller's own; return any other model as it is.

    Returns:
        What `adfm.models.loading.load` takes, which for a version lies in the verified folder of the whole version; and
        the model's name, with the version's number also where an alias was given.

    Raises:
        AdfmError: MLflow cannot be reached, has no such version or alias, or the version's files cannot be verified.
    """
    if not str(model).startswith("models:"):
        return model, str(model)
    with tracking.store_errors(tracking.configure()):
        version = find(str(model))
        return download(version, to), f"models:/{version.name}/{version.version}"


def find(uri: str) -> "ModelVersion":
    """Return the version that a URI names; raise `AdfmError` where MLflow has no such version or alias."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    match = _URI.fullmatch(uri)
    if not match:
        raise AdfmError(f"{uri} names no version; write models:/adfm/3, or models:/adfm@production for an alias.")
    name, number, alias = match.group("name", "version", "alias")
    client = MlflowClient()
    try:
        aliases = client.get_registered_model(name).aliases
        if alias is not None and alias not in aliases:
            known = ", ".join(sorted(aliases)) or "none"
            raise AdfmError(
                f"No version of {name} has the alias {alias} in MLflow; there are: {known}. `adfm promote` "
                f"puts an approved version into production; models:/{name}/3 names a version by its number."
            )
        return client.get_model_version(name, str(number or aliases[alias]))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise AdfmError(
            f"MLflow has no version {number or f'for {alias}'} of a model {name}: {error.message} See that "
            "MLFLOW_TRACKING_URI names the right server, and which versions `adfm register` has made there."
        ) from error


def download(version: "ModelVersion", to: Path) -> Path:
    """Download a version into a new folder in `to`; verify that its files are those that were signed and registered.

    Returns:
        The folder of its model, in the folder of the version.

    Raises:
        Unverified: The files are not what a trusted key has signed, are another version's, or cannot be downloaded.
        Unreachable: MLflow, or the store of its files, does not answer.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    name = f"models:/{version.name}/{version.version}"
    own = tempfile.mkdtemp(prefix="version-", dir=to)  # empty: a file too many is an error
    try:
        folder = Path(mlflow.artifacts.download_artifacts(name, dst_path=own))
    except (MlflowException, OSError) as error:  # also of links and pipes in a store that is a folder
        _remove(Path(own))
        reason = printable(tracking.reason(error)[:300] or type(error).__name__)
        if tracking.may_pass(error):
            raise Unreachable(f"{name} cannot be downloaded now ({reason}).") from error
        raise signing.Unverified(
            f"{name} cannot be verified: its files cannot be downloaded ({reason}). See that the artifact store can be "
            "reached and holds plain files alone."
        ) from error
    signing.verify(folder, signing.keys(), name)
    present, expected = digest(folder / "model"), version.tags.get("artifact_digest")
    if present != expected:  # the whole signed folder of another version lies there
        raise signing.Unverified(
            f"{name}: its model files have the digest {present}, and {expected or 'none'} was registered. Somebody has "
            "put the files of another version there, or changed the tag artifact_digest; register the model again with "
            "`adfm register`."
        )
    return folder / "model"


def _remove(folder: Path) -> None:
    # Threads of MLflow may still be downloading into it; without the folder they fail.
    deadline = time.monotonic() + 10
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
