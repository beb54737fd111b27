import io
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_images

from adfm.data import duplicates, synthetic

PHOTOGRAPHS = [Image.fromarray(pixels) for pixels in load_sample_images().images]


def _pairs(images: list[Image.Image]) -> set[tuple[int, int]]:
    thumbnails, contrasts = zip(*map(duplicates.thumbnail, images), strict=True)
    return {(one, other) for one, other in duplicates.near_duplicates(_looks(thumbnails, contrasts)).tolist()}


def _looks(thumbnails: Sequence[np.ndarray], contrasts: Sequence[float]) -> duplicates.Looks:
    stacked = np.stack(thumbnails)
    return duplicates.Looks(stacked, np.array(contrasts), duplicates.coarse(stacked))


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue()))


def _draft(image: Image.Image) -> Image.Image:
    decoded = _jpeg(image, 90)
    decoded.draft("L", (256, 256))
    return decoded


def _resized(image: Image.Image, by: float) -> Image.Image:
    return image.resize((round(image.width * by), round(image.height * by)), Image.Resampling.LANCZOS)


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    **{f"JPEG {quality}": lambda image, quality=quality: _jpeg(image, quality) for quality in (50, 75, 95)},  # type: ignore[misc]
    "JPEG decoded at a smaller scale": _draft,
    "smaller": lambda image: _resized(image, 0.75),
    "larger": lambda image: _resized(image, 1.25),
    "smaller JPEG": lambda image: _jpeg(_resized(image, 0.75), 85),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.04),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.9),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.9),
    "grey": lambda image: image.convert("L"),
}


@pytest.fixture(scope="module")
def parts() -> list[Image.Image]:
    """One good part of every category, large."""
    rng = np.random.default_rng(1)
    return [Image.fromarray(synthetic.draw(rng, draw, None, 320)[0]) for draw in synthetic.TARGET_CATEGORIES.values()]


@pytest.mark.parametrize("copy", COPIES)
def test_a_picture_saved_twice_is_found(copy: str, parts: list[Image.Image]) -> None:
    images = PHOTOGRAPHS + parts
    count = len(images)
    assert _pairs(images + [COPIES[copy](image) for image in images]) == {(i, i + count) for i in range(count)}


def _photographed_again(image: Image.Image, rng: np.random.Generator, shift: float) -> Image.Image:
    """The same thing on the same rig: moved a little, in slightly other light, with the noise of the sensor."""
    moved = image.transform(image.size, Image.Transform.AFFINE, (1, 0, shift, 0, 1, shift), Image.Resampling.BICUBIC)
    pixels = np.asarray(moved.crop((8, 8, image.width - 8, image.height - 8)), np.float32)
    light = 1 + 0.02 * np.linspace(-1, 1, pixels.shape[1])[None, :, None]
    return Image.fromarray((pixels * light + rng.normal(0, 3, pixels.shape)).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("shift", [1.5, 3, 6])
def test_another_photograph_of_the_same_is_none(shift: float) -> None:
    rng = np.random.default_rng(0)
    again = [_photographed_again(image, rng, shift * step) for image in PHOTOGRAPHS for step in range(4)]
    assert _pairs(again) == set()


def test_parts_of_one_product_are_none() -> None:
    rng = np.random.default_rng(0)
    for draw in synthetic.TARGET_CATEGORIES.values():
        assert _pairs([Image.fromarray(synthetic.draw(rng, draw)[0]) for _ in range(30)]) == set()


def test_blank_pictures_are_none() -> None:
    rng = np.random.default_rng(0)
    blank = [np.full((60, 80), 99) + rng.integers(0, 3, (60, 80)) for _ in range(9)]
    assert _pairs([Image.fromarray(pixels.astype(np.uint8)) for pixels in blank]) == set()
    assert _pairs([Image.new("RGB", (1, 1))] * 2) == set()


def test_few_are_compared_however_many_are_alike() -> None:
    thumbnail, contrast = duplicates.thumbnail(PHOTOGRAPHS[0])
    pairs = duplicates.near_duplicates(_looks([thumbnail] * 200, [contrast] * 200))
    assert 100 <= len(pairs) <= 200 * 9
    assert [len(cluster) for cluster in duplicates.clusters(pairs)] == [200]


def test_vectors_are_no_further_apart_than_thumbnails() -> None:
    rng = np.random.default_rng(0)
    thumbnails = rng.normal(size=(20, duplicates.SIDE, duplicates.SIDE)).astype(np.float16)
    vectors = duplicates.coarse(thumbnails)
    for one in range(20):
        for other in range(one):
            apart = np.sqrt(((thumbnails[one].astype(float) - thumbnails[other].astype(float)) ** 2).mean())
            assert np.linalg.norm(vectors[one] - vectors[other]) <= apart + 1e-3


def test_clusters() -> None:
    pairs = np.array([[4, 9], [2, 9], [1, 7]])
    assert [cluster.tolist() for cluster in duplicates.clusters(pairs)] in ([[1, 7], [2, 4, 9]], [[2, 4, 9], [1, 7]])
    assert duplicates.clusters(pairs[:0]) == []
