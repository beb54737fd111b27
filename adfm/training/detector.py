"""Train the reference detector (`adfm.models.detector`): a head on frozen features, on the CPU."""

import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
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

VARIANTS = 4  # of a picture: as it is, and flipped across, down and both ways, each with other light and noise
# Images or tiles that the backbone computes for training, variants included: two minutes on one core, 0.9 GB in a file.
MOST_PICTURES = 2400
_MOST_VALIDATION = 1000  # images that threshold and boxes are chosen on
_MOST_TILES = 2400  # of these images, where they are cut: about as many images as have so many tiles, but
_FEWEST_VALIDATION = 40  # no fewer: a threshold on fewer images is chance
_MOST_TUNED = 200  # of those with boxes
_AT_ONCE = 8  # pictures, each in its variants, whose features are computed side by side
_BATCH = 16
_LEARNING_RATE, _WEIGHT_DECAY, _WARMUP = 2e-3, 2e-2, 30
_DEFECT_WEIGHT = 3.0  # of a cell with a defect in the cross-entropy: few cells have one
_COVERED = 0.4  # share of a cell from which on boxes make it one with a defect
# Each with a `least`, a `share` and a `most`.
_RULES = [detector.Rule(*each) for each in product((0.2, 0.3, 0.4, 0.5, 0.6, 0.7), (0.0, 0.5, 0.7), (1, 3, 10))]


class _Example(NamedTuple):
    """A picture whose features are in the file."""

    places: list[int]  # by variant, where its features begin, in numbers
    grid: tuple[int, int]  # rows and columns of its map of defects
    target: NDArray[np.float32]  # cells with a defect, of the shape `grid`
    anomalous: bool
    boxes: bool
    kind: int  # -1: none of those that are learned


def train(shards: Path, out: Path, params: Params, force: bool = False) -> None:
    """Train a reference detector on the train split; choose threshold and box rule on the validation split.

    At most `MOST_PICTURES` images or tiles (`tile.size`) are drawn, half of them normal; the same settings and images
    give the same detector. What it was trained on, and what was left out, is printed.

    Args:
        shards: Folder of shards.
        out: Folder to write: `detector.safetensors`, `adfm.json`, `trained_on.parquet`.
        params: Reads `detector`, `seed` and `tile`.
        force: Replace a finished model at `out`.

    Raises:
        AdfmError: `out` cannot be replaced; the shards cannot be read; or nothing is to learn: no defective image, or
            neither boxes nor normal images nor several kinds; with `tile.size`, no boxes.
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
        print("; ".join(_summary(shards, rows, examples, kinds, variants, params.tile)), flush=True)
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
    if tile.size:
        # Few tiles have a defect: they get as many variants as leave room for as many normal ones, which fill the rest.
        anomalous = sum(row["label"] == "anomalous" for row in rows)
        variants = min(VARIANTS, max(1, MOST_PICTURES // (2 * anomalous)))
        return _draw(rows, rng, MOST_PICTURES // variants), variants
    chosen = _draw(rows, rng, MOST_PICTURES)
    return chosen, min(VARIANTS, max(1, MOST_PICTURES // len(chosen)))


def _draw(rows: list[dict[str, Any]], rng: np.random.Generator, most: int) -> list[dict[str, Any]]:
    """Return all images, or `most` of them: of each label half, or all that there are."""
    if len(rows) <= most:
        return rows
    by_label = [[row for row in rows if row["label"] == label] for label in ("anomalous", "normal")]
    fewer, more = sorted(by_label, key=len)
    few = min(len(fewer), most // 2)
    drawn = [(fewer, few), (more, most - few)]
    return [own[i] for own, count in drawn for i in np.sort(rng.choice(len(own), count, replace=False))]


def _summary(
    shards: Path, rows: list[dict[str, Any]], examples: list[_Example], kinds: list[str], variants: int, tile: Tile
) -> list[str]:
    anomalous, boxes = sum(e.anomalous for e in examples), sum(e.boxes for e in examples)
    normal, total = len(examples) - anomalous, sum(row["label"] == "anomalous" for row in rows)
    if tile.size:
        notes = [
            f"detector: {anomalous:,} of {total:,} tiles with a defect, {normal:,} of {len(rows) - total:,} normal "
            f"tiles of the training images, in {variants} variants"
        ]
        if without := examples_.boxes_known(shards)[1]:
            notes.append(f"{without} defective images have no boxes and are left out")
    else:
        drawn = f" of {len(rows):,}, drawn" if len(examples) < len(rows) else ""
        notes = [f"detector: {len(examples):,} training images{drawn}, {anomalous:,} defective, in {variants} variants"]
        if not boxes and not normal:
            notes.append("no image has boxes or is normal: it learns the kinds alone, and its score says nothing")
        elif not boxes:
            notes.append("no image has boxes, so that it learns the labels alone and draws no boxes")
        elif boxes < anomalous:
            notes.append(f"{anomalous - boxes:,} defective images have a label alone")
        if boxes and not normal:
            notes.append("no image is normal, so that it learns the boxes alone, and its score is the map's highest")
    return [*notes, f"{len(kinds)} kinds of defects"] if len(kinds) > 1 else notes


def _compute(
    shards: Path, rows: list[dict[str, Any]], kinds: list[str], variants: int, seed: int, file: Path
) -> list[_Example]:
    """Write the features of all variants of some images or tiles to `file`, as float16, one picture after the other."""
    compute = efficientnet.Features(tuple(efficientnet.CHANNELS), keep=0)
    examples: list[_Example] = []
    place = 0
    with file.open("wb") as stream, bar(total=len(rows), desc="detector, features", unit="picture") as progress:
        plain = (
            (row, detector.picture(image.crop(row["tile"])))
            for _, image, of_image in examples_.images(shards, "train", rows)
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
                cells = target([Box(*box) for box in row["boxes"]], (row["width"], row["height"]), grid)
                kind = kinds.index(name) if (name := kinds_.written(row["defect"])) in kinds else -1
                anomalous = row["label"] == "anomalous"
                examples.append(_Example(places, grid, cells, anomalous, bool(row["boxes"]), kind))
                progress.update()
    return examples


def varied(picture: Tensor, variant: int, seed: Sequence[int]) -> Tensor:
    """Return a variant of a picture.

    Args:
        picture: [3, height, width], from -1 to 1.
        variant: 0: as it is; 1: flipped across, 2: flipped down, 3: both, with other brightness, contrast and noise.
        seed: Decides brightness, contrast and noise.
    """
    if not variant:
        return picture
    rng = np.random.default_rng(seed)
    mean = picture.mean()
    noise = torch.from_numpy(rng.standard_normal(picture.shape, dtype=np.float32))
    lit = (picture - mean) * rng.uniform(0.75, 1.3) + mean + rng.normal(0, 0.15) + noise * rng.uniform(0, 0.04)
    return flipped(lit.clamp(-1, 1), variant)


def flipped(picture: Tensor, variant: int) -> Tensor:
    """Flip a tensor whose last dimensions are rows and columns as `variant` is."""
    return picture.flip([dimension for bit, dimension in ((1, -1), (2, -2)) if variant & bit])


def target(boxes: Sequence[Box], size: tuple[int, int], grid: tuple[int, int]) -> NDArray[np.float32]:
    """Return a map of shape `grid`, 1 for cells that a box, in pixels, covers by `_COVERED` or that hold its middle."""
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
    values = np.memmap(file, np.float16, "r")
    seed = int(rng.integers(2**31))
    anomalous = np.flatnonzero([example.anomalous for example in examples])
    normal = np.flatnonzero([not example.anomalous for example in examples])
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
    some = rng.choice(len(examples), min(len(examples), 200), replace=False)
    maps = [_read(values, examples[i], 0) for i in some]
    both = [torch.cat([one[stride].flatten(1) for one in maps], 1) for stride in efficientnet.CHANNELS]
    head.mean.copy_(torch.cat([each.mean(1) for each in both]))
    head.spread.copy_(torch.cat([each.std(1) + 1e-3 for each in both]))


def _read(values: NDArray[np.float16], example: _Example, variant: int) -> dict[int, Tensor]:
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
    """Return the loss of a batch; `None` if none of its images has something to learn from."""
    by_grid: dict[tuple[int, int], list[_Example]] = defaultdict(list)
    for example in batch:
        by_grid[example.grid].append(example)
    terms: dict[str, list[Tensor]] = defaultdict(list)
    for alike in by_grid.values():
        maps = [_read(values, example, variant) for example in alike]
        outputs = head({stride: torch.stack([one[stride] for one in maps]) for stride in efficientnet.CHANNELS})
        label = torch.tensor([float(example.anomalous) for example in alike])
        boxes = torch.tensor([example.boxes for example in alike])
        if located:  # cross-entropy and Dice of the map, where there are boxes and on normal images
            truth = flipped(torch.from_numpy(np.stack([example.target for example in alike])), variant)
            known = boxes | (label == 0)
            weight = torch.tensor(_DEFECT_WEIGHT)
            cells = F.binary_cross_entropy_with_logits(outputs.cells, truth, reduction="none", pos_weight=weight)
            terms["cells"].append(cells.mean((1, 2))[known])
            share = outputs.cells.sigmoid()
            both, each = (share * truth).sum((1, 2)), share.sum((1, 2)) + truth.sum((1, 2))
            terms["dice"].append((1 - (2 * both + 1) / (each + 1))[boxes])
        else:  # the mean of the map's highest hundredth learns the label, so that the map still helps
            terms["top"].append(F.binary_cross_entropy_with_logits(outputs.top, label, reduction="none"))
        if by_image:  # some image is normal
            terms["image"].append(F.binary_cross_entropy_with_logits(outputs.image, label, reduction="none"))
        if kinds > 1:
            kind = torch.tensor([example.kind for example in alike])
            terms["kind"].append(F.cross_entropy(outputs.kinds, kind, reduction="none", ignore_index=-1)[kind >= 0])
    weights = {"cells": 2.0, "dice": 0.5, "top": 0.5, "image": 0.5, "kind": 0.3}
    means = [weights[name] * torch.cat(each).mean() for name, each in terms.items() if sum(map(len, each))]
    return torch.stack(means).sum() if means else None


class _Scored(NamedTuple):
    """An image, its tiles (a whole image is its only tile), and for each the probability and the map of defects."""

    record: Record
    grid: list[Box]
    scores: list[float]
    cells: list[Tensor]


def _choose(
    trained: detector.Detector, shards: Path, split: Split, tile: Tile, rng: np.random.Generator
) -> detector.Detector:
    """Return the detector with a threshold fitted on `split` (`metrics.best_threshold`) and its rule of best IoU."""
    rows = examples_.rows(shards, split, Tile())
    sizes = [(row["width"], row["height"]) for row in rows]
    grids = [tiles.grid(*size, tile.size or max(size), tile.overlap) for size in sizes]
    most = max(_FEWEST_VALIDATION, _MOST_TILES * len(rows) // sum(map(len, grids))) if tile.size else _MOST_VALIDATION
    chosen = _draw(rows, rng, min(most, _MOST_VALIDATION))
    if len(chosen) < len(rows):
        drawn = f"{len(chosen):,} of {len(rows):,} {split} images"
        print(f"detector: threshold and boxes are chosen on {drawn}, drawn", flush=True)
    compute = efficientnet.Features(tuple(efficientnet.CHANNELS), keep=0)
    scores, labels = [], []
    located: list[_Scored] = []
    images = examples_.images(shards, split, chosen)
    images = iter(bar(images, total=len(chosen), desc="detector, threshold", unit="image"))
    at_once = 1 if tile.size else _AT_ONCE  # the tiles of one image are enough for all cores
    while some := list(islice(images, at_once)):
        pictures = [detector.picture(image.crop(place)) for _, image, [row] in some for place in grids[row["number"]]]
        computed = iter(detector.features(compute, pictures))
        for record, _, [row] in some:
            scored = _Scored(record, grids[row["number"]], [], [])
            for maps in islice(computed, len(scored.grid)):
                with torch.inference_mode():
                    outputs = trained.head({stride: one[None] for stride, one in maps.items()})
                scored.scores.extend(detector.score_of(outputs, trained.by_image))
                scored.cells.append(outputs.cells[0].sigmoid())
            scores.append(max(scored.scores))
            labels.append(record.label == "anomalous")
            if record.boxes and len(located) < _MOST_TUNED:
                located.append(scored)
    if all(labels) and not trained.by_image:
        # How low normal images score is not known: the lowest score of the validation images as a threshold called 1 to
        # 3 % of NEU-DET's defective test images normal (docs/experiments.md).
        threshold = 0.0
    else:
        threshold = metrics.best_threshold(np.array(labels), np.array(scores))
    return replace(trained, threshold=threshold, rule=_best_rule(located, threshold), chosen_on=len(chosen))


def _best_rule(located: list[_Scored], threshold: float) -> detector.Rule | None:
    images = []
    for record, grid, scores, cells in located:
        # On the tiles that are flagged, and on the most suspicious one, as `predictor.joined` does.
        flagged = [i for i, score in enumerate(scores) if score >= min(threshold, max(scores))]
        images.append((record, [grid[i] for i in flagged], [detector.refined(cells[i]) for i in flagged]))

    def mean_iou(rule: detector.Rule) -> float:
        overlaps = []
        for record, grid, maps in images:
            sizes = [(int(x2 - x1), int(y2 - y1)) for x1, y1, x2, y2 in grid]
            boxes = [detector.regions(cells, size, rule) for cells, size in zip(maps, sizes, strict=True)]
            overlap = metrics.localize(record.boxes, tiles.merged(boxes, grid), record.width, record.height)
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
