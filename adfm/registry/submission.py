"""Submissions: a trained model with everything by which it is judged, signed, as a logged model of MLflow.

A submitter needs write access to the experiment, not to the registered model: the service makes a version of it
(`adfm.registry.registration`). Its files, which are those of `models:/<name>/<version>` later:

    model/          the folder that training wrote: adapter, processor, chat template, prompt (in adfm.json)
    evaluation/     the folder that evaluation wrote: predictions.parquet, metrics.json, calibration.json, plots
    separation/     hashes of the images that it was trained on and is judged on, and pairs that were checked
    rivals/         predictions of production and anchor on the same images, and rivals.json: of which versions
    params.yaml     the settings as used
    gate.yaml       the submitter's policy; the registered one judges
    lineage.json    data, code, libraries, base model; who submitted it, and for which registered model
    MLmodel, …      what makes an MLflow pyfunc of it, which `adfm.serving.scoring` loads
    model.sig       the signature over all of these
    gate.json       the decision, which the service adds for people to read
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow.parquet as pq
import yaml

from adfm import signing, tracking
from adfm.data import hashes
from adfm.data import shards as shards_
from adfm.errors import AdfmError, Unusable
from adfm.evaluation import calibration as calibration_
from adfm.evaluation import metrics, separation
from adfm.evaluation.calibration import Calibration
from adfm.files import digest, write_json
from adfm.method import prompt
from adfm.models import families, model_folder
from adfm.params import Evaluate, Params
from adfm.registry import policy, pyfunc, reconcile, tables
from adfm.registry.history import History
from adfm.registry.lineage import lineage
from adfm.registry.policy import Policy
from adfm.registry.reconcile import Registry

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion

SUBMITTED_FOR = "adfm_submitted_for"  # tag of a logged model: the registered model that it was submitted for
CONTENTS = "adfm_contents"  # tag of a logged model: digests of its contents, which identify a repeated submission

TEST_IMAGES = Path("separation", "test.parquet")  # hashes of the images that a version is judged on
TRAINED_ON = Path("separation", "trained_on.parquet")  # hashes of the images that it has seen
CHECKED = Path("separation", "checked.parquet")  # pairs that may be near-duplicates, decided by the submitter

HELD_OUT = "test"  # the split that the gate judges on
FREE = ("kfp_", "data_")  # prefixes of the tags that a submitter may choose
AS_REGISTERED, AGAIN = "as registered", "evaluated again"  # origin of the predictions of production or anchor

_PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}  # loading one can run code


class Unfit(Unusable):
    """A submission cannot be judged as it is."""


@dataclass(frozen=True)
class Submission:
    """The files of a submission or version, whose signature was verified."""

    folder: Path
    signer: str  # id of the key that signed them

    @cached_property
    def manifest(self) -> str:
        """Digest of the signed list of files."""
        return signing.manifest(self.folder)

    @cached_property
    def origin(self) -> dict[str, Any]:
        """The content of lineage.json."""
        return _json(self.folder / "lineage.json")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The content of params.yaml."""
        try:
            return dict(yaml.safe_load((self.folder / "params.yaml").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            raise Unfit(f"params.yaml is missing or broken ({error})") from error

    @cached_property
    def about(self) -> dict[str, Any]:
        """The content of evaluation.json."""
        return _json(self.folder / "evaluation" / "evaluation.json")

    @cached_property
    def measured(self) -> dict[str, Any]:
        """The candidate's metrics."""
        every = _json(self.folder / "evaluation" / "metrics.json")
        try:
            return dict(every[self.about["candidate"]])
        except (KeyError, TypeError, ValueError) as error:
            raise Unfit("evaluation/metrics.json does not have the candidate's metrics") from error

    @property
    def predictions(self) -> Path:
        """The file of the prediction table."""
        return self.folder / "evaluation" / "predictions.parquet"

    @property
    def calibration(self) -> Calibration:
        """The calibration; one without a threshold where there is none."""
        return _calibration(self.folder / "evaluation")

    @cached_property
    def contents(self) -> str:
        """Digests of model, predictions and test images."""
        return _contents(self.folder / "evaluation", self.origin)

    def protocol(self) -> tuple[Any, Any]:
        """What must be equal for the predictions of two models to be comparable."""
        return self.origin.get("data", {}).get("test"), self.origin.get("protocol")


def check(submission: Submission, name: str) -> pd.DataFrame:
    """Check that a submission is whole, fits together, and is for the registered model `name`.

    Returns:
        The candidate's predictions.

    Raises:
        AdfmError: It is for another model, its parts are not of one another, or it is not of the held-out split.
    """
    model = submission.folder / "model"
    check_model(model)
    origin = submission.origin
    if origin.get("registered_model") != name:
        raise Unfit(f"it was submitted for the registered model {origin.get('registered_model')!r}, not for {name!r}")
    if origin.get("artifact_digest") != digest(model):
        raise Unfit("its lineage.json is of another model")
    settings = submission.settings.get("evaluate")
    if not isinstance(settings, dict):
        raise Unfit("its params.yaml has no section evaluate")
    try:
        return _check_evaluation(submission.folder / "evaluation", "its evaluation", origin, settings, None)
    except AdfmError as error:  # of a calibration that cannot be read
        raise Unfit(str(error)) from error


def submit(
    registry: Registry,
    model: Path,
    shards: Path,
    evaluation: Path,
    params: Params,
    run: Run,  # counts where the run of the training is not in this store
    tags: Mapping[str, str],
) -> str:
    """Sign a trained model with its evaluation, and log it to MLflow as a submission.

    A submission of the same model with the same predictions that was accepted, or waits, is used again.

    Returns:
        Id of the logged model.

    Raises:
        AdfmError: A folder lacks something, or the evaluation is of other data, settings or split.
    """
    if params.evaluate.split != HELD_OUT:
        raise Unfit(
            f"evaluate.split is {params.evaluate.split!r}: a version is judged on the held-out images, the split "
            f"{HELD_OUT!r} alone. Evaluate with --set evaluate.split={HELD_OUT}, then register."
        )
    family = check_model(model)
    trained_by = tracking.find_run((model_folder.describe(model) or {}).get("mlflow_run_id"))
    origin = lineage(model, shards, params, trained_by) | {
        "protocol": _protocol(family, params.evaluate),
        "registered_model": registry.name,
        "submitted_by": reconcile.user(),
        "tags": dict(tags),
    }
    settings = params.evaluate.model_dump(mode="json")
    _check_evaluation(evaluation, str(evaluation), origin, settings, shards_.ids(shards, params.evaluate.split))
    if same := _same(registry, params.mlflow.experiment, _contents(evaluation, origin)):
        return same
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "version"
        pyfunc.write(folder, bool(model_folder.kinds_of(model)))
        shutil.copytree(model, folder / "model")
        shutil.copytree(evaluation, folder / "evaluation")
        (folder / "params.yaml").write_text(tracking.settings(params), encoding="utf-8")
        (folder / policy.FILE).write_text(policy.dumps(own_policy(registry.history)), encoding="utf-8")
        write_json(origin, folder / "lineage.json")
        _write_separation(folder, model, shards)
        _write_models_to_compare(folder, registry, origin, shards, params)
        signing.sign(folder, registry.keys)
        # The service searches this experiment; the run may be in another one, that of KFP's MLflow plug-in.
        experiment = tracking.experiment(params.mlflow.experiment)
        return _log(registry.store, folder, registry.name, trained_by or run, origin, experiment)


def own_policy(history: History) -> Policy:
    """Return the submitter's policy: `gate.yaml` of the current folder, else the registered one, else the default."""
    if history.policy and not Path(policy.FILE).is_file():
        return policy.registered(history.policy)
    return policy.load()


def check_model(model: Path) -> str:
    """Return the family of a model; raise Unfit if the folder cannot be registered."""
    description = model_folder.describe(model)
    if model_folder.is_detector(model):
        raise Unfit(
            f"{model} is a reference detector, and only language models are registered and served: register the model "
            f"that it was compared with, or use it from its folder: adfm predict --model {model} IMAGES."
        )
    if description is None or not any(model.glob("*.safetensors")):
        raise Unfit(f"{model} is not a model folder (adfm.json and *.safetensors); make one with `adfm train`.")
    if pickles := sorted(str(path) for path in model.rglob("*") if path.suffix in _PICKLES):
        raise Unfit(f"{', '.join(pickles)}: pickles can run code and are not registered; remove them.")
    return str(description["family"])


def read_artifact(version: ModelVersion, path: str) -> str:
    """Read the text of a version's artifact."""
    import mlflow
    from mlflow.exceptions import MlflowException

    def read() -> str:
        with TemporaryDirectory() as folder:
            file = mlflow.artifacts.download_artifacts(f"{version_uri(version)}/{path}", dst_path=folder)
            return Path(file).read_text(encoding="utf-8")

    # MLflow's server overwrites files in place, which cuts off a concurrent download.
    for pause in (0.2, 1.0):  # seconds
        try:
            return read()
        except MlflowException as error:
            if "IncompleteRead" not in str(error):
                raise
        time.sleep(pause)
    return read()


def fetch(uri: str, keys: signing.Keys, to: Path) -> Submission:
    """Download a submission or version, `models:/…`, into a new folder below `to`, and verify its signature.

    Raises:
        Unverified: It is not what a submitter whose key counts has signed.
        AdfmError: Files cannot be read.
    """
    import mlflow

    try:
        folder = mlflow.artifacts.download_artifacts(uri, dst_path=tempfile.mkdtemp(dir=to))
        return Submission(Path(folder), signing.verify(Path(folder), keys, uri))
    except OSError as error:
        raise AdfmError(f"Files of {uri} cannot be read: {error}") from error


def version_uri(version: ModelVersion) -> str:
    """Return `models:/<name>/<version>`."""
    return f"models:/{version.name}/{version.version}"


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
        return content
    except (OSError, ValueError) as error:
        raise Unfit(f"{file.name} is missing or broken ({error})") from error


def _contents(evaluation: Path, origin: dict[str, Any]) -> str:
    """Digests of model, judged predictions and test images, shortened for a tag."""
    predictions = tables.read(evaluation / "predictions.parquet").sort_values("id")
    # What the gate judges only: scores differ in their last digits from machine to machine.
    judged = [name for name in ("id", "predicted", "decision", "iou", "region_iou") if name in predictions]
    text = predictions[judged].to_csv(index=False, float_format="%.4f")
    parts = (str(origin["artifact_digest"]), hashlib.sha256(text.encode()).hexdigest(), str(origin["data"]["test"]))
    return "-".join(part[:32] for part in parts)


def _calibration(evaluation: Path) -> Calibration:
    # An evaluation of before there were thresholds has none: the letter decides then.
    file = evaluation / calibration_.FILE
    return calibration_.read(file) if file.is_file() else Calibration(note=f"it was evaluated without a {file.name}")


def _check_evaluation(
    evaluation: Path, place: str, origin: dict[str, Any], settings: dict[str, Any], ids: list[str] | None
) -> pd.DataFrame:
    """Return the candidate's predictions, after proof that they are of these data, this model and these settings."""
    table = tables.read(evaluation / "predictions.parquet")
    try:
        about = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
        json.loads((evaluation / "metrics.json").read_text(encoding="utf-8"))[about["candidate"]]
        model = origin["artifact_digest"]
        pairs = {  # what the evaluation has, and what it should have
            "split": (about["split"], HELD_OUT),
            "max_new_tokens": (about["settings"]["max_new_tokens"], settings["max_new_tokens"]),
            "fingerprint of the shards": (about["fingerprint"], origin["data"]["test"]),
            "digest of the model": (about.get("candidate_digest", model), model),
        }
        if ids is not None:
            pairs["images"] = sorted(table["id"]), sorted(ids)
        calibration = _calibration(evaluation)
        if calibrated := (evaluation / calibration_.FILE).is_file():
            pairs["digest of the calibrated model"] = calibration.model, model
            for key in ("calibration", "overkill_limit", "escape_limit", "score", "samples"):
                pairs[key] = about["settings"].get(key), settings[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unfit(f"{place} is not a whole evaluation ({error!r}); make it with `adfm evaluate`.") from error
    if differing := [key for key, (present, due) in pairs.items() if present != due]:
        keys = ", ".join(differing)
        other = f"{place} is not an evaluation of this model on these shards with these settings: {keys} differ"
        raise Unfit(f"{other}. Evaluate again with `adfm evaluate`, then register.")
    if "decision" in table:
        # The decisions must be those that a version with this calibration would make.
        decisions = calibration.apply(table)["decision"].fillna("").tolist() if calibrated else None
        if decisions != table["decision"].fillna("").tolist():
            other = f"{place}: the decisions in predictions.parquet are not those of its {calibration_.FILE}"
            raise Unfit(f"{other}. Evaluate again with `adfm evaluate`, then register.")
    return table


def _protocol(family: str, evaluate: Evaluate) -> str:
    """What must be equal, besides the data, for two models' predictions to be comparable, as JSON."""
    messages = hashlib.sha256(json.dumps(prompt.messages(families.get(family).units)).encode()).hexdigest()
    settings = {"split": evaluate.split, "max_new_tokens": evaluate.max_new_tokens}
    return json.dumps({"family": family, **settings, "prompt": messages[:16]})


def _write_separation(folder: Path, model: Path, shards: Path) -> None:
    """Write the hashes of the images that the model is judged on and of those that it has seen."""
    (folder / TEST_IMAGES).parent.mkdir()
    test, seen = hashes.collect(shards, [HELD_OUT]), hashes.of_model(model)
    hashes.write(test, folder / TEST_IMAGES)
    if seen is not None:
        # The threshold is chosen on the validation split of these shards, so that counts as seen.
        seen = hashes.unite([seen, hashes.collect(shards, ["validation"])])
        hashes.write(seen, folder / TRAINED_ON)
        # Pairs that may be near-duplicates are decided here, by the rule itself: the service has the hashes alone.
        pq.write_table(separation.check(test, seen, shards), folder / CHECKED)


def _write_models_to_compare(
    folder: Path, registry: Registry, origin: dict[str, Any], shards: Path, params: Params
) -> None:
    """Write the predictions of production and anchor on these shards, made again where theirs are of other images."""
    history, about = registry.history, {}
    (folder / "rivals").mkdir()
    predictions: dict[str, tuple[pd.DataFrame, dict[str, str]]] = {}
    for role, number in (("production", history.production), ("anchor", history.anchor)):
        version = registry.versions.get(number)
        if version is None:
            continue
        if number not in predictions:
            predictions[number] = _predict(version, registry.keys, origin, shards, params)
        table, about[role] = predictions[number]
        table.to_parquet(folder / "rivals" / f"{role}.parquet")
    write_json(about, folder / "rivals" / "rivals.json")


def _predict(
    version: ModelVersion, keys: signing.Keys, origin: dict[str, Any], shards: Path, params: Params
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Return a version's predictions on these shards: its own if of the same data and protocol, else new ones."""
    from adfm.evaluation import predictions

    with TemporaryDirectory() as temporary:
        other = fetch(version_uri(version), keys, Path(temporary))
        about = {"version": str(version.version), "manifest": other.manifest}
        protocols = [_protocol(family, params.evaluate) for family in families.FAMILIES]
        if other.origin["data"]["test"] == origin["data"]["test"] and other.origin.get("protocol") in protocols:
            return pd.read_parquet(other.predictions), about | {"predictions": AS_REGISTERED}
        model = other.folder / "model"
        # It is judged as the model that it is: with its own precision and image size.
        own = ((model_folder.describe(model) or {}).get("params") or {}).get("model", {})
        kept = {key: own[key] for key in ("dtype", "max_pixels") if key in own}
        settings = params.model_copy(update={"model": params.model.model_copy(update=kept)})
        calibration = other.calibration
        table = calibration.apply(predictions.predict(model, shards, settings, f"version {version.version}"))
        table.attrs["threshold"] = calibration.threshold
        return table, about | {"predictions": AGAIN}


def _same(registry: Registry, experiment: str, contents: str) -> str | None:
    """Return a submission with the same contents: one that was accepted, else one that waits, of the own key."""
    keys = registry.keys
    judged = (step for step in reversed(registry.history.counting) if step.action == "judge")
    step = next((step for step in judged if step.contents == contents), None)
    uri = f"models:/{registry.name}/{step.version}" if step and step.version in registry.versions else None
    if step and uri and _has_contents(uri, keys, contents, [*keys.submitters]):
        return step.submission
    for waiting in waiting_submissions(registry, experiment, contents):
        if _has_contents(f"models:/{waiting.model_id}", keys, contents, [keys.id]):
            return str(waiting.model_id)
    return None


def _has_contents(uri: str, keys: signing.Keys, contents: str, signers: Sequence[str]) -> bool:
    with TemporaryDirectory() as folder:
        try:
            submission = fetch(uri, keys, Path(folder))
            return submission.signer in signers and submission.contents == contents
        except AdfmError:
            return False


def waiting_submissions(registry: Registry, experiment: str, contents: str | None = None) -> list[LoggedModel]:
    """Return the whole submissions in an experiment on which the history has no step, oldest first."""
    import mlflow

    place = tracking.find_experiment(experiment)
    if place is None:
        return []
    query = f"tags.`{SUBMITTED_FOR}` = '{registry.name}'"
    if contents:
        query += f" and tags.`{CONTENTS}` = '{contents}'"
    done = {step.submission for step in registry.history.counting}
    logged = mlflow.search_logged_models([place.experiment_id], query, output_format="list")
    waiting = [each for each in logged if str(each.status) == "READY" and each.model_id not in done]
    return sorted(waiting, key=lambda each: (each.creation_timestamp, each.model_id))


def _log(store: MlflowClient, folder: Path, name: str, run: Run, origin: dict[str, Any], experiment: str) -> str:
    """Log a new model, which is READY with all its files or not at all."""
    import mlflow

    submission = Submission(folder, "")
    tags = {SUBMITTED_FOR: name, CONTENTS: submission.contents}
    tags |= {key: str(origin[key]) for key in ("submitted_by", "artifact_digest")}
    logged = mlflow.initialize_logged_model("adapter", run.info.run_id, tags, experiment_id=experiment)
    try:
        store.log_model_artifacts(logged.model_id, str(folder))
        values = {metric: submission.measured.get(metric) for metric in metrics.HEADLINE}
        mlflow.log_metrics({key: value for key, value in values.items() if value is not None}, model_id=logged.model_id)
    except BaseException:
        store.finalize_logged_model(logged.model_id, "FAILED")
        raise
    store.finalize_logged_model(logged.model_id, "READY")
    return str(logged.model_id)
