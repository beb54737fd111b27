"""Inference on unlabelled images: files on the command line, bytes in a served model.

It is the path of evaluation: the same prompt, the same batches, the same reading of the answer.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

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

ENDING = ".answer.png"
"""Of the names of the pictures that `predict` writes; it takes none of them for a photograph."""

CANNOT_JUDGE = "cannot judge"
"""The label of an image that the guard refuses, and of one to which the model gives no clear answer."""

NO_ANSWER = "no answer"
"""Kind of reason: the model gave no clear answer."""

KEYS = ["label", "probability", "threshold", "boxes", "reasoning", "reason"]
"""Of `readable` and `refused`, in the order of the served model's columns."""

KIND = "kind"
"""A further key, after `KEYS`, of a model whose prompt asks for the defect's kind."""

UNGUARDED = f"No image is refused: there is no {guard_.FILE}, so a black one is answered as any other."

_MOST_PIXELS = 80_000_000  # of an image: 240 MB when decoded
_MOST_ASPECT = 200  # beyond it the families' processors refuse an image
_TOGETHER = 100_000_000  # pixels of the images that are in memory at once
_SIDES = (512, 1600)  # shortest and longest longer side of a picture
_MOST_LINES = 60  # under it
# What a model was registered, or trained, with decides its answers; how many images a batch has does not.
_OWN = {"model": ("dtype", "max_pixels"), "evaluate": ("max_new_tokens", "score", "samples")}

T = TypeVar("T")


def predict(images: Sequence[Path], model: str, params: Params, out: Path | None = None, as_json: bool = False) -> None:
    """Run a model on unlabelled images, print its answers, and draw them.

    Args:
        images: Files, and folders, of which every image is taken, also in folders inside.
        model: A base model's name, a model folder, or a registered version (`models:/adfm@production`).
        params: Reads `model` and `evaluate`; of a registered or trained model its own precision, image size and length
            of an answer count.
        out: Folder for a picture of each answer, `<image>.answer.png`, with boxes and reasoning; none without it.
        as_json: Print a line of JSON for each image: `image`, what `readable` or `refused` gives, `model`, `picture`.

    Raises:
        AdfmError: There is no image, the model cannot be loaded, or images cannot be read: all of them are listed, and
            the others were answered.
    """
    for row in answers(images, model, params, out):
        line = json.dumps(row) if as_json else _text(row)
        print(line, flush=True)


def answers(images: Sequence[Path], model: str, params: Params, out: Path | None = None) -> Iterator[dict[str, Any]]:
    """Run a model on unlabelled images, a batch at a time.

    Args:
        images: As in `predict`.
        model: As in `predict`.
        params: As in `predict`.
        out: As in `predict`.

    Yields:
        For each image, in order, `image`, what `readable` or `refused` gives, `model`, and `picture`, the path of the
        drawn answer; `None` without `out`.

    Raises:
        AdfmError: As in `predict`; for images that cannot be read, after the last answer.
    """
    files = _files(images)
    above = Path(os.path.commonpath([path if path.is_dir() else path.parent for path in map(_absolute, images)]))
    unreadable: list[str] = []
    with TemporaryDirectory() as folder:
        predictor, name, calibration, guard, bounds = load(model, params, Path(folder))
        if calibration.threshold is None:
            print(f"{name}: {calibration.summary}", file=sys.stderr)
        if guard is None:
            print(f"{name}: {UNGUARDED}", file=sys.stderr)
        with bar(total=len(files), desc="predict", unit="image", leave=False) as progress:
            for batch in batches(_read(files, unreadable, bounds), params.evaluate.batch_size):
                rows = judge(predictor, calibration, guard, batch)
                for (file, image), (row, _) in zip(batch, rows, strict=True):
                    picture = None
                    if out:
                        picture = str(_save(draw(image, row), out / f"{_absolute(file).relative_to(above)}{ENDING}"))
                    yield {"image": str(file), **row, "model": name, "picture": picture}
                    progress.update()
    if unreadable:
        raise AdfmError(
            f"{len(unreadable)} of {len(files)} images cannot be read; replace them, or leave them out:\n  "
            + "\n  ".join(unreadable)
        )


def load(
    model: str, params: Params, to: Path
) -> tuple[predictor_.Predictor, str, Calibration, Guard | None, images_.GreyRange | None]:
    """Load a model with the settings that it was evaluated with.

    Args:
        model: As in `predict`.
        params: As in `predict`.
        to: An existing folder for what is downloaded.

    Returns:
        The model; its name: that of a version has its number also where an alias was given; what it decides by; what
        images it can judge, `None` where that is not known; and the range of its grey images of more than 8 bits.

    Raises:
        AdfmError: It cannot be found or loaded.
    """
    local: str | Path = model
    name = model
    if model.startswith("models:"):
        from adfm.serving import verified

        folder, name = verified.fetch(model, to)
        local = folder / "model"
        own, calibration, guard = read_version(folder)
    else:
        about = model_folder.describe(Path(local)) or {}
        own = about.get("params")
        calibration, guard = Calibration(note="only a registered version has a threshold"), None
        if model_folder.is_detector(local):  # its score is a probability, and its threshold in its folder
            calibration = Calibration(threshold=about["threshold"], images=about["chosen_on"])
    predictor = predictor_.Predictor(local, with_own(params, own))
    return predictor, name, calibration, guard, model_folder.grey_range(Path(local))


def read_version(folder: Path) -> tuple[Any, Calibration, Guard | None]:
    """What the files of a version say of how its model answers.

    Args:
        folder: The version's files.

    Returns:
        Its settings; what it decides by; and what images it can judge, `None` where it was registered without a guard.

    Raises:
        AdfmError: A file cannot be read, or belongs to another model.
    """
    file = folder / "params.yaml"
    try:
        own = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise AdfmError(f"{file} cannot be read ({error}); register the version again.") from error
    calibration = calibration_.of_version(folder, digest(folder / "model"))
    return own, calibration, guard_.read(folder / "evaluation" / guard_.FILE)


def with_own(params: Params, own: Any) -> Params:
    """`params` with what of a model's own settings, as far as they are known, decides its answers."""
    values = params.model_dump(by_alias=True)
    for section, keys in _OWN.items():
        theirs = own.get(section) if isinstance(own, dict) else None
        values[section] |= {key: theirs[key] for key in keys if isinstance(theirs, dict) and key in theirs}
    return Params.model_validate(values)


def decode(content: bytes, bounds: images_.GreyRange | None = None) -> Image.Image:
    """A photograph as a model sees it: upright, RGB.

    Args:
        content: A file in any format that conversion reads.
        bounds: The model's, for grey values of more than 8 bits; without, a file of such values is an error.

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


def batches(images: Iterable[tuple[T, Image.Image]], batch_size: int) -> Iterator[list[tuple[T, Image.Image]]]:
    """Images in the order in which they come, as many together as fit into a batch and into memory."""
    batch: list[tuple[T, Image.Image]] = []
    pixels = 0
    for what, image in images:
        size = image.width * image.height
        if batch and (len(batch) == batch_size or pixels + size > _TOGETHER):
            yield batch
            batch, pixels = [], 0
        batch.append((what, image))
        pixels += size
    if batch:
        yield batch


def judge(
    predictor: predictor_.Predictor,
    calibration: Calibration,
    guard: Guard | None,
    batch: Sequence[tuple[Any, Image.Image]],
) -> list[tuple[dict[str, Any], str | None]]:
    """Answers a batch of images; the model is asked for those that the guard lets through.

    Args:
        predictor: The model.
        calibration: What it decides by.
        guard: What images it can judge; `None`: any.
        batch: The images, each upright RGB, with whatever tells them apart.

    Returns:
        For each image, in order, its row, as `readable` or `refused` gives it, with `kind` if the model's prompt asks
        for it: the kind of defect that the model names on an image that is `anomalous`, else `None`; and where it
        cannot be judged the kind of reason, for counting: one of the guard's, or `no answer`.
    """
    refusals = [guard.judge(image) if guard else None for _, image in batch]
    images = [image for (_, image), refusal in zip(batch, refusals, strict=True) if not refusal]
    answers = iter(predictor.answers([image.size for image in images], images.__getitem__) if images else [])
    rows: list[tuple[dict[str, Any], str | None]] = []
    for (_, image), refusal in zip(batch, refusals, strict=True):
        if refusal:
            row = refused(refusal.reason, calibration)
            rows.append((row | {KIND: None} if predictor.kinds else row, refusal.kind))
        else:
            answer = next(answers)
            row = readable(answer, image.size, calibration)
            if predictor.kinds:
                row[KIND] = answer.kind if row["label"] == "anomalous" else None
            rows.append((row, NO_ANSWER if row["label"] == CANNOT_JUDGE else None))
    return rows


def readable(answer: Prediction, size: tuple[int, int], calibration: Calibration) -> dict[str, Any]:
    """An answer for people and programs.

    Args:
        answer: The model's answer.
        size: Width and height of the upright image in pixels.
        calibration: What the model decides by.

    Returns:
        `label`: the decision, `anomalous` from the threshold on, else `normal`; without a threshold the model's letter;
        `cannot judge` where there is neither a score nor a clear letter. `reason`: why not; `None` for other labels.
        `probability` of a defect, calibrated, or `None` without a score. `threshold`, or `None`. `boxes`: of an image
        that is `anomalous` all regions that the model names, `[x1, y1, x2, y2]` in pixels of the upright image,
        half-open, within it.
        `reasoning`: what the model saw, and on the next line what it made of it, in its own words and, for coordinates,
        units; all that it wrote where it did not keep to that form. Of an image in tiles, lines follow that say which
        tile it is, and what it wrote of further suspicious tiles.
    """
    width, height = size
    probability, label = calibration.judge(answer.predicted, answer.score)
    inside = (
        Box(max(0.0, box.x1), max(0.0, box.y1), min(float(width), box.x2), min(float(height), box.y2))
        for box in (answer.regions if label == "anomalous" else [])
    )
    stages = [answer.read.think, answer.read.rethink]
    if answer.predicted is None or None in stages:
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
    """The answer to an image that was not put to the model, with the keys of `readable`.

    Args:
        reason: Why not, for people.
        calibration: What the model decides by.
    """
    return {
        "label": CANNOT_JUDGE,
        "probability": None,
        "threshold": calibration.threshold,
        "boxes": [],
        "reasoning": "",
        "reason": reason,
    }


def draw(image: Image.Image, said: dict[str, Any]) -> Image.Image:
    """A photograph with the boxes of an answer on it, and verdict and reasoning under it.

    Args:
        image: Upright, RGB.
        said: As `readable` or `refused` gives it.
    """
    side = min(max(*image.size, _SIDES[0]), _SIDES[1])
    shown = pictures.drawn(pictures.marked(image, image.size, None, said["boxes"]), side)
    width, font = max(shown.width, _SIDES[0]), drawing.font(side // 40)
    margin = side // 40
    text = "\n".join(map(printable, [_verdict(said), *said["reasoning"].split("\n")]))
    lines = drawing.wrapped(text, font, width - 2 * margin, _MOST_LINES)
    height = shown.height + len(lines) * drawing.line_height(font) + 2 * margin
    sheet = Image.new("RGB", (width, height), "white")
    sheet.paste(shown, ((width - shown.width) // 2, 0))
    drawing.write(sheet, (margin, shown.height + margin), lines, font)
    return sheet


def _files(images: Sequence[Path]) -> list[Path]:
    missing = [str(path) for path in images if not path.exists()]
    if missing:
        raise AdfmError("no such file or folder:\n  " + "\n  ".join(missing))
    found = [
        file
        for path in images
        for file in (sorted(readers.images_within(path)) if path.is_dir() else [path])
        if file == path or not file.name.endswith(ENDING)
    ]
    if not found:
        kinds = ", ".join(sorted(readers.IMAGES))
        raise AdfmError(f"no image in {', '.join(map(str, images)) or 'nothing'}; images are named {kinds}.")
    return found


def _read(
    found: Iterable[Path], unreadable: list[str], bounds: images_.GreyRange | None
) -> Iterator[tuple[Path, Image.Image]]:
    for file in found:
        if file.exists() and not file.is_file():  # a pipe would be waited for
            unreadable.append(f"{printable(str(file))}: it is a pipe, a socket or a device, not an ordinary file")
            continue
        try:
            yield file, decode(file.read_bytes(), bounds)
        except AdfmError as error:
            unreadable.append(f"{printable(str(file))}: {error}")
        except OSError as error:
            unreadable.append(f"{printable(str(file))}: {error.strerror}")


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


def _verdict(said: dict[str, Any]) -> str:
    if said["label"] == CANNOT_JUDGE:
        return f"{CANNOT_JUDGE}: {said['reason']}"
    at = "" if said["threshold"] is None else f", flagged from {said['threshold']:.2f} on"
    sure = "" if said["probability"] is None else f" (probability of a defect {said['probability']:.2f}{at})"
    kind = f", {said[KIND]}" if said.get(KIND) else ""
    return f"{said['label']}{kind}{sure}" + "".join(f" {[round(side) for side in box]}" for box in said["boxes"])


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))
