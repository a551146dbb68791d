"""Clocks for what runs on a device, and interleaved timing: contenders take turns, a slow spell hits all.

Figures of a call, seconds each. ``warm``: from an idle device to an idle device, on what the last call left in
the caches. ``cold``: after a read of other memory has evicted the last cache; on CUDA the time on the device.
``device`` and ``host``, CUDA only: of calls that are queued behind a busy device, so that no side waits.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from . import environment
from .rows import Hopeless

Call = Callable[[], Any]
NAN = float("nan")
# Of one contender, if the time allows; as many stay in the record.
ROUNDS = 40
# A turn is not shorter.
_TURN_S = 2e-3
# Several times the largest L2 of a GPU.
_FLUSH_BYTES = 256 * 2**20
_MATMUL = 1024


@dataclass
class Samples:
    """Seconds per call: the least of all single calls, and of each turn the median; nan where it failed."""

    least: float = math.inf
    rounds: list[float] = field(default_factory=list)

    def add(self, times: list[float]) -> None:
        self.least = min([self.least, *times])
        self.rounds.append(statistics.median(times) if times else NAN)

    @property
    def median(self) -> float:
        known = [value for value in self.rounds if not math.isnan(value)]
        return statistics.median(known) if known else NAN


def turns(names: Iterable[str], seconds: float, most: float = math.inf) -> Iterator[list[str]]:
    """The names in an order that rotates, for about ``seconds``; thrice at least, ``most`` times at most."""
    order = list(names)
    deadline = time.perf_counter() + seconds
    count = 0
    while count < 3 or (time.perf_counter() < deadline and count < most):
        yield order
        order = order[1:] + order[:1]
        count += 1


def sample(
    clock: Clock, calls: Mapping[str, Call], seconds: float, figures: tuple[str, ...]
) -> dict[str, dict[str, Samples]]:
    """Times every callable for about ``seconds`` in all: samples by name and figure."""
    seen: dict[str, dict[str, Samples]] = {n: {f: Samples() for f in figures} for n in calls}
    timers = {name: clock.timer(call, figures) for name, call in calls.items()}
    share = seconds / ROUNDS / max(1, len(calls))
    for order in turns(calls, seconds, ROUNDS):
        for name in order:
            for figure, times in timers[name](share).items():
                seen[name][figure].add(times)
    return seen


class Host:
    """The CPU, with torch's threads."""

    name = "cpu"
    figures: tuple[str, ...] = ("warm", "cold")

    def __init__(self) -> None:
        self._other: torch.Tensor | None = None

    def facts(self) -> dict[str, Any]:
        return {"name": environment.processor(), "l2_bytes": 0}

    def free_bytes(self) -> int:
        gc.collect()
        return environment.free_memory()

    def timer(
        self, call: Call, figures: tuple[str, ...]
    ) -> Callable[[float], dict[str, list[float]]]:
        def turn(share: float) -> dict[str, list[float]]:
            call()  # pays for the caches that the others emptied
            times, spent = [], 0.0
            while spent < max(share, _TURN_S):
                times.append(self.wall(call, 1).wall)
                spent += times[-1]
            cold = {"cold": self.cold(call, 1)} if "cold" in figures else {}
            return {"warm": times, **cold}

        return turn

    def wall(self, call: Call, count: int) -> Spent:
        began = time.perf_counter()
        for _ in range(count):
            call()
        spent = (time.perf_counter() - began) / count
        return Spent(spent, spent, spent)

    def cold(self, call: Call, count: int, expected: float = 0.0) -> list[float]:
        """Of each of ``count`` calls, after a read of twice the last cache."""
        if self._other is None:
            size = min(2 * environment.last_cache() + 2**20, 2**29)
            self._other = torch.zeros(size // 4)
        times = []
        for _ in range(count):
            self._other.sum()
            times.append(self.wall(call, 1).wall)
        return times

    def copy_bandwidth(self, seconds: float = 1.0) -> float:
        """Bytes per second of ``y += x``, two reads and a write: the yardstick for floors.

        In place, as an optimizer works; a copy would also pay for reading the lines that it overwrites.
        """
        x = torch.ones(2**26)
        y = torch.zeros_like(x)
        times = sample(self, {"add": lambda: y.add_(x)}, seconds, ("warm",))
        return 3 * x.numel() * x.element_size() / times["add"]["warm"].least


@dataclass(frozen=True)
class Spent:
    """Seconds per call. ``device`` is nan where the clock cannot tell it from the host's time."""

    wall: float
    host: float
    device: float


class Cuda:
    """The present CUDA device."""

    name = "cuda"
    figures: tuple[str, ...] = ("warm", "cold", "device", "host")

    def __init__(self) -> None:
        self.properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._cycles_per_second = self._calibrate()
        self._flush: torch.Tensor | None = None

    def _calibrate(self) -> float:
        cycles = 20_000_000
        torch.cuda._sleep(cycles)
        torch.cuda.synchronize()
        return cycles / self._events(lambda: torch.cuda._sleep(cycles))

    @staticmethod
    def _events(work: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    def facts(self) -> dict[str, Any]:
        return {
            "name": self.properties.name,
            "multiprocessors": self.properties.multi_processor_count,
            "l2_bytes": int(getattr(self.properties, "L2_cache_size", 0)),
        }

    def free_bytes(self) -> int:
        gc.collect()  # optimizers of the last row, with their state
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])

    def timer(
        self, call: Call, figures: tuple[str, ...]
    ) -> Callable[[float], dict[str, list[float]]]:
        guess = patience = self.wall(call, 1).wall

        def known(seconds: float) -> list[float]:
            return [] if math.isnan(seconds) else [seconds]

        def turn(share: float) -> dict[str, list[float]]:
            nonlocal guess, patience
            call()
            count = max(1, min(100, int(5e-3 / guess)))
            times = {"warm": [self.wall(call, count).wall]}
            guess = times["warm"][0]
            if "device" in figures:
                queued = self.queued(call, count, 1.5 * count * guess + 2e-4)
                times |= {"device": known(queued.device), "host": known(queued.host)}
            if "cold" in figures:
                times["cold"] = self.cold(call, 5, patience)
                patience *= 1 if times["cold"] else 2
            return times

        return turn

    def wall(self, call: Call, count: int) -> Spent:
        """``count`` calls from an idle device to an idle device."""
        torch.cuda.synchronize()
        began = time.perf_counter()
        device = self._events(lambda: [call() for _ in range(count)])
        torch.cuda.synchronize()
        wall = time.perf_counter() - began
        return Spent(wall / count, NAN, device / count)

    def queued(self, call: Call, count: int, seconds: float) -> Spent:
        """``count`` calls queued behind a kernel that spins for ``seconds``, so that no side waits."""
        torch.cuda.synchronize()
        torch.cuda._sleep(int(seconds * self._cycles_per_second))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        began = time.perf_counter()
        for _ in range(count):
            call()
        host = time.perf_counter() - began
        # The spin is over: the device may have waited for the host, or a full queue made the host wait.
        late = start.query()
        end.record()
        end.synchronize()
        if late:
            return Spent(NAN, NAN, NAN)
        return Spent(NAN, host / count, float(start.elapsed_time(end)) * 1e-3 / count)

    def cold(self, call: Call, count: int, expected: float = 0.0) -> list[float]:
        """Seconds on the device of each of ``count`` calls; none where the host was too slow to queue them.

        Before each, a read of other memory evicts L2, as the other layers of a network do, and leaves lines
        there that need not be written back in the call's time.
        """
        if self._flush is None:
            self._flush = torch.zeros(_FLUSH_BYTES // 4, device=self.name)
        starts, ends = (
            [torch.cuda.Event(enable_timing=True) for _ in range(count)] for _ in range(2)
        )
        torch.cuda.synchronize()
        torch.cuda._sleep(int((1e-3 + count * expected) * self._cycles_per_second))
        for start, end in zip(starts, ends, strict=True):
            self._flush.sum()
            start.record()
            call()
            end.record()
        late = starts[0].query()  # the device has begun: it may have waited for the host
        ends[-1].synchronize()
        if late:
            return []
        pairs = zip(starts, ends, strict=True)
        return [float(start.elapsed_time(end)) * 1e-3 for start, end in pairs]

    def graph(self, call: Call) -> Call:
        """Captures one call; the result replays it."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def kernels(self, call: Call) -> dict[str, int]:
        """Kernels, and copies and fills, that one call puts on the device, counted by the profiler."""
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
        names = [
            e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA
        ]
        copies = sum(name.startswith(("Memcpy", "Memset")) for name in names)
        # Annotations of the host also appear on the device's track.
        marks = sum("#" in name or name.startswith("Optimizer") for name in names)
        return {"kernels": len(names) - copies - marks, "copies": copies}

    def waits(self, call: Call) -> bool:
        """Whether the host waits for the device in a call."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return False

    def copy_bandwidth(self, seconds: float = 1.0) -> float:
        """Bytes read and written per second by a device-to-device copy of 1 GiB; a median, as figures are."""
        x = torch.empty(2**28, dtype=torch.float32, device=self.name).normal_()
        y = torch.empty_like(x)
        y.copy_(x)
        times: list[float] = []
        while not times:
            times = self.cold(lambda: y.copy_(x), 20, 1e-3)
        return 2 * x.numel() * 4 / statistics.median(times)


Clock = Host | Cuda


def open_clock(device: str) -> Clock:
    """Raises Hopeless where the device is not to be had."""
    if device == "cuda" and not torch.cuda.is_available():
        raise Hopeless(f"torch {torch.__version__} finds no CUDA device; --device cpu needs none")
    return Cuda() if device == "cuda" else Host()


def matmul_rate(clock: Clock, dtype: torch.dtype) -> float:
    """Operations per second of a product of two square matrices."""
    n = _MATMUL if clock.name == "cpu" else 8 * _MATMUL
    a, b = (torch.randn(n, n, device=clock.name).to(dtype) for _ in range(2))
    times = sample(clock, {"product": lambda: a @ b}, 0.2, ("warm",))
    return 2 * n**3 / times["product"]["warm"].least
