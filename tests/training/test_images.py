"""An image of a step is read, decoded and processed once, and nothing else changes."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from adfm.method import prompt
from adfm.models import families, loading
from adfm.params import Params
from adfm.training import grpo, images
from adfm.training.sft import sft
from experiments import tiny_base, tiny_model

FAMILIES = {"qwen2_5_vl": {"patch_size": 14}, "qwen3_vl": {"patch_size": 16}}


@pytest.fixture(scope="module", params=FAMILIES)
def processor(request: pytest.FixtureRequest) -> Any:
    """A processor of a family whose images differ in their number of patches."""
    size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    pixels = transformers.Qwen2VLImageProcessorPil(**FAMILIES[request.param], size=size)
    embedded = tiny_model.processor(tiny_model.tokenizer(tiny_base.corpus()))
    embedded.tokenizer.padding_side = "left"
    return families.processor_class(request.param)(pixels, embedded.tokenizer, chat_template=embedded.chat_template)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in ((80, 60), (200, 90), (50, 50))
    ]


@contextlib.contextmanager
def counted(image_processor: Any) -> Iterator[list[int]]:
    """How many images each call of the real image processor gets."""
    calls: list[int] = []
    owner, original = type(image_processor), type(image_processor).preprocess

    def preprocess(self: Any, given: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(given))
        return original(self, given, *args, **kwargs)

    owner.preprocess = preprocess
    try:
        yield calls
    finally:
        owner.preprocess = original


def same(one: Any, other: Any) -> bool:
    """Whether two outputs have the same types, shapes and bits; for TRL an array and its tensor are one."""
    if isinstance(one, torch.Tensor) and isinstance(other, np.ndarray):
        other = torch.from_numpy(other)
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def passes(processor: Any, rows: list[Image.Image]) -> list[dict[str, Any]]:
    """What TRL has the processor do with the rows of a step: before it generates, and before it scores."""
    system, user = prompt.messages(families.get("qwen3_vl").units)
    text = {"type": "text", "text": user["content"]}
    chats = [
        [
            {**system, "content": [{"type": "text", "text": system["content"]}]},
            {**user, "content": [{"type": "image", "image": image}, text]},
        ]
        for image in rows
    ]
    first = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)
    texts = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    second = processor(images=[[image] for image in rows], text=texts, padding=True, return_tensors="pt")
    return [dict(first), dict(second)]


def test_both_passes_get_the_same_bits_from_one_look_at_each_image(processor: Any, pictures: list[Any]) -> None:
    a, b, c = pictures
    rows = [a, a, a, b, b, b, c, c, c, a]
    expected = passes(processor, rows)
    original = processor.image_processor
    with counted(original) as calls, images.processed_once(processor):
        outputs = passes(processor, rows)
        assert processor.image_processor.patch_size == original.patch_size
    assert processor.image_processor is original
    assert calls == [1, 1, 1]
    assert outputs[0]["pixel_values"].shape[0] == outputs[1]["image_grid_thw"].prod(-1).sum()
    for ours, theirs in zip(outputs, expected, strict=True):
        assert list(ours) == list(theirs)
        assert [name for name in theirs if not same(ours[name], theirs[name])] == []


def test_nothing_is_kept_after_the_block_or_an_error(processor: Any, pictures: list[Any]) -> None:
    original = processor.image_processor
    with pytest.raises(ZeroDivisionError), images.processed_once(processor):
        raise ZeroDivisionError
    assert processor.image_processor is original
    for _ in range(2):
        with counted(original) as calls, images.processed_once(processor):
            processor.image_processor(pictures, return_tensors="pt")
        assert calls == [1, 1, 1]


@pytest.mark.parametrize(
    ("name", "kwargs", "alone"),
    [
        ("Gemma3ImageProcessorPil", {}, True),
        ("GotOcr2ImageProcessorPil", {"crop_to_patches": True}, True),  # InternVL's: a number of tiles an image
        ("LlavaOnevisionImageProcessorPil", {}, False),  # pads to the image of the batch with the most tiles
        ("Idefics3ImageProcessorPil", {}, False),  # pads as well, to an array
    ],
)
def test_other_families_get_the_same_and_those_that_pad_are_processed_as_usual(
    name: str, kwargs: dict[str, Any], alone: bool
) -> None:
    rng = np.random.default_rng(0)
    a, b = (Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in ((200, 300), (500, 200)))
    original = getattr(transformers, name)()
    holder = type("Processor", (), {"image_processor": original})()
    with images.processed_once(holder):
        for rows, tensors in (([[a], [a], [b]], None), ([[a], [b], [b]], "pt")):
            ours = holder.image_processor(rows, return_tensors=tensors, **kwargs)
            theirs = original(rows, return_tensors=tensors, **kwargs)
            assert same(dict(ours).keys(), dict(theirs).keys())
            assert [key for key in theirs if not same(ours[key], theirs[key])] == []
        with counted(original) as calls:
            holder.image_processor([[a], [a], [b]], return_tensors="pt", **kwargs)
        assert calls == ([] if alone else [3])


def test_rows_of_several_images_are_processed_as_usual(processor: Any, pictures: list[Any]) -> None:
    a, b, c = pictures
    with counted(processor.image_processor) as calls, images.processed_once(processor):
        processor.image_processor([[a, b], [c]], return_tensors="pt")
    assert calls == [2]


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=8), max_size=5))
def test_rows_are_read_when_the_last_load_did_not_have_them(loads: list[list[int]]) -> None:
    class Data:
        def __len__(self) -> int:
            return 6

        def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
            read.append(indices)
            return [{"image": object(), "index": index} for index in indices]

    read: list[list[int]] = []
    rows = images.Rows(Data())  # type: ignore[arg-type]
    last: dict[int, Any] = {}
    for indices in loads:
        read.clear()
        loaded = rows.__getitems__(indices)
        assert [row["index"] for row in loaded] == indices
        new = [index for index in dict.fromkeys(indices) if index not in last]
        assert read == ([new] if new else [])
        assert all(row["image"] is last.get(row["index"], row["image"]) for row in loaded)
        last = {row["index"]: row["image"] for row in loaded}
        assert all(row["image"] is last[row["index"]] for row in loaded)
    assert len(rows) == 6 and rows[3]["index"] == 3


def test_a_training_is_the_same_to_the_bit(
    small_shards: Path, tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    settings = params.model_dump(by_alias=True)
    settings["sft"]["steps"] = 0
    settings["train"] |= {"steps": 2, "micro_batch": 2, "pictures_every": 0, "checkpoint_every": 100}
    own = Params.model_validate(settings)
    sft(small_shards, tmp_path / "sft", own)
    decoded: list[Any] = []
    original = datasets.Image.decode_example

    def decode(self: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        decoded.append(value)
        return original(self, value, *args, **kwargs)

    def train(name: str) -> tuple[int, int]:
        decoded.clear()
        with counted(processing) as calls:
            grpo.train(small_shards, tmp_path / "sft", tmp_path / name, own)
        return len(decoded), sum(calls)

    monkeypatch.setattr(datasets.Image, "decode_example", decode)
    processing = loading.load_processor("embedded://tiny-base", own.model).image_processor
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    once = train("once")
    monkeypatch.setattr(images, "processed_once", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(images, "Rows", lambda data: data)
    usual = train("usual")
    torch.set_num_threads(threads)
    # Two steps of two images, of which TRL decodes 8 rows for each of 4 backward passes and processes 8 rows twice.
    assert once == (4, 4) and usual == (64, 32)
    ours, theirs = (tmp_path / name / "adapter_model.safetensors" for name in ("once", "usual"))
    assert ours.read_bytes() == theirs.read_bytes()
    files = [tmp_path / name / "reward_curves.csv" for name in ("once", "usual")]
    curves = [list(csv.DictReader(file.read_text().splitlines())) for file in files]
    steady = [name for name in curves[0][0] if not any(word in name for word in ("second", "time", "runtime"))]
    ours, theirs = ([[row[name] for name in steady] for row in curve] for curve in curves)
    assert "reward" in steady and ours == theirs
