"""The whole path on a data set whose images are all defective, with a model that names the kinds of defects."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from adfm.data import shards as shards_
from adfm.errors import AdfmError
from adfm.evaluation import calibration, evaluate, metrics, predictions, verdict
from adfm.method import kinds as kinds_
from adfm.method.terms import Terms
from adfm.models import model_folder, predictor
from adfm.params import Params
from adfm.training import grpo, sft

BASE = "embedded://tiny-base"


@pytest.fixture(scope="session")
def defects(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("defects") / "shards"
    folder.mkdir()
    records = (record for record in shards_.read(small_shards) if record.label == "anomalous")
    shards_.write(records, folder, shard_images=1000)
    return folder


def test_defects_alone_are_told_apart(defects: Path, tmp_path: Path, params: Params) -> None:
    values = params.model_dump(by_alias=True)
    values["sft"] |= {"kinds": True}
    values["train"] |= {"steps": 1, "pictures_every": 0, "dynamic_sampling": 1}
    values["evaluate"] |= {"bootstrap": 10}
    params = Params.model_validate(values)
    sft.sft(defects, tmp_path / "sft", params)
    grpo.train(defects, tmp_path / "sft", tmp_path / "trained", params)
    known = kinds_.listed(shards_.table(defects, "train")["defect"].to_pylist())
    for model in ("sft", "trained"):
        assert model_folder.kinds_of(tmp_path / model) == known
        text = json.loads((tmp_path / model / "adfm.json").read_text())["prompt"][0]["content"]
        assert tuple(text.split('"')[1::2]) == known
        assert verdict.kind_of(tmp_path / model, params.model).cut == params.sft.steps  # less than one pass
    [curves] = csv.DictReader((tmp_path / "trained" / "reward_curves.csv").read_text().splitlines())
    assert {"rewards/kind/mean", "utilisation/kind"} <= curves.keys()
    weights = params.train.weights
    total = sum(getattr(weights, name) * float(curves[f"rewards/{name}/mean"]) for name in (*Terms._fields, "kind"))
    assert float(curves["reward"]) == pytest.approx(total, abs=1e-4)

    out = tmp_path / "evaluation"
    evaluate.evaluate({"base": BASE, "trained": tmp_path / "trained"}, defects, out, params)
    results = json.loads((out / "metrics.json").read_text(), parse_constant=pytest.fail)
    for of in results.values():
        assert {of[name] for name in metrics.BOTH_LABELS} == {None}
    assert results["trained"]["kind_right"] is not None and "kind_right" not in results["base"]
    table = pd.read_parquet(out / "predictions.parquet")
    assert table["kind"].tolist() == table["defect"].tolist()
    assert pq.read_schema(out / "base.parquet").names == calibration.DECIDED.names
    rows = list(csv.DictReader((out / "plots" / "kinds.csv").read_text().splitlines()))
    assert [row["actual"] for row in rows] == table["kind"].tolist()
    text = (out / "comparison.md").read_text()
    assert "| kind right" in text and metrics.NO_NORMAL_IMAGE in text and "nan" not in text
    assert "no normal image to choose a threshold on" in text
    page = (out / "report" / "report.html").read_text()
    assert '"kinds":{"trained":' in page and metrics.NO_NORMAL_IMAGE in page


def test_without_kinds_defects_alone_are_refused(defects: Path, tmp_path: Path, params: Params) -> None:
    with pytest.raises(AdfmError, match=r"no normal image.*sft\.kinds"):
        sft.sft(defects, tmp_path / "sft", params)


def test_a_model_without_kinds_has_no_column_of_them(small_shards: Path) -> None:
    inspector = predictor.Predictor(BASE, Params())
    assert inspector.kinds == ()
    assert {field.name for field in predictions.KINDS}.isdisjoint(predictions.PREDICTIONS.names)


@pytest.mark.parametrize(("trained_on", "expected"), [([], ()), (["dent"], ()), (["dent", "spot"], ("dent", "spot"))])
def test_a_model_of_one_kind_names_none(trained_on: list[str], expected: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "adfm.json").write_text(json.dumps({"stage": "detector", "kinds": trained_on}))
    assert model_folder.kinds_of(tmp_path) == expected
