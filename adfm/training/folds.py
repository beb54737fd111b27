"""Cross-validation of the recipe on a small data set: `adfm folds SHARDS OUT` with `evaluate.folds`."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from adfm.data import folds as division
from adfm.data import shards as shards_
from adfm.evaluation import calibration, crossvalidation, predictions
from adfm.evaluation.calibration import DECIDED, Calibration
from adfm.evaluation.crossvalidation import FILE, PREDICTIONS
from adfm.files import atomic_folder, digest, replace_json, write_json
from adfm.models import loading
from adfm.params import Params, flat
from adfm.records import SPLITS
from adfm.training import launch

_WORK = "work"
_UNUSED = ("fetch.", "convert.", "validation.", "mlflow.")  # sections that change no metric


def cross_validate(shards: Path, out: Path, params: Params) -> None:
    """Train and evaluate a model for each fold, and write the metrics of all.

    For each fold a model is trained on the other parts, by SFT and GRPO, and evaluated on its own part; without
    `evaluate.folds` an empty result is written. The trainings are runs of the experiment `<mlflow.experiment>-folds` in
    MLflow. Those of an interrupted cross-validation are kept in `<OUT>.partial/` and used when it is started again.

    Args:
        shards: Folder of shards; train, validation and test are pooled.
        out: Folder to write: `cross-validation.json`, the metrics with their intervals and what each fold was trained
            and evaluated on; `cross-validation.parquet`, the predictions with the fold's number, each image once.
        params: All settings of training and evaluation.

    Raises:
        AdfmError: The data set cannot be divided into so many folds, or a training or an evaluation fails.
    """
    count = params.evaluate.folds
    if not count:
        shutil.rmtree(out.with_name(out.name + ".partial"), ignore_errors=True)
        with atomic_folder(out) as partial:
            write_json({"folds": []}, partial / FILE)
        print("evaluate.folds is 0: no cross-validation")
        return
    codes = division.assign(shards, params)
    with atomic_folder(out, keep_partial=True) as partial:
        work = _work(partial / _WORK, shards, params)
        # Apart from the runs of models that may be registered.
        experiment = {"experiment": f"{params.mlflow.experiment[:250]}-folds"}
        own = params.model_copy(update={"mlflow": params.mlflow.model_copy(update=experiment)})
        parts = [work / f"{fold + 1}" for fold in range(count)]
        for fold, part in enumerate(parts):
            train, validation, test = np.bincount(codes[fold], minlength=len(SPLITS)).tolist()
            images = f"{train} images train, {validation} validate, {test} are evaluated"
            print(f"cross-validation, fold {fold + 1} of {count}: {images}", flush=True)
            _train(shards, part, codes[fold], own)
        # All trainings first: a model that predicts in this process would hold GPU memory that the next one needs.
        tables = [_predictions(part, params, f"fold {fold + 1} of {count}") for fold, part in enumerate(parts)]
        results = _figures(tables, codes, shards, params)
        write_json(results, partial / FILE)
        numbered = [
            pa.Table.from_pandas(table, schema=DECIDED, preserve_index=False).append_column(
                "fold", pa.array(np.full(len(table), fold + 1))
            )
            for fold, table in enumerate(tables)
        ]
        pq.write_table(pa.concat_tables(numbered), partial / PREDICTIONS)
        shutil.rmtree(work)
    print(crossvalidation.section(results))


def _work(work: Path, shards: Path, params: Params) -> Path:
    """Return the folder of the trainings, emptied if those in it are of other data, models or settings."""
    settings = {key: value for key, value in flat(params).items() if not key.startswith(_UNUSED)}
    base = loading.identity(params.model.name, params.model)
    identity = json.loads(json.dumps({"data": shards_.fingerprint(shards), "base": base, "settings": settings}))
    file = work / "identity.json"
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != identity:
        print(f"{work}: the trainings are of other data, models or settings and are removed")
        shutil.rmtree(work)
    work.mkdir(exist_ok=True)
    replace_json(identity, file)
    return work


def _train(shards: Path, part: Path, codes: NDArray[np.int8], params: Params) -> None:
    own = part / "shards"
    if not own.exists():
        unfinished = part / "shards.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        pooled = zip(shards_.read(shards), codes.tolist(), strict=True)
        records = (replace(record, split=SPLITS[code]) for record, code in pooled)
        shards_.write(records, unfinished, params.convert.shard_images)
        shutil.copy2(shards / "conversion.json", unfinished)
        unfinished.rename(own)  # when complete: an interrupted run continues with it
    # Each in a process of its own, which leaves no GPU memory behind.
    if not (part / "sft").exists():
        launch.cold_start(own, part / "sft", params)
    if not (part / "trained").exists():
        launch.on_gpus(own, part / "sft", part / "trained", params, gpus=1)


def _predictions(part: Path, params: Params, describe: str) -> pd.DataFrame:
    """Return the predictions of a fold's model on its part; the threshold is chosen on its validation split."""
    shards, model = part / "shards", part / "trained"
    splits = [split for split in ("validation", "test") if any(shards.glob(f"{split}-*.parquet"))]
    tables = predictions.predict_splits(model, shards, params, describe, splits, part / "answers")
    if "validation" in tables:
        fitted = calibration.fit(tables["validation"], params.evaluate, digest(model))
    else:
        fitted = Calibration(note="the fold has no validation split, on which a threshold is chosen")
    return fitted.apply(tables["test"])


def _figures(tables: list[pd.DataFrame], codes: NDArray[np.int8], shards: Path, params: Params) -> dict[str, Any]:
    counts = [np.bincount(each, minlength=len(SPLITS)).tolist() for each in codes]
    labels = [int((table["label"] == "anomalous").sum()) for table in tables]
    resamples = params.evaluate.bootstrap
    return {
        "folds": [
            {**dict(zip(SPLITS, count, strict=True)), "anomalous": anomalous}
            for count, anomalous in zip(counts, labels, strict=True)
        ],
        "images": sum(map(len, tables)),
        "anomalous": sum(labels),
        "metrics": crossvalidation.summarize(tables, [count[0] for count in counts], resamples, params.seed),
        "fingerprint": shards_.fingerprint(shards),
        "seed": params.seed,
        "settings": params.model_dump(mode="json", by_alias=True),
    }
