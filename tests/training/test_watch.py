from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

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


def test_boxes_stand_where_they_should_in_the_picture() -> None:
    sample = {
        "image": Image.new("RGB", (64, 32), "black"),
        "completion": prompt.answer("anomalous", [Box(500, 500, 750, 1000)], "spot"),
        "regions": [[0, 0, 250, 500]],
        "frame": [1000, 1000],
        "reward": 2.0,
    }
    pixels = np.asarray(watch.picture([sample], columns=1, side=192))
    for colour, left, top, right, bottom in ((watch.TRUTH, 0, 0, 48, 48), (watch.PREDICTED, 96, 48, 144, 96)):
        ys, xs = np.nonzero((pixels == colour).all(-1))
        assert [xs.min(), ys.min(), xs.max(), ys.max()] == [left + 4, top + 4, right + 4, bottom + 4]


def test_a_completion_without_form_is_drawn_too() -> None:
    sample = {
        "image": Image.new("L", (10, 500)),
        "completion": "<think>[9, 9, 1, 1] [0, 0, 1e9, nan]" + "x" * 5000,
        "regions": [],
        "frame": [1000, 1000],
        "reward": 0.0,
    }
    assert watch.picture([sample] * 5).size == (800, 2 * (192 + 92))
