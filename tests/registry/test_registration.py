from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from mlflow import MlflowClient

from adfm import files, tracking
from adfm.data import shards as shards_
from adfm.errors import AdfmError
from adfm.evaluation import calibration
from adfm.evaluation.calibration import Calibration
from adfm.params import Params
from adfm.registry import registration
from adfm.registry.promotion import promote
from adfm.registry.registration import register

PARAMS = Params.model_validate({"gate": {"bootstrap": 200, "min_images": 20}})


def versions(name: str = "adfm") -> list[Any]:
    return sorted(tracking.client().search_model_versions(f"name = '{name}'"), key=lambda v: int(v.version))


def put_into_production(version: str) -> None:
    """Moves the alias as a person would in MLflow's own pages."""
    tracking.client().set_registered_model_alias("adfm", "production", version)


@pytest.fixture
def shards(make_shards, tmp_path):
    return make_shards(tmp_path / "shards")


@pytest.fixture
def registered(store, shards, make_model, make_evaluation, tmp_path):
    """Registers a model that judges 30 of 40 images rightly."""
    model = make_model(tmp_path / "first", 1.0, shards)
    evaluation = make_evaluation(tmp_path / "evaluation-first", shards, 30)
    return model, evaluation, register(model, shards, evaluation, tmp_path / "registration-first", PARAMS)


def test_first_version_carries_everything(store, shards, make_model, make_evaluation, tmp_path, capsys):
    with tracking.start_run("train", PARAMS, {"git_commit": "c0ffee", "git_dirty": "true"}) as training:
        pass
    model = make_model(tmp_path / "model", 1.0, shards, training.info.run_id)
    evaluation = make_evaluation(tmp_path / "evaluation", shards, 36)
    decision = register(model, shards, evaluation, tmp_path / "out", PARAMS)
    assert decision.passed
    assert decision.metrics["accuracy"]["candidate"] == 0.9
    assert capsys.readouterr().out.startswith("version 1 of adfm: gate passed\n  - Accuracy")

    [version] = versions()
    assert version.run_id == training.info.run_id
    assert version.tags["gate"] == "passed"
    assert version.tags["approval"] == "pending"
    assert version.tags["gate_production_version"] == "none"
    assert version.tags["artifact_digest"] == files.digest(model)
    assert version.tags["data_fingerprint"] == shards_.fingerprint(shards)
    assert version.tags["test_fingerprint"] == shards_.fingerprint(shards, "test")
    assert version.tags["git_commit"] == "c0ffee"
    assert version.tags["base_model"] == "embedded://tiny-base"
    assert "base_revision" not in version.tags
    assert version.tags["accuracy"] == "0.9000"

    carried = registration.download(version, "", tmp_path / "carried")
    for folder, source in (("model", model), ("evaluation", evaluation)):
        assert files.digest(carried / folder) == files.digest(source)
    assert yaml.safe_load((carried / "params.yaml").read_text()) == PARAMS.model_dump(mode="json", by_alias=True)
    assert json.loads((carried / "lineage.json").read_text())["git_commit"] == "c0ffee"
    gate = json.loads((carried / "gate.json").read_text())
    assert gate == json.loads((tmp_path / "out" / "gate.json").read_text())
    assert yaml.safe_load((carried / "MLmodel").read_text())["flavors"]["python_function"]["loader_module"] == (
        "adfm.registry.serving"
    )
    assert gate["passed"] is True and gate["production_version"] is None and gate["reasons"] == decision.reasons

    out = json.loads((tmp_path / "out" / "registration.json").read_text())
    assert (out["model"], out["version"], out["uri"]) == ("adfm", "1", "models:/adfm/1")
    assert out["training_run"] == training.info.run_id
    logged = tracking.client().get_logged_model(version.source.removeprefix("models:/"))
    assert logged.source_run_id == training.info.run_id
    assert {metric.key: metric.value for metric in logged.metrics}["accuracy"] == 0.9
    assert tracking.client().get_run(out["run_id"]).data.metrics["accuracy"] == 0.9
    assert tracking.client().get_registered_model("adfm").aliases == {}


def test_description_is_for_a_reviewer(registered):
    [version] = versions()
    text = version.description
    assert text.startswith("**Gate passed** on 20")
    assert "judged on 40 images of the test split against the floors alone" in text
    assert "set the tag `approval` to `approved`; then `adfm promote 1`" in text
    assert "| accuracy | 0.750 | - | - | - | - | no production |" in text
    assert "| balanced_accuracy | 0.750 |" in text
    for reason in registered[2].reasons:
        assert f"- {reason}" in text


def test_a_failed_gate_registers_and_says_so(store, shards, make_model, make_evaluation, tmp_path):
    model = make_model(tmp_path / "model", 1.0, shards)
    decision = register(model, shards, make_evaluation(tmp_path / "e", shards, 20), tmp_path / "out", PARAMS)
    assert not decision.passed
    [version] = versions()
    assert version.tags["gate"] == "failed"
    assert "**It cannot be promoted.**" in version.description
    assert "adfm promote" not in version.description


def test_long_description_fits_the_column():
    decided = {"passed": False, "decided_at": "now", "images": 1, "split": "test", "production_version": None}
    decided |= {"reasons": ["word " * 30] * 40, "metrics": {}}
    origin = {"base": {"name": "b", "revision": None}, "git_commit": None, "git_dirty": None}
    origin["data"] = {"trained_on": "d", "dvc_md5": None}
    measured = {f"{m}{end}": None for m in registration.metrics.HEADLINE for end in ("", "_low", "_high")}
    text = registration._text(decided, origin, measured, Calibration(), "1", None)
    assert len(text) <= 5000
    assert "and 25 more, in gate.json" in text


def test_production_is_compared_by_the_predictions_that_it_carries(
    registered, shards, make_model, make_evaluation, tmp_path
):
    put_into_production("1")
    model = make_model(tmp_path / "second", 2.0, shards)
    out = tmp_path / "out"
    decision = register(model, shards, make_evaluation(tmp_path / "e", shards, 40, iou=0.8), out, PARAMS)
    assert decision.passed
    assert decision.metrics["accuracy"] | {"low": 0, "high": 0} == decision.metrics["accuracy"] | {
        "candidate": 1.0, "production": 0.75, "difference": 0.25, "verdict": "better", "low": 0, "high": 0
    }  # fmt: skip
    gate = json.loads((out / "gate.json").read_text())
    assert (gate["production_version"], gate["production_predictions"]) == ("1", "as registered")
    assert versions()[1].tags["gate_production_version"] == "1"
    assert "against version 1 in production (as registered)" in versions()[1].description
    stored = pd.read_parquet(registered[1] / "predictions.parquet")
    assert pd.read_parquet(out / "production.parquet")["predicted"].tolist() == stored["predicted"].tolist()
    assert tracking.client().get_registered_model("adfm").aliases == {"production": 1}


def test_a_worse_model_fails(registered, shards, make_model, make_evaluation, tmp_path):
    put_into_production("1")
    model = make_model(tmp_path / "second", 2.0, shards)
    decision = register(model, shards, make_evaluation(tmp_path / "e", shards, 26), tmp_path / "out", PARAMS)
    assert decision.metrics["accuracy"]["verdict"] == "worse"
    assert versions()[1].tags["gate"] == "failed"


def test_repeated_registration_makes_no_second_version(registered, shards, tmp_path):
    model, evaluation, first = registered
    client = tracking.client()
    client.set_model_version_tag("adfm", "1", "approval", "approved")
    assert register(model, shards, evaluation, tmp_path / "registration-first", PARAMS) == first
    [version] = versions()
    assert version.tags["approval"] == "approved"  # the decision is the one that was approved

    stricter = Params.model_validate({"gate": {"bootstrap": 200, "min_images": 20, "accuracy": {"floor": 0.8}}})
    assert not register(model, shards, evaluation, tmp_path / "registration-first", stricter).passed
    [version] = versions()
    assert (version.tags["gate"], version.tags["approval"]) == ("failed", "pending")
    assert version.description.startswith("**Gate failed**")
    assert json.loads(registration.read_artifact(version, "gate.json"))["passed"] is False


def test_another_evaluation_of_the_model_makes_another_version(registered, shards, make_evaluation, tmp_path):
    register(registered[0], shards, make_evaluation(tmp_path / "e", shards, 32), tmp_path / "out", PARAMS)
    first, second = versions()
    assert first.tags["artifact_digest"] == second.tags["artifact_digest"]
    assert first.tags["evaluation_digest"] != second.tags["evaluation_digest"]


def test_what_is_in_production_is_not_its_own_rival(registered, shards, tmp_path):
    model, evaluation, first = registered
    put_into_production("1")
    assert register(model, shards, evaluation, tmp_path / "again", PARAMS) == first
    assert json.loads((tmp_path / "again" / "registration.json").read_text())["version"] == "1"
    [version] = versions()
    assert version.tags["gate"] == "passed"


def test_a_crash_before_the_end_leaves_one_version_in_the_end(
    store, shards, make_model, make_evaluation, tmp_path, monkeypatch
):
    model, evaluation = make_model(tmp_path / "m", 1.0, shards), make_evaluation(tmp_path / "e", shards, 36)
    create = MlflowClient.create_model_version

    def crash(*args, **kwargs):
        create(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MlflowClient, "create_model_version", crash)
        register(model, shards, evaluation, tmp_path / "out", PARAMS)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    [version] = versions()
    assert version.tags["gate"] == "passed"  # a version is never without its decision
    register(model, shards, evaluation, tmp_path / "out", PARAMS)
    [version] = versions()
    assert version.description.startswith("**Gate passed**")
    runs = tracking.client().search_runs([tracking.experiment("adfm")], "tags.stage = 'register'")
    assert sorted(run.info.status for run in runs) == ["FINISHED", "KILLED"]


def test_registration_continues_without_the_trainings_run(store, shards, make_model, make_evaluation, tmp_path):
    model = make_model(tmp_path / "m", 1.0, shards, "0" * 32)
    register(model, shards, make_evaluation(tmp_path / "e", shards, 36), tmp_path / "out", PARAMS)
    out = json.loads((tmp_path / "out" / "registration.json").read_text())
    assert out["training_run"] == out["run_id"]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda m, e: (m / "adfm.json").unlink(), r"is not a model folder"),
        (lambda m, e: (m / "adapter_model.safetensors").unlink(), r"is not a model folder"),
        (lambda m, e: (m / "optimizer.pt").touch(), r"optimizer\.pt: pickles can run code"),
        (lambda m, e: (e / "predictions.parquet").unlink(), r"not a whole evaluation.*predictions\.parquet.*evaluate"),
        (lambda m, e: (e / "evaluation.json").write_text("{}"), r"not a whole evaluation.*candidate"),
        (lambda m, e: (e / "metrics.json").write_text("{"), r"not a whole evaluation"),
    ],
)
def test_what_is_not_whole_is_not_registered(store, shards, make_model, make_evaluation, tmp_path, spoil, says):
    model, evaluation = make_model(tmp_path / "m", 1.0, shards), make_evaluation(tmp_path / "e", shards, 36)
    spoil(model, evaluation)
    with pytest.raises(AdfmError, match=says):
        register(model, shards, evaluation, tmp_path / "out", PARAMS)
    assert versions() == []
    assert not (tmp_path / "out").exists()


def test_an_evaluation_of_something_else_is_refused(store, shards, make_shards, make_model, make_evaluation, tmp_path):
    model, evaluation = make_model(tmp_path / "m", 1.0, shards), make_evaluation(tmp_path / "e", shards, 36)

    def refused(shards: Path = shards, params: Params = PARAMS) -> str:
        with pytest.raises(AdfmError, match="adfm evaluate") as caught:
            register(model, shards, evaluation, tmp_path / "out", params)
        return str(caught.value)

    assert "fingerprint of the shards differ" in refused(shards=make_shards(tmp_path / "other", 7))
    assert "max_new_tokens differ" in refused(params=Params.model_validate({"evaluate": {"max_new_tokens": 9}}))
    about = json.loads((evaluation / "evaluation.json").read_text())
    (evaluation / "evaluation.json").write_text(json.dumps(about | {"candidate_digest": "of another model"}))
    assert "digest of the model differ" in refused()
    (evaluation / "evaluation.json").write_text(json.dumps(about))
    # Answers that were dropped would raise every metric.
    table = pd.read_parquet(evaluation / "predictions.parquet")
    table[table["predicted"] == table["label"]].to_parquet(evaluation / "predictions.parquet")
    assert "images differ" in refused()
    assert versions() == []


def test_production_is_evaluated_again_when_the_shards_differ(
    store, make_shards, make_model, make_evaluation, tmp_path
):
    """A real model is in production; its stored predictions are of other images and must not be used."""
    from peft import LoraConfig, get_peft_model

    from adfm.evaluation.evaluate import evaluate
    from adfm.models import loading, tiny
    from adfm.training.base import corpus
    from adfm.training.warmup import save

    tokens = tiny.tokenizer(corpus())
    tiny.model(tokens, seed=0).save_pretrained(tmp_path / "base")
    tiny.processor(tokens).save_pretrained(tmp_path / "base")
    params = Params.model_validate(
        {
            "model": {"name": str(tmp_path / "base")},
            "evaluate": {"max_new_tokens": 4, "bootstrap": 20},
            "gate": {"bootstrap": 200, "min_images": 20, "accuracy": {"floor": 0.0}, "iou": {"floor": 0.0}},
        }
    )
    old, new = make_shards(tmp_path / "old", 100), make_shards(tmp_path / "new", 150)
    loaded = loading.load(params.model.name, params.model)
    adapted = get_peft_model(loaded.model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    (tmp_path / "real").mkdir()
    with tracking.start_run("train", params) as run:
        save(tmp_path / "real", adapted, loaded, old, params, "train", run.info.run_id)
    evaluate({"trained": tmp_path / "real"}, old, tmp_path / "evaluation", params)
    assert register(tmp_path / "real", old, tmp_path / "evaluation", tmp_path / "out", params).passed
    put_into_production("1")
    assert versions()[0].run_id == run.info.run_id

    # The same images again: the stored predictions do.
    model = make_model(tmp_path / "candidate", 2.0, old)
    same = make_evaluation(tmp_path / "same", old, 40)
    about = json.loads((same / "evaluation.json").read_text())
    about["settings"]["max_new_tokens"] = 4
    (same / "evaluation.json").write_text(json.dumps(about))
    register(model, old, same, tmp_path / "out", params)
    assert json.loads((tmp_path / "out" / "gate.json").read_text())["production_predictions"] == "as registered"

    other = make_evaluation(tmp_path / "other", new, 40)
    (other / "evaluation.json").write_text(json.dumps(about | {"fingerprint": shards_.fingerprint(new, "test")}))
    decision = register(model, new, other, tmp_path / "out", params)
    gate = json.loads((tmp_path / "out" / "gate.json").read_text())
    assert gate["production_predictions"] == "evaluated again"
    again = pd.read_parquet(tmp_path / "out" / "production.parquet")
    assert again["id"].tolist() == shards_.ids(new, "test")
    right = (again["predicted"] == again["label"]).mean()
    assert decision.metrics["accuracy"]["production"] == pytest.approx(right)
    assert decision.passed

    # Predictions that somebody changed in the store are not believed, and neither is a changed model.
    [artifacts] = (store / "mlartifacts" / "models").glob(f"{versions()[0].source.removeprefix('models:/')}/artifacts")
    flattering = pd.read_parquet(artifacts / "evaluation" / "predictions.parquet")
    flattering.assign(predicted=flattering["label"]).to_parquet(artifacts / "evaluation" / "predictions.parquet")
    register(make_model(tmp_path / "third", 3.0, old), old, same, tmp_path / "out", params)
    assert json.loads((tmp_path / "out" / "gate.json").read_text())["production_predictions"] == "evaluated again"
    (artifacts / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(AdfmError, match="Version 1 of adfm: its model files have the digest"):
        register(make_model(tmp_path / "fourth", 4.0, old), old, same, tmp_path / "out", params)


# ------------------------------------------------------------------------------------------------- the threshold


def test_threshold_and_limit_are_on_the_version(store, shards, make_model, make_evaluation, tmp_path):
    model = make_model(tmp_path / "m", 1.0, shards)
    # From 0.95 on nothing is flagged, and from 0.05 on everything: either way 20 of 40 are right, not 36.
    for number, threshold in (("1", 0.95), ("2", 0.05)):
        evaluation = make_evaluation(tmp_path / number, shards, 36, model=model, threshold=threshold)
        decision = register(model, shards, evaluation, tmp_path / "out", PARAMS)
        assert decision.metrics["accuracy"]["candidate"] == 0.5
        [version] = [each for each in versions() if each.version == int(number)]
        assert version.tags["threshold"] == str(threshold) and version.tags["threshold_limit"] == "overkill <= 0.3"
        assert version.tags["calibration"] == "none"
        assert f"An image is flagged from a probability of {threshold} on" in version.description
        assert "| accuracy_at_threshold | 0.500 |" in version.description
        assert calibration.of_version(f"models:/adfm/{number}").threshold == threshold


def test_a_version_of_before_there_were_thresholds_says_that_its_letters_decide(registered):
    [version] = versions()
    assert version.tags["threshold"] == "none" and "calibration_digest" not in version.tags
    assert "The letter decides: it was evaluated without a calibration.json." in version.description
    carried = calibration.of_version("models:/adfm/1")
    assert carried.threshold is None and "was registered without a calibration.json" in carried.summary


def test_a_threshold_of_another_model_or_limit_is_refused(store, shards, make_model, make_evaluation, tmp_path):
    model, other = (make_model(tmp_path / name, weight, shards) for name, weight in (("m", 1.0), ("n", 2.0)))
    evaluation = make_evaluation(tmp_path / "e", shards, 36, model=model)

    def refused(model: Path = model, params: Params = PARAMS) -> str:
        with pytest.raises(AdfmError, match="adfm evaluate") as caught:
            register(model, shards, evaluation, tmp_path / "out", params)
        return str(caught.value)

    assert "digest of the calibrated model differ" in refused(model=other)
    assert "overkill_limit differ" in refused(params=Params.model_validate({"evaluate": {"overkill_limit": 0.01}}))
    fitted = json.loads((evaluation / "calibration.json").read_text())
    (evaluation / "calibration.json").write_text(json.dumps(fitted | {"threshold": 0.01}))
    assert "decisions in predictions.parquet are not those of its calibration.json" in refused()
    (evaluation / "calibration.json").unlink()
    assert "decisions in predictions.parquet are not those" in refused()
    assert versions() == []


def test_a_calibration_that_was_changed_in_the_store_is_refused(store, shards, make_model, make_evaluation, tmp_path):
    model = make_model(tmp_path / "m", 1.0, shards)
    evaluation = make_evaluation(tmp_path / "e", shards, 36, model=model)
    assert register(model, shards, evaluation, tmp_path / "out", PARAMS).passed
    tracking.client().set_model_version_tag("adfm", "1", "approval", "approved")
    [artifact] = (store / "mlartifacts").rglob("evaluation/calibration.json")
    content = artifact.read_text()
    for spoil in (lambda: artifact.write_text(content.replace("0.5", "0.1")), artifact.unlink):
        spoil()
        with pytest.raises(AdfmError, match=r"calibration\.json is not the file that was registered"):
            calibration.of_version("models:/adfm/1")
    with pytest.raises(AdfmError, match=r"calibration\.json is not the file that was registered"):
        promote("1", PARAMS)
