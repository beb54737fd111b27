"""vLLM in GRPO, as far as it goes without a GPU: what TRL hands the engine, which here is a stand-in."""

from __future__ import annotations

import types
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from PIL import Image
from trl.distributed import DistributedBackend
from trl.generation import vllm_generation as trl_generation

from adfm.errors import AdfmError
from adfm.models import families, hardware, loading
from adfm.params import Model, Params
from adfm.training import grpo, vllm_generation
from adfm.training.sft import sft
from experiments import tiny_base, tiny_model
from tests.models import random_models


def adapted(network: Any, targets: str | list[str], rank: int = 4) -> Any:
    """The network with an adapter whose factors are random, both of them: PEFT starts the second at zero."""
    model = get_peft_model(network, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    shake(model)
    return model


def shake(model: Any) -> None:
    """Changes the adapter as a training step does."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.add_(torch.randn_like(weight) * 0.02)


def syncing(model: Any, kind: type[Any] = vllm_generation.Generation) -> Any:
    """TRL's generation without an engine, to which weights are sent that are collected in `received`."""
    generation = kind.__new__(kind)
    generation.model, generation.mode, generation.enable_sleep_mode = model, "colocate", False
    generation.accelerator = Accelerator(cpu=True)
    generation._dist = DistributedBackend(generation.accelerator)
    generation.received = {}

    def load_weights(pairs: Any) -> None:
        generation.received.update({name: weight.clone() for name, weight in pairs})

    engine = types.SimpleNamespace(load_weights=load_weights)
    runner = types.SimpleNamespace(model_runner=types.SimpleNamespace(model=engine))
    executor = types.SimpleNamespace(driver_worker=runner)
    generation.llm = types.SimpleNamespace(
        llm_engine=types.SimpleNamespace(model_executor=executor), reset_prefix_cache=lambda: None
    )
    return generation


class Small(torch.nn.Module):
    """Two linear layers and a norm, in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32, bias=False)
        self.norm = torch.nn.LayerNorm(32)
        self.to(torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(self.down(self.up(x)))
        return y


@torch.no_grad()
def drift(kind: type[Any], syncs: int) -> float:
    """How far `syncs` syncs move the base, as a share of what the adapter itself changes; checks what is received."""
    torch.manual_seed(0)
    model = adapted(Small(), ["up", "down"])
    before = {n: w.detach().clone() for n, w in model.named_parameters() if "base_layer.weight" in n}
    generation = syncing(model, kind)
    for _ in range(syncs):
        shake(model)
        generation.sync_weights()
        if kind is vllm_generation.Generation:
            for name, layer in (("up", model.base_model.model.up), ("down", model.base_model.model.down)):
                start = before[f"base_model.model.{name}.base_layer.weight"]
                change = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
                assert change.dtype == torch.float32
                rounded = (start.float() + change).to(torch.bfloat16)
                assert torch.equal(generation.received[f"{name}.weight"], rounded)
    moved = sum((w - before[n]).float().norm() ** 2 for n, w in model.named_parameters() if n in before)
    change = sum(
        layer.get_delta_weight("default").float().norm() ** 2
        for layer in (model.base_model.model.up, model.base_model.model.down)
    )
    return float((moved / change) ** 0.5)


def test_500_syncs_leave_the_base_bitwise_as_it_was_and_send_its_sum_with_the_adapter() -> None:
    assert drift(vllm_generation.Generation, 500) == 0.0


def test_merging_into_the_base_as_trl_does_moves_it() -> None:
    assert drift(trl_generation.VLLMGeneration, 100) > 0.01


def test_the_sum_is_rounded_once() -> None:
    torch.manual_seed(0)
    model = adapted(Small(), ["up", "down"])
    layer = model.base_model.model.up
    weight = layer.base_layer.weight.detach()
    exact = weight.double() + layer.get_delta_weight("default").double()
    error = (vllm_generation.merged(weight, layer).double() - exact).abs()
    assert (error <= exact.abs() * 2**-8).all()  # half a step of bfloat16, which has eight bits
    assert vllm_generation.merged(weight, None) is weight


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_weights_have_the_names_and_sizes_of_the_base_model(family: str) -> None:
    network = architecture(family)
    expected = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    generation = syncing(adapted(network, "all-linear"))
    generation.sync_weights()
    assert {name: w.shape for name, w in generation.received.items()} == {name: w.shape for name, w in expected.items()}
    same = {name for name, weight in expected.items() if torch.equal(weight, generation.received[name])}
    assert "model.visual.patch_embed.proj.weight" in same
    assert {"model.visual.blocks.0.attn.qkv.weight", "model.language_model.layers.0.mlp.up_proj.weight"}.isdisjoint(
        same
    )
    ours = dict(generation.received)
    by_trl = syncing(generation.model, trl_generation.VLLMGeneration)
    by_trl.sync_weights()
    assert list(by_trl.received) == list(ours)
    for name, weight in by_trl.received.items():
        torch.testing.assert_close(ours[name], weight)


def test_a_module_that_is_trained_whole_is_sent_as_it_is_trained() -> None:
    model = get_peft_model(Small(), LoraConfig(r=4, target_modules=["up"], modules_to_save=["norm"]))
    with torch.no_grad():
        model.base_model.model.norm.modules_to_save["default"].weight.fill_(3)
    generation = syncing(model)
    generation.sync_weights()
    assert set(generation.received) == {"up.weight", "up.bias", "down.weight", "norm.weight", "norm.bias"}
    assert (generation.received["norm.weight"] == 3).all()


def test_an_adapter_that_cannot_be_added_to_a_weight_is_refused() -> None:
    vllm_generation.refuse_other_layers(adapted(Small(), ["up", "down"]))
    tied = Small()
    tied.again = torch.nn.Linear(32, 64)
    tied.again.weight = tied.up.weight
    with pytest.raises(AdfmError, match="again is another layer's too"):
        vllm_generation.refuse_other_layers(adapted(tied, ["up", "again"]))
    embedding = torch.nn.Sequential(torch.nn.Embedding(8, 8))
    with pytest.raises(AdfmError, match="is not a plain linear layer"):
        vllm_generation.refuse_other_layers(adapted(embedding, ["0"]))


# ------------------------------------------------------------------------------------------------ prompts


def processor_of(family: str) -> Any:
    whole = tiny_model.processor(tiny_model.tokenizer(tiny_base.corpus()))
    return families.processor_class(family)(
        image_processor=whole.image_processor, tokenizer=whole.tokenizer, chat_template=whole.chat_template
    )


def architecture(family: str) -> Any:
    """A network of a family with two layers each, random."""
    return random_models.BUILDERS[family]()[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_models.write("qwen3_vl", tmp_path_factory.mktemp("qwen3_vl"))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_each_run_of_image_tokens_becomes_one(family: str) -> None:
    processor = processor_of(family)
    images = [Image.new("RGB", size) for size in ((96, 96), (192, 64), (48, 120))]
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    chat = [{"role": "user", "content": [*content, {"type": "text", "text": "Which of them?"}]}]
    encoded = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    (ids,), image = encoded["input_ids"], processor.image_token_id
    assert ids.count(image) == sum(int(grid.prod()) // tiny_model.MERGE**2 for grid in encoded["image_grid_thw"]) > 3
    once = vllm_generation.collapsed(ids, image)
    assert once == processor.tokenizer(text)["input_ids"] and once.count(image) == 3
    assert vllm_generation.collapsed(once, image) == once
    assert vllm_generation.collapsed([], image) == []


def test_trl_is_not_newer_than_the_one_that_is_corrected() -> None:
    assert Version(version("trl")) <= Version(vllm_generation.TRL), (
        "TRL is newer than the one that adfm/training/vllm_generation.py corrects. See whether it still hands vLLM "
        "prompts with expanded image tokens (huggingface/trl 6294, 6401), still merges the adapter into the base for a "
        "sync, and takes engine arguments; drop what is no longer needed, and raise `TRL` there."
    )


# ------------------------------------------------------------------------------- a training with a stand-in


class Engine:
    """A stand-in for `vllm.LLM` that keeps what it is given and always writes the same."""

    options: ClassVar[dict[str, Any]] = {}
    weights: ClassVar[list[dict[str, torch.Tensor]]] = []
    prompts: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, **options: Any) -> None:
        Engine.options = options
        self.llm_engine = types.SimpleNamespace(
            model_executor=types.SimpleNamespace(
                driver_worker=types.SimpleNamespace(model_runner=types.SimpleNamespace(model=self))
            ),
            model_config=types.SimpleNamespace(max_model_len=options["max_model_len"]),
        )

    def load_weights(self, pairs: list[tuple[str, torch.Tensor]]) -> None:
        if pairs[0][0].endswith("patch_embed.proj.weight"):
            self.weights.append({})
        self.weights[-1].update({name: weight.clone() for name, weight in pairs})

    def generate(self, prompts: list[dict[str, Any]], sampling_params: Any, use_tqdm: bool) -> list[Any]:
        self.prompts.extend(prompts)
        assert sampling_params.logit_bias and sampling_params.repetition_penalty == 1.0
        tokenizer = tiny_model.tokenizer(tiny_base.corpus())
        texts = [f"<answer>{'AB'[number % 2]}</answer><|im_end|>" for number in range(len(prompts))]
        written = [tokenizer(text)["input_ids"] for text in texts]
        logprobs = {0: types.SimpleNamespace(logprob=-0.1, rank=1)}
        return [
            types.SimpleNamespace(
                prompt_token_ids=prompt["prompt_token_ids"],
                outputs=[types.SimpleNamespace(token_ids=ids, logprobs=[logprobs] * len(ids))],
            )
            for prompt, ids in zip(prompts, written, strict=True)
        ]

    def nothing(self, *_: Any, **__: Any) -> None: ...

    sleep = wake_up = reset_prefix_cache = nothing


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[Engine]:
    monkeypatch.setattr(trl_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(trl_generation, "LLM", Engine, raising=False)
    monkeypatch.setattr(trl_generation, "SamplingParams", types.SimpleNamespace, raising=False)
    monkeypatch.setattr(hardware, "require", lambda *_: None)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, {"MASTER_ADDR": "localhost", "MASTER_PORT": "29511", "WORLD_SIZE": "1"}.get(name, "0"))
        monkeypatch.delenv(name)  # TRL sets them, and here they are taken back
    Engine.weights.clear()
    Engine.prompts.clear()
    return Engine


def test_a_training_hands_the_engine_prompts_sizes_and_merged_weights(
    stand_in: type[Engine], small_shards: Path, folder: Path, tmp_path: Path, params: Params
) -> None:
    settings = params.model_dump(by_alias=True)
    settings["model"] = {"name": str(folder)}
    settings["train"] |= {"vllm": 0.3, "steps": 2}
    own = Params.model_validate(settings)
    sft(small_shards, tmp_path / "sft", own)
    grpo.train(small_shards, tmp_path / "sft", tmp_path / "trained", own)
    processor = loading.load_processor(folder, Model())
    options = stand_in.options
    assert (options["gpu_memory_utilization"], options["dtype"]) == (0.3, "float32")
    assert options["mm_processor_kwargs"] == {
        "size": {"shortest_edge": random_models.SIDE**2, "longest_edge": random_models.SIDE**2}
    }
    assert options["limit_mm_per_prompt"] == {"image": 1, "video": 0}
    assert options["generation_config"] == "vllm"
    image = processor.image_token_id
    assert {prompt["prompt_token_ids"].count(image) for prompt in stand_in.prompts} == {1}
    longest = max(len(prompt["prompt_token_ids"]) for prompt in stand_in.prompts)
    grid = (random_models.SIDE // random_models.PATCH // random_models.MERGE) ** 2
    assert options["max_model_len"] >= longest - 1 + grid + own.train.max_completion_length
    start = loading.load(tmp_path / "sft", own.model)
    merged = start.model.merge_and_unload()
    (first, *_), last = stand_in.weights, stand_in.weights[-1]
    assert set(first) == {name for name, _ in merged.named_parameters()}
    for name, weight in merged.named_parameters():
        torch.testing.assert_close(first[name], weight.data, rtol=1e-5, atol=1e-5)
    assert any(not torch.equal(first[name], last[name]) for name in first)


def test_a_server_is_given_to_trl_by_its_address() -> None:
    loaded: Any = types.SimpleNamespace()
    params = Params.model_validate({"train": {"vllm_server": "http://gpu0:8000"}})
    given = vllm_generation.trl_settings(params.train, loaded, [5])
    assert given == {
        "generation_kwargs": {"logit_bias": {5: -100.0}},
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_server_base_url": "http://gpu0:8000",
    }
    from trl import GRPOConfig

    GRPOConfig(use_cpu=True, bf16=False, **given)
