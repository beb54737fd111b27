"""`scripts/install_torch.py` with a real pip in a real environment, against package indexes on loopback."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pip
import pytest

ROOT = Path(__file__).parents[2]
LIBRARIES = ("nvidia-cublas", "cuda-toolkit", "triton")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or Path("/dev/nvidiactl").exists(), reason="tests what happens on Linux without a GPU"
)


def wheel(
    folder: Path, name: str, version: str, requires: tuple[str, ...] = (), files: dict[str, str] | None = None
) -> None:
    """Write a package of pure Python."""
    folder.mkdir(parents=True, exist_ok=True)
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {package}\n" for package in requires)
    content = {f"{module}/__init__.py": ""} | (files or {}) | {f"{info}/METADATA": metadata}
    content[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    content[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*content, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as archive:
        for file, text in content.items():
            archive.writestr(file, text)


def torch(folder: Path, version: str) -> None:
    cuda = None if version.endswith("+cpu") else "13.0"
    wheel(folder, "torch", version, () if cuda is None else LIBRARIES, {"torch/version.py": f"cuda = {cuda!r}\n"})


class Machine:
    """An environment with pip, and the indexes: `pypi` is pip's own, `cpu` stands for PyTorch's."""

    def __init__(self, folder: Path, address: str, requests: list[str]) -> None:
        self.folder, self.address, self.requests = folder, address, requests
        self.python = folder / "venv" / "bin" / "python"
        self.site = folder / "venv" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        self.index = "pypi"
        self.torch_index = f"{address}/cpu"
        self.driver = ""

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        programs = self.folder / "programs"
        programs.mkdir(exist_ok=True)
        (programs / "nvidia-smi").unlink(missing_ok=True)
        if self.driver:
            (programs / "nvidia-smi").write_text(f"#!/bin/sh\necho {self.driver}\n")
            (programs / "nvidia-smi").chmod(0o755)
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
        env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1", "PIP_INDEX_URL": f"{self.address}/{self.index}"}
        env |= {"TORCH_INDEX": self.torch_index, "PATH": f"{programs}:/usr/bin:/bin", "no_proxy": "127.0.0.1"}
        return subprocess.run([self.python, *command], capture_output=True, text=True, env=env, timeout=120)

    def install(self, *arguments: str, pins: str = "torch==2.13.0\n") -> str:
        """What `make setup` does: torch, then all of the file. Returns what the first said."""
        file = self.folder / "pins.txt"
        file.write_text(pins)
        script = self.run(ROOT / "scripts" / "install_torch.py", "--requirements", file, *arguments)
        assert script.returncode == 0, script.stderr
        rest = self.run("-m", "pip", "install", "--quiet", "--requirement", file)
        assert rest.returncode == 0, rest.stderr
        return script.stdout

    def installed(self) -> dict[str, str]:
        found = (folder.name.removesuffix(".dist-info").split("-") for folder in self.site.glob("[a-z]*.dist-info"))
        return {name.replace("_", "-"): version for name, version in found}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, list[str]]]:
    folder = tmp_path_factory.mktemp("machine")
    for index in ("pypi", "mirror"):
        for library in LIBRARIES:
            wheel(folder / index / library, library, "13.0")
        torch(folder / index / "torch", "2.13.0")
        torch(folder / index / "torch", "2.14.0")
        wheel(folder / index / "numpy", "numpy", "2.4.6")
    torch(folder / "mirror" / "torch", "2.13.0+cpu")
    for version in ("2.13.0+cpu", "2.14.0+cpu"):
        torch(folder / "cpu" / "torch", version)
    torch(folder / "other" / "torch", "2.14.0+cpu")
    venv.create(folder / "venv")
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            requests.append(self.path)

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    ) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{listener.server_address[1]}", requests
        listener.shutdown()


@pytest.fixture
def machine(server: tuple[Path, str, list[str]]) -> Machine:
    """A machine without a GPU, and with nothing installed yet."""
    machine = Machine(*server)
    shutil.rmtree(machine.site)
    machine.site.mkdir()
    (machine.site / "pip").symlink_to(Path(pip.__file__).parent)
    machine.requests.clear()
    return machine


def test_without_a_gpu_torch_is_pytorchs_build_for_cpus_and_all_else_pips(machine: Machine) -> None:
    said = machine.install(pins="numpy==2.4.6\ntorch==2.13.0\n")
    assert machine.installed() == {"numpy": "2.4.6", "torch": "2.13.0+cpu"}
    assert "for CPUs" in said and "2.5 GB" in said
    assert {path.split("/")[2] for path in machine.requests if path.startswith("/cpu/")} == {"torch"}
    machine.requests.clear()
    machine.install()
    assert not any(path.startswith("/cpu/") for path in machine.requests)  # nothing is left to do


def test_with_a_gpu_it_is_the_cuda_build_even_where_a_cpu_build_is_offered(machine: Machine) -> None:
    machine.driver, machine.index = "580.95.05", "mirror"
    said = machine.install()
    assert machine.installed() == {"torch": "2.13.0"} | dict.fromkeys(LIBRARIES, "13.0")
    assert "with CUDA" in said and "6.3 GB" in said and "too old" not in said


def test_a_gpu_appears_and_the_build_is_chosen_again(machine: Machine) -> None:
    machine.install()
    machine.driver = "570.12"
    assert "driver 570 is too old" in machine.install()
    assert machine.installed() == {"torch": "2.13.0"} | dict.fromkeys(LIBRARIES, "13.0")
    machine.driver = ""
    machine.install()  # the CUDA build computes on CPUs as well
    assert machine.installed()["torch"] == "2.13.0"
    machine.install("--torch", "cpu")
    assert machine.installed() == {"torch": "2.13.0+cpu"}  # and its gigabytes of libraries are gone


def test_the_index_of_pip_is_enough_if_it_has_the_cpu_build(machine: Machine) -> None:
    machine.index = "mirror"
    assert "from the index of pip" in machine.install()
    assert machine.installed() == {"torch": "2.13.0+cpu"}
    assert not any(path.startswith("/cpu/") for path in machine.requests)


@pytest.mark.parametrize("index", ["closed", "silent", "without this version"])
def test_without_pytorchs_index_pip_decides_and_the_size_is_said(machine: Machine, index: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, never answers
        port = silent.getsockname()[1]
        if index == "closed":
            silent.close()
        machine.torch_index = (
            f"http://127.0.0.1:{port}/cpu" if index != "without this version" else f"{machine.address}/other"
        )
        said = machine.install()  # within seconds: the timeout is for all of pip's tries
    assert re.search(r"cannot be reached or does not have torch 2\.13\.0\+cpu: .*6\.3 GB", said)
    assert machine.installed()["torch"] == "2.13.0"


def test_what_an_interrupted_pip_left_is_installed_again(machine: Machine) -> None:
    pins = "numpy==2.4.6\ntorch==2.13.0\n"
    machine.install(pins=pins)
    (machine.site / "numpy-2.4.6.dist-info" / "INSTALLER").unlink()
    (machine.site / "numpy" / "__init__.py").unlink()
    (machine.site / "~orch").mkdir()
    machine.install(pins=pins)
    assert (machine.site / "numpy" / "__init__.py").exists() and not (machine.site / "~orch").exists()


def test_vllm_needs_cuda(machine: Machine) -> None:
    file = machine.folder / "gpu.txt"
    file.write_text("torch==2.13.0\nvllm==0.30.0\n")
    script = machine.run(ROOT / "scripts" / "install_torch.py", "--requirements", file, "--torch", "cpu")
    assert script.returncode == 1 and "needs torch's CUDA build" in script.stderr and not machine.installed()
    script = machine.run(ROOT / "scripts" / "install_torch.py", "--requirements", file)
    assert script.returncode == 0 and machine.installed() == {"torch": "2.13.0"}
    assert "no NVIDIA GPU is found" in script.stdout
