"""vLLM inside TRL's GRPO trainer: corrections to TRL 1.16 for a LoRA on a vision-language model; not run with vLLM."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from trl.generation import vllm_generation as trl_generation
from trl.trainer import grpo_trainer

from adfm.errors import AdfmError
from adfm.models import vllm_engine
from adfm.models.loading import Loaded
from adfm.params import Train

TRL = "1.16.0"  # that this file corrects; a test fails with a newer one, which may need less or other corrections


def trl_settings(settings: Train, loaded: Loaded, unwanted: list[int]) -> dict[str, Any]:
    """Return the arguments of TRL's `GRPOConfig` that let vLLM generate, without the tokens `unwanted`."""
    # vLLM knows no `suppress_tokens`, so their logits are lowered.
    bias = dict.fromkeys(unwanted, -100.0)
    shared: dict[str, Any] = {"generation_kwargs": {"logit_bias": bias}, "use_vllm": True}
    if settings.vllm_server:  # whose memory and model length are set where it is started
        return {**shared, "vllm_mode": "server", "vllm_server_base_url": settings.vllm_server}
    length = vllm_engine.model_length(loaded.processor, loaded.prompt, settings.max_completion_length)
    return {
        **shared,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": settings.vllm,
        "vllm_max_model_length": length,
        "vllm_enable_sleep_mode": True,
    }


@contextmanager
def installed(loaded: Loaded) -> Iterator[None]:
    """Let the trainer that is built in the body generate by `Generation`."""
    trainer: Any = grpo_trainer  # TRL takes no class as an argument: the name in its module is replaced
    original = trainer.VLLMGeneration
    refuse_other_layers(loaded.model)
    options = vllm_engine.options(loaded.processor, loaded.base.dtype)
    trainer.VLLMGeneration = functools.partial(Generation, engine_options=options)
    try:
        yield
    finally:
        trainer.VLLMGeneration = original


class Generation(trl_generation.VLLMGeneration):
    """TRL's generation by vLLM, with weight sync that leaves the trained model's base weights unchanged.

    `engine_options` are further arguments of `vllm.LLM`, where the engine is in this process.
    """

    def __init__(self, *args: Any, engine_options: dict[str, Any], **kwargs: Any) -> None:
        self._engine_options = engine_options
        super().__init__(*args, **kwargs)
        if self._dist.fsdp_version == 1:
            raise AdfmError("train.vllm: FSDP1 is not supported; use configs/accelerate/fsdp2.yaml")

    def _init_vllm(self) -> None:
        # TRL has no argument for the sizes that images are resized to, for the number of images a prompt, or for the
        # data type, and vLLM would measure its memory with videos of the longest kind.
        start: Any = super()._init_vllm  # untyped in TRL
        names: Any = trl_generation
        original = getattr(names, "LLM", None)  # absent without vLLM, where TRL refuses
        if self.mode != "colocate" or original is None:
            start()
            return
        names.LLM = functools.partial(original, **self._engine_options)
        try:
            start()
        finally:
            names.LLM = original

    def generate(self, prompts: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """Generate as TRL does."""
        # TRL hands the engine in this process prompts whose image token is already repeated once for each visual token,
        # which vLLM does itself. A server gets images and their places separately: there the repetition is right.
        if self.mode == "colocate":
            processor: Any = self.processing_class
            prompts = [collapsed(ids, processor.image_token_id) for ids in prompts]
        return super().generate(prompts, *args, **kwargs)

    @torch.no_grad()
    def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every weight under vLLM's name, with the adapter added. It gathers: all processes iterate."""
        # TRL merges the adapter into the base weights, sends them, and unmerges. In bfloat16 each such round trip
        # rounds twice, so that the base drifts with every step.
        for name, weight in self.model.named_parameters():
            if getattr(self.model, "prefix", "lora_") in name or "original_module" in name:
                continue
            layer = adapted_layer(self.model, name)
            factors = [factor for pair in _factors(layer) for factor in pair[:2]] if layer is not None else []
            with self._dist.gather_params([weight, *factors]):
                yield self._name_for_vllm(name), merged(self._whole(weight), layer, self._whole)

    def _name_for_vllm(self, name: str) -> str:
        """Return a weight's name in the base model, as TRL does; vLLM maps it to its own."""
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        return str(self._fix_param_name_to_vllm(name, extra_prefixes=["modules_to_save.default."]))

    def _whole(self, weight: Any) -> Tensor:
        """Return a whole weight; gather one that FSDP2 divides among processes."""
        if not hasattr(weight, "full_tensor"):
            return cast("Tensor", weight.data)
        if weight.is_cpu and self.accelerator.device.type != "cpu":  # offloaded: the GPUs gather faster
            weight = weight.to(self.accelerator.device)
        return cast("Tensor", weight.full_tensor())


def collapsed(ids: list[int], image_token: int) -> list[int]:
    """Collapse each run of image tokens of a prompt to one token, as vLLM expects."""
    return [token for i, token in enumerate(ids) if token != image_token or i == 0 or ids[i - 1] != image_token]


def adapted_layer(model: Any, name: str) -> Any:
    """Return PEFT's layer around the base weight of this name; `None` if no adapter changes the weight."""
    place = name.removesuffix(".base_layer.weight")
    return model.get_submodule(place) if place != name else None


def merged(weight: Tensor, layer: Any, whole: Any = lambda factor: factor) -> Tensor:
    """Return base weight plus adapter, `[out, in]`, summed in float32 and rounded once to the type of the base.

    Args:
        weight: The whole base weight, which stays as it is.
        layer: PEFT's layer around it; `None`: the weight is returned as it is.
        whole: Gathers a factor of the adapter that is divided among processes.
    """
    if layer is None:
        return weight
    total = weight.to(torch.float32, copy=True)
    for down, up, scaling in _factors(layer):
        total += whole(up).float() @ whole(down).float() * scaling
    return total.to(weight.dtype)


def _factors(layer: Any) -> list[tuple[Any, Any, float]]:
    """Return the factors A `[r, in]` and B `[out, r]` of each active adapter on a layer, and their product's scale."""
    return [
        (layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
        for name in layer.active_adapters
        if name in layer.lora_A
    ]


def refuse_other_layers(model: Any) -> None:
    """Refuse an adapter that `merged` cannot add: on a layer that is not linear, or on a weight of two layers."""
    from peft.tuners.lora import Linear, LoraLayer

    weights = {name for name, _ in model.named_parameters()}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if not isinstance(layer, Linear) or layer.fan_in_fan_out or any(layer.use_dora.values()):
            raise AdfmError(f"train.vllm: {name} is not a plain linear layer; leave it out of lora.target_modules")
        if f"{name}.base_layer.weight" not in weights:
            raise AdfmError(
                f"train.vllm: the weight of {name} is another layer's too; leave it out of lora.target_modules"
            )
