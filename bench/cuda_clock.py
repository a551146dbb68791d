"""Clocks for steps on a device: CUDA's events, graphs and profiler, or a rehearsal of them on the CPU."""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from .rows import Hopeless
from .timing import turns

Step = Callable[[], Any]
NAN = float("nan")
# Several times the largest L2.
_FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Spent:
    """Seconds per step. ``device`` is nan where the clock cannot tell it from the host's time."""

    wall: float
    host: float
    device: float


class Cuda:
    """The present CUDA device."""

    name = "cuda"

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
    def _events(work: Step) -> float:
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

    def wall(self, step: Step, count: int) -> Spent:
        """``count`` steps from an idle device to an idle device."""
        torch.cuda.synchronize()
        began = time.perf_counter()
        device = self._events(lambda: [step() for _ in range(count)])
        torch.cuda.synchronize()
        wall = time.perf_counter() - began
        return Spent(wall / count, NAN, device / count)

    def queued(self, step: Step, count: int, seconds: float) -> Spent:
        """``count`` steps queued behind a kernel that spins for ``seconds``, so that no side waits."""
        torch.cuda.synchronize()
        torch.cuda._sleep(int(seconds * self._cycles_per_second))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        began = time.perf_counter()
        for _ in range(count):
            step()
        host = time.perf_counter() - began
        # The spin is over: the device may have waited for the host, or a full queue made the host wait.
        late = start.query()
        end.record()
        end.synchronize()
        if late:
            return Spent(NAN, NAN, NAN)
        return Spent(NAN, host / count, float(start.elapsed_time(end)) * 1e-3 / count)

    def cold(self, step: Step, count: int, expected: float) -> list[float]:
        """Seconds on the device of each of ``count`` steps; none where the host was too slow to queue them.

        Before each, a read of other memory evicts L2, as the other layers of a network do, and leaves lines
        there that need not be written back in the step's time.
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
            step()
            end.record()
        late = starts[0].query()  # the device has begun: it may have waited for the host
        ends[-1].synchronize()
        if late:
            return []
        pairs = zip(starts, ends, strict=True)
        return [float(start.elapsed_time(end)) * 1e-3 for start, end in pairs]

    def graph(self, step: Step) -> Step:
        """Captures one step; the result replays it."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def kernels(self, step: Step) -> dict[str, int]:
        """Kernels, and copies and fills, that one step puts on the device, counted by the profiler."""
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            step()
            torch.cuda.synchronize()
        names = [
            e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA
        ]
        copies = sum(name.startswith(("Memcpy", "Memset")) for name in names)
        # Annotations of the host also appear on the device's track.
        marks = sum("#" in name or name.startswith("Optimizer") for name in names)
        return {"kernels": len(names) - copies - marks, "copies": copies}

    def copy_bandwidth(self) -> float:
        """Bytes read and written per second by a device-to-device copy of 1 GiB; a median, as figures are."""
        x = torch.empty(2**28, dtype=torch.float32, device=self.name).normal_()
        y = torch.empty_like(x)
        y.copy_(x)
        times: list[float] = []
        while not times:
            times = self.cold(lambda: y.copy_(x), 20, 1e-3)
        return 2 * x.numel() * 4 / statistics.median(times)


class Rehearsal:
    """The same calls on the CPU, to try the benchmark where there is no GPU. Its figures mean nothing."""

    name = "cpu"

    def facts(self) -> dict[str, Any]:
        return {"name": "rehearsal on the CPU", "multiprocessors": 0, "l2_bytes": 0}

    def free_bytes(self) -> int:
        return 2 * 2**30

    def wall(self, step: Step, count: int) -> Spent:
        began = time.perf_counter()
        for _ in range(count):
            step()
        spent = (time.perf_counter() - began) / count
        return Spent(spent, NAN, spent)

    def queued(self, step: Step, count: int, seconds: float) -> Spent:
        spent = self.wall(step, count)
        return Spent(NAN, spent.wall, spent.wall)

    def cold(self, step: Step, count: int, expected: float) -> list[float]:
        return [self.wall(step, 1).wall for _ in range(count)]

    def graph(self, step: Step) -> Step:
        step()
        return step

    def kernels(self, step: Step) -> dict[str, int]:
        step()
        return {"kernels": 0, "copies": 0}

    def copy_bandwidth(self) -> float:
        x = torch.ones(2**20)
        return 2 * x.numel() * 4 / self.wall(lambda: torch.empty_like(x).copy_(x), 5).wall


Clock = Cuda | Rehearsal


def _us(
    values: Iterable[float], of: Callable[[list[float]], float] = statistics.median
) -> float | None:
    """Microseconds for JSON, which has no nan."""
    known = [value for value in values if not math.isnan(value)]
    return of(known) * 1e6 if known else None


def measure(device: Clock, calls: dict[str, Step], seconds: float) -> dict[str, dict[str, Any]]:
    """Microseconds of contenders in turns: end to end and, with steps queued, on the device and the host."""
    guess = {name: device.wall(step, 1).wall for name, step in calls.items()}
    seen: dict[str, list[Spent]] = {name: [] for name in calls}
    queued: dict[str, list[Spent]] = {name: [] for name in calls}
    for order in turns(calls, seconds, 50):
        for name in order:
            step, spent = calls[name], guess[name]
            step()
            count = max(1, min(100, int(5e-3 / spent)))
            seen[name].append(device.wall(step, count))
            queued[name].append(device.queued(step, count, 1.5 * count * spent + 2e-4))
            guess[name] = seen[name][-1].wall
    return {
        name: {
            "wall_us": _us(s.wall for s in seen[name]),
            "wall_min_us": _us((s.wall for s in seen[name]), min),
            "busy_us": _us(s.device for s in seen[name]),
            "device_us": _us(s.device for s in queued[name]),
            "host_us": _us(s.host for s in queued[name]),
            "rounds": len(seen[name]),
        }
        for name in calls
    }


def prepare(arguments: argparse.Namespace) -> None:
    """Sets the threads; raises Hopeless where the device is not to be had."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise Hopeless(f"torch {torch.__version__} finds no CUDA device; --device cpu needs none")
    if getattr(arguments, "threads", None):
        torch.set_num_threads(arguments.threads)


def open_clock(arguments: argparse.Namespace) -> Clock:
    prepare(arguments)
    return Cuda() if arguments.device == "cuda" else Rehearsal()
