from __future__ import annotations

import json
from pathlib import Path

import pytest

from adfm.errors import AdfmError
from adfm.models import loading


def test_embedded_model_is_small_and_of_the_real_architecture() -> None:
    folder = loading.resolve("embedded://tiny-base", None)
    assert loading.family_of(folder) == "qwen3_vl"
    assert sum(f.stat().st_size for f in folder.glob("*.safetensors")) <= 12e6
    assert not list(folder.glob("*.py")) and not list(folder.glob("*.bin"))


@pytest.mark.parametrize(
    ("name", "revision", "says"),
    [
        ("embedded://huge", None, "embedded://tiny-base"),
        ("no/such/folder", None, "no folder no/such/folder"),
        ("./nowhere", None, "no folder ./nowhere"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", None, "model.revision"),
    ],
)
def test_unusable_names_are_answered_in_one_sentence(name: str, revision: str | None, says: str) -> None:
    with pytest.raises(AdfmError, match=says) as error:
        loading.resolve(name, revision)
    assert "\n" not in str(error.value)


def test_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(AdfmError, match="neither in the local cache nor") as error:
        loading.resolve("Qwen/Qwen2.5-VL-7B-Instruct", "cc594898137f460bfe9f0759e9844b3ce807cfb5")
    assert "\n" not in str(error.value)


def test_folder_of_another_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(AdfmError, match="'llava'"):
        loading.resolve(str(tmp_path), None)


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"}))
    with pytest.raises(AdfmError, match="no model weights"):
        loading.resolve(str(tmp_path), None)
