"""Find, load and describe a Qwen2.5-VL or Qwen3-VL model, with or without an adapter.

A *model* is one of:
- `embedded://tiny-base`, the tiny base model that ships with the package,
- a local folder of a Qwen2.5-VL or Qwen3-VL model,
- a hub id, with a pinned revision,
- a folder that warm-up or training wrote: a LoRA adapter, its processor, and `adfm.json`, which names its base.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adfm.errors import AdfmError
from adfm.params import Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

EMBEDDED = {"embedded://tiny-base": Path(__file__).parent / "tiny_base"}
FAMILIES = ("qwen2_5_vl", "qwen3_vl")
DESCRIPTION = "adfm.json"


@dataclass(frozen=True)
class Loaded:
    """A model in memory.

    Args:
        model: The network, with its adapter if it has one.
        processor: Its processor; pads on the left.
        family: `qwen2_5_vl` or `qwen3_vl`.
        base: Name and revision of the base model.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    family: str
    base: Model


def resolve(name: str, revision: str | None) -> Path:
    """The local folder that holds a base model's weights; a hub model is downloaded (safetensors, no code).

    Raises:
        AdfmError: There is no such folder or hub model, a hub model's revision is not pinned, or the folder holds no
            safetensors of a Qwen2.5-VL or Qwen3-VL model.
    """
    if name in EMBEDDED:
        folder = EMBEDDED[name]
    elif name.startswith("embedded://"):
        raise AdfmError(f"model.name: there is no {name}; the embedded model is {', '.join(EMBEDDED)}")
    elif Path(name).is_dir():
        folder = Path(name)
    else:
        folder = _download(name, revision)
    config = folder / "config.json"
    if not config.is_file() or not any(folder.glob("*.safetensors")):
        raise AdfmError(
            f"model.name: {folder} holds no model weights (config.json and *.safetensors); "
            "name a folder or a hub id of a Qwen2.5-VL or Qwen3-VL model"
        )
    family_of(folder)
    return folder


def family_of(folder: Path) -> str:
    """`qwen2_5_vl` or `qwen3_vl`, read from the folder's `config.json`.

    Raises:
        AdfmError: It is another kind of model.
    """
    family = json.loads((folder / "config.json").read_text()).get("model_type")
    if family not in FAMILIES:
        raise AdfmError(f"model.name: {folder} is a {family!r} model; adfm adapts {' and '.join(FAMILIES)} models")
    return str(family)


def _download(name: str, revision: str | None) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise AdfmError(
            f"model.name: there is no folder {name}; give a local folder, a hub id (owner/name), or embedded://tiny-base"
        )
    if revision is None:
        raise AdfmError(f"model.revision: pin the commit of hub model {name} (a branch moves; a commit does not)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise AdfmError(
            f"model.name: the weights of {name} at {revision} are neither in the local cache nor could they be "
            f"downloaded ({reason}); download them once with network access, or name a local folder"
        ) from error


def describe(model: Path) -> dict[str, Any] | None:
    """The contents of `adfm.json` of a folder that warm-up or training wrote; `None` for any other model."""
    file = model / DESCRIPTION
    return dict(json.loads(file.read_text())) if file.is_file() else None


def load(model: str | Path, settings: Model, trainable: bool = False) -> Loaded:
    """Load a base model, or an adapter on its base.

    Args:
        model: A base model's name, or a folder that warm-up or training wrote.
        settings: `revision` of a base model, and for every model `dtype` and `max_pixels`.
        trainable: Whether the adapter's weights ask for gradients.

    Raises:
        AdfmError: As `resolve`; or the adapter does not fit its base.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    description = describe(Path(model))
    base = Model(**{**settings.model_dump(), **(description["base"] if description else {"name": str(model)})})
    folder = resolve(base.name, base.revision)
    network: Any = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=getattr(torch, base.dtype), use_safetensors=True, local_files_only=True
    )
    family = family_of(folder)
    processor = processor_class(family).from_pretrained(model if description else folder, local_files_only=True)
    processor.tokenizer.padding_side = "left"
    if base.max_pixels is not None:
        size = processor.image_processor.size
        processor.image_processor.size = {
            "shortest_edge": min(size["shortest_edge"], base.max_pixels),
            "longest_edge": base.max_pixels,
        }
    if description:
        from peft import PeftModel

        try:
            network = PeftModel.from_pretrained(network, str(model), is_trainable=trainable)
        except (RuntimeError, ValueError) as error:
            raise AdfmError(f"{model}: its adapter does not fit {base.name} ({error}); train it anew") from error
    if torch.cuda.is_available():
        network = network.to("cuda")
    return Loaded(network, processor, family, base)


def processor_class(family: str) -> Any:
    """The family's processor without its video half, which alone needs torchvision.

    It has the original's name, so that what it saves loads in any transformers.
    """
    import transformers

    # ProcessorMixin reads the names of its parts from the signature of __init__, so leaving one out suffices.
    original: Any = {"qwen2_5_vl": transformers.Qwen2_5_VLProcessor, "qwen3_vl": transformers.Qwen3VLProcessor}[family]

    def __init__(  # noqa: N807
        self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any
    ) -> None:
        original.__init__(self, image_processor, tokenizer, chat_template=chat_template, **kwargs)

    return type(original.__name__, (original,), {"__init__": __init__})
