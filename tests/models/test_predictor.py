from __future__ import annotations

import dataclasses
import io
import json
import math
import sys
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
import torch
from PIL import Image

from adfm.data import shards, tiles
from adfm.errors import AdfmError
from adfm.evaluation import predictions
from adfm.method import prompt, response
from adfm.models import families, loading, model_folder, predictor, transformers_backend, vllm_engine
from adfm.params import Evaluate, Model, Params
from adfm.records import Box
from tests.models import random_models
from tests.models.generation import generate

BASE = "embedded://tiny-base"


@pytest.fixture(scope="module")
def embedded() -> loading.Loaded:
    return loading.load("embedded://tiny-base", Model())


def test_every_image_of_the_split_gets_one_row(small_shards: Path) -> None:
    params = Params.model_validate({"evaluate": {"batch_size": 7, "max_new_tokens": 40}})
    table = predictions.predict("embedded://tiny-base", small_shards, params, "base")
    assert table["id"].tolist() == shards.ids(small_shards, "test")
    assert set(table["predicted"].dropna()) <= {"anomalous", "normal"}
    assert table["score"].isna().tolist() == table["predicted"].isna().tolist()
    assert table["iou"].isna().tolist() == (table["label"] == "normal").tolist()
    judged_normal = table[table["predicted"] != "anomalous"]
    assert not any(len(boxes) for boxes in judged_normal["predicted_boxes"])


def test_answers_do_not_depend_on_the_batch(small_shards: Path, embedded: loading.Loaded) -> None:
    images = [Image.open(io.BytesIO(r.image)).convert("RGB") for r in list(shards.read(small_shards, "test"))[:6]]
    images[1] = images[1].resize((160, 64))
    together, scores = generate(embedded, images, Evaluate(max_new_tokens=40))
    alone = [generate(embedded, [image], Evaluate(max_new_tokens=40)) for image in images]
    assert together == [completions[0] for completions, _ in alone]
    for score, (_, single) in zip(scores, alone, strict=True):
        assert (score is None and single[0] is None) or math.isclose(score or 0, single[0] or 0, abs_tol=1e-4)


def test_score_is_the_probability_of_the_letter_that_is_written(embedded: loading.Loaded) -> None:
    image = Image.new("RGB", (128, 128), "gray")
    [completion], [score] = generate(embedded, [image], Evaluate(max_new_tokens=40, score="letter"))
    answer = response.parse(completion).answer
    assert score is not None and (score > 0.5) == (answer == "A")

    tokenizer = embedded.processor.tokenizer
    text = loading.chat_text(embedded.processor, embedded.prompt)
    before = completion[: completion.index("<answer>") + len("<answer>")]
    inputs = embedded.processor(text=[text + before], images=[image], return_tensors="pt")
    with torch.inference_mode():
        logits = embedded.model(**inputs).logits[0, -1]
    letters = torch.tensor([tokenizer.convert_tokens_to_ids(letter) for letter in "AB"])
    assert math.isclose(score, logits[letters].softmax(0)[0].item(), abs_tol=1e-2)


def test_a_completion_ends_at_its_answer_also_where_the_model_would_go_on(embedded: loading.Loaded) -> None:
    image = Image.new("RGB", (128, 128), "gray")
    expected = generate(embedded, [image], Evaluate(max_new_tokens=40))
    settings = embedded.model.generation_config
    end, settings.eos_token_id = settings.eos_token_id, None
    try:
        assert generate(embedded, [image], Evaluate(max_new_tokens=60)) == expected
    finally:
        settings.eos_token_id = end


# ------------------------------------------------------------------------------------------------- batches


@pytest.fixture
def mixed(small_shards: Path, tmp_path: Path) -> Path:
    """The first twelve test images in three sizes, in turn."""
    records = []
    for number, record in enumerate(list(shards.read(small_shards, "test"))[:12]):
        size = [(128, 128), (192, 64), (64, 96)][number % 3]
        png = io.BytesIO()
        Image.open(io.BytesIO(record.image)).resize(size).save(png, "PNG")
        records.append(
            dataclasses.replace(record, image=png.getvalue(), mask=None, width=size[0], height=size[1], boxes=())
        )
    shards.write(records, tmp_path, 1000)
    return tmp_path


def test_images_of_one_size_are_answered_together_and_rows_keep_their_order(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = transformers_backend._inputs

    def spied(processor: Any, text: str, images: list[Image.Image]) -> Any:
        seen.append([image.size for image in images])
        return original(processor, text, images)

    monkeypatch.setattr(transformers_backend, "_inputs", spied)
    params = Params.model_validate({"evaluate": {"batch_size": 4, "max_new_tokens": 40}})
    table = predictions.predict(BASE, mixed, params, "base")
    assert len(seen) == 3 and all(len(set(batch)) == 1 for batch in seen)
    assert table["id"].tolist() == shards.ids(mixed, "test")
    loaded = loading.load(BASE, Model())
    images = [Image.open(io.BytesIO(record.image)).convert("RGB") for record in shards.read(mixed, "test")]
    assert table["completion"].tolist() == [
        generate(loaded, [image], Evaluate(max_new_tokens=40))[0][0] for image in images
    ]


def test_work_ahead_keeps_its_order_and_its_errors() -> None:
    assert list(predictor._ahead(lambda n: 10 // n, [1, 2, 5])) == [10, 5, 2]
    results = predictor._ahead(lambda n: 10 // n, [1, 0, 5])
    assert next(results) == 10
    with pytest.raises(ZeroDivisionError):
        list(results)


# ------------------------------------------------------------------------------------------------- resuming

SMALL = Params.model_validate({"evaluate": {"batch_size": 3, "max_new_tokens": 8}})


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many images each call of the model was given; where 99 stands first, the sixth call is interrupted."""
    calls: list[int] = []
    original = transformers_backend._generate

    def counted(
        loaded: loading.Loaded, scorer: Any, inputs: Any, settings: Evaluate, seed: int
    ) -> predictor.Completions:
        if calls[:1] == [99] and len(calls) > 5:
            raise KeyboardInterrupt
        calls.append(len(inputs["input_ids"]))
        return original(loaded, scorer, inputs, settings, seed)

    monkeypatch.setattr(transformers_backend, "_generate", counted)
    yield calls


def test_an_interrupted_evaluation_goes_on_with_the_same_result(
    small_shards: Path, tmp_path: Path, batches: list[int]
) -> None:
    def answered(keep: Path | None) -> dict[str, pd.DataFrame]:
        return predictions.predict_splits(BASE, small_shards, SMALL, "base", ["test", "validation"], keep)

    whole = answered(None)
    expected = sum(batches)
    batches[:] = [99]
    with pytest.raises(KeyboardInterrupt):
        answered(tmp_path / "kept")
    finished = len(list((tmp_path / "kept").rglob("*.parquet"))) * 12
    assert finished == 12  # of the five batches before the interrupt, four are a window

    batches.clear()
    again = answered(tmp_path / "kept")
    assert sum(batches) == expected - finished
    for split, table in whole.items():
        pd.testing.assert_frame_equal(again[split], table)

    batches.clear()
    answered(tmp_path / "kept")
    assert batches == []


def test_what_was_finished_with_other_settings_or_data_is_not_used(
    small_shards: Path, mixed: Path, tmp_path: Path, batches: list[int]
) -> None:
    keep = tmp_path / "kept"
    for changed in ({}, {"max_new_tokens": 7}, {"batch_size": 4}):
        params = Params.model_validate({"evaluate": {"batch_size": 3, "max_new_tokens": 8, **changed}})
        batches.clear()
        predictions.predict_splits(BASE, mixed, params, "base", ["test"], keep)
        assert sum(batches) == 12
    keys = {predictions._key(BASE, folder, "test", SMALL, vllm) for folder in (small_shards, mixed) for vllm in (0, 1)}
    assert len(keys) == 4


# ------------------------------------------------------------------------------------------------- tiles


@pytest.fixture
def large(small_shards: Path, tmp_path: Path) -> Path:
    """Four test images: each of the first three is a mosaic, 224 x 128, of which the right part is the next one's."""
    records = list(shards.read(small_shards, "test"))[:4]
    pictures = [Image.open(io.BytesIO(record.image)).convert("RGB") for record in records]
    for number in range(3):
        mosaic, png = Image.new("RGB", (224, 128)), io.BytesIO()
        mosaic.paste(pictures[number], (0, 0))
        mosaic.paste(pictures[number + 1], (96, 0))
        mosaic.save(png, "PNG")
        records[number] = dataclasses.replace(records[number], image=png.getvalue(), mask=None, width=224, boxes=())
    shards.write(records, tmp_path, 1000)
    return tmp_path


def test_an_image_in_tiles_gets_what_its_tiles_get(large: Path, embedded: loading.Loaded, tmp_path: Path) -> None:
    settings = {"batch_size": 3, "max_new_tokens": 96}
    params = Params.model_validate({"evaluate": settings, "tile": {"size": 128, "overlap": 0.25}})
    progress: list[int] = []
    inspector = predictor.Predictor(BASE, params)
    images = [Image.open(io.BytesIO(record.image)).convert("RGB") for record in shards.read(large, "test")]
    decoded: list[int] = []

    def image(number: int) -> Image.Image:
        decoded.append(number)
        return images[number]

    answers = inspector.answers([image.size for image in images], image, progress.append)
    assert decoded == [0, 1, 2, 3]  # each once, though it has two tiles
    assert len(progress) == 3 and sum(progress) == 4
    alone = predictor.Predictor(BASE, Params.model_validate({"evaluate": settings}))
    for picture, answer in zip(images[:3], answers, strict=False):
        grid = [Box(0, 0, 128, 128), Box(96, 0, 224, 128)]
        of_tiles = alone.answers([(128, 128)] * 2, lambda i, p=picture, g=grid: p.crop(g[i]))  # type: ignore[misc]
        expected = predictor.joined(of_tiles, grid)
        assert (answer.predicted, answer.boxes, answer.notes) == (expected.predicted, expected.boxes, expected.notes)
        scores = [each.score for each in of_tiles if each.score is not None]
        assert answer.score == (pytest.approx(max(scores), abs=1e-4) if expected.predicted else None)
    assert (
        answers[3].notes == []
        and answers[3].completion == alone.answers([(128, 128)], lambda _: images[3])[0].completion
    )

    table = predictions.predict_splits(BASE, large, params, "base", ["test"], tmp_path / "kept")["test"]
    assert table["completion"].tolist() == [answer.completion for answer in answers]
    # A window is as many tiles as it is images where none is cut.
    assert len(list((tmp_path / "kept").rglob("*.parquet"))) == 1
    settings = {"batch_size": 1, "max_new_tokens": 1}
    params = Params.model_validate({"evaluate": settings, "tile": {"size": 128, "overlap": 0.25}})
    predictions.predict_splits(BASE, large, params, "base", ["test"], tmp_path / "two")
    assert len(list((tmp_path / "two").rglob("*.parquet"))) == 2


def test_kept_answers_are_those_of_the_same_tiles(small_shards: Path) -> None:
    tiled = [Params.model_validate({"tile": tile}) for tile in ({}, {"size": 64}, {"size": 64, "overlap": 0.3})]
    assert len({predictions._key(BASE, small_shards, "test", params, False) for params in tiled}) == 3


def test_a_model_keeps_the_tiles_that_it_was_trained_with(tmp_path: Path) -> None:
    params = Params.model_validate({"tile": {"size": 256}})
    assert predictor.tile_of(BASE, params.tile) == params.tile
    for own, expected in (
        ({"tile": {"size": 400, "overlap": 0.1}}, (400, 0.1)),
        ({}, (None, 0.2)),
        (None, (None, 0.2)),
    ):
        for stage in ("sft", model_folder.DETECTOR):
            (tmp_path / "adfm.json").write_text(json.dumps({"stage": stage, "params": own}))
            tile = predictor.tile_of(tmp_path, params.tile)
            assert (tile.size, tile.overlap) == expected


GRID = tiles.grid(300, 100, 100, 0.2)


def reply(letter: str, score: float | None = None, *boxes: Box, words: str = "Here") -> predictor.Prediction:
    completion = f"<think>{words}: {len(boxes)}</think><rethink>So.</rethink><answer>{letter}</answer>"
    read = response.parse(completion)
    defects = list(boxes) if letter == "A" else []
    return predictor.Prediction(read.predicted_label, score, defects, read, completion, list(boxes))


def test_the_most_suspicious_tile_decides() -> None:
    seam = Box(90, 10, 100, 20), Box(23, 10, 40, 20)  # one defect, on the first tile and on the second
    image = predictor.joined([reply("A", 0.6, seam[0]), reply("A", 0.9, seam[1]), *[reply("B", 0.1)] * 2], GRID)
    assert (image.predicted, image.score, image.boxes) == ("anomalous", 0.9, [Box(89, 10, 106, 20)])
    assert image.regions == image.boxes
    assert image.completion.startswith("<think>Here: 1</think>") and response.parse(image.completion).answer == "A"
    assert image.notes == [
        "These are the words on tile 2 of 4, [66, 0, 166, 100], the most suspicious.",
        "On tile 1 of 4, [0, 0, 100, 100]: Here: 1 So.",
    ]


def test_an_image_is_normal_if_all_its_tiles_are_and_keeps_the_region_of_the_most_suspicious() -> None:
    rejected = Box(10, 10, 20, 20)
    image = predictor.joined([reply("B", 0.1, rejected), reply("B", 0.4, rejected), *[reply("B", 0.2)] * 2], GRID)
    assert (image.predicted, image.score, image.boxes) == ("normal", 0.4, [])
    assert image.regions == [Box(76, 10, 86, 20)]  # what an image is flagged for if its score is above the threshold


def test_an_unreadable_tile_leaves_the_image_open_unless_another_is_anomalous() -> None:
    unclear = reply("neither", words="<answer>A</answer>")
    image = predictor.joined([reply("B", 0.3), unclear, reply("B", 0.2), reply("B", 0.2)], GRID)
    assert (image.predicted, image.score, image.boxes) == (None, None, [])
    assert image.completion.startswith(unclear.completion) and response.parse(image.completion).answer is None
    image = predictor.joined([reply("B", 0.8), unclear, reply("A", 0.6), reply("A", None)], GRID)
    assert (image.predicted, image.score) == ("anomalous", 0.8)
    assert response.parse(image.completion).answer == "A" and len(image.notes) == 2


def test_each_suspicious_tile_of_a_detector_is_noted_with_its_words() -> None:
    from adfm.models.detector import Detection

    scores = [0.6, 0.2, 0.9, 0.1]
    answers = [predictor._detected(Detection(score, [Box(0, 0, 9, 9)], "dent"), 0.5) for score in scores]
    image = predictor.joined(answers, GRID)
    assert image.notes == [
        "These are the words on tile 3 of 4, [133, 0, 233, 100], the most suspicious.",
        "On tile 1 of 4, [0, 0, 100, 100]: Dent, in 1 place.",
    ]
    assert (image.predicted, image.score, image.kind) == ("anomalous", 0.9, "dent") and len(image.boxes) == 2


def test_the_words_of_many_suspicious_tiles_are_cut_short() -> None:
    grid = tiles.grid(2000, 100, 100, 0.2)
    notes = predictor.joined([reply("A", 0.5)] * len(grid), grid).notes
    assert len(notes) == 10 and notes[-1] == f"{len(grid) - 9} more tiles are suspicious."


# ------------------------------------------------------------------------------------------------- vLLM


def test_transformers_is_used_where_vllm_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor.importlib.util, "find_spec", lambda name: None)
    assert not predictor.uses_vllm(Params())
    with pytest.raises(AdfmError, match="not installed"):
        predictor.uses_vllm(Params.model_validate({"evaluate": {"backend": "vllm"}}))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of an architecture that vLLM has."""
    return str(random_models.write("qwen3_vl", tmp_path_factory.mktemp("qwen3_vl")))


def of(model: str, **evaluate: Any) -> Params:
    return Params.model_validate({"model": {"name": model}, "evaluate": evaluate})


@pytest.mark.parametrize(
    ("backend", "gpu", "expected"),
    [("auto", True, True), ("auto", False, False), ("transformers", True, False), ("vllm", False, True)],
)
def test_vllm_is_chosen_where_it_is_installed_and_there_is_a_gpu(
    backend: str, gpu: bool, expected: bool, qwen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor.importlib.util, "find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert predictor.uses_vllm(of(qwen, backend=backend)) is expected


def test_vllm_does_not_have_the_embedded_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor.importlib.util, "find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not predictor.uses_vllm(Params())
    with pytest.raises(AdfmError, match="set the backend to auto"):
        predictor.uses_vllm(Params.model_validate({"evaluate": {"backend": "vllm"}}))


class Engine:
    """A stand-in for `vllm.LLM` that always writes the same."""

    made: ClassVar[list[dict[str, Any]]] = []
    asked: ClassVar[list[tuple[Any, ...]]] = []
    completion = "<think>Suspicious: [0, 0, 500, 500]</think><rethink>It is.</rethink><answer>A</answer>"

    def __init__(self, **options: Any) -> None:
        self.made.append(options)

    def generate(self, prompts: list[Any], sampling: Any, lora_request: Any, use_tqdm: bool) -> list[Any]:
        self.asked.append((prompts, sampling, lora_request))
        tokenizer = loading.load_processor(BASE, Model()).tokenizer
        tokens = tokenizer(self.completion)["input_ids"]
        a, b = tokenizer.convert_tokens_to_ids(["A", "B"])
        known = dict.fromkeys(sampling.logprob_token_ids, types.SimpleNamespace(logprob=-1000.0))
        known |= {a: types.SimpleNamespace(logprob=math.log(0.6)), b: types.SimpleNamespace(logprob=math.log(0.2))}
        written = types.SimpleNamespace(text=self.completion + "\n", token_ids=tokens, logprobs=[known] * len(tokens))
        return [types.SimpleNamespace(outputs=[written] * getattr(sampling, "n", 1)) for _ in prompts]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[Engine]:
    fake: Any = types.ModuleType("vllm")
    fake.__spec__ = ModuleSpec("vllm", None)
    fake.LLM, fake.SamplingParams = Engine, types.SimpleNamespace
    lora: Any = types.ModuleType("vllm.lora.request")
    lora.LoRARequest = lambda name, number, path: (name, number, path)
    for name, module in (("vllm", fake), ("vllm.lora", types.ModuleType("vllm.lora")), ("vllm.lora.request", lora)):
        monkeypatch.setitem(sys.modules, name, module)
    Engine.made.clear()
    Engine.asked.clear()
    return Engine


def test_vllm_gets_the_same_prompts_and_its_answers_are_read_the_same(
    mixed: Path, vllm: type[Engine], qwen: str
) -> None:
    params = of(qwen, batch_size=5, backend="vllm", max_new_tokens=77, score="letter")
    loaded = loading.load(qwen, Model())
    table = predictions.predict(qwen, mixed, params, "base")
    assert set(table["completion"]) == {Engine.completion} and set(table["predicted"]) == {"anomalous"}
    assert table["score"].tolist() == pytest.approx([0.75] * 12)
    assert [list(box) for box in table["predicted_boxes"][1]] == [[0, 0, 96, 32]]  # half of 192 x 64
    prompts = [prompt for asked, _, _ in vllm.asked for prompt in asked]
    assert {prompt["prompt"] for prompt in prompts} == {loading.chat_text(loaded.processor, loaded.prompt)}
    assert [len(asked) for asked, _, _ in vllm.asked] == [5, 5, 2]
    sampling = vllm.asked[0][1]
    assert (sampling.temperature, sampling.max_tokens, sampling.stop) == (0, 77, ["</answer>"])
    assert all(asked[2] is None for asked in vllm.asked) and "enable_lora" not in vllm.made[0]
    (made,) = vllm.made
    assert made["max_model_len"] == vllm_engine.model_length(loaded.processor, loaded.prompt, 77)
    assert (made["generation_config"], made["dtype"], made["gpu_memory_utilization"]) == ("vllm", "float32", 0.9)
    size = {name: loaded.processor.image_processor.size[name] for name in ("shortest_edge", "longest_edge")}
    assert made["mm_processor_kwargs"] == {"size": size}


def test_vllm_samples_answers_for_the_score_and_shows_the_greedy_one(
    mixed: Path, vllm: type[Engine], qwen: str
) -> None:
    params = of(qwen, batch_size=12, backend="vllm", samples=3)
    table = predictions.predict(qwen, mixed, params, "base")
    assert table["score"].tolist() == pytest.approx([0.75] * 12)  # at the letter
    greedy, sampled = (sampling for _, sampling, _ in vllm.asked)
    assert greedy.temperature == 0 and (sampled.temperature, sampled.n, sampled.seed) == (1.0, 3, params.seed)


def test_an_adapter_is_a_lora_request_to_vllm(mixed: Path, vllm: type[Engine], qwen: str, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    loading.load_processor(qwen, Model()).save_pretrained(adapter)
    described = {"base": {"name": qwen, "revision": None}, "prompt": prompt.messages(families.get("qwen3_vl").units)}
    (adapter / "adfm.json").write_text(json.dumps(described))
    (adapter / "adapter_config.json").write_text('{"r": 24}')
    params = of(qwen, backend="vllm")
    predictions.predict(adapter, mixed, params, "adapter")
    assert vllm.made[0]["enable_lora"] and vllm.made[0]["max_lora_rank"] == 32
    assert vllm.made[0]["model"] == str(loading.resolve(qwen, None))
    assert vllm.asked[0][2] == ("adapter", 1, str(adapter))
    (adapter / "adapter_config.json").write_text('{"r": 1024}')
    with pytest.raises(AdfmError, match="adapters up to rank 512"):
        predictions.predict(adapter, mixed, params, "adapter")
