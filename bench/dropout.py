"""Dropout against torch's, alone and fused with an activation or a sum, forward and with its backward pass.

Floor: the tensors that must be read and written. no reuse: braze in malloc's memory, as torch's results are;
beyond 32 MB that is fresh pages.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from braze.nn import _dropout_functional as ours
from torch import Tensor
from torch.nn import functional as theirs

from .clock import Call
from .harness import DTYPES, Built, Case, Part, Setting, Suite
from .memory import without_reuse
from .peers import compiled
from .rows import Row, goal
from .session import commands

Function = Callable[[Tensor], Tensor]
P = 0.5


@dataclass(frozen=True)
class Operation:
    """``forward``, ``backward``: the fewest tensors read or written."""

    torch: Function
    braze: Function
    forward: int = 2
    backward: int = 2


OPERATIONS = {
    "dropout": Operation(lambda x: theirs.dropout(x, P), lambda x: ours.dropout(x, P)),
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
# On CUDA, of what a copy reaches in the same run, for tensors beyond L2.
COPY_GOAL = 0.85


def check(name: str, x: Tensor) -> float | None:
    """Masks differ; means and spreads of both results may not, beyond what chance allows. Returns None.

    Raises:
        RuntimeError: braze's result is of another distribution than torch's.
    """
    operation = OPERATIONS[name]
    results = [f(x.detach()).double() for f in (operation.braze, operation.torch)]
    for what, of in (("mean", torch.mean), ("standard deviation", torch.std)):
        a, b = (float(of(result)) for result in results)
        # Of two means of n elements, or of as many as there are channels; seven sigma.
        n = x.numel() if name != "dropout2d" else x.shape[0] * x.shape[1]
        if abs(a - b) > 7 * float(results[1].std()) * (2 / n) ** 0.5:
            raise RuntimeError(f"the {what} of braze's results is {a:.4g}, of torch's {b:.4g}")
    return None


def build(name: str, numel: int, dtype: str, both: bool, setting: Setting) -> Built:
    x = torch.randn((16, 64, 32, numel >> 15), device=setting.device).to(DTYPES[dtype])
    x = x.contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(x)
    x.requires_grad_(both)

    def call(function: Function) -> Call:
        if not both:
            return lambda: function(x)
        return lambda: torch.autograd.grad(function(x), x, grad)

    operation = OPERATIONS[name]
    calls = {"torch": call(operation.torch), "braze": call(operation.braze)}
    makers: dict[str, Callable[[], Call]] = {
        "torch": lambda: calls["torch"],
        "braze": lambda: calls["braze"],
    }
    if setting.device == "cpu":
        makers["braze, no reuse"] = lambda: without_reuse(calls["braze"])
    makers |= compiled(setting.against, calls["torch"])
    return Built(makers, lambda: check(name, x))


def _goals(share_of: bool, row: Row) -> list[dict[str, Any]]:
    if not share_of:
        return []
    share = row["of_floor"]
    return [goal(f"{row['name']}: at least {COPY_GOAL} of a copy", share, share >= COPY_GOAL)]


def cases(arguments: argparse.Namespace) -> list[Case]:
    sizes = ELEMENTS[arguments.device]
    found = []
    for name, operation in OPERATIONS.items():
        for numel in sizes:
            for dtype in ("fp32", "bf16"):
                for both in (False, True):
                    direction = "forward+backward" if both else "forward"
                    tensors = operation.forward + (operation.backward if both else 0)
                    part = Part(
                        partial(build, name, numel, dtype, both),
                        tensors * numel * DTYPES[dtype].itemsize,
                    )
                    tags = {
                        "operation": name,
                        "dtype": dtype,
                        "elements": numel,
                        "direction": direction,
                    }
                    title = f"{name} {numel >> 20}M {dtype} {direction}"
                    quick = numel == sizes[1] and name in ("dropout", "relu", "add")
                    judged = arguments.device == "cuda" and numel == sizes[1] and not both
                    goals = partial(_goals, judged)
                    found.append(Case(title, tags, (part,), quick, goals))
    return found


SUITE = Suite("dropout", cases, 1.0, {"cpu": "warm", "cuda": "device"})
add_arguments, run = commands(SUITE)
