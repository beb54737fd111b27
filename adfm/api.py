"""The public Python API: one function for each step from a data set to a model in production.

Paths may be `str` or `Path`. `params` are settings as of `load_params`, by default those of the embedded run. Boxes are
`[x1, y1, x2, y2]` in pixels of the original image, half-open.

The examples run one after another: each uses the output of the one before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adfm.params import Params

if TYPE_CHECKING:
    from adfm.registry.gate import Decision

    File = str | PathLike[str]


def load_params(files: File | Sequence[File] = (), overrides: Sequence[str] = ()) -> Params:
    """Read settings files, later ones over earlier ones, and overrides over all of them.

    Args:
        files: YAML files; keys that none of them has keep their defaults. Without any, `params.yaml` of the working
            folder, if there is one.
        overrides: `key=value`, as `train.steps=50`.

    Returns:
        The settings, one attribute a section.

    Raises:
        AdfmError: A file is missing or not YAML, or keys or values are wrong: all of them are listed.

    Example:
        >>> import adfm
        >>> few = ["train.steps=2", "train.prompts_per_step=2", "train.num_generations=2", "evaluate.bootstrap=50"]
        >>> small = ["model.max_pixels=9216", "sft.steps=2", "sft.batch_size=2", "detector.steps=2"]
        >>> lenient = ["validation.min_images_per_split=2", "validation.min_label_share=0"]
        >>> params = adfm.load_params(overrides=[*few, *small, *lenient])
        >>> params.train.steps
        2
    """
    from adfm.params import load

    return load([Path(files)] if isinstance(files, (str, PathLike)) else [Path(file) for file in files], overrides)


def fetch(source: str, out: File) -> tuple[int, int]:
    """Copy or download a raw data set into a folder, with `manifest.json` (size and SHA-256 of each file). Resumes.

    Args:
        source: A folder, an archive, `s3://bucket/prefix`, `dvc://REPO@REV:PATH`, or `synthetic://`, the embedded set.
        out: Folder to write.

    Returns:
        Number of files, and their bytes.

    Raises:
        AdfmError: The source cannot be read, or has unsafe or clashing file names.

    Example:
        >>> files, size = adfm.fetch("synthetic://?images=20", "raw")
        >>> files > 60
        True
    """
    from adfm.data import sources

    return sources.fetch(source, Path(out))


def convert(raw: File, out: File, params: Params | None = None) -> None:
    """Convert a raw data set to shards: Parquet files of images, masks and boxes, divided into splits. Resumes.

    Args:
        raw: The data set, in a layout that adfm reads (`convert.layout`; detected by default).
        out: Folder to write: `{train,validation,test}-NNNNN.parquet` and `conversion.json`.
        params: Reads `convert`, `split` and `seed`.

    Raises:
        AdfmError: No layout fits, or files are wrong: all of them are listed by cause.

    Example:
        >>> adfm.convert("raw", "shards", params)
    """
    from adfm.data import conversion

    conversion.convert(Path(raw), Path(out), params or Params())


def validate(shards: File, out: File, params: Params | None = None) -> bool:
    """Validate shards and write a report; failing expectations do not raise.

    Args:
        shards: Folder of shards.
        out: Folder to write: `validation.json`, and `index.html` with the images that failed.
        params: Reads `validation`, `convert`, `split`, `model`, `tile`, `mlflow` and `sft.kinds`.

    Returns:
        Whether every critical expectation holds.

    Raises:
        AdfmError: The shards cannot be read, or have other columns.

    Example:
        >>> adfm.validate("shards", "validation", params)
        True
    """
    from adfm.validation import validate as validation

    return validation.validate(Path(shards), Path(out), params or Params())


def sft(shards: File, out: File, params: Params | None = None, *, force: bool = False) -> None:
    """Train a LoRA adapter on target completions, the cold start of GRPO. Resumes from its last checkpoint.

    Args:
        shards: Folder of shards.
        out: Folder to write: adapter, processor, `adfm.json`, `sft_curves.csv`.
        params: Reads `model`, `lora`, `tile`, `sft` and `seed`.
        force: Whether a finished model in `out` is replaced.

    Raises:
        AdfmError: `out` holds a finished model, no image can be learnt from, or the model cannot be loaded.

    Example:
        >>> adfm.sft("shards", "models/sft", params)
    """
    from adfm.training import sft as stage

    stage.sft(Path(shards), Path(out), params or Params(), force)


def train_detector(shards: File, out: File, params: Params | None = None, *, force: bool = False) -> None:
    """Train the reference detector, a small head on frozen image features, which a language model has to beat.

    Args:
        shards: Folder of shards.
        out: Folder to write.
        params: Reads `detector`, `tile` and `seed`.
        force: Whether a finished model in `out` is replaced.

    Raises:
        AdfmError: `out` holds a finished model, or no image can be learnt from.

    Example:
        >>> adfm.train_detector("shards", "models/detector", params)
    """
    from adfm.training import detector

    detector.train(Path(shards), Path(out), params or Params(), force)


def train(shards: File, model: File, out: File, params: Params | None = None, *, force: bool = False) -> None:
    """Train an adapter further by GRPO with the fine-grained reward. Resumes from its last checkpoint.

    Args:
        shards: Folder of shards.
        model: Folder that `sft` wrote.
        out: Folder to write: adapter, processor, `adfm.json`, `reward_curves.csv`.
        params: Reads `model`, `tile`, `train` and `seed`.
        force: Whether a finished model in `out` is replaced.

    Raises:
        AdfmError: `out` holds a finished model, or a health check (`train.health`) stopped the training.

    Example:
        >>> adfm.train("shards", "models/sft", "models/trained", params)
    """
    from adfm.training import grpo

    grpo.train(Path(shards), Path(model), Path(out), params or Params(), force=force)


def evaluate(models: Mapping[str, File], shards: File, out: File, params: Params | None = None) -> dict[str, Any]:
    """Evaluate models on the same held-out images; the last one is the candidate.

    Args:
        models: Name -> base model, model folder, or registered version (`models:/adfm@production`).
        shards: Folder of shards.
        out: Folder to write: metrics, predictions, calibration, plots, report.
        params: Reads `evaluate`, `model`, `tile` and `seed`.

    Returns:
        Each model's metrics by its name, with 95 % intervals: the contents of `metrics.json`.

    Raises:
        AdfmError: A model or the shards cannot be read.

    Example:
        >>> models = {"detector": "models/detector", "sft": "models/sft", "trained": "models/trained"}
        >>> metrics = adfm.evaluate(models, "shards", "evaluation", params)
        >>> 0 <= metrics["trained"]["balanced_accuracy"] <= 1
        True
    """
    import json

    from adfm.evaluation import evaluate as stage

    stage.evaluate({name: str(model) for name, model in models.items()}, Path(shards), Path(out), params or Params())
    metrics: dict[str, Any] = json.loads((Path(out) / "metrics.json").read_text(encoding="utf-8"))
    return metrics


def predict(images: Sequence[File], model: str, params: Params | None = None) -> Iterator[dict[str, Any]]:
    """Run a model on unlabelled images.

    Args:
        images: Image files, and folders of images.
        model: A registered version (`models:/adfm@production`), a model folder, or a base model.
        params: Reads `model` and `evaluate`.

    Yields:
        For each image `image` (its path), `label` (`normal`, `anomalous` or `cannot judge`), `probability` of a defect
        (calibrated; `None` without a score), `threshold`, `boxes`, `reasoning`, `reason` and `model`.

    Raises:
        AdfmError: There are no images, the model cannot be loaded, or images cannot be read. The last is raised after
            all other images, and lists them.

    Example:
        >>> for row in adfm.predict(["raw/gear/test/good"], "models/trained", params):
        ...     assert row["label"] in ("normal", "anomalous", "cannot judge")
    """
    from adfm.serving import predict as serving

    return serving.answers([Path(image) for image in images], model, params or Params())


def gate(
    candidate: File, production: File | None = None, anchor: File | None = None, policy: File | None = None
) -> Decision:
    """Judge a candidate's predictions by the policy, against production's and the anchor's on the same images.

    Args:
        candidate: `predictions.parquet` of an evaluation.
        production: That of the version in production, if any.
        anchor: That of the best version so far, if any.
        policy: A policy file; by default `gate.yaml` of the working folder, or without one the default policy.

    Returns:
        The decision: `verdict` is `passed`, `failed` or `cannot tell`; `rows` has each check with its limits.

    Raises:
        AdfmError: A table or the policy cannot be read, or tables are of other images.

    Example:
        >>> decision = adfm.gate("evaluation/predictions.parquet")
        >>> decision.verdict in ("passed", "failed", "cannot tell")
        True
    """
    from adfm.registry import gate as gate_
    from adfm.registry import policy as policy_
    from adfm.registry import tables

    other, best = (None if file is None else tables.read(Path(file)) for file in (production, anchor))
    by = policy_.load(None if policy is None else Path(policy))
    return gate_.decide(tables.read(Path(candidate)), other, best, by)


def register(model: File, shards: File, evaluation: File, out: File, params: Params | None = None) -> Decision:
    """Register a trained model as a signed version in MLflow, with the gate's decision. Production does not change.

    Args:
        model: Folder that `train` wrote.
        shards: Folder of shards.
        evaluation: Folder that `evaluate` wrote, with `model` as the candidate.
        out: Folder to write: `gate.json`, `registration.json`.
        params: Reads `mlflow`, `evaluate` and `model`.

    Returns:
        The decision, as of `gate`. The version is registered either way.

    Raises:
        AdfmError: A folder is incomplete, the evaluation is of other data, or MLflow cannot be reached.

    Example:
        >>> decision = adfm.register("models/trained", "shards", "evaluation", "registration", params)
    """
    from adfm.registry import registration

    return registration.register(Path(model), Path(shards), Path(evaluation), Path(out), params or Params())


def approve(version: str, model: str = "adfm", *, reason: str = "") -> None:
    """Approve a registered version as the current user of MLflow. `promote` moves it to production.

    Args:
        version: Its number.
        model: The registered model.
        reason: Why, for the history.

    Raises:
        AdfmError: The version does not exist, or MLflow cannot be reached.

    Example:
        A model of two steps does not pass the gate:

        >>> adfm.approve("1")
        Traceback (most recent call last):
        ...
        adfm.registry.reconcile.Refused: Version 1 of adfm cannot be approved: its gate's verdict is 'failed'.
    """
    from adfm.registry import promotion

    promotion.approve(version, model, "approved", reason)


def promote(version: str, model: str = "adfm") -> None:
    """Move the alias `production` to a version whose signature, gate decision and approval are valid.

    Args:
        version: Its number.
        model: The registered model.

    Raises:
        AdfmError: It cannot be promoted: every reason is listed.

    Example:
        >>> adfm.promote("2")
        Traceback (most recent call last):
        ...
        adfm.errors.AdfmError: adfm has no version 2; its versions: 1.
    """
    from adfm.registry import promotion

    promotion.promote(version, model)


def rollback(model: str = "adfm", *, to: str | None = None, why: str = "") -> None:
    """Move the alias `production` back to an earlier version; the one that it leaves needs a new approval to return.

    Args:
        model: The registered model.
        to: Number of the version; by default the one before.
        why: The reason, for the history.

    Raises:
        AdfmError: No earlier version can take over.

    Example:
        >>> adfm.rollback()
        Traceback (most recent call last):
        ...
        adfm.errors.AdfmError: No version of adfm is in production, so there is nothing to roll back.
    """
    from adfm.registry import promotion

    promotion.rollback(model, to=to, why=why)
