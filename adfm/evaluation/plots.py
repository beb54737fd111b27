"""Figures of an evaluation: confusion, reliability, IoU by size of the defect, models side by side, examples."""

import io
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image

from adfm.drawing import FAINT, INK, PALETTE, PREDICTED, TRUTH, WIDTH, drawn, panels, stages
from adfm.evaluation import metrics
from adfm.evaluation.metrics import HEADLINE, SIZES
from adfm.text import printable

if TYPE_CHECKING:
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
TITLES |= {f"{metric}_at_threshold": f"{TITLES[metric]} at threshold" for metric in metrics.AT_THRESHOLD}
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
_COLUMNS = 3  # panels a row


def _panel_each(figure: "Figure", tables: Mapping[str, pd.DataFrame]) -> Iterator[tuple["Axes", pd.DataFrame, bool]]:
    """Yield a panel with its title for each model, its table, and whether it begins a row."""
    made = panels(figure, len(tables), min(len(tables), _COLUMNS))
    for number, (axes, (name, table)) in enumerate(zip(made, tables.items(), strict=True)):
        axes.set_title(name, loc="left", fontweight="bold")
        yield axes, table, number % _COLUMNS == 0


def confusion(tables: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Draw one confusion matrix a model: counts of its decisions, shaded by the share of the actual class."""
    answers = ("normal", "anomalous", "unparseable")
    with drawn(path, WIDTH, 2.1 * -(-len(tables) // _COLUMNS)) as figure:
        for axes, table, first in _panel_each(figure, tables):
            counts = metrics.confusion(metrics.as_decided(table))
            shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
            axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            for (row, column), count in np.ndenumerate(counts):
                share = shares[row, column]
                words, colour = f"{count}\n{share:.0%}", "white" if share > 0.55 else INK
                axes.text(column, row, words, ha="center", va="center", fontsize=9, color=colour)
            axes.set_xticks(range(3), answers, fontsize=7)
            axes.set_yticks(range(2), answers[:2] if first else ("", ""), rotation=90, va="center", fontsize=7)
            axes.set(xlabel="decision", ylabel="actual" if first else "")
            axes.grid(visible=False)


def reliability(tables: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Draw a reliability diagram a model: share of defects against mean probability, before and after calibration."""
    series = (("score", PALETTE[1], "raw score"), ("probability", PALETTE[0], "calibrated probability"))
    with drawn(path, WIDTH, 2.7 * -(-len(tables) // _COLUMNS) + 0.3) as figure:
        for axes, table, first in _panel_each(figure, tables):
            axes.plot([0, 1], [0, 1], color=FAINT, lw=1, ls=":", label="perfect")
            for column, colour, label in series:
                points = metrics.reliability(metrics.numbers(table, column), metrics.is_defective(table))
                mean, share, _ = np.reshape(points, (-1, 3)).T
                axes.plot(mean, share, color=colour, lw=1.2, marker="o", ms=3.5, label=label)
            axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal", xlabel="mean probability of a defect")
            axes.set_ylabel("share of defective images" if first else "")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)


def iou_by_size(sizes: Mapping[str, Mapping[str, Any]], small: float, large: float, path: Path) -> None:
    """Draw mean IoU for small, medium and large defects as bars, a model each, with 95 % intervals.

    `sizes` has for each model the `sizes` of `metrics.summarize`; `small` and `large` are shares of the image.
    """
    with drawn(path, WIDTH, 3.4) as figure:
        [axes] = panels(figure, 1, 1)
        measured = [size for size in SIZES if size in sizes[[*sizes][-1]]]
        width = 0.8 / len(sizes)
        for i, (name, of) in enumerate(sizes.items()):
            at = np.arange(len(measured)) + (i - (len(sizes) - 1) / 2) * width
            values, errors = _errors([metrics.with_limits(of[size], "iou") for size in measured])
            axes.bar(at, values, width * 0.92, color=_colour(name, sizes), label=name)
            axes.errorbar(at, values, errors, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
        ranges = {"small": f"below {100 * small:g} %", "large": f"from {100 * large:g} %"}
        ranges |= {"medium": f"{100 * small:g} % to {100 * large:g} %"}
        counts = next(iter(sizes.values()))
        labels = [f"{size}\n{ranges[size]} of the image\n{counts[size]['images']} images" for size in measured]
        axes.set_xticks(range(len(measured)), labels)
        axes.set_ylabel("mean IoU on anomalous images")
        axes.set_ylim(bottom=0)
        axes.grid(visible=False, axis="x")
        axes.set_title("Localisation by size of the defect, with 95 % intervals", loc="left", fontweight="bold")
        figure.legend(loc="outside lower center", ncols=min(6, len(sizes)), frameon=False)


def comparison(
    overall: Mapping[str, Mapping[str, Any]], differences: Mapping[str, Mapping[str, Any]], path: Path
) -> None:
    """Draw escapes, overkill and the headline metrics of all models, and paired differences, with 95 % intervals."""
    rows = np.arange(len(ESCAPES_FIRST))[::-1]
    *_, candidate = overall
    with drawn(path, WIDTH, 0.7 + len(rows) * (0.25 + 0.09 * len(overall))) as figure:
        titles = ["Held-out images", f"Difference: {candidate} minus the other"][: 1 + bool(differences)]
        others = {name.split("_minus_", 1)[1]: values for name, values in differences.items()}
        for axes, title in zip(panels(figure, len(titles), len(titles)), titles, strict=True):
            absolute = title == titles[0]
            for name, values in (overall if absolute else others).items():
                points, errors = _errors([metrics.with_limits(values, metric) for metric in ESCAPES_FIRST])
                # A model has the same place in both panels.
                at = rows + 0.8 * ((len(overall) - 1) / 2 - [*overall].index(name)) / max(3, len(overall))
                colour, label = _colour(name, overall), name if absolute else None
                axes.errorbar(points, at, xerr=errors, fmt="o", ms=4, color=colour, elinewidth=1.6, label=label)
            axes.set_yticks(rows, [TITLES[metric] for metric in ESCAPES_FIRST] if absolute else [""] * len(rows))
            axes.set_ylim(-0.5, len(rows) - 0.5)
            axes.set_title(title, loc="left", fontweight="bold")
            # Bands of two shades keep the dots of a metric together.
            axes.grid(visible=False, axis="y")
            for row in rows[::2]:
                axes.axhspan(row - 0.5, row + 0.5, color="#f4f6f8", zorder=0)
            if not absolute:
                axes.axvline(0, color=INK, lw=1)
        figure.legend(loc="outside lower center", ncols=min(6, len(overall)), frameon=False)


def choose(table: pd.DataFrame, most: int = 12) -> pd.DataFrame:
    """Choose rows of a prediction table for `examples`, by its decisions: some of each outcome, escapes first.

    Those the model was surest of come first, and located defects by IoU, the best first. Each outcome comes from as
    many categories as it can. The result has a further column `outcome`.
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
    ranked["extra"] = ranked["rank"] >= [_OUTCOMES[name][0] for name in ranked["outcome"]]
    return ranked.sort_values(["extra", "rank", "kind"]).head(most).sort_values(["kind", "rank"])


def examples(rows: pd.DataFrame, images: Mapping[str, bytes], path: Path, columns: int = _COLUMNS) -> None:
    """Draw the `rows` of `choose`: encoded `images`, by id, with boxes, the verdict above, the completion below."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    def outline(box: Sequence[float], colour: str, dashes: str, width: int, height: int) -> Rectangle:
        x1, y1, x2, y2 = np.clip(box, 0, [width, height, width, height])
        halo = [withStroke(linewidth=2.8, foreground="white")]
        shape = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, ls=dashes, lw=1.5, path_effects=halo)
        shape.set_clip_on(False)
        return shape

    lines = -(-len(rows) // columns)
    with drawn(path, WIDTH / _COLUMNS * columns, 3.4 * lines + 0.4) as figure:
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
            verdict = verdict.format(iou=row["iou"], located=metrics.LOCATED)
            axes.set_title(verdict, loc="left", color=colour, fontweight="bold")
            product = " · ".join(printable(row[key]) for key in ("category", "defect") if isinstance(row[key], str))
            text = [line for stage in stages(row["completion"]).splitlines() for line in textwrap.wrap(stage, 42)]
            words = "\n".join(text[:7] + (["…"] if len(text) > 7 else []))
            axes.set_xlabel(f"{product}\n{words}\n", loc="left", fontsize=7, color=FAINT)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        key = [outline((0, 0, 1, 1), colour, dashes, 1, 1) for colour, dashes in ((TRUTH, "-"), (PREDICTED, "--"))]
        figure.legend(key, ["ground truth", "predicted"], loc="outside upper right", ncols=2, frameon=False)


def _errors(intervals: Sequence[Sequence[float | None]]) -> tuple[Any, Any]:
    """Return values (n,) and their distances to the interval's ends (2, n); NaN, which is not drawn, without."""
    value, low, high = np.array(intervals, dtype=float).reshape(-1, 3).T
    return value, np.maximum([value - low, high - value], 0)


def _colour(name: str, names: Iterable[str]) -> str:
    """Return the colour of a model: the candidate, which comes last, has the first of the palette."""
    return PALETTE[[*names][::-1].index(name) % len(PALETTE)]
