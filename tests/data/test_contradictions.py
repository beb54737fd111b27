"""Copies of one picture with two labels, or with other marks."""

import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from adfm.data import contradictions

NO_PAIRS = np.empty((0, 2), np.int64)


def _images(labels: list[str], digests: list[str]) -> pa.Table:
    """Images of different looks and kinds, so that no file is opened."""
    count = len(labels)
    return pa.table(
        {
            "label": pa.array(labels).dictionary_encode(),
            "sha256": digests,
            "source": [f"{number} .png" for number in range(count)],
            "width": pa.array([9] * count, pa.int32()),
            "height": pa.array([9] * count, pa.int32()),
            "embedded": [True] * count,
            "look": [zlib.crc32(digest.encode()) for digest in digests],
        }
    )


def _decode(content: bytes) -> Image.Image:
    raise AssertionError


def _rows(images: pa.Table, more: list[dict[str, Any]] | None = None) -> contradictions.Rows:
    def rows(some: NDArray[np.int64], columns: list[str]) -> Iterator[dict[str, Any]]:
        assert sorted(some.tolist()) == some.tolist()
        for number in some.tolist():
            row = images.slice(number, 1).to_pylist()[0] | {"file": "none.png"} | (more[number] if more else {})
            yield {name: row[name] for name in columns}

    return rows


copies = st.lists(st.tuples(st.sampled_from(["normal", "anomalous"]), st.sampled_from("abcdef")), max_size=20)


@settings(deadline=None)
@given(copies)
def test_every_file_of_a_contradiction_is_named(its: list[tuple[str, str]]) -> None:
    images = _images([label for label, _ in its], [digest for _, digest in its])
    of: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for number, (label, digest) in enumerate(its):
        of[digest][label].append(f"{number} .png")
    problems = contradictions.under_two_labels(Path("line"), images, NO_PAIRS, _rows(images), _decode)
    both = [labels for labels in of.values() if len(labels) == 2]
    assert len(problems) == sum(max(map(len, labels.values())) for labels in both)
    for labels in both:
        for name in labels["normal"]:
            assert any(problem.startswith(f"{name}: is labelled normal") for problem in problems)
        for name in labels["anomalous"]:
            assert any(f"but {name!r}, the same picture" in problem for problem in problems)


def test_images_of_another_look_size_or_label_are_not_opened() -> None:
    images = _images(["normal", "normal", "anomalous"], ["a", "b", "c"])
    images = images.set_column(images.schema.get_field_index("width"), "width", pa.array([9, 9, 8], pa.int32()))

    def rows(*_: object) -> Iterator[dict[str, Any]]:
        raise AssertionError

    near = np.array([(0, 1), (0, 2), (1, 2)], np.int64)
    assert contradictions.under_two_labels(Path("line"), images, near, rows, _decode) == []


@given(copies, st.lists(st.integers(0, 2), min_size=20, max_size=20))
def test_copies_that_are_marked_differently(its: list[tuple[str, str]], marks: list[int]) -> None:
    its = [(label, digest) for label, digest in its if label == "anomalous"]
    images = _images([label for label, _ in its], [digest for _, digest in its])
    more = [{"defect": f"{mark // 2}", "boxes": [[0.0, 0.0, 4.0, 4.0]] * mark} for mark in marks]
    of: dict[str, set[int]] = defaultdict(set)
    for (_, digest), mark in zip(its, marks, strict=False):
        of[digest].add(mark)
    result = contradictions.marked_differently(images, _rows(images, more))
    assert result["pictures"] == sum(len(different) > 1 for different in of.values())
    assert len(result["examples"]) == result["pictures"]


def test_near_duplicates_with_two_labels() -> None:
    images = _images(["normal", "anomalous", "anomalous"], ["a", "b", "c"])
    pairs = np.array([(0, 1), (1, 2)], np.int64)
    assert contradictions.near_duplicates_with_two_labels(images, pairs) == {
        "pairs": 1,
        "examples": [["0 .png", "1 .png"]],
    }
