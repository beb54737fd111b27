"""Submit a pipeline to a server of Kubeflow Pipelines: once for the same code, images, settings and data."""

import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from adfm import tracking
from adfm.kubeflow.tasks import unused_settings
from adfm.params import loads
from pipelines import checks, cluster, connection, schedules
from pipelines.ir import write

T = TypeVar("T")

_OVER = ("FAILED", "CANCELED", "CANCELING", "SKIPPED")
_LOOKS, _PAUSE = 10, 0.5  # requests, seconds between them, until a run that gives way has ended
_EQUALS = 1


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
    """Start a run, or find the one that does the same; with a schedule, create a recurring run.

    All that can be checked is checked before anything is created on the server.

    Args:
        pipeline: What `dsl.pipeline` made.
        arguments: Of the pipeline, by name.
        host: Address of the KFP API; `KF_PIPELINES_ENDPOINT` without it.
        experiment: Name of the experiment, which is created if it does not exist.
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
    token = connection.bearer_token()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pipeline.yaml"
        write(pipeline, file)
        _check(file, host, token, namespace, service_account, arguments)
        code = hashlib.sha256(file.read_bytes()).hexdigest()
        # A link changes nothing of a run that is under way; a schedule is to have the new one.
        key = [code, arguments, schedule, service_account] if schedule else [code, {**arguments, "ui": ""}]
        name = f"{pipeline.name}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"
        with connection.translate_errors(host):
            client = connection.client(host, namespace, token)
            place = _experiment(client, experiment, namespace)
            if not schedule and once and (same := _runs(client, place, name)):
                return _report("the same run is there already", "runs", same[0], ui)
            version = _version(client, pipeline.name, _version_name(variant, code), file, namespace)
            if schedule:
                made = schedules.replace(client, place, name, version, arguments, service_account, schedule, namespace)
                return _report(f"every {schedule}", "recurringrun", made, ui)
            run = _quietly(
                client.run_pipeline, place, name, params=arguments, service_account=service_account, **version
            )
            if once and (other := _other(client, place, name, run.run_id)):
                client.terminate_run(run.run_id)
                return _report("the same run was begun at the same time", "runs", other, ui)
            return _report("run", "runs", str(run.run_id), ui)


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
    ir = next(yaml.load_all(file.read_text(encoding="utf-8"), Loader=loader))  # then its settings for Kubernetes
    images = checks.images(ir)
    print(f"images: {', '.join(images)}")
    checks.require_references(images)
    notes = checks.require_pullable(images, host) + unused_settings(loads(arguments.get("settings", "")).evaluate)
    notes += connection.require_server(host, token, namespace)
    account = service_account or "default"
    notes += cluster.check(namespace or connection.NAMESPACE, account, ir, arguments)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)


def _report(what: str, page: str, ident: str, ui: str) -> str:
    """Print the id and, where the address of KFP's pages is known, a link; the API's address has no pages."""
    print(f"{what}: {ident}")
    if ui:
        print(f"{ui}/#/{page}/details/{ident}")
    return ident


def _quietly(call: Callable[..., T], *args: Any, **options: Any) -> T:
    """Call KFP's client without the link that it prints, which leads to the API."""
    with contextlib.redirect_stdout(io.StringIO()):
        return call(*args, **options)


def _find_or_create(find: Callable[[], T | None], create: Callable[[], T]) -> T:
    """What `find` finds, else what `create` creates; if another submission was faster (409), what that one created."""
    import kfp_server_api

    thing = find()
    if thing is not None:
        return thing
    try:
        return create()
    except kfp_server_api.ApiException as error:
        if error.status != 409 or (thing := find()) is None:
            raise
        return thing


def _first(things: list[Any] | None, name: str) -> Any:
    """The one of exactly that name, else one whose name differs in case: KFP's filter (filter.go) takes both."""
    return max(things or [], key=lambda each: each.display_name == name, default=None)


def _experiment(client: Any, name: str, namespace: str | None) -> str:
    # Not `create_experiment`, which lists the name again, by a filter that `+` and `%` break (`_named`).
    body = client.api_models.V2beta1Experiment(display_name=name, namespace=namespace)
    experiment = _find_or_create(
        lambda: _first(client.list_experiments(namespace=namespace, filter=_named(name)).experiments, name),
        lambda: client.experiments.experiment_service_create_experiment(experiment=body),
    )
    return str(experiment.experiment_id)


def _version_name(variant: str, code: str) -> str:
    """Variant, Git commit and digest."""
    commit = tracking.code_version().get("git_commit", "")[:12]
    return "-".join(part for part in (variant, commit, code[:8]) if part)


def _version(client: Any, pipeline: str, name: str, file: Path, namespace: str | None) -> dict[str, str]:
    """Ids of the pipeline and of its version of a name; both are created unless they exist."""
    # `upload_pipeline` would create both at once, but names the version like the pipeline
    # (backend/src/apiserver/server/pipeline_upload_server.go), and `get_pipeline_id` sees only pipelines that are
    # shared by all namespaces.
    body = client.api_models.V2beta1Pipeline(name=pipeline, display_name=pipeline, namespace=namespace)
    parent = _find_or_create(
        lambda: _first(client.list_pipelines(namespace=namespace, filter=_named(pipeline)).pipelines, pipeline),
        lambda: client.pipelines.pipeline_service_create_pipeline(pipeline=body),
    ).pipeline_id
    version = _find_or_create(
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
    """The run to keep instead of ours, if several of the same name were started at once: the oldest."""
    # KFP's timestamps have whole seconds and are taken before a run is stored, so the others may not have seen the
    # oldest: it waits for them to end, and is given up itself if they do not.
    for _ in range(_LOOKS):
        runs = _runs(client, place, name)
        others = [run for run in runs if run != ours]
        if not others or runs[0] != ours:
            break
        time.sleep(_PAUSE)
    return others[0] if others else None


def _named(name: str) -> str:
    """A filter by name for KFP's lists."""
    # The server unescapes it like an address (`parseAPIFilter` in backend/src/apiserver/server/list_request_util.go)
    # after HTTP did so already; JSON can write `+` and `%` in another way.
    text = json.dumps({"predicates": [{"operation": _EQUALS, "key": "display_name", "stringValue": name}]})
    return text.replace("%", r"\u0025").replace("+", r"\u002b")
