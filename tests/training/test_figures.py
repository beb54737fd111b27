from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from adfm import drawing
from adfm.method import prompt
from adfm.records import Box
from adfm.training import figures


def test_curves_have_a_row_a_step_and_every_metric_once(tmp_path: Path) -> None:
    history = [
        {"step": 1, "epoch": 0.1, "loss": 0.5, "reward": 1.0},
        {"step": 2, "epoch": 0.2, "loss": 0.4, "reward": 1.5, "kl": 0.01},
        {"step": 2, "train_runtime": 12.0},
    ]
    figures.write_curves(history, tmp_path / "curves.csv")
    with (tmp_path / "curves.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert rows == [
        {"step": "1", "loss": "0.5", "reward": "1.0", "kl": ""},
        {"step": "2", "loss": "0.4", "reward": "1.5", "kl": "0.01"},
    ]


def test_curves_of_no_steps_are_empty(tmp_path: Path) -> None:
    figures.write_curves([], tmp_path / "curves.csv")
    assert (tmp_path / "curves.csv").read_text().splitlines() == ["step"]


def test_a_chart_has_a_panel_for_each_reward_and_its_smoothed_curve(tmp_path: Path) -> None:
    names = ("reward", "rewards/format/mean", "rewards/localization/mean", "utilisation", "kl")
    history: list[dict[str, Any]] = [
        {"step": i, "loss": 0.1, **dict.fromkeys(names, i % 2 * 0.5 + i / 50)} for i in range(1, 31)
    ]
    history[7]["kl"] = None  # as TRL logs what was not a number
    for count, rows in (("many", history), ("one", history[:1]), ("none", [])):
        figures.draw_curves(rows, tmp_path / f"{count}.png")
    with Image.open(tmp_path / "many.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape[1] == 130 * drawing.WIDTH
    bold = (abs(pixels - [*bytes.fromhex(drawing.PALETTE[0][1:])]) < 20).all(-1)
    panels = [panel for row in np.array_split(bold, 2) for panel in np.array_split(row, 3, axis=1)]
    assert [panel.sum() > 100 for panel in panels] == [True] * 5 + [False]
    for count in ("one", "none"):
        with Image.open(tmp_path / f"{count}.png") as image:
            assert image.width == 130 * drawing.WIDTH


SAMPLE: dict[str, Any] = {
    "image": Image.new("RGB", (64, 32), "black"),
    "label": "anomalous",
    "completion": prompt.target_completion("anomalous", [Box(500, 500, 750, 1000)], "spot"),
    "regions": [[0, 0, 250, 500]],
    "frame": [1000, 1000],
    "reward": 2.25,
    "terms": {"format": 1.0, "classification": 1.0, "localization": 0.25},
}


def test_boxes_stand_where_they_should_in_the_picture() -> None:
    pixels = np.asarray(figures.completion_sheet([SAMPLE]))
    for colour, left, top, right, bottom in ((drawing.TRUTH, 0, 0, 48, 48), (drawing.PREDICTED, 96, 48, 144, 96)):
        ys, xs = np.nonzero((pixels == tuple(bytes.fromhex(colour[1:]))).all(-1))
        # Framed from outside, two pixels wide, as far as the image has room, in a sheet with a margin of eight.
        assert abs(xs.min() - (left + 8)) <= 2 and abs(ys.min() - (top + 8)) <= 2
        assert abs(xs.max() - (right + 8)) <= 2 and abs(ys.max() - (bottom + 8)) <= 2


def test_reward_terms_and_text_stand_beside_the_image() -> None:
    reward, terms, label, empty, *text = figures.text_lines(SAMPLE)
    assert (reward, label, empty) == ("reward 2.25", "label: anomalous", "")
    assert terms == "format 1.00, classification 1.00, localization 0.25"
    assert [line.split(">")[0] for line in text] == ["<think", "<rethink", "<answer"]  # a line for each stage
    assert "".join("".join(text).split()) == "".join(SAMPLE["completion"].split())


def test_the_longest_line_fits_and_a_completion_without_form_is_drawn_too() -> None:
    sample = SAMPLE | {
        "image": Image.new("L", (10, 500)),
        "completion": "<think>[9, 9, 1, 1] [0, 0, 1e9, nan]\n\n" + "suspicious texture " * 500,
        "reward": 0.0,
    }
    sheet = figures.completion_sheet([sample] * 5)
    assert sheet.width == 736 and sheet.height == 5 * figures.completion_sheet([sample]).height
    edge = np.asarray(sheet)[:, -4:]
    assert (edge == edge[:, :1]).all()  # no letter reaches it
