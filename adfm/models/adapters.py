"""LoRA adapters, and checks of `lora.target_modules`.

`adfm check` runs them on a network without weights and training on the real one, so that both refuse the same.
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any

from adfm.errors import AdfmError
from adfm.models import families
from adfm.params import Lora

if TYPE_CHECKING:
    from peft import LoraConfig

ALL_LINEAR = "all-linear"


def config(network: Any, settings: Lora) -> LoraConfig:
    """Return the settings as PEFT's, for `network`."""
    from peft import LoraConfig

    family = families.get(network.config.model_type)
    whole = [module for module in family.modules_to_save if settings.vision or module not in family.vision]
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        exclude_modules=family.vision_pattern if family.modules_to_save or not settings.vision else None,
        modules_to_save=whole or None,
        task_type="CAUSAL_LM",
    )


def attach(network: Any, settings: Lora) -> Any:
    """Put a new adapter on `network`.

    Returns:
        The network as PEFT's `PeftModel`; its only trainable weights are the adapter's.

    Raises:
        AdfmError: Lists all `problems`.
    """
    from peft import get_peft_model

    if refused := problems(network, settings):
        raise AdfmError("\n  ".join(refused))
    return get_peft_model(network, config(network, settings))


def problems(network: Any, settings: Lora) -> list[str]:
    """Return why `attach` refuses `lora.target_modules`: a sentence for every wrong entry.

    Args:
        network: The model without an adapter; its weights may be on PyTorch's device `meta`.
        settings: Reads `target_modules` and `vision`.
    """
    targets = settings.target_modules
    if not targets:
        return [f"lora.target_modules is empty; name modules, or set it to {ALL_LINEAR}"]
    modules = dict(network.named_modules())
    refused = []
    for entry in [targets] if isinstance(targets, str) else dict.fromkeys(targets):
        try:
            problem = _problem(network, modules, settings, entry)
        except re.error as error:
            problem = f"is not a regular expression ({error}); name modules in a list, or set it to {ALL_LINEAR}"
        if problem:
            refused.append(f"lora.target_modules: {entry!r} {problem}")
    return refused


def weights(network: Any, settings: Lora) -> int:
    """Return how many numbers the adapter of `attach` has, without attaching it to the network."""
    modules = dict(network.named_modules())
    sizes: dict[Any, int] = {}  # by kind and shape: PEFT's layers are made once for each, not hundreds of times
    whole = config(network, settings).modules_to_save or []
    total: int = sum(p.numel() for name, p in network.named_parameters() if not set(whole).isdisjoint(name.split(".")))
    for name in _matched(network, modules, settings):
        kind = type(modules[name]), tuple(modules[name].weight.shape)
        if kind not in sizes:
            layer = _layer(network, modules[name], settings)
            sizes[kind] = sum(weight.numel() for key, weight in layer.named_parameters() if "lora_" in key)
        total += sizes[kind]
    return total


def _problem(network: Any, modules: dict[str, Any], settings: Lora, entry: str) -> str | None:
    """Return what is wrong with one entry of a list, or with a regular expression; `None` if it can be used."""
    text = isinstance(settings.target_modules, str)
    one = settings.model_copy(update={"target_modules": entry if text else [entry]})
    matched = _matched(network, modules, one)
    if not matched and not _matched(network, modules, one.model_copy(update={"vision": True})):
        return f"matches no module of the model; {_hint(modules, entry, text)}"
    if not matched:
        return "matches modules of the vision tower only, and lora.vision is false; remove it, or set lora.vision=true"
    kinds = {type(modules[name]): name for name in reversed(matched)}
    unfit = next((name for name in kinds.values() if _layer(network, modules[name], one) is None), None)
    if unfit:
        return (
            f"matches {unfit} ({type(modules[unfit]).__name__}), which cannot carry a LoRA adapter; "
            f"name linear layers, or set lora.target_modules={ALL_LINEAR}"
        )
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    for name in matched:
        if modules[name] is head:
            return (
                f"matches the output head {name}, where TRL's loss would bypass an adapter and not train it; remove it"
            )
        if modules[name] is embedding and head is not None and embedding.weight is head.weight:
            return (
                f"matches {name}, whose weights are the output head's too in this model: once merged, as for vLLM, an "
                "adapter would change both; remove it"
            )
    return None


def _matched(network: Any, modules: dict[str, Any], settings: Lora) -> list[str]:
    """Return the names of the modules that PEFT would put an adapter on."""
    # PEFT's own functions decide, since rules of our own could differ from them.
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    peft = _maybe_include_all_linear_layers(config(network, settings), network)
    return [name for name in modules if name and check_target_module_exists(peft, name)]


def _layer(network: Any, module: Any, settings: Lora) -> Any:
    """Return PEFT's layer around one module, on the device `meta`; `None` if PEFT has none for the module's class."""
    import torch
    from peft.tuners.lora.layer import dispatch_default

    with torch.device("meta"):
        peft = config(network, settings)
        return dispatch_default(module, "default", config=peft, r=settings.r, lora_alpha=settings.alpha)


def _hint(modules: dict[str, Any], entry: str, text: bool) -> str:
    """Suggest what may have been meant by a name that matches nothing."""
    import torch

    linear = [name for name, module in modules.items() if isinstance(module, torch.nn.Linear)]
    if text:
        return (
            f"a text other than {ALL_LINEAR} is a regular expression for whole names, such as {linear[0]} or "
            f"{linear[-2]}; names of their own go into a list, as in [q_proj, v_proj]"
        )
    if entry.strip().lower() == ALL_LINEAR:
        return f"{ALL_LINEAR} is not for a list; set lora.target_modules={ALL_LINEAR}"
    parts = entry.count(".") + 1
    names = list(dict.fromkeys(".".join(name.split(".")[-parts:]) for name in linear))
    near = difflib.get_close_matches(entry, names, n=3)
    last = list(dict.fromkeys(name.split(".")[-1] for name in linear))
    return f"near are {', '.join(near)}" if near else f"its linear layers are {', '.join(last)}"
