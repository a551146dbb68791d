"""Batch norm + activation over ResNet-50's layers, against torch eager."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import braze
import torch

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
)
from .files import write_json
from .timing import interleave, stream_bandwidth

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
    times = interleave(contenders(case, layer, direction, "cpu"), seconds)
    ours, theirs = times["braze"], times["torch"]
    return {
        "case": case.name,
        "direction": direction,
        "layer": layer.name,
        "count": layer.count,
        "torch_us": theirs.minimum * 1e6,
        "braze_us": ours.minimum * 1e6,
        "torch_median_us": theirs.median * 1e6,
        "braze_median_us": ours.median * 1e6,
        "ratio_min": theirs.minimum / ours.minimum,
        "ratio_median": theirs.median / ours.median,
        "floor_us": case.bytes_moved(layer, direction) / bandwidth * 1e6,
    }


def total(case: Case, direction: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum over the network's layers, each shape as often as it has it."""

    def over(key: str) -> float:
        return sum(float(row[key]) * int(row["count"]) for row in rows)

    judged = case.activation == "relu" and not case.join
    return {
        "case": case.name,
        "direction": direction,
        "layers": sum(row["count"] for row in rows),
        "torch_us": over("torch_us"),
        "braze_us": over("braze_us"),
        "ratio_min": over("torch_us") / over("braze_us"),
        "ratio_median": over("torch_median_us") / over("braze_median_us"),
        "worst_layer": min(row["ratio_min"] for row in rows),
        "floor_us": over("floor_us"),
        "goal": GOALS.get((case.dtype, case.layout, direction)) if judged else None,
    }


HEADER = (
    f"{'layer':16}{'x':>4}{'torch us':>11}{'braze us':>11}{'ratio':>8}{'median':>8}{'floor us':>10}"
)


def line(row: dict[str, Any], name: str, count: int) -> str:
    return (
        f"{name:16}{count:>4}{row['torch_us']:11.1f}{row['braze_us']:11.1f}{row['ratio_min']:8.2f}"
        f"{row['ratio_median']:8.2f}{row['floor_us']:10.1f}"
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


def run(
    wanted: list[Case], layers: list[Layer], directions: list[str], seconds: float
) -> dict[str, Any]:
    """Measures and prints row by row. Returns everything as a JSON-ready dict; times in microseconds."""
    bandwidth = stream_bandwidth()
    result: dict[str, Any] = {
        "build": braze.build_info(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "stream_bandwidth_gb_s": bandwidth / 1e9,
        "rows": [],
        "sums": [],
    }
    print(f"stream bandwidth {bandwidth / 1e9:.1f} GB/s, {torch.get_num_threads()} threads")
    result["stored"] = print_stored(dict.fromkeys(case.activation for case in wanted))
    for case in wanted:
        for direction in directions:
            print(f"\n{case.name}, {direction}\n{HEADER}")
            rows = []
            for layer in case.layers_of(layers):
                rows.append(measure(case, layer, direction, seconds, bandwidth))
                print(line(rows[-1], layer.name, layer.count), flush=True)
            summed = total(case, direction, rows)
            goal = "" if summed["goal"] is None else f"; goal {summed['goal']}"
            worst = f"   worst layer {summed['worst_layer']:.2f}{goal}"
            print(line(summed, "sum", summed["layers"]) + worst, flush=True)
            result["rows"] += rows
            result["sums"].append(summed)
    return result


def main(argv: list[str]) -> int:
    """Parses arguments and runs. Returns 0; with --device cuda what that benchmark returns."""
    if "cuda" in argv or "--device=cuda" in argv:
        from .batch_norm_cuda import main as cuda

        return cuda(argv)
    parser = argparse.ArgumentParser(
        prog="python -m braze bench batch_norm",
        description="Time of a training forward, and of a backward, of BatchNormAct2d against torch's "
        "BatchNorm2d and in-place activation, over the shapes of ResNet-50's 53 batch norms, interleaved; "
        "ratios of minima and of medians, above 1 where braze is faster. floor = 3 (forward) or 5 "
        "(backward) passes / stream bandwidth; what stays in the caches can be below it.",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda has own --help"
    )
    parser.add_argument(
        "--only", default="", help='cases with this in their name, like "bf16 NHWC"'
    )
    parser.add_argument("--direction", choices=[*PASSES, "both"], default="both")
    parser.add_argument(
        "--activation", choices=[*ACTIVATIONS, "all"], default="relu", help="default: relu"
    )
    parser.add_argument("--join", action="store_true", help="the 16 layers that add a residual")
    parser.add_argument("--quick", action="store_true", help="four of the twelve shapes")
    parser.add_argument("--batch", type=int, default=8, help="images (default 8)")
    parser.add_argument("--seconds", type=float, default=0.5, help="per row (default 0.5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    arguments = parser.parse_args(argv)
    for name in ("threads", "batch"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    activations = list(ACTIVATIONS) if arguments.activation == "all" else [arguments.activation]
    every = cases(activations, arguments.batch, arguments.join)
    wanted = [case for case in every if arguments.only in case.name]
    if not wanted:
        names = ", ".join(case.name for case in every)
        parser.error(f"no case's name contains '{arguments.only}'; there are: {names}")
    torch.set_num_threads(arguments.threads)
    layers = select(resnet50_layers(), arguments.quick)
    directions = list(PASSES) if arguments.direction == "both" else [arguments.direction]
    result = run(wanted, layers, directions, arguments.seconds)
    if arguments.json is not None:
        write_json(json.loads(json.dumps(result)), arguments.json)
        print(f"\nwritten: {arguments.json}", file=sys.stderr)
    return 0
