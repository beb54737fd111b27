"""Batched greedy decoding of a split, and the prediction table.

One row an image: `id source dataset category defect group label predicted score iou mask_iou matched_iou true_positives
false_positives false_negatives area_share boxes predicted_boxes completion regions region_*`. Boxes are original
pixels, half-open. `regions` are all boxes that the completion names, whatever its letter; `region_iou` and so on
compare them as `iou` and so on compare `predicted_boxes`: they are what an image gets that is flagged by its
probability. `predicted` is null where the completion has no clean answer, and such an image counts as wrong everywhere;
`score` is the uncalibrated probability of a defect, computed as `evaluate.score` says, and null where there is no valid
answer; `group` is null where it is not known which images show the same part. A model whose prompt asks for the
defect's kind has two further columns: `kind`, that of a defective image, null where it has several or none is known;
and `predicted_kind`, the one that the model names, whatever its letter, null where it names none or several.

A window of a few batches is read at a time, and its images are answered in order of their size, so that a batch is
padded little or not at all; rows keep the order of the shards. The next batch is decoded and resized in a thread while
the model writes. A finished window is kept in a file, so that an interrupted evaluation goes on with the next one.

With `tile.size`, a large image is answered tile by tile, and the answers are joined (`joined`); batches and windows
then count tiles.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

import adfm
from adfm import tiles
from adfm.data import shards as shards_
from adfm.errors import AdfmError
from adfm.evaluation import metrics
from adfm.method import kinds, prompt, response
from adfm.models import decoding, families, loading
from adfm.params import Evaluate, Params, Tile
from adfm.records import Box, Label, Record

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from adfm.models.detector import Detection, Detector

_TEXT = ("id", "source", "dataset", "category", "defect", "group", "label", "predicted")
_BOXES = pa.list_(pa.list_(pa.float64()))
PREDICTIONS = pa.schema(
    [(name, pa.string()) for name in _TEXT]
    + [(name, pa.float64()) for name in ("score", "iou", "mask_iou", "matched_iou")]
    + [(name, pa.int64()) for name in ("true_positives", "false_positives", "false_negatives")]
    + [("area_share", pa.float64()), ("boxes", _BOXES), ("predicted_boxes", _BOXES), ("completion", pa.string())]
    + [("regions", _BOXES), *((f"region_{name}", pa.float64()) for name in metrics.COMPARED)]
)

KINDS = tuple(pa.field(name, pa.string()) for name in ("kind", "predicted_kind"))
"""Further columns where the model's prompt asks for the defect's kind: the true one, and the one `<rethink>` names."""

_WINDOW = 4  # batches that are read, sorted and kept at a time
_MOST_NOTES = 8  # suspicious tiles of an image whose words are kept

Answers = tuple[list[str], list[float | None]]
"""Completions, and for each the probability of a defect; `None` where it has no clean letter."""


@dataclass(frozen=True)
class Answer:
    """What a model answers to one image, read.

    Args:
        predicted: The decision; `None` where the completion has no clean answer.
        score: The probability of `anomalous`, before calibration; `None` where there is no decision.
        boxes: The defects, in pixels of the image, half-open, not clipped; none unless it is `anomalous`: a region that
            was examined and rejected is no defect.
        read: The completion in its parts.
        completion: The model's own words.
        regions: All boxes of the first stage, in pixels like `boxes`, whatever the letter: the defects of an image that
            is flagged by its probability.
        notes: Of an image that was cut into tiles: which tile the words are of, and a line for each further tile that
            is suspicious, with its words.
        kind: The kind of defect that the second stage names, whatever the letter; `None` where it names none.
    """

    predicted: Label | None
    score: float | None
    boxes: list[Box]
    read: response.Response
    completion: str
    regions: list[Box] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    kind: str | None = None


def predict(model: str | Path, shards: Path, params: Params, describe: str) -> pd.DataFrame:
    """Let `model` answer every image of the split `params.evaluate.split`; as `predict_splits`."""
    split = params.evaluate.split
    return predict_splits(model, shards, params, describe, [split])[split]


def predict_splits(
    model: str | Path, shards: Path, params: Params, describe: str, splits: Sequence[str], keep: Path | None = None
) -> dict[str, pd.DataFrame]:
    """Let `model` answer every image of some splits, greedily, one answer an image.

    Args:
        model: A base model's name, or a folder that warm-up or training wrote.
        shards: Folder of shards.
        params: Reads the sections `model`, `tile` and `evaluate`.
        describe: What the progress bar says.
        splits: The splits.
        keep: Folder for what is finished; what it holds of the same model, data and settings is not done again.

    Returns:
        The prediction table of each split.

    Raises:
        AdfmError: The model or the shards cannot be loaded, or the backend asked for is not there.
    """
    vllm = uses_vllm(params)
    tile = tile_of(model, params)
    inspector: Inspector | None = None
    tables: dict[str, pd.DataFrame] = {}
    for split in splits:
        kept = keep / _key(model, shards, split, params, vllm) if keep else None
        parts: list[pa.Table] = []
        total, most = len(shards_.ids(shards, split)), _most_tiles(shards, split, tile)
        with tqdm(total=total, desc=f"{describe}, {split}", unit="image", mininterval=1.0) as progress:
            windows = _batched(shards_.read(shards, split), max(1, _WINDOW * params.evaluate.batch_size // most))
            for number, window in enumerate(windows):
                file = kept / f"{number:06d}.parquet" if kept else None
                if file and file.is_file():
                    parts.append(pq.read_table(file))
                    progress.update(len(window))
                    continue
                if inspector is None:  # not before: everything may be finished
                    inspector = Inspector(model, params)
                schema = pa.schema([*PREDICTIONS, *KINDS]) if inspector.kinds else PREDICTIONS
                parts.append(pa.Table.from_pylist(_rows(inspector, window, progress.update), schema=schema))
                if file:
                    _write_whole(parts[-1], file)
        tables[split] = pa.concat_tables(parts).to_pandas()
    return tables


def _write_whole(table: pa.Table, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    pq.write_table(table, partial)
    partial.rename(file)


def uses_vllm(params: Params) -> bool:
    """Whether vLLM does the work: where it is asked for, or with `auto` where it is installed and there is a GPU.

    Raises:
        AdfmError: `evaluate.backend` is `vllm`, which is not installed or does not have the model's architecture.
    """
    backend = params.evaluate.backend
    if backend == "transformers":
        return False
    installed = importlib.util.find_spec("vllm") is not None
    if backend == "vllm" and not installed:
        raise AdfmError("evaluate.backend is vllm, which is not installed: install it, or set the backend to auto.")
    if not installed:
        return False
    import torch

    if backend == "auto" and not torch.cuda.is_available():
        return False
    known = families.get(loading.family_of(loading.base_of(params.model.name, params.model)[1])).vllm
    if backend == "vllm" and not known:
        raise AdfmError(f"evaluate.backend is vllm, which does not have {params.model.name}: set the backend to auto.")
    return known


def _key(model: str | Path, shards: Path, split: str, params: Params, vllm: bool) -> str:
    """What decides the predictions, as a name for their folder."""
    settings = params.evaluate
    decides = {
        "code": adfm.__version__,
        "columns": PREDICTIONS.names,
        "prompt": [prompt.messages(units) for units in families.UNITS.values()],
        "model": loading.identity(model, params.model),
        "how": [params.model.dtype, params.model.max_pixels, settings.batch_size, settings.max_new_tokens, vllm],
        "tile": tile_of(model, params).model_dump(),
        "score": [settings.score, settings.samples, params.seed if settings.samples else None],
        "data": [split, shards_.fingerprint(shards, split)],
    }
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]


def tile_of(model: str | Path, params: Params) -> Tile:
    """Into which tiles images are cut for a model: those it was trained with; the settings' for a base model."""
    description = loading.describe(Path(model))
    if description is None:
        return params.tile
    return Tile.model_validate((description.get("params") or {}).get("tile") or {})  # an older model saw whole images


def _grid(size: tuple[int, int], tile: Tile) -> list[Box]:
    """The tiles of an image; the image itself where it is not cut."""
    return tiles.grid(*size, tile.size or max(size), tile.overlap)


def _most_tiles(shards: Path, split: str, tile: Tile) -> int:
    """Tiles of the image of a split that has most of them."""
    if not tile.size:
        return 1
    sizes = {
        (row["width"], row["height"])
        for rows in shards_.batches(shards, split, ["width", "height"])
        for row in rows.to_pylist()
    }
    return max(len(_grid(size, tile)) for size in sizes)


class Inspector:
    """A loaded model, or a reference detector, that inspects images.

    `kinds` are the kinds of defects that its prompt asks to name one of; empty if it asks for none.

    Args:
        model: A base model's name, or a folder that warm-up, training or the detector's training wrote.
        params: Reads the sections `model` and `evaluate`, and `tile` for a base model.

    Raises:
        AdfmError: The model cannot be loaded, or the backend asked for is not there.
    """

    def __init__(self, model: str | Path, params: Params) -> None:
        settings = params.evaluate
        self._batch_size = settings.batch_size
        self._tile = tile_of(model, params)
        self.kinds = loading.kinds_of(model)
        self._prepare: Callable[[list[Image.Image]], Any]
        self._generate: Callable[[Any], Answers]
        self._detector: Detector | None = None
        if loading.is_detector(model):
            from adfm.models import detector

            self._detector = detector.load(Path(model))
            self._prepare = lambda images: [detector.picture(image) for image in images]
        elif uses_vllm(params):
            from adfm.evaluation import vllm_backend

            self._processor, self._family, self._generate = vllm_backend.load(model, params)
            self._prepare = lambda images: images
        else:
            loaded = loading.load(model, params.model)
            loaded.model.eval()
            self._processor, self._family = loaded.processor, loaded.family
            text = loading.chat_text(loaded.processor, loaded.prompt)
            self._prepare = lambda images: _inputs(loaded.processor, text, images)
            scorer = decoding.Scorer(loaded.processor.tokenizer)
            self._generate = lambda inputs: _generate(loaded, scorer, inputs, settings, params.seed)

    def answers(
        self,
        sizes: Sequence[tuple[int, int]],
        image: Callable[[int], Image.Image],
        done: Callable[[int], object] = lambda count: None,
    ) -> list[Answer]:
        """Inspects images, one answer an image, greedily; large ones in tiles, if the model was trained so.

        Args:
            sizes: Width and height of each image in pixels.
            image: Returns the image of that number, RGB. Called in a thread shortly before the image is needed, and
                more than once if its tiles are not answered one after the other.
            done: Called after each batch with the number of images in it; for tiled images, with the average number
                that it finished.

        Returns:
            The answers, in the order of `sizes`.
        """
        grids = [_grid(size, self._tile) for size in sizes]
        places = [(i, tile) for i, grid in enumerate(grids) for tile in grid]
        if len(places) == len(sizes):
            return self._answers(sizes, image, done)
        last: list[tuple[int, Image.Image]] = []  # of the images that are cut, one is held at a time
        answered = 0

        def cut(number: int) -> Image.Image:
            i, tile = places[number]
            if not last or last[0][0] != i:
                last[:] = [(i, image(i))]
            return last[0][1].crop(tile)

        def progressed(count: int) -> None:
            nonlocal answered
            before, answered = answered, answered + count
            done(answered * len(sizes) // len(places) - before * len(sizes) // len(places))

        of_tiles = iter(self._answers([_size(tile) for _, tile in places], cut, progressed))
        return [joined([next(of_tiles) for _ in grid], grid) for grid in grids]

    def _answers(
        self,
        sizes: Sequence[tuple[int, int]],
        image: Callable[[int], Image.Image],
        done: Callable[[int], object],
    ) -> list[Answer]:
        """Inspects images as they are, in batches of like size; as `answers`."""
        order = self._order(sizes)
        found: dict[int, Answer] = {}

        def prepared(batch: list[int]) -> Any:
            return self._prepare([image(i) for i in batch])

        batches = list(_batched(order, self._batch_size))
        for batch, inputs in zip(batches, _ahead(prepared, batches), strict=True):
            found.update(zip(batch, self._answer(inputs, [sizes[i] for i in batch]), strict=True))
            done(len(batch))
        return [found[i] for i in range(len(sizes))]

    def _order(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Images of like size one after the other, so that a batch is padded little; a detector pads nothing."""
        if self._detector:
            return [*range(len(sizes))]
        resized, images = families.get(self._family).images.resized, self._processor.image_processor
        return sorted(range(len(sizes)), key=lambda i: math.prod(resized(images, *sizes[i])))

    def _answer(self, inputs: Any, sizes: list[tuple[int, int]]) -> list[Answer]:
        """The answers to a batch, as `_prepare` gives it."""
        if self._detector:
            detections = self._detector.detect(inputs, sizes)
            return [_detected(detection, self._detector.threshold) for detection in detections]
        return [
            self._read(completion, score, *size)
            for completion, score, size in zip(*self._generate(inputs), sizes, strict=True)
        ]

    def _read(self, completion: str, score: float | None, width: int, height: int) -> Answer:
        parsed = response.parse(completion)
        frame = families.get(self._family).frame(self._processor, width, height)
        predicted = parsed.predicted_label
        regions = [frame.to_pixels(box, width, height) for box in parsed.boxes]
        boxes = regions if predicted == "anomalous" else []
        kind = kinds.read(parsed.rethink, self.kinds)
        return Answer(predicted, score if predicted else None, boxes, parsed, completion, regions, kind=kind)


def _size(tile: Box) -> tuple[int, int]:
    return int(tile.x2 - tile.x1), int(tile.y2 - tile.y1)


def joined(answers: Sequence[Answer], grid: Sequence[Box]) -> Answer:
    """The answer to an image, of those to its tiles.

    The image is anomalous if a tile is; unparsed if none is and the answer to some tile is; else normal. Its score is
    the largest of its tiles. The words are those of the most suspicious tile among those that answer as the image does.
    Boxes of tiles are joined across seams (`adfm.tiles.merged`).

    Args:
        answers: One a tile, boxes in pixels of the tile.
        grid: The tiles, as of `adfm.tiles.grid`.

    Returns:
        The answer; its `boxes` are those of the tiles that are anomalous, its `regions` also those of the tile that
        the score is of.
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
    notes += [f"On {_place(i, grid)}: {_words(answers[i])}" for i in suspicious if i != first][:_MOST_NOTES]
    if len(suspicious) - 1 > _MOST_NOTES:
        notes.append(f"{len(suspicious) - 1 - _MOST_NOTES} more tiles are suspicious.")
    best, flagged = answers[first], set(suspicious)
    return Answer(
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


def _words(answer: Answer) -> str:
    """What a model wrote of a tile on one line, without an answer: the image's words would have two.

    A detector's words are in no form and have no answer.
    """
    parts = [answer.read.think, answer.read.rethink] if answer.read.answer else [answer.completion]
    return " ".join(part for part in parts if part).strip().replace("\n", " ")


def _detected(detection: Detection, threshold: float) -> Answer:
    """A detector's answer in the form of a language model's; its few words are for people, in no form."""
    flagged = detection.score >= threshold
    count = len(detection.regions)
    words = "no defect" if not flagged else detection.kind or "a defect"
    if flagged and count:
        words += f", in {count} {'place' if count == 1 else 'places'}"
    completion = f"{words[0].upper()}{words[1:]}."
    return Answer(
        "anomalous" if flagged else "normal",
        detection.score,
        detection.regions if flagged else [],
        response.parse(completion),
        completion,
        detection.regions,
        kind=detection.kind,
    )


def _ahead(work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """`work` of each item, the next one already under way in a thread while one is used."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(work, items[0])
        for item in items[1:]:
            ready, pending = pending.result(), pool.submit(work, item)
            yield ready
        yield pending.result()


def answer(loaded: loading.Loaded, images: list[Image.Image], settings: Evaluate) -> Answers:
    """Greedy completions for `images`, and the probability of a defect for each."""
    scorer = decoding.Scorer(loaded.processor.tokenizer)
    text = loading.chat_text(loaded.processor, loaded.prompt)
    return _generate(loaded, scorer, _inputs(loaded.processor, text, images), settings)


def _inputs(processor: Any, text: str, images: list[Image.Image]) -> Any:
    return processor(text=[text] * len(images), images=images, padding=True, return_tensors="pt")


def _generate(
    loaded: loading.Loaded, scorer: decoding.Scorer, inputs: Any, settings: Evaluate, seed: int = 0
) -> Answers:
    import torch

    inputs = inputs.to(loaded.model.device)
    completions, scores = _complete(loaded, scorer, inputs, settings)
    if settings.samples:
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # the same batch gets the same samples
            samples = [_complete(loaded, scorer, inputs, settings, sample=True)[1] for _ in range(settings.samples)]
        scores = decoding.mean_of_samples(scores, samples)
    return completions, scores


def _complete(
    loaded: loading.Loaded, scorer: decoding.Scorer, inputs: Any, settings: Evaluate, sample: bool = False
) -> Answers:
    import torch
    from transformers import LogitsProcessorList

    tokenizer = loaded.processor.tokenizer
    logits = _DecidingLogits(scorer.tokens)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    generate: Any = loaded.model.generate
    with torch.inference_mode():
        output = generate(
            **inputs,
            **sampling,
            max_new_tokens=settings.max_new_tokens,
            stop_strings=[decoding.STOP],
            tokenizer=tokenizer,
            logits_processor=LogitsProcessorList([logits]),
        )
    tokens = output[:, inputs["input_ids"].shape[1] :].tolist()
    steps = torch.stack(logits.steps, 1).cpu().numpy()  # [images, tokens, deciding tokens]
    completions = [decoding.until_stop(text) for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    scores = [
        scorer.score(settings, row, text, at.__getitem__)
        for row, text, at in zip(tokens, completions, steps, strict=True)
    ]
    return completions, scores


class _DecidingLogits:
    """Called by `generate` at every step: keeps the logits of a few tokens, not of the whole vocabulary."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps.append(scores[:, self._tokens].float())
        return scores


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _image(record: Record) -> Image.Image:
    return Image.open(io.BytesIO(record.image)).convert("RGB")


def _rows(inspector: Inspector, window: Sequence[Record], done: Callable[[int], object]) -> list[dict[str, Any]]:
    sizes = [(record.width, record.height) for record in window]
    answers = inspector.answers(sizes, lambda i: _image(window[i]), done)
    rows = list(map(_row, window, answers))
    if inspector.kinds:
        for row, answer in zip(rows, answers, strict=True):
            row |= {"kind": kinds.of(row["defect"], inspector.kinds), "predicted_kind": answer.kind}
    return rows


def _row(record: Record, answer: Answer) -> dict[str, Any]:
    mask = None if record.mask is None else np.asarray(Image.open(io.BytesIO(record.mask))) > 0
    overlap: dict[str, Any] = {}
    if record.label == "anomalous":
        overlap = metrics.localize(record.boxes, answer.boxes, record.width, record.height, mask)
        of_regions = metrics.localize(record.boxes, answer.regions, record.width, record.height, mask)
        overlap |= {f"region_{name}": of_regions[name] for name in metrics.COMPARED}
    return {
        "id": record.id,
        "source": record.source,
        "dataset": record.dataset,
        "category": record.category,
        "defect": record.defect,
        "group": record.group,
        "label": record.label,
        "predicted": answer.predicted,
        "score": answer.score,
        **overlap,
        "boxes": [list(box) for box in record.boxes],
        "predicted_boxes": [list(box) for box in answer.boxes],
        "completion": answer.completion,
        "regions": [list(box) for box in answer.regions],
    }
