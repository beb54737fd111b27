"""A registered version to answer images with: downloaded, and checked against its signature and the signed history.

A signature says that somebody whose key counts has signed these files. The history says more: which files the gate has
decided on, and which version is in production.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adfm import signing, tracking
from adfm.errors import AdfmError
from adfm.models import versions
from adfm.registry import history
from adfm.registry.reconcile import PRODUCTION

if TYPE_CHECKING:
    from adfm.registry.history import History


class NotInProduction(AdfmError):
    """The alias `production` is not where the history says that it is."""

    exit_code = 2


def fetch(model: str, to: Path) -> tuple[Path, str]:
    """Downloads and verifies a version.

    Args:
        model: `models:/<name>/<version>`, or `models:/<name>@<alias>`. With the alias `production`, the history must
            say that this version is in production.
        to: An existing folder, which nobody else can write to.

    Returns:
        The folder of the version, and its name with its number: `models:/<name>/<version>`.

    Raises:
        Unverified: The version's files are not those that were signed, or not those that the gate decided on, or not
            those that came into production.
        NotInProduction: The alias was moved by hand.
        AdfmError: There is no such version, or MLflow cannot be reached.
    """
    from mlflow import MlflowClient

    with tracking.store_errors(tracking.configure()):
        version = versions.find(model)
        folder = versions.download(version, to).parent
        name, number = version.name, str(version.version)
        seen = history.read(MlflowClient(), name, signing.keys())
    judged, since = seen.last("judge", version=number), "the gate decided on them"
    if model.endswith(f"@{PRODUCTION}"):
        _check_production(seen, name, number)
        judged, since = seen.last("promote", "rollback", "restore", version=number), "it came into production"
    if judged is not None and judged.manifest != signing.manifest(folder):
        raise signing.Unverified(
            f"models:/{name}/{number}: its files were changed, and signed again, since {since}. Find out who did it "
            "(`adfm audit`), and register the model again with `adfm register`."
        )
    return folder, f"models:/{name}/{number}"


def _check_production(seen: History, name: str, number: str) -> None:
    """The history decides what is in production; an alias can be moved by anybody who may edit the model."""
    if seen.production != number:
        recorded = "none" if seen.production == history.NOBODY else f"version {seen.production}"
        raise NotInProduction(
            f"The alias {PRODUCTION} of {name} points at version {number}, and its history has {recorded} in "
            f"production: somebody has moved the alias by hand, or is moving it now. Try again; `adfm promote` puts it "
            f"back. models:/{name}/{number} is this version all the same."
        )
