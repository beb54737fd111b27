"""Recurring runs of a pipeline: one for each production line, which a new submission replaces."""

import re
import sys
from typing import Any

import yaml

Line = tuple[str, str]
"""What tells the schedules of one production line from those of another: its data and its registered model."""


def replace(
    client: Any,
    experiment: str,
    name: str,
    version: dict[str, str],
    arguments: dict[str, Any],
    service_account: str | None,
    cron: str,
    namespace: str | None,
) -> str:
    """Create the schedule of a name, or enable it if it exists; delete those that it replaces.

    A schedule replaces those of the same pipeline, experiment, data and registered model. Those of other data or models
    stay, and are reported; so are those of another experiment with the same data and model.

    Args:
        client: KFP's.
        experiment: Id of the experiment.
        name: Of the schedule.
        version: Ids of the pipeline and its version.
        arguments: Of the pipeline.
        service_account: Of the pods.
        cron: Six fields, seconds first.
        namespace: Of the runs, where the server has several users.

    Returns:
        The id of the schedule.
    """
    line = _line(arguments)
    schedules = _of_pipeline(client, version, experiment_id=experiment)
    newest = max(_of(line, schedules), key=_age, default=None)
    if newest is None or newest.display_name != name:
        newest = client.create_recurring_run(
            experiment,
            name,
            cron_expression=cron,
            no_catchup=True,
            params=arguments,
            service_account=service_account,
            **version,
        )
        # Another submission may create one at the same moment. Both list them after they created theirs, so that one of
        # them at least sees both, and both keep the newest.
        schedules = _of_pipeline(client, version, experiment_id=experiment)
        newest = max(_of(line, schedules), key=_age, default=newest)
    elif newest.status == "DISABLED":
        client.enable_recurring_run(newest.recurring_run_id)
        print("the same schedule was there already, switched off; it is on again")
    for schedule in schedules:
        if schedule is newest:
            continue
        if _line(_parameters(schedule)) == line:
            _delete(client, schedule)
        elif schedule.status != "DISABLED":
            print(f"another schedule of other data or another model stays: {_described(schedule)}")
    _report_other_experiments(client, experiment, version, line, namespace)
    return str(newest.recurring_run_id)


def _of_pipeline(client: Any, version: dict[str, str], **where: str | None) -> list[Any]:
    """All schedules of a pipeline in an experiment, or in a namespace."""
    schedules: list[Any] = []
    token = ""
    while True:
        page = client.list_recurring_runs(page_size=100, page_token=token, **where)
        schedules += page.recurring_runs or []
        if not (token := page.next_page_token or ""):
            break
    return [
        schedule
        for schedule in schedules
        if (reference := schedule.pipeline_version_reference) and reference.pipeline_id == version["pipeline_id"]
    ]


def _of(line: Line, schedules: list[Any]) -> list[Any]:
    return [schedule for schedule in schedules if _line(_parameters(schedule)) == line]


def _line(arguments: dict[str, Any]) -> Line:
    try:
        settings = yaml.safe_load(arguments.get("settings") or "") or {}
        source, model = settings["fetch"]["source"], settings["mlflow"]["registered_model"]
    except (yaml.YAMLError, LookupError, TypeError):  # made by hand, or by another version
        return "", ""
    # Without the commit of a `dvc://` source: a schedule at a newer one replaces the older. A promotion has no data.
    return re.sub(r"@[0-9a-f]{40}:", ":", str(source)) if "data_revision" in arguments else "", str(model)


def _parameters(schedule: Any) -> dict[str, Any]:
    """The arguments of a schedule; those made by hand may have none."""
    return (schedule.runtime_config and schedule.runtime_config.parameters) or {}


def _age(schedule: Any) -> tuple[str, str]:
    return str(schedule.created_at), str(schedule.recurring_run_id)


def _described(schedule: Any) -> str:
    trigger = schedule.trigger and schedule.trigger.cron_schedule
    return f"{schedule.display_name} ({trigger.cron if trigger else 'no cron'}, {schedule.recurring_run_id})"


def _delete(client: Any, schedule: Any) -> None:
    """Delete a schedule; where that is refused, warn that it will run as well."""
    import kfp_server_api

    try:
        # Its workflows are the schedule's own in Kubernetes' sense (`SetOwnerReferences` in KFP's resource_manager.go):
        # deleted in the usual way, it would take those under way with it.
        client.recurring_runs.recurring_run_service_delete_recurring_run(
            schedule.recurring_run_id, propagation_policy="ORPHAN"
        )
    except kfp_server_api.ApiException as error:
        if error.status != 404:
            _warn(
                f"{_described(schedule)} should be replaced and could not be deleted ({error.status} {error.reason}); "
                "delete it in the pages of Kubeflow Pipelines."
            )
        return
    print(f"replaced: {_described(schedule)}; its runs under way continue")


def _report_other_experiments(
    client: Any, experiment: str, version: dict[str, str], line: Line, namespace: str | None
) -> None:
    """Warn of schedules of the same data and model in another experiment: they run as well."""
    import kfp_server_api
    import urllib3

    try:
        schedules = _of_pipeline(client, version, namespace=namespace)
    except (kfp_server_api.ApiException, urllib3.exceptions.HTTPError):  # the schedule is made: no reason to fail
        return
    for schedule in _of(line, schedules):
        if schedule.experiment_id != experiment and schedule.status != "DISABLED":
            _warn(
                f"{_described(schedule)} of another experiment has the same data and model; if this one is to replace "
                "it, delete it in the pages of Kubeflow Pipelines."
            )


def _warn(text: str) -> None:
    print(f"warning: two schedules will run: {text}", file=sys.stderr)
