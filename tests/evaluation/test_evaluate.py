from __future__ import annotations

import csv
import html
import json
import re
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
from adfm.evaluation import calibration, evaluate, metrics, plots, predictions, references
from adfm.method import response
from adfm.models import predictor
from adfm.params import Params
from adfm.records import Box

BASE = "embedded://tiny-base"
PARAMS = Params.model_validate({"evaluate": {"batch_size": 24, "max_new_tokens": 96, "bootstrap": 50}})


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
    assert candidate.schema.remove_metadata().equals(calibration.DECIDED)
    assert candidate["id"].to_pylist() == shards.ids(small_shards, "test")
    assert candidate.equals(base)


def test_metrics_are_those_of_the_predictions(evaluated: Path) -> None:
    measured = read(evaluated / "metrics.json")
    assert list(measured) == ["base", "again", "always_A", "always_B", "again_minus_base"]
    assert [measured[f"always_{letter}"]["recall"] for letter in "AB"] == [1, 0]
    table = pd.read_parquet(evaluated / "predictions.parquet")
    expected = metrics.values(table)
    assert {name: measured["again"][name] for name in expected} == pytest.approx(expected)
    change = measured["again_minus_base"]
    assert {value for name, value in change.items() if not name.endswith(("_low", "_high"))} <= {0.0, None}
    assert change["accuracy_low"] == -change["accuracy_high"] < 0
    assert measured["again"].items() >= metrics.operating_point(table, measured["again"]["threshold"], 50, 0).items()
    assert read(evaluated / "metrics" / "again.json") == {name: measured["again"][name] for name in metrics.HEADLINE}
    details = read(evaluated / "details.json")["base"]
    assert set(details) == {"datasets", "categories", "defects", "sizes"} and len(details["categories"]) == 6


def test_the_verdict_in_words_is_written_once_and_comes_first(evaluated: Path) -> None:
    summary = read(evaluated / references.FILE)["summary"]
    assert summary["model"].startswith("again is the embedded model (") and summary["model"].endswith("not trained.")
    assert re.match(r"again is .* a blind answer: balanced accuracy by score 0\.\d{3} \[", summary["comparison"][0])
    assert 1 <= len(summary["steps"]) <= 2
    lines = references.read(evaluated)["lines"]
    assert lines == [summary["model"], *summary["comparison"], *(f"Next: {step['text']}" for step in summary["steps"])]
    paragraphs = (evaluated / "comparison.md").read_text().split("\n\n")
    assert [html.unescape(text) for text in paragraphs[: len(lines)]] == lines
    assert re.match(r"\| +\| base +\| again +\| always A +\| always B +\|\n", paragraphs[len(lines)])
    page = (evaluated / "report" / "report.html").read_text()
    assert json.dumps(summary["model"]) in page


def test_the_threshold_is_chosen_on_validation(evaluated: Path, small_shards: Path) -> None:
    table = pd.read_parquet(evaluated / "validation" / "again.parquet")
    assert table["id"].tolist() == shards.ids(small_shards, "validation")
    fitted = calibration.read(evaluated / "calibration.json")
    assert fitted == calibration.fit(table, PARAMS.evaluate, data=shards.fingerprint(small_shards, "validation"))
    assert calibration.read(evaluated / "calibration" / "base.json") == fitted
    assert fitted.threshold is not None and read(evaluated / "metrics.json")["again"]["threshold"] == fitted.threshold
    text = (evaluated / "comparison.md").read_text()
    assert "| overkill at threshold" in text and f"again: {fitted.summary}" in text
    for file in ("predictions.parquet", "base.parquet", "validation/again.parquet"):
        table = pd.read_parquet(evaluated / file)
        pd.testing.assert_frame_equal(fitted.apply(table), table)


def test_regions_are_named_whatever_the_letter(evaluated: Path) -> None:
    table = pd.read_parquet(evaluated / "predictions.parquet")
    counts = [len(response.parse(words).boxes) for words in table["completion"]]
    assert [len(regions) for regions in table["regions"]] == counts and sum(counts) > 0
    marked = table["predicted"] == "anomalous"
    assert [len(boxes) for boxes in table["predicted_boxes"]] == (marked * counts).tolist()
    both = marked & (table["label"] == "anomalous")
    assert table["region_iou"][both].tolist() == table["iou"][both].tolist()


def test_what_was_evaluated_is_recorded(evaluated: Path, small_shards: Path) -> None:
    about = read(evaluated / "evaluation.json")
    assert about["candidate"] == "again" and about["models"] == {"base": BASE, "again": BASE}
    assert about["fingerprint"] == shards.fingerprint(small_shards, "test")
    assert about["images"] == len(shards.ids(small_shards, "test"))
    assert about["settings"]["max_new_tokens"] == 96
    attrs = pd.read_parquet(evaluated / "predictions.parquet").attrs
    threshold = calibration.read(evaluated / "calibration.json").threshold
    how = {"split": "test", "fingerprint": about["fingerprint"], "max_new_tokens": 96, "threshold": threshold}
    assert attrs == how


def test_plots_hold_the_data_of_the_candidate(evaluated: Path) -> None:
    table = pd.read_parquet(evaluated / "predictions.parquet")
    with (evaluated / "plots" / "confusion.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [r["actual"] for r in rows] == table["label"].tolist()
    assert [r["predicted"] for r in rows] == table["predicted"].fillna("unparseable").tolist()
    assert [r["decision"] for r in rows] == table["decision"].fillna("unparseable").tolist()
    assert (evaluated / "plots" / "kinds.csv").read_text() == "actual,predicted\n"  # the model names none
    points = pd.read_csv(evaluated / "plots" / "reliability.csv")
    assert points["images"].sum() == table["probability"].notna().sum()
    assert points["probability"].is_monotonic_increasing and points["defective"].between(0, 1).all()
    roc = pd.read_csv(evaluated / "plots" / "roc.csv")
    area = np.trapezoid(roc["tpr"], roc["fpr"])
    assert area == pytest.approx(read(evaluated / "metrics.json")["again"]["auroc"])
    assert roc["threshold"].is_monotonic_decreasing
    sizes = pd.read_csv(evaluated / "plots" / "iou_by_size.csv", index_col="size")
    assert list(sizes) == ["base", "again"]
    assert sizes["again"].to_dict() == {
        size: pytest.approx(measured["iou"])
        for size, measured in read(evaluated / "details.json")["again"]["sizes"].items()
    }
    for name in ("confusion", "reliability", "iou_by_size", "comparison", "examples"):
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
    # What models have in common is logged once, and a part of metrics.json is not logged beside it.
    assert "again/images" in run.data.metrics and "base/images" not in run.data.metrics
    assert not any(name.startswith("always_") for name in run.data.metrics)
    logged = {file.path for file in client.list_artifacts(run.info.run_id, "evaluation")}
    assert {
        "evaluation/predictions.parquet",
        "evaluation/comparison.md",
        "evaluation/plots",
        "evaluation/report",
    } <= logged
    assert "evaluation/metrics.json" in logged and "evaluation/metrics" not in logged


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
    out, original = evaluated.with_name("interrupted"), predictions.predict_splits

    def interrupted(model: str, folder: Path, params: Params, describe: str, *rest: Any) -> Any:
        if describe == "second":
            raise KeyboardInterrupt
        return original(model, folder, params, describe, *rest)

    models = {"first": BASE, "second": BASE}
    monkeypatch.setattr(predictions, "predict_splits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(models, small_shards, out, PARAMS)
    assert not out.exists() and not out.with_name("interrupted.partial").exists()

    def refused(*_: Any) -> Any:
        raise AssertionError("everything is finished")

    monkeypatch.setattr(predictions, "predict_splits", original)
    monkeypatch.setattr(predictor, "Predictor", refused)
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
    measured = read(evaluated.with_name("validated") / "metrics.json")["base"]
    assert "threshold" not in measured and measured["images"] == len(shards.ids(small_shards, "validation"))
    table = pd.read_parquet(evaluated.with_name("validated") / "predictions.parquet")
    assert table["decision"].equals(table["predicted"]) and table.attrs["threshold"] is None
    assert (
        "base: The letter decides: the validation split, on which a threshold is chosen, is evaluated itself."
        in (evaluated.with_name("validated") / "comparison.md").read_text()
    )


@pytest.mark.parametrize("name", ["", "a/b", "predictions", "..", "a b"])
def test_names_that_cannot_be_files_are_refused(name: str, small_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(AdfmError, match="cannot name a model"):
        evaluate.evaluate({name: BASE}, small_shards, tmp_path / "out", PARAMS)
    with pytest.raises(AdfmError, match="No model to evaluate"):
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
    for row, flag in zip(table.itertuples(), flagged, strict=True):
        truth = [Box(*box) for box in row.boxes]
        boxes = truth if flag else []
        measured = metrics.localize(truth, boxes, row.width, row.height) if row.label == "anomalous" else {}
        measured |= {f"region_{name}": measured[name] for name in metrics.COMPARED} if measured else {}
        measured["regions"] = boxes
        rows.append({"boxes": truth, "predicted_boxes": boxes, "completion": "…", **measured})
    known = table[["id", "source", "dataset", "category", "defect", "label"]]
    letters = np.where(flagged, "anomalous", "normal")
    return pd.concat([known.assign(predicted=letters, score=flagged * 0.8 + 0.1), pd.DataFrame(rows)], axis=1)


def cells(table: str) -> dict[str, list[str]]:
    """The rows of an aligned Markdown table that fits a terminal, by title."""
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= 100
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|--")]
    return {title: row for title, *row in rows}


def test_the_comparison_shows_models_and_differences(small_shards: Path, tmp_path: Path) -> None:
    tables = {
        name: constructed(small_shards, right, 0) for name, right in (("base", 0.5), ("sft", 0.7), ("trained", 0.95))
    }
    letters = calibration.Calibration(note="no validation")
    tables = {name: letters.apply(table) for name, table in tables.items()}
    comparison = evaluate.report(tables, small_shards, tmp_path, PARAMS, dict.fromkeys(tables, letters))
    everyone, first, second, more, *_ = comparison.written
    assert comparison.printed == [everyone, first, more]
    assert more.startswith("More test images: the recall of ") and "normal images; four times" in more
    values, gained, further = map(cells, (everyone, first, second))
    assert values[""] == ["base", "sft", "trained", "always A", "always B"]
    assert [*values][1:4] == ["escape rate", "overkill", "accuracy"]
    assert values["balanced accuracy"][3:] == ["0.500", "0.500"] and values["escape rate"][3:] == ["-", "-"]
    assert gained["95 % intervals"] == ["trained", "trained - sft"]
    assert further["95 % intervals"] == ["trained - base"]
    base, sft, trained = map(float, values["accuracy"][:3])
    for cell, other in ((gained["accuracy"][1], sft), (further["accuracy"][0], base)):
        assert float(cell.split()[0]) == pytest.approx(trained - other, abs=2e-3) and cell.startswith("+")
    rows = pd.read_csv(tmp_path / "comparison.csv")
    assert len(rows) == (len(plots.ESCAPES_FIRST) + 2) * 5
    assert "trained: The letter decides: no validation." in comparison.written
    assert ((rows["low"] <= rows["value"]) & (rows["value"] <= rows["high"])).all()


def test_the_comparison_shows_each_model_at_its_threshold(small_shards: Path, tmp_path: Path) -> None:
    tables = {name: constructed(small_shards, right, 0) for name, right in (("base", 0.5), ("trained", 0.95))}
    tables["mute"] = tables["base"].assign(predicted=None, score=np.nan)
    tables = {"mute": tables["mute"], "base": tables["base"], "trained": tables["trained"]}
    fitted = {name: calibration.fit(table, PARAMS.evaluate) for name, table in tables.items()}
    tables = {name: fitted[name].apply(table) for name, table in tables.items()}
    comparison = evaluate.report(tables, small_shards, tmp_path, PARAMS, fitted)
    values, first, second = map(cells, comparison.written[:3])
    measured = read(tmp_path / "metrics.json")
    thresholds = [f"{fitted[name].threshold:.3f}" for name in ("base", "trained")]
    assert values["threshold"] == ["-", *thresholds, "-", "-"] and first["threshold"] == [thresholds[1], "-"]
    assert any(note.startswith("mute: The letter decides: ") for note in comparison.written)
    assert values["escape rate at threshold"][0] == "-" and first["escape rate at threshold"][1].startswith("-0.")
    assert "escape rate at threshold" not in second  # of a model without a threshold
    expected = measured["trained"]["overkill_at_threshold"]
    assert first["overkill at threshold"][0].startswith(f"{expected:.3f} [")
    rows = pd.read_csv(tmp_path / "comparison.csv").set_index(["metric", "model"])
    assert rows.loc[("overkill_at_threshold", "trained"), "high"] <= 1


def test_a_comparison_of_many_models_fits_a_terminal(small_shards: Path, tmp_path: Path) -> None:
    letters = calibration.Calibration(note="no validation")
    names = ("detector", "base", "sft", "production", "anchor", "a-model-with-a-name-of-its-own", "trained")
    table = letters.apply(constructed(small_shards, 0.8, 0))
    comparison = evaluate.report(
        dict.fromkeys(names, table), small_shards, tmp_path, PARAMS, dict.fromkeys(names, letters)
    )
    tables = [cells(part) for part in comparison.written if part.startswith("|")]
    heads = [name for rows in tables for name in next(iter(rows.values()))]
    others = ("production", "a-model-with-a-name-of-its-own", "anchor", "sft", "base", "detector")
    differences = [f"trained - {name}" for name in others]
    assert heads == [*names, "always A", "always B", "trained", *differences]
    command = "`adfm gate --plan data/shards`"
    lines = evaluate._folded("\n\n".join([*comparison.printed, "a " * 80 + command])).splitlines()
    assert max(map(len, lines)) <= 100 and any(command in line for line in lines)


def test_the_sentence_says_whether_the_reference_detector_is_better(small_shards: Path, tmp_path: Path) -> None:
    letters = calibration.Calibration(note="no validation")
    for better, start in (
        ("detector", "The reference detector is better on this data: balanced accuracy "),
        ("trained", "trained is better than the reference detector on this data: balanced accuracy "),
        ("", "trained and the reference detector cannot be told apart on this data: balanced accuracy "),
    ):
        tables = {
            name: letters.apply(constructed(small_shards, 1.0 if name == better else 0.5, 0))
            for name in ("detector", "trained")
        }
        (folder := tmp_path / f"better {better}").mkdir()
        reference = references.Reference("detector", "models/detector")
        fitted = dict.fromkeys(tables, letters)
        compared = evaluate.report(tables, small_shards, folder, PARAMS, fitted, tables, reference).compared
        assert compared["sentence"].startswith(start)
        assert compared["verdict"] == {"trained": "candidate", "": "open"}.get(better, better)


def test_labels_alone_are_evaluated_without_iou(
    label_shards: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.evaluate({"base": BASE}, label_shards, store / "out", PARAMS)
    measured = read(store / "out" / "metrics.json")["base"]
    assert measured["iou"] is None and measured["box_f1"] is None and measured["accuracy"] is not None
    assert measured["without_boxes"] == measured["anomalous"] > 0
    words = f"{measured['anomalous']} anomalous images have no boxes; they are left out of IoU and box F1."
    assert words in capsys.readouterr().out and words in (store / "out" / "comparison.md").read_text()
    assert re.search(rf'"without_boxes": ?{measured["anomalous"]}\b', (store / "out/report/report.html").read_text())
