"""Whole models side by side: what is measured, and the contenders that compute the same."""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import braze
import torch
from braze import memory
from torch import Tensor, nn

from . import model_peak, models, session
from .clock import Call
from .harness import LAYOUTS, OURS, Built, Case, Part, Setting, Suite
from .memory import without_reuse
from .rows import Hopeless, Row, count, goal

CAST = "bf16 cast"


@dataclass(frozen=True)
class Cell:
    """``dtype``: fp32, bf16 (fp32 parameters under autocast) or bf16 cast (bf16 parameters). ``goal``: how much
    faster than torch, channels last, braze should be on CUDA."""

    model: str
    batch: int
    dtype: str
    size: int = 224
    device: str = "cpu"
    quick: bool = False
    goal: float = 0.0

    @property
    def name(self) -> str:
        size = "" if self.size == 224 else f" {self.size}px"
        device = "" if self.device == "cpu" else f" {self.device}"
        return f"{self.model} N={self.batch} {self.dtype}{size}{device}"


Make = Callable[[Cell, str, nn.Module], Call]


@dataclass(frozen=True)
class Task:
    """``call``: of a cell, a layout and a model what is timed."""

    name: str
    training: bool
    cells: Sequence[Cell]
    call: Make


def layout_of(contender: str) -> str:
    """``torch NCHW`` is in that layout, all others are channels last."""
    return "NCHW" if contender.endswith("NCHW") else "NHWC"


def _formatted(tensor: Tensor, layout: str) -> Tensor:
    if layout == "NCHW":
        return tensor.contiguous()
    last = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    return tensor.contiguous(memory_format=last)


def build(cell: Cell, contender: str, source: nn.Module, training: bool) -> nn.Module:
    """A copy of ``source`` as the contender runs it: ``braze``, ``torch NHWC``, ``torch NCHW``, ``compile``."""
    model = copy.deepcopy(source).train(training).to(cell.device)
    if cell.dtype == CAST:
        model = model.bfloat16()
    if contender == OURS:
        return braze.fuse(model, channels_last=True)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() in (4, 5):
            tensor.data = _formatted(tensor.data, layout_of(contender))
    if contender == "compile":
        torch.compiler.reset()
        return cast(nn.Module, torch.compile(model))
    return model


def images(cell: Cell, layout: str) -> Tensor:
    """The same for every contender."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        x = models.example(cell.model, cell.batch, cell.size)
    return _formatted(x.to(cell.device, torch.bfloat16 if cell.dtype == CAST else None), layout)


def autocast(cell: Cell) -> contextlib.AbstractContextManager[object]:
    if cell.dtype != "bf16":
        return contextlib.nullcontext()
    return torch.autocast(cell.device, torch.bfloat16)


def _built(task: Task, cell: Cell, setting: Setting) -> Built:
    torch.manual_seed(0)
    source = models.load(cell.model)

    def make(contender: str) -> Call:
        model = build(cell, contender, source, task.training)
        return task.call(cell, layout_of(contender), model)

    names = [f"torch {layout}" for layout in LAYOUTS] + [OURS]
    names += ["compile"] if "compile" in setting.against else []
    makers: dict[str, Callable[[], Call]] = {name: partial(make, name) for name in names}
    if cell.device == "cpu":
        makers["braze, no reuse"] = lambda: without_reuse(make(OURS))
    memory.empty_cache()
    return Built(makers)


def _peaks(task: Task, cell: Cell, setting: Setting, row: Row) -> None:
    """Peak memory too; braze's may not be above torch's in the same layout."""
    threads = torch.get_num_threads()
    found = {n: model_peak.measure(task.name, cell, n, threads) for n in (OURS, "torch NHWC")}
    row["memory_mb"] = {name: peak["peak_mb"] for name, peak in found.items()}
    row["memory_first_mb"] = {name: peak["first_mb"] for name, peak in found.items()}
    ours, theirs = row["memory_mb"].values()
    if ours > model_peak.SLACK * theirs:
        row["ok"], row["note"] = False, "braze needs MORE MEMORY than torch"


def _goals(cell: Cell, row: Row) -> list[dict[str, Any]]:
    if not cell.goal or row["device"] != "cuda":
        return []
    figures = [row["contenders"][n]["warm"]["median_us"] for n in ("torch NHWC", OURS)]
    ratio = figures[0] / figures[1]
    return [goal(f"{cell.name}: at least {cell.goal} x torch NHWC", ratio, ratio >= cell.goal)]


def chosen_cells(task: Task, arguments: argparse.Namespace) -> list[Cell]:
    """The default cells, or those of one model; batch and size as asked."""
    device, model = arguments.device, getattr(arguments, "model", None)
    cells = [cell for cell in task.cells if cell.device == device]
    if model or not cells:
        cells = [
            Cell(model or "resnet50", 8, d, device=device, quick=True) for d in ("fp32", "bf16")
        ]
    changes = {k: v for k in ("batch", "size") if (v := getattr(arguments, k, None)) is not None}
    return list(dict.fromkeys(replace(cell, **changes) for cell in cells))


def cases(task: Task, arguments: argparse.Namespace) -> list[Case]:
    measured = getattr(arguments, "memory", False)
    if measured and (arguments.device != "cpu" or model_peak.why_not()):
        why = model_peak.why_not() or "it measures this process's memory, not a device's"
        raise Hopeless(f"--memory: {why}")
    cells = chosen_cells(task, arguments)
    for cell in cells:
        models.require(cell.model)
    return [
        Case(
            cell.name,
            {
                "model": cell.model,
                "dtype": cell.dtype.partition(" ")[0],
                "batch": cell.batch,
                "cast": cell.dtype == CAST,
            },
            (Part(partial(_built, task, cell)),),
            cell.quick,
            partial(_goals, cell),
            # Dropout draws other masks, and bf16 rounds anew in every layer: shown, not judged.
            math.inf,
            partial(_peaks, task, cell) if measured else None,
        )
        for cell in cells
    ]


def suite(task: Task) -> Suite:
    figure = {"cpu": "warm", "cuda": "warm"}
    return Suite(task.name, partial(cases, task), 12.0, figure, ("warm",))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="one model: torchvision's name, or timm:NAME (default: some)")
    add("--batch", type=count, help="images (default: each row's own; with --model 8)")
    add("--size", type=count, help="pixels on a side (default 224)")
    add(
        "--memory",
        action="store_true",
        help="peak memory of one call too, in processes of their own",
    )
    session.add_options(parser, "12")
