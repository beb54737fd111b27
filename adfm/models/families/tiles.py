"""Images as InternVL sees them: stretched over a grid of square tiles, and once more as a single tile."""

from collections.abc import Mapping
from typing import Any

from adfm.errors import AdfmError
from adfm.models.families.family import Vision


def set_max_pixels(images: Any, max_pixels: int) -> None:
    """Limit the tiles of an image to those that `max_pixels` hold."""
    height, width = images.size["height"], images.size["width"]
    if max_pixels < height * width:
        raise AdfmError(
            f"model.max_pixels: the model sees nothing smaller than a tile of {width}x{height} pixels; "
            f"set {height * width} or more"
        )
    images.max_patches = max_pixels // (height * width)
    images.min_patches = min(images.min_patches, images.max_patches)


def max_pixels(settings: Mapping[str, Any]) -> int:
    """The pixels of the most tiles."""
    return int(settings["max_patches"] * settings["size"]["height"] * settings["size"]["width"])


def resized(images: Any, width: int, height: int) -> tuple[int, int]:
    """Width and height of the grid of tiles."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    tile = images.size["height"], images.size["width"]
    columns, rows = get_optimal_tiled_canvas((height, width), tile, images.min_patches, images.max_patches)
    return columns * tile[1], rows * tile[0]


def cost(config: Any, pixels: int) -> Vision:
    """The cost of an image of that many pixels."""
    vision = config.vision_config
    tile = vision.image_size[0] * vision.image_size[1]
    tiles = max(1, pixels // tile)
    tiles += tiles > 1  # the whole image once more
    patches = tiles * (tile // (vision.patch_size[0] * vision.patch_size[1]) + 1)  # and the class token of each
    return Vision(patches, tiles * config.image_seq_length, vision.num_hidden_layers)


def pairs(processor: Any, config: Any) -> dict[str, tuple[Any, Any]]:
    """Values that must be equal in processor and model."""
    size = processor.image_processor.size
    return {
        "pixels of a tile": ((size["height"], size["width"]), tuple(config.vision_config.image_size)),
        "tokens of a tile": (processor.image_seq_length, config.image_seq_length),
        "number of the image token": (processor.image_token_id, config.image_token_id),
    }
