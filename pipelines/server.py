"""Asks a server of Kubeflow Pipelines for a run: once for the same code, images, settings and data."""

import contextlib
import hashlib
import http.client
import io
import json
import os
import re
import ssl
import sys
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import yaml

from adfm import tracking
from adfm.errors import AdfmError
from adfm.kubeflow.tasks import unused_settings
from adfm.params import loads
from adfm.process import environment
from pipelines import checks, cluster
from pipelines.ir import write

T = TypeVar("T")

MINIMUM = (2, 17)
"""Version of Kubeflow Pipelines from which all that the pipelines use is there."""

_OVER = ("FAILED", "CANCELED", "CANCELING", "SKIPPED")
_TIMEOUT = 10  # seconds
_LOOKS, _PAUSE = 10, 0.5  # seconds between looks, until a run that gives way has ended
_EQUALS = 1
_NAMESPACE = "kubeflow"
_HEALTH = {"commit_sha", "tag_name", "multi_user", "apiServerReady"}  # what `healthz` has; the last: of KFP's pages
_TOKEN = "Give a valid token in KFP_TOKEN, or run where the service account's is mounted (docs/kubernetes.md)."
_ADDRESS = (
    "See that the address is right; from outside the cluster: kubectl port-forward -n kubeflow svc/ml-pipeline 8888."
)


def submit(
    pipeline: Any,
    arguments: dict[str, Any],
    *,
    host: str | None,
    experiment: str,
    namespace: str | None,
    service_account: str | None,
    variant: str,
    schedule: str | None = None,
    once: bool = True,
) -> str:
    """Start a run, or find the one that does the same; with a schedule, a recurring run.

    All that can be checked is checked before anything is made on the server.

    Args:
        pipeline: What `dsl.pipeline` made.
        arguments: Of the pipeline, by name.
        host: Address of the KFP API; `KF_PIPELINES_ENDPOINT` without it.
        experiment: Name of the experiment, which is made if it is not there.
        namespace: Of the runs, where the server has several users.
        service_account: Of the pods.
        variant: Name of the compiled file, for the version's name: several of them are one pipeline.
        schedule: Six fields of cron, seconds first. A schedule of the same pipeline, experiment, data and registered
            model is replaced.
        once: Whether a run of the same code, images and arguments that is under way, or succeeded, is used instead.

    Returns:
        The id of the run or recurring run.

    Raises:
        AdfmError: Names are wrong; there is no server, it cannot be reached, is too old, or refuses; the cluster
            cannot pull the images, or is known to lack what the run needs.
    """
    host = checks.address("--host", host or os.environ.get("KF_PIPELINES_ENDPOINT") or "is missing")
    checks.require_names(experiment, namespace, service_account, schedule)
    checks.require_labels(arguments)
    ui = arguments.get("ui") or os.environ.get("KF_PIPELINES_UI_ENDPOINT", "")
    ui = checks.address("--ui", ui) if ui else ""
    if "ui" in arguments:
        arguments = {**arguments, "ui": ui}
    token = _token()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pipeline.yaml"
        write(pipeline, file)
        _check(file, host, token, namespace, service_account, arguments)
        code = hashlib.sha256(file.read_bytes()).hexdigest()
        # A link changes nothing of a run that is under way; a schedule is to have the new one.
        key = [code, arguments, schedule, service_account] if schedule else [code, {**arguments, "ui": ""}]
        name = f"{pipeline.name}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"
        with _explained(host):
            client = _client(host, namespace, token)
            place = _experiment(client, experiment, namespace)
            if not schedule and once and (there := _runs(client, place, name)):
                return _end("the same run is there already", "runs", there[0], ui)
            version = _version(client, pipeline.name, _version_name(variant, code), file, namespace)
            if schedule:
                made = _schedule(client, place, name, version, arguments, service_account, schedule, namespace)
                return _end(f"every {schedule}", "recurringrun", made, ui)
            run = _quietly(
                client.run_pipeline, place, name, params=arguments, service_account=service_account, **version
            )
            if once and (other := _other(client, place, name, run.run_id)):
                client.terminate_run(run.run_id)
                return _end("the same run was begun at the same time", "runs", other, ui)
            return _end("run", "runs", str(run.run_id), ui)


def _check(
    file: Path,
    host: str,
    token: str | None,
    namespace: str | None,
    service_account: str | None,
    arguments: dict[str, Any],
) -> None:
    """Print the images of a compiled pipeline and what may go wrong with it; refuse what is known to go wrong."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, where it was built in: ten times as fast
    ir, *platform = yaml.load_all(file.read_text(encoding="utf-8"), Loader=loader)
    images = checks.images(ir)
    print(f"images: {', '.join(images)}")
    checks.require_references(images)
    notes = checks.require_pullable(images, host) + unused_settings(loads(arguments.get("settings", "")))
    notes += _require_server(host, token, namespace)
    account = service_account or "default"
    notes += cluster.check(namespace or _NAMESPACE, account, ir, platform[0] if platform else {}, arguments)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)


def _end(what: str, page: str, ident: str, ui: str) -> str:
    """Print what came of it, with a link where the address of the pages is known: the API's has none."""
    print(f"{what}: {ident}")
    if ui:
        print(f"{ui}/#/{page}/details/{ident}")
    return ident


def _quietly(call: Callable[..., T], *args: Any, **options: Any) -> T:
    """The call of KFP's client without its print of a link, which is one to the API."""
    with contextlib.redirect_stdout(io.StringIO()):
        return call(*args, **options)


def _found_or_made(find: Callable[[], T | None], make: Callable[[], T]) -> T:
    """What is there already, else what is made; if another was faster (409), what that one made."""
    import kfp_server_api

    there = find()
    if there is not None:
        return there
    try:
        return make()
    except kfp_server_api.ApiException as error:
        if error.status != 409 or (there := find()) is None:
            raise
        return there


def _first(things: list[Any] | None, name: str) -> Any:
    """The one of exactly that name, else one whose name differs in case: KFP's filter (filter.go) takes both."""
    return max(things or [], key=lambda each: each.display_name == name, default=None)


def _experiment(client: Any, name: str, namespace: str | None) -> str:
    # Not `create_experiment`, which asks for the name again, by a filter that `+` and `%` break (`_named`).
    body = client.api_models.V2beta1Experiment(display_name=name, namespace=namespace)
    there = _found_or_made(
        lambda: _first(client.list_experiments(namespace=namespace, filter=_named(name)).experiments, name),
        lambda: client.experiments.experiment_service_create_experiment(experiment=body),
    )
    return str(there.experiment_id)


def _version_name(variant: str, code: str) -> str:
    """Variant, Git commit and digest."""
    commit = tracking.code_version().get("git_commit", "")[:12]
    return "-".join(part for part in (variant, commit, code[:8]) if part)


def _version(client: Any, pipeline: str, name: str, file: Path, namespace: str | None) -> dict[str, str]:
    """The pipeline's version of a name; pipeline and version are made unless they are there.

    `upload_pipeline` would make pipeline and version at once, but calls the version like the pipeline
    (backend/src/apiserver/server/pipeline_upload_server.go), and `get_pipeline_id` sees only pipelines that are shared
    by all namespaces.
    """
    body = client.api_models.V2beta1Pipeline(name=pipeline, display_name=pipeline, namespace=namespace)
    parent = _found_or_made(
        lambda: _first(client.list_pipelines(namespace=namespace, filter=_named(pipeline)).pipelines, pipeline),
        lambda: client.pipelines.pipeline_service_create_pipeline(pipeline=body),
    ).pipeline_id
    version = _found_or_made(
        lambda: _first(client.list_pipeline_versions(parent, filter=_named(name)).pipeline_versions, name),
        lambda: _quietly(client.upload_pipeline_version, str(file), name, pipeline_id=parent),
    )
    return {"pipeline_id": parent, "version_id": version.pipeline_version_id}


def _runs(client: Any, place: str, name: str) -> list[str]:
    """Runs of a name that are under way or succeeded, the oldest first; of the newest hundred."""
    runs = client.list_runs(experiment_id=place, page_size=100, sort_by="created_at desc", filter=_named(name)).runs
    alive = [run for run in runs or () if run.state not in _OVER]
    return [str(run.run_id) for run in sorted(alive, key=lambda run: (str(run.created_at), run.run_id))]


def _other(client: Any, place: str, name: str, ours: str) -> str | None:
    """The run to keep instead of ours, if several of the same name were started at once.

    The oldest is kept. KFP's timestamps have whole seconds and are taken before a run is stored, so that the others may
    not have seen the oldest: it waits for them to end, and is given up itself if they do not.
    """
    for _ in range(_LOOKS):
        runs = _runs(client, place, name)
        others = [run for run in runs if run != ours]
        if not others or runs[0] != ours:
            break
        time.sleep(_PAUSE)
    return others[0] if others else None


def _schedule(
    client: Any,
    place: str,
    name: str,
    version: dict[str, str],
    arguments: dict[str, Any],
    service_account: str | None,
    cron: str,
    namespace: str | None,
) -> str:
    """The recurring run of a name: made, or switched on if it is there; those that it replaces are deleted.

    What a schedule replaces are those of the same pipeline, experiment, data and registered model. Those of other data
    or models stay, and are named; so are those of another experiment, if they are of the same data and model.
    """
    line = _line(arguments)
    schedules = _recurring_runs(client, version, experiment_id=place)
    newest = max(_of(line, schedules), key=_age, default=None)
    if newest is None or newest.display_name != name:
        newest = client.create_recurring_run(
            place,
            name,
            cron_expression=cron,
            no_catchup=True,
            params=arguments,
            service_account=service_account,
            **version,
        )
        # Another submission may have made one at the same moment. Both look after they made theirs, so that one of them
        # at least sees both, and both keep the newest.
        schedules = _recurring_runs(client, version, experiment_id=place)
        newest = max(_of(line, schedules), key=_age, default=newest)
    elif newest.status == "DISABLED":
        client.enable_recurring_run(newest.recurring_run_id)
        print("the same schedule was there already, switched off; it is on again")
    for each in _of(line, schedules):
        if each is not newest:
            _remove(client, each)
    for each in schedules:
        if _line(_parameters(each)) != line and each.status != "DISABLED":
            print(f"another schedule of other data or another model stays: {_described(each)}")
    _report_elsewhere(client, place, version, line, namespace)
    return str(newest.recurring_run_id)


def _of(line: tuple[str, str], schedules: list[Any]) -> list[Any]:
    return [each for each in schedules if _line(_parameters(each)) == line]


def _report_elsewhere(
    client: Any, place: str, version: dict[str, str], line: tuple[str, str], namespace: str | None
) -> None:
    """Say which schedules of the same data and model another experiment has: they run as well."""
    import kfp_server_api
    import urllib3

    try:
        schedules = _recurring_runs(client, version, namespace=namespace)
    except (kfp_server_api.ApiException, urllib3.exceptions.HTTPError):  # the schedule is made: no reason to fail
        return
    for each in _of(line, schedules):
        if each.experiment_id != place and each.status != "DISABLED":
            print(
                f"warning: two schedules will run: {_described(each)} of another experiment has the same data and "
                "model; if this one is to replace it, delete it in the pages of Kubeflow Pipelines.",
                file=sys.stderr,
            )


def _age(thing: Any) -> tuple[str, str]:
    return str(thing.created_at), str(thing.recurring_run_id)


def _parameters(schedule: Any) -> dict[str, Any]:
    """The arguments of a schedule; those made by hand may have none."""
    return (schedule.runtime_config and schedule.runtime_config.parameters) or {}


def _recurring_runs(client: Any, version: dict[str, str], **where: str | None) -> list[Any]:
    """All schedules of a pipeline in an experiment, or in a namespace."""
    schedules: list[Any] = []
    token = ""
    while True:
        page = client.list_recurring_runs(page_size=100, page_token=token, **where)
        schedules += page.recurring_runs or []
        if not (token := page.next_page_token or ""):
            break
    return [
        each
        for each in schedules
        if each.pipeline_version_reference and each.pipeline_version_reference.pipeline_id == version["pipeline_id"]
    ]


def _line(arguments: dict[str, Any]) -> tuple[str, str]:
    """What tells the schedules of one production line from those of another: its data and its registered model.

    The commit in a `dvc://` source is left out: a schedule at a newer one replaces the older. A promotion has no data.
    """
    try:
        settings = yaml.safe_load(arguments.get("settings") or "") or {}
        source, model = settings["fetch"]["source"], settings["mlflow"]["registered_model"]
    except (yaml.YAMLError, LookupError, TypeError):  # made by hand, or by another version
        return "", ""
    return re.sub(r"@[0-9a-f]{40}:", ":", str(source)) if "data_revision" in arguments else "", str(model)


def _remove(client: Any, schedule: Any) -> None:
    """Delete a schedule. Where that is refused, say that it will run as well."""
    import kfp_server_api

    try:
        # Its workflows are the schedule's own in Kubernetes' sense (`SetOwnerReferences` in KFP's resource_manager.go):
        # deleted in the usual way, it would take those under way with it.
        client.recurring_runs.recurring_run_service_delete_recurring_run(
            schedule.recurring_run_id, propagation_policy="ORPHAN"
        )
    except kfp_server_api.ApiException as error:
        if error.status != 404:
            print(
                f"warning: two schedules will run: {_described(schedule)} should be replaced and could not be deleted "
                f"({error.status} {error.reason}); delete it in the pages of Kubeflow Pipelines.",
                file=sys.stderr,
            )
        return
    print(f"replaced: {_described(schedule)}; its runs under way continue")


def _described(schedule: Any) -> str:
    trigger = schedule.trigger and schedule.trigger.cron_schedule
    return f"{schedule.display_name} ({trigger.cron if trigger else 'no cron'}, {schedule.recurring_run_id})"


def _named(name: str) -> str:
    """A filter of KFP's lists.

    The server unescapes its text as one of an address (`parseAPIFilter` in
    backend/src/apiserver/server/list_request_util.go), after HTTP did so already: `+` and `%` are written as JSON can.
    """
    text = json.dumps({"predicates": [{"operation": _EQUALS, "key": "display_name", "stringValue": name}]})
    return text.replace("%", r"\u0025").replace("+", r"\u002b")


def _client(host: str, namespace: str | None, token: str | None) -> Any:
    import kfp

    address = urlsplit(host)
    bypassed = urllib.request.proxy_bypass(address.hostname or "")
    proxy = None if bypassed else urllib.request.getproxies().get(address.scheme)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This client only works", FutureWarning)
        return kfp.Client(
            host=host,
            namespace=namespace or _NAMESPACE,
            existing_token=token,
            proxy=proxy,
            ssl_ca_cert=environment.ca_bundle(),
        )


def _token() -> str | None:
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


def _require_server(host: str, token: str | None, namespace: str | None) -> list[str]:
    """Refuse a server that is too old, or has several users where no namespace is given; returns warnings.

    One with a single user ignores a namespace.

    `healthz` has `tag_name`, the release that the image was built for, and `multi_user`
    (backend/src/apiserver/main.go). Images that are not of a release have a branch there, or `unknown`. KFP's pages,
    through which the API is reached behind Kubeflow's gateway, reply themselves: with `apiServerTagName`, and whether
    they reach the API (frontend/server/handlers/healthz.ts).
    """
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
    warnings = []
    # Without a word: ReplaceNamespace of backend/src/apiserver/resource/resource_manager.go makes it "".
    if health.get("multi_user") is False and namespace not in (None, _NAMESPACE):
        warnings.append(
            f"the KFP API at {host} serves one user and ignores --namespace {namespace}: the run goes to the namespace "
            "that Kubeflow Pipelines itself is in, with the secrets there."
        )
    minimum = ".".join(map(str, MINIMUM))
    tag = str(health.get("tag_name") or health.get("apiServerTagName") or "unknown")
    release = re.match(r"v?(\d+)\.(\d+)", tag)
    if not release:
        return [
            *warnings,
            f"the KFP API at {host} does not say its release (tag_name {tag!r}); it has to be {minimum} or newer.",
        ]
    if (int(release[1]), int(release[2])) < MINIMUM:
        raise AdfmError(
            f"the KFP API at {host} is {tag}; adfm needs Kubeflow Pipelines {minimum} or newer: upgrade it."
        )
    return warnings


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
def _explained(host: str) -> Iterator[None]:
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
