"""Registration: a trained model becomes a version in MLflow that carries all it is, and the gate's decision on it.

Artifacts of a version, as `models:/<name>/<version>` has them:

    model/          the folder that training wrote: adapter, processor, chat template, prompt (in adfm.json)
    evaluation/     the folder that evaluation wrote: predictions.parquet, metrics.json, calibration.json, plots
    params.yaml     the settings as used
    lineage.json    data, code, libraries and base model
    gate.json       the decision
    MLmodel, …      what makes an MLflow pyfunc of it, which `adfm.registry.serving` loads

Nothing here moves an alias.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from adfm import tracking
from adfm.data import shards as shards_
from adfm.errors import AdfmError
from adfm.evaluation import calibration as calibration_
from adfm.evaluation import metrics
from adfm.evaluation.calibration import Calibration
from adfm.files import atomic_folder, file_digest, write_json
from adfm.method import prompt
from adfm.models import families, loading
from adfm.models.loading import check_unchanged
from adfm.params import Params
from adfm.registry import gate, history, page, policy, pyfunc
from adfm.registry.alerts import alert
from adfm.registry.lineage import lineage

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

PRODUCTION = "production"
NOBODY = "none"
"""Value of the tag `gate_production_version` when nothing was in production."""

_PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
_STORED = "as registered"  # where production's predictions are from


def register(
    model: Path, shards: Path, evaluation: Path, out: Path, params: Params, tags: Mapping[str, str] | None = None
) -> gate.Decision:
    """Registers a trained model as a version and lets the gate decide on it.

    A version of the same model with the same evaluation is used again, so a stage that is repeated makes no second one;
    its approval stands unless the decision is another one now. The verdict is printed.

    Args:
        model: Folder that training wrote.
        shards: Folder of shards.
        evaluation: Folder that evaluation wrote from these shards, with `model` as the candidate.
        out: Folder to write: `gate.json`, `registration.json`, and `production.parquet` if something is in production:
            the predictions that the candidate was compared with.
        params: Reads `register` and `evaluate`.
        tags: Further tags of the version, such as the run of the pipeline that made it.

    Returns:
        The decision. The version is registered either way.

    Raises:
        AdfmError: A folder lacks something, the evaluation is of other data or settings, or MLflow cannot be reached.
    """
    tracking.configure()
    family = _check_model(model)
    with tracking.start_run("register", params) as run, atomic_folder(out) as partial:
        from mlflow import MlflowClient

        store, name = MlflowClient(), params.register_.model
        trained_by = tracking.find_run((loading.describe(model) or {}).get("mlflow_run_id"))
        origin = lineage(model, shards, params, trained_by)
        candidate, measured, calibration = _read_evaluation(evaluation, shards, origin, params)
        evaluated = file_digest(evaluation / "predictions.parquet")
        about = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
        evaluated_by = tracking.find_run(about.get("mlflow_run_id"))

        production = holder(store, name)
        version = _same_version(store, name, origin["artifact_digest"], evaluated)
        if version and production and version.version == production.version:
            # It cannot be its own rival; the decision that brought it there stands.
            decided = json.loads(read_artifact(version, "gate.json"))
            write_json(decided, partial / "gate.json")
        else:
            decided = _decide(candidate, production, origin, shards, partial, params)
            if version:
                decided = _as_before(version, decided)
            write_json(decided, partial / "gate.json")
            described = _tags(origin, measured, evaluated, _protocol(family, params))
            described |= _threshold_tags(calibration, evaluation)
            described |= _decision_tags(decided, partial / "gate.json")
            if version is None:
                with TemporaryDirectory() as temporary:
                    folder = Path(temporary) / "version"
                    pyfunc.write(folder)
                    (folder / "params.yaml").write_text(tracking.settings(params), encoding="utf-8")
                    write_json(origin, folder / "lineage.json")
                    write_json(decided, folder / "gate.json")
                    contents = {"": folder, "model": model, "evaluation": evaluation}
                    version = _create(store, name, contents, described, measured, trained_by or run)
            elif version.tags.get("gate_digest") != described["gate_digest"]:
                _put_decision(store, version, partial / "gate.json", described)
            text = page.text(decided, origin, measured, calibration, str(version.version), evaluated_by)
            store.update_model_version(name, str(version.version), text)
        for key, value in (tags or {}).items():
            store.set_model_version_tag(name, str(version.version), key, value)
        registration = {
            "model": name,
            "version": str(version.version),
            "uri": f"models:/{name}/{version.version}",
            "logged_model": version.source,
            "run_id": run.info.run_id,
            "training_run": version.run_id,
            "gate": decided["verdict"],
        }
        write_json(registration, partial / "registration.json")
    lines = [f"version {version.version} of {name}: gate {registration['gate']}", *decided["reasons"]]
    print("\n  - ".join(lines))
    alert("\n- ".join(lines))
    return gate.Decision(**{field.name: decided[field.name] for field in dataclasses.fields(gate.Decision)})


def decide_again(version: ModelVersion, rival: ModelVersion | None) -> dict[str, Any]:
    """Lets the gate decide on a version once more, against another version, by the predictions that both carry.

    Args:
        version: A registered version. The gate has the settings of its decision.
        rival: The version that is in production now, if any.

    Returns:
        The decision, as JSON values; all but `decided_at`, which is still that of the earlier one. The same versions
        give the same decision.

    Raises:
        AdfmError: Their predictions cannot be compared: they are of other data or another protocol, or are not those
            that were registered.
        OSError: Files cannot be read.
    """
    try:
        decided: dict[str, Any] = json.loads(read_artifact(version, "gate.json"))
        judged_by = policy.Policy.model_validate(decided["policy"])
    except (KeyError, ValueError) as error:
        raise AdfmError("because its gate.json does not have a policy") from error
    tables = []
    for each in [version, rival] if rival else [version]:
        if any(each.tags.get(key) != version.tags.get(key) for key in ("test_fingerprint", "protocol")):
            raise AdfmError(f"because version {each.version} was evaluated on other images or in another way")
        table = _stored_predictions(each)
        if table is None:
            raise AdfmError(f"because the predictions of version {each.version} are not those that were registered")
        tables.append(table)
    decision = gate.decide(tables[0], tables[1] if rival else None, None, judged_by)
    against = {
        "production_version": str(rival.version) if rival else None,
        "production_predictions": _STORED if rival else None,
    }
    return decided | dataclasses.asdict(decision) | against


def renew(store: MlflowClient, version: ModelVersion, decided: dict[str, Any], why: str) -> None:
    """Puts a new decision on a version, with its description; an approval was of the old one and is void.

    Args:
        store: MLflow's client.
        version: The version.
        decided: The decision, as `decide_again` gives it, with its own `decided_at`.
        why: Why it was decided anew, for the description.
    """
    with TemporaryDirectory() as folder:
        write_json(decided, Path(folder) / "gate.json")
        _put_decision(store, version, Path(folder) / "gate.json", _decision_tags(decided, Path(folder) / "gate.json"))
    about = json.loads(read_artifact(version, "evaluation/evaluation.json"))
    measured = json.loads(read_artifact(version, "evaluation/metrics.json"))[about["candidate"]]
    origin = json.loads(read_artifact(version, "lineage.json"))
    evaluated_by = tracking.find_run(about.get("mlflow_run_id"))
    calibration = calibration_.of_version(f"models:/{version.name}/{version.version}")
    text = page.text(decided, origin, measured, calibration, str(version.version), evaluated_by)
    store.update_model_version(version.name, str(version.version), f"{why}\n\n{text}"[: page.LONGEST])


def holder(store: MlflowClient, name: str, alias: str = PRODUCTION) -> ModelVersion | None:
    """The version of model `name` that `alias` points at; `None` if there is no such alias, model or version."""
    from mlflow.exceptions import MlflowException

    try:
        version = store.get_registered_model(name).aliases.get(alias)
        return None if version is None else store.get_model_version(name, str(version))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def download(version: ModelVersion, path: str, to: Path) -> Path:
    """A copy of a version's artifact, a file or a folder, below the folder `to`."""
    import mlflow

    return Path(
        mlflow.artifacts.download_artifacts(f"models:/{version.name}/{version.version}/{path}", dst_path=str(to))
    )


def read_artifact(version: ModelVersion, path: str) -> str:
    """The text of a version's artifact."""
    with TemporaryDirectory() as folder:
        return download(version, path, Path(folder)).read_text(encoding="utf-8")


def _check_model(model: Path) -> str:
    """The model's family; raises when the folder is not one to register."""
    description = loading.describe(model)
    if description is None or not any(model.glob("*.safetensors")):
        raise AdfmError(f"{model} is not a model folder (adfm.json and *.safetensors); make one with `adfm train`.")
    if pickles := sorted(str(path) for path in model.rglob("*") if path.suffix in _PICKLES):
        raise AdfmError(f"{', '.join(pickles)}: pickles can run code and are not registered; remove them.")
    return str(description["family"])


def _read_evaluation(
    evaluation: Path, shards: Path, origin: dict[str, Any], params: Params
) -> tuple[pd.DataFrame, dict[str, Any], Calibration]:
    """The candidate's predictions, metrics and calibration, after proof that they are of these shards and this model.

    An evaluation of before there were thresholds has no calibration: the letter decides then, and that is said.
    """
    import pandas as pd

    try:
        about = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
        measured = json.loads((evaluation / "metrics.json").read_text(encoding="utf-8"))[about["candidate"]]
        predictions = pd.read_parquet(evaluation / "predictions.parquet")
        done = {
            "split": about["split"],
            "max_new_tokens": about["settings"]["max_new_tokens"],
            "fingerprint of the shards": about["fingerprint"],
            "digest of the model": about.get("candidate_digest", origin["artifact_digest"]),
            "images": sorted(predictions["id"]),
        }
    except (OSError, ValueError, KeyError) as error:
        raise AdfmError(f"{evaluation} is not a whole evaluation ({error!r}); make it with `adfm evaluate`.") from error
    asked = {
        "split": params.evaluate.split,
        "max_new_tokens": params.evaluate.max_new_tokens,
        "fingerprint of the shards": origin["data"]["test"],
        "digest of the model": origin["artifact_digest"],
        "images": sorted(shards_.ids(shards, params.evaluate.split)),
    }
    calibration = Calibration(note=f"it was evaluated without a {calibration_.FILE}")
    if there := (evaluation / calibration_.FILE).is_file():
        calibration = calibration_.read(evaluation / calibration_.FILE)
        key = "digest of the calibrated model"
        done[key], asked[key] = calibration.model, origin["artifact_digest"]
        for key in ("calibration", "overkill_limit", "escape_limit", "score", "samples"):
            done[key], asked[key] = about["settings"].get(key), getattr(params.evaluate, key)
    if differing := [key for key in asked if asked[key] != done[key]]:
        raise AdfmError(
            f"{evaluation} is not an evaluation of this model on {shards} with these settings: {', '.join(differing)} "
            "differ. Evaluate again with `adfm evaluate`, then register."
        )
    if "decision" in predictions and not (there and _decided_by(calibration, predictions)):
        raise AdfmError(
            f"{evaluation}: the decisions in predictions.parquet are not those of its {calibration_.FILE}. "
            "Evaluate again with `adfm evaluate`, then register."
        )
    return predictions, measured, calibration


def _decided_by(calibration: Calibration, predictions: pd.DataFrame) -> bool:
    """Whether the table's decisions are those that a version with this calibration would make."""
    decisions = calibration.apply(predictions)["decision"]
    return bool(decisions.fillna("").tolist() == predictions["decision"].fillna("").tolist())


def _protocol(family: str, params: Params) -> str:
    """What must be equal, besides the data, for two models' predictions to be comparable, as JSON."""
    asked = hashlib.sha256(json.dumps(prompt.messages(families.get(family).units)).encode()).hexdigest()
    settings = {"split": params.evaluate.split, "max_new_tokens": params.evaluate.max_new_tokens}
    return json.dumps({"family": family, **settings, "prompt": asked[:16]})


def _decide(
    candidate: pd.DataFrame,
    rival: ModelVersion | None,
    origin: dict[str, Any],
    shards: Path,
    partial: Path,
    params: Params,
) -> dict[str, Any]:
    """The gate's decision against the version in production, as JSON values with the circumstances."""
    production, source = None, None
    if rival:
        production, source = _predictions_of(rival, origin["data"]["test"], shards, params)
        production.to_parquet(partial / "production.parquet")
    judged_by = policy.load()
    decision = gate.decide(candidate, production, None, judged_by)
    return dataclasses.asdict(decision) | {
        "split": params.evaluate.split,
        "fingerprint": origin["data"]["test"],
        "policy": judged_by.model_dump(),
        "production_version": str(rival.version) if rival else None,
        "production_predictions": source,
        "decided_at": tracking.now(),
    }


def _predictions_of(version: ModelVersion, fingerprint: str, shards: Path, params: Params) -> tuple[pd.DataFrame, str]:
    """The version's predictions on these shards: its own if they are of the same data and protocol, else new ones."""
    from adfm.evaluation import inference

    same_protocol = version.tags.get("protocol") in [_protocol(family, params) for family in families.FAMILIES]
    with TemporaryDirectory() as folder:
        if same_protocol and version.tags.get("test_fingerprint") == fingerprint:
            stored = _stored_predictions(version)
            if stored is not None:
                return stored, _STORED
        model = check_unchanged(version, Path(folder))
        # It is judged as the model that it is: with its own precision and image size.
        own = ((loading.describe(model) or {}).get("params") or {}).get("model", {})
        kept = {key: own[key] for key in ("dtype", "max_pixels") if key in own}
        settings = params.model_copy(update={"model": params.model.model_copy(update=kept)})
        calibration = calibration_.of_version(f"models:/{version.name}/{version.version}")
        table = calibration.apply(inference.predict(model, shards, settings, f"version {version.version}"))
        table.attrs["threshold"] = calibration.threshold
        return table, "evaluated again"


def _stored_predictions(version: ModelVersion) -> pd.DataFrame | None:
    """The predictions that the version carries; `None` if they are not those that were registered."""
    import pandas as pd

    with TemporaryDirectory() as folder:
        stored = download(version, "evaluation/predictions.parquet", Path(folder))
        return pd.read_parquet(stored) if file_digest(stored) == version.tags.get("evaluation_digest") else None


def _same_version(store: MlflowClient, name: str, digest: str, evaluated: str) -> ModelVersion | None:
    same = f"name = '{name}' and tags.artifact_digest = '{digest}' and tags.evaluation_digest = '{evaluated}'"
    return next(iter(store.search_model_versions(same)), None)


def _tags(origin: dict[str, Any], measured: dict[str, Any], evaluated: str, protocol: str) -> dict[str, str]:
    tags = {
        "approval": "pending",
        "artifact_digest": origin["artifact_digest"],
        "evaluation_digest": evaluated,
        "test_fingerprint": origin["data"]["test"],
        "protocol": protocol,
        "data_fingerprint": origin["data"]["trained_on"],
        "dvc_md5": origin["data"]["dvc_md5"],
        "git_commit": origin["git_commit"],
        "git_dirty": origin["git_dirty"],
        "base_model": origin["base"]["name"],
        "base_revision": origin["base"]["revision"],
        **{metric: measured[metric] and f"{measured[metric]:.4f}" for metric in metrics.HEADLINE},
    }
    return {key: str(value) for key, value in tags.items() if value is not None}


def _threshold_tags(calibration: Calibration, evaluation: Path) -> dict[str, str]:
    """The tags that say what the version decides by; a limit as `overkill <= 0.05`."""
    file = evaluation / calibration_.FILE
    tags = {"threshold": "none" if calibration.threshold is None else f"{calibration.threshold:.6g}"}
    if file.is_file():
        limit = "".join(f"{kind} <= {share:g}" for kind, share in calibration.limit.items())
        tags |= {"threshold_limit": limit or "none", "calibration": calibration.method}
        tags |= {calibration_.DIGEST_TAG: file_digest(file)}
    return tags


def _decision_tags(decided: dict[str, Any], file: Path) -> dict[str, str]:
    """The tags that repeat a decision, and tell the file that holds it from any other."""
    return {
        "gate": decided["verdict"],
        "gate_decided_at": decided["decided_at"],
        "gate_production_version": decided["production_version"] or NOBODY,
        "gate_digest": file_digest(file),
    }


def _create(
    store: MlflowClient,
    name: str,
    contents: dict[str, Path],
    tags: dict[str, str],
    measured: dict[str, Any],
    run: Run,
) -> ModelVersion:
    """A new version, which appears with all its files and tags or not at all."""
    import mlflow
    from mlflow.exceptions import MlflowException

    logged = mlflow.initialize_logged_model(
        name="adapter", tags=tags, source_run_id=run.info.run_id, experiment_id=run.info.experiment_id
    )
    try:
        for path, folder in contents.items():
            store.log_model_artifacts(logged.model_id, str(folder), path or None)
        found = {metric: measured[metric] for metric in metrics.HEADLINE if measured[metric] is not None}
        mlflow.log_metrics(found, model_id=logged.model_id)
    except BaseException:
        store.finalize_logged_model(logged.model_id, "FAILED")
        raise
    store.finalize_logged_model(logged.model_id, "READY")
    try:
        store.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return store.create_model_version(
        name, logged.model_uri, run_id=run.info.run_id, tags=tags, model_id=logged.model_id
    )


def _as_before(version: ModelVersion, decided: dict[str, Any]) -> dict[str, Any]:
    """The decision that the version has, if the new one differs in its time only."""
    try:
        stored: dict[str, Any] = json.loads(read_artifact(version, "gate.json"))
    except ValueError:
        return decided
    return stored if isinstance(stored, dict) and stored | {"decided_at": decided["decided_at"]} == decided else decided


def _put_decision(store: MlflowClient, version: ModelVersion, decision: Path, tags: dict[str, str]) -> None:
    """Puts a new decision on a version; an approval was of the old one and is void."""
    number = str(version.version)
    history.note_rejection(store, version)
    # First and last: one that arrives in between is of a page that showed the old decision.
    history.tag(store, version, approval="pending")
    store.log_model_artifact(str(version.source).removeprefix("models:/"), str(decision))
    for key in ("approval_by", "approval_reason", "approval_refused"):
        if key in version.tags:
            store.delete_model_version_tag(version.name, number, key)
    history.tag(store, version, **tags)
    history.tag(store, version, approval="pending")
