"""Batch norm + activation (+ residual) over ResNet-50's layers, against torch eager.

Time of a training forward, and of a backward, of BatchNormAct2d against torch's BatchNorm2d and in-place
activation. A row is the sum over the network's batch norms, each shape as often as it has it. Floor: 3
(forward) or 5 (backward) passes over a layer, 4 and 6 with a residual. no reuse: braze in malloc's memory, as
torch's results are; beyond 32 MB that is fresh pages.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import braze.nn
import torch
from torch import Tensor, nn

from . import session
from .clock import Call
from .harness import DTYPES, LAYOUTS, Built, Case, Part, Setting, Suite
from .memory import without_reuse
from .resnet50 import convolutions
from .rows import Row, count, goal

# How often an activation is read or written at the least: forward x, x, y; backward x and dy twice, dx.
PASSES = {"forward": 3, "backward": 5}
# A residual join also reads the residual and writes its gradient.
JOIN_PASSES = {"forward": 4, "backward": 6}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "silu": lambda: nn.SiLU(inplace=True),
}
# On CUDA: of torch's time, and of a copy.
RATIO_GOALS, COPY_GOAL = {"forward": 1.6, "backward": 1.5}, 0.85
# Of every size: beyond the caches, in the last level, in the second.
QUICK = ("256x56x56", "512x28x28", "256x14x14", "512x7x7")


@dataclass(frozen=True)
class Layer:
    """``count`` layers of one shape, of which ``joins`` add a residual."""

    channels: int
    side: int
    count: int
    joins: int = 0

    @property
    def name(self) -> str:
        return f"{self.channels}x{self.side}x{self.side}"


def resnet50_layers() -> tuple[Layer, ...]:
    """Its 53 batch norms for 224 x 224 images, by shape, the largest first."""
    counts = Counter((c.outputs, c.out) for c in convolutions())
    joins = Counter((c.outputs, c.out) for c in convolutions() if c.joins)
    layers = [Layer(*shape, n, joins[shape]) for shape, n in counts.items()]
    return tuple(sorted(layers, key=lambda layer: -layer.channels * layer.side**2))


@dataclass(frozen=True)
class Kind:
    """One configuration that all layers run in; ``join``: act(bn(x) + residual)."""

    dtype: str
    layout: str
    activation: str
    batch: int = 8
    join: bool = False

    @property
    def name(self) -> str:
        join = "add+" if self.join else ""
        return f"{self.dtype} {self.layout} {join}{self.activation} N={self.batch}"

    def passes(self, direction: str) -> int:
        return (JOIN_PASSES if self.join else PASSES)[direction]

    def layers(self, quick: bool = False) -> list[Layer]:
        """Those that there are in this configuration, as often as there are."""
        layers = [layer for layer in resnet50_layers() if not quick or layer.name in QUICK]
        if not self.join:
            return layers
        return [replace(layer, count=layer.joins) for layer in layers if layer.joins]

    def numel(self, layer: Layer) -> int:
        return self.batch * layer.channels * layer.side**2

    def input(self, layer: Layer, device: str) -> Tensor:
        shape = (self.batch, layer.channels, layer.side, layer.side)
        x = torch.randn(shape, device=device).to(DTYPES[self.dtype])
        return x.contiguous(memory_format=LAYOUTS[self.layout])


class Eager(nn.Module):
    """What torch offers for act(bn(x) + residual)."""

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.act = ACTIVATIONS[activation]()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.bn(x)
        result: Tensor = self.act(y if residual is None else y + residual)
        return result


def _backward(module: nn.Module, inputs: list[Tensor], dy: Tensor) -> Call:
    y = module(*inputs)
    wanted = [*inputs, *module.parameters()]
    return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)


def build(kind: Kind, layer: Layer, direction: str, setting: Setting) -> Built:
    """All on the same input (and gradient), as a training step has them: the graph is recorded. Parameters are
    fp32, as under autocast."""
    device = setting.device
    inputs = [kind.input(layer, device).requires_grad_() for _ in range(1 + kind.join)]
    dy = kind.input(layer, device)

    def call(module: nn.Module) -> Call:
        module.to(device)
        if direction == "forward":
            return lambda: module(*inputs)
        return _backward(module, inputs, dy)

    def torchs() -> Call:
        return call(Eager(layer.channels, kind.activation))

    def ours() -> Call:
        return call(braze.nn.BatchNormAct2d(layer.channels, activation=kind.activation))

    makers: dict[str, Callable[[], Call]] = {"torch": torchs, "braze": ours}
    if setting.device == "cpu":
        makers["braze, no reuse"] = lambda: without_reuse(ours())
    if "compile" in setting.against:
        module: Any = torch.compile(Eager(layer.channels, kind.activation))
        makers["compile"] = lambda: call(module)
    return Built(makers)


def _goals(kind: Kind, direction: str, row: Row) -> list[dict[str, Any]]:
    if row["device"] != "cuda" or kind != CUDA_KINDS[0]:
        return []
    ratio, share, least = row["ratio"], row["of_floor"], RATIO_GOALS[direction]
    return [
        goal(f"{row['name']}: at least {least} x torch", ratio, ratio >= least),
        goal(f"{row['name']}: at least {COPY_GOAL} of a copy", share, share >= COPY_GOAL),
    ]


KINDS = tuple(
    Kind(dtype, layout, activation, join=join)
    for activation, join in (("relu", False), ("relu", True), ("silu", False))
    for layout in LAYOUTS
    for dtype in ("fp32", "bf16")
)
# Those with a goal come first: a run that is cut short has them.
CUDA_KINDS = (
    Kind("bf16", "NHWC", "relu", 256),
    Kind("bf16", "NHWC", "relu", 256, join=True),
    Kind("bf16", "NHWC", "silu", 256),
    Kind("fp32", "NHWC", "relu", 256),
    Kind("bf16", "NCHW", "relu", 256),
    Kind("fp32", "NCHW", "relu", 256),
    Kind("bf16", "NHWC", "relu", 32),
)


def cases(arguments: argparse.Namespace) -> list[Case]:
    kinds = CUDA_KINDS if arguments.device == "cuda" else KINDS
    if (batch := getattr(arguments, "batch", None)) is not None:
        kinds = tuple(dict.fromkeys(replace(kind, batch=batch) for kind in kinds))
    found = []
    for kind in kinds:
        size = DTYPES[kind.dtype].itemsize
        for direction in PASSES:
            parts = [
                Part(
                    partial(build, kind, layer, direction),
                    kind.passes(direction) * kind.numel(layer) * size,
                    needs=12 * kind.numel(layer) * size,
                    name=layer.name,
                    count=layer.count,
                )
                for layer in kind.layers(arguments.quick)
            ]
            tags = {
                "dtype": kind.dtype,
                "layout": kind.layout,
                "activation": kind.activation,
                "join": kind.join,
                "direction": direction,
                "batch": kind.batch,
            }
            quick = kind.layout == "NHWC" and kind.activation == "relu"
            goals = partial(_goals, kind, direction)
            # Sums of another order, and in 16 bits other roundings of what is summed.
            loose = {"fp32": 1e-3, "bf16": 5e-2}[kind.dtype]
            title = f"{kind.name} / {direction}"
            found.append(Case(title, tags, tuple(parts), quick, goals, loose))
    return found


SUITE = Suite("norm", cases, 0.4, {"cpu": "warm", "cuda": "cold"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=count, help="images (default 8; on CUDA 256 or 32)")
    session.add_options(parser, f"{SUITE.seconds:g}")


run = partial(session.run, (SUITE,))
