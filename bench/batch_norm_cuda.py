"""Batch norm + activation on a CUDA device: time on the device with a cold L2, against torch eager."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import braze
import torch

from .batch_norm_cases import PASSES, Call, Case, Layer, contenders, resnet50_layers, select
from .files import announce, emit, is_fatal, write_json
from .optim_device import Cuda, Rehearsal

# The rows with a goal come first: a run that is cut short has them.
CASES = (
    Case("bf16", "NHWC", "relu", 256),
    Case("bf16", "NHWC", "relu", 256, join=True),
    Case("bf16", "NHWC", "silu", 256),
    Case("fp32", "NHWC", "relu", 256),
    Case("bf16", "NCHW", "relu", 256),
    Case("fp32", "NCHW", "relu", 256),
    Case("bf16", "NHWC", "relu", 32),
)
RATIO_GOALS = {"forward": 1.6, "backward": 1.5}
COPY_GOAL = 0.85
FLUSH_BYTES = 256 * 2**20


class CudaClock(Cuda):
    """CUDA events around single calls. Between them a fill evicts L2: an activation comes from memory, as in
    a network whose other layers went over the cache since."""

    def __init__(self) -> None:
        super().__init__()
        self._scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def cold(self, call: Call, count: int, expected: float) -> list[float]:
        """Seconds on the device of each of ``count`` calls; none where the host was too slow to queue them."""
        starts, ends = (
            [torch.cuda.Event(enable_timing=True) for _ in range(count)] for _ in range(2)
        )
        torch.cuda.synchronize()
        torch.cuda._sleep(int((1e-3 + count * expected) * self._cycles_per_second))
        for start, end in zip(starts, ends, strict=True):
            self._scratch.zero_()
            start.record()
            call()
            end.record()
        late = starts[0].query()  # the device has begun: it may have waited for the host
        ends[-1].synchronize()
        if late:
            return []
        pairs = zip(starts, ends, strict=True)
        return [float(start.elapsed_time(end)) * 1e-3 for start, end in pairs]


class RehearsalClock(Rehearsal):
    """The same call on the CPU. Its figures mean nothing."""

    def cold(self, call: Call, count: int, expected: float) -> list[float]:
        return [self.wall(call, 1).wall for _ in range(count)]


Clock = CudaClock | RehearsalClock


def sample(clock: Clock, calls: dict[str, Call], seconds: float) -> dict[str, list[float]]:
    """Seconds per call of every contender, in turns."""
    expected = {}
    for name, call in calls.items():
        call()
        call()
        expected[name] = clock.wall(call, 2).wall
    seen: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds
    names = list(calls)
    rounds = 0
    while rounds < 3 or (time.perf_counter() < deadline and rounds < 50):
        turn = rounds % len(names)
        for name in names[turn:] + names[:turn]:
            times = clock.cold(calls[name], 5, expected[name])
            seen[name] += times
            expected[name] *= 1 if times else 2
        rounds += 1
    return seen


def measure_layer(
    case: Case, layer: Layer, direction: str, clock: Clock, bandwidth: float, seconds: float
) -> dict[str, Any]:
    """Microseconds. Raises RuntimeError where the device or the host cannot do it."""
    free, needed = clock.free_bytes(), 12 * case.bytes_of(layer)
    if needed > 0.9 * free:
        raise RuntimeError(f"needs up to {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
    seen = sample(clock, contenders(case, layer, direction, clock.name), seconds)
    if not all(seen.values()):
        raise RuntimeError("the host was too slow to keep the device busy")
    median = {name: statistics.median(values) for name, values in seen.items()}
    least = {name: min(values) for name, values in seen.items()}
    floor = case.bytes_moved(layer, direction) / bandwidth
    return {
        "layer": layer.name,
        "count": layer.count,
        "torch_us": median["torch"] * 1e6,
        "braze_us": median["braze"] * 1e6,
        "torch_min_us": least["torch"] * 1e6,
        "braze_min_us": least["braze"] * 1e6,
        "ratio": median["torch"] / median["braze"],
        "floor_us": floor * 1e6,
        "of_copy": floor / median["braze"],
    }


def total(case: Case, direction: str, layers: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum over the network's layers, and its goals."""
    row: dict[str, Any] = {
        key: math.fsum(r[key] * r["count"] for r in layers)
        for key in ("torch_us", "braze_us", "floor_us")
    }
    row |= {
        "layer": "sum",
        "count": sum(r["count"] for r in layers),
        "ratio": row["torch_us"] / row["braze_us"],
        "of_copy": row["floor_us"] / row["braze_us"],
        "worst_layer": min(r["ratio"] for r in layers),
        "goals": [],
    }
    if case == CASES[0]:
        for what, value, goal in (
            ("ratio", row["ratio"], RATIO_GOALS[direction]),
            ("share of copy bandwidth", row["of_copy"], COPY_GOAL),
        ):
            text = f"{case.name} {direction}: {what} at least {goal}"
            row["goals"].append({"goal": text, "value": value, "met": value >= goal})
    return row


HEADER = f"{'layer':14}{'x':>4}{'torch us':>11}{'braze us':>11}{'ratio':>8}{'floor us':>11}{'of copy':>9}"


def line(layer: dict[str, Any]) -> str:
    return (
        f"{layer['layer']:14}{layer['count']:>4}{layer['torch_us']:11.1f}{layer['braze_us']:11.1f}"
        f"{layer['ratio']:8.2f}{layer['floor_us']:11.1f}{layer['of_copy']:9.2f}"
    )


def measure(
    case: Case,
    layers: list[Layer],
    direction: str,
    clock: Clock,
    bandwidth: float,
    seconds: float,
) -> dict[str, Any]:
    """One row: all layers and their sum. Rows never raise: what went wrong is in ``note``."""
    row: dict[str, Any] = {"name": f"{case.name} / {direction}", "ok": False, "layers": []}
    print(f"\n{row['name']}\n{HEADER}", flush=True)
    try:
        for layer in case.layers_of(layers):
            seen = measure_layer(case, layer, direction, clock, bandwidth, seconds)
            row["layers"].append(seen)
            print(line(seen), flush=True)
    except Exception as error:
        note = f"{layer.name}: {type(error).__name__}: {error}"[:500]
        print(note, flush=True)
        return {**row, "note": note}
    summed = total(case, direction, row["layers"])
    print(line(summed), flush=True)
    for goal in summed["goals"]:
        met = "met" if goal["met"] else "MISSED"
        print(f"    goal {met}: {goal['goal']}; here {goal['value']:.2f}", flush=True)
    return {**row, **summed, "ok": True, "note": ""}


def main(argv: list[str]) -> int:
    """Measures row by row. Returns 0, 1 if a row failed, 2 for bad arguments, 3 after a fatal error."""
    parser = argparse.ArgumentParser(
        prog="python -m braze bench batch_norm --device cuda",
        description="Time on the device of a training forward, and of a backward, of BatchNormAct2d against "
        "torch's BatchNorm2d and in-place activation, over the shapes of ResNet-50's 53 batch norms, L2 "
        "flushed before each call; medians. floor = 3 (forward) or 5 (backward) passes, 4 and 6 with a "
        "residual, at the speed of a copy on the device.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: rehearse")
    parser.add_argument(
        "--only", default="", help='cases with this in their name, like "bf16 NHWC"'
    )
    parser.add_argument("--quick", action="store_true", help="four of the twelve shapes")
    parser.add_argument("--batch", type=int, help="images, instead of 256 or 32")
    parser.add_argument("--seconds", type=float, default=0.3, help="per layer (default 0.3)")
    parser.add_argument("--json", type=Path, help="also write all figures to this file, row by row")
    parser.add_argument("--skip-file", type=Path, help="a JSON list of row names to leave out")
    parser.add_argument("--rows", action="store_true", help="print each row as ROW {json}")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no CUDA device; --device cpu rehearses")
    cases = [case for case in CASES if arguments.only in case.name]
    if not cases:
        names = ", ".join(case.name for case in CASES)
        parser.error(f"no case's name contains '{arguments.only}'; there are: {names}")
    skip = set(json.loads(arguments.skip_file.read_text()) if arguments.skip_file else [])
    clock: Clock = CudaClock() if arguments.device == "cuda" else RehearsalClock()
    bandwidth = clock.copy_bandwidth()
    result: dict[str, Any] = {"build": braze.build_info(), **clock.facts(), "rows": []}
    print(f"{result['name']}: a copy moves {bandwidth / 1e9:.0f} GB/s", flush=True)
    layers = select(resnet50_layers(), arguments.quick)
    if arguments.batch is not None:
        cases = list(dict.fromkeys(replace(case, batch=arguments.batch) for case in cases))
    for case in cases:
        for direction in PASSES:
            if f"{case.name} / {direction}" in skip:
                continue
            if arguments.rows:
                announce(f"{case.name} / {direction}")
            row = measure(case, layers, direction, clock, bandwidth, arguments.seconds)
            result["rows"].append(row)
            if arguments.rows:
                emit(row)
            if arguments.json is not None:
                write_json(result, arguments.json)
            if is_fatal(row["note"]):
                return 3
    return 0 if all(row["ok"] for row in result["rows"]) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
