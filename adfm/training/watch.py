"""What is seen of a training while it runs: a progress bar with its ETA, every step in MLflow, curves on disk."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
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
_LINES, _GAP = 8, 8  # of a sampled completion; pixels


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
        figures = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, int | float) and math.isfinite(v)}
        if "loss" in (logs or {}):
            self._outbox.add(figures, state.global_step)
            self._bar.set_postfix(
                {k.rsplit("/", 1)[-1]: f"{figures[k]:.3f}" for k in self._shown if k in figures}, refresh=False
            )
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


def picture(samples: Sequence[dict[str, Any]], columns: int = 4, side: int = 240) -> Image.Image:
    """A sheet of sampled completions: the image, ground truth in green, predicted boxes in red, the text below.

    Args:
        samples: Dicts with `image` (PIL), `completion`, `regions` (ground truth, model's frame), `frame` (its width and
            height) and `reward`.
        columns: Samples a row.
        side: Width of a sample in pixels.
    """
    font = drawing.font(12)
    height = side + _LINES * drawing.line_height(font) + 3 * _GAP
    sheet = Image.new("RGB", (columns * (side + _GAP) + _GAP, -(-len(samples) // columns) * height), "white")
    for i, sample in enumerate(samples):
        x, y = (i % columns) * (side + _GAP) + _GAP, (i // columns) * height + _GAP
        image = sample["image"].convert("RGB")
        scale = side / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        pixels = np.array(image.resize(size))
        frame = Frame(*sample["frame"])
        predicted = response.parse(sample["completion"]).boxes
        for boxes, colour in (([Box(*b) for b in sample["regions"]], drawing.TRUTH), (predicted, drawing.PREDICTED)):
            drawing.frame(pixels, (box for b in boxes if (box := frame.to_pixels(b, *size)).area), colour)
        sheet.paste(Image.fromarray(pixels), (x, y))
        text = f"reward {sample['reward']:.2f}\n{drawing.stages(printable(sample['completion']))}"
        lines = drawing.wrapped(text, font, side, _LINES)
        drawing.write(sheet, (x, y + size[1] + _GAP), lines, font)
    return sheet
