"""How much memory a function takes, seen in a process of its own: other tests leave threads that allocate too."""

import tracemalloc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any


def peaks(function: Callable[..., Any], *calls: tuple[Any, ...]) -> list[int]:
    """The most bytes that Python held allocated during each of the calls, which follow each other in one process.

    The function is one of a module; what the first call imports counts for the first.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return [pool.submit(_peak, function, arguments).result() for arguments in calls]


def _peak(function: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    tracemalloc.start()
    try:
        function(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
