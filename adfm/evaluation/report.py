"""The page that a person looks at: `report.html`, and the pictures of the test images beside it.

`report.html` works alone, as an attachment or an artifact in MLflow or Kubeflow: it holds all figures, and of each
gallery the first few images with pictures and words. Those of all other images are in `images/NNN.js`, which the page
asks for as they come into view. They are scripts because a page opened from a disk may load these but not other data,
and hold a megabyte each because an artifact store takes its time over every single file.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image

from adfm.data import shards as shards_
from adfm.drawing import smoothed
from adfm.errors import AdfmError
from adfm.evaluation import calibration, crossvalidation, detection, metrics, plots, references
from adfm.evaluation.calibration import FILE
from adfm.evaluation.gate_metrics import METRICS
from adfm.files import atomic_folder
from adfm.method import response
from adfm.process import cpus

if TYPE_CHECKING:
    import pandas as pd

SIDE = 512
"""Pictures are made smaller until neither side is longer, in pixels."""

_LEADING = ("miss_rate_at_threshold", "overkill_at_threshold", "miss_rate", "overkill")
_AT_THRESHOLD = ("threshold", *(f"{metric}_at_threshold" for metric in metrics.AT_THRESHOLD), "ece_of_score", "ece")
_TITLES = {
    "iou_at_threshold": "IoU at threshold",
    "miss_rate_at_threshold": "escape rate at threshold",
    "ece_of_score": "error of the score",
}
PAGE_METRICS = tuple(dict.fromkeys((*_LEADING, *metrics.HEADLINE, metrics.KIND, "precision", *_AT_THRESHOLD)))
"""The metrics of the page, escapes and overkill first."""

_FIRST = 12  # of each gallery, in the page itself
_EMBEDDED_BYTES = 2_000_000
_FILE_BYTES = 1_000_000
_MOST_POINTS = 300
_ANSWERS = ("normal", "anomalous", "unparseable")


def write(evaluation: Path, shards: Path, out: Path) -> None:
    """Writes the page for an evaluation.

    Args:
        evaluation: Folder with the `evaluation.json`, `metrics.json`, `details.json` and prediction tables that
            evaluation wrote.
        shards: The shards that were evaluated, for the pictures.
        out: Folder to write: `report.html` and `images/`.

    Raises:
        AdfmError: The evaluation is not whole, or an image of it is not in the shards.
    """
    figures, tables = _read(evaluation)
    candidate, *others = figures["models"]
    written, tables = tables, {name: metrics.as_decided(table) for name, table in tables.items()}
    # Of every image its letter: what is shown, counted and marked is what a model does in production.
    letters = written[candidate].set_index("id")["predicted"].map({"anomalous": "A", "normal": "B"})
    table = tables[candidate].assign(category=metrics.category_names(tables[candidate])).sort_values("id")
    table = table.assign(outcome=metrics.outcomes(table)).set_index("id", drop=False).rename_axis(None)
    detector = figures["about"].get("detector")
    language = [name for name in others if name != detector]
    rival = "production" if "production" in others else next(iter(language or others), None)
    before = tables[rival].set_index("id").loc[table.index] if rival else None
    changed = _changed(table, before)
    order, first = _order(table, changed)
    with atomic_folder(out) as partial, TemporaryFile(dir=partial) as spool:
        (partial / "images").mkdir()
        pictures, sizes = _thumbnails(shards, figures["about"]["split"], set(order), spool)
        completions = table["completion"].to_dict()

        def content(key: str) -> list[str | None]:
            return [base64.b64encode(pictures(key)).decode(), *_stages(completions[key])]

        embedded, starts = _write_pictures(order, first, content, partial / "images")
        page = figures | {
            "confusion": {name: _confusion(each) for name, each in tables.items()},
            "written": {name: _confusion(each) for name, each in written.items()},
            "reliability": {name: _reliability(each) for name, each in tables.items()},
            "curves": {name: _curves(each) for name, each in tables.items()},
            "images": _columns(table.loc[order], sizes) | {"letter": letters[order].fillna("-").tolist()},
            "others": {
                name: _letters(metrics.outcomes(tables[name]).set_axis(tables[name]["id"])[order]) for name in others
            },
            "rival": rival,
            "compared": _compared(table, before),
            "changed": "".join("1" if each else "0" for each in changed[order]),
            "located": _located(table),
            "located_from": metrics.LOCATED,
            "detection": {name: _detection(each.set_index("id"), sizes) for name, each in tables.items()},
            "without_boxes": metrics.without_boxes(table),
            "no_normal": metrics.NO_NORMAL_IMAGE if metrics.without_normal(table) else "",
            "kinds": {name: _kinds(each) for name, each in written.items() if "predicted_kind" in each},
            "embedded": embedded,
            "starts": starts,
        }
        (partial / "report.html").write_text(_html(f"Evaluation of {candidate}", page), encoding="utf-8")


def _read(evaluation: Path) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    """What the page says of the models as a whole, candidate first, and the prediction table of each."""
    import pandas as pd

    try:
        about, found, details = (
            json.loads((evaluation / f"{name}.json").read_text(encoding="utf-8"), parse_constant=lambda _: None)
            for name in ("evaluation", "metrics", "details")
        )
        if not all(isinstance(content, dict) for content in (about, found, details)):
            raise TypeError("what should be an object is not one")
        candidate = about["candidate"]
        models = [candidate, *(name for name in reversed(about["models"]) if name != candidate)]
        tables = {
            name: pd.read_parquet(evaluation / f"{'predictions' if name == candidate else name}.parquet")
            for name in models
        }
        for table in tables.values():
            metrics.same_images(tables[candidate], table)
        figures = {
            "about": about,
            "models": models,
            "titles": plots.TITLES | _TITLES,
            "metrics": {
                name: {
                    metric: [values.get(metric + end) for end in ("", "_low", "_high")]
                    for metric in PAGE_METRICS
                    if metric in found[candidate]
                }
                for name, values in found.items()
                if name not in references.BLIND
            },
            "more_images": metrics.more_images(found[candidate]),
            "crossed": _crossed(evaluation / crossvalidation.FILE),
            "references": _references(evaluation),
            "sizes": {name: details[name]["sizes"] for name in models},
            "categories": details[candidate]["categories"],
            "defects": details[candidate]["defects"],
            "calibrations": {
                name: _calibration(evaluation / (FILE if name == candidate else f"calibration/{name}.json"))
                for name in models
            },
            "rewards": _rewards(Path(about["models"][candidate]) / "reward_curves.csv"),
        }
        if missing := set(models) - figures["metrics"].keys():
            raise KeyError(*missing)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise AdfmError(f"{evaluation} is not a whole evaluation ({error!r}); make it with `adfm evaluate`.") from error
    return figures, tables


def _references(evaluation: Path) -> dict[str, Any]:
    """What the candidate is compared with, in sentences and as a table of text."""
    compared = references.read(evaluation)
    rows = references.table(compared) if compared["rows"] else []
    return {"lines": compared["lines"], "sentence": compared["sentence"], "verdict": compared["verdict"], "table": rows}


def _calibration(file: Path) -> dict[str, Any]:
    """The threshold, and what decides in words; an evaluation of before there were thresholds has letters alone."""
    fitted = calibration.read(file) if file.is_file() else calibration.Calibration()
    return {"threshold": fitted.threshold, "summary": fitted.summary}


def _crossed(file: Path) -> dict[str, Any] | None:
    """The table of a cross-validation and what it is, in words; `None` if there was none."""
    if not file.is_file():
        return None
    results = json.loads(file.read_text(encoding="utf-8"))
    return {"rows": crossvalidation.rows(results), "note": crossvalidation.note(results)}


def _changed(table: pd.DataFrame, before: pd.DataFrame | None) -> pd.Series[Any]:
    """Which images the candidate and its rival decide differently; none without a rival."""
    now, then = (each["predicted"].fillna("unparseable") for each in (table, table if before is None else before))
    return now != then


def _compared(table: pd.DataFrame, before: pd.DataFrame | None) -> list[dict[str, Any]]:
    """What the gate judges, escapes and overkill first: values of both models and their difference, with 95 % limits.

    Args:
        table: The candidate's decisions.
        before: Those of its rival, on the same images in the same order; `None` if there is none.
    """
    group = metrics.groups(table)
    rows = []
    # Escapes among defects alone say nothing: to flag everything would be right.
    judged = [entry for entry in METRICS.values() if not (entry.binary and metrics.without_normal(table))]
    for entry in sorted(judged, key=lambda entry: entry.higher):
        both = [entry.values(each) for each in (table, before) if each is not None]
        counting = ~np.isnan(both).any(axis=0)
        if not counting.any():
            continue
        of_images = None if group is None else group[counting]
        values = [each[counting] for each in both]
        cells = [[each.mean(), *metrics.confidence_limits(each, of_images, entry.binary)] for each in values]
        if before is not None:
            change = values[0] - values[1]
            cells.append([change.mean(), *metrics.difference_limits(change, of_images, entry.binary)])
        rows.append(
            {
                "title": entry.title,
                "higher": entry.higher,
                "over": entry.over,
                "images": int(counting.sum()),
                "cells": [[float(number) for number in cell] for cell in cells],
            }
        )
    return rows


def _located(table: pd.DataFrame) -> list[Any] | None:
    """Count and share of the defects with true boxes that are located, with 95 % limits, and how many there are."""
    with_boxes = table[table["outcome"].ne("flagged") & table["iou"].notna() & table["label"].eq("anomalous")]
    if not len(with_boxes):
        return None
    hits = np.asarray(with_boxes["outcome"] == "located", dtype=np.float64)
    return [
        int(hits.sum()),
        float(hits.mean()),
        *metrics.confidence_limits(hits, metrics.groups(with_boxes)),
        len(hits),
    ]


def _detection(table: pd.DataFrame, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """The probability that a defect is flagged, against its size as a share of the image.

    `side`: a50, a90 and a90/95 also as the side of a square of that area, in pixels.
    """
    if "area_share" not in table:
        return detection.curve(np.array([]), np.array([])) | {"side": {}}
    share = table["area_share"].to_numpy(dtype=float, na_value=np.nan)
    measured = (table["label"] == "anomalous").to_numpy(dtype=bool) & (share > 0)
    flagged = np.asarray(table["predicted"][measured] == "anomalous", dtype=np.float64)
    pixels = np.array([sizes[key][0] * sizes[key][1] for key in table.index[measured]], dtype=float)
    in_pixels = detection.curve(np.sqrt(share[measured] * pixels), flagged)
    names = ("a50", "a90", "a90_95")
    return detection.curve(share[measured], flagged) | {"side": {name: in_pixels[name] for name in names}}


def _letters(outcomes: pd.Series[Any]) -> str:
    return "".join(metrics.OUTCOMES[word] for word in outcomes)


def _order(table: pd.DataFrame, changed: pd.Series[Any]) -> tuple[list[str], int]:
    """All ids in the order in which their pictures are kept, and how many of them begin a gallery.

    The first of each gallery come first, in turns; then the rest by outcome, those first that are looked at first: the
    surest of the wrong answers, and flagged defects from the worst place to the best.
    """
    outcomes = [*metrics.OUTCOMES]
    score = table["score"].astype(float).fillna(0.5)
    placed = table["outcome"].isin(["elsewhere", "located"])
    key = np.where(placed, table["iou"].astype(float).fillna(0.5), score)
    key = np.where(table["outcome"] == "overkill", -key, key)
    ranked = table["id"].to_frame().assign(key=key, place=table["outcome"].map(outcomes.index), changed=changed)
    ranked = ranked.sort_values(["place", "key", "id"])
    galleries = [ranked["id"][ranked["place"] == place].tolist() for place in range(len(outcomes))]
    best = galleries[outcomes.index("located")][::-1]
    otherwise = ranked["id"][ranked["changed"]].tolist()
    turns = zip_longest(*(gallery[:_FIRST] for gallery in (*galleries, best, otherwise)))
    first = list(dict.fromkeys(key for turn in turns for key in turn if key is not None))
    return list(dict.fromkeys(first + ranked["id"].tolist())), len(first)


def _thumbnails(
    shards: Path, split: str, ids: set[str], spool: BinaryIO
) -> tuple[Callable[[str], bytes], dict[str, tuple[int, int]]]:
    """Small JPEGs of the images `ids`, which wait in the file `spool`; and the images' own widths and heights.

    Returns:
        A function that gives the JPEG of an id, and sizes by id.
    """
    places: dict[str, tuple[int, int]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    with ThreadPoolExecutor(cpus.count()) as pool:
        for batch in shards_.batches(shards, split, ["id", "image", "width", "height"]):
            rows = [row for row in batch.to_pylist() if row["id"] in ids]
            for row, small in zip(rows, pool.map(_smaller, (row["image"]["bytes"] for row in rows)), strict=True):
                places[row["id"]] = spool.tell(), spool.write(small)
                sizes[row["id"]] = row["width"], row["height"]
    if missing := sorted(ids - places.keys()):
        raise AdfmError(
            f"{shards} does not hold {len(missing)} of the {len(ids)} evaluated images ({metrics.listed(missing)}); "
            "name the shards that were evaluated."
        )

    def picture(key: str) -> bytes:
        start, length = places[key]
        spool.seek(start)
        return spool.read(length)

    return picture, sizes


def _smaller(content: bytes) -> bytes:
    image = Image.open(io.BytesIO(content)).convert("RGB")
    image.thumbnail((SIDE, SIDE))
    small = io.BytesIO()
    image.save(small, "JPEG", quality=82)
    return small.getvalue()


def _write_pictures(
    order: Sequence[str], first: int, content: Callable[[str], list[str | None]], folder: Path
) -> tuple[list[list[str | None]], list[int]]:
    """Writes pictures and words into files of about a megabyte.

    Returns:
        Those that the page itself holds, and the position in `order` at which each file begins.
    """
    embedded: list[list[str | None]] = []
    left = _EMBEDDED_BYTES
    for key in order[:first]:
        row = content(key)
        left -= sum(len(part or "") for part in row)
        if left < 0:
            break
        embedded.append(row)
    starts: list[int] = []
    for start, rows in _files(order, len(embedded), content):
        text = f"pictures({len(starts)}, {_json(rows)});\n"
        (folder / f"{len(starts):03d}.js").write_text(text, encoding="utf-8")
        starts.append(start)
    return embedded, starts


def _files(
    order: Sequence[str], begin: int, content: Callable[[str], list[str | None]]
) -> Iterator[tuple[int, list[list[str | None]]]]:
    """The contents of each file, and the position in `order` at which it begins."""
    rows: list[list[str | None]] = []
    size = 0
    for position in range(begin, len(order)):
        rows.append(content(order[position]))
        size += sum(len(part or "") for part in rows[-1])
        if size >= _FILE_BYTES or position == len(order) - 1:
            yield position + 1 - len(rows), rows
            rows, size = [], 0


def _stages(completion: str) -> list[str | None]:
    """What the model wrote in `<think>` and in `<rethink>`; and all of it where it does not keep to the form.

    Of an image in tiles, what the third holds where it does are the notes on the tiles, which follow the answer.
    """
    parsed = response.parse(completion)
    whole = parsed.think is not None and parsed.rethink is not None and parsed.answer is not None
    notes = completion.partition(response.STAGES[-1])[2].strip() or None
    return [parsed.think, parsed.rethink, notes if whole else completion]


def _columns(table: pd.DataFrame, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """What the page knows of each image without its picture; short, because there are many."""

    def codes(column: str) -> tuple[list[str], list[int]]:
        values, names = table[column].astype("category").cat.codes, table[column].astype("category").cat.categories
        return names.tolist(), values.tolist()

    def numbers(column: str) -> list[float | None]:
        return [None if np.isnan(value) else round(value, 3) for value in table[column].astype(float)]

    def boxes(column: str) -> list[list[float]]:
        return [
            [round(float(edge), 1) for box in row if np.isfinite(box).all() for edge in box] for row in table[column]
        ]

    categories, category = codes("category")
    defects, defect = codes("defect")
    return {
        "id": table["id"].tolist(),
        "source": table["source"].tolist(),
        "categories": categories,
        "category": category,
        "defects": defects,
        "defect": defect,
        "anomalous": (table["label"] == "anomalous").astype(int).tolist(),
        "outcome": _letters(table["outcome"]),
        # Calibrated, where it is; to more digits than are shown, because thresholds lie close to 0 and 1 as well.
        "score": [
            None if np.isnan(value) else float(f"{value:.6g}")
            for value in table["probability" if "probability" in table else "score"].astype(float)
        ],
        "iou": numbers("iou"),
        "size": [sizes[key] for key in table["id"]],
        "boxes": boxes("boxes"),
        "predicted": boxes("predicted_boxes"),
    }


def _confusion(table: pd.DataFrame) -> list[list[int]]:
    """How many of the normal, and of the anomalous, images were answered normal, anomalous, unparseably."""
    said = table["predicted"].astype(object).where(table["predicted"].isin(_ANSWERS[:2]), _ANSWERS[2])
    return [
        [int(((table["label"] == label) & (said == answer)).sum()) for answer in _ANSWERS] for label in _ANSWERS[:2]
    ]


def _kinds(table: pd.DataFrame) -> dict[str, Any]:
    """The confusion table of kinds, letters as written."""
    rows, columns, counts = metrics.kinds_confusion(table)
    return {"rows": rows, "columns": columns, "counts": counts}


def _reliability(table: pd.DataFrame) -> dict[str, list[list[float]]]:
    """Points of the reliability diagram (mean probability, share of defective images), raw and calibrated."""
    anomalous = (table["label"] == "anomalous").to_numpy(dtype=bool)
    columns = [column for column in ("score", "probability") if column in table]
    return {
        column: [
            [round(probability, 4), round(share, 4)]
            for probability, share, _ in metrics.reliability(
                table[column].to_numpy(dtype=float, na_value=np.nan), anomalous
            )
        ]
        for column in columns
    }


def _curves(table: pd.DataFrame) -> dict[str, list[list[float]]] | None:
    """Points of the ROC curve (overkill, recall) and the precision-recall curve (recall, precision)."""
    from sklearn.metrics import precision_recall_curve, roc_curve

    anomalous, score = metrics.ranked(table)
    if anomalous.all() or not anomalous.any():
        return None
    false_positives, true_positives, _ = roc_curve(anomalous, score)
    precision, recall, _ = precision_recall_curve(anomalous, score, drop_intermediate=True)
    return {
        "roc": _thinned(np.column_stack([false_positives, true_positives])),
        # The last point is a convention, (0, 1), and of no image.
        "precision_recall": _thinned(np.column_stack([recall, precision])[:-1]),
    }


def _thinned(points: Any) -> list[list[float]]:
    chosen = np.unique(np.linspace(0, len(points) - 1, min(len(points), _MOST_POINTS)).round().astype(int))
    return [[round(float(number), 4) for number in points[at]] for at in chosen]


def _rewards(file: Path) -> dict[str, dict[str, list[list[float]]]]:
    """For each reward that training logged its points (step, mean reward), raw and smoothed; none without training."""
    import pandas as pd

    if not file.is_file():
        return {}
    history = pd.read_csv(file)
    curves = {}
    for name in map(str, history):
        if name == "reward" or (name.startswith("rewards/") and name.endswith("/mean")):
            steps, rewards = history[["step", name]].dropna().to_numpy().T
            if len(steps):
                both = {"raw": rewards, "smooth": smoothed(rewards)}
                short = name.removeprefix("rewards/").removesuffix("/mean")
                curves[short] = {key: _thinned(np.column_stack([steps, values])) for key, values in both.items()}
    return dict(sorted(curves.items(), key=lambda curve: curve[0] != "reward"))


def _html(title: str, page: dict[str, Any]) -> str:
    def part(name: str) -> str:
        return (resources.files("adfm.evaluation") / name).read_text(encoding="utf-8")

    text = part("report.html")
    # The data come last: they may hold anything.
    fillings = {"title": html.escape(title), "located": f"{metrics.LOCATED:g}"}
    fillings |= {"style": part("report.css"), "script": part("report.js")}
    for name, filling in (fillings | {"data": _json(page)}).items():
        text = text.replace(f"{{{{ {name} }}}}", filling)
    return text


def _json(content: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
