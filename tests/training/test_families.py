"""Every family takes the same path as the embedded model, with random weights, coordinates and modules of its own."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adfm import preflight
from adfm.data import shards as shards_
from adfm.errors import AdfmError
from adfm.evaluation.evaluate import evaluate
from adfm.models import adapters, families, hardware, loading
from adfm.params import Lora, Params
from adfm.serving import predict as predict_
from adfm.training import examples, grpo
from adfm.training.sft import sft
from tests.models import random_models


@pytest.fixture(scope="module", params=list(families.FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the family, saved as a real one is."""
    return random_models.write(family, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def qwen2_5_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the one family that writes boxes in pixels."""
    return random_models.write("qwen2_5_vl", tmp_path_factory.mktemp("pixels"))


def changed(params: Params, name: Path, **sections: dict[str, Any]) -> Params:
    """`params` with another model, and with some settings of some sections."""
    settings = params.model_dump(by_alias=True)
    settings["model"]["name"] = str(name)
    for section, values in sections.items():
        settings[section] |= values
    return Params.model_validate(settings)


def test_the_whole_path(
    folder: Path, family: str, small_shards: Path, tmp_path: Path, params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    # Two images and four backward passes a step: what the family's processor makes of an image is cut among them.
    step = {"steps": 2, "micro_batch": 2, "gradient_checkpointing": True, "pictures_every": 0}
    own = changed(params, folder, train=step, evaluate={"bootstrap": 50, "max_new_tokens": 8})
    preflight.check(own)
    sft(small_shards, tmp_path / "sft", own)
    grpo.train(small_shards, tmp_path / "sft", tmp_path / "trained", own)
    assert json.loads((tmp_path / "trained" / "adfm.json").read_text())["family"] == family
    losses = (tmp_path / "trained" / "reward_curves.csv").read_text().splitlines()
    assert len(losses) > 2 and "nan" not in "".join(losses[1:])
    evaluate({"base": str(folder), "trained": tmp_path / "trained"}, small_shards, tmp_path / "evaluation", own)
    assert json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["trained"]["images"] > 0
    image = tmp_path / "image.png"
    examples_of(small_shards)[0].convert("RGB").save(image)
    capsys.readouterr()
    predict_.predict([image], str(tmp_path / "trained"), own, as_json=True)
    assert len(capsys.readouterr().out.splitlines()) == 1


def examples_of(shards: Path) -> list[Any]:
    """The images of the test split."""
    return [Image.open(io.BytesIO(record.image)) for record in shards_.read(shards, "test")]


def test_the_prompt_shows_the_image_once_and_asks_for_the_units_of_the_frame(folder: Path, family: str) -> None:
    processor = loading.load_processor(str(folder), Params().model)
    text = loading.chat_text(processor, loading.prompt_of(str(folder), family))
    assert text.count(processor.image_token) == 1
    frame = families.get(family).frame(processor, 128, 64)
    if frame.width == frame.height == 1000:
        assert "0 to 1000" in text
    else:
        assert "in pixels of the image" in text and frame.width == 2 * frame.height


def test_a_frozen_tower_has_no_adapter_and_what_remains_is_counted(folder: Path, family: str) -> None:
    for vision in (True, False):
        lora = Lora(vision=vision)
        network = loading.load(str(folder), Params().model).model
        count = adapters.weights(network, lora)
        adapted = adapters.attach(network, lora)
        trained = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
        assert any(families.get(family).is_vision(name) for name in trained) == vision
        assert sum(weight.numel() for weight in trained.values()) == count


def test_memory_is_computed_from_what_an_image_costs_the_model(folder: Path, family: str) -> None:
    network = hardware.meta_model(folder)
    small, large = (
        hardware.memory(network, Params.model_validate({"model": {"max_pixels": side**2}})) for side in (96, 960)
    )
    assert small["weights"] == large["weights"] and small["training"] < large["training"]
    processor = loading.load_processor(str(folder), Params().model)
    width, height = families.get(family).images.resized(processor.image_processor, 96, 96)
    blank = Image.new("RGB", (96, 96))
    tokens = processor(text=[processor.image_token], images=[blank], return_tensors="pt")["input_ids"]
    cost = families.get(family).images.cost(network.config, width * height)
    assert cost.tokens == int((tokens == processor.image_token_id).sum())


def test_placeholders_of_images_are_never_generated(folder: Path) -> None:
    processor = loading.load_processor(str(folder), Params().model)
    numbers = families.placeholders(processor)
    texts = processor.tokenizer.convert_ids_to_tokens(numbers)
    assert processor.image_token in texts and processor.video_token in texts
    assert None not in texts and processor.tokenizer.eos_token not in texts


def test_images_are_limited_and_other_engines_get_them_in_the_size_that_the_model_sees(
    folder: Path, family: str, small_shards: Path, tmp_path: Path
) -> None:
    limit = (64 if family == "adfm_embedded" else random_models.TILE) ** 2
    settings = Params.model_validate({"model": {"name": str(folder), "max_pixels": limit}}).model
    loaded = loading.load(str(folder), settings)
    data = examples.draw(small_shards, loaded, 4, anomalous_share=0.5, seed=0, cache=tmp_path)
    seen = [row["image"].size for row in examples.as_seen(data, loaded)]
    assert all(width * height <= limit for width, height in seen)
    cut = families.get(family).images
    images = loaded.processor.image_processor
    assert [cut.resized(images, *size) for size in seen] == seen  # a second processor changes nothing


def test_a_folder_without_weights_of_the_tower_is_refused(folder: Path, family: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    for number, module in enumerate(families.get(family).vision):
        blind = shutil.copytree(folder, tmp_path / str(number))
        kept = {name: weight for name, weight in weights.items() if module not in name.split(".")}
        assert len(kept) < len(weights)
        save_file(kept, blind / "model.safetensors", {"format": "pt"})
        with pytest.raises(AdfmError, match=rf"no weights of a vision tower \(no {module}\)"):
            preflight.check(Params.model_validate({"model": {"name": str(blind)}}))


HUB = {
    "qwen2_5_vl": {"model.visual.": "visual.", "model.language_model.": "model."},
    "internvl": {
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    },
}
"""How folders of the hub, written by earlier transformers, begin the names of weights."""


def test_names_of_weights_as_the_hub_has_them_are_known(folder: Path, family: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        for own, hub in HUB.get(family, {}).items():
            name = name.replace(own, hub) if name.startswith(own) else name
        weights[name] = weight
    hub = shutil.copytree(folder, tmp_path / "hub")
    save_file(weights, hub / "model.safetensors", {"format": "pt"})
    expected = loading.load(str(folder), Params().model).model.state_dict()
    loaded = loading.load(str(hub), Params().model).model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all((loaded[name] == expected[name]).all() for name in expected)


def test_the_processor_of_a_folder_that_an_earlier_transformers_wrote_is_read(family: str, tmp_path: Path) -> None:
    """Today's puts the image processor's settings into `processor_config.json`; torchvision's class is named there."""
    folder = random_models.write(family, tmp_path / "folder")
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text())
    images = settings.pop("image_processor")
    images["image_processor_type"] += "Fast"
    file.write_text(json.dumps(settings))
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    videos = {**images, "video_processor_type": "AnyVideoProcessor"}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(videos))
    processor = loading.load_processor(str(folder), Params().model)
    images = random_models.BUILDERS[family]()[1].image_processor
    assert processor.image_processor.to_dict() == images.to_dict()


def test_the_processor_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["image_token_id"] += 1
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdfmError, match="number of the image token"):
        loading.load_processor(str(other), Params().model)


def test_a_chat_template_that_hides_the_image_or_changes_the_answer_is_refused(
    qwen2_5_vl: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(qwen2_5_vl, tmp_path / "other")
    own = (other / "chat_template.jinja").read_text()
    thinking = own.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
    assert thinking != own
    for template, says in (
        ("{% for m in messages %}{{ m.content[-1].text }}{% endfor %}", "<|image_pad|> 0 times, not once"),
        (thinking, "does not write an answer as it stands"),
        ("{{ nothing.at.all }}", "cannot be used"),
    ):
        (other / "chat_template.jinja").write_text(template)
        with pytest.raises(AdfmError) as error:
            loading.load_processor(str(other), Params().model)
        assert says in str(error.value)


def test_an_unknown_architecture_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "internvl_chat"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(AdfmError) as error:
        preflight.check(Params.model_validate({"model": {"name": str(tmp_path)}}))
    for what in ("'internvl_chat'", *families.FAMILIES, "that end in -HF", "adfm/models/families/__init__.py"):
        assert what in str(error.value)


def test_settings_of_a_real_run_take_the_same_path(
    qwen2_5_vl: Path, small_shards: Path, tmp_path: Path, params: Params
) -> None:
    from safetensors import safe_open

    own = changed(
        params,
        qwen2_5_vl,
        model={"attention": "eager", "dtype": "bfloat16"},
        lora={"vision": False},
        train={"steps": 1, "gradient_checkpointing": True, "micro_batch": 4},
    )
    sft(small_shards, tmp_path / "sft", own)
    grpo.train(small_shards, tmp_path / "sft", tmp_path / "trained", own)
    with safe_open(tmp_path / "trained" / "adapter_model.safetensors", framework="np") as weights:
        names = list(weights.keys())
    assert names and not any("visual" in name for name in names)
    assert loading.load(tmp_path / "trained", own.model).model.config._attn_implementation == "eager"


def test_an_adapter_on_nothing_is_refused(qwen2_5_vl: Path, small_shards: Path, tmp_path: Path) -> None:
    for targets in (["q_proj", "no_proj"], "no_such_.*"):
        own = Params.model_validate({"model": {"name": str(qwen2_5_vl)}, "lora": {"target_modules": targets}})
        with pytest.raises(AdfmError, match=r"lora\.target_modules: 'no_\S+' matches no module"):
            sft(small_shards, tmp_path / "sft", own)


def test_boxes_are_pixels_of_the_resized_image(qwen2_5_vl: Path, small_shards: Path, tmp_path: Path) -> None:
    loaded = loading.load(str(qwen2_5_vl), Params().model)
    data = examples.draw(small_shards, loaded, 4, anomalous_share=0.5, seed=0, cache=tmp_path)
    assert [row["frame"] for row in data] == [[random_models.SIDE, random_models.SIDE]] * 4
    assert [list(row["image"].size) for row in examples.as_seen(data, loaded)] == data["frame"][:]
    assert "pixels" in data[0]["prompt"][1]["content"]
