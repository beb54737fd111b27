from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from adfm.data import synthetic
from adfm.errors import AdfmError

EVERY = {**synthetic.TARGET_CATEGORIES, **synthetic.SOURCE_CATEGORIES}


def test_base_and_data_set_share_no_category() -> None:
    assert not set(synthetic.TARGET_CATEGORIES) & set(synthetic.SOURCE_CATEGORIES)
    assert len(synthetic.TARGET_CATEGORIES) >= 6 and len(synthetic.DEFECTS) >= 5


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(EVERY)), st.sampled_from([None, *synthetic.DEFECTS]), st.integers(0, 2**32))
def test_mask_is_where_the_defect_is(category: str, defect: str | None, seed: int) -> None:
    image, mask = synthetic.draw(np.random.default_rng(seed), EVERY[category], defect)
    assert image.shape == (synthetic.SIZE, synthetic.SIZE, 3) and image.dtype == np.uint8
    assert set(np.unique(mask)) <= {0, 255}
    assert mask.any() == (defect is not None)


def test_a_defect_changes_the_pixels_under_its_mask() -> None:
    for defect in synthetic.DEFECTS:
        for seed in range(5):
            good, _ = synthetic.draw(np.random.default_rng(seed), synthetic.TARGET_CATEGORIES["gear"])
            bad, mask = synthetic.draw(np.random.default_rng(seed), synthetic.TARGET_CATEGORIES["gear"], defect)
            change = np.abs(good.astype(int) - bad.astype(int)).mean(-1)
            assert change[mask > 0].mean() > 2 * change[mask == 0].mean()


def test_defects_come_in_many_sizes() -> None:
    shares = []
    for seed in range(80):
        _, mask = synthetic.draw(np.random.default_rng(seed), synthetic.TARGET_CATEGORIES["weave"], "spot")
        ys, xs = np.nonzero(mask)
        shares.append(np.ptp(ys) * np.ptp(xs) / mask.size)
    assert min(shares) < 0.01 and max(shares) > 0.08


def test_layout_is_that_of_mvtec_ad(tmp_path: Path) -> None:
    synthetic.generate(tmp_path, images=20)
    for category in synthetic.TARGET_CATEGORIES:
        folder = tmp_path / category
        assert len(list(folder.glob("train/good/*.png"))) == 2
        assert len(list(folder.glob("test/good/*.png"))) == 9
        for defect in synthetic.DEFECTS:
            images = {p.stem for p in folder.glob(f"test/{defect}/*.png")}
            masks = {p.stem for p in folder.glob(f"ground_truth/{defect}/*.png")}
            assert images and masks == {f"{name}_mask" for name in images}


def test_same_seed_same_bytes_other_seed_other_images(tmp_path: Path) -> None:
    def digest(name: str, seed: int) -> dict[str, str]:
        synthetic.generate(tmp_path / name, seed=seed, images=20)
        files = sorted((tmp_path / name).rglob("*.png"))
        return {p.relative_to(tmp_path / name).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    first, again, other = digest("a", 0), digest("b", 0), digest("c", 1)
    assert first == again
    assert first.keys() == other.keys() and not set(first.values()) & set(other.values())


@pytest.mark.parametrize("arguments", [{"images": 5}, {"seed": -1}])
def test_unusable_arguments_are_named(tmp_path: Path, arguments: dict[str, int]) -> None:
    with pytest.raises(AdfmError, match=next(iter(arguments))):
        synthetic.generate(tmp_path, **arguments)


def test_images_open(tmp_path: Path) -> None:
    synthetic.generate(tmp_path, images=20)
    for file in tmp_path.rglob("*.png"):
        with Image.open(file) as image:
            assert image.size == (synthetic.SIZE, synthetic.SIZE)
