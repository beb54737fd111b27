from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from PIL import Image

from adfm.models import adapters, loading
from adfm.params import Lora, Model
from adfm.tiny import tower
from experiments import tiny_base, tiny_model

SIDE = 96


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_model.processor(tiny_model.tokenizer(tiny_base.corpus()), SIDE)


@pytest.fixture
def network(processor: Any) -> Any:
    return tiny_model.model(processor.tokenizer, seed=0).eval()


def picture(seed: int, width: int = SIDE, height: int = SIDE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def see(network: Any, processor: Any, images: list[Image.Image]) -> Any:
    inputs = processor.image_processor(images=images, return_tensors="pt")
    return network.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 100))
def test_patches_become_the_picture_that_they_were_cut_from(processor: Any, rows: int, columns: int, seed: int) -> None:
    image = picture(seed, 32 * columns, 32 * rows)
    limit = {"shortest_edge": 32 * 32, "longest_edge": 320 * 320}
    packed = processor.image_processor(images=[image], size=limit, return_tensors="pt")
    assert packed["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * columns]]
    pixels = tower.unpacked(packed["pixel_values"], 2 * rows, 2 * columns, tower.TowerConfig())
    np.testing.assert_allclose(pixels.permute(1, 2, 0), np.asarray(image, np.float32) / 127.5 - 1, atol=1e-6)


def test_a_picture_gives_the_same_tokens_alone_and_among_others(network: Any, processor: Any) -> None:
    images = [picture(0), picture(1, 192, 64), picture(2), picture(3, 48, 160)]
    together = see(network, processor, images)
    for number, image in enumerate(images):
        alone = see(network, processor, [image])
        rows, columns = alone.places[0].defect.shape
        assert alone.pooler_output.shape == (rows * columns // 4, tiny_model.HIDDEN)
        start = sum(place.defect.numel() // 4 for place in together.places[:number])
        torch.testing.assert_close(together.pooler_output[start : start + rows * columns // 4], alone.pooler_output)
        torch.testing.assert_close(together.places[number].boxes, alone.places[0].boxes)


def test_the_language_model_sees_the_picture(network: Any, processor: Any) -> None:
    text = loading.chat_text(processor, loading.prompt_of("embedded://tiny-base", tiny_model.FAMILY))
    logits = []
    for seed in (0, 1):
        inputs = processor(text=[text], images=[picture(seed)], padding=True, return_tensors="pt")
        logits.append(network(**inputs).logits[0, -1])
    assert not torch.allclose(*logits, atol=1e-4)


def test_pretrained_weights_are_neither_trained_nor_saved(network: Any, processor: Any, tmp_path: Any) -> None:
    network.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 5e6
    loaded = loading.load(str(tmp_path), Model())
    assert type(loaded.model) is tower.EmbeddedForConditionalGeneration
    outputs = [see(each, processor, [picture(0)]).pooler_output for each in (network, loaded.model.eval())]
    torch.testing.assert_close(*outputs)
    network.train()
    see(network, processor, [picture(0)]).pooler_output.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_an_adapter_holds_the_neck_whole_and_can_be_switched_off(network: Any, processor: Any) -> None:
    before = see(network, processor, [picture(0)]).pooler_output.detach()
    adapted = adapters.attach(network, Lora())
    assert not [name for name, _ in adapted.named_parameters() if "lora_" in name and "visual" in name]
    trained = [p for name, p in adapted.named_parameters() if p.requires_grad and "visual" in name]
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in tower.Tower(tower.TowerConfig()).parameters())
    with torch.no_grad():
        for weight in trained:
            weight.add_(0.1)
    after = see(adapted.base_model.model, processor, [picture(0)]).pooler_output
    with adapted.disable_adapter():
        off = see(adapted.base_model.model, processor, [picture(0)]).pooler_output
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(off, before)


def test_lora_vision_false_leaves_the_neck_as_it_is(network: Any) -> None:
    config: LoraConfig = adapters.config(network, Lora(vision=False))
    assert config.modules_to_save == ["embed_tokens", "lm_head"]
    adapted = adapters.attach(network, Lora(vision=False))
    assert not [name for name, p in adapted.named_parameters() if p.requires_grad and "visual" in name]


FRACTION = st.floats(0, 1)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.lists(st.tuples(FRACTION, FRACTION, FRACTION, FRACTION), max_size=6))
def test_targets_mark_every_box_and_nothing_far_from_one(rows: int, columns: int, corners: list[Any]) -> None:
    boxes = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in corners]
    boxes = [box for box in boxes if box[2] - box[0] > 1e-3 and box[3] - box[1] > 1e-3]
    hit, box_of = tower.targets(boxes, rows, columns)
    assert hit.any() == bool(boxes)
    for row, column in hit.nonzero().tolist():
        x1, y1, x2, y2 = box_of[row, column].tolist()
        assert any(np.allclose((x1, y1, x2, y2), box) for box in boxes)
        assert x1 < (column + 1) / columns + 1e-6 and x2 > column / columns - 1e-6
        assert y1 < (row + 1) / rows + 1e-6 and y2 > row / rows - 1e-6


def places(rows: int, columns: int, defect: float, image: float) -> tower.Places:
    label = torch.tensor(image, requires_grad=True)
    return tower.Places(torch.full((rows, columns), defect), torch.zeros(rows, columns, 4), label, torch.zeros(30))


def test_the_loss_is_least_for_the_truth() -> None:
    truth = [[0.25, 0.25, 0.5, 0.5]]
    hit, box_of = tower.targets(truth, 8, 8)
    exact = tower.Places(torch.where(hit, 20.0, -20.0), box_of, torch.tensor(20.0), 20.0 * (torch.arange(30) == 7))
    assert tower.loss([exact], [truth], [True], [7]).item() == pytest.approx(0, abs=1e-3)
    for worse in (
        replace(exact, defect=-exact.defect),
        replace(exact, boxes=box_of + 0.1),
        replace(exact, image=-exact.image),
        replace(exact, kinds=exact.kinds.roll(1)),
    ):
        assert tower.loss([worse], [truth], [True], [7]) > 0.1


def test_where_neither_place_nor_kind_is_known_the_label_alone_counts() -> None:
    for defect in (-5.0, 5.0):
        alone = tower.loss([places(4, 4, defect, 0.0)], [None], [True], [None])
        assert alone.item() == pytest.approx(0.5 * np.log(2))


def test_the_tokens_of_a_picture_say_which_kind_is_likeliest(network: Any, processor: Any) -> None:
    """The language model reads the number of the kind in every token, whatever else the picture shows."""
    visual = network.model.visual
    with torch.no_grad():
        visual.kind.weight.mul_(50)
        read = []
        for number in (3, 4, 3):
            visual.kinds.bias.copy_(20.0 * (torch.arange(30) == number))
            read.append(see(network, processor, [picture(len(read))]).pooler_output.mean(0))
    assert torch.cosine_similarity(read[0], read[2], 0) > 0.95 > torch.cosine_similarity(read[0], read[1], 0)


def test_a_linear_map_of_the_sinusoids_tells_every_coordinate_from_the_next() -> None:
    each = tower.sinusoids(torch.arange(101) / 100)
    assert (each @ each.T).argmax(1).equal(torch.arange(101))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6))
def test_tokens_list_the_edges_of_the_regions_in_the_order_in_which_they_are_written(
    rows: int, columns: int, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    defect = torch.randn(2, 2 * rows, 2 * columns, generator=rng) * 2 - 2
    boxes = torch.rand(2, 2 * rows, 2 * columns, 4, generator=rng) * 1.2 - 0.1
    code = tower._code(defect, boxes, 2)
    assert code.shape == (2, rows * columns, tower._CODED)
    grid = torch.linspace(0, 1, 1001)
    for logits, corners, tokens in zip(defect, boxes, code, strict=True):
        of_picture = tower.regions(logits, corners, min(rows * columns // 4, tower.REGIONS))
        tops = [box[1] for box in of_picture]
        assert tops == sorted(tops)
        edges = torch.tensor([edge for box in of_picture for edge in box]).clamp(0, 1)
        turn, edge = tokens[:, 1 : 1 + 4 * tower.REGIONS], tokens[:, 1 + 4 * tower.REGIONS :]
        assert turn.nonzero().tolist() == [[number, number] for number in range(len(edges))]
        read = grid[(tower.sinusoids(grid) @ edge[: len(edges)].T).argmax(0)]
        torch.testing.assert_close(read, edges, atol=1e-3, rtol=0)
        assert not edge[len(edges) :].any()
