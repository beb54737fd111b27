"""The frame in which a model writes its boxes; `adfm.models.families` has that of each family."""

from typing import NamedTuple

from adfm.records import Box


class Frame(NamedTuple):
    """The units in which a model writes boxes: the whole image spans `width` by `height` of them."""

    width: float
    height: float

    def to_pixels(self, box: Box, width: int, height: int) -> Box:
        """Convert a box of this frame to pixels of the original image of `width` by `height`. Not clipped."""
        x, y = width / self.width, height / self.height
        return Box(box.x1 * x, box.y1 * y, box.x2 * x, box.y2 * y)

    def from_pixels(self, box: Box, width: int, height: int) -> Box:
        """Convert a box in pixels of the original image of `width` by `height` to this frame. Not clipped."""
        x, y = self.width / width, self.height / height
        return Box(box.x1 * x, box.y1 * y, box.x2 * x, box.y2 * y)


# A square image of the published runs: max_pixels 262144, which Qwen2.5-VL's processor rounds to multiples of 28.
PUBLISHED = Frame(504, 504)
