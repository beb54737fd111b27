"""The page, looked at with a real browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.stats import binomtest

from adfm.cli import main
from adfm.data import shards
from adfm.errors import AdfmError
from adfm.evaluation import metrics, references, report
from adfm.evaluation.calibration import Calibration
from adfm.records import Box, Record

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WIDTH, HEIGHT = 901, 400
MINUS = "\N{MINUS SIGN}"
CATEGORIES = ("gear", '<b onclick="owned()">"quo\'ted" & new\nline</b>', "齿轮 ترس")
ATTACK = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">\u2028"


def record(number: int, size: tuple[int, int] = (WIDTH, HEIGHT), content: bytes | None = None) -> Record:
    """Image `number`; every second one is defective, with a box at a place of its own."""
    anomalous = number % 2 == 0
    x, y = 40 + 3 * (number % 200), 30 + number % 200
    category = CATEGORIES[number % 3]
    return Record(
        id=f"{number:016x}",
        image=content or jpeg(size, number % 5),
        mask=None,
        width=size[0],
        height=size[1],
        dataset="parts",
        category=category,
        defect=("scratch" if number % 4 else "Kratzer <i>") if anomalous else None,
        label="anomalous" if anomalous else "normal",
        boxes=(Box(x, y, x + 101, y + 57),) if anomalous else (),
        split="test",
        source=f'{category}/it\'s "{number:04d}" ñ\n.png',
        sha256="",
    )


@cache
def jpeg(size: tuple[int, int], seed: int) -> bytes:
    stream = io.BytesIO()
    shade = np.random.default_rng(seed).integers(0, 255, (size[1] // 8, size[0] // 8, 3), np.uint8)
    Image.fromarray(shade).resize(size).save(stream, "JPEG")
    return stream.getvalue()


def predictions(records: list[Record], right: float, seed: int) -> pd.DataFrame:
    """Answers of which a share `right` is right, the boxes a little off, and a few that cannot be read."""
    rng = np.random.default_rng(seed)
    rows = []
    for number, one in enumerate(records):
        said = (one.label == "anomalous") == (rng.random() < right)
        shift = float(rng.integers(0, 60))
        box = Box(50 + shift, 50, 150 + shift, 110) if not one.boxes else Box(*(np.add(one.boxes[0], shift)))
        words = f"<think>At {number}: [1, 2, 3, 4] {ATTACK}</think><rethink>Real? {number}</rethink>"
        completion = words + f"<answer>{'A' if said else 'B'}</answer>"
        unparseable = number % 17 == 3
        boxes = [box] if said and not unparseable else []
        of_regions = metrics.localize(one.boxes, [box], one.width, one.height)
        rows.append(
            {
                "id": one.id,
                "source": one.source,
                "dataset": one.dataset,
                "category": one.category,
                "defect": one.defect,
                "label": one.label,
                "predicted": None if unparseable else "anomalous" if said else "normal",
                "score": None if unparseable else round(float(rng.random() / 2 + said / 2), 6),
                **metrics.localize(one.boxes, boxes, one.width, one.height),
                "boxes": [list(b) for b in one.boxes],
                "predicted_boxes": [list(b) for b in boxes],
                "regions": [list(box)],
                **{f"region_{name}": of_regions[name] for name in metrics.COMPARED},
                "completion": f"{words} no answer" if unparseable else completion,
            }
        )
    return pd.DataFrame(rows)


def evaluated(folder: Path, tables: dict[str, pd.DataFrame], model: str = "none", at: float | None = 0.5) -> Path:
    """What evaluation writes, as far as the report reads it; the last table is the candidate's.

    Of answers that can be read those flagged have a score from 0.5 on: at that threshold decisions are the letters.
    """
    (folder / "calibration").mkdir(parents=True)
    *others, candidate = tables
    fitted = Calibration(threshold=at, limit={"overkill": 0.2}, images=80)
    for name in tables:
        file = folder / ("calibration.json" if name == candidate else f"calibration/{name}.json")
        file.write_text(fitted.model_dump_json())
    tables = {name: fitted.apply(table) for name, table in tables.items()}
    details = {name: metrics.summarize(table, 20, 0, 0.01, 0.05) for name, table in tables.items()}
    measured = {name: values.pop("overall") for name, values in details.items()}
    for name, each in tables.items():
        measured[name] |= metrics.operating_point(each, at, 20, 0)
    for other in reversed(others):
        measured[f"{candidate}_minus_{other}"] = metrics.difference(tables[candidate], tables[other], 20, 0)
    about = {
        "candidate": candidate,
        "models": dict.fromkeys(tables, model),
        "split": "test",
        "fingerprint": "f00d",
        "settings": {"small": 0.01, "large": 0.05, "overkill_limit": 0.2},
    }
    for name, content in (("evaluation", about), ("metrics", measured), ("details", details)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    for name, table in tables.items():
        table.to_parquet(folder / f"{'predictions' if name == candidate else name}.parquet")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of 150 images, in `report`, and what it was made from."""
    folder = tmp_path_factory.mktemp("reported")
    records = [record(number) for number in range(150)]
    (folder / "shards").mkdir()
    shards.write(records, folder / "shards", 100)
    (folder / "model").mkdir()
    curve = [f"{step},{0.1 * step},0.5,{0.1 * step - 0.5}" for step in range(1, 21)]
    header = "step,reward,rewards/format/mean,rewards/localization/mean"
    (folder / "model" / "reward_curves.csv").write_text("\n".join([header, *curve, "21,,,"]))
    shares = {"base": 0.4, "production": 0.6, "new": 0.8}
    tables = {name: predictions(records, right, seed) for seed, (name, right) in enumerate(shares.items())}
    evaluation = evaluated(folder / "evaluation", tables, str(folder / "model"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "_FILE_BYTES", 150_000)
        report.write(evaluation, folder / "shards", folder / "report")
    return folder


@pytest.fixture(scope="module")
def table(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "evaluation" / "predictions.parquet")


class Opened:
    """A page and all that went wrong with it or left the machine."""

    def __init__(self, browser: Browser, address: str, **look: Any) -> None:
        self.page = browser.new_page(**look)
        self.page.set_default_timeout(20_000)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)


@pytest.fixture
def opened(browser: Browser, folder: Path) -> Iterator[Opened]:
    opened = Opened(browser, (folder / "report" / "report.html").as_uri())
    yield opened
    assert opened.complaints == []
    assert all(url.startswith(("file:", "data:")) for url in opened.requests)
    opened.page.close()


def data_of(file: Path) -> Any:
    """What a page holds."""
    return json.loads(file.read_text(encoding="utf-8").partition('id="data">')[2].partition("</script>")[0])


def test_the_page_begins_with_the_reference_detector(browser: Browser, folder: Path, tmp_path: Path) -> None:
    words = f"The reference detector is better on this data. {ATTACK}"
    row = {metric: [0.75, 0.7, 0.8] for metric in references.METRICS}
    steps = [{"rule": "detector", "text": f"Use it. {ATTACK}"}]
    summary = {"model": "new is embedded.", "comparison": [words], "steps": steps}
    compared = {"rows": {"new": row, "always_A": row}, "sentence": words, "verdict": "detector", "summary": summary}
    shutil.copytree(folder / "evaluation", tmp_path / "evaluation")
    (tmp_path / "evaluation" / references.FILE).write_text(json.dumps(compared))
    report.write(tmp_path / "evaluation", folder / "shards", tmp_path / "report")
    page = Opened(browser, (tmp_path / "report" / "report.html").as_uri())
    lines = page.page.locator("#verdict li")
    model, comparison, step = lines.all_inner_texts()
    assert model == "new is embedded." and step.startswith("Next: Use it.")
    assert comparison.startswith("The reference detector is better on this data.")
    assert [lines.nth(place).get_attribute("class") for place in range(3)] == [None, "bad", None]
    rows = page.page.locator("#references tbody tr").all_inner_texts()
    assert (
        [text.split()[0] for text in rows] == ["new", "always"] and "0.750" in rows[1] and "[0.700, 0.800]" in rows[1]
    )
    assert page.complaints == [] and page.page.title() == "Evaluation of new"
    page.page.close()


def test_a_page_without_references_shows_none_of_them(opened: Opened) -> None:
    assert not opened.page.is_visible("#verdict") and not opened.page.is_visible("#references")


def test_the_rival_is_a_language_model_where_there_is_one(folder: Path, tmp_path: Path) -> None:
    records = [record(number) for number in range(12)]
    (tmp_path / "shards").mkdir()
    shards.write(records, tmp_path / "shards", 100)
    tables = {name: predictions(records, 0.7, 0) for name in ("sft", "detector", "trained")}
    evaluation = evaluated(tmp_path / "evaluation", tables)
    about = json.loads((evaluation / "evaluation.json").read_text()) | {"detector": "detector"}
    (evaluation / "evaluation.json").write_text(json.dumps(about))
    report.write(evaluation, tmp_path / "shards", tmp_path / "report")
    assert data_of(tmp_path / "report" / "report.html")["rival"] == "sft"


def choose(page: Page, gallery: str) -> None:
    page.locator(f"input[name=gallery][value={gallery}]").check()


def turn(page: Page, to: str = "next") -> None:
    """Turns the page and waits until it is the other one.

    By the keyboard: words that arrive in the cards move the button away from under a mouse.
    """
    before = page.inner_text("#page")
    page.press(f"#{to}", "Enter")
    page.wait_for_function("before => document.querySelector('#page').innerText !== before", arg=before)


def see_all(page: Page) -> None:
    """Waits until every card on the page has its picture; the window must be tall."""
    page.wait_for_function("[...document.querySelectorAll('article')].every(card => card.querySelector('img'))")


def positions(page: Page) -> list[str]:
    """The ids of the cards on the page."""
    return [text.rsplit(" · ", 1)[1] for text in page.locator("article .facts:last-of-type").all_inner_texts()]


def outcomes(table: pd.DataFrame) -> pd.Series:
    """The galleries' names, derived another way than in the report."""

    def gallery(row: Any) -> str:
        if row.label == "normal":
            return "passed" if row.predicted == "normal" else "overkill"
        if row.predicted != "anomalous":
            return "escapes"
        return "flagged" if np.isnan(row.iou) else "located" if row.iou >= 0.5 else "elsewhere"

    return pd.Series([gallery(row) for row in table.itertuples()], table.index)


def counts(page: Page) -> dict[str, int]:
    names = ("escapes", "overkill", "elsewhere", "located", "unparseable", "passed", "all")
    return {name: int(page.inner_text(f"[data-count={name}]").replace(",", "")) for name in names}


def expected_counts(table: pd.DataFrame) -> dict[str, int]:
    measured = outcomes(table).value_counts()
    names = ("escapes", "overkill", "elsewhere", "located", "passed")
    unparseable = int(table["predicted"].isna().sum())
    return {**{name: int(measured.get(name, 0)) for name in names}, "unparseable": unparseable, "all": len(table)}


# ------------------------------------------------------------------------------------------------- figures


def test_figures_are_those_of_the_metrics(opened: Opened, folder: Path) -> None:
    measured = json.loads((folder / "evaluation" / "metrics.json").read_text())
    page = opened.page
    header = page.locator("#headline thead th").all_inner_texts()
    assert header == ["Metric", "new", "production", "base", f"new {MINUS} production", f"new {MINUS} base"]
    rows = {re.split(r"[\n\t]", row)[0]: row for row in page.locator("#headline tbody tr").all_inner_texts()}
    new = measured["new"]
    assert f"{new['iou']:.3f}" in rows["IoU"] and f"[{new['iou_low']:.3f}, {new['iou_high']:.3f}]" in rows["IoU"]
    assert f"{100 * new['recall']:.1f}" in rows["recall, %"]
    change = measured["new_minus_production"]
    assert f"{change['accuracy']:+.1%}".rstrip("%").replace("-", MINUS) in rows["accuracy, %"]
    assert ("better" in rows["accuracy, %"].split("\t")[4]) == (change["accuracy_low"] > 0)
    first = [text.split("\n")[0] for text in page.locator("#headline tbody th").all_inner_texts()[:4]]
    assert first == ["escape rate at threshold, %", "overkill at threshold, %", "escape rate, %", "overkill, %"]
    assert f"{100 * new['miss_rate_at_threshold']:.1f} %" in page.inner_text("#tiles")


def test_the_page_has_the_operating_point(opened: Opened, folder: Path) -> None:
    new = json.loads((folder / "evaluation" / "metrics.json").read_text())["new"]
    rows = opened.page.locator("#headline tbody tr")
    row = rows.filter(has_text="from which on an image is flagged").first.inner_text()
    assert f"{new['threshold']:.3f}" in row
    words = opened.page.inner_text("#decides")
    assert "new: An image is flagged from a probability of 0.5 on, chosen on 80 validation images" in words
    assert "at most 20.0% of the normal images" in words
    assert f"{100 * new['miss_rate_at_threshold']:.1f}" in rows.filter(has_text="escape rate at threshold").inner_text()
    x, y = opened.page.locator(".chart circle").evaluate_all(
        "circles => { const ring = circles.filter(c => c.style.fill.includes('sheet')).pop();"
        "const grid = ring.ownerSVGElement.querySelectorAll('.grid');"
        "const [zero, one] = [grid[0], grid[4]].map(g => g.y1.baseVal.value), left = grid[0].x1.baseVal.value;"
        "const width = grid[0].x2.baseVal.value - left;"
        "return [(ring.cx.baseVal.value - left) / width, (ring.cy.baseVal.value - zero) / (one - zero)] }"
    )
    assert x == pytest.approx(new["overkill_at_threshold"], abs=1e-3)
    assert y == pytest.approx(1 - new["miss_rate_at_threshold"], abs=1e-3)


def test_galleries_are_of_decisions_and_cards_say_what_was_written(tmp_path: Path) -> None:
    records = [record(number) for number in range(60)]
    (tmp_path / "shards").mkdir()
    shards.write(records, tmp_path / "shards", 100)
    folder = evaluated(tmp_path / "evaluation", {"new": predictions(records, 0.7, 1)}, at=0.75)
    report.write(folder, tmp_path / "shards", tmp_path / "report")
    text = (tmp_path / "report" / "report.html").read_text()
    page = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    table = metrics.as_decided(pd.read_parquet(folder / "predictions.parquet")).set_index("id")
    written = pd.read_parquet(folder / "predictions.parquet").set_index("id")["predicted"]
    images = page["images"]
    letters = {"anomalous": "A", "normal": "B"}
    assert images["letter"] == [letters.get(written[key], "-") for key in images["id"]]
    flagged = [table["predicted"][key] == "anomalous" for key in images["id"]]
    assert [outcome in "elfo" for outcome in images["outcome"]] == flagged
    assert [bool(boxes) for boxes in images["predicted"]] == flagged
    assert (written == "anomalous").sum() > sum(flagged) == sum(row[1] for row in page["confusion"]["new"])
    assert sum(row[1] for row in page["written"]["new"]) == (written == "anomalous").sum()
    assert page["calibrations"]["new"]["threshold"] == 0.75
    assert sum(map(len, page["reliability"]["new"].values())) == 2 * metrics.BINS


def test_an_evaluation_of_before_there_were_thresholds_is_shown_by_its_letters(tmp_path: Path) -> None:
    records = [record(number) for number in range(40)]
    (tmp_path / "shards").mkdir()
    shards.write(records, tmp_path / "shards", 100)
    folder = evaluated(tmp_path / "evaluation", {"new": predictions(records, 0.7, 1)}, at=None)
    (folder / "calibration.json").unlink()
    table = pd.read_parquet(folder / "predictions.parquet")
    old = [c for c in table if not c.startswith("region") and c not in ("decision", "probability")]
    table[old].to_parquet(folder / "predictions.parquet")
    report.write(folder, tmp_path / "shards", tmp_path / "report")
    text = (tmp_path / "report" / "report.html").read_text()
    assert "The letter decides: there is no threshold." in text


def test_what_the_gate_judges_comes_first_with_exact_limits(opened: Opened, table: pd.DataFrame, folder: Path) -> None:
    page = opened.page
    assert page.locator("#compared thead th").all_inner_texts() == [
        *("Metric", "new", "production", f"new {MINUS} production", "images")
    ]
    rows = [re.split(r"[\n\t]+", row) for row in page.locator("#compared tbody tr").all_inner_texts()]
    assert [row[0] for row in rows] == ["escape rate, %", "overkill, %", "accuracy, %", "IoU, %"]
    defects = table[table["label"] == "anomalous"]
    escaped = int((defects["predicted"] != "anomalous").sum())
    exact = binomtest(escaped, len(defects)).proportion_ci(0.95, "exact")
    assert rows[0][1:4] == [
        "of anomalous images",
        f"{100 * escaped / len(defects):.1f}",
        f"[{100 * exact.low:.1f}, {100 * exact.high:.1f}]",
    ]
    assert rows[0][-1] == str(len(defects))
    before = pd.read_parquet(folder / "evaluation" / "production.parquet").set_index("id")["predicted"][table["id"]]
    change = ((table["predicted"] == table["label"]).mean()) - (before.to_numpy() == table["label"]).mean()
    assert f"{100 * change:+.1f}" in rows[2][6]
    # The note says what counts as located.
    assert "overlap the true ones with an IoU of at least 0.5" in page.inner_text("main")
    hits, with_boxes = (outcomes(table) == "located").sum(), defects["iou"].notna().sum()
    assert f"{hits} of {with_boxes} defective parts with boxes are flagged" in page.inner_text("#tiles")


def test_a_perfect_model_is_not_shown_as_certain(tmp_path: Path) -> None:
    records = [record(number) for number in range(128)]
    (tmp_path / "shards").mkdir()
    shards.write(records, tmp_path / "shards", 200)
    table = predictions(records, 1.0, 1)
    perfect = table.assign(predicted=table["label"], score=np.where(table["label"] == "anomalous", 0.9, 0.1))
    report.write(evaluated(tmp_path / "evaluation", {"new": perfect}), tmp_path / "shards", tmp_path / "report")
    page = data_of(tmp_path / "report" / "report.html")
    most = 1 - 0.025 ** (1 / 64)
    for title, row in zip(("escape rate", "overkill"), page["compared"], strict=False):
        assert (row["title"], row["images"]) == (title, 64)
        assert row["cells"] == [pytest.approx([0, 0, most])]
    assert page["metrics"]["new"]["miss_rate_at_threshold"] == pytest.approx([0, 0, most])


def test_the_curve_of_detection_names_a90_with_its_limit_or_why_not(tmp_path: Path, browser: Browser) -> None:
    records = [record(number) for number in range(400)]
    (tmp_path / "shards").mkdir()
    shards.write(records, tmp_path / "shards", 500)
    rng = np.random.default_rng(0)
    table = predictions(records, 1.0, 1)
    side = np.exp(rng.uniform(np.log(10), np.log(200), len(table)))
    share = side**2 / (WIDTH * HEIGHT)
    flagged = rng.random(len(table)) < 1 / (1 + np.exp(-4 * np.log(side / 40)))
    anomalous = table["label"] == "anomalous"
    table["area_share"] = np.where(anomalous, share, np.nan)
    table["predicted"] = np.where(anomalous & flagged, "anomalous", "normal")
    table["score"] = np.where(table["predicted"] == "anomalous", 0.9, 0.1)
    blind = table.assign(predicted="normal", score=0.1)
    report.write(
        evaluated(tmp_path / "evaluation", {"blind": blind, "new": table}), tmp_path / "shards", tmp_path / "r"
    )
    measured = data_of(tmp_path / "r" / "report.html")["detection"]
    new = measured["new"]
    assert new["side"]["a50"] == pytest.approx(40, rel=0.15)
    assert new["side"]["a90"] == pytest.approx(40 * 9**0.25, rel=0.2)
    for name, pixels in new["side"].items():
        assert new[name] * WIDTH * HEIGHT == pytest.approx(pixels**2, rel=1e-3)
    assert new["a50"] < new["a90"] < new["a90_95"]
    opened = Opened(browser, (tmp_path / "r" / "report.html").as_uri())
    rows = opened.page.locator("#detection tbody tr").all_inner_texts()
    assert "{:.3g} %".format(100 * new["a90_95"]) in rows[0]
    assert "{:.3g} px square".format(new["side"]["a90_95"]) in rows[0]
    assert "0 of 200 defects are detected; a curve needs 10 hits and 10 misses." in rows[1]
    chart = opened.page.locator(".chart", has_text="Probability of detection")
    assert chart.locator("path").count() == 2  # the curve and its lower limit
    assert opened.complaints == []
    opened.page.close()


def test_fewer_misses_are_called_better(opened: Opened, folder: Path) -> None:
    change = json.loads((folder / "evaluation" / "metrics.json").read_text())["new_minus_base"]
    assert change["miss_rate_high"] < 0 and change["recall_low"] > 0
    rows = opened.page.locator("#headline tbody tr")
    for title in ("escape rate", "recall"):
        assert "▲ better" in rows.filter(has_text=f"{title}, %").locator("td").last.inner_text()


def test_confusion_counts_every_answer(opened: Opened, table: pd.DataFrame) -> None:
    for kind, column in (("written", "predicted"), ("decided", "decision")):
        cells = opened.page.locator(f'[data-model="new"][data-kind="{kind}"] td').all_inner_texts()
        said = table[column].fillna("unparseable")
        shown = pd.crosstab(table["label"], said).loc[["normal", "anomalous"], ["normal", "anomalous", "unparseable"]]
        assert [int(cell.split()[0]) for cell in cells] == shown.to_numpy().ravel().tolist()


def test_kinds_of_defects_are_a_table_with_their_names_as_text(browser: Browser, tmp_path: Path) -> None:
    records = [replace(record(number), defect=("dent", ATTACK)[number % 4 // 2]) for number in range(0, 24, 2)]
    table = predictions(records, 0.9, 1)
    table = table.assign(kind=table["defect"], predicted_kind=["dent"] * len(table))
    folder = evaluated(tmp_path / "evaluation", {"old": predictions(records, 0.8, 2), "new": table}, at=None)
    measured = json.loads((folder / "metrics.json").read_text())
    (tmp_path / "shards").mkdir()
    shards.write(records, tmp_path / "shards", 100)
    report.write(folder, tmp_path / "shards", folder / "report")
    opened = Opened(browser, (folder / "report" / "report.html").as_uri())
    cells = opened.page.locator('[data-model="new"][data-kind="kinds"] td').all_inner_texts()
    _, columns, counts = metrics.kinds_confusion(table).values()
    assert [int(cell.split()[0]) for cell in cells] == np.ravel(counts).tolist() and len(columns) == 4
    assert opened.page.locator('[data-model="old"][data-kind="kinds"]').count() == 0
    assert metrics.NO_NORMAL_IMAGE in opened.page.inner_text("#about")
    assert "kind right" in opened.page.inner_text("#tiles") and "escapes" not in opened.page.inner_text("#tiles")
    assert measured["new"]["kind_right"] is not None and opened.complaints == []
    opened.page.close()


def test_curves_are_drawn_for_each_model(opened: Opened) -> None:
    titles = opened.page.locator(".chart figcaption").all_inner_texts()
    lines = [chart.locator("path").count() for chart in opened.page.locator(".chart").all()]
    assert dict(zip(titles, lines, strict=True)) == {
        "ROC curve": 3,
        "Precision and recall": 3,
        "Reliability": 5,  # one a model, the candidate's raw score, the diagonal
        "Localisation by size of the defect": 0,
        **{f"Reward in training: {name}": 2 for name in ("reward", "format", "localization")},  # smoothed, and raw
    }
    assert opened.page.locator(".chart").nth(3).locator("rect").count() % 3 == 0


# ----------------------------------------------------------------------------------------------- galleries


def test_galleries_hold_what_they_say(opened: Opened, table: pd.DataFrame) -> None:
    page, known = opened.page, outcomes(table).set_axis(table["id"])
    assert counts(page) == expected_counts(table)
    for gallery in ("escapes", "overkill", "elsewhere", "located", "passed"):
        choose(page, gallery)
        shown = positions(page)
        assert len(shown) == min(24, (known == gallery).sum())
        assert set(known[shown]) == {gallery}
        assert page.inner_text("#status") == f"{(known == gallery).sum()} of 150 images"
    iou = table.set_index("id")["iou"]
    for gallery, rising in (("elsewhere", True), ("located", False)):
        choose(page, gallery)
        ordered = iou[known == gallery].sort_values(ascending=rising)
        assert iou[positions(page)].tolist() == pytest.approx(ordered.head(24).tolist(), abs=1e-3)


def test_changed_images_are_shown_with_both_answers(opened: Opened, folder: Path, table: pd.DataFrame) -> None:
    page = opened.page
    before = pd.read_parquet(folder / "evaluation" / "production.parquet").set_index("id")["predicted"]
    now = table.set_index("id")["predicted"]
    changed = now.index[now.fillna("-") != before[now.index].fillna("-")]
    assert int(page.inner_text("[data-count=changed]")) == len(changed) > 0
    choose(page, "changed")
    seen = positions(page)
    while page.locator("#next").is_enabled():
        turn(page)
        seen += positions(page)
    assert sorted(seen) == sorted(changed)
    label = table.set_index("id")["label"]
    escapes = [label[key] == "anomalous" and now[key] != "anomalous" for key in seen]
    assert escapes == sorted(escapes, reverse=True)  # first
    page.fill("input[name=text]", seen[0])
    card = page.locator("article").inner_text()
    was = before[seen[0]] if isinstance(before[seen[0]], str) else "no clean answer"
    assert f"changed: {was} by production" in card


def test_filters_filter(opened: Opened, folder: Path, table: pd.DataFrame) -> None:
    page = opened.page
    choose(page, "all")
    for category in CATEGORIES:
        page.locator("select[name=category]").select_option(index=1 + sorted(CATEGORIES).index(category))
        assert counts(page) == expected_counts(table[table["category"] == category])
    page.locator("select[name=category]").select_option(index=0)

    page.fill("input[name=text]", '"0042" Ñ')
    assert positions(page) == [f"{42:016x}"]
    page.fill("input[name=text]", f"{77:016X}")
    assert positions(page) == [f"{77:016x}"]
    page.fill("input[name=text]", "no such image")
    assert positions(page) == [] and page.inner_text("#status") == "0 of 150 images"
    page.fill("input[name=text]", "")

    production = pd.read_parquet(folder / "evaluation" / "production.parquet")
    right, was_right = (each["predicted"] == each["label"] for each in (table, production))
    for option, chosen in (("wrong production", was_right & ~right), ("right production", right & ~was_right)):
        page.locator("select[name=change]").select_option(option)
        assert counts(page) == expected_counts(table[chosen]) and chosen.any()


def test_pages_show_every_image_once(opened: Opened, table: pd.DataFrame) -> None:
    page = opened.page
    choose(page, "all")
    seen = positions(page)
    while page.locator("#next").is_enabled():
        turn(page)
        seen += positions(page)
    assert sorted(seen) == sorted(table["id"]) and len(seen) == 150
    turn(page, "previous")
    assert "page 6 of 7" in page.inner_text("#pages")


def test_a_category_of_the_table_shows_its_images(opened: Opened, table: pd.DataFrame) -> None:
    opened.page.locator("#groups button").last.click()
    chosen = table["category"] == sorted(CATEGORIES)[-1]
    opened.page.get_by_text(f"{chosen.sum()} of 150 images", exact=True).wait_for()


# ---------------------------------------------------------------------------------------- pictures and words


def look_up(page: Page, key: str) -> Any:
    """The card of an image, when its picture is there."""
    choose(page, "all")
    page.fill("input[name=text]", key)
    card = page.locator("article")
    card.scroll_into_view_if_needed()
    card.locator("img").wait_for()
    return card


# Left, top, width and height of a card's picture, its true and its predicted box, at one moment: a page may scroll.
STANDING = """card => {
    const { x, y, width, height } = card.querySelector("img").getBoundingClientRect();
    const boxes = [...card.querySelectorAll("rect.truth, rect.predicted")].map(rect => {
        const m = rect.getScreenCTM(), b = rect.getBBox();
        return [m.a * b.x + m.e, m.d * b.y + m.f, m.a * b.width, m.d * b.height];
    });
    return [[x, y, width, height], ...boxes];
}"""


@pytest.mark.parametrize("look", [(1280, 1), (390, 3), (700, 1.5)])
def test_boxes_stand_where_they_should(browser: Browser, folder: Path, table: pd.DataFrame, look: Any) -> None:
    size = {"viewport": {"width": look[0], "height": 900}, "device_scale_factor": look[1]}
    opened = Opened(browser, (folder / "report" / "report.html").as_uri(), **size)
    for row in table[(table["predicted"] == "anomalous") & (table["label"] == "anomalous")].tail(2).itertuples():
        card = look_up(opened.page, row.id)
        for enlarged in (False, True):
            if enlarged:
                card.locator("button").click()
                card.locator("button[aria-expanded=true]").wait_for()
            frame, *boxes = card.evaluate(STANDING)
            left, top, width, height = frame
            assert width / height == pytest.approx(WIDTH / HEIGHT, rel=0.01)
            for box, (x1, y1, x2, y2) in zip(boxes, (row.boxes[0], row.predicted_boxes[0]), strict=True):
                x1, x2, y1, y2 = min(x1, WIDTH), min(x2, WIDTH), min(y1, HEIGHT), min(y2, HEIGHT)
                across, down = width / WIDTH, height / HEIGHT
                expected = [left + x1 * across, top + y1 * down, (x2 - x1) * across, (y2 - y1) * down]
                assert box == pytest.approx(expected, abs=0.6)
    assert opened.complaints == []
    opened.page.close()


def test_boxes_can_be_hidden(opened: Opened, table: pd.DataFrame) -> None:
    card = look_up(opened.page, table["id"][0])
    assert card.locator("svg").is_visible()
    opened.page.uncheck("input[name=boxes]")
    assert not opened.page.locator("article svg").is_visible()


def test_pictures_are_small_and_whole(opened: Opened, table: pd.DataFrame) -> None:
    for key in (table["id"].iloc[0], table["id"].iloc[-1]):
        image = look_up(opened.page, key).locator("img")
        image.evaluate("image => image.decode()")
        assert image.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [
            512,
            round(512 * HEIGHT / WIDTH),
        ]


def test_the_reasoning_stands_beside_the_picture(opened: Opened, table: pd.DataFrame) -> None:
    for number in (2, 149):  # of the page itself, and of a file
        row = table.iloc[number]
        text = look_up(opened.page, row["id"]).locator(".words").inner_text()
        assert f"At {number}: [1, 2, 3, 4] </script><script>document.title = 'owned'" in text
        assert f"Real? {number}" in text
        assert ("A: a defect" if row["predicted"] == "anomalous" else "B: no defect") in text
    assert opened.page.locator("pre").count() == 0


def test_an_unparseable_answer_is_shown_as_written(opened: Opened, table: pd.DataFrame) -> None:
    row = table[table["predicted"].isna()].iloc[0]
    card = look_up(opened.page, row["id"])
    assert "no clean answer" in card.inner_text()
    assert card.locator("pre").text_content() == row["completion"]


def test_what_comes_from_models_and_data_stays_text(opened: Opened, table: pd.DataFrame) -> None:
    page = opened.page
    scripts = page.locator("script").count()
    for number in (0, 1, 3):
        row = table.iloc[number]
        card = look_up(page, row["id"])
        assert row["category"] in card.locator("h3").text_content()
        assert row["source"] in card.locator(".facts").last.text_content()
        assert row["source"] in card.locator("img").get_attribute("alt")
        assert card.locator("b, i, script, img[src=x]").count() == 0
        names = card.locator("bdi").all_text_contents()  # direction marks in a name end with it
        assert row["category"] in names and row["source"] in names
    assert page.title() == "Evaluation of new"
    assert page.locator("#groups b, select b").count() == 0
    assert page.locator("script").count() == scripts
    assert page.locator("select[name=category] option").all_text_contents()[1:] == sorted(CATEGORIES)


def test_pictures_are_loaded_when_they_come_into_view(opened: Opened, folder: Path) -> None:
    files = sorted((folder / "report" / "images").iterdir())
    assert len(files) > 3

    def asked() -> int:
        return len({url for url in opened.requests if "/images/" in url})

    assert asked() == 0  # the first cards of the first gallery are in the page
    opened.page.set_viewport_size({"width": 1280, "height": 20_000})
    choose(opened.page, "all")
    see_all(opened.page)
    while opened.page.locator("#next").is_enabled():
        turn(opened.page)
        see_all(opened.page)
    assert asked() == len(files)


def test_files_that_were_dropped_are_loaded_again(
    browser: Browser, folder: Path, table: pd.DataFrame, tmp_path: Path
) -> None:
    shutil.copytree(folder / "report", tmp_path / "report")
    page = tmp_path / "report" / "report.html"
    text = page.read_text(encoding="utf-8")
    assert "MOST_FILES = 40" in text
    page.write_text(text.replace("MOST_FILES = 40", "MOST_FILES = 1"), encoding="utf-8")
    opened = Opened(browser, page.as_uri())
    for _ in range(2):
        for key in table["id"].iloc[[0, 60, 100, 149]]:
            look_up(opened.page, key)
    assert opened.complaints == []
    opened.page.close()


def test_the_page_alone_shows_the_first_of_each_gallery(
    browser: Browser, folder: Path, table: pd.DataFrame, tmp_path: Path
) -> None:
    """As in the viewers of MLflow and Kubeflow: a sandbox that runs scripts and has no address."""
    page = browser.new_page(viewport={"width": 1280, "height": 20_000})
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    text = (folder / "report" / "report.html").read_text(encoding="utf-8")
    page.set_content('<iframe sandbox="allow-scripts" width="1200" height="20000"></iframe>')
    page.locator("iframe").evaluate("(frame, text) => { frame.srcdoc = text }", text)
    frame = page.frame_locator("iframe")
    for gallery in ("escapes", "overkill", "changed", "elsewhere", "located", "unparseable"):
        frame.locator(f"input[value={gallery}]").check()
        frame.locator("article").first.locator("img").wait_for()
    frame.locator("input[value=all]").check()
    frame.locator(".missing").first.wait_for()
    assert "beside the page" in frame.locator(".missing").first.inner_text()
    assert complaints == []
    page.close()

    # Moved away from its pictures, on a disk: the browser itself notes the missing file, nothing else happens.
    shutil.copy(folder / "report" / "report.html", tmp_path)
    opened = Opened(browser, (tmp_path / "report.html").as_uri())
    choose(opened.page, "all")
    opened.page.locator("article").last.scroll_into_view_if_needed()
    opened.page.locator(".missing").first.wait_for()
    assert all("ERR_FILE_NOT_FOUND" in complaint for complaint in opened.complaints)
    opened.page.close()


# ---------------------------------------------------------------------------------------------- who looks


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_sticks_out_sideways(browser: Browser, folder: Path, width: int) -> None:
    opened = Opened(browser, (folder / "report" / "report.html").as_uri(), viewport={"width": width, "height": 800})
    choose(opened.page, "all")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    opened.page.close()


def test_dark_mode_is_dark(browser: Browser, folder: Path) -> None:
    for scheme, dark in (("light", False), ("dark", True)):
        opened = Opened(browser, (folder / "report" / "report.html").as_uri(), color_scheme=scheme)
        for element, property_, brighter in (("body", "backgroundColor", not dark), ("body", "color", dark)):
            value = opened.page.locator(element).evaluate(f"e => getComputedStyle(e).{property_}")
            red = int(value.removeprefix("rgb(").split(",")[0])
            assert (red > 127) == brighter
        opened.page.close()


def test_it_can_be_used_by_keyboard_and_read_aloud(opened: Opened) -> None:
    page = opened.page
    page.locator("input[name=gallery]:checked").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("input[name=gallery][value=overkill]").is_checked()
    page.locator("article img").first.wait_for()
    picture = page.locator(".picture").first
    picture.focus()
    page.keyboard.press("Enter")
    assert picture.get_attribute("aria-expanded") == "true"
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, select')].filter(e => !e.labels.length || !e.labels[0].innerText.trim())"
        ".length"
    )
    assert unnamed == 0
    assert page.evaluate("[...document.querySelectorAll('article img')].every(image => image.alt)")
    assert page.get_by_role("status").inner_text()
    roles = {
        "Category": "combobox",
        "Change": "combobox",
        "Find in id and source": "searchbox",
        "Show boxes": "checkbox",
    }
    for name, role in roles.items():
        assert page.get_by_role(role, name=name, exact=True).count() == 1
    assert page.locator("th:not([scope])").count() == 0


# ---------------------------------------------------------------------------------------------- large, and odd


def test_ten_thousand_images(browser: Browser, tmp_path: Path) -> None:
    content = jpeg((64, 32), 0)
    few = [record(number, (64, 32), content) for number in range(200)]
    names = [f"{one.source}-{turn}" for turn in range(50) for one in few]
    (tmp_path / "shards").mkdir()
    many = (replace(few[i % 200], id=f"{i:016x}", source=name) for i, name in enumerate(names))
    shards.write(many, tmp_path / "shards", 5000)
    tables = {}
    for seed, (name, right) in enumerate({"base": 0.5, "new": 0.8}.items()):
        tables[name] = pd.concat([predictions(few, right, seed)] * 50, ignore_index=True)
        ids = [f"{i:016x}" for i in range(10_000)]
        tables[name] = tables[name].assign(id=ids, source=names, completion=f"<think>{'…' * 600}</think>" * 2)
    table = tables["new"]
    evaluation = evaluated(tmp_path / "evaluation", tables)
    report.write(evaluation, tmp_path / "shards", tmp_path / "report")
    assert (tmp_path / "report" / "report.html").stat().st_size < 5_000_000
    files = list((tmp_path / "report" / "images").iterdir())
    assert len(files) < 100

    look = {"viewport": {"width": 390, "height": 800}}
    opened = Opened(browser, (tmp_path / "report" / "report.html").as_uri(), **look)
    page = opened.page
    assert page.inner_text("#about").startswith("10,000 images")
    assert counts(page) == expected_counts(table)
    choose(page, "all")
    for _ in range(3):
        for card in (page.locator("article").nth(12), page.locator("article").last):
            card.scroll_into_view_if_needed()
            card.locator("img").wait_for()
        turn(page)
    assert page.inner_text("#page") == "page 4 of 417"
    assert page.locator("article").count() == 24
    assert opened.complaints == []
    page.close()


def test_what_is_missing_is_hidden(browser: Browser, folder: Path, table: pd.DataFrame, tmp_path: Path) -> None:
    """One model alone, on good parts only, without scores."""
    normal = table[table["label"] == "normal"].assign(score=np.nan, predicted=None, completion="")
    evaluation = evaluated(tmp_path / "evaluation", {"new": normal})
    report.write(evaluation, folder / "shards", tmp_path / "report")
    opened = Opened(browser, (tmp_path / "report" / "report.html").as_uri())
    assert opened.page.locator(".chart").count() == 0
    # An answer that cannot be read does not pass a good part.
    assert opened.page.locator("input[value=overkill]").is_checked()
    assert counts(opened.page)["unparseable"] == len(normal)
    opened.page.locator("article").first.scroll_into_view_if_needed()
    opened.page.locator("article img").first.wait_for()
    assert "(nothing)" in opened.page.locator("article").first.inner_text()
    assert not opened.page.locator("#changes").is_visible()
    assert opened.complaints == []
    opened.page.close()


def test_the_page_keeps_its_size_with_large_pictures(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_EMBEDDED_BYTES", 100_000)
    report.write(folder / "evaluation", folder / "shards", tmp_path / "report")
    smaller, larger = ((at / "report.html").stat().st_size for at in (tmp_path / "report", folder / "report"))
    assert smaller < larger - 100_000
    text = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    page = json.loads(text.split('id="data">')[1].split("</script>")[0])
    held = sum(len(base64.b64decode(row[0])) for row in page["embedded"])
    assert 0 < held < 100_000 and page["starts"][0] == len(page["embedded"])


def test_the_same_evaluation_gives_the_same_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_FILE_BYTES", 150_000)
    report.write(folder / "evaluation", folder / "shards", tmp_path / "again")
    files = sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*.*"))
    assert len(files) > 1
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (folder / "report" / file).read_bytes()


@pytest.mark.parametrize(
    "name", ["evaluation.json", "metrics.json", "details.json", "predictions.parquet", "base.parquet"]
)
@pytest.mark.parametrize("content", [None, "{}", "[1]"])
def test_an_evaluation_that_is_not_whole_is_refused(
    folder: Path, tmp_path: Path, name: str, content: str | None
) -> None:
    shutil.copytree(folder / "evaluation", tmp_path / "evaluation")
    if content is None:
        (tmp_path / "evaluation" / name).unlink()
    else:
        (tmp_path / "evaluation" / name).write_text(content)
    with pytest.raises(AdfmError, match="adfm evaluate"):
        report.write(tmp_path / "evaluation", folder / "shards", tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_the_verb_writes_a_page_and_replaces_its_own(folder: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert (
            main(["report", *(str(each) for each in (folder / "evaluation", folder / "shards", tmp_path / "out"))]) == 0
        )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["images", "report.html"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(AdfmError, match="did not write"):
        report.write(folder / "evaluation", folder / "shards", tmp_path / "other")


def test_other_shards_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    shards.write([record(number) for number in range(140)], tmp_path / "shards", 100)
    with pytest.raises(AdfmError, match=f"10 of the 150 .*{140:016x}"):
        report.write(folder / "evaluation", tmp_path / "shards", tmp_path / "report")
    assert list(tmp_path.iterdir()) == [tmp_path / "shards"]


def test_the_notes_on_tiles_follow_the_stages() -> None:
    form = "<think>Here.</think><rethink>So.</rethink><answer>A</answer>"
    assert report._stages(form) == ["Here.", "So.", None]
    assert report._stages(f"{form}\nOn tile 1 of 4: a dent.") == ["Here.", "So.", "On tile 1 of 4: a dent."]
    assert report._stages("neither") == [None, None, "neither"]
