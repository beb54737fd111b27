"""Figures of a training: curves as CSV and PNG, and sheets of sampled completions."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from adfm import drawing
from adfm.method import response
from adfm.method.coordinates import Frame
from adfm.records import Box
from adfm.text import printable

_LEAST = 0.1  # height of a scale: of a curve that hardly moves, it shows that it does not
_FONT_SIZE = 14  # pixels; the font is loaded when it is needed: matplotlib has it
_IMAGE_SIDE, _TEXT_WIDTH, _MARGIN = 192, 520, 8  # pixels
_MOST_LINES = 24  # of a completion


def write_curves(history: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write what a trainer logged as CSV, one row a step; metrics that a step lacks are empty."""
    rows = [row for row in history if "loss" in row]
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("step", "epoch")))
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["step", *names], extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(rows)


def draw_curves(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw reward, its terms, utilisation and KL against steps: every step faint, smoothed bold, with a scale each."""
    rows = [row for row in history if "loss" in row]
    terms = [name for row in rows for name in row if name.startswith("rewards/") and name.endswith("/mean")]
    titles = {name: name.removeprefix("rewards/").removesuffix("/mean") for name in terms}
    titles = {"reward": "reward", **titles, "utilisation": "utilisation", "kl": "KL divergence"}
    # TRL logs `None` for a metric that was not a number in every micro-batch of a step.
    curves = {name: [(row["step"], row[name]) for row in rows if row.get(name) is not None] for name in titles}
    curves = {name: points for name, points in curves.items() if points} or {"reward": [(0, 0.0)]}
    columns = min(3, len(curves))
    caption = "Faint: mean of each step. Bold, and at the right its first and last value: smoothed."
    with drawing.drawn(path, drawing.WIDTH, 0.3 + 2.0 * -(-len(curves) // columns)) as figure:
        figure.suptitle(caption, x=0.015, ha="left", fontsize=8, color=drawing.FAINT)
        for axes, (name, points) in zip(drawing.panels(figure, len(curves), columns), curves.items(), strict=True):
            steps, values = np.array(points, float).T
            smooth = drawing.smoothed(values)
            axes.plot(steps, values, color=drawing.PALETTE[0], lw=0.8, alpha=0.35)
            axes.plot(steps, smooth, color=drawing.PALETTE[0], lw=2)
            low, high = min(values), max(values)
            room = max(0.05 * (high - low), (_LEAST - (high - low)) / 2)
            axes.set_ylim(low - room, high + room)
            axes.set_title(titles[name], loc="left", fontweight="bold")
            axes.set_title(f"{smooth[0]:.2f} → {smooth[-1]:.2f}", loc="right", color=drawing.FAINT)
            axes.set_xlabel("step")


def completion_sheet(samples: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Draw sampled completions, the image on the left, reward and text on the right; true boxes green, predicted red.

    Args:
        samples: Dicts with `image` (PIL), `label`, `completion`, `regions` (ground truth, model's frame), `frame` (its
            width and height), `reward` and `terms` (the value of each term by name).
    """
    rows = [(_with_boxes(sample), text_lines(sample)) for sample in samples]
    font, heading = drawing.font(_FONT_SIZE), drawing.font(16)
    line = drawing.line_height(font)
    heights = [max(image.height, line * len(lines)) + 2 * _MARGIN for image, lines in rows]
    # As wide as MLflow's pane for an artifact: a wider sheet would be shown smaller, and its text with it.
    sheet = Image.new("RGB", (_IMAGE_SIDE + _TEXT_WIDTH + 3 * _MARGIN, sum(heights)), "white")
    top = 0
    for (image, (first, *lines)), height in zip(rows, heights, strict=True):
        sheet.paste(image, (_MARGIN, top + _MARGIN))
        left = _IMAGE_SIDE + 2 * _MARGIN
        drawing.write(sheet, (left, top + _MARGIN), [first], heading)
        drawing.write(sheet, (left, top + _MARGIN + line), lines, font)
        top += height
        ImageDraw.Draw(sheet).line((0, top - 1, sheet.width, top - 1), fill="lightgrey")
    return sheet


def _with_boxes(sample: Mapping[str, Any]) -> Image.Image:
    image, frame = sample["image"], Frame(*sample["frame"])
    scale = _IMAGE_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    pixels = np.array(image.convert("RGB").resize(size))
    predicted = response.parse(sample["completion"]).boxes
    for boxes, colour in (([Box(*b) for b in sample["regions"]], drawing.TRUTH), (predicted, drawing.PREDICTED)):
        drawing.frame(pixels, (box for b in boxes if (box := frame.to_pixels(b, *size)).area), colour)
    return Image.fromarray(pixels)


def text_lines(sample: Mapping[str, Any]) -> list[str]:
    """Return the lines beside an image: the reward, its terms, the label, an empty line, the completion."""
    font = drawing.font(_FONT_SIZE)
    terms = ", ".join(f"{name} {value:.2f}" for name, value in sample["terms"].items())
    return [
        f"reward {sample['reward']:.2f}",
        *drawing.wrapped(terms, font, _TEXT_WIDTH, _MOST_LINES),
        f"label: {sample['label']}",
        "",
        *drawing.wrapped(drawing.stages(printable(sample["completion"])), font, _TEXT_WIDTH, _MOST_LINES),
    ]
