"""LoRA adapters, and checks of `lora.target_modules`, the same for `adfm check` and for training."""

import difflib
import re
from typing import TYPE_CHECKING, Any

from adfm.errors import AdfmError
from adfm.models import families
from adfm.params import Lora

if TYPE_CHECKING:
    from peft import LoraConfig

ALL_LINEAR = "all-linear"


def config(network: Any, settings: Lora) -> "LoraConfig":
    """Return the settings as PEFT's, for `network`."""
    from peft import LoraConfig

    family = families.get(network.config.model_type)
    whole = [module for module in family.modules_to_save if settings.vision or module not in family.vision]
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        # A family with modules that are saved whole has its tower among them, which then takes no LoRA layers.
        exclude_modules=family.vision_pattern if family.modules_to_save or not settings.vision else None,
        modules_to_save=whole or None,
        task_type="CAUSAL_LM",
    )


def attach(network: Any, settings: Lora) -> Any:
    """Put a new adapter, whose weights alone are trainable, on `network`; raise `AdfmError` with all `problems`."""
    from peft import get_peft_model

    if refused := problems(network, settings):
        raise AdfmError("\n  ".join(refused))
    return get_peft_model(network, config(network, settings))


def problems(network: Any, settings: Lora) -> list[str]:
    """Return a sentence for every entry of `lora.target_modules` that `attach` refuses.

    Args:
        network: The model without an adapter; its weights may be on PyTorch's device `meta`.
        settings: Reads `target_modules` and `vision`.
    """
    targets = settings.target_modules
    if not targets:
        return [f"lora.target_modules is empty; name modules, or set it to {ALL_LINEAR}"]
    refused = []
    for entry in [targets] if isinstance(targets, str) else dict.fromkeys(targets):
        try:
            problem = _problem(network, settings, entry)
        except re.error as error:
            problem = f"is not a regular expression ({error}); name modules in a list, or set it to {ALL_LINEAR}"
        if problem:
            refused.append(f"lora.target_modules: {entry!r} {problem}")
    return refused


def weights(network: Any, settings: Lora) -> int:
    """Return how many numbers the adapter of `attach` has, without attaching it to the network."""
    whole = {*(config(network, settings).modules_to_save or ())}
    total: int = sum(p.numel() for name, p in network.named_parameters() if not whole.isdisjoint(name.split(".")))
    # By kind and shape, since PEFT needs long to make the layers of hundreds of modules, which are nearly all alike.
    sizes: dict[Any, int] = {}
    for module in _matched(network, settings).values():
        kind = type(module), tuple(module.weight.shape)
        if kind not in sizes:
            layer = _layer(network, module, settings)
            sizes[kind] = sum(weight.numel() for key, weight in layer.named_parameters() if "lora_" in key)
        total += sizes[kind]
    return total


def _problem(network: Any, settings: Lora, entry: str) -> str | None:
    text = isinstance(settings.target_modules, str)
    one = settings.model_copy(update={"target_modules": entry if text else [entry]})
    matched = _matched(network, one)
    if not matched and not _matched(network, one.model_copy(update={"vision": True})):
        return f"matches no module of the model; {_hint(network, entry, text)}"
    if not matched:
        return "matches modules of the vision tower only, and lora.vision is false; remove it, or set lora.vision=true"
    # The first module of each class, since PEFT decides by the class.
    kinds = {type(module): name for name, module in reversed(matched.items())}
    unfit = next((name for name in kinds.values() if _layer(network, matched[name], one) is None), None)
    if unfit:
        return (
            f"matches {unfit} ({type(matched[unfit]).__name__}), which cannot carry a LoRA adapter; "
            f"name linear layers, or set lora.target_modules={ALL_LINEAR}"
        )
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    for name, module in matched.items():
        if module is head:
            return f"matches the output head {name}, where TRL's loss would bypass an adapter; remove it"
        if module is embedding and head is not None and embedding.weight is head.weight:
            return (
                f"matches {name}, whose weights are the output head's too in this model: once merged, as for vLLM, an "
                "adapter would change both; remove it"
            )
    return None


def _matched(network: Any, settings: Lora) -> dict[str, Any]:
    # PEFT's own functions decide what an adapter is put on, since rules of our own could differ from them.
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    peft = _maybe_include_all_linear_layers(config(network, settings), network)
    return {name: module for name, module in network.named_modules() if name and check_target_module_exists(peft, name)}


def _layer(network: Any, module: Any, settings: Lora) -> Any:
    """Return PEFT's layer around one module, on the device `meta`; `None` if PEFT has none for the module's class."""
    import torch
    from peft.tuners.lora.layer import dispatch_default

    with torch.device("meta"):
        peft = config(network, settings)
        return dispatch_default(module, "default", config=peft, r=settings.r, lora_alpha=settings.alpha)


def _hint(network: Any, entry: str, text: bool) -> str:
    import torch

    linear = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    if text:
        return (
            f"a text other than {ALL_LINEAR} is a regular expression for whole names, such as {linear[0]} or "
            f"{linear[-2]}; names of their own go into a list, as in [q_proj, v_proj]"
        )
    if entry.strip().lower() == ALL_LINEAR:
        return f"{ALL_LINEAR} is not for a list; set lora.target_modules={ALL_LINEAR}"
    # As many of the last parts of each name as the entry has.
    names = [".".join(name.split(".")[-entry.count(".") - 1 :]) for name in linear]
    if near := difflib.get_close_matches(entry, dict.fromkeys(names), n=3):
        return f"near are {', '.join(near)}"
    return f"its linear layers are {', '.join(dict.fromkeys(name.split('.')[-1] for name in linear))}"
