"""Settings of a vLLM engine for training and evaluation: model length, image sizes, and the supported version."""

import importlib.metadata
import json
import math
import shlex
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from adfm.errors import AdfmError
from adfm.models import loading

# Written from the source of vLLM 0.30 and TRL 1.16; not run with vLLM, which needs a GPU.
VERSION = "0.30.0"  # fits torch 2.13, transformers 5.23 and TRL 1.16 (which takes 0.22 to 0.31)
BATCHED_TOKENS = 4096  # that vLLM computes at a time where TRL starts it; it measures its memory with as many
_NARROWEST = 200  # width / height beyond which the processors of Qwen's models refuse an image
_PATIENCE = 5  # seconds for a server to reply


def wrong_version() -> list[str]:
    """Return a sentence if the installed vLLM does not fit TRL and adfm; nothing if it does, or none is installed."""
    try:
        installed = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return []
    if installed.split("+")[0].split(".")[:2] == VERSION.split(".")[:2]:
        return []
    return [
        f"vllm {installed} is installed, which does not fit TRL and transformers here; "
        f"make setup REQUIREMENTS=requirements-gpu.txt installs vllm=={VERSION}"
    ]


def options(processor: Any, dtype: str) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM` that make it read images as `processor` does."""
    size = processor.image_processor.size
    return {
        "dtype": dtype,
        # Without a limit, vLLM keeps memory for the longest video.
        "limit_mm_per_prompt": {"image": 1, "video": 0},
        "mm_processor_kwargs": {"size": {name: size[name] for name in ("shortest_edge", "longest_edge")}},
        # No temperature, top-k, top-p or repetition penalty of the model's own folder.
        "generation_config": "vllm",
    }


def image_tokens(processor: Any) -> int:
    """Return the most tokens that an image becomes; raise `AdfmError` for a family that does not cut into patches."""
    images = processor.image_processor
    if not hasattr(images, "merge_size"):
        name = type(processor).__name__
        raise AdfmError(f"vLLM is not supported with {name}; set train.vllm=null and evaluate.backend=transformers")
    # `smart_resize` of Qwen's processors (transformers 5.23) brings an image of at most 200 : 1 between `shortest_edge`
    # and `longest_edge` pixels, in units of a merged patch: rounded down, but no side to 0, or up if it is smaller.
    unit = images.patch_size * images.merge_size
    low, high = images.size["shortest_edge"], images.size["longest_edge"]
    reduced = max(high, unit * math.sqrt(high * _NARROWEST))
    enlarged = (math.sqrt(low * _NARROWEST) + unit) * (math.sqrt(low / _NARROWEST) + unit)
    return int(max(reduced, enlarged if low > unit**2 else 0) // unit**2)


def model_length(processor: Any, messages: list[dict[str, Any]], completion: int) -> int:
    """Return the tokens of vLLM's longest request: the prompt with its one image, and `completion` tokens after it."""
    written = processor.tokenizer(loading.chat_text(processor, messages))["input_ids"]
    return int(len(written) - written.count(processor.image_token_id)) + image_tokens(processor) + completion


def server_command(folder: Path, processor: Any, dtype: str, length: int, url: str = "http://localhost:8000") -> str:
    """Return the command that starts the server of `train.vllm_server` on the first GPU; the GPUs after it train."""
    # The flags are those that TRL's deprecated `trl vllm-serve` adds (TRL 1.16), and the arguments of `options`.
    command = ["vllm", "serve", str(folder), "--port", str(urlsplit(url).port or 8000), "--max-model-len", str(length)]
    for name, value in options(processor, dtype).items():
        command += ["--" + name.replace("_", "-"), value if isinstance(value, str) else json.dumps(value)]
    command += ["--logprobs-mode", "processed_logprobs", "--enable-scale-out"]
    command += ["--weight-transfer-config", json.dumps({"backend": "nccl"})]
    return "CUDA_VISIBLE_DEVICES=0 VLLM_SERVER_DEV_MODE=1 " + shlex.join(command)


def server_problems(url: str, length: int) -> list[str]:
    """Return what keeps a vLLM server from answering requests of `length` tokens for a training, a sentence each."""
    if not url.startswith(("http://", "https://")):
        return [f"train.vllm_server={url}: write it as http://host:8000"]
    try:
        _get(f"{url}/health")
    except OSError as error:
        return [f"train.vllm_server={url} does not reply ({error})"]
    try:
        config = json.loads(_get(f"{url}/server_info?config_format=json"))["vllm_config"]
        transfer, model = config["weight_transfer_config"], config["model_config"]
        longest, logprobs = int(model["max_model_len"]), model["logprobs_mode"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"train.vllm_server={url} does not report its settings ({error!r}); set VLLM_SERVER_DEV_MODE=1 there"]
    problems = []
    if transfer is None:
        problems.append(f"train.vllm_server={url} takes no weights; give it --weight-transfer-config")
    if logprobs != "processed_logprobs":
        problems.append(f"train.vllm_server={url} has --logprobs-mode {logprobs}; it must be processed_logprobs")
    if longest < length:
        problems.append(
            f"train.vllm_server={url} takes {longest} tokens, and prompt and completion have up to {length}; "
            f"give it --max-model-len {length}"
        )
    return problems


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=_PATIENCE) as reply:
        return bytes(reply.read())
