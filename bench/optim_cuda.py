"""One optimizer step on a CUDA device: time on the device, end to end and on the host, and launches."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from typing import Any

import braze.optim
import torch
from torch.nn import Parameter

from . import cuda_clock, rows
from .cells import CUDA_CELLS, OPTIONS, TORCH_MODES, Cell, torch_optimizers
from .cuda_clock import Clock, Spent, Step
from .rows import Row, Work, goal

BRAZE_MODES: dict[str, dict[str, bool]] = {"braze": {}, "braze fused": {"fused": True}}
# Of what a copy reaches in the same process.
COPY_GOAL, MODEL_COPY_GOAL = 0.95, 0.85
# The first cells, whose launches are counted.
LAUNCH_CELLS = 4


def contenders(cell: Cell, name: str, device: Clock) -> dict[str, Step]:
    """All modes over the same parameters and gradients. A mode that fails is left out; its error is printed."""
    params = [
        Parameter(torch.randn(shape, device=device.name).to(cell.dtype)) for shape in cell.shapes
    ]
    for p in params:
        p.grad = torch.randn(p.shape, device=device.name).to(cell.dtype)

    groups: Any = [{"params": [p]} for p in params] if cell.group_each else params
    modes, ours = torch_optimizers(name), getattr(braze.optim, name)

    def build(**mode: bool) -> Step:
        step: Step = ours(groups, **OPTIONS[name], **mode).step
        return step

    capturable = {} if name == "SGD" else {"capturable": True}
    builders: dict[str, Any] = {
        **{mode: lambda make=make: make(groups).step for mode, make in modes.items()},
        **{mode: lambda f=flags: build(**f) for mode, flags in BRAZE_MODES.items()},
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


def _median(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else float("nan")


def _figure(seconds: float) -> float | None:
    """Microseconds for JSON, which has no nan."""
    return None if math.isnan(seconds) else seconds * 1e6


def _rounds(device: Clock, calls: dict[str, Step], seconds: float) -> dict[str, Any]:
    guess = {mode: device.wall(step, 1).wall for mode, step in calls.items()}
    seen: dict[str, list[Spent]] = {mode: [] for mode in calls}
    queued: dict[str, list[Spent]] = {mode: [] for mode in calls}
    names = list(calls)
    deadline = time.perf_counter() + seconds
    round_ = 0
    while round_ < 3 or (time.perf_counter() < deadline and round_ < 50):
        turn = round_ % len(names)
        for mode in names[turn:] + names[:turn]:
            step, spent = calls[mode], guess[mode]
            step()
            count = max(1, min(100, int(5e-3 / spent)))
            seen[mode].append(device.wall(step, count))
            queued[mode].append(device.queued(step, count, 1.5 * count * spent + 2e-4))
            guess[mode] = seen[mode][-1].wall
        round_ += 1
    return {
        mode: {
            "wall_us": _figure(_median([s.wall for s in seen[mode]])),
            "wall_min_us": _figure(min(s.wall for s in seen[mode])),
            "busy_us": _figure(_median([s.device for s in seen[mode]])),
            "device_us": _figure(_median([s.device for s in queued[mode]])),
            "host_us": _figure(_median([s.host for s in queued[mode]])),
            "rounds": round_,
        }
        for mode in names
    }


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
    modes = row["modes"] = _rounds(device, contenders(cell, name, device), seconds)
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
        fits_l2=cell.bytes * (3 if name == "SGD" else 4) < device.facts()["l2_bytes"],
        goals=goals(cell, name, modes, bandwidth),
    )
    missing = [m for m in BRAZE_MODES | {"braze graph": {}} if m not in modes]
    if missing:
        raise RuntimeError(f"failed: {', '.join(missing)} (see the log)")


HEADER = (
    f"{'cell / optimizer':28}{'best torch':>10}{'torch us':>10}{'braze us':>10}{'fused':>8}{'graph':>8}"
    f"{'device':>9}{'host':>7}{'ratio':>7}{'floor':>8}{'GB/s':>7}{'of copy':>9}"
)


def _cell(modes: dict[str, Any], mode: str, key: str) -> str:
    value = modes.get(mode, {}).get(key)
    return "-" if value is None else f"{value:.1f}"


def line(row: dict[str, Any]) -> str:
    """The row for a person; microseconds, end to end unless the heading says otherwise."""
    if row["name"].startswith("launches") and "modes" in row:
        counts = (f"{m} {c['kernels']} (+{c['copies']})" for m, c in row["modes"].items())
        return f"{row['name']} (+ copies and fills): {', '.join(counts)}"
    if "gb_s" not in row:
        return f"{row['name']:28} {row.get('note', '')}"
    modes = row["modes"]
    return (
        f"{row['name']:28}{row['torch_mode']:>10}{_cell(modes, row['torch_mode'], 'wall_us'):>10}"
        f"{_cell(modes, 'braze', 'wall_us'):>10}{_cell(modes, 'braze fused', 'wall_us'):>8}"
        f"{_cell(modes, 'braze graph', 'wall_us'):>8}{_cell(modes, 'braze', 'device_us'):>9}"
        f"{_cell(modes, 'braze', 'host_us'):>7}"
        f"{row['ratio_wall']:7.2f}{row['floor_us']:8.1f}{row['gb_s']:7.0f}{row['of_copy']:9.2f}"
    )


def main(argv: list[str]) -> int:
    """Measures row by row. Returns :func:`rows.run`'s code; 2 for bad arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m braze bench optim --device cuda",
        description="Time of opt.step() with every gradient present: end to end, on the device, on the "
        "host with the device kept busy, and launches. floor = bytes / speed of a copy on the device. "
        "Parameters and state are the same in every step, so what fits in L2 (fits_l2) stays there.",
    )
    cuda_clock.add_option(parser)
    parser.add_argument("--optimizer", choices=[*OPTIONS, "all"], default="all")
    parser.add_argument("--seconds", type=float, default=1.0, help="per row (default 1)")
    rows.add_options(parser)
    arguments = parser.parse_args(argv)
    names = rows.choose(parser, [cell.name for cell in CUDA_CELLS], arguments.only)
    device = cuda_clock.open_clock(parser, arguments.device)
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
    print(f"{result['name']}: a copy moves {bandwidth / 1e9:.0f} GB/s\n{HEADER}", flush=True)
    return rows.run(work, arguments, result, line)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
