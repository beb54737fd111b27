"""What `Family` records about a model family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

from adfm.method.coordinates import Frame

Coordinates = Literal["pixels", "thousandths"]

UNITS: dict[Coordinates, str] = {
    "pixels": "in pixels of the image",
    "thousandths": "from 0 to 1000 across and down the image",
}
"""How the prompt asks for boxes, by the coordinates of a family."""


class Vision(NamedTuple):
    """Cost of one image: `patches` go through `layers` of the vision tower and become `tokens` of the prompt."""

    patches: int
    tokens: int
    layers: int


class Images(Protocol):
    """How a family resizes and cuts images: a module with these functions, `images` being `processor.image_processor`.

    `adfm.models.families.patches` is that of Qwen's families, `tiles` that of InternVL.
    """

    def set_max_pixels(self, images: Any, max_pixels: int) -> None:
        """Limit the pixels of an image after resizing.

        Raises:
            AdfmError: The family cannot make images so small.
        """

    def max_pixels(self, settings: Mapping[str, Any]) -> int:
        """The most pixels of an image after resizing, from the image processor's settings as saved with it."""

    def resized(self, images: Any, width: int, height: int) -> tuple[int, int]:
        """Width and height in pixels to which an image is resized before it is cut.

        Raises:
            AdfmError: The image is too narrow.
        """

    def cost(self, config: Any, pixels: int) -> Vision:
        """The cost of an image of that many pixels after resizing, for a model of that configuration."""

    def pairs(self, processor: Any, config: Any) -> dict[str, tuple[Any, Any]]:
        """Values that must be equal in a processor and in its model's configuration, by name."""


class Family(NamedTuple):
    """One model family.

    Args:
        models: The family's models, in words for people.
        processor: Name of its processor's class in transformers.
        coordinates: The units of its boxes: pixels of the image as its processor resizes it, or thousandths of the
            image's width and height.
        vision: Names of the modules of the vision tower and of the projector to the language model. A module or a
            weight belongs to them if one of these is a part of its dotted name, in transformers as on the hub.
        images: How it resizes and cuts images.
        chat_template: Replaces the chat template of its folders; `None` keeps that.
        modules_to_save: Names of the modules that an adapter holds with all their weights.
        vllm: Whether `adfm.models.vllm_engine` supports it.
    """

    models: str
    processor: str
    coordinates: Coordinates
    vision: tuple[str, ...]
    images: Images
    chat_template: str | None = None
    modules_to_save: tuple[str, ...] = ()
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
        """Whether a module or weight of that name belongs to the tower or projector."""
        return not set(self.vision).isdisjoint(name.split("."))

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
