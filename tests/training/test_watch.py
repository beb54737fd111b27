from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from adfm import drawing
from adfm.method import prompt
from adfm.records import Box
from adfm.training import watch


def test_curves_have_a_row_a_step_and_every_figure_once(tmp_path: Path) -> None:
    history = [
        {"step": 1, "epoch": 0.1, "loss": 0.5, "reward": 1.0},
        {"step": 2, "epoch": 0.2, "loss": 0.4, "reward": 1.5, "kl": 0.01},
        {"step": 2, "train_runtime": 12.0},
    ]
    watch.write_curves(history, tmp_path / "curves.csv")
    with (tmp_path / "curves.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert rows == [
        {"step": "1", "loss": "0.5", "reward": "1.0", "kl": ""},
        {"step": "2", "loss": "0.4", "reward": "1.5", "kl": "0.01"},
    ]


def test_curves_of_no_steps_are_empty(tmp_path: Path) -> None:
    watch.write_curves([], tmp_path / "curves.csv")
    assert (tmp_path / "curves.csv").read_text().splitlines() == ["step"]


def test_a_chart_has_a_panel_for_each_reward_and_its_smoothed_curve(tmp_path: Path) -> None:
    names = ("reward", "rewards/format/mean", "rewards/localization/mean", "utilisation", "kl")
    history = [{"step": i, "loss": 0.1, **dict.fromkeys(names, i % 2 * 0.5 + i / 50)} for i in range(1, 31)]
    for count, rows in (("many", history), ("one", history[:1]), ("none", [])):
        watch.write_curves(rows, tmp_path / f"{count}.csv")
        watch.draw_curves(tmp_path / f"{count}.csv", tmp_path / f"{count}.png")
    with Image.open(tmp_path / "many.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape[1] == 130 * drawing.WIDTH
    bold = (abs(pixels - [*bytes.fromhex(drawing.PALETTE[0][1:])]) < 20).all(-1)
    panels = [panel for row in np.array_split(bold, 2) for panel in np.array_split(row, 3, axis=1)]
    assert [panel.sum() > 100 for panel in panels] == [True] * 5 + [False]
    for count in ("one", "none"):
        with Image.open(tmp_path / f"{count}.png") as image:
            assert image.width == 130 * drawing.WIDTH


def test_boxes_stand_where_they_should_in_the_picture() -> None:
    sample = {
        "image": Image.new("RGB", (80, 40), "black"),
        "completion": prompt.answer("anomalous", [Box(500, 500, 750, 750)], "spot"),
        "regions": [[100, 250, 250, 500]],
        "frame": [1000, 1000],
        "reward": 2.0,
    }
    pixels = np.asarray(watch.picture([sample], columns=1, side=240))
    for colour, left, top, right, bottom in (
        (drawing.TRUTH, 24, 30, 60, 60),
        (drawing.PREDICTED, 120, 60, 180, 90),
    ):
        ys, xs = np.nonzero((pixels == tuple(bytes.fromhex(colour[1:]))).all(-1))
        # framed from outside, two pixels wide, in a sheet with a margin of eight
        assert [xs.min(), ys.min(), xs.max(), ys.max()] == [left + 6, top + 6, right + 9, bottom + 9]


def test_a_completion_without_form_is_drawn_too() -> None:
    sample = {
        "image": Image.new("L", (10, 500)),
        "completion": "<think>[9, 9, 1, 1] [0, 0, 1e9, nan]" + "x" * 5000,
        "regions": [],
        "frame": [1000, 1000],
        "reward": 0.0,
    }
    width, height = watch.picture([sample] * 5).size
    assert width == 4 * 248 + 8 and height == watch.picture([sample]).height * 2
