"""What two processes do with a model that FSDP2 divides: run by `torchrun`, with the adapter and the file to write.

accelerate takes FSDP on GPUs only; its own function that divides a model is called here on CPUs.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from trl.distributed import DistributedBackend

from adfm.models import loading
from adfm.params import Model
from adfm.training import vllm_generation


def main(adapter: str, out: Path) -> None:
    state = PartialState(cpu=True)
    loaded = loading.load(adapter, Model(dtype="bfloat16"), trainable=True)
    network: Any = loaded.model
    devices = {weight.device.type for name, weight in network.named_parameters() if "lora_" not in name}
    network.add_adapter("ref", network.peft_config["default"])  # as TRL does for its KL penalty
    for name, weight in network.named_parameters():
        if ".default." in name:
            network.get_parameter(name.replace(".default.", ".ref.")).data.copy_(weight.data)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=True
    )
    accelerator: Any = types.SimpleNamespace(
        state=types.SimpleNamespace(fsdp_plugin=plugin, deepspeed_plugin=None),
        device=torch.device("cpu"),
        is_main_process=state.is_main_process,
        mixed_precision="no",
        parallelism_config=None,
    )
    shares = [tuple(weight.shape) for weight in network.parameters()]
    network = fsdp2_prepare_model(accelerator, network)
    generation: Any = vllm_generation.Generation.__new__(vllm_generation.Generation)
    generation.model, generation.accelerator = network, accelerator
    generation._dist = DistributedBackend(accelerator)
    sent = {name: weight.clone() for name, weight in generation._iter_named_params()}
    local = [weight.to_local().numel() for weight in network.parameters()]
    whole = sum(torch.Size(shape).numel() for shape in shares)
    torch.save({"devices": devices, "sent": sent, "share": sum(local) / whole}, f"{out}.{state.process_index}")
    state.wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
