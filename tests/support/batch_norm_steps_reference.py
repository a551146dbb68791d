"""The steps that the batch-norm operators are made of, in torch's operations and any dtype."""

from __future__ import annotations

import batch_norm_reference as reference
import torch
from activations import NAMES
from batch_norm_reference import per_channel
from op_table import FP32, Args
from torch import Tensor


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else FP32


def comparable(stats: Tensor) -> list[Tensor]:
    """mean, invstd, scale and bias: mean and shift are rounded numbers, whose rests are in other rows."""
    if stats.numel() == 0:
        return []
    mean, low, invstd, scale, shift = stats.double()
    return [t.to(stats.dtype) for t in (mean + low, invstd, scale, shift + low * scale)]


def exact_stats(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> list[Tensor]:
    invstd = (var + eps).rsqrt()
    scale = invstd if weight is None else invstd * weight
    return [mean, invstd, scale, torch.zeros_like(mean) if bias is None else bias.to(mean.dtype)]


def moments(x: Tensor) -> Tensor:
    wide = x.to(arithmetic(x.dtype))
    dims = list(reference.over_pixels(x))
    count = x.numel() // x.shape[1]
    if count == 0:
        return wide.new_zeros(3, x.shape[1])
    mean = wide.mean(dims)
    m2 = (wide - per_channel(mean, x)).square().sum(dims)
    return torch.stack([mean, m2, torch.full_like(mean, count)])


def stats_of(x: Tensor, args: Args, training: bool, eps: float) -> list[Tensor]:
    weight, bias, running_mean, running_var, _ = args
    if not training:
        return exact_stats(running_mean, running_var, weight, bias, eps)
    mean, m2, count = moments(x)
    return exact_stats(mean, m2 / count.clamp(min=1), weight, bias, eps)


def forward(*args: object) -> list[Tensor]:
    """y, and the comparable statistics of both sides."""
    a = list(args)
    x, channels, momentum, eps, x2, channels2, momentum2, eps2 = (
        a[0],
        a[1:6],
        a[6],
        a[7],
        a[8],
        a[9:14],
        *a[14:16],
    )
    residual, training, activation, parameter, _ = a[16:]
    result = stats_of(x, channels, training, eps)
    z = reference.normalize(x, *channels, momentum, eps, training)
    if x2 is not None:
        result += stats_of(x2, channels2, training, eps2)
        z = z + reference.normalize(x2, *channels2, momentum2, eps2, training)
    z = z if residual is None else z + residual
    return [reference.ACTIVATIONS[NAMES[activation]](z, parameter), *result]


def combine(parts: Tensor, x: Tensor, *args: object) -> list[Tensor]:
    weight, bias, running_mean, running_var, tracked, momentum, eps = args
    means, m2s, counts = parts.unbind(1)
    n = counts.sum(0)
    mean = (means * counts).sum(0) / n
    m2 = (m2s + counts * (means - mean).square()).sum(0)
    if tracked is not None:
        tracked.add_(1)
        momentum = 1.0 / float(tracked) if momentum is None else momentum
        for running, value in ((running_mean, mean), (running_var, m2 / (n - 1))):
            running.copy_((1 - momentum) * running + momentum * value)
    return exact_stats(mean, m2 / n, weight, bias, eps)


def z_of(x: Tensor, stats: Tensor) -> Tensor:
    mean, _, _, scale, shift = (per_channel(row, x) for row in stats)
    return (x - mean) * scale + shift


def apply(
    x: Tensor, stats: Tensor, residual: Tensor | None, activation: int, parameter: float
) -> Tensor:
    z = z_of(x, stats) if residual is None else z_of(x, stats) + residual
    return reference.ACTIVATIONS[NAMES[activation]](z, parameter).to(x.dtype)


def d_of(
    grad: Tensor, z: Tensor, mask: Tensor | None, x: Tensor, activation: int, parameter: float
) -> Tensor:
    if mask is not None:
        return grad * reference.slopes(mask, x, NAMES[activation], parameter)
    return grad * reference.derivative(z, NAMES[activation], parameter)


def centred(x: Tensor, stats: Tensor) -> Tensor:
    return x - per_channel(stats[0], x) - per_channel(stats[1], x)


def reduce(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: int,
    parameter: float,
) -> Tensor:
    z = z_of(x, stats) if residual is None else z_of(x, stats) + residual
    d = d_of(grad, z, mask, x, activation, parameter)
    dims = list(reference.over_pixels(x))
    return torch.stack([d.sum(dims), (d * centred(x, stats)).sum(dims)]).to(stats.dtype)


def dx_of(d: Tensor, x: Tensor, stats: Tensor, sums: Tensor, count: Tensor | float) -> Tensor:
    _, _, invstd, scale, _ = (per_channel(row, x) for row in stats)
    grad, grad_input = (per_channel(row, x) for row in sums / count)
    return (scale * (d - grad - centred(x, stats) * invstd.square() * grad_input)).to(x.dtype)


def input_grad(grad: Tensor, x: Tensor, stats: Tensor, coefficients: Tensor) -> Tensor:
    on_grad, on_input, constant = (per_channel(row, x) for row in coefficients)
    return (grad * on_grad + (x - per_channel(stats[0], x)) * on_input + constant).to(x.dtype)


def apply_grad(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    sums: Tensor,
    count: Tensor,
    activation: int,
    parameter: float,
    need_residual: bool,
) -> list[Tensor]:
    z = z_of(x, stats) if residual is None else z_of(x, stats) + residual
    d = d_of(grad, z, mask, x, activation, parameter)
    return [dx_of(d, x, stats, sums, count), d.to(x.dtype) if need_residual else x.new_empty(0)]


def backward(
    grad: Tensor,
    grad2: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    x2: Tensor | None,
    weight2: Tensor | None,
    stats2: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    training: bool,
    activation: int,
    parameter: float,
    wanted: list[bool],
) -> list[Tensor]:
    z = z_of(x, stats)
    if x2 is not None and stats2 is not None:
        z = z + z_of(x2, stats2)
    z = z if residual is None else z + residual
    d = d_of(grad if grad2 is None else grad + grad2, z, mask, x, activation, parameter)
    dims = list(reference.over_pixels(x))
    result: list[Tensor] = []
    for side, (t, w, s) in enumerate(((x, weight, stats), (x2, weight2, stats2))):
        ask = wanted[3 * side : 3 * side + 3]
        vectors = x.new_empty(0, dtype=stats.dtype if w is None else w.dtype)
        if t is None or s is None:
            result += [x.new_empty(0), vectors, vectors]
            continue
        sums = torch.stack([d.sum(dims), (d * centred(t, s)).sum(dims)]).to(s.dtype)
        count = max(t.numel() // t.shape[1], 1)
        dx = dx_of(d, t, s, sums, count) if training else (d * per_channel(s[3], t)).to(t.dtype)
        found = [dx, (sums[1] * s[2]).to(vectors.dtype), sums[0].to(vectors.dtype)]
        empty = [x.new_empty(0), vectors, vectors]
        result += [f if asked else e for f, e, asked in zip(found, empty, ask, strict=True)]
    return [*result, d.to(x.dtype) if wanted[6] else x.new_empty(0)]
