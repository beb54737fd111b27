"""What this process may use, against a tree of files as the kernel's cgroups are, and a real affinity."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adfm
from adfm.process import cpus

NODE = 64


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of the cgroups of a node with 64 cores on which nothing is limited; `own` beside it says which count."""
    monkeypatch.setattr(cpus, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cpus, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "cpu_count", lambda: NODE)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(NODE)))
    _write(tmp_path / "own", "0::/\n")
    return tmp_path / "cgroup"


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_without_a_limit_it_is_the_machine(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpus.count() == NODE  # the root of version 2 has no cpu.max
    _write(kernel / "cpu.max", "max 100000\n")
    assert cpus.count() == NODE
    monkeypatch.setattr(cpus, "_OWN_CGROUPS", kernel / "none")  # not Linux
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cpus.count() == NODE
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cpus.count() == 1


@pytest.mark.parametrize(
    ("limit", "count"), [("400000 100000", 4), ("250000 100000", 3), ("50000 100000", 1), ("9900000 100000", NODE)]
)
def test_the_limit_of_a_container_in_version_2(kernel: Path, limit: str, count: int) -> None:
    _write(kernel / "cpu.max", f"{limit}\n")
    assert cpus.count() == count


def test_the_limit_of_a_container_in_version_1(kernel: Path) -> None:
    # The container sees its own cgroup as the root, and its path on the node.
    own = "11:cpu,cpuacct:/kubepods/burstable/pod7/c3\n4:memory:/kubepods/burstable/pod7/c3\n0::/\n"
    _write(kernel.parent / "own", own)
    _write(kernel / "cpu/cpu.cfs_period_us", "100000\n")
    _write(kernel / "cpu/cpu.cfs_quota_us", "-1\n")
    assert cpus.count() == NODE
    _write(kernel / "cpu/cpu.cfs_quota_us", "400000\n")
    assert cpus.count() == 4


def test_the_narrowest_of_nested_cgroups_counts(kernel: Path) -> None:
    """As of a systemd service (CPUQuota=) in a slice that has a limit too."""
    _write(kernel.parent / "own", "0::/user.slice/adfm.service\n")
    _write(kernel / "user.slice/adfm.service/cpu.max", "800000 100000\n")
    assert cpus.count() == 8
    _write(kernel / "user.slice/cpu.max", "600000 100000\n")
    assert cpus.count() == 6


@pytest.mark.parametrize("text", ["", "many\n", "100000\n", "100000 0\n"])
def test_a_file_that_is_not_as_documented_limits_nothing(kernel: Path, text: str) -> None:
    _write(kernel / "cpu.max", text)
    assert cpus.count() == NODE


def test_affinity_counts_beside_the_limit(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(kernel / "cpu.max", "400000 100000\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7, 9})
    assert cpus.count() == 2
    assert (cpus.share(1), cpus.share(2), cpus.share(3)) == (2, 1, 1)


@pytest.mark.parametrize(("given", "threads"), [("", 4), ("8", 4), ("3", 3), ("1,2", 1), ("odd", 4)])
def test_processes_side_by_side_share_the_cpus(
    given: str, threads: int, kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(kernel / "cpu.max", "800000 100000\n")
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert cpus.threads(2) == threads


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="NOT TESTED: this system has no affinity")
def test_a_real_affinity() -> None:
    assert _run("import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})", "cpus.count()") == "1"


_LIMITED = """
import pathlib, tempfile
folder = pathlib.Path(tempfile.mkdtemp())
(folder / "cpu.max").write_text("100000 100000")
(folder / "own").write_text("0::/")
cpus._CGROUPS, cpus._OWN_CGROUPS = folder, folder / "own"
os.cpu_count, os.sched_getaffinity = lambda: 64, lambda _: set(range(64))
"""
_IMPORTS = """
from adfm.process.environment import set_environment
set_environment()
import numpy, pyarrow, threadpoolctl, torch
"""
_OF_NUMPY = "{pool['num_threads'] for pool in threadpoolctl.threadpool_info()}"


def test_every_library_takes_the_limit() -> None:
    """A machine of one core, where this could not fail, hardly runs tests."""
    expression = f"torch.get_num_threads(), pyarrow.cpu_count(), {_OF_NUMPY}"
    assert _run(_LIMITED + _IMPORTS, f"[{expression}]") == "[1, 1, {1}]"


def test_what_the_user_has_set_is_kept() -> None:
    assert _run(_LIMITED + "cpus.limit_threads()", "os.environ['OMP_NUM_THREADS']", threads="2") == "2"


def test_nothing_is_set_where_nothing_is_limited(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cpus.limit_threads()
    assert "OMP_NUM_THREADS" not in os.environ


def test_it_comes_before_the_imports_that_count() -> None:
    code = "from adfm.process import environment; environment.set_environment()"
    assert _run(code, "{'numpy', 'pyarrow', 'torch'} & set(sys.modules)") == "set()"


def test_one_thread_also_gives_back_the_others_after_an_error() -> None:
    with cpus.one_thread():
        torch.set_num_threads(3)
        with pytest.raises(ZeroDivisionError), cpus.one_thread():
            within = torch.get_num_threads()
            raise ZeroDivisionError
        assert (within, torch.get_num_threads()) == (1, 3)


def _run(code: str, expression: str, threads: str | None = None) -> str:
    """The value of an expression in a process of its own, in which OMP_NUM_THREADS is what `threads` says."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    environment |= {"OMP_NUM_THREADS": threads} if threads else {}
    lines = ["import os, sys", "from adfm.process import cpus", code, f"print({expression})"]
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return done.stdout.strip()


def test_nobody_else_counts_the_cores() -> None:
    """A pool without a size takes `os.cpu_count()` as well, as do SciPy and scikit-learn that are given -1."""
    others = []
    for file in sorted(Path(adfm.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            counts = isinstance(node, ast.Attribute | ast.Name) and _name(node) in ("cpu_count", "get_num_threads")
            pool = isinstance(node, ast.Call) and _name(node.func).endswith("PoolExecutor") and not node.args
            all_cores = isinstance(node, ast.keyword) and node.arg in ("workers", "n_jobs")
            all_cores = all_cores and ast.unparse(node.value) == "-1"  # type: ignore[attr-defined]
            if (counts or pool or all_cores) and file.name != "cpus.py":
                others.append(f"{file}:{node.lineno}")  # type: ignore[attr-defined]
    assert not others


def _name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
