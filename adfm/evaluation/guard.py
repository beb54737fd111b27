"""Input guard: recognise images that the model cannot judge, because they are unlike those that it was trained on.

A model answers a black frame, or a photograph of another product, as readily as a good part, and often `normal`. The
guard is fitted with every evaluation, written to `guard.json` beside `calibration.json`, and so signed with the version
and served with it. An image is refused, with a reason in words, if one of these holds:

- `uniform`: all pixels of the reduced image are the same; always refused.
- `black`, `white`: more of it is black or white than of any training image, by a margin. Dark-field photographs, most
  of which is black, therefore pass where the training images are such.
- `size`, `shape`: its longer side, or width over height, is out of the range of the training images, by a margin.
- `far`: its distance to the most similar training image is above a limit.

The distance is Euclidean between `STATISTICS` of the images (brightness, contrast, colour, edges at several scales,
sharpness), whitened by their covariance within a category (Ledoit and Wolf, "A well-conditioned estimator for
large-dimensional covariance matrices", 2004). Nearest neighbours need no assumption about how many kinds of image there
are. The limit is `_MARGIN` times the distance that all but 1 in 1,000 validation images keep (with fewer than 1,000 of
them: all), or that 99 of 100 training images keep to the other ones, whichever is larger: a few validation images alone
do not show how far good ones lie.
"""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adfm.data import shards as shards_
from adfm.errors import AdfmError
from adfm.params import Params
from adfm.process import cpus

Floats = NDArray[np.float64]
Kind = Literal["uniform", "black", "white", "size", "shape", "far"]

FILE = "guard.json"
"""In an evaluation's folder, and so in a version: `evaluation/guard.json`."""

_LEVEL, _LOG = 0.01, 0.05  # least spread of a statistic in [0, 1], and of a logarithm: less is noise of the encoding
_SCALES = {
    "brightness": _LEVEL,
    "contrast": _LOG,
    "dark end": _LEVEL,
    "middle grey": _LEVEL,
    "bright end": _LEVEL,
    "red against green": _LEVEL,
    "yellow against blue": _LEVEL,
    "colourfulness": _LOG,
    "edges of 1 pixel": _LOG,
    "edges of 2 pixels": _LOG,
    "edges of 4 pixels": _LOG,
    "edges of 8 pixels": _LOG,
    "direction of fine edges": _LOG,
    "direction of coarse edges": _LOG,
    "sharpness": _LOG,
}
STATISTICS = tuple(_SCALES)
"""What is measured on the reduced copy of an image, in this order."""

_SIDE = 256  # pixels of the longer side of the reduced copy; smaller images keep their size
_LEAST_SIDE = 16  # of its shorter side, so that there are edges of 8 pixels
_BLACK, _WHITE = 10, 245  # grey values up to which, and from which on, a pixel is black or white
_SAME = 2  # grey values that the pixels of a uniform image may differ by, after JPEG
_SIZE_MARGIN, _SHAPE_MARGIN = 1.5, 1.25  # factors beyond the range of the training images
_MARGIN = 1.25  # factor of the limit of the distance
_SHARE = 0.001  # of the validation images that may lie beyond the limit before the margin
_TRAINING_SHARE = 0.01  # of the training images; more, because mislabelled and odd images are among them
_RIDGE = 0.05  # added to the covariance: directions in which a category hardly varies are not everything
_IMAGES = 2000  # of a split that are measured at most
_LEAST = 20  # training images to measure a distance to


class BadGuard(AdfmError):
    """A `guard.json` cannot be read, or was made by another release."""

    exit_code = 2


class Refusal(NamedTuple):
    """Why an image cannot be judged.

    Args:
        kind: For counting.
        reason: A phrase for people, without the image's name: "it is black".
    """

    kind: Kind
    reason: str


class Range(BaseModel):
    """The values of the training and validation images, least and greatest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    high: Annotated[float, Field(gt=0, allow_inf_nan=False)]

    def holds(self, value: float, margin: float) -> bool:
        """Whether a value lies in the range widened by a factor."""
        return self.low / margin <= value <= self.high * margin


class Guard(BaseModel):
    """What an image must be like to be judged.

    Args:
        side: Longer sides in pixels; `None`: any.
        shape: Width over height; `None`: any.
        black: The largest share of black pixels, in [0, 1].
        white: The largest share of white pixels, in [0, 1].
        statistics: Names of the statistics, `STATISTICS` of the program that fitted it.
        mean: Mean of each statistic over the training images.
        spread: Standard deviation of each within a category.
        covariance: Covariance of the standardised statistics within a category.
        references: Standardised statistics of the training images, (n, statistics); empty: no distance is judged.
        limit: Of the whitened distance to the nearest of them.
        images: How many images of each split it comes from.
        split: The split that was evaluated.
        tested: Images of it that were tried.
        refused: How many of those are refused, by kind.
        note: Why no distance is judged; empty otherwise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    side: Range | None = None
    shape: Range | None = None
    black: Annotated[float, Field(ge=0, le=1)] = 0.0
    white: Annotated[float, Field(ge=0, le=1)] = 0.0
    statistics: tuple[str, ...] = STATISTICS
    mean: list[float] = []
    spread: list[Annotated[float, Field(gt=0)]] = []
    covariance: list[list[float]] = []
    references: list[list[float]] = []
    limit: Annotated[float, Field(ge=0)] = 0.0
    images: dict[str, int] = {}
    split: str = "test"
    tested: Annotated[int, Field(ge=0)] = 0
    refused: dict[Kind, int] = {}
    note: str = ""

    @model_validator(mode="after")
    def _fits(self) -> Guard:
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
        """Whether the model can judge an image.

        Args:
            image: Upright RGB, at its own size, as the model gets it (`adfm.serving.predict.decode`).

        Returns:
            Why not; `None` if it can.
        """
        return self._judge(image.size, measure(image))

    def distance(self, measured: Measured) -> float:
        """The whitened distance of an image to the nearest training image."""
        return self._nearest(self._standardised(measured))[0]

    @property
    def summary(self) -> str:
        """One sentence for people: the share of images that it refuses, or why it refuses few."""
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.refused.items())
        counted = f"Of {self.tested} {self.split} images {sum(self.refused.values())} cannot be judged"
        return f"{counted}{f' ({kinds})' if kinds else ''}." + (f" {self.note}" if self.note else "")

    def _judge(self, size: tuple[int, int], measured: Measured) -> Refusal | None:
        kinds = (self._blank(measured), self._size(size), self._far(measured))
        return next((refusal for refusal in kinds if refusal), None)

    def _blank(self, measured: Measured) -> Refusal | None:
        if measured.uniform:
            colour = "black" if measured.black == 1 else "white" if measured.white == 1 else "of one colour"
            return Refusal("uniform", f"it is {colour}, the same everywhere")
        if measured.black > _blank_from(self.black):
            return Refusal("black", f"it is black: {measured.black:.1%} of its pixels")
        if measured.white > _blank_from(self.white):
            return Refusal("white", f"it is white: {measured.white:.1%} of its pixels")
        return None

    def _size(self, size: tuple[int, int]) -> Refusal | None:
        width, height = size
        if self.side and not self.side.holds(max(size), _SIZE_MARGIN):
            own = _span(self.side, "{:.0f}")
            return Refusal(
                "size", f"its size of {width} x {height} is not like the training images (longer side {own})"
            )
        if self.shape and not self.shape.holds(width / height, _SHAPE_MARGIN):
            own = _span(self.shape, "{:.2f}")
            return Refusal(
                "shape",
                f"its shape of {width} x {height}, width over height {width / height:.2f}, is not like the training"
                f" images ({own})",
            )
        return None

    def _far(self, measured: Measured) -> Refusal | None:
        if not self.references:
            return None
        standard = self._standardised(measured)
        distance, nearest = self._nearest(standard)
        if distance <= self.limit:
            return None
        away = standard - np.asarray(self.references[nearest])
        # The squared distance is the sum of these, so the largest is the statistic that makes most of it.
        parts = away * (self._whitening @ (self._whitening.T @ away))
        most = int(np.argmax(parts))
        return Refusal(
            "far",
            f"it is far from the training images: {self.statistics[most]} {abs(away[most]):.1f} times the spread"
            f" {'above' if away[most] > 0 else 'below'} the most similar one (distance {distance:.1f}, limit"
            f" {self.limit:.1f})",
        )

    def _standardised(self, measured: Measured) -> Floats:
        return np.asarray((measured.statistics - np.asarray(self.mean)) / np.asarray(self.spread))

    def _nearest(self, standard: Floats) -> tuple[float, int]:
        squared = ((self._whitened - standard @ self._whitening) ** 2).sum(axis=1)
        nearest = int(np.argmin(squared))
        return float(np.sqrt(squared[nearest])), nearest


class Measured(NamedTuple):
    """What the guard reads off an image.

    Args:
        statistics: The values of `STATISTICS`, (n,).
        black: Share of black pixels.
        white: Share of white pixels.
        uniform: Whether all pixels are the same.
    """

    statistics: Floats
    black: float
    white: float
    uniform: bool


def measure(image: Image.Image) -> Measured:
    """Measures an image on a copy of at most 256 pixels a side.

    Args:
        image: Upright RGB, at its own size.
    """
    small = _reduced(image)
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
    levels = small.getextrema()
    uniform = all(high - low <= _SAME for low, high in levels)  # type: ignore[misc]
    below = cumulated[_WHITE - 1]
    return Measured(np.asarray(statistics, float), float(cumulated[_BLACK]), float(1 - below), uniform)


def _reduced(image: Image.Image) -> Image.Image:
    factor = min(1.0, _SIDE / max(image.size))
    width, height = (max(_LEAST_SIDE, round(side * factor)) for side in image.size)
    if (width, height) == image.size:
        return image
    return image.resize((width, height), Image.Resampling.BOX, reducing_gap=2.0)


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


def fit(shards: Path, params: Params) -> Guard:
    """Fits a guard on the training images, with its limit from the validation images.

    At most 2,000 images of a split are measured, as many of each category as there are or as fit, evenly spaced, so
    that the same shards give the same guard.

    Args:
        shards: Folder of shards.
        params: Reads `evaluate.split`, whose images are tried.

    Raises:
        AdfmError: The shards cannot be read.
    """
    splits = {split: _measured(shards, split) for split in ("train", "validation") if _has(shards, split)}
    kept = [one for images in splits.values() for _, _, one in images]
    sizes = [size for split in splits for size in _sizes(shards, split)]
    guard = Guard(
        side=_range([max(size) for size in sizes]),
        shape=_range([width / height for width, height in sizes]),
        black=max((one.black for one in kept if not one.uniform), default=0.0),
        white=max((one.white for one in kept if not one.uniform), default=0.0),
        images={split: len(images) for split, images in splits.items()},
        split=params.evaluate.split,
    )
    guard = guard.model_copy(update=_fit_distance(splits.get("train", []), splits.get("validation", [])))
    tried = _measured(shards, guard.split)
    refusals = (guard._judge(size, one) for _, size, one in tried)
    refused = Counter(refusal.kind for refusal in refusals if refusal)
    return guard.model_copy(update={"tested": len(tried), "refused": dict(sorted(refused.items()))})


Sampled = list[tuple[str, tuple[int, int], Measured]]
"""Category, width and height, and what was measured, of each image."""


def _fit_distance(training: Sampled, validation: Sampled) -> dict[str, object]:
    """The fields of a guard that the distance needs."""
    if len(training) < _LEAST:
        few = f"{len(training)} training images are too few to tell how far another one is from them"
        return {"note": f"{few}; {_LEAST} would do."}
    from sklearn.covariance import LedoitWolf

    values = np.array([one.statistics for _, _, one in training])
    categories = np.array([category for category, _, _ in training])
    means = {name: values[categories == name].mean(axis=0) for name in set(categories)}
    residuals = values - np.array([means[name] for name in categories])
    spread = np.sqrt(residuals.var(axis=0) + np.array(list(_SCALES.values())) ** 2)
    covariance = LedoitWolf(assume_centered=True).fit(residuals / spread).covariance_ + _RIDGE * np.eye(len(STATISTICS))
    mean = values.mean(axis=0)
    guard = Guard(
        mean=_rounded(mean, 6),
        spread=_rounded(spread, 6),
        covariance=_rounded(covariance, 6),
        references=_rounded((values - mean) / spread, 3),
    )
    limit = max(
        _quantile(_to_others(guard._whitened), _TRAINING_SHARE),
        _quantile(np.array([guard.distance(one) for _, _, one in validation]), _SHARE),
    )
    fields = ("mean", "spread", "covariance", "references")
    return {name: getattr(guard, name) for name in fields} | {"limit": round(_MARGIN * limit, 4)}


def _quantile(distances: Floats, beyond: float) -> float:
    """The least distance beyond which at most that share of the distances lies; 0 without any."""
    if not len(distances):
        return 0.0
    return float(np.sort(distances)[len(distances) - 1 - int(beyond * len(distances))])


def _to_others(whitened: Floats) -> Floats:
    """The distance of each row to the nearest other one, (n,)."""
    squared = (whitened**2).sum(axis=1)
    between = squared[:, None] + squared[None, :] - 2 * whitened @ whitened.T
    np.fill_diagonal(between, np.inf)
    return np.asarray(np.sqrt(np.clip(between.min(axis=1), 0, None)))


def _measured(shards: Path, split: str) -> Sampled:
    def one(row: tuple[str, bytes]) -> tuple[str, tuple[int, int], Measured]:
        with Image.open(io.BytesIO(row[1])) as file:
            image = file.convert("RGB")
        return row[0], image.size, measure(image)

    with ThreadPoolExecutor(cpus.count()) as pool:
        return [measured for rows in _sample(shards, split) for measured in pool.map(one, rows)]


def _sample(shards: Path, split: str) -> Iterator[list[tuple[str, bytes]]]:
    """Category and image of the sampled rows, a batch of the shards at a time."""
    categories = [
        name for rows in shards_.batches(shards, split, ["category"]) for name in rows["category"].to_pylist()
    ]
    chosen = set(choose(categories, _IMAGES))
    first = 0
    for rows in shards_.batches(shards, split, ["category", "image"]):
        own = [number for number in range(rows.num_rows) if first + number in chosen]
        first += rows.num_rows
        yield [(row["category"], row["image"]["bytes"]) for row in rows.take(own).to_pylist()]


def choose(categories: Sequence[str], most: int) -> list[int]:
    """Numbers of at most so many images, as many of each category as there are or as fit, evenly spaced."""
    by_category: dict[str, list[int]] = defaultdict(list)
    for number, name in enumerate(categories):
        by_category[name].append(number)
    chosen: list[int] = []
    for position, numbers in enumerate(sorted(by_category.values(), key=len)):  # small ones leave more for the others
        share = (most - len(chosen)) // (len(by_category) - position)
        count = min(share, len(numbers))
        chosen += [numbers[i * len(numbers) // count] for i in range(count)]
    return sorted(chosen)


def _has(shards: Path, split: str) -> bool:
    return any(shards.glob(f"{split}-*.parquet"))


def _sizes(shards: Path, split: str) -> Iterator[tuple[int, int]]:
    for rows in shards_.batches(shards, split, ["width", "height"]):
        yield from zip(rows["width"].to_pylist(), rows["height"].to_pylist(), strict=True)


def _range(values: Sequence[float]) -> Range | None:
    return Range(low=min(values), high=max(values)) if values else None


def _span(own: Range, form: str) -> str:
    low, high = form.format(own.low), form.format(own.high)
    return low if low == high else f"{low} to {high}"


def _blank_from(largest: float) -> float:
    """The share of black or white pixels above which an image is refused, from the largest of the training images."""
    return max(0.95, 1 - (1 - largest) / 4)


def _rounded(values: Floats, digits: int) -> Any:
    return np.round(values, digits).tolist()


def read(file: Path) -> Guard | None:
    """Reads a `guard.json`; `None` if there is none, as in a version that was registered before there were guards.

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
        place = ".".join(map(str, problem["loc"]))
        raise BadGuard(
            f"{file} is not a guard ({place}{': ' * bool(place)}{problem['msg']}); evaluate and register the model"
            " again."
        ) from error
    if guard.statistics != STATISTICS:
        raise BadGuard(
            f"{file} was made by another release of adfm, which measured other statistics; serve the version with that"
            " release, or evaluate and register the model again."
        )
    return guard
