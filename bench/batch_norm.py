"""Batch norm + activation over ResNet-50's layers, against torch eager.

Time of a training forward, and of a backward, of BatchNormAct2d against torch's BatchNorm2d and in-place
activation, over the shapes of the 53 batch norms, interleaved; ratios of minima and of medians, above 1 where
braze is faster. floor = 3 (forward) or 5 (backward) passes, 4 and 6 with a residual, / stream bandwidth; what
stays in the caches can be below it. no reuse: braze in malloc's memory, as torch's results are; beyond 32 MB
that is fresh pages. On CUDA: medians of the time on the device, L2 flushed before each call; floor = passes /
speed of a copy.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterable
from typing import Any

import braze
import torch

from . import batch_norm_cuda, cuda_clock, rows, table
from .batch_norm_cases import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    PASSES,
    Case,
    Layer,
    contenders,
    resnet50_layers,
    select,
    stored,
    summed,
)
from .rows import Row, Work
from .timing import interleave, ratios, stream_bandwidth, without_reuse

# Ratio of the sums over all layers at N = 8 with 2 threads; no layer may be slower than torch.
GOALS = {
    ("fp32", "NHWC", "forward"): 2.2,
    ("fp32", "NHWC", "backward"): 2.0,
    ("bf16", "NHWC", "forward"): 3.2,
    ("bf16", "NHWC", "backward"): 3.0,
    ("fp32", "NCHW", "forward"): 2.0,
}
STORED_LAYER = Layer(256, 28, 1)


def cases(activations: Iterable[str], batch: int, join: bool) -> list[Case]:
    return [
        Case(dtype, layout, activation, batch, join)
        for activation in activations
        for layout in LAYOUTS
        for dtype in DTYPES
    ]


def measure(
    case: Case, layer: Layer, direction: str, seconds: float, bandwidth: float
) -> dict[str, Any]:
    calls = contenders(case, layer, direction, "cpu")
    calls["no reuse"] = without_reuse(calls["braze"])
    times = interleave(calls, seconds)
    return {
        "case": case.name,
        "direction": direction,
        "layer": layer.name,
        "count": layer.count,
        **ratios(times),
        "torch_median_us": times["torch"].median * 1e6,
        "braze_median_us": times["braze"].median * 1e6,
        "floor_us": case.bytes_moved(layer, direction) / bandwidth * 1e6,
    }


def total(case: Case, direction: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum over the network's layers, and its goal."""
    keys = ("torch_us", "braze_us", "no_reuse_us", "torch_median_us", "braze_median_us", "floor_us")
    sums = summed(rows, *keys)
    judged = case.activation == "relu" and not case.join
    return {
        "case": case.name,
        "direction": direction,
        "layers": sums["count"],
        "torch_us": sums["torch_us"],
        "braze_us": sums["braze_us"],
        "no_reuse_us": sums["no_reuse_us"],
        "ratio_min": sums["torch_us"] / sums["braze_us"],
        "ratio_median": sums["torch_median_us"] / sums["braze_median_us"],
        "worst_layer": min(row["ratio_min"] for row in rows),
        "floor_us": sums["floor_us"],
        "goal": GOALS.get((case.dtype, case.layout, direction)) if judged else None,
    }


COLUMNS = (
    "layer:<16 count:>6 torch_us:11.1f braze_us:11.1f no_reuse_us:12.1f ratio_min:11.2f ratio_median:13.2f "
    "floor_us:10.1f worst_layer:12.2f goal:6.1f"
)


def print_stored(activations: Iterable[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for activation in activations:
        case = Case("fp32", "NHWC", activation, 8)
        kept = stored(case, STORED_LAYER, "cpu")
        less = 1 - kept["braze"] / kept["torch"]
        rows.append({"activation": activation, **kept, "less": less})
        print(
            f"stored for backward, batch norm + {activation} before a convolution: torch "
            f"{kept['torch'] / 1e6:.1f} MB, braze {kept['braze'] / 1e6:.1f} MB, {100 * less:.0f} % less"
        )
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--direction", choices=[*PASSES, "both"], default="both")
    add("--activation", choices=[*ACTIVATIONS, "all"], default="relu", help="default: relu")
    add("--join", action="store_true", help="the 16 layers that add a residual")
    batch_norm_cuda.add_arguments(parser, ("cpu", "cuda"))


def run(arguments: argparse.Namespace) -> int:
    """Measures row by row; CUDA has cases of its own. Returns :func:`rows.run`'s code."""
    if arguments.device == "cuda":
        return batch_norm_cuda.run(arguments)
    activations = list(ACTIVATIONS) if arguments.activation == "all" else [arguments.activation]
    every = {case.name: case for case in cases(activations, arguments.batch or 8, arguments.join)}
    wanted = [every[name] for name in rows.choose(list(every), arguments.only)]
    cuda_clock.prepare(arguments)
    bandwidth = stream_bandwidth()
    print(f"stream bandwidth {bandwidth / 1e9:.1f} GB/s, {torch.get_num_threads()} threads")
    result: dict[str, Any] = {
        "build": braze.build_info(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "stream_bandwidth_gb_s": bandwidth / 1e9,
        "rows": [],
        "sums": [],
        "stored": print_stored(dict.fromkeys(case.activation for case in wanted)),
    }
    layers = select(resnet50_layers(), arguments.quick)
    directions = list(PASSES) if arguments.direction == "both" else [arguments.direction]

    def work(case: Case, direction: str, layer: Layer) -> Work:
        fixed = (case, layer, direction, arguments.seconds, bandwidth)
        name = f"{case.name} / {direction} / {layer.name}"
        return Work(name, lambda row: row.update(measure(*fixed)))

    def lines(row: Row) -> str:
        """A heading before the layers of a case, their sum behind them."""
        text = table.line(row, COLUMNS)
        if not row["ok"]:
            return f"{row['name']}{text}"
        case, direction = every[row["case"]], row["direction"]
        seen = [
            r
            for r in result["rows"]
            if (r.get("case"), r.get("direction")) == (case.name, direction)
        ]
        if len(seen) == 1:
            text = f"\n{case.name}, {direction}\n{table.header(COLUMNS)}\n{text}"
        if len(seen) == len(case.layers_of(layers)):
            result["sums"].append(sums := total(case, direction, seen))
            text += "\n" + table.line(sums | {"layer": "sum", "count": sums["layers"]}, COLUMNS)
        return text

    pairs = [(case, direction) for case in wanted for direction in directions]
    each = [work(*pair, layer) for pair in pairs for layer in pair[0].layers_of(layers)]
    return rows.run(each, arguments, result, lines)
