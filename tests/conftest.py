"""Fixtures that several folders of tests use."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def mvtec_folder(tmp_path: Path) -> Path:
    """A small data set in the MVTec AD layout: 2 categories, each 4 normal to train, 10 normal and 2 x 5 defective."""
    root = tmp_path / "raw" / "tiny"
    rng = np.random.default_rng(0)
    for category in ("bolt", "tile"):
        for folder, count in (("train/good", 4), ("test/good", 10), ("test/hole", 5), ("test/stain", 5)):
            for number in range(count):
                image = rng.integers(0, 255, (32, 48, 3), dtype=np.uint8)
                path = root / category / folder / f"{number:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.parent.name != "good":
                    mask = np.zeros((32, 48), np.uint8)
                    mask[4 + number : 10 + number, 20:28] = 255
                    image[mask > 0] = 255
                    mask_path = root / category / "ground_truth" / path.parent.name / f"{number:03d}_mask.png"
                    mask_path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask).save(mask_path)
                Image.fromarray(image).save(path)
    return root


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded data set at its smallest, as shards."""
    from adfm.data import synthetic
    from adfm.data.conversion import convert
    from adfm.params import Params

    folder = tmp_path_factory.mktemp("small")
    synthetic.generate(folder / "raw", images=20)
    convert(folder / "raw", folder / "shards", Params())
    return folder / "shards"
