"""Input guard: refuse images that the model cannot judge, because they are unlike its training images.

The guard is fitted with every evaluation and written to `guard.json` beside `calibration.json`, so that it is signed
and served with the version. docs/serving.md lists the kinds of images that it refuses.
"""

import io
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adfm.data import shards as shards_
from adfm.errors import AdfmError
from adfm.evaluation.metrics import Floats
from adfm.process import cpus

Kind = Literal["uniform", "black", "white", "size", "shape", "far"]

FILE = "guard.json"  # in an evaluation's folder, and so in a version: `evaluation/guard.json`

# What is measured on the reduced copy of an image: brightness, colour, edges at several scales, sharpness.
STATISTICS = (
    *("brightness", "contrast", "dark end", "middle grey", "bright end"),
    *("red against green", "yellow against blue", "colourfulness"),
    *("edges of 1 pixel", "edges of 2 pixels", "edges of 4 pixels", "edges of 8 pixels"),
    *("direction of fine edges", "direction of coarse edges", "sharpness"),
)
_LEVELS = ("brightness", "dark end", "middle grey", "bright end", "red against green", "yellow against blue")
# Least spread of a statistic in [0, 1], and of a logarithm: less is noise of the encoding.
_LEAST_SPREAD = [0.01 if name in _LEVELS else 0.05 for name in STATISTICS]

_SIDE = 256  # pixels of the longer side of the reduced copy; smaller images keep their size
_LEAST_SIDE = 16  # of its shorter side, so that there are edges of 8 pixels
_BLACK, _WHITE = 10, 245  # grey values up to which, and from which on, a pixel is black or white
_SAME = 2  # grey values that the pixels of a uniform image may differ by, after JPEG
_SIZE_MARGIN, _SHAPE_MARGIN = 1.5, 1.25  # factors beyond the range of the training images
_MARGIN = 1.25  # factor of the limit of the distance
_SHARE = 0.001  # of the validation images that may lie beyond the limit before the margin; of fewer than 1,000: none
_TRAINING_SHARE = 0.01  # of the training images; more, because mislabelled and odd images are among them
_RIDGE = 0.05  # added to the covariance: directions in which a category hardly varies are not everything
_IMAGES = 2000  # of a split that are measured at most
_LEAST = 20  # training images to measure a distance to


class BadGuard(AdfmError):
    """A `guard.json` cannot be read, or was made by another release."""

    exit_code = 2


class Measured(NamedTuple):
    """An image's size, and what the guard measures on its reduced copy."""

    size: tuple[int, int]
    statistics: Floats  # the values of `STATISTICS`, (n,)
    black: float  # share of its pixels
    white: float
    uniform: bool


class Refusal(NamedTuple):
    """Why an image cannot be judged."""

    kind: Kind  # for counting
    reason: str  # a phrase for people, without the image's name: "it is black"


class Range(BaseModel):
    """Least and greatest value of the training and validation images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    high: Annotated[float, Field(gt=0, allow_inf_nan=False)]

    def holds(self, value: float, margin: float) -> bool:
        """Whether a value lies in the range widened by a factor."""
        return self.low / margin <= value <= self.high * margin


class Guard(BaseModel):
    """The limits that an image must keep to be judged."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    side: Range | None = None  # longer sides in pixels; `None`: any
    shape: Range | None = None  # width over height; `None`: any
    black: Annotated[float, Field(ge=0, le=1)] = 0.0  # the largest share of black pixels
    white: Annotated[float, Field(ge=0, le=1)] = 0.0
    statistics: tuple[str, ...] = STATISTICS  # of the program that fitted it
    mean: list[float] = []  # of each statistic over the training images
    spread: list[Annotated[float, Field(gt=0)]] = []  # standard deviation of each within a category
    covariance: list[list[float]] = []  # of the standardised statistics within a category
    references: list[list[float]] = []  # standardised statistics of the training images; empty: no distance is judged
    limit: Annotated[float, Field(ge=0)] = 0.0  # of the whitened distance to the nearest of them
    images: dict[str, int] = {}  # of each split that it comes from
    split: str = "test"  # that was evaluated
    tested: Annotated[int, Field(ge=0)] = 0  # images of it that were tried
    refused: dict[Kind, int] = {}  # how many of those, by kind
    note: str = ""  # why no distance is judged

    @model_validator(mode="after")
    def _fits(self) -> Self:
        count = len(self.statistics)
        if self.references:
            rows = [self.mean, self.spread, *self.covariance, *self.references]
            if len(self.covariance) != count or any(len(row) != count for row in rows):
                raise ValueError(f"it does not have {count} values a row")
            try:
                np.linalg.cholesky(np.asarray(self.covariance))
            except np.linalg.LinAlgError as error:
                raise ValueError("its covariance is not one") from error
        return self

    @cached_property
    def _whitening(self) -> Floats:
        return np.asarray(np.linalg.cholesky(np.linalg.inv(np.asarray(self.covariance))))

    @cached_property
    def _whitened(self) -> Floats:
        return np.asarray(np.asarray(self.references) @ self._whitening)

    def judge(self, image: Image.Image) -> Refusal | None:
        """Return why the model cannot judge an image, upright RGB at its own size; `None` if it can."""
        return self._judge(measure(image))

    @property
    def summary(self) -> str:
        """One sentence for people: the share of images that it refuses, or why it refuses few."""
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.refused.items())
        counted = f"Of {self.tested} {self.split} images {sum(self.refused.values())} cannot be judged"
        return f"{counted}{f' ({kinds})' if kinds else ''}." + (f" {self.note}" if self.note else "")

    def _judge(self, image: Measured) -> Refusal | None:
        width, height = image.size
        if image.uniform:
            colour = "black" if image.black == 1 else "white" if image.white == 1 else "of one colour"
            return Refusal("uniform", f"it is {colour}, the same everywhere")
        # Dark-field photographs, most of which is black, pass where the training images are such.
        if image.black > _blank_from(self.black):
            return Refusal("black", f"it is black: {image.black:.1%} of its pixels")
        if image.white > _blank_from(self.white):
            return Refusal("white", f"it is white: {image.white:.1%} of its pixels")
        if self.side and not self.side.holds(max(image.size), _SIZE_MARGIN):
            own = f"longer side {_span(self.side, '{:.0f}')}"
            return Refusal("size", f"its size of {width} x {height} is not like the training images ({own})")
        if self.shape and not self.shape.holds(width / height, _SHAPE_MARGIN):
            own = f"width over height {width / height:.2f}, is not like the training images"
            return Refusal("shape", f"its shape of {width} x {height}, {own} ({_span(self.shape, '{:.2f}')})")
        return self._far(image) if self.references else None

    def _far(self, image: Measured) -> Refusal | None:
        distance, away = self._nearest(image)
        if distance <= self.limit:
            return None
        # The squared distance is the sum of these, so the largest is the statistic that makes most of it.
        parts = away * (self._whitening @ (self._whitening.T @ away))
        most = int(np.argmax(parts))
        side = f"{abs(away[most]):.1f} times the spread {'above' if away[most] > 0 else 'below'} the most similar one"
        figures = f"(distance {distance:.1f}, limit {self.limit:.1f})"
        return Refusal("far", f"it is far from the training images: {self.statistics[most]} {side} {figures}")

    def _nearest(self, image: Measured) -> tuple[float, Floats]:
        """The whitened distance to the most similar training image, and by how much each statistic differs."""
        # Euclidean between the statistics, whitened by their covariance within a category. Nearest neighbours need no
        # assumption about how many kinds of image there are.
        standard = np.asarray((image.statistics - np.asarray(self.mean)) / np.asarray(self.spread))
        squared = ((self._whitened - standard @ self._whitening) ** 2).sum(axis=1)
        nearest = int(np.argmin(squared))
        return float(np.sqrt(squared[nearest])), standard - np.asarray(self.references[nearest])


def measure(image: Image.Image) -> Measured:
    """Measure an image, upright and RGB, on a copy of at most 256 pixels a side."""
    factor = min(1.0, _SIDE / max(image.size))
    width, height = (max(_LEAST_SIDE, round(side * factor)) for side in image.size)
    small = image.resize((width, height), Image.Resampling.BOX, reducing_gap=2.0)
    grey = small.convert("L")
    cumulated = np.cumsum(grey.histogram()) / (grey.width * grey.height)
    dark, middle, bright = (float(np.searchsorted(cumulated, share)) / 255 for share in (0.02, 0.5, 0.98))
    luma = np.asarray(grey, np.float32) / 255
    red, green, blue = np.moveaxis(np.asarray(small, np.float32) / 255, 2, 0)
    redness, yellowness = red - green, (red + green) / 2 - blue
    edges, directions = _edges(luma)
    bends = 4 * luma[1:-1, 1:-1] - luma[:-2, 1:-1] - luma[2:, 1:-1] - luma[1:-1, :-2] - luma[1:-1, 2:]
    statistics = [
        *(luma.mean(), np.log(luma.std() + 1 / 255), dark, middle, bright),
        *(redness.mean(), yellowness.mean(), np.log(np.hypot(redness.std(), yellowness.std()) + 1 / 255)),
        *edges,
        *(directions[0], directions[2], np.log(bends.std() + 0.5 / 255)),
    ]
    uniform = all(high - low <= _SAME for low, high in small.getextrema())  # type: ignore[misc]
    black, white = float(cumulated[_BLACK]), float(1 - cumulated[_WHITE - 1])
    return Measured(image.size, np.asarray(statistics, float), black, white, uniform)


def _edges(luma: NDArray[Any]) -> tuple[list[float], list[float]]:
    """Logarithms of the edges' energy, and of its ratio across to down, at 1, 2, 4 and 8 pixels."""
    energies, directions = [], []
    for _ in range(4):
        across, down = (float(np.sqrt(np.mean(np.diff(luma, axis=axis) ** 2))) + 0.5 / 255 for axis in (1, 0))
        energies.append(float(np.log(np.hypot(across, down))))
        directions.append(float(np.log(across / down)))
        height, width = (side // 2 for side in luma.shape)
        luma = luma[: 2 * height, : 2 * width].reshape(height, 2, width, 2).mean(axis=(1, 3))
    return energies, directions


def fit(shards: Path, split: str) -> Guard:
    """Fit a guard on the training images, with its limit from the validation images, and try it on `split`.

    At most 2,000 images of a split are measured, as many of each category as there are or as fit, evenly spaced, so
    that the same shards give the same guard.

    Raises:
        AdfmError: The shards cannot be read.
    """
    splits = [each for each in ("train", "validation") if any(shards.glob(f"{each}-*.parquet"))]
    sampled = {each: _measured(shards, each) for each in splits}
    varied = [one for images in sampled.values() for _, one in images if not one.uniform]
    tables = [shards_.table(shards, each).select(["width", "height"]).to_pydict() for each in splits]
    sizes = [size for table in tables for size in zip(table["width"], table["height"], strict=True)]
    guard = Guard(
        side=_range([max(size) for size in sizes]),
        shape=_range([width / height for width, height in sizes]),
        black=max((one.black for one in varied), default=0.0),
        white=max((one.white for one in varied), default=0.0),
        images={each: len(images) for each, images in sampled.items()},
        split=split,
        **_fit_distance(sampled.get("train", []), sampled.get("validation", [])),
    )
    tried = _measured(shards, split)
    refused = Counter(refusal.kind for _, one in tried if (refusal := guard._judge(one)))
    return guard.model_copy(update={"tested": len(tried), "refused": dict(sorted(refused.items()))})


Sampled = list[tuple[str, Measured]]  # category and measurements of each image


def _fit_distance(training: Sampled, validation: Sampled) -> dict[str, Any]:
    if len(training) < _LEAST:
        few = (
            f"{len(training)} training images are too few to tell how far another one is from them; {_LEAST} would do."
        )
        return {"note": few}
    from sklearn.covariance import LedoitWolf

    values = np.array([one.statistics for _, one in training])
    categories = np.array([category for category, _ in training])
    means = {name: values[categories == name].mean(axis=0) for name in set(categories)}
    # Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004.
    residuals = values - np.array([means[name] for name in categories])
    spread = np.sqrt(residuals.var(axis=0) + np.array(_LEAST_SPREAD) ** 2)
    covariance = LedoitWolf(assume_centered=True).fit(residuals / spread).covariance_ + _RIDGE * np.eye(len(STATISTICS))
    mean = values.mean(axis=0)
    fields = {
        "mean": np.round(mean, 6).tolist(),
        "spread": np.round(spread, 6).tolist(),
        "covariance": np.round(covariance, 6).tolist(),
        "references": np.round((values - mean) / spread, 3).tolist(),
    }
    guard = Guard(**fields)
    # The larger of two: a few validation images alone do not show how far good ones lie.
    limit = max(
        _quantile(_to_others(guard._whitened), _TRAINING_SHARE),
        _quantile(np.array([guard._nearest(one)[0] for _, one in validation]), _SHARE),
    )
    return fields | {"limit": round(_MARGIN * limit, 4)}


def _quantile(distances: Floats, beyond: float) -> float:
    """The least distance beyond which at most that share of the distances lies; 0 without any."""
    count = len(distances)
    return float(np.sort(distances)[count - 1 - int(beyond * count)]) if count else 0.0


def _to_others(whitened: Floats) -> Floats:
    """The distance of each row to the nearest other one, (n,)."""
    squared = (whitened**2).sum(axis=1)
    between = squared[:, None] + squared[None, :] - 2 * whitened @ whitened.T
    np.fill_diagonal(between, np.inf)
    return np.asarray(np.sqrt(np.clip(between.min(axis=1), 0, None)))


def _measured(shards: Path, split: str) -> Sampled:
    def one(row: dict[str, Any]) -> tuple[str, Measured]:
        with Image.open(io.BytesIO(row["image"]["bytes"])) as file:
            return row["category"], measure(file.convert("RGB"))

    chosen = set(choose(shards_.table(shards, split)["category"].to_pylist(), _IMAGES))
    measured: Sampled = []
    first = 0
    with ThreadPoolExecutor(cpus.count()) as pool:
        for rows in shards_.batches(shards, split, ["category", "image"]):
            own = [number for number in range(rows.num_rows) if first + number in chosen]
            first += rows.num_rows
            measured += pool.map(one, rows.take(own).to_pylist())
    return measured


def choose(categories: Sequence[str], most: int) -> list[int]:
    """Choose the numbers of at most so many images, as many of each category as there are or as fit, evenly spaced."""
    by_category: dict[str, list[int]] = defaultdict(list)
    for number, name in enumerate(categories):
        by_category[name].append(number)
    chosen: list[int] = []
    for position, numbers in enumerate(sorted(by_category.values(), key=len)):  # small ones leave more for the others
        count = min(len(numbers), (most - len(chosen)) // (len(by_category) - position))
        chosen += [numbers[i * len(numbers) // count] for i in range(count)]
    return sorted(chosen)


def _range(values: Sequence[float]) -> Range | None:
    return Range(low=min(values), high=max(values)) if values else None


def _span(own: Range, form: str) -> str:
    low, high = form.format(own.low), form.format(own.high)
    return low if low == high else f"{low} to {high}"


def _blank_from(largest: float) -> float:
    """The share of black or white pixels above which an image is refused, from the largest of the training images."""
    return max(0.95, 1 - (1 - largest) / 4)


def read(file: Path) -> Guard | None:
    """Read a `guard.json`; return `None` without one, as in a version that was registered before there were guards.

    Raises:
        BadGuard: It cannot be read, or other statistics were measured for it.
    """
    if not file.is_file():
        return None
    try:
        guard = Guard.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadGuard(f"{file} cannot be read ({error}); evaluate and register the model again.") from error
    except ValidationError as error:
        problem = error.errors()[0]
        what = ": ".join(filter(None, [".".join(map(str, problem["loc"])), problem["msg"]]))
        raise BadGuard(f"{file} is not a guard ({what}); evaluate and register the model again.") from error
    if guard.statistics != STATISTICS:
        other = f"{file} was made by another release of adfm, which measured other statistics"
        raise BadGuard(f"{other}; serve the version with that release, or evaluate and register the model again.")
    return guard
