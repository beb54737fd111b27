from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from adfm import drawing
from adfm.evaluation import metrics, plots


def png(width: int = 60, height: int = 40, colour: str = "gray") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(stream, "PNG")
    return stream.getvalue()


def row(number: int, label: str, predicted: str | None, **more: object) -> dict[str, object]:
    return {
        "id": f"{number:03}",
        "category": f"part-{number % 3}",
        "defect": "scratch" if label == "anomalous" else None,
        "label": label,
        "predicted": predicted,
        "score": None if predicted is None else 0.9 if predicted == "anomalous" else 0.1,
        "iou": 0.0 if label == "anomalous" else None,
        "boxes": [[5, 5, 20, 20]] if label == "anomalous" else [],
        "predicted_boxes": [[8, 6, 24, 19]] if predicted == "anomalous" else [],
        "completion": f"<think>[8, 6, 24, 19]</think><rethink>{number}</rethink><answer>A</answer>",
        "area_share": 0.02 if label == "anomalous" else None,
        **more,
    }


@pytest.fixture
def table() -> pd.DataFrame:
    rows = [row(i, "anomalous", "anomalous", iou=0.5 + i / 40) for i in range(20)]
    rows += [row(20 + i, "anomalous", "anomalous", iou=0.05) for i in range(3)]
    rows += [row(30 + i, "anomalous", "normal") for i in range(5)]
    rows += [row(40 + i, "normal", "normal") for i in range(20)]
    rows += [row(60 + i, "normal", "anomalous") for i in range(5)]
    rows += [row(70 + i, "normal", None) for i in range(2)]
    return pd.DataFrame(rows).assign(dataset="parts")


def test_the_sheet_shows_right_and_wrong(table: pd.DataFrame) -> None:
    chosen = plots.choose(table)
    counts = chosen["outcome"].value_counts().to_dict()
    assert counts == {"missed": 2, "overkill": 2, "elsewhere": 1, "located": 5, "passed": 2}
    assert chosen["outcome"].tolist()[:2] == ["missed", "missed"]
    located = chosen[chosen["outcome"] == "located"]
    assert set(located["category"]) == {"part-0", "part-1", "part-2"}
    assert located["iou"].max() == table["iou"].max()
    assert chosen["id"].is_unique


def test_others_take_the_places_of_a_kind_that_is_rare(table: pd.DataFrame) -> None:
    only = table[table["label"] == "normal"]
    assert plots.choose(only)["outcome"].value_counts().to_dict() == {
        "passed": 5,
        "overkill": 5,
        "overkill, unparseable": 2,
    }
    assert len(plots.choose(table.head(2))) == 2


def test_the_choice_does_not_depend_on_the_order_of_rows(table: pd.DataFrame) -> None:
    assert plots.choose(table.sample(frac=1, random_state=0))["id"].tolist() == plots.choose(table)["id"].tolist()


def pixels_of(path: Path) -> Any:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def near(pixels: Any, colour: str) -> Any:
    """Where the pixels have about a colour."""
    return np.abs(pixels - [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).max(axis=-1) < 20


def test_examples_draw_truth_and_prediction(table: pd.DataFrame, tmp_path: Path) -> None:
    chosen = plots.choose(table)
    images = {key: png() for key in chosen["id"]}
    plots.examples(chosen, images, tmp_path / "all.png")
    seen = pixels_of(tmp_path / "all.png")
    assert near(seen, drawing.TRUTH).sum() > 1000 and near(seen, drawing.PREDICTED).sum() > 1000
    assert seen.shape[1] == 130 * drawing.WIDTH
    assert (tmp_path / "all.png").stat().st_size < 1_000_000


def test_boxes_stand_where_they_should(tmp_path: Path) -> None:
    rows = pd.DataFrame([row(0, "anomalous", "anomalous", iou=0.9, boxes=[[30, 0, 60, 40]], predicted_boxes=[])])
    plots.examples(plots.choose(rows), {"000": png(colour="blue")}, tmp_path / "one.png", columns=1)
    pixels = pixels_of(tmp_path / "one.png")
    blue, green = near(pixels, "#0000ff"), near(pixels, drawing.TRUTH)
    rows_, columns = np.nonzero(blue)
    top, bottom, left, right = rows_.min(), rows_.max(), columns.min(), columns.max()
    inside = np.argwhere(green[top + 20 : bottom - 20])[:, 1]
    assert inside.min() == pytest.approx((left + right) / 2, abs=6)
    assert inside.max() == pytest.approx(right, abs=6)


@pytest.mark.parametrize(
    "completion", ["", "$x_{", "<think>" + "long " * 400, "缺陷 ☃ \x07 \ufffd", "[1,2]\n\n<answer>A", "\\frac{"]
)
def test_any_completion_can_be_drawn(completion: str, tmp_path: Path) -> None:
    rows = pd.DataFrame([row(0, "anomalous", None, completion=completion, category="$a_", defect="日本")])
    plots.examples(plots.choose(rows), {"000": png()}, tmp_path / "one.png")
    assert pixels_of(tmp_path / "one.png").shape[0] < 1500


def test_figures_are_drawn_also_where_nothing_is_defined(table: pd.DataFrame, tmp_path: Path) -> None:
    normal = table[table["label"] == "normal"]
    for name, part in (("whole", table), ("normal", normal)):
        tables = {"base": part, "trained": part}
        measured = {key: metrics.summarize(value, 20, 0, 0.01, 0.05) for key, value in tables.items()}
        overall = {key: value["overall"] for key, value in measured.items()}
        change = {"trained_minus_base": metrics.difference(part, part, 20, 0)}
        plots.confusion(tables, tmp_path / f"{name}-confusion.png")
        plots.iou_by_size({key: f["sizes"] for key, f in measured.items()}, 0.01, 0.05, tmp_path / f"{name}-sizes.png")
        plots.comparison(overall, change, tmp_path / f"{name}-comparison.png")
        plots.comparison(dict([*overall.items()][:1]), {}, tmp_path / f"{name}-alone.png")
    for path in tmp_path.glob("*.png"):
        assert pixels_of(path).shape[1] > 300 and path.stat().st_size < 200_000


def test_where_only_the_label_is_known_a_defect_is_judged_by_the_answer_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    rows = [row(i, "anomalous", word, iou=None, boxes=[]) for i, word in enumerate(("anomalous", "normal"))]
    table = pd.DataFrame(rows).astype({"iou": float})
    chosen = plots.choose(table)
    assert chosen["outcome"].tolist() == ["missed", "flagged"]
    titles: list[str] = []
    drawn = Axes.set_title

    def set_title(axes: Any, label: str, **more: Any) -> Any:
        titles.append(label)
        return drawn(axes, label, **more)

    monkeypatch.setattr(Axes, "set_title", set_title)
    plots.examples(chosen, {key: png() for key in table["id"]}, tmp_path / "examples.png")
    assert titles == ["\u2717 escape: defect missed", "\u2713 defect flagged, label alone known"]


def test_the_sheet_is_of_decisions_and_says_from_which_iou_a_defect_is_located(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    regions = {f"region_{name}": [0.3] for name in metrics.COMPARED} | {"regions": [[[1, 1, 9, 9]]]}
    table = pd.DataFrame([row(0, "anomalous", "normal")]).assign(decision="anomalous", **regions)
    titles: list[str] = []
    monkeypatch.setattr(Axes, "set_title", lambda axes, label, **more: titles.append(label))
    chosen = plots.choose(table)
    plots.examples(chosen, {"000": png()}, tmp_path / "examples.png")
    assert titles == ["~ not located: IoU 0.30 < 0.5"]
    assert chosen["predicted_boxes"].tolist() == [[[1, 1, 9, 9]]]


@pytest.mark.parametrize("name", ["$\\frac{", "$x$", "$$"])
def test_no_name_is_read_as_a_formula(table: pd.DataFrame, name: str, tmp_path: Path) -> None:
    from matplotlib.mathtext import MathTextParser

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MathTextParser, "parse", lambda *arguments, **more: pytest.fail("a formula"))
        plots.confusion({name: table}, tmp_path / "confusion.png")
        sizes = metrics.summarize(table, 20, 0, 0.01, 0.05)["sizes"]
        plots.iou_by_size({name: sizes}, 0.01, 0.05, tmp_path / "sizes.png")
        rows = table.head(3).assign(category=name, defect=name)
        plots.examples(plots.choose(rows), {key: png() for key in rows["id"]}, tmp_path / "examples.png")


def test_without_any_boxes_there_are_no_sizes_to_draw(tmp_path: Path) -> None:
    plots.iou_by_size({"base": {}, "trained": {}}, 0.01, 0.1, tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").is_file()


def test_charts_of_many_models_fit_a_page_on_white_and_each_model_has_its_colour(
    table: pd.DataFrame, tmp_path: Path
) -> None:
    names = ("base", "sft", "detector", "production", "anchor", "trained")
    tables = {name: table.assign(probability=table["score"]) for name in names}
    overall = {name: metrics.overall(part, 20, 0) for name, part in tables.items()}
    sizes = metrics.summarize(table, 20, 0, 0.01, 0.05)["sizes"]
    change = {f"trained_minus_{name}": metrics.difference(table, table, 20, 0) for name in names[-2::-1]}
    plots.confusion(tables, tmp_path / "confusion.png")
    plots.reliability(tables, tmp_path / "reliability.png")
    plots.iou_by_size(dict.fromkeys(names, sizes), 0.01, 0.05, tmp_path / "sizes.png")
    plots.comparison(overall, change, tmp_path / "comparison.png")
    for path in tmp_path.glob("*.png"):
        pixels = pixels_of(path)
        assert pixels.shape[1] == 130 * drawing.WIDTH
        edge = np.concatenate([pixels[[0, -1]].reshape(-1, 3), pixels[:, [0, -1]].reshape(-1, 3)])
        assert (edge == 255).all(), path.name
    for chart in ("sizes", "comparison"):
        pixels = pixels_of(tmp_path / f"{chart}.png")
        assert all(near(pixels, colour).sum() > 100 for colour in drawing.PALETTE[:6])
