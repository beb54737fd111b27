"""Liger is not installed here, as it needs a GPU: a package with its modules stands in for what it imports."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from adfm.models import hardware, liger, loading, model_folder
from adfm.params import Params, Train

MODULES = {
    "__init__": "",
    "transformers/__init__": "def _apply_liger_kernel_to_instance(model, **kwargs):\n    model.applied = kwargs\n",
    "transformers/monkey_patch": "MODEL_TYPE_TO_APPLY_LIGER_FN = {'qwen3_vl': None, 'qwen2_5_vl': None}\n",
    "transformers/model/__init__": "",
    "transformers/model/output_classes": "",
    # As liger-kernel 0.8.5 beside transformers 5.23: this class is not defined.
    "transformers/model/qwen3_vl": "from .output_classes import LigerQwen3VLCausalLMOutputWithPast\n",
    "transformers/model/qwen2_5_vl": "from .output_classes import something_else\n",
}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import liger as integration

    for name, text in MODULES.items():
        file = tmp_path / "liger_kernel" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    info = tmp_path / "liger_kernel-0.8.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: liger-kernel\nVersion: 0.8.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(integration, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in [name for name in sys.modules if name.startswith("liger_kernel")]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()


@pytest.mark.usefixtures("installed")
def test_a_class_that_transformers_has_renamed_does_not_keep_the_layers_from_their_kernels() -> None:
    assert liger.problems("qwen3_vl") == []
    assert liger.enabled(Train(), "qwen3_vl")
    model = hardware.meta_model(loading.EMBEDDED["embedded://tiny-base"])
    liger.apply(model)
    assert model.applied == {"fused_linear_cross_entropy": False}


@pytest.mark.usefixtures("installed")
def test_what_cannot_be_used_is_refused_with_the_reason() -> None:
    (problem,) = liger.problems("qwen2_5_vl")
    assert problem.startswith(
        "train.liger=true: liger-kernel 0.8.5 cannot be used (cannot import name 'something_else'"
    )
    assert problem.endswith("set train.liger=false")
    assert not liger.enabled(Train(), "qwen2_5_vl")
    (problem,) = liger.problems("internvl")
    assert "it has no kernels for internvl models" in problem


@pytest.mark.usefixtures("installed")
def test_a_training_with_kernels_that_its_model_has_not_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("GPU", (), {"total_memory": 2**40}))
    monkeypatch.setattr(model_folder, "family_of", lambda _: "qwen3_vl")
    assert hardware.problems(Params(train=Train(liger=True))) == []
    monkeypatch.setattr(model_folder, "family_of", lambda _: "internvl")
    monkeypatch.setattr(loading, "base_of", lambda name, settings: (settings, Path()))
    (problem,) = hardware.problems(Params(train=Train(liger=True)))
    assert "it has no kernels for internvl models" in problem
