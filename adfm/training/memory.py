"""When memory runs out: which setting to lower, and to what."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from adfm.errors import AdfmError
from adfm.models import hardware
from adfm.params import Params


@contextmanager
def explained(params: Params, processes: int) -> Iterator[None]:
    """Turns running out of memory in the body, a training by GRPO, into an `AdfmError` that says what to lower."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        generating = any(frame.name == "_generate" for frame in traceback.extract_tb(error.__traceback__))
        what = "generating completions" if generating else "the forward and backward passes"
        tries = advice(params, processes, generating)
        listed = "".join(f"\n  {number}. {text}" for number, text in enumerate(tries, 1))
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise AdfmError(f"memory ran out in {what}: {reason}\nTry, in this order:{listed}") from error


def ran_out(error: BaseException) -> bool:
    """Whether an exception says that memory, of a GPU or of the machine, did not suffice."""
    import torch

    said = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in said for words in ("can't allocate memory", "CUDA out of memory", "not enough memory")
    )


def advice(params: Params, processes: int = 1, generating: bool = False) -> list[str]:
    """What to set to what, the cheapest first, from what is set.

    Args:
        params: Reads `model` and `train`.
        processes: Among which the completions of a step are divided.
        generating: Whether it was in generation, which has all completions of a step at once, or in the passes.
    """
    train, group = params.train, params.train.num_generations
    share, now = hardware.batch_split(train, processes)
    tries = []
    if generating:
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
    tries.append(
        f"model.max_pixels={pixels // 2} (it is {pixels}), in cold start and evaluation too"
        if pixels
        else "model.max_pixels=262144 (it is null: the processor's own limit), in cold start and evaluation too"
    )
    if params.model.dtype == "float32":
        tries.append("model.dtype=bfloat16, on a GPU")
    return tries
