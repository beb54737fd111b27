"""Find, load and describe a Qwen2.5-VL or Qwen3-VL model, with or without an adapter.

A *model* is one of:
- `embedded://tiny-base`, the tiny base model that ships with the package,
- a local folder of a Qwen2.5-VL or Qwen3-VL model,
- a hub id, with a pinned revision,
- a folder that warm-up or training wrote: a LoRA adapter, its processor, and `adfm.json`, which names its base,
- a registered version, `models:/<name>/<version>` or `models:/<name>@<alias>`, which `fetch` makes such a folder of.
"""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adfm import tracking
from adfm.errors import AdfmError
from adfm.files import digest
from adfm.method import prompt
from adfm.params import Model

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from transformers import PreTrainedModel, ProcessorMixin

EMBEDDED = {"embedded://tiny-base": Path(__file__).parent / "tiny_base"}
FAMILIES = ("qwen2_5_vl", "qwen3_vl")
DESCRIPTION = "adfm.json"
_FLASH = FAMILIES  # the families that FlashAttention computes the same: no image token attends to later ones
_REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>\d+)|@(?P<alias>[^/@]+))")


@dataclass(frozen=True)
class Loaded:
    """A model in memory.

    Args:
        model: The network, with its adapter if it has one.
        processor: Its processor; pads on the left.
        family: `qwen2_5_vl` or `qwen3_vl`.
        base: Name and revision of the base model.
        prompt: What it is asked, as chat messages without the image.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    family: str
    base: Model
    prompt: list[dict[str, Any]]


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
    if "vision_config" not in json.loads(config.read_text()) or not any("visual." in name for name in weights(folder)):
        raise AdfmError(
            f"model.name: {folder} has no weights of a vision tower, so that it sees nothing; take the whole model"
        )
    return folder


def weights(folder: Path) -> list[str]:
    """The names of the weights in a model's folder, in order; nothing but the files' heads is read.

    Raises:
        AdfmError: A file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    names = []
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np") as opened:
                names += opened.keys()
        except SafetensorError as error:
            raise AdfmError(
                f"model.name: {file} is no file of safetensors, or half of one ({error}); get it again"
            ) from error
    return sorted(names)


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


def fetch(model: str | Path, to: Path) -> tuple[str | Path, str]:
    """Makes a model local: a registered version is downloaded and proved to be what was registered.

    Args:
        model: Any model, as above.
        to: An existing folder for what is downloaded.

    Returns:
        What `load` takes, and the model's name: that of a version has its number also where an alias was given.

    Raises:
        AdfmError: MLflow cannot be reached, has no such version or alias, or the version's files were changed.
    """
    if not str(model).startswith("models:"):
        return model, str(model)
    asked = _REGISTERED.fullmatch(str(model))
    if not asked:
        raise AdfmError(f"{model} names no version; write models:/adfm/3, or models:/adfm@production for an alias.")
    with tracking.store_errors(tracking.configure()):
        version = _version(asked["name"], asked["version"], asked["alias"])
        return check_unchanged(version, to), f"models:/{version.name}/{version.version}"


def _version(name: str, number: str | None, alias: str | None) -> ModelVersion:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    store = MlflowClient()
    try:
        aliases = store.get_registered_model(name).aliases
        if alias is not None and alias not in aliases:
            known = ", ".join(sorted(aliases)) or "none"
            raise AdfmError(
                f"No version of {name} has the alias {alias} in MLflow; there are: {known}. `adfm promote` "
                f"puts an approved version into production; models:/{name}/3 names a version by its number."
            )
        return store.get_model_version(name, str(number or aliases[str(alias)]))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise AdfmError(
            f"MLflow has no version {number or f'for {alias}'} of a model {name}: {error.message} See that "
            "MLFLOW_TRACKING_URI names the right server, and which versions `adfm register` has made there."
        ) from error


def check_unchanged(version: ModelVersion, to: Path) -> Path:
    """Downloads a version's model folder to the folder `to`, and proves that it is what was registered.

    Raises:
        AdfmError: The files are not those whose digest the version carries.
    """
    import mlflow

    folder = Path(
        mlflow.artifacts.download_artifacts(f"models:/{version.name}/{version.version}/model", dst_path=str(to))
    )
    found, registered = digest(folder), version.tags.get("artifact_digest")
    if found != registered:
        raise AdfmError(
            f"Version {version.version} of {version.name}: its model files have the digest {found}, and "
            f"{registered or 'none'} was registered. Somebody has changed the files or the tag artifact_digest; "
            "register the model again with `adfm register`."
        )
    return folder


def identity(model: str | Path, settings: Model) -> str:
    """What tells a local or hub model from any other: the digest of its folder, or its name and pinned commit.

    Raises:
        AdfmError: As `resolve`.
    """
    if describe(Path(model)):
        return digest(Path(model))
    folder = resolve(str(model), settings.revision)
    return digest(folder) if str(model) in EMBEDDED or Path(model).is_dir() else f"{model}@{settings.revision}"


def load(model: str | Path, settings: Model, trainable: bool = False) -> Loaded:
    """Load a base model, or an adapter on its base.

    Args:
        model: A base model's name, or a folder that warm-up or training wrote.
        settings: `revision` of a base model, and for every model the other settings.
        trainable: Whether the adapter's weights ask for gradients.

    Raises:
        AdfmError: As `load_processor`; the adapter does not fit its base; or the machine lacks what settings ask for.
    """
    import torch
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    base, folder = base_of(model, settings)
    if missing := lacking(base):
        raise AdfmError("\n  ".join(missing))
    processor = load_processor(model, settings)
    dtype = getattr(torch, base.dtype)
    in_4_bits: dict[str, Any] = {}
    if base.quantization:
        in_4_bits["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=base.quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        in_4_bits["device_map"] = {"": torch.cuda.current_device()}
    network: Any = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attention(base, family_of(folder)),
        use_safetensors=True,
        local_files_only=True,
        **in_4_bits,
    )
    if describe(Path(model)):
        from peft import PeftModel

        try:
            network = PeftModel.from_pretrained(network, str(model), is_trainable=trainable)
        except (RuntimeError, ValueError) as error:
            raise AdfmError(f"{model}: its adapter does not fit {base.name} ({error}); train it anew") from error
    if torch.cuda.is_available() and not base.quantization:
        network = network.to("cuda")
    return Loaded(network, processor, family_of(folder), base, prompt_of(model, family_of(folder)))


def prompt_of(model: str | Path, family: str) -> list[dict[str, Any]]:
    """What a model is asked: an adapter, what it was trained with; a base model of `family`, the multi-stage prompt."""
    description = describe(Path(model))
    return list(description["prompt"]) if description else prompt.messages(family)


def base_of(model: str | Path, settings: Model) -> tuple[Model, Path]:
    """The base of a model, which is the model itself unless it is an adapter, and the folder of its weights.

    Raises:
        AdfmError: As `resolve`.
    """
    description = describe(Path(model))
    base = Model(**{**settings.model_dump(), **(description["base"] if description else {"name": str(model)})})
    return base, resolve(base.name, base.revision)


def load_processor(model: str | Path, settings: Model) -> Any:
    """The processor of a model, which reduces images to `max_pixels`; it pads on the left.

    Raises:
        AdfmError: As `resolve`; or it is the processor of another model.
    """
    base, folder = base_of(model, settings)
    source = model if describe(Path(model)) else folder
    processor = processor_class(family_of(folder)).from_pretrained(source, local_files_only=True)
    _check_processor(processor, folder, Path(source))
    processor.tokenizer.padding_side = "left"
    if base.max_pixels is not None:
        size = processor.image_processor.size
        processor.image_processor.size = {
            "shortest_edge": min(size["shortest_edge"], base.max_pixels),
            "longest_edge": base.max_pixels,
        }
    return processor


def _check_processor(processor: Any, folder: Path, source: Path) -> None:
    """Refuses a processor that cuts images otherwise than the model in `folder`, or has other tokens."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    images, vision = processor.image_processor, config.vision_config
    expected = {
        "pixels of a patch": (images.patch_size, vision.patch_size),
        "patches merged": (images.merge_size, vision.spatial_merge_size),
        "number of the image token": (processor.image_token_id, config.image_token_id),
    }
    wrong = [f"{what} {its}, the model's {own}" for what, (its, own) in expected.items() if its != own]
    if wrong:
        raise AdfmError(
            f"model.name: the processor in {source} is that of another model ({'; '.join(wrong)}); "
            "take all files of a model from one place"
        )


def attention(settings: Model, family: str) -> str:
    """The attention that a model is loaded with: `model.attention`, of which `auto` is the fastest that runs here."""
    if settings.attention != "auto":
        return settings.attention
    return "flash_attention_2" if family in _FLASH and not lacking_flash(settings) else "sdpa"


def lacking_flash(settings: Model) -> list[str]:
    """What this machine or a model's settings lack for FlashAttention 2, a sentence each."""
    import torch
    from transformers.utils.import_utils import is_flash_attn_2_available

    name = "model.attention=flash_attention_2"
    found = lacking_package(name, "flash-attn")
    if not found and not is_flash_attn_2_available():
        found.append(f"{name} needs flash-attn 2.3.3 or newer, and not the package of FlashAttention 4; install that")
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        found.append(f"{name} needs an NVIDIA A100 or newer, and here is {torch.cuda.get_device_name()}; set sdpa")
    if settings.dtype == "float32":
        found.append(f"{name} computes in 16 bits; set model.dtype=bfloat16")
    return found


def lacking(settings: Model) -> list[str]:
    """What this machine lacks for a model's settings, a sentence each: a GPU of the right kind, a package."""
    import torch

    found = lacking_flash(settings) if settings.attention == "flash_attention_2" else []
    if settings.quantization:
        found += lacking_package(f"model.quantization={settings.quantization}", "bitsandbytes")
    if (
        settings.dtype == "bfloat16"
        and torch.cuda.is_available()
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        found.append(
            f"model.dtype=bfloat16: {torch.cuda.get_device_name()} does not compute in it (NVIDIA's do from the A100 "
            "on); set model.dtype=float32"
        )
    return found


def lacking_package(setting: str, package: str) -> list[str]:
    """What this machine lacks for a setting that needs a GPU and a package that is not installed by default."""
    import torch

    if not torch.cuda.is_available():
        return [f"{setting} needs a GPU, and there is none; leave it at its default"]
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        return [f"{setting} needs a package that is not installed; pip install {package}"]
    return []


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
