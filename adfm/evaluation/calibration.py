"""Calibrated probabilities, and the threshold from which on an image is flagged.

A model's raw `score` ranks images but need not be a probability: "0.99" may be right in 80 of 100 cases. A calibration
is fitted on the validation split and maps scores to probabilities; the threshold is chosen on the same images for a
stated limit, of overkill (`evaluate.overkill_limit`) or of escapes (`evaluate.escape_limit`). An image is flagged if
its probability is at least the threshold. Evaluation, the gate, `adfm predict` and a served version all decide by it.

Methods (`evaluate.calibration`):

- `temperature`: p = sigmoid(logit(score) / temperature + bias), by logistic regression on the logit (temperature
  scaling, Guo et al., arXiv 1706.04599, with the bias of Platt, "Probabilistic outputs for support vector machines",
  1999, because a score of 0.5 need not be even odds). Two numbers, so that a hundred images suffice. Keeps the order of
  the images.
- `isotonic`: the best non-decreasing step-like function. It follows any shape, wants about 1,000 images, and makes
  ties: images that had an order may get the same probability, AUROC may change, and a limit is used up less exactly.
- `none`: the score as it is.

A probability is stated for the share of defects that the validation split has. A line with fewer defects sees a lower
one behind the same number; the threshold's overkill and escapes do not depend on that share.

Without a validation split, or where no threshold keeps the limit, the threshold is `None` and the letter decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adfm.errors import AdfmError
from adfm.evaluation.predictions import PREDICTIONS
from adfm.params import Evaluate
from adfm.records import Label

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]

FILE = "calibration.json"
"""In an evaluation's folder, and so in a version: `evaluation/calibration.json`."""

DIGEST_TAG = "calibration_digest"
"""Of a version: the digest of that file."""

DECIDED = pa.schema([*PREDICTIONS, pa.field("probability", pa.float64()), pa.field("decision", pa.string())])
"""A prediction table with decisions: `probability` is calibrated, `decision` the label at the threshold."""

# Scores of 0 and 1 have no logit. Scores come within 1e-6 of 1 and still have an order, so the bound is beyond that.
_EPSILON = 1e-9
_LEAST_SLOPE = 1e-6
_UNKEPT = "no threshold keeps the limit on the validation split: answers without a score alone exceed it"


class Calibration(BaseModel):
    """What makes probabilities and decisions of a model's scores.

    Args:
        method: How scores become probabilities.
        parameters: Of `temperature`: `temperature` and `bias`; of `isotonic`: `scores` and `probabilities`, the corners
            of the function, linear between them; of `none`: nothing.
        threshold: The probability from which on an image is flagged; `None`: the letter decides.
        limit: What the threshold was chosen for, as `{"overkill": 0.05}`; empty: a detector's own threshold.
        images: Images of the validation split that it comes from.
        model: Digest of the model's folder; `None` for a base model.
        data: Fingerprint of the validation split.
        note: Reason for a missing threshold, or for a method other than the configured one; empty otherwise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["temperature", "isotonic", "none"] = "none"
    parameters: dict[str, Any] = {}
    threshold: float | None = Field(default=None, ge=0, le=1)
    limit: dict[Literal["overkill", "escapes"], float] = {}
    images: int = Field(default=0, ge=0)
    model: str | None = None
    data: str | None = None
    note: str = ""

    def probability(self, scores: Sequence[float | None] | Floats) -> Floats:
        """Calibrated probabilities of a defect, shape (n,); NaN for images without a score."""
        score = np.asarray(scores, dtype=float)
        if self.method == "temperature":
            from scipy.special import expit

            return np.asarray(expit(_logit(score) / self.parameters["temperature"] + self.parameters["bias"]))
        if self.method == "isotonic":
            return np.asarray(np.interp(score, self.parameters["scores"], self.parameters["probabilities"]))
        return score

    def judge(self, predicted: Label | None, score: float | None) -> tuple[float | None, Label | None]:
        """Probability and decision for one answer.

        Args:
            predicted: Label of the model's letter; `None` if the completion has no valid letter.
            score: The raw score; `None` where there is none.

        Returns:
            The calibrated probability, `None` without a score; and the decision, `None` where there is neither a
            threshold with a score nor a clean letter.
        """
        probability = None if score is None else float(self.probability([score])[0])
        return probability, _decision(predicted, probability, self.threshold)

    def apply(self, table: pd.DataFrame) -> pd.DataFrame:
        """The prediction table with the columns `probability` and `decision`."""
        probability = self.probability(_scores(table))
        letters = table["predicted"].astype(object).where(table["predicted"].notna(), None)
        decisions = [
            _decision(letter, None if np.isnan(value) else value, self.threshold)
            for letter, value in zip(letters, probability, strict=True)
        ]
        decided = table.assign(probability=probability)
        decided["decision"] = np.array(decisions, dtype=object)
        return decided

    @property
    def summary(self) -> str:
        """One sentence for people: what decides."""
        if self.threshold is None:
            return f"The letter decides: {self.note or 'there is no threshold'}."
        chosen = (
            f"An image is flagged from a probability of {self.threshold:.6g} on, chosen on {self.images} validation"
        )
        if not self.limit:
            return f"{chosen} images for the best balanced accuracy."
        ((kind, share),) = self.limit.items()
        words = {"overkill": "normal images are flagged", "escapes": "defective images are missed"}[kind]
        return f"{chosen} images so that at most {share:.1%} of the {words}."


def fit(table: pd.DataFrame, settings: Evaluate, model: str | None = None, data: str | None = None) -> Calibration:
    """Fits probabilities and chooses the threshold on the validation split.

    Args:
        table: Prediction table of the validation split: `label`, `predicted`, `score`.
        settings: Reads `calibration`, `overkill_limit` and `escape_limit`.
        model: As in `Calibration`.
        data: As in `Calibration`.
    """
    method, parameters, note = _fit(table, settings.calibration)
    calibration = Calibration(
        method=method, parameters=parameters, limit=limit_of(settings), images=len(table), model=model, data=data
    )
    threshold, why = choose_threshold(table, calibration.probability(_scores(table)), calibration.limit)
    note = "; ".join(part for part in (note, why) if part)
    return calibration.model_copy(update={"threshold": threshold, "note": note})


def limit_of(settings: Evaluate) -> dict[Literal["overkill", "escapes"], float]:
    """The one limit that is set, as `Calibration.limit` has it."""
    if settings.overkill_limit is not None:
        return {"overkill": settings.overkill_limit}
    assert settings.escape_limit is not None  # the settings see to it
    return {"escapes": settings.escape_limit}


def read(file: Path, model: str | None = None) -> Calibration:
    """Reads a `calibration.json`.

    Args:
        file: The file.
        model: Digest of the model's folder that it has to belong to; `None`: of any.

    Raises:
        AdfmError: It cannot be read, or belongs to another model.
    """
    try:
        calibration = _parse(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise AdfmError(f"{file} cannot be read ({error}); `adfm evaluate` writes it.") from error
    if model is not None and calibration.model != model:
        raise AdfmError(
            f"{file} was made for another model (digest {calibration.model}, not {model}); "
            "evaluate and register the model again."
        )
    return calibration


def _parse(text: str, place: str) -> Calibration:
    try:
        calibration = Calibration.model_validate_json(text)
        calibration.probability([0.5])  # has the parameters of its method
    except (ValidationError, LookupError, TypeError, ValueError, ZeroDivisionError) as error:
        raise AdfmError(f"{place} is not a calibration ({error}); evaluate and register the model again.") from error
    return calibration


def of_version(folder: Path, model: str) -> Calibration:
    """The calibration in the folder of a version; one without a threshold, which says so, where there is none.

    Args:
        folder: The version's files, whose signature is verified.
        model: Digest of its model.

    Raises:
        AdfmError: The file cannot be read, or was made for another model.
    """
    file = folder / "evaluation" / FILE
    if not file.is_file():
        return Calibration(note=f"the version was registered without a {FILE}")
    return read(file, model)


def choose_threshold(
    table: pd.DataFrame, probability: Floats, limit: dict[Literal["overkill", "escapes"], float]
) -> tuple[float | None, str]:
    """The threshold that keeps a limit, and no more careful than that.

    For overkill it is the lowest that flags at most that share of the normal images; for escapes the highest that
    misses at most that share of the defective ones. Of all thresholds that decide the validation images in that way it
    is the one in the middle, so that the last digits of a probability, which depend on the batch, flip nothing. Images
    with the same probability are flagged together. An image without a score is decided by its letter at any threshold,
    and wrongly without one.

    Args:
        table: Prediction table: `label`, `predicted`.
        probability: Of each image, (n,); NaN where there is none.
        limit: The kind of limit and its share, in [0, 1).

    Returns:
        The threshold, in [0, 1], and an empty text; or `None`, and why there is none.
    """
    ((kind, share),) = limit.items()
    anomalous = (table["label"] == "anomalous").to_numpy(dtype=bool)
    # Without normal images any threshold at all keeps a limit of escapes, 0 included, which flags everything.
    lacking = "normal" if anomalous.all() else "anomalous" if kind == "escapes" and not anomalous.any() else ""
    if lacking:
        return None, f"the validation split has no {lacking} image to choose a threshold on"
    rank = _ranks(table, probability, anomalous)
    known = rank[(rank >= 0) & (rank <= 1)]
    if kind == "overkill":
        normal = np.sort(rank[~anomalous])[::-1]
        passed = normal[int(np.floor(share * len(normal) + 1e-9))]  # the highest that has to be passed
        if passed >= 1:
            return None, _UNKEPT
        low, high = passed, np.min(known[known > passed], initial=1.0)
        if passed < 0:
            return 0.0, ""
        middle = (low + high) / 2
        return float(middle if middle > low else high), ""
    defects = np.sort(rank[anomalous])
    flagged = defects[int(np.floor(share * len(defects) + 1e-9))]  # the lowest that has to be flagged
    if flagged < 0:
        return None, _UNKEPT
    if flagged > 1:
        return 1.0, ""
    low = np.max(known[known < flagged], initial=0.0)
    middle = (low + flagged) / 2
    return float(middle if middle > low else flagged), ""


def _fit(
    table: pd.DataFrame, method: Literal["temperature", "isotonic", "none"]
) -> tuple[Literal["temperature", "isotonic", "none"], dict[str, Any], str]:
    """The method that can be fitted, its parameters, and why it is not the one asked for."""
    if method == "none":
        return "none", {}, ""
    score = _scores(table)
    scored = ~np.isnan(score)
    score, defective = score[scored], (table["label"] == "anomalous").to_numpy(dtype=bool)[scored]
    if not defective.any() or defective.all():
        return "none", {}, "scores are not calibrated: the validation split does not have scored images of both labels"
    if method == "isotonic":
        corners, steps = _isotonic(score, defective)
        if steps[0] < steps[-1]:
            return method, {"scores": corners, "probabilities": steps}, ""
    else:
        slope, bias = _platt(_logit(score), defective)
        if slope > _LEAST_SLOPE:
            return method, {"temperature": 1 / slope, "bias": bias}, ""
    return "none", {}, "scores are not calibrated: on the validation split they do not rise with defects"


def _platt(logit: Floats, defective: NDArray[np.bool_]) -> tuple[float, float]:
    """Slope and bias of the logistic regression of the label on the logit; slope 0 where the logits are all alike.

    Labels are softened as Platt has it, (n + 1) / (n + 2) for 1 and 1 / (n + 2) for 0, with n images of that label:
    where scores separate the labels, which they do on small splits, the slope would be infinite otherwise.
    """
    from sklearn.linear_model import LogisticRegression

    if np.ptp(logit) < 1e-9:
        return 0.0, 0.0
    positive, negative = int(defective.sum()), int((~defective).sum())
    soft = np.where(defective, (positive + 1) / (positive + 2), 1 / (negative + 2))
    inputs, labels = np.concatenate([logit, logit])[:, None], np.repeat([1, 0], len(logit))
    regression = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-9, max_iter=200)
    # It takes no soft labels: each image counts as both, with the weight of each.
    regression.fit(inputs, labels, sample_weight=np.concatenate([soft, 1 - soft]))
    return float(regression.coef_[0, 0]), float(regression.intercept_[0])


def _isotonic(score: Floats, defective: NDArray[np.bool_]) -> tuple[list[float], list[float]]:
    """Corners of the best non-decreasing function of the score."""
    from sklearn.isotonic import IsotonicRegression

    regression = IsotonicRegression(y_min=0, y_max=1).fit(score, defective.astype(float))
    return regression.X_thresholds_.tolist(), regression.y_thresholds_.tolist()


def _decision(predicted: Label | None, probability: float | None, threshold: float | None) -> Label | None:
    if probability is None or threshold is None:
        return predicted
    return "anomalous" if probability >= threshold else "normal"


def _ranks(table: pd.DataFrame, probability: Floats, anomalous: NDArray[np.bool_]) -> Floats:
    """Probabilities; without one 2 (always flagged) or -1 (never), by the letter, and wrong without a letter."""
    letter = table["predicted"].astype(object)
    flagged = np.where(letter.isna(), ~anomalous, letter == "anomalous")
    return np.where(np.isnan(probability), np.where(flagged, 2.0, -1.0), probability)


def _scores(table: pd.DataFrame) -> Floats:
    return np.asarray(table["score"].to_numpy(dtype=float, na_value=np.nan))


def _logit(score: Floats) -> Floats:
    from scipy.special import logit

    return np.asarray(logit(np.clip(score, _EPSILON, 1 - _EPSILON)))
