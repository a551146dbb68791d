"""Interleaved timing: contenders take turns, so that a slow spell of the machine hits all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Times:
    """Seconds per call."""

    minimum: float
    median: float


def turns(names: Iterable[str], seconds: float, most: float = math.inf) -> Iterator[list[str]]:
    """The names in an order that rotates, for about ``seconds``; thrice at least, ``most`` times at most."""
    order = list(names)
    deadline = time.perf_counter() + seconds
    count = 0
    while count < 3 or (time.perf_counter() < deadline and count < most):
        yield order
        order = order[1:] + order[:1]
        count += 1


def interleave(
    calls: Mapping[str, Callable[[], object]], seconds: float, block: float = 2e-3
) -> dict[str, Times]:
    """Times every callable for about ``seconds`` in all.

    In turns of at least ``block`` seconds and two calls; the first call of a turn is not counted, for it
    pays for the caches that the others emptied. The order rotates.

    Returns:
        Minimum and median of the single calls, by name.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for order in turns(calls, seconds):
        for name in order:
            call = calls[name]
            call()
            spent = 0.0
            while spent < block:
                start = time.perf_counter()
                call()
                elapsed = time.perf_counter() - start
                samples[name].append(elapsed)
                spent += elapsed
    return {name: Times(min(s), statistics.median(s)) for name, s in samples.items()}


def without_reuse(call: Callable[[], T]) -> Callable[[], T]:
    """The call with braze's results in malloc's memory, as torch's are: beyond 32 MB, fresh pages."""
    from braze import memory  # here: a GPU machine builds braze with what else is in this file

    def run() -> T:
        memory.set_reuse(False)
        try:
            return call()
        finally:
            memory.set_reuse(True)

    return run


def ratios(times: Mapping[str, Times], best: str = "torch") -> dict[str, float]:
    """Least microseconds of ``best``, of braze and, if it is there, of "no reuse"; how much faster braze is."""
    ours, theirs = times["braze"], times[best]
    without = {"no_reuse_us": times["no reuse"].minimum * 1e6} if "no reuse" in times else {}
    return {
        "torch_us": theirs.minimum * 1e6,
        "braze_us": ours.minimum * 1e6,
        **without,
        "ratio_min": theirs.minimum / ours.minimum,
        "ratio_median": theirs.median / ours.median,
    }


def stream_bandwidth(megabytes: int = 256, seconds: float = 1.0) -> float:
    """Bytes per second of ``y += x`` with torch's threads, two reads and a write: the yardstick for floors.

    In place, as an optimizer works; a copy would also pay for reading the lines that it overwrites.
    """
    x = torch.ones(megabytes * 2**20 // 4)
    y = torch.zeros_like(x)
    times = interleave({"add": lambda: y.add_(x)}, seconds)
    return 3 * x.numel() * x.element_size() / times["add"].minimum
