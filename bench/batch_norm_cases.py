"""What the batch-norm benchmarks run: ResNet-50's layers, and the two modules that compute the same."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import braze.nn
import torch
from torch import Tensor, nn

from .resnet50 import convolutions

Call = Callable[[], Any]
# How often an activation is read or written at the least: forward x, x, y; backward x and dy twice, dx.
PASSES = {"forward": 3, "backward": 5}
# A residual join also reads the residual and writes its gradient.
JOIN_PASSES = {"forward": 4, "backward": 6}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "silu": lambda: nn.SiLU(inplace=True),
}


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

    def shape(self, batch: int) -> tuple[int, int, int, int]:
        return batch, self.channels, self.side, self.side


def resnet50_layers() -> tuple[Layer, ...]:
    """Its 53 batch norms for 224 x 224 images, by shape, the largest first."""
    counts = Counter((c.outputs, c.out) for c in convolutions())
    joins = Counter((c.outputs, c.out) for c in convolutions() if c.joins)
    layers = [Layer(*shape, n, joins[shape]) for shape, n in counts.items()]
    return tuple(sorted(layers, key=lambda layer: -layer.channels * layer.side**2))


# Of every size: beyond the caches, in the last level, in the second.
QUICK = ("256x56x56", "512x28x28", "256x14x14", "512x7x7")


@dataclass(frozen=True)
class Case:
    """One configuration that all layers run in; ``join``: act(bn(x) + residual)."""

    dtype: str
    layout: str
    activation: str
    batch: int
    join: bool = False

    @property
    def name(self) -> str:
        join = "add+" if self.join else ""
        return f"{self.dtype} {self.layout} {join}{self.activation} N={self.batch}"

    def bytes_moved(self, layer: Layer, direction: str) -> int:
        """The fewest bytes that one forward or backward can read and write."""
        passes = (JOIN_PASSES if self.join else PASSES)[direction]
        return passes * self.bytes_of(layer)

    def layers_of(self, layers: Iterable[Layer]) -> list[Layer]:
        """Those that there are in this configuration, as often as there are."""
        if not self.join:
            return list(layers)
        return [replace(layer, count=layer.joins) for layer in layers if layer.joins]

    def input(self, layer: Layer, device: str) -> Tensor:
        x = torch.randn(layer.shape(self.batch), device=device).to(DTYPES[self.dtype])
        return x.contiguous(memory_format=LAYOUTS[self.layout])

    def bytes_of(self, layer: Layer) -> int:
        return torch.Size(layer.shape(self.batch)).numel() * DTYPES[self.dtype].itemsize


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


def modules(case: Case, channels: int, device: str) -> dict[str, nn.Module]:
    """torch's and braze's, with the same parameters (fp32, as under autocast)."""
    theirs = Eager(channels, case.activation).to(device)
    ours = braze.nn.BatchNormAct2d(channels, activation=case.activation).to(device)
    ours.load_state_dict(theirs.bn.state_dict())
    return {"torch": theirs, "braze": ours}


def _forward(module: nn.Module, inputs: list[Tensor]) -> Call:
    return lambda: module(*inputs)


def _backward(module: nn.Module, inputs: list[Tensor], dy: Tensor) -> Call:
    y = module(*inputs)
    wanted = [*inputs, *module.parameters()]
    return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)


def contenders(case: Case, layer: Layer, direction: str, device: str) -> dict[str, Call]:
    """Both on the same input (and gradient), as a training step has them: the graph is recorded."""
    inputs = [case.input(layer, device).requires_grad_() for _ in range(1 + case.join)]
    both = modules(case, layer.channels, device)
    if direction == "forward":
        return {name: _forward(module, inputs) for name, module in both.items()}
    dy = case.input(layer, device)
    return {name: _backward(module, inputs, dy) for name, module in both.items()}


def stored_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes of all memory that a forward keeps for backward, parameters and x's own layer aside."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    del y
    return sum(kept.values())


def stored(case: Case, layer: Layer, device: str) -> dict[str, int]:
    """What batch norm + activation store in front of a convolution, which stores its own input."""
    result = {}
    for name, module in modules(case, layer.channels, device).items():
        convolution = nn.Conv2d(layer.channels, 8, 1, device=device, dtype=DTYPES[case.dtype])
        x = case.input(layer, device).requires_grad_()
        result[name] = stored_bytes(nn.Sequential(module, convolution), x)
    return result


def summed(rows: Sequence[dict[str, Any]], *keys: str) -> dict[str, Any]:
    """Over the network's layers, each shape as often as it has it."""
    sums = {key: math.fsum(row[key] * row["count"] for row in rows) for key in keys}
    return {"layer": "sum", "count": sum(row["count"] for row in rows), **sums}


def select(layers: Iterable[Layer], quick: bool) -> list[Layer]:
    """All, or the few that stand for all."""
    return [layer for layer in layers if not quick or layer.name in QUICK]
