"""Settings of a vLLM engine: lengths, versions, and a server, here a local HTTP server of Python's own."""

from __future__ import annotations

import functools
import itertools
import json
import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from trl.data_utils import prepare_multimodal_messages

from adfm.errors import AdfmError
from adfm.models import families, loading, vllm_engine
from adfm.models.families import patches
from adfm.params import Model

BASE = "embedded://tiny-base"


@functools.cache
def processor(max_pixels: int | None = None) -> Any:
    return loading.load_processor(BASE, Model(max_pixels=max_pixels))


@given(
    sides=st.tuples(st.integers(1, 5000), st.integers(1, 5000)).filter(lambda s: max(s) <= 200 * min(s)),
    unit=st.sampled_from([(14, 2), (16, 2), (12, 2)]),
    high=st.integers(3000, 2_000_000),
    low=st.integers(1, 300_000),
)
def test_no_image_becomes_more_tokens(sides: tuple[int, int], unit: tuple[int, int], high: int, low: int) -> None:
    patch, merge = unit
    size = {"shortest_edge": min(low, high), "longest_edge": high}
    images: Any = type("Images", (), {"patch_size": patch, "merge_size": merge, "size": size})
    bound = vllm_engine.image_tokens(type("Processor", (), {"image_processor": images}))
    height, width = smart_resize(*sides, factor=patch * merge, min_pixels=size["shortest_edge"], max_pixels=high)
    assert height * width // (patch * merge) ** 2 <= bound


def test_the_length_holds_what_trl_makes_of_a_prompt_and_not_much_more() -> None:
    messages = loading.prompt_of(BASE, "qwen3_vl")
    for pixels in (None, 4608):
        own = processor(pixels)
        text = vllm_engine.model_length(own, messages, 0) - vllm_engine.image_tokens(own)
        longest = vllm_engine.model_length(own, messages, 100)
        for size in ((96, 96), (300, 40), (20, 20)):
            chat = prepare_multimodal_messages(messages, images=[Image.new("RGB", size)])
            encoded = own.apply_chat_template([chat], tokenize=True, return_dict=True, add_generation_prompt=True)
            ids = encoded["input_ids"][0]
            assert len(ids) + 100 <= longest
            assert len(ids) - ids.count(own.image_token_id) == text


def test_with_the_limits_of_the_real_models_the_bound_is_that_of_a_square_image() -> None:
    for patch, low, high, tokens in ((14, 3136, 262144, 334), (14, 3136, 12845056, 16384), (16, 65536, 262144, 256)):
        images: Any = type("Images", (), {})
        images.patch_size, images.merge_size = patch, 2
        images.size = {"shortest_edge": low, "longest_edge": high}
        assert vllm_engine.image_tokens(type("Processor", (), {"image_processor": images})) == tokens


def test_a_family_whose_images_are_cut_otherwise_is_refused() -> None:
    other: Any = type("OtherProcessor", (), {"image_processor": object()})()
    with pytest.raises(AdfmError, match="not supported with OtherProcessor"):
        vllm_engine.image_tokens(other)


def test_only_families_that_cut_images_into_patches_are_supported() -> None:
    assert [name for name, family in families.FAMILIES.items() if family.vllm and family.images is not patches] == []


@pytest.mark.parametrize(
    ("installed", "fits"), [("0.30.0", True), ("0.30.1+cu130", True), ("0.22.0", False), ("0.33.0", False)]
)
def test_a_version_that_does_not_fit_is_refused_with_the_one_that_does(
    installed: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine.importlib.metadata, "version", lambda name: installed)
    problems = vllm_engine.wrong_version()
    assert (problems == []) is fits
    assert fits or (f"vllm {installed} is installed" in problems[0] and "installs vllm==0.30.0" in problems[0])


def test_no_vllm_is_no_wrong_version() -> None:
    assert vllm_engine.wrong_version() == []


# ------------------------------------------------------------------------------------------------- a server


class Server(BaseHTTPRequestHandler):
    """Replies as vLLM's server does on `/health` and `/server_info`."""

    config: Any = None

    def do_GET(self) -> None:
        known = self.path == "/health" or (self.path == "/server_info?config_format=json" and self.config)
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(json.dumps({"vllm_config": self.config}).encode() if known else b"")

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_server_that_fits_is_taken_and_any_other_told_what_it_lacks(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def problems(transfer: Any, logprobs: str, longest: int) -> list[str]:
        model = {"max_model_len": longest, "logprobs_mode": logprobs}
        monkeypatch.setattr(Server, "config", {"weight_transfer_config": transfer, "model_config": model})
        return vllm_engine.server_problems(url, 900)

    assert problems({"backend": "nccl"}, "processed_logprobs", 900) == []
    (problem,) = problems({"backend": "nccl"}, "processed_logprobs", 899)
    assert "--max-model-len 900" in problem
    lacks = "; ".join(problems(None, "raw_logprobs", 1000))
    assert "--weight-transfer-config" in lacks and "must be processed_logprobs" in lacks
    monkeypatch.setattr(Server, "config", None)
    (problem,) = vllm_engine.server_problems(url, 900)
    assert "VLLM_SERVER_DEV_MODE=1" in problem


def test_no_server_is_said(url: str) -> None:
    (problem,) = vllm_engine.server_problems("http://127.0.0.1:9", 900)
    assert "does not reply" in problem
    (problem,) = vllm_engine.server_problems("gpu0:8000", 900)
    assert "write it as http://host:8000" in problem


def test_the_command_of_a_server_says_what_the_engine_in_the_process_is_told() -> None:
    command = vllm_engine.server_command(Path("/models/a b"), processor(), "bfloat16", 900, "http://gpu0:8001")
    environment, words = shlex.split(command)[:2], shlex.split(command)[2:]
    assert environment == ["CUDA_VISIBLE_DEVICES=0", "VLLM_SERVER_DEV_MODE=1"]
    assert words[:5] == ["vllm", "serve", "/models/a b", "--port", "8001"]
    given_ = dict(itertools.pairwise(words))
    for name, value in vllm_engine.options(processor(), "bfloat16").items():
        argument = given_["--" + name.replace("_", "-")]
        assert argument == value or json.loads(argument) == value
    assert given_["--max-model-len"] == "900" and "--enable-scale-out" in words
