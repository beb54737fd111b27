"""Evaluation report: the page `report.html`, and the pictures of the test images beside it.

`report.html` works alone: it has all figures, and the first few pictures of each gallery. Those of all other images are
in `images/NNN.js`, which the page loads as they come into view.
"""

import base64
import html
import io
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
from PIL import Image

from adfm.data import shards as shards_
from adfm.drawing import smoothed
from adfm.errors import AdfmError
from adfm.evaluation import calibration, crossvalidation, detection, gate_metrics, metrics, plots, references
from adfm.evaluation.calibration import FILE
from adfm.evaluation.gate_metrics import METRICS
from adfm.evaluation.metrics import is_defective, numbers, with_limits
from adfm.files import atomic_folder
from adfm.method import response
from adfm.process import cpus

SIDE = 512  # most pixels of either side of a picture

_LEADING = ("miss_rate_at_threshold", "overkill_at_threshold", "miss_rate", "overkill")  # escapes and overkill first
_AT_THRESHOLD = ("threshold", *(f"{metric}_at_threshold" for metric in metrics.AT_THRESHOLD), "ece_of_score", "ece")
PAGE_METRICS = tuple(dict.fromkeys((*_LEADING, *metrics.HEADLINE, metrics.KIND, "precision", *_AT_THRESHOLD)))

_FIRST = 12  # of each gallery, in the page itself
_EMBEDDED_BYTES = 2_000_000
_FILE_BYTES = 1_000_000  # an artifact store takes its time over every single file
_MOST_POINTS = 300


def write(evaluation: Path, shards: Path, out: Path) -> None:
    """Write the page, `report.html` and `images/`, for an evaluation of `shards` to the folder `out`.

    Raises:
        AdfmError: The evaluation is not whole, or an image of it is not in the shards.
    """
    figures, tables = _read(evaluation)
    candidate, *others = figures["models"]
    # The page shows, counts and marks what a model does in production; of the answers as written it has the letters.
    written, tables = tables, {name: metrics.as_decided(table) for name, table in tables.items()}
    letters = written[candidate].set_index("id")["predicted"].map({"anomalous": "A", "normal": "B"})
    table = tables[candidate].assign(category=metrics.category_names(tables[candidate])).sort_values("id")
    table = table.assign(outcome=metrics.outcomes(table)).set_index("id", drop=False).rename_axis(None)
    outcomes = {name: metrics.outcomes(tables[name]).set_axis(tables[name]["id"]) for name in others}
    detector = figures["about"].get("detector")
    language = [name for name in others if name != detector]
    rival = "production" if "production" in others else next(iter(language or others), None)
    before = tables[rival].set_index("id").loc[table.index] if rival else None
    now, then = (each["predicted"].fillna("unparseable") for each in (table, table if before is None else before))
    changed = now != then
    order, first = _order(table, changed)
    with atomic_folder(out) as partial, TemporaryFile(dir=partial) as spool:
        (partial / "images").mkdir()
        pictures, sizes = _thumbnails(shards, figures["about"]["split"], set(order), spool)
        completions = table["completion"].to_dict()

        def content(key: str) -> list[str | None]:
            return [base64.b64encode(pictures(key)).decode(), *_stages(completions[key])]

        embedded, starts = _write_pictures(order, first, content, partial / "images")
        page = figures | {
            "confusion": {name: metrics.confusion(each).tolist() for name, each in tables.items()},
            "written": {name: metrics.confusion(each).tolist() for name, each in written.items()},
            "reliability": {name: _reliability(each) for name, each in tables.items()},
            "curves": {name: _curves(each) for name, each in tables.items()},
            "images": _columns(table.loc[order], sizes) | {"letter": letters[order].fillna("-").tolist()},
            "others": {name: "".join(outcomes[name][order].map(metrics.OUTCOMES)) for name in others},
            "rival": rival,
            "compared": _compared(table, before),
            "changed": "".join("1" if each else "0" for each in changed[order]),
            "located": _located(table),
            "located_from": metrics.LOCATED,
            "detection": {name: _detection(each.set_index("id"), sizes) for name, each in tables.items()},
            "without_boxes": metrics.without_boxes(table),
            "no_normal": metrics.NO_NORMAL_IMAGE if metrics.without_normal(table) else "",
            "kinds": {name: metrics.kinds_confusion(of) for name, of in written.items() if "predicted_kind" in of},
            "embedded": embedded,
            "starts": starts,
        }
        (partial / "report.html").write_text(_html(f"Evaluation of {candidate}", page), encoding="utf-8")


def _read(evaluation: Path) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    """Read what the page has of the models as a whole, candidate first, and the prediction table of each."""
    try:
        compared = references.read(evaluation)
        about, measured, details = (
            json.loads((evaluation / f"{name}.json").read_text(encoding="utf-8"), parse_constant=lambda _: None)
            for name in ("evaluation", "metrics", "details")
        )
        if not all(isinstance(content, dict) for content in (about, measured, details)):
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
            "titles": plots.TITLES | {"ece_of_score": "error of the score"},
            "metrics": {
                name: {metric: with_limits(values, metric) for metric in PAGE_METRICS if metric in measured[candidate]}
                for name, values in measured.items()
                if name not in references.BLIND
            },
            "more_images": metrics.more_images(measured[candidate]),
            "crossed": _crossed(evaluation / crossvalidation.FILE),
            "references": {key: compared[key] for key in ("lines", "sentence", "verdict")}
            | {"table": references.table(compared) if compared["rows"] else []},
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


def _calibration(file: Path) -> dict[str, Any]:
    # An evaluation of before there were thresholds has letters alone.
    fitted = calibration.read(file) if file.is_file() else calibration.Calibration()
    return {"threshold": fitted.threshold, "summary": fitted.summary}


def _crossed(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    results = json.loads(file.read_text(encoding="utf-8"))
    return {"rows": crossvalidation.rows(results), "note": crossvalidation.note(results)}


def _compared(table: pd.DataFrame, before: pd.DataFrame | None) -> list[dict[str, Any]]:
    """Compare what the gate judges, escapes first: values of both models and their difference, with limits."""
    group, rows = metrics.groups(table), []
    # Escapes among defects alone say nothing: to flag everything would be right.
    judged = {name: entry for name, entry in METRICS.items() if not (entry.binary and metrics.without_normal(table))}
    values = [gate_metrics.values(each, judged) for each in (table, before) if each is not None]
    for name, entry in sorted(judged.items(), key=lambda item: item[1].higher):
        both = np.array([each[name] for each in values])
        both[:, np.isnan(both).any(axis=0)] = np.nan
        images = int((~np.isnan(both[0])).sum())
        if not images:
            continue
        cells = [[np.nanmean(each), *metrics.confidence_limits(each, group, entry.binary)] for each in both]
        if before is not None:
            change = both[0] - both[1]
            cells.append([np.nanmean(change), *metrics.difference_limits(change, group, entry.binary)])
        row = {"title": entry.title, "higher": entry.higher, "over": entry.over, "images": images}
        rows.append(row | {"cells": [[float(number) for number in cell] for cell in cells]})
    return rows


def _located(table: pd.DataFrame) -> list[Any] | None:
    """Count and share of the defects with true boxes that are located, with 95 % limits, and how many there are."""
    with_boxes = table[table["outcome"].ne("flagged") & table["iou"].notna() & table["label"].eq("anomalous")]
    if not len(with_boxes):
        return None
    hits = np.asarray(with_boxes["outcome"] == "located", dtype=np.float64)
    limits = metrics.confidence_limits(hits, metrics.groups(with_boxes))
    return [int(hits.sum()), float(hits.mean()), *limits, len(hits)]


def _detection(table: pd.DataFrame, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Fit the probability that a defect is flagged, against its share of the image; `side` has the sizes in pixels."""
    share = numbers(table, "area_share")
    measured = is_defective(table) & (share > 0)
    flagged = np.asarray(table["predicted"][measured] == "anomalous", dtype=np.float64)
    pixels = np.array([sizes[key][0] * sizes[key][1] for key in table.index[measured]], dtype=float)
    in_pixels = detection.curve(np.sqrt(share[measured] * pixels), flagged)
    side = {name: in_pixels[name] for name in ("a50", "a90", "a90_95")}
    return detection.curve(share[measured], flagged) | {"side": side if "area_share" in table else {}}


def _order(table: pd.DataFrame, changed: "pd.Series[Any]") -> tuple[list[str], int]:
    """Return all ids in the order in which their pictures are kept, and how many of them begin a gallery."""
    # The first of each gallery, in turns; then the rest by outcome: the surest of the wrong answers first, and flagged
    # defects from the worst place to the best.
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
    """Write small JPEGs to the file `spool`; return a function that reads that of an id, and image sizes by id."""
    places: dict[str, tuple[int, int]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    with ThreadPoolExecutor(cpus.count()) as pool:
        for batch in shards_.batches(shards, split, ["id", "image", "width", "height"]):
            rows = [row for row in batch.to_pylist() if row["id"] in ids]
            for row, small in zip(rows, pool.map(_smaller, (row["image"]["bytes"] for row in rows)), strict=True):
                places[row["id"]] = spool.tell(), spool.write(small)
                sizes[row["id"]] = row["width"], row["height"]
    if missing := sorted(ids - places.keys()):
        lacks = f"{shards} does not hold {len(missing)} of the {len(ids)} evaluated images ({metrics.listed(missing)})"
        raise AdfmError(f"{lacks}; name the shards that were evaluated.")

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
    """Write files of pictures and words; return those of the page itself, and where in `order` each file begins."""
    embedded: list[list[str | None]] = []
    rows: list[list[str | None]] = []
    starts: list[int] = []
    left, size = _EMBEDDED_BYTES, 0
    for position, key in enumerate(order):
        row = content(key)
        length = sum(len(part or "") for part in row)
        left -= length
        if len(embedded) == position < first and left >= 0:
            embedded.append(row)
            continue
        rows.append(row)
        size += length
        if size >= _FILE_BYTES or position == len(order) - 1:
            # Scripts, because a page opened from a disk may load these but not other data.
            text = f"pictures({len(starts)}, {_json(rows)});\n"
            (folder / f"{len(starts):03d}.js").write_text(text, encoding="utf-8")
            starts.append(position + 1 - len(rows))
            rows, size = [], 0
    return embedded, starts


def _stages(completion: str) -> list[str | None]:
    """The model's words in `<think>` and in `<rethink>`; and all of them where it does not keep to the form."""
    parsed = response.parse(completion)
    whole = parsed.think is not None and parsed.rethink is not None and parsed.answer is not None
    # Of an image in tiles, notes on the tiles follow the answer.
    notes = completion.partition(response.STAGES[-1])[2].strip() or None
    return [parsed.think, parsed.rethink, notes if whole else completion]


def _columns(table: pd.DataFrame, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """The page's data of each image without its picture; short, because there are many."""

    def rounded(column: str, form: str) -> list[float | None]:
        return [None if np.isnan(value) else float(format(value, form)) for value in numbers(table, column)]

    def boxes(column: str) -> list[list[float]]:
        finite = ([box for box in row if np.isfinite(box).all()] for row in table[column])
        return [[round(float(edge), 1) for box in row for edge in box] for row in finite]

    category, defect = (table[column].astype("category").cat for column in ("category", "defect"))
    return {
        "id": table["id"].tolist(),
        "source": table["source"].tolist(),
        "categories": category.categories.tolist(),
        "category": category.codes.tolist(),
        "defects": defect.categories.tolist(),
        "defect": defect.codes.tolist(),
        "anomalous": is_defective(table).astype(int).tolist(),
        "outcome": "".join(table["outcome"].map(metrics.OUTCOMES)),
        # Calibrated, where it is; to more digits than are shown, because thresholds lie close to 0 and 1 as well.
        "score": rounded("probability" if "probability" in table else "score", ".6g"),
        "iou": rounded("iou", ".3f"),
        "size": [sizes[key] for key in table["id"]],
        "boxes": boxes("boxes"),
        "predicted": boxes("predicted_boxes"),
    }


def _reliability(table: pd.DataFrame) -> dict[str, list[list[float]]]:
    """Points of the reliability diagram (mean probability, share of defective images), raw and calibrated."""
    columns = [column for column in ("score", "probability") if column in table]
    points = {column: metrics.reliability(numbers(table, column), is_defective(table)) for column in columns}
    return {column: [[round(mean, 4), round(share, 4)] for mean, share, _ in of] for column, of in points.items()}


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
    """Read the points (step, mean reward) of each reward that training logged, raw and smoothed; none without it."""
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
    # It must not end the script element that it stands in.
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
