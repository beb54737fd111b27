from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.distance import jensenshannon

from adfm import tracking
from adfm.data import shards
from adfm.errors import AdfmError
from adfm.params import Params
from adfm.records import SPLITS, Box, Record
from adfm.validation import drift, suite, validate
from adfm.validation import page as page_

# Great Expectations imports modules that Python has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:module 'sre_:DeprecationWarning")

LIMITS = {"min_side": 16, "max_side": 64, "max_aspect": 2.0, "min_images_per_split": 8, "min_label_share": 0.25}
PARAMS = Params.model_validate({"validation": LIMITS})
DEFECTS = ((4, 6, 12, 10), (20, 20, 29, 25))  # x1, y1, x2, y2 of a 32x32 mask


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def picture(name: str, width: int = 32, height: int = 32) -> bytes:
    seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
    return png(np.random.default_rng(seed).integers(0, 256, (height, width, 3)))


def faded(name: str, levels: int, side: int = 32) -> bytes:
    """The picture with fewer levels of grey: for a person the same one."""
    with Image.open(io.BytesIO(picture(name, side, side))) as file:
        return png(np.asarray(file, float) * levels / 255)


def blank(*corner: int, name: str = "blank") -> bytes:
    """A picture with a part of one colour."""
    with Image.open(io.BytesIO(picture(name))) as file:
        file.paste((90, 90, 90), corner)
        return png(np.asarray(file))


def stored_otherwise(name: str) -> bytes:
    """The same pixels in another file."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(picture(name))) as file:
        file.save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def drawn(*boxes: tuple[int, int, int, int], size: int = 32) -> bytes:
    mask = np.zeros((size, size))
    for x1, y1, x2, y2 in boxes:
        mask[y1:y2, x1:x2] = 255
    return png(mask)


def record(name: str, **changes: Any) -> Record:
    """A faultless record; its name is split/category/label/number."""
    split, category, label, _ = name.split("/")
    anomalous = label == "anomalous"
    image = picture(name)
    faultless = Record(
        id=name,
        image=image,
        mask=drawn(*DEFECTS) if anomalous else None,
        width=32,
        height=32,
        dataset="parts",
        category=category,
        defect="scratch" if anomalous else None,
        label="anomalous" if anomalous else "normal",
        boxes=tuple(Box(*map(float, box)) for box in DEFECTS) if anomalous else (),
        split=split,  # type: ignore[arg-type]
        source=f"{name}.png",
        sha256=hashlib.sha256(image).hexdigest(),
    )
    return replace(faultless, **changes)


def faultless() -> dict[str, Record]:
    names = [
        f"{split}/{category}/{label}/{number}"
        for split in SPLITS
        for category in ("gear", "weave")
        for label in ("normal", "anomalous")
        for number in range(2)
    ]
    return {name: record(name) for name in names}


def written(records: dict[str, Record], folder: Path) -> Path:
    folder.mkdir()
    shards.write(records.values(), folder, shard_images=1000)
    return folder


def run(folder: Path, out: Path, params: Params = PARAMS) -> tuple[bool, dict[str, Any]]:
    passed = validate.judge(folder, out, params)
    return passed, json.loads((out / "validation.json").read_text())


def failed(report: dict[str, Any]) -> dict[str, list[str]]:
    return {entry["what"]: entry["ids"] for entry in report["expectations"] if not entry["success"]}


def test_a_faultless_set_passes_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    passed, report = run(written(faultless(), tmp_path / "shards"), tmp_path / "report")
    assert passed and report["passed"] and validate.failures(tmp_path / "report") == []
    assert all(entry["success"] for entry in report["expectations"])
    assert report["statistics"]["images"] == 24 and report["statistics"]["categories"] == 2
    assert report["statistics"]["splits"] == {split: {"normal": 4, "anomalous": 4} for split in SPLITS}
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["index.html", "validation.json"]
    assert ">0.5<" in (tmp_path / "report" / "index.html").read_text()  # the share that was observed
    assert capfd.readouterr() == ("", "")


# One fault a record, so that each expectation must name exactly its own records.
def boxed(*boxes: tuple[float, float, float, float]) -> dict[str, Any]:
    return {"boxes": tuple(Box(*box) for box in boxes)}


FAULTS: dict[str, dict[str, Any]] = {
    "train/gear/normal/no id": {"id": None},
    "train/gear/normal/no dataset": {"dataset": None},
    "train/gear/normal/no category": {"category": None},
    "train/gear/normal/no label": {"label": None},
    "train/gear/normal/no source": {"source": None},
    "train/gear/normal/no sha256": {"sha256": None},
    "train/gear/normal/no width": {"width": None},
    "train/gear/normal/no height": {"height": None},
    "train/gear/normal/double 1": {"id": "double"},
    "train/gear/normal/double 2": {"id": "double"},
    "train/gear/normal/unknown label": {"label": "broken"},
    "train/gear/normal/damaged": {"image": picture("damaged")[:-200]},
    "train/gear/normal/empty": {"image": b""},
    "train/gear/normal/other size": {"image": picture("other size", 32, 31)},
    "train/gear/normal/narrow": {"image": picture("narrow", 15, 30), "width": 15, "height": 30},
    "train/gear/normal/low": {"image": picture("low", 30, 15), "width": 30, "height": 15},
    "train/gear/normal/wide": {"image": picture("wide", 65, 40), "width": 65, "height": 40},
    "train/gear/normal/high": {"image": picture("high", 40, 65), "width": 40, "height": 65},
    "train/gear/normal/long": {"image": picture("long", 20, 41), "width": 20, "height": 41},
    "train/gear/normal/has box": boxed((1, 1, 9, 9)),
    "train/gear/normal/has defect": {"defect": "scratch"},
    "train/gear/normal/has mask": {"mask": drawn(DEFECTS[0])},
    "train/gear/normal/empty mask is fine": {"mask": drawn()},
    "train/gear/anomalous/no mask is fine": {"mask": None},
    "train/gear/anomalous/no boxes": {"boxes": ()},
    "train/gear/anomalous/label alone is noticed": {"boxes": (), "mask": None},
    "train/gear/anomalous/whole image": {"mask": drawn((0, 0, 32, 32)), **boxed((0, 0, 32, 32))},
    "train/gear/anomalous/blank part": {
        "image": blank(3, 5, 13, 11),
        "mask": drawn(DEFECTS[0]),
        **boxed(DEFECTS[0]),
    },
    "train/gear/anomalous/thin": {"mask": drawn((4, 6, 5, 12)), **boxed((4, 6, 5, 12))},
    "train/gear/anomalous/file": {"defect": "file"},
    "train/0001.JPG/normal/category": {},
    "train/gear/normal/black": {"image": png(np.full((32, 32, 3), 3))},
    "train/gear/normal/white": {"image": png(np.full((32, 32, 3), 255))},
    "train/gear/normal/two labels": {"image": picture("two labels")},
    "train/gear/anomalous/two labels": {"image": picture("two labels")},
    "train/gear/normal/near, and another label": {"image": faded("near", 200)},
    "train/gear/anomalous/near, and another label": {"image": faded("near", 198)},
    "train/gear/anomalous/no defect": {"defect": None},
    "train/gear/anomalous/outside": boxed(*DEFECTS, (20, 20, 33, 30)),
    "train/gear/anomalous/negative": boxed(*DEFECTS, (-1, 20, 30, 30)),
    "train/gear/anomalous/not a number": boxed((float("nan"), 1, 1, 1)),
    "train/gear/anomalous/no area": boxed(*DEFECTS, (20, 20, 20, 30)),
    "train/gear/anomalous/inverted": boxed(*DEFECTS, (30, 20, 20, 30)),
    "train/gear/anomalous/damaged mask": {"mask": drawn(*DEFECTS)[:-30]},
    "train/gear/anomalous/small mask": {"mask": drawn(*DEFECTS, size=31)},
    "train/gear/anomalous/colour mask": {"mask": picture("colour mask")},
    "train/gear/anomalous/empty mask": {"mask": drawn()},
    "train/gear/anomalous/box beside": boxed(*DEFECTS, (12, 10, 20, 20)),
    "train/gear/anomalous/inclusive": boxed((4, 6, 11, 9), (20, 20, 28, 24)),
    "train/gear/anomalous/part of a pixel is fine": boxed((4.9, 6.5, 11.1, 9.2), (20, 20, 29, 25)),
    "train/gear/anomalous/crossing shapes are fine": {
        "mask": drawn((4, 6, 20, 10), (10, 2, 14, 16)),
        **boxed((4, 6, 20, 10), (10, 2, 14, 16)),
    },
    "train/gear/anomalous/one missing": boxed(DEFECTS[1]),
    "train/gear/anomalous/merged is fine": boxed((4, 6, 29, 25)),
    "train/gear/anomalous/speck is fine": {"mask": drawn(*DEFECTS, (0, 0, 3, 1))},
    "train/gear/normal/leak": {"image": picture("leak")},
    "test/gear/normal/leak": {"image": stored_otherwise("leak")},
    "train/gear/normal/twin": {"image": faded("twin", 200)},
    "validation/gear/normal/twin": {"image": faded("twin", 198)},
    "train/gear/normal/twin in train is fine 1": {"image": faded("other twin", 200)},
    "train/gear/normal/twin in train is fine 2": {"image": faded("other twin", 198)},
    "train/gear/normal/view": {"group": "part 1"},
    "train/gear/normal/another view": {"group": "part 1"},
    "test/gear/normal/view": {"group": "part 1"},
    "test/weave/normal/view of another part is fine": {"group": "part 1"},
    "train/gear/normal/twice in train is noticed": {"image": picture("twice")},
    "train/weave/normal/twice in train is noticed": {"image": picture("twice")},
    "test/<img src=x>$cost/normal/only in test": {},
    "train/coin/normal/one label": {},
    "validation/gear/normal/filed elsewhere": {},  # moved to train below
}
EXPECTED = {
    "every image has its id": ["without id"],
    "every image has its dataset": ["no dataset"],
    "every image has its category": ["no category"],
    "every image has its label": ["no label"],
    "every image has its source": ["no source"],
    "every image has its sha256": ["no sha256"],
    "every image has its width": ["no width"],
    "every image has its height": ["no height"],
    "ids are unique": ["double", "double"],
    "the label is one that is known": ["unknown label"],
    "the split is the one that the file is named after": ["filed elsewhere"],
    "the image decodes": ["damaged", "empty"],
    "the image has the stated width and height": ["no width", "no height", "other size"],
    "width is 16 to 64": ["narrow", "wide"],
    "height is 16 to 64": ["low", "high"],
    "aspect ratio is at most 2": ["no width", "no height", "long"],
    "normal images have no box": ["has box"],
    "normal images have no defect type": ["has defect"],
    "anomalous images that have a mask have boxes": ["no boxes"],
    "anomalous images have boxes": ["no boxes", "label alone is noticed"],
    "anomalous images have a defect type": ["no defect"],
    "boxes lie inside the image": ["outside", "negative", "not a number"],
    "boxes have an area": ["not a number", "no area", "inverted"],
    "the mask decodes and has one channel and the image's size": ["damaged mask", "small mask", "colour mask"],
    "the mask shows a defect if and only if the label is anomalous": ["has mask", "empty mask"],
    "there is something of the mask in every box": ["box beside"],
    "defects of 4 mask pixels and more lie in boxes": ["inclusive", "one missing"],
    "images with the same pixels are in one split": ["leak", "leak"],
    "images with the same pixels have the same label": ["two labels", "two labels"],
    "near-identical images are in one split": ["twin", "twin"],
    "images of one part are in one split": ["view", "another view", "view"],
    "every category has 1 and more images of each label in test": ["one label", "only in test", "category"],
    "every category has both labels in train": ["one label", "only in test", "category"],
    "near-identical images have the same label": ["near, and another label", "near, and another label"],
    "every image is there once": ["leak", "twice in train is noticed", "two labels"],
    "every box covers something": ["blank part", "thin"],
    "no box covers the whole image": ["whole image"],
    "the image is neither black nor white all over": ["black", "white"],
    "no category or defect type has the name of its file": ["file", "category"],
    "every defect type is in more than one split": ["file"],
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on a set with every fault."""
    folder = tmp_path_factory.mktemp("faulty")
    records = faultless() | {name: record(name, **changes) for name, changes in FAULTS.items()}
    written(records, folder / "shards")
    path = folder / "shards" / "validation-00000.parquet"
    table = pq.read_table(path)
    moved = pa.compute.match_substring(table["id"], "filed elsewhere")
    split = pa.compute.if_else(moved, "train", table["split"])
    pq.write_table(table.set_column(table.schema.get_field_index("split"), "split", split), path)
    assert not validate.judge(folder / "shards", folder / "report", PARAMS)
    return folder / "report"


def test_every_expectation_of_the_suite_is_put_to_the_test(faulty: Path) -> None:
    report = json.loads((faulty / "validation.json").read_text())
    found = {entry["what"] for entry in report["expectations"] if entry["failing"] is not None}
    assert found - {"every image has its split"} == set(EXPECTED)


@pytest.mark.parametrize("what", EXPECTED)
def test_an_expectation_names_exactly_the_records_at_fault(faulty: Path, what: str) -> None:
    report = json.loads((faulty / "validation.json").read_text())
    [entry] = [entry for entry in report["expectations"] if entry["what"] == what]
    assert sorted(id_.split("/")[-1] for id_ in entry["ids"]) == sorted(EXPECTED[what])
    assert entry["failing"] == len(EXPECTED[what]) and not entry["success"]
    [line] = [line for line in validate.failures(faulty) if f"{what}: " in line]
    assert f"{entry['failing']} failing: {', '.join(entry['ids'])}" in line
    assert line.endswith(f"; {entry['remedy']}.")
    assert line.startswith("warning: ") == (entry["severity"] == "warning")


def test_lines_give_unexpected_values_and_put_warnings_last(faulty: Path) -> None:
    lines = validate.failures(faulty)
    assert any("(label: broken)" in line for line in lines)
    assert any("parts/<img src=x>$cost" in line and "parts/coin" in line for line in lines)
    warnings = [line.startswith("warning: ") for line in lines]
    assert warnings == sorted(warnings) and sum(warnings) == 10


def test_a_name_cannot_break_a_line_or_write_to_the_terminal(tmp_path: Path) -> None:
    changes = {"category": "a\nadfm: error: b\x1b[31m", "boxes": (), "id": "id\n"}
    records = faultless() | {"odd": record("train/gear/anomalous/odd", **changes)}
    run(written(records, tmp_path / "shards"), tmp_path / "report")
    lines = validate.failures(tmp_path / "report")
    assert any(r"a\nadfm: error: b\x1b[31m" in line for line in lines)
    assert all(line.isprintable() for line in lines)


def test_the_page_loads_nothing_and_shows_what_failed(faulty: Path) -> None:
    tags: list[tuple[str, dict[str, str | None]]] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            tags.append((tag, dict(attributes)))

    page = (faulty / "index.html").read_text()
    Tags().feed(page)
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe", "object", "embed", "video", "base"}
    addresses = [attributes[name] or "" for _, attributes in tags for name in ("src", "href") if name in attributes]
    assert all(address.startswith(("#", "data:image/jpeg;", "data:image/png;")) for address in addresses)
    assert "url(" not in page and "@import" not in page
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("meta", policy) in [(tag, attributes.get("content")) for tag, attributes in tags]
    for text in (*EXPECTED, "train/gear/anomalous/one missing", "parts/&lt;img src=x&gt;$cost"):
        assert text in page, text


def under(page: str, what: str) -> str:
    """The figures under the line that says that an expectation failed."""
    figures = page.split(f"<p>{what}: ", 1)[1].split('<div class="pictures">', 1)[1].split("</div><p>", 1)[0]
    return figures.replace("<wbr>", "")  # where a path may break


def test_the_page_shows_what_failed(faulty: Path) -> None:
    page = (faulty / "index.html").read_text()
    figures = under(page, "boxes lie inside the image")
    assert figures.count("<figure") == len(EXPECTED["boxes lie inside the image"]) == 3
    assert "train/gear/anomalous/outside.png" in figures
    # the two defects and the box that reaches out of the image of 32x32, in its own pixels, each twice for its halo
    places = [(4, 6, 8, 4), (20, 20, 9, 5), (20, 20, 13, 10)]
    for x, y, width, height in places:
        assert figures.count(f'x="{x}.00" y="{y}.00" width="{width}.00" height="{height}.00"') >= 2
    encoded = figures.split('src="data:image/jpeg;base64,', 1)[1].split('"', 1)[0]
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as shown:
        assert shown.size == (32, 32)
    assert "does not decode: it is not an image" in under(page, "the image decodes")


def test_the_page_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"train/gear/normal/narrow {number}" for number in range(8)]
    records = faultless() | {name: record(name, image=picture("narrow", 10, 31)) for name in names}
    shards_ = written(records, tmp_path / "shards")
    what = "the image has the stated width and height"
    for most, figures in ((1_000_000, 4), (5_000, 0)):
        monkeypatch.setattr(page_, "_PICTURES_LENGTH", most)
        run(shards_, tmp_path / "report")
        page = (tmp_path / "report" / "index.html").read_text()
        assert f"{what}: 8 failing" in page
        assert under(page, what).count("<figure") == figures


def test_held_out_categories_are_in_test_alone_and_need_nothing_in_train(tmp_path: Path) -> None:
    records = {name: one for name, one in faultless().items() if "weave" not in name or name.startswith("test")}
    more = {f"{split}/gear/{label}/9{n}" for split in SPLITS for label in ("normal", "anomalous") for n in range(2)}
    records |= {name: record(name) for name in more}
    shards_ = written(records, tmp_path / "shards")
    settings = {"validation": LIMITS, "split": {"holdout_categories": ["weave"]}}
    passed, report = run(shards_, tmp_path / "a", Params.model_validate(settings))
    assert passed and failed(report) == {}
    settings["split"] = {"holdout_categories": ["gear"]}
    passed, report = run(shards_, tmp_path / "b", Params.model_validate(settings))
    astray = sorted(name for name in records if "gear" in name and not name.startswith("test"))
    assert not passed and sorted(failed(report)["held-out categories are in test alone"]) == astray


@dataclass(frozen=True)
class RecordWithCamera(Record):
    camera: str = "top"
    shift: float | None = None


def test_a_new_column_is_expected_in_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "COLUMNS", shards.Columns(RecordWithCamera))
    records = {name: RecordWithCamera(**vars(each)) for name, each in faultless().items()}
    spoilt = next(iter(records))
    records[spoilt] = replace(records[spoilt], camera=None)  # type: ignore[arg-type]
    _, report = run(written(records, tmp_path / "shards"), tmp_path / "report")  # type: ignore[arg-type]
    assert failed(report) == {"every image has its camera": [spoilt]}


def test_lookalikes_may_be_allowed(tmp_path: Path) -> None:
    records = faultless()
    for name, levels in (("train/gear/normal/0", 200), ("test/gear/normal/0", 198)):
        records[name] = replace(records[name], image=faded("same", levels))
    shards_ = written(records, tmp_path / "shards")
    passed, report = run(shards_, tmp_path / "a")
    assert not passed
    assert {name: sorted(ids) for name, ids in failed(report).items()} == {
        "near-identical images are in one split": ["test/gear/normal/0", "train/gear/normal/0"]
    }
    assert run(
        shards_, tmp_path / "b", Params.model_validate({"validation": LIMITS, "split": {"near_duplicates": False}})
    )[0]


@pytest.mark.parametrize(
    ("keep", "params", "expected"),
    [
        (
            lambda name: not name.startswith("validation"),
            PARAMS,
            ["validation has at least 8 images", "validation has a"],
        ),
        (lambda name: name != "test/gear/normal/0", PARAMS, ["test has at least 8 images"]),
        (
            lambda name: not name.startswith("validation"),
            Params.model_validate({"validation": LIMITS, "split": {"validation": 0.0}}),
            [],
        ),
        (
            lambda name: "train/" not in name or "normal" not in name or name == "train/gear/normal/0",
            Params.model_validate({"validation": LIMITS | {"min_images_per_split": 5}}),
            ["train has a share", "warning: every category has both labels in train"],
        ),
        (
            lambda name: "train/" not in name or "normal" in name,
            Params.model_validate({"validation": LIMITS | {"min_images_per_split": 4, "min_label_share": 0.0}}),
            ["train has normal and anomalous images", "warning: every category has both labels in train"],
        ),
        (
            lambda name: name not in ("test/gear/normal/0", "test/gear/normal/1"),
            Params.model_validate({"validation": LIMITS | {"min_images_per_split": 4}}),
            ["every category has 1 and more images of each label in test"],
        ),
        (
            lambda name: name not in ("test/gear/normal/0", "test/gear/normal/1"),
            Params.model_validate({"validation": LIMITS | {"min_images_per_split": 4, "min_category_images": 0}}),
            [],
        ),
    ],
)
def test_splits_are_large_and_balanced_enough(
    tmp_path: Path, keep: Callable[[str], bool], params: Params, expected: list[str]
) -> None:
    records = {name: record for name, record in faultless().items() if keep(name)}
    passed, _ = run(written(records, tmp_path / "shards"), tmp_path / "report", params)
    lines = validate.failures(tmp_path / "report")
    assert passed == (not expected) and len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True)), lines


def test_warnings_do_not_fail(tmp_path: Path) -> None:
    records = {name: replace(record, mask=None) for name, record in faultless().items()}
    records["train/gear/anomalous/0"] = replace(records["train/gear/anomalous/0"], defect=None)
    passed, report = run(written(records, tmp_path / "shards"), tmp_path / "report")
    assert passed and report["passed"]
    assert failed(report) == {"anomalous images have a defect type": ["train/gear/anomalous/0"]}
    assert report["statistics"]["failed"] == 0 and report["statistics"]["warnings"] == 1


def on_large_images(boxes: bool = True) -> dict[str, Record]:
    """The faultless records on images of 96 x 96 pixels, with boxes of 8 x 4 and 9 x 5 or without."""
    return {
        name: replace(record, image=picture(name, 96, 96), width=96, height=96, mask=None, boxes=record.boxes * boxes)
        for name, record in faultless().items()
    }


def tiled(**sections: Any) -> Params:
    return Params.model_validate({"validation": LIMITS | {"max_side": 96}} | sections)


def test_small_defects_are_reported_with_the_tiles_that_make_them_visible(tmp_path: Path) -> None:
    large, sees = written(on_large_images(), tmp_path / "shards"), {"max_pixels": 32 * 32}
    passed, _ = run(large, tmp_path / "report", tiled(model=sees))
    assert passed
    assert validate.failures(tmp_path / "report") == [
        "warning: three quarters of the defects are at least 16 pixels wide and high to the model, which sees about "
        "32 x 32: observed 1.3; cut the images: tile.size=32 makes that 4 pixels; 16 tiles an image of "
        "middling size cost about 16 times the time in evaluation and use."
    ]
    for params in (tiled(model=sees, tile={"size": 32}), tiled(), tiled(model={"name": "owner/name"})):
        passed, report = run(large, tmp_path / "report", params)
        assert passed and failed(report) == {}


def test_tiles_need_larger_images_and_boxes(tmp_path: Path) -> None:
    large = written(on_large_images(), tmp_path / "shards")
    for size, expected in ((96, {"an image is larger than tile.size, 96": []}), (95, {})):
        passed, report = run(large, tmp_path / "report", tiled(tile={"size": size}))
        assert passed and failed(report) == expected
    labels = written(on_large_images(boxes=False), tmp_path / "labels")
    passed, report = run(labels, tmp_path / "report", tiled(tile={"size": 64}))
    assert not passed and "an image in train has boxes, which tile.size needs" in failed(report)


def test_a_strip_may_be_narrow_if_its_tiles_are_not(tmp_path: Path) -> None:
    strips = {
        name: replace(record, image=picture(name, 96, 32), width=96, mask=None) for name, record in faultless().items()
    }
    folder = written(strips, tmp_path / "shards")
    assert [run(folder, tmp_path / "report", tiled(tile={"size": size}))[0] for size in (None, 64)] == [False, True]


def test_ids_are_listed_up_to_a_limit_and_counted_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "MAX_IDS", 12)
    names = [f"train/gear/normal/damaged {number}" for number in range(15)]
    records = {name: record(name, image=name.encode()) for name in names}
    _, report = run(written(records | faultless(), tmp_path / "shards"), tmp_path / "report")
    [entry] = [entry for entry in report["expectations"] if entry["what"] == "the image decodes"]
    assert entry["failing"] == 15 and entry["ids"] == names[:12]
    assert f"15 failing: {', '.join(names[:10])}, …;" in validate.failures(tmp_path / "report")[0]


def _nothing(folder: Path) -> None:
    pass


def _other_columns(folder: Path) -> None:
    pq.write_table(pa.table({"id": ["a"]}), folder / "train-00000.parquet")


def _not_parquet(folder: Path) -> None:
    (folder / "train-00000.parquet").write_bytes(b"PAR1 and no more")


def _no_rows(folder: Path) -> None:
    pq.write_table(shards.COLUMNS.schema.empty_table(), folder / "train-00000.parquet")


def _cut_short(folder: Path) -> None:
    shards.write(faultless().values(), folder, 1000)
    path = folder / "test-00000.parquet"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("spoil", [_nothing, _other_columns, _not_parquet, _no_rows, _cut_short])
def test_what_is_not_shards_is_one_error_and_no_report(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    spoil(folder)
    with pytest.raises(AdfmError, match=r"shards.*adfm convert"):
        validate.judge(folder, tmp_path / "report", PARAMS)
    assert not (tmp_path / "report").exists()


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AdfmError, match="nowhere"):
        validate.judge(tmp_path / "nowhere", tmp_path / "report", PARAMS)


# ---------------------------------------------------------------------------------------------------------------- drift


counts = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 1000), min_size=1)


@settings(deadline=None)
@given(counts, counts)
def test_the_distance_is_that_of_jensen_and_shannon(p: dict[str, int], q: dict[str, int]) -> None:
    both = [[these.get(name, 0) for name in "abcdef"] for these in (p, q)]
    assert drift.distance(p, q) == pytest.approx(jensenshannon(*both, base=2), abs=1e-7)
    assert drift.distance(p, q) == pytest.approx(drift.distance(q, p))
    assert 0 <= drift.distance(p, q) <= 1 + 1e-12


def test_distances_of_known_shares() -> None:
    assert drift.distance({"a": 3, "b": 1}, {"a": 300, "b": 100}) == 0
    assert drift.distance({"a": 1}, {"b": 1}) == 1
    assert drift.distance({}, {}) == 0
    assert drift.distance({"a": 1}, {}) == 1
    # a small change, by its population stability index
    p, q = {"a": 500, "b": 500}, {"a": 520, "b": 480}
    index = sum((p[name] - q[name]) / 1000 * math.log(p[name] / q[name]) for name in "ab")
    assert drift.distance(p, q) == pytest.approx(math.sqrt(index / (8 * math.log(2))), rel=0.01)


def drifted(name: str) -> Record:
    """Wider, higher and darker, with another category and another defect."""
    one = record(name, image=faded(name, 60, 40), width=40, height=40, mask=None)
    return replace(one, category="new" if "weave" in name else "gear", defect="hole" if one.defect else None)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on the faultless set."""
    folder = tmp_path_factory.mktemp("before")
    validate.judge(written(faultless(), folder / "shards"), folder / "report", PARAMS)
    return folder / "report"


def test_drift_is_warned_of_and_does_not_fail(tmp_path: Path, before: Path) -> None:
    statistics = json.loads((before / "validation.json").read_text())["statistics"]
    shards_ = written({name: drifted(name) for name in faultless()}, tmp_path / "shards")
    assert validate.judge(shards_, tmp_path / "report", PARAMS, statistics)
    lines = validate.failures(tmp_path / "report")
    figures = ("brightness", "contrast", "width", "height")
    wanted = ["the shares of categories", "the shares of defects", *(f"mean {figure}" for figure in figures)]
    assert len(lines) == len(wanted)
    assert all(line.startswith(f"warning: {what} in train") for line, what in zip(lines, wanted, strict=True)), lines


def test_the_same_data_have_not_drifted(tmp_path: Path, before: Path) -> None:
    statistics = json.loads((before / "validation.json").read_text())["statistics"]
    assert validate.judge(written(faultless(), tmp_path / "shards"), tmp_path / "report", PARAMS, statistics)
    assert validate.failures(tmp_path / "report") == []
    assert len(json.loads((tmp_path / "report" / "validation.json").read_text())["expectations"]) == 6 + len(
        json.loads((before / "validation.json").read_text())["expectations"]
    )


def test_the_statistics_are_those_of_the_training_images(tmp_path: Path) -> None:
    records = {name: record(name) for name in ("train/gear/normal/0", "train/weave/anomalous/0", "test/gear/normal/0")}
    for name, (dark, light) in zip(records, ((0, 100), (100, 240), (0, 0)), strict=True):
        pixels = np.full((600, 300), dark)
        pixels[:300] = light
        records[name] = replace(records[name], image=png(pixels), width=300, height=600, mask=None)
    run(written(records, tmp_path / "shards"), tmp_path / "report")
    train = json.loads((tmp_path / "report" / "validation.json").read_text())["statistics"]["train"]
    # halves of two greys: the mean is half their sum, the contrast half their difference
    assert train["brightness"] == pytest.approx({"mean": (50 + 170) / 2, "deviation": (170 - 50) / 2}, rel=0.01)
    assert train["contrast"] == pytest.approx({"mean": (50 + 70) / 2, "deviation": (70 - 50) / 2}, rel=0.01)
    assert (train["width"], train["height"]) == ({"mean": 300, "deviation": 0}, {"mean": 600, "deviation": 0})
    assert train["categories"] == {"parts/gear": 1, "parts/weave": 1}
    assert train["defects"] == {"normal": 1, "scratch": 1}


# --------------------------------------------------------------------------------------------------------------- MLflow


@pytest.fixture(scope="module")
def store(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The embedded store, in a current folder with nothing else; the tests share it."""
    folder = tmp_path_factory.mktemp("store")
    shutil.copy(empty_database, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("MLFLOW_RUN_ID", raising=False)
        patch.chdir(folder)
        yield folder


def test_the_reports_are_in_mlflow_and_drift_is_measured_from_production(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards_ = written(faultless(), tmp_path / "shards")
    assert validate.validate(shards_, tmp_path / "report", PARAMS)
    client = tracking.client()
    [run_] = client.search_runs(["1"])
    assert run_.data.metrics == {"validation/images": 24, "validation/failed": 0, "validation/warnings": 0}
    artifacts = store / "mlartifacts" / run_.info.run_id / "artifacts" / "validation"
    for name in ("index.html", "validation.json"):
        assert (artifacts / name).read_text() == (tmp_path / "report" / name).read_text()

    client.create_registered_model("adfm")
    tags = {"data_fingerprint": shards.fingerprint(shards_)}
    version = client.create_model_version("adfm", "somewhere", tags=tags)
    client.set_registered_model_alias("adfm", "production", version.version)
    other = written({name: drifted(name) for name in faultless()}, tmp_path / "other")
    assert validate.validate(other, tmp_path / "report", PARAMS)
    assert validate.failures(tmp_path / "report")[0].startswith("warning: the shares of categories in train")
    assert capsys.readouterr().err == ""

    (artifacts / "validation.json").unlink()
    assert validate.validate(other, tmp_path / "report", PARAMS)
    assert "warning: no drift is measured: production has no report" in capsys.readouterr().err


def test_failed_shards_are_logged_as_such(store: Path, tmp_path: Path) -> None:
    records = faultless() | {"train/gear/normal/damaged": record("train/gear/normal/damaged", image=b"")}
    assert not validate.validate(written(records, tmp_path / "shards"), tmp_path / "report", PARAMS)
    newest = tracking.client().search_runs(["1"])[0]
    assert newest.data.metrics["validation/failed"] == 1
    assert newest.info.status == "FINISHED"
    assert "validated" not in newest.data.tags


def test_without_a_server_validation_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert validate.validate(written(faultless(), tmp_path / "shards"), tmp_path / "report", PARAMS)
    assert (tmp_path / "report" / "validation.json").is_file()
    said = capsys.readouterr().err
    assert said.startswith("adfm: warning: the validation is not logged, nor compared with production")
    assert "127.0.0.1:9" in said


def test_in_a_pod_validation_waits_for_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", pauses.append)
    assert validate.validate(written(faultless(), tmp_path / "shards"), tmp_path / "report", PARAMS)
    assert pauses == [10, 20, 40, 80]


def test_a_reference_is_a_report(store: Path, tmp_path: Path, before: Path) -> None:
    shards_ = written({name: drifted(name) for name in faultless()}, tmp_path / "shards")
    for reference in (before, before / "validation.json"):
        params = Params.model_validate({"validation": LIMITS | {"reference": str(reference)}})
        assert validate.validate(shards_, tmp_path / "report", params)
        assert len(validate.failures(tmp_path / "report")) == 6
    for content in ("no JSON", "[]", "{}", '{"statistics": {"train": {"categories": {}}}}'):
        (tmp_path / "validation.json").write_text(content)
        params = Params.model_validate({"validation": LIMITS | {"reference": str(tmp_path / "validation.json")}})
        with pytest.raises(AdfmError, match=r"validation\.reference.*validation\.json is not the report"):
            validate.validate(shards_, tmp_path / "other", params)
        assert not (tmp_path / "other").exists()


def defects_alone() -> dict[str, Record]:
    kept = [(name, one) for name, one in faultless().items() if one.label == "anomalous"]
    return {name: replace(one, defect=("dent", "scratch")[i % 2]) for i, (name, one) in enumerate(kept)}


KINDS = Params.model_validate(
    {"validation": {**LIMITS, "min_images_per_split": 4, "min_label_share": 0.05}, "sft": {"kinds": True}}
)


def test_defects_alone_pass_where_their_kinds_are_learnt(tmp_path: Path) -> None:
    folder = written(defects_alone(), tmp_path / "shards")
    passed, report = run(folder, tmp_path / "report", KINDS)
    assert passed and not failed(report)
    without = KINDS.model_copy(update={"sft": Params().sft})
    assert not run(folder, tmp_path / "refused", without)[0]
    first = validate.failures(tmp_path / "refused")[0]
    assert "train has normal and anomalous images" in first and "add normal images, or set sft.kinds to true" in first


def test_of_a_name_that_joins_kinds_its_parts_are_the_kinds(tmp_path: Path) -> None:
    """Neither is "dent+scratch" a third kind, nor is it missed in a split that shows dents and scratches apart."""
    both = "dent+scratch"
    records = {
        name: replace(one, defect=both if one.split == "train" and i % 4 == 1 else one.defect)
        for i, (name, one) in enumerate(defects_alone().items())
    }
    names = {split: {one.defect for one in records.values() if one.split == split} for split in ("train", "test")}
    assert names["train"] == {"dent", "scratch", both} and both not in names["test"]
    passed, report = run(written(records, tmp_path / "two"), tmp_path / "report", KINDS)
    assert passed and not failed(report)
    [count] = [entry for entry in report["expectations"] if "kinds of defects for the model" in entry["what"]]
    assert count["observed"] == 2
    long = {name: replace(one, defect=f"{one.defect} " + "x" * 40) for name, one in defects_alone().items()}
    kinds = "+".join(sorted({str(one.defect) for one in long.values()}))
    long["joined"] = replace(next(iter(long.values())), id="joined", split="train", defect=kinds)
    assert len(kinds) > 60
    run(written(long, tmp_path / "long"), tmp_path / "report", KINDS)
    assert "names of kinds" not in "".join(validate.failures(tmp_path / "report"))


def test_normal_images_alone_are_refused_with_or_without_kinds(tmp_path: Path) -> None:
    normal = {name: one for name, one in faultless().items() if one.label == "normal"}
    folder = written(normal, tmp_path / "shards")
    for kinds in (True, False):
        params = KINDS.model_copy(update={"sft": Params().sft.model_copy(update={"kinds": kinds})})
        assert not run(folder, tmp_path / f"report {kinds}", params)[0]
        assert "add images of defects" in "".join(validate.failures(tmp_path / f"report {kinds}"))


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["dent"], "train has 2 to 30 kinds of defects"),
        (["dent", "x" * 61], "names of kinds have at most 60 characters"),
    ],
)
def test_kinds_that_no_prompt_can_ask_for_are_refused(names: list[str], what: str, tmp_path: Path) -> None:
    records = {
        name: replace(one, defect=names[i % len(names)]) for i, (name, one) in enumerate(defects_alone().items())
    }
    assert not run(written(records, tmp_path / "shards"), tmp_path / "report", KINDS)[0]
    assert what in validate.failures(tmp_path / "report")[0]
