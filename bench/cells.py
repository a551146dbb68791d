"""What the optimizer benchmarks step: lists of tensor shapes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import braze.optim
import torch

from .resnet50 import convolutions

OPTIONS: dict[str, dict[str, float]] = {
    "SGD": {"lr": 1e-3, "momentum": 0.9},
    "Adam": {"lr": 1e-3},
    "AdamW": {"lr": 1e-3},
    "RMSprop": {"lr": 1e-3},
    "Lion": {"lr": 1e-4},
}
# Reads and writes of one parameter element, in elements: p, g and the state.
ELEMENTS_MOVED = {"SGD": 5, "Adam": 7, "AdamW": 7, "RMSprop": 5, "Lion": 5}

TORCH_MODES: dict[str, dict[str, bool]] = {
    "for-loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def torch_optimizers(name: str) -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """Constructors of what braze's class is measured against: the modes of torch's class, else its formula
    in torch's operators."""
    ours, theirs = getattr(braze.optim, name), getattr(torch.optim, name, None)
    if theirs is None:
        written = ours._torch_class
        return {"for-loop": lambda groups: written(groups, ours(groups, **OPTIONS[name]).defaults)}
    known = inspect.signature(theirs).parameters
    found = {}
    for mode, flags in TORCH_MODES.items():
        given = {flag: value for flag, value in flags.items() if flag in known}
        if given.items() >= {k: v for k, v in flags.items() if v}.items():
            found[mode] = _constructor(theirs, {**OPTIONS[name], **given})
    return found


def _constructor(cls: Any, options: dict[str, Any]) -> Callable[..., torch.optim.Optimizer]:
    return lambda groups, **extra: cls(groups, **options, **extra)


@dataclass(frozen=True)
class Cell:
    """One row: which tensors, and on the CPU what ratio (torch / braze) is the goal for Adam and for SGD."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    goal_adam: float = 0.0
    goal_sgd: float = 0.0
    group_each: bool = False

    @property
    def numel(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def bytes_moved(self, optimizer: str) -> int:
        """The fewest bytes that one step can read and write."""
        return self.bytes * ELEMENTS_MOVED[optimizer]


def _flat(name: str, numel: int, dtype: torch.dtype, goal: float, goal_sgd: float = 0.97) -> Cell:
    return Cell(name, ((numel,),), dtype, goal, goal_sgd)


def resnet50_shapes() -> tuple[tuple[int, ...], ...]:
    """ResNet-50's 161 parameters in the model's order: 53 convolutions, 53 batch norms, 1 linear layer."""
    shapes: list[tuple[int, ...]] = []
    for c in convolutions():
        shapes.extend([(c.outputs, c.inputs, c.kernel, c.kernel), (c.outputs,), (c.outputs,)])
    return (*shapes, (1000, 2048), (1000,))


CELLS = (
    Cell("1 x 64", ((64,),), torch.float32, 0.97, 0.97),
    Cell("1000 x 64", ((64,),) * 1000, torch.float32, 30, 15),
    Cell("200 x (64x64 + 64)", ((64, 64), (64,)) * 200, torch.float32, 8, 2.5),
    Cell("465 groups of 64", ((64,),) * 465, torch.float32, 30, 30, group_each=True),
    _flat("fp32 64K (in cache)", 2**16, torch.float32, 1.2),
    _flat("fp32 256K (in cache)", 2**18, torch.float32, 1.2),
    _flat("fp32 1M", 2**20, torch.float32, 0.97),
    _flat("fp32 16M", 2**24, torch.float32, 0.97),
    _flat("fp32 128M", 2**27, torch.float32, 0.97),
    _flat("bf16 64K", 2**16, torch.bfloat16, 2, 2),
    _flat("bf16 1M", 2**20, torch.bfloat16, 2, 2),
    _flat("bf16 16M", 2**24, torch.bfloat16, 2, 2),
    _flat("bf16 64M", 2**26, torch.bfloat16, 0.97),
    _flat("fp16 1M", 2**20, torch.float16, 0.97),
)
# The rows with a goal come first: a run that is cut short has them.
CUDA_CELLS = (
    Cell("1000 x 1024", ((1024,),) * 1000, torch.float32),
    Cell("ResNet-50", resnet50_shapes(), torch.float32),
    Cell("465 groups of 64", ((64,),) * 465, torch.float32, group_each=True),
    Cell("fp32 100M", ((100_000_000,),), torch.float32),
    Cell("bf16 100M", ((100_000_000,),), torch.bfloat16),
    *(cell for cell in CELLS if not cell.group_each),
)
