"""What is seen of a training while it runs: a progress bar with its ETA, every step in MLflow, curves on disk."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw
from transformers import TrainerCallback

from adfm import drawing
from adfm.method import response
from adfm.method.coordinates import Frame
from adfm.process.progress import bar
from adfm.records import Box
from adfm.text import printable
from adfm.training.outbox import Outbox

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

_LEAST = 0.1  # height of a scale

# MLflow sorts a run's charts by name, a section for each prefix before `/`, capital letters first; metrics without a
# prefix come last.
_FIRST = {name: f"Overview/{name}" for name in ("balanced_accuracy", "reward", "utilisation")}
# `epoch` repeats the step, and `frac_reward_zero_std` is 1 - utilisation. Clip ratios are 0: the weights do not change
# between the sampling of a batch and the one step on it.
_NOT_IN_MLFLOW = ("epoch", "frac_reward_zero_std", "clip_ratio/")

_FONT_SIZE = 14  # pixels; the font is loaded when it is needed: matplotlib has it
_IMAGE_SIDE, _TEXT_WIDTH, _MARGIN = 192, 520, 8  # pixels
_MOST_LINES = 24  # of a completion


def mlflow_metrics(logs: Mapping[str, Any]) -> dict[str, float]:
    """The finite metrics of a step under their names in MLflow: the most important in the section `Overview`."""
    return {
        _FIRST.get(name, name): float(value)
        for name, value in logs.items()
        if isinstance(value, int | float) and math.isfinite(value) and not name.startswith(_NOT_IN_MLFLOW)
    }


class Watch(TrainerCallback):
    """Shows progress, and puts every step's figures into the outbox, which only the first process has."""

    def __init__(self, describe: str, shown: Sequence[str], outbox: Outbox | None) -> None:
        self._describe, self._shown, self._outbox = describe, shown, outbox

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the bar where an interrupted training left off."""
        self._bar = bar(
            total=state.max_steps,
            initial=state.global_step,
            desc=self._describe,
            unit="step",
            disable=not state.is_world_process_zero,
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Show and send one step, from one process."""
        if self._outbox is None:
            return
        if logs and "loss" in logs:
            self._outbox.add(mlflow_metrics(logs), state.global_step)
            labels = {k: k.removesuffix("/mean").rsplit("/", 1)[-1] for k in self._shown if k in logs}
            self._bar.set_postfix({label: f"{logs[k]:.3f}" for k, label in labels.items()}, refresh=False)
            self._bar.update(state.global_step - self._bar.n)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the bar."""
        self._bar.close()


def write_curves(history: list[dict[str, Any]], file: Path) -> None:
    """Write what a trainer logged, one row a step, as CSV; figures that a step lacks are empty."""
    rows = [row for row in history if "loss" in row]
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("step", "epoch")))
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["step", *names], extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(rows)


def draw_curves(curves: Path, path: Path) -> None:
    """Draw reward, its terms, utilisation and KL against steps: every step faint, smoothed bold, each on its own scale.

    Args:
        curves: As `write_curves` wrote it.
        path: The PNG file.
    """
    with curves.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    terms = [name for name in (rows[0] if rows else ()) if name.startswith("rewards/") and name.endswith("/mean")]
    titles = {name: name.removeprefix("rewards/").removesuffix("/mean") for name in terms}
    titles = {"reward": "reward", **titles, "utilisation": "utilisation", "kl": "KL divergence"}
    known = {name: [(float(row["step"]), float(row[name])) for row in rows if row.get(name)] for name in titles}
    known = {name: points for name, points in known.items() if points} or {"reward": [(0.0, 0.0)]}
    columns = min(3, len(known))
    words = "Faint: mean of each step. Bold, and at the right its first and last value: smoothed."
    with drawing.drawn(path, drawing.WIDTH, 0.3 + 2.0 * -(-len(known) // columns)) as figure:
        figure.suptitle(words, x=0.015, ha="left", fontsize=8, color=drawing.FAINT)
        for axes, (name, points) in zip(drawing.panels(figure, len(known), columns), known.items(), strict=True):
            steps, values = np.array(points).T
            smooth = drawing.smoothed(values)
            axes.plot(steps, values, color=drawing.PALETTE[0], lw=0.8, alpha=0.35)
            axes.plot(steps, smooth, color=drawing.PALETTE[0], lw=2)
            # Of a curve that hardly moves, the scale shows that it does not.
            low, high = min(values), max(values)
            room = max(0.05 * (high - low), (_LEAST - (high - low)) / 2)
            axes.set_ylim(low - room, high + room)
            axes.set_title(titles[name], loc="left", fontweight="bold")
            axes.set_title(f"{smooth[0]:.2f} → {smooth[-1]:.2f}", loc="right", color=drawing.FAINT)
            axes.set_xlabel("step")


def picture(samples: Sequence[Mapping[str, Any]]) -> Image.Image:
    """A sheet of sampled completions, one below the other: the image on the left, reward and text on the right.

    The ground truth is green, predicted boxes are red.

    Args:
        samples: Dicts with `image` (PIL), `label`, `completion`, `regions` (ground truth, model's frame), `frame` (its
            width and height), `reward` and `terms` (the value of each term of it by name).
    """
    rows = [(_with_boxes(sample), words(sample)) for sample in samples]
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
    scale = _IMAGE_SIDE / max(sample["image"].size)
    size = (max(1, round(sample["image"].width * scale)), max(1, round(sample["image"].height * scale)))
    pixels = np.array(sample["image"].convert("RGB").resize(size))
    frame = Frame(*sample["frame"])
    predicted = response.parse(sample["completion"]).boxes
    for boxes, colour in (([Box(*b) for b in sample["regions"]], drawing.TRUTH), (predicted, drawing.PREDICTED)):
        drawing.frame(pixels, (box for b in boxes if (box := frame.to_pixels(b, *size)).area), colour)
    return Image.fromarray(pixels)


def words(sample: Mapping[str, Any]) -> list[str]:
    """The lines beside an image: the reward, its terms, the label, an empty line, the completion."""
    font = drawing.font(_FONT_SIZE)
    terms = ", ".join(f"{name} {value:.2f}" for name, value in sample["terms"].items())
    return [
        f"reward {sample['reward']:.2f}",
        *drawing.wrapped(terms, font, _TEXT_WIDTH, _MOST_LINES),
        f"label: {sample['label']}",
        "",
        *drawing.wrapped(drawing.stages(printable(sample["completion"])), font, _TEXT_WIDTH, _MOST_LINES),
    ]
