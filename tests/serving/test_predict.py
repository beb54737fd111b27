from __future__ import annotations

import dataclasses
import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from adfm.cli import main
from adfm.data import shards as shards_
from adfm.errors import AdfmError
from adfm.evaluation import guard as guard_
from adfm.evaluation import predictions
from adfm.evaluation.calibration import Calibration
from adfm.method import response
from adfm.models import predictor
from adfm.models.predictor import Prediction
from adfm.params import Params
from adfm.records import Box
from adfm.serving import predict as predict_

BASE = "embedded://tiny-base"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answer(completion: str, *boxes: Box, score: float | None = 0.75) -> Prediction:
    parsed = response.parse(completion)
    marked = list(boxes) if parsed.answer == "A" else []
    return Prediction(parsed.predicted_label, score if parsed.answer else None, marked, parsed, completion, list(boxes))


class Stub:
    """Instead of a model: calls every image anomalous, with a box over its left half."""

    kinds: tuple[str, ...] = ()

    def __init__(self, *arguments: Any) -> None:
        self.batches: list[list[Image.Image]] = []

    def answers(self, sizes: list[tuple[int, int]], image: Any) -> list[Prediction]:
        self.batches.append([image(i) for i in range(len(sizes))])
        completion = "<think>It has\n a scratch.</think><rethink>A real one.</rethink><answer>A</answer>"
        return [answer(completion, Box(0, 0, width / 2, height)) for width, height in sizes]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    model = Stub()
    monkeypatch.setattr(predictor, "Predictor", lambda *arguments: model)
    return model


def test_a_photograph_gets_the_answer_that_evaluation_gives_it(
    small_shards: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = Params()
    table = predictions.predict(BASE, small_shards, params, "base").set_index("id")
    table = table[table["predicted"].notna()][:3]
    of_id = {record.id: record for record in shards_.read(small_shards, "test")}
    records = [of_id[number] for number in table.index]
    for number, record in enumerate(records):
        (here / f"{number}.png").write_bytes(record.image)
    capsys.readouterr()
    assert main(["predict", "0.png", "1.png", "2.png", "--model", BASE, "--json"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"] for line in printed] == ["0.png", "1.png", "2.png"]
    assert [line["label"] for line in printed] == table["predicted"].tolist()
    assert [line["probability"] for line in printed] == pytest.approx(table["score"].tolist(), abs=1e-4)
    for line, record, (_, row) in zip(printed, records, table.iterrows(), strict=True):
        limits = np.array([record.width, record.height] * 2)
        inside = np.array([np.clip(box, 0, limits) for box in row["predicted_boxes"]])
        assert np.allclose(line["boxes"], inside, atol=0.01)
        assert line["reasoning"].split("\n")[0] in row["completion"]
        assert (line["model"], line["picture"]) == (BASE, None)
    assert not (here / "predictions").exists()


def test_the_threshold_decides_and_the_regions_of_a_flagged_image_are_its_boxes() -> None:
    calibration = Calibration(threshold=0.6, limit={"overkill": 0.1}, images=100)
    box = Box(1, 2, 30, 60)
    for letter, score, label in (("B", 0.75, "anomalous"), ("A", 0.25, "normal"), ("A", None, "anomalous")):
        prediction = answer(f"<think>Here.</think><rethink>So.</rethink><answer>{letter}</answer>", box, score=score)
        row = predict_.readable(prediction, (20, 50), calibration)
        assert (row["label"], row["probability"], row["threshold"]) == (label, score, 0.6)
        assert row["boxes"] == ([[1, 2, 20, 50]] if label == "anomalous" else [])
        letters = predict_.readable(prediction, (20, 50), Calibration())
        assert letters["label"] == prediction.predicted and letters["threshold"] is None


def test_the_words_of_an_image_in_tiles_end_with_the_tiles_that_they_are_of() -> None:
    read = "<think>A\n scratch.</think><rethink>Real.</rethink><answer>{}</answer>"
    notes = [
        "These are the words on tile 2 of 4, [66, 0, 166, 100], the most suspicious.",
        "On tile 1 of 4, …: A dent.",
    ]
    for letter, words in (("A", ["A scratch.", "Real."]), ("C", [" ".join(read.format("C").split())])):
        of_tile = answer(read.format(letter), score=0.5)
        image = dataclasses.replace(of_tile, completion="\n".join([of_tile.completion, *notes]), notes=notes)
        assert predict_.readable(image, (300, 100), Calibration())["reasoning"].split("\n") == [*words, *notes]


def test_pictures_lie_as_the_photographs_do_and_are_none_themselves(
    stub: Stub, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("line/a/1.png", "line/b/1.png", "line/b/1.jpg", "line/b/notes.txt"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 20), "gray").save(here / name, format="PNG")
    for out in ("predictions", "line"):  # the second among the photographs themselves
        for _ in range(2):
            assert main(["predict", "line/a/1.png", "line/b", "--model", BASE, "--out", out]) == 0
            printed = capsys.readouterr().out.splitlines()
            pictures = sorted(path.relative_to(out).as_posix() for path in Path(out).rglob("*.answer.png"))
            assert pictures == ["a/1.png.answer.png", "b/1.jpg.answer.png", "b/1.png.answer.png"]
    assert printed == [
        line
        for name in ("a/1.png", "b/1.jpg", "b/1.png")
        for line in (
            f"line/{name}: anomalous (probability of a defect 0.75) [0, 0, 20, 20]",
            "  It has a scratch.",
            "  A real one.",
            f"  line/{name}.answer.png",
        )
    ]
    with Image.open("line/a/1.png.answer.png") as file:
        pixels = np.asarray(file.convert("RGB")).astype(int)
    assert pixels.shape[1] == 512 and pixels.shape[0] > 256
    red = (abs(pixels - (255, 45, 85)).max(axis=2) < 10).nonzero()
    assert (red[1].min(), red[0].max()) == pytest.approx((2, 253), abs=3)  # the frame keeps to the left half
    assert red[1].max() == pytest.approx(257, abs=3)
    assert (pixels[256:].min(axis=(0, 2)) < 100).any()  # words below


class Unclear(Stub):
    """Gives no clear answer to any image."""

    def answers(self, sizes: list[tuple[int, int]], image: Any) -> list[Prediction]:
        self.batches.append([image(i) for i in range(len(sizes))])
        return [answer("I cannot say.") for _ in sizes]


def test_images_that_cannot_be_judged_are_not_put_to_the_model() -> None:
    guard = guard_.Guard(side=guard_.Range(low=50, high=60))
    calibration = Calibration(threshold=0.6, limit={"overkill": 0.1}, images=100)
    good = [Image.effect_noise((50, 50), 50).convert("RGB") for _ in range(2)]
    images = [good[0], Image.new("RGB", (50, 50)), good[1], Image.effect_noise((200, 90), 50).convert("RGB")]
    for stub, label, kind in ((Stub(), "anomalous", None), (Unclear(), "cannot judge", "no answer")):
        loaded = predict_.LoadedModel("adfm", stub, 4, calibration, guard, None)  # type: ignore[arg-type]
        judged = loaded.judge(images)
        assert stub.batches == [good]
        assert [row["label"] for row, _ in judged] == [label, "cannot judge", label, "cannot judge"]
        assert [kind for _, kind in judged] == [kind, "uniform", kind, "size"]
        refused = judged[1][0]
        assert refused == {
            "label": "cannot judge",
            "probability": None,
            "threshold": 0.6,
            "boxes": [],
            "reasoning": "",
            "reason": "it is black, the same everywhere",
        }
        without = replace(loaded, guard=None).judge(images)
        assert [row["label"] for row, _ in without] == [label] * 4
    stub = Stub()
    judged = replace(loaded, predictor=stub).judge(images[1:2])  # type: ignore[arg-type]
    assert [kind for _, kind in judged] == ["uniform"] and not stub.batches


def test_an_image_that_cannot_be_judged_is_reported_with_the_reason(
    stub: Stub, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: Any) -> Any:
        return predict_.LoadedModel("models:/adfm/1", stub, 8, Calibration(), guard_.Guard(), None)  # type: ignore[arg-type]

    monkeypatch.setattr(predict_, "load", load)
    Image.effect_noise((50, 50), 50).save("1.png")
    Image.new("L", (50, 50)).save("2.png")
    Image.effect_noise((50, 50), 50).save("3.png")
    assert main(["predict", ".", "--model", "models:/adfm/1", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["image"], row["label"], row["reason"]) for row in rows] == [
        ("1.png", "anomalous", None),
        ("2.png", "cannot judge", "it is black, the same everywhere"),
        ("3.png", "anomalous", None),
    ]
    assert main(["predict", "2.png", "--model", "models:/adfm/1", "--out", "out"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["2.png: cannot judge: it is black, the same everywhere", "  out/2.png.answer.png"]
    with Image.open("out/2.png.answer.png") as picture:
        assert picture.width == 512


def test_a_rotated_photograph_is_answered_upright(stub: Stub, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 30)).save("phone.jpg", exif=exif)
    assert main(["predict", "phone.jpg", "--model", BASE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["boxes"] == [[0, 0, 15, 60]]
    assert stub.batches[0][0].size == (30, 60)


def test_all_that_cannot_be_read_is_listed_and_the_rest_answered(
    stub: Stub, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict_, "_MOST_PIXELS", 5000)
    good = Image.effect_noise((50, 50), 50)
    good.save("good.png")
    (here / "truncated.png").write_bytes((here / "good.png").read_bytes()[:900])
    (here / "text.jpg").write_text("no image")
    (here / "empty.png").touch()
    Image.new("L", (400, 400)).save("large.png")
    Image.new("L", (4, 900)).save("narrow.png")
    good.save("pages.tif", save_all=True, append_images=[good])
    (here / "a\x1b[2J.png").write_text("no image")
    assert main(["predict", ".", "--model", BASE, "--json"]) == 1
    printed = capsys.readouterr()
    assert [json.loads(line)["image"] for line in printed.out.splitlines()] == ["good.png"]
    first, second, *lines = printed.err.splitlines()
    assert first == f"{BASE}: The letter decides: only a registered version has a threshold."
    assert second == f"{BASE}: No image is refused: there is no guard.json, so a black one is answered as any other."
    assert lines[0] == "adfm: error: 7 of 8 images cannot be read; replace them, or leave them out:"
    reasons = dict(line.strip().split(": ", 1) for line in lines[1:])
    assert reasons.keys() == {
        "a\\x1b[2J.png", "empty.png", "large.png", "narrow.png", "pages.tif", "text.jpg",
        "truncated.png",
    }  # fmt: skip
    assert reasons["text.jpg"] == "it is not an image"
    assert reasons["empty.png"] == "it is empty"
    assert "400x400 pixels, and 5000 are the most" in reasons["large.png"]
    assert "too narrow" in reasons["narrow.png"]
    assert "2 frames or pages" in reasons["pages.tif"]


def test_what_is_no_file_is_not_waited_for(stub: Stub, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (40, 40)).save("good.png")
    os.mkfifo("pipe.png")
    (here / "zero.png").symlink_to("/dev/zero")
    (here / "round.png").symlink_to("round.png")
    assert main(["predict", ".", "--model", BASE, "--json"]) == 1
    printed = capsys.readouterr()
    assert [json.loads(line)["image"] for line in printed.out.splitlines()] == ["good.png"]
    assert "3 of 4 images cannot be read" in printed.err
    assert printed.err.count("it is a pipe, a socket or a device, not an ordinary file") == 2
    assert "round.png: Too many levels of symbolic links" in printed.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(stub: Stub, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (40, 40)).save("locked.png")
    (here / "locked.png").chmod(0)
    assert main(["predict", "locked.png", "--model", BASE]) == 1
    assert "locked.png: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (["no.png", ".", "nor.png"], "no such file or folder:\n  no.png\n  nor.png"),
        (["."], "no image in .; images are named .avif,"),
    ],
)
def test_without_an_image_no_model_is_loaded(images: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", *images, "--model", "models:/adfm@production"]) == 1
    assert says in capsys.readouterr().err
    assert not Path("mlflow.db").exists()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ([], "MLflow has no version for production of a model adfm"),
        (["--model", "nowhere"], "nowhere is not a folder"),
        (["--model", "models:/adfm"], "names no version"),
    ],
)
def test_a_model_that_is_not_there(
    model: list[str], says: str, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (40, 40)).save("a.png")
    assert main(["predict", "a.png", *model]) == 1
    assert says in capsys.readouterr().err
    assert not Path("predictions").exists()


def test_pictures_that_cannot_be_written(stub: Stub, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (40, 40)).save("a.png")
    assert main(["predict", "a.png", "--model", BASE, "--out", "a.png"]) == 1
    assert "a.png.answer.png: cannot be written" in capsys.readouterr().err


def test_no_more_images_are_in_memory_than_fit(stub: Stub, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict_, "_TOGETHER", 1000)
    for number, width in enumerate((20, 20, 70, 20, 20, 20)):
        Image.new("L", (width, 20)).save(f"{number}.png")
    predict_.predict([Path()], BASE, Params.model_validate({"evaluate": {"batch_size": 2}}), as_json=True)
    assert [[image.width for image in batch] for batch in stub.batches] == [[20, 20], [70], [20, 20], [20]]


def test_a_model_answers_with_what_it_was_judged_with() -> None:
    own = {"model": {"dtype": "bfloat16", "max_pixels": 999, "name": "x", "gone": 1}, "evaluate": {"batch_size": 3}}
    params = predict_.with_own(Params(), own)
    assert (params.model.dtype, params.model.max_pixels, params.model.name) == ("bfloat16", 999, BASE)
    assert params.evaluate == Params().evaluate
    assert predict_.with_own(Params(), {"evaluate": {"max_new_tokens": 512}}).evaluate.max_new_tokens == 512
    for unknown in (None, {}, [], {"model": None}):
        assert predict_.with_own(Params(), unknown) == Params()


def test_an_answer_that_is_none_is_told_as_it_is() -> None:
    row = predict_.readable(answer("I  cannot\nsay."), (10, 10), Calibration())
    assert row == {
        "label": "cannot judge",
        "probability": None,
        "threshold": None,
        "boxes": [],
        "reasoning": "I cannot say.",
        "reason": "the model gave no clear answer",
    }
    assert list(row) == predict_.KEYS == list(predict_.refused("it is black", Calibration()))
    assert predict_._verdict(row) == "cannot judge: the model gave no clear answer"
    odd = predict_.readable(answer("<answer>B</answer>"), (10, 10), Calibration())
    assert (odd["label"], odd["reasoning"]) == ("normal", "<answer>B</answer>")


sides = st.floats(-1e6, 1e6)


@given(st.lists(st.tuples(sides, sides, sides, sides), max_size=4), st.integers(1, 3000), st.integers(1, 3000))
def test_boxes_lie_within_the_photograph(corners: list[tuple[float, ...]], width: int, height: int) -> None:
    boxes = [Box(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in corners]
    row = predict_.readable(answer("<think>x</think><answer>A</answer>", *boxes), (width, height), Calibration())
    for x1, y1, x2, y2 in row["boxes"]:
        assert 0 <= x1 <= x2 <= width and 0 <= y1 <= y2 <= height
    json.dumps(row, allow_nan=False)


@given(st.binary(max_size=200))
def test_any_bytes_are_an_image_or_a_clear_error(content: bytes) -> None:
    buffer = io.BytesIO()
    Image.new("L", (3, 2)).save(buffer, "PNG")
    for spoilt in (content, buffer.getvalue()[: len(content)] + content):
        try:
            assert predict_.decode(spoilt).mode == "RGB"
        except AdfmError as error:
            assert str(error)


class Kinds(Stub):
    """Names a kind on every image, and answers every second one normal."""

    kinds = ("dent", "scratch")

    def answers(self, sizes: list[tuple[int, int]], image: Any) -> list[Prediction]:
        texts = [f'<think>x</think><rethink>"dent"</rethink><answer>{"AB"[i % 2]}</answer>' for i in range(len(sizes))]
        return [replace(answer(text), kind="dent") for text in texts]


def test_a_model_that_names_kinds_has_them_in_its_rows(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(predictor, "Predictor", Kinds)
    for name in ("1.png", "2.png"):
        Image.new("RGB", (40, 20), "gray").save(here / name)
    assert main(["predict", "1.png", "2.png", "--model", BASE, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["label"], row["kind"]) for row in rows] == [("anomalous", "dent"), ("normal", None)]
    assert main(["predict", "1.png", "2.png", "--model", BASE]) == 0
    printed = capsys.readouterr().out
    assert "1.png: anomalous, dent (probability" in printed and "2.png: normal (probability" in printed
