"""Find and load a vision-language model, with or without an adapter.

A *model* is `embedded://tiny-base`, a local folder or a hub id of a family in `adfm.models.families`, or a folder that
adfm trained: a LoRA adapter, its processor, and `adfm.json`, which names its base.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adfm import tracking
from adfm.errors import AdfmError, Unreachable
from adfm.files import digest
from adfm.method import prompt
from adfm.models import decoding, families, model_folder, requirements
from adfm.models.model_folder import describe, family_of
from adfm.params import Model
from adfm.process import environment, retries

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

EMBEDDED = {"embedded://tiny-base": Path(__file__).parents[1] / "tiny" / "base"}


@dataclass(frozen=True)
class Loaded:
    """A model in memory."""

    model: "PreTrainedModel"  # with its adapter if it has one
    processor: "ProcessorMixin"  # pads on the left
    family: str  # a key of `adfm.models.families.FAMILIES`
    base: Model  # the settings, with name and revision of the base model
    prompt: list[dict[str, Any]]  # chat messages, without the image
    kinds: tuple[str, ...] = ()  # of defects, of which the prompt asks to name one; empty if it asks for none


def resolve(name: str, revision: str | None) -> Path:
    """Return the local folder of a base model's weights; download a hub model (safetensors, no code).

    Raises:
        AdfmError: There is no such folder or hub model, a hub model's revision is not pinned, or the folder does not
            hold safetensors of a model of a known family, vision tower included.
        Unreachable: The hub did not answer. What was downloaded is kept.
    """
    if name.startswith("embedded://") and name not in EMBEDDED:
        raise AdfmError(f"model.name: {name} does not exist; the embedded model is {', '.join(EMBEDDED)}")
    folder = EMBEDDED.get(name, Path(name))
    if not folder.is_dir():
        folder = _download(name, revision)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise AdfmError(
            f"model.name: {folder} holds no model weights (config.json and *.safetensors); "
            "name a folder or a hub id of a vision-language model"
        )
    vision = families.get(family_of(folder)).vision
    parts = {part for name in model_folder.weight_shapes(folder) for part in name.split(".")}
    absent = [module for module in vision if module not in parts]
    if absent or "vision_config" not in model_folder.config(folder):
        raise AdfmError(
            f"model.name: {folder} has no weights of a vision tower (no {' or '.join(absent) or 'vision_config'}); "
            "use the full checkpoint"
        )
    return folder


def pixels(settings: Model) -> int | None:
    """Return the most pixels that a model sees of an image, without loading or downloading anything.

    It is `model.max_pixels`, else the limit of the processor in the model's folder; `None` where neither is known.
    """
    if settings.max_pixels:
        return settings.max_pixels
    folder = EMBEDDED.get(settings.name, Path(settings.name))
    for name in ("processor_config.json", "preprocessor_config.json"):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            return families.get(family_of(folder)).images.max_pixels(content.get("image_processor", content))
        except (AdfmError, OSError, ValueError, LookupError, TypeError, AttributeError):
            continue  # `load_processor` reports what is wrong with it
    return None


def auto_class(name: str) -> Any:
    """Return transformers' `AutoConfig` or `AutoModelForImageTextToText`, able to load the embedded model too."""
    import transformers

    from adfm.tiny import tower  # noqa: F401 (registers the embedded model's classes)

    return getattr(transformers, name)


def outline(folder: Path) -> Any:
    """Return the network of a base model's folder on PyTorch's device `meta`; verify that no weight is missing.

    Raises:
        AdfmError: Weights are missing or have another shape, or files are missing, damaged, or of another model.
    """
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # its report of what is missing is a table of many lines; ours is a sentence
    logging.disable_progress_bar()
    try:
        # transformers compares names, by its own renaming, and shapes from the heads of the files. By itself it would
        # give random numbers to a weight that is missing.
        network, loaded = auto_class("AutoModelForImageTextToText").from_pretrained(
            folder,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
        )
    except Exception as error:  # what is wrong with files that others made raises anything
        raise AdfmError(
            f"model.name: transformers cannot load {folder} ({_reason(error)}); get all files of the model again"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
    missing, mismatched = loaded["missing_keys"], [name for name, *_ in loaded["mismatched_keys"]]
    if names := sorted(missing or mismatched):
        what = "are missing" if missing else "have another shape than config.json says"
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        raise AdfmError(
            f"model.name: in {folder}, weights {what}: {', '.join(names[:2])}{more}; get all files of the model again, "
            "from one place"
        )
    return network


def _reason(error: Exception) -> str:
    return tracking.reason(error)[:300] or type(error).__name__


# Messages of hf_xet, which downloads weights from the hub's file servers, when a server is down or busy. It raises
# RuntimeError after six tries of its own over 68 s (measured with replies of 503).
_OF_XET = re.compile(r"HTTP status server error|\(429 |error sending request|response body|connection|timed out", re.I)


def _download(name: str, revision: str | None) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise AdfmError(
            f"model.name: {name} is not a folder; give a local folder, a hub id (owner/name), or embedded://tiny-base"
        )
    if revision is None:
        raise AdfmError(f"model.revision: pin the commit of hub model {name} (a branch moves; a commit does not)")
    import httpx2
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    failures = (HfHubHTTPError, LocalEntryNotFoundError, httpx2.TransportError, OSError, ValueError, RuntimeError)
    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja"]  # no code, and no pickled weights
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except failures as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        # The hub's client itself tries each request six times, for 23 s (huggingface_hub/utils/_http.py, http_backoff).
        # With HF_HUB_OFFLINE it raises a ConnectionError.
        passes = not isinstance(error.__cause__, OfflineModeIsEnabled) and (
            retries.may_pass(error, httpx2.TimeoutException, httpx2.RemoteProtocolError)
            or (isinstance(error, RuntimeError) and bool(_OF_XET.search(str(error))))
        )
        raise (Unreachable if passes else AdfmError)(
            f"model.name: the weights of {name} at {revision} are neither in the local cache nor could they be "
            f"downloaded ({reason}); download them once with network access, or name a local folder."
            f"{environment.ca_remedy(error)}"
        ) from error


def identity(model: str | Path, settings: Model) -> str:
    """Return what identifies a local or hub model: the digest of its folder, or its name and pinned commit."""
    folder = Path(model) if describe(model) else resolve(str(model), settings.revision)
    return digest(folder) if str(model) in EMBEDDED or Path(model).is_dir() else f"{model}@{settings.revision}"


def load(model: str | Path, settings: Model, trainable: bool = False) -> Loaded:
    """Load a base model, or an adapter on its base; with `trainable`, the adapter's weights require gradients.

    Raises:
        AdfmError: As `load_processor`; the adapter does not fit its base; or the machine lacks what settings require.
    """
    import torch
    from transformers import BitsAndBytesConfig
    from transformers.integrations.fsdp import is_fsdp_enabled

    base, folder = base_of(model, settings)
    if problems := requirements.missing(base):
        raise AdfmError("\n  ".join(problems))
    outline(folder)
    processor = load_processor(model, settings)
    # Weights that are divided among processes are not put on a GPU here. With FSDP2 the first process alone reads them,
    # and accelerate divides them later; with ZeRO-3 DeepSpeed divides each weight as it is read.
    divided = trainable and weights_are_divided()
    zero3 = _zero3() if divided else None  # transformers reads it through a weak reference: it lives until the end
    # Otherwise transformers 5.23 reads all weights in every process, and accelerate then takes those of the first.
    without_weights = divided and is_fsdp_enabled() and os.environ.get("LOCAL_RANK") != "0"
    placed: dict[str, Any] = {"device_map": "meta"} if without_weights else {}
    if base.quantization:
        placed["device_map"] = {"": torch.cuda.current_device()}
        placed["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=base.quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, base.dtype),
        )
    network = auto_class("AutoModelForImageTextToText").from_pretrained(
        folder,
        dtype=getattr(torch, base.dtype),
        attn_implementation=requirements.attention(base),
        use_safetensors=True,
        local_files_only=True,
        **placed,
    )
    placeholders = families.placeholders(processor)
    network.generation_config = decoding.generation_config(network.generation_config, placeholders)
    if describe(model):
        try:
            network = _with_adapter(network, str(model), trainable, without_weights)
        except (RuntimeError, ValueError) as error:
            raise AdfmError(f"{model}: its adapter does not fit {base.name} ({error}); train it again") from error
    del zero3
    if torch.cuda.is_available() and not base.quantization and not divided:
        network = network.to("cuda")
    family = family_of(folder)
    return Loaded(network, processor, family, base, prompt_of(model, family), model_folder.kinds_of(model))


def _with_adapter(network: Any, model: str, trainable: bool, without_weights: bool) -> Any:
    from peft import PeftConfig, PeftModel

    if not without_weights:
        return PeftModel.from_pretrained(network, model, is_trainable=trainable)
    # An adapter of the right sizes; its weights come from the first process too.
    config = PeftConfig.from_pretrained(model)
    config.inference_mode = False
    adapted = PeftModel(network, config)
    for name, module in adapted.named_modules():
        if "lora_" in name and not list(module.children()):  # TRL copies an adapter, which meta has none of
            module.to_empty(device="cpu")
    return adapted


def weights_are_divided() -> bool:
    """Whether accelerate's launcher enabled FSDP or DeepSpeed's ZeRO-3."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true" or _is_zero3()


def _is_zero3() -> bool:
    used = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    return used and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"


def _zero3() -> Any:
    if not _is_zero3():
        return None
    from accelerate.utils import DeepSpeedPlugin

    # As `TrainingArguments` would, it makes transformers let DeepSpeed divide weights as they are read.
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision(os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    plugin.set_deepspeed_weakref()
    return plugin


def prompt_of(model: str | Path, family: str) -> list[dict[str, Any]]:
    """Return a model's prompt: that which an adapter was trained with, or the multi-stage prompt for a base model."""
    description = describe(model)
    return list(description["prompt"]) if description else prompt.messages(families.get(family).units)


def base_of(model: str | Path, settings: Model) -> tuple[Model, Path]:
    """Return the base of a model, which is the model itself unless it is an adapter, and the folder of its weights.

    Raises:
        AdfmError: As `resolve`; or it is a reference detector, which has no base.
    """
    description = describe(model)
    if model_folder.is_detector(model):
        raise AdfmError(
            f"{model} is a reference detector, not a language model: evaluate it, or use it with `adfm predict --model "
            f"{model} IMAGES`; it cannot be trained further, registered or served"
        )
    base = Model(**settings.model_dump() | (description["base"] if description else {"name": str(model)}))
    return base, resolve(base.name, base.revision)


def load_processor(model: str | Path, settings: Model) -> Any:
    """Load the processor of a model, which reduces images to `model.max_pixels` and pads on the left.

    Raises:
        AdfmError: As `resolve`; it is the processor of another model; or its chat template cannot be used.
    """
    base, folder = base_of(model, settings)
    source = Path(model) if describe(model) else folder
    family = families.get(family_of(folder))
    try:
        processor = families.processor_class(family_of(folder)).from_pretrained(source, local_files_only=True)
    except Exception as error:  # what is wrong with files that others made raises anything
        raise AdfmError(
            f"model.name: {source} holds no whole processor ({_reason(error)}); get preprocessor_config.json, the chat "
            "template and the tokenizer's files from where the model is from"
        ) from error
    if family.chat_template:
        processor.chat_template = family.chat_template
    config = auto_class("AutoConfig").from_pretrained(folder, local_files_only=True)
    if reason := _of_another_model(processor, family, config):
        raise AdfmError(f"model.name: {source} {reason}; take all files of a model from one place")
    _check_chat(processor, family, source)
    processor.tokenizer.padding_side = "left"
    if base.max_pixels is not None:
        family.images.set_max_pixels(processor.image_processor, base.max_pixels)
    return processor


def _of_another_model(processor: Any, family: families.Family, config: Any) -> str | None:
    pairs = family.images.pairs(processor, config)
    wrong = [f"{what} {its}, the model's {own}" for what, (its, own) in pairs.items() if its != own]
    if wrong:
        return f"has the processor of another model ({'; '.join(wrong)})"
    if not processor.chat_template:
        return "has no chat template (chat_template.jinja or chat_template.json)"
    tokens, size = len(processor.tokenizer), config.get_text_config().vocab_size
    return f"has a tokenizer of {tokens} tokens, and the model has {size}" if tokens > size else None


def chat_text(processor: Any, messages: list[dict[str, Any]], answer: str | None = None) -> str:
    """Write a prompt of a system's and a user's message by the chat template, one image before the user's words.

    The text ends after `answer`, or without one where the completion begins.
    """
    chat = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    chat[-1]["content"].insert(0, {"type": "image"})
    if answer is not None:
        chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return str(processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=answer is None))


def _check_chat(processor: Any, family: families.Family, source: Path) -> None:
    answer, messages = prompt.target_completion("normal", []), prompt.messages(family.units)
    try:
        prompt_text, full_text = chat_text(processor, messages), chat_text(processor, messages, answer)
    except Exception as error:  # a template is a program, and may raise anything
        raise AdfmError(
            f"model.name: the chat template in {source} cannot be used ({error}); take the instruction-tuned model"
        ) from error
    if prompt_text.count(processor.image_token) != 1:
        raise AdfmError(
            f"model.name: the chat template in {source} writes the image's placeholder {processor.image_token} "
            f"{prompt_text.count(processor.image_token)} times, not once; take all files of a model from one place"
        )
    if not full_text.startswith(prompt_text + answer):
        raise AdfmError(
            f"model.name: the chat template in {source} does not write an answer as it stands, as those of models that "
            "think before they answer do not; take the model's version that only follows instructions (Instruct)"
        )
