import hashlib
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from adfm.data import duplicates, hashes, shards, synthetic
from adfm.evaluation import separation
from adfm.records import Record, Split


def _encoded(image: Image.Image, format: str = "PNG", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def parts() -> list[Image.Image]:
    """Twelve good parts, 320 pixels wide."""
    rng = np.random.default_rng(1)
    draws = [*synthetic.TARGET_CATEGORIES.values()] * 12
    return [Image.fromarray(synthetic.draw(rng, draw, None, 320)[0]) for draw in draws[:12]]


def _record(name: str, content: bytes, split: Split, group: str | None = None, category: str = "bolt") -> Record:
    sha256 = hashlib.sha256(content).hexdigest()
    with Image.open(io.BytesIO(content)) as image:
        width, height = image.size
    return Record(name, content, None, width, height, "line", category, None, "normal", (), split, name, sha256, group)


def _folder(tmp_path: Path, *records: Record) -> Path:
    folder = tmp_path / f"shards-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    shards.write(records, folder, 1000)
    return folder


def _compared(folder: Path, near_duplicates: bool = True) -> dict[str, Any]:
    """The result of `compare`, which is the same whether the rule itself or sketches alone decide."""
    seen, test = hashes.collect(folder, hashes.SEEN), hashes.collect(folder, ["test"])
    result = separation.compare(test, {"candidate": seen}, separation.check(test, seen, folder), near_duplicates)
    assert separation.compare(test, {"candidate": seen}, None, near_duplicates) == result
    return result


def test_the_embedded_data_set_is_proved(small_shards: Path) -> None:
    result = _compared(small_shards)
    assert result == {
        "images": len(shards.ids(small_shards, "test")),
        "against": {"candidate": len(shards.ids(small_shards, "train")) + len(shards.ids(small_shards, "validation"))},
        "unknown": [],
        "problems": [],
        "alike": [],
        "near_duplicates": True,
        "proved": True,
    }


LEAKS: dict[str, tuple[str, Callable[[Image.Image], bytes]]] = {
    "under another name": ("same bytes", _encoded),
    "saved again": ("same pixels", lambda image: _encoded(image, compress_level=1)),
    "with an alpha channel": ("same pixels", lambda image: _encoded(image.convert("RGBA"))),
    "JPEG 90": ("near-duplicate", lambda image: _encoded(image, "JPEG", quality=90)),
    "JPEG 60": ("near-duplicate", lambda image: _encoded(image, "JPEG", quality=60)),
    "smaller": ("near-duplicate", lambda image: _encoded(image.resize((240, 240)))),
    "darker": ("near-duplicate", lambda image: _encoded(image.point(lambda value: int(value * 0.9)))),
}


@pytest.mark.parametrize("split", hashes.SEEN)
@pytest.mark.parametrize("leak", LEAKS)
def test_a_copy_of_a_test_image_is_named(leak: str, split: Split, parts: list[Image.Image], tmp_path: Path) -> None:
    kind, saved = LEAKS[leak]
    held = [_record(f"test-{number}", _encoded(part), "test") for number, part in enumerate(parts[:6])]
    seen = [_record(f"seen-{number}", _encoded(part), split) for number, part in enumerate(parts[6:])]
    result = _compared(_folder(tmp_path, *held, *seen, _record("copy", saved(parts[3]), split)))
    assert result["problems"] == [{"kind": kind, "of": "candidate", "ids": ["test-3"], "like": ["copy"]}]
    assert result["proved"] is False


def test_a_jpeg_and_the_png_of_it_have_the_same_pixels(parts: list[Image.Image], tmp_path: Path) -> None:
    jpeg = _encoded(parts[0], "JPEG", quality=80)
    png = _encoded(Image.open(io.BytesIO(jpeg)))
    result = _compared(_folder(tmp_path, _record("a", jpeg, "test"), _record("b", png, "train")))
    assert [problem["kind"] for problem in result["problems"]] == ["same pixels"]


def test_photographs_of_one_part_are_named_whatever_the_data_set_is_called(
    parts: list[Image.Image], tmp_path: Path
) -> None:
    held = [_record("a", _encoded(parts[0]), "test", "serial 7"), _record("b", _encoded(parts[1]), "test", "serial 8")]
    seen = [
        replace(_record("c", _encoded(parts[2]), "train", "serial 7"), dataset="another"),
        _record("d", _encoded(parts[3]), "train", "serial 8", category="nut"),
        _record("e", _encoded(parts[4]), "train"),
    ]
    result = _compared(_folder(tmp_path, *held, *seen))
    assert result["problems"] == [{"kind": "same part", "of": "candidate", "ids": ["a"], "like": ["c"]}]


def test_different_parts_of_one_product_are_not_copies(parts: list[Image.Image], tmp_path: Path) -> None:
    records = [
        _record(f"{number}", _encoded(part), "test" if number % 2 else "train") for number, part in enumerate(parts)
    ]
    assert _compared(_folder(tmp_path, *records))["proved"] is True


def test_blank_surfaces_are_not_copies(tmp_path: Path) -> None:
    blank = [_encoded(Image.new("RGB", (64, 64), (120 + shade,) * 3)) for shade in range(2)]
    assert _compared(_folder(tmp_path, _record("a", blank[0], "test"), _record("b", blank[1], "train")))["proved"]


def test_near_duplicates_are_only_counted_where_conversion_does_not_compare_them(
    parts: list[Image.Image], tmp_path: Path
) -> None:
    held = _record("a", _encoded(parts[0]), "test")
    folder = _folder(tmp_path, held, _record("b", _encoded(parts[0], "JPEG", quality=90), "train"))
    result = _compared(folder, near_duplicates=False)
    assert (result["proved"], result["problems"], result["near_duplicates"]) == (True, [], False)
    assert result["alike"] == [{"kind": "near-duplicate", "of": "candidate", "ids": ["a"], "like": ["b"]}]


def test_what_is_not_known_of_the_candidate_is_not_proved(small_shards: Path) -> None:
    test = hashes.collect(small_shards, ["test"])
    result = separation.compare(test, {"candidate": None, "production": None})
    assert (result["proved"], result["problems"], result["unknown"]) == (False, [], ["candidate", "production"])


def test_a_production_that_saw_test_images_is_named(small_shards: Path) -> None:
    seen, test = hashes.collect(small_shards, hashes.SEEN), hashes.collect(small_shards, ["test"])
    result = separation.compare(test, {"candidate": seen, "production": hashes.unite([seen, test[:3]])})
    assert result["problems"] == [
        {
            "kind": "same bytes",
            "of": "production",
            "ids": test["id"][:3].to_pylist(),
            "like": test["id"][:3].to_pylist(),
        }
    ]
    assert separation.compare(test, {"candidate": seen, "production": None})["proved"] is True


def test_without_test_images_nothing_is_proved(small_shards: Path) -> None:
    seen = hashes.collect(small_shards, hashes.SEEN)
    assert separation.compare(seen[:0], {"candidate": seen})["proved"] is False
    assert separation.compare(seen, {"candidate": seen[:0]})["proved"] is True


@pytest.mark.parametrize("apart", [0.8, 0.95, 1.05, 1.2])
def test_the_rule_itself_decides_on_images_that_are_at_hand(apart: float, tmp_path: Path) -> None:
    one, other = _pair(apart)
    folder = _folder(tmp_path, _record("a", one, "test"), _record("b", other, "train"))
    seen, test = hashes.collect(folder, hashes.SEEN), hashes.collect(folder, ["test"])
    checked = separation.check(test, seen, folder)
    assert checked["copies"].to_pylist() == [apart < 1]
    opposite = checked.set_column(2, separation.PAIRS.field("copies"), pa.array([apart > 1]))
    for pairs, copies in ((checked, apart < 1), (opposite, apart > 1)):
        assert bool(separation.compare(test, {"candidate": seen}, pairs)["problems"]) is copies
    elsewhere = _folder(tmp_path, _record("a", one, "test"))
    assert len(separation.check(test, seen, elsewhere)) == 0


def _pair(apart: float) -> tuple[bytes, bytes]:
    """Two images whose thumbnails are so far apart, as a share of the bound of near-duplicates."""
    rng = np.random.default_rng(3)
    base, noise = (np.kron(rng.normal(size=(32, 32)), np.ones((8, 8))) for _ in range(2))

    def shares(amount: float) -> tuple[float, bytes, bytes]:
        one, other = (
            Image.fromarray(np.clip(np.rint(128 + 30 * image), 0, 255).astype(np.uint8))
            for image in (base, base + amount * noise)
        )
        (look, contrast), (other_look, _) = (duplicates.thumbnail(image) for image in (one, other))
        distance = float(np.sqrt(((look.astype(float) - other_look.astype(float)) ** 2).mean()))
        return distance / max(0.02, 0.5 / contrast), _encoded(one), _encoded(other)

    amounts = np.linspace(0.005, 0.04, 300)
    _, one, other = min((shares(amount) for amount in amounts), key=lambda trial: abs(trial[0] - apart))
    return one, other


def test_a_near_duplicate_of_a_validation_image_is_a_problem(parts: list[Image.Image], tmp_path: Path) -> None:
    before = _folder(tmp_path, _record("a", _encoded(parts[0]), "train"))
    table = hashes.collect(before, hashes.SEEN)
    png, jpeg = _encoded(parts[1]), _encoded(parts[1], "JPEG", quality=90)
    folder = _folder(tmp_path, _record("b", png, "test"), _record("c", jpeg, "validation"))
    test, seen = hashes.collect(folder, ["test"]), hashes.unite([table, hashes.collect(folder, ["validation"])])
    checked = separation.check(test, seen, folder)
    result = separation.compare(test, {"candidate": seen, "production": table}, checked)
    assert result["against"] == {"candidate": 2, "production": 1}
    assert result["problems"] == [{"kind": "near-duplicate", "of": "candidate", "ids": ["b"], "like": ["c"]}]
    assert separation.compare(test, {"candidate": seen}, checked, near_duplicates=False)["proved"] is True
    assert separation.compare(test, {"candidate": None, "production": table}, checked)["proved"] is False


def test_an_image_that_is_a_copy_of_another_of_its_part_counts_as_its_part(
    parts: list[Image.Image], tmp_path: Path
) -> None:
    held = _record("a", _encoded(parts[0]), "test", "7")
    copy = _record("b", _encoded(parts[0], "JPEG", quality=90), "train", "7")
    for near_duplicates in (True, False):
        result = _compared(_folder(tmp_path, held, copy), near_duplicates)
        assert [problem["kind"] for problem in result["problems"]] == ["same part"]
