"""Augmentation of training images: mirroring, brightness and contrast, none of which makes or hides a defect."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from adfm.records import Box

# As it is, mirrored left to right, top to bottom, and both. No more: a frozen tower's features of each are cached.
VIEWS = 4


def view(image: Image.Image, number: int, seed: Sequence[int]) -> Image.Image:
    """Return a view, 0 to `VIEWS` - 1, of an RGB image; `seed` decides its brightness and contrast, 0 is unchanged."""
    if number == 0:
        return image
    if number & 1:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if number & 2:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    rng = np.random.default_rng([*seed, number])
    contrast, shift = rng.uniform(0.8, 1.25), rng.normal(0, 15)
    pixels = np.asarray(image, np.float32)
    mean = pixels.mean()
    return Image.fromarray(np.clip((pixels - mean) * contrast + mean + shift, 0, 255).round().astype(np.uint8))


def view_of_box(box: Box, number: int, width: float, height: float) -> Box:
    """Return a box of the image, in any frame of this width and height, as it lies in a view."""
    x1, y1, x2, y2 = box
    if number & 1:
        x1, x2 = width - x2, width - x1
    if number & 2:
        y1, y2 = height - y2, height - y1
    return Box(x1, y1, x2, y2)
