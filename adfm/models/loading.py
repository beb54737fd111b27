"""Find, load and describe a vision-language model, with or without an adapter.

A *model* is one of:
- `embedded://tiny-base`, the tiny base model that ships with the package,
- a local folder of a model of a family that `adfm.models.families` lists,
- a hub id, with a pinned revision,
- a folder that cold start or training wrote: a LoRA adapter, its processor, and `adfm.json`, which names its base,
- a registered version, `models:/<name>/<version>` or `models:/<name>@<alias>`, which `fetch` makes such a folder of.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adfm import files, signing, tracking
from adfm.errors import AdfmError, Unreachable
from adfm.files import digest
from adfm.method import prompt
from adfm.models import decoding, families
from adfm.params import Model
from adfm.process import environment, retries
from adfm.text import printable

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from transformers import PreTrainedModel, ProcessorMixin

EMBEDDED = {"embedded://tiny-base": Path(__file__).parents[1] / "tiny" / "base"}
DESCRIPTION = files.MODEL
DETECTOR = "detector"
"""The `stage` in `adfm.json` of a reference detector (`adfm.models.detector`), which is not a language model."""
GPU_SETUP = "make setup REQUIREMENTS=requirements-gpu.txt"
"""What installs the packages that only a GPU needs, in the versions that fit."""
_REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>\d+)|@(?P<alias>[^/@]+))")


@dataclass(frozen=True)
class Loaded:
    """A model in memory.

    Args:
        model: The network, with its adapter if it has one.
        processor: Its processor; pads on the left.
        family: Its key in `adfm.models.families.FAMILIES`.
        base: Name and revision of the base model.
        prompt: What it is asked, as chat messages without the image.
        kinds: The kinds of defects that the prompt asks to name one of; empty if it asks for none.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    family: str
    base: Model
    prompt: list[dict[str, Any]]
    kinds: tuple[str, ...] = ()


def resolve(name: str, revision: str | None) -> Path:
    """The local folder that holds a base model's weights; a hub model is downloaded (safetensors, no code).

    Raises:
        AdfmError: There is no such folder or hub model, a hub model's revision is not pinned, or the folder holds no
            safetensors of a model of a known family, vision tower included; `Unreachable`: the hub did not answer, and
            what was downloaded is kept.
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
            "name a folder or a hub id of a vision-language model"
        )
    blind = families.get(family_of(folder)).without_weights(weights(folder))
    if blind or "vision_config" not in _config(folder):
        raise AdfmError(
            f"model.name: {folder} has no weights of a vision tower (no {' or '.join(blind) or 'vision_config'}), so "
            "that it sees nothing; take the whole model"
        )
    return folder


def pixels(settings: Model) -> int | None:
    """The most pixels that a model sees of an image, as far as files here say; nothing is loaded or downloaded.

    Returns:
        `model.max_pixels`, else the limit of Qwen's processor in the folder of the model; `None` for a hub model and
        other processors.
    """
    if settings.max_pixels:
        return settings.max_pixels
    folder = EMBEDDED.get(settings.name, Path(settings.name))
    for name in ("processor_config.json", "preprocessor_config.json"):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            return int(content.get("image_processor", content)["size"]["longest_edge"])  # an area, whatever its name
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue  # what is wrong with it, `load_processor` says
    return None


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


def parameters(folder: Path) -> int:
    """How many numbers the weights in a model's folder are, which `weights` accepts; only the files' heads are read."""
    from safetensors import safe_open

    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            total += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    return total


def family_of(folder: Path) -> str:
    """The family of a model, a key of `families.FAMILIES`, read from the folder's `config.json`.

    Raises:
        AdfmError: It is of a family that is not there.
    """
    family = _config(folder).get("model_type")
    try:
        families.get(family)
    except AdfmError as error:
        raise AdfmError(f"model.name: {folder}: {error}") from None
    return str(family)


def _config(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdfmError(f"model.name: {folder}/config.json cannot be read ({error}); get it again") from error
    if not isinstance(content, dict):
        raise AdfmError(f"model.name: {folder}/config.json does not hold the settings of a model; get it again")
    return content


def outline(folder: Path) -> Any:
    """The network in a model's folder without memory for its weights, once its files are known to hold all of them.

    transformers itself compares names and shapes, by its own renaming, from the heads of the files. By itself it would
    give random numbers to a weight that is missing.

    Args:
        folder: As `resolve` finds it.

    Returns:
        The network, on PyTorch's device `meta`.

    Raises:
        AdfmError: Weights are missing or have another shape, or files are missing, damaged, or of another model.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    from adfm.tiny import tower  # noqa: F401 (transformers then knows the embedded model)

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # its report of what is missing is a table of many lines; ours is a sentence
    logging.disable_progress_bar()
    try:
        loader: Any = AutoModelForImageTextToText
        network, loaded = loader.from_pretrained(
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
    for what, names in (
        ("are missing", sorted(loaded["missing_keys"])),
        ("have another shape than config.json says", sorted(name for name, *_ in loaded["mismatched_keys"])),
    ):
        if names:
            raise AdfmError(
                f"model.name: in {folder}, weights {what}: {', '.join(names[:2])}"
                f"{f' and {len(names) - 2} more' * (len(names) > 2)}; get all files of the model again, from one place"
            )
    return network


def _reason(error: Exception) -> str:
    """The message of an exception on one line, without logins; the exception's name if it has no message."""
    return tracking.reason(error)[:300] or type(error).__name__


# Messages of hf_xet, which downloads weights from the hub's file servers, when a server is down or busy. It raises
# RuntimeError after six tries of its own over 68 s (measured with replies of 503).
_OF_XET = re.compile(r"HTTP status server error|\(429 |error sending request|response body|connection|timed out", re.I)


def _download(name: str, revision: str | None) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise AdfmError(
            f"model.name: there is no folder {name}; give a local folder, a hub id (owner/name), or embedded://tiny-base"
        )
    if revision is None:
        raise AdfmError(f"model.revision: pin the commit of hub model {name} (a branch moves; a commit does not)")
    import httpx2
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    failures = (HfHubHTTPError, LocalEntryNotFoundError, httpx2.TransportError, OSError, ValueError, RuntimeError)

    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except failures as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        # The hub's client itself tries each request six times, for 23 s (huggingface_hub/utils/_http.py, http_backoff).
        # What it tells of HF_HUB_OFFLINE is a ConnectionError.
        passes = not isinstance(error.__cause__, OfflineModeIsEnabled) and (
            retries.may_pass(error, httpx2.TimeoutException, httpx2.RemoteProtocolError)
            or (isinstance(error, RuntimeError) and bool(_OF_XET.search(str(error))))
        )
        raise (Unreachable if passes else AdfmError)(
            f"model.name: the weights of {name} at {revision} are neither in the local cache nor could they be "
            f"downloaded ({reason}); download them once with network access, or name a local folder."
            f"{environment.ca_remedy(error)}"
        ) from error


def describe(model: Path) -> dict[str, Any] | None:
    """The contents of `adfm.json` of a folder that cold start or training wrote; `None` for any other model."""
    file = model / DESCRIPTION
    return dict(json.loads(file.read_text())) if file.is_file() else None


def is_detector(model: str | Path) -> bool:
    """Whether a model is the folder of a reference detector."""
    return (describe(Path(model)) or {}).get("stage") == DETECTOR


def grey_range(model: Path) -> tuple[int, int] | None:
    """Range of the grey values that a model was trained on, if its training images had more than 8 bits of them."""
    bounds = (describe(model) or {}).get("grey_range")
    return (bounds[0], bounds[1]) if bounds else None


def fetch(model: str | Path, to: Path) -> tuple[str | Path, str]:
    """Makes a model local: a registered version is downloaded and verified.

    Args:
        model: Any model, as above.
        to: An existing folder for what is downloaded, which nobody else can write to.

    Returns:
        What `load` takes, and the model's name: that of a version has its number also where an alias was given. The
        model of a version lies in the verified folder of the whole version, beside `params.yaml` and `evaluation/`.

    Raises:
        AdfmError: MLflow cannot be reached, has no such version or alias, or the version's files cannot be verified.
    """
    if not str(model).startswith("models:"):
        return model, str(model)
    with tracking.store_errors(tracking.configure()):
        version = registered(str(model))
        return check_unchanged(version, to), f"models:/{version.name}/{version.version}"


def registered(model: str) -> ModelVersion:
    """The version that `models:/<name>/<version>` or `models:/<name>@<alias>` names.

    Raises:
        AdfmError: It names none, or MLflow has no such version or alias.
    """
    uri = _REGISTERED.fullmatch(model)
    if not uri:
        raise AdfmError(f"{model} names no version; write models:/adfm/3, or models:/adfm@production for an alias.")
    return _version(uri["name"], uri["version"], uri["alias"])


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
    """Downloads a version, and verifies that its files are those that were signed and registered.

    Args:
        version: The version.
        to: An existing folder, which nobody else can write to; the version becomes a new folder in it.

    Returns:
        The folder of its model, in the folder of the version.

    Raises:
        Unverified: The files are not what a submitter whose key counts has signed, they are those of another version,
            or they cannot be downloaded.
        Unreachable: MLflow, or the store of its files, does not answer.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    name = f"models:/{version.name}/{version.version}"
    own = tempfile.mkdtemp(prefix="version-", dir=to)  # empty: a file too many is an error
    try:
        folder = Path(mlflow.artifacts.download_artifacts(name, dst_path=own))
    except (MlflowException, OSError) as error:  # also of links and pipes in a store that is a folder
        _remove(Path(own))
        if tracking.may_pass(error):
            raise Unreachable(f"{name} cannot be downloaded now ({printable(_reason(error))}).") from error
        raise signing.Unverified(
            f"{name} cannot be verified: its files cannot be downloaded ({printable(_reason(error))}). See that the "
            "artifact store can be reached and holds plain files alone."
        ) from error
    signing.verify(folder, signing.keys(), name)
    present, expected = digest(folder / "model"), version.tags.get("artifact_digest")
    if present != expected:  # the whole signed folder of another version lies there
        raise signing.Unverified(
            f"{name}: its model files have the digest {present}, and {expected or 'none'} was registered. Somebody has "
            "put the files of another version there, or changed the tag artifact_digest; register the model again with "
            "`adfm register`."
        )
    return folder / "model"


def _remove(folder: Path) -> None:
    """Removes a folder into which threads of MLflow may still be downloading: they find no folder then, and end."""
    deadline = time.monotonic() + 10
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)


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

    A model to be trained whose weights are divided among processes is not put on a GPU here: with FSDP2 the first
    process reads it into its memory and the others none of it (transformers' `is_fsdp_enabled`), and accelerate divides
    it later; with ZeRO-3 DeepSpeed divides each weight as it is read.

    Args:
        model: A base model's name, or a folder that cold start or training wrote.
        settings: `revision` of a base model, and for every model the other settings.
        trainable: Whether the adapter's weights ask for gradients.

    Raises:
        AdfmError: As `load_processor`; the adapter does not fit its base; or the machine lacks what settings ask for.
    """
    import torch
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
    from transformers.integrations.fsdp import is_fsdp_enabled

    from adfm.tiny import tower  # noqa: F401 (as in `outline`)

    base, folder = base_of(model, settings)
    if missing := lacking(base):
        raise AdfmError("\n  ".join(missing))
    outline(folder)
    processor = load_processor(model, settings)
    dtype = getattr(torch, base.dtype)
    divided = trainable and weights_are_divided()
    zero3 = _zero3() if divided else None  # transformers asks for it as long as it lives
    placed: dict[str, Any] = {}
    # Otherwise transformers 5.23 reads all weights in every process, and accelerate then takes those of the first.
    without_weights = divided and is_fsdp_enabled() and os.environ.get("LOCAL_RANK") != "0"
    if without_weights:
        placed["device_map"] = "meta"
    if base.quantization:
        placed["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=base.quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        placed["device_map"] = {"": torch.cuda.current_device()}
    network: Any = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attention(base),
        use_safetensors=True,
        local_files_only=True,
        **placed,
    )
    placeholders = families.placeholders(processor)
    network.generation_config = decoding.generation_config(network.generation_config, placeholders)
    if describe(Path(model)):
        from peft import PeftConfig, PeftModel

        try:
            if without_weights:  # an adapter of the right sizes; its weights come from the first process, too
                config = PeftConfig.from_pretrained(str(model))
                config.inference_mode = False
                network = PeftModel(network, config)
                for name, module in network.named_modules():
                    if "lora_" in name and not list(module.children()):  # TRL copies an adapter, which meta has none of
                        module.to_empty(device="cpu")
            else:
                network = PeftModel.from_pretrained(network, str(model), is_trainable=trainable)
        except (RuntimeError, ValueError) as error:
            raise AdfmError(f"{model}: its adapter does not fit {base.name} ({error}); train it anew") from error
    del zero3
    if torch.cuda.is_available() and not base.quantization and not divided:
        network = network.to("cuda")
    family = family_of(folder)
    return Loaded(network, processor, family, base, prompt_of(model, family), kinds_of(model))


def weights_are_divided() -> bool:
    """Whether accelerate's launcher enabled FSDP or DeepSpeed's ZeRO-3."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true" or _stage() == "3"


def _stage() -> str | None:
    used = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    return os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") if used else None


def _zero3() -> Any:
    """What tells transformers to let DeepSpeed divide weights as they are read, as `TrainingArguments` would."""
    if _stage() != "3":
        return None
    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision(os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    plugin.set_deepspeed_weakref()
    return plugin


def prompt_of(model: str | Path, family: str) -> list[dict[str, Any]]:
    """What a model is asked: an adapter, what it was trained with; a base model of `family`, the multi-stage prompt."""
    description = describe(Path(model))
    return list(description["prompt"]) if description else prompt.messages(families.get(family).units)


def kinds_of(model: str | Path) -> tuple[str, ...]:
    """The kinds of defects that a model names one of; empty for a base model, without kinds, and for a single kind."""
    kinds = tuple((describe(Path(model)) or {}).get("kinds", ()))
    return kinds if len(kinds) > 1 else ()  # a detector of one kind has learned none


def base_of(model: str | Path, settings: Model) -> tuple[Model, Path]:
    """The base of a model, which is the model itself unless it is an adapter, and the folder of its weights.

    Raises:
        AdfmError: As `resolve`; or it is a reference detector, which has no base.
    """
    description = describe(Path(model))
    if is_detector(model):
        raise AdfmError(
            f"{model} is a reference detector, not a language model: evaluate it, or use it with `adfm predict --model "
            f"{model} IMAGES`; it cannot be trained further, registered or served"
        )
    base = Model(**{**settings.model_dump(), **(description["base"] if description else {"name": str(model)})})
    return base, resolve(base.name, base.revision)


def load_processor(model: str | Path, settings: Model) -> Any:
    """The processor of a model, which reduces images to `max_pixels`; it pads on the left.

    Raises:
        AdfmError: As `resolve`; it is the processor of another model; or its chat template cannot be used.
    """
    from transformers import AutoConfig

    from adfm.tiny import tower  # noqa: F401 (as in `outline`)

    base, folder = base_of(model, settings)
    source = model if describe(Path(model)) else folder
    name = family_of(folder)
    family = families.get(name)
    try:
        processor = families.processor_class(name).from_pretrained(source, local_files_only=True)
    except Exception as error:  # what is wrong with files that others made raises anything
        raise AdfmError(
            f"model.name: {source} holds no whole processor ({_reason(error)}); get preprocessor_config.json, the chat "
            "template and the tokenizer's files from where the model is from"
        ) from error
    if family.chat_template:
        processor.chat_template = family.chat_template
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    _check_processor(processor, family, config, Path(source))
    _check_tokenizer(processor, config, Path(source))
    _check_chat(processor, family, Path(source))
    processor.tokenizer.padding_side = "left"
    if base.max_pixels is not None:
        family.images.limit(processor.image_processor, base.max_pixels)
    return processor


def _check_processor(processor: Any, family: families.Family, config: Any, source: Path) -> None:
    """Refuses a processor that cuts images otherwise than the model of `config`, or has other tokens."""
    compared = family.images.compared(processor, config)
    wrong = [f"{what} {its}, the model's {own}" for what, (its, own) in compared.items() if its != own]
    if wrong:
        raise AdfmError(
            f"model.name: the processor in {source} is that of another model ({'; '.join(wrong)}); "
            "take all files of a model from one place"
        )


def chat_text(processor: Any, messages: list[dict[str, Any]], answer: str | None = None) -> str:
    """A prompt as the model's own chat template writes it, one image before the user's words.

    Args:
        processor: The model's.
        messages: The prompt without the image: the system's message and the user's.
        answer: The response, after which the text ends; `None`: the text ends where the response begins.
    """
    chat = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    chat[-1]["content"].insert(0, {"type": "image"})
    if answer is not None:
        chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return str(processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=answer is None))


def _check_chat(processor: Any, family: families.Family, source: Path) -> None:
    """Refuses a chat template that leaves out the image, or changes an answer in adfm's form."""
    answer, messages = prompt.answer("normal", []), prompt.messages(family.units)
    try:
        prompt_text, full_text = chat_text(processor, messages), chat_text(processor, messages, answer)
    except Exception as error:  # a template is a program, and may raise anything
        raise AdfmError(
            f"model.name: the chat template in {source} cannot be used ({error}); take the instruction-tuned model"
        ) from error
    if prompt_text.count(processor.image_token) != 1:
        raise AdfmError(
            f"model.name: the chat template in {source} writes the image's place {processor.image_token} "
            f"{prompt_text.count(processor.image_token)} times, not once; take all files of a model from one place"
        )
    if not full_text.startswith(prompt_text + answer):
        raise AdfmError(
            f"model.name: the chat template in {source} does not write an answer as it stands, as those of models that "
            "think before they answer do not; take the model's version that only follows instructions (Instruct)"
        )


def _check_tokenizer(processor: Any, config: Any, source: Path) -> None:
    """Refuses a processor without a chat template, or whose tokenizer has more tokens than the model."""
    tokenizer = processor.tokenizer
    size = config.get_text_config().vocab_size
    if not processor.chat_template:
        reason = "has no chat template (chat_template.jinja or chat_template.json)"
    elif len(tokenizer) > size:
        reason = f"has a tokenizer of {len(tokenizer)} tokens, and the model has {size}"
    else:
        return
    raise AdfmError(f"model.name: {source} {reason}; take all files of a model from one place")


def attention(settings: Model) -> str:
    """The attention that a model is loaded with: `model.attention`, of which `auto` is the fastest that runs here."""
    if settings.attention != "auto":
        return settings.attention
    # FlashAttention's mask is causal: it computes the same for families whose image tokens attend to no later ones, as
    # those of `families.FAMILIES` (but not Gemma 3).
    return "sdpa" if lacking_flash(settings) else "flash_attention_2"


def lacking_flash(settings: Model) -> list[str]:
    """What this machine or a model's settings lack for FlashAttention 2, a sentence each."""
    import torch
    from transformers.utils.import_utils import is_flash_attn_2_available

    name = "model.attention=flash_attention_2"
    missing = lacking_package(name, "flash-attn")
    if not missing and not is_flash_attn_2_available():
        missing.append(f"{name} needs flash-attn 2.3.3 or newer, and not the package of FlashAttention 4; install that")
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        missing.append(f"{name} needs an NVIDIA A100 or newer, and here is {torch.cuda.get_device_name()}; set sdpa")
    if settings.dtype == "float32":
        missing.append(f"{name} computes in 16 bits; set model.dtype=bfloat16")
    return missing


def lacking(settings: Model) -> list[str]:
    """What this machine lacks for a model's settings, a sentence each: a GPU of the right kind, a package."""
    import torch

    missing = lacking_flash(settings) if settings.attention == "flash_attention_2" else []
    if settings.quantization:
        missing += lacking_package(f"model.quantization={settings.quantization}", "bitsandbytes")
    if (
        settings.dtype == "bfloat16"
        and torch.cuda.is_available()
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        missing.append(
            f"model.dtype=bfloat16: {torch.cuda.get_device_name()} does not compute in it (NVIDIA's do from the A100 "
            "on); set model.dtype=float32"
        )
    return missing


def lacking_package(setting: str, package: str) -> list[str]:
    """What this machine lacks for a setting that needs a GPU and a package that is not installed by default."""
    import torch

    if not torch.cuda.is_available():
        return [f"{setting} needs a GPU, and there is none; leave it at its default"]
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        # FlashAttention is compiled on the machine itself, and so is in no requirements file.
        remedy = "see docs/training.md" if package == "flash-attn" else GPU_SETUP
        return [f"{setting} needs the package {package}, which is not installed; {remedy}"]
    return []
