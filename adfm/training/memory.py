"""Out-of-memory errors of a training: which setting to lower, and to what."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from adfm.errors import AdfmError
from adfm.models import hardware
from adfm.params import Params


@contextmanager
def translate_errors(params: Params, processes: int) -> Iterator[None]:
    """Turn an out-of-memory error in the body, a training by GRPO, into an `AdfmError` that lists what to lower."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # On a CPU PyTorch raises a plain RuntimeError.
        texts = ("can't allocate memory", "CUDA out of memory", "not enough memory")
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(map(str(error).__contains__, texts)):
            raise
        generating = any(frame.name == "_generate" for frame in traceback.extract_tb(error.__traceback__))
        where = "generating completions" if generating else "the forward and backward passes"
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        listed = "".join(f"\n  {n}. {text}" for n, text in enumerate(advice(params, processes, generating), 1))
        raise AdfmError(f"memory ran out in {where}: {reason}\nTry, in this order:{listed}") from error


def advice(params: Params, processes: int = 1, generating: bool = False) -> list[str]:
    """Return which settings to change to what, the cheapest first, when memory ran out in generation or after it."""
    train, group = params.train, params.train.num_generations
    share, now = hardware.batch_split(train, processes)
    tries = []
    if generating:  # all completions of a step are in memory at once, whatever train.micro_batch is
        fewer = [n for n in range(1, train.prompts_per_step) if n * group % processes == 0]
        if fewer:
            near = min(fewer, key=lambda n: abs(n - train.prompts_per_step / 2))
            tries.append(f"train.prompts_per_step={near} (it is {train.prompts_per_step})")
        if group > 2:
            tries.append(f"train.num_generations={max(2, group // 2)} (it is {group})")
        shorter = train.max_completion_length * 3 // 4
        tries.append(f"train.max_completion_length={shorter} (it is {train.max_completion_length})")
    else:
        smaller = [n for n in range(1, now) if share % n == 0]
        if smaller:
            tries.append(f"train.micro_batch={smaller[-1]} (it is {train.micro_batch or f'null: {now}'})")
        if not train.gradient_checkpointing:
            tries.append("train.gradient_checkpointing=true")
    pixels = params.model.max_pixels
    smaller_images = f"{pixels // 2} (it is {pixels})" if pixels else "262144 (it is null: the processor's own limit)"
    tries.append(f"model.max_pixels={smaller_images}, in cold start and evaluation too")
    if params.model.dtype == "float32":
        tries.append("model.dtype=bfloat16, on a GPU")
    return tries
