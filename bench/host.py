"""Host time of a CUDA step where there is no GPU: the emulated device, with kernels not run."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import braze.optim
import torch
from torch.nn import Parameter

from .cells import OPTIONS
from .files import write_json
from .sources import find_root
from .timing import interleave

COUNTS = (1, 10, 100, 1000)
GOAL_FIXED_US, GOAL_TENSOR_US = 10.0, 0.03


def fit(counts: list[int], times: list[float]) -> tuple[float, float]:
    """Least squares a + b * n of relative errors, so that few tensors weigh as much as many."""
    w = [1.0 / t**2 for t in times]
    s, sx = sum(w), sum(v * n for v, n in zip(w, counts, strict=True))
    sxx = sum(v * n * n for v, n in zip(w, counts, strict=True))
    sy = sum(v * t for v, t in zip(w, times, strict=True))
    sxy = sum(v * n * t for v, n, t in zip(w, counts, times, strict=True))
    slope = (s * sxy - sx * sy) / (s * sxx - sx * sx)
    return (sy - slope * sx) / s, slope


def load_emulated() -> Any:
    """The emulated device of the tests. Raises what went wrong where there is none."""
    sys.path.insert(0, str(find_root() / "tests" / "support"))
    return importlib.import_module("emulated").load()


def _step(name: str, count: int, size: int) -> Callable[[], Any]:
    params = [Parameter(torch.randn(size)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn(size)
    step: Callable[[], Any] = getattr(braze.optim, name)(params, **OPTIONS[name]).step
    return step


def run(optimizers: list[str], seconds: float, size: int) -> dict[str, Any]:
    """Measures and prints. Microseconds."""
    result: dict[str, Any] = {"build": braze.build_info(), "rows": []}
    heads = "".join(f"{n:>9}" for n in COUNTS)
    print(
        f"host us of one step (minimum), by number of tensors\n{'optimizer':10}{heads}   fit a + b*n (goal)"
    )
    for name in optimizers:
        times = interleave({str(n): _step(name, n, size) for n in COUNTS}, seconds)
        # The minimum: what another process does to the host's time says nothing about the step.
        least = [times[str(n)].minimum * 1e6 for n in COUNTS]
        fixed, each = fit(list(COUNTS), least)
        # Every count: a relative fit hardly sees a jump at the last one.
        goals = [GOAL_FIXED_US + GOAL_TENSOR_US * n for n in COUNTS]
        met = all(us <= goal for us, goal in zip(least, goals, strict=True))
        row = {
            "optimizer": name,
            "min_us": dict(zip(COUNTS, least, strict=True)),
            "median_us": {n: times[str(n)].median * 1e6 for n in COUNTS},
        }
        result["rows"].append({**row, "fixed_us": fixed, "per_tensor_us": each, "met": met})
        figures = "".join(f"{value:9.1f}" for value in least)
        print(
            f"{name:10}{figures}   {fixed:.1f} + {each:.3f} n "
            f"({GOAL_FIXED_US:.0f} + {GOAL_TENSOR_US} n: {'met' if met else 'MISSED'})",
            flush=True,
        )
    return result


def main(argv: list[str]) -> int:
    """Returns 0; 1 where the emulated device is missing; 2 for bad arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m braze bench host",
        description="Host time of a CUDA step on the emulated device, kernels not run. Needs a source "
        "checkout (tests/support/emulated.py).",
    )
    parser.add_argument("--optimizer", choices=[*OPTIONS, "all"], default="all")
    parser.add_argument("--seconds", type=float, default=2.0, help="per optimizer (default 2)")
    parser.add_argument("--size", type=int, default=64, help="elements of a tensor (default 64)")
    parser.add_argument(
        "--threads", type=int, default=1, help="that share the look at the gradients (default 1)"
    )
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    arguments = parser.parse_args(argv)
    if arguments.threads < 1:
        parser.error(f"--threads must be at least 1, got {arguments.threads}")
    try:
        emulated = load_emulated()
        emulated.set_null_launch(True)
    except (ImportError, FileNotFoundError, AttributeError, RuntimeError) as error:
        print(
            f"braze bench host: the emulated device is not to be had ({error}). It is "
            "tests/support/emulated.py of a source checkout; run this command inside one",
            file=sys.stderr,
        )
        return 1
    threads = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    emulated.enable(True)
    try:
        names = list(OPTIONS) if arguments.optimizer == "all" else [arguments.optimizer]
        result = run(names, arguments.seconds, arguments.size)
    finally:
        emulated.enable(False)
        torch.set_num_threads(threads)
        emulated.set_null_launch(False)
    if arguments.json is not None:
        write_json(json.loads(json.dumps(result)), arguments.json)
    return 0
