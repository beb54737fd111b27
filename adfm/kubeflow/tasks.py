"""Helpers shared by the KFP components: stages and their exit status, metrics and pages on a run's page."""

import difflib
import errno
import html
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from adfm import tracking
from adfm.errors import AdfmError
from adfm.kubeflow import termination
from adfm.method.terms import MEANS
from adfm.params import Evaluate, Model, Params, loads
from adfm.process import environment, pod, stopping
from adfm.text import printable_output

RUN_TAG = "kfp_run_id"  # of a version, and of the run of `register` in MLflow: the pipeline's run that registered it
REVISION_TAG = "data_revision"  # of a version: the revision of the data of its run
# Resources by which the device plugins of Kubernetes announce GPUs; besides them, parts of one: `nvidia.com/mig-…`.
GPUS = ("nvidia.com/gpu", "amd.com/gpu", "gpu.intel.com/i915", "gpu.intel.com/xe", "habana.ai/gaudi")
CANDIDATE = "trained"  # name of the model in an evaluation that the run has trained
# Metrics that head the tables of a run's page.
TRAINING_FIRST = ("reward", *MEANS, "utilisation", "kl", "step")
SFT_FIRST = ("loss", "mean_token_accuracy", "step")
_EVALUATION_FIRST = ("balanced_accuracy", "miss_rate", "overkill", "iou")
_ROC_POINTS = 200
_CONVERSION = ("seed", "convert", "split", "validation", "mlflow")


@contextmanager
def stage(tolerant: bool = False) -> Iterator[None]:
    """Run the body of a component as `adfm` runs a verb: set up the environment, and exit with the status of its error.

    An `AdfmError` is printed alone, without a traceback. Any error becomes, in one line, the container's termination
    message (`adfm.kubeflow.termination`), so that the notification has the stage's own reason.

    Args:
        tolerant: Run the body even if the environment cannot be set up.

    Raises:
        SystemExit: After an `AdfmError`, a full disk or SIGTERM. The status is 75 for a training that can be resumed.
    """
    with printable_output():
        try:
            try:
                environment.set_environment()
            except AdfmError as error:
                if not tolerant:  # as the notification is, which reports that the other stages could not
                    raise
                print(f"adfm: {error}", file=sys.stderr)
            with stopping.handle_sigterm():
                yield
        except AdfmError as error:
            _end(str(error), error.exit_code)
        except stopping.Terminated:
            _end("terminated by SIGTERM: the run was terminated, or its pod deleted", 143)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                _end(f"{error.filename or 'a file'}: the disk is full; use nodes with more ephemeral storage.", 1)
            termination.leave(f"{type(error).__name__}: {error}")
            raise


def _end(message: str, status: int) -> NoReturn:
    print(f"adfm: error: {message}", file=sys.stderr)
    termination.leave(message)
    raise SystemExit(status)


def check(
    settings: str, run: str = "", revision: str = "", gpu_type: str = GPUS[0], num_gpus: int = 0, num_nodes: int = 0
) -> tuple[str, str, str, str, str, str]:
    """Check that a run can start, and split its settings by task, so that a task runs again only for those it reads.

    Args:
        settings: All settings.
        run: Id of the pipeline's run, by which a TrainJob is named.
        revision: Of the data, if it is known.
        gpu_type: Resource that stands for a GPU.
        num_gpus: GPUs of a machine.
        num_nodes: Machines that train together in a TrainJob; 0: training is a task on one machine.

    Returns:
        The whole settings; where the data is; its name; its revision, which is the time for a source that may change;
        what the inspection of a part reads; what conversion and validation read.

    Raises:
        AdfmError: Settings or GPUs are wrong, model or MLflow cannot be used, MLflow's address or credentials for S3
            are missing, or the cluster lacks what a TrainJob needs.
    """
    from adfm import preflight

    params = loads(settings)
    check_gpus(gpu_type, num_gpus)
    if pod.is_task() and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise AdfmError(
            "MLflow's address is not set, and what is written to a file of a pod is lost with it; "
            "make the secret adfm-mlflow in the namespace of the runs, with the key uri "
            "(deploy/runs/secrets.example.yaml)."
        )
    for unused in unused_settings(params.evaluate):
        print(f"warning   {unused}")
    preflight.check(params, gpus=num_nodes * max(num_gpus, 1) if num_nodes else num_gpus)
    source = params.fetch.source
    if pod.is_task() and source.startswith("s3://"):
        from adfm.data import s3

        if not s3.has_credentials():
            raise AdfmError(
                f"{source} cannot be read: neither the service account nor a secret gives credentials for S3; make the "
                "secret adfm-s3 in the namespace of the runs, with the keys access-key and secret-key "
                "(deploy/runs/secrets.example.yaml)."
            )
    if num_nodes:
        from adfm.kubeflow import nodes

        nodes.check(params.train, run=run, nodes=num_nodes, gpus=num_gpus, gpu_type=gpu_type)
    revision = revision or fixed_revision(source) or tracking.now()
    # Settings that the inspection of a part does not read are left at their defaults.
    convert = params.convert.model_dump(exclude={"shard_images"})
    split = params.split.model_dump(include={"group", "holdout_categories"})
    inspection = tracking.settings(Params.model_validate({"convert": convert, "split": split}), "convert", "split")
    # Without kinds it is the same whatever the section `sft` says, so that the task's result is used again.
    conversion = tracking.settings(params, *_CONVERSION) + "sft:\n  kinds: true\n" * params.sft.kinds
    return tracking.settings(params), source, params.fetch.name, revision, inspection, conversion


def unused_settings(evaluate: Evaluate) -> list[str]:
    """Return the settings that a pipeline of Kubeflow does not use, a line each."""
    if not evaluate.folds:
        return []
    return [
        f"evaluate.folds is {evaluate.folds} and is not used in a pipeline of Kubeflow: cross-validation is for"
        " small sets, where `dvc repro` or `adfm folds` does it"
    ]


def check_gpus(gpu_type: str, num_gpus: int) -> None:
    """Raise `AdfmError` for a type of GPU that no device plugin announces, or a negative number of them."""
    if gpu_type not in GPUS and not re.fullmatch(r"nvidia\.com/mig-\d+g\.\d+gb(\.me)?", gpu_type):
        near = difflib.get_close_matches(gpu_type, GPUS, n=1, cutoff=0)[0]
        known = ", ".join([*GPUS, "nvidia.com/mig-…"])
        raise AdfmError(f"unknown GPU type {gpu_type!r}; the nearest is {near}. Known: {known}")
    if num_gpus < 0:
        raise AdfmError(f"num_gpus is {num_gpus}; it has to be 0 or more.")


def fixed_revision(source: str) -> str:
    """Return the revision of a source whose content cannot change; "" for one that may have other content tomorrow."""
    fixed = source.startswith("synthetic://") or re.match(r"dvc://.+@[0-9a-f]{40}:", source)
    return source if fixed else ""


@contextmanager
def raw_data(archive: Path) -> Iterator[Path]:
    """Yield the folder of a packed data set; errors in the data have its name, not that of the temporary folder."""
    from adfm.data import packed
    from adfm.data.problems import BadData

    with packed.opened(archive) as folder:
        try:
            yield folder
        except BadData as error:
            listing = error.listing
            if isinstance(listing, Path) and pod.is_task():  # where the file is lost with the pod
                print(listing.read_text(encoding="utf-8"))
                listing = "the log above"
            raise BadData(Path(folder.name), error.layout, error.problems, listing) from None


def convert(raw: Path, shards: Path, validation: Path, params: Params, parts: Sequence[Path] = ()) -> dict[str, float]:
    """Convert a raw data set and validate the shards, whose report is in MLflow too.

    Args:
        raw: Archive of the data set, as `adfm.data.packed.pack` writes it.
        shards: Folder of shards to write.
        validation: Folder of the report to write.
        params: Reads `seed`, `convert`, `split`, `validation`, `mlflow` and `sft.kinds`.
        parts: Folders of the inspected parts; without any, the images are inspected here.

    Returns:
        Metrics of the validation: how many images it saw, and how many expectations failed.

    Raises:
        AdfmError: As `adfm.data.conversion.convert` and `adfm.validation.validate.require`.
    """
    from adfm.data import conversion
    from adfm.validation.validate import require

    with raw_data(raw) as folder:
        conversion.convert(folder, shards, params, parts)
    require(shards, validation, params)  # in the same task: shards that fail leave no output to train on
    statistics = json.loads((validation / "validation.json").read_text(encoding="utf-8"))["statistics"]
    return {name: float(statistics[name]) for name in ("images", "expectations", "failed", "warnings")}


def wait_for_servers(model: Model) -> None:
    """Wait until MLflow answers and the base model is there, for 2.5 minutes each at most (`retries.again`).

    Raises:
        Unreachable: One of them cannot be reached.
        AdfmError: It refuses, or the model is not what it should be.
    """
    from adfm.models import loading
    from adfm.process import retries

    retries.again(tracking.configure, "MLflow")
    retries.again(lambda: loading.resolve(model.name, model.revision), f"model {model.name}")


def models_to_compare(params: Params, detector: Path, sft: Path, candidate: Path) -> dict[str, str | Path]:
    """Return the models to evaluate a candidate beside: detector, base, cold start, production and anchor, if any."""
    from adfm.evaluation import evaluate
    from adfm.registry.production import in_production

    models: dict[str, str | Path] = {"detector": detector, "base": params.model.name, "sft": sft}
    return models | evaluate.models_to_compare(in_production(params.mlflow.registered_model), candidate)


def last_metrics(curves: Path) -> dict[str, float]:
    """Return the last row of a curves file that training wrote; empty metrics are left out."""
    import pandas as pd

    rows = pd.read_csv(curves)
    return {} if rows.empty else {str(name): float(value) for name, value in rows.iloc[-1].dropna().items()}


def evaluation_metrics(evaluation: Path) -> tuple[dict[str, float], list[str]]:
    """Return `<model>/<metric>` of an evaluation's headlines, and the names of those that the gate judges.

    These are of the candidate's decisions at the threshold where it has one, as the gate takes them.
    """
    metrics = {}
    for file in sorted((evaluation / "metrics").glob("*.json")):
        for metric, value in json.loads(file.read_text(encoding="utf-8")).items():
            metrics[f"{file.stem}/{metric}"] = value
    candidate = json.loads((evaluation / "metrics.json").read_text(encoding="utf-8"))[CANDIDATE]
    suffix = "" if candidate.get("threshold") is None else "_at_threshold"  # as the gate takes the decisions
    first = {f"{CANDIDATE}/{metric}{suffix}": candidate.get(metric + suffix) for metric in _EVALUATION_FIRST}
    return {name: float(value) for name, value in (metrics | first).items() if value is not None}, list(first)


def log_metrics(artifact: Any, title: str, metrics: Mapping[str, float], first: Sequence[str] = ()) -> None:
    """Write metrics into an artifact of KFP, those of `first` with a number before their names; skip NaN and infinity.

    Args:
        artifact: A `dsl.Metrics`.
        title: KFP's name for the artifact on the page.
        metrics: Values by name.
        first: Names of at most nine that come first, in this order; those that `metrics` lacks are left out.
    """
    name_artifacts({title: artifact})
    # NaN and infinity are not JSON, and KFP's launcher fails a task whose output it cannot read, here after training
    # (`getExecutorOutputFile` in backend/src/v2/component/launcher_v2.go).
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    leading = [name for name in first if name in finite]
    # KFP's page sorts metrics by name, ten at a time (frontend/src/components/viewers/PagedTable.tsx).
    for number, name in enumerate(leading, 1):
        artifact.log_metric(f"{number} {name}", finite[name])
    for name in sorted(set(finite) - set(leading)):
        artifact.log_metric(name, finite[name])


def name_artifacts(titles: Mapping[str, Any]) -> None:
    """Give artifacts of KFP names for its pages."""
    # Without it, KFP's launcher takes the name of the output (`RecordArtifact` in backend/src/v2/metadata/client.go).
    for title, artifact in titles.items():
        artifact.metadata["display_name"] = title


def confusion(evaluation: Path) -> tuple[list[str], list[list[int]]]:
    """Return labels, and how many images of each (row) the candidate of an evaluation decided to be each (column)."""
    return _crosstab(evaluation / "plots" / "confusion.csv", "decision", ("normal", "anomalous", "unparseable"))


def kinds(evaluation: Path) -> tuple[list[str], list[list[int]]] | None:
    """Return as `confusion`, for kinds of defects; `None` if the candidate's prompt does not ask for the kind."""
    names, counts = _crosstab(evaluation / "plots" / "kinds.csv", "predicted")
    return (names, counts) if names else None


def _crosstab(file: Path, column: str, labels: Sequence[str] = ()) -> tuple[list[str], list[list[int]]]:
    import pandas as pd

    rows = pd.read_csv(file, dtype=str, keep_default_na=False)  # a kind may be called NA
    names = list(labels) or sorted({*rows["actual"], *rows[column]})
    counts = pd.crosstab(rows["actual"], rows[column]).reindex(index=names, columns=names, fill_value=0)
    return names, counts.to_numpy().tolist()


def roc(evaluation: Path) -> tuple[list[float], list[float], list[float]]:
    """Return the candidate's ROC curve, 200 points at most: false and true positive rates, and thresholds."""
    import numpy as np
    import pandas as pd

    points = pd.read_csv(evaluation / "plots" / "roc.csv", dtype=float)  # empty if only one class was there
    if len(points) > _ROC_POINTS:  # its ends stay
        points = points.iloc[np.linspace(0, len(points) - 1, _ROC_POINTS).astype(int)]
    # The first threshold is infinity, which JSON lacks; no probability reaches 2.
    return points["fpr"].tolist(), points["tpr"].tolist(), points["threshold"].clip(upper=2.0).tolist()


def publish_page(artifact: Any, title: str, page: Path) -> None:
    """Copy a page into an artifact of KFP, a `dsl.HTML`, which the task's visualizations show."""
    name_artifacts({title: artifact})
    Path(artifact.path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(page, artifact.path)


def register(
    model: str, shards: str, evaluation: str, out: str, settings: str, run: str, revision: str, page: str
) -> tuple[str, dict[str, float], str]:
    """Register the model of a run, and write the gate's page: the version, the decision, its reasons and table.

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
        Number of the version; metrics of the decision; `passed` or `failed`.

    Raises:
        AdfmError: As `adfm.registry.registration.register`.
    """
    from adfm.registry import gate, registration

    params = loads(settings)
    tags = {RUN_TAG: run} | ({REVISION_TAG: revision} if revision else {})
    folder = Path(out)
    decision = registration.register(Path(model), Path(shards), Path(evaluation), folder, params, tags)
    about = json.loads((folder / "registration.json").read_text(encoding="utf-8"))
    title = html.escape(f"Version {about['version']} of {about['model']}: gate {about['gate']}")
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in decision.reasons)
    header, *rows = gate.table(json.loads((folder / "gate.json").read_text(encoding="utf-8")))
    table = _row(header, "th") + "".join(_row(row, "td") for row in rows)
    link = version_link(about["model"], about["version"])
    Path(page).parent.mkdir(parents=True, exist_ok=True)
    Path(page).write_text(
        f"<!doctype html><meta charset='utf-8'><title>{title}</title><h1>{title}</h1>"
        f"<ul>{reasons}</ul><table cellpadding='4'>{table}</table><p>{link}</p>\n",
        encoding="utf-8",
    )
    return about["version"], {"version": float(about["version"]), "gate": float(decision.passed)}, about["gate"]


def _row(cells: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag} align=left>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


def version_link(model: str, version: str) -> str:
    """Return a version in MLflow as HTML: its name, and its address where MLflow has pages."""
    # The address is the text of the link, to be copied: KFP's frame for a page opens no other window (`sandbox` in
    # frontend/src/components/viewers/HTMLViewer.tsx), and MLflow refuses to be in a frame.
    name, address = html.escape(f"models:/{model}/{version}"), html.escape(environment.version_page(model, version))
    return f'{name}: <a href="{address}">{address}</a>' if address else name


def promote(version: str, settings: str, by: str, page: str) -> None:
    """Promote a version, and write the history as a page.

    Without a version, accept submissions, then promote what is newly approved, as the approvals service does.

    Raises:
        AdfmError: As `adfm.registry.registration.accept` and `adfm.registry.promotion.promote`.
    """
    from adfm.registry import history, promotion, reconcile, registration

    params = loads(settings)
    try:
        if version:
            promotion.promote(version, params.mlflow.registered_model, by)
            return
        with reconcile.client() as store:
            registration.accept(store, params.mlflow)
        if not promotion.promote_approved(params.mlflow.registered_model, by):
            print(f"no version of {params.mlflow.registered_model} is newly approved; nothing to do")
    finally:
        Path(page).parent.mkdir(parents=True, exist_ok=True)
        steps = html.escape(history.table(promotion.history(params.mlflow.registered_model)))
        Path(page).write_text(f"<!doctype html><meta charset='utf-8'><pre>{steps}</pre>\n", encoding="utf-8")
