from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from adfm.evaluation import inference
from adfm.method import response
from adfm.models import loading
from adfm.params import Model, Params


@pytest.fixture(scope="module")
def embedded() -> loading.Loaded:
    return loading.load("embedded://tiny-base", Model())


def test_every_image_of_the_split_gets_one_row(small_shards: Path) -> None:
    from adfm.data import shards

    params = Params.model_validate({"evaluate": {"batch_size": 7, "max_new_tokens": 40}})
    table = inference.predict("embedded://tiny-base", small_shards, params, "base")
    assert table["id"].tolist() == shards.ids(small_shards, "test")
    assert set(table["predicted"].dropna()) <= {"anomalous", "normal"}
    assert table["score"].isna().tolist() == table["predicted"].isna().tolist()
    assert table["iou"].isna().tolist() == (table["label"] == "normal").tolist()
    judged_normal = table[table["predicted"] != "anomalous"]
    assert not any(len(boxes) for boxes in judged_normal["predicted_boxes"])


def test_answers_do_not_depend_on_the_batch(small_shards: Path, embedded: loading.Loaded) -> None:
    import io

    from adfm.data import shards

    images = [Image.open(io.BytesIO(r.image)).convert("RGB") for r in list(shards.read(small_shards, "test"))[:6]]
    images[1] = images[1].resize((160, 64))
    together, scores = inference.answer(embedded, images, 40)
    alone = [inference.answer(embedded, [image], 40) for image in images]
    assert together == [completions[0] for completions, _ in alone]
    for score, (_, single) in zip(scores, alone, strict=True):
        assert (score is None and single[0] is None) or math.isclose(score or 0, single[0] or 0, abs_tol=1e-4)


def test_score_is_the_probability_of_the_letter_that_is_written(embedded: loading.Loaded) -> None:
    image = Image.new("RGB", (128, 128), "gray")
    [completion], [score] = inference.answer(embedded, [image], 40)
    answer = response.parse(completion).answer
    assert score is not None and (score > 0.5) == (answer == "A")

    tokenizer = embedded.processor.tokenizer
    text = inference.chat_text(embedded.processor, embedded.family)
    before = completion[: completion.index("<answer>") + len("<answer>")]
    inputs = embedded.processor(text=[text + before], images=[image], return_tensors="pt")
    with torch.inference_mode():
        logits = embedded.model(**inputs).logits[0, -1]
    letters = torch.tensor([tokenizer.convert_tokens_to_ids(letter) for letter in "AB"])
    assert math.isclose(score, logits[letters].softmax(0)[0].item(), abs_tol=1e-2)
