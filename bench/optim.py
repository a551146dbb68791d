"""One optimizer step, against the best of torch.optim's modes.

Time of opt.step() with every gradient present, interleaved; ratios above 1 mean braze is faster. floor = bytes
/ stream bandwidth. --clip, --amp and --ema: the whole of what follows backward(), see recipe.py. On CUDA: end
to end, on the device, on the host with the device kept busy, and launches.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from typing import Any

import braze
import braze.optim
import torch
from torch.nn import Parameter

from . import cuda_clock, optim_cuda, recipe_cuda, rows, table
from .cells import CELLS, OPTIONS, Cell
from .cuda_clock import Step
from .recipe import CELLS as RECIPE_CELLS
from .recipe import CLIP, Recipe, contenders
from .rows import Work
from .timing import interleave, ratios, stream_bandwidth

COLUMNS = (
    "cell:<22 optimizer:<10 torch_mode:>11 torch_us:11.1f braze_us:11.1f ratio_min:11.2f ratio_median:13.2f "
    "goal:7.2f floor_us:10.1f"
)


def _contenders(cell: Cell, name: str, recipe: Recipe) -> dict[str, Step]:
    groups = optim_cuda.groups_of(cell, "cpu")
    calls = contenders(groups, name, recipe, "cpu")
    if name == "SGD" and cell.dtype in (torch.bfloat16, torch.float16) and _fused_sgd_is_broken():
        del calls["fused"]
    return calls


def _fused_sgd_is_broken() -> bool:
    """torch 2.13's fused SGD leaves whole blocks of 16-bit parameters untouched: not a contender."""
    p = Parameter(torch.ones(64, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    torch.optim.SGD([p], lr=0.5, momentum=0.9, fused=True).step()
    return not bool((p == 0.5).all())


def _measure(
    cell: Cell, name: str, recipe: Recipe, seconds: float, bandwidth: float
) -> dict[str, Any]:
    calls = _contenders(cell, name, recipe)
    torch_modes = [mode for mode in calls if mode != "braze"]
    probe = interleave({mode: calls[mode] for mode in torch_modes}, 0.0)
    best = min(torch_modes, key=lambda mode: probe[mode].minimum)
    times = interleave({best: calls[best], "braze": calls["braze"]}, seconds)
    return {
        "cell": cell.name,
        "optimizer": name,
        "torch_mode": best,
        **ratios(times, best),
        "goal": recipe.goal(cell, name),
        "floor_us": recipe.bytes_moved(cell, name) / bandwidth * 1e6,
    }


class _Empty(torch.optim.Optimizer):
    """Nothing but torch's hook wrapper around step()."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        return None


def fixed_cost(seconds: float) -> dict[str, float]:
    """Microseconds of a braze step on one one-element tensor beyond torch's hook wrapper around step()."""
    p = Parameter(torch.zeros(1))
    p.grad = torch.ones(1)
    calls: dict[str, Callable[[], Any]] = {"wrapper": _Empty([p], {}).step}
    for name, options in OPTIONS.items():
        calls[name] = getattr(braze.optim, name)([p], **options).step
    times = interleave(calls, seconds)
    return {name: (times[name].median - times["wrapper"].median) * 1e6 for name in OPTIONS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--optimizer", choices=[*OPTIONS, CLIP, "all"], default="all")
    parser.add_argument("--clip", action="store_true", help="with clipping by the norm")
    parser.add_argument("--amp", action="store_true", help="with a GradScaler")
    parser.add_argument("--ema", action="store_true", help="with a running average of the weights")
    rows.add_options(parser, ("cpu", "cuda"), 1.5)


def run(arguments: argparse.Namespace) -> int:
    """Measures row by row. Returns :func:`rows.run`'s code."""
    if arguments.device == "cuda":
        recipe = arguments.clip or arguments.amp or arguments.ema
        return (recipe_cuda if recipe else optim_cuda).run(arguments)
    recipe = Recipe(arguments.clip, arguments.amp, arguments.ema)
    cells = RECIPE_CELLS if recipe else CELLS
    names = rows.choose([cell.name for cell in cells], arguments.only)
    cuda_clock.prepare(arguments)
    bandwidth = stream_bandwidth()
    result: dict[str, Any] = {
        "build": braze.build_info(),
        "processor": platform.processor() or platform.machine(),
        "stream_bandwidth_gb_s": bandwidth / 1e9,
        "fixed_cost_us": fixed_cost(1.0),
    }
    print(f"stream bandwidth {bandwidth / 1e9:.1f} GB/s, {torch.get_num_threads()} threads")
    fixed = ", ".join(f"{name} {value:.1f} us" for name, value in result["fixed_cost_us"].items())
    print(f"fixed cost beyond torch's hook wrapper: {fixed}\n\n{table.header(COLUMNS)}")

    def work(cell: Cell, name: str) -> Work:
        fixed = (cell, name, recipe, arguments.seconds, bandwidth)
        return Work(f"{cell.name} / {name}", lambda row: row.update(_measure(*fixed)))

    optimizers = [arguments.optimizer]
    if arguments.optimizer == "all":
        optimizers = ["SGD", "AdamW", *([CLIP] if recipe.clip else [])] if recipe else [*OPTIONS]
    every = [work(cell, name) for cell in cells if cell.name in names for name in optimizers]
    return rows.run(every, arguments, result, lambda row: table.line(row, COLUMNS))
