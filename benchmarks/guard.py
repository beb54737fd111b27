"""What the input guard refuses: good images (none should be), spoilt ones, and those of other data sets.

python benchmarks/guard.py [SHARDS ...]

The guard is fitted on the shards' training and validation images; the share of test images that it refuses is printed
as they are, and after each way of spoiling them. With several folders of shards, the test images of the others count as
photographs of something else. Without any, the embedded data set is drawn. Ends with status 1 if more than 1 % of the
good images are refused, or less than all of the black, white, grey and noisy ones.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

from adfm.data import shards as shards_
from adfm.data import synthetic
from adfm.data.conversion import convert
from adfm.evaluation import guard as guard_
from adfm.params import Params

MOST_REFUSED = 0.01
IMAGES = 400  # of a test split that are spoilt, at most

Array = NDArray[np.float64]
Spoil = Callable[[Image.Image], Image.Image]


def pixels(change: Callable[[Array], Array]) -> Spoil:
    """Spoils an image through its pixels, (height, width, 3), 0 to 255."""
    return lambda image: Image.fromarray(np.clip(change(np.asarray(image, float)), 0, 255).astype(np.uint8))


def noise(mean: float, spread: float) -> Spoil:
    """Replaces an image by noise around a grey value."""
    return pixels(lambda values: random.normal(mean, spread, values.shape))


def blurred(share: float) -> Spoil:
    """Blurs an image by a share of its longer side."""
    return lambda image: image.filter(ImageFilter.GaussianBlur(share * max(image.size)))


def enlarged(image: Image.Image) -> Image.Image:
    """The middle half of an image, at its size."""
    width, height = image.size
    middle = (width // 4, height // 4, width // 4 + width // 2, height // 4 + height // 2)
    return image.resize(image.size, Image.Resampling.BICUBIC, middle)


def hidden(image: Image.Image) -> Image.Image:
    """An image whose lower half is black."""
    result = Image.new("RGB", image.size)
    result.paste(image.crop((0, 0, image.width, image.height // 2)))
    return result


def compressed(image: Image.Image) -> Image.Image:
    """An image after JPEG of quality 5."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=5)
    return Image.open(buffer).convert("RGB")


random = np.random.default_rng(0)
ALWAYS: dict[str, Spoil] = {
    "black": pixels(lambda values: values * 0),
    "black with noise of a sensor": noise(2, 2),
    "white": pixels(lambda values: values * 0 + 255),
    "grey": pixels(lambda values: values * 0 + 128),
    "grey with noise of a sensor": noise(128, 4),
    "noise": noise(128, 80),
    "4 times as large": lambda image: image.resize((4 * image.width, 4 * image.height)),
}
OFTEN: dict[str, Spoil] = {
    "blurred by 1 % of the side": blurred(0.01),
    "blurred by 2 %": blurred(0.02),
    "blurred by 4 %": blurred(0.04),
    "exposure / 4": pixels(lambda values: values / 4),
    "exposure / 2": pixels(lambda values: values / 2),
    "exposure x 2": pixels(lambda values: values * 2),
    "exposure x 4": pixels(lambda values: values * 4),
    "noise of 20 grey values": pixels(lambda values: values + random.normal(0, 20, values.shape)),
    "red + 20 %, blue - 20 %": pixels(lambda values: values * [1.2, 1, 0.8]),
    "colours inverted": ImageOps.invert,
    "lower half hidden": hidden,
    "middle enlarged twice": enlarged,
    "JPEG of quality 5": compressed,
    "turned by 90 degrees": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "turned by 180 degrees": lambda image: image.transpose(Image.Transpose.ROTATE_180),
    "mirrored": ImageOps.mirror,
}


def images(shards: Path) -> list[Image.Image]:
    """Test images, evenly spaced."""
    chosen = set(guard_.choose(["all"] * len(shards_.ids(shards, "test")), IMAGES))
    records = (record for number, record in enumerate(shards_.read(shards, "test")) if number in chosen)
    return [Image.open(io.BytesIO(record.image)).convert("RGB") for record in records]


def refused(guard: guard_.Guard, tried: list[Image.Image]) -> float:
    """The share of images that are refused."""
    return sum(guard.judge(image) is not None for image in tried) / len(tried)


def main(folders: list[Path]) -> int:
    """Prints a table, a column a data set, in percent."""
    tests = {folder.name: images(folder) for folder in folders}
    guards = {}
    for folder in folders:
        start = time.perf_counter()
        guards[folder.name] = guard_.fit(folder, "test")
        print(f"{folder.name}: {guards[folder.name].summary} Fitted in {time.perf_counter() - start:.1f} s.")
    width = max(len(name) for name in (*ALWAYS, *OFTEN))
    print(f"{'refused, %':{width}}", *(f"{name:>14}" for name in tests))
    rows = {"as they are": tests} | {
        name: {own: [spoil(image) for image in its] for own, its in tests.items()}
        for name, spoil in (ALWAYS | OFTEN).items()
    }
    rates = {name: [refused(guards[own], its) for own, its in row.items()] for name, row in rows.items()}
    for name, its in rates.items():
        print(f"{name:{width}}", *(f"{100 * rate:14.1f}" for rate in its))
    for other, its in tests.items() if len(tests) > 1 else ():
        scaled = {own: [image.resize(tests[own][0].size) for image in its] for own in tests}
        shares = (f"{100 * refused(guards[own], scaled[own]):14.1f}" if own != other else f"{'':>14}" for own in tests)
        print(f"{f'{other}, at their size':{width}}", *shares)
    for own, its in tests.items():
        start = time.perf_counter()
        refused(guards[own], its)
        print(f"{own}: {1000 * (time.perf_counter() - start) / len(its):.1f} ms an image of {its[0].size}")
    whole = all(rate == 1 for name in ALWAYS for rate in rates[name])
    return 0 if whole and max(rates["as they are"]) <= MOST_REFUSED else 1


if __name__ == "__main__":
    if len(sys.argv) > 1:
        raise SystemExit(main([Path(name) for name in sys.argv[1:]]))
    with TemporaryDirectory() as temporary:
        synthetic.generate(Path(temporary) / "raw")
        convert(Path(temporary) / "raw", Path(temporary) / "embedded", Params())
        raise SystemExit(main([Path(temporary) / "embedded"]))
