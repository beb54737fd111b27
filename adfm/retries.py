"""Repeat what may work in a minute (stand-in)."""

import time
from collections.abc import Callable
from typing import TypeVar

from adfm.errors import Unreachable

T = TypeVar("T")


def again(work: Callable[[], T], what: str, tries: int = 5, pause: float = 10.0) -> T:
    """Call `work` until it reaches what it needs."""
    for number in range(1, tries):
        try:
            return work()
        except Unreachable as error:
            print(f"{what}: {error}; try {number} of {tries}")
            time.sleep(pause * 2 ** (number - 1))
    return work()
