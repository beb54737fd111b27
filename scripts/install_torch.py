"""Install the build of torch that fits this machine, before pip installs everything else that a file of pins lists.

    python scripts/install_torch.py [--torch auto|cpu|cuda] [--requirements requirements-gpu.txt]

On Linux plain pip takes torch's CUDA build: gigabytes that only an NVIDIA GPU needs. `auto` takes it where there is
such a GPU, or where the file lists vLLM; elsewhere `auto` takes PyTorch's build for CPUs. Its version, "2.13.0+cpu",
satisfies the pin "2.13.0" as that of the CUDA build does, so pip keeps whichever is installed. It comes from pip's own
index if that has it, else from PyTorch's (`TORCH_INDEX`). If neither has it or answers within seconds, pip's own index
decides, and the size is printed first.

Standard library only, and run with the Python of the environment that torch goes to: `make setup`, Containerfile.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

INDEX = "https://download.pytorch.org/whl/cpu"
DRIVER = 580  # the oldest major version of NVIDIA's driver that runs CUDA 13, which torch 2.13 is built with

# All of requirements.txt, Python 3.11, measured; of requirements-gpu.txt computed from the sizes of the packages.
CPU = "2.5 GB on disk, 0.6 GB to download"
CUDA = "6.3 GB on disk, 3.1 GB to download"
GPU = "with vLLM, about 9.5 GB on disk, 4.2 GB to download"


def main() -> None:
    """Parse the command line, and install torch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--torch", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--requirements", type=Path, default=Path("requirements.txt"))
    options = parser.parse_args()
    pins = options.requirements.read_text()
    pinned = re.search(r"^torch==(\S+)$", pins, re.MULTILINE)
    if not pinned:
        sys.exit(f"{options.requirements} does not pin torch")
    needs_cuda = re.search(r"^vllm==", pins, re.MULTILINE) is not None
    if needs_cuda and options.torch == "cpu":
        sys.exit(f"{options.requirements} needs torch's CUDA build: leave TORCH=cpu away, or take requirements.txt")
    remove_interrupted(Path(sysconfig.get_path("purelib")))
    if sys.platform != "linux":
        if options.torch == "cuda" or needs_cuda:
            sys.exit("torch has a CUDA build for Linux only here; leave TORCH=cuda and requirements-gpu.txt away")
        return  # plain pip takes a CPU build
    driver = gpu_driver()
    if options.torch == "cuda" or needs_cuda or (options.torch == "auto" and driver is not None):
        if driver is None:
            print("no NVIDIA GPU is found here; torch's CUDA build is installed because it was asked for")
        elif driver and driver < DRIVER:
            print(
                f"NVIDIA's driver {driver} is too old for torch's CUDA build: update it to {DRIVER}, or set TORCH=cpu"
            )
        install_cuda(pinned[1], GPU if needs_cuda else CUDA)
    else:
        install_cpu(pinned[1], replace=options.torch == "cpu")


def gpu_driver() -> int | None:
    """The major version of NVIDIA's driver; 0 if there is a GPU whose driver does not say it, None without a GPU."""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except subprocess.TimeoutExpired:  # a driver in trouble
            return 0
        version = re.match(r"\d+", run.stdout)
        if run.returncode == 0 and version:
            return int(version[0])
    # /proc/driver/nvidia is there in containers that were given no GPU as well.
    return 0 if Path("/dev/nvidiactl").exists() else None


def install_cuda(version: str, size: str) -> None:
    """Install the CUDA build from pip's own index, which is the one that PyPI has."""
    print(f"torch {version} with CUDA: {size} in all", flush=True)
    if installed_build(version) != "cuda":
        # Three equals signs: "2.13.0+cpu" does not satisfy them.
        pip("install", "--no-deps", f"torch==={version}")


def install_cpu(version: str, replace: bool) -> None:
    """Install the CPU build; a CUDA build that is installed, which computes on CPUs as well, only goes if `replace`."""
    found = installed_build(version)
    if found == "cpu" or (found == "cuda" and not replace):
        return
    index = os.environ.get("TORCH_INDEX") or INDEX
    build = f"{version}+cpu"
    if build in offered():
        source = []
    elif build in offered("--index-url", index, "--retries", "0", "--timeout", "5"):
        source = ["--index-url", index]
    else:
        print(f"{index} cannot be reached or does not have torch {build}: pip's own index decides.", end=" ")
        print(f"PyPI has the CUDA build: {CUDA} in all", flush=True)
        return
    print(f"torch {version} for CPUs, from {source[-1] if source else 'the index of pip'}: {CPU} in all", flush=True)
    # Without dependencies: these come from pip's own index, and no other index is asked for them.
    pip("install", "--no-deps", *source, f"torch=={build}")
    if found == "cuda":
        names = {item.name for item in importlib.metadata.distributions()}
        pip("uninstall", "--yes", *sorted(name for name in names if re.match(r"(nvidia|cuda)-|triton$", name)))


def installed_build(version: str) -> str | None:
    """Which build of torch of this version is installed, `cpu` or `cuda`, if one is."""
    file = Path(sysconfig.get_path("purelib")) / "torch" / "version.py"
    try:
        if importlib.metadata.version("torch").partition("+")[0] != version:
            return None
        return "cuda" if runpy.run_path(str(file))["cuda"] else "cpu"
    except (importlib.metadata.PackageNotFoundError, OSError, KeyError):
        return None


def offered(*options: str) -> list[str]:
    """The versions of torch that pip finds for this Python, with its own configuration and `options`."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    command += ["index", "versions", "torch", *options]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return []
    line = re.search(r"^Available versions: (.*)$", run.stdout, re.MULTILINE)
    return line[1].split(", ") if line else []


def remove_interrupted(packages: Path) -> None:
    """Remove what an interrupted pip left: it takes a package for installed before all its files are there."""
    for folder in [*packages.glob("*.dist-info"), *packages.glob("~*")]:
        # pip writes INSTALLER when all files of a package are in place.
        if folder.is_dir() and (folder.name.startswith("~") or not (folder / "INSTALLER").exists()):
            shutil.rmtree(folder)


def pip(*arguments: str) -> None:
    """Run pip of this environment; end with its status if it fails."""
    run = subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments])
    if run.returncode:
        sys.exit(run.returncode)


if __name__ == "__main__":
    main()
