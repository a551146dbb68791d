"""Parameters, gradients and optimizers for the accumulation tests."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import braze.optim
import torch
from torch import Tensor
from torch.nn import Parameter

SHAPES = ((5, 3), (7,), (), (0,), (2, 3, 4))
KINDS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1},
    "SGD+momentum": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "Adam": {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True},
    "AdamW": {"lr": 0.01, "l1": 1e-3, "maximize": True},
}
TORCH_FLAGS: tuple[dict[str, Any], ...] = ({}, {"foreach": True})


def build(kind: str, params: list[Parameter], **extra: Any) -> Any:
    return getattr(braze.optim, kind.split("+")[0])(params, **{**KINDS[kind], **extra})


def parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def gradients(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(dtype) for s in SHAPES]


def put(params: list[Parameter], grads: list[Tensor]) -> None:
    for p, g in zip_longest(params, grads):
        p.grad = None if g is None else g.clone()


def assert_close(a: list[Parameter], b: list[Parameter], tolerance: float = 1e-6) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def assert_same(a: list[Parameter], b: list[Parameter]) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)
