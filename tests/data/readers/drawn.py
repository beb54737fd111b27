"""Helpers for the tests of readers of drawn annotations, which open no image."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adfm.data.problems import BadData
from adfm.errors import AdfmError
from adfm.records import Sample

Read = Callable[[Path], Iterator[Sample]]

# What is not a file of any layout, or one with something in it that no tool should have written.
NASTY = (
    b"",
    b"\0",
    b"\xff\xfe\x00\xd8",
    b"null",
    b"[" * 20_000,
    b'{"a":' * 5_000,
    b"[1, 2,]",
    b"1" * 10_000,
    b'{"shapes": null, "imagePath": 3}',
    b'{"shapes": [3, {"label": 1, "points": {}}, {"label": "a", "points": [[]]}], "imagePath": "a.jpg"}',
    b'{"shapes": [{"label": "a", "points": [[1e999, 1], [2, NaN]], "shape_type": []}], "imagePath": "\\ud800.jpg"}',
    b'{"images": [null, {"id": []}, {"id": 1}], "annotations": ["id"], "categories": [0, {"id": 1}]}',
    b'{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1]},'
    b'{"image_id": 1, "category_id": 1, "segmentation": {"size": [2, -1], "counts": "\xc3\xa9"}}],'
    b' "categories": [{"id": 1, "name": null}, {"id": 1, "name": "x"}]}',
    b"0 0.5 0.5 0.1 0.1\n" * 3 + "٣ ² 1 1 1\n".encode(),
    b"names: [&a [*a]]\npath: [1]\ntrain: {}",
    b"names: {2001-99-99: 1}\n",
    b"names: !!python/object:os.system {}\n? {a: 1} : 2",
    b"<annotation><object/><object><name>a</name><bndbox><xmin>1</xmin></bndbox></object></annotation>",
    b'<?xml version="1.0" encoding="shift_jis"?><annotation/>',
    b'<?xml version="1.0" encoding="nothing"?><annotation/>',
    b"<annotation>" + b"<a>" * 5_000,
    b"image,label\n\0,1\n",
    b'image,label\n"a.jpg,1\n',
    b"image,label,x1,y1,x2,y2\na.jpg,1," + b"9" * 5_000 + b",0,nan,1\n",
    b"image,label\n" + b"a" * 200_000 + b",1\n",
)


def same_box(points: Iterable[tuple[float, float]]) -> tuple[float, ...]:
    """Equal where the boxes round points are one to a reader, which counts a box that is drawn twice once."""
    xs, ys = zip(*points, strict=True)
    return tuple(round(side, 6) for side in (min(xs), min(ys), max(xs), max(ys)))


def same_place(place: tuple[float, float, float, float]) -> tuple[float, ...]:
    """The same for x, y, width and height."""
    x, y, width, height = place
    return same_box([(x, y), (x + width, y + height)])


def touch(raw: Path, *names: str) -> None:
    """Files that count as images by their names."""
    for name in names:
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).write_bytes(b"pixels")


def dump(path: Path, content: Any) -> None:
    """A JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def by_source(read: Read, raw: Path) -> dict[str, Sample]:
    """The samples of a data set that has nothing wrong with it."""
    samples = list(read(raw))
    by_name = {sample.source: sample for sample in samples}
    assert len(by_name) == len(samples)
    assert all(sample.image == raw / sample.source and sample.image.is_file() for sample in samples)
    return by_name


def problems(read: Read, raw: Path) -> list[str]:
    """The lines of the one error that lists everything."""
    with pytest.raises(BadData) as error:
        list(read(raw))
    first, *_, last = str(error.value).splitlines()
    assert first.startswith(f"{raw}: ") and last.startswith("Add what is missing")
    return error.value.problems


def never_fails_otherwise(read: Read, files: dict[str, bytes]) -> None:
    """A reader gives samples or an `AdfmError`, whatever is in the files of a data set that has the image a.jpg."""
    raw = Path(tempfile.mkdtemp())
    try:
        touch(raw, "a.jpg")
        for name, content in files.items():
            (raw / name).write_bytes(content)
        try:
            samples = list(read(raw))
        except AdfmError as error:
            str(error).encode()  # can be printed
        else:
            assert samples
    finally:
        shutil.rmtree(raw)
