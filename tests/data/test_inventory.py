"""Every file of a data set is converted, used or left out, and none is counted twice."""

import os
import random
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adfm.data import inventory

PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


def _write(raw: Path, *names: str, content: bytes = b"x") -> None:
    for name in names:
        path = raw / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _reasons(raw: Path) -> dict[str, str]:
    rows = inventory.take(raw, set(), set()).left_out
    return {example: row["reason"] for row in rows for example in row["examples"]}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a/b.gif", b"GIF89a", inventory.UNREAD),
        ("a/IMG_1.CR2", b"x", inventory.UNREAD),
        ("a/line.MP4", b"x", inventory.UNREAD),
        ("labels.xlsx", b"x", inventory.UNREAD),
        ("more.zip", b"PK", inventory.ARCHIVE),
        ("more.tar.gz", b"x", inventory.ARCHIVE),
        ("SegmentationClass/1.png", PNG, inventory.UNUSED),
        ("README.md", b"x", inventory.OTHER),
        ("README.dataset.txt", b"x", inventory.OTHER),
        ("LICENSE", b"x", inventory.OTHER),
        ("paper.pdf", b"%PDF", inventory.OTHER),
        ("a/Thumbs.db", b"x", inventory.OTHER),
        (".DS_Store", b"x", inventory.HIDDEN),
        ("a/._1.png", b"x", inventory.HIDDEN),
        (".git/objects/ab", b"x", inventory.HIDDEN),
        ("__MACOSX/a/1.png", b"x", inventory.HIDDEN),
        ("a/IMG_0001", PNG, inventory.MISNAMED),
        ("a/1.jpg_old", b"\xff\xd8\xff\xe0" + bytes(20), inventory.MISNAMED),
        ("a/1.img", b"BM" + struct.pack("<IHH", 99, 0, 0) + bytes(9), inventory.MISNAMED),
        ("a/notes", b"BMW", inventory.OTHER),
    ],
)
def test_a_file_that_is_left_out(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    _write(tmp_path, name, content=content)
    assert _reasons(tmp_path) == {name: reason}
    assert inventory.take(tmp_path, set(), set())[:3] == (1, 0, 0)


@pytest.mark.parametrize(
    "name", ["a.json", "A.XML", "labels/1.txt", "x.csv", "data.yaml", "obj.names", "_darknet.labels"]
)
def test_annotations_are_counted(tmp_path: Path, name: str) -> None:
    _write(tmp_path, name)
    assert inventory.take(tmp_path, set(), set()) == (1, 0, 1, [])


def test_kinds_are_counted_with_ten_examples(tmp_path: Path) -> None:
    _write(tmp_path, *(f"b/{number:02}.gif" for number in range(12)), "a.GIF", "z.svg", "manifest.json")
    taken = inventory.take(tmp_path, set(), set())
    assert taken.files == 14
    gif, svg = taken.left_out
    assert gif == {
        "kind": ".gif",
        "reason": inventory.UNREAD,
        "files": 13,
        "examples": ["a.GIF", *(f"b/{number:02}.gif" for number in range(9))],
    }
    assert (svg["kind"], svg["files"]) == (".svg", 1)


def test_the_number_of_kinds_is_bounded(tmp_path: Path) -> None:
    _write(tmp_path, *(f"{number}.k{number}" for number in range(150)), *(f"x.{number}" for number in range(50)))
    rows = inventory.take(tmp_path, set(), set()).left_out
    assert len(rows) <= 101
    assert sum(row["files"] for row in rows) == 200


def test_links(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    _write(raw, "a/1.gif", "b/2.gif")
    _write(tmp_path, "elsewhere/3.gif")
    (raw / "c").symlink_to(tmp_path / "elsewhere")
    (raw / "a/up").symlink_to("..")
    (raw / "a/other").symlink_to("../b")
    (raw / "b/other").symlink_to("../a")
    (raw / "nowhere.png").symlink_to("gone.png")
    (raw / "itself.png").symlink_to("itself.png")
    assert _reasons(raw) == {
        "a/1.gif": inventory.UNREAD,
        "a/other/2.gif": inventory.UNREAD,
        "b/2.gif": inventory.UNREAD,
        "b/other/1.gif": inventory.UNREAD,
        "c/3.gif": inventory.UNREAD,
        "nowhere.png": inventory.BROKEN,
        "itself.png": inventory.BROKEN,
    }


def test_a_name_in_no_encoding(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.gif"
    Path(os.fsdecode(path)).write_bytes(b"x")
    assert _reasons(tmp_path) == {os.fsdecode(b"\xff.gif"): inventory.UNREAD}


parts = st.sampled_from(["a", "images", ".git", "__MACOSX", "b c"])
names = st.sampled_from(["1.png", "2.JPG", "1.txt", "x.json", "y.gif", "README.md", ".hidden", "noext", "1_mask.png"])


@given(st.lists(st.tuples(st.lists(parts, max_size=3), names), unique_by=str), st.randoms())
def test_every_file_is_accounted_for(files: list[tuple[list[str], str]], chance: random.Random) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _account(Path(folder), ["/".join([*folders, name]) for folders, name in files], chance)


def _account(raw: Path, paths: list[str], chance: random.Random) -> None:
    _write(raw, *paths)
    images = {path for path in paths if path.endswith(("png", "JPG")) and chance.random() < 0.5}
    masks = {path for path in images if path.endswith("mask.png")}
    images -= masks
    taken = inventory.take(raw, images, masks)
    on_disk = sum(len(its) for _, _, its in os.walk(raw))
    assert taken.files == on_disk == len(paths)
    assert taken.images == len(images)
    assert taken.images + taken.annotations + sum(row["files"] for row in taken.left_out) == on_disk
    examples = [example for row in taken.left_out for example in row["examples"]]
    assert len(set(examples)) == len(examples)
    assert not images.intersection(examples)
