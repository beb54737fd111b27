"""What a task of a pipeline does around the function of its stage.

Settings come as text, the run's page shows figures and pages, and at the end somebody is told.
"""

from __future__ import annotations

import csv
import difflib
import html
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from adfm import cli, params, stopping, tracking
from adfm.errors import AdfmError
from adfm.params import Params
from adfm.text import printable_output

RUN_TAG = "kfp_run_id"
"""Tag of a version: the run of the pipeline that registered it."""

REVISION_TAG = "data_revision"
"""Tag of a version: the revision of the data that the run was asked for."""

GPUS = ("nvidia.com/gpu", "amd.com/gpu", "gpu.intel.com/i915", "gpu.intel.com/xe", "habana.ai/gaudi")
"""Resources by which the device plugins of Kubernetes announce GPUs; besides them, parts of one: `nvidia.com/mig-…`."""

_ANSWERS = ("normal", "anomalous", "unparseable")
_ROC_POINTS = 200
_SECTIONS = {
    "conversion": ("seed", "convert", "split"),
    "validation": ("convert", "split", "validate", "register"),
}


def begin(settings: str) -> Params:
    """The settings of a task, after its environment is set up; an empty text gives the defaults.

    Raises:
        AdfmError: The settings are wrong; all that is wrong is listed.
    """
    cli.set_environment()
    return params.loads(settings)


def check(
    settings: str, revision: str = "", gpu_type: str = GPUS[0], num_gpus: int = 0
) -> tuple[str, str, str, str, str, str]:
    """Sees that a run can start, and takes its settings apart, so that a task runs again only for those it reads.

    Args:
        settings: All settings.
        revision: What tells this data from an earlier one, if it is known.
        gpu_type: Resource that stands for a GPU.
        num_gpus: GPUs of a machine.

    Returns:
        The whole settings; where the data is; its name; its revision, which is the time for a source that may change;
        what conversion reads; what validation reads.

    Raises:
        AdfmError: Settings or GPUs are wrong, model or MLflow cannot be used, or what only a secret of the cluster can
            give is missing: MLflow's address, or keys for S3 that the service account does not stand for.
    """
    from adfm import preflight

    asked = begin(settings)
    check_gpus(gpu_type, num_gpus)
    if "KUBERNETES_SERVICE_HOST" in os.environ and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise AdfmError(
            "MLFLOW_TRACKING_URI is not set, and what is written to a file of a pod is lost with it; "
            "make the secret adfm-mlflow in the namespace of the runs, with the key uri (deploy/secrets.example.yaml)."
        )
    preflight.check(asked, gpus=num_gpus)
    if "KUBERNETES_SERVICE_HOST" in os.environ and asked.fetch.source.startswith("s3://"):
        _require_s3_keys(asked.fetch.source)
    conversion, validation = (tracking.settings(asked, *sections) for sections in _SECTIONS.values())
    source = asked.fetch.source
    return (
        tracking.settings(asked),
        source,
        asked.fetch.name,
        revision or fixed_revision(source) or tracking.now(),
        conversion,
        validation,
    )


def _require_s3_keys(source: str) -> None:
    import boto3
    from botocore.exceptions import BotoCoreError

    try:
        found = boto3.Session().get_credentials()
    except BotoCoreError:  # one key without the other
        found = None
    if found is None:
        raise AdfmError(
            f"{source} cannot be read: neither the service account nor a secret gives credentials for S3; make the "
            "secret adfm-s3 in the namespace of the runs, with the keys access-key and secret-key "
            "(deploy/secrets.example.yaml)."
        )


@contextmanager
def exit_status() -> Iterator[None]:
    """Ends the task as `adfm` would end: with the error alone and its exit status, 75 for what was told to stop."""
    with printable_output():
        try:
            with stopping.terminable():
                yield
        except AdfmError as error:
            print(f"adfm: error: {error}", file=sys.stderr)
            raise SystemExit(error.exit_code) from error


def check_gpus(gpu_type: str, num_gpus: int) -> None:
    """Refuses a type of GPU that no device plugin announces, and a number that no machine has.

    Raises:
        AdfmError: As said.
    """
    if gpu_type not in GPUS and not re.fullmatch(r"nvidia\.com/mig-\d+g\.\d+gb(\.me)?", gpu_type):
        near = difflib.get_close_matches(gpu_type, GPUS, n=1, cutoff=0)[0]
        raise AdfmError(
            f"there is no GPU type {gpu_type!r}; the nearest is {near}. Known: {', '.join(GPUS)}, nvidia.com/mig-…"
        )
    if num_gpus < 0:
        raise AdfmError(f"num_gpus is {num_gpus}; it has to be 0 or more.")


def fixed_revision(source: str) -> str:
    """What names the content of a source for ever; empty for a source that may have other content tomorrow."""
    fixed = source.startswith("synthetic://") or re.match(r"dvc://.+@[0-9a-f]{40}:", source)
    return source if fixed else ""


def models_to_compare(params: Params, warmup: Path, candidate: Path) -> dict[str, str | Path]:
    """The models that a candidate is evaluated beside: the base, the warmed-up one, production and anchor, if any."""
    from adfm.evaluation import evaluate
    from adfm.registry.production import in_production

    models: dict[str, str | Path] = {"base": params.model.name, "warmup": warmup}
    return models | evaluate.models_to_compare(in_production(params), candidate)


def last_figures(curves: Path) -> dict[str, float]:
    """The last row of a curves file that training wrote; empty figures are left out."""
    with curves.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return {name: float(value) for name, value in rows[-1].items() if value} if rows else {}


def validation_figures(report: Path) -> dict[str, float]:
    """How many images validation saw, and how many expectations did not hold."""
    found = json.loads((report / "validation.json").read_text(encoding="utf-8"))["statistics"]
    return {name: float(found[name]) for name in ("images", "expectations", "failed", "warnings")}


def evaluation_figures(evaluation: Path) -> dict[str, float]:
    """`<model>/<metric>` of the headline of each model in an evaluation."""
    found = {}
    for file in sorted((evaluation / "metrics").glob("*.json")):
        for metric, value in json.loads(file.read_text(encoding="utf-8")).items():
            if value is not None:
                found[f"{file.stem}/{metric}"] = float(value)
    return found


def confusion(evaluation: Path) -> tuple[list[str], list[list[int]]]:
    """Labels, and how many images of each (row) the candidate of an evaluation decided to be each (column)."""
    with (evaluation / "plots" / "confusion.csv").open(newline="", encoding="utf-8") as stream:
        counted = Counter((row["actual"], row["decision"]) for row in csv.DictReader(stream))
    return list(_ANSWERS), [[counted[actual, said] for said in _ANSWERS] for actual in _ANSWERS]


def roc(evaluation: Path) -> tuple[list[float], list[float], list[float]]:
    """The ROC curve of the candidate of an evaluation, for a page: 200 points of it at most, its ends among them.

    Returns:
        False positive rates, true positive rates, and the scores from which an image is called anomalous; 2, which no
        probability reaches, stands for infinity, which JSON lacks. All are empty if only one class was there.
    """
    with (evaluation / "plots" / "roc.csv").open(newline="", encoding="utf-8") as stream:
        points = [tuple(map(float, row)) for row in list(csv.reader(stream))[1:]]
    if len(points) > _ROC_POINTS:
        points = [points[i * (len(points) - 1) // (_ROC_POINTS - 1)] for i in range(_ROC_POINTS)]
    fpr, tpr, threshold = ([point[column] for point in points] for column in range(3))
    return fpr, tpr, [min(each, 2.0) for each in threshold]


def show(page: Path, to: str) -> None:
    """Copies a page to where the artifact of a task is wanted."""
    Path(to).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(page, to)


def register(
    model: str, shards: str, evaluation: str, out: str, settings: str, run: str, revision: str, page: str
) -> tuple[str, dict[str, float], str]:
    """Registers the model of a run and writes a page that says what was decided.

    Args:
        model: Folder that training wrote.
        shards: Folder of shards.
        evaluation: Folder that evaluation wrote.
        out: Folder to write.
        settings: All settings.
        run: Id of the pipeline's run, a tag of the version.
        revision: Revision of the data, a tag of the version if it is not empty.
        page: File of the page.

    Returns:
        Number of the version; figures of the decision; `passed` or `failed`.

    Raises:
        AdfmError: As `adfm.registry.registration.register`.
    """
    from adfm.registry import registration

    asked = begin(settings)
    tags = {RUN_TAG: run} | ({REVISION_TAG: revision} if revision else {})
    folder = Path(out)
    decision = registration.register(Path(model), Path(shards), Path(evaluation), folder, asked, tags)
    about = json.loads((folder / "registration.json").read_text(encoding="utf-8"))
    title = f"Version {about['version']} of {about['model']}: gate {about['gate']}"
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in decision.reasons)
    link = version_link(about["model"], about["version"])
    Path(page).parent.mkdir(parents=True, exist_ok=True)
    Path(page).write_text(
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><h1>{html.escape(title)}</h1>"
        f"<ul>{reasons}</ul><p>{link}</p>\n",
        encoding="utf-8",
    )
    return about["version"], {"version": float(about["version"]), "gate": float(decision.passed)}, about["gate"]


def version_link(model: str, version: str) -> str:
    """A link, as HTML, to a version in MLflow; its name alone where MLflow is not a server."""
    name = html.escape(f"models:/{model}/{version}")
    server = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not server.startswith(("http://", "https://")):
        return name
    address = html.escape(f"{server.rstrip('/')}/#/models/{quote(model)}/versions/{version}", quote=True)
    return f'<a href="{address}">{name}</a>'


def promote(version: str, settings: str, by: str, page: str) -> None:
    """Promotes a version, and writes the history as a page.

    If none is named, does what the approvals service does at each look: accepts submissions, then promotes what is
    newly approved.

    Raises:
        AdfmError: As `adfm.registry.registration.accept` and `adfm.registry.promotion.promote`.
    """
    from adfm.registry import history, promotion, reconcile, registration

    asked = begin(settings)
    try:
        if version:
            promotion.promote(version, asked, by)
            return
        with reconcile.client() as store:
            registration.accept(store, asked)
        if not promotion.promote_approved(asked, by):
            print(f"no version of {asked.register_.model} is newly approved; nothing to do")
    finally:
        Path(page).parent.mkdir(parents=True, exist_ok=True)
        steps = html.escape(history.table(promotion.history(asked)))
        Path(page).write_text(f"<!doctype html><meta charset='utf-8'><pre>{steps}</pre>\n", encoding="utf-8")
