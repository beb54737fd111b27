from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from adfm.data import shards as shards_
from adfm.errors import AdfmError
from adfm.evaluation import guard as guard_
from adfm.evaluation.guard import Guard, Range
from adfm.records import Record


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def pixels(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert("RGB")


def textures(count: int, mean: float, spread: float = 20, size: tuple[int, int] = (64, 48), seed: int = 0) -> list:
    """Grey images of noise, whose brightness varies a little."""
    rng = np.random.default_rng(seed)
    return [
        pixels(rng.normal(mean + rng.normal(0, 5), spread, (size[1], size[0]))).filter(ImageFilter.BoxBlur(1))
        for _ in range(count)
    ]


def write(folder: Path, **splits: list[Image.Image] | list[tuple[str, Image.Image]]) -> Path:
    """Shards of normal images; an image may come with its category."""
    folder.mkdir()
    records = []
    for split, images in splits.items():
        for number, entry in enumerate(images):
            category, image = entry if isinstance(entry, tuple) else ("part", entry)
            name = f"{split}-{number}"
            records.append(
                Record(
                    name, png(image), None, *image.size, "data", category, None, "normal", (), split,  # type: ignore[arg-type]
                    f"{name}.png", name,
                )
            )  # fmt: skip
    shards_.write(records, folder, 1000)
    return folder


@pytest.fixture(scope="module")
def embedded(small_shards: Path) -> Guard:
    return guard_.fit(small_shards, "test")


def images(shards: Path, split: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(record.image)).convert("RGB") for record in shards_.read(shards, split)]


# ------------------------------------------------------------------------------------------------ the embedded data set


def test_good_images_are_judged_and_counted(embedded: Guard, small_shards: Path) -> None:
    tried = images(small_shards, "test")
    refusals = [refusal for refusal in map(embedded.judge, tried) if refusal]
    assert len(refusals) <= 0.02 * len(tried)
    assert (embedded.split, embedded.tested) == ("test", len(tried))
    assert sum(embedded.refused.values()) == len(refusals)
    assert embedded.summary.startswith(f"Of {len(tried)} test images {len(refusals)} cannot be judged")
    assert all(embedded.judge(image) is None for image in images(small_shards, "validation"))
    assert all(embedded.judge(image) is None for image in images(small_shards, "train"))


rng = np.random.default_rng(0)
BLANK = {
    "black": ("uniform", "it is black, the same everywhere", np.zeros((128, 128))),
    "white": ("uniform", "it is white, the same everywhere", np.full((128, 128), 255)),
    "grey": ("uniform", "it is of one colour, the same everywhere", np.full((128, 128), 90)),
    "lens cap": ("black", "it is black: 100.0% of its pixels", rng.normal(2, 2, (128, 128))),
    "overexposed": ("white", "it is white: 100.0% of its pixels", rng.normal(253, 2, (128, 128))),
    "fog": ("far", "it is far from the training images: ", rng.normal(128, 4, (128, 128))),
    "noise": ("far", "it is far from the training images: ", rng.normal(128, 80, (128, 128, 3))),
}


@pytest.mark.parametrize("name", BLANK)
def test_blank_and_noisy_images_are_refused(name: str, embedded: Guard) -> None:
    kind, reason, values = BLANK[name]
    refusal = embedded.judge(pixels(values))
    assert refusal is not None and refusal.kind == kind and refusal.reason.startswith(reason)


def test_images_of_another_size_or_shape_are_refused(embedded: Guard, small_shards: Path) -> None:
    [image, *_] = images(small_shards, "test")
    assert embedded.judge(image.resize((140, 140))) is None
    large, small = embedded.judge(image.resize((512, 512))), embedded.judge(image.resize((64, 64)))
    assert large and small and (large.kind, small.kind) == ("size", "size")
    assert large.reason == "its size of 512 x 512 is not like the training images (longer side 128)"
    narrow = embedded.judge(image.resize((128, 90)))
    assert narrow and narrow.kind == "shape"
    assert "128 x 90, width over height 1.42, is not like the training images (1.00)" in narrow.reason


def test_blurred_images_are_refused_for_their_edges(embedded: Guard, small_shards: Path) -> None:
    refusals = [embedded.judge(image.filter(ImageFilter.GaussianBlur(4))) for image in images(small_shards, "test")]
    reasons = [refusal.reason for refusal in refusals if refusal and refusal.kind == "far"]
    assert len(reasons) > 0.95 * len(refusals)
    assert sum("edges" in reason or "sharpness" in reason for reason in reasons) > 0.9 * len(reasons)


def test_the_same_shards_give_the_same_guard(embedded: Guard, small_shards: Path) -> None:
    assert guard_.fit(small_shards, "test").model_dump_json() == embedded.model_dump_json()


def test_a_guard_is_read_as_it_was_written(embedded: Guard, small_shards: Path, tmp_path: Path) -> None:
    file = tmp_path / guard_.FILE
    assert guard_.read(file) is None
    file.write_text(json.dumps(embedded.model_dump(), allow_nan=False))
    read = guard_.read(file)
    assert read is not None and read.model_dump() == embedded.model_dump()
    for image in [*images(small_shards, "test")[:20], pixels(np.full((128, 128), 7.0)), pixels(BLANK["noise"][2])]:
        assert read.judge(image) == embedded.judge(image)


# ------------------------------------------------------------------------------------------------------- made data sets


def test_a_dark_field_plant_is_not_refused_for_being_dark(tmp_path: Path) -> None:
    """Black but for a few bright spots: the training images really are so."""
    rng = np.random.default_rng(0)

    def dark(spots: int) -> Image.Image:
        values = np.clip(rng.normal(2, 1, (96, 96)), 0, 9)
        rows, columns = rng.integers(0, 96, (2, spots))
        values[rows, columns] = rng.uniform(120, 250, spots)
        return pixels(values)

    train, validation, test = ([dark(int(rng.integers(60, 140))) for _ in range(count)] for count in (60, 30, 40))
    guard = guard_.fit(write(tmp_path / "shards", train=train, validation=validation, test=test), "test")
    assert 0.98 < guard.black < 1
    assert guard.tested == 40 and not guard.refused
    lens_cap = guard.judge(pixels(np.clip(rng.normal(2, 1, (96, 96)), 0, 9)))
    assert lens_cap is not None and lens_cap.kind == "black"
    uniform = guard.judge(Image.new("RGB", (96, 96)))
    assert uniform is not None and uniform.kind == "uniform"


def test_each_category_is_like_itself(tmp_path: Path) -> None:
    """Dark and bright products are judged; what lies between them is neither."""
    dark, bright = (textures(60, mean, seed=int(mean)) for mean in (50, 200))
    train = [("dark", image) for image in dark[:40]] + [("bright", image) for image in bright[:40]]
    rest = [("dark", image) for image in dark[40:]] + [("bright", image) for image in bright[40:]]
    guard = guard_.fit(write(tmp_path / "shards", train=train, validation=rest[::2], test=rest[1::2]), "test")
    assert not guard.refused
    [between] = textures(1, 125)
    refusal = guard.judge(between)
    assert refusal is not None and refusal.kind == "far"
    assert any(name in refusal.reason for name in ("brightness", "dark end", "middle grey", "bright end"))


def test_the_statistic_that_is_farthest_is_named(tmp_path: Path) -> None:
    guard = guard_.fit(write(tmp_path / "shards", train=textures(60, 120), test=textures(5, 120, seed=1)), "test")
    [image] = textures(1, 120, seed=2)
    assert guard.judge(image) is None
    red = guard.judge(pixels(np.asarray(image, float) + np.array([30, -15, 0])))
    assert red and "red against green" in red.reason and " above the most similar one" in red.reason
    smooth = guard.judge(image.filter(ImageFilter.GaussianBlur(3)))
    assert smooth and " below the most similar one" in smooth.reason
    assert f"limit {guard.limit:.1f}" in smooth.reason


def test_without_validation_images_the_training_images_give_the_limit(tmp_path: Path) -> None:
    guard = guard_.fit(write(tmp_path / "shards", train=textures(60, 120), test=textures(40, 120, seed=1)), "test")
    assert guard.images == {"train": 60} and guard.limit > 0
    assert sum(guard.refused.values()) <= 2


def test_a_far_validation_image_widens_the_limit(tmp_path: Path) -> None:
    train, test = textures(60, 120), textures(5, 120, seed=1)
    odd = textures(1, 170, seed=2)
    guard = guard_.fit(write(tmp_path / "shards", train=train, validation=odd, test=test), "test")
    narrow = guard_.fit(write(tmp_path / "others", train=train, validation=test, test=test), "test")
    assert guard.judge(odd[0]) is None
    assert narrow.judge(odd[0]) is not None and narrow.limit < guard.limit


def test_few_training_images_allow_no_distance(tmp_path: Path) -> None:
    guard = guard_.fit(write(tmp_path / "shards", train=textures(19, 120), test=textures(5, 120)), "test")
    assert guard.note == "19 training images are too few to tell how far another one is from them; 20 would do."
    assert guard.summary == f"Of 5 test images 0 cannot be judged. {guard.note}"
    assert guard.judge(pixels(BLANK["noise"][2]).resize((64, 48))) is None
    refusal = guard.judge(Image.new("RGB", (64, 48)))
    assert refusal is not None and refusal.kind == "uniform"


def test_without_training_images_only_uniform_and_blank_ones_are_refused(tmp_path: Path) -> None:
    guard = guard_.fit(write(tmp_path / "shards", test=textures(5, 120)), "test")
    assert guard.side is None and guard.images == {}
    assert guard.judge(textures(1, 120, size=(300, 40))[0]) is None
    for level, kind in ((0, "uniform"), (255, "uniform")):
        refusal = guard.judge(Image.new("RGB", (64, 48), (level,) * 3))
        assert refusal is not None and refusal.kind == kind


def test_refusals_of_the_test_split_are_counted(tmp_path: Path) -> None:
    train, validation, test = textures(60, 120), textures(30, 120, seed=1), textures(20, 120, seed=2)
    test[3], test[7] = Image.new("RGB", (64, 48)), textures(1, 120, size=(200, 150))[0]
    shards = write(tmp_path / "shards", train=train, validation=validation, test=test)
    guard = guard_.fit(shards, "test")
    assert (guard.tested, guard.refused) == (20, {"size": 1, "uniform": 1})
    assert guard.summary == "Of 20 test images 2 cannot be judged (size 1, uniform 1)."
    other = guard_.fit(shards, "validation")
    assert (other.split, other.tested, other.refused) == ("validation", 30, {})


def test_uniform_training_images_hide_no_black_ones(tmp_path: Path) -> None:
    train = [*textures(60, 120), Image.new("RGB", (64, 48))]
    guard = guard_.fit(write(tmp_path / "shards", train=train, test=textures(5, 120)), "test")
    assert guard.black < 0.9
    refusal = guard.judge(pixels(np.random.default_rng(0).normal(3, 1, (48, 64))))
    assert refusal is not None and refusal.kind == "black"


# -------------------------------------------------------------------------------------------------------- its parts


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 2**32 - 1))
def test_any_image_can_be_measured(width: int, height: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = pixels(rng.integers(0, 256, (height, width, 3)))
    measured = guard_.measure(image)
    assert measured.statistics.shape == (len(guard_.STATISTICS),)
    assert np.isfinite(measured.statistics).all()
    assert 0 <= measured.black <= 1 and 0 <= measured.white <= 1


@given(st.integers(0, 255), st.integers(1, 300), st.integers(1, 300))
def test_every_uniform_image_is_uniform(level: int, width: int, height: int) -> None:
    measured = guard_.measure(Image.new("RGB", (width, height), (level,) * 3))
    assert measured.uniform
    assert np.isfinite(measured.statistics).all()
    assert (measured.black, measured.white) == (float(level <= 10), float(level >= 245))
    refusal = Guard().judge(Image.new("RGB", (width, height), (level,) * 3))
    assert refusal is not None and refusal.kind == "uniform"


@given(
    st.lists(st.sampled_from("abcdefgh"), max_size=300),
    st.integers(8, 100),
)
def test_a_sample_has_images_of_every_category(categories: list[str], most: int) -> None:
    chosen = guard_.choose(categories, most)
    assert chosen == sorted(set(chosen)) and all(0 <= number < len(categories) for number in chosen)
    assert len(chosen) == min(most, len(categories))
    counts = {name: sum(categories[number] == name for number in chosen) for name in set(categories)}
    for name, count in counts.items():
        assert count >= min(categories.count(name), most // len(counts))


@pytest.mark.parametrize(
    ("distances", "beyond", "quantile"),
    [([], 0.1, 0), ([3], 0.001, 3), (range(100), 0.01, 98), (range(1, 1001), 0.001, 999), (range(999), 0.001, 998)],
)
def test_a_limit_leaves_out_at_most_its_share(distances: list[float], beyond: float, quantile: float) -> None:
    assert guard_._quantile(np.array(distances, float), beyond) == quantile


def test_the_distance_to_others_is_that_to_the_nearest() -> None:
    rows = np.random.default_rng(0).normal(size=(30, 4))
    pairs = np.sqrt(((rows[:, None] - rows[None]) ** 2).sum(axis=2)) + np.diag([np.inf] * 30)
    assert guard_._to_others(rows) == pytest.approx(pairs.min(axis=1), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limit": -1.0}, "limit: Input should be greater than or equal to 0"),
        ({"unknown": 1}, "unknown: Extra inputs"),
        ({"spread": [1.0]}, "it does not have 15 values a row"),
        ({"covariance": [[0.0] * 15] * 15}, "its covariance is not one"),
        ({"statistics": ["brightness"], "references": []}, "another release of adfm, which measured other statistics"),
    ],
)
def test_a_guard_that_cannot_be_one_is_refused(
    change: dict[str, object], message: str, embedded: Guard, tmp_path: Path
) -> None:
    file = tmp_path / guard_.FILE
    file.write_text(json.dumps(embedded.model_dump() | change))
    with pytest.raises(guard_.BadGuard) as error:
        guard_.read(file)
    assert message in str(error.value) and str(file) in str(error.value) and error.value.exit_code == 2
    file.write_bytes(b"\xff")
    with pytest.raises(guard_.BadGuard, match="cannot be read"):
        guard_.read(file)


def test_a_range_reaches_beyond_what_was_seen_by_its_margin() -> None:
    own = Range(low=100, high=200)
    assert [value for value in (60, 67, 100, 150, 299, 301) if own.holds(value, 1.5)] == [67, 100, 150, 299]


def test_shards_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(AdfmError, match="no test shards here"):
        guard_.fit(tmp_path, "test")
