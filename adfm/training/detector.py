"""Training of the reference detector (`adfm.models.detector`): the head learns on frozen features, on the CPU.

The loss is dense on the user's boxes (cross-entropy and Dice of the map of defects) where there are boxes and on normal
images, and a cross-entropy of the image's logit on the label of every image. Where no image has boxes, the mean of the
map's highest hundredth learns the label instead, so that the map still helps. Where no image is normal there is no loss
of the label. Kinds of defects are a further output where there are several, and all that it learns where no image is
normal and none has boxes.

The backbone runs once for each picture and its augmented variants (flips, brightness, contrast, noise); their features
wait in a file. For about 1,000 images that takes two minutes on one core, and the head's training one more.

With `tile.size` it learns from tiles of the images, as the language model does (`adfm.training.examples.rows`): all
with a defect and at least as many normal ones, as far as `MOST_PICTURES` allows. An image's score is then the highest
of its tiles, and its boxes are joined across seams (`adfm.models.predictor.joined`); threshold and box rule are
chosen on the joined answers.
"""

from __future__ import annotations

import io
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from adfm.data import hashes, tiles
from adfm.data import shards as shards_
from adfm.errors import AdfmError
from adfm.evaluation import metrics
from adfm.files import atomic_folder, refuse_to_replace, write_json
from adfm.method import kinds as kinds_
from adfm.models import detector, model_folder
from adfm.params import Params, Tile
from adfm.process.progress import bar
from adfm.records import Box, Record, Split
from adfm.tiny import efficientnet
from adfm.training import examples as examples_

VARIANTS = 4
"""Of a picture: as it is, and flipped across, down and both ways, each with other light and noise."""

MOST_PICTURES = 2400
"""Pictures that the backbone computes for training, variants included: about two minutes on one core, 0.9 GB."""

_MOST_VALIDATION = 1000  # images that threshold and boxes are chosen on
_MOST_TILES = 2400  # of these images, where they are cut: about as many images as have so many tiles, but
_FEWEST_VALIDATION = 40  # no fewer: a threshold on fewer images is chance
_MOST_TUNED = 200  # of those with boxes
_AT_ONCE = 8  # pictures, each in its variants, whose features are computed side by side
_BATCH = 16
_LEARNING_RATE, _WEIGHT_DECAY, _WARMUP = 2e-3, 2e-2, 30
_DEFECT_WEIGHT = 3.0  # of a cell with a defect in the cross-entropy: few cells have one
_COVERED = 0.4  # share of a cell from which on boxes make it one with a defect
_RULES = [
    detector.Rule(least, share, most)
    for least in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    for share in (0.0, 0.5, 0.7)
    for most in (1, 3, 10)
]

Maps = dict[int, Tensor]


class _Example(NamedTuple):
    """A picture whose features wait in the file.

    Args:
        places: By variant, where its features begin, in numbers.
        grid: Rows and columns of its map of defects.
        target: Cells with a defect, float32 of `grid`.
        anomalous: The label.
        boxes: Whether it has boxes.
        kind: Index of its kind; -1 if it has none.
    """

    places: list[int]
    grid: tuple[int, int]
    target: NDArray[np.float32]
    anomalous: bool
    boxes: bool
    kind: int


def train(shards: Path, out: Path, params: Params, force: bool = False) -> None:
    """Trains a reference detector on the train split, chooses threshold and box rule on the validation split.

    At most `MOST_PICTURES` images or tiles are drawn, half of them normal; the same settings and images give the same
    detector. What it was trained on, and what was left out, is printed.

    Args:
        shards: Folder of shards.
        out: Folder to write: `detector.safetensors`, `adfm.json`, `trained_on.parquet`.
        params: Reads `detector`, `seed` and `tile`.
        force: Replace a finished model at `out`.

    Raises:
        AdfmError: `out` holds a finished model or something else; the shards cannot be read; or there is nothing to
            learn: no defective image, or neither boxes nor normal images nor several kinds; with `tile.size`, no boxes.
    """
    refuse_to_replace(out, force)
    rng = np.random.default_rng(params.seed)
    rows = examples_.rows(shards, "train", params.tile)
    _check(rows, shards)
    chosen, variants = _chosen(rows, rng, params.tile)
    kinds = kinds_.single(row["defect"] for row in chosen)
    by_image = any(row["label"] == "normal" for row in chosen)
    with atomic_folder(out) as folder:
        cache = folder / "cache"
        cache.mkdir()
        examples = _compute(shards, chosen, kinds, variants, params.seed, cache / "features")
        if params.tile.size:
            print(_tiles_summary(shards, rows, examples, kinds, variants), flush=True)
        else:
            print(_summary(len(rows), examples, kinds, variants), flush=True)
        head = _fit(examples, cache / "features", len(kinds), by_image, params.detector.steps, rng)
        shutil.rmtree(cache)
        chosen_on: Split = "validation" if any(shards.glob("validation-*.parquet")) else "train"
        trained = _choose(detector.Detector(head, 0.0, None, kinds, by_image), shards, chosen_on, params.tile, rng)
        if chosen_on == "train":
            print("detector: there is no validation split; threshold and boxes are chosen on training images")
        _save(folder, trained, shards, params)
    if trained.threshold:
        print(f"{out}: flags from a probability of {trained.threshold:.3g} on")
    else:
        print(f"{out}: flags every image, as no normal one was there to learn from")


def _check(rows: list[dict[str, Any]], shards: Path) -> None:
    """Refuses training images that nothing can be learnt from."""
    counts = Counter(row["label"] for row in rows)
    if not counts["anomalous"]:
        raise AdfmError(
            f"{shards}: the train split has no defective image, and the detector learns from such; add defective "
            "images, or change split.* in params.yaml and convert again"
        )
    several = len(kinds_.single(row["defect"] for row in rows)) > 1
    if not counts["normal"] and not several and not any(row["boxes"] for row in rows):
        raise AdfmError(
            f"{shards}: the train split has no normal image, no boxes and no two kinds of defects, so that nothing is "
            "told apart; add normal images, or mark the defects with boxes"
        )


def _chosen(rows: list[dict[str, Any]], rng: np.random.Generator, tile: Tile) -> tuple[list[dict[str, Any]], int]:
    """The images or tiles to learn from, and in how many variants each.

    Of tiles few have a defect: they get as many variants as leave room for as many normal ones, which fill the rest.
    """
    if tile.size:
        anomalous = sum(row["label"] == "anomalous" for row in rows)
        variants = min(VARIANTS, max(1, MOST_PICTURES // (2 * anomalous)))
        return _draw(rows, rng, MOST_PICTURES // variants), variants
    chosen = _draw(rows, rng, MOST_PICTURES)
    return chosen, min(VARIANTS, max(1, MOST_PICTURES // len(chosen)))


def _draw(rows: list[dict[str, Any]], rng: np.random.Generator, most: int) -> list[dict[str, Any]]:
    """All images, or `most` of them: of each label half, or all that there are."""
    if len(rows) <= most:
        return rows
    by_label = [[row for row in rows if row["label"] == label] for label in ("anomalous", "normal")]
    fewer, more = sorted(by_label, key=len)
    few = min(len(fewer), most // 2)
    drawn = [(fewer, few), (more, most - few)]
    return [own[i] for own, count in drawn for i in np.sort(rng.choice(len(own), count, replace=False))]


def _summary(total: int, examples: list[_Example], kinds: list[str], variants: int) -> str:
    anomalous, boxes = sum(e.anomalous for e in examples), sum(e.boxes for e in examples)
    drawn = f" of {total:,}, drawn" if len(examples) < total else ""
    notes = [f"detector: {len(examples):,} training images{drawn}, {anomalous:,} defective, in {variants} variants"]
    normal = len(examples) - anomalous
    if not boxes and not normal:
        notes.append("no image has boxes or is normal, so that it learns the kinds alone, and its score says nothing")
    elif not boxes:
        notes.append("no image has boxes, so that it learns the labels alone and draws no boxes")
    elif boxes < anomalous:
        notes.append(f"{anomalous - boxes:,} defective images have a label alone")
    if boxes and not normal:
        notes.append("no image is normal, so that it learns the boxes alone, and its score is the map's highest")
    if len(kinds) > 1:
        notes.append(f"{len(kinds)} kinds of defects")
    return "; ".join(notes)


def _tiles_summary(
    shards: Path, rows: list[dict[str, Any]], examples: list[_Example], kinds: list[str], variants: int
) -> str:
    """What was drawn of the tiles `rows`, and what was left out."""
    anomalous, total = sum(e.anomalous for e in examples), sum(row["label"] == "anomalous" for row in rows)
    notes = [
        f"detector: {anomalous:,} of {total:,} tiles with a defect, {len(examples) - anomalous:,} of "
        f"{len(rows) - total:,} normal tiles of the training images, in {variants} variants"
    ]
    if without := examples_.boxes_known(shards)[1]:
        notes.append(f"{without} defective images have no boxes and are left out")
    if len(kinds) > 1:
        notes.append(f"{len(kinds)} kinds of defects")
    return "; ".join(notes)


def _images(
    shards: Path, split: Split, rows: list[dict[str, Any]]
) -> Iterator[tuple[Record, Image.Image, list[dict[str, Any]]]]:
    """The images of some rows of `examples.rows`, in the order of the shards, each with its rows."""
    of_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        of_image[row["number"]].append(row)
    for number, record in enumerate(shards_.read(shards, split)):
        if number in of_image:
            yield record, Image.open(io.BytesIO(record.image)), of_image[number]


def _compute(
    shards: Path, rows: list[dict[str, Any]], kinds: list[str], variants: int, seed: int, file: Path
) -> list[_Example]:
    """Writes the features of all variants of the pictures to `file`, as float16, one picture after the other.

    Args:
        shards: Folder of shards.
        rows: Some of `examples.rows` of the train split; a picture is an image or a tile.
        kinds: The kinds of defect.
        variants: Of each picture.
        seed: Of the variants.
        file: The file to write.
    """
    compute = efficientnet.Features(tuple(efficientnet.CHANNELS), keep=0)
    examples: list[_Example] = []
    place = 0
    with file.open("wb") as stream, bar(total=len(rows), desc="detector, features", unit="picture") as progress:
        plain = (
            (row, detector.picture(image.crop(row["tile"])))
            for _, image, of_image in _images(shards, "train", rows)
            for row in of_image
        )
        while some := list(islice(plain, _AT_ONCE)):
            pictures = [
                varied(one, variant, [seed, number, variant])
                for number, (_, one) in enumerate(some, len(examples))
                for variant in range(variants)
            ]
            computed = iter(detector.features(compute, pictures))
            for row, one in some:
                places = []
                for maps in islice(computed, variants):
                    places.append(place)
                    for stride in efficientnet.CHANNELS:
                        values = maps[stride].half().numpy()
                        stream.write(values.tobytes())
                        place += values.size
                grid = one.shape[1] // detector.STRIDE, one.shape[2] // detector.STRIDE
                examples.append(
                    _Example(
                        places,
                        grid,
                        target([Box(*box) for box in row["boxes"]], (row["width"], row["height"]), grid),
                        row["label"] == "anomalous",
                        bool(row["boxes"]),
                        kinds.index(kind) if (kind := kinds_.written(row["defect"])) in kinds else -1,
                    )
                )
                progress.update()
    return examples


def varied(picture: Tensor, variant: int, seed: Sequence[int]) -> Tensor:
    """A variant of a picture.

    Args:
        picture: [3, height, width], from -1 to 1.
        variant: 0: as it is; 1: flipped across, 2: flipped down, 3: both, with other brightness, contrast and noise.
        seed: Of the light and the noise.
    """
    if not variant:
        return picture
    rng = np.random.default_rng(seed)
    mean = picture.mean()
    noise = torch.from_numpy(rng.standard_normal(picture.shape, dtype=np.float32))
    lit = (picture - mean) * rng.uniform(0.75, 1.3) + mean + rng.normal(0, 0.15) + noise * rng.uniform(0, 0.04)
    return flipped(lit.clamp(-1, 1), variant)


def flipped(picture: Tensor, variant: int) -> Tensor:
    """`picture`, or any tensor whose last dimensions are rows and columns, flipped as `variant` is."""
    return picture.flip([dimension for bit, dimension in ((1, -1), (2, -2)) if variant & bit])


def target(boxes: Sequence[Box], size: tuple[int, int], grid: tuple[int, int]) -> NDArray[np.float32]:
    """The cells with a defect: those that a box covers by `_COVERED`, and of every box the one with its middle.

    Args:
        boxes: In pixels of the image.
        size: Width and height of the image in pixels.
        grid: Rows and columns.

    Returns:
        1 for cells with a defect, else 0, of shape `grid`.
    """
    (width, height), (rows, columns) = size, grid
    cells = np.zeros(grid, np.float32)

    def covered(low: float, high: float, count: int) -> NDArray[np.float64]:
        edges = np.arange(count + 1)
        return np.asarray(np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, 1))

    for box in boxes:
        left, right = (x * columns / width for x in (box.x1, box.x2))
        top, bottom = (y * rows / height for y in (box.y1, box.y2))
        cells[np.outer(covered(top, bottom, rows), covered(left, right, columns)) >= _COVERED] = 1
        cells[min(int((top + bottom) / 2), rows - 1), min(int((left + right) / 2), columns - 1)] = 1
    return cells


def _fit(
    examples: list[_Example], file: Path, kinds: int, by_image: bool, steps: int, rng: np.random.Generator
) -> detector.Head:
    """The trained head, in evaluation mode."""
    values = np.memmap(file, np.float16, "r")
    seed = int(rng.integers(2**31))
    anomalous, normal = (
        np.array([i for i, e in enumerate(examples) if e.anomalous == label]) for label in (True, False)
    )
    located = any(example.boxes for example in examples)
    with torch.random.fork_rng(devices=[]):  # dropout and the first weights, whatever ran before
        torch.manual_seed(seed)
        head = detector.Head(kinds)
        _standardise(head, values, examples, rng)
        optimizer = torch.optim.AdamW(head.parameters(), _LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
        head.train()
        for step in bar(range(steps), desc="detector, training", unit="step"):
            rate = min(1.0, (step + 1) / _WARMUP) * (0.5 + 0.5 * np.cos(np.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = _LEARNING_RATE * rate + 1e-5
            if by_image:  # half and half, however rare defects are
                drawn = np.concatenate([rng.choice(own, _BATCH // 2) for own in (anomalous, normal)])
            else:
                drawn = rng.choice(anomalous, _BATCH)
            variant = int(rng.integers(len(examples[0].places)))
            loss = _loss(head, [examples[i] for i in drawn], values, variant, by_image, located, kinds)
            if loss is None:  # of images with a label alone, none of which can be learnt from
                continue
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head.eval().requires_grad_(False)


def _standardise(
    head: detector.Head, values: NDArray[np.float16], examples: list[_Example], rng: np.random.Generator
) -> None:
    """Sets mean and spread of each channel over some plain pictures."""
    some = rng.choice(len(examples), min(len(examples), 200), replace=False)
    maps = [_read(values, examples[i], 0) for i in some]
    both = [torch.cat([one[stride].flatten(1) for one in maps], 1) for stride in efficientnet.CHANNELS]
    head.mean.copy_(torch.cat([each.mean(1) for each in both]))
    head.spread.copy_(torch.cat([each.std(1) + 1e-3 for each in both]))


def _read(values: NDArray[np.float16], example: _Example, variant: int) -> Maps:
    """The features of a variant, by stride, [channels, rows, columns]."""
    place, maps = example.places[variant], {}
    for stride, channels in efficientnet.CHANNELS.items():
        coarser = max(stride, detector.STRIDE) // detector.STRIDE
        shape = (channels, example.grid[0] // coarser, example.grid[1] // coarser)
        size = int(np.prod(shape))
        maps[stride] = torch.from_numpy(values[place : place + size].astype(np.float32).reshape(shape))
        place += size
    return maps


def _loss(
    head: detector.Head,
    batch: list[_Example],
    values: NDArray[np.float16],
    variant: int,
    by_image: bool,
    located: bool,
    kinds: int,
) -> Tensor | None:
    """The loss of a batch; `None` if none of its images has something to learn from."""
    by_grid: dict[tuple[int, int], list[_Example]] = defaultdict(list)
    for example in batch:
        by_grid[example.grid].append(example)
    terms: dict[str, list[Tensor]] = defaultdict(list)
    for alike in by_grid.values():
        maps = [_read(values, example, variant) for example in alike]
        outputs = head({stride: torch.stack([one[stride] for one in maps]) for stride in efficientnet.CHANNELS})
        label = torch.tensor([float(example.anomalous) for example in alike])
        boxes = torch.tensor([example.boxes for example in alike])
        if located:
            truth = flipped(torch.from_numpy(np.stack([example.target for example in alike])), variant)
            known = boxes | (label == 0)
            weight = torch.tensor(_DEFECT_WEIGHT)
            cells = F.binary_cross_entropy_with_logits(outputs.cells, truth, reduction="none", pos_weight=weight)
            terms["cells"].append(cells.mean((1, 2))[known])
            share = outputs.cells.sigmoid()
            both, each = (share * truth).sum((1, 2)), share.sum((1, 2)) + truth.sum((1, 2))
            terms["dice"].append((1 - (2 * both + 1) / (each + 1))[boxes])
        else:
            terms["top"].append(F.binary_cross_entropy_with_logits(outputs.top, label, reduction="none"))
        if by_image:
            terms["image"].append(F.binary_cross_entropy_with_logits(outputs.image, label, reduction="none"))
        if kinds > 1:
            kind = torch.tensor([example.kind for example in alike])
            terms["kind"].append(F.cross_entropy(outputs.kinds, kind, reduction="none", ignore_index=-1)[kind >= 0])
    weights = {"cells": 2.0, "dice": 0.5, "top": 0.5, "image": 0.5, "kind": 0.3}
    means = [weights[name] * torch.cat(each).mean() for name, each in terms.items() if sum(map(len, each))]
    return torch.stack(means).sum() if means else None


class _Located(NamedTuple):
    """An image with boxes, and what the head answers to its tiles; one that is not cut is its only tile.

    Args:
        record: The image.
        grid: Its tiles.
        scores: Probability of a defect, by tile.
        cells: Map of defects, by tile.
    """

    record: Record
    grid: list[Box]
    scores: list[float]
    cells: list[Tensor]


def _choose(
    trained: detector.Detector, shards: Path, split: Split, tile: Tile, rng: np.random.Generator
) -> detector.Detector:
    """The detector with a threshold fitted on `split` (`metrics.best_threshold`), and its box rule of the best IoU.

    The threshold is 0 where no normal image is in `split` or was trained on.
    """
    rows = examples_.rows(shards, split, Tile())
    sizes = [(row["width"], row["height"]) for row in rows]
    grids = [tiles.grid(*size, tile.size or max(size), tile.overlap) for size in sizes]
    most = max(_FEWEST_VALIDATION, _MOST_TILES * len(rows) // sum(map(len, grids))) if tile.size else _MOST_VALIDATION
    chosen = _draw(rows, rng, min(most, _MOST_VALIDATION))
    if len(chosen) < len(rows):
        drawn = f"{len(chosen):,} of {len(rows):,} {split} images"
        print(f"detector: threshold and boxes are chosen on {drawn}, drawn", flush=True)
    compute = efficientnet.Features(tuple(efficientnet.CHANNELS), keep=0)
    scores: list[float] = []
    labels: list[bool] = []
    located: list[_Located] = []
    images = iter(bar(_images(shards, split, chosen), total=len(chosen), desc="detector, threshold", unit="image"))
    at_once = 1 if tile.size else _AT_ONCE  # the tiles of one image are enough for all cores
    while some := list(islice(images, at_once)):
        pictures = [detector.picture(image.crop(place)) for _, image, [row] in some for place in grids[row["number"]]]
        computed = iter(detector.features(compute, pictures))
        for record, _, [row] in some:
            answer = _Located(record, grids[row["number"]], [], [])
            for maps in islice(computed, len(answer.grid)):
                with torch.inference_mode():
                    outputs = trained.head({stride: one[None] for stride, one in maps.items()})
                answer.scores.extend(detector.score_of(outputs, trained.by_image))
                answer.cells.append(outputs.cells[0].sigmoid())
            scores.append(max(answer.scores))
            labels.append(record.label == "anomalous")
            if record.boxes and len(located) < _MOST_TUNED:
                located.append(answer)
    if all(labels) and not trained.by_image:  # how low normal images score is not known
        threshold = 0.0
    else:
        threshold = metrics.best_threshold(np.array(labels), np.array(scores))
    return replace(trained, threshold=threshold, rule=_best_rule(located, threshold), chosen_on=len(chosen))


def _best_rule(located: list[_Located], threshold: float) -> detector.Rule | None:
    """The rule with the highest mean IoU; `None` without an image with boxes.

    Boxes are drawn on the tiles that are flagged, and on the most suspicious one, as `predictor.joined` does.
    """
    images = []
    for record, grid, scores, cells in located:
        drawn = [i for i, score in enumerate(scores) if score >= min(threshold, max(scores))]
        images.append((record, [(grid[i], detector.refined(cells[i])) for i in drawn]))

    def mean_iou(rule: detector.Rule) -> float:
        overlaps = []
        for record, drawn in images:
            boxes = [detector.regions(fine, (int(x2 - x1), int(y2 - y1)), rule) for (x1, y1, x2, y2), fine in drawn]
            joined = tiles.merged(boxes, [tile for tile, _ in drawn])
            overlap = metrics.localize(record.boxes, joined, record.width, record.height)
            overlaps.append(overlap["iou"] or 0.0)
        return float(np.mean(overlaps))

    return max(_RULES, key=mean_iou) if images else None


def _save(folder: Path, trained: detector.Detector, shards: Path, params: Params) -> None:
    from safetensors.torch import save_file

    save_file({name: each.contiguous() for name, each in trained.head.state_dict().items()}, folder / detector.WEIGHTS)
    description = {
        "stage": detector.STAGE,
        "threshold": trained.threshold,
        "rule": trained.rule._asdict() if trained.rule else None,
        "kinds": trained.kinds,
        "score": "image" if trained.by_image else "map",
        "chosen_on": trained.chosen_on,
        "backbone": efficientnet.SHA256,
        "data_fingerprint": shards_.fingerprint(shards),
        "grey_range": shards_.grey_range(shards),
        "params": params.model_dump(mode="json", by_alias=True),
    }
    write_json(description, folder / model_folder.DESCRIPTION)
    hashes.write(hashes.collect(shards, hashes.SEEN), folder / hashes.FILE)
