"""Model families: everything that one needs beyond what transformers knows of it, an entry of `FAMILIES` each.

To add a family: add its entry, and a model of it with random weights to `tests/models/random_models.py`, which
`tests/training/test_families.py` takes along the whole path. If its images are cut otherwise than by `Patches` or
`Tiles`, write a third class with their functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from adfm.errors import AdfmError
from adfm.method.coordinates import Frame

Coordinates = Literal["pixels", "thousandths"]

UNITS: dict[Coordinates, str] = {
    "pixels": "in pixels of the image",
    "thousandths": "from 0 to 1000 across and down the image",
}
"""How the prompt asks for boxes, by the coordinates of a family."""


class Vision(NamedTuple):
    """What one image costs: `patches` go through `layers` of the vision tower and become `tokens` of the prompt."""

    patches: int
    tokens: int
    layers: int


class Images(Protocol):
    """How a family's image processor (`processor.image_processor`) cuts images."""

    @staticmethod
    def limit(images: Any, max_pixels: int) -> None:
        """Set the most pixels that an image has after resizing.

        Raises:
            AdfmError: The family cannot make images so small.
        """

    @staticmethod
    def limits(images: Any) -> dict[str, Any]:
        """The limits in force, as the processor's own keyword arguments."""

    @staticmethod
    def most(images: Any) -> int:
        """The most pixels that an image has after resizing."""

    @staticmethod
    def resized(images: Any, width: int, height: int) -> tuple[int, int]:
        """Width and height in pixels to which an image is resized before it is cut.

        Raises:
            AdfmError: The image is too narrow.
        """

    @staticmethod
    def cost(config: Any, pixels: int) -> Vision:
        """What an image of that many pixels after resizing costs a model of that configuration."""

    @staticmethod
    def compared(processor: Any, config: Any) -> dict[str, tuple[Any, Any]]:
        """What must be equal in a processor and in its model's configuration, by name."""


class Patches:
    """An image keeps its shape and is cut into patches, of which squares are merged into tokens: Qwen."""

    @staticmethod
    def limit(images: Any, max_pixels: int) -> None:  # noqa: D102 (as in `Images`, here and below)
        smallest = min(images.size["shortest_edge"], max_pixels)  # both are areas, whatever they are called
        images.size = {"shortest_edge": smallest, "longest_edge": max_pixels}

    @staticmethod
    def limits(images: Any) -> dict[str, Any]:  # noqa: D102
        return {"size": dict(images.size)}

    @staticmethod
    def most(images: Any) -> int:  # noqa: D102
        return int(images.size["longest_edge"])

    @staticmethod
    def resized(images: Any, width: int, height: int) -> tuple[int, int]:  # noqa: D102
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
            raise AdfmError(
                f"an image of {width}x{height} pixels cannot be resized for the model: {error}; crop it"
            ) from None
        return resized_width, resized_height

    @staticmethod
    def cost(config: Any, pixels: int) -> Vision:  # noqa: D102
        vision = config.vision_config
        patches = pixels // vision.patch_size**2
        return Vision(patches, patches // vision.spatial_merge_size**2, vision.depth)

    @staticmethod
    def compared(processor: Any, config: Any) -> dict[str, tuple[Any, Any]]:  # noqa: D102
        images, vision = processor.image_processor, config.vision_config
        return {
            "pixels of a patch": (images.patch_size, vision.patch_size),
            "patches merged": (images.merge_size, vision.spatial_merge_size),
            "number of the image token": (processor.image_token_id, config.image_token_id),
        }


class Tiles:
    """An image is stretched over a grid of square tiles, and seen once more as a single tile: InternVL."""

    @staticmethod
    def limit(images: Any, max_pixels: int) -> None:  # noqa: D102
        height, width = images.size["height"], images.size["width"]
        if max_pixels < height * width:
            raise AdfmError(
                f"model.max_pixels: the model sees nothing smaller than a tile of {width}x{height} pixels; "
                f"set {height * width} or more"
            )
        images.max_patches = max_pixels // (height * width)
        images.min_patches = min(images.min_patches, images.max_patches)

    @staticmethod
    def limits(images: Any) -> dict[str, Any]:  # noqa: D102
        return {"min_patches": images.min_patches, "max_patches": images.max_patches}

    @staticmethod
    def most(images: Any) -> int:  # noqa: D102
        return int(images.max_patches * images.size["height"] * images.size["width"])

    @staticmethod
    def resized(images: Any, width: int, height: int) -> tuple[int, int]:  # noqa: D102
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

        tile = images.size["height"], images.size["width"]
        columns, rows = get_optimal_tiled_canvas((height, width), tile, images.min_patches, images.max_patches)
        return columns * tile[1], rows * tile[0]

    @staticmethod
    def cost(config: Any, pixels: int) -> Vision:  # noqa: D102
        vision = config.vision_config
        tile = vision.image_size[0] * vision.image_size[1]
        tiles = max(1, pixels // tile)
        tiles += tiles > 1  # the whole image once more
        patches = tiles * (tile // (vision.patch_size[0] * vision.patch_size[1]) + 1)  # and the class token of each
        return Vision(patches, tiles * config.image_seq_length, vision.num_hidden_layers)

    @staticmethod
    def compared(processor: Any, config: Any) -> dict[str, tuple[Any, Any]]:  # noqa: D102
        size = processor.image_processor.size
        return {
            "pixels of a tile": ((size["height"], size["width"]), tuple(config.vision_config.image_size)),
            "tokens of a tile": (processor.image_seq_length, config.image_seq_length),
            "number of the image token": (processor.image_token_id, config.image_token_id),
        }


@dataclass(frozen=True)
class Family:
    """One model family.

    Args:
        models: The models that are of it, for people.
        processor: Name of its processor's class in transformers.
        coordinates: The units of its boxes: pixels of the image as its processor resizes it, or thousandths of the
            image's width and height.
        vision: Names of the modules that see, the projector to the language model included. A module or a weight with
            one of them among the parts of its name is of these, by the names of transformers as by those of the hub.
        images: How its image processor cuts images.
        chat_template: What replaces the chat template of its folders; `None`: nothing.
        whole: Names of the modules of which an adapter holds all weights: convolutions, which take no low-rank change,
            and the embeddings of a small vocabulary, in which the names of a user's defects are words not seen before.
        vllm: Whether vLLM has its architecture.
    """

    models: str
    processor: str
    coordinates: Coordinates
    vision: tuple[str, ...]
    images: type[Images]
    chat_template: str | None = None
    whole: tuple[str, ...] = ()
    vllm: bool = True

    @property
    def units(self) -> str:
        """The words by which the prompt asks for this family's coordinates."""
        return UNITS[self.coordinates]

    @property
    def vision_pattern(self) -> str:
        """A regular expression that matches the whole name of any module within the tower or projector, for PEFT."""
        return rf"(.*\.)?({'|'.join(self.vision)})\..*"

    def is_vision(self, name: str) -> bool:
        """Whether a module or weight of that name is of the tower or projector."""
        return not set(self.vision).isdisjoint(name.split("."))

    def without_weights(self, names: list[str]) -> list[str]:
        """Which of the modules that see have no weight among `names`."""
        parts = {part for name in names for part in name.split(".")}
        return [module for module in self.vision if module not in parts]

    def frame(self, processor: Any, width: int, height: int) -> Frame:
        """The frame in which its models write boxes on an image of `width` by `height` original pixels.

        Args:
            processor: The model's processor; only its `image_processor` is read.
            width: Width of the original image in pixels.
            height: Height of the original image in pixels.

        Raises:
            AdfmError: The image is too narrow for the processor.
        """
        if self.coordinates == "thousandths":
            return Frame(1000, 1000)
        return Frame(*self.images.resized(processor.image_processor, width, height))


# Qwen3.5's own template takes what stands in <think> out of an answer and writes it in another form, and begins an
# answer with <think> itself. Here an answer stands as it is, after the empty <think> of an answer without thinking.
_QWEN3_5_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role + '\\n' }}
{%- if message.role == 'assistant' %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- else %}{{ part.text }}{% endif %}
{%- endfor %}
{%- endif %}{{ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant{{ '\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}"""

# Coordinates: Qwen's cookbooks of spatial understanding have them for Qwen2.5-VL and Qwen3-VL. For Qwen3.5 and InternVL
# they are assumed: no real weights were at hand to try them.
FAMILIES = {
    "qwen2_5_vl": Family("Qwen2.5-VL", "Qwen2_5_VLProcessor", "pixels", ("visual",), Patches),
    "qwen3_vl": Family("Qwen3-VL", "Qwen3VLProcessor", "thousandths", ("visual",), Patches),
    "qwen3_5": Family(
        "Qwen3.5, 3.6 and 3.8, dense", "Qwen3VLProcessor", "thousandths", ("visual",), Patches, _QWEN3_5_TEMPLATE
    ),
    "adfm_embedded": Family(
        "the embedded model",
        "Qwen3VLProcessor",
        "thousandths",
        ("visual",),
        Patches,
        whole=("visual", "embed_tokens", "lm_head"),
        vllm=False,
    ),
    "internvl": Family(
        "InternVL3 and 3.5, the folders that end in -HF",
        "InternVLProcessor",
        "thousandths",
        ("vision_tower", "multi_modal_projector"),
        Tiles,
    ),
}
"""By `model_type` of the model's configuration."""


def get(model_type: Any) -> Family:
    """The family of a model.

    Args:
        model_type: `model_type` of its configuration.

    Raises:
        AdfmError: There is no entry for it.
    """
    if model_type not in FAMILIES:
        known = "; ".join(f"{name} ({family.models})" for name, family in FAMILIES.items())
        raise AdfmError(
            f"a {model_type!r} model is of a family that adfm does not know; it knows: {known}. Take a model of one of "
            "these, or add an entry to FAMILIES in adfm/models/families.py and a test of it, as written there"
        )
    return FAMILIES[model_type]


def processor_class(model_type: str) -> Any:
    """A family's processor without its video half, which alone needs torchvision.

    It has the original's name, so that what it saves loads in any transformers.
    """
    import transformers

    original: Any = getattr(transformers, get(model_type).processor)
    # ProcessorMixin loads, keeps and saves the parts that get_attributes names, and ignores a further one.
    attributes = [part for part in original.get_attributes() if part != "video_processor"]
    return type(original.__name__, (original,), {"get_attributes": classmethod(lambda cls: list(attributes))})


def placeholders(processor: Any) -> list[int]:
    """The tokens that stand for pictures: to generate one would ask for a picture that is not there."""
    videos = [processor.tokenizer.convert_tokens_to_ids(processor.video_token)]
    return [token for token in [*processor.image_token_ids, *videos] if token is not None]
