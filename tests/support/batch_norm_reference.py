"""Batch norm + activation in torch's operations, differentiable, in any dtype; and arguments for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from activations import (  # noqa: F401  (others take some from here)
    ACTIVATIONS,
    CASES,
    KINKS,
    PARAMETERS,
    TWO_SLOPES,
)
from op_table import FP32, Args, one_number, values
from torch import Tensor

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def normalize(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    training: bool,
) -> Tensor:
    """What torch's modules do."""
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(num_batches_tracked)
    if not training:
        momentum = 0.0
    return F.batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum or 0.0, eps
    )


def batch_norm_act(*args: Any) -> Tensor:
    activation, parameter, residual = args[9:12]
    z = normalize(*args[:9])
    if residual is not None:
        z = z + residual
    return ACTIVATIONS[activation](z, parameter)


def batch_norm_act_fork(*args: Any) -> tuple[Tensor, Tensor]:
    y = batch_norm_act(*args)
    return y, y.clone()


def batch_norm_add_act(*args: Any) -> Tensor:
    first, second = args[:8], args[8:16]
    training, activation, parameter = args[16:]
    z = normalize(*first, training) + normalize(*second, training)
    return ACTIVATIONS[activation](z, parameter)


def batch_norm_add_act_fork(*args: Any) -> tuple[Tensor, Tensor]:
    y = batch_norm_add_act(*args)
    return y, y.clone()


@dataclass(frozen=True)
class Config:
    """One call of batch_norm_act."""

    shape: tuple[int, ...] = (4, 5, 3, 7)
    activation: str = "relu"
    training: bool = True
    residual: bool = False
    last: bool = False  # channels last in memory
    affine: bool = True
    bias: bool = True
    running: bool = True
    momentum: float | None = 0.1
    wide: bool = False  # parameters and running statistics in fp32, whatever the input is
    mean: float = 0.5
    sigma: float = 1.5

    def with_(self, **changes: Any) -> Config:
        return replace(self, **changes)

    @property
    def name(self) -> str:
        words = ["x".join(map(str, self.shape)), self.activation]
        words += [w for w in ("residual", "last", "wide") if getattr(self, w)]
        words += [w for w in ("training", "affine", "bias", "running") if not getattr(self, w)]
        return "-".join([*words, *([] if self.momentum == 0.1 else [f"momentum={self.momentum}"])])


def activation_tensor(config: Config, seed: int, dtype: torch.dtype) -> Tensor:
    x = (values(config.shape, seed, torch.float64) * config.sigma + config.mean).to(dtype)
    if config.last and x.dim() in LAST:
        return x.contiguous(memory_format=LAST[x.dim()])
    if config.last:  # [N, C] and [N, C, L] have no memory format of their own
        return x.transpose(1, -1).contiguous().transpose(1, -1)
    return x


def channel_args(config: Config, dtype: torch.dtype, seed: int) -> Args:
    """weight, bias, running_mean, running_var, num_batches_tracked."""
    c = config.shape[1:2]
    vectors = FP32 if config.wide and dtype is not torch.float64 else dtype
    return [
        1.0 + 0.5 * values(c, seed, vectors) if config.affine else None,
        values(c, seed + 1, vectors) if config.affine and config.bias else None,
        config.mean + values(c, seed + 2, vectors) if config.running else None,
        values(c, seed + 3, vectors).square() + config.sigma**2 if config.running else None,
        one_number(3, torch.int64) if config.running else None,
    ]


def act_args(config: Config, dtype: torch.dtype) -> Args:
    """The arguments of batch_norm_act."""
    return [
        activation_tensor(config, 1, dtype),
        *channel_args(config, dtype, 10),
        config.momentum,
        1e-5,
        config.training,
        config.activation,
        PARAMETERS.get(config.activation, 0.0),
        activation_tensor(config.with_(mean=0.0), 2, dtype) if config.residual else None,
    ]


def add_act_args(config: Config, dtype: torch.dtype) -> Args:
    """The arguments of batch_norm_add_act."""
    other = config.with_(mean=-1.0, sigma=0.7)
    return [
        activation_tensor(config, 1, dtype),
        *channel_args(config, dtype, 10),
        config.momentum,
        1e-5,
        activation_tensor(other, 3, dtype),
        *channel_args(other, dtype, 20),
        config.momentum,
        1e-3,
        config.training,
        config.activation,
        PARAMETERS.get(config.activation, 0.0),
    ]


def near_kinks(z: Tensor, activation: str, tolerance: float) -> Tensor:
    """Where rounding may choose the other derivative."""
    close = torch.zeros_like(z, dtype=torch.bool)
    for kink in KINKS.get(activation, ()):
        close |= (z - kink).abs() < tolerance
    return close


def memory_order(x: Tensor) -> Tensor:
    """The elements as rows of memory: pixels of C values, or planes of spatial ones."""
    n, c = x.shape[:2]
    pixels = x.numel() // (n * c) if x.numel() else 0
    if is_last(x):
        return (
            x.transpose(1, -1).reshape(n * pixels, c)
            if x.dim() < 4
            else x.movedim(1, -1).reshape(-1, c)
        )
    return x.reshape(n * c, pixels)


def is_last(x: Tensor) -> bool:
    """Whether channels are innermost in memory, as braze reads a dense tensor."""
    return x.shape[1] > 1 and x.stride(1) == 1


def unpack_mask(mask: Tensor, x: Tensor) -> Tensor:
    """The bits of a mask in x's shape; a row starts a new byte, the lowest bit comes first."""
    rows = memory_order(torch.arange(x.numel(), device=x.device).as_strided(x.shape, x.stride()))
    weights = 2 ** torch.arange(8, device=mask.device, dtype=torch.uint8)
    by_row = mask.view(rows.shape[0], -1, 1).bitwise_and(weights).ne(0).flatten(1)
    in_memory = by_row[:, : rows.shape[1]].reshape(-1)
    return in_memory.as_strided(x.shape, x.stride())


def slopes(mask: Tensor, x: Tensor, activation: str, parameter: float) -> Tensor:
    """activation' from the mask of a two-slope activation."""
    upper, lower = CASES[activation].slopes or (1.0, 1.0)
    lower = parameter if lower is None else lower
    bits = unpack_mask(mask, x)
    return torch.where(bits, upper, lower).to(x.dtype)


def derivative(z: Tensor, activation: str, parameter: float) -> Tensor:
    leaf = z.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(ACTIVATIONS[activation](leaf, parameter).sum(), leaf)
    return slope


def per_channel(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view(1, -1, *([1] * (x.dim() - 2)))


def over_pixels(x: Tensor) -> Sequence[int]:
    return [d for d in range(x.dim()) if d != 1]
