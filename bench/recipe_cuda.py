"""What follows backward() on a CUDA device, in one call of braze: against torch's recipe, and who waits."""

from __future__ import annotations

import argparse
from typing import Any

import braze
import torch

from . import cuda_clock, rows, table
from .cells import TORCH_MODES, Cell
from .cuda_clock import Clock, Step
from .optim_cuda import bytes_needed, groups_of
from .recipe import CELLS, Recipe, contenders
from .rows import Row, Work, goal

RECIPES = {
    "amp + clip": Recipe(clip=True, amp=True, ema=False),
    "amp + clip + ema": Recipe(clip=True, amp=True, ema=True),
}
LARGE_GOAL = 1.4
COLUMNS = "name:<40 torch_mode:>11 torch:10.1f braze:9.1f ratio_wall:11.2f floor_us:9.1f waits:6"


def waits(step: Step, device: Clock) -> bool | None:
    """Whether the host waits for the device in a step; None where nothing can tell."""
    if device.name != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def measure(
    cell: Cell, name: str, recipe: Recipe, device: Clock, bandwidth: float, seconds: float, row: Row
) -> None:
    """One row."""
    if bytes_needed(cell) > 0.9 * device.free_bytes():
        row.update(skipped=True, note="skipped: needs more memory than is free")
        return
    calls = contenders(groups_of(cell, device.name), name, recipe, device.name)
    for step in calls.values():
        for _ in range(2):
            step()
    row["host_waits"] = {mode: waits(step, device) for mode, step in calls.items()}
    modes = row["modes"] = cuda_clock.measure(device, calls, seconds)
    best = min((m for m in modes if m in TORCH_MODES), key=lambda m: modes[m]["wall_us"])
    ratio = modes[best]["wall_us"] / modes["braze"]["wall_us"]
    row.update(
        torch_mode=best, ratio_wall=ratio, floor_us=recipe.bytes_moved(cell, name) / bandwidth * 1e6
    )
    waited = row["host_waits"]["braze"]
    row["goals"] = []
    if waited is not None:
        row["goals"].append(goal(f"{row['name']}: host waits, none", float(waited), not waited))
    if cell.numel >= 100_000_000:
        text = f"{row['name']}: at least {LARGE_GOAL} x torch's recipe"
        row["goals"].append(goal(text, ratio, ratio >= LARGE_GOAL))


def line(row: dict[str, Any]) -> str:
    modes = row.get("modes", {})
    shown = {mode: figures["wall_us"] for mode, figures in modes.items()}
    shown["torch"] = shown.get(row.get("torch_mode", ""))
    return table.line(row | shown | {"waits": row.get("host_waits", {}).get("braze")}, COLUMNS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    rows.add_options(parser, ("cuda", "cpu"), 1.0)


def run(arguments: argparse.Namespace) -> int:
    """Measures row by row; on the CPU it rehearses. Returns :func:`rows.run`'s code."""
    cells = rows.choose([cell.name for cell in CELLS], arguments.only)
    device = cuda_clock.open_clock(arguments)
    bandwidth = device.copy_bandwidth()

    def work(cell: Cell, name: str, title: str) -> Work:
        fixed = (cell, name, RECIPES[title], device, bandwidth, arguments.seconds)
        return Work(f"{cell.name} / {name} / {title}", lambda row: measure(*fixed, row))

    every = [
        work(cell, name, title)
        for cell in sorted(CELLS, key=lambda cell: -cell.numel)
        if cell.name in cells
        for name in ("AdamW", "SGD")
        for title in RECIPES
    ]
    result: dict[str, Any] = {"build": braze.build_info(), **device.facts()}
    print(f"{result['name']}\n{table.header(COLUMNS)}", flush=True)
    return rows.run(every, arguments, result, line)
