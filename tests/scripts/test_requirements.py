"""The two files of pins: complete, in keeping with pyproject.toml and with each other."""

from __future__ import annotations

import re
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.packages import PROJECT, closure, requirements

ROOT = Path(__file__).parents[2]


# Torch's build for CPUs has none of these; with its CUDA build, they are installed and not pinned.
CUDA = re.compile(r"(cuda|nvidia)-|triton$")


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[^ ;@]+", line) for line in lines)
    return dict(line.split("==") for line in lines)


@pytest.mark.parametrize(
    ("file", "extras"), [("requirements.txt", ["all", "dev"]), ("requirements-gpu.txt", ["all", "dev", "gpu"])]
)
def test_pins_are_what_the_project_asks_for(file: str, extras: list[str]) -> None:
    pinned = pins(file)
    for text in requirements(*extras):
        wanted = Requirement(text)
        version = pinned[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(version, prereleases=True), f"{file} has {version}; pyproject.toml: {text}"


def test_all_is_every_extra_but_those_for_a_gpu_and_for_development() -> None:
    others = PROJECT["optional-dependencies"].keys() - {"all", "dev", "gpu"}
    assert set(requirements("all")) == set(requirements(*others))


def test_the_core_and_the_extras_together_are_what_is_pinned() -> None:
    needed = closure(requirements("all", "dev"))
    pinned = pins("requirements.txt").keys()
    installed = {canonicalize_name(each.name) for each in distributions()}
    assert (pinned - needed) & installed == set()  # what others need is in their metadata, if they are installed
    assert {name for name in needed - pinned if not CUDA.match(name)} == set()


def test_the_files_differ_in_what_vllm_caps_alone() -> None:
    cpu, gpu = pins("requirements.txt"), pins("requirements-gpu.txt")
    assert {name for name, version in cpu.items() if gpu.get(name) != version} == {"fastapi", "numpy", "setuptools"}


def test_without_a_gpu_nothing_of_cuda_or_torchvision_is_pinned() -> None:
    assert not [name for name in pins("requirements.txt") if re.match("nvidia|cuda|triton|torchvision|vllm", name)]


def test_docs_and_code_name_the_version_of_vllm_that_is_pinned() -> None:
    version = pins("requirements-gpu.txt")["vllm"]
    for file in ("README.md", "docs/training.md", "docs/kubernetes.md"):
        named = re.findall(r"vllm(?:==| )(\d+\.\d+(?:\.\d+)?)", (ROOT / file).read_text(), re.IGNORECASE)
        assert set(named) <= {version}, file
