"""Measures and prints whole models, row by row; what ``bench train`` and ``bench infer`` share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import braze
import torch
from braze import memory
from torch import Tensor, nn

from . import cuda_clock, model_peak, models, rows, table
from .model_cells import (
    CAST,
    DTYPES,
    LAYOUTS,
    Call,
    Cell,
    Contender,
    build,
    contenders,
    settle,
    waiting,
)
from .rows import Hopeless, Row, Work, goal
from .timing import interleave, without_reuse

# What is compared; the second is braze.
PAIRS = (
    ("eager NHWC", "braze NHWC"),
    ("eager NCHW", "braze NHWC"),
    ("eager NCHW", "braze NCHW"),
    ("compile NHWC", "braze NHWC"),
    ("compile NCHW", "braze NCHW"),
    ("eager NHWC", "braze NHWC no reuse"),
)
SAME_LAYOUT = (PAIRS[0], PAIRS[2])


@dataclass(frozen=True)
class Task:
    """``goals``: by cell, how much faster than which contender braze should be, channels last, by minima.
    Cells are of every device."""

    name: str
    training: bool
    cells: Sequence[Cell]
    goals: Mapping[Cell, Mapping[str, float]]
    call: Callable[[Cell, Contender, nn.Module], Call]


def _difference(result: Tensor, reference: Tensor) -> float:
    """||result - reference|| / ||reference||."""
    wide = reference.double()
    norm = torch.linalg.vector_norm
    return float(norm(result.double() - wide) / norm(wide).clamp(min=1e-300))


def compare(
    figures: Mapping[str, Mapping[str, float]], goals: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Ratios above 1 where braze is faster; a goal is met by the ratio of minima."""
    found = []
    for other, ours in PAIRS:
        if other not in figures or ours not in figures:
            continue
        row: dict[str, Any] = {"other": other, "braze": ours}
        for key in ("min", "median"):
            row[f"ratio_{key}"] = figures[other][f"{key}_ms"] / figures[ours][f"{key}_ms"]
        goal = goals.get(other) if ours == "braze NHWC" else None
        row["goal"] = goal
        row["met"] = None if goal is None else row["ratio_min"] >= goal
        found.append(row)
    return found


def _time(
    task: Task, cell: Cell, wanted: Sequence[Contender], seconds: float, row: dict[str, Any]
) -> None:
    """Fills ``row["contenders"]``; one that fails is left out, its error in ``row["failed"]``."""
    torch.manual_seed(0)
    source = models.load(cell.model)
    torch.compiler.reset()
    calls: dict[str, Call] = {}
    figures: dict[str, dict[str, float]] = row["contenders"]
    reference: Tensor | None = None
    for contender in wanted:
        try:
            model = build(cell, contender, source, task.training)
            call = waiting(task.call(cell, contender, model), cell.device)
            compile_s = settle(call) if contender.who == "compile" else None
            torch.manual_seed(0)
            memory.empty_cache()
            result = call()
        except Exception as error:
            row["failed"][contender.name] = _reason(error)
            continue
        figures[contender.name] = {}
        if reference is None:
            reference = result
        else:
            figures[contender.name]["difference"] = _difference(result, reference)
        if compile_s is not None:
            figures[contender.name]["compile_s"] = compile_s
        calls[contender.name] = call
        if memory.kept() and contender == Contender("braze", wanted[0].layout):
            calls[f"{contender.name} no reuse"] = without_reuse(call)
            figures[f"{contender.name} no reuse"] = {}
    for name, times in interleave(calls, seconds).items():
        figures[name].update(min_ms=times.minimum * 1e3, median_ms=times.median * 1e3)


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def measure(
    task: Task,
    cell: Cell,
    wanted: Sequence[Contender],
    seconds: float,
    memory: bool,
    row: Row,
) -> None:
    """One row. A contender that fails fails it, except for torch.compile, which may lack a compiler."""
    row["contenders"], row["failed"] = {}, {}
    _time(task, cell, wanted, seconds, row)
    figures = row["contenders"]
    if memory:
        for contender in wanted:
            if contender.who != "compile" and contender.name in figures:
                peaks = model_peak.measure(task.name, cell, contender, torch.get_num_threads())
                figures[contender.name].update(peaks)
    row["ratios"] = compare(figures, task.goals.get(cell, {}))
    row["needs_more_memory"] = [
        ours
        for other, ours in SAME_LAYOUT
        if "peak_mb" in figures.get(other, {})
        and "peak_mb" in figures.get(ours, {})
        and figures[ours]["peak_mb"] > model_peak.SLACK * figures[other]["peak_mb"]
    ]
    row["goals"] = [
        goal(
            f"{cell.name}: at least {pair['goal']} x {pair['other']}",
            pair["ratio_min"],
            pair["met"],
        )
        for pair in row["ratios"]
        if pair["goal"] is not None
    ]
    broken = [name for name in row["failed"] if not name.startswith("compile")]
    row["ok"] = not (row["needs_more_memory"] or broken)


COLUMNS = "contender:<20 min_ms:10.1f median_ms:10.1f difference:12.0e compile_s:11.1f peak_mb:9.1f"


def lines(row: Row) -> str:
    """What is printed of a row."""
    text = [f"\n{row['name']}"]
    if "ratios" in row:
        for name, figures in row["contenders"].items():
            text.append(table.line({"contender": name, **figures}, COLUMNS))
        for ratio in row["ratios"]:
            pair = f"  {ratio['other']} / {ratio['braze']}"
            text.append(f"{pair:38}{ratio['ratio_min']:6.2f}  median{ratio['ratio_median']:6.2f}")
        text += [f"  {name} needs MORE MEMORY than eager" for name in row["needs_more_memory"]]
    text += [f"  {name} left out: {reason}" for name, reason in row.get("failed", {}).items()]
    if "note" in row:
        text.append(f"  {row['note']}")
    return "\n".join(text)


def chosen_cells(task: Task, arguments: argparse.Namespace) -> list[Cell]:
    """The default cells, or those of one model; batch, dtype and size as asked."""
    device = arguments.device
    cells = [cell for cell in task.cells if cell.device == device]
    if arguments.model or not cells:
        model = arguments.model or "resnet50"
        cells = [Cell(model, 8, dtype, device=device) for dtype in DTYPES]
    changes = {"size": arguments.size}
    if arguments.batch is not None:
        changes["batch"] = arguments.batch
    cells = [replace(cell, **changes) for cell in cells]
    if arguments.dtype:
        cells = [cell for cell in cells if cell.dtype == arguments.dtype]
    if getattr(arguments, "cast", False):
        cells += [replace(cell, dtype=CAST) for cell in cells if cell.dtype == "bf16"]
    return list(dict.fromkeys(cells))


def add_arguments(task: Task, parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Ratios of minima and of medians, above 1 where braze is faster. difference: of the first result from "
        "the first contender's, relative, of equal weights and images (dropout draws other masks, and bf16 "
        "rounds). no reuse: where results get the memory of earlier ones, the same model without. compile_s: "
        "what torch.compile's first calls took beyond a settled one."
    )
    add = parser.add_argument
    add("--model", help="one model: torchvision's name, or timm:NAME (default: some, with goals)")
    add("--batch", type=rows.count, help="images (default: each cell's own; with --model 8)")
    add("--size", type=rows.count, default=224, help="pixels on a side (default 224)")
    add("--dtype", choices=DTYPES, help="bf16 is autocast over fp32 parameters (default: both)")
    if not task.training:
        add("--cast", action="store_true", help="bf16 cells also as models cast with .bfloat16()")
    add("--layout", choices=(*LAYOUTS, "both"), default="both", help="default: both")
    add("--compile", action="store_true", help="torch.compile too, channels last")
    add(
        "--memory",
        action="store_true",
        help="peak memory of one call too, each contender in a process of its own; braze's may not be above "
        "eager's",
    )
    rows.add_options(parser, ("cpu", "cuda"), 20.0, "cell, three rounds at least")


def run(task: Task, arguments: argparse.Namespace) -> int:
    """Returns :func:`rows.run`'s code; a row in which braze needs more memory than eager has failed."""
    if arguments.memory and arguments.device != "cpu":
        raise Hopeless("--memory measures this process's memory, not a device's")
    if arguments.memory and (reason := model_peak.why_not()) is not None:
        raise Hopeless(f"--memory: {reason}")
    cuda_clock.prepare(arguments)
    layouts = LAYOUTS if arguments.layout == "both" else (arguments.layout,)
    wanted = contenders(layouts, arguments.compile)
    every = {cell.name: cell for cell in chosen_cells(task, arguments)}
    cells = [every[name] for name in rows.choose(list(every), arguments.only)]

    def work(cell: Cell) -> Work:
        fixed = (task, cell, wanted, arguments.seconds, arguments.memory)
        return Work(cell.name, lambda row: measure(*fixed, row))

    result: dict[str, Any] = {"build": braze.build_info(), "threads": torch.get_num_threads()}
    where = f"{result['threads']} threads"
    if arguments.device == "cuda":
        where = result["name"] = torch.cuda.get_device_name()
    print(f"{where}\n{table.header(COLUMNS)}")
    return rows.run(map(work, cells), arguments, result, lines)
