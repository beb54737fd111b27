"""Asks a server of Kubeflow Pipelines for a run: once for the same code, images, settings and data."""

import hashlib
import json
import os
import tempfile
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adfm import tracking
from adfm.errors import AdfmError
from pipelines.cluster import require_secret
from pipelines.command import write

_OVER = ("FAILED", "CANCELED", "CANCELING", "SKIPPED")
_TIMEOUT = 10  # seconds
_EQUALS = 1
_NAMESPACE = "kubeflow"
_TOKEN = "Give a valid one in KFP_TOKEN, or run where the service account's token is mounted (docs/kubernetes.md)."


def submit(
    pipeline: Any,
    arguments: dict[str, Any],
    *,
    host: str | None,
    experiment: str,
    namespace: str | None,
    service_account: str | None,
    schedule: str | None = None,
    once: bool = True,
) -> str:
    """Starts a run, or finds the one that does the same; with a schedule, a recurring run.

    Args:
        pipeline: What `dsl.pipeline` made.
        arguments: Of the pipeline, by name.
        host: Address of the server; `KF_PIPELINES_ENDPOINT` without it.
        experiment: Name of the experiment, which is made if it is not there.
        namespace: Of the runs, where the server has several users.
        service_account: Of the pods.
        schedule: Six fields of cron, seconds first.
        once: Whether a run of the same code, images and arguments that is under way, or succeeded, is used instead.

    Returns:
        The id of the run or recurring run.

    Raises:
        AdfmError: There is no server, it cannot be reached, or it refuses; or a secret is known to be missing.
    """
    host = (host or os.environ.get("KF_PIPELINES_ENDPOINT", "")).rstrip("/")
    if not host.startswith(("http://", "https://")):
        raise AdfmError(f"--host {host or 'is missing'}: name the KFP API by an http(s):// address.")
    token = os.environ.get("KFP_TOKEN") or _mounted_token()
    _probe(host, token)
    require_secret(namespace or _NAMESPACE, service_account or "default")
    if "ui" in arguments:
        arguments = {**arguments, "ui": arguments["ui"] or host}
    with tempfile.TemporaryDirectory() as folder, _explained(host):
        file = Path(folder) / "pipeline.yaml"
        write(pipeline, file)
        asked = {name: value for name, value in arguments.items() if name != "ui"}
        code = hashlib.sha256(file.read_bytes()).hexdigest()
        key = hashlib.sha256(json.dumps([code, asked, schedule], sort_keys=True).encode()).hexdigest()
        name = f"{pipeline.name}-{key[:16]}"

        client = _client(host, namespace, token)
        place = client.create_experiment(experiment, namespace=namespace).experiment_id
        if schedule:
            return _schedule(client, place, name, pipeline, file, code, arguments, service_account, schedule, namespace)
        if once and (there := _runs(client, place, name)):
            print(f"the same run is there already: {host}/#/runs/details/{there[0]}")
            return there[0]
        version = _version(client, pipeline.name, file, code, namespace)
        run = client.run_pipeline(place, name, params=arguments, service_account=service_account, **version)
        if once and (first := _runs(client, place, name)[:1]) and first[0] != run.run_id:
            client.terminate_run(run.run_id)  # another was faster
            print(f"the same run was begun at the same time: {host}/#/runs/details/{first[0]}")
            return first[0]
        return str(run.run_id)


def _schedule(
    client: Any,
    place: str,
    name: str,
    pipeline: Any,
    file: Path,
    code: str,
    arguments: dict[str, Any],
    service_account: str | None,
    schedule: str,
    namespace: str | None,
) -> str:
    found = client.list_recurring_runs(experiment_id=place, page_size=100, filter=_named(name)).recurring_runs
    if found:
        print(f"the same schedule is there already: {found[0].recurring_run_id}")
        return str(found[0].recurring_run_id)
    version = _version(client, pipeline.name, file, code, namespace)
    made = client.create_recurring_run(
        place,
        name,
        cron_expression=schedule,
        no_catchup=True,
        params=arguments,
        service_account=service_account,
        **version,
    )
    print(f"every {schedule}: {made.recurring_run_id}")
    return str(made.recurring_run_id)


def _runs(client: Any, place: str, name: str) -> list[str]:
    """Runs of a name that are under way or succeeded, the oldest first."""
    found = client.list_runs(experiment_id=place, page_size=100, sort_by="created_at asc", filter=_named(name)).runs
    alive = [run for run in found or () if run.state not in _OVER]
    return [str(run.run_id) for run in sorted(alive, key=lambda run: (str(run.created_at), run.run_id))]


def _version(client: Any, name: str, file: Path, code: str, namespace: str | None) -> dict[str, str]:
    """The pipeline's version of this code, named by Git commit and digest; it is uploaded unless it is there."""
    commit = tracking.code_version().get("git_commit", "")[:12]
    wanted = "-".join(part for part in (commit, code[:8]) if part)
    pipeline_id = client.get_pipeline_id(name)
    if pipeline_id is None:
        pipeline_id = client.upload_pipeline(str(file), pipeline_name=name, namespace=namespace).pipeline_id
    found = client.list_pipeline_versions(pipeline_id, page_size=10, filter=_named(wanted)).pipeline_versions
    version = found[0] if found else client.upload_pipeline_version(str(file), wanted, pipeline_id=pipeline_id)
    return {"pipeline_id": pipeline_id, "version_id": version.pipeline_version_id}


def _named(name: str) -> str:
    return json.dumps({"predicates": [{"operation": _EQUALS, "key": "display_name", "stringValue": name}]})


def _client(host: str, namespace: str | None, token: str | None) -> Any:
    import kfp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This client only works", FutureWarning)
        return kfp.Client(host=host, namespace=namespace or _NAMESPACE, existing_token=token)


def _mounted_token() -> str | None:
    file = Path(os.environ.get("KF_PIPELINES_SA_TOKEN_PATH", "/var/run/secrets/kubeflow/pipelines/token"))
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def _probe(host: str, token: str | None) -> None:
    """Asks once whether the server is there and lets us in; KFP's client would ask for a minute."""
    request = urllib.request.Request(
        f"{host}/apis/v2beta1/healthz", headers={"Authorization": f"Bearer {token}"} if token else {}
    )
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            json.load(answer)
    except urllib.error.HTTPError as error:
        error.close()
        raise AdfmError(_refusal(host, error.code, error.reason)) from error
    except json.JSONDecodeError as error:
        raise AdfmError(f"{host} answered with a page and not as the KFP API: a login is wanted. {_TOKEN}") from error
    except (OSError, ValueError) as error:
        raise AdfmError(
            f"the KFP API at {host} cannot be reached: {getattr(error, 'reason', error)}. See that the address is "
            "right; from outside the cluster: kubectl port-forward -n kubeflow svc/ml-pipeline 8888."
        ) from error


@contextmanager
def _explained(host: str) -> Iterator[None]:
    import kfp_server_api
    import urllib3

    try:
        yield
    except kfp_server_api.ApiException as error:
        said = error.body or error.reason
        raise AdfmError(_refusal(host, error.status, said)) from error
    except urllib3.exceptions.HTTPError as error:
        raise AdfmError(f"the KFP API at {host} cannot be reached any more: {error}.") from error
    except ValueError as error:
        raise AdfmError(f"the KFP API at {host}: {error}") from error


def _refusal(host: str, status: int, said: object) -> str:
    text = " ".join(str(said).split())[:300]
    if status == 401:
        return f"{host} does not accept the token: it is missing or has expired ({text}). {_TOKEN}"
    if status == 403:
        return f"{host} does not let this account do that ({text}). Ask for the right in the namespace. {_TOKEN}"
    return f"the KFP API at {host} answered {status}: {text}"
