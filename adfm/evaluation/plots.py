"""The pictures of an evaluation: confusion, IoU by size of the defect, the models side by side, and examples.

Drawn on bare figures, not through pyplot, so that no window, backend or global state is involved.
"""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from adfm.evaluation import metrics
from adfm.evaluation.metrics import HEADLINE, SIZES
from adfm.text import printable

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "recall": "recall",
    "specificity": "specificity",
    "auroc": "AUROC",
    "iou": "IoU",
    "box_f1": "box F1",
    "parse_rate": "parse rate",
    "miss_rate": "escape rate",
    "overkill": "overkill",
    "ece": "calibration error",
    "kind_right": "kind right",
}
INK, FAINT, GRID = "#1f2933", "#6b7785", "#e3e8ee"
TRUTH, PREDICTED = "#2ea043", "#da3633"
# Of each outcome: places on the sheet of examples, colour, and words; escapes and overkill first.
_OUTCOMES = {
    "missed": (2, PREDICTED, "✗ escape: defect missed"),
    "missed, unparseable": (0, PREDICTED, "✗ escape: no clean answer"),
    "overkill": (2, PREDICTED, "✗ overkill: normal, flagged"),
    "overkill, unparseable": (0, PREDICTED, "✗ overkill: no clean answer"),
    "elsewhere": (1, "#bf8700", "~ not located: IoU {iou:.2f} < {located:g}"),
    "located": (5, TRUTH, "✓ defect located, IoU {iou:.2f}"),
    "flagged": (0, TRUTH, "✓ defect flagged, label alone known"),
    "passed": (2, TRUTH, "✓ normal, passed"),
}
ESCAPES_FIRST = ("miss_rate", "overkill", *HEADLINE)
# The candidate comes last and is the darkest.
_SHADES = ("#c3ccd6", "#86b6e8", "#1f5fae")


def confusion(tables: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Draws one confusion matrix a model: counts of its decisions, shaded by the share of the actual class."""
    answers = ("normal", "anomalous", "unparseable")
    with drawn(path, 2.9 * len(tables) + 0.7, 2.5) as figure:
        for i, (name, table) in enumerate(tables.items()):
            axes = figure.add_subplot(1, len(tables), i + 1)
            given = metrics.as_decided(table)["predicted"].astype(object)
            given = given.where(given.notna(), "unparseable")
            counts = np.array(
                [[((table["label"] == label) & (given == a)).sum() for a in answers] for label in answers[:2]]
            )
            shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
            axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            for (row, column), count in np.ndenumerate(counts):
                dark = shares[row, column] > 0.55
                words = f"{count}\n{shares[row, column]:.0%}"
                axes.text(column, row, words, ha="center", va="center", fontsize=9, color="white" if dark else INK)
            axes.set_xticks(range(3), answers)
            axes.set_yticks(range(2), answers[:2] if i == 0 else ("", ""), rotation=90, va="center")
            axes.set_title(name, loc="left", fontweight="bold")
            axes.set_xlabel("answer")
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            if i == 0:
                axes.set_ylabel("actual")


def reliability(tables: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Draws a reliability diagram a model: share of defects against mean probability, before and after calibration."""
    with drawn(path, 2.5 * len(tables) + 0.7, 3.3) as figure:
        for i, (name, table) in enumerate(tables.items()):
            axes = figure.add_subplot(1, len(tables), i + 1)
            anomalous = (table["label"] == "anomalous").to_numpy(dtype=bool)
            axes.plot([0, 1], [0, 1], color=FAINT, lw=1, ls=":")
            for column, colour, label in (
                ("score", _SHADES[0], "raw score"),
                ("probability", _SHADES[2], "calibrated"),
            ):
                probability = table[column].to_numpy(dtype=float, na_value=np.nan)
                points = np.array(metrics.reliability(probability, anomalous)).reshape(-1, 3)
                # The area of a dot says how many images it stands for.
                sizes = 200 * points[:, 2] / max(1, len(table))
                axes.plot(points[:, 0], points[:, 1], color=colour, lw=1.2, label=label)
                axes.scatter(points[:, 0], points[:, 1], sizes, color=colour)
            axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal", xlabel="mean probability of a defect")
            axes.set_title(name, loc="left", fontweight="bold")
            axes.grid(color=GRID)
            bare(axes)
            if i == 0:
                axes.set_ylabel("share of defective images")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)


def iou_by_size(sizes: Mapping[str, Mapping[str, Any]], small: float, large: float, path: Path) -> None:
    """Draws mean IoU for small, medium and large defects as bars, a model each, with 95 % intervals.

    Args:
        sizes: For each model the `sizes` of `metrics.summarize`.
        small: Share of the image below which a defect is small.
        large: Share from which it is large.
        path: The PNG file.
    """
    with drawn(path, 5.6, 3.1) as figure:
        axes = figure.add_subplot()
        there = [size for size in SIZES if size in sizes[[*sizes][-1]]]
        width = 0.8 / len(sizes)
        for i, (name, of) in enumerate(sizes.items()):
            at = np.arange(len(there)) + (i - (len(sizes) - 1) / 2) * width
            values, errors = _errors([of[size] for size in there], "iou")
            axes.bar(at, values, width * 0.92, color=_shade(i, len(sizes)), label=name)
            axes.errorbar(at, values, errors, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
        ranges = {
            "small": f"below {100 * small:g} %",
            "medium": f"{100 * small:g} % to {100 * large:g} %",
            "large": f"from {100 * large:g} %",
        }
        counts = next(iter(sizes.values()))
        labels = [f"{size}\n{ranges[size]} of the image\n{counts[size]['images']} images" for size in there]
        axes.set_xticks(range(len(there)), labels)
        axes.set_ylabel("mean IoU on anomalous images")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color=GRID)
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(sizes))
        axes.set_title("Localisation by size of the defect", loc="left", fontweight="bold")
        bare(axes)


def comparison(
    overall: Mapping[str, Mapping[str, Any]], differences: Mapping[str, Mapping[str, Any]], path: Path
) -> None:
    """Draws escapes, overkill and the headline metrics of all models, and paired differences, with 95 % intervals."""
    with drawn(path, 8.4 if differences else 5.2, 4.4) as figure:
        rows = np.arange(len(ESCAPES_FIRST))[::-1]
        panels = [("Held-out images", overall), (f"{[*overall][-1]} minus", differences)][: 1 + bool(differences)]
        for panel, (title, series) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), panel + 1)
            for i, (name, values) in enumerate(series.items()):
                points, errors = _errors([_one(values, metric) for metric in ESCAPES_FIRST], "value")
                colour = _shade(i, len(series)) if panel == 0 else _shade(len(overall) - 2 - i, len(overall))
                label = name if panel == 0 else name.split("_minus_", 1)[1]
                at = rows + ((len(series) - 1) / 2 - i) * 0.22
                axes.errorbar(
                    points, at, xerr=errors, fmt="o", ms=5, color=colour, elinewidth=1.6, capsize=0, label=label
                )
            axes.set_yticks(rows, [TITLES[metric] for metric in ESCAPES_FIRST] if panel == 0 else [""] * len(rows))
            axes.set_ylim(-0.6, len(rows) - 0.4)
            axes.set_title(title, loc="left", fontweight="bold")
            axes.grid(axis="both", color=GRID)
            axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(series))
            if panel == 1:
                axes.axvline(0, color=INK, lw=1)
            bare(axes)


def choose(table: pd.DataFrame, most: int = 12) -> pd.DataFrame:
    """Picks rows of a prediction table for `examples`, by its decisions: some of each outcome, escapes first.

    Those the model was surest of come first, and located defects by IoU, the best first. Each kind comes from as many
    categories as it can; where one has too few rows, others fill its places. The result has a further column `outcome`.
    """
    table = metrics.as_decided(table)
    outcome = metrics.outcomes(table).to_numpy(dtype=object)
    score = table["score"].fillna(0.5)
    order = np.where(outcome == "located", -table["iou"], np.where(table["predicted"] == "anomalous", -score, score))
    ranked = table.assign(outcome=outcome, kind=[[*_OUTCOMES].index(o) for o in outcome], order=order)
    ranked = ranked.sort_values(["order", "id"])
    ranked["turn"] = ranked.groupby(["kind", "category"]).cumcount()
    ranked = ranked.sort_values(["kind", "turn", "order", "id"])
    ranked["rank"] = ranked.groupby("kind").cumcount()
    ranked["extra"] = ranked["rank"] >= ranked["outcome"].map(
        {name: places for name, (places, *_) in _OUTCOMES.items()}
    )
    chosen = ranked.sort_values(["extra", "rank", "kind"]).head(most)
    return chosen.sort_values(["kind", "rank"])


def examples(rows: pd.DataFrame, images: Mapping[str, bytes], path: Path, columns: int = 4) -> None:
    """Draws a sheet of images with true and predicted boxes, the verdict above and the completion below.

    Args:
        rows: Rows that `choose` picked.
        images: Encoded images by id.
        path: The PNG file.
        columns: Images a row.
    """
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    def outline(box: Sequence[float], colour: str, dashes: str, width: int, height: int) -> Rectangle:
        x1, y1, x2, y2 = np.clip(box, 0, [width, height, width, height])
        halo = [withStroke(linewidth=2.8, foreground="white")]
        shape = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, ls=dashes, lw=1.5, path_effects=halo)
        shape.set_clip_on(False)
        return shape

    lines = -(-len(rows) // columns)
    with drawn(path, 2.6 * columns, 3.5 * lines + 0.4) as figure:
        for i, row in enumerate(rows.to_dict("records")):
            axes = figure.add_subplot(lines, columns, i + 1)
            image = Image.open(io.BytesIO(images[row["id"]])).convert("RGB")
            width, height = image.size
            image.thumbnail((640, 640))
            axes.imshow(np.asarray(image), extent=(0, width, height, 0), interpolation="bilinear")
            for boxes, colour, dashes in ((row["boxes"], TRUTH, "-"), (row["predicted_boxes"], PREDICTED, "--")):
                for box in boxes:
                    axes.add_patch(outline(box, colour, dashes, width, height))
            _, colour, verdict = _OUTCOMES[row["outcome"]]
            axes.set_title(
                verdict.format(iou=row["iou"], located=metrics.LOCATED), loc="left", color=colour, fontweight="bold"
            )
            product = " · ".join(
                printable(str(row[key])) for key in ("category", "defect") if isinstance(row[key], str)
            )
            words = f"{product}\n{_wrapped(row['completion'])}\n"
            axes.set_xlabel(words, loc="left", fontsize=6.5, color=FAINT)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        key = [outline((0, 0, 1, 1), colour, dashes, 1, 1) for colour, dashes in ((TRUTH, "-"), (PREDICTED, "--"))]
        figure.legend(key, ["ground truth", "predicted"], loc="outside upper right", ncols=2, frameon=False)


def _wrapped(completion: str, width: int = 46, most: int = 7) -> str:
    """A completion in a few short lines: each stage begins a line, boxes stay whole."""
    stages = re.sub(r">\s*(?=<(?:rethink|answer)>)", ">\n", completion.strip()).splitlines()
    whole = [re.sub(r",\s(?=[^\[\]]*\])", ",\u00a0", stage) for stage in stages]
    lines = [line for stage in whole for line in textwrap.wrap(stage, width)]
    return "\n".join(lines[:most] + (["…"] if len(lines) > most else []))


def _one(values: Mapping[str, Any], metric: str) -> dict[str, Any]:
    return {"value": values[metric], "value_low": values[f"{metric}_low"], "value_high": values[f"{metric}_high"]}


def _errors(parts: Iterable[Mapping[str, Any]], metric: str) -> tuple[Any, Any]:
    """Values (n,) and their distances to the interval's ends (2, n); NaN, which is not drawn, where there is none."""
    keys = (metric, f"{metric}_low", f"{metric}_high")
    value, low, high = np.array([[part[key] for key in keys] for part in parts], dtype=float).reshape(-1, 3).T
    return value, np.maximum([value - low, high - value], 0)


def _shade(index: int, count: int) -> str:
    return _SHADES[max(0, len(_SHADES) - count + index)]


@contextmanager
def drawn(path: Path, width: float, height: float) -> Iterator[Figure]:
    """An empty figure of a size in inches, which is written to `path` when the block ends."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # A dollar sign in the name of a category or a model begins no formula.
    look: Any = {"font.size": 8, "axes.titlesize": 9, "text.color": INK, "text.parse_math": False}
    with rc_context(look), warnings.catch_warnings():
        # A completion may hold any script; a glyph that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        written = io.BytesIO()
        figure.savefig(written, dpi=130)
    full = Image.open(written).convert("RGB")
    # 256 colours, dithered, are less than half the bytes and look the same.
    full.quantize(palette=full.quantize(256), dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)


def bare(axes: Axes) -> None:
    """Takes frame and ticks off."""
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
