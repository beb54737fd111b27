"""The frame in which a model writes its boxes, for every model family. No other file knows families' frames."""

from __future__ import annotations

from typing import Any, NamedTuple

from adfm.errors import AdfmError
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


# A square image of the published runs as their model saw it: max_pixels 262144, which Qwen2.5-VL's processor rounds to
# multiples of 28 pixels.
PUBLISHED = Frame(504, 504)


def frame_of(family: str, processor: Any, width: int, height: int) -> Frame:
    """The frame that a family's models use on an image of `width` by `height` original pixels.

    Args:
        family: `model_type` of the model's configuration: `qwen2_5_vl` (pixels of the image as its processor resizes
            it) or `qwen3_vl` (0 to 1000 on either axis, whatever the image's shape).
        processor: The model's processor; only its `image_processor` is read.
        width: Width of the original image in pixels.
        height: Height of the original image in pixels.

    Raises:
        AdfmError: The family is unknown, or the image is too narrow for the processor.
    """
    if family == "qwen3_vl":
        return Frame(1000, 1000)
    if family != "qwen2_5_vl":
        raise AdfmError(f"model family {family!r} has no known coordinate frame; use a qwen2_5_vl or qwen3_vl model")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    images = processor.image_processor
    try:
        resized_height, resized_width = smart_resize(
            height,
            width,
            factor=images.patch_size * images.merge_size,
            min_pixels=images.size["shortest_edge"],
            max_pixels=images.size["longest_edge"],
        )
    except ValueError as error:
        raise AdfmError(
            f"an image of {width}x{height} pixels cannot be resized for the model: {error}; crop it"
        ) from None
    return Frame(resized_width, resized_height)
