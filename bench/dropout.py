"""Dropout against torch's, alone and fused, forward and with its backward pass, on the CPU or on CUDA.

Interleaved; ratios above 1 mean braze is faster. no reuse: braze in malloc's memory, as torch's results are;
beyond 32 MB that is fresh pages. floor = the bytes that must move / stream bandwidth (CUDA: speed of a copy).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import braze
import torch
from braze.nn import _dropout_functional as ours
from torch import Tensor
from torch.nn import functional as theirs

from . import cuda_clock, rows, table
from .cuda_clock import Cuda
from .rows import Row, Work, goal
from .timing import interleave, ratios, stream_bandwidth, without_reuse

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Operation:
    """``forward``, ``backward``: the fewest tensors read or written; ``goals``: CPU ratios."""

    torch: Call
    braze: Call
    forward: int = 2
    backward: int = 2
    goals: tuple[float, float] = (0.0, 0.0)


P = 0.5
OPERATIONS = {
    "dropout": Operation(
        lambda x: theirs.dropout(x, P), lambda x: ours.dropout(x, P), goals=(20.0, 10.0)
    ),
    "alpha_dropout": Operation(
        lambda x: theirs.alpha_dropout(x, P, True), lambda x: ours.alpha_dropout(x, P, True)
    ),
    "dropout2d": Operation(lambda x: theirs.dropout2d(x, P), lambda x: ours.dropout2d(x, P)),
    "relu": Operation(
        lambda x: theirs.dropout(theirs.relu(x), P),
        lambda x: ours.act_dropout(x, "relu", P),
        backward=3,
    ),
    "gelu": Operation(
        lambda x: theirs.dropout(theirs.gelu(x), P),
        lambda x: ours.act_dropout(x, "gelu", P),
        backward=3,
    ),
    "add": Operation(
        lambda x: theirs.dropout(x, P) + x.detach(),
        lambda x: ours.dropout_add(x, x.detach(), P),
        forward=3,
    ),
}
ELEMENTS = {"cpu": (2**20, 2**22), "cuda": (2**22, 2**26)}
# Of what a copy reaches in the same process, for tensors beyond L2.
COPY_GOAL = 0.85
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Cell:
    operation: str
    numel: int
    dtype: str
    both: bool  # the backward pass too

    @property
    def name(self) -> str:
        passes = "forward+backward" if self.both else "forward"
        return f"{self.operation} {self.numel >> 20}M {self.dtype} {passes}"

    @property
    def bytes_moved(self) -> int:
        """The fewest bytes that one call can read and write."""
        operation = OPERATIONS[self.operation]
        tensors = operation.forward + (operation.backward if self.both else 0)
        return tensors * self.numel * DTYPES[self.dtype].itemsize

    def calls(self, device: str) -> dict[str, Callable[[], Any]]:
        shape = (16, 64, 32, self.numel >> 15)
        x = torch.randn(shape, device=device).to(DTYPES[self.dtype])
        x = x.contiguous(memory_format=torch.channels_last)
        grad = torch.randn_like(x)
        x.requires_grad_(self.both)

        def call(function: Call) -> Callable[[], Any]:
            if not self.both:
                return lambda: function(x)
            return lambda: torch.autograd.grad(function(x), x, grad)

        operation = OPERATIONS[self.operation]
        return {"torch": call(operation.torch), "braze": call(operation.braze)}


def cells(device: str) -> list[Cell]:
    return [
        Cell(operation, numel, dtype, both)
        for operation in OPERATIONS
        for numel in ELEMENTS[device]
        for dtype in DTYPES
        for both in (False, True)
    ]


def measure(cell: Cell, device: Cuda | None, bandwidth: float, seconds: float, row: Row) -> None:
    """One row."""
    floor = row["floor_us"] = cell.bytes_moved / bandwidth * 1e6
    if device is None:
        calls = cell.calls("cpu")
        calls["no reuse"] = without_reuse(calls["braze"])
        row.update(ratios(interleave(calls, seconds)))
        row["goal"] = OPERATIONS[cell.operation].goals[cell.both]
        return
    times = cuda_clock.measure(device, cell.calls("cuda"), seconds)
    ours, theirs = times["braze"], times["torch"]
    on_device = ours["device_us"] or ours["wall_us"]
    row.update(
        torch_us=theirs["wall_us"],
        braze_us=ours["wall_us"],
        device_us=on_device,
        ratio_min=theirs["wall_min_us"] / ours["wall_min_us"],
        ratio_median=theirs["wall_us"] / ours["wall_us"],
        gb_s=cell.bytes_moved / on_device / 1e3,
        copy_gb_s=bandwidth / 1e9,
    )
    row["of_copy"] = share = floor / row["device_us"]
    if cell.numel == max(ELEMENTS["cuda"]) and not cell.both:
        text = f"{cell.name}: at least {COPY_GOAL} of a copy"
        row["goals"] = [goal(text, share, share >= COPY_GOAL)]


COLUMNS = (
    "name:<38 torch_us:11.1f braze_us:11.1f no_reuse_us:12.1f ratio_min:11.2f ratio_median:13.2f goal:6.0f "
    "floor_us:10.1f gb_s:8.0f of_copy:9.2f"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    rows.add_options(parser, ("cpu", "cuda"), 1.0)


def run(arguments: argparse.Namespace) -> int:
    """Measures row by row. Returns :func:`rows.run`'s code."""
    every = {cell.name: cell for cell in cells(arguments.device)}
    chosen = rows.choose(list(every), arguments.only)
    cuda_clock.prepare(arguments)
    device = Cuda() if arguments.device == "cuda" else None
    bandwidth = stream_bandwidth() if device is None else device.copy_bandwidth()
    where = f"{torch.get_num_threads()} threads" if device is None else device.facts()["name"]
    result: dict[str, Any] = {"build": braze.build_info(), "where": where}
    result["bandwidth_gb_s"] = bandwidth / 1e9
    print(f"{where}, {bandwidth / 1e9:.1f} GB/s, p = {P}\n{table.header(COLUMNS)}")

    def work(cell: Cell) -> Work:
        return Work(cell.name, lambda row: measure(cell, device, bandwidth, arguments.seconds, row))

    return rows.run(
        [work(every[name]) for name in chosen],
        arguments,
        result,
        lambda row: table.line(row, COLUMNS),
    )
