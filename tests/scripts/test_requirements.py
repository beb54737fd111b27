"""The two files of pins: complete, in keeping with pyproject.toml and with each other."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[^ ;@]+", line) for line in lines)
    return dict(line.split("==") for line in lines)


@pytest.mark.parametrize(("file", "extras"), [("requirements.txt", ["dev"]), ("requirements-gpu.txt", ["dev", "gpu"])])
def test_pins_are_what_the_project_asks_for(file: str, extras: list[str]) -> None:
    pinned = pins(file)
    for text in sum((PROJECT["optional-dependencies"][extra] for extra in extras), PROJECT["dependencies"]):
        wanted = Requirement(text)
        version = pinned[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(version, prereleases=True), f"{file} has {version}; pyproject.toml: {text}"


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
