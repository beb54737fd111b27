"""Calibrated probabilities, and the threshold from which on an image is flagged.

A calibration maps a model's raw `score`, which ranks images, to a probability. It is fitted on the validation split,
and the threshold is chosen on the same images for a limit of overkill or of escapes. Evaluation, the gate, `adfm
predict` and a served version all decide by it; without a threshold the letter decides. A probability holds for the
share of defects that the validation split has; the threshold's overkill and escapes do not depend on it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy import special

from adfm.errors import AdfmError
from adfm.evaluation.metrics import Floats, decide, is_defective, numbers
from adfm.evaluation.predictions import PREDICTIONS
from adfm.params import Evaluate
from adfm.records import Label

Method = Literal["temperature", "isotonic", "none"]
Limit = Literal["overkill", "escapes"]

FILE = "calibration.json"  # in an evaluation's folder, and so in a version: `evaluation/calibration.json`
DIGEST_TAG = "calibration_digest"  # of a version: the digest of that file

# A prediction table with decisions: `probability` is calibrated, `decision` the label at the threshold.
DECIDED = pa.schema([*PREDICTIONS, pa.field("probability", pa.float64()), pa.field("decision", pa.string())])

# Scores of 0 and 1 have no logit. Scores come within 1e-6 of 1 and still have an order, so the bound is beyond that.
_EPSILON = 1e-9
_LEAST_SLOPE = 1e-6
_UNKEPT = "no threshold keeps the limit on the validation split: answers without a score alone exceed it"


class Calibration(BaseModel):
    """The probability of a model's score, and the decision by it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method = "none"
    # Of `temperature`: `temperature` and `bias`; of `isotonic`: `scores` and `probabilities`, the corners of the
    # function, linear between them; of `none`: nothing.
    parameters: dict[str, Any] = {}
    threshold: float | None = Field(default=None, ge=0, le=1)  # `None`: the letter decides
    limit: dict[Limit, float] = {}  # that the threshold keeps; a detector's own keeps none
    images: int = Field(default=0, ge=0)  # of the validation split that it comes from
    model: str | None = None  # digest of the model's folder; `None` for a base model
    data: str | None = None  # fingerprint of the validation split
    note: str = ""  # why there is no threshold, or another method than the configured one

    def probability(self, scores: Sequence[float | None] | Floats) -> Floats:
        """Calibrated probabilities of a defect, shape (n,); NaN for images without a score."""
        score = np.asarray(scores, dtype=float)
        if self.method == "temperature":
            # Temperature scaling (Guo et al., arXiv 1706.04599), with a bias, because a score of 0.5 need not be even
            # odds. Two numbers, so that a hundred images suffice, and the images keep their order.
            return np.asarray(special.expit(_logit(score) / self.parameters["temperature"] + self.parameters["bias"]))
        if self.method == "isotonic":
            return np.asarray(np.interp(score, self.parameters["scores"], self.parameters["probabilities"]))
        return score

    def judge(self, predicted: Label | None, score: float | None) -> tuple[float | None, Label | None]:
        """Return probability and decision for one answer.

        `predicted` is the label of the model's letter, `None` if the completion has no valid one. The probability is
        `None` without a score; the decision, where there is neither a threshold with a score nor a clean letter.
        """
        probability = None if score is None else float(self.probability([score])[0])
        if probability is None or self.threshold is None:
            return probability, predicted
        return probability, "anomalous" if probability >= self.threshold else "normal"

    def apply(self, table: pd.DataFrame) -> pd.DataFrame:
        """The prediction table with the columns `probability` and `decision`."""
        probability = self.probability(numbers(table, "score"))
        return table.assign(probability=probability, decision=decide(table, probability, self.threshold))

    @property
    def summary(self) -> str:
        """One sentence for people: what decides."""
        if self.threshold is None:
            return f"The letter decides: {self.note or 'there is no threshold'}."
        chosen = f"An image is flagged from a probability of {self.threshold:.6g} on, chosen on {self.images}"
        if not self.limit:
            return f"{chosen} validation images for the best balanced accuracy."
        ((kind, share),) = self.limit.items()
        words = {"overkill": "normal images are flagged", "escapes": "defective images are missed"}[kind]
        return f"{chosen} validation images so that at most {share:.1%} of the {words}."


def fit(table: pd.DataFrame, settings: Evaluate, model: str | None = None, data: str | None = None) -> Calibration:
    """Fit probabilities and choose the threshold on `table`, of the validation split; `model`, `data` as the fields."""
    method, parameters, note = _fit(table, settings.calibration)
    limits: dict[Limit, float | None] = {"overkill": settings.overkill_limit, "escapes": settings.escape_limit}
    limit = {kind: share for kind, share in limits.items() if share is not None}  # the settings have exactly one
    fitted = Calibration(method=method, parameters=parameters, limit=limit, images=len(table), model=model, data=data)
    threshold, why = choose_threshold(table, fitted.probability(numbers(table, "score")), limit)
    return fitted.model_copy(update={"threshold": threshold, "note": "; ".join(filter(None, (note, why)))})


def read(file: Path, model: str | None = None) -> Calibration:
    """Read a `calibration.json`, of the model with this digest, or of any.

    Raises:
        AdfmError: It cannot be read, or belongs to another model.
    """
    try:
        calibration = Calibration.model_validate_json(file.read_text(encoding="utf-8"))
        calibration.probability([0.5])  # fails without the parameters of its method
    except (OSError, UnicodeDecodeError) as error:
        raise AdfmError(f"{file} cannot be read ({error}); `adfm evaluate` writes it.") from error
    except (ValidationError, LookupError, TypeError, ValueError, ZeroDivisionError) as error:
        raise AdfmError(f"{file} is not a calibration ({error}); evaluate and register the model again.") from error
    if model is not None and calibration.model != model:
        other = f"{file} was made for another model (digest {calibration.model}, not {model})"
        raise AdfmError(f"{other}; evaluate and register the model again.")
    return calibration


def of_version(folder: Path, model: str) -> Calibration:
    """Read the calibration of a verified version for the model with this digest; without a threshold if it has none.

    Raises:
        AdfmError: As of `read`.
    """
    file = folder / "evaluation" / FILE
    if not file.is_file():
        return Calibration(note=f"the version was registered without a {FILE}")
    return read(file, model)


def choose_threshold(table: pd.DataFrame, probability: Floats, limit: dict[Limit, float]) -> tuple[float | None, str]:
    """Choose the threshold that keeps a limit, and no more careful than that; or return `None`, and why there is none.

    For overkill it is the lowest that flags at most that share of the normal images; for escapes the highest that
    misses at most that share of the defective ones. An image without a score (NaN in `probability`) is decided by its
    letter at any threshold, and wrongly without one.
    """
    ((kind, share),) = limit.items()
    anomalous = is_defective(table)
    # Without normal images any threshold at all keeps a limit of escapes, 0 included, which flags everything.
    missing = "normal" if anomalous.all() else "anomalous" if kind == "escapes" and not anomalous.any() else ""
    if missing:
        return None, f"the validation split has no {missing} image to choose a threshold on"
    letter = table["predicted"].astype(object)
    flagged = np.where(letter.isna(), ~anomalous, letter == "anomalous")
    rank = np.where(np.isnan(probability), np.where(flagged, 2.0, -1.0), probability)
    known = rank[(rank >= 0) & (rank <= 1)]
    images = np.sort(rank[anomalous] if kind == "escapes" else rank[~anomalous])
    spent = int(np.floor(share * len(images) + 1e-9))
    if kind == "overkill":
        low = images[len(images) - 1 - spent]  # the highest that has to be passed
        if low >= 1:
            return None, _UNKEPT
        if low < 0:
            return 0.0, ""
        high = np.min(known[known > low], initial=1.0)
    else:
        high = images[spent]  # the lowest that has to be flagged
        if high < 0:
            return None, _UNKEPT
        if high > 1:
            return 1.0, ""
        low = np.max(known[known < high], initial=0.0)
    # All thresholds above `low` up to `high` decide alike here. The middle one is safest: the last digits of a
    # probability, which depend on the batch, flip nothing.
    middle = (low + high) / 2
    return float(middle if middle > low else high), ""


def _fit(table: pd.DataFrame, method: Method) -> tuple[Method, dict[str, Any], str]:
    """Return the method that can be fitted, its parameters, and why it is not the configured one."""
    if method == "none":
        return "none", {}, ""
    score = numbers(table, "score")
    scored = ~np.isnan(score)
    score, defective = score[scored], is_defective(table)[scored]
    if not defective.any() or defective.all():
        return "none", {}, "scores are not calibrated: the validation split does not have scored images of both labels"
    if method == "isotonic":
        from sklearn.isotonic import IsotonicRegression

        # It follows any shape, but needs about 1,000 images, and makes ties: images that had an order may get the same
        # probability, AUROC may change, and a limit is used up less exactly.
        fitted = IsotonicRegression(y_min=0, y_max=1).fit(score, defective.astype(float))
        corners, steps = fitted.X_thresholds_.tolist(), fitted.y_thresholds_.tolist()
        if steps[0] < steps[-1]:
            return method, {"scores": corners, "probabilities": steps}, ""
    else:
        slope, bias = _platt(_logit(score), defective)
        if slope > _LEAST_SLOPE:
            return method, {"temperature": 1 / slope, "bias": bias}, ""
    return "none", {}, "scores are not calibrated: on the validation split they do not rise with defects"


def _platt(logit: Floats, defective: NDArray[np.bool_]) -> tuple[float, float]:
    """Fit a logistic regression of the label on the logit; return slope and bias."""
    from sklearn.linear_model import LogisticRegression

    if np.ptp(logit) < 1e-9:
        return 0.0, 0.0
    # Labels are softened (Platt, "Probabilistic outputs for support vector machines", 1999): where scores separate the
    # labels, which they do on small splits, the slope would be infinite otherwise.
    positive, negative = int(defective.sum()), int((~defective).sum())
    soft = np.where(defective, (positive + 1) / (positive + 2), 1 / (negative + 2))
    inputs, labels = np.concatenate([logit, logit])[:, None], np.repeat([1, 0], len(logit))
    regression = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-9, max_iter=200)
    # It takes no soft labels: each image counts as both, with the weight of each.
    regression.fit(inputs, labels, sample_weight=np.concatenate([soft, 1 - soft]))
    return float(regression.coef_[0, 0]), float(regression.intercept_[0])


def _logit(score: Floats) -> Floats:
    return np.asarray(special.logit(np.clip(score, _EPSILON, 1 - _EPSILON)))
