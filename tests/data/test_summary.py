"""The report of a conversion as a short table of plain text."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from adfm.data import inventory, summary
from adfm.text import printable

REPORT: dict[str, Any] = {
    "dataset": "line",
    "layout": {"name": "labelme"},
    "images": 1234,
    "normal": 1000,
    "anomalous": 234,
    "image_level_labels": 0,
    "boxes": {"before_dilation": 300, "after_dilation": 299},
    "counts": [
        {"split": "train", "category": "bolt", "label": "normal", "defect": None, "images": 1000},
        {"split": "test", "category": "nut", "label": "anomalous", "defect": "dent+scratch", "images": 200},
        {"split": "validation", "category": "nut", "label": "anomalous", "defect": "dent", "images": 34},
    ],
    "parts": {"split.group": {"parts": 0, "images": 0}},
    "kinds_missing": {},
    "files": {"total": 0, "images": 1234, "annotations_and_masks": 1235, "left_out": 0},
    "left_out": [],
    "missing": {"annotations": 0, "examples": []},
    "notes": [],
    "moved": [],
}


def test_the_table() -> None:
    assert summary.table(REPORT, Path("data/my shards"), 12.3).splitlines() == [
        "data/my shards: line, layout labelme",
        "  images          1,234  2 categories",
        "  normal          1,000",
        "  anomalous         234",
        "  boxes             299",
        "  defects             2  dent 234, scratch 200",
        "  splits                 train 1,000, validation 34, test 200",
        "  annotations     1,235  files, masks included",
        "  left out            0",
        "  seconds            12",
    ]


def test_what_is_not_as_expected_has_a_line() -> None:
    left_out = [
        {"kind": kind, "reason": reason, "files": 2, "examples": [f"a{kind}", "x"]}
        for kind, reason in ((".gif", inventory.UNREAD), (".psd", inventory.UNREAD), (".md", inventory.OTHER))
    ]
    more = {
        "image_level_labels": 7,
        "files": REPORT["files"] | {"left_out": 6},
        "left_out": left_out,
        "missing": {"annotations": 3, "examples": ["b.json: image 'b.png' is missing"]},
        "notes": [{"note": f"note {number}", "images": 9 - number, "examples": []} for number in range(5)],
        "moved": [{"because": "copies", "from": "train", "to": "test", "images": 5}],
        "parts": {"split.group": {"parts": 44, "images": 1200}},
        "kinds_missing": {"test": ["chip", "dent"], "validation": ["a", "b", "c", "dent"]},
    }
    lines = summary.table(REPORT | more, Path("shards"), 1.25).splitlines()
    assert lines[3] == "  anomalous         234  7 with a label alone, without boxes"
    rare = "not in test, so not judged: chip, dent; not in validation: a, b, c, …"
    assert lines[7] == f"  rare                5  {rare}"
    assert lines[8] == "  parts              44  on 1,200 images, by split.group"
    assert lines[10:] == [
        "  left out            6  files",
        f"                      4  .gif, .psd (e.g. a.gif): {inventory.UNREAD}",
        f"                      2  .md (e.g. a.md): {inventory.OTHER}",
        "  skipped             3  annotations without image, e.g. b.json: image 'b.png' is missing",
        "  note                9  images: note 0",
        "  note                8  images: note 1",
        "  note                   and 3 more kinds, see conversion.json",
        "  moved               5  images from train to test: a copy is there",
        "  seconds           1.2",
    ]


texts = st.text(min_size=1, max_size=99)


@given(st.lists(texts, min_size=12, max_size=30), texts)
def test_it_fits_a_terminal_whatever_the_names(names: list[str], dataset: str) -> None:
    counts = [
        {"split": "test", "category": name, "label": "anomalous", "defect": name.replace("+", ""), "images": 10**6}
        for name in names
    ]
    left_out = [
        {"kind": name, "reason": reason, "files": 10**6, "examples": names}
        for name, reason in zip(names, [*inventory.LOST, inventory.UNUSED, inventory.OTHER], strict=False)
    ]
    more = {
        "dataset": dataset,
        "counts": counts,
        "left_out": left_out,
        "missing": {"annotations": 3, "examples": names},
        "notes": [{"note": name, "images": 9, "examples": names} for name in names],
        "moved": [{"because": "part", "from": "train", "to": "test", "images": 5}] * 6,
        "parts": {"split.group": {"parts": 44, "images": 1200}},
        "kinds_missing": {"test": sorted(names), "train": sorted(names)},
    }
    text = summary.table(REPORT | more, Path("shards"), 1.25)
    lines = text.split("\n")
    assert len(lines) <= 25
    assert all(printable(line) == line and len(line) <= 120 for line in lines)


def test_kinds_that_a_split_lacks() -> None:
    def row(split: str, category: str, defect: str | None) -> dict[str, Any]:
        return {"split": split, "category": category, "label": "anomalous" if defect else "normal", "defect": defect}

    counts = [
        *(row(split, "a", "dent") for split in ("train", "validation", "test")),
        *(row("train", "a", "chip+dent"), row("train", "a", "burr"), row("test", "a", "burr"), row("test", "a", None)),
    ]
    assert summary._kinds_missing(counts, []) == {"validation": ["burr", "chip"], "test": ["chip"]}
    held = [*counts, row("test", "b", "hole")]
    assert summary._kinds_missing(held, ["b"]) == {"validation": ["a/burr", "a/chip"], "test": ["a/chip"]}
    assert summary._kinds_missing(held, [])["train"] == ["b/hole"]
    assert summary._kinds_missing(counts[:1], []) == {}


def test_notes_are_counted_by_text_with_ten_examples(tmp_path: Path) -> None:
    runs = [tmp_path / f"{run}.parquet" for run in range(2)]
    for run, path in enumerate(runs):
        notes = [["turned"], ["cut", "turned"], *[[]] * 5, *[["many"]] * 9]
        sources = [f"{run}/{number}.png" for number in range(len(notes))]
        pq.write_table(pa.table({"source": sources, "notes": pa.array(notes, pa.list_(pa.string()))}), path)
    many, turned, cut = summary.notes(runs)
    assert (many["note"], many["images"], len(many["examples"])) == ("many", 18, 10)
    examples = ["0/0.png", "0/1.png", "1/0.png", "1/1.png"]
    assert turned == {"note": "turned", "images": 4, "examples": examples}
    assert cut == {"note": "cut", "images": 2, "examples": examples[1::2]}
