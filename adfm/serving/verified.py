"""Download a registered version to answer images with, and check it against its signature and the signed history."""

from pathlib import Path

from adfm import signing, tracking
from adfm.errors import AdfmError
from adfm.models import versions
from adfm.registry import history
from adfm.registry.reconcile import PRODUCTION


class NotInProduction(AdfmError):
    """The alias `production` points at another version than the one that the history has in production."""

    exit_code = 2


def fetch(model: str, to: Path) -> tuple[Path, str]:
    """Download and verify a version.

    Args:
        model: `models:/<name>/<version>` or `models:/<name>@<alias>`; the history must agree on the alias `production`.
        to: An existing folder, which nobody else can write to.

    Returns:
        The folder of the version, and its name with its number: `models:/<name>/<version>`.

    Raises:
        Unverified: The files are not those that were signed, that the gate decided on, or that came into production.
        NotInProduction: The alias was moved by hand.
        AdfmError: There is no such version, or MLflow cannot be reached.
    """
    from mlflow import MlflowClient

    with tracking.store_errors(tracking.configure()):
        version = versions.find(model)
        folder = versions.download(version, to).parent
        name, number = version.name, str(version.version)
        steps = history.read(MlflowClient(), name, signing.keys())
    # A signature says that a key that counts has signed these files; the history, which files the gate decided on.
    judged, since = steps.last("judge", version=number), "the gate decided on them"
    if model.endswith(f"@{PRODUCTION}"):
        # The history decides what is in production; an alias can be moved by anybody who may edit the model.
        if steps.production != number:
            recorded = "none" if steps.production == history.NOBODY else f"version {steps.production}"
            raise NotInProduction(
                f"The alias {PRODUCTION} of {name} points at version {number}, and its history has {recorded} in "
                f"production: somebody has moved the alias by hand, or is moving it now. Try again; `adfm promote` "
                f"puts it back. models:/{name}/{number} is this version all the same."
            )
        judged, since = steps.last("promote", "rollback", "restore", version=number), "it came into production"
    if judged is not None and judged.manifest != signing.manifest(folder):
        raise signing.Unverified(
            f"models:/{name}/{number}: its files were changed, and signed again, since {since}. Find out who did it "
            "(`adfm audit`), and register the model again with `adfm register`."
        )
    return folder, f"models:/{name}/{number}"
