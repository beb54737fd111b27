"""Images as Qwen's families see them: the aspect ratio is kept, and squares of patches are merged into tokens."""

from collections.abc import Mapping
from typing import Any

from adfm.errors import AdfmError
from adfm.models.families.family import Vision


def set_max_pixels(images: Any, max_pixels: int) -> None:
    """Limit the pixels of an image after resizing."""
    # Both are areas, whatever they are called.
    smallest = min(images.size["shortest_edge"], max_pixels)
    images.size = {"shortest_edge": smallest, "longest_edge": max_pixels}


def max_pixels(settings: Mapping[str, Any]) -> int:
    """The most pixels of an image after resizing."""
    return int(settings["size"]["longest_edge"])


def resized(images: Any, width: int, height: int) -> tuple[int, int]:
    """Width and height of an image after resizing: multiples of a merged patch."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    try:
        resized_height, resized_width = smart_resize(
            height,
            width,
            factor=images.patch_size * images.merge_size,
            min_pixels=images.size["shortest_edge"],
            max_pixels=images.size["longest_edge"],
        )
    except ValueError as error:
        raise AdfmError(f"an image of {width}x{height} cannot be resized for the model: {error}; crop it") from None
    return resized_width, resized_height


def cost(config: Any, pixels: int) -> Vision:
    """The cost of an image of that many pixels."""
    vision = config.vision_config
    patches = pixels // vision.patch_size**2
    return Vision(patches, patches // vision.spatial_merge_size**2, vision.depth)


def pairs(processor: Any, config: Any) -> dict[str, tuple[Any, Any]]:
    """Values that must be equal in processor and model."""
    images, vision = processor.image_processor, config.vision_config
    return {
        "pixels of a patch": (images.patch_size, vision.patch_size),
        "patches merged": (images.merge_size, vision.spatial_merge_size),
        "number of the image token": (processor.image_token_id, config.image_token_id),
    }
