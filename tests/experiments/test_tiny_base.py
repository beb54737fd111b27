from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from adfm.data import synthetic
from adfm.method import kinds as kinds_
from adfm.method import response
from adfm.models import loading, model_folder
from adfm.tiny import tower
from experiments import tiny_base, tiny_model


def _picture(x: int, y: int, width: int, height: int) -> tiny_base.Picture:
    boxes = np.array([[x, y, x + width, y + height]], np.float32) / 96
    return tiny_base.Picture(Image.new("RGB", (96, 96)), boxes, "spot")


@pytest.mark.parametrize("index", range(12))
def test_pictures_show_their_boxes(index: int) -> None:
    picture = tiny_base._draw(1, index)
    width, height = picture.image.size
    assert 64 <= min(width, height) <= max(width, height) <= synthetic.SIZE
    assert bool(len(picture.boxes)) == (picture.defect is not None)
    assert ((picture.boxes >= 0) & (picture.boxes <= 1)).all()
    assert (picture.boxes[:, 2:] > picture.boxes[:, :2]).all()


@settings(max_examples=50)
@given(st.integers(0, 10**6))
def test_annotator_answers_in_the_form_of_the_prompt(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parsed = response.parse(tiny_base.annotate(_picture(10, 20, 30, 10), rng))
    assert parsed.answer in ("A", "B") and parsed.think and parsed.rethink
    assert all(0 <= value <= 1000 and value % 10 == 0 for box in parsed.boxes for value in box)


def test_annotator_is_right() -> None:
    rng = np.random.default_rng(0)
    read = response.parse(tiny_base.annotate(_picture(24, 12, 48, 24), rng))
    assert read.answer == "A" and [list(box) for box in read.boxes] == [[250, 120, 750, 380]]
    normal = tiny_base.Picture(Image.new("RGB", (96, 96)), np.zeros((0, 4), np.float32), None)
    answers = [response.parse(tiny_base.annotate(normal, rng)) for _ in range(100)]
    assert all(read.answer == "B" for read in answers) and 2 < sum(bool(read.boxes) for read in answers) < 25


@settings(max_examples=50)
@given(st.integers(0, 10**6))
def test_an_answer_names_the_kind_by_the_name_that_its_prompt_lists_at_the_number(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kinds = tiny_base.made_up_kinds(rng, len(tiny_base.KINDS))
    assert len(kinds) == len(tiny_base.KINDS) and kinds_.single(kinds) == [*kinds]
    read = response.parse(tiny_base.annotate(_picture(10, 20, 30, 10), rng, kinds))
    assert kinds_.read(read.rethink, kinds) == kinds[tiny_base.KINDS.index("spot")]


@settings(max_examples=50)
@given(st.integers(0, 10**6))
def test_a_kind_to_copy_is_the_likeliest(seed: int) -> None:
    listed, name, probabilities = tiny_base._draw_kind(np.random.default_rng(seed))
    assert len(probabilities) == kinds_.MOST and probabilities.sum() == pytest.approx(1)
    assert [*(listed or tiny_base.KINDS)].index(name) == probabilities.argmax()


def test_regions_to_copy_are_what_a_neck_could_give() -> None:
    defect, boxes = tiny_base._regions(np.random.default_rng(0), 12, 16)
    for logits, corners in zip(defect, boxes, strict=True):
        read = response.parse(tiny_base._answer_of_regions(logits, corners, "gulost", ["gulost", "kraba"]))
        assert read.answer == "A" and 1 <= len(read.boxes) <= 4
        assert kinds_.read(read.rethink, ["gulost", "kraba"]) == "gulost"
        regions = tower.regions(logits, corners)
        assert all(
            np.allclose(box, np.array(region) * 1000, atol=5.001)
            for box, region in zip(read.boxes, regions, strict=True)
        )


def test_interrupted_build_gives_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name: str) -> None:
        tiny_base.build(tmp_path / name, seed=3, pictures=64, places_steps=3, copying_steps=3, response_steps=3)

    monkeypatch.setattr(tiny_base, "CHECKPOINT_EVERY", 1)
    monkeypatch.setattr(tiny_base, "BATCH", 4)
    monkeypatch.setattr(tiny_model, "processor", partial(tiny_model.processor, side=64))
    build("undisturbed")

    saves = 0
    save = tiny_base._Checkpoint.save

    def interrupted(*args: object) -> None:
        nonlocal saves
        save(*args)  # type: ignore[arg-type]
        saves += 1
        if saves in (2, 5, 8):
            raise KeyboardInterrupt

    monkeypatch.setattr(tiny_base._Checkpoint, "save", interrupted)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            build("interrupted")
        assert not (tmp_path / "interrupted").exists()
    build("interrupted")

    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("undisturbed", "interrupted"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert model_folder.family_of(loading.resolve(str(tmp_path / "interrupted"), None)) == "adfm_embedded"
    assert not (tmp_path / "interrupted.checkpoint").exists()
