"""Which modules carry the adapter: PEFT on the real network, on one without weights, and the count of its numbers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from adfm.errors import AdfmError
from adfm.models import adapters, loading
from adfm.params import Lora
from tests import hub

FAMILIES = ("qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    """A tiny model of each family as the hub has it, with an output head of its own and with a tied one."""
    root = tmp_path_factory.mktemp("hub")
    return {
        (family, tied): hub.write(root / f"{family}-{tied}", family, tied)
        for family in FAMILIES
        for tied in (False, True)
    }


def _real(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder)


def _trainable(model: Any) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_network_without_weights_has_the_names_that_training_sees(
    folders: dict[tuple[str, bool], Path], family: str
) -> None:
    for tied in (False, True):
        outline = loading.outline(folders[family, tied])
        assert {weight.device.type for weight in outline.parameters()} == {"meta"}
        assert [name for name, _ in outline.named_modules()] == [
            name for name, _ in _real(folders[family, tied]).named_modules()
        ]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_is_taken_or_refused_as_by_peft(folders: dict[tuple[str, bool], Path], family: str) -> None:
    """Each name that a module of the network has, alone in the list: PEFT decides on the real network."""
    from peft import get_peft_model

    outline, network = loading.outline(folders[family, False]), _real(folders[family, False])
    names = {name.split(".")[-1] for name, _ in network.named_modules() if name} - {str(i) for i in range(2)}
    taken = set()
    for name in sorted(names):
        lora = Lora(r=4, target_modules=[name])
        problems = adapters.problems(outline, lora)
        if name == "lm_head":  # PEFT takes it, TRL does not
            assert "matches the output head lm_head" in problems[0]
            continue
        try:
            model = get_peft_model(network, adapters.config(network, lora))
        except ValueError:
            (problem,) = problems
            assert f"{name!r} matches" in problem and "cannot carry a LoRA adapter" in problem
            network = _real(folders[family, False])  # PEFT had begun
        else:
            assert problems == []
            assert adapters.weights(outline, lora) == _trainable(model)
            network = model.unload()
            taken.add(name)
    assert {"q_proj", "qkv", "proj", "embed_tokens"} <= taken
    assert "norm1" in names - taken


@pytest.mark.parametrize(
    ("targets", "vision"),
    [
        ("all-linear", True),
        ("ALL-LINEAR", False),
        (["q_proj"], False),
        (["q_proj", "qkv", "proj"], True),
        (["self_attn.o_proj", "layers.1.mlp.down_proj"], True),
        (r".*\.(q_proj|qkv)", True),
        (r".*\.(q_proj|qkv)", False),
        (r"(.*\.)?embed_tokens", False),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_numbers_of_an_adapter_are_those_that_peft_trains(
    folders: dict[tuple[str, bool], Path], family: str, targets: str | list[str], vision: bool
) -> None:
    lora = Lora(r=8, target_modules=targets, vision=vision)
    model = adapters.attach(_real(folders[family, False]), lora)
    assert adapters.weights(loading.outline(folders[family, False]), lora) == _trainable(model)
    assert vision or not any("visual" in name and "lora_" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("targets", "vision", "reasons"),
    [
        (
            ["q_proj", "q_prj", "no"],
            True,
            ["'q_prj' matches no module of the model; near are q_proj", "'no' matches no"],
        ),
        (["model.layers.0.self_attn.q_proj"], True, ["near are language_model.layers.0.self_attn.q_proj"]),
        (["all-linear"], True, ["all-linear is not for a list; set lora.target_modules=all-linear"]),
        (["q_proj", ""], True, ["'' matches no module of the model; its linear layers are"]),
        ("q_proj", True, ["is a regular expression for whole names, such as model.visual"]),
        (r"model\.layers\..*", True, ["matches no module of the model"]),
        ("(", True, ["'(' is not a regular expression"]),
        (".*mlp.*", True, ["cannot carry a LoRA adapter"]),
        (["q_proj", "norm", "visual"], True, ["'norm' matches model.", "'visual' matches model.visual "]),
        (["qkv", "q_proj"], False, ["'qkv' matches modules of the vision tower only, and lora.vision is false"]),
        (".*visual.*qkv", False, ["matches modules of the vision tower only, and lora.vision is false"]),
        ([], True, ["lora.target_modules is empty"]),
        ("", True, ["lora.target_modules is empty"]),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_entry_at_fault_is_named_with_what_to_do(
    folders: dict[tuple[str, bool], Path], family: str, targets: str | list[str], vision: bool, reasons: list[str]
) -> None:
    lora = Lora(target_modules=targets, vision=vision)
    problems = adapters.problems(loading.outline(folders[family, False]), lora)
    assert len(problems) == len(reasons)
    for problem, reason in zip(problems, reasons, strict=True):
        assert reason in problem
    with pytest.raises(AdfmError, match="lora.target_modules") as caught:
        adapters.attach(_real(folders[family, False]), lora)
    assert str(caught.value).split("\n  ") == problems


@pytest.mark.parametrize("family", FAMILIES)
def test_neither_the_output_head_nor_what_is_tied_to_it_takes_an_adapter(
    folders: dict[tuple[str, bool], Path], family: str
) -> None:
    for targets, tied, reason in (
        (["q_proj", "lm_head"], False, "'lm_head' matches the output head lm_head"),
        (["q_proj", "lm_head"], True, "'lm_head' matches the output head lm_head"),
        (r"(.*\.)?(q_proj|lm_head)", True, "matches the output head lm_head"),
        (
            ["q_proj", "embed_tokens"],
            True,
            "'embed_tokens' matches model.language_model.embed_tokens, whose weights are",
        ),
    ):
        lora = Lora(r=4, target_modules=targets)
        (problem,) = adapters.problems(loading.outline(folders[family, tied]), lora)
        assert reason in problem
        with pytest.raises(AdfmError, match="lora.target_modules"):
            adapters.attach(_real(folders[family, tied]), lora)


def test_merging_an_adapter_of_a_tied_embedding_gives_another_model(folders: dict[tuple[str, bool], Path]) -> None:
    """Why it is refused: if PEFT ever merges it right, the refusal can go."""
    from peft import get_peft_model

    lora = Lora(r=4, target_modules=["embed_tokens"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = _real(folders["qwen3_vl", True])
        model = get_peft_model(network, adapters.config(network, lora))
        torch.manual_seed(0)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.normal_()
            tokens = torch.tensor([[1, 2, 3]])
            before = model(input_ids=tokens).logits
            model.merge_adapter()
            after = model(input_ids=tokens).logits
    assert (before - after).abs().max() > 1


def test_the_published_adapter_has_its_published_size() -> None:
    """Qwen2.5-VL-7B at its real shapes, without memory: 161 M numbers with the tower frozen, 207 M without."""
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

    text = {
        **{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
        **{"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    with torch.device("meta"):
        network = AutoModelForImageTextToText.from_config(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    assert adapters.weights(network, Lora(r=64, alpha=128, vision=False)) == 161_480_704
    assert adapters.weights(network, Lora(r=64, alpha=128)) == 207_298_560
