"""Cross-validation with real trainings of one step each."""

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from adfm.data import shards as shards_
from adfm.errors import AdfmError
from adfm.evaluation import crossvalidation, evaluate
from adfm.evaluation.calibration import DECIDED
from adfm.params import Params, load
from adfm.training import folds, launch
from adfm.training.grpo import train
from adfm.training.sft import sft
from tests.small import SMALL

ONE_STEP = [*SMALL, "sft.steps=1", "train.steps=1", "train.pictures_every=0", "evaluate.folds=2"]


@pytest.fixture(scope="module")
def few_shards(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 images of two categories."""
    folder = tmp_path_factory.mktemp("few") / "shards"
    folder.mkdir()
    shutil.copy2(small_shards / "conversion.json", folder)
    of = defaultdict(list)
    for record in shards_.read(small_shards):
        if record.category in ("gear", "leather"):
            of[record.category, record.label].append(record)
    records = [record for some in of.values() for record in (*some[:2], *some[-3:])]  # of train and of test
    shards_.write(records, folder, shard_images=1000)
    return folder


def test_without_folds_nothing_is_done(few_shards: Path, tmp_path: Path) -> None:
    folds.cross_validate(few_shards, tmp_path / "out", Params())
    assert [file.name for file in (tmp_path / "out").iterdir()] == [crossvalidation.FILE]
    assert crossvalidation.read(tmp_path / "out", few_shards) is None


@pytest.mark.timeout(600)
def test_every_image_is_evaluated_once_and_the_evaluation_shows_it(
    few_shards: Path, small_shards: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = load(None, ONE_STEP)
    trained = []

    def in_this_process(shards: Path, model: Path, out: Path, params: Params, gpus: int) -> None:
        train(shards, model, out, params)
        trained.append(out.parent.name)

    # `launch` does the same in processes of their own, each of which takes seconds to start.
    monkeypatch.setattr(launch, "cold_start", sft)
    monkeypatch.setattr(launch, "on_gpus", in_this_process)
    with pytest.raises(KeyboardInterrupt):
        _interrupted(few_shards, store / "folds", params, monkeypatch)
    folds.cross_validate(few_shards, store / "folds", params)
    assert trained == ["1", "2"]  # the training that was finished is used

    table = pq.read_table(store / "folds" / crossvalidation.PREDICTIONS)
    assert sorted(table["id"].to_pylist()) == sorted(shards_.ids(few_shards))
    assert set(table["fold"].to_pylist()) == {1, 2} and set(DECIDED.names) < set(table.column_names)
    results = json.loads((store / "folds" / crossvalidation.FILE).read_text())
    assert [fold["test"] for fold in results["folds"]] == [10, 10] and results["images"] == 20
    assert not (store / "folds.partial").exists() and not (store / "folds" / "work").exists()
    errors = results["metrics"]["miss_rate"]
    assert errors["low"] <= errors["value"] <= errors["high"]

    evaluate.evaluate({"trained": "embedded://tiny-base"}, few_shards, store / "evaluation", params, store / "folds")
    text = (store / "evaluation" / "comparison.md").read_text()
    assert "## Cross-validation" in text and "Cross-validation: 20 images" in text
    assert len(pd.read_parquet(store / "evaluation" / crossvalidation.PREDICTIONS)) == 20
    assert "each judged once by one of 2 models" in (store / "evaluation" / "report" / "report.html").read_text()
    with pytest.raises(AdfmError, match="is of other data than"):
        crossvalidation.read(store / "folds", small_shards)


def _interrupted(shards: Path, out: Path, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cross-validation that is interrupted before its second training."""
    real = launch.on_gpus

    def once(*arguments: Any, **more: Any) -> None:
        if arguments[2].parent.name == "2":
            raise KeyboardInterrupt
        real(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(launch, "on_gpus", once)
        folds.cross_validate(shards, out, params)
