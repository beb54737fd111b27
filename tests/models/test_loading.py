from __future__ import annotations

import json
import shutil
import ssl
import stat
from pathlib import Path

import pytest
from transformers import Qwen3VLForConditionalGeneration

from adfm import signing, tracking
from adfm.errors import AdfmError
from adfm.files import digest
from adfm.models import loading, model_folder, versions
from adfm.params import Model


def test_embedded_model_is_small_and_of_the_real_architecture() -> None:
    folder = loading.resolve("embedded://tiny-base", None)
    assert model_folder.family_of(folder) == "adfm_embedded"
    assert issubclass(type(loading.outline(folder)), Qwen3VLForConditionalGeneration)
    assert sum(f.stat().st_size for f in folder.glob("*.safetensors")) <= 5e6  # without the pretrained features
    assert not list(folder.glob("*.py")) and not list(folder.glob("*.bin"))


@pytest.mark.parametrize(
    ("name", "revision", "says"),
    [
        ("embedded://huge", None, "embedded://tiny-base"),
        ("no/such/folder", None, "no/such/folder is not a folder"),
        ("./nowhere", None, "./nowhere is not a folder"),
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


def test_a_hub_whose_authority_is_unknown_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> None:
        raise OSError("cannot find the files") from ssl.SSLCertVerificationError("self-signed certificate")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(AdfmError, match="name a local folder.*ADFM_CA_BUNDLE"):
        loading.resolve("Qwen/Qwen2.5-VL-7B-Instruct", "cc594898137f460bfe9f0759e9844b3ce807cfb5")


def test_folder_of_another_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(AdfmError, match="'llava'"):
        loading.resolve(str(tmp_path), None)


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"}))
    with pytest.raises(AdfmError, match="no model weights"):
        loading.resolve(str(tmp_path), None)


def test_what_a_model_sees_of_an_image_is_known_without_loading_it(tmp_path: Path) -> None:
    embedded = Model()
    limit = loading.load_processor(embedded.name, embedded).image_processor.size["longest_edge"]
    assert loading.pixels(embedded) == limit
    assert loading.pixels(Model(max_pixels=1000)) == 1000
    assert loading.pixels(Model(name="owner/name")) is None
    folder = Model(name=str(tmp_path))
    for family, content, expected in (
        ("qwen3_vl", {"size": {"longest_edge": 2000}}, 2000),
        ("qwen3_vl", {"size": {"height": 448, "width": 448}}, None),
        ("internvl", {"size": {"height": 448, "width": 448}, "max_patches": 12}, 12 * 448 * 448),
        ("another", {"size": {"longest_edge": 2000}}, None),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
        assert loading.pixels(folder) == expected


def test_a_model_has_an_identity_that_changes_with_its_files(tmp_path: Path) -> None:
    embedded = loading.identity("embedded://tiny-base", Model())
    assert embedded == digest(loading.EMBEDDED["embedded://tiny-base"])
    (tmp_path / "adfm.json").write_text(json.dumps({"base": {"name": "embedded://tiny-base", "revision": None}}))
    before = loading.identity(tmp_path, Model())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    assert len({embedded, before, loading.identity(tmp_path, Model())}) == 3


# ------------------------------------------------------------------------------------------------- registered versions


@pytest.fixture(scope="module")
def registered(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with versions of `parts`: whole, with changed files, without its digest, unsigned, of other files."""
    folder = tmp_path_factory.mktemp("registered")
    shutil.copy(empty_database, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("ADFM_KEYS", raising=False)
        store = tracking.client()
        store.create_registered_model("parts")
        for number in range(1, 6):
            model = folder / str(number) / "model"
            model.mkdir(parents=True)
            (model / "adfm.json").write_text(json.dumps({"version": number}))
            if number != 4:
                signing.sign(model.parent, signing.keys())
            tags = {"artifact_digest": digest(model)} if number != 3 else {}
            store.create_model_version("parts", model.parent.as_uri(), tags=tags)
        (folder / "2" / "model" / "adfm.json").write_text("{}")
        shutil.rmtree(folder / "5")
        shutil.copytree(folder / "1", folder / "5")
        store.set_registered_model_alias("parts", "production", "1")
    return folder


@pytest.fixture
def here(registered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(registered)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("ADFM_KEYS", raising=False)


@pytest.mark.parametrize("uri", ["models:/parts/1", "models:/parts@production"])
def test_a_registered_version_is_downloaded(uri: str, here: None, tmp_path: Path) -> None:
    folder, name = versions.fetch(uri, tmp_path)
    assert name == "models:/parts/1"
    assert Path(folder).is_relative_to(tmp_path)
    assert model_folder.describe(Path(folder)) == {"version": 1}
    assert stat.S_IMODE(Path(folder).parent.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("models:/parts/2", r"^models:/parts/2 is not what was signed: changed: model/adfm\.json\. "),
        ("models:/parts/3", "none was registered"),
        ("models:/parts/4", r"^models:/parts/4 has no model\.sig: .*Register the model again"),
        ("models:/parts/5", "the files of another version"),
        ("models:/parts/6", "no version 6 of a model parts"),
        ("models:/parts@previous", "No version of parts has the alias previous in MLflow; there are: production"),
        ("models:/other/1", "no version 1 of a model other"),
        ("models:/other@production", "no version for production of a model other"),
        ("models:/parts", "write models:/adfm/3"),
        ("models:/parts/Production", "write models:/adfm/3"),
        ("models:parts@production", "write models:/adfm/3"),
    ],
)
def test_a_version_that_is_not_there_or_not_whole_is_refused(uri: str, says: str, here: None, tmp_path: Path) -> None:
    with pytest.raises(AdfmError, match=says):
        versions.fetch(uri, tmp_path)


def test_without_a_server_the_error_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(AdfmError, match=r"127\.0\.0\.1:9"):
        versions.fetch("models:/parts/1", tmp_path)


@pytest.mark.parametrize("model", ["embedded://tiny-base", "owner/name", "/some/folder"])
def test_other_models_are_local_already(model: str, tmp_path: Path) -> None:
    assert versions.fetch(model, tmp_path) == (model, model)
