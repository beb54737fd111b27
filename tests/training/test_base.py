from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from adfm.method import response
from adfm.models import loading
from adfm.training import base


def _picture(x: int, y: int, width: int, height: int) -> base.Picture:
    pixels = np.zeros((96, 96, 3), np.uint8)
    pixels[y : y + height, x : x + width] = 255
    return base.Picture(pixels, np.array([[x, y, x + width, y + height]], np.float32) / 96, "spot")


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 20), st.integers(1, 20), st.integers(0, 1000))
def test_boxes_turn_with_the_picture(x: int, y: int, width: int, height: int, seed: int) -> None:
    turned = base._turned(_picture(x, y, width, height), np.random.default_rng(seed))
    ys, xs = np.nonzero(turned.pixels[..., 0])
    seen = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / 96
    np.testing.assert_allclose(turned.boxes[0], seen, atol=1e-6)


@settings(max_examples=50)
@given(st.integers(0, 10**6))
def test_annotator_answers_in_the_form_of_the_prompt(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parsed = response.parse(base.annotate(_picture(10, 20, 30, 10), rng))
    assert parsed.answer in ("A", "B") and parsed.think and parsed.rethink
    assert all(0 <= value <= 1000 and value % 10 == 0 for box in parsed.boxes for value in box)


def test_annotator_is_imperfect() -> None:
    rng = np.random.default_rng(0)
    answers = [response.parse(base.annotate(_picture(20, 20, 20, 20), rng)).answer for _ in range(300)]
    assert 0.05 < answers.count("B") / 300 < 0.3


def test_interrupted_build_gives_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name: str) -> None:
        base.build(tmp_path / name, seed=3, pictures=64, dense_steps=3, response_steps=3)

    monkeypatch.setattr(base, "CHECKPOINT_EVERY", 1)
    build("undisturbed")

    saves = 0
    save = base._Checkpoint.save

    def interrupted(*args: object) -> None:
        nonlocal saves
        save(*args)  # type: ignore[arg-type]
        saves += 1
        if saves in (2, 4):
            raise KeyboardInterrupt

    monkeypatch.setattr(base._Checkpoint, "save", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            build("interrupted")
        assert not (tmp_path / "interrupted").exists()
    build("interrupted")

    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("undisturbed", "interrupted"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert loading.family_of(loading.resolve(str(tmp_path / "interrupted"), None)) == "qwen3_vl"
    assert not (tmp_path / "interrupted.checkpoint").exists()
