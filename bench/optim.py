"""One optimizer step, against the best of torch.optim's modes."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import braze
import braze.optim
import torch
from torch.nn import Parameter

from .cells import CELLS, OPTIONS, Cell, torch_optimizers
from .timing import interleave, stream_bandwidth


def _contenders(cell: Cell, name: str) -> dict[str, Callable[[], Any]]:
    """All modes over the same parameters and gradients, so that none has the luckier pages."""
    params = [Parameter(torch.randn(shape, dtype=cell.dtype)) for shape in cell.shapes]
    for p in params:
        p.grad = torch.randn_like(p)

    groups: Any = [{"params": [p]} for p in params] if cell.group_each else params
    modes: dict[str, Callable[[], Any]] = {
        mode: make(groups).step for mode, make in torch_optimizers(name).items()
    }
    if name == "SGD" and cell.dtype in (torch.bfloat16, torch.float16) and _fused_sgd_is_broken():
        del modes["fused"]
    return {**modes, "braze": getattr(braze.optim, name)(groups, **OPTIONS[name]).step}


def _fused_sgd_is_broken() -> bool:
    """torch 2.13's fused SGD leaves whole blocks of 16-bit parameters untouched: not a contender."""
    p = Parameter(torch.ones(64, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    torch.optim.SGD([p], lr=0.5, momentum=0.9, fused=True).step()
    return not bool((p == 0.5).all())


def _measure(cell: Cell, name: str, seconds: float, bandwidth: float) -> dict[str, Any]:
    calls = _contenders(cell, name)
    torch_modes = [mode for mode in calls if mode != "braze"]
    probe = interleave({mode: calls[mode] for mode in torch_modes}, 0.0)
    best = min(torch_modes, key=lambda mode: probe[mode].minimum)
    times = interleave({best: calls[best], "braze": calls["braze"]}, seconds)
    ours, theirs = times["braze"], times[best]
    return {
        "cell": cell.name,
        "optimizer": name,
        "torch_mode": best,
        "torch_us": theirs.minimum * 1e6,
        "braze_us": ours.minimum * 1e6,
        "ratio_min": theirs.minimum / ours.minimum,
        "ratio_median": theirs.median / ours.median,
        "goal": cell.goal_sgd if name == "SGD" else cell.goal_adam,
        "floor_us": cell.bytes_moved(name) / bandwidth * 1e6,
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


def run(cells: list[Cell], optimizers: list[str], seconds: float) -> dict[str, Any]:
    """Measures and prints row by row. Returns everything as a JSON-ready dict; times in microseconds."""
    bandwidth = stream_bandwidth()
    result: dict[str, Any] = {
        "build": braze.build_info(),
        "processor": platform.processor() or platform.machine(),
        "stream_bandwidth_gb_s": bandwidth / 1e9,
        "fixed_cost_us": fixed_cost(1.0),
        "rows": [],
    }
    print(f"stream bandwidth {bandwidth / 1e9:.1f} GB/s, {torch.get_num_threads()} threads")
    fixed = ", ".join(f"{name} {value:.1f} us" for name, value in result["fixed_cost_us"].items())
    print(f"fixed cost beyond torch's hook wrapper: {fixed}\n")
    print(
        f"{'cell':22}{'optimizer':10}{'best torch':>11}{'torch us':>11}{'braze us':>11}"
        f"{'ratio min':>10}{'median':>8}{'goal':>6}{'floor us':>10}"
    )
    for cell in cells:
        for name in optimizers:
            row = _measure(cell, name, seconds, bandwidth)
            result["rows"].append(row)
            print(
                f"{row['cell']:22}{name:10}{row['torch_mode']:>11}{row['torch_us']:11.1f}"
                f"{row['braze_us']:11.1f}{row['ratio_min']:10.2f}{row['ratio_median']:8.2f}"
                f"{row['goal']:6.2f}{row['floor_us']:10.1f}",
                flush=True,
            )
    return result


def main(argv: list[str]) -> int:
    """Parses arguments and runs. Returns 0; with --device cuda what that benchmark returns."""
    if "cuda" in argv or "--device=cuda" in argv:
        from .optim_cuda import main as cuda

        return cuda(argv)
    parser = argparse.ArgumentParser(
        prog="python -m braze bench optim",
        description="Time of opt.step() with every gradient present, torch's best mode against braze, "
        "interleaved; ratios above 1 mean braze is faster. floor = bytes / stream bandwidth.",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda has own --help"
    )
    parser.add_argument("--only", default="", help="cells whose name contains this text")
    parser.add_argument("--optimizer", choices=[*OPTIONS, "all"], default="all")
    parser.add_argument("--seconds", type=float, default=1.5, help="per row (default 1.5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    arguments = parser.parse_args(argv)
    if arguments.threads < 1:
        parser.error(f"--threads must be at least 1, got {arguments.threads}")
    cells = [cell for cell in CELLS if arguments.only in cell.name]
    if not cells:
        names = ", ".join(cell.name for cell in CELLS)
        parser.error(f"no cell's name contains '{arguments.only}'; there are: {names}")
    torch.set_num_threads(arguments.threads)
    optimizers = list(OPTIONS) if arguments.optimizer == "all" else [arguments.optimizer]
    result = run(cells, optimizers, arguments.seconds)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\nwritten: {arguments.json}", file=sys.stderr)
    return 0
