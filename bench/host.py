"""Host time of a CUDA step where there is no GPU: the emulated device, with kernels not run.

Needs a source checkout (tests/support/emulated.py).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from typing import Any

import braze.optim
import torch
from torch.nn import Parameter

from . import rows, table
from .cells import OPTIONS
from .rows import Row, Work
from .sources import find_root
from .timing import interleave

COUNTS = (1, 10, 100, 1000)
GOAL_FIXED_US, GOAL_TENSOR_US = 10.0, 0.03
COLUMNS = (
    f"optimizer:<10 {' '.join(f'{n}:9.1f' for n in COUNTS)} fixed_us:10.1f per_tensor_us:15.3f"
)


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


def measure(name: str, seconds: float, size: int, row: Row) -> None:
    """One row. Microseconds."""
    times = interleave({str(n): _step(name, n, size) for n in COUNTS}, seconds)
    # The minimum: what another process does to the host's time says nothing about the step.
    row["min_us"] = {str(n): times[str(n)].minimum * 1e6 for n in COUNTS}
    row["median_us"] = {str(n): times[str(n)].median * 1e6 for n in COUNTS}
    least = list(row["min_us"].values())
    row["fixed_us"], row["per_tensor_us"] = fit(list(COUNTS), least)
    # Every count: a relative fit hardly sees a jump at the last one.
    goals = [GOAL_FIXED_US + GOAL_TENSOR_US * n for n in COUNTS]
    row["met"] = all(us <= goal for us, goal in zip(least, goals, strict=True))
    row["optimizer"] = name


def line(row: Row) -> str:
    verdict = f"goal {GOAL_FIXED_US:g} + {GOAL_TENSOR_US:g} n: {'met' if row['met'] else 'MISSED'}"
    return (
        table.line(row | row["min_us"] | {"note": verdict}, COLUMNS) if row["ok"] else row["note"]
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--optimizer", choices=[*OPTIONS, "all"], default="all")
    parser.add_argument("--size", type=int, default=64, help="elements of a tensor (default 64)")
    rows.add_options(parser, (), 2.0, "optimizer")


def run(arguments: argparse.Namespace) -> int:
    """Returns :func:`rows.run`'s code; 1 where the emulated device is missing."""
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
    torch.set_num_threads(arguments.threads or 1)
    emulated.enable(True)
    print(f"host us of one step (minimum), by number of tensors\n{table.header(COLUMNS)}")

    def work(name: str) -> Work:
        return Work(name, lambda row: measure(name, arguments.seconds, arguments.size, row))

    names = list(OPTIONS) if arguments.optimizer == "all" else [arguments.optimizer]
    try:
        return rows.run(map(work, names), arguments, {"build": braze.build_info()}, line)
    finally:
        emulated.enable(False)
        torch.set_num_threads(threads)
        emulated.set_null_launch(False)
