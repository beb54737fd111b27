"""Access to the Kubernetes API from inside a pod, with the rights of the pod's service account."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from adfm.errors import AdfmError

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

TIMEOUT = (10, 60)
"""Seconds for the connection and for the answer: `_request_timeout` of a call, for which the client has no default."""


def inside() -> bool:
    """Whether this process runs in a pod: Kubernetes sets the address of its API in each."""
    return "KUBERNETES_SERVICE_HOST" in os.environ


def api() -> ApiClient:
    """A client of the cluster's API as the pod's service account; it reads the token again as Kubernetes renews it.

    Raises:
        AdfmError: This is not a pod, or its service account's token is not mounted.
    """
    from kubernetes import client, config

    configuration = client.Configuration()
    try:
        config.load_incluster_config(configuration)
    except config.ConfigException as error:
        raise AdfmError(f"the Kubernetes API can only be used from a pod with a service account: {error}") from error
    return client.ApiClient(configuration)


def namespace() -> str:
    """The pod's namespace.

    Raises:
        AdfmError: As `api`.
    """
    try:
        return (SERVICE_ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
    except OSError as error:
        raise AdfmError(
            f"the namespace of this pod is not known: {error}; mount the service account's token "
            "(automountServiceAccountToken)."
        ) from error
