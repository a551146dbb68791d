"""One optimizer step on a CUDA device: time on the device, end to end and on the host, and launches."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence
from typing import Any

import braze.optim
import torch
from torch.nn import Parameter

from . import cuda_clock, rows, table
from .cells import CUDA_CELLS, ELEMENTS_MOVED, OPTIONS, TORCH_MODES, Cell, torch_optimizers
from .cuda_clock import Clock, Step
from .rows import Row, Work, goal

# Of what a copy reaches in the same process.
COPY_GOAL, MODEL_COPY_GOAL = 0.95, 0.85
# The first cells, whose launches are counted.
LAUNCH_CELLS = 4


def braze_modes(name: str) -> dict[str, dict[str, bool]]:
    """RMSprop has no ``fused`` in torch, and Lion is not in torch at all."""
    fused = "fused" in inspect.signature(getattr(braze.optim, name)).parameters
    return {"braze": {}, **({"braze fused": {"fused": True}} if fused else {})}


def groups_of(cell: Cell, device: str) -> Any:
    """Parameters with gradients, the same for all optimizers, so that none has the luckier pages."""

    def random(shape: Sequence[int]) -> torch.Tensor:
        return torch.randn(shape, device=device).to(cell.dtype)

    params = [Parameter(random(shape)) for shape in cell.shapes]
    for p in params:
        p.grad = random(p.shape)

    return [{"params": [p]} for p in params] if cell.group_each else params


def contenders(cell: Cell, name: str, device: Clock) -> dict[str, Step]:
    """All modes. One that fails is left out; its error is printed."""
    groups = groups_of(cell, device.name)
    modes, ours = torch_optimizers(name), getattr(braze.optim, name)

    def build(**mode: bool) -> Step:
        step: Step = ours(groups, **OPTIONS[name], **mode).step
        return step

    capturable = {} if name == "SGD" else {"capturable": True}
    builders: dict[str, Any] = {
        **{mode: lambda make=make: make(groups).step for mode, make in modes.items()},
        **{mode: lambda f=flags: build(**f) for mode, flags in braze_modes(name).items()},
        "torch graph": lambda: device.graph([*modes.values()][-1](groups, **capturable).step),
        "braze graph": lambda: device.graph(build(**capturable)),
    }
    calls: dict[str, Step] = {}
    for mode, builder in builders.items():
        try:
            step = builder()
            for _ in range(2):
                step()
            calls[mode] = step
        except (RuntimeError, ValueError, TypeError) as error:
            if rows.is_fatal(str(error)):
                raise
            message = str(error).splitlines()[0] if str(error) else ""
            print(f"{cell.name} {name} {mode}: {type(error).__name__}: {message}", file=sys.stderr)
    return calls


def bytes_needed(cell: Cell) -> int:
    """An upper bound: parameters, gradients, seven modes' states, foreach's temporaries, fp32 sources."""
    return cell.bytes * (2 + 2 * 7 + 4) + 2 * 4 * cell.numel


def goals(cell: Cell, name: str, modes: dict[str, Any], bandwidth: float) -> list[dict[str, Any]]:
    """The goals that this row has."""
    found = []
    ours = modes["braze"]
    title = f"{cell.name} {name}"
    torch_wall = min((modes[m]["wall_us"] for m in TORCH_MODES if m in modes), default=None)
    floor_us = cell.bytes_moved(name) / bandwidth * 1e6
    if cell.name == "1000 x 1024" and name == "AdamW":
        found.append(goal(f"{title}: at most 60 us a step", ours["wall_us"], ours["wall_us"] <= 60))
    if cell.name == "ResNet-50" and name == "AdamW":
        share = floor_us / ours["wall_us"]
        text = f"{title}: end to end at least {MODEL_COPY_GOAL} of a copy"
        found.append(goal(text, share, share >= MODEL_COPY_GOAL))
    if cell.group_each and torch_wall is not None:
        ratio = torch_wall / ours["wall_us"]
        found.append(goal(f"{title}: at least 100 x torch", ratio, ratio >= 100))
    if cell.numel >= 100_000_000 and cell.dtype == torch.float32:
        share = floor_us / (ours["device_us"] or ours["busy_us"])
        found.append(goal(f"{title}: at least {COPY_GOAL} of a copy", share, share >= COPY_GOAL))
    return found


def count_launches(cell: Cell, name: str, device: Clock, row: Row) -> None:
    """A row of its own, after all times: the profiler may slow down launches from then on."""
    calls = contenders(cell, name, device)
    row["modes"] = {mode: device.kernels(step) for mode, step in calls.items()}
    row["ok"] = "braze" in calls


def measure(
    cell: Cell, name: str, device: Clock, bandwidth: float, seconds: float, row: Row
) -> None:
    """One row."""
    row["optimizer"] = name
    free, needed = device.free_bytes(), bytes_needed(cell)
    if needed > 0.9 * free:
        row["skipped"] = True
        row["note"] = (
            f"skipped: needs up to {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        )
        return
    moved = cell.bytes_moved(name)
    modes = row["modes"] = cuda_clock.measure(device, contenders(cell, name, device), seconds)
    if "braze" not in modes:
        raise RuntimeError("braze's step failed; the log has its error")
    ours = modes["braze"]
    best = min((m for m in TORCH_MODES if m in modes), key=lambda m: modes[m]["wall_us"])
    on_device = (ours["device_us"] or ours["busy_us"]) * 1e-6
    row.update(
        torch_mode=best,
        ratio_wall=modes[best]["wall_us"] / ours["wall_us"],
        floor_us=moved / bandwidth * 1e6,
        gb_s=moved / on_device / 1e9,
        copy_gb_s=bandwidth / 1e9,
        of_copy=moved / bandwidth / on_device,
        fits_l2=cell.bytes * (ELEMENTS_MOVED[name] + 1) // 2 < device.facts()["l2_bytes"],
        goals=goals(cell, name, modes, bandwidth),
    )
    missing = [m for m in braze_modes(name) | {"braze graph": {}} if m not in modes]
    if missing:
        raise RuntimeError(f"failed: {', '.join(missing)} (see the log)")


# Microseconds, those of whole steps end to end.
COLUMNS = (
    "name:<28 torch_mode:>11 torch:10.1f braze:9.1f braze_fused:12.1f braze_graph:12.1f device_us:10.1f "
    "host_us:8.1f ratio_wall:11.2f floor_us:9.1f gb_s:7.0f of_copy:8.2f"
)


def line(row: dict[str, Any]) -> str:
    """The row for a person."""
    if row["name"].startswith("launches") and "modes" in row:
        counts = (f"{m} {c['kernels']} (+{c['copies']})" for m, c in row["modes"].items())
        return f"{row['name']} (+ copies and fills): {', '.join(counts)}"
    modes = row.get("modes", {})
    shown = {mode.replace(" ", "_"): figures["wall_us"] for mode, figures in modes.items()}
    shown["torch"] = shown.get(row.get("torch_mode", ""))
    return table.line(row | modes.get("braze", {}) | shown, COLUMNS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--optimizer", choices=[*OPTIONS, "all"], default="all")
    rows.add_options(parser, ("cuda", "cpu"), 1.0)


def run(arguments: argparse.Namespace) -> int:
    """Measures row by row; on the CPU it rehearses. Returns :func:`rows.run`'s code.

    Parameters and state are the same in every step, so what fits in L2 (fits_l2) stays there.
    """
    names = rows.choose([cell.name for cell in CUDA_CELLS], arguments.only)
    device = cuda_clock.open_clock(arguments)
    bandwidth = device.copy_bandwidth()
    optimizers = list(OPTIONS) if arguments.optimizer == "all" else [arguments.optimizer]
    # AdamW first: a run that is cut short has what most people ask for.
    optimizers.sort(key=lambda name: name != "AdamW")
    pairs = [(c, n) for c in CUDA_CELLS if c.name in names for n in optimizers]

    def timed(cell: Cell, name: str) -> Work:
        return Work(
            f"{cell.name} / {name}",
            lambda row: measure(cell, name, device, bandwidth, arguments.seconds, row),
        )

    def counted(cell: Cell, name: str) -> Work:
        title = f"launches / {cell.name} / {name}"
        return Work(title, lambda row: count_launches(cell, name, device, row))

    few = [(c, n) for c, n in pairs if c in CUDA_CELLS[:LAUNCH_CELLS] and n != "Adam"]
    work = [timed(*pair) for pair in pairs] + [counted(*pair) for pair in few]
    result: dict[str, Any] = {"build": braze.build_info(), **device.facts()}
    print(
        f"{result['name']}: a copy moves {bandwidth / 1e9:.0f} GB/s\n{table.header(COLUMNS)}",
        flush=True,
    )
    return rows.run(work, arguments, result, line)
