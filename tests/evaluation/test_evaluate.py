from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from adfm import tracking
from adfm.data import shards
from adfm.errors import AdfmError
from adfm.evaluation import evaluate, inference, metrics
from adfm.params import Params
from adfm.records import Box

BASE = "embedded://tiny-base"
PARAMS = Params.model_validate({"evaluate": {"batch_size": 24, "max_new_tokens": 40, "bootstrap": 50}})


@pytest.fixture(scope="module")
def evaluated(small_shards: Path, empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model evaluated under two names, once, in a folder of its own."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copy(empty_database, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        evaluate.evaluate({"base": BASE, "again": BASE}, small_shards, folder / "evaluation", PARAMS)
    return folder / "evaluation"


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def test_predictions_are_typed_and_complete(evaluated: Path, small_shards: Path) -> None:
    candidate, base = (pq.read_table(evaluated / f"{name}.parquet") for name in ("predictions", "base"))
    assert candidate.schema.remove_metadata().equals(evaluate.PREDICTIONS)
    assert candidate["id"].to_pylist() == shards.ids(small_shards, "test")
    assert candidate.equals(base)


def test_metrics_are_those_of_the_predictions(evaluated: Path) -> None:
    found = read(evaluated / "metrics.json")
    assert list(found) == ["base", "again", "again_minus_base"]
    table = pd.read_parquet(evaluated / "predictions.parquet")
    expected = metrics.values(table)
    assert {name: found["again"][name] for name in expected} == pytest.approx(expected)
    assert set(found["again_minus_base"].values()) <= {0.0, None}
    assert found["again"].items() >= metrics.operating_point(table, found["again"]["threshold"], 50, 0).items()
    assert read(evaluated / "metrics" / "again.json") == {name: found["again"][name] for name in metrics.HEADLINE}
    details = read(evaluated / "details.json")["base"]
    assert set(details) == {"datasets", "categories", "defects", "sizes"} and len(details["categories"]) == 6


def test_the_threshold_is_chosen_on_validation(evaluated: Path, small_shards: Path) -> None:
    table = pd.read_parquet(evaluated / "validation" / "again.parquet")
    assert table["id"].tolist() == shards.ids(small_shards, "validation")
    at = metrics.threshold(table, PARAMS.evaluate.overkill_limit)
    assert read(evaluated / "metrics.json")["again"]["threshold"] == at
    assert "| overkill at threshold" in (evaluated / "comparison.md").read_text()


def test_what_was_evaluated_is_recorded(evaluated: Path, small_shards: Path) -> None:
    about = read(evaluated / "evaluation.json")
    assert about["candidate"] == "again" and about["models"] == {"base": BASE, "again": BASE}
    assert about["fingerprint"] == shards.fingerprint(small_shards, "test")
    assert about["images"] == len(shards.ids(small_shards, "test"))
    assert about["settings"]["max_new_tokens"] == 40
    attrs = pd.read_parquet(evaluated / "predictions.parquet").attrs
    assert attrs == {"split": "test", "fingerprint": about["fingerprint"], "max_new_tokens": 40}


def test_plots_hold_the_data_of_the_candidate(evaluated: Path) -> None:
    table = pd.read_parquet(evaluated / "predictions.parquet")
    with (evaluated / "plots" / "confusion.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [r["actual"] for r in rows] == table["label"].tolist()
    assert [r["predicted"] for r in rows] == table["predicted"].fillna("unparseable").tolist()
    roc = pd.read_csv(evaluated / "plots" / "roc.csv")
    area = np.trapezoid(roc["tpr"], roc["fpr"])
    assert area == pytest.approx(read(evaluated / "metrics.json")["again"]["auroc"])
    assert roc["threshold"].is_monotonic_decreasing
    sizes = pd.read_csv(evaluated / "plots" / "iou_by_size.csv", index_col="size")
    assert list(sizes) == ["base", "again"]
    assert sizes["again"].to_dict() == {
        size: pytest.approx(found["iou"]) for size, found in read(evaluated / "details.json")["again"]["sizes"].items()
    }
    for name in ("confusion", "iou_by_size", "comparison", "examples"):
        with Image.open(evaluated / "plots" / f"{name}.png") as image:
            assert image.format == "PNG"


def test_the_run_is_in_mlflow(evaluated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(evaluated.parent)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client = tracking.client()
    about = read(evaluated / "evaluation.json")
    run = client.get_run(about["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["candidate"] == "again" and run.data.tags["data_fingerprint"] == about["fingerprint"]
    assert run.data.metrics["again/accuracy"] == read(evaluated / "metrics.json")["again"]["accuracy"]
    assert "again_minus_base/accuracy_low" in run.data.metrics
    logged = {file.path for file in client.list_artifacts(run.info.run_id, "evaluation")}
    assert {
        "evaluation/predictions.parquet",
        "evaluation/comparison.md",
        "evaluation/plots",
        "evaluation/report",
    } <= logged


def test_a_model_that_is_not_there_destroys_nothing(
    evaluated: Path, small_shards: Path, store: Path, tmp_path: Path
) -> None:
    before = (evaluated / "metrics.json").read_bytes()
    with pytest.raises(AdfmError, match="not-there"):
        evaluate.evaluate({"candidate": tmp_path / "not-there"}, small_shards, evaluated, PARAMS)
    assert (evaluated / "metrics.json").read_bytes() == before
    assert not evaluated.with_name("evaluation.partial").exists()


def test_an_interrupted_evaluation_keeps_what_is_finished(
    evaluated: Path, small_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(evaluated.parent)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    out, original = evaluated.with_name("interrupted"), inference.predict_splits

    def interrupted(model: str, folder: Path, params: Params, describe: str, *rest: Any) -> Any:
        if describe == "second":
            raise KeyboardInterrupt
        return original(model, folder, params, describe, *rest)

    models = {"first": BASE, "second": BASE}
    monkeypatch.setattr(inference, "predict_splits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(models, small_shards, out, PARAMS)
    assert not out.exists() and not out.with_name("interrupted.partial").exists()

    def refused(*_: Any) -> Any:
        raise AssertionError("everything is finished")

    monkeypatch.setattr(inference, "predict_splits", original)
    monkeypatch.setattr(inference, "Inspector", refused)
    evaluate.evaluate(models, small_shards, out, PARAMS)
    assert read(out / "metrics.json")["second"] == read(evaluated / "metrics.json")["again"]
    assert not list(out.parent.glob("interrupted*.partial"))


def test_validation_itself_is_not_judged_by_a_threshold_chosen_on_it(
    evaluated: Path, small_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(evaluated.parent)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    params = Params.model_validate({"evaluate": {"split": "validation", "max_new_tokens": 4, "bootstrap": 10}})
    evaluate.evaluate({"base": BASE}, small_shards, evaluated.with_name("validated"), params)
    found = read(evaluated.with_name("validated") / "metrics.json")["base"]
    assert "threshold" not in found and found["images"] == len(shards.ids(small_shards, "validation"))


@pytest.mark.parametrize("name", ["", "a/b", "predictions", "..", "a b"])
def test_names_that_cannot_be_files_are_refused(name: str, small_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(AdfmError, match="cannot name a model"):
        evaluate.evaluate({name: BASE}, small_shards, tmp_path / "out", PARAMS)
    with pytest.raises(AdfmError, match="no model to evaluate"):
        evaluate.evaluate({}, small_shards, tmp_path / "out", PARAMS)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------- the report


def constructed(folder: Path, right: float, seed: int) -> pd.DataFrame:
    """A prediction table of the test shards in which a share `right` of the answers is right."""
    table = shards.table(folder, "test").to_pandas()
    rng = np.random.default_rng(seed)
    anomalous = (table["label"] == "anomalous").to_numpy()
    flagged = (rng.random(len(table)) < right) == anomalous
    rows = []
    for row, said in zip(table.itertuples(), flagged, strict=True):
        truth = [Box(*box) for box in row.boxes]
        boxes = truth if said else []
        found = metrics.localize(truth, boxes, row.width, row.height) if row.label == "anomalous" else {}
        rows.append({"boxes": truth, "predicted_boxes": boxes, "completion": "…", **found})
    known = table[["id", "source", "dataset", "category", "defect", "label"]]
    said = np.where(flagged, "anomalous", "normal")
    return pd.concat([known.assign(predicted=said, score=flagged * 0.8 + 0.1), pd.DataFrame(rows)], axis=1)


def test_the_comparison_shows_models_and_differences(small_shards: Path, tmp_path: Path) -> None:
    tables = {
        name: constructed(small_shards, right, 0) for name, right in (("base", 0.5), ("warmup", 0.7), ("trained", 0.95))
    }
    text = evaluate.report(tables, small_shards, tmp_path, PARAMS)
    header, _, *lines = text.splitlines()
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    assert columns == ["", "base", "warmup", "trained", "trained - warmup", "trained - base"]
    accuracy = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert accuracy[0] == "accuracy"
    values = [float(cell.split()[0]) for cell in accuracy[1:]]
    assert values[3] == pytest.approx(values[2] - values[1], abs=2e-3) and accuracy[4].startswith("+")
    assert values[4] == pytest.approx(values[2] - values[0], abs=2e-3)
    assert len({len(line) for line in text.splitlines()}) == 1
    assert text in (tmp_path / "comparison.md").read_text()
    rows = pd.read_csv(tmp_path / "comparison.csv")
    assert len(rows) == len(metrics.HEADLINE) * 5
    assert ((rows["low"] <= rows["value"]) & (rows["value"] <= rows["high"])).all()


def test_the_comparison_shows_each_model_at_its_threshold(small_shards: Path, tmp_path: Path) -> None:
    tables = {name: constructed(small_shards, right, 0) for name, right in (("base", 0.5), ("trained", 0.95))}
    tables["mute"] = tables["base"].assign(predicted=None, score=np.nan)
    tables = {"mute": tables["mute"], "base": tables["base"], "trained": tables["trained"]}
    text = evaluate.report(tables, small_shards, tmp_path, PARAMS, validation=tables)
    *_, threshold, overkill, miss_rate = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
    )
    assert threshold[0] == "threshold" and threshold[1] == threshold[4] == threshold[5] == "-"
    found = read(tmp_path / "metrics.json")
    assert float(threshold[3]) == found["trained"]["threshold"] == pytest.approx(0.1)
    assert miss_rate[1] == "-" and miss_rate[5] == "-" and miss_rate[4].startswith("-0.")
    for name, title in (("base", overkill[2]), ("trained", overkill[3])):
        assert title.startswith(f"{found[name]['overkill_at_threshold']:.3f} [")
    rows = pd.read_csv(tmp_path / "comparison.csv").set_index(["metric", "model"])
    assert rows.loc[("overkill_at_threshold", "trained"), "high"] <= 1
