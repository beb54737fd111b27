from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from adfm import files, signing, tracking
from adfm.cli import main
from adfm.data import shards as shards_
from adfm.errors import AdfmError
from adfm.evaluation import calibration
from adfm.evaluation.gate_metrics import METRICS
from adfm.kubeflow import notification
from adfm.params import Params
from adfm.registry import decisions, policy, registration
from adfm.registry.promotion import history, promote
from adfm.registry.registration import NotAccepted, accept, register, set_policy
from adfm.registry.submission import read_artifact, version_uri
from tests.registry.conftest import POLICY

PARAMS = Params()


def download(version: Any, path: str, to: Path) -> Path:
    return Path(download_artifacts(f"{version_uri(version)}/{path}", dst_path=str(to)))


def versions(name: str = "adfm") -> list[Any]:
    return sorted(tracking.client().search_model_versions(f"name = '{name}'"), key=lambda v: int(v.version))


def put_into_production(version: str) -> None:
    for key, value in (("approval_by", "Rita"), ("approval", "approved")):
        tracking.client().set_model_version_tag("adfm", version, key, value)
    promote(version, "adfm")


def gate_of(version: Any) -> dict[str, Any]:
    return dict(json.loads(read_artifact(version, "gate.json")))


def refuses(*arguments: Any, **options: Any) -> str:
    """Why a registration is refused."""
    with pytest.raises(AdfmError) as caught:
        register(*arguments, **options)
    return str(caught.value)


@pytest.fixture
def shards(make_shards, tmp_path, store):
    Path("gate.yaml").write_text(POLICY)
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
    assert decision.rows[0].candidate == 0.9
    assert "\nversion 1: gate passed\n" in capsys.readouterr().out

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

    carried = download(version, "", tmp_path / "carried")
    assert signing.verify(carried, signing.keys()) == signing.keys().id
    [judged] = [step for step in history("adfm").counting if step.action == "judge"]
    assert judged.manifest == signing.manifest(carried) and judged.finished
    assert judged.submission == version.source.removeprefix("models:/")
    of_model, _, of_test = judged.contents.split("-")
    assert (of_model, of_test) == (files.digest(model)[:32], version.tags["test_fingerprint"][:32])
    assert policy.loads((carried / "gate.yaml").read_text()) == policy.load() == policy.loads(history("adfm").policy)
    for folder, source in (("model", model), ("evaluation", evaluation)):
        assert files.digest(carried / folder) == files.digest(source)
    assert yaml.safe_load((carried / "params.yaml").read_text()) == PARAMS.model_dump(mode="json", by_alias=True)
    assert json.loads((carried / "lineage.json").read_text())["git_commit"] == "c0ffee"
    gate = json.loads((carried / "gate.json").read_text())
    assert gate == json.loads((tmp_path / "out" / "gate.json").read_text())
    assert yaml.safe_load((carried / "MLmodel").read_text())["flavors"]["python_function"]["loader_module"] == (
        "adfm.serving.scoring"
    )
    assert gate["verdict"] == "passed" and gate["production_version"] is None and gate["reasons"] == decision.reasons
    assert gate["policy"] == policy.load().model_dump() and gate["fingerprint"] == version.tags["test_fingerprint"]
    assert gate["separation"]["proved"] and gate["separation"]["images"] == 40

    out = json.loads((tmp_path / "out" / "registration.json").read_text())
    assert (out["model"], out["version"], out["uri"]) == ("adfm", "1", "models:/adfm/1")
    assert out["training_run"] == training.info.run_id
    logged = tracking.client().get_logged_model(version.source.removeprefix("models:/"))
    assert logged.source_run_id == training.info.run_id
    assert {metric.key: metric.value for metric in logged.metrics}["accuracy"] == 0.9
    assert tracking.client().get_run(out["run_id"]).data.metrics["accuracy"] == 0.9
    registered_model = tracking.client().get_registered_model("adfm")
    assert registered_model.aliases == {}
    assert f"](#/experiments/{training.info.experiment_id}/runs?" in registered_model.description


def test_a_description_of_the_model_that_somebody_wrote_stays(
    registered, shards, make_model, make_evaluation, tmp_path
):
    client = tracking.client()
    client.update_registered_model("adfm", "Ask Ada first.")
    second = make_model(tmp_path / "second", 2.0, shards)
    register(second, shards, make_evaluation(tmp_path / "evaluation", shards, 36), tmp_path / "out", PARAMS)
    assert len(versions()) == 2
    assert client.get_registered_model("adfm").description == "Ask Ada first."


def test_scores_that_differ_in_their_last_digits_make_no_second_version(registered, shards, tmp_path):
    model, evaluation, decision = registered
    table = pq.read_table(evaluation / "predictions.parquet")
    column = table.schema.get_field_index("score")
    scores = pa.array([score + 1e-8 for score in table["score"].to_pylist()])
    pq.write_table(table.set_column(column, table.schema.field(column), scores), evaluation / "predictions.parquet")
    assert register(model, shards, evaluation, tmp_path / "again", PARAMS) == decision
    assert len(versions()) == 1


def test_description_is_for_a_reviewer(registered):
    [version] = versions()
    text = version.description
    assert text.startswith("Gate: passed.\n\n**There is no model in production yet")
    assert "`approval`" in text and "75.0%" in text


def test_a_failed_gate_registers_and_says_so(store, shards, make_model, make_evaluation, tmp_path):
    model = make_model(tmp_path / "model", 1.0, shards)
    decision = register(model, shards, make_evaluation(tmp_path / "e", shards, 8), tmp_path / "out", PARAMS)
    assert not decision.passed
    [version] = versions()
    assert version.tags["gate"] == "failed"
    assert "adfm promote" not in version.description


def test_production_is_compared_by_the_predictions_that_it_carries(
    registered, shards, make_model, make_evaluation, tmp_path
):
    put_into_production("1")
    model = make_model(tmp_path / "second", 2.0, shards)
    out = tmp_path / "out"
    decision = register(model, shards, make_evaluation(tmp_path / "e", shards, 40, iou=0.8), out, PARAMS)
    assert decision.passed
    assert (decision.rows[0].candidate, decision.rows[0].production) == (1.0, 0.75)
    gate = json.loads((out / "gate.json").read_text())
    assert (gate["production_version"], gate["production_predictions"]) == ("1", "as registered")
    assert versions()[1].tags["gate_production_version"] == "1"
    carried = download(versions()[1], "rivals", tmp_path / "carried")
    stored = pd.read_parquet(registered[1] / "predictions.parquet")
    for role in ("production", "anchor"):
        assert pd.read_parquet(carried / f"{role}.parquet")["predicted"].tolist() == stored["predicted"].tolist()
    rivals = json.loads((carried / "rivals.json").read_text())
    assert {role: about["version"] for role, about in rivals.items()} == {"production": "1", "anchor": "1"}
    assert tracking.client().get_registered_model("adfm").aliases == {"production": 1, "anchor": 1}


def test_a_worse_model_fails(registered, shards, make_model, make_evaluation, tmp_path):
    put_into_production("1")
    model = make_model(tmp_path / "second", 2.0, shards)
    decision = register(model, shards, make_evaluation(tmp_path / "e", shards, 8), tmp_path / "out", PARAMS)
    assert decision.verdict == "failed"
    assert versions()[1].tags["gate"] == "failed"


def test_repeated_registration_makes_no_second_version(registered, shards, tmp_path):
    model, evaluation, first = registered
    client = tracking.client()
    client.set_model_version_tag("adfm", "1", "approval", "approved")
    assert register(model, shards, evaluation, tmp_path / "registration-first", PARAMS) == first
    [version] = versions()
    assert version.tags["approval"] == "approved"  # the decision is the one that was approved

    # A policy that is registered later judges it again, and the approval was of the old decision.
    Path("gate.yaml").write_text(POLICY.replace("limit: 0.5", "limit: 0.9"))
    set_policy(Path("gate.yaml"), PARAMS.mlflow.registered_model)
    assert register(model, shards, evaluation, tmp_path / "registration-first", PARAMS).verdict != "passed"
    [version] = versions()
    assert version.tags["gate"] != "passed" and version.tags["approval"] == "pending"
    assert gate_of(version)["verdict"] == version.tags["gate"]


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

    def crash(self, name, *args, **kwargs):
        version = create(self, name, *args, **kwargs)
        if name == "adfm":
            raise KeyboardInterrupt
        return version

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MlflowClient, "create_model_version", crash)
        register(model, shards, evaluation, tmp_path / "out", PARAMS)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    [version] = versions()
    assert (version.tags["approval"], "gate" in version.tags) == ("pending", False)
    assert history("adfm").last("judge") is None
    register(model, shards, evaluation, tmp_path / "out", PARAMS)
    [version] = versions()
    assert version.tags["gate"] == "passed" and version.description
    assert tracking.client().get_registered_model("adfm").description
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
        (
            lambda m, e: (e / "predictions.parquet").unlink(),
            r"predictions\.parquet cannot be read as a prediction table.*evaluate",
        ),
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
        text = refuses(model, shards, evaluation, tmp_path / "out", params)
        assert "adfm evaluate" in text
        return text

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
    from adfm.models import loading
    from adfm.training.sft import save
    from experiments import tiny_model
    from experiments.tiny_base import corpus

    tokens = tiny_model.tokenizer(corpus())
    tiny_model.model(tokens, seed=0).save_pretrained(tmp_path / "base")
    tiny_model.processor(tokens).save_pretrained(tmp_path / "base")
    Path("gate.yaml").write_text(POLICY.replace("limit: 0.5", "limit: null"))
    params = Params.model_validate(
        {
            "model": {"name": str(tmp_path / "base")},
            "evaluate": {"max_new_tokens": 4, "bootstrap": 20},
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
    again = pd.read_parquet(download(versions()[-1], "rivals/production.parquet", tmp_path / "again"))
    assert again["id"].tolist() == shards_.ids(new, "test")
    right = (again["predicted"] == again["label"]).mean()
    assert decision.rows[0].production == pytest.approx(right)
    assert decision.passed

    # Predictions that somebody changed in the store are not believed, and neither is a changed model.
    [artifacts] = (store / "mlartifacts" / "models").glob(f"{versions()[0].source.removeprefix('models:/')}/artifacts")
    for path in ("evaluation/predictions.parquet", "model/adapter_config.json"):
        content = (artifacts / path).read_bytes()
        (artifacts / path).write_bytes(content + b" ")
        third = make_model(tmp_path / path.replace("/", "-"), 3.0, old)
        assert path in refuses(third, old, same, tmp_path / "out", params)
        (artifacts / path).write_bytes(content)


# ------------------------------------------------------------------------------------------------- the threshold


def test_threshold_and_limit_are_on_the_version(store, shards, make_model, make_evaluation, tmp_path):
    model = make_model(tmp_path / "m", 1.0, shards)
    # From 0.95 on nothing is flagged, and from 0.05 on everything: either way 20 of 40 are right, not 36.
    for number, threshold in (("1", 0.95), ("2", 0.05)):
        evaluation = make_evaluation(tmp_path / number, shards, 36, model=model, threshold=threshold)
        decision = register(model, shards, evaluation, tmp_path / "out", PARAMS)
        assert decision.rows[0].candidate == 0.5
        [version] = [each for each in versions() if each.version == int(number)]
        assert version.tags["threshold"] == str(threshold) and version.tags["threshold_limit"] == "overkill <= 0.05"
        assert version.tags["calibration"] == "none"


def test_a_version_of_before_there_were_thresholds_says_that_its_letters_decide(registered):
    [version] = versions()
    assert version.tags["threshold"] == "none" and "calibration_digest" not in version.tags
    carried = calibration.of_version(Path("nowhere"), "digest")
    assert carried.threshold is None and "was registered without a calibration.json" in carried.summary


def test_a_threshold_of_another_model_or_limit_is_refused(store, shards, make_model, make_evaluation, tmp_path):
    model, other = (make_model(tmp_path / name, weight, shards) for name, weight in (("m", 1.0), ("n", 2.0)))
    evaluation = make_evaluation(tmp_path / "e", shards, 36, model=model)

    def refused(model: Path = model, params: Params = PARAMS) -> str:
        text = refuses(model, shards, evaluation, tmp_path / "out", params)
        assert "adfm evaluate" in text
        return text

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
    [artifact] = (store / "mlartifacts").rglob("evaluation/calibration.json")
    content = artifact.read_text()
    for spoil in (lambda: artifact.write_text(content.replace("0.5", "0.1")), artifact.unlink):
        spoil()
        for key, value in (("approval_by", "Rita"), ("approval", "approved")):
            tracking.client().set_model_version_tag("adfm", "1", key, value)
        with pytest.raises(AdfmError, match=r"(changed|missing): evaluation/calibration\.json"):
            promote("1", "adfm")


# -------------------------------------------------------------------------------------- submission and acceptance


@pytest.fixture
def apart(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Two folders of keys, of a submitter and of the service, who know each other; takes one for the process."""
    folders = {role: tmp_path / "keys" / role for role in ("submitter", "service")}
    for folder in folders.values():
        monkeypatch.setattr(signing, "FOLDER", folder)
        signing.keys()
    monkeypatch.setattr(signing, "FOLDER", tmp_path / "none")
    public = {role: (folder / "service" / "own.pem").read_bytes() for role, folder in folders.items()}
    for folder in folders.values():
        (folder / "service" / "own.pem").write_bytes(public["service"])
        (folder / "submitters" / "own.pem").write_bytes(public["submitter"])

    def take(role: str) -> None:
        monkeypatch.setenv(signing.VARIABLE, str(folders[role]))

    return take


@pytest.fixture
def one(shards, make_model, make_evaluation, tmp_path) -> tuple[Path, Path, Path, Path]:
    """What is to be registered."""
    evaluation = make_evaluation(tmp_path / "e", shards, 36)
    return make_model(tmp_path / "m", 1.0, shards), shards, evaluation, tmp_path / "out"


def accept_all() -> list[str]:
    return accept(tracking.client(), PARAMS.mlflow)


def submissions() -> list[Any]:
    experiment = tracking.experiment("adfm")
    return list(tracking.client().search_logged_models([experiment]))


def test_a_submitter_submits_and_the_service_accepts(apart, one, capsys):
    apart("submitter")
    assert "has not made a version of it in 0 s" in refuses(*one, PARAMS, wait=0)
    assert versions() == [] and len(submissions()) == 1 and not one[3].exists()
    with pytest.raises(NotAccepted):  # the same submission is found again
        register(*one, PARAMS, wait=0)
    assert len(submissions()) == 1

    apart("service")
    with pytest.raises(AdfmError, match="1 submissions for adfm wait for a policy: a reviewer sets one"):
        accept_all()
    Path("gate.yaml").rename("policy.yaml")
    set_policy(Path("policy.yaml"), PARAMS.mlflow.registered_model)
    assert accept_all() == ["1"]
    assert accept_all() == []

    apart("submitter")
    decision = register(*one, PARAMS, {"kfp_run_id": "r", "approval": "approved"}, wait=0)
    assert decision.passed and json.loads((one[3] / "registration.json").read_text())["version"] == "1"
    [version] = versions()
    [judged] = [step for step in history("adfm").counting if step.action == "judge"]
    assert version.tags["signed_by"] == judged.signer == signing.keys().id
    assert version.tags["approval"] == "pending" and len(submissions()) == 1
    assert "kfp_run_id" not in version.tags  # those of the first submission, which the submitter may not change
    assert notified("r") == "version 1 of adfm: gate passed" and notified("r2") == "no version was registered"


def notified(run: str) -> str:
    """What the notification of a pipeline's run says of its version."""
    status = notification.Status("SUCCEEDED", "", "local-pipeline-exit-handler-1", "exit-handler-1")
    return notification.notify("adfm-training", status, run, "", "").splitlines()[1]


def test_the_service_sees_what_is_submitted_from_a_run_in_another_experiment(apart, one, monkeypatch):
    given = tracking.client().create_run(tracking.experiment("of the platform")).info.run_id
    apart("submitter")
    monkeypatch.setenv("MLFLOW_RUN_ID", given)  # as KFP's MLflow plug-in names one
    for _ in range(2):
        refuses(*one, PARAMS, wait=0)
    assert [each.source_run_id for each in submissions()] == [given]
    apart("service")
    set_policy(Path("gate.yaml"), PARAMS.mlflow.registered_model)
    assert accept_all() == ["1"]
    assert versions()[0].run_id == given


def test_a_submitter_waits_for_the_service(apart, one):
    apart("service")
    set_policy(Path("gate.yaml"), PARAMS.mlflow.registered_model)
    apart("submitter")
    original = registration.reconcile.read
    reads = []

    def read(*arguments):
        reads.append(1)
        if len(reads) == 3:
            apart("service")
            accept_all()
            apart("submitter")
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registration, "_POLL", 0.01)
        patch.setattr(registration.reconcile, "read", read)
        assert register(*one, PARAMS, wait=30).passed


def test_what_is_submitted_unsigned_or_changed_is_refused_and_not_looked_at_again(apart, one, store, capsys):
    apart("service")
    set_policy(Path("gate.yaml"), PARAMS.mlflow.registered_model)
    apart("submitter")
    refuses(*one, PARAMS, wait=0)
    [file] = (store / "mlartifacts").rglob("MLmodel")
    file.write_text(file.read_text() + "# changed")
    apart("service")
    assert accept_all() == [] and versions() == []
    assert history("adfm").last("refuse").submission == submissions()[0].model_id
    assert "changed: MLmodel" in capsys.readouterr().out
    assert accept_all() == []
    assert [step.action for step in history("adfm").counting] == ["policy", "refuse"]
    apart("submitter")
    refuses(*one, PARAMS, wait=0)  # a new submission, not the one that was refused
    assert len(submissions()) == 2
    apart("service")
    assert accept_all() == ["1"]


def test_a_submission_by_an_unknown_key_or_for_another_model_is_refused(apart, one, store, tmp_path, monkeypatch):
    apart("service")
    set_policy(Path("gate.yaml"), PARAMS.mlflow.registered_model)
    apart("submitter")
    other = Params.model_validate({"mlflow": {"registered_model": "other"}})
    refuses(*one, other, wait=0)
    [submission] = submissions()
    tracking.client().set_logged_model_tags(submission.model_id, {"adfm_submitted_for": "adfm"})
    monkeypatch.delenv(signing.VARIABLE)
    monkeypatch.setattr(signing, "FOLDER", tmp_path / "stranger")
    keys = signing.keys()
    for name in ("own.pem",):  # it believes in the service, and signs with its own key
        service = tmp_path / "keys" / "service" / "service" / name
        (keys.folder / "service" / name).write_bytes(service.read_bytes())
    refuses(*one, PARAMS, wait=0)
    apart("service")
    assert accept_all() == [] and versions() == [] and versions("other") == []
    refused = [step.why for step in history("adfm").counting if step.action == "refuse"]
    assert len(refused) == 2
    assert any("for the registered model 'other', not for 'adfm'" in why for why in refused)
    assert any("signed with a key whose versions do not count" in why for why in refused)


def test_another_split_than_the_held_out_one_is_refused(one):
    params = Params.model_validate({"evaluate": {"split": "validation"}})
    with pytest.raises(AdfmError, match="evaluate.split is 'validation'") as refused:
        register(*one, params)
    assert refused.value.exit_code == 2 and versions() == []


@pytest.mark.parametrize(
    "dies_in", ["log_model_artifacts", "finalize_logged_model", "create_model_version", "log_model_artifact"]
)
@pytest.mark.parametrize("after", [False, True])
def test_killed_anywhere_one_submission_makes_one_version(one, monkeypatch, dies_in, after):
    original = getattr(MlflowClient, dies_in)

    def crash(self, *arguments, **options):
        if dies_in == "create_model_version" and arguments[0] != "adfm":
            return original(self, *arguments, **options)
        if after:
            original(self, *arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MlflowClient, dies_in, crash)
        register(*one, PARAMS)
    register(*one, PARAMS)
    assert accept_all() == []
    [version] = versions()
    assert version.tags["gate"] == "passed" and version.description
    assert sum(step.action == "judge" for step in history("adfm").counting) == 1
    assert decisions.is_published(version, history("adfm").last("judge"))


def test_two_services_that_accept_at_once_make_one_version(apart, one, monkeypatch):
    apart("service")
    set_policy(Path("gate.yaml"), PARAMS.mlflow.registered_model)
    apart("submitter")
    refuses(*one, PARAMS, wait=0)
    apart("service")
    original = MlflowClient.create_model_version

    def create(self, name, *arguments, **options):
        if name == "adfm":
            monkeypatch.setattr(MlflowClient, "create_model_version", original)
            assert accept_all() == ["1"]
        return original(self, name, *arguments, **options)

    monkeypatch.setattr(MlflowClient, "create_model_version", create)
    assert accept_all() == ["1"]
    [version] = versions()
    assert version.tags["gate"] == "passed"
    assert sum(step.action == "judge" for step in history("adfm").counting) == 1


def test_a_version_that_was_deleted_is_not_made_again(one):
    register(*one, PARAMS)
    tracking.client().delete_model_version("adfm", "1")
    assert accept_all() == [] and versions() == []
    register(*one, PARAMS)  # a submission of its own
    assert [version.version for version in versions()] == [2]


def test_looks_count_the_versions_that_a_test_set_has_judged(
    shards, make_model, make_evaluation, make_shards, tmp_path
):
    def judge(number: int, shards: Path = shards) -> dict[str, Any]:
        model = make_model(tmp_path / f"m{number}", float(number), shards)
        register(model, shards, make_evaluation(tmp_path / f"e{number}", shards, 36), tmp_path / "out", PARAMS)
        return gate_of(versions()[-1])

    Path("gate.yaml").write_text(POLICY + "looks: 2\n")
    assert [judge(number)["look"] for number in (1, 2)] == [1, 2]
    tracking.client().delete_model_version("adfm", "1")
    third = judge(3)
    assert (third["look"], third["verdict"]) == (3, "cannot tell")
    assert "budget of this test set is used up" in third["reasons"][0]
    assert judge(4, make_shards(tmp_path / "new", 50))["look"] == 1
    # Judged again, a version keeps its look.
    put_into_production("2")
    register(tmp_path / "m3", shards, tmp_path / "e3", tmp_path / "out", PARAMS)
    assert [step.look for step in history("adfm").counting if step.version == "3" and step.action == "judge"] == [
        "3"
    ] * 2


def test_test_images_that_were_trained_on_fail_the_gate(one, shards):
    from adfm.data import hashes

    seen = hashes.collect(shards, ["test"]).slice(3, 2)
    hashes.write(hashes.unite([hashes.of_model(one[0]), seen]), one[0] / hashes.FILE)
    decision = register(*one, PARAMS)
    assert (
        decision.verdict == "failed" and "2 test images were in the training or validation data" in decision.reasons[0]
    )


def test_without_knowledge_of_the_training_data_the_gate_cannot_tell(one):
    (one[0] / "trained_on.parquet").unlink()
    decision = register(*one, PARAMS)
    assert decision.verdict == "cannot tell" and "It is not known which images" in decision.reasons[0]


# ------------------------------------------------------------------------------------------------------ the policy


def test_the_first_policy_is_the_one_of_the_folder_and_later_ones_only_differ(one, shards, make_evaluation, tmp_path):
    register(*one, PARAMS)
    [step] = [step for step in history("adfm").counting if step.action == "policy"]
    assert step.policy == policy.dumps(policy.load())
    Path("gate.yaml").write_text(POLICY.replace("limit: 0.5", "limit: 0.1"))
    register(one[0], shards, make_evaluation(tmp_path / "second", shards, 30), one[3], PARAMS)
    assert history("adfm").policy == step.policy
    assert gate_of(versions()[-1])["policy"]["whole"]["accuracy"]["limit"] == 0.5
    assert "0.1 instead of 0.5" in versions()[-1].description


def test_a_reviewer_sets_the_policy_with_a_tag(apart, one, capsys):
    apart("submitter")
    refuses(*one, PARAMS, wait=0)
    client = tracking.client()
    client.create_registered_model("adfm")
    client.set_registered_model_tag("adfm", "policy_by", "Rita")
    client.set_registered_model_tag("adfm", "policy", "whole: {acuracy: {limit: 0.5}}")
    apart("service")
    with pytest.raises(AdfmError, match="wait for a policy"):
        accept_all()
    assert "the nearest is accuracy" in client.get_registered_model("adfm").tags["policy_refused"]
    assert capsys.readouterr().out.count("is refused") == 1
    client.set_registered_model_tag("adfm", "policy", POLICY)
    assert accept_all() == ["1"]
    assert "policy_refused" not in client.get_registered_model("adfm").tags
    [step] = [step for step in history("adfm").counting if step.action == "policy"]
    assert (step.by, step.why) == ("Rita", "the first policy")
    client.set_registered_model_tag("adfm", "policy", POLICY + "looks: 7\n")
    accept_all()
    assert history("adfm").last("policy").why == "looks: 7 instead of 20"
    accept_all()
    assert sum(step.action == "policy" for step in history("adfm").counting) == 2


def test_a_metric_that_is_added_to_adfm_changes_neither_policy_nor_decisions(one, monkeypatch):
    register(*one, PARAMS)
    set_policy(Path("gate.yaml"), PARAMS.mlflow.registered_model)
    before = history("adfm").policy
    monkeypatch.setitem(METRICS, "more", METRICS["escape_rate"])
    accept_all()
    assert history("adfm").policy == before and decisions.stands(history("adfm"), "1")


def test_a_policy_that_changes_after_an_approval_is_applied_before_promotion(one):
    register(*one, PARAMS)
    for key, value in (("approval_by", "Rita"), ("approval", "approved")):
        tracking.client().set_model_version_tag("adfm", "1", key, value)
    tracking.client().set_registered_model_tag("adfm", "policy", POLICY.replace("limit: 0.5", "limit: 0.99"))
    with pytest.raises(AdfmError, match="the policy has changed since its gate decided; .* it cannot be promoted"):
        promote("1", "adfm")
    assert tracking.client().get_registered_model("adfm").aliases == {}


@pytest.mark.parametrize(
    ("rules", "approver", "says"),
    [
        ("team_of_one: false\n", "ada", "'ada' (tag approval_by) submitted it: another person has to approve"),
        ("team_of_one: false\n", " Ada ", "submitted it"),
        ("approvers: [Rita]\n", "Ada", "'Ada' (tag approval_by) is not one of the policy's approvers"),
        ("approvers: [Rita]\n", "rita", "is not one of the policy's approvers"),
        ("", "none", "approval_by is missing"),
        ("", " ", "approval_by is missing"),
    ],
)
def test_who_may_approve(one, monkeypatch, rules, approver, says):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    Path("gate.yaml").write_text(POLICY + rules)
    register(*one, PARAMS)
    for key, value in (("approval_by", approver), ("approval", "approved")):
        tracking.client().set_model_version_tag("adfm", "1", key, value)
    with pytest.raises(AdfmError) as refused:
        promote("1", "adfm")
    assert says in str(refused.value)
    assert tracking.client().get_registered_model("adfm").aliases == {}


def test_a_team_of_one_may_approve_its_own_and_the_history_says_so(one, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    register(*one, PARAMS)
    assert main(["approve", "1", "--reason", "it is good"]) == 0
    assert main(["promote", "1"]) == 0
    step = history("adfm").move
    assert (step.approval_by, step.submitted_by) == ("ada", "ada")
    assert step.why.endswith("; it is good; team of one: the submitter approved")


def test_policy_and_approval_on_the_command_line(one, capsys):
    assert main(["policy", "show"]) == 0
    assert capsys.readouterr().out == "no policy is registered for adfm\n"
    assert main(["policy", "set", "gate.yaml"]) == 0
    assert main(["policy", "show"]) == 0
    assert capsys.readouterr().out.endswith(policy.dumps(policy.load()))
    Path("bad.yaml").write_text("whole: {acuracy: {limit: 0.5}}")
    assert main(["policy", "set", "bad.yaml"]) == 2
    Path("gate.yaml").write_text(POLICY)
    register(*one, PARAMS)
    assert main(["reject", "1", "--reason", "misses scratches"]) == 0
    assert main(["promote"]) == 0
    assert history("adfm").last("reject").why == "misses scratches"
    assert main(["approve", "9"]) == 1
    assert main(["audit"]) == 0
    assert "everything is as the signed history says" in capsys.readouterr().out
