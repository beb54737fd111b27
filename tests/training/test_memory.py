from __future__ import annotations

import pytest
import torch

from adfm.errors import AdfmError
from adfm.params import Params
from adfm.training import memory


def params(**train: object) -> Params:
    return Params.model_validate({"train": train})


def test_the_next_smaller_divisor_is_advised_then_what_costs_time_then_what_costs_sight() -> None:
    assert memory.advice(params(micro_batch=16)) == [
        "train.micro_batch=12 (it is 16)",
        "train.gradient_checkpointing=true",
        "model.max_pixels=262144 (it is null: the processor's own limit), in cold start and evaluation too",
        "model.dtype=bfloat16, on a GPU",
    ]
    assert memory.advice(params())[0] == "train.micro_batch=24 (it is null: 48)"
    assert memory.advice(params(), processes=2)[0] == "train.micro_batch=12 (it is null: 24)"
    least = Params.model_validate(
        {
            "train": {"micro_batch": 1, "gradient_checkpointing": True},
            "model": {"max_pixels": 262144, "dtype": "bfloat16"},
        }
    )
    assert memory.advice(least) == ["model.max_pixels=131072 (it is 262144), in cold start and evaluation too"]


def test_generation_has_all_completions_at_once_and_other_settings() -> None:
    assert memory.advice(params(), generating=True)[:3] == [
        "train.prompts_per_step=6 (it is 12)",
        "train.num_generations=2 (it is 4)",
        "train.max_completion_length=72 (it is 96)",
    ]


def test_out_of_memory_errors_list_settings_to_lower() -> None:
    message = r"(?s)memory ran out in the forward and backward.*1\. train\.micro_batch=24"
    with pytest.raises(AdfmError, match=message), memory.translate_errors(Params(), 1):
        torch.empty(1 << 60, dtype=torch.uint8)

    def _generate() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    message = r"(?s)ran out in generating completions: CUDA.*1\. train\.prompts_per_step=6"
    with pytest.raises(AdfmError, match=message), memory.translate_errors(Params(), 1):
        _generate()


def test_other_errors_are_not_translated() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory.translate_errors(Params(), 1):
        raise RuntimeError("shapes do not match")
