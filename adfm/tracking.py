"""MLflow runs: the tracking URI, what every run records, and error messages for a failing store.

`MLFLOW_TRACKING_URI` names a server. Without it, runs and versions go to `mlflow.db` and files to `mlartifacts/`, both
in `environment.home`, which `mlflow ui --backend-store-uri sqlite:///mlflow.db` shows.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import yaml

from adfm import descriptions
from adfm.errors import AdfmError, Unreachable
from adfm.params import Params, flat
from adfm.process import environment, retries
from adfm.process.environment import without_login
from adfm.process.stopping import Stopped

if TYPE_CHECKING:
    from mlflow import ActiveRun, MlflowClient
    from mlflow.entities import Experiment, Run

LIBRARIES = (
    *("adfm", "accelerate", "datasets", "dvc", "great_expectations", "mlflow", "numpy", "pandas", "peft", "pillow"),
    *("pillow-heif", "pyarrow", "safetensors", "scipy", "tokenizers", "torch", "transformers", "trl"),
)

VERSION_TAG = "registered_version"  # of the run of `register`: the version that it registered or found

_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it links to the start page for GenAI
    "GIT_PYTHON_REFRESH": "quiet",
}

_version = cache(metadata.version)  # it reads a file of the installation

# What requests, urllib3 and botocore report of a server that is away or busy.
_OF_FILES = re.compile(
    r"too many \d+ error responses|connection (aborted|broken|refused|reset|was closed)|timed out|timeout on endpoint|"
    r"failed to resolve|could not connect|while reading from response|total bytes expected|"
    r"an error occurred \((SlowDown|ServiceUnavailable|InternalError|50[0234])\)",
    re.IGNORECASE,
)


def configure() -> str:
    """Set MLflow's tracking URI, and check that the store answers; call it before work starts.

    What is set in MLflow's own environment variables is kept.

    Returns:
        The tracking URI: `MLFLOW_TRACKING_URI`, else the SQLite file `mlflow.db` in the current folder.

    Raises:
        AdfmError: The store cannot be reached (`Unreachable`) or refuses, within about ten seconds.
    """
    given, uri = os.environ.get("MLFLOW_TRACKING_URI"), address()
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    import mlflow

    logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])
    mlflow.set_tracking_uri(uri)
    if not given:
        os.environ.pop("MLFLOW_TRACKING_URI", None)  # MLflow exports it; the next call must use its own folder
    _probe(uri)
    return uri


def address() -> str:
    """Return the tracking URI; no server is contacted."""
    # Absolute, because MLflow keeps one connection per URI: a relative one would outlive a change of folder.
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if not given:
        return f"sqlite:///{(environment.home() / 'mlflow.db').resolve()}"
    relative = re.fullmatch(r"sqlite:///([^/:].*)", given)
    # In the copy of the workspace that DVC removes, a relative path is one of the workspace.
    return f"sqlite:///{environment.home() / relative[1]}" if relative and environment.home() != Path.cwd() else given


def store_is_missing() -> bool:
    """Whether runs would go to a database file that does not exist; `configure` would make it."""
    file = sqlite_file(address())
    return file is not None and not file.exists()


def client() -> MlflowClient:
    """Return MLflow's client, after `configure`."""
    configure()
    from mlflow import MlflowClient

    return MlflowClient()


@contextmanager
def start_run(
    name: str, params: Params, tags: Mapping[str, str] | None = None, run_id: str | None = None, must_end: bool = True
) -> Iterator[ActiveRun]:
    """Run the body as one MLflow run of the experiment `mlflow.experiment`.

    The run carries all of `params` (flattened, and whole as `params.yaml`), the Git commit and the versions of the
    libraries. It ends FINISHED, FAILED on an exception, or KILLED on Ctrl-C or SIGTERM.

    Args:
        name: Name of the run, e.g. `train`.
        params: Settings to record.
        tags: Further tags.
        run_id: A run to resume if the store has it; else that of `MLFLOW_RUN_ID`, if any; else a new one begins. A
            resumed run keeps the parameters that it has (MLflow cannot change them); its `params.yaml` is replaced.
        must_end: Whether it is an error if the store does not answer when the body has ended well.

    Raises:
        AdfmError: The store cannot be reached, does not have the run of `MLFLOW_RUN_ID`, or fails in the body.
    """
    uri = configure()
    import mlflow

    with store_errors(uri):
        given = os.environ.get("MLFLOW_RUN_ID")
        if resumed := find_run(run_id) or given_run(uri):
            run = mlflow.start_run(run_id=resumed.info.run_id)
        else:
            place = params.mlflow
            run = mlflow.start_run(run_name=name, experiment_id=experiment(place.experiment, place.registered_model))
        try:
            mlflow.log_params({key: value for key, value in flat(params).items() if key not in run.data.params})
            mlflow.log_text(settings(params), "params.yaml")
            mlflow.set_tags({"stage": name, **code_version(), **libraries(), **(tags or {})})
            yield run
            with nullcontext() if must_end else _errors_suppressed():
                mlflow.end_run()
            if pages := environment.mlflow_ui():
                print(f"{name}: {pages}/{run_page(run)}")
        except BaseException as error:
            # When the store is what failed, the first error says more than a second one.
            with _errors_suppressed():
                mlflow.end_run("KILLED" if isinstance(error, KeyboardInterrupt | Stopped) else "FAILED")
            raise
        finally:
            if given:  # MLflow unsets it when a run ends; the next stage of this process needs it
                os.environ["MLFLOW_RUN_ID"] = given


def given_run(uri: str) -> Run | None:
    """Return the run that the platform names in `MLFLOW_RUN_ID`, if any.

    Raises:
        AdfmError: The store at `uri` does not have it.
    """
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if not run_id:
        return None
    run = find_run(run_id)
    if run is None:
        raise AdfmError(
            f"MLflow at {without_login(uri)} does not have the run {run_id} that MLFLOW_RUN_ID names: it is a run of "
            "another server, or was deleted. Set MLFLOW_TRACKING_URI to the server of that run (KFP's MLflow plug-in "
            "sets both where injectUserEnvVars is true), or unset MLFLOW_RUN_ID."
        )
    return run


@contextmanager
def _errors_suppressed() -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    with short_timeouts(), suppress(MlflowException):
        yield


def settings(params: Params, *sections: str) -> str:
    """Return `params`, or some of its sections, as the text of a `params.yaml`."""
    every = params.model_dump(mode="json", by_alias=True)
    return yaml.safe_dump({key: every[key] for key in sections or every}, sort_keys=False)


@contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Turn MLflow's exceptions into an `AdfmError` with the remedy (`Unreachable` for no answer, 429 or 5xx)."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException  # type: ignore[import-untyped]

    try:
        yield
    except MlflowException as error:
        place = without_login(uri)
        if uri.startswith("http"):
            remedy = (
                "See that the server runs and that MLFLOW_TRACKING_URI is its address (unset it to use mlflow.db in "
                "the current folder); if it needs a login, set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD. "
                f"On a cluster, all three come from the secret adfm-mlflow.{environment.ca_remedy(error)}"
            )
        else:
            remedy = (
                "See that MLFLOW_TRACKING_URI names a server or a database (unset it to use mlflow.db in the current "
                f"folder); a database that another version of MLflow made needs `mlflow db upgrade {place}`. On a "
                "cluster it comes from the secret adfm-mlflow, key uri: http://… or https://…"
            )
        # Not errors of a database: MLflow itself tries to open one ten times, for 100 s (mlflow/store/db/utils.py).
        unreachable = uri.startswith("http") and may_pass(error)
        text = f"MLflow at {place} failed: {reason(error)[:300]}\n{remedy}"
        raise (Unreachable if unreachable else AdfmError)(text) from error
    except RequestException as error:  # of files, which MLflow's client does not turn into its own exception
        cause = without_login(" ".join(str(error).split()))[:300]
        raise (Unreachable if may_pass(error) else AdfmError)(
            f"MLflow at {without_login(uri)} failed to store or load a file: {cause}. After 413, raise the limit for a "
            "request's size in the proxy before MLflow (nginx: client_max_body_size); after 401 or 403, see that the "
            "account may edit the experiment; after 404, that the server has --serve-artifacts."
        ) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("boto3", "botocore"):
            raise
        # MLflow raises what boto3 raised where files go to S3 directly (store/artifact/s3_artifact_repo.py).
        raise (Unreachable if retries.may_pass(error) else AdfmError)(
            f"MLflow at {without_login(uri)} does not store files itself but sends clients to S3, which failed: "
            f"{error}. Start the server with --serve-artifacts and --artifacts-destination s3://…, or give the clients "
            "access to that bucket: AWS_*, on a cluster the service account."
        ) from error


def reason(error: Exception) -> str:
    """Return the root cause of an error of MLflow's client, on one line, without logins and its retries."""
    return without_login(" ".join(str(error).rpartition("Caused by ")[2].split()))


def may_pass(error: BaseException) -> bool:
    """Whether an error of MLflow's client may be gone in a minute, as `adfm.process.retries.may_pass`."""
    # The client raises requests' RetryError for 408, 429, 500, 502, 503 and 504, after its own retries. What it raises
    # after a download has the errors of the files in its text alone (mlflow/store/artifact/artifact_repo.py).
    from requests.exceptions import RetryError

    return retries.may_pass(error, RetryError) or bool(_OF_FILES.search(str(error)))


def experiment(name: str, model: str | None = None) -> str:
    """Return the id of the experiment `name`; create it if it does not exist.

    Args:
        name: Its name.
        model: The registered model that its description links to (`adfm.descriptions`); `None` keeps the description.

    Raises:
        AdfmError: An experiment of that name was deleted.
    """
    import mlflow
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    store = MlflowClient()
    existing = find_experiment(name)
    if existing is None:
        database = sqlite_file(mlflow.get_tracking_uri())
        artifacts = database.with_name("mlartifacts").as_uri() if database else None
        try:
            existing = store.get_experiment(store.create_experiment(name, artifact_location=artifacts))
        except MlflowException as error:
            existing = find_experiment(name)
            if existing is None or error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
    note = model and descriptions.to_write(existing.tags.get(descriptions.NOTE), descriptions.of_experiment(model))
    if note:
        store.set_experiment_tag(existing.experiment_id, descriptions.NOTE, note)
    return str(existing.experiment_id)


def find_experiment(name: str) -> Experiment | None:
    """Return the experiment `name`, if it exists.

    Raises:
        AdfmError: An experiment of that name was deleted.
    """
    from mlflow import MlflowClient

    existing: Experiment | None = MlflowClient().get_experiment_by_name(name)
    if existing is not None and existing.lifecycle_stage == "deleted":
        raise AdfmError(
            f"MLflow's experiment {name!r} was deleted; restore it with "
            f"`mlflow experiments restore --experiment-id {existing.experiment_id}`, or set mlflow.experiment."
        )
    return existing


def find_run(run_id: str | None) -> Run | None:
    """Return a run; `None` if the store does not have it, as after a move to another server."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        run = MlflowClient().get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # the latter: not an id
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def run_page(run: Run, tab: str = "model-metrics") -> str:
    """Return the address of a run's `tab` (curves, or `artifacts/<path>`) in MLflow's pages, below the server's own."""
    # Without a tab and the kind of work, MLflow opens its start page for GenAI, which shows neither runs nor curves.
    return f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}/{tab}?workflowType=machine_learning"


def code_version() -> dict[str, str]:
    """Return `git_commit` of the current folder or image, and `git_dirty`: whether code or settings differ; else {}."""
    commit, dirty = _git("rev-parse", "HEAD"), "false"
    if commit is None:  # an image has the commit that it was built from
        commit = os.environ.get("ADFM_GIT_COMMIT", "")
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            return {}
    # No other files: the stages themselves change `dvc.lock` and metrics that are kept in Git.
    elif _git("status", "--porcelain", "--", ":/*.py", ":/*.yaml"):
        dirty = "true"
    return {"git_commit": commit, "git_dirty": dirty, "mlflow.source.git.commit": commit}


def libraries() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide a result, as `library.<name>`."""
    versions = {"library.python": python_version()}
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            versions[f"library.{name}"] = _version(name)
    return versions


def sqlite_file(uri: str) -> Path | None:
    """Return the database file of a `sqlite:///` URI; `None` for any other."""
    parts = urlsplit(uri)
    return Path(parts.path[1:]).resolve() if parts.scheme == "sqlite" and parts.path[1:] else None


@contextmanager
def short_timeouts(timeout: int = 8, retries: int = 0) -> Iterator[None]:
    """Use short timeouts (seconds) for MLflow's client in the body, unless its environment variables are set."""
    # Elsewhere MLflow's own minutes of retries hold: hours of work outlive a server's restart.
    values = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries)}
    added = {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)  # another thread may have been first


def _probe(uri: str) -> None:
    from mlflow import MlflowClient

    if path := sqlite_file(uri):
        try:  # first, because MLflow tries an unusable file for minutes
            with closing(sqlite3.connect(path, timeout=8)) as database:
                database.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            raise AdfmError(
                f"MLflow's database {path} cannot be used: {error}. Make its folder writable and see that there is "
                "space, move a damaged file away, or name a server in MLFLOW_TRACKING_URI."
            ) from error
    with store_errors(uri), short_timeouts():
        MlflowClient().search_experiments(max_results=1)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], check=False, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def now() -> str:
    """Return the time, UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
