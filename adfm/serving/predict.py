"""Inference on unlabelled images, files or bytes, by the prompt, the batches and the parser of evaluation."""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from PIL import Image

from adfm import drawing
from adfm.data import images as images_
from adfm.data import pictures
from adfm.data.readers import files as readers
from adfm.errors import AdfmError
from adfm.evaluation import calibration as calibration_
from adfm.evaluation import guard as guard_
from adfm.evaluation.calibration import Calibration
from adfm.evaluation.guard import Guard
from adfm.files import digest
from adfm.models import model_folder
from adfm.models import predictor as predictor_
from adfm.models.predictor import Prediction
from adfm.params import Params
from adfm.process.progress import bar
from adfm.records import Box
from adfm.text import printable

ENDING = ".answer.png"  # of the pictures that `predict` writes, and does not take for photographs
CANNOT_JUDGE = "cannot judge"  # the label of an image that the guard refuses, or that has no clear answer
# Of `readable` and `refused`, in the order of the served model's columns; and one more, of a model that names kinds.
KEYS = ["label", "probability", "threshold", "boxes", "reasoning", "reason"]
KIND = "kind"

_MOST_PIXELS = 80_000_000  # of an image: 240 MB when decoded
_MOST_ASPECT = 200  # beyond it the families' processors refuse an image
_TOGETHER = 100_000_000  # pixels of the images that are in memory at once
_SIDES = (512, 1600)  # shortest and longest longer side of a picture
_MOST_LINES = 60  # under it
# What a model was registered, or trained, with decides its answers; how many images a batch has does not.
_OWN = {"model": ("dtype", "max_pixels"), "evaluate": ("max_new_tokens", "score", "samples")}


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, with what its answers are decided by."""

    name: str  # that of a version has its number also where an alias was given
    predictor: predictor_.Predictor
    batch_size: int
    calibration: Calibration
    guard: Guard | None  # refuses images that the model cannot judge
    grey_range: images_.GreyRange | None  # of its training images of more than 8 bits

    def report(self, threshold: bool) -> None:
        """Report on stderr a missing guard and a missing threshold; with `threshold`, one that is there too."""
        if threshold or self.calibration.threshold is None:
            print(f"{self.name}: {self.calibration.summary}", file=sys.stderr)
        if self.guard is None:
            message = f"No image is refused: there is no {guard_.FILE}, so a black one is answered as any other."
            print(f"{self.name}: {message}", file=sys.stderr)

    def judge(self, images: Sequence[Image.Image]) -> list[tuple[dict[str, Any], str | None]]:
        """Answer upright RGB images; the model sees those that the guard accepts.

        Returns:
            For each image its row, as `readable` or `refused` gives it, with `kind` if the model's prompt asks for it;
            and the kind of reason where it cannot be judged, for counting: one of the guard's, or `no answer`.
        """
        refusals = [self.guard.judge(image) if self.guard else None for image in images]
        accepted = [image for image, refusal in zip(images, refusals, strict=True) if not refusal]
        sizes = [image.size for image in accepted]
        answers = iter(self.predictor.answers(sizes, accepted.__getitem__) if accepted else [])
        rows: list[tuple[dict[str, Any], str | None]] = []
        for image, refusal in zip(images, refusals, strict=True):
            kind, why = None, str(refusal.kind) if refusal else None
            if refusal:
                row = refused(refusal.reason, self.calibration)
            else:
                answer = next(answers)
                row, kind = readable(answer, image.size, self.calibration), answer.kind
                why = "no answer" if row["label"] == CANNOT_JUDGE else None
            if self.predictor.kinds:
                row[KIND] = kind if row["label"] == "anomalous" else None
            rows.append((row, why))
        return rows


def predict(images: Sequence[Path], model: str, params: Params, out: Path | None = None, as_json: bool = False) -> None:
    """Run a model on unlabelled images, print its answers, and draw them.

    Args:
        images: Files, and folders, of which every image is taken, also in folders inside.
        model: A base model's name, a model folder, or a registered version (`models:/adfm@production`).
        params: Reads `model` and `evaluate`, as far as a registered or trained model has not its own.
        out: Folder for a picture of each answer, `<image>.answer.png`, with boxes and reasoning; none without it.
        as_json: Print a line of JSON for each image: `image`, what `readable` or `refused` gives, `model`, `picture`.

    Raises:
        AdfmError: No image was found, the model cannot be loaded, or some images cannot be read (all are listed).
    """
    for row in answers(images, model, params, out):
        print(json.dumps(row) if as_json else _text(row), flush=True)


def answers(images: Sequence[Path], model: str, params: Params, out: Path | None = None) -> Iterator[dict[str, Any]]:
    """As `predict`, a batch at a time.

    Yields:
        For each image, in order, `image`, what `readable` or `refused` gives, `model`, and `picture`, a path or `None`.

    Raises:
        AdfmError: As in `predict`; for images that cannot be read, after the last answer.
    """
    files = _files(images)
    above = Path(os.path.commonpath([path if path.is_dir() else path.parent for path in map(_absolute, images)]))
    unreadable: list[str] = []
    with TemporaryDirectory() as folder:
        loaded = load(model, params, Path(folder))
        loaded.report(threshold=False)
        with bar(total=len(files), desc="predict", unit="image", leave=False) as progress:
            for batch in batches(_read(files, unreadable, loaded.grey_range), loaded.batch_size):
                rows = loaded.judge([image for _, image in batch])
                for (file, image), (row, _) in zip(batch, rows, strict=True):
                    picture = None
                    if out:
                        picture = str(_save(draw(image, row), out / f"{_absolute(file).relative_to(above)}{ENDING}"))
                    yield {"image": str(file), **row, "model": loaded.name, "picture": picture}
                    progress.update()
    if unreadable:
        raise AdfmError(
            f"{len(unreadable)} of {len(files)} images cannot be read; replace them, or leave them out:\n  "
            + "\n  ".join(unreadable)
        )


def load(model: str, params: Params, to: Path) -> LoadedModel:
    """Load a model as in `predict`, with the settings that it was evaluated with; `to` is a folder for downloads."""
    if model.startswith("models:"):
        from adfm.serving import verified

        folder, name = verified.fetch(model, to)
        return of_version(folder, name, params)
    about = model_folder.describe(model) or {}
    calibration = Calibration(note="only a registered version has a threshold")
    if model_folder.is_detector(model):  # its score is a probability, and its threshold in its folder
        calibration = Calibration(threshold=about["threshold"], images=about["chosen_on"])
    return _loaded(model, model, with_own(params, about.get("params")), calibration, None)


def of_version(folder: Path, name: str, params: Params | None = None) -> LoadedModel:
    """Load a registered version from its files, by default with the batch size that it was registered with."""
    file = folder / "params.yaml"
    try:
        own = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise AdfmError(f"{file} cannot be read ({error}); register the version again.") from error
    calibration = calibration_.of_version(folder, digest(folder / "model"))
    guard = guard_.read(folder / "evaluation" / guard_.FILE)
    if params is None:
        params = Params.model_validate({"evaluate": {"batch_size": int(own["evaluate"]["batch_size"])}})
    return _loaded(name, folder / "model", with_own(params, own), calibration, guard)


def _loaded(name: str, model: str | Path, params: Params, calibration: Calibration, guard: Guard | None) -> LoadedModel:
    predictor = predictor_.Predictor(model, params)
    grey_range = model_folder.grey_range(model)
    return LoadedModel(name, predictor, params.evaluate.batch_size, calibration, guard, grey_range)


def with_own(params: Params, own: Any) -> Params:
    """Return `params` with those of a model's own settings, if known, that decide its answers."""
    values = params.model_dump(by_alias=True)
    for section, keys in _OWN.items():
        theirs = own.get(section) if isinstance(own, dict) else None
        values[section] |= {key: theirs[key] for key in keys if isinstance(theirs, dict) and key in theirs}
    return Params.model_validate(values)


def decode(content: bytes, bounds: images_.GreyRange | None = None) -> Image.Image:
    """Decode a photograph as a model sees it: upright, RGB; with `bounds`, also grey values of more than 8 bits.

    Raises:
        AdfmError: It cannot be decoded, or a model cannot take it in; the message is the reason alone.
    """
    try:
        width, height = images_.size(content)
        if width * height > _MOST_PIXELS:
            raise AdfmError(f"it has {width}x{height} pixels, and {_MOST_PIXELS} are the most; make it smaller")
        if max(width, height) > _MOST_ASPECT * min(width, height):
            raise AdfmError(f"it is {width}x{height}, too narrow to be looked at as a whole; crop it")
        return images_.upright(content, bounds)
    except AdfmError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise AdfmError(images_.reason(error)) from error


def batches(images: Iterable[tuple[Any, Image.Image]], batch_size: int) -> Iterator[list[tuple[Any, Image.Image]]]:
    """Yield the images in their order, as many together as fit into a batch and into memory."""
    batch: list[tuple[Any, Image.Image]] = []
    for what, image in images:
        pixels = sum(each.width * each.height for _, each in [*batch, (what, image)])
        if batch and (len(batch) == batch_size or pixels > _TOGETHER):
            yield batch
            batch = []
        batch.append((what, image))
    if batch:
        yield batch


def readable(answer: Prediction, size: tuple[int, int], calibration: Calibration) -> dict[str, Any]:
    """Return an answer to an upright image of `size` for people and programs, by `KEYS`; see docs/serving.md."""
    width, height = size
    probability, label = calibration.judge(answer.predicted, answer.score)
    # All regions that the model names, whatever its letter: the calibrated probability may flag an image against it.
    inside = (
        Box(max(0.0, box.x1), max(0.0, box.y1), min(float(width), box.x2), min(float(height), box.y2))
        for box in (answer.regions if label == "anomalous" else [])
    )
    stages = [answer.read.think, answer.read.rethink]
    if answer.predicted is None or None in stages:  # the whole completion, where it is not well-formed
        stages = [answer.completion.removesuffix("\n".join(answer.notes))]
    return {
        "label": label or CANNOT_JUDGE,
        "probability": probability if label else None,
        "threshold": calibration.threshold,
        "boxes": [[round(side, 2) for side in box] for box in inside if box.area],
        "reasoning": "\n".join([*(" ".join(stage.split()) for stage in stages if stage), *answer.notes]),
        "reason": None if label else "the model gave no clear answer",
    }


def refused(reason: str, calibration: Calibration) -> dict[str, Any]:
    """Return the answer to an image that was not put to the model, with the keys of `readable`."""
    return dict(zip(KEYS, [CANNOT_JUDGE, None, calibration.threshold, [], "", reason], strict=True))


def draw(image: Image.Image, row: dict[str, Any]) -> Image.Image:
    """Draw the boxes of a row of `readable` or `refused` on its image, and verdict and reasoning under it."""
    side = min(max(*image.size, _SIDES[0]), _SIDES[1])
    photograph = pictures.drawn(pictures.marked(image, image.size, None, row["boxes"]), side)
    width, margin = max(photograph.width, _SIDES[0]), side // 40
    font = drawing.font(margin)
    text = "\n".join(map(printable, [_verdict(row), *row["reasoning"].split("\n")]))
    lines = drawing.wrapped(text, font, width - 2 * margin, _MOST_LINES)
    height = photograph.height + len(lines) * drawing.line_height(font) + 2 * margin
    sheet = Image.new("RGB", (width, height), "white")
    sheet.paste(photograph, ((width - photograph.width) // 2, 0))
    drawing.write(sheet, (margin, photograph.height + margin), lines, font)
    return sheet


def _files(images: Sequence[Path]) -> list[Path]:
    missing = [str(path) for path in images if not path.exists()]
    if missing:
        raise AdfmError("no such file or folder:\n  " + "\n  ".join(missing))
    files = [
        file
        for path in images
        for file in (sorted(readers.images_within(path)) if path.is_dir() else [path])
        if file == path or not file.name.endswith(ENDING)  # a picture that the caller names is a photograph
    ]
    if not files:
        kinds = ", ".join(sorted(readers.IMAGES))
        raise AdfmError(f"no image in {', '.join(map(str, images)) or 'nothing'}; images are named {kinds}.")
    return files


def _read(
    files: Iterable[Path], unreadable: list[str], bounds: images_.GreyRange | None
) -> Iterator[tuple[Path, Image.Image]]:
    for file in files:
        try:
            if file.exists() and not file.is_file():  # a pipe would be waited for
                raise AdfmError("it is a pipe, a socket or a device, not an ordinary file")
            yield file, decode(file.read_bytes(), bounds)
        except (AdfmError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            unreadable.append(f"{printable(str(file))}: {reason}")


def _save(picture: Image.Image, file: Path) -> Path:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file)
    except OSError as error:
        raise AdfmError(f"{file}: cannot be written ({error.strerror}); choose another folder with --out.") from error
    return file


def _text(row: dict[str, Any]) -> str:
    lines = [f"{row['image']}: {_verdict(row)}", *(f"  {line}" for line in row["reasoning"].split("\n") if line)]
    if row["picture"]:
        lines.append(f"  {row['picture']}")
    return "\n".join(map(printable, lines))


def _verdict(row: dict[str, Any]) -> str:
    if row["label"] == CANNOT_JUDGE:
        return f"{CANNOT_JUDGE}: {row['reason']}"
    at = "" if row["threshold"] is None else f", flagged from {row['threshold']:.2f} on"
    sure = "" if row["probability"] is None else f" (probability of a defect {row['probability']:.2f}{at})"
    kind = f", {row[KIND]}" if row.get(KIND) else ""
    return f"{row['label']}{kind}{sure}" + "".join(f" {[round(side) for side in box]}" for box in row["boxes"])


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # without `..`, by which a picture would leave its folder
