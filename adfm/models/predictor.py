"""Inspect images with a model, in batches and in tiles: transformers, vLLM or the reference detector."""

import importlib.util
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from adfm.data import tiles
from adfm.errors import AdfmError
from adfm.method import kinds, response
from adfm.models import families, loading, model_folder, transformers_backend
from adfm.models.decoding import Completions
from adfm.params import Params, Tile
from adfm.records import Box, Label

if TYPE_CHECKING:
    from adfm.models.detector import Detection, Detector

_MAX_NOTES = 8  # suspicious tiles of an image whose words are kept


@dataclass(frozen=True)
class Prediction:
    """A model's parsed answer to one image. Boxes are in pixels of the image, half-open, not clipped."""

    predicted: Label | None  # the decision; `None` where the completion has no clean answer
    score: float | None  # the probability of `anomalous`, before calibration; `None` where there is no decision
    boxes: list[Box]  # the defects; none unless it is `anomalous`, since a region that was rejected is not a defect
    read: response.ParsedCompletion
    completion: str
    # All boxes of the first stage, whatever the letter: the defects of an image that is flagged by its probability.
    regions: list[Box] = field(default_factory=list)
    # Of an image in tiles: which one the words describe, and a line with its words for each further suspicious one.
    notes: list[str] = field(default_factory=list)
    kind: str | None = None  # that the second stage names, whatever the letter


def uses_vllm(params: Params) -> bool:
    """Whether vLLM generates: as `evaluate.backend` says, or with `auto` where it is installed and there is a GPU."""
    backend = params.evaluate.backend
    installed = importlib.util.find_spec("vllm") is not None
    if backend == "transformers" or (backend == "auto" and not installed):
        return False
    if not installed:
        raise AdfmError("evaluate.backend is vllm, which is not installed: install it, or set the backend to auto.")
    import torch

    if backend == "auto" and not torch.cuda.is_available():
        return False
    _, folder = loading.base_of(params.model.name, params.model)
    supported = families.get(model_folder.family_of(folder)).vllm
    if backend == "vllm" and not supported:
        raise AdfmError(f"evaluate.backend is vllm, not supported for {params.model.name}: set the backend to auto.")
    return supported


def tile_of(model: str | Path, default: Tile) -> Tile:
    """Return the tiles that images are cut into: those that a model was trained with; `default` for a base."""
    description = model_folder.describe(model)
    if description is None:
        return default
    return Tile.model_validate((description.get("params") or {}).get("tile") or {})  # an older model saw whole images


def grid_of(size: tuple[int, int], tile: Tile) -> list[Box]:
    """Return the tiles of an image; the image itself where it is not cut."""
    return tiles.grid(*size, tile.size or max(size), tile.overlap)


class Predictor:
    """A loaded model, or a reference detector, that inspects images.

    Args:
        model: A base model's name, or a folder that adfm trained.
        params: Reads the sections `model` and `evaluate`, `seed`, and `tile` for a base model.

    Raises:
        AdfmError: The model cannot be loaded, or the backend is missing.
    """

    def __init__(self, model: str | Path, params: Params) -> None:
        self._batch_size = params.evaluate.batch_size
        self._tile = tile_of(model, params.tile)
        self.kinds = model_folder.kinds_of(model)  # of defects, of which the prompt asks to name one
        self._prepare: Callable[[list[Image.Image]], Any]
        self._generate: Callable[[Any], Completions]
        self._detector: Detector | None = None
        if model_folder.is_detector(model):
            from adfm.models import detector

            self._detector = detector.load(Path(model))
            self._prepare = lambda images: [detector.picture(image) for image in images]
        elif uses_vllm(params):
            from adfm.models import vllm_backend

            self._processor, self._family, self._generate = vllm_backend.load(model, params)
            self._prepare = lambda images: images
        else:
            self._processor, self._family, self._prepare, self._generate = transformers_backend.load(model, params)

    def answers(
        self,
        sizes: Sequence[tuple[int, int]],
        image: Callable[[int], Image.Image],
        done: Callable[[int], object] = lambda count: None,
    ) -> list[Prediction]:
        """Inspect images by greedy decoding; large ones in tiles, if the model was trained so.

        Args:
            sizes: Width and height of each image in pixels.
            image: Returns the image of that number, RGB, in a thread, and more than once if its tiles are apart.
            done: Called after each batch with the number of images in it, or the average number that its tiles finish.
        """
        grids = [grid_of(size, self._tile) for size in sizes]
        places = [(i, tile) for i, grid in enumerate(grids) for tile in grid]
        if len(places) == len(sizes):
            return self._answers(sizes, image, done)
        held, answered = lru_cache(1)(image), 0  # of the images that are cut, one is held at a time

        def cut(number: int) -> Image.Image:
            i, tile = places[number]
            return held(i).crop(tile)

        def progressed(count: int) -> None:
            nonlocal answered
            before, answered = answered, answered + count
            done(answered * len(sizes) // len(places) - before * len(sizes) // len(places))

        tile_sizes = [(int(tile.x2 - tile.x1), int(tile.y2 - tile.y1)) for _, tile in places]
        of_tiles = iter(self._answers(tile_sizes, cut, progressed))
        return [joined([next(of_tiles) for _ in grid], grid) for grid in grids]

    def _answers(
        self, sizes: Sequence[tuple[int, int]], image: Callable[[int], Image.Image], done: Callable[[int], object]
    ) -> list[Prediction]:
        order = list(range(len(sizes)))
        if not self._detector:
            # Images of like size one after the other, so that a batch is padded little.
            resized, images = families.get(self._family).images.resized, self._processor.image_processor
            order.sort(key=lambda i: math.prod(resized(images, *sizes[i])))
        predictions: dict[int, Prediction] = {}
        batches = list(batched(order, self._batch_size))
        prepared = _ahead(lambda batch: self._prepare([image(i) for i in batch]), batches)
        for batch, inputs in zip(batches, prepared, strict=True):
            predictions.update(zip(batch, self._answer(inputs, [sizes[i] for i in batch]), strict=True))
            done(len(batch))
        return [predictions[i] for i in range(len(sizes))]

    def _answer(self, inputs: Any, sizes: list[tuple[int, int]]) -> list[Prediction]:
        if self._detector:
            threshold = self._detector.threshold
            return [_detected(detection, threshold) for detection in self._detector.detect(inputs, sizes)]
        return [self._read(*answer) for answer in zip(*self._generate(inputs), sizes, strict=True)]

    def _read(self, completion: str, score: float | None, size: tuple[int, int]) -> Prediction:
        parsed = response.parse(completion)
        frame = families.get(self._family).frame(self._processor, *size)
        predicted = parsed.predicted_label
        regions = [frame.to_pixels(box, *size) for box in parsed.boxes]
        boxes = regions if predicted == "anomalous" else []
        kind = kinds.read(parsed.rethink, self.kinds)
        return Prediction(predicted, score if predicted else None, boxes, parsed, completion, regions, kind=kind)


def joined(answers: Sequence[Prediction], grid: Sequence[Box]) -> Prediction:
    """Join the answers to the tiles of an image, boxes in pixels of the tile, to its answer.

    The image is anomalous if a tile is; unparsed if none is and the answer to some tile is; else normal. Its score is
    the largest of its tiles. The words are those of the most suspicious tile among those that answer as the image does.
    `boxes` are those of anomalous tiles, `regions` also those of the one with the largest score, joined across seams.
    """
    if len(answers) == 1:
        return answers[0]
    labels = [answer.predicted for answer in answers]
    predicted: Label | None = "anomalous" if "anomalous" in labels else None if None in labels else "normal"
    scores = [-1.0 if answer.score is None else answer.score for answer in answers]
    order = sorted(range(len(answers)), key=lambda i: -scores[i])
    suspicious = [i for i in order if labels[i] == "anomalous"]
    first = next(i for i in order if labels[i] == predicted)
    notes = [f"These are the words on {_place(first, grid)}{', the most suspicious' * (predicted is not None)}."]
    notes += [f"On {_place(i, grid)}: {_words(answers[i])}" for i in suspicious if i != first][:_MAX_NOTES]
    if len(suspicious) - 1 > _MAX_NOTES:
        notes.append(f"{len(suspicious) - 1 - _MAX_NOTES} more tiles are suspicious.")
    best, flagged = answers[first], set(suspicious)
    return Prediction(
        predicted,
        scores[order[0]] if predicted and scores[order[0]] >= 0 else None,
        tiles.merged([answer.boxes for answer in answers], grid),
        best.read,
        "\n".join([best.completion, *notes]),
        tiles.merged([a.regions if i in {*flagged, order[0]} else [] for i, a in enumerate(answers)], grid),
        notes,
        best.kind,
    )


def _place(number: int, grid: Sequence[Box]) -> str:
    return f"tile {number + 1} of {len(grid)}, {[int(side) for side in grid[number]]}"


def _words(answer: Prediction) -> str:
    # Without the letter, of which the image's words would otherwise have two. A detector's words have none.
    parts = [answer.read.think, answer.read.rethink] if answer.read.answer else [answer.completion]
    return " ".join(part for part in parts if part).strip().replace("\n", " ")


def _detected(detection: "Detection", threshold: float) -> Prediction:
    flagged = detection.score >= threshold
    words = (detection.kind or "a defect") if flagged else "no defect"
    if flagged and (count := len(detection.regions)):
        words += f", in {count} {'place' if count == 1 else 'places'}"
    completion = f"{words[0].upper()}{words[1:]}."
    return Prediction(
        "anomalous" if flagged else "normal",
        detection.score,
        detection.regions if flagged else [],
        response.parse(completion),
        completion,
        detection.regions,
        kind=detection.kind,
    )


def _ahead(work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Yield `work` of each item while a thread already works on the next one."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(work, items[0])
        for item in items[1:]:
            ready, pending = pending.result(), pool.submit(work, item)
            yield ready
        yield pending.result()


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield the items in lists of `size`, the last one shorter; `itertools.batched` needs Python 3.12."""
    rest = iter(items)
    while batch := list(itertools.islice(rest, size)):
        yield batch
