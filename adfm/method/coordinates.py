"""The frame in which a model writes its boxes; `adfm.models.families` knows that of each family."""

from __future__ import annotations

from typing import NamedTuple

from adfm.records import Box


class Frame(NamedTuple):
    """The units in which a model writes boxes: the whole image spans `width` by `height` of them."""

    width: float
    height: float

    def to_pixels(self, box: Box, width: int, height: int) -> Box:
        """A box of this frame, in pixels of the original image of `width` by `height`. Not clipped."""
        x, y = width / self.width, height / self.height
        return Box(box.x1 * x, box.y1 * y, box.x2 * x, box.y2 * y)

    def from_pixels(self, box: Box, width: int, height: int) -> Box:
        """A box in pixels of the original image of `width` by `height`, in this frame. Not clipped."""
        x, y = self.width / width, self.height / height
        return Box(box.x1 * x, box.y1 * y, box.x2 * x, box.y2 * y)


# The images of the published runs, as their model saw them.
PUBLISHED = Frame(512, 512)
