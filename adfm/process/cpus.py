"""Number of CPUs and threads that this process may use: in a pod its limit, not the cores of the node."""

# `os.cpu_count()` and PyTorch's own default ignore a cgroup's limit: on a node of 64 cores, a pod limited to 4 would
# decode 64 images at a time and be throttled. joblib.cpu_count() follows nearly the same rules, but imports NumPy: that
# starts its threads at that moment, and `limit_threads` has to come before.

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def count() -> int:
    """Return the CPUs that this process may use, at least 1: by machine, affinity and limits of its cgroups."""
    # Kubernetes sets a cgroup's limit where a container has a CPU limit; a request alone sets none.
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cpus = len(affinity(0)) if affinity else of_machine()
    return max(1, min([of_machine(), cpus, *map(math.ceil, _limits())]))  # of 2.5 CPUs, 3 threads are busy


def share(processes: int) -> int:
    """Return the CPUs for each of `processes` processes that run at the same time, at least 1."""
    return max(1, count() // processes)


def threads(processes: int) -> int:
    """Return the threads for each of `processes` processes that run at the same time, at most `OMP_NUM_THREADS`."""
    given = re.match(r"[1-9]\d*", os.environ.get("OMP_NUM_THREADS", ""))  # of "4,2" the first, as OpenMP does
    return min(int(given[0]) if given else count(), share(processes))


def limit_threads() -> None:
    """Limit the threads of numerical libraries to `count()`, unless `OMP_NUM_THREADS` is set; call before imports."""
    # PyTorch, MKL, OpenBLAS (NumPy, SciPy) and Arrow read it when they are loaded; child processes inherit it. For a
    # whole machine it is not set: PyTorch's default, the physical cores, beats a thread for each hyper-thread.
    if count() < of_machine():
        os.environ.setdefault("OMP_NUM_THREADS", str(count()))


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit PyTorch's operations to one thread in the body."""
    import torch  # here: this module is imported before the libraries whose threads it limits

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def of_machine() -> int:
    """Return the CPUs of the machine."""
    return os.cpu_count() or 1


def _limits() -> Iterator[float]:
    # In CPUs, version 1 and 2: https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/scheduler/sched-bwc.html
    for folder in _cgroups():
        try:
            if (limit := folder / "cpu.max").is_file():
                quota, period = limit.read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if quota != "max" and int(quota) > 0:  # -1 in version 1
                yield int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):  # the root of version 2 has no limit; not as documented
            continue


def _cgroups() -> Iterator[Path]:
    # Up to the root, which in a container often is the container's own.
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            top = _CGROUPS / "cpu" if controllers else _CGROUPS
            inner = PurePosixPath(path.lstrip("/"))
            yield from (top / folder for folder in (inner, *inner.parents))
