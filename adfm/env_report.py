"""Facts about this installation for a bug report (`adfm env`). Contacts no server, prints no secret."""

import os
import platform
import re
import shutil
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from adfm import __version__, signing, tracking
from adfm.errors import AdfmError
from adfm.process import cpus, environment

LIBRARIES = ("torch", "transformers", "trl", "peft", "vllm", "mlflow", "kfp", "dvc")

# Variables whose value is printed. Addresses are printed without login; any other may hold a secret, or be one.
_NOT_SECRET = (
    *("ADFM_CA_BUNDLE", "ADFM_CPU_IMAGE", "ADFM_GIT_COMMIT", "ADFM_GPU_IMAGE", "ADFM_KEYS"),
    *("ADFM_SERVE_LOG", "ADFM_SHADOW"),
)


def collect() -> dict[str, dict[str, Any]]:
    """Collect versions, machine, paths and environment variables, without secrets."""
    variables = {name: _masked(name, value) for name, value in sorted(os.environ.items()) if name.startswith("ADFM_")}
    try:
        environment.set_environment()  # MLflow's address may come from ADFM_MLFLOW_TRACKING_URI
    except AdfmError as error:
        variables["problem"] = str(error)
    return {
        "versions": {"adfm": __version__, "Python": platform.python_version(), **_libraries()},
        "machine": {
            "system": _system(),
            "CPUs": f"{cpus.count()} of {cpus.of_machine()} for this process",
            "memory": _memory(),
            **_gpus(),
        },
        "paths": {
            "Python": sys.executable,
            "adfm": str(Path(__file__).parent),
            "working folder": _folder(),
            "settings": "params.yaml" if Path("params.yaml").is_file() else "the defaults: no params.yaml here",
            "MLflow": _address(tracking.address()),
            "keys": _keys(),
        },
        "environment variables": variables,
    }


def text(report: dict[str, dict[str, Any]]) -> str:
    """Format a report as lines for people."""
    width = max(len(name) for section in report.values() for name in section)
    lines = []
    for title, section in report.items():
        lines += [title, *(f"  {name:<{width}}  {value}" for name, value in (section or {"none": ""}).items())]
    return "\n".join(line.rstrip() for line in lines)


def _folder() -> str:
    code = tracking.code_version()
    changed = ", changed since" if code.get("git_dirty") == "true" else ""
    return str(Path.cwd()) + (f" (Git {code['git_commit'][:12]}{changed})" if code else "")


def _libraries() -> dict[str, str]:
    versions = dict.fromkeys(LIBRARIES, "not installed")
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _system() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):  # not Linux
        name = platform.mac_ver()[0]
    return ", ".join(filter(None, (f"{platform.system()} {platform.release()} {platform.machine()}", name)))


def _memory() -> str:
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    # Version 2 and version 1 of cgroups; in a container the root is the container's own.
    files = map(Path, ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"))
    texts = [file.read_text().strip() for file in files if file.is_file()]
    limit = min((int(text) / 2**30 for text in texts if text != "max"), default=size)
    return f"{size:.1f} GiB" + (f", {limit:.1f} GiB for this container" if limit < size else "")


def _gpus() -> dict[str, str]:
    # torch takes seconds to import, so it is used only where a driver is installed; /dev/kfd is that of AMD's ROCm.
    if not (Path("/proc/driver/nvidia/version").exists() or Path("/dev/kfd").exists() or shutil.which("nvidia-smi")):
        return {"GPUs": "none: no driver of NVIDIA or AMD"}
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"GPUs": f"unknown: torch cannot be imported ({error})"}
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA: torch's build for CPUs"
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = [f"{each.name} ({each.total_memory / 2**30:.0f} GiB)" for each in properties]
    return {"GPUs": ", ".join(names) or "a driver, but none that torch can use", "torch's build": build}


def _keys() -> str:
    folder = signing.key_folder()
    private = "with a private key" if (folder / signing.PRIVATE).is_file() else "without a private key"
    return f"{folder} ({private if folder.is_dir() else 'not there yet'})"


def _address(uri: str) -> str:
    # A query may hold a login too.
    address = re.sub(r"(://[^?#]*)[?#].*", r"\1", environment.without_login(uri))
    return "(set)" if "@" in address else address  # a login in what is not a proper address


def _masked(name: str, value: str) -> str:
    if not value:
        return "(empty)"
    if name.endswith(("_URI", "_UI")):
        return _address(value)
    return value if name in _NOT_SECRET else "(set)"
