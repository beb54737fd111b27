"""Cross-validation with real trainings of one step each."""

import json
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from adfm import folds
from adfm.data import shards as shards_
from adfm.evaluation import crossvalidation, evaluate
from adfm.evaluation.calibration import DECIDED
from adfm.params import load
from adfm.training import launch
from tests.small import SMALL

ONE_STEP = [*SMALL, "warmup.steps=1", "train.steps=1", "model.max_pixels=4096", "evaluate.folds=2"]


def test_without_folds_nothing_is_done(small_shards: Path, tmp_path: Path) -> None:
    folds.cross_validate(small_shards, tmp_path / "out", load(None, ["evaluate.folds=0"]))
    assert [file.name for file in (tmp_path / "out").iterdir()] == [crossvalidation.FILE]
    assert crossvalidation.read(tmp_path / "out", small_shards) is None


@pytest.mark.timeout(600)
def test_every_image_is_judged_once_and_the_evaluation_shows_it(
    small_shards: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    params = load(None, ONE_STEP)
    real = launch.on_gpus

    def interrupted(shards: Path, model: Path, out: Path, *others: object, **more: object) -> None:
        if out.parent.name == "2":
            raise KeyboardInterrupt
        real(shards, model, out, *others, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(launch, "on_gpus", interrupted)
    with pytest.raises(KeyboardInterrupt):
        folds.cross_validate(small_shards, store / "folds", params)
    monkeypatch.setattr(launch, "on_gpus", real)
    first = store / "folds.partial" / "work" / "1" / "trained" / "adfm.json"
    before = first.stat().st_mtime_ns
    trained: list[str] = []
    monkeypatch.setattr(
        launch,
        "on_gpus",
        lambda *arguments, **more: trained.append(arguments[2].parent.name) or real(*arguments, **more),
    )
    folds.cross_validate(small_shards, store / "folds", params)
    assert before and trained == ["2"]  # the training that was finished is used

    table = pq.read_table(store / "folds" / crossvalidation.PREDICTIONS)
    assert sorted(table["id"].to_pylist()) == sorted(shards_.ids(small_shards))
    assert set(table["fold"].to_pylist()) == {1, 2} and set(DECIDED.names) < set(table.column_names)
    found = json.loads((store / "folds" / crossvalidation.FILE).read_text())
    assert [fold["test"] for fold in found["folds"]] == table.to_pandas()["fold"].value_counts().sort_index().tolist()
    assert not (store / "folds.partial").exists() and not (store / "folds" / "work").exists()
    recall = found["metrics"]["miss_rate"]
    assert recall["low"] <= recall["value"] <= recall["high"]

    capsys.readouterr()
    model = {"trained": "embedded://tiny-base"}
    evaluate.evaluate(model, small_shards, store / "evaluation", params, store / "folds")
    text = (store / "evaluation" / "comparison.md").read_text()
    assert "## Cross-validation" in text and "20 images" in text and "## Cross-validation" in capsys.readouterr().out
    assert pd.read_parquet(store / "evaluation" / crossvalidation.PREDICTIONS).shape[0] == 20
    page = (store / "evaluation" / "report" / "report.html").read_text()
    assert "each judged once by one of 2 models" in page
