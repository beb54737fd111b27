"""Further views of a training image: mirrored, a little brighter or darker, of a little more or less contrast.

None of them makes a defect of what is none or hides one: nothing is turned, cut, scaled, blurred or painted over. An
image has `VIEWS` views and no more, so that what a frozen tower sees in them is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from adfm.records import Box

VIEWS = 4
"""Views of an image: as it is, mirrored left to right, top to bottom, and both."""


def view(image: Image.Image, number: int, seed: Sequence[int]) -> Image.Image:
    """One view of an image.

    Args:
        image: RGB.
        number: 0 to `VIEWS` - 1; 0 is the image as it is.
        seed: Decides the brightness and contrast of the other views.
    """
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
    """Where a box of the image lies in one of its views.

    Args:
        box: In any frame.
        number: As in `view`.
        width: Width of that frame.
        height: Height of that frame.
    """
    x1, y1, x2, y2 = box
    if number & 1:
        x1, x2 = width - x2, width - x1
    if number & 2:
        y1, y2 = height - y2, height - y1
    return Box(x1, y1, x2, y2)
