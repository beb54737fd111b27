"""Validate shards before anything is trained on them: `adfm validate SHARDS`."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from adfm import tracking
from adfm.data import folds, shards, tiles
from adfm.errors import AdfmError
from adfm.files import atomic_folder, write_json
from adfm.params import Params
from adfm.process import retries
from adfm.records import SPLITS, Label
from adfm.validation import drift, facts, page, suite

if TYPE_CHECKING:
    import pandas as pd


def validate(folder: Path, out: Path, params: Params) -> bool:
    """Validate shards, write the report, and log it as a run in MLflow, whether they pass or not.

    Args:
        folder: The shards.
        out: Folder of the report, as `judge` writes it; the artifact `validation` of the run.
        params: As of `judge`, and `mlflow`.

    Returns:
        Whether every critical expectation holds.

    Raises:
        AdfmError: As of `judge`; `validation.reference` is neither `production` nor a report.
    """
    reference, reachable = params.validation.reference, True
    try:
        retries.again(tracking.configure, "MLflow")
    except AdfmError as error:  # a warning alone: shards are validated without MLflow too
        reachable = False
        print(f"adfm: warning: the validation is not logged, nor compared with production: {error}", file=sys.stderr)
    before = None
    if reference == "production":
        before = drift.of_production(params.mlflow.registered_model) if reachable else None
    elif reference is not None:
        before = drift.of_file(Path(reference))
    passed = judge(folder, out, params, before)
    if reachable:
        _log(folder, out, params, passed)
    return passed


def require(folder: Path, out: Path, params: Params) -> None:
    """Validate shards and print what failed; offer cross-validation to a small set.

    Raises:
        AdfmError: As of `validate`; the shards are not fit to train on, or cannot be divided into `evaluate.folds`.
    """
    fit = validate(folder, out, params)
    verdict = f"{folder} is {'fit' if fit else 'not fit'} to train on; the report is {out / 'index.html'}"
    lines = "\n  ".join([verdict + ":" * (not fit), *failures(out)])
    if not fit:
        raise AdfmError(lines)
    print(lines)
    if params.evaluate.folds:
        folds.assign(folder, params)  # before anything is trained
    elif offer := folds.offer(folder):
        print(f"note: {offer}.")


def judge(folder: Path, out: Path, params: Params, before: Mapping[str, Any] | None = None) -> bool:
    """Validate shards and write the report, whether they pass or not.

    `out` holds `validation.json`, with `passed`, `statistics` and the `expectations` as of `suite.entries`, and
    `index.html`, Great Expectations' Data Docs with pictures of what failed, a page that needs no network.

    Args:
        folder: The shards.
        out: Folder of the report.
        params: The section `validation`; `convert`, `split` and `sft.kinds` say what is expected of boxes, splits and
            kinds of defects, `model` and `tile` at which size defects are seen.
        before: The `statistics` of the report that drift is measured from; `None`: it is not.

    Returns:
        Whether every critical expectation holds.

    Raises:
        AdfmError: There are no shards, they have other columns, or one cannot be read.
    """
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # Great Expectations reads it when it is imported
    table = facts.measure(folder, params.convert)
    train = drift.profile(table[table["split"] == "train"])
    expectations = suite.expectations(table, tiles.defects_of(folder), params)
    if before is not None:
        expectations += drift.expectations(table, train, before["train"], params.validation)
    result, failing = suite.run(table, expectations)
    entries = suite.entries(expectations, result)
    passed = all(entry["success"] for entry in entries if entry["severity"] == "critical")
    statistics = _statistics(table, entries) | {"train": train}
    figures = page.figures(folder, table, failing)
    with atomic_folder(out) as unfinished:
        report = {"passed": passed, "statistics": statistics, "expectations": entries}
        write_json(report, unfinished / "validation.json")
        (unfinished / "index.html").write_text(page.page(result, entries, figures), encoding="utf-8")
    return passed


def failures(out: Path) -> list[str]:
    """Return one line for each expectation that failed, the critical ones first: what, how many, which, what to do."""
    entries = json.loads((out / "validation.json").read_text(encoding="utf-8"))["expectations"]
    return [page.line(entry) for entry in page.failed(entries)]


def _log(folder: Path, out: Path, params: Params, passed: bool) -> None:
    """Log the report as a run; `drift.of_production` finds it by its tag `validated`."""
    import mlflow

    tags = {"validated": shards.fingerprint(folder)} if passed else {}
    statistics = json.loads((out / "validation.json").read_text(encoding="utf-8"))["statistics"]
    try:
        with tracking.start_run("validate", params, tags):
            mlflow.log_metrics({f"validation/{name}": statistics[name] for name in ("images", "failed", "warnings")})
            mlflow.log_artifacts(str(out), "validation")
    except AdfmError as error:
        print(f"adfm: warning: the validation is not logged: {error}", file=sys.stderr)


def _statistics(table: "pd.DataFrame", entries: list[dict[str, Any]]) -> dict[str, Any]:
    failed = [entry["severity"] for entry in entries if not entry["success"]]
    counts = table.groupby(["split", "label"]).size()
    return {
        "images": len(table),
        "splits": {split: {label: int(counts.get((split, label), 0)) for label in get_args(Label)} for split in SPLITS},
        "categories": int(table["product"].nunique()),
        "expectations": len(entries),
        "failed": failed.count("critical"),
        "warnings": failed.count("warning"),
    }
