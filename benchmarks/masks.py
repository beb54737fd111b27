"""How far boxes move when the edges of masks are soft: clean masks are made soft, and read by several rules.

    python benchmarks/masks.py              # masks of the embedded data set
    python benchmarks/masks.py FOLDER       # every PNG and BMP below a folder that is black and white but for its edges

A clean mask is what is at least half of a file's maximum. Boxes are those of `adfm convert` with its defaults. For each
change and rule: masks whose boxes are as many and have every side within a pixel of the clean one, the largest distance
of a side, and the area of all boxes together as a multiple of the clean one (median, largest).
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from adfm.data import masks, synthetic
from adfm.params import Convert
from adfm.records import Box

PARAMS = Convert()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--most", type=int, default=400, help="masks to try")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as empty:
        folder = args.folder or Path(empty)
        if not args.folder:
            synthetic.generate(folder)
        clean = list(_clean(folder, args.most))
    print(f"{len(clean)} masks with defects")
    print("| change | rule | within a pixel | other number of boxes | farthest side | area, median | area, largest |")
    print("|---|---|---|---|---|---|---|")
    for change, soften in CHANGES.items():
        for rule, read in RULES.items():
            _report(change, rule, [_compared(mask, *soften(mask), read) for mask in clean])


def _clean(folder: Path, most: int) -> Iterator[np.ndarray]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".png", ".bmp"))
    masks_ = 0
    for path in paths:
        with Image.open(path) as file:
            if file.mode not in ("1", "L", "P"):
                continue
            values = np.asarray(file.convert("L"))
        clean = values >= max(1, values.max() / 2)
        soft = (values > 0) & (values < values.max()) & (np.abs(values - values.max() / 2.0) < values.max() / 4)
        if clean.any() and not clean.all() and soft.mean() < 0.01 and clean.mean() < 0.9 and masks_ < most:
            masks_ += 1
            yield np.where(clean, np.uint8(255), np.uint8(0))


def _boxes(mask: np.ndarray) -> list[Box]:
    return masks.to_boxes(mask, PARAMS.dilation, PARAMS.connectivity, PARAMS.min_area)


def _compared(
    clean: np.ndarray, soft: np.ndarray, scale: float, read: Callable[[np.ndarray], np.ndarray]
) -> tuple[bool, float, float]:
    """Whether the number of boxes is the same, the farthest side in pixels of the soft mask, and the ratio of areas."""
    expected = [Box(*(side * scale for side in box)) for box in _boxes(clean)]
    boxes = _boxes(read(soft))
    ratio = sum(box.area for box in boxes) / max(1.0, sum(box.area for box in expected))
    if len(boxes) != len(expected):
        return False, np.inf, ratio
    left = list(boxes)
    farthest = 0.0
    for box in expected:
        nearest = min(left, key=lambda other: max(abs(a - b) for a, b in zip(box, other, strict=True)))
        left.remove(nearest)
        farthest = max(farthest, *(abs(a - b) for a, b in zip(box, nearest, strict=True)))
    return True, farthest, ratio


def _report(change: str, rule: str, results: list[tuple[bool, float, float]]) -> None:
    same, farthest, ratio = (np.array(column) for column in zip(*results, strict=True))
    distance = farthest[same.astype(bool)].max(initial=0)
    print(
        f"| {change} | {rule} | {(farthest <= 1).mean():.1%} | {int((~same).sum())} | {distance:.1f}"
        f" | {np.median(ratio):.2f} | {ratio.max():.2f} |"
    )


def _filtered(mask: np.ndarray, radius: float) -> tuple[np.ndarray, float]:
    return np.asarray(Image.fromarray(mask).filter(ImageFilter.GaussianBlur(radius))), 1


def _compressed(mask: np.ndarray, quality: int) -> tuple[np.ndarray, float]:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer)), 1


def _resized(mask: np.ndarray, scale: float, how: Image.Resampling) -> tuple[np.ndarray, float]:
    height, width = mask.shape
    return np.asarray(Image.fromarray(mask).resize((round(width * scale), round(height * scale)), how)), scale


def _numbered(mask: np.ndarray, first: int, step: int) -> tuple[np.ndarray, float]:
    from scipy import ndimage

    areas, _ = ndimage.label(mask, np.ones((3, 3)))
    return np.where(areas > 0, np.minimum(first + step * (areas - 1), 255), 0).astype(np.uint8), 1


CHANGES: dict[str, Callable[[np.ndarray], tuple[np.ndarray, float]]] = {
    "none": lambda mask: (mask, 1),
    "blur, radius 1": lambda mask: _filtered(mask, 1),
    "blur, radius 2": lambda mask: _filtered(mask, 2),
    "JPEG 95": lambda mask: _compressed(mask, 95),
    "JPEG 75": lambda mask: _compressed(mask, 75),
    "JPEG 30": lambda mask: _compressed(mask, 30),
    "half as large, bilinear": lambda mask: _resized(mask, 0.5, Image.Resampling.BILINEAR),
    "half as large, bicubic": lambda mask: _resized(mask, 0.5, Image.Resampling.BICUBIC),
    "JPEG 75, then half as large": lambda mask: _resized(_compressed(mask, 75)[0], 0.5, Image.Resampling.BICUBIC),
    "1.5 times, bicubic": lambda mask: _resized(mask, 1.5, Image.Resampling.BICUBIC),
    "twice as large, Lanczos": lambda mask: _resized(mask, 2, Image.Resampling.LANCZOS),
    "numbered 1, 2, 3 …": lambda mask: _numbered(mask, 1, 1),
    "numbered 40, 80, 120 …": lambda mask: _numbered(mask, 40, 40),
}
RULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "not black": lambda values: values > 0,
    "half of the maximum": lambda values: (values > 0) & (values >= values.max() / 2),
    "adfm": lambda values: masks.defects(values, PARAMS.mask_threshold),
}

if __name__ == "__main__":
    main()
