"""The connection to a server of Kubeflow Pipelines: token, version, client, errors."""

import http.client
import json
import os
import re
import ssl
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from adfm.errors import AdfmError
from adfm.process import environment

MINIMUM = (2, 17)
"""Version of Kubeflow Pipelines from which all that the pipelines use is there."""

NAMESPACE = "kubeflow"
"""Where Kubeflow Pipelines is installed, and runs go on a server with a single user."""

_TIMEOUT = 10  # seconds
_HEALTH = {"commit_sha", "tag_name", "multi_user", "apiServerReady"}  # what `healthz` has; the last: of KFP's pages
_TOKEN = "Give a valid token in KFP_TOKEN, or run where the service account's is mounted (docs/kubernetes.md)."
_ADDRESS = (
    "See that the address is right; from outside the cluster: kubectl port-forward -n kubeflow svc/ml-pipeline 8888."
)


def client(host: str, namespace: str | None, token: str | None) -> Any:
    """KFP's client, through the proxy and with the authorities that `require_server` used."""
    import kfp

    address = urlsplit(host)
    bypassed = urllib.request.proxy_bypass(address.hostname or "")
    proxy = None if bypassed else urllib.request.getproxies().get(address.scheme)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This client only works", FutureWarning)
        return kfp.Client(
            host=host,
            namespace=namespace or NAMESPACE,
            existing_token=token,
            proxy=proxy,
            ssl_ca_cert=environment.ca_bundle(),
        )


def bearer_token() -> str | None:
    """The bearer token of `KFP_TOKEN`, else that of the service account, if there is one.

    Raises:
        AdfmError: It could not stand in a header: http.client would print it in its error.
    """
    file = Path(os.environ.get("KF_PIPELINES_SA_TOKEN_PATH", "/var/run/secrets/kubeflow/pipelines/token"))
    token = os.environ.get("KFP_TOKEN", "").strip()
    if not token and file.is_file():
        token = file.read_text(encoding="utf-8").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise AdfmError("KFP_TOKEN holds blanks or characters that no token has; give the token alone, without Bearer.")
    return token or None


def require_server(host: str, token: str | None, namespace: str | None) -> list[str]:
    """Refuse a server that is too old, or has several users where no namespace is given; return warnings.

    Raises:
        AdfmError: Also that the server cannot be reached, or does not let us in.
    """
    # `healthz` has `tag_name`, the release that the image was built for, and `multi_user`
    # (backend/src/apiserver/main.go). Images that are not of a release have a branch there, or `unknown`. KFP's pages,
    # through which the API is reached behind Kubeflow's gateway, reply themselves: with `apiServerTagName`, and whether
    # they reach the API (frontend/server/handlers/healthz.ts).
    health = _probe(host, token)
    if health.get("apiServerReady") is False:
        raise AdfmError(
            f"KFP's pages at {host} do not reach the API behind them: see whether the deployment ml-pipeline runs."
        )
    if health.get("multi_user") is True and not namespace:
        raise AdfmError(
            f"--namespace is missing: the KFP API at {host} serves several users, and each run belongs to a namespace. "
            "Name that of your profile."
        )
    notes = []
    # It does so silently: ReplaceNamespace of backend/src/apiserver/resource/resource_manager.go makes it "".
    if health.get("multi_user") is False and namespace not in (None, NAMESPACE):
        notes.append(
            f"the KFP API at {host} serves one user and ignores --namespace {namespace}: the run goes to the namespace "
            "that Kubeflow Pipelines itself is in, with the secrets there."
        )
    minimum = ".".join(map(str, MINIMUM))
    tag = str(health.get("tag_name") or health.get("apiServerTagName") or "unknown")
    release = re.match(r"v?(\d+)\.(\d+)", tag)
    if not release:
        notes.append(
            f"the KFP API at {host} does not say its release (tag_name {tag!r}); it has to be {minimum} or newer."
        )
    elif (int(release[1]), int(release[2])) < MINIMUM:
        raise AdfmError(
            f"the KFP API at {host} is {tag}; adfm needs Kubeflow Pipelines {minimum} or newer: upgrade it."
        )
    return notes


def _probe(host: str, token: str | None) -> dict[str, Any]:
    """Ask once whether the server is there and lets us in; KFP's client would ask for a minute."""
    import certifi

    request = urllib.request.Request(f"{host}/apis/v2beta1/healthz")
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")  # a page for logins is not to have it
    try:
        # The same authorities as KFP's client has: kfp_server_api/rest.py.
        context = ssl.create_default_context(cafile=environment.ca_bundle() or certifi.where())
        with urllib.request.urlopen(request, timeout=_TIMEOUT, context=context) as answer:
            health = json.load(answer)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 404:
            raise AdfmError(
                f"{host} has no API of Kubeflow Pipelines 2 (404); the address may lack a path, as /pipeline."
            ) from error
        raise AdfmError(_refusal(host, error.code, error.reason)) from error
    except json.JSONDecodeError as error:
        raise AdfmError(
            f"{host} answered with a page and not as the KFP API: it wants a login, or the address lacks a path, as "
            f"/pipeline. {_TOKEN}"
        ) from error
    except (OSError, ValueError) as error:
        remedy = environment.ca_remedy(error) or f" {_ADDRESS}"
        reason = getattr(error, "reason", error)
        raise AdfmError(f"the KFP API at {host} cannot be reached: {reason}.{remedy}") from error
    except http.client.HTTPException as error:  # the port of gRPC, or a reply that was cut off
        raise AdfmError(f"{host} does not reply as the KFP API does ({type(error).__name__}). {_ADDRESS}") from error
    if not isinstance(health, dict) or (health and not _HEALTH & health.keys()):
        raise AdfmError(f"{host} answered, but is not the KFP API. {_ADDRESS}")
    return health


@contextmanager
def translate_errors(host: str) -> Iterator[None]:
    """Raise errors of KFP's client as `AdfmError`, with what to do."""
    import kfp_server_api
    import urllib3

    try:
        yield
    except kfp_server_api.ApiException as error:
        raise AdfmError(_refusal(host, error.status, error.body or error.reason)) from error
    except urllib3.exceptions.HTTPError as error:
        raise AdfmError(f"the KFP API at {host} cannot be reached any more: {error}.") from error
    except ValueError as error:
        raise AdfmError(f"the KFP API at {host}: {error}") from error


def _refusal(host: str, status: int, answer: object) -> str:
    text = " ".join(str(answer).split())[:300]
    if status == 401:
        return f"{host} does not accept the token: it is missing or has expired ({text}). {_TOKEN}"
    if status == 403:
        return f"{host} does not let this account do that ({text}). Ask for the right in the namespace. {_TOKEN}"
    return f"the KFP API at {host} answered {status}: {text}"
