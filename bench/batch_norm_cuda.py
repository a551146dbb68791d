"""Batch norm + activation on a CUDA device: time on the device with a cold L2, against torch eager."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import braze

from . import cuda_clock, rows, table
from .batch_norm_cases import PASSES, Call, Case, Layer, contenders, resnet50_layers, select, summed
from .cuda_clock import Clock
from .rows import Row, Work, goal
from .timing import turns

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


def sample(clock: Clock, calls: dict[str, Call], seconds: float) -> dict[str, list[float]]:
    """Seconds per call of every contender, in turns."""
    expected = {}
    for name, call in calls.items():
        call()
        call()
        expected[name] = clock.wall(call, 2).wall
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for order in turns(calls, seconds, 50):
        for name in order:
            times = clock.cold(calls[name], 5, expected[name])
            seen[name] += times
            expected[name] *= 1 if times else 2
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
    row = summed(layers, "torch_us", "braze_us", "floor_us")
    row |= {
        "ratio": row["torch_us"] / row["braze_us"],
        "of_copy": row["floor_us"] / row["braze_us"],
        "worst_layer": min(r["ratio"] for r in layers),
        "goals": [],
    }
    if case == CASES[0]:
        for what, value, least in (
            ("ratio", row["ratio"], RATIO_GOALS[direction]),
            ("share of copy bandwidth", row["of_copy"], COPY_GOAL),
        ):
            text = f"{case.name} {direction}: {what} at least {least}"
            row["goals"].append(goal(text, value, value >= least))
    return row


COLUMNS = (
    "layer:<14 count:>6 torch_us:11.1f braze_us:11.1f ratio:8.2f floor_us:11.1f of_copy:9.2f "
    "worst_layer:12.2f"
)


def measure(
    case: Case,
    layers: list[Layer],
    direction: str,
    clock: Clock,
    bandwidth: float,
    seconds: float,
    row: Row,
) -> None:
    """One row: all layers and their sum."""
    row["layers"] = []
    for layer in case.layers_of(layers):
        try:
            row["layers"].append(measure_layer(case, layer, direction, clock, bandwidth, seconds))
        except Exception as error:
            raise RuntimeError(f"{layer.name}: {type(error).__name__}: {error}") from error
    row.update(total(case, direction, row["layers"]), copy_gb_s=bandwidth / 1e9)


def lines(row: Row) -> str:
    summed = [row] if row["ok"] else []
    text = f"\n{row['name']}\n{table.table([*row['layers'], *summed], COLUMNS)}"
    return text if row["ok"] else f"{text}\n{row['note']}"


def add_arguments(
    parser: argparse.ArgumentParser, devices: Sequence[str] = ("cuda", "cpu")
) -> None:
    parser.add_argument("--quick", action="store_true", help="four of the twelve shapes")
    parser.add_argument("--batch", type=rows.count, help="images (default 8; on CUDA 256 or 32)")
    rows.add_options(parser, devices, 0.4, "layer")


def run(arguments: argparse.Namespace) -> int:
    """Measures row by row; on the CPU it rehearses. Returns :func:`rows.run`'s code."""
    names = rows.choose([case.name for case in CASES], arguments.only)
    clock = cuda_clock.open_clock(arguments)
    bandwidth = clock.copy_bandwidth()
    layers = select(resnet50_layers(), arguments.quick)
    cases = [case for case in CASES if case.name in names]
    if arguments.batch is not None:
        cases = list(dict.fromkeys(replace(case, batch=arguments.batch) for case in cases))

    def work(case: Case, direction: str) -> Work:
        fixed = (case, layers, direction, clock, bandwidth, arguments.seconds)
        return Work(f"{case.name} / {direction}", lambda row: measure(*fixed, row))

    result: dict[str, Any] = {"build": braze.build_info(), **clock.facts()}
    print(f"{result['name']}: a copy moves {bandwidth / 1e9:.0f} GB/s", flush=True)
    every = [work(case, direction) for case in cases for direction in PASSES]
    return rows.run(every, arguments, result, lines)
