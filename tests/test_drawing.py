"""Boxes, letters and curves, as they are drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from adfm import drawing
from adfm.records import Box


def test_photographs_are_kept_in_few_colours_and_white_stays_white(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    with drawing.drawn(tmp_path / "chart.png", 3, 2) as figure:
        [axes] = drawing.panels(figure, 1, 1)
        axes.imshow(noise)
    with Image.open(tmp_path / "chart.png") as image:
        assert image.mode == "P"
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape == (260, 390, 3)
    assert (pixels[:5] == 255).all() and (pixels[:, -5:] == 255).all()


def test_a_box_has_its_colour_around_it_and_white_around_that() -> None:
    pixels = np.zeros((40, 60, 3), np.uint8)
    drawing.frame(pixels, [Box(20, 10, 40, 30)], "#2ea043")
    green, white = (pixels == (46, 160, 67)).all(-1), (pixels == 255).all(-1)
    for ring, room in ((green, 2), (white, 3)):
        rows, columns = np.nonzero(ring)
        assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == [
            20 - room, 10 - room, 40 + room, 30 + room
        ]  # fmt: skip
    assert (pixels[10:30, 20:40] == 0).all()


def test_a_curve_is_smoothed_without_a_shift_and_a_constant_stays() -> None:
    steps = np.arange(100.0)
    noisy = steps / 100 + np.random.default_rng(0).normal(0, 0.1, 100)
    smooth = drawing.smoothed(noisy)
    assert np.abs(smooth - steps / 100)[5:-5].max() < 0.1 < np.abs(noisy - steps / 100).max()
    assert drawing.smoothed(np.full(7, 0.3)) == pytest.approx(np.full(7, 0.3))
    assert drawing.smoothed(np.array([0.5])) == pytest.approx([0.5])


@given(st.text(max_size=200), st.integers(40, 400), st.integers(1, 5))
def test_lines_fit_their_place(text: str, width: int, most: int) -> None:
    font = drawing.font(12)
    lines = drawing.wrapped(text, font, width, most)
    assert len(lines) <= most
    assert all(font.getlength(line) <= width for line in lines)


def test_words_stay_whole_and_a_cut_is_marked() -> None:
    font = drawing.font(12)
    text = "The surface is even, nothing stands out. " * 3
    lines = drawing.wrapped(text, font, 160, 99)
    assert " ".join(lines) == text.strip()
    assert drawing.wrapped(text, font, 160, 2)[1].endswith("…")
    assert drawing.wrapped(text, font, 160, len(lines)) == lines


def test_a_long_name_keeps_its_beginning_and_its_number() -> None:
    font = drawing.font(12)
    short = drawing.fitted("circuit/test/contamination/with/many/folders/image_0017.png", font, 200)
    assert short.startswith("circuit/") and short.endswith("/image_0017.png") and "…" in short
    assert 150 < font.getlength(short) <= 200
    assert drawing.fitted("short.png", font, 200) == "short.png"
