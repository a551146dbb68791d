"""What the operators of batch norms and convolutions return without the numbers, for FakeTensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from braze._native import _C

# Rows of the arrays [rows, C] that operators hand to each other; csrc/plan/batch_norm.h.
_STATS, _MOMENTS, _SUMS, _COEFFICIENTS = 5, 3, 2, 3
_LAST = torch.channels_last
_SLOPES = tuple(_C.ACTIVATION_SLOPES.values())


def _is_dense(tensor: Tensor, channels_last: bool) -> bool:
    dims = [*range(2, tensor.dim())]
    order = [0, *dims, 1] if channels_last else [0, 1, *dims]
    expected = 1
    for d in reversed(order):
        if tensor.size(d) != 1 and tensor.stride(d) != expected:
            return False
        expected = expected * tensor.size(d)
    return True


def _like(x: Tensor) -> Tensor:
    """Dense, in the order of ``x`` where the kernels know it."""
    if _is_dense(x, False) or _is_dense(x, True):
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=suggest_memory_format(x))


def _arithmetic(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _array(x: Tensor, *sizes: int) -> Tensor:
    return x.new_empty(sizes, dtype=_arithmetic(x))


def _mask(x: Tensor, wanted: bool) -> Tensor:
    if not wanted:
        return x.new_empty((0,), dtype=torch.uint8)
    n, c = x.size(0), x.size(1)
    spatial = math.prod(x.shape[2:])
    last = c > 1 and (spatial == 1 or not _is_dense(x, False))
    rows, row = (n * spatial, c) if last else (n * c, spatial)
    return x.new_empty((rows * ((row + 7) // 8),), dtype=torch.uint8)


def forward(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    input2, residual = arguments[7], arguments[15]
    _, activation, _, save_mask = arguments[16:]
    c = input.size(1)
    stats2 = _array(input, 0) if input2 is None else _array(input, _STATS, c)
    y, mask = apply(input, input, residual if save_mask else None, activation, 0.0)
    return y, _array(input, _STATS, c), stats2, mask


def backward(
    grad: Tensor,
    grad2: Tensor | None,
    input: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    input2: Tensor | None,
    weight2: Tensor | None,
    stats2: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    training: bool,
    activation: int,
    parameter: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    def vector(wanted: bool, parameter_of: Tensor | None) -> Tensor:
        dtype = _arithmetic(input) if parameter_of is None else parameter_of.dtype
        return input.new_empty((input.size(1) if wanted else 0,), dtype=dtype)

    def image(wanted: bool) -> Tensor:
        return _like(input) if wanted else input.new_empty((0,))

    x, w, b, x2, w2, b2, r = output_mask
    return (
        image(x),
        vector(w, weight),
        vector(b, weight),
        image(x2),
        vector(w2, weight2),
        vector(b2, weight2),
        image(r),
    )


def moments(input: Tensor) -> Tensor:
    return _array(input, _MOMENTS, input.size(1))


def combine(moments: Tensor, input: Tensor, *norm: Any) -> Tensor:
    return _array(input, _STATS, input.size(1))


def apply(
    input: Tensor, stats: Tensor, residual: Tensor | None, activation: int, parameter: float
) -> tuple[Tensor, Tensor]:
    y = _like(input)
    return y, _mask(y, residual is not None and _SLOPES[activation] == "two")


def reduce(grad: Tensor, input: Tensor, *_: Any) -> Tensor:
    return _array(input, _SUMS, input.size(1))


def apply_grad(grad: Tensor, input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    need_residual = arguments[-1]
    return _like(input), _like(input) if need_residual else input.new_empty((0,))


def input_grad(grad: Tensor, input: Tensor, *_: Any) -> Tensor:
    return _like(input)


def conv_forward(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    weight, stride, padding = arguments[3:6]
    kernel = weight.size(2)
    size = ((d + 2 * padding - kernel) // stride + 1 for d in input.shape[2:])
    y = input.new_empty((input.size(0), weight.size(0), *size)).to(memory_format=_LAST)
    return y, _array(y, _STATS, y.size(1))


def conv_input_grad(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, input, _, norm_weight, _, _, size, _, _ = arguments[3:]
    dx = grad.new_empty((grad.size(0), weight.size(1), *size)).to(memory_format=_LAST)
    c = 0 if input is None else dx.size(1)
    rows = _array(grad, 0 if input is None else _COEFFICIENTS, c)
    vector = _array(grad, c) if input is None or norm_weight is None else norm_weight.new_empty(c)
    return dx, rows, vector, torch.empty_like(vector)


def conv_weight_grad(input: Tensor, *arguments: Any) -> Tensor:
    grad, kernel, wide = arguments[3], arguments[7], arguments[10]
    dw = input.new_empty((grad.size(1), input.size(1), kernel, kernel)).to(memory_format=_LAST)
    return dw.float() if wide else dw


def register() -> None:
    for name, function in (
        ("batch_norm_act_forward", forward),
        ("batch_norm_act_backward", backward),
        ("batch_norm_moments", moments),
        ("batch_norm_combine", combine),
        ("batch_norm_apply", apply),
        ("batch_norm_reduce", reduce),
        ("batch_norm_apply_grad", apply_grad),
        ("batch_norm_input_grad", input_grad),
        ("conv_norm_forward", conv_forward),
        ("conv_norm_input_grad", conv_input_grad),
        ("conv_norm_weight_grad", conv_weight_grad),
    ):
        torch.library.register_fake(f"braze::{name}", function)
