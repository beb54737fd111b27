"""What is seen of a training while it runs: a progress bar with its ETA, every step in MLflow, curves on disk."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw
from transformers import TrainerCallback

from adfm.method import response
from adfm.method.coordinates import Frame
from adfm.process.progress import bar
from adfm.records import Box
from adfm.training.outbox import Outbox

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

TRUTH, PREDICTED = (46, 160, 67), (218, 54, 51)


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


def picture(samples: Sequence[dict[str, Any]], columns: int = 4, side: int = 192) -> Image.Image:
    """A sheet of sampled completions: the image, ground truth in green, predicted boxes in red, the text below.

    Args:
        samples: Dicts with `image` (PIL), `completion`, `regions` (ground truth, model's frame), `frame` (its width and
            height) and `reward`.
        columns: Samples a row.
        side: Width of a sample in pixels.
    """
    text_height = 92
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (columns * (side + 8), rows * (side + text_height)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, sample in enumerate(samples):
        x, y = (i % columns) * (side + 8) + 4, (i // columns) * (side + text_height) + 4
        image = sample["image"].convert("RGB")
        scale = side / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        sheet.paste(image.resize(size), (x, y))
        frame = Frame(*sample["frame"])
        parsed = response.parse(sample["completion"])
        for boxes, colour in (([Box(*b) for b in sample["regions"]], TRUTH), (parsed.boxes, PREDICTED)):
            for box in boxes:
                x1, y1, x2, y2 = frame.to_pixels(box, *size)
                if x1 < x2 and y1 < y2:
                    draw.rectangle((x + x1, y + y1, x + x2, y + y2), outline=colour, width=2)
        words = f"reward {sample['reward']:.2f}  {sample['completion']}"
        lines = [words[k : k + 30] for k in range(0, len(words), 30)][:7]
        draw.multiline_text((x, y + size[1] + 2), "\n".join(lines), fill="black", spacing=1, font_size=10)
    return sheet
