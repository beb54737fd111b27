"""Access to the Kubernetes API from inside a pod, with the rights of the pod's service account."""

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from adfm.errors import AdfmError, Unreachable
from adfm.process import retries

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"  # Kubeflow Trainer's API
RUNTIME = "torch-distributed"  # Kubeflow Trainer's runtime for a TrainJob
CONTAINER = "node"  # name of the replicated job, and of its container, in this runtime

_TIMEOUT = (10, 60)  # seconds for the connection and for the answer; the client has no default
_PAUSE = 10.0  # seconds


def api() -> client.ApiClient:
    """Return a client of the cluster's API as the pod's service account.

    Raises:
        AdfmError: This is not a pod, or its service account's token is not mounted.
    """
    configuration = client.Configuration()
    try:
        config.load_incluster_config(configuration)  # reads the token again as Kubernetes renews it
    except config.ConfigException as error:
        raise AdfmError(f"the Kubernetes API can only be used from a pod with a service account: {error}") from error
    return client.ApiClient(configuration)


def namespace() -> str:
    """Return the pod's namespace; raise `AdfmError` as `api`."""
    try:
        return (SERVICE_ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
    except OSError as error:
        raise AdfmError(
            f"the namespace of this pod is not known: {error}; mount the service account's token "
            "(automountServiceAccountToken)."
        ) from error


def pod_name() -> str:
    """Return the pod's name."""
    return os.environ.get("KFP_POD_NAME") or socket.gethostname()  # KFP's first: the host's is cut at 63 characters


def call(function: Callable[..., Any], *args: Any, patience: float = 0.0, **kwargs: Any) -> Any:
    """Call a method of a `kubernetes.client` API with a time limit; retry transient errors (`is_transient`).

    Args:
        function: The method, e.g. `CoreV1Api(cluster.api()).read_namespaced_pod`.
        *args: Its arguments.
        patience: Seconds for which a transient error is retried.
        **kwargs: Its keyword arguments.

    Raises:
        ApiException: The server's error; a transient one after `patience` seconds.
        Unreachable: There is no connection.
    """
    end = time.monotonic() + patience
    while True:
        try:
            return function(*args, _request_timeout=_TIMEOUT, **kwargs)
        except ApiException as error:
            if not is_transient(error) or time.monotonic() >= end:
                raise
            problem = f"{error.status} {message(error)}"
        except HTTPError as error:
            if time.monotonic() >= end:
                raise Unreachable(f"the Kubernetes API cannot be reached: {error}") from error
            problem = str(error)
        print(f"the Kubernetes API does not answer ({problem}); trying again", file=sys.stderr)
        time.sleep(min(_PAUSE, max(end - time.monotonic(), 0.0)))


def is_transient(error: ApiException) -> bool:
    """Whether the same call may work in a minute."""
    # Besides those of `retries.is_transient`: no connection (0), and a token that was renewed meanwhile (401).
    return error.status in (0, 401) or retries.is_transient(error.status)


def message(error: ApiException) -> str:
    """Return the message of an API's error, e.g. of an admission webhook; its HTTP reason where it has none."""
    try:
        return str(json.loads(error.body)["message"] or error.reason)
    except (TypeError, ValueError, KeyError):  # no body, or text that is not of the API: a proxy, an unknown path
        return str(error.reason)


def claim_problem(claim: Any, name: str, namespace: str) -> str:
    """Return why several machines cannot train on a claim of the Kubernetes API, and what to do; "" if they can."""
    place = f"{name} in the namespace {namespace}"
    if claim is None:
        return (
            f"the namespace {namespace} has no volume claim {name}, on which several machines train; "
            f"kubectl -n {namespace} apply -f deploy/runs/workspace.yaml, with a storage class of ReadWriteMany."
        )
    modes = (claim.spec and claim.spec.access_modes) or []
    if "ReadWriteMany" not in modes:
        return (
            f"the volume claim {place} is {', '.join(modes) or 'without access mode'}, and several machines write to "
            "it; make it again with ReadWriteMany and a storage class that has it (deploy/runs/workspace.yaml)."
        )
    if claim.status and claim.status.phase == "Lost":
        return f"the volume of the claim {place} is lost (phase Lost); make it again (deploy/runs/workspace.yaml)."
    return ""  # one that is not bound may be of a storage class that makes the volume for its first pod
