"""Tell how a run ended (stand-in)."""

from typing import NamedTuple

from adfm import tracking
from adfm.errors import AdfmError
from adfm.params import loads
from adfm.registry.alerts import alert
from adfm.tasks import RUN_TAG


class Status(NamedTuple):
    """As KFP gives it to an exit task."""

    state: str
    error_message: str
    pipeline_job_resource_name: str
    pipeline_task_name: str


def notify(name: str, status: Status, run: str, settings: str, ui: str) -> str:
    """Send the state, the version with the gate's verdict, and a link."""
    lines = [f"{name} {status.state.lower()}", status.error_message.strip()]
    try:
        params = loads(settings)
        with tracking.store_errors(tracking.configure()):
            query = f"name = '{params.register_.model}' and tags.{RUN_TAG} = '{run}'"
            versions = list(tracking.client().search_model_versions(query))
        lines += [
            f"version {each.version} of {each.name}: gate {each.tags.get('gate', 'unknown')}" for each in versions
        ]
    except AdfmError as problem:
        lines.append(f"the gate's verdict is not known: {str(problem).splitlines()[0]}")
    lines.append(f"{ui.rstrip('/')}/#/runs/details/{run}" if ui else f"run {run}")
    text = "\n".join(line for line in lines if line)
    print(text)
    alert(text)
    return text
