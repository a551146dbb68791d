"""braze's results in malloc's memory, as torch's are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from braze import memory

T = TypeVar("T")


def without_reuse(call: Callable[[], T]) -> Callable[[], T]:
    """The call without the memory of earlier results: beyond 32 MB, fresh pages."""

    def run() -> T:
        memory.set_reuse(False)
        try:
            return call()
        finally:
            memory.set_reuse(True)

    return run
