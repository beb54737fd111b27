"""What `Family` records about a model family."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

from adfm.method.coordinates import Frame

Coordinates = Literal["pixels", "thousandths"]

UNITS: dict[Coordinates, str] = {  # how the prompt asks for boxes
    "pixels": "in pixels of the image",
    "thousandths": "from 0 to 1000 across and down the image",
}


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
        """Limit the pixels of an image after resizing; raise `AdfmError` where images cannot be so small."""

    def max_pixels(self, settings: Mapping[str, Any]) -> int:
        """The most pixels of an image after resizing, from the image processor's settings as saved with it."""

    def resized(self, images: Any, width: int, height: int) -> tuple[int, int]:
        """Width and height to which an image is resized before it is cut; raise `AdfmError` if it is too narrow."""

    def cost(self, config: Any, pixels: int) -> Vision:
        """The cost of an image of that many pixels after resizing, for a model of that configuration."""

    def pairs(self, processor: Any, config: Any) -> dict[str, tuple[Any, Any]]:
        """Values that must be equal in a processor and in its model's configuration, by name."""


class Family(NamedTuple):
    """One model family."""

    models: str  # in words for people
    processor: str  # class in transformers
    coordinates: Coordinates  # pixels of the image as its processor resizes it, or thousandths of its width and height
    # Modules of the vision tower and of the projector to the language model. A module or a weight belongs to them if
    # one of these is a part of its dotted name, in transformers as on the hub.
    vision: tuple[str, ...]
    images: Images
    chat_template: str | None = None  # replaces the chat template of its folders
    modules_to_save: tuple[str, ...] = ()  # that an adapter holds with all their weights
    vllm: bool = True  # whether `adfm.models.vllm_engine` supports it

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
        """The frame in which its models write boxes on an image of that size; raise `AdfmError` as `Images.resized`."""
        if self.coordinates == "thousandths":
            return Frame(1000, 1000)
        return Frame(*self.images.resized(processor.image_processor, width, height))
