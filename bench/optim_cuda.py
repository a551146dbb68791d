"""One optimizer step on a CUDA device: time on the device, end to end and on the host, and launches."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import braze.optim
import torch
from torch.nn import Parameter

from .cells import CUDA_CELLS, OPTIONS, Cell
from .files import announce, emit, is_fatal, write_json
from .optim_device import Cuda, Rehearsal, Spent, Step

TORCH_MODES: dict[str, dict[str, bool]] = {
    "for-loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
BRAZE_MODES: dict[str, dict[str, bool]] = {"braze": {}, "braze fused": {"fused": True}}
FLOOR_GOAL = 4.1e12
# The first cells, whose launches are counted.
LAUNCH_CELLS = 4


def contenders(cell: Cell, name: str, device: Cuda | Rehearsal) -> dict[str, Step]:
    """All modes over the same parameters and gradients. A mode that fails is left out; its error is printed."""
    params = [
        Parameter(torch.randn(shape, device=device.name).to(cell.dtype)) for shape in cell.shapes
    ]
    for p in params:
        p.grad = torch.randn(p.shape, device=device.name).to(cell.dtype)

    def build(module: Any, **mode: bool) -> Step:
        groups: Any = [{"params": [p]} for p in params] if cell.group_each else params
        step: Step = getattr(module, name)(groups, **OPTIONS[name], **mode).step
        return step

    capturable = {} if name == "SGD" else {"capturable": True}
    builders: dict[str, Any] = {
        **{mode: lambda f=flags: build(torch.optim, **f) for mode, flags in TORCH_MODES.items()},
        **{mode: lambda f=flags: build(braze.optim, **f) for mode, flags in BRAZE_MODES.items()},
        "torch graph": lambda: device.graph(build(torch.optim, fused=True, **capturable)),
        "braze graph": lambda: device.graph(build(braze.optim, **capturable)),
    }
    calls: dict[str, Step] = {}
    for mode, builder in builders.items():
        try:
            step = builder()
            for _ in range(2):
                step()
            calls[mode] = step
        except (RuntimeError, ValueError, TypeError) as error:
            if is_fatal(str(error)):
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


def _rounds(device: Cuda | Rehearsal, calls: dict[str, Step], seconds: float) -> dict[str, Any]:
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


def goals(cell: Cell, name: str, modes: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals that this row has: text, figure, and whether it is met."""
    ours = modes["braze"]
    torch_wall = min((modes[m]["wall_us"] for m in TORCH_MODES if m in modes), default=None)
    found = []
    for where, limit in (("1000 x 1024", 60.0), ("ResNet-50", 190.0)):
        if cell.name == where and name == "AdamW":
            text = f"{where} {name}: at most {limit:.0f} us a step"
            found.append({"goal": text, "value": ours["wall_us"], "met": ours["wall_us"] <= limit})
    if cell.group_each and torch_wall is not None:
        ratio = torch_wall / ours["wall_us"]
        text = f"{cell.name} {name}: at least 100 x torch"
        found.append({"goal": text, "value": ratio, "met": ratio >= 100})
    if cell.numel >= 100_000_000 and cell.dtype == torch.float32:
        rate = cell.bytes_moved(name) / ((ours["device_us"] or ours["busy_us"]) * 1e-6)
        text = f"{cell.name} {name}: at least {FLOOR_GOAL / 1e12} TB/s"
        found.append({"goal": text, "value": rate / 1e12, "met": rate >= FLOOR_GOAL})
    return found


def count_launches(cell: Cell, name: str, device: Cuda | Rehearsal) -> dict[str, Any]:
    """A row of its own, after all times: the profiler may slow down launches from then on."""
    row: dict[str, Any] = {"name": f"launches / {cell.name} / {name}", "ok": False}
    try:
        calls = contenders(cell, name, device)
        row["modes"] = {mode: device.kernels(step) for mode, step in calls.items()}
        row["ok"] = "braze" in calls
    except Exception as error:
        row["note"] = f"{type(error).__name__}: {error}"[:500]
    return row


def measure(
    cell: Cell, name: str, device: Cuda | Rehearsal, bandwidth: float, seconds: float
) -> dict[str, Any]:
    """One row. Rows never raise: what went wrong is in ``note``."""
    row: dict[str, Any] = {"name": f"{cell.name} / {name}", "ok": False, "optimizer": name}
    free, needed = device.free_bytes(), bytes_needed(cell)
    if needed > 0.9 * free:
        note = f"skipped: needs up to {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        return {**row, "ok": True, "skipped": True, "note": note}
    moved = cell.bytes_moved(name)
    l2 = device.facts()["l2_bytes"]
    try:
        calls = contenders(cell, name, device)
        modes = _rounds(device, calls, seconds)
        if "braze" not in modes:
            return {**row, "note": "braze's step failed; the log has its error", "modes": modes}
        ours = modes["braze"]
        best = min((m for m in TORCH_MODES if m in modes), key=lambda m: modes[m]["wall_us"])
        row.update(
            torch_mode=best,
            ratio_wall=modes[best]["wall_us"] / ours["wall_us"],
            floor_us=moved / bandwidth * 1e6,
            gb_s=moved / ((ours["device_us"] or ours["busy_us"]) * 1e-6) / 1e9,
            copy_gb_s=bandwidth / 1e9,
            fits_l2=cell.bytes * (3 if name == "SGD" else 4) < l2,
            goals=goals(cell, name, modes),
            modes=modes,
        )
    except Exception as error:
        return {**row, "note": f"{type(error).__name__}: {error}"[:500]}
    missing = [m for m in BRAZE_MODES | {"braze graph": {}} if m not in modes]
    note = f"failed: {', '.join(missing)} (see the log)" if missing else ""
    return {**row, "ok": not missing, "note": note}


HEADER = (
    f"{'cell / optimizer':28}{'best torch':>10}{'torch us':>10}{'braze us':>10}{'fused':>8}{'graph':>8}"
    f"{'device':>9}{'host':>7}{'ratio':>7}{'floor':>8}{'GB/s':>7}"
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
        f"{row['ratio_wall']:7.2f}{row['floor_us']:8.1f}{row['gb_s']:7.0f}"
    )


def main(argv: list[str]) -> int:
    """Measures row by row. Returns 0, 1 if a row failed, 2 for bad arguments, 3 after a fatal error."""
    parser = argparse.ArgumentParser(
        prog="python -m braze bench optim --device cuda",
        description="Time of opt.step() with every gradient present: end to end, on the device, on the "
        "host with the device kept busy, and launches. floor = bytes / speed of a copy on the device. "
        "Parameters and state are the same in every step, so what fits in L2 (fits_l2) stays there.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: rehearse")
    parser.add_argument("--only", default="", help="cells whose name contains this text")
    parser.add_argument("--optimizer", choices=[*OPTIONS, "all"], default="all")
    parser.add_argument("--seconds", type=float, default=1.0, help="per row (default 1)")
    parser.add_argument("--json", type=Path, help="also write all figures to this file, row by row")
    parser.add_argument("--skip-file", type=Path, help="a JSON list of row names to leave out")
    parser.add_argument("--rows", action="store_true", help="print each row as ROW {json}")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no CUDA device; --device cpu rehearses")
    cells = [cell for cell in CUDA_CELLS if arguments.only in cell.name]
    if not cells:
        names = ", ".join(cell.name for cell in CUDA_CELLS)
        parser.error(f"no cell's name contains '{arguments.only}'; there are: {names}")
    skip = set(json.loads(arguments.skip_file.read_text()) if arguments.skip_file else [])
    device = Cuda() if arguments.device == "cuda" else Rehearsal()
    bandwidth = device.copy_bandwidth()
    result: dict[str, Any] = {"build": braze.build_info(), **device.facts(), "rows": []}
    print(f"{result['name']}: a copy moves {bandwidth / 1e9:.0f} GB/s\n{HEADER}", flush=True)
    optimizers = list(OPTIONS) if arguments.optimizer == "all" else [arguments.optimizer]
    pairs = [(c, n) for c in cells for n in sorted(optimizers, key=lambda n: n != "AdamW")]
    work = [(f"{c.name} / {n}", c, n) for c, n in pairs]
    work += [
        (f"launches / {c.name} / {n}", c, n)
        for c, n in pairs
        if c in CUDA_CELLS[:LAUNCH_CELLS] and n != "Adam"
    ]
    for title, cell, name in work:
        if title in skip:
            continue
        if arguments.rows:
            announce(title)
        if title.startswith("launches"):
            row = count_launches(cell, name, device)
        else:
            row = measure(cell, name, device, bandwidth, arguments.seconds)
        result["rows"].append(row)
        print(line(row), flush=True)
        for goal in row.get("goals", []):
            met = "met" if goal["met"] else "MISSED"
            print(f"    goal {met}: {goal['goal']}; here {goal['value']:.2f}", flush=True)
        if arguments.rows:
            emit(row)
        if arguments.json is not None:
            write_json(result, arguments.json)
        if is_fatal(row.get("note", "")):
            return 3
    return 0 if all(row["ok"] for row in result["rows"]) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
