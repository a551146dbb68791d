"""Whole models side by side: what is measured, and the contenders that compute the same."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import braze
import torch
from torch import Tensor, nn

from . import models

Call = Callable[[], Tensor]
DTYPES = ("fp32", "bf16")
LAYOUTS = ("NHWC", "NCHW")
CAST = "bf16 cast"
# Steps of a compiled model that may go by before two in a row take the same time.
_UNSETTLED = 12


@dataclass(frozen=True)
class Cell:
    """``dtype``: fp32, bf16 (fp32 parameters under autocast) or bf16 cast (bf16 parameters)."""

    model: str
    batch: int
    dtype: str
    size: int = 224
    device: str = "cpu"

    @property
    def name(self) -> str:
        size = "" if self.size == 224 else f" {self.size}px"
        device = "" if self.device == "cpu" else f" {self.device}"
        return f"{self.model} N={self.batch} {self.dtype}{size}{device}"


@dataclass(frozen=True)
class Contender:
    """``who``: eager, braze (through :func:`braze.fuse`) or compile (``torch.compile``)."""

    who: str
    layout: str

    @property
    def name(self) -> str:
        return f"{self.who} {self.layout}"


def contenders(layouts: tuple[str, ...], compiled: bool) -> list[Contender]:
    """eager and braze in each layout; torch.compile in the first, which is channels last if that is there."""
    found = [Contender(who, layout) for layout in layouts for who in ("eager", "braze")]
    return found + ([Contender("compile", layouts[0])] if compiled else [])


def _formatted(tensor: Tensor, layout: str) -> Tensor:
    if layout == "NCHW":
        return tensor.contiguous()
    last = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    return tensor.contiguous(memory_format=last)


def build(cell: Cell, contender: Contender, source: nn.Module, training: bool) -> nn.Module:
    """A copy of ``source`` as the contender runs it."""
    model = copy.deepcopy(source).train(training).to(cell.device)
    if cell.dtype == CAST:
        model = model.bfloat16()
    if contender.who == "braze":
        return braze.fuse(model, channels_last=contender.layout == "NHWC")
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() in (4, 5):
            tensor.data = _formatted(tensor.data, contender.layout)
    if contender.who == "compile":
        return cast(nn.Module, torch.compile(model))
    return model


def images(cell: Cell, layout: str) -> Tensor:
    """The same for every contender."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        x = models.example(cell.model, cell.batch, cell.size)
    return _formatted(x.to(cell.device, torch.bfloat16 if cell.dtype == CAST else None), layout)


def waiting(call: Call, device: str) -> Call:
    """The call, ended when the device is done with it."""
    if device == "cpu":
        return call

    def wait() -> Tensor:
        result = call()
        torch.cuda.synchronize()
        return result

    return wait


def autocast(cell: Cell) -> contextlib.AbstractContextManager[object]:
    if cell.dtype != "bf16":
        return contextlib.nullcontext()
    return torch.autocast(cell.device, torch.bfloat16)


def settle(call: Callable[[], object]) -> float:
    """Calls until two calls in a row take the same time within a quarter.

    Returns:
        Seconds that the calls before took longer than the last one: what compiling costs.
    """
    spent: list[float] = []
    while len(spent) < _UNSETTLED:
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
        if len(spent) > 2 and abs(spent[-1] - spent[-2]) < 0.25 * spent[-1]:
            break
    return sum(spent) - len(spent) * spent[-1]
