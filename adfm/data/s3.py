"""Access to data in S3, by `ADFM_S3_*` or boto3's usual chain: a client, and credentials for DVC's remotes."""

import contextlib
import os
from typing import Any

from adfm.errors import AdfmError
from adfm.process.environment import variable

# Names that boto3 and DVC's remotes (dvc/config_schema.py) have for each variable `ADFM_S3_…`. They are passed on, not
# exported as `AWS_*`: KFP's launcher and MLflow would take those for theirs.
_NAMES = {
    "ACCESS_KEY_ID": ("aws_access_key_id", "access_key_id"),
    "SECRET_ACCESS_KEY": ("aws_secret_access_key", "secret_access_key"),
    "SESSION_TOKEN": ("aws_session_token", "session_token"),
    "ENDPOINT_URL": ("endpoint_url", "endpointurl"),
    "REGION": ("region_name", "region"),
}
_KEYS = ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")
_OWN_LOGIN = ("access_key_id", "profile", "credentialpath", "configpath", "allow_anonymous_login")


def settings() -> dict[str, str]:
    """Return the variables `ADFM_S3_*` that are set, by the rest of their names.

    Raises:
        AdfmError: One key is set without the other, or a session token without keys.
    """
    variables = {name: value for name in _NAMES if (value := variable(f"ADFM_S3_{name}"))}
    missing = [f"ADFM_S3_{name}" for name in _KEYS if name not in variables]
    present = [f"ADFM_S3_{name}" for name in variables if name in (*_KEYS, "SESSION_TOKEN")]
    if missing and present:
        raise AdfmError(
            f"{' and '.join(present)} is set without {' and '.join(missing)}; set both keys or neither (on a cluster,"
            " access-key and secret-key of the secret adfm-s3)."
        )
    return variables


def prefix() -> str:
    """Return the prefix of the variables that are in use, for messages: `ADFM_S3_` or `AWS_`."""
    return "ADFM_S3_" if settings() else "AWS_"


def keys_prefix() -> str:
    """Return the prefix of the variables of the keys, which may be `AWS_` where only `ADFM_S3_ENDPOINT_URL` is set."""
    return "ADFM_S3_" if "ACCESS_KEY_ID" in settings() else "AWS_"


def endpoint() -> str:
    """Return the address of the data's server, for messages."""
    given = settings()
    other = "" if "ACCESS_KEY_ID" in given else _others_endpoint()
    return given.get("ENDPOINT_URL") or other or "Amazon S3"


def _others_endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def client(connections: int = 10) -> Any:
    """Return boto3's client for the data, for some requests at a time.

    Raises:
        AdfmError: As `settings`.
        botocore.exceptions.BotoCoreError: A profile or an endpoint cannot be used.
        ValueError: The endpoint is not an address.
    """
    import boto3
    from botocore.config import Config

    given = settings()
    # ADFM_S3_* keys without an endpoint are Amazon's: AWS_ENDPOINT_URL may be that of other keys.
    options = {"ignore_configured_endpoint_urls": "ACCESS_KEY_ID" in given or None, "retries": {"mode": "standard"}}
    config = Config(connect_timeout=10, read_timeout=60, max_pool_connections=connections, **options)
    return boto3.client("s3", config=config, **{_NAMES[name][0]: value for name, value in given.items()})


def has_credentials() -> bool:
    """Return whether there are keys for the data: `ADFM_S3_*`, or some of boto3's chain."""
    import boto3
    from botocore.exceptions import BotoCoreError

    if "ACCESS_KEY_ID" in settings():
        return True
    try:
        return boto3.Session().get_credentials() is not None
    except BotoCoreError:  # one key without the other
        return False


def configure_remotes(remotes: dict[str, dict[str, Any]]) -> None:
    """Pass `ADFM_S3_*` to DVC's S3 remotes that have no login of their own, in memory only.

    Args:
        remotes: The section `remote` of a repository's configuration.
    """
    given = {_NAMES[name][1]: value for name, value in settings().items()}
    if "access_key_id" in given and "endpointurl" not in given and _others_endpoint():
        # DVC's remotes cannot ignore AWS_ENDPOINT_URL, and would send the keys there.
        with contextlib.closing(client()) as amazon:
            given["endpointurl"] = amazon.meta.endpoint_url
    for remote in remotes.values():
        if remote.get("url", "").startswith("s3://") and not any(map(remote.get, _OWN_LOGIN)):
            remote.update({name: value for name, value in given.items() if not remote.get(name)})
